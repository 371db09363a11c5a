# SPDX-License-Identifier: Apache-2.0
"""Inputs shared by the tests of flow_conv2d."""

import torch

from helpers.op_matrix import OpSample

CODES = {"auto": 0, "winograd": 1, "direct": 2, "tf32": 3, "tf32x3": 4}
"""Codes of the algorithms in the raw operators."""


def eighths(*size: int) -> torch.Tensor:
    """Generate normal float64 numbers between -3 and 3, rounded to multiples of 1/8."""
    return (torch.randn(size, dtype=torch.float64).clamp(-3, 3) * 8).round() / 8


def tensors_of(channels: int, out_channels: int, sizes: list[tuple[int, int]], flow: bool, bias: bool, batch: int):
    """Return a function that makes x, flow, weight and bias in float64; its argument enlarges the maps."""

    def build(grow: int = 0) -> list:
        """Make tensors with x and flow in eighths, so that x + flow is exact in 16 bits."""
        x = [eighths(batch, channels, h + grow, w + grow) for h, w in sizes]
        weight = torch.randn(out_channels, channels, 3, 3, dtype=torch.float64) * (2 / max(channels, 1)) ** 0.5 / 3
        return [
            x,
            [eighths(*level.shape) for level in x] if flow else None,
            weight,
            torch.randn(out_channels, dtype=torch.float64) if bias else None,
        ]

    return build


def sample_of(op, reference, raw, tensors, flow: bool, bias: bool, options: dict):
    """Return a function that makes an OpSample; `tensors` returns x, flow, weight and bias first."""
    present = tuple(index for index, there in enumerate((True, flow, True, bias)) if there)

    def build() -> OpSample:
        return OpSample(
            op=op,
            reference=reference,
            tensors=tensors(),
            options=options,
            differentiable=present,
            converted=present,
            raw=raw,
            images=(0, 1) if flow else (0,),
            resized=tensors,
        )

    return build
