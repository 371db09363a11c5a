# SPDX-License-Identifier: Apache-2.0
"""Sigmoid focal loss from class indices, with fused forward and backward kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import is_checking, number, require_finite, require_labels
from spatialflow.ops.differentiable import DifferentiableOp
from spatialflow.ops.fake import register_fake


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *options: Any,
    gamma: float = 2.0,
    alpha: float = 0.25,
    reduction: str = "none",
) -> Tensor:
    """Compute the focal loss of C binary classifiers per row; the label is the index of the positive class, if any.

    With p the predicted probability of an element's correct answer, its loss is `-w * (1 - p) ** gamma * log(p)`. The
    weight w is alpha for the class of the label and 1 - alpha for all other classes.

    Args:
        logits: (..., C); float32, float64, float16 or bfloat16, any strides.
        labels: (...) int64 or int32. 0 to C - 1: that class; C: background, all classes are negative; any other value,
            by convention -1: the row is ignored, with zero loss and gradient whatever its logits are. Or torchvision's
            targets (..., C), floating-point numbers from 0 to 1: one-hot rows, or any others.
        *options: `gamma`, `alpha` and `reduction` in this order if given by position; beside targets `alpha`, `gamma`
            and `reduction`, as in torchvision.
        gamma: how strongly elements with a high p are down-weighted; 0 or more.
        alpha: weight of the class of the label, at most 1; negative: all weights are 1.
        reduction: "none", "sum", or "mean" over all elements, including ignored ones.

    Returns:
        For "none" (..., C) in the dtype of `logits`. Otherwise a scalar in float32 (float64 for float64 logits), as a
        sum over all anchors of an image may overflow 16 bits.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument.
        TypeError: an option given twice, or too many options.
        ValueError: an unknown reduction; `gamma` or `alpha` that is not a number; within `spatialflow.ops.checked()` a
            logit that is not finite, or a label outside [-1, C].

    Note:
        The loss is computed in float32 (float64 for float64) and is numerically stable for logits of any
        size. A NaN logit gives NaN in loss and gradient. The loss of an infinite logit is zero if its sign is correct.
        Otherwise it is infinite, or NaN if its weight is 0. Without rows or classes, the result of "none" is empty,
        that of "sum" is 0 and that of "mean" is NaN.

        Gradients flow to `logits`, in reverse and forward mode, to second order. Sums have a fixed order.

        Complexity: one pass over the logits, for the loss and for each derivative. No one-hot target is stored, and
        "sum" and "mean" store no loss per element. This holds for class indices. The loss of targets is composed of
        torch's operators, as in torchvision, and has their gradients.

        Difference from torchvision: class indices too, and with them `gamma` before `alpha`. mmcv's mean divides by
        rows: its result is `reduction="sum"` divided by `len(labels)`.

    Examples:
        >>> logits = torch.zeros(3, 2)
        >>> sigmoid_focal_loss(logits, torch.tensor([1, 2, -1]))  # class 1, background, ignored
        tensor([[0.1300, 0.0433],
                [0.1300, 0.1300],
                [0.0000, 0.0000]])

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equation 5; torchvision.ops.sigmoid_focal_loss
    with one-hot targets.
    """
    if options:
        gamma, alpha, reduction = _by_position(options, _are_targets(logits, labels), gamma, alpha, reduction)
    if not are_tensors(logits, labels):
        return with_arrays(sigmoid_focal_loss, locals())
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"sigmoid_focal_loss: reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    gamma, alpha = number("sigmoid_focal_loss", "gamma", gamma), number("sigmoid_focal_loss", "alpha", alpha)
    if labels.is_floating_point() and labels.ndim == logits.ndim:
        return _loss_of_targets(logits, labels, gamma, alpha, reduction)
    if labels.shape == logits.shape != ():  # F.one_hot gives integers
        dtype = str(labels.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"sigmoid_focal_loss: labels that are targets must be floating-point, got {dtype}; use "
            f"labels.to(logits.dtype)"
        )
    loss = (_elementwise if reduction == "none" else _sum)(logits, labels, gamma, alpha)
    if is_checking():  # values; the operator has checked the shapes
        require_finite("sigmoid_focal_loss", "logits", logits)
        require_labels("sigmoid_focal_loss", "labels", labels, logits.shape[-1])
    return loss / logits.numel() if reduction == "mean" else loss


def _are_targets(logits: Any, labels: Any) -> bool:
    """Return whether `labels`, a tensor or an array, is of the kind that torchvision takes."""
    return getattr(labels, "ndim", 0) == getattr(logits, "ndim", None)


def _by_position(
    options: tuple[Any, ...], are_targets: bool, gamma: float, alpha: float, reduction: str
) -> tuple[float, float, str]:
    """Return gamma, alpha and reduction, of which the first ones were given by position."""
    values: dict[str, Any] = {"gamma": gamma, "alpha": alpha, "reduction": reduction}
    order = ("alpha", "gamma", "reduction") if are_targets else ("gamma", "alpha", "reduction")
    if len(options) > len(order):
        raise TypeError(f"sigmoid_focal_loss: takes at most 5 arguments by position, got {2 + len(options)}")
    defaults = {"gamma": 2.0, "alpha": 0.25, "reduction": "none"}
    for name, value in zip(order, options, strict=False):
        if values[name] != defaults[name]:
            raise TypeError(f"sigmoid_focal_loss: {name} must be given once, got {value!r} and {values[name]!r}")
        values[name] = value
    return values["gamma"], values["alpha"], values["reduction"]


def _loss_of_targets(logits: Tensor, targets: Tensor, gamma: float, alpha: float, reduction: str) -> Tensor:
    """Return the loss of targets of the shape of `logits`, from 0 to 1, as torchvision computes it."""
    if targets.shape != logits.shape:
        raise RuntimeError(
            "sigmoid_focal_loss: labels that are targets must have the shape of logits, "
            f"{tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    if not 0 <= gamma < math.inf:
        raise RuntimeError(f"sigmoid_focal_loss: gamma must be a finite number >= 0, got {gamma:g}")
    if not alpha <= 1:
        raise RuntimeError(f"sigmoid_focal_loss: alpha must be a number <= 1 (negative: no weighting), got {alpha:g}")
    if is_checking():
        require_finite("sigmoid_focal_loss", "logits", logits)
        require_finite("sigmoid_focal_loss", "labels", targets)
    positive = torch.sigmoid(logits)
    correct = positive * targets + (1 - positive) * (1 - targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * (1 - correct) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _check(logits: Tensor, labels: Tensor) -> None:
    torch._check(
        labels.dim() == logits.dim() - 1,
        lambda: f"sigmoid_focal_loss: labels must have one dimension less than logits, got {labels.dim()}",
    )


@register_fake("sigmoid_focal_loss")
def _(logits: Tensor, labels: Tensor, gamma: float, alpha: float) -> Tensor:
    _check(logits, labels)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@register_fake("_sigmoid_focal_loss_sum", op="sigmoid_focal_loss")
def _(logits: Tensor, labels: Tensor, gamma: float, alpha: float) -> Tensor:
    _check(logits, labels)
    return logits.new_empty((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


@register_fake("_sigmoid_focal_loss_derivative", op="sigmoid_focal_loss")
def _(factor: Tensor, logits: Tensor, labels: Tensor, gamma: float, alpha: float, order: int) -> Tensor:
    _check(logits, labels)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# The loss of an element depends on one logit, so the Jacobian is diagonal. Gradients and tangents are both products
# with the derivative, which is a separate operator: factor * (order-th derivative).
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, *ctx.settings = inputs
    ctx.save_for_backward(logits, labels)
    ctx.save_for_forward(logits, labels)


def _backward(ctx: Any, needs: Any, grad_output: Tensor) -> tuple[Any, ...]:
    logits, labels = ctx.saved_tensors
    grad = _derivative(grad_output, logits, labels, *ctx.settings, 1) if needs[0] else None
    return grad, None, None, None


def _jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
    logits, labels = ctx.saved_tensors
    return None if tangent is None else _derivative(tangent, logits, labels, *ctx.settings, 1)


def _sum_jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
    logits, labels = ctx.saved_tensors
    if tangent is None:
        return None
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return _derivative(tangent, logits, labels, *ctx.settings, 1).sum(dtype=wide)


def _derivative_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    factor, logits, labels, *ctx.settings, ctx.order = inputs
    ctx.save_for_backward(factor, logits, labels)
    ctx.save_for_forward(factor, logits, labels)


def _derivative_backward(ctx: Any, needs: Any, grad_output: Tensor) -> tuple[Any, ...]:
    factor, logits, labels = ctx.saved_tensors
    grad_factor = grad_logits = None
    if needs[0]:
        grad_factor = _derivative(grad_output, logits, labels, *ctx.settings, ctx.order)
        grad_factor = grad_factor if factor.dim() == grad_factor.dim() else grad_factor.sum(dtype=factor.dtype)
    if needs[1]:
        grad_logits = _derivative(grad_output * factor, logits, labels, *ctx.settings, ctx.order + 1)
    return grad_factor, grad_logits, None, None, None, None


def _derivative_jvp(ctx: Any, factor_tangent: Tensor | None, logits_tangent: Tensor | None, *_: Any) -> Tensor | None:
    factor, logits, labels = ctx.saved_tensors
    parts = []
    if factor_tangent is not None:
        parts.append(_derivative(factor_tangent, logits, labels, *ctx.settings, ctx.order))
    if logits_tangent is not None:
        parts.append(_derivative(logits_tangent * factor, logits, labels, *ctx.settings, ctx.order + 1))
    return sum(parts) if parts else None


_elementwise = DifferentiableOp("sigmoid_focal_loss", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_sum = DifferentiableOp("_sigmoid_focal_loss_sum", setup_context=_setup_context, backward=_backward, jvp=_sum_jvp)
_derivative = DifferentiableOp(
    "_sigmoid_focal_loss_derivative",
    setup_context=_derivative_setup_context,
    backward=_derivative_backward,
    jvp=_derivative_jvp,
)
