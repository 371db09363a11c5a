# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression and the selection of detection candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fuzz.brute_force.common import comparison_dtype, to_array, without_warnings


def _suppresses(box: np.ndarray, other_box: np.ndarray, threshold: float, real: type) -> bool:
    """Tell whether the IoU of two boxes exceeds the threshold, with each operation rounded to `real`."""
    areas = []
    for x1, y1, x2, y2 in (box, other_box):
        width, height = x2 - x1, y2 - y1
        if not (width > 0 and height > 0 and width * height > 0 and width * height < np.inf):
            return False
        areas.append(width * height)
    width = min(box[2], other_box[2]) - max(box[0], other_box[0])
    height = min(box[3], other_box[3]) - max(box[1], other_box[1])
    intersection = max(width, real(0)) * max(height, real(0))
    return bool(intersection > real(threshold) * (areas[0] + areas[1] - intersection))


@without_warnings
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> np.ndarray:
    real = comparison_dtype(boxes, scores)
    corners, values, classes = to_array(boxes).astype(real), to_array(scores), to_array(idxs)
    candidates = [row for row in range(len(values)) if not (np.isnan(values[row]) or np.isnan(corners[row]).any())]
    candidates.sort(key=lambda row: (-values[row], row))
    kept: list[int] = []
    for row in candidates:
        same_class = [kept_row for kept_row in kept if classes[kept_row] == classes[row]]
        if not any(_suppresses(corners[kept_row], corners[row], iou_threshold, real) for kept_row in same_class):
            kept.append(row)
    return np.array(kept, dtype=np.int64)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> np.ndarray:
    return batched_nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), iou_threshold)


@without_warnings
def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[np.ndarray, ...]:
    if boxes.dim() == 2:
        batched = multiclass_nms(boxes[None], scores[None], score_threshold, iou_threshold, max_detections)
        return tuple(result[0] for result in batched)
    real = comparison_dtype(boxes, scores)
    corners, values = to_array(boxes), to_array(scores)
    batch, count, classes = values.shape
    detected_boxes, detected_scores = np.zeros((batch, max_detections, 4)), np.zeros((batch, max_detections))
    labels, indices = (np.full((batch, max_detections), -1, dtype=np.int64) for _ in range(2))
    counts = np.zeros(batch, dtype=np.int64)
    for image in range(batch):
        image_boxes = corners[image].astype(real)
        pairs = [
            (row, label)
            for row in range(count)
            for label in range(classes)
            if real(values[image, row, label]) > real(score_threshold) and not np.isnan(image_boxes[row]).any()
        ]
        pairs.sort(key=lambda pair: (-values[image, pair[0], pair[1]], pair))
        kept: list[tuple[int, int]] = []
        for row, label in pairs:
            if len(kept) == max_detections:
                break
            same_class = [kept_row for kept_row, kept_label in kept if kept_label == label]
            if not any(
                _suppresses(image_boxes[kept_row], image_boxes[row], iou_threshold, real) for kept_row in same_class
            ):
                kept.append((row, label))
        for place, (row, label) in enumerate(kept):
            detected_boxes[image, place], detected_scores[image, place] = corners[image, row], values[image, row, label]
            labels[image, place], indices[image, place] = label, row
        counts[image] = len(kept)
    return detected_boxes, detected_scores, labels, counts, indices


def _interval(low: float, high: float, offset: float, log_ratio: float, limit: float, scale: float) -> list[float]:
    """Decode one axis of an anchor with its deltas, clip the interval to the image and divide it by `scale`."""
    most = abs(math.log(16 / 1000))
    center = (low + high) / 2 + (high - low) * offset
    half = (high - low) * np.exp(np.clip(log_ratio, -most, most)) / 2
    return [np.minimum(np.maximum(end, 0.0), limit) / scale for end in (center - half, center + half)]


@without_warnings
def select_candidates(
    class_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    base_anchors: Tensor,
    strides: Sequence[int],
    valid_sizes: Tensor,
    scale_factors: Tensor,
    per_level: int,
) -> tuple[np.ndarray, np.ndarray]:
    base, sizes, factors = to_array(base_anchors), to_array(valid_sizes).astype(np.float64), to_array(scale_factors)
    batch, channels = class_logits[0].shape[:2]
    anchors = base.shape[1]
    classes = channels // anchors
    candidates: list[list[tuple]] = [[] for _ in range(batch)]
    for logits, deltas, level_base, stride in zip(
        map(to_array, class_logits), map(to_array, box_deltas), base, strides
    ):
        height, width = logits.shape[2:]
        for image in range(batch):
            rows = []
            limit, scale = sizes[image], factors[image]
            for y, x, anchor in np.ndindex(height, width, anchors):
                anchor_logits = logits[image, anchor * classes : (anchor + 1) * classes, y, x]
                dx, dy, dw, dh = deltas[image, 4 * anchor : 4 * anchor + 4, y, x]
                corners = level_base[anchor] + np.array([x, y, x, y]) * float(stride)
                left, right = _interval(corners[0], corners[2], dx, dw, limit[1], scale[0])
                top, bottom = _interval(corners[1], corners[3], dy, dh, limit[0], scale[1])
                best = max((value for value in anchor_logits if not np.isnan(value)), default=-math.inf)
                rows.append((best, [left, top, right, bottom], 1 / (1 + np.exp(-anchor_logits))))
            if 0 < per_level < len(rows):
                rows = sorted(rows, key=lambda row: -row[0])[:per_level]  # a stable sort
            candidates[image] += rows
    level_anchors = [level.shape[2] * level.shape[3] * anchors for level in class_logits]
    count = sum(min(number, per_level or number) for number in level_anchors)
    boxes = np.array([[row[1] for row in rows] for rows in candidates], dtype=np.float64).reshape(batch, count, 4)
    scores = np.array([[row[2] for row in rows] for rows in candidates], dtype=np.float64).reshape(
        batch, count, classes
    )
    return boxes, scores
