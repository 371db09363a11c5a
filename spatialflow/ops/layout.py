# SPDX-License-Identifier: Apache-2.0
"""Memory layout of results, for fake kernels and gradients: `memory_format_of` of csrc/ops/tensor.h in Python."""

from typing import Any

import torch
from torch import Tensor


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the layout of results that are computed from an (N, C, H, W) tensor.

    The layout is channels-last if C is the innermost dimension and pixels and rows are in order (slices allowed). It is
    contiguous otherwise, including the ambiguous cases with sizes of 1. Strides of dimensions of size 1 are arbitrary
    in torch and are not read.
    """
    if tensor.dim() != 4 or tensor.is_contiguous() or tensor.shape[1] <= 1 or tensor.stride(1) != 1:
        return torch.contiguous_format
    pixel = tensor.stride(3) if tensor.shape[3] > 1 else tensor.shape[1]
    in_order = pixel >= tensor.shape[1] and (tensor.shape[2] <= 1 or tensor.stride(2) >= pixel)
    return torch.channels_last if in_order else torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """Return whether results that are computed from `tensor` are channels-last."""
    return memory_format_of(tensor) == torch.channels_last


def empty_levels(levels: list[Tensor], channels: Any = None) -> list[Tensor]:
    """Make uninitialized results of the sizes and layouts of `levels`, with `channels` if it is not None."""
    return [
        torch.empty(
            (level.shape[0], level.shape[1] if channels is None else channels, *level.shape[2:]),
            dtype=level.dtype,
            device=level.device,
            memory_format=memory_format_of(level),
        )
        for level in levels
    ]
