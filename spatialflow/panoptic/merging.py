# SPDX-License-Identifier: Apache-2.0
"""Panoptic merge for any network: from arrays or tensors to an id map and a list of segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from spatialflow.deprecated import renamed_keywords
from spatialflow.ops import PanopticMergeOutput, panoptic_merge

Array = Any  # numpy array, tensor, or a nested list of numbers


_MOST_STUFF_LABELS = 1 << 16  # `panoptic_merge` returns a row per stuff label


class MergeResult(NamedTuple):
    """An id map, and one mapping per segment in the order of ids."""

    id_map: Any  # (H, W) int32, numpy or tensor like the masks that were given; 0 = void
    segments: list[dict[str, Any]]  # id, category_id, isthing, area, bbox [x, y, width, height], score (None for stuff)


@renamed_keywords(stuff_area_limit="stuff_area_threshold", box_threshold="box_overlap_threshold")
def merge(
    masks: Array,
    scores: Array,
    labels: Array,
    boxes: Array | None,
    stuff: Array | None,
    *,
    thing_categories: Sequence[int] | Mapping[int, int] | None = None,
    stuff_categories: Sequence[int | None] | Mapping[int, int | None] | None = None,
    void_label: int = 255,
    score_threshold: float = 0.37,
    overlap_threshold: float = 0.37,
    stuff_area_threshold: int = 4900,
    box_overlap_threshold: float | None = 0.5,
) -> MergeResult:
    """Merge instances, their boxes and a stuff label map into one panoptic result.

    See `spatialflow.ops.panoptic_merge` for the steps and the thresholds.

    Args:
        masks: (K, H, W) bool or uint8, nonzero = inside. Numpy or tensor, on any device.
        scores: (K) numbers.
        labels: (K) integers, indices of thing classes (or category ids, see thing_categories).
        boxes: (K, 4) x1, y1, x2, y2 in pixels; None skips the step that fills boxes.
        stuff: (H, W) integers, stuff label of every pixel, or None: no stuff.
        thing_categories: category id of each thing label; None: a label is its category id.
        stuff_categories: category id of each stuff label, None for one that stays void. Labels that are not listed are
            void. None: a label is its category id, and negative labels are void.
        void_label: stuff label that is void regardless of stuff_categories.
        score_threshold: instances and boxes below it are left out.
        overlap_threshold: an instance with a larger share of its pixels already taken is dropped.
        stuff_area_threshold: stuff with fewer free pixels is dropped.
        box_overlap_threshold: least void share of a box that is filled; None fills no boxes.

    Returns:
        `MergeResult`. Ids are 1, 2, ... without gaps; every segment has at least one pixel, and every pixel that is not
        0 belongs to a listed segment. The same input gives the same ids.

    Raises:
        ValueError: an argument of the wrong kind or shape, a stuff label that is too large, or a segment whose label
            has no category. The message says which.
    """
    like_tensor = isinstance(masks, torch.Tensor)
    masks = _tensor(masks, "masks")
    if masks.dim() != 3 or masks.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"masks must be (K, H, W) bool or uint8, got {tuple(masks.shape)} {masks.dtype}")
    count, height, width = masks.shape
    scores = _numbers(scores, "scores", (count,), masks.device)
    labels = _integers(labels, "labels", (count,), masks.device)
    if boxes is not None:
        boxes = _numbers(boxes, "boxes", (count, 4), masks.device)
    if stuff is None:
        stuff = masks.new_full((height, width), void_label, dtype=torch.int64)
    stuff = _integers(stuff, "stuff", (height, width), masks.device)

    stuff_category_by_label = dict(
        stuff_categories if isinstance(stuff_categories, Mapping) else enumerate(stuff_categories or ())
    )
    if stuff_categories is None:
        stuff_labels = _labels_in_use(stuff, void_label)
        ignored = [void_label]
    else:
        labels_with_category = {
            label for label, category in stuff_category_by_label.items() if category is not None
        } - {void_label}
        stuff_labels = max(labels_with_category, default=-1) + 1
        ignored = sorted(set(range(stuff_labels)) - labels_with_category)
    if stuff_labels > _MOST_STUFF_LABELS:
        raise ValueError(f"stuff labels must be below {_MOST_STUFF_LABELS}, got {stuff_labels - 1}")

    result = panoptic_merge(
        masks,
        scores,
        labels,
        None if box_overlap_threshold is None else boxes,
        stuff,
        stuff_labels,
        ignored_stuff=ignored,
        score_threshold=score_threshold,
        overlap_threshold=overlap_threshold,
        stuff_area_threshold=stuff_area_threshold,
        box_overlap_threshold=0.0 if box_overlap_threshold is None else box_overlap_threshold,
    )
    segments = segment_list(result, thing_categories, None if stuff_categories is None else stuff_category_by_label)
    return MergeResult(result.id_map if like_tensor else result.id_map.numpy(), segments)


def _labels_in_use(stuff: torch.Tensor, void_label: int) -> int:
    """Return the largest label other than `void_label`, plus one; 0 if there is no such label of at least 0."""
    if stuff.numel() == 0:
        return 0
    largest = int(stuff.max())
    if largest == void_label:
        largest = int(torch.where(stuff == void_label, -1, stuff.long()).max())
    return max(largest + 1, 0)


def segment_list(
    result: PanopticMergeOutput,
    thing_categories: Sequence[int] | np.ndarray | Mapping[int, int] | None,
    stuff_categories: Sequence[int | None] | np.ndarray | Mapping[int, int | None] | None,
) -> list[dict[str, Any]]:
    """Convert the segments of a merge to mappings with category ids; the host waits for the device once.

    Args:
        result: the result of `panoptic_merge`.
        thing_categories: category id of each thing label; None: a label is its category id.
        stuff_categories: the same for stuff labels.

    Raises:
        ValueError: a segment's label has no category.
    """
    columns = torch.cat(
        [
            torch.stack([result.labels, result.is_thing.long(), result.areas], dim=1),
            result.boxes,
            result.scores.double().view(torch.int64)[:, None],  # bit for bit, so that one copy to the host is enough
        ],
        dim=1,
    )
    rows = torch.cat([result.count.expand(1, columns.shape[1]), columns]).cpu()
    scores = rows[1:, -1].contiguous().view(torch.float64).tolist()
    segments = []
    for index, (label, is_thing, area, x, y, width, height, _) in enumerate(rows[1 : 1 + int(rows[0, 0])].tolist()):
        categories = thing_categories if is_thing else stuff_categories
        segments.append(
            {
                "id": index + 1,
                "category_id": label if categories is None else _category(categories, label, is_thing),
                "isthing": is_thing,
                "area": area,
                "bbox": [x, y, width, height],
                "score": scores[index] if is_thing else None,
            }
        )
    return segments


def _category(categories: Sequence[Any] | np.ndarray | Mapping[Any, Any], label: int, is_thing: int) -> int:
    try:
        if isinstance(categories, Mapping) or label >= 0:
            return int(categories[label])
    except (KeyError, IndexError):
        pass
    kind = "thing_categories" if is_thing else "stuff_categories"
    raise ValueError(f"{kind} must have a category for every label, got none for {label}")


def _tensor(value: Array, name: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # torch computes with one unsigned type only
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _shaped(value: Array, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    tensor = _tensor(value, name)
    if tensor.numel() == 0 and 0 in shape:
        tensor = tensor.reshape(shape)  # an empty list has no columns
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to fit the masks, got {tuple(tensor.shape)}")
    return tensor.to(device)


def _numbers(value: Array, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    tensor = _shaped(value, name, shape, device)
    return tensor if tensor.is_floating_point() else tensor.double()


def _integers(value: Array, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    tensor = _shaped(value, name, shape, device)
    if tensor.numel() == 0:
        return tensor.long()
    if tensor.dtype == torch.bool or tensor.is_floating_point():
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor
