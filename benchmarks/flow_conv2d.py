# SPDX-License-Identifier: Apache-2.0
"""flow_conv2d at the size of one stage of a sub-network: P3..P7 of an 800x1344 image, 256 channels."""

from functools import partial

import naive_kernels
import torch
from harness import Benchmark, Problem, Provider, compiled, main, with_conv_precision

from spatialflow import ops
from spatialflow.ops import reference

SIZES = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # P3..P7


def setup(out_channels: int, levels: slice, flow: bool, channels: int = 256) -> Problem:
    def maps() -> list[torch.Tensor]:
        return [torch.randn(1, channels, *s).contiguous(memory_format=torch.channels_last) for s in SIZES[levels]]

    weight = torch.randn(out_channels, channels, 3, 3).contiguous(memory_format=torch.channels_last) * 0.02
    pixels = sum(height * width for height, width in SIZES[levels])
    # At least ten standard deviations of the convolution above or below zero: half of the units are active. No unit is
    # so near zero that rounding decides whether its gradient passes; otherwise gradients would differ from float64.
    bias = torch.where(torch.arange(out_channels) % 2 == 0, 14.0, -14.0)
    return Problem(
        inputs=(maps(), maps() if flow else None, weight, bias),
        features=(0, 1, 2, 3),
        differentiable=(0, 1, 2, 3) if flow else (0, 2, 3),
        bytes=4 * (pixels * (channels * (2 if flow else 1) + out_channels) + weight.numel()),
        operations=2 * 9 * channels * out_channels * pixels,  # of the direct form; Winograd needs about a quarter
    )


def packed(x, flow, weight, bias):
    """Return the arguments with a `PackedConv`, whose unpacked weight is used if gradients are needed."""
    return x, flow, ops.pack_conv3x3(weight, bias)


BENCHMARK = Benchmark(
    name="flow_conv2d",
    title="relu(conv3x3(x + flow) + bias), channels-last",
    setup=setup,
    sweep={
        "P3..P7, 256 to 256, flow": {"out_channels": 256, "levels": slice(None), "flow": True},
        "P3..P7, 256 to 720, no flow": {"out_channels": 720, "levels": slice(None), "flow": False},
        "P3..P7, 256 to 36, no flow": {"out_channels": 36, "levels": slice(None), "flow": False},
        "P3, 256 to 256, flow": {"out_channels": 256, "levels": slice(0, 1), "flow": True},
        "P4, 256 to 256, flow": {"out_channels": 256, "levels": slice(1, 2), "flow": True},
        "P5, 256 to 256, flow": {"out_channels": 256, "levels": slice(2, 3), "flow": True},
    },
    providers={
        "spatialflow": with_conv_precision("ieee", ops.flow_conv2d),
        "spatialflow packed": with_conv_precision("ieee", Provider(ops.flow_conv2d, packed)),
        "spatialflow direct": partial(ops.flow_conv2d, algorithm="direct"),
        "reference": with_conv_precision("ieee", reference.flow_conv2d),  # eager; the CPU uses oneDNN, CUDA uses cuDNN
        "reference, torch.compile": with_conv_precision("ieee", compiled(reference.flow_conv2d)),
        "spatialflow packed TF32": with_conv_precision(
            "tf32", Provider(ops.flow_conv2d, packed)
        ),  # other dtypes: as "spatialflow packed"
        "reference TF32": with_conv_precision("tf32", reference.flow_conv2d),
        "CuPy, naive kernel": naive_kernels.provider(naive_kernels.flow_conv2d),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
