# SPDX-License-Identifier: Apache-2.0
"""Pasting of masks, stuff labels, panoptic merge and the counts of panoptic quality."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fuzz.brute_force.common import bilinear, to_array, without_warnings


@without_warnings
def upsampled_logits(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Return (H, W, C): the interpolated logits, of which `stuff_labels` takes the argmax at every pixel."""
    values = to_array(logits)
    classes, rows, columns = values.shape
    height, width = original_size

    def source_position(index: int, valid: int, target: int, cells: int) -> tuple[int, float]:
        source = min(math.floor(index * (1 / (target / valid))), valid - 1)  # nearest neighbor, as in OpenCV
        at = source * (cells - 1) / (4 * cells - 1)  # aligned corners
        return int(at), at - int(at)

    def mix(low: np.ndarray, high: np.ndarray, fraction: float) -> np.ndarray:
        return low + fraction * (high - low)

    result = np.zeros((height, width, classes))
    for i in range(height):
        y, y_fraction = source_position(i, valid_size[0], height, rows)
        lower = min(y + 1, rows - 1)
        for j in range(width):
            x, x_fraction = source_position(j, valid_size[1], width, columns)
            left = mix(values[:, y, x], values[:, lower, x], y_fraction)
            right = mix(values[:, y, min(x + 1, columns - 1)], values[:, lower, min(x + 1, columns - 1)], y_fraction)
            result[i, j] = mix(left, right, x_fraction)
    return result


@without_warnings
def stuff_labels(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Compute labels in float64; where two classes of `upsampled_logits` differ only by rounding, both are right."""
    upsampled = upsampled_logits(logits, valid_size, original_size)
    result = np.zeros(upsampled.shape[:2], dtype=np.int64)
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            best = -np.inf
            for label, value in enumerate(upsampled[i, j]):
                if value > best:
                    result[i, j], best = label, value
    return result


@without_warnings
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
) -> tuple[np.ndarray, ...]:
    inside, classes, stuff_map = to_array(masks) != 0, to_array(labels), to_array(stuff)
    values = to_array(scores)
    corners = None if boxes is None else to_array(boxes)
    count, height, width = inside.shape
    id_map = np.zeros((height, width), dtype=np.int64)
    segments: list[tuple[int, int, float]] = []  # label, instance or -1, score
    ids: dict[int, int] = {}  # segment id of each instance that became a segment

    entering = sorted((k for k in range(count) if values[k] >= score_threshold), key=lambda k: (-values[k], k))
    for k in entering:
        pixels = [(y, x) for y in range(height) for x in range(width) if inside[k, y, x]]
        free = [place for place in pixels if id_map[place] == 0]
        if not free or (len(pixels) - len(free)) / len(pixels) > overlap_threshold:
            continue
        segments.append((int(classes[k]), k, float(values[k])))
        ids[k] = len(segments)
        for place in free:
            id_map[place] = ids[k]
    for label in range(stuff_labels):
        if label in ignored_stuff:
            continue
        free = [(y, x) for y in range(height) for x in range(width) if stuff_map[y, x] == label and id_map[y, x] == 0]
        if free and len(free) >= stuff_area_threshold:
            segments.append((label, -1, 0.0))
            for place in free:
                id_map[place] = len(segments)
    for k in entering if corners is not None else ():
        if not np.isfinite(corners[k]).all():
            continue
        x1, y1, x2, y2 = (int(corner) for corner in corners[k])
        pixels = [(y, x) for y in range(max(y1, 0), min(y2, height)) for x in range(max(x1, 0), min(x2, width))]
        free = [place for place in pixels if id_map[place] == 0]
        if not free or len(free) / len(pixels) < box_overlap_threshold:
            continue
        if k not in ids:
            segments.append((int(classes[k]), k, float(values[k])))
            ids[k] = len(segments)
        for place in free:
            id_map[place] = ids[k]

    rows = count + stuff_labels
    table_labels, instances = np.full(rows, -1, dtype=np.int64), np.full(rows, -1, dtype=np.int64)
    is_thing, areas = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.int64)
    extents, segment_scores = np.zeros((rows, 4), dtype=np.int64), np.zeros(rows, dtype=np.float32)
    for row, (label, instance, score) in enumerate(segments):
        places = [(y, x) for y in range(height) for x in range(width) if id_map[y, x] == row + 1]
        ys, xs = [y for y, _ in places], [x for _, x in places]
        table_labels[row], instances[row], is_thing[row] = label, instance, instance >= 0
        areas[row], segment_scores[row] = len(places), score
        extents[row] = min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1
    return id_map, table_labels, is_thing, instances, areas, extents, segment_scores, np.int64(len(segments))


def panoptic_quality_counts(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> np.ndarray:
    truth, prediction = to_array(gt_map), to_array(pred_map)
    counts = np.zeros((gt_segments + 1, pred_segments + 1), dtype=np.int64)
    for gt_segment, pred_segment in zip(truth.ravel(), prediction.ravel()):
        if 0 <= gt_segment <= gt_segments and 0 <= pred_segment <= pred_segments:
            counts[gt_segment, pred_segment] += 1
    return counts


@without_warnings
def mask_probabilities(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return (K, H, W): the interpolated probabilities that `paste_masks` compares with its threshold.

    They are NaN for a box that has no extent, is reversed or is not finite, and 0 where no cell is read.
    """
    logits, corners = to_array(mask_logits), to_array(boxes)
    count, rows, columns = logits.shape
    height, width = size
    probabilities = 1 / (1 + np.exp(-logits))
    result = np.full((count, height, width), np.nan)
    for k in range(count):
        x1, y1, x2, y2 = corners[k]
        if not (np.isfinite(corners[k]).all() and x1 < x2 and y1 < y2):
            continue
        for i in range(height):
            for j in range(width):
                y = (i + 0.5 - y1) / (y2 - y1) * rows - 0.5
                x = (j + 0.5 - x1) / (x2 - x1) * columns - 0.5
                result[k, i, j] = bilinear(probabilities[k : k + 1], y, x)[0]
    return result


@without_warnings
def paste_masks(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> np.ndarray:
    """Threshold `mask_probabilities`; where one differs from the threshold only by rounding, both results are right."""
    return mask_probabilities(mask_logits, boxes, size) >= threshold
