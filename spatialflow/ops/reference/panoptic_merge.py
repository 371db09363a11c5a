# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.panoptic_merge` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from spatialflow.ops.panoptic_merge import PanopticMergeOutput


def panoptic_merge(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor | None,
    stuff: Tensor,
    stuff_labels: int,
    *,
    ignored_stuff: Sequence[int] = (),
    score_threshold: float = 0.37,
    overlap_threshold: float = 0.37,
    stuff_area_threshold: int = 4900,
    box_overlap_threshold: float = 0.5,
) -> PanopticMergeOutput:
    """Compute `spatialflow.ops.panoptic_merge`, one segment at a time."""
    count, height, width = masks.shape
    masks, stuff = masks != 0, stuff.long()  # (K, H, W) bool, (H, W) int64
    id_map = masks.new_zeros((height, width), dtype=torch.int32)  # (H, W)
    segments: list[tuple[int, int, float]] = []  # label, instance or -1, score
    id_of: dict[int, int] = {}

    def add_segment(pixels: Tensor, label: int, instance: int, score: float) -> int:
        """Append a segment with (H, W) bool pixels and return its id."""
        segments.append((label, instance, score))
        id_map[pixels] = len(segments)
        return len(segments)

    candidates = [k for k in range(count) if float(scores[k]) >= score_threshold]
    candidates.sort(key=lambda k: -float(scores[k]))
    for k in candidates:
        area, free = int(masks[k].sum()), masks[k] & (id_map == 0)  # free: (H, W) bool
        overlap = area - int(free.sum())
        if area == 0 or overlap / area > overlap_threshold or overlap == area:
            continue
        id_of[k] = add_segment(free, int(labels[k]), k, float(scores[k]))
    for label in range(stuff_labels):
        free = (stuff == label) & (id_map == 0)  # (H, W) bool
        if label not in ignored_stuff and int(free.sum()) >= max(stuff_area_threshold, 1):
            add_segment(free, label, -1, 0.0)
    for k in () if boxes is None else candidates:
        box = cast("Tensor", boxes)[k]
        if not bool(torch.isfinite(box).all()):
            continue
        x1, y1, x2, y2 = (min(max(int(v), 0), side) for v, side in zip(box.tolist(), (width, height) * 2, strict=True))
        window = id_map[y1:y2, x1:x2]  # (y2 - y1, x2 - x1), a view
        void = int((window == 0).sum())
        if void == 0 or void / window.numel() < box_overlap_threshold:
            continue
        if k not in id_of:
            segments.append((int(labels[k]), k, float(scores[k])))
            id_of[k] = len(segments)
        window[window == 0] = id_of[k]

    rows = count + stuff_labels
    table = masks.new_zeros((rows, 8), dtype=torch.int64)  # label, is_thing, instance, area, x, y, width, height
    table[:, [0, 2]] = -1
    segment_scores = masks.new_zeros(rows, dtype=torch.float64)  # (R)
    for row, (label, instance, score) in enumerate(segments):
        ys, xs = torch.nonzero(id_map == row + 1, as_tuple=True)  # (area) each
        x, y = int(xs.min()), int(ys.min())
        size = [int(xs.max()) - x + 1, int(ys.max()) - y + 1]
        table[row] = table.new_tensor([label, instance >= 0, instance, len(xs), x, y, *size])
        segment_scores[row] = scores.new_tensor(score)
    return PanopticMergeOutput(
        id_map,
        table[:, 0],
        table[:, 1].bool(),
        table[:, 2],
        table[:, 3],
        table[:, 4:8],
        segment_scores.float(),
        table.new_tensor(len(segments)),
    )
