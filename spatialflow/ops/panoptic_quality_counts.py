# SPDX-License-Identifier: Apache-2.0
"""Pixel counts for panoptic quality, from id maps that are tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import integer
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def panoptic_quality_counts(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> Tensor:
    """Count the pixels that each ground-truth segment shares with each predicted segment.

    The area of a segment is the sum over its row or column. Row and column 0 hold the overlap with void. The table is
    all that panoptic quality needs of the pixels. Ids are numbered from 1, as in the result of `panoptic_merge`. For
    maps with any ids, `spatialflow.panoptic.evaluate` counts without torch.

    Args:
        gt_map: (H, W) int32 ids, 0 = void, 1 .. gt_segments.
        pred_map: (H, W) int32 ids, 0 = void, 1 .. pred_segments.
        gt_segments: number of ground-truth segments G.
        pred_segments: number of predicted segments P, or an upper bound of it.

    Returns:
        (G + 1, P + 1) int64. Its size depends on the arguments alone, so the host does not wait for the device.

    Raises:
        RuntimeError: a shape, dtype, device or number that does not fit, naming the argument.
        ValueError: a number of segments that is not an integer.

    Note:
        A pixel with an id outside its range is not counted. The result has no gradient.

        Complexity: one pass over the H * W pixels of both maps. Memory is the table; on the CPU each thread may have
        its own table.

        Difference from panopticapi: ids are consecutive, and the table is a tensor on the device of the maps.

    Examples:
        >>> truth = torch.tensor([[1, 1, 0], [1, 1, 0]], dtype=torch.int32)
        >>> prediction = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.int32)
        >>> panoptic_quality_counts(truth, prediction, 1, 1)
        tensor([[1, 1],
                [1, 3]])

    Source: panopticapi, `pq_compute_single_core` (the confusion matrix).
    """
    if not are_tensors(gt_map, pred_map):
        return with_arrays(panoptic_quality_counts, locals())
    gt_segments = integer("panoptic_quality_counts", "gt_segments", gt_segments)
    pred_segments = integer("panoptic_quality_counts", "pred_segments", pred_segments)
    return _panoptic_quality_counts(gt_map, pred_map, gt_segments, pred_segments)


_panoptic_quality_counts = without_gradient("panoptic_quality_counts")


@register_fake("panoptic_quality_counts")
def _(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> Tensor:
    torch._check(
        gt_map.dim() == 2, lambda: f"panoptic_quality_counts: gt_map must be (H, W), got {tuple(gt_map.shape)}"
    )
    return gt_map.new_empty((gt_segments + 1, pred_segments + 1), dtype=torch.int64)
