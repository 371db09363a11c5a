# SPDX-License-Identifier: Apache-2.0
"""The counts behind panoptic quality, for id maps that are already tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def panoptic_quality_counts(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> Tensor:
    """Counts the pixels that every segment of the ground truth shares with every predicted segment.

    Areas are the sums over a row or column, and row and column 0 hold the overlap with void, so the table is all that
    panoptic quality needs of the pixels. `panoptic_merge` gives maps with such ids; `spatialflow.panoptic.evaluate`
    counts maps with any ids without torch.

    Args:
        gt_map: (H, W) int32 ids, 0 = void, 1 .. gt_segments.
        pred_map: (H, W) int32 ids, 0 = void, 1 .. pred_segments.
        gt_segments: number of ground-truth segments G.
        pred_segments: number of predicted segments P, or more.

    Returns:
        (G + 1, P + 1) int64. Its size depends on the arguments alone, so nothing waits for the device.

    Raises:
        RuntimeError: a shape, dtype, device or number that does not fit, naming the argument.

    Remarks:
        A pixel with an id outside its range is not counted. No gradients.

    Example:
        >>> truth = torch.tensor([[1, 1, 0], [1, 1, 0]], dtype=torch.int32)
        >>> prediction = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.int32)
        >>> panoptic_quality_counts(truth, prediction, 1, 1)
        tensor([[1, 1],
                [1, 3]])

    Source: panopticapi, `pq_compute_single_core` (the confusion matrix).
    """
    if not are_tensors(gt_map, pred_map):
        return with_arrays(panoptic_quality_counts, locals())
    return _panoptic_quality_counts(gt_map, pred_map, gt_segments, pred_segments)


_panoptic_quality_counts = without_gradient("panoptic_quality_counts")


@register_fake("panoptic_quality_counts")
def _(gt_map, pred_map, gt_segments, pred_segments):
    torch._check(
        gt_map.dim() == 2, lambda: f"panoptic_quality_counts: gt_map must be (H, W), got {tuple(gt_map.shape)}"
    )
    return gt_map.new_empty((gt_segments + 1, pred_segments + 1), dtype=torch.int64)
