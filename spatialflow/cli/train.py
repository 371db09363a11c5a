# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow train`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from spatialflow.cli.common import CommandError, add_path, check_count, print_error, set_threads
from spatialflow.cli.networks import add_ema_option, add_model_option, check_ema, configs_paragraph

if TYPE_CHECKING:
    from spatialflow.config import Config, ModelConfig
    from spatialflow.data.categories import Categories
    from spatialflow.data.cityscapes import Cityscapes
    from spatialflow.data.coco import CocoPanoptic
    from spatialflow.engine.trainer import Trainer

DataSet: TypeAlias = "Cityscapes | CocoPanoptic"

SUMMARY = "train a network; with torchrun on several GPUs or machines"
DESCRIPTION = (
    "Train on COCO panoptic data (--images, --annotations) or Cityscapes (--cityscapes). The same command, given\n"
    "again, resumes an interrupted run from its last checkpoint. docs/training.md describes data, configurations\n"
    "and resuming.\n\n" + configs_paragraph()
)
EXAMPLES = (
    "synthesize scenes --count 20 --size 256x384",
    "train demo epochs=5 --images scenes/images --annotations scenes/panoptic.json --output run",
    "train spatialflow_r50_cityscapes --cityscapes cityscapes --backbone r50.pth --device cuda --output run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="configuration of the package, or YAML file")
    add("settings", nargs="*", metavar="FIELD=VALUE", help="values of fields of the configuration, e.g. epochs=5")
    files = "checkpoint.pt, model.safetensors, log.jsonl, curves.png, ..."
    add_path(parser, "--output", "FOLDER", f"folder for {files}", required=True)
    _add_data_options(parser)
    add_model_option(
        parser,
        "fine-tune this network; layers whose shape depends on the classes start from random weights if the classes "
        "differ",
        dest="checkpoint",
    )
    add_ema_option(parser)
    add_path(parser, "--backbone", "FILE", "ImageNet weights with torchvision's names")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--workers", type=int, default=2, metavar="N", help="data loading processes (default: %(default)s)")
    add("--strict", action="store_true", help="stop at an invalid image or annotation instead of skipping it")
    add("--restart", action="store_true", help="start from the beginning and replace what the output folder has")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    for name, metavar, text in (
        ("images", "FOLDER", "photographs"),
        ("annotations", "JSON", "COCO panoptic JSON"),
        ("panoptic", "FOLDER", "PNGs of --annotations (default: the folder beside the JSON with the same name)"),
        ("validation-images", "FOLDER", "like --images, for evaluation"),
        ("validation-annotations", "JSON", "like --annotations, for evaluation"),
        ("validation-panoptic", "FOLDER", "like --panoptic, for evaluation"),
    ):
        add_path(parser, f"--{name}", metavar, text)
    text = "tree with leftImg8bit and gtFine: train on its split train, evaluate on its split val if present"
    add_path(parser, "--cityscapes", "FOLDER", text)


def run(options: argparse.Namespace) -> int:
    """Train, or resume a run; return the exit code."""
    from spatialflow.data.samples import SampleError
    from spatialflow.engine import distributed
    from spatialflow.engine.checkpoint_store import TrainingError
    from spatialflow.engine.checkpoints import CheckpointError
    from spatialflow.engine.trainer import InitialWeights, Trainer
    from spatialflow.panoptic import PanopticFormatError

    _check_options(options)
    config = _config(options)
    data, validation = _data(options, config)
    world = distributed.join(options.device)
    try:
        trainer = Trainer(
            config,
            data,
            options.output,
            world,
            validation=validation,
            initial_weights=InitialWeights(options.checkpoint, options.backbone, options.ema),
            workers=options.workers,
            strict=options.strict,
            progress=sys.stderr.isatty(),
            resume=not options.restart,
        )
        if world.is_first:
            _print_start(options, trainer, data, validation)
        try:
            trainer.run()
        except KeyboardInterrupt as stop:
            if os.path.isfile(trainer.store.path):
                stop.args = (f"run the same command again to continue from {trainer.store.path}",)
            raise
    except (TrainingError, CheckpointError, SampleError, PanopticFormatError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(
            f"{error.filename or options.output}: cannot be written: {error.strerror or error}"
        ) from None
    finally:
        distributed.leave()
    if world.is_first:
        print(_summary(trainer))
    distributed.end(world)
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Raise CommandError for options that exclude each other or do not fit this machine; set the CPU threads."""
    import torch

    check_count("--workers", options.workers, minimum=0)
    if options.checkpoint is not None and options.backbone is not None:
        raise CommandError(
            "--model and --backbone exclude each other: a whole network's weights include the backbone's"
        )
    check_ema(options.ema, options.checkpoint is not None)
    if options.device not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got '{options.device}'")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    set_threads(options.threads)


def _print_start(options: argparse.Namespace, trainer: Trainer, data: DataSet, validation: DataSet | None) -> None:
    """Print the size of the run and messages about settings that have no effect or may be unintended."""
    from spatialflow.engine.trainer import settings_without_effect

    print(
        f"{len(data)} images, {trainer.schedule.steps_per_epoch} steps per epoch, step {trainer.step} of "
        f"{trainer.total_steps}: {options.output}",
        flush=True,
    )
    _warn_of_random_statistics(options, trainer.config.model)
    for text in [
        *settings_without_effect(trainer.config.training, trainer.total_steps),
        *_without_pycocotools(validation),
    ]:
        print_error(text)
    if trainer.store.changed_settings:
        print_error(f"{options.output}: continues with changed settings: {', '.join(trainer.store.changed_settings)}")
    if trainer.reinitialized_layers and trainer.step == 0:
        layers = ", ".join(trainer.reinitialized_layers)
        print_error(f"{options.checkpoint}: has other classes; {layers} start from random weights")


def _warn_of_random_statistics(options: argparse.Namespace, model: ModelConfig) -> None:
    is_fixed = model.backbone_frozen_stages >= 0 or not model.backbone_norm_trains
    if is_fixed and options.checkpoint is None and options.backbone is None:
        print_error(
            "no --backbone or --model: frozen stages and BatchNorm's statistics keep their random initial "
            "values; from scratch, set backbone_norm_trains=true backbone_frozen_stages=-1"
        )


def _without_pycocotools(validation: DataSet | None) -> list[str]:
    from spatialflow.panoptic.detection import has_pycocotools

    if validation is None or has_pycocotools():
        return []
    return ["the package pycocotools is missing, so that evaluations have no average precision"]


def _config(options: argparse.Namespace) -> Config:
    from spatialflow.config import ConfigError, load_config, parse_settings

    try:
        return load_config(options.config, **parse_settings(options.settings))
    except ConfigError as error:
        raise CommandError(str(error)) from None


def _check_data_options(options: argparse.Namespace) -> None:
    """Raise CommandError for options of the data that exclude or require each other."""
    for first, second in (("images", "annotations"), ("validation_images", "validation_annotations")):
        if (getattr(options, first) is None) != (getattr(options, second) is None):
            raise CommandError(f"--{first} and --{second} must be given together".replace("_", "-"))
    if (options.cityscapes is None) == (options.images is None):
        raise CommandError("give either --images and --annotations, or --cityscapes")
    if options.cityscapes is not None and options.validation_images is not None:
        raise CommandError("--cityscapes and --validation-images exclude each other: the tree has its own split val")
    for folder, images in (("panoptic", "images"), ("validation_panoptic", "validation_images")):
        if getattr(options, folder) is not None and getattr(options, images) is None:
            raise CommandError(f"--{folder} needs --{images}".replace("_", "-"))


def _data(options: argparse.Namespace, config: Config) -> tuple[DataSet, DataSet | None]:
    """Open the training data and, if given, the validation data."""
    from spatialflow.data.categories import CategoryError, load_categories
    from spatialflow.data.cityscapes import Cityscapes, CityscapesError
    from spatialflow.panoptic import PanopticFormatError

    _check_data_options(options)
    model = config.model
    try:
        categories = load_categories(config.data.categories, model.num_things, model.num_stuff, model.stuff_head)
        if options.cityscapes is not None:
            has_validation = os.path.isdir(options.cityscapes / "leftImg8bit" / "val")
            return (
                Cityscapes(options.cityscapes, "train", categories),
                Cityscapes(options.cityscapes, "val", categories) if has_validation else None,
            )
        data = _coco(options.annotations, options.images, options.panoptic, categories, False)
        if options.validation_images is None:
            return data, None
        paths = (options.validation_annotations, options.validation_images, options.validation_panoptic)
        return data, _coco(*paths, categories, True)
    except (CategoryError, CityscapesError, PanopticFormatError) as error:
        raise CommandError(str(error)) from None


def _coco(annotations: Path, images: Path, panoptic: Path | None, categories: Categories, scored: bool) -> CocoPanoptic:
    from spatialflow.data.coco import CocoPanoptic

    data = CocoPanoptic(annotations, images, panoptic, categories, scored)
    for folder in (data.image_folder, data.panoptic_folder):
        if not os.path.isdir(folder):
            raise CommandError(f"{folder}: no such folder")
    return data


def _summary(trainer: Trainer) -> str:
    """Describe the end of a run in one line."""
    assert trainer.log is not None  # only the first process has a log, and prints the summary
    rows = trainer.log.rows
    parts = [f"{trainer.step} steps: {trainer.folder / 'model.safetensors'}"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if evaluations:
        last = evaluations[-1]
        parts.append(
            f"PQ {100 * last['pq']:.2f} (things {100 * last['pq_things']:.2f}, stuff {100 * last['pq_stuff']:.2f})"
        )
        precision = ((kind, last.get(f"{kind}_ap", -1)) for kind in ("box", "mask"))
        parts += [f"{kind} AP {100 * value:.2f}" for kind, value in precision if value >= 0]  # -1: no ground truth
    if trainer.reporter.problems:
        parts.append(f"{len(trainer.reporter.problems)} images or annotations could not be used")
    if trainer.reporter.count_by_rule:
        counts = ", ".join(f"{count} x {rule}" for rule, count in trainer.reporter.count_by_rule.items())
        parts.append(f"contradictory annotations: {counts} (`spatialflow validate` lists all)")
    return "; ".join(parts)
