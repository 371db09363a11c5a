# SPDX-License-Identifier: Apache-2.0
"""Layout of results: the Python half of `memory_format_of` in csrc/ops/tensor.h, for fake kernels and gradients."""

import torch
from torch import Tensor


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Layout of what is computed from an (N, C, H, W) tensor: channels-last where its channels are adjacent in memory
    and its rows in order, slices of such included; plain contiguous otherwise, and where sizes of one leave it open."""
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.stride(1) == 1
        and tensor.stride(3) >= tensor.shape[1]
        and tensor.stride(2) >= tensor.stride(3)
    ):
        return torch.channels_last
    return torch.contiguous_format


def is_channels_last(tensor: Tensor) -> bool:
    return memory_format_of(tensor) == torch.channels_last
