# SPDX-License-Identifier: Apache-2.0
"""A photograph in, a panoptic map out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor

from spatialflow.data.categories import Categories, load_categories
from spatialflow.data.transforms import Fitted, check_image, fit_image, read_image
from spatialflow.models import inference
from spatialflow.models.build import load_config
from spatialflow.models.config import Config, ConfigError, place_overrides
from spatialflow.models.optimize import optimize_for_inference
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import panoptic_merge, paste_masks, preprocess_images
from spatialflow.panoptic import PanopticWriter, overlay

STAGES = ("decode", "preprocess", "network", "detect", "masks", "stuff", "merge")
"""What `PanopticResult.times` measures, in order."""

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
        mask_logits: (K, 28, 28) float32 over each box; None where the model has no thing head.
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
        mask_logits: Optional[np.ndarray],
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
    def masks(self) -> Optional[np.ndarray]:
        """(K, H, W) bool, the detections' masks before merging, pasted on every access; None without a thing head."""
        if self.mask_logits is None:
            return None
        logits, boxes = torch.from_numpy(self.mask_logits), torch.from_numpy(self.boxes)
        return paste_masks(logits, boxes, self.id_map.shape, self.mask_threshold).numpy()

    @property
    def image_id(self) -> Union[int, str]:
        """The stem of the image's name, as a number where it is one (as COCO names its files)."""
        stem = Path(self.image_name).stem
        return int(stem) if stem.isascii() and stem.isdigit() else stem

    def save(self, folder: Union[str, Path]) -> Path:
        """Writes `<stem>.png`, the map in COCO panoptic colours, and `<stem>.json`, a panoptic JSON of this image.

        Returns:
            Path of the PNG.

        Raises:
            OSError: a file cannot be written; no part of it is left behind.
        """
        folder = Path(folder)
        writer = PanopticWriter(folder, folder / f"{Path(self.image_name).stem}.json", self.categories.as_coco())
        path = writer.add(self.image_id, self.image_name, self.id_map, self.segments)
        writer.write_json()
        return path

    def overlay(self, image: np.ndarray) -> np.ndarray:
        """The segments drawn over `image`, (H, W, 3) uint8 BGR of the size of the map; returns the same."""
        return overlay(image, self.id_map, self.segments, self.categories.as_coco())

    def __repr__(self) -> str:
        h, w = self.id_map.shape
        found = f"{len(self.segments)} segments, {len(self.scores)} detections"
        return f"PanopticResult({self.image_name}: {h} x {w}, {found})"


class _Item(NamedTuple):
    position: int
    name: str
    pixels: np.ndarray
    fitted: Fitted
    times: dict[str, float]


class Predictor:
    """A model with everything between image files and panoptic maps.

    Args:
        model: from `build_model`, with weights loaded. It is not changed; with `optimize`, later changes of its weights
            have no effect here.
        device: where to run; None: where the model is.
        optimize: fold BatchNorm and pre-arrange the weights once.
        batch_size: images that go through the network together; only images of equal padded size share a batch, so that
            results do not depend on the company.
        overrides: fields of the configuration's `test` section, for instance `test_short_edges=(600,)`,
            `score_threshold=0.3`.

    Raises:
        ConfigError: an override breaks a rule.
        CategoryError: the configuration's categories do not fit the model.
    """

    def __init__(
        self,
        model: SpatialFlow,
        device: Union[str, torch.device, None] = None,
        optimize: bool = True,
        batch_size: int = 1,
        **overrides: Any,
    ):
        strangers = [section for section in place_overrides(overrides) if section != "test"]
        if strangers:
            raise ConfigError(
                f"Predictor: only fields of the test section can be overridden, got {', '.join(overrides)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        self.config: Config = load_config(model.config, **overrides)
        shape = self.config.model
        self.categories = load_categories(
            self.config.data.categories, shape.num_things, shape.num_stuff, shape.stuff_head
        )
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.network = (optimize_for_inference(model) if optimize else model).to(self.device)
        self.batch_size = batch_size

    def __call__(
        self, images: Union[Image, Sequence[Image], Iterable[Image]]
    ) -> Union[PanopticResult, list[PanopticResult]]:
        """Predicts one image or many.

        Args:
            images: a path or an (H, W, 3) uint8 BGR array, or an iterable of them.

        Returns:
            A PanopticResult for one image, a list in the order given for many.

        Raises:
            ImageError: an image cannot be read or has another shape or type; the file and the reason are named.
        """
        if isinstance(images, (str, Path, np.ndarray)):
            return self._predict([images])[0]
        return self._predict(list(images))

    def _predict(self, images: Sequence[Image]) -> list[PanopticResult]:
        results: list[Optional[PanopticResult]] = [None] * len(images)
        waiting: dict[tuple[int, ...], list[_Item]] = {}
        for position, image in enumerate(images):
            item = self._load(position, image)
            group = waiting.setdefault(item.fitted.padded_size, [])
            group.append(item)
            if len(group) == self.batch_size:
                self._run(waiting.pop(item.fitted.padded_size), results)
        for group in waiting.values():
            self._run(group, results)
        return results

    def _load(self, position: int, image: Image) -> _Item:
        times = dict.fromkeys(STAGES, 0.0)
        is_path = isinstance(image, (str, Path))
        name = Path(image).name if is_path else f"image {position}"
        with _stopwatch(times, "decode"):
            pixels = read_image(image) if is_path else check_image(image, name)
        test = self.config.test
        fitted = fit_image(
            pixels.shape[:2], test.test_short_edges[0], test.test_long_edge, self.config.data.size_divisor
        )
        return _Item(position, name, pixels, fitted, times)

    @torch.inference_mode()
    def _run(self, items: list[_Item], results: list[Optional[PanopticResult]]):
        """One batch of equal padded size; fills `results` at the items' positions."""
        shared = dict.fromkeys(STAGES, 0.0)
        data, sizes = self.config.data, [item.fitted.valid_size for item in items]
        valid = torch.tensor(sizes, device=self.device)
        scale = torch.tensor([item.fitted.scale for item in items], device=self.device)
        with _stopwatch(shared, "preprocess"):
            pixels = [torch.from_numpy(np.require(item.pixels, requirements="CW")).to(self.device) for item in items]
            images = preprocess_images(pixels, sizes, data.image_mean, data.image_std, data.size_divisor)
        with _stopwatch(shared, "network"):
            output, quarter_logits = self.network.dense(images)
        with _stopwatch(shared, "detect"):
            candidates = inference.select_candidates(
                output.class_logits,
                output.box_deltas,
                valid,
                scale,
                self.config.model,
                self.config.test.candidates_per_level,
            )
            found = inference.detect(candidates, self.config.test)
            counts = found.count.tolist()
        logits = None
        if output.thing_features is not None:
            with _stopwatch(shared, "masks"):
                rois = inference.make_rois([found.boxes[i, :n] for i, n in enumerate(counts)], scale)
                labels = torch.cat([found.labels[i, :n] for i, n in enumerate(counts)])
                logits = inference.mask_logits(self.network, output.thing_features, rois, labels).split(counts)
        for i, (item, n) in enumerate(zip(items, counts)):
            for stage in STAGES:
                item.times[stage] += shared[stage] / len(items)
            results[item.position] = self._finish(
                item,
                found.boxes[i, :n],
                found.scores[i, :n],
                found.labels[i, :n],
                None if logits is None else logits[i],
                None if quarter_logits is None else quarter_logits[i],
            )

    def _finish(
        self,
        item: _Item,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        mask_logits: Optional[Tensor],
        quarter_logits: Optional[Tensor],
    ) -> PanopticResult:
        """Masks and stuff labels at original size, merged."""
        test, size, times = self.config.test, item.fitted.original_size, item.times
        with _stopwatch(times, "stuff"):
            if quarter_logits is None:  # every label lies outside 0..num_stuff - 1 = nothing, so all is void
                stuff, num_stuff = torch.zeros(size, dtype=torch.uint8, device=self.device), 0
            else:
                stuff, num_stuff = (
                    inference.stuff_labels(quarter_logits, item.fitted.valid_size, size),
                    self.config.model.num_stuff,
                )
        with _stopwatch(times, "masks"):
            entering = scores >= test.instance_score_threshold
            if mask_logits is None:
                entering = torch.zeros_like(entering)
                masks = torch.zeros((0, *size), dtype=torch.bool, device=self.device)
            else:
                masks = paste_masks(mask_logits[entering], boxes[entering], size, test.mask_threshold)
        with _stopwatch(times, "merge"):
            other = self.categories.other_index
            merged = panoptic_merge(
                masks,
                scores[entering],
                labels[entering],
                boxes[entering] if test.box_fill else None,
                stuff,
                num_stuff,
                ignored_stuff=() if other is None else (other,),
                score_threshold=test.instance_score_threshold,
                overlap_threshold=test.instance_overlap_threshold,
                stuff_area_limit=test.stuff_area_threshold,
                box_threshold=test.box_overlap_threshold,
            )
            id_map, segments = merged.id_map.cpu().numpy(), self._segments(merged)
        category_ids = self.categories.thing_ids[labels.cpu().numpy()]
        return PanopticResult(
            id_map,
            segments,
            boxes.cpu().numpy(),
            scores.cpu().numpy(),
            category_ids,
            None if mask_logits is None else mask_logits.cpu().numpy(),
            test.mask_threshold,
            self.categories,
            item.name,
            times,
        )

    def _segments(self, merged) -> list[dict[str, Any]]:
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


@contextmanager
def _stopwatch(times: dict[str, float], stage: str):
    """Adds the seconds of the block to `times[stage]`; on a GPU until the work is queued, without waiting for it."""
    start = time.perf_counter()
    yield
    times[stage] += time.perf_counter() - start
