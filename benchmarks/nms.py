# SPDX-License-Identifier: Apache-2.0
"""nms of one class: 20,000 boxes in four densities, from small boxes in a large image to crowded boxes.

The plain-PyTorch reference is not timed: it has a step per kept box and takes seconds.
"""

import torch
from harness import Benchmark, Problem, Provider, main, optional

from spatialflow import ops
from spatialflow.ops import reference

torchvision = optional("torchvision.ops")


def setup(count: int, extent: float, smallest: float, largest: float) -> Problem:
    corner = torch.rand(count, 2) * extent
    boxes = torch.cat([corner, corner + smallest + torch.rand(count, 2) * (largest - smallest)], dim=1)
    return Problem(inputs=(boxes, torch.rand(count)), options={"iou_threshold": 0.5}, bytes=20 * count)


def share_of_different_rows(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the share of rows that only one result keeps; rounding at the threshold can decide either way."""
    kept, expected_kept = set(result.tolist()), set(expected.tolist())
    return len(kept ^ expected_kept) / max(len(kept | expected_kept), 1)


BENCHMARK = Benchmark(
    name="nms",
    title="20,000 boxes, threshold 0.5",
    setup=setup,
    sweep={
        "10-100 px in 1000 px": {"count": 20000, "extent": 1000.0, "smallest": 10.0, "largest": 100.0},
        "16-400 px in 1333 px": {"count": 20000, "extent": 1333.0, "smallest": 16.0, "largest": 400.0},
        "5-50 px in 4000 px": {"count": 20000, "extent": 4000.0, "smallest": 5.0, "largest": 50.0},
        "0-100 px in 100 px": {"count": 20000, "extent": 100.0, "smallest": 0.0, "largest": 100.0},
    },
    providers={
        "spatialflow": Provider(ops.nms, waits=True),
        "torchvision": torchvision and Provider(torchvision.nms, waits=True),
    },
    oracle=torchvision.nms if torchvision else reference.nms,  # in float64; the reference gives the same, but is slow
    tolerance=1e-3,
    compare=share_of_different_rows,
)

if __name__ == "__main__":
    main(BENCHMARK)
