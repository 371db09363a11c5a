# SPDX-License-Identifier: Apache-2.0
"""Layouts, sizes, tolerances and comparisons of tensors in tests of operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.get_default_device().type  # device of the tests' tensors; see conftest.py

# Tolerances against the reference in float64, relative to the largest value of the result. float16 has 11 significant
# bits and bfloat16 has 8. In both, inputs and outputs are rounded once; sums are in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Same values, other strides: layouts of (N, C, H, W) tensors after common operations.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "channels-last slice": lambda t: torch.cat([t, t], 3).contiguous(memory_format=torch.channels_last)[
        ..., : t.shape[3]
    ],
}


# Shapes (N, C, H, W) for thin samples: each dimension is 1 or 0 in one of them. Eight channels are 16 bytes of float16.
THIN_SHAPES = {
    "one image": (1, 8, 5, 6),
    "one channel": (2, 1, 5, 6),
    "one row": (2, 8, 1, 6),
    "one column": (2, 8, 5, 1),
    "one pixel": (2, 8, 1, 1),
    "one value": (1, 1, 1, 1),
    "no images": (0, 8, 5, 6),
    "no channels": (2, 0, 5, 6),
    "no rows": (2, 8, 0, 6),
    "no columns": (2, 8, 5, 0),
}


def with_stride(tensor: Tensor, stride: int) -> Tensor:
    """Return the same values with `stride` along dimensions of size 1 or 0, where torch allows any stride."""
    strides = [old if size > 1 else stride for size, old in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


def surrounded_by_nans(tensor: Tensor) -> Tensor:
    """Return the same values inside a larger tensor of NaN (integers: 99), which begins at element 1 of its storage."""
    sizes = [size + 2 for size in tensor.shape]
    filling = float("nan") if tensor.is_floating_point() else 99
    storage = torch.full((math.prod(sizes) + 1,), filling, dtype=tensor.dtype)
    window = storage[1:].view(sizes)[tuple(slice(1, -1) for _ in sizes)]
    return window.copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


# Same values at unusual strides that torch allows.
THIN_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda t: with_stride(t, 0),
    "stride 5": lambda t: with_stride(t, 5),
    "channels last, stride 1": lambda t: with_stride(channels_last(t), 1),
    "channels last, stride 2^40": lambda t: with_stride(channels_last(t), 2**40),
    "surrounded by NaNs": surrounded_by_nans,
    "surrounded by NaNs, stride 3": lambda t: with_stride(surrounded_by_nans(t), 3),
}

# Expanded tensors: one number, or one row, repeated by a stride of 0.
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda t: t.flatten()[:1].sum().to(t.dtype).expand(t.shape),
    "one row": lambda t: t[:1].expand(t.shape) if t.dim() > 1 else t,
}


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [map_tensors(function, item) for item in value]
    return value


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def assert_near(actual: Any, expected: Any, dtype: torch.dtype, factor: float = 1.0, what: str = "result") -> None:
    actual, expected = leaves(actual), leaves(expected)
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"{what}[{index}]: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if a.numel() == 0:
            continue
        if not e.is_floating_point():
            assert torch.equal(a, e), f"{what}[{index}] differs"
            continue
        a, e = a.detach().double(), e.detach().double()
        scale = max(float(e.abs().max()), 1e-30, torch.finfo(dtype).smallest_normal)
        error = float((a - e).abs().max()) / scale
        assert error <= TOLERANCE[dtype] * factor, f"{what}[{index}]: error {error:.2e} of the maximum {scale:.3g}"
