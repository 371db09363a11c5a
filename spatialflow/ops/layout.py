# SPDX-License-Identifier: Apache-2.0
"""Memory layout of results, for fake kernels and gradients: `memory_format_of` of csrc/ops/tensor.h in Python."""

import torch
from torch import Tensor


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the layout of results that are computed from an (N, C, H, W) tensor.

    Channels-last if C is the innermost dimension and pixels and rows are in order (slices allowed). Contiguous
    otherwise, including the ambiguous cases with sizes of 1. Strides of dimensions of size 1 are arbitrary in torch and
    are not read.
    """
    if tensor.dim() != 4 or tensor.is_contiguous() or tensor.shape[1] <= 1 or tensor.stride(1) != 1:
        return torch.contiguous_format
    pixel = tensor.stride(3) if tensor.shape[3] > 1 else tensor.shape[1]
    in_order = pixel >= tensor.shape[1] and (tensor.shape[2] <= 1 or tensor.stride(2) >= pixel)
    return torch.channels_last if in_order else torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    """Return whether results that are computed from `tensor` are channels-last."""
    return memory_format_of(tensor) == torch.channels_last
