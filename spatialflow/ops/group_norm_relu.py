# SPDX-License-Identifier: Apache-2.0
"""GroupNorm, ReLU and optional 2x bilinear upsampling in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import integer, number
from spatialflow.ops.differentiable import DifferentiableOp, autocast
from spatialflow.ops.fake import register_fake
from spatialflow.ops.layout import memory_format_of


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    upsample: bool = False,
) -> Tensor:
    """Apply GroupNorm and ReLU, and optionally upsample the map by two.

    For a value x of a group, y = max((x - mean) / sqrt(variance + eps) * weight + bias, 0). Mean and variance are over
    the C / num_groups * H * W values of the group in its image. The variance is the mean of (x - mean)^2.

    Args:
        input: features (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        num_groups: number of groups of adjacent channels; it divides C.
        weight: factor of each channel (C,); any floating dtype; None: 1.
        bias: summand of each channel (C,), as `weight`; None: 0.
        eps: added to the variance; finite, 0 or more.
        upsample: whether to upsample the result to (2H, 2W) by bilinear interpolation with aligned corners: the corner
            pixels keep their values.

    Returns:
        (N, C, H, W), or (N, C, 2H, 2W) with `upsample`, in the dtype of `input`; channels-last if `input` is.

    Raises:
        RuntimeError: a shape, dtype, device or number that does not fit, naming the argument.
        ValueError: `num_groups` that is not an integer, or `eps` that is not a number.

    Note:
        Arithmetic is in float32 (float64 for float64 features); long sums are in float64. Statistics are computed from
        differences to one value of the group, so a mean that is large compared with the deviation costs no digits. Sums
        have a fixed order: results and gradients do not depend on the number of threads, and are deterministic on CUDA
        too.

        A value that is not finite makes all of its group NaN, and NaN passes ReLU, as in torch. If squares of
        differences in a group overflow float32 (float64 for float64 features), the group gives max(bias, 0) or NaN. It
        is unspecified whether an infinite weight or bias gives infinity or NaN, and what an infinite incoming gradient
        gives in its group. If `eps` is positive, a group of one value or of equal values gives max(bias, 0). Without
        images, channels, rows or columns the result is empty, and the gradients of weight and bias are zero.

        Gradients flow to `input`, `weight` and `bias`, in reverse and forward mode and to any order. Forward mode and
        gradients of higher order are composed of torch's operators. The gradient of ReLU at zero is zero.

        Complexity: the input is read twice, for the statistics and to normalize. The normalized map is not stored
        before upsampling. Features that are not channels-last are copied into that layout, and the result back.

        Difference from `torch.nn.functional.group_norm` (torchvision, mmcv and detectron2 have no such operator): ReLU
        and upsampling are part of the kernel, and channels-last features stay channels-last.

    Examples:
        >>> features = torch.randn(2, 128, 25, 42).to(memory_format=torch.channels_last)
        >>> group_norm_relu(features, 32, torch.ones(128), torch.zeros(128), upsample=True).shape
        torch.Size([2, 128, 50, 84])

    Source: Wu and He, Group Normalization (2018), equations 1, 2 and 6; result of torch.nn.functional.group_norm, relu
    and interpolate(scale_factor=2, mode="bilinear", align_corners=True).
    """
    if not are_tensors(input, optional=(weight, bias)):
        return with_arrays(group_norm_relu, locals())
    num_groups, eps = integer("group_norm_relu", "num_groups", num_groups), number("group_norm_relu", "eps", eps)
    return _group_norm_relu(autocast(input), weight, bias, num_groups, eps, bool(upsample))[0]


@register_fake("group_norm_relu")
def _(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, upsample: bool
) -> tuple[Tensor, Tensor]:
    torch._check(input.dim() == 4, lambda: f"group_norm_relu: input must be (N, C, H, W), got {tuple(input.shape)}")
    factor = 2 if upsample else 1
    batch, channels, height, width = input.shape
    size, memory_format = (batch, channels, factor * height, factor * width), memory_format_of(input)
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)
    return output, input.new_empty((batch, num_groups, 2), dtype=torch.float64)


@register_fake("_group_norm_relu_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    upsample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.dim() == 4, lambda: f"group_norm_relu: input must be (N, C, H, W), got {tuple(input.shape)}")
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))
    size = (input.shape[1],)
    grad_weight, grad_bias = (input.new_empty(size, dtype=(input if t is None else t).dtype) for t in (weight, bias))
    return grad_input, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, weight, bias, ctx.num_groups, ctx.eps, ctx.upsample = inputs
    ctx.save_for_backward(input, weight, bias, output[1])
    ctx.save_for_forward(input, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, needs: Any, grad_output: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_output is None:
        return (None,) * 6
    input, weight, bias, statistics = ctx.saved_tensors
    if torch.is_grad_enabled():  # a derivative of these gradients may follow
        grads = _Composed(input, weight, bias, ctx.num_groups, ctx.eps, ctx.upsample).gradients(grad_output)
    else:
        grads = torch.ops.spatialflow._group_norm_relu_backward(
            grad_output, input, statistics, weight, bias, ctx.num_groups, ctx.upsample
        )
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=False)) + (None,) * 3


def _jvp(ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> tuple[Any, ...]:
    input, weight, bias, _statistics = ctx.saved_tensors
    composed = _Composed(input, weight, bias, ctx.num_groups, ctx.eps, ctx.upsample)
    return composed.tangent(input_t, weight_t, bias_t), None


class _Composed:
    """First derivatives composed of torch's operators, which can be differentiated again.

    Features are (N, G, C / G, H, W) here, and numbers per channel (G, C / G, 1, 1). All are float32, or float64 for
    float64 features.
    """

    def __init__(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, upsample: bool
    ) -> None:
        self.input, self.weight, self.bias, self.upsample = input, weight, bias, upsample
        self.groups = (num_groups, input.shape[1] // num_groups)
        self.dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        grouped = self._grouped(input)
        centered = grouped - self._mean(grouped)
        self.rstd = (self._mean(centered.square()) + eps).rsqrt()
        self.normalized = centered * self.rstd
        self.factor = 1 if weight is None else self._by_channel(weight)
        self.before_relu = self.normalized * self.factor + (0 if bias is None else self._by_channel(bias))

    def tangent(self, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor | None:
        """Return the tangent of the output; None if no input has one."""
        terms = []
        if input_t is not None:
            terms.append(self._through_norm(self._grouped(input_t)) * self.factor)
        if weight_t is not None:
            terms.append(self.normalized * self._by_channel(weight_t))
        if bias_t is not None:
            terms.append(self._by_channel(bias_t).expand_as(self.normalized))
        if not terms:
            return None
        tangent = self._where_active(sum(terms[1:], terms[0])).reshape(self.input.shape)
        if self.upsample:
            size = [2 * side for side in tangent.shape[2:]]
            tangent = (
                F.interpolate(tangent, size, mode="bilinear", align_corners=True)
                if tangent.numel() > 0
                else tangent.new_zeros((*tangent.shape[:2], *size))
            )
        return tangent.to(self.input.dtype, memory_format=memory_format_of(self.input))

    def gradients(self, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of input, weight and bias."""
        gradient = grad_output.to(self.dtype)
        if self.upsample and gradient.numel() > 0:
            gradient = torch.ops.aten.upsample_bilinear2d_backward(
                gradient, list(gradient.shape[2:]), list(self.input.shape), True, None, None
            )
        gradient = self._where_active(self._grouped(gradient.reshape(self.input.shape)))
        grad_input = self._through_norm(gradient * self.factor).reshape(self.input.shape)
        sums = [t.sum(dim=(0, 3, 4)).flatten() for t in (gradient * self.normalized, gradient)]
        grad_weight, grad_bias = (
            total.to((self.input if tensor is None else tensor).dtype)
            for total, tensor in zip(sums, (self.weight, self.bias), strict=True)
        )
        return grad_input.to(self.input.dtype, memory_format=memory_format_of(self.input)), grad_weight, grad_bias

    def _grouped(self, features: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        return features.to(self.dtype).reshape(batch, *self.groups, height, width)

    def _by_channel(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.dtype).reshape(*self.groups, 1, 1)

    def _mean(self, grouped: Tensor) -> Tensor:
        return grouped.mean(dim=(2, 3, 4), keepdim=True)

    def _through_norm(self, grouped: Tensor) -> Tensor:
        """Multiply by the Jacobian of the normalization, which is symmetric."""
        projected = grouped - self._mean(grouped) - self.normalized * self._mean(grouped * self.normalized)
        return projected * self.rstd

    def _where_active(self, grouped: Tensor) -> Tensor:
        return torch.where(self.before_relu <= 0, 0, grouped)  # NaN passes


_group_norm_relu = DifferentiableOp("group_norm_relu", setup_context=_setup_context, backward=_backward, jvp=_jvp)
