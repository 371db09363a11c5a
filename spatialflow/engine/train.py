# SPDX-License-Identifier: Apache-2.0
"""Training from files: `spatialflow.train` and the command `spatialflow train`."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from spatialflow.config import Config, given_fields, load_config, own_settings
from spatialflow.data.categories import Categories, CategoryError, categories_of, table_path
from spatialflow.data.cityscapes import Cityscapes
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.convert.formats import conversion_advice
from spatialflow.data.samples import SampleError
from spatialflow.data.subset import hold_out
from spatialflow.engine import distributed
from spatialflow.engine.checkpoint_store import TrainingError
from spatialflow.engine.checkpoints import CheckpointError
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.model_files import read_model_file
from spatialflow.engine.run_advice import advice, missing_photographs, spinning_threads
from spatialflow.engine.run_folder import check_replaced_files, describe_saved, only_run_in, write_config
from spatialflow.engine.run_settings import (
    CLASS_FIELDS,
    DEFAULT_MODEL,
    ClassTable,
    describe_settings,
    read_classes,
    with_classes,
    with_sizes_and_schedule,
)
from spatialflow.engine.trainer import InitialWeights, Trainer
from spatialflow.models.spatialflow import SpatialFlow

DataSet: TypeAlias = Cityscapes | CocoPanoptic

DEFAULT_RATE_PER_IMAGE = 0.005
"""Learning rate of `DEFAULT_MODEL` for a step of one image; in proportion for more."""

DEFAULT_WITH_BACKBONE = "spatialflow_r50_coco"
"""Configuration of a run that names a backbone alone."""

CHECKED_IMAGES = 4
"""Images to evaluate on that are read before the run."""

DEFAULT_VALIDATION_SHARE, LEAST_FOR_VALIDATION = 0.1, 20
"""Share of the images that a run without configuration and validation images evaluates on, from this many images on."""

_CONVERT_ADVICE = "annotations of other formats become a panoptic JSON by `spatialflow dataset convert`"

_logger = logging.getLogger("spatialflow")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Where the images of a run are: `images` and `annotations`, or `cityscapes`.

    Attributes:
        images, annotations, panoptic: photographs, COCO panoptic JSON, and the folder of its PNGs (None: beside it).
        validation_images, validation_annotations, validation_panoptic: the same, to evaluate on.
        cityscapes: a Cityscapes tree; its split val is evaluated on.
        validation_share: share of the images to evaluate on instead of training on them. None: 0.1 if nothing else is
            given, no configuration is named, and there are at least 20 images; else 0.
    """

    images: Path | None = None
    annotations: Path | None = None
    panoptic: Path | None = None
    validation_images: Path | None = None
    validation_annotations: Path | None = None
    validation_panoptic: Path | None = None
    cityscapes: Path | None = None
    validation_share: float | None = None

    def __post_init__(self) -> None:
        for first, second in (("images", "annotations"), ("validation_images", "validation_annotations")):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise TrainingError(f"{first} and {second} must be given together")
        if (self.cityscapes is None) == (self.images is None):
            raise TrainingError("give either images and annotations, or cityscapes")
        if self.cityscapes is not None and self.validation_images is not None:
            raise TrainingError("cityscapes and validation_images exclude each other: the tree has a split val")
        for folder, images in (("panoptic", "images"), ("validation_panoptic", "validation_images")):
            if getattr(self, folder) is not None and getattr(self, images) is None:
                raise TrainingError(f"{folder} needs {images}")
        if self.validation_share is None:
            return
        if not 0 <= self.validation_share < 1:
            raise TrainingError(
                f"validation_share must be from 0 up to, but not including, 1, got {self.validation_share}"
            )
        if self.validation_share and (self.validation_images or self.cityscapes) is not None:
            raise TrainingError(
                "validation_share excludes validation_images and cityscapes, which name images to evaluate on"
            )


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The end of a run.

    Attributes:
        network: the trained network, in evaluation mode, for `Predictor`.
        folder: of the run.
        steps: number of steps.
        scores: the last evaluation: `pq`, `pq_things` and `pq_stuff` from 0 to 1, `box_ap` and `mask_ap`; None without
            images to evaluate on.
        problems: messages about images or annotations that could not be used.
        broken_rules: number of annotations that break a rule and were used, by rule (docs/annotations.md).
    """

    network: SpatialFlow
    folder: Path
    steps: int
    scores: dict[str, Any] | None
    problems: tuple[str, ...]
    broken_rules: dict[str, int]

    @property
    def weights(self) -> Path:
        """The weights of the network, `model.safetensors`."""
        return self.folder / "model.safetensors"

    def __str__(self) -> str:
        """Describe the run in a few lines."""
        parts = [f"{self.steps} steps: {self.weights}"]
        if self.scores is not None:
            scores = self.scores
            parts.append(
                f"PQ {100 * scores['pq']:.2f} (things {100 * scores['pq_things']:.2f}, stuff "
                f"{100 * scores['pq_stuff']:.2f})"
            )
            precision = ((kind, scores.get(f"{kind}_ap", -1)) for kind in ("box", "mask"))
            parts += [f"{kind} AP {100 * value:.2f}" for kind, value in precision if value >= 0]  # -1: no ground truth
        if self.problems:
            parts.append(f"{len(self.problems)} images or annotations could not be used")
        if self.broken_rules:
            counts = ", ".join(f"{count} x {rule}" for rule, count in self.broken_rules.items())
            parts.append(f"contradictory annotations: {counts} (`spatialflow validate` lists all)")
        return "; ".join(parts)


class _Start(NamedTuple):
    """The network that a run begins with."""

    config: Config
    weights: Path | None
    categories: Categories | None  # of `weights`
    rate_per_image: float  # learning rate for a step of one image; in proportion for more


def train(
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str],
    validation_images: str | os.PathLike[str] | None = None,
    validation_annotations: str | os.PathLike[str] | None = None,
    validation_share: float | None = None,
    panoptic: str | os.PathLike[str] | None = None,
    validation_panoptic: str | os.PathLike[str] | None = None,
    cityscapes: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    backbone: str | os.PathLike[str] | None = None,
    ema: bool = False,
    device: str = "cpu",
    workers: int = 2,
    strict: bool = False,
    resume: bool | None = None,
    progress: bool = True,
    **overrides: Any,
) -> TrainingResult:
    """Train a network on photographs with COCO panoptic annotations, or continue the run of a folder.

    The classes are those of the annotation file. Without `config`, sizes and schedule follow from the images too, and
    what was chosen is printed.

    Args:
        images: folder of photographs.
        annotations: COCO panoptic JSON with `categories`.
        output: folder of the run, which is created.
        validation_images: photographs to evaluate on.
        validation_annotations: their JSON.
        validation_share: share of the images to evaluate on instead of training on them. None: 0.1 if there are no
            other images to evaluate on, no `config`, and at least 20 images; else 0.
        panoptic: PNGs of `annotations`; None: the folder beside the JSON with the same name.
        validation_panoptic: PNGs of `validation_annotations`.
        cityscapes: a Cityscapes tree, in place of images and annotations.
        config: configuration of the package, or YAML file.
        model: network to begin with: folder of a run, file of weights, or "demo". Its classes may differ. None: "demo"
            without `config` and `backbone`, else random weights.
        backbone: ImageNet weights with torchvision's names. Without `config`, the network is `spatialflow_r50_coco`.
        ema: take the moving average of the weights of `model`.
        device: "cpu" or "cuda".
        workers: number of processes that load data.
        strict: stop at an invalid image or annotation instead of skipping it.
        resume: continue from the folder's checkpoint. None: if there is one; True: it must exist; False: start over.
        progress: print what was chosen, and show the progress.
        overrides: fields of the configuration, for instance `epochs=20`.

    Returns:
        `TrainingResult`, with the network and its scores.

    Raises:
        TrainingError: arguments exclude each other; another process trains in `output`; a file in it that is not of a
            run would be replaced; or the run cannot start, continue or be resumed.
        KeyboardInterrupt: the run was interrupted; the message has what is saved.
        ConfigError: a field breaks a rule, or contradicts the annotation file.
        CategoryError, PanopticFormatError, CityscapesError: annotations cannot be used.
        CheckpointError: weights cannot be read, or do not fit.
        SampleError: an image cannot be used, in a strict run; or none can.
        OSError: a file cannot be written.
    """
    paths = {
        "images": images,
        "annotations": annotations,
        "panoptic": panoptic,
        "validation_images": validation_images,
        "validation_annotations": validation_annotations,
        "validation_panoptic": validation_panoptic,
        "cityscapes": cityscapes,
    }
    files = TrainingData(
        **{name: None if path is None else Path(path) for name, path in paths.items()},
        validation_share=validation_share,
    )
    if model is not None and backbone is not None:
        raise TrainingError("model and backbone exclude each other: a whole network's weights include the backbone's")
    if ema and model is None:
        raise TrainingError("ema needs model")
    start = _start(config, model, backbone, ema, overrides)
    group = distributed.join(device)
    configured, data, validation = _settings(start, files, config, overrides, group)
    if group.is_first:
        for text in missing_photographs(data):
            _logger.warning(text)
    if validation is not None:
        _check_readable(validation)
    folder = Path(output)
    with only_run_in(folder, group):
        if resume is None:
            check_replaced_files(folder, group)
        trainer = Trainer(
            configured,
            data,
            folder,
            group,
            validation=validation,
            initial_weights=InitialWeights(
                start.weights, None if backbone is None else Path(backbone), ema, start.categories
            ),
            workers=workers,
            strict=strict,
            progress=progress,
            resume=resume,
        )
        try:
            if group.is_first:
                if not trainer.is_complete:
                    write_config(trainer.config, trainer.folder)
                _announce(trainer, start, is_chosen=config is None, is_pretrained=backbone is not None, prints=progress)
            network = trainer.run().eval()
        except KeyboardInterrupt as stop:
            if group.is_first:
                stop.args = (describe_saved(trainer.store, trainer.total_steps),)
            raise
    rows = [] if trainer.log is None else trainer.log.rows
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    return TrainingResult(
        network,
        trainer.folder,
        trainer.step,
        evaluations[-1] if evaluations else None,
        tuple(trainer.reporter.problems),
        trainer.reporter.count_by_rule,
    )


def _start(
    config: str | os.PathLike[str] | None,
    model: str | os.PathLike[str] | None,
    backbone: str | os.PathLike[str] | None,
    ema: bool,
    overrides: dict[str, Any],
) -> _Start:
    """Choose the network that a run begins with."""
    if model is None and (config is not None or backbone is not None):
        named = DEFAULT_WITH_BACKBONE if config is None else _name_or_path(config)
        return _Start(load_config(named, **overrides), None, None, _rate(load_config(named)))
    file = read_model_file(_name_or_path(DEFAULT_MODEL if model is None else model), ema)
    own = file.description.config
    if config is not None:
        own = load_config(_name_or_path(config))
    if own is None:
        raise CheckpointError(f"{file.path}: holds no configuration; name the configuration of these weights")
    rate = DEFAULT_RATE_PER_IMAGE if model in (None, DEFAULT_MODEL) else _rate(own)
    known = file.description.config
    is_numbered = known is not None and known.data.categories is None  # the names are numbers, and say nothing
    categories = None if is_numbered else file.description.categories
    return _Start(load_config(own, **overrides), file.path, categories, rate)


def _rate(config: Config) -> float:
    return config.training.learning_rate / config.training.images_per_step


def _name_or_path(config: str | os.PathLike[str]) -> str | Path:
    return config if isinstance(config, str) else Path(config)


def _settings(
    start: _Start,
    files: TrainingData,
    named: str | os.PathLike[str] | None,
    overrides: dict[str, Any],
    group: ProcessGroup,
) -> tuple[Config, DataSet, DataSet | None]:
    """Complete the configuration from the data, and open the data.

    Args:
        start: its configuration has `overrides`.
        files: where the data are.
        named: the configuration that the user named, None if the whole configuration is chosen.
        overrides: of the user.
        group: the processes.
    """
    config, given = start.config, given_fields(overrides)
    classes = _classes(files, named is None)
    if classes is not None:
        own = {} if named is None else own_settings(_name_or_path(named))
        set_by_user = {name: value for name, value in (own | given).items() if name in CLASS_FIELDS}
        config = with_classes(config, classes, set_by_user)
    data, validation = _open(files, categories_of(config), is_chosen=named is None)
    if named is None and len(data):
        on_gpu = group.device.type == "cuda"
        config = with_sizes_and_schedule(config, data.sizes, given, start.rate_per_image, on_gpu, group.size)
    return config, data, validation


def _classes(files: TrainingData, are_needed: bool) -> ClassTable | None:
    """Read the classes of the annotations; None if the file has none, and they are not needed."""
    if files.annotations is None:
        return read_classes(table_path("cityscapes")) if are_needed else None
    for path in (files.annotations, files.validation_annotations):
        if path is not None:
            _check_is_file(path)
    try:
        return read_classes(files.annotations)
    except CategoryError as error:
        if are_needed:
            raise CategoryError(f"{error}; {_CONVERT_ADVICE}") from None
        return None  # the configuration has them; other defects of the file are reported when it is opened


def _check_is_file(path: Path) -> None:
    """Raise TrainingError for annotations that are absent, or a folder."""
    if not os.path.exists(path):
        raise TrainingError(f"{path}: no such file")
    if os.path.isdir(path):
        inside = path / "panoptic.json"
        is_inside = os.path.isfile(inside)
        hint = f", such as {inside}" if is_inside else ""
        text = f"{path}: is a folder; annotations must be a panoptic JSON{hint}"
        raise TrainingError(text if is_inside else conversion_advice(path) or text)


def _open(files: TrainingData, categories: Categories, is_chosen: bool) -> tuple[DataSet, DataSet | None]:
    """Open the images to train on, and those to evaluate on."""
    if files.cityscapes is not None:
        has_validation = os.path.isdir(files.cityscapes / "leftImg8bit" / "val")
        return (
            Cityscapes(files.cityscapes, "train", categories),
            Cityscapes(files.cityscapes, "val", categories) if has_validation else None,
        )
    assert files.images is not None and files.annotations is not None  # `TrainingData` has checked this
    data = _open_coco(files.annotations, files.images, files.panoptic, categories, False)
    if files.validation_images is not None and files.validation_annotations is not None:
        paths = (files.validation_annotations, files.validation_images, files.validation_panoptic)
        return data, _open_coco(*paths, categories, True)
    share = files.validation_share
    if share is None:
        share = DEFAULT_VALIDATION_SHARE if is_chosen and len(data) >= LEAST_FOR_VALIDATION else 0.0
    if not share:
        return data, None
    if len(data) < 2:
        raise TrainingError(f"validation_share needs at least 2 images, got {len(data)}")
    return hold_out(_open_coco(files.annotations, files.images, files.panoptic, categories, True), share)


def _open_coco(
    annotations: Path, images: Path, panoptic: Path | None, categories: Categories, scored: bool
) -> CocoPanoptic:
    data = CocoPanoptic(annotations, images, panoptic, categories, scored)
    for folder in (data.image_folder, data.panoptic_folder):
        if not os.path.isdir(folder):
            raise TrainingError(f"{folder}: no such folder")
    if len(data) and not any(os.path.isfile(data.image_path(index)) for index in range(len(data))):
        raise TrainingError(
            f"{images}: holds none of the {len(data)} photographs of {annotations}, such as {data.names[0]}; "
            f"name the folder that holds them"
        )
    return data


def _check_readable(validation: DataSet) -> None:
    """Raise TrainingError if none of a few images to evaluate on can be used; the first evaluation may come late."""
    errors = []
    for index in range(0, len(validation), max(len(validation) // CHECKED_IMAGES, 1)):
        try:
            validation[index]
        except SampleError as error:
            errors.append(str(error))
        else:
            return
    if errors:
        raise TrainingError(f"the images to evaluate on cannot be used, e.g. {errors[0]}")


def _announce(trainer: Trainer, start: _Start, is_chosen: bool, is_pretrained: bool, prints: bool) -> None:
    """Print what the run does, and give warnings about settings and data."""
    if trainer.is_complete:
        if prints:
            print(_run_line(trainer), flush=True)
        return
    data, validation = trainer.data, trainer.validation
    lines = []
    if is_chosen:
        names = [row.name for row in data.categories.rows]
        held_out = 0 if validation is None else len(validation)
        lines += describe_settings(trainer.config, names, len(data), held_out)
    lines.append(_run_line(trainer))
    if trainer.taken_weights is not None and trainer.step == 0:
        lines.append(trainer.taken_weights.describe(str(start.weights)))
    for line in lines:
        if prints:
            print(line, flush=True)
        else:
            _logger.info(line)
    warnings = advice(
        trainer.config, data, trainer.total_steps, validation is not None, is_pretrained or start.weights is not None
    )
    warnings += spinning_threads(trainer.process_group.device, trainer.workers)
    if trainer.store.changed_settings:
        changed = ", ".join(trainer.store.changed_settings)
        warnings.append(f"{trainer.folder}: continues with changed settings: {changed}")
    for text in warnings:
        _logger.warning(text)


def _run_line(trainer: Trainer) -> str:
    """Describe the size of a run, and where it starts."""
    per_epoch = trainer.schedule.steps_per_epoch
    size = f"{len(trainer.data)} images, {per_epoch} steps per epoch, step {trainer.step} of {trainer.total_steps}"
    if trainer.is_complete:
        place = "is complete, so nothing was changed; a larger epochs=N continues it, --restart starts over"
    elif trainer.step:
        place = "continues from its checkpoint"
    elif trainer.store.has_checkpoint():
        place = "starts over, and replaces the earlier run"
    else:
        place = "new run"
    return f"{size}: {trainer.folder}: {place}"
