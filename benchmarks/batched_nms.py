# SPDX-License-Identifier: Apache-2.0
"""batched_nms over 80 classes: 5,000 boxes in all, and 5,000 boxes in each class."""

import torch
from harness import Benchmark, Problem, Provider, main, optional
from nms import setup as one_class
from nms import share_of_different_rows

from spatialflow import ops
from spatialflow.ops import reference

CLASSES = 80
torchvision = optional("torchvision.ops")


def setup(count: int) -> Problem:
    problem = one_class(count, 1000.0, 10.0, 100.0)
    idxs = torch.arange(count) % CLASSES
    return Problem(inputs=(*problem.inputs, idxs), options=problem.options, bytes=28 * count)


def class_by_class(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Run nms class by class, as the oracle; torchvision's nms if it is installed, because the reference is slow."""
    nms = torchvision.nms if torchvision else reference.nms
    rows_by_class = [(idxs == label).nonzero()[:, 0] for label in range(CLASSES)]
    kept = torch.cat([rows[nms(boxes[rows], scores[rows], iou_threshold)] for rows in rows_by_class])
    return kept[scores[kept].argsort(descending=True)]


BENCHMARK = Benchmark(
    name="batched_nms",
    title="80 classes, threshold 0.5",
    setup=setup,
    sweep={"5,000 boxes": {"count": 5000}, "80 x 5,000 boxes": {"count": 400000}},
    providers={
        "spatialflow": Provider(ops.batched_nms, waits=True),
        "torchvision": torchvision and Provider(torchvision.batched_nms, waits=True),
    },
    oracle=class_by_class,
    tolerance=1e-3,
    compare=share_of_different_rows,
)

if __name__ == "__main__":
    main(BENCHMARK)
