# SPDX-License-Identifier: Apache-2.0
"""sigmoid_focal_loss at the size of training: the 201,600 anchors of one 800x1344 image, 80 classes."""

import torch
from harness import Benchmark, Problem, Provider, main, optional

from spatialflow import ops
from spatialflow.ops import reference

CLASSES = 80
ANCHORS = 9 * (100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11)  # nine per cell of P3..P7
torchvision = optional("torchvision.ops")


def setup(reduction: str) -> Problem:
    labels = torch.where(torch.rand(ANCHORS) < 0.01, torch.randint(CLASSES, (ANCHORS,)), CLASSES)
    logits = torch.randn(ANCHORS, CLASSES) - 3
    return Problem(
        inputs=(logits, labels),
        options={"reduction": reduction},
        features=(0,),
        differentiable=(0,),
        bytes=4 * ANCHORS * CLASSES * (2 if reduction == "none" else 1),
    )


def one_hot(logits: torch.Tensor, labels: torch.Tensor, reduction: str) -> tuple:
    target = torch.nn.functional.one_hot(labels, CLASSES + 1)[:, :CLASSES].to(logits.dtype)
    return logits, target, 0.25, 2.0, reduction


BENCHMARK = Benchmark(
    name="sigmoid_focal_loss",
    title="201,600 anchors, 80 classes",
    setup=setup,
    sweep={"sum": {"reduction": "sum"}, "elements": {"reduction": "none"}},
    providers={
        "spatialflow": ops.sigmoid_focal_loss,
        "reference": reference.sigmoid_focal_loss,
        # The conversion of labels to one-hot targets is not timed, to torchvision's advantage.
        "torchvision": torchvision and Provider(torchvision.sigmoid_focal_loss, prepare=one_hot),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
