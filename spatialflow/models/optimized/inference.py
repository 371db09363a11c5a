# SPDX-License-Identifier: Apache-2.0
"""The network optimized for inference: BatchNorm folded, bias and ReLU in the convolutions, weights packed once.

Every module for inference computes the same function as the plain module it replaces, to rounding. It holds buffers or
packed weights instead of parameters, except the last 1x1 convolution of `PackedThingHead`. The plain modules are the
reference implementation.
"""

import copy
from typing import Any

import torch

from spatialflow.models.optimized.backbone import FusedResNet, PackedFPN
from spatialflow.models.optimized.fold import fold_norms
from spatialflow.models.optimized.heads import PackedBoxHead, PackedStuffHead, PackedThingHead
from spatialflow.models.optimized.subnets import optimize_subnets
from spatialflow.models.spatialflow import SpatialFlow


def optimize_for_inference(
    model: SpatialFlow, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> SpatialFlow:
    """Make a faster copy of a network, for inference.

    Args:
        model: from `build_model`, with its weights loaded. It is not changed.
        device: where the result runs; None: where the model is.
        dtype: of weights and features; None: that of the model. BatchNorm is folded before the weights are converted.

    Returns:
        A SpatialFlow that computes the same outputs to rounding, channels-last and without gradients. It shares no
        weights with `model`, and cannot be trained. It can be pickled and copied. Its weights are packed again when
        it is unpickled, for the instruction set of that machine, and when `.to` changes device or dtype. Without
        autocast, images of another dtype than its weights raise a RuntimeError.
    """
    with torch.no_grad():
        source: Any = copy.deepcopy(model).to(device)  # its parts are of the plain classes
        fold_norms(source.backbone)
        source.to(dtype)
        fast = SpatialFlow(
            backbone=FusedResNet(source.backbone),
            fpn=PackedFPN(source.fpn),
            subnets=optimize_subnets(source.subnets),
            box_head=PackedBoxHead(source.box_head),
            thing_head=None if source.thing_head is None else PackedThingHead(source.thing_head),
            stuff_head=None if source.stuff_head is None else PackedStuffHead(source.stuff_head),
            config=source.config,
        )
        fast.categories, fast.trained_on = source.categories, source.trained_on
    return fast.requires_grad_(False).eval()
