# SPDX-License-Identifier: Apache-2.0
"""Algorithms of convolutions and the layout of packed weights, as csrc/ops/conv_algorithm.h defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops._torch_private import assume_constant_result
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake

_ALGORITHMS = {"auto": 0, "winograd": 1, "direct": 2, "tf32": 3, "tf32x3": 4}

pack_conv3x3_weight = without_gradient("_pack_conv3x3")

# Number of elements that identifies the layout of packed weights on the CPU (packed_tag in csrc/ops/conv_algorithm.h).
_CPU_TAG = pack_conv3x3_weight(torch.empty((0, 0, 3, 3), dtype=torch.float32, device="cpu"), 2).numel()
CUDA_TAG = 2
_PACKED_UNIT = 288  # divides the length of packed weights without their tag


def algorithm_code(op: str, algorithm: str, x: Tensor | None = None, without: str | None = None) -> int:
    """Return the number of `algorithm` in the schemas; for float32 `x` on CUDA, "auto" is "tf32" if torch allows TF32.

    `without` is a name that `op` does not accept.
    """
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS or algorithm == without:
        names = ", ".join(repr(name) for name in _ALGORITHMS if name != without)
        reason = ", which only flow_conv2d and fused_subnets have" if algorithm == without else ""
        raise ValueError(f"{op}: algorithm must be one of {names}, got {algorithm!r}{reason}")
    if algorithm == "auto" and x is not None and _may_use_tf32(x):
        algorithm = "tf32"
    return _ALGORITHMS[algorithm]


def _may_use_tf32(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.float32 and _allows_tf32()


@assume_constant_result
def _allows_tf32() -> bool:
    """Return whether torch lets cuDNN round float32 convolutions to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # set by torch at import


def check_packed_bias(op: str, bias: Tensor | None, weight: Tensor) -> None:
    """Raise RuntimeError, as the operators do, if the bias of a weight to be packed does not fit it."""
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not bias.is_floating_point():
        raise RuntimeError(f"{op}: bias must be of a floating dtype, got {str(bias.dtype).removeprefix('torch.')}")
    if bias.device != weight.device:
        raise RuntimeError(f"{op}: bias must be on the device of weight, {weight.device}, got {bias.device}")


def packed_tag(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of elements after packed weights of a dtype, which identifies their layout (csrc/ops)."""
    return (CUDA_TAG if device.type == "cuda" else _CPU_TAG) + (dtype == torch.float64)


def check_packed_layout(op: str, packed: Tensor) -> None:
    """Refuse, in fake kernels, weights packed for another back end, as the operators do."""
    tag, wanted = packed.shape[0] % _PACKED_UNIT, packed_tag(packed.device, packed.dtype)
    torch._check(
        tag == wanted,
        lambda: (
            f"{op}: the packed weight has the layout of another instruction set, device, dtype or version "
            f"(tag {tag}, here {wanted}); pack the weight again, by pack_conv3x3 or pack_subnets"
        ),
    )


@register_fake("_pack_conv3x3")
def _(weight: Tensor, algorithm: int) -> Tensor:
    out_channels, in_channels = weight.shape[0], weight.shape[1]
    is_double = weight.dtype == torch.float64
    winograd = not is_double and (
        algorithm == _ALGORITHMS["winograd"]
        or (algorithm != _ALGORITHMS["direct"] and in_channels >= 32 and out_channels >= 32)
    )
    size = (36 if winograd else 9 if is_double else 18) * in_channels * ((out_channels + 31) // 32 * 32)
    dtype = torch.float64 if is_double else torch.float32
    return weight.new_empty((size + packed_tag(weight.device, dtype),), dtype=dtype)
