# SPDX-License-Identifier: Apache-2.0
"""roi_align at the size of the thing head: P3 of an 800x1344 image (stride 8), 256 channels."""

import naive_kernels
import torch
from harness import Benchmark, Problem, Provider, deterministic, main, optional

from spatialflow import ops
from spatialflow.ops import reference

HEIGHT, WIDTH, CHANNELS, STRIDE, BINS = 100, 168, 256, 8, 14
torchvision = optional("torchvision.ops")


def setup(layout: torch.memory_format, sampling_ratio: int, count: int = 100) -> Problem:
    feature = torch.randn(1, CHANNELS, HEIGHT, WIDTH).contiguous(memory_format=layout)
    limit = torch.tensor([WIDTH, HEIGHT]) * float(STRIDE)
    size = 16 + torch.rand(count, 2) * 300
    corner = torch.rand(count, 2) * (limit - size)
    boxes = torch.cat([torch.zeros(count, 1), corner, corner + size], dim=1)
    samples = count * BINS * BINS * max(sampling_ratio, 1) ** 2
    return Problem(
        inputs=(feature, boxes),
        options={"output_size": BINS, "spatial_scale": 1 / STRIDE, "sampling_ratio": sampling_ratio, "aligned": True},
        features=(0,),
        differentiable=(0,),
        bytes=4
        * CHANNELS
        * (HEIGHT * WIDTH + count * BINS * BINS),  # every cell is read once, and every bin written once
        operations=2 * 4 * CHANNELS * samples if sampling_ratio > 0 else None,  # four cells per sample
    )


BENCHMARK = Benchmark(
    name="roi_align",
    title="100 RoIs, 256x100x168 features, 14x14 bins",
    setup=setup,
    sweep={
        "channels-last, 2x2 samples": {"layout": torch.channels_last, "sampling_ratio": 2},
        "channels-last, adaptive": {"layout": torch.channels_last, "sampling_ratio": 0},
        "contiguous, 2x2 samples": {"layout": torch.contiguous_format, "sampling_ratio": 2},
        "contiguous, adaptive": {"layout": torch.contiguous_format, "sampling_ratio": 0},
    },
    providers={
        "spatialflow": ops.roi_align,
        "spatialflow deterministic": deterministic(ops.roi_align),
        "reference": reference.roi_align,
        "torchvision": torchvision and Provider(torchvision.roi_align, lowered=(1,)),
        "CuPy, naive kernel": naive_kernels.provider(naive_kernels.roi_align),
    },
    oracle=torchvision.roi_align if torchvision else reference.roi_align,  # in float64; the reference is slow
)

if __name__ == "__main__":
    main(BENCHMARK)
