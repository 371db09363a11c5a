# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution, version 1, and version 2 with a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import integer, is_checking, pair, require_finite
from spatialflow.ops.conv_algorithm import CUDA_TAG, algorithm_code, check_packed_bias, packed_tag
from spatialflow.ops.deform_conv2d_backward import differentiable_deform_conv2d
from spatialflow.ops.differentiable import autocast, needs_gradient, without_gradient
from spatialflow.ops.fake import register_fake
from spatialflow.ops.layout import memory_format_of

_CPU_PADDING = 32
"""Multiple to which packed weights on the CPU pad the outputs of a group: kGemmColumnPadding in csrc/cpu/gemm.h."""

_pack_deform_conv2d = without_gradient("_pack_deform_conv2d")
_deform_conv2d_packed = without_gradient("_deform_conv2d_packed")


class PackedDeformConv(NamedTuple):
    """A deformable convolution with its weights in the order that the kernels read, made by `pack_deform_conv2d`.

    As for `PackedConv`, the order depends on the instruction set, the device and the version of the package. A pickle
    or a deep copy has `weight` but not `packed`, and packs `weight` again on loading. Calls that need gradients, or run
    under autocast to another dtype, use `weight`. With `algorithm` "auto", float32 calls on CUDA also use `weight` if
    torch's TF32 setting has changed since packing.
    """

    packed: Tensor  # a vector; its length identifies the order
    weight: Tensor  # (C_out, C / groups, kernel_h, kernel_w)
    bias: Tensor | None  # (C_out,)
    groups: int
    offset_groups: int
    algorithm: str
    resolved: int  # number of the algorithm that `algorithm` meant when the weight was packed

    def __reduce__(self) -> tuple[Any, ...]:
        return pack_deform_conv2d, (self.weight, self.bias, self.groups, self.offset_groups, self.algorithm)

    def packed_again(self, weight: Tensor, bias: Tensor | None) -> PackedDeformConv:
        """Pack another weight and bias with the same settings."""
        return pack_deform_conv2d(weight, bias, self.groups, self.offset_groups, self.algorithm)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor | PackedDeformConv,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] | str = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    algorithm: str = "auto",
    mask_sigmoid: bool = False,
    relu: bool = False,
) -> Tensor:
    """Convolve with kernel taps that sample the input bilinearly at learned offsets from the regular grid.

    Args:
        input: features (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        offset: (N, 2 * offset_groups * kernel_h * kernel_w, H_out, W_out), in cells: for each offset group the pairs
            (dy, dx) of all taps, row by row. Channels of `input` are split evenly over offset groups. Any floating
            dtype, used in float32 (float64 for float64 features).
        weight: (C_out, C / groups, kernel_h, kernel_w), the dtype of `input`; the sizes define the number of groups.
            With a `PackedDeformConv` instead, its bias and algorithm are used. The kernels then read its packed weight
            and apply sigmoid and ReLU, except in calls that use its unpacked weight (see `PackedDeformConv`).
        bias: (C_out), the dtype of `input`, or None.
        stride: of the undeformed convolution; (height, width), or one number for both.
        padding: as `stride`; or "valid", which is 0, or "same", with which the result has the size of `input`.
        dilation: as `stride`.
        mask: factor of every sample (N, offset_groups * kernel_h * kernel_w, H_out, W_out), or None (version 1); dtype
            as for `offset`.
        algorithm: arithmetic of float32 on CUDA; the CPU always computes "direct". Sums are in float32. Errors below
            are relative to the largest output.
            "auto": "tf32" if torch allows it for its own convolutions (`torch.backends.cudnn.conv.fp32_precision`, or
            `torch.backends.cudnn.allow_tf32`; the default), else "tf32x3". A compiled function keeps the setting at the
            time of tracing.
            "direct": multiply-adds in float32: error about 1e-6.
            "tf32": tensor cores; samples, weights and gradients are rounded to TF32 (11-bit significand): error about
            3e-4.
            "tf32x3": tensor cores, three products of TF32: error about 1e-6.
            "winograd", an algorithm of `flow_conv2d`, needs taps on a grid and is refused. Gradients use the algorithm
            of the call.
        mask_sigmoid: whether `mask` holds logits: the factor of a sample is then the sigmoid of its entry.
        relu: whether to apply ReLU to the result; NaN stays NaN.

    Returns:
        (N, C_out, H_out, W_out), the dtype of `input`; channels-last if `input` is.

    Raises:
        RuntimeError: a shape, dtype, device or size that does not fit, naming the argument.
        ValueError: an unknown `algorithm`, or "winograd"; `stride`, `padding` or `dilation` of a wrong kind;
            `padding` "same" with a stride, or with a kernel that needs more padding on one side; `mask_sigmoid`
            without a mask; a bias beside a `PackedDeformConv`; within `spatialflow.ops.checked()` also
            an offset or mask that is not finite.

    Note:
        Cells outside the map count as zero, so a sample falls to zero within one cell beyond the outermost centers. A
        sample whose offset or mask is not finite in the type it is used in is zero. It has no gradient, not even for
        its mask. A feature that is not finite counts even if its bilinear weight, mask or kernel value is 0: the result
        is then NaN. "tf32" turns values from 3.4e38 on into infinity, "tf32x3" turns an infinity into NaN. Without
        images the result is empty.

        Gradients flow to all five tensors in reverse and forward mode. They exist to second order through `offset`
        (except forward over forward) and to any order through the others. At whole coordinates, where a bilinear sample
        has a kink, the gradient of the offset is that from above, as in torchvision. Results and gradients are
        deterministic, except the gradient of `input` on CUDA. That gradient is deterministic only in float64 or under
        `torch.use_deterministic_algorithms(True)`.

        Complexity: N * H_out * W_out * kernel_h * kernel_w * C * C_out / groups multiply-adds, and one bilinear sample
        per output pixel, tap and input channel. The samples of an image (im2col columns) are never stored.

        Difference from torchvision: the options from `algorithm` on, and a sample with a non-finite offset is zero.
        mmcv passes `mask` before the weight, and groups as arguments.

    Examples:
        >>> features, weight = torch.rand(1, 8, 20, 30), torch.rand(16, 8, 3, 3)
        >>> offset, mask = torch.zeros(1, 2 * 9, 20, 30), torch.ones(1, 9, 20, 30)
        >>> result = deform_conv2d(features, offset, weight, padding=1, mask=mask)
        >>> torch.allclose(result, torch.nn.functional.conv2d(features, weight, padding=1), rtol=1e-4)
        True

    Source: Dai et al., Deformable Convolutional Networks (2017), eq. 2-4; Zhu et al., Deformable ConvNets v2 (2019),
    eq. 1; signature and result of torchvision.ops.deform_conv2d.
    """
    packed = weight if isinstance(weight, PackedDeformConv) else None
    weights, biases = ([weight], (bias,)) if packed is None else (packed[:2], (bias, packed.bias))
    if not are_tensors(input, offset, *weights, optional=(*biases, mask)):
        return with_arrays(deform_conv2d, locals())
    if mask_sigmoid and mask is None:
        raise ValueError("deform_conv2d: mask_sigmoid must be False without a mask")
    if isinstance(weight, PackedDeformConv):
        if bias is not None:
            raise ValueError("deform_conv2d: bias must be None when weight is a PackedDeformConv, which has its own")
        algorithm_code("deform_conv2d", algorithm, without="winograd")
        bias, algorithm, weight = weight.bias, weight.algorithm, weight.weight
    input = autocast(input)
    code = algorithm_code("deform_conv2d", algorithm, input, without="winograd")
    settings = (
        *pair("deform_conv2d", "stride", stride),
        *(
            _padding("deform_conv2d", padding, stride, dilation, weight.shape[2:])
            if isinstance(padding, str)
            else pair("deform_conv2d", "padding", padding)
        ),
        *pair("deform_conv2d", "dilation", dilation),
        code,
    )
    if is_checking():
        require_finite("deform_conv2d", "offset", offset)
        if mask is not None:
            require_finite("deform_conv2d", "mask", mask)
    if (
        packed is not None
        and (code, input.dtype) == (packed.resolved, weight.dtype)
        and not needs_gradient([input, offset, weight, bias, mask])
    ):
        sizes = (weight.shape[0], packed.groups, packed.offset_groups, *weight.shape[2:])
        flags = (bool(mask_sigmoid), bool(relu))
        return _deform_conv2d_packed(input, offset, packed.packed, bias, mask, *settings, *sizes, *flags)
    bias = None if bias is None else autocast(bias)
    if mask_sigmoid and mask is not None and mask.is_floating_point():  # the operator refuses other dtypes
        mask = mask.to(torch.float64 if input.dtype == torch.float64 else torch.float32).sigmoid()
    result = differentiable_deform_conv2d(input, offset, autocast(weight), bias, mask, None, *settings)
    return result.relu() if relu else result


def pack_deform_conv2d(
    weight: Tensor, bias: Tensor | None = None, groups: int = 1, offset_groups: int = 1, algorithm: str = "auto"
) -> PackedDeformConv:
    """Rearrange the weight of a deformable convolution once, for many calls of `deform_conv2d`.

    Args:
        weight: (C_out, C / groups, kernel_h, kernel_w); float32, float64, float16 or bfloat16, any strides.
        bias: (C_out,), the dtype of `weight`, or None.
        groups: number of groups of the convolution; it divides C_out.
        offset_groups: number of groups of the offsets in later calls; it divides C.
        algorithm: as in `deform_conv2d`.

    Returns:
        A `PackedDeformConv` for inputs of the dtype of `weight`. Do not change `weight` in place afterwards: some calls
        read it, all others its packed copy (see `PackedDeformConv`).

    Raises:
        RuntimeError: a shape, dtype, device or number of groups that does not fit, naming the argument.
        ValueError: an unknown `algorithm`, or "winograd".

    Examples:
        >>> features, conv = torch.rand(1, 8, 20, 30), pack_deform_conv2d(torch.rand(16, 8, 3, 3))
        >>> offset, logits = torch.zeros(1, 2 * 9, 20, 30), torch.zeros(1, 9, 20, 30)
        >>> deform_conv2d(features, offset, conv, padding=1, mask=logits, mask_sigmoid=True, relu=True).shape
        torch.Size([1, 16, 20, 30])
    """
    if not are_tensors(weight, optional=(bias,)):
        return with_arrays(pack_deform_conv2d, locals())
    code = algorithm_code("pack_deform_conv2d", algorithm, weight, without="winograd")
    packed = _pack_deform_conv2d(weight, groups, offset_groups, code)
    check_packed_bias("pack_deform_conv2d", bias, weight)
    if bias is not None and bias.dtype != weight.dtype:
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in (weight, bias)]
        raise RuntimeError(f"pack_deform_conv2d: bias must be {names[0]}, got {names[1]}")
    return PackedDeformConv(packed, weight, bias, groups, offset_groups, algorithm, code)


def _padding(
    op: str,
    padding: int | tuple[int, int] | str,
    stride: int | tuple[int, int],
    dilation: int | tuple[int, int],
    kernel_size: Sequence[int],
) -> tuple[int, int]:
    """Return `padding`, which may be a name, as a pair for rows and columns."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f"{op}: padding must be one integer, a pair, 'same' or 'valid', got {padding!r:.80}")
        return pair(op, "padding", padding)
    if pair(op, "stride", stride) != (1, 1):
        raise ValueError(f"{op}: padding must be numbers if stride is not 1, got 'same' for a stride of {stride}")
    both = [factor * (size - 1) for factor, size in zip(pair(op, "dilation", dilation), kernel_size, strict=True)]
    if any(total % 2 for total in both):
        raise ValueError(
            f"{op}: padding must be numbers if dilation * (kernel size - 1) is odd, got 'same' for a kernel of "
            f"{tuple(kernel_size)} with a dilation of {dilation}"
        )
    return both[0] // 2, both[1] // 2


class DeformConv2d(nn.Module):
    """Module of `deform_conv2d` with a weight and bias: `forward(input, offset, mask=None)`.

    Args:
        in_channels: C; divisible by `groups`.
        out_channels: C_out; divisible by `groups`.
        kernel_size: (height, width), or one number for both.
        stride: as for `deform_conv2d`.
        padding: as for `deform_conv2d`.
        dilation: as for `deform_conv2d`.
        groups: number of groups of the convolution.
        bias: whether there is a bias.

    Raises:
        ValueError: channels that `groups` does not divide, or an argument of a wrong kind, naming it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        integer("DeformConv2d", "groups", groups)
        if groups < 1:
            raise ValueError(f"DeformConv2d: groups must be positive, got {groups}")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if integer("DeformConv2d", name, channels) % groups:
                raise ValueError(
                    f"DeformConv2d: {name} must be divisible by groups, got {channels} for {groups} groups"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("DeformConv2d", "kernel_size", kernel_size)
        self.stride = pair("DeformConv2d", "stride", stride)
        self.dilation = pair("DeformConv2d", "dilation", dilation)
        self.padding = _padding("DeformConv2d", padding, self.stride, self.dilation, self.kernel_size)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from +-1 / sqrt(fan in), like torch's convolutions."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Call `deform_conv2d` with the module's weight, bias and settings."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


@register_fake("deform_conv2d")
def _(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    offset_tangent: Tensor | None,
    *settings: Any,
) -> Tensor:
    for name, tensor in (("input", input), ("offset", offset), ("weight", weight)):
        message = f"deform_conv2d: {name} must have 4 dimensions, got {tuple(tensor.shape)}"
        torch._check(tensor.dim() == 4, partial(str, message))
    size = (input.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _packed_layout(like: Tensor, outputs: Any, taps: Any, channels: Any, groups: int) -> tuple[Any, torch.dtype]:
    """Return length and dtype of the packed weight for inputs like `like`."""
    is_double, tag = like.dtype == torch.float64, packed_tag(like.device, like.dtype)
    is_cuda_layout = tag == CUDA_TAG + is_double  # by the tag: tensors of the SIMT interpreter are on the CPU
    unit = 16 // like.element_size() if is_cuda_layout else _CPU_PADDING
    size = channels * taps * ((outputs // groups + unit - 1) // unit * unit)
    return size + tag, like.dtype if is_cuda_layout else torch.float64 if is_double else torch.float32


@register_fake("_pack_deform_conv2d")
def _(weight: Tensor, groups: int, offset_groups: int, algorithm: int) -> Tensor:
    outputs, inputs, *kernel = weight.shape
    length, dtype = _packed_layout(weight, outputs, math.prod(kernel), groups * inputs, groups)
    return weight.new_empty((length,), dtype=dtype)


@register_fake("_deform_conv2d_packed", op="deform_conv2d")
def _(
    input: Tensor, offset: Tensor, packed: Tensor, bias: Tensor | None, mask: Tensor | None, *settings: Any
) -> Tensor:
    outputs, groups, _, kernel_h, kernel_w = settings[7:12]
    length, dtype = _packed_layout(input, outputs, kernel_h * kernel_w, input.shape[1], groups)
    torch._check(
        packed.dtype == dtype and packed.dim() == 1 and packed.shape[0] == length,
        lambda: (
            "deform_conv2d: the packed weight was made for other channels, another instruction set, device, dtype or "
            f"version than input, {tuple(input.shape)} {input.dtype}; pack the weight again, by pack_deform_conv2d"
        ),
    )
    size = (input.shape[0], outputs, offset.shape[2], offset.shape[3])
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))
