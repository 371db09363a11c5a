# SPDX-License-Identifier: Apache-2.0
"""Layout of results: the Python half of `memory_format_of` in csrc/ops/tensor.h, for fake kernels and gradients."""

import torch
from torch import Tensor


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Layout of what is computed from an (N, C, H, W) tensor: channels-last where its channels are adjacent in memory,
    pixels and rows in order, slices of such included. Plain contiguous otherwise, and where sizes of one allow both.
    Strides of dimensions of size 1 are arbitrary in torch and are not read.
    """
    if tensor.dim() != 4 or tensor.is_contiguous() or tensor.shape[1] <= 1 or tensor.stride(1) != 1:
        return torch.contiguous_format
    pixel = tensor.stride(3) if tensor.shape[3] > 1 else tensor.shape[1]
    in_order = pixel >= tensor.shape[1] and (tensor.shape[2] <= 1 or tensor.stride(2) >= pixel)
    return torch.channels_last if in_order else torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    return memory_format_of(tensor) == torch.channels_last
