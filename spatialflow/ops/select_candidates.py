# SPDX-License-Identifier: Apache-2.0
"""Candidates for NMS: the best anchors of every level of RetinaNet's head, decoded, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, as_list, with_arrays
from spatialflow.ops.checking import integer, integers, is_checking, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


class Candidates(NamedTuple):
    """Decoded boxes and their scores; N is the same for all images of a batch."""

    boxes: Tensor  # (B, N, 4) float32; float64 for float64 logits
    scores: Tensor  # (B, N, classes) of the same dtype, sigmoids


def select_candidates(
    class_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    base_anchors: Tensor,
    strides: Sequence[int],
    valid_sizes: Tensor,
    scale_factors: Tensor,
    per_level: int,
) -> Candidates:
    """Select the best anchors of every level, decode them, clip them to the valid image and scale them to the original.

    Args:
        class_logits: L levels (B, A * classes, H_l, W_l), channels by anchor, then class; one dtype (float32, float64,
            float16 or bfloat16), any strides. Channels-last levels are read in place, others are copied.
        box_deltas: L levels (B, A * 4, H_l, W_l) of that dtype, channels by anchor, then (dx, dy, dw, dh).
        base_anchors: (L, A, 4) float32, corners of the anchors of each level's cell (0, 0) in pixels.
        strides: pixels per cell of each level. Cell (y, x) has the base anchors moved by (x * stride, y * stride).
        valid_sizes: (B, 2) int64, height and width of each image at network scale, without padding.
        scale_factors: (B, 2) float32, x and y factor original -> network scale; ones keep boxes at network scale.
        per_level: anchors kept per level, below 2^31; 0: all.

    Returns:
        `Candidates`: boxes (B, N, 4) and scores (B, N, classes) in float32, float64 for float64 logits. Levels follow
        each other in order. N is the sum over the levels of min(per_level, H_l * W_l * A), or of H_l * W_l * A if
        `per_level` is 0. It does not depend on values.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument.
        ValueError: `class_logits` or `box_deltas` that is one tensor or an empty list, `strides` that is not a
            sequence of integers, or `per_level` that is not an integer; within `spatialflow.ops.checked()` a
            value that is not finite.

    Note:
        A level with more than `per_level` anchors gives those with the highest best logit, best first. Equal ones rank
        by anchor index, the lower first: cells row-major, then anchors. A level with `per_level` anchors or fewer keeps
        all, by anchor index. NaN is never the best logit of an anchor. An anchor whose logits are all NaN, or without
        classes, ranks as minus infinity. A NaN logit gives a NaN score, and a NaN delta a box with a NaN corner:
        `multiclass_nms` keeps neither. Infinite deltas are clipped like large ones.

        The selection is the same on CPU and CUDA; boxes and scores are the same up to rounding. The results are
        detached: no gradient flows to logits or deltas. Autocast changes nothing. CUDA takes up to 8 levels and 65,535
        images.

        Complexity: one pass over the logits. Only anchors that may be kept are sorted, and only kept ones are decoded.
        Scratch memory is linear in the number of anchors.

        Difference from mmdetection (`RetinaHead.get_bboxes` up to NMS): a batch and all levels in one call, and the
        order of equal logits is defined.

    Examples:
        >>> logits, deltas = torch.zeros(1, 2, 1, 2), torch.zeros(1, 4, 1, 2)  # one level of 1 x 2 cells, 2 classes
        >>> logits[0, :, 0, 1] = torch.tensor([9.0, -9.0])
        >>> base = torch.tensor([[[-4.0, -4.0, 4.0, 4.0]]])  # one anchor per cell
        >>> valid, scale = torch.tensor([[8, 16]]), torch.tensor([[1.0, 1.0]])
        >>> select_candidates([logits], [deltas], base, [8], valid, scale, per_level=1).boxes
        tensor([[[ 4.,  0., 12.,  4.]]])

    Source: Lin et al., Focal Loss for Dense Object Detection (2017); arithmetic of mmdetection's RetinaHead with
    means 0 and standard deviations 1, whose clamp of dw and dh is |log(16 / 1000)|.
    """
    if not are_tensors(*as_list(class_logits), *as_list(box_deltas), base_anchors, valid_sizes, scale_factors):
        return with_arrays(select_candidates, locals())
    for name, levels in (("class_logits", class_logits), ("box_deltas", box_deltas)):
        if isinstance(levels, Tensor) or not levels:
            got = f"a tensor of shape {tuple(levels.shape)}" if isinstance(levels, Tensor) else "none"
            raise ValueError(f"select_candidates: {name} must be a sequence of at least one level, got {got}")
    strides = integers("select_candidates", "strides", strides)
    per_level = integer("select_candidates", "per_level", per_level)
    selected = _select_candidates(
        list(class_logits), list(box_deltas), base_anchors, strides, valid_sizes, scale_factors, per_level
    )
    if is_checking():  # values; the operator has checked the shapes
        for level, (logits, deltas) in enumerate(zip(class_logits, box_deltas, strict=True)):
            require_finite("select_candidates", f"class_logits[{level}]", logits)
            require_finite("select_candidates", f"box_deltas[{level}]", deltas)
        require_finite("select_candidates", "base_anchors", base_anchors)
        require_finite("select_candidates", "scale_factors", scale_factors)
    return Candidates(*selected)


_select_candidates = without_gradient("select_candidates")


@register_fake("select_candidates")
def _(
    class_logits: list[Tensor],
    box_deltas: list[Tensor],
    base_anchors: Tensor,
    strides: list[int],
    valid_sizes: Tensor,
    scale_factors: Tensor,
    per_level: int,
) -> tuple[Tensor, Tensor]:
    first = class_logits[0]
    torch._check(
        first.dim() == 4,
        lambda: f"select_candidates: class_logits[0] must be (B, A * classes, H, W), got {tuple(first.shape)}",
    )
    torch._check(
        base_anchors.dim() == 3,
        lambda: f"select_candidates: base_anchors must have shape (L, A, 4), got {tuple(base_anchors.shape)}",
    )
    anchors = base_anchors.shape[1]
    counts = [level.shape[2] * level.shape[3] * anchors for level in class_logits]
    if per_level > 0:
        counts = [torch.sym_min(count, per_level) for count in counts]
    rows = (first.shape[0], sum(counts))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return first.new_empty((*rows, 4), dtype=dtype), first.new_empty((*rows, first.shape[1] // anchors), dtype=dtype)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped dimension and the batch into one dimension for the call."""
    class_logits, box_deltas, base_anchors, strides, valid_sizes, scale_factors, per_level = args
    if in_dims[2] is not None:
        raise ValueError("select_candidates: base_anchors must not be mapped by vmap")

    def unfolded(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def folded(levels: list[Tensor], dims: list[int | None] | None) -> list[Tensor]:
        dims = dims or [None] * len(levels)
        return [unfolded(level, dim).flatten(0, 1) for level, dim in zip(levels, dims, strict=True)]

    sizes, factors = unfolded(valid_sizes, in_dims[4]), unfolded(scale_factors, in_dims[5])
    results = _select_candidates(
        folded(class_logits, in_dims[0]),
        folded(box_deltas, in_dims[1]),
        base_anchors,
        strides,
        sizes.flatten(0, 1),
        factors.flatten(0, 1),
        per_level,
    )
    return tuple(result.unflatten(0, sizes.shape[:2]) for result in results), (0, 0)


torch.library.register_vmap("spatialflow::select_candidates", _vmap)
