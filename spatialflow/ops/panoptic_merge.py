# SPDX-License-Identifier: Apache-2.0
"""Panoptic merge: one id map and a table of segments from instance masks, a stuff label map and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatialflow.deprecated import renamed_keywords
from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import integer, integers, is_checking, number, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


class PanopticMergeOutput(NamedTuple):
    """Result of `panoptic_merge`. Row r of every table is the segment with id r + 1; R = K + stuff_labels."""

    id_map: Tensor  # (H, W) int32, 0 = void
    labels: Tensor  # (R) int64, of the instance or of the stuff; -1 in unused rows
    is_thing: Tensor  # (R) bool
    instances: Tensor  # (R) int64, index of the segment's mask in the input; -1 for stuff and unused rows
    areas: Tensor  # (R) int64, pixels
    boxes: Tensor  # (R, 4) int64, x, y, width, height of the segment's pixels
    scores: Tensor  # (R) float32, 0 for stuff and unused rows
    count: Tensor  # type: ignore[assignment]  # () int64, rows in use; hides tuple.count


@renamed_keywords(stuff_area_limit="stuff_area_threshold", box_threshold="box_overlap_threshold")
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
    """Merge instances and stuff into one map in which every pixel has the id of one segment or is void.

    1. Instances with `score >= score_threshold` are visited by descending score, ties in input order. An instance is
       dropped if it has no pixels, or if more than `overlap_threshold` of its pixels are in instances kept before.
       Other instances are kept and take their free pixels.
    2. Each stuff label takes its free pixels, unless they are fewer than `stuff_area_threshold`.
    3. The box of each instance of step 1 is visited in the same order, whether the instance is kept or not. If at least
       `box_overlap_threshold` of the box's pixels are still void, these void pixels join the instance's segment, or a
       new one. Boxes are truncated to integers and clipped to the image.

    Args:
        masks: (K, H, W) bool or uint8, not zero = inside.
        scores: (K), any floating dtype.
        labels: (K), any integer dtype; copied to the table.
        boxes: (K, 4) x1, y1, x2, y2 in pixels, any floating dtype; None skips step 3.
        stuff: (H, W), any integer dtype; values outside [0, stuff_labels) are void.
        stuff_labels: number of stuff labels.
        ignored_stuff: stuff labels that stay void, such as "other".
        score_threshold: least score of an instance. All defaults are the paper's for COCO.
        overlap_threshold: largest share of an instance's pixels in instances kept before.
        stuff_area_threshold: least number of free pixels of a stuff label.
        box_overlap_threshold: least share of void pixels of a box in step 3.

    Returns:
        `PanopticMergeOutput`. Ids count from 1 in order of creation: instances, stuff by label, then new segments of
        step 3. Every id of the map has a row in use, and every row in use has pixels. All shapes follow from the shapes
        of the arguments and `stuff_labels`, so the host does not wait for the device.

    Raises:
        RuntimeError: a shape, dtype or option that does not fit, naming the argument.
        ValueError: `ignored_stuff` that is not a sequence of integers, `stuff_labels` or `stuff_area_threshold` that is
            not an integer, another threshold that is not a number; within `spatialflow.ops.checked()`, a score or box
            that is not finite.

    Note:
        Scores, shares and thresholds are compared in float64, where 0.7 of a float32 tensor is below a threshold of
        0.7. Boxes are truncated toward zero from their dtype; x2 and y2 are exclusive. A kept instance without free
        pixels (`overlap_threshold` of 1) is not a segment, but step 3 may make it one. Rows hold scores in float32.

        An instance with a NaN score is ignored; a box with a coordinate that is not finite fills nothing. K, H and W
        may be 0. The results have no gradients and do not depend on the number of threads.

        Complexity: one pass over the K * H * W mask values, which are packed to K * H * W / 8 bytes. All later steps
        use these bits. Instances are decided one after the other.

        Difference from detectron2 (`combine_semantic_and_instance_outputs`): step 3, and results of fixed shape.
        `spatialflow.panoptic.merge` maps labels to categories.

    Examples:
        >>> masks = torch.zeros(1, 4, 6, dtype=torch.bool)
        >>> masks[0, :2, :3] = True
        >>> stuff = torch.ones(4, 6, dtype=torch.int64)
        >>> scores, labels = torch.tensor([0.9]), torch.tensor([5])
        >>> merged = panoptic_merge(masks, scores, labels, None, stuff, 2, stuff_area_threshold=4)
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
    ignored_stuff = integers("panoptic_merge", "ignored_stuff", ignored_stuff)
    id_map, table, segment_scores, count = _panoptic_merge(
        masks,
        scores,
        labels,
        boxes,
        stuff,
        integer("panoptic_merge", "stuff_labels", stuff_labels),
        ignored_stuff,
        number("panoptic_merge", "score_threshold", score_threshold),
        number("panoptic_merge", "overlap_threshold", overlap_threshold),
        integer("panoptic_merge", "stuff_area_threshold", stuff_area_threshold),
        number("panoptic_merge", "box_overlap_threshold", box_overlap_threshold),
    )
    return PanopticMergeOutput(
        id_map, table[:, 0], table[:, 1].bool(), table[:, 2], table[:, 3], table[:, 4:8], segment_scores, count
    )


_panoptic_merge = without_gradient("panoptic_merge")


@register_fake("panoptic_merge")
def _(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor | None,
    stuff: Tensor,
    stuff_labels: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(masks.dim() == 3, lambda: f"panoptic_merge: masks must be (K, H, W), got {tuple(masks.shape)}")
    count, height, width = masks.shape
    rows = count + stuff_labels
    return (
        masks.new_empty((height, width), dtype=torch.int32),
        masks.new_empty((rows, 8), dtype=torch.int64),
        masks.new_empty((rows,), dtype=torch.float32),
        masks.new_empty((), dtype=torch.int64),
    )
