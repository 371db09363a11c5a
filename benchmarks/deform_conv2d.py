# SPDX-License-Identifier: Apache-2.0
"""deform_conv2d at the sizes of the deformable models at 800x1344: sub-networks on P3 to P5, and backbone stages."""

from functools import partial

import naive_kernels
import torch
from harness import Benchmark, Problem, Provider, deterministic, main, optional, with_conv_precision

from spatialflow import ops
from spatialflow.ops import reference

torchvision = optional("torchvision.ops")


def setup(
    layout: torch.memory_format,
    channels: int = 256,
    height: int = 50,
    width: int = 84,
    stride: int = 1,
    groups: int = 1,
    masked: bool = True,
) -> Problem:
    """Make a 3x3 convolution with as many outputs as inputs; `height` and `width` are those of the output."""
    input = torch.randn(1, channels, height * stride, width * stride).contiguous(memory_format=layout)
    # The gradient jumps where a sample crosses a cell. Offsets are odd multiples of 1/32, never integers, so float32
    # and float64 sample the same cells.
    offset = ((2 * torch.randn(1, 18, height, width)) * 16).floor() / 16 + 1 / 32
    weight = torch.randn(channels, channels // groups, 3, 3) / (9 * channels // groups) ** 0.5
    mask = torch.rand(1, 9, height, width) if masked else None
    positions = offset.numel() + (mask.numel() if masked else 0)
    inputs = (input, offset, weight, torch.randn(channels)) + ((mask,) if masked else ())
    return Problem(
        inputs=inputs,
        options={"stride": (stride, stride), "padding": (1, 1), "dilation": (1, 1)},
        features=(0, 2, 3),
        differentiable=tuple(range(len(inputs))),
        bytes=4 * (input.numel() + positions + weight.numel() + channels * height * width),
        fixed_bytes=4 * positions,
        operations=2 * 9 * channels * channels // groups * height * width,
    )


def by_position(function):
    """Return a function that takes the mask of `function` as an optional fifth argument; None if `function` is None."""
    return function and (lambda *tensors, **options: function(*tensors[:4], mask=(*tensors, None)[4], **options))


def packed(input, offset, weight, bias, mask=None, **options):
    """Return the arguments with a packed weight; packing is not timed, because networks pack once for inference."""
    return input, offset, ops.pack_deform_conv2d(weight, bias, input.shape[1] // weight.shape[1]), None, mask, options


def with_packed(*arguments):
    *tensors, mask, options = arguments
    return ops.deform_conv2d(*tensors, mask=mask, **options)


BENCHMARK = Benchmark(
    name="deform_conv2d",
    title="3x3, sub-networks on P3 to P5 (256 channels) and backbone stages",
    setup=setup,
    sweep={
        "v2 on P3, channels-last": {"layout": torch.channels_last, "height": 100, "width": 168},
        "v2 on P4, channels-last": {"layout": torch.channels_last},
        "v2 on P4, contiguous": {"layout": torch.contiguous_format},
        "v1 on P4, channels-last": {"layout": torch.channels_last, "masked": False},
        "v2 on P5, channels-last": {"layout": torch.channels_last, "height": 25, "width": 42},
        "R101 stage 5, stride 2, channels-last": {
            "layout": torch.channels_last,
            "channels": 512,
            "height": 25,
            "width": 42,
            "stride": 2,
        },
        "X101-64x4d stage 4, 64 groups, channels-last": {
            "layout": torch.channels_last,
            "channels": 1024,
            "groups": 64,
        },
    },
    providers={
        "spatialflow": with_conv_precision("ieee", by_position(ops.deform_conv2d)),
        "spatialflow packed": with_conv_precision("ieee", Provider(with_packed, packed, only_forward=True)),
        "spatialflow TF32": with_conv_precision("tf32", by_position(ops.deform_conv2d)),  # differs in float32 only
        "spatialflow direct": by_position(partial(ops.deform_conv2d, algorithm="direct")),
        "spatialflow deterministic": deterministic(by_position(partial(ops.deform_conv2d, algorithm="tf32x3"))),
        "reference": by_position(reference.deform_conv2d),
        "torchvision": torchvision
        and Provider(
            by_position(torchvision.deform_conv2d),
            lowered=(1, 4),
            waits=True,  # launches its kernels on the default stream, where CUDA graphs cannot capture them
        ),
        "CuPy, naive kernel": naive_kernels.provider(naive_kernels.deform_conv2d),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
