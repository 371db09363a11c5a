# SPDX-License-Identifier: Apache-2.0
"""multilevel_roi_align at the size of the thing head: P3..P5 of an 800x1344 image, 256 channels."""

import torch
from harness import Benchmark, Problem, Provider, deterministic, main, optional

from spatialflow import ops
from spatialflow.ops import reference

HEIGHT, WIDTH, CHANNELS, STRIDES, BINS = 800, 1344, 256, (8, 16, 32), 14
torchvision = optional("torchvision.ops")


def setup(count: int, sampling_ratio: int, layout: torch.memory_format = torch.channels_last) -> Problem:
    features = [
        torch.randn(1, CHANNELS, HEIGHT // stride, WIDTH // stride).contiguous(memory_format=layout)
        for stride in STRIDES
    ]
    # Sizes from 16 to 512 pixels, spread evenly over the octaves, so that every level has work. Each side is 0.7 to 1.3
    # times the size.
    size = 2 ** (4 + 5 * torch.rand(count, 1)) * (0.7 + 0.6 * torch.rand(count, 2))
    corner = torch.rand(count, 2) * (torch.tensor([WIDTH, HEIGHT]) - size).clamp(min=0)
    boxes = torch.cat([torch.zeros(count, 1), corner, corner + size], dim=1)
    cells = sum(feature[0, 0].numel() for feature in features)
    samples = count * BINS * BINS * max(sampling_ratio, 1) ** 2
    return Problem(
        inputs=(features, boxes),
        # torchvision's pooler has no `aligned`
        options={"output_size": BINS, "strides": STRIDES, "sampling_ratio": sampling_ratio, "aligned": False},
        features=(0,),
        differentiable=(0,),
        bytes=4 * CHANNELS * (cells + count * BINS * BINS),  # every cell is read once, and every bin written once
        operations=2 * 4 * CHANNELS * samples if sampling_ratio > 0 else None,  # four cells per sample
    )


def make_pooler(features, boxes, output_size, strides, sampling_ratio, aligned):
    """Return the arguments of `run_pooler`; canonical scale 112 at level 4 (P4) assigns levels as finest_scale 56."""
    names = [str(level) for level in range(len(features))]
    pooler = torchvision.MultiScaleRoIAlign(names, output_size, sampling_ratio, canonical_scale=112, canonical_level=4)
    return pooler, dict(zip(names, features)), [boxes[:, 1:]], [(HEIGHT, WIDTH)]


def run_pooler(pooler, features, boxes, sizes):
    return pooler(features, boxes, sizes)


BENCHMARK = Benchmark(
    name="multilevel_roi_align",
    title="P3..P5 of 800x1344, 256 channels, 14x14 bins",
    setup=setup,
    sweep={
        "100 RoIs, 2x2 samples": {"count": 100, "sampling_ratio": 2},
        "100 RoIs, adaptive": {"count": 100, "sampling_ratio": 0},
        "1000 RoIs, 2x2 samples": {"count": 1000, "sampling_ratio": 2},
        "1000 RoIs, adaptive": {"count": 1000, "sampling_ratio": 0},
    },
    providers={
        "spatialflow": ops.multilevel_roi_align,
        "spatialflow deterministic": deterministic(ops.multilevel_roi_align),
        "reference": reference.multilevel_roi_align,
        "torchvision": torchvision and Provider(run_pooler, make_pooler, waits=True, lowered=(1,)),
    },
    # Run in float64. The reference loops over RoIs, which is slow on a GPU, so torchvision is preferred.
    oracle=(lambda *inputs, **options: run_pooler(*make_pooler(*inputs, **options)))
    if torchvision
    else reference.multilevel_roi_align,
)

if __name__ == "__main__":
    main(BENCHMARK)
