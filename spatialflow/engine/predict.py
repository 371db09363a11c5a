# SPDX-License-Identifier: Apache-2.0
"""Prediction: images of several kinds to panoptic results, one by one or in overlapped batches."""

from __future__ import annotations

import copy
import numbers
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from torch import Tensor

from spatialflow.config import Config, ConfigError, load_config, place_overrides
from spatialflow.data.categories import Categories, network_categories
from spatialflow.data.transforms import LARGEST_SIDE, ResizeGeometry
from spatialflow.engine.cuda_graphs import GraphCache
from spatialflow.engine.inputs import (
    ChannelOrder,
    Image,
    Source,
    check_images,
    check_order,
    is_one_image,
    is_path,
    make_sources,
    pixels_of,
)
from spatialflow.engine.pipeline import FixedResult, Pipeline
from spatialflow.engine.result import PanopticResult
from spatialflow.engine.stage_times import STAGES, record_stages, stage, zero_times
from spatialflow.engine.transfers import Download, Transfers
from spatialflow.images import ImageError, read_image
from spatialflow.models.optimized.inference import optimize_for_inference
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.panoptic.merging import segment_list
from spatialflow.threads import map_ahead

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights and features that a Predictor supports."""

DECODERS = {"cpu": 1, "cuda": 6}
"""Threads that decode images, by the kind of device. On the CPU the network needs the cores."""

PATIENCE = 4
"""A batch that is not full runs when `PATIENCE * batch_size` images have been read after its first image."""


class Outcome(NamedTuple):
    """The result of one image of several, or the error that prevented it."""

    result: PanopticResult | None  # None where the image could not be read
    pixels: np.ndarray | None  # (H, W, 3) uint8 BGR, the decoded image; None where it could not be read
    error: BaseException | None  # an ImageError where it could not be read


class _Item(NamedTuple):
    position: int
    name: str
    pixels: np.ndarray
    staged: Tensor  # the source of the upload
    geometries: tuple[ResizeGeometry, ...]  # for each short edge
    times: dict[str, float]


class _Running(NamedTuple):
    """A batch that is queued on a GPU, or done on the CPU."""

    items: list[_Item]
    pixels: list[Tensor]  # on the device; kept alive until the work is done
    download: Download
    times: dict[str, float]  # of the batch


class Predictor:
    """Inference from images to panoptic maps, with one model or an ensemble.

    NumPy arrays are read as BGR, the order of `cv2.imread`, unless `channel_order="rgb"` is given. Images of Pillow and
    tensors are always RGB. `__call__` lists the kinds of images.

    Several short edges (`test_short_edges`) or mirrored images (`test_flip`) are test-time augmentation. The outputs
    for all views of an image, and of all models of an ensemble, are combined into one map. See `Pipeline`.

    Args:
        model: from `build_model`, with weights loaded; a sequence for an ensemble, which uses the configuration of the
            first. Models are copied: later changes of their weights have no effect.
        device: "cpu", "cuda" or "cuda:<number>"; None: the device of the model.
        dtype: of weights and features, torch.float32, bfloat16 or float16; None: that of the model. Scores and
            boxes are always float32.
        cuda_graph: replay a CUDA graph per padded size and number of images of a batch instead of queueing every
            kernel; None: True on a GPU, else False. The capture, at the first batch of a size, takes about the time of
            four batches. The 64 most recently used graphs are kept, fewer where memory is short. Under autocast, and
            within `spatialflow.ops.checked()`, no graph is used. Each combination of torch's settings for TF32, cuDNN,
            reduced precision and deterministic algorithms has separate graphs. Forward hooks of modules run at the
            capture of a graph, not at a replay.
        optimize: fold BatchNorm and repack the weights once.
        detection_masks: whether results have the mask of every detection. If False, results have no masks, and the
            mask head skips detections below `instance_score_threshold`: on the CPU often a quarter of all work. On a
            GPU, flags in device memory select the detections, and only the optimized mask head skips the others.
        batch_size: images that go through the network together. Only images of equal padded size share a batch, so
            that results do not depend on the other images. See `stream` for how long an image waits for others.
        channel_order: "bgr" or "rgb", of the channels of NumPy arrays; each method takes another for its call. None:
            "bgr", with a `spatialflow.images.ChannelOrderWarning` for an array that is probably RGB.
        overrides: fields of the configuration's `test` section, for instance `test_short_edges=(600,)`,
            `test_flip=True`, `score_threshold=0.3`.

    Raises:
        ConfigError: an override is not a field of the section `test`, or breaks a rule.
        CategoryError: the configuration's categories do not fit the model.
        ValueError: the device does not exist or is neither a CPU nor a CUDA device; the dtype is not supported;
            `cuda_graph` is True without a CUDA device; the batch size is below 1; the channel order is unknown; there
            is no model; or the models of an ensemble differ in their classes, heads or inputs.
        TypeError: `model` is neither a SpatialFlow network nor a sequence of them.

    Note:
        On a CUDA device the host waits for the GPU only at the capture of a CUDA graph and at the download of a
        result. Several threads may share a Predictor. With CUDA graphs their images are queued one after the other.
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
        channel_order: ChannelOrder | None = None,
        **overrides: Any,
    ) -> None:
        unknown = [section for section in place_overrides(overrides) if section != "test"]
        if unknown:
            raise ConfigError(
                f"Predictor: only fields of the test section can be overridden, got {', '.join(overrides)}"
            )
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"batch_size: must be an integer of at least 1, got {batch_size!r}")
        models = _models_of(model)
        check_ensemble([model.config for model in models])
        weight = next(models[0].parameters())
        self.device: torch.device = usable_device(weight.device if device is None else device)
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        graphs = graph_cache(self.device, cuda_graph)
        self.config: Config = load_config(models[0].config, **overrides)
        self.categories: Categories = _shared_categories(models)
        networks = [
            optimize_for_inference(model, self.device, dtype)
            if optimize
            else copy.deepcopy(model).to(self.device, dtype).eval()
            for model in models
        ]
        other_index = self.categories.other_index
        ignored = () if other_index is None else (other_index,)
        self.pipeline: Pipeline = Pipeline(networks, self.config, ignored, self.device, dtype, detection_masks, graphs)
        self.batch_size: int = batch_size
        self.channel_order: ChannelOrder | None = check_order(channel_order)
        self._transfers: Transfers = Transfers(self.device)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # str is iterable
        self, images: Image, *, channel_order: ChannelOrder | None = None
    ) -> PanopticResult: ...

    @overload
    def __call__(
        self, images: Iterable[Image], *, channel_order: ChannelOrder | None = None
    ) -> list[PanopticResult]: ...

    def __call__(
        self, images: Image | Iterable[Image], *, channel_order: ChannelOrder | None = None
    ) -> PanopticResult | list[PanopticResult]:
        """Predict one image or many.

        Arrays are BGR by default, images of Pillow and tensors are RGB.

        Args:
            images: one image, or an iterable of images, of any kinds and sizes:

                - the path of a file, see `spatialflow.images.read_image`;
                - a PIL image of any mode except "I" and "F"; its EXIF orientation is applied;
                - a uint8 array (H, W, 3), (H, W, 4) or, in gray, (H, W); an (N, H, W, 3) array is N images;
                - a tensor (3, H, W), (4, H, W) or, in gray, (1, H, W) or (H, W), uint8 or floating-point in 0..1, on
                  any device; an (N, C, H, W) tensor is N images.

                Transparency is dropped.
            channel_order: "bgr" or "rgb", of the channels of arrays; None: that of the Predictor.

        Returns:
            A PanopticResult for one image, a list in the order given for many, see `stream`.

        Raises:
            ImageError: an image cannot be read, or has another shape, type or range of values; the message names the
                image, the rule and the value.
            ValueError: the channel order is unknown.
            TypeError: `images` is neither an image nor an iterable.
        """
        if not is_one_image(images):
            return list(self.stream(cast("Iterable[Image]", images), channel_order=channel_order))
        (source,) = make_sources([cast("Image", images)], check_order(channel_order) or self.channel_order)
        ((_, outcome),) = self._finish(self._queue([self._load(source)])).items()
        return cast("PanopticResult", outcome.result)

    def stream(self, images: Iterable[Image], *, channel_order: ChannelOrder | None = None) -> Iterator[PanopticResult]:
        """Predict many images, and yield the results in the order of the images.

        Worker threads decode the next files while the network runs. On a GPU the next batch is queued before the host
        waits for the previous one. The iterable is read in the caller's thread, at most
        `2 * DECODERS[device] + (2 * PATIENCE + 1) * batch_size` images ahead. So the memory is bounded, and the
        iterable may be infinite.

        Args:
            images: an iterable of images as for `__call__`. An iterator may reuse the memory of an image that it
                yielded.
            channel_order: see `__call__`.

        Yields:
            A PanopticResult per image, in the order given.

        Raises:
            ImageError: see `__call__`; raised after the results of the previous images.
            ValueError: the channel order is unknown.
            TypeError: `images` is one image, or is not iterable.

        Note:
            After an early exit from the loop, the threads end when the iterator is closed or garbage-collected.
            The images of a batch need not be adjacent. An image waits until its batch is full, the images end, or
            `PATIENCE * batch_size` further images were read.

        Example:
            >>> for result in predictor.stream(sorted(folder.glob("*.jpg"))):  # doctest: +SKIP
            ...     result.save("out")
        """
        with closing(self.outcomes(images, channel_order=channel_order)) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    try:
                        raise outcome.error
                    finally:
                        del outcome  # the error's traceback refers to this frame
                yield cast("PanopticResult", outcome.result)

    def outcomes(
        self, images: Iterable[Image], *, channel_order: ChannelOrder | None = None
    ) -> Generator[Outcome, None, None]:
        """Predict many images as `stream` does, and yield the decoded pixels too.

        An image that cannot be used gives an Outcome with an ImageError. Any other exception is raised.

        Yields:
            An Outcome per image, in the order given.
        """
        check_images(images)
        sources = make_sources(images, check_order(channel_order) or self.channel_order)
        done: dict[int, Outcome] = {}  # by position, not yet yielded
        running: deque[_Running] = deque()
        next_position = 0
        with closing(self._batches(sources, done)) as batches:
            for batch in batches:
                if batch:
                    running.append(self._queue(batch))
                while len(running) > (self._transfers.max_queued if batch else 0):
                    done |= self._finish(running.popleft())
                while next_position in done:
                    outcome = done.pop(next_position)
                    next_position += 1
                    if not isinstance(outcome.error, (ImageError, type(None))):
                        try:
                            raise outcome.error
                        finally:
                            del outcome  # the error's traceback refers to this frame
                    yield outcome

    def _batches(self, sources: Iterator[Source], failed: dict[int, Outcome]) -> Generator[list[_Item], None, None]:
        """Group images of equal padded size into batches.

        Args:
            sources: from `make_sources`.
            failed: receives the outcomes, by position, of images that cannot be read.

        Yields:
            A batch; or an empty list if the running batches should be finished first. That is the case if the next
            image is not decoded yet, and at the end.
        """
        # Images without a full batch, by their padded sizes. The group that begins with the earliest image is first.
        waiting: dict[tuple[tuple[int, int], ...], list[_Item]] = {}
        threads, error = DECODERS[self.device.type], None
        with closing(map_ahead(self._load, sources, threads, 2 * threads + self.batch_size)) as loads:
            try:
                for position, load in enumerate(loads):
                    if not load.done():
                        yield []
                    if load.exception() is not None:
                        failed[position] = Outcome(None, None, load.exception())
                    else:
                        item = load.result()
                        shape = tuple(geometry.padded_size for geometry in item.geometries)
                        waiting.setdefault(shape, []).append(item)
                        if len(waiting[shape]) == self.batch_size:
                            yield waiting.pop(shape)
                    while waiting and position - next(iter(waiting.values()))[0].position >= PATIENCE * self.batch_size:
                        yield waiting.pop(next(iter(waiting)))
            except Exception as caught:  # of the iterable; raised after the results of the previous images
                error = caught
        yield from waiting.values()
        yield []
        if error is not None:
            try:
                raise error
            finally:
                del error  # the error's traceback refers to this frame

    def _load(self, source: Source) -> _Item:
        """Read and check one image; `stream` calls this method in worker threads."""
        position, name, times = source.position, source.name, source.times
        with record_stages(times), stage("decode"):
            pixels = read_image(source.image) if is_path(source.image) else pixels_of(source)
            staged = self._transfers.stage(pixels)
        geometries = self.pipeline.geometries(pixels.shape[:2])
        for geometry in geometries:
            if max(geometry.valid_size) > LARGEST_SIDE:
                sides = " x ".join(map(str, geometry.valid_size))
                rule = f"the sides of the network's input must be at most {LARGEST_SIDE} pixels long"
                raise ImageError(f"{name}: {rule}, got {sides}")
        return _Item(position, name, pixels, staged, geometries, times)

    def _queue(self, items: list[_Item]) -> _Running:
        """Queue one batch of equal padded size."""
        times, graphs = zero_times(), self.pipeline.graphs
        with record_stages(times):
            with stage("preprocess"):
                pixels = self._transfers.upload([item.staged for item in items])
                plan = self.pipeline.plan([item.geometries for item in items])
            with nullcontext() if graphs is None else graphs.lock:  # a replay by another thread overwrites the results
                results = self.pipeline(pixels, plan)
                with stage("merge"):
                    return _Running(items, pixels, self._transfers.download(results), times)

    def _finish(self, batch: _Running) -> dict[int, Outcome]:
        """Wait for a batch; return the outcomes by position."""
        with record_stages(batch.times), stage("merge"):
            results = batch.download.wait()
        outcomes = {}
        for item, result in zip(batch.items, results, strict=True):
            for name in STAGES:
                item.times[name] += batch.times[name] / len(batch.items)
            outcomes[item.position] = Outcome(self._result(item, result), item.pixels, None)
        return outcomes

    def _result(self, item: _Item, result: FixedResult) -> PanopticResult:
        """Make the result of an image; rows of `result` beyond its number of detections are padding and are dropped."""
        count = int(result.count)
        return PanopticResult(
            result.merged.id_map.numpy(),
            segment_list(result.merged, self.categories.thing_ids, self.categories.stuff_ids),
            result.boxes[:count].numpy(),
            result.scores[:count].numpy(),
            self.categories.thing_ids[result.labels[:count].numpy()],
            None if result.mask_logits is None else result.mask_logits[:count].numpy(),
            self.config.test.mask_threshold,
            self.categories,
            item.name,
            item.times,
            item.pixels,
        )


def graph_cache(device: torch.device, enabled: bool | None) -> GraphCache | None:
    """Make the cache of CUDA graphs of a Predictor; return None if it uses no graphs.

    Args:
        device: device of the Predictor.
        enabled: argument `cuda_graph` of the Predictor; None: True on a CUDA device.

    Raises:
        ValueError: graphs are enabled on another kind of device.
    """
    if enabled and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, got device {device}")
    return GraphCache(device) if device.type == "cuda" and enabled is not False else None


def _models_of(model: SpatialFlow | Sequence[SpatialFlow]) -> list[SpatialFlow]:
    """List the networks of a Predictor; raise TypeError unless all are SpatialFlow networks."""
    rule = "model: must be a SpatialFlow network or a sequence of them"
    if isinstance(model, SpatialFlow):
        return [model]
    if not isinstance(model, (list, tuple)):
        raise TypeError(f"{rule}, got {model!r:.80}")
    for network in model:
        if not isinstance(network, SpatialFlow):
            raise TypeError(f"{rule}, got a {type(network).__name__} in the sequence")
    return list(model)


def check_ensemble(configs: Sequence[Config]) -> None:
    """Raise ValueError unless there is a configuration, and all agree in input format, classes and heads."""
    if not configs:
        raise ValueError("model: an ensemble needs at least one model, got none")
    shared = {
        "model": ("num_things", "num_stuff", "thing_head", "stuff_head", "roi_size"),
        "data": ("image_mean", "image_std", "size_divisor"),
    }
    for section, names in shared.items():
        for name in names:
            first, *further = (getattr(getattr(config, section), name) for config in configs)
            for value in further:
                if value != first:
                    raise ValueError(
                        f"model: the models of an ensemble must agree in {name}, got {first!r} and {value!r}"
                    )


def _shared_categories(models: Sequence[SpatialFlow]) -> Categories:
    """Return the categories of an ensemble; raise ValueError unless they are the same in all models."""
    first, *further = (network_categories(model) for model in models)
    for other in further:
        if not other.same_classes(first):
            raise ValueError(f"model: the models of an ensemble must agree in categories, got {first} and {other}")
    return first


def usable_device(device: str | torch.device) -> torch.device:
    """Convert a name to a device; raise ValueError unless it is the CPU or an existing CUDA device."""
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
