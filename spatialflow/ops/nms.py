# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression: of boxes that overlap too much, the best one stays."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import is_checking, number, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps, from the best score down, every box that no kept box overlaps by more than a threshold.

    Args:
        boxes: (N, 4) rows of (x1, y1, x2, y2), any unit; float32, float64, float16 or bfloat16, any strides.
        scores: (N) of those dtypes too.
        iou_threshold: intersection over union above which the worse box of a pair is dropped; 0 or more.

    Returns:
        Row numbers of the kept boxes, int64, by descending score.

    Raises:
        RuntimeError: a shape, dtype, device or threshold that does not fit, naming the argument.
        ValueError: a threshold that is no number; within `spatialflow.ops.checked()`, a box or score that is not
            finite.

    Remarks:
        Equal scores rank by row, the lower row first, on every device. A pair is decided by
        `intersection > iou_threshold * union` in float32 (float64 if either tensor is), the threshold and each
        operation rounded: boxes whose IoU is the threshold itself both stay, as far as that arithmetic can tell.
        A box with a NaN corner and a box with a NaN score are never kept. A box without area (reversed or empty), and
        one whose area is infinite, suppresses nothing and is never suppressed; overflow and underflow count as such.
        Infinite scores rank first or last.
        No gradient: row numbers have none. No boxes: an empty result. Memory is linear in N.
        The length of the result depends on the values: to trace it with `torch.compile(fullgraph=True)`, set
        `torch._dynamo.config.capture_dynamic_output_shape_ops`. `multiclass_nms` has results of fixed shape.

    Example:
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
    """`nms` within each class (or image, level, ...): boxes of different classes never meet.

    Args:
        boxes, scores, iou_threshold: as for `nms`.
        idxs: (N) int64, the class of each box; any values, negative and huge ones included.

    Returns:
        Row numbers of the kept boxes of all classes, int64, by descending score.

    Raises:
        RuntimeError: a shape, dtype, device or threshold that does not fit, naming the argument.
        ValueError: a threshold that is no number; within `spatialflow.ops.checked()`, a box or score that is not
            finite.

    Remarks:
        All of those of `nms`. Each class is treated by itself with its boxes as given: they are not shifted apart by
        class, so neither negative coordinates nor many classes change the result.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0]])
        >>> batched_nms(boxes, torch.tensor([0.6, 0.9]), torch.tensor([7, 3]), iou_threshold=0.5)
        tensor([1, 0])

    Source: signature and result of torchvision.ops.batched_nms.
    """
    if not are_tensors(boxes, scores, idxs):
        return with_arrays(batched_nms, locals())
    if is_checking():
        _require_finite("batched_nms", boxes, scores)
    return _batched_nms(boxes, scores, idxs, number("batched_nms", "iou_threshold", iou_threshold))


_nms, _batched_nms = without_gradient("nms"), without_gradient("batched_nms")


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
def _(boxes, scores, iou_threshold):
    return _fake_rows("nms", boxes, scores)


@register_fake("batched_nms")
def _(boxes, scores, idxs, iou_threshold):
    return _fake_rows("batched_nms", boxes, scores)
