# SPDX-License-Identifier: Apache-2.0
"""A photograph in, a panoptic map out; of many photographs, the steps of several at once."""

from __future__ import annotations

import copy
import numbers
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Union, overload

import numpy as np
import torch
from torch import Tensor

from spatialflow import panoptic
from spatialflow.config import Config, ConfigError, load_config, place_overrides
from spatialflow.data.categories import Categories, load_categories
from spatialflow.data.transforms import LARGEST_SIDE, Fitted, check_image
from spatialflow.engine.cuda_graphs import GraphCache
from spatialflow.engine.pipeline import STAGES, FixedResult, Pipeline, stopwatch
from spatialflow.engine.transfers import Download, Transfers
from spatialflow.files import write_json
from spatialflow.images import ImageError, read_image
from spatialflow.models.optimized.inference import optimize_for_inference
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import PanopticMergeOutput, paste_masks
from spatialflow.panoptic.writer import panoptic_row
from spatialflow.threads import map_ahead

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a Predictor computes in."""

DECODERS = {"cpu": 1, "cuda": 6}
"""Threads that decode images, by the kind of device. On the CPU the network needs the cores itself."""

PATIENCE = 4
"""An image runs in a batch that is not full if this many times `batch_size` images came since."""

Image = Union[str, Path, np.ndarray]


class PanopticResult:
    """What was found in one image.

    Attributes:
        id_map: (H, W) int32, segment id per pixel, 0 = void.
        segments: one dict per id of the map: `id`, `category_id`, `isthing`, `area` (pixels), `bbox` ([x, y, width,
            height]), `score` (None for stuff).
        boxes: (K, 4) float32, x1, y1, x2, y2 in pixels of the image, best score first.
        scores: (K,) float32.
        labels: (K,) int64, category ids.
        mask_logits: (K, 28, 28) float32 over each box; None where the model has no thing head, or the Predictor
            was told `detection_masks=False`.
        mask_threshold: probability from which a pixel belongs to a mask.
        categories: the category table.
        image_name: file name of the image, or "image <position in the call>" for an array.
        times: seconds by stage, see `STAGES`; of a batch its share.
    """

    def __init__(
        self,
        id_map: np.ndarray,
        segments: list[dict[str, Any]],
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        mask_logits: np.ndarray | None,
        mask_threshold: float,
        categories: Categories,
        image_name: str,
        times: dict[str, float],
    ):
        self.id_map, self.segments = id_map, segments
        self.boxes, self.scores, self.labels, self.mask_logits = boxes, scores, labels, mask_logits
        self.mask_threshold = mask_threshold
        self.categories, self.image_name, self.times = categories, image_name, times

    @property
    def masks(self) -> np.ndarray | None:
        """(K, H, W) bool, the detections' masks before merging, pasted on every access; None without `mask_logits`."""
        if self.mask_logits is None:
            return None
        logits, boxes = torch.from_numpy(self.mask_logits), torch.from_numpy(self.boxes)
        return paste_masks(logits, boxes, self.id_map.shape, self.mask_threshold).numpy()

    @property
    def image_id(self) -> int | str:
        """See `image_id_of`."""
        return image_id_of(self.image_name)

    def save(self, folder: str | Path) -> Path:
        """Writes `<stem>.png`, the map in COCO panoptic colors, and `<stem>.json`, a panoptic JSON of this image.

        Returns:
            Path of the PNG.

        Raises:
            OSError: a file cannot be written; no part of it is left behind.
        """
        path = Path(folder) / f"{Path(self.image_name).stem}.png"
        row = panoptic_row(self.image_id, self.image_name, path.name, self.id_map, self.segments)
        panoptic.write_id_map(path, self.id_map)
        content = {"images": [row["image"]], "annotations": [row["annotation"]]}
        write_json(path.with_suffix(".json"), {**content, "categories": self.categories.as_coco()})
        return path

    def overlay(self, image: np.ndarray) -> np.ndarray:
        """The segments drawn over `image`, (H, W, 3) uint8 BGR of the size of the map; returns the same."""
        return panoptic.overlay(image, self.id_map, self.segments, self.categories.as_coco())

    def __repr__(self) -> str:
        h, w = self.id_map.shape
        found = f"{len(self.segments)} segments, {len(self.scores)} detections"
        return f"PanopticResult({self.image_name}: {h} x {w}, {found})"


def image_id_of(image_name: str) -> int | str:
    """The stem of an image's name: COCO's as the number it is, Cityscapes' without "_leftImg8bit"."""
    stem = Path(image_name).stem.removesuffix("_leftImg8bit")
    return int(stem) if stem.isascii() and stem.isdigit() else stem


class Outcome(NamedTuple):
    """What became of one image of several."""

    result: PanopticResult | None  # None where the image could not be read
    pixels: np.ndarray | None  # (H, W, 3) uint8 BGR, the image as it was decoded; None where it could not be read
    error: BaseException | None  # an ImageError where it could not be read


class _Item(NamedTuple):
    position: int
    name: str
    pixels: np.ndarray
    staged: Tensor  # where the upload reads the pixels
    fitted: tuple[Fitted, ...]  # for each short edge
    times: dict[str, float]


class _Running(NamedTuple):
    """A batch that is queued on the device, or done on the CPU."""

    items: list[_Item]
    pixels: list[Tensor]  # on the device: to be kept until the work is done
    download: Download
    times: dict[str, float]  # of the batch


class Predictor:
    """A model with everything between image files and panoptic maps.

    Several short edges (`test_short_edges`) or mirrored images (`test_flip`) are test-time augmentation: every image
    goes through the network in each form, and the results are one map, as several models' are. See `Pipeline`.

    Args:
        model: from `build_model`, with weights loaded; several for an ensemble, whose first's configuration counts.
            They are not changed, and later changes of their weights have no effect here.
        device: where to run, "cpu", "cuda" or "cuda:<number>"; None: where the model is.
        dtype: of weights and features, torch.float32, bfloat16 or float16; None: that of the model. Scores and
            boxes are float32 always.
        cuda_graph: replay a CUDA graph per padded size of the network's input instead of queueing every kernel; None:
            on a GPU. The first image of a size pays for the capture, about what four images take without. The 64 sizes
            used last are kept; where memory is short, fewer. Under autocast, and within `spatialflow.ops.checked()`,
            every kernel is queued. Settings of torch for TF32, cuDNN, reduced precision and deterministic algorithms
            have graphs of their own. Forward hooks of modules run when a graph is captured, not when it is replayed.
        optimize: fold BatchNorm and pre-arrange the weights once.
        detection_masks: whether results carry the mask of every detection. False where only the map counts: on the
            CPU the masks of detections below `instance_score_threshold`, often a quarter of all work, are left out. On
            a GPU their number is not known to the host, so that all masks are computed, and only their download is
            saved.
        batch_size: images that go through the network together; only images of equal padded size share a batch, so that
            results do not depend on the other images. See `stream` for how long an image waits for others.
        overrides: fields of the configuration's `test` section, for instance `test_short_edges=(600,)`,
            `test_flip=True`, `score_threshold=0.3`.

    Raises:
        ConfigError: an override breaks a rule.
        CategoryError: the configuration's categories do not fit the model.
        ValueError: a device that is not there or of another kind, another dtype, a CUDA graph without a CUDA device, a
            batch size below 1, no model, models of an ensemble that differ in their classes or inputs.
        TypeError: `model` is neither a SpatialFlow network nor a sequence of them.

    Remarks:
        On a CUDA device nothing waits for the GPU between the upload of an image and the download of its result.
        Several threads may share a Predictor. With CUDA graphs they queue their images one after the other.
    """

    def __init__(
        self,
        model: SpatialFlow | Sequence[SpatialFlow],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        cuda_graph: bool | None = None,
        optimize: bool = True,
        batch_size: int = 1,
        detection_masks: bool = True,
        **overrides: Any,
    ):
        unknown = [section for section in place_overrides(overrides) if section != "test"]
        if unknown:
            raise ConfigError(
                f"Predictor: only fields of the test section can be overridden, got {', '.join(overrides)}"
            )
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"batch_size: must be an integer of at least 1, got {batch_size!r}")
        models = _models_of(model)
        check_ensemble([one.config for one in models])
        weight = next(models[0].parameters())
        self.device = usable_device(weight.device if device is None else device)
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        graphs = graph_cache(self.device, cuda_graph)
        self.config: Config = load_config(models[0].config, **overrides)
        shape = self.config.model
        self.categories = load_categories(
            self.config.data.categories, shape.num_things, shape.num_stuff, shape.stuff_head
        )
        networks = [
            optimize_for_inference(one, self.device, dtype)
            if optimize
            else copy.deepcopy(one).to(self.device, dtype).eval()
            for one in models
        ]
        other = self.categories.other_index
        ignored = () if other is None else (other,)
        self.pipeline = Pipeline(networks, self.config, ignored, self.device, dtype, detection_masks, graphs)
        self.batch_size = batch_size
        self._transfers = Transfers(self.device)

    @overload
    def __call__(self, images: Image) -> PanopticResult: ...

    @overload
    def __call__(self, images: Iterable[Image]) -> list[PanopticResult]: ...

    def __call__(self, images: Image | Sequence[Image] | Iterable[Image]) -> PanopticResult | list[PanopticResult]:
        """Predicts one image or many.

        Args:
            images: a path or an (H, W, 3) uint8 BGR array, or an iterable of them.

        Returns:
            A PanopticResult for one image, a list in the order given for many, see `stream`.

        Raises:
            ImageError: an image cannot be read or has another shape or type; the file and the reason are named.
        """
        if not isinstance(images, (str, Path, np.ndarray)):
            return list(self.stream(images))
        ((_, outcome),) = self._finish(self._queue([self._load((0, images))])).items()
        return outcome.result

    def stream(self, images: Iterable[Image]) -> Iterator[PanopticResult]:
        """Predicts many images, and yields each result as soon as those before it are there.

        Worker threads decode the next images while the network works. A GPU gets the next batch before the host waits
        for the one before. Images are taken from the iterable in the caller's thread, a few ahead: no more than
        `2 * DECODERS[device] + (PATIENCE + 3) * batch_size`. So the memory is bounded, and the iterable may be endless.

        Args:
            images: paths or (H, W, 3) uint8 BGR arrays. An array that an iterator yields may be changed after that.

        Yields:
            A PanopticResult per image, in the order given.

        Raises:
            ImageError: see `__call__`; raised in the image's turn, after the results before it.
            TypeError: `images` is one path or one array, or no iterable.

        Remarks:
            Where the loop is left early, the threads end when the iterator is closed or has no more references.
            Images of other padded sizes may come between those of a batch. An image waits until its batch is full, the
            images end, or `PATIENCE * batch_size` images came since.

        Example:
            >>> for result in predictor.stream(sorted(folder.glob("*.jpg"))):  # doctest: +SKIP
            ...     result.save("out")
        """
        with closing(self.outcomes(images)) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    try:
                        raise outcome.error
                    finally:
                        del outcome  # its error refers to this frame
                yield outcome.result

    def outcomes(self, images: Iterable[Image]) -> Iterator[Outcome]:
        """As `stream`, for a caller that goes on after an image that cannot be read, or needs the decoded pixels.

        Yields:
            An Outcome per image, in the order given.
        """
        if isinstance(images, (str, Path)):
            raise TypeError(f"images: must be an iterable of images, got one path, {str(images)!r}; call the Predictor")
        if isinstance(images, np.ndarray) and images.ndim < 4:
            rule = "images: must be an iterable of images"
            raise TypeError(f"{rule}, got one array of shape {images.shape}; call the Predictor")
        try:
            iter(images)
        except TypeError:
            raise TypeError(f"images: must be an iterable of images, got {images!r:.80}") from None
        done: dict[int, Outcome] = {}  # by position; an image before them is not done
        running: deque[_Running] = deque()
        given = 0
        with closing(self._batches(images, done)) as batches:
            for batch in batches:
                if batch:
                    running.append(self._queue(batch))
                while len(running) > (self._transfers.queued if batch else 0):
                    done |= self._finish(running.popleft())
                while given in done:
                    outcome = done.pop(given)
                    given += 1
                    if not isinstance(outcome.error, (ImageError, type(None))):
                        try:
                            raise outcome.error
                        finally:
                            del outcome  # its error refers to this frame
                    yield outcome

    def _batches(self, images: Iterable[Image], failed: dict[int, Outcome]) -> Iterator[list[_Item]]:
        """Images of equal padded size that go through the network together.

        Yields:
            A batch; or no images, where all that runs should be finished now, as the next image is not decoded yet, or
            none follows. Before that, the outcomes of images that cannot be read are added to `failed`.
        """
        waiting: dict[tuple[tuple[int, int], ...], list[_Item]] = {}  # the group of the first image comes first
        threads, error = DECODERS[self.device.type], None
        with closing(map_ahead(self._load, _taken(images), threads, 2 * threads + self.batch_size)) as loads:
            try:
                for position, load in enumerate(loads):
                    if not load.done():
                        yield []
                    if load.exception() is not None:
                        failed[position] = Outcome(None, None, load.exception())
                    else:
                        item = load.result()
                        shape = tuple(fitted.padded_size for fitted in item.fitted)
                        waiting.setdefault(shape, []).append(item)
                        if len(waiting[shape]) == self.batch_size:
                            yield waiting.pop(shape)
                    while waiting and position - next(iter(waiting.values()))[0].position >= PATIENCE * self.batch_size:
                        yield waiting.pop(next(iter(waiting)))
            except Exception as caught:  # of the iterable: it comes after the results before it
                error = caught
        yield from waiting.values()
        yield []
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame

    def _load(self, place: tuple[int, Image]) -> _Item:
        """Reads an image; in a worker thread, if it is one of many."""
        position, image = place
        times = dict.fromkeys(STAGES, 0.0)
        is_path = isinstance(image, (str, Path))
        name = Path(image).name if is_path else f"image {position}"
        with stopwatch(times, "decode"):
            pixels = read_image(image) if is_path else check_image(image, name)
            staged = self._transfers.stage(pixels)
        fitted = self.pipeline.fit(pixels.shape[:2])
        for form in fitted:
            if max(form.valid_size) > LARGEST_SIDE:
                sides = " x ".join(map(str, form.valid_size))
                rule = f"the sides of the network's input must be at most {LARGEST_SIDE} pixels long"
                raise ImageError(f"{name}: {rule}, got {sides}")
        return _Item(position, name, pixels, staged, fitted, times)

    def _queue(self, items: list[_Item]) -> _Running:
        """Starts one batch of equal padded size."""
        times = dict.fromkeys(STAGES, 0.0)
        with stopwatch(times, "preprocess"):
            pixels = self._transfers.upload([item.staged for item in items])
            plan = self.pipeline.plan([item.fitted for item in items])
        graphs = self.pipeline.graphs
        with nullcontext() if graphs is None else graphs.lock:  # other threads' replays would overwrite the results
            found = self.pipeline(pixels, plan, times)
            with stopwatch(times, "merge"):
                return _Running(items, pixels, self._transfers.download(found), times)

    def _finish(self, batch: _Running) -> dict[int, Outcome]:
        """Waits for a batch; the outcomes by position."""
        with stopwatch(batch.times, "merge"):
            found = batch.download.wait()
        outcomes = {}
        for item, result in zip(batch.items, found):
            for stage in STAGES:
                item.times[stage] += batch.times[stage] / len(batch.items)
            outcomes[item.position] = Outcome(self._result(item, result), item.pixels, None)
        return outcomes

    def _result(self, item: _Item, found: FixedResult) -> PanopticResult:
        count = int(found.count)
        return PanopticResult(
            found.merged.id_map.numpy(),
            self._segments(found.merged),
            found.boxes[:count].numpy(),
            found.scores[:count].numpy(),
            self.categories.thing_ids[found.labels[:count].numpy()],
            None if found.mask_logits is None else found.mask_logits[:count].numpy(),
            self.config.test.mask_threshold,
            self.categories,
            item.name,
            item.times,
        )

    def _segments(self, merged: PanopticMergeOutput) -> list[dict[str, Any]]:
        count = int(merged.count)
        columns = (merged.labels, merged.is_thing, merged.areas, merged.boxes, merged.scores)
        rows = zip(*(column[:count].tolist() for column in columns))
        things, stuff = self.categories.thing_ids, self.categories.stuff_ids
        return [
            {
                "id": row + 1,
                "category_id": int(things[label] if is_thing else stuff[label]),
                "isthing": int(is_thing),
                "area": area,
                "bbox": box,
                "score": score if is_thing else None,
            }
            for row, (label, is_thing, area, box, score) in enumerate(rows)
        ]


def graph_cache(device: torch.device, wanted: bool | None) -> GraphCache | None:
    """Where the graphs of a Predictor are kept; None without. `wanted` is its `cuda_graph`."""
    if wanted and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, got device {device}")
    return GraphCache(device) if device.type == "cuda" and wanted is not False else None


def _models_of(model: SpatialFlow | Sequence[SpatialFlow]) -> list[SpatialFlow]:
    """The networks of a Predictor; TypeError unless all are."""
    rule = "model: must be a SpatialFlow network or a sequence of them"
    if isinstance(model, SpatialFlow):
        return [model]
    if not isinstance(model, (list, tuple)):
        raise TypeError(f"{rule}, got {model!r:.80}")
    for one in model:
        if not isinstance(one, SpatialFlow):
            raise TypeError(f"{rule}, got a {type(one).__name__} in the sequence")
    return list(model)


def check_ensemble(configs: Sequence[Config]):
    """ValueError unless networks of these configurations, one or more, take the same input and name equal classes."""
    if not configs:
        raise ValueError("model: an ensemble needs at least one model, got none")
    shared = {
        "model": ("num_things", "num_stuff", "thing_head", "stuff_head", "roi_size"),
        "data": ("categories", "image_mean", "image_std", "size_divisor"),
    }
    for section, names in shared.items():
        for name in names:
            first, *others = (getattr(getattr(config, section), name) for config in configs)
            for other in others:
                if other != first:
                    raise ValueError(f"model: those of an ensemble must agree in {name}, got {first!r} and {other!r}")


def usable_device(device: str | torch.device) -> torch.device:
    """The device by that name, if it is a CPU or a CUDA device that is there; ValueError otherwise."""
    try:
        usable = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, got {str(device)!r}") from None
    if usable.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, got {str(device)!r}")
    if usable.type == "cuda" and (usable.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {usable}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
        )
    return usable


def _taken(images: Iterable[Image]) -> Iterator[tuple[int, Image]]:
    """Images with their positions. What an iterator yields is copied, as its next step may overwrite an array."""
    for position, image in enumerate(images):
        lasting = isinstance(images, Sequence) or not isinstance(image, np.ndarray)
        yield position, image if lasting else image.copy()
