# SPDX-License-Identifier: Apache-2.0
"""group_norm_relu in the stuff head: 128 channels in 32 groups, channels-last, P3 to P5 of an 800x1344 image."""

import torch
from harness import Benchmark, Problem, compiled, main
from torch.nn import functional as F

from spatialflow import ops
from spatialflow.ops import reference

CHANNELS, GROUPS = 128, 32


def setup(size: tuple[int, int], upsample: bool) -> Problem:
    input = torch.randn(1, CHANNELS, *size).to(memory_format=torch.channels_last)
    pixels = size[0] * size[1]
    return Problem(
        inputs=(input, GROUPS, torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)),
        options={"upsample": upsample},
        features=(0, 2, 3),
        differentiable=(0, 2, 3),
        bytes=4 * CHANNELS * pixels * (5 if upsample else 2),  # every value is read once, and every result written once
    )


def eager(input, num_groups, weight, bias, upsample):
    result = F.group_norm(input, num_groups, weight, bias).relu_()
    return F.interpolate(result, scale_factor=2, mode="bilinear", align_corners=True) if upsample else result


BENCHMARK = Benchmark(
    name="group_norm_relu",
    title="1x128 channels in 32 groups, channels-last",
    setup=setup,
    sweep={
        f"{h}x{w}{', upsampled' if upsample else ''}": {"size": (h, w), "upsample": upsample}
        for h, w in ((100, 168), (50, 84), (25, 42))
        for upsample in (False, True)
    },
    providers={
        "spatialflow": ops.group_norm_relu,
        "reference": reference.group_norm_relu,
        "torch": eager,
        "torch.compile": compiled(eager),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
