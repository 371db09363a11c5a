# SPDX-License-Identifier: Apache-2.0
"""Panoptic merge: instance masks, a stuff label map and boxes become one id map and a table of segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import is_checking, items, number, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


class PanopticMergeOutput(NamedTuple):
    """Result of `panoptic_merge`. Row r of every table describes the segment with id r + 1; R = K + stuff_labels."""

    id_map: Tensor  # (H, W) int32, 0 = void
    labels: Tensor  # (R) int64, of the instance or of the stuff; -1 in unused rows
    is_thing: Tensor  # (R) bool
    instances: Tensor  # (R) int64, index of the segment's mask in the input; -1 for stuff and unused rows
    areas: Tensor  # (R) int64, pixels
    boxes: Tensor  # (R, 4) int64, x, y, width, height of the segment's pixels
    scores: Tensor  # (R) float32, 0 for stuff and unused rows
    count: Tensor  # () int64, rows in use


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
    """Merges instances and stuff into one map in which every pixel belongs to one segment or to none.

    1. Instances with `score >= score_threshold`, highest score first, ties in input order. One without pixels, or with
       more than `overlap_threshold` of its pixels taken by those kept before, is dropped; a kept one takes its free
       pixels.
    2. Each stuff label takes its free pixels, unless they are fewer than `stuff_area_threshold`.
    3. Every box of step 1, its instance kept or not, in the same order: if at least `box_overlap_threshold` of its pixels are
       still void, they go to the instance's segment, or to a new one. Boxes are truncated to integers and cut to the
       image.

    Args:
        masks: (K, H, W) bool or uint8, not zero = inside.
        scores: (K), any floating dtype.
        labels: (K), any integer dtype; copied to the table.
        boxes: (K, 4) x1, y1, x2, y2 in pixels, any floating dtype; None leaves out step 3.
        stuff: (H, W), any integer dtype; values outside [0, stuff_labels) are void.
        stuff_labels: number of stuff labels.
        ignored_stuff: stuff labels that stay void, such as "other".
        score_threshold, overlap_threshold, stuff_area_threshold, box_overlap_threshold: see above. Defaults: the paper's for COCO.

    Returns:
        `PanopticMergeOutput`. Ids count from 1 in order of creation: instances, stuff by label, then new ones of
        step 3. Every id of the map is one row in use and the other way round. All shapes are fixed by the arguments'
        shapes and `stuff_labels`, so nothing waits for the device.

    Raises:
        RuntimeError: a shape, dtype or option that does not fit, naming the argument.
        ValueError: `ignored_stuff` that is no sequence, a threshold that is no number; within
            `spatialflow.ops.checked()`, a score or box that is not finite.

    Remarks:
        Scores, shares and thresholds are compared in float64, where 0.7 of a float32 tensor is below a threshold of
        0.7. Boxes are truncated towards zero from the dtype given; x2 and y2 are outside. A kept instance without free
        pixels (overlap_threshold of 1) is no segment, but step 3 may make it one. Rows hold scores in float32.
        A NaN score never enters; a box with a coordinate that is not finite fills nothing. No instances, or no pixels,
        are fine. No gradients. The result does not depend on the number of threads.

    Example:
        >>> masks = torch.zeros(1, 4, 6, dtype=torch.bool)
        >>> masks[0, :2, :3] = True
        >>> stuff = torch.ones(4, 6, dtype=torch.int64)
        >>> merged = panoptic_merge(masks, torch.tensor([0.9]), torch.tensor([5]), None, stuff, 2, stuff_area_threshold=4)
        >>> merged.id_map[0]
        tensor([1, 1, 1, 2, 2, 2], dtype=torch.int32)
        >>> merged.labels, merged.areas  # rows: the instance, the stuff, one that is not used
        (tensor([ 5,  1, -1]), tensor([ 6, 18,  0]))

    Source: Chen et al., SpatialFlow (2020), sections III-A3 and IV-B2; steps 1 and 2: Kirillov et al., Panoptic
    Segmentation (2019), section 7.
    """
    if not are_tensors(masks, scores, labels, stuff, optional=(boxes,)):
        return with_arrays(panoptic_merge, locals())
    if is_checking():
        require_finite("panoptic_merge", "scores", scores)
        if boxes is not None:
            require_finite("panoptic_merge", "boxes", boxes)
    ignored_stuff = items("panoptic_merge", "ignored_stuff", ignored_stuff)
    id_map, table, segment_scores, count = _panoptic_merge(
        masks,
        scores,
        labels,
        boxes,
        stuff,
        stuff_labels,
        ignored_stuff,
        number("panoptic_merge", "score_threshold", score_threshold),
        number("panoptic_merge", "overlap_threshold", overlap_threshold),
        stuff_area_threshold,
        number("panoptic_merge", "box_overlap_threshold", box_overlap_threshold),
    )
    return PanopticMergeOutput(
        id_map, table[:, 0], table[:, 1].bool(), table[:, 2], table[:, 3], table[:, 4:8], segment_scores, count
    )


_panoptic_merge = without_gradient("panoptic_merge")


@register_fake("panoptic_merge")
def _(
    masks,
    scores,
    labels,
    boxes,
    stuff,
    stuff_labels,
    ignored_stuff,
    score_threshold,
    overlap_threshold,
    stuff_area_threshold,
    box_overlap_threshold,
):
    torch._check(masks.dim() == 3, lambda: f"panoptic_merge: masks must be (K, H, W), got {tuple(masks.shape)}")
    count, height, width = masks.shape
    rows = count + stuff_labels
    return (
        masks.new_empty((height, width), dtype=torch.int32),
        masks.new_empty((rows, 8), dtype=torch.int64),
        masks.new_empty((rows,), dtype=torch.float32),
        masks.new_empty((), dtype=torch.int64),
    )
