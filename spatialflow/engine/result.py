# SPDX-License-Identifier: Apache-2.0
"""The result of prediction for one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from spatialflow.data.categories import Categories
from spatialflow.files import write_json
from spatialflow.ops import paste_masks
from spatialflow.panoptic.drawing import overlay
from spatialflow.panoptic.formats import write_id_map
from spatialflow.panoptic.writer import panoptic_row


class PanopticResult:
    """The panoptic segmentation and the detections of one image.

    Attributes:
        id_map: (H, W) int32, segment id per pixel, 0 = void.
        segments: one dict per id of the map: `id`, `category_id`, `isthing`, `area` (pixels), `bbox` ([x, y, width,
            height]), `score` (None for stuff).
        boxes: (K, 4) float32, x1, y1, x2, y2 in pixels of the image, best score first.
        scores: (K,) float32.
        labels: (K,) int64, category ids.
        mask_logits: (K, 2R, 2R) float32 over each box, R = `roi_size` of the model; None where the model has no thing
            head, or with `detection_masks=False`.
        mask_threshold: probability from which a pixel belongs to a mask.
        categories: the category table.
        image_name: file name of the image, or "image <position in the call>" for an array.
        times: seconds by stage, see `STAGES`. The time of a batch is divided equally among its images.
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
    ) -> None:
        self.id_map, self.segments = id_map, segments
        self.boxes, self.scores, self.labels, self.mask_logits = boxes, scores, labels, mask_logits
        self.mask_threshold = mask_threshold
        self.categories, self.image_name, self.times = categories, image_name, times

    @property
    def masks(self) -> np.ndarray | None:
        """(K, H, W) bool masks of the detections before the merge; None without `mask_logits`.

        They are pasted on every access.
        """
        if self.mask_logits is None:
            return None
        logits, boxes = torch.from_numpy(self.mask_logits), torch.from_numpy(self.boxes)
        return paste_masks(logits, boxes, self.id_map.shape, self.mask_threshold).numpy()

    @property
    def image_id(self) -> int | str:
        """Id of the image, derived from its name by `image_id_of`."""
        return image_id_of(self.image_name)

    def save(self, folder: str | Path) -> Path:
        """Write `<stem>.png`, the map in COCO panoptic colors, and `<stem>.json`, a panoptic JSON of this image.

        Args:
            folder: of both files.

        Returns:
            Path of the PNG.

        Raises:
            OSError: a file cannot be written; no part of it is left behind.
        """
        path = Path(folder) / f"{Path(self.image_name).stem}.png"
        row = panoptic_row(self.image_id, self.image_name, path.name, self.id_map, self.segments)
        write_id_map(path, self.id_map)
        content = {"images": [row["image"]], "annotations": [row["annotation"]]}
        write_json(path.with_suffix(".json"), {**content, "categories": self.categories.as_coco()})
        return path

    def overlay(self, image: np.ndarray) -> np.ndarray:
        """Draw the segments over `image`, (H, W, 3) uint8 BGR of the size of the map; returns an image of that kind."""
        return overlay(image, self.id_map, self.segments, self.categories.as_coco())

    def __repr__(self) -> str:
        h, w = self.id_map.shape
        counts = f"{len(self.segments)} segments, {len(self.scores)} detections"
        return f"PanopticResult({self.image_name}: {h} x {w}, {counts})"


def image_id_of(image_name: str) -> int | str:
    """Derive the image id from a file name: the stem without Cityscapes' "_leftImg8bit", as an integer if possible."""
    stem = Path(image_name).stem.removesuffix("_leftImg8bit")
    return int(stem) if stem.isascii() and stem.isdigit() else stem
