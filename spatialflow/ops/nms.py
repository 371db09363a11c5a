# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression: of boxes that overlap by more than a threshold, keep the one with the best score."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import is_checking, number, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep, from the best score down, every box that no kept box overlaps by more than a threshold.

    Args:
        boxes: (N, 4) rows of (x1, y1, x2, y2), any unit; float32, float64, float16 or bfloat16, any strides.
        scores: (N), any of those dtypes.
        iou_threshold: intersection over union above which the box with the lower score is dropped; 0 or more.

    Returns:
        Row numbers of the kept boxes, int64, by descending score.

    Raises:
        RuntimeError: a shape, dtype, device or threshold that does not fit, naming the argument.
        ValueError: a threshold that is not a number; within `spatialflow.ops.checked()`, a box or score that is not
            finite.

    Note:
        Equal scores rank by row, the lower row first, on every device. The second box of a pair is dropped if
        `intersection > iou_threshold * union`. This is computed in float32 (float64 if either tensor is), and the
        threshold and each operation are rounded. If the two sides are equal in this arithmetic, both boxes stay.

        A box with a NaN corner and a box with a NaN score are never kept. A box without area (reversed or empty), and
        one whose area is infinite, suppresses nothing and is never suppressed. Areas that overflow or underflow count
        as infinite or zero. Infinite scores rank first or last. Without boxes the result is empty. Row numbers have no
        gradient.

        The length of the result depends on the values. To trace it with `torch.compile(fullgraph=True)`, set
        `torch._dynamo.config.capture_dynamic_output_shape_ops`. `multiclass_nms` has results of fixed shape.

        Complexity: a sort of N boxes, then at most N tests for each kept box. Memory is O(N); there is no N x N matrix.

        Difference from torchvision: NaN scores and boxes are never kept. mmcv's `nms` also returns the detections and
        has an `offset`.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
        >>> nms(boxes, torch.tensor([0.6, 0.9, 0.3]), iou_threshold=0.5)
        tensor([1, 2])

    Source: greedy NMS with the signature and result of torchvision.ops.nms.
    """
    if not are_tensors(boxes, scores):
        return with_arrays(nms, locals())
    if is_checking():
        _require_finite("nms", boxes, scores)
    return _nms(boxes, scores, number("nms", "iou_threshold", iou_threshold))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Apply `nms` within each class (or image, level, ...): boxes of different classes do not suppress each other.

    Args:
        boxes: as for `nms`.
        scores: as for `nms`.
        idxs: (N), the class of each box; any values, including negative and huge ones. int64 needs no conversion; all
            other real dtypes are converted, and floating-point classes are different if their values are.
        iou_threshold: as for `nms`.

    Returns:
        Row numbers of the kept boxes of all classes, int64, by descending score.

    Raises:
        RuntimeError: a shape, dtype, device or threshold that does not fit, naming the argument.
        ValueError: a threshold that is not a number; within `spatialflow.ops.checked()`, a box or score that is not
            finite.

    Note:
        All notes of `nms` apply. Each class is processed separately, with its boxes as they are.

        Complexity: as for `nms`, with tests only between boxes of one class.

        Difference from torchvision and mmcv: they may shift the boxes of each class by an offset. Here boxes are never
        shifted, so negative coordinates and many classes do not change the result.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0]])
        >>> batched_nms(boxes, torch.tensor([0.6, 0.9]), torch.tensor([7, 3]), iou_threshold=0.5)
        tensor([1, 0])

    Source: signature and result of torchvision.ops.batched_nms.
    """
    if not are_tensors(boxes, scores, idxs):
        return with_arrays(batched_nms, locals())
    if is_checking():
        _require_finite("batched_nms", boxes, scores)
    if idxs.dtype != torch.int64:
        idxs = _as_int64(idxs)
    return _batched_nms(boxes, scores, idxs, number("batched_nms", "iou_threshold", iou_threshold))


_nms, _batched_nms = without_gradient("nms"), without_gradient("batched_nms")


def _as_int64(idxs: Tensor) -> Tensor:
    """Return classes of another real dtype as int64: equal where they are equal, different where they differ."""
    if idxs.is_complex():
        return idxs  # the operator refuses them
    if idxs.is_floating_point():
        return torch.unique(idxs, return_inverse=True)[1]
    return idxs.to(torch.int64)


def _require_finite(op: str, boxes: Tensor, scores: Tensor) -> None:
    require_finite(op, "boxes", boxes)
    require_finite(op, "scores", scores)


def _fake_rows(op: str, boxes: Tensor, scores: Tensor) -> Tensor:
    torch._check(
        boxes.dim() == 2 and boxes.shape[1] == 4,
        lambda: f"{op}: boxes must have shape (N, 4), got {tuple(boxes.shape)}",
    )
    torch._check(scores.dim() == 1, lambda: f"{op}: scores must have shape (N), got {tuple(scores.shape)}")
    torch._check(
        scores.shape[0] == boxes.shape[0],
        lambda: f"{op}: scores must have one entry per box, got {scores.shape[0]} for {boxes.shape[0]} boxes",
    )
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@register_fake("nms")
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _fake_rows("nms", boxes, scores)


@register_fake("batched_nms")
def _(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return _fake_rows("batched_nms", boxes, scores)
