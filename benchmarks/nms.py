# SPDX-License-Identifier: Apache-2.0
"""nms of one class: 20,000 boxes, spread over an image, small in a large one, and crowded.

The plain-PyTorch reference takes a step per kept box, seconds in all, and is not timed.
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


def share_of_other_rows(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Rows kept by one alone. Not all zero: a pair within rounding of the threshold can turn out either way."""
    one, other = set(result.tolist()), set(expected.tolist())
    return len(one ^ other) / max(len(one | other), 1)


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
    oracle=torchvision.nms if torchvision else reference.nms,  # in float64; the reference decides alike, but slowly
    tolerance=1e-3,
    compare=share_of_other_rows,
)

if __name__ == "__main__":
    main(BENCHMARK)
