# SPDX-License-Identifier: Apache-2.0
"""Untrained networks with as many computations, and about as many detections, as trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference_pipeline import network_input
from torch import nn

from spatialflow import build_model
from spatialflow.images import read_image
from spatialflow.models.resnet import Bottleneck
from spatialflow.models.spatialflow import SpatialFlow

CANDIDATES, CONFIDENT = 1500, 20
"""Numbers of (anchor, class) pairs before NMS that reach `score_threshold` and `instance_score_threshold`."""


@torch.no_grad()
def settle_norms(backbone: nn.Module, images: torch.Tensor) -> None:
    """Set BatchNorm statistics from `images`, and the weights of the last BatchNorm of every residual branch to 0.2.

    Without statistics the activations overflow. The weights of these last BatchNorms are initially zero. Zeros would
    hide errors of the convolutions, and a GPU multiplies them faster than other numbers.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            module.bn3.weight.fill_(0.2)
    modes = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    backbone(images)
    for norm, (training, momentum) in zip(norms, modes):
        norm.train(training).momentum = momentum


def untrained_model(config: str, image: Path, overrides: dict[str, Any]) -> SpatialFlow:
    """Return a network that detects about as much in `image` as a trained one.

    Initial weights give every box a probability near 0.01, and few stuff classes to the pixels. Therefore
    `settle_norms` is applied with the image, and each channel of the logits is normalized. Then the class logits are
    scaled and shifted: `CANDIDATES` pairs of anchor and class reach `score_threshold`, and `CONFIDENT` of them reach
    `instance_score_threshold`.
    """
    torch.manual_seed(0)
    model = build_model(config, **overrides).eval()
    test = model.config.test
    _, images = network_input(read_image(image), test, model.config.data)
    settle_norms(model.backbone, images)
    with torch.inference_mode():
        output = model(images)
        logits = torch.cat([level.flatten(2)[0] for level in output.class_logits], dim=1)  # (A * classes, cells)
        mean, deviation = logits.mean(dim=1), logits.std(dim=1)
        best = ((logits - mean[:, None]) / deviation[:, None]).flatten().topk(CANDIDATES).values
        low, high = (torch.tensor([test.score_threshold, test.instance_score_threshold])).logit()
        slope = (high - low) / (best[CONFIDENT - 1] - best[-1])
        adjust(model.box_head.class_logits, slope / deviation, low - slope * (best[-1] + mean / deviation))
        mean, deviation = (output.stuff_logits.mean(dim=(0, 2, 3)), output.stuff_logits.std(dim=(0, 2, 3)))
        rarity = torch.arange(len(mean)) / 4  # subtracted, so that later classes have fewer pixels
        adjust(model.stuff_head.logits, 1 / deviation, -mean / deviation - rarity)
    return model


def adjust(conv: nn.Conv2d, factor: torch.Tensor, offset: torch.Tensor) -> None:
    """Multiply the outputs of a convolution by `factor` and add `offset`, channel by channel."""
    conv.weight.mul_(factor[:, None, None, None])
    conv.bias.mul_(factor).add_(offset)
