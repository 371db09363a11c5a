# SPDX-License-Identifier: Apache-2.0
"""Detections of a batch: score threshold, NMS per class, and the best D of all classes, in results of fixed shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import integer, is_checking, number, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


class Detections(NamedTuple):
    """Detections by descending score; rows from `count` on are padding.

    If the inputs have no batch, the shapes have no B.
    """

    boxes: Tensor  # (B, D, 4), padded with 0
    scores: Tensor  # (B, D), padded with 0
    labels: Tensor  # (B, D) int64, classes, padded with -1
    count: Tensor  # type: ignore[assignment]  # (B) int64, detections of each image; hides tuple.count
    indices: Tensor  # (B, D) int64, rows of the input boxes, padded with -1


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> Detections:
    """Return up to D detections of each image: (box, class) pairs above a score threshold that NMS per class keeps.

    Args:
        boxes: (B, N, 4), or (N, 4) for one image, rows of (x1, y1, x2, y2) shared by all classes; float32, float64,
            float16 or bfloat16, any strides.
        scores: (B, N, C), or (N, C); any of those dtypes.
        score_threshold: a (box, class) pair takes part if its score is strictly above this.
        iou_threshold: intersection over union above which, of two boxes of a class, the one with the lower score is
            dropped.
        max_detections: D, below 2^31; the search stops when that many are kept.

    Returns:
        `Detections`: boxes (B, D, 4) and scores (B, D) in the dtypes of the inputs, labels (B, D), count (B), indices
            (B, D). One box may be returned for several classes. The shapes do not depend on values.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument.
        ValueError: `boxes` and `scores` that do not both have three dimensions or both have two; a threshold that is
            not a number, or `max_detections` that is not an integer; within `spatialflow.ops.checked()` a box or score
            that is not finite.

    Note:
        Equal scores rank by row, then by class, the lower first. Pairs of boxes are compared as in `nms`. The score
        threshold is rounded to float32 (float64 if either tensor is). A NaN score or a box with a NaN corner is never
        kept. Without boxes or classes, `count` is 0.

        The results are detached: no gradient flows to boxes or scores. For a gradient, gather the kept rows from the
        inputs by `indices` and `labels`.

        Complexity: one pass over the B * N * C scores. Only the best pairs are sorted, and each is tested against the
        kept boxes of its class until D are kept. Scratch memory is at most linear in the number of scores.

        Difference from torchvision: a batch in one call, with score threshold and fixed shapes, instead of
        `batched_nms` per image. mmdetection's `multiclass_nms` has a background column in `scores`, which is absent
        here.

    Examples:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0]])
        >>> scores = torch.tensor([[0.8, 0.1], [0.9, 0.6]])  # of two classes
        >>> detections = multiclass_nms(boxes, scores, score_threshold=0.05, iou_threshold=0.5, max_detections=4)
        >>> detections.count, detections.labels, detections.indices
        (tensor(2), tensor([ 0,  1, -1, -1]), tensor([ 1,  1, -1, -1]))

    Source: the same detections as torchvision.ops.batched_nms per image followed by a top-D, or mmdetection's
    multiclass_nms.
    """
    if not are_tensors(boxes, scores):
        return with_arrays(multiclass_nms, locals())
    if boxes.dim() not in (2, 3) or scores.dim() != boxes.dim():
        raise ValueError(
            "multiclass_nms: boxes and scores must have shapes (B, N, 4) and (B, N, C), or (N, 4) and (N, C), "
            f"got {tuple(boxes.shape)} and {tuple(scores.shape)}"
        )
    if is_checking():
        require_finite("multiclass_nms", "boxes", boxes)
        require_finite("multiclass_nms", "scores", scores)
    score_threshold = number("multiclass_nms", "score_threshold", score_threshold)
    iou_threshold = number("multiclass_nms", "iou_threshold", iou_threshold)
    settings = (score_threshold, iou_threshold, integer("multiclass_nms", "max_detections", max_detections))
    if boxes.dim() == 3:
        return Detections(*_multiclass_nms(boxes, scores, *settings))
    batched = _multiclass_nms(boxes.unsqueeze(0), scores.unsqueeze(0), *settings)
    return Detections(*(result.squeeze(0) for result in batched))


_multiclass_nms = without_gradient("multiclass_nms")


@register_fake("multiclass_nms")
def _(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(
        boxes.dim() == 3 and boxes.shape[2] == 4,
        lambda: f"multiclass_nms: boxes must have shape (B, N, 4), got {tuple(boxes.shape)}",
    )
    torch._check(
        scores.dim() == 3 and scores.shape[0] == boxes.shape[0] and scores.shape[1] == boxes.shape[1],
        lambda: f"multiclass_nms: scores must have shape (B, N, C), got {tuple(scores.shape)}",
    )
    torch._check(
        0 <= max_detections < 1 << 31,
        lambda: f"multiclass_nms: max_detections must be from 0 to 2147483647, got {max_detections}",
    )
    rows = (boxes.shape[0], max_detections)
    return (
        boxes.new_empty((*rows, 4)),
        scores.new_empty(rows),
        boxes.new_empty(rows, dtype=torch.int64),
        boxes.new_empty(rows[:1], dtype=torch.int64),
        boxes.new_empty(rows, dtype=torch.int64),
    )


def _vmap(info: Any, in_dims: tuple[Any, ...], boxes: Tensor, scores: Tensor, *settings: Any) -> tuple[Any, Any]:
    """Fold the mapped dimension and the batch into one dimension for the call."""
    size = info.batch_size
    boxes, scores = (
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip((boxes, scores), in_dims, strict=False)
    )
    folded = boxes.shape[:2]
    results = _multiclass_nms(boxes.flatten(0, 1), scores.flatten(0, 1), *settings)
    return tuple(result.unflatten(0, folded) for result in results), (0,) * len(results)


torch.library.register_vmap("spatialflow::multiclass_nms", _vmap)
