# SPDX-License-Identifier: Apache-2.0
"""Convolutions for inference: bias, residual sum and ReLU fused, weights packed once, buffers instead of parameters."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spatialflow.models.deform import OFFSETS, FlowOffsetDeformConv2d, Geometry, SelfOffsetDeformConv2d
from spatialflow.models.optimized.conv import Shape, fused_conv2d
from spatialflow.ops import (
    PackedConv,
    PackedDeformConv,
    SubnetParameters,
    deform_conv2d,
    flow_conv2d,
    pack_conv3x3,
    pack_deform_conv2d,
)

Levels = TypeVar("Levels", Tensor, list[Tensor])
"""A feature map, or a list of maps of several levels."""


class FusedConv(nn.Module):
    """Convolution with an optional residual sum and ReLU in the same pass: (N, C, H, W) -> (N, O, H', W').

    Args:
        conv: the convolution, of dilation 1.
        relu: whether a ReLU follows (after the residual sum, where there is one).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        stride, padding, _ = cast("Geometry", (conv.stride, conv.padding, conv.dilation))
        self.shape, self.relu = Shape(stride, padding, conv.groups), relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve `x`, (N, C, H, W); `residual`, (N, O, H', W'), may be overwritten."""
        return fused_conv2d(x, self.weight, self.bias, self.shape, self.relu, residual)


def is_3x3(conv: nn.Conv2d) -> bool:
    """Return whether `flow_conv2d` supports this convolution."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    deformable = isinstance(conv, (FlowOffsetDeformConv2d, SelfOffsetDeformConv2d))
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and not deformable


def pack(conv: nn.Conv2d) -> PackedConv:
    """Pack the weights of a 3x3 convolution of stride 1, without gradients."""
    return pack_conv3x3(conv.weight.detach(), None if conv.bias is None else conv.bias.detach())


class PackedModule(nn.Module):
    """Base class of modules with packed convolutions, which `.to` packs again for another device or dtype.

    Args:
        packed: the convolutions.
    """

    def __init__(self, packed: PackedConv | PackedDeformConv | list[PackedConv] | SubnetParameters) -> None:
        super().__init__()
        self.packed = packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        """Apply `fn` to every tensor of the module; `.to`, `.cuda`, `.half` and the like call this method."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        self.packed = _apply_to_packed(self.packed, fn)
        return self


def _apply_to_packed(packed: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply `fn` to the weights in nested lists and tuples, and pack again the convolutions that it changes."""
    if isinstance(packed, (PackedConv, PackedDeformConv)):
        weight, bias = fn(packed.weight), None if packed.bias is None else fn(packed.bias)
        return packed if weight is packed.weight else packed.packed_again(weight, bias)
    if isinstance(packed, SubnetParameters):
        return SubnetParameters(*(_apply_to_packed(field, fn) for field in packed))
    if isinstance(packed, (list, tuple)):
        return type(packed)(_apply_to_packed(part, fn) for part in packed)
    return packed


class PackedConv3x3(PackedModule):
    """3x3 convolution of stride 1 with packed weights: (N, C, H, W) -> (N, O, H, W), or a list of such levels.

    Args:
        conv: the convolution.
        relu: whether a ReLU follows.
    """

    packed: PackedConv

    def __init__(self, conv: nn.Conv2d, relu: bool = False) -> None:
        super().__init__(pack(conv))
        self.relu = relu

    def forward(self, x: Levels, flow: Levels | None = None, active: Tensor | None = None) -> Levels:
        """Compute conv(x + flow) and the ReLU, if any, in the structure of `x`.

        The result is zero for images that are not `active`, (N,) bool.
        """
        return flow_conv2d(x, flow, self.packed, None, self.relu, active=active)


class PackedFlowOffsetDeformConv2d(PackedModule):
    """`FlowOffsetDeformConv2d` with a packed weight, for a tensor or a list of levels.

    (N, C, H, W), (N, 27, H', W') -> (N, O, H', W').

    Args:
        conv: weight, bias and settings.
        relu: whether a ReLU follows.
    """

    packed: PackedDeformConv

    def __init__(self, conv: nn.Conv2d, relu: bool = False) -> None:
        bias = None if conv.bias is None else conv.bias.detach()
        super().__init__(pack_deform_conv2d(conv.weight.detach(), bias, conv.groups))
        self.geometry, self.relu = cast("Geometry", (conv.stride, conv.padding, conv.dilation)), relu

    def forward(self, x: Levels, prediction: Levels) -> Levels:
        """Convolve `x` with `prediction`, the offsets and mask logits."""
        if not isinstance(x, Tensor):
            return [self(*level) for level in zip(x, prediction, strict=True)]
        offset, logits = prediction[:, :OFFSETS], prediction[:, OFFSETS:]
        return deform_conv2d(x, offset, self.packed, None, *self.geometry, logits, mask_sigmoid=True, relu=self.relu)


class PackedSelfOffsetDeformConv2d(nn.Module):
    """`SelfOffsetDeformConv2d` with packed weights: (N, C, H, W) -> (N, O, H', W'), or a list of such levels.

    Args:
        conv: the deformable convolution.
        relu: whether a ReLU follows.
    """

    def __init__(self, conv: SelfOffsetDeformConv2d, relu: bool = False) -> None:
        super().__init__()
        self.offsets, self.conv = optimize_conv(conv.conv_offset), PackedFlowOffsetDeformConv2d(conv, relu)

    def forward(self, x: Levels) -> Levels:
        """Convolve `x`, (N, C, H, W) or a list of such levels."""
        return self.conv(x, self.offsets(x))


def optimize_conv(conv: nn.Conv2d, relu: bool = False) -> nn.Module:
    """Make the module of this file that replaces a convolution and, with `relu`, the ReLU after it."""
    if isinstance(conv, SelfOffsetDeformConv2d):
        return PackedSelfOffsetDeformConv2d(conv, relu)
    if isinstance(conv, FlowOffsetDeformConv2d):
        return PackedFlowOffsetDeformConv2d(conv, relu)
    return (PackedConv3x3 if is_3x3(conv) else FusedConv)(conv, relu)
