# SPDX-License-Identifier: Apache-2.0
"""Folding of BatchNorm into the convolutions before it."""

from typing import cast

from torch import Tensor, nn

from spatialflow.models.resnet import Bottleneck, ResNet


def fold_norms(backbone: ResNet) -> None:
    """Fold every BatchNorm of a backbone, with its running statistics, into the convolution before it, in float64."""
    pairs = [(backbone.conv1, backbone.bn1)]
    for block in backbone.modules():
        if isinstance(block, Bottleneck):
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
            if block.downsample is not None:
                pairs.append(cast("tuple[nn.Conv2d, nn.BatchNorm2d]", (block.downsample[0], block.downsample[1])))
    for conv, norm in pairs:
        mean, variance = cast("tuple[Tensor, Tensor]", (norm.running_mean, norm.running_var))
        scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        bias = 0 if conv.bias is None else conv.bias.double()
        bias = (bias - mean.double()) * scale + norm.bias.double()
        weight = conv.weight.double() * scale[:, None, None, None]
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype))
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
