# SPDX-License-Identifier: Apache-2.0
"""Every operator of `spatialflow.ops` in plain NumPy loops and float64, written from the docstrings alone.

Each function has the name and the signature of its operator, takes its tensors (any dtype and layout) and returns NumPy
arrays: float64, int64 or bool, in the operator's order of fields. It shares no code with the kernels or with
`spatialflow.ops.reference`, and it is for tiny cases only. Shapes and options are not checked. A weight must be a
tensor, not packed. `algorithm` is accepted and ignored.

Results are not rounded to 16 bits. If an operator is documented to decide in float32, this module does too: sampling
grids and levels of RoIAlign, sampling points of deformable convolution, and overlaps of NMS. The arithmetic of
`preprocess_images` is in float32 as well. Where rounding may change a decision, `mask_probabilities`,
`upsampled_logits` and `perturbed_boxes` give the values from which a test tells how close the decision was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _silent(function: Callable) -> Callable:
    """Wrap `function` so that NumPy does not warn of overflow, NaN and division by zero, which are expected here."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **options)

    return run


def _array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to an array: floating-point values to float64, integers to int64, bool to bool."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        return tensor.double().numpy().copy()
    return tensor.numpy().copy() if tensor.dtype == torch.bool else tensor.long().numpy().copy()


def _decides_in(*tensors: Tensor) -> type:
    """Return the type in which an operator compares: float64 if any of its tensors is float64, else float32."""
    return np.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else np.float32


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# RoIAlign


def _boxes_array(boxes: Tensor | Sequence[Tensor]) -> np.ndarray:
    """Return (K, 5) float64 rows of batch index and corners, also for a list of boxes per image."""
    if isinstance(boxes, Tensor):
        return _array(boxes)
    rows = [[index, *box] for index, of_image in enumerate(boxes) for box in _array(of_image)]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def _bin_weights(start: Any, extent: Any, bins: int, ratio: int, size: int, real: type) -> list[dict[int, float]]:
    """For every bin of one axis, return the weight of each of `size` cells in the mean of the bin's samples.

    Bilinear weights are products over the axes, and the samples of a bin form a grid, so the axes are independent.
    """
    length = real(extent) / real(bins)
    if not (np.isfinite(start) and np.isfinite(extent)):
        return [{} for _ in range(bins)]
    count = ratio if ratio > 0 else math.ceil(length)
    result = []
    for index in range(bins):
        weights: dict[int, float] = {}
        first, last = 0, count
        if count > 100_000:  # only samples near the map matter
            step, origin = float(length) / count, float(start) + index * float(length)
            first = max(0, math.floor((-2 - origin) / step))
            last = min(count, math.ceil((size + 2 - origin) / step))
        for sample in range(first, last):
            at = start + real(index) * length + (real(sample) + real(0.5)) * length / real(count)
            if size == 0 or not -1 <= at <= size:
                continue
            at = min(max(float(at), 0.0), size - 1.0)
            low = int(at)
            for cell, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
                if weight != 0:
                    weights[cell] = weights.get(cell, 0.0) + weight / count
        result.append(weights)
    return result


def _pool(
    pooled: np.ndarray, features: np.ndarray, box: np.ndarray, scale: float, ratio: int, aligned: bool, real: type
) -> None:
    """Add the pooled RoI `box` of `features` (N, C, H, W) to `pooled` (C, PH, PW), which is zero."""
    batch, _, height, width = features.shape
    if not np.isfinite(box.astype(real)).all() or not 0 <= real(box[0]) < batch:
        return
    image = features[int(real(box[0]))]
    half = real(0.5 if aligned else 0)
    x1, y1, x2, y2 = (real(corner) * real(scale) - half for corner in box[1:])
    roi_width, roi_height = x2 - x1, y2 - y1
    if not aligned:
        roi_width, roi_height = max(roi_width, real(1)), max(roi_height, real(1))
    rows = _bin_weights(y1, roi_height, pooled.shape[1], ratio, height, real)
    columns = _bin_weights(x1, roi_width, pooled.shape[2], ratio, width, real)
    for i, of_row in enumerate(rows):
        for j, of_column in enumerate(columns):
            for y, y_weight in of_row.items():
                for x, x_weight in of_column.items():
                    pooled[:, i, j] += y_weight * x_weight * image[:, y, x]


@_silent
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> np.ndarray:
    real, features, rows = _decides_in(input), _array(input), _boxes_array(boxes)
    pooled = np.zeros((len(rows), features.shape[1], *_pair(output_size)))
    for index, box in enumerate(rows):
        _pool(pooled[index], features, box, spatial_scale, sampling_ratio, aligned, real)
    return pooled


@_silent
def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56,
) -> np.ndarray:
    real, levels, rows = _decides_in(*features), [_array(level) for level in features], _boxes_array(boxes)
    pooled = np.zeros((len(rows), levels[0].shape[1], *_pair(output_size)))
    for index, box in enumerate(rows):
        x1, y1, x2, y2 = (real(corner) for corner in box[1:])
        level = np.floor(np.log2(np.sqrt((x2 - x1) * (y2 - y1)) / real(finest_scale) + real(1e-6)))
        if np.isnan(level):  # one axis is reversed, so the area is negative: the finest level
            level = 0
        level = int(min(max(level, 0), len(levels) - 1))
        _pool(pooled[index], levels[level], box, 1 / strides[level], sampling_ratio, aligned, real)
    return pooled


# Non-maximum suppression


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


@_silent
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> np.ndarray:
    real = _decides_in(boxes, scores)
    corners, values, classes = _array(boxes).astype(real), _array(scores), _array(idxs)
    candidates = [row for row in range(len(values)) if not (np.isnan(values[row]) or np.isnan(corners[row]).any())]
    candidates.sort(key=lambda row: (-values[row], row))
    kept: list[int] = []
    for row in candidates:
        rivals = [kept_row for kept_row in kept if classes[kept_row] == classes[row]]
        if not any(_suppresses(corners[kept_row], corners[row], iou_threshold, real) for kept_row in rivals):
            kept.append(row)
    return np.array(kept, dtype=np.int64)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> np.ndarray:
    return batched_nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), iou_threshold)


@_silent
def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[np.ndarray, ...]:
    if boxes.dim() == 2:
        batched = multiclass_nms(boxes[None], scores[None], score_threshold, iou_threshold, max_detections)
        return tuple(result[0] for result in batched)
    real = _decides_in(boxes, scores)
    corners, values = _array(boxes), _array(scores)
    batch, count, classes = values.shape
    found_boxes, found_scores = np.zeros((batch, max_detections, 4)), np.zeros((batch, max_detections))
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
            rivals = [kept_row for kept_row, kept_label in kept if kept_label == label]
            if not any(
                _suppresses(image_boxes[kept_row], image_boxes[row], iou_threshold, real) for kept_row in rivals
            ):
                kept.append((row, label))
        for place, (row, label) in enumerate(kept):
            found_boxes[image, place], found_scores[image, place] = corners[image, row], values[image, row, label]
            labels[image, place], indices[image, place] = label, row
        counts[image] = len(kept)
    return found_boxes, found_scores, labels, counts, indices


# Candidates


def _interval(low: float, high: float, offset: float, log_ratio: float, limit: float, scale: float) -> list[float]:
    """Decode one axis of an anchor with its deltas, clip the interval to the image and divide it by `scale`."""
    most = abs(math.log(16 / 1000))
    center = (low + high) / 2 + (high - low) * offset
    half = (high - low) * np.exp(np.clip(log_ratio, -most, most)) / 2
    return [np.minimum(np.maximum(end, 0.0), limit) / scale for end in (center - half, center + half)]


@_silent
def select_candidates(
    class_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    base_anchors: Tensor,
    strides: Sequence[int],
    valid_sizes: Tensor,
    scale_factors: Tensor,
    per_level: int,
) -> tuple[np.ndarray, np.ndarray]:
    base, sizes, factors = _array(base_anchors), _array(valid_sizes).astype(np.float64), _array(scale_factors)
    batch, channels = class_logits[0].shape[:2]
    anchors = base.shape[1]
    classes = channels // anchors
    candidates: list[list[tuple]] = [[] for _ in range(batch)]
    for logits, deltas, own_base, stride in zip(map(_array, class_logits), map(_array, box_deltas), base, strides):
        height, width = logits.shape[2:]
        for image in range(batch):
            rows = []
            for y in range(height):
                for x in range(width):
                    for anchor in range(anchors):
                        class_scores = logits[image, anchor * classes : (anchor + 1) * classes, y, x]
                        dx, dy, dw, dh = deltas[image, 4 * anchor : 4 * anchor + 4, y, x]
                        corners = own_base[anchor] + np.array([x, y, x, y]) * float(stride)
                        limit, scale = sizes[image], factors[image]
                        left, right = _interval(corners[0], corners[2], dx, dw, limit[1], scale[0])
                        top, bottom = _interval(corners[1], corners[3], dy, dh, limit[0], scale[1])
                        best = max((value for value in class_scores if not np.isnan(value)), default=-math.inf)
                        rows.append((best, [left, top, right, bottom], 1 / (1 + np.exp(-class_scores))))
            if 0 < per_level < len(rows):
                rows = sorted(rows, key=lambda row: -row[0])[:per_level]  # a stable sort
            candidates[image] += rows
    numbers = [level.shape[2] * level.shape[3] * anchors for level in class_logits]
    count = sum(min(number, per_level or number) for number in numbers)
    boxes = np.array([[row[1] for row in rows] for rows in candidates], dtype=np.float64).reshape(batch, count, 4)
    scores = np.array([[row[2] for row in rows] for rows in candidates], dtype=np.float64).reshape(
        batch, count, classes
    )
    return boxes, scores


# Convolutions


def _bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Sample `image` (C, H, W) bilinearly at a point, with zeros around the map; 0 * NaN is NaN."""
    height, width = image.shape[1:]
    sample = np.zeros(image.shape[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return sample
    top, left = math.floor(y), math.floor(x)
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                sample += row_weight * column_weight * image[:, row, column]
    return sample


@_silent
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    algorithm: str = "auto",
    mask_sigmoid: bool = False,
    relu: bool = False,
) -> np.ndarray:
    real = _decides_in(input)
    features, kernel = _array(input), _array(weight)
    moves = _array(offset).astype(real)
    factors = None if mask is None else _array(mask).astype(real)
    if mask_sigmoid:
        factors = (1 / (1 + np.exp(-factors.astype(np.float64)))).astype(real)
    (stride_y, stride_x), (pad_y, pad_x), (step_y, step_x) = _pair(stride), _pair(padding), _pair(dilation)
    batch, channels, height, width = features.shape
    out_channels, group_channels, kernel_h, kernel_w = kernel.shape
    taps = kernel_h * kernel_w
    groups, offset_groups = channels // max(group_channels, 1) or 1, moves.shape[1] // (2 * taps)
    part, out_part = channels // offset_groups, out_channels // groups
    out_height = (height + 2 * pad_y - step_y * (kernel_h - 1) - 1) // stride_y + 1
    out_width = (width + 2 * pad_x - step_x * (kernel_w - 1) - 1) // stride_x + 1
    result = np.zeros((batch, out_channels, out_height, out_width))
    for n in range(batch):
        for i in range(out_height):
            for j in range(out_width):
                samples = np.zeros((channels, kernel_h, kernel_w))
                for g in range(offset_groups):
                    for tap in range(taps):
                        tap_y, tap_x = divmod(tap, kernel_w)
                        move_y, move_x = moves[n, 2 * (g * taps + tap) : 2 * (g * taps + tap) + 2, i, j]
                        factor = real(1) if factors is None else factors[n, g * taps + tap, i, j]
                        if not (np.isfinite(move_y) and np.isfinite(move_x) and np.isfinite(factor)):
                            continue
                        y = real(i * stride_y - pad_y + tap_y * step_y) + move_y
                        x = real(j * stride_x - pad_x + tap_x * step_x) + move_x
                        sample = _bilinear(features[n, g * part : (g + 1) * part], float(y), float(x))
                        samples[g * part : (g + 1) * part, tap_y, tap_x] = float(factor) * sample
                for o in range(out_channels):
                    first = o // out_part * group_channels
                    result[n, o, i, j] = (kernel[o] * samples[first : first + group_channels]).sum()
    if bias is not None:
        result += _array(bias)[:, None, None]
    return _rectify(result) if relu else result


def _convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Convolve (N, C, H, W) by a 3x3 kernel with stride 1 and padding 1."""
    batch, _, height, width = x.shape
    result = np.zeros((batch, kernel.shape[0], height, width))
    for n in range(batch):
        for i in range(height):
            for j in range(width):
                for di in range(3):
                    for dj in range(3):
                        row, column = i + di - 1, j + dj - 1
                        if 0 <= row < height and 0 <= column < width:
                            result[n, :, i, j] += (kernel[:, :, di, dj] * x[n, :, row, column]).sum(axis=1)
    return result if bias is None else result + bias[:, None, None]


def _rectify(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, 0.0, x)


@_silent
def flow_conv2d(
    x: Tensor | Sequence[Tensor],
    flow: Tensor | Sequence[Tensor] | None,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: Tensor | None = None,
) -> np.ndarray | list[np.ndarray]:
    if isinstance(x, Tensor):
        return flow_conv2d([x], None if flow is None else [flow], weight, bias, relu, algorithm, active)[0]
    results = []
    for index, level in enumerate(x):
        total = _array(level) if flow is None else _array(level) + _array(flow[index])
        result = _convolve(total, _array(weight), None if bias is None else _array(bias))
        result = _rectify(result) if relu else result
        if active is not None:
            result[~active.numpy()] = 0.0
        results.append(result)
    return results


@_silent
def fused_subnets(levels: Sequence[Tensor], parameters: Any, algorithm: str = "auto") -> tuple[list[np.ndarray], ...]:
    def apply(conv: tuple[Tensor, Tensor | None], x: np.ndarray) -> np.ndarray:
        return _convolve(x, _array(conv[0]), None if conv[1] is None else _array(conv[1]))

    def flow(convs: Sequence, stage: int, source: np.ndarray) -> np.ndarray | float:
        return apply(convs[stage], source) if stage < len(convs) and convs[stage] is not None else 0.0

    cls, reg, stuff, thing = [], [], [], []
    for index, level in enumerate(_array(level) for level in levels):
        source_convs, follower_convs = parameters.reg, parameters.cls
        if parameters.flow_source == "cls":
            source_convs, follower_convs = parameters.cls, parameters.reg
        source, follower, of_stuff, of_thing = level, level, level, level
        for stage in range(max(len(source_convs), len(follower_convs), len(parameters.stuff))):
            if stage < len(source_convs):
                source = _rectify(apply(source_convs[stage], source))
            if stage < len(follower_convs):
                follower = follower + flow(parameters.flow_cls, stage, source)
                follower = _rectify(apply(follower_convs[stage], follower))
            if stage < len(parameters.stuff) and index < parameters.segmentation_levels:
                of_stuff = of_stuff + flow(parameters.flow_stuff, stage, source)
                of_stuff = _rectify(apply(parameters.stuff[stage], of_stuff))
        if not follower_convs:
            follower = follower + flow(parameters.flow_cls, 0, source)
        cls.append(source if parameters.flow_source == "cls" else follower)
        reg.append(follower if parameters.flow_source == "cls" else source)
        if index >= parameters.segmentation_levels:
            continue
        if not parameters.stuff:
            of_stuff = of_stuff + flow(parameters.flow_stuff, 0, source)
        stuff.append(of_stuff)
        for stage in range(max(len(parameters.thing), 1)):
            of_thing = of_thing + flow(parameters.semantic_flow, stage, of_stuff)
            of_thing = of_thing + flow(parameters.flow_thing, stage, source)
            if parameters.thing:
                of_thing = _rectify(apply(parameters.thing[stage], of_thing))
        thing.append(of_thing)
    return cls, reg, stuff, thing


# Panoptic segmentation


@_silent
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
    inside, classes, stuff_map = _array(masks) != 0, _array(labels), _array(stuff)
    values = _array(scores)
    corners = None if boxes is None else _array(boxes)
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
    truth, prediction = _array(gt_map), _array(pred_map)
    counts = np.zeros((gt_segments + 1, pred_segments + 1), dtype=np.int64)
    for gt_segment, pred_segment in zip(truth.ravel(), prediction.ravel()):
        if 0 <= gt_segment <= gt_segments and 0 <= pred_segment <= pred_segments:
            counts[gt_segment, pred_segment] += 1
    return counts


@_silent
def mask_probabilities(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return (K, H, W): the interpolated probabilities that `paste_masks` compares with its threshold.

    NaN marks pixels outside the mask.
    """
    logits, corners = _array(mask_logits), _array(boxes)
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
                result[k, i, j] = _bilinear(probabilities[k : k + 1], y, x)[0]
    return result


@_silent
def paste_masks(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> np.ndarray:
    """Threshold `mask_probabilities`; where one differs from the threshold only by rounding, both results are right."""
    return mask_probabilities(mask_logits, boxes, size) >= threshold


# Images and labels


def _resize_coefficients(source: int, target: int) -> list[tuple[int, int, int, int]]:
    """For each output position, return two cells and their weights in 1/2048, as OpenCV's INTER_LINEAR for 8 bits."""
    scale = 1 / (target / source)
    result = []
    for place in range(target):
        at = np.float32((place + 0.5) * scale - 0.5)
        cell = math.floor(at)
        fraction = at - np.float32(cell)
        low, high = min(max(cell, 0), source - 1), min(max(cell + 1, 0), source - 1)
        weights = [int(np.rint(part * np.float32(2048))) for part in (np.float32(1) - fraction, fraction)]
        result.append((low, high, *weights))
    return result


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) bytes as OpenCV's `resize` with INTER_LINEAR."""
    height, width = size
    result = np.zeros((height, width, 3), dtype=np.int64)
    if image.shape[:2] == (2 * height, 2 * width):
        for y in range(height):
            for x in range(width):
                result[y, x] = (image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum(axis=(0, 1)) + 2) >> 2
        return result
    rows, columns = _resize_coefficients(image.shape[0], height), _resize_coefficients(image.shape[1], width)
    for y, (top, bottom, top_weight, bottom_weight) in enumerate(rows):
        for x, (left, right, left_weight, right_weight) in enumerate(columns):
            upper = image[top, left] * left_weight + image[top, right] * right_weight
            lower = image[bottom, left] * left_weight + image[bottom, right] * right_weight
            total = ((top_weight * (upper >> 4)) >> 16) + ((bottom_weight * (lower >> 4)) >> 16)
            result[y, x] = (total + 2) >> 2
    return result


@_silent
def preprocess_images(
    images: Tensor | Sequence[Tensor],
    sizes: tuple[int, int] | Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    divisor: int = 32,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Compute the documented float32 result, bit for bit, whatever `dtype` is."""
    if isinstance(images, Tensor):
        images, sizes = [images], [sizes]
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes))
    result = np.zeros((len(images), 3, height, width))
    for n, (image, size) in enumerate(zip(images, sizes)):
        resized = _resize(_array(image), size)
        for channel in range(3):
            centered = resized[:, :, 2 - channel].astype(np.float32) - np.float32(mean[channel])
            result[n, channel, : size[0], : size[1]] = (centered * (1 / np.float64(std[channel]))).astype(np.float32)
    return result


@_silent
def upsampled_logits(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Return (H, W, C): the interpolated logits, of which `stuff_labels` takes the argmax at every pixel."""
    values = _array(logits)
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


@_silent
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


# Normalization


def _doubled(values: np.ndarray) -> np.ndarray:
    """Interpolate (S, ...) to (2 S, ...) linearly along the first axis, repeating the first and the last value."""
    size = len(values)
    result = []
    for index in range(2 * size):
        place = index * (size - 1) / (2 * size - 1)
        low = min(int(place), size - 1)
        high = min(low + 1, size - 1)
        result.append(values[low] * (1 - (place - low)) + values[high] * (place - low))
    return np.array(result).reshape(2 * size, *values.shape[1:])


@_silent
def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    upsample: bool = False,
) -> np.ndarray:
    values = _array(input)
    batch, channels, height, width = values.shape
    by_group = channels // num_groups
    result = np.zeros(values.shape)
    if values.size == 0:
        return np.zeros((batch, channels, 2 * height, 2 * width)) if upsample else result
    for n in range(batch):
        for c in range(channels):
            first = c // by_group * by_group
            group = values[n, first : first + by_group]
            mean = group.sum() / group.size
            variance = ((group - mean) ** 2).sum() / group.size
            result[n, c] = (values[n, c] - mean) / np.sqrt(variance + eps)
            if weight is not None:
                result[n, c] *= _array(weight)[c]
            if bias is not None:
                result[n, c] += _array(bias)[c]
    result = np.where(result < 0, 0, result)
    if upsample:
        result = np.moveaxis(_doubled(np.moveaxis(result, 2, 0)), 0, 2)
        result = np.moveaxis(_doubled(np.moveaxis(result, 3, 0)), 0, 3)
    return result


# Loss


@_silent
def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25, reduction: str = "none"
) -> np.ndarray | np.float64:
    values = _array(logits)
    classes = values.shape[-1]
    targets = _array(labels).reshape(-1)
    rows = values.reshape(len(targets), classes)
    loss = np.zeros_like(rows)
    for row, target in enumerate(targets):
        if not 0 <= target <= classes:
            continue
        for label in range(classes):
            right = rows[row, label] if label == target else -rows[row, label]  # the larger, the better
            weight = 1.0 if alpha < 0 else alpha if label == target else 1 - alpha
            rest = np.log1p(np.exp(-abs(right)))
            modulation = np.exp(-gamma * (rest + max(right, 0.0))) if gamma > 0 else 1.0  # (1 - p) ** gamma
            loss[row, label] = weight * modulation * (rest + max(-right, 0.0))
    if reduction == "sum":
        return loss.sum()
    return np.float64(loss.sum() / loss.size) if reduction == "mean" else loss.reshape(values.shape)


# Tools for comparing


def perturbed_boxes(boxes: Tensor, amount: float = 1e-6) -> list[Tensor]:
    """Return the boxes in float64 and four copies perturbed by about a rounding: up, down, wider and narrower.

    RoIAlign is discontinuous where a sample crosses the border, a bin gets one more sample, or a RoI changes its level.
    There the operator is right if each number is that of one of these boxes.

    Args:
        boxes: (K, 5) of batch index and corners, or (K, 4).
        amount: size of the perturbation, relative to the largest coordinate of each box, or to 1 if that is larger.
    """
    boxes64 = boxes.detach().double().cpu()
    corners = boxes64[:, -4:]
    step = amount * corners.abs().amax(dim=1, keepdim=True).clamp(min=1)
    moved = []
    for first, second in ((0, 0), (1, 1), (-1, -1), (-1, 1), (1, -1)):
        signs = torch.tensor([first, first, second, second], dtype=torch.float64, device="cpu")
        moved.append(torch.cat((boxes64[:, :-4], torch.where(step.isfinite(), corners + signs * step, corners)), dim=1))
    return moved


def numeric_gradient(function: Callable[[Tensor], float], tensor: Tensor, step: float = 1e-5) -> np.ndarray:
    """Compute the gradient of a number with respect to `tensor`, by central differences in float64.

    Args:
        function: takes a float64 tensor of the shape of `tensor` and returns a number.
        tensor: argument of the gradient; the function is smooth within `step` of it.
        step: half of the distance between the two points of each difference.
    """
    point = tensor.detach().double().cpu().contiguous().clone()
    gradient = np.zeros(tuple(point.shape))
    for index in np.ndindex(*point.shape):
        value = float(point[index])
        point[index] = value + step
        above = float(function(point))
        point[index] = value - step
        below = float(function(point))
        point[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient
