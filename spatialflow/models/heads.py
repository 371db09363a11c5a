# SPDX-License-Identifier: Apache-2.0
"""Task heads: RetinaNet's predictors, the mask head for things and the semantic head for stuff."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BoxHead(nn.Module):
    """RetinaNet's two predictors, shared by all levels.

    Per level: cls and reg features, (N, C, H, W) each -> (N, A * classes, H, W) and (N, A * 4, H, W).

    Channels of `class_logits` are anchor-major (anchor, class), of `box_deltas` (anchor, dx dy dw dh). Each class has
    its own sigmoid; there is no background class.

    Args:
        in_channels: channels of the sub-network features.
        num_classes: thing classes.
        num_anchors: anchors per cell.
    """

    def __init__(self, in_channels: int, num_classes: int, num_anchors: int) -> None:
        super().__init__()
        self.class_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        for conv in (self.class_logits, self.box_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(cast("Tensor", conv.bias))
        # Every class of every anchor starts at a probability of about 0.01.
        nn.init.constant_(cast("Tensor", self.class_logits.bias), -math.log(99))

    def forward(self, cls: Sequence[Tensor], reg: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute class logits and box deltas of every level."""
        return [self.class_logits(f) for f in cls], [self.box_deltas(f) for f in reg]


class ThingHead(nn.Module):
    """Mask R-CNN's mask head: 3x3 convolutions, a 2x2 deconvolution of stride 2, one mask per class.

    (K, C, S, S) -> (K, classes, 2S, 2S), or (K, 2S, 2S) of one class per RoI.

    Args:
        in_channels: channels of the RoI features.
        channels: channels inside.
        num_classes: thing classes.
        num_convs: 3x3 convolutions before the deconvolution.
    """

    def __init__(self, in_channels: int = 256, channels: int = 256, num_classes: int = 80, num_convs: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1) for i in range(num_convs)
        )
        self.upsample = nn.ConvTranspose2d(channels if num_convs else in_channels, channels, 2, stride=2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast("Tensor", module.bias))

    def forward(self, roi_features: Tensor, labels: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Compute the mask logits of RoIs.

        Args:
            roi_features: (K, C, S, S).
            labels: (K,) int64 class of each RoI; None: all classes.
            active: (K,) bool, RoIs whose logits are needed; None: all. This head computes all of them; the optimized
                head skips the others.

        Returns:
            (K, 2S, 2S) logits of the class `labels`, or (K, num_classes, 2S, 2S) without them; unspecified for RoIs
            that are not active.
        """
        x = self.features(roi_features)  # (K, channels, 2S, 2S)
        return self.logits(x) if labels is None else self.class_logits(x, labels)

    def features(self, roi_features: Tensor) -> Tensor:
        """Compute the inputs of the last 1x1 convolution: (K, C, S, S) -> (K, channels, 2S, 2S)."""
        for conv in self.convs:
            roi_features = conv(roi_features).relu()
        return self.upsample(roi_features).relu()

    def class_logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Apply row `labels[k]` of the last 1x1 convolution to RoI k: (K, channels, 2S, 2S) -> (K, 2S, 2S)."""
        weight = self.logits.weight[labels].flatten(1)  # (K, channels)
        logits = torch.einsum("kchw,kc->khw", features, weight)
        return logits + cast("Tensor", self.logits.bias)[labels][:, None, None]


class ConvNormUp(nn.Module):
    """3x3 convolution without bias, GroupNorm, ReLU, and 2x bilinear upsampling with aligned corners.

    (N, C, H, W) -> (N, O, 2H, 2W).

    Args:
        in_channels: C.
        channels: O.
        groups: groups of the GroupNorm.
    """

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on `x`, (N, C, H, W)."""
        return upsample(self.norm(self.conv(x)).relu(), 2)


class StuffHead(nn.Module):
    """Semantic head: upsamples P3, P4 and P5 to stride 4 by 1, 2 and 3 blocks, sums and classifies them.

    [P3, P4, P5], each (N, C, ...) -> logits (N, classes, H / 4, W / 4), where (H, W) is the size of the images.

    Args:
        in_channels: channels of the stuff features.
        channels: channels inside.
        num_classes: stuff classes.
        groups: groups of the GroupNorm.
    """

    def __init__(self, in_channels: int = 256, channels: int = 128, num_classes: int = 54, groups: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(ConvNormUp(in_channels if i == 0 else channels, channels, groups) for i in range(level + 1))
            )
            for level in range(3)
        )
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(cast("Tensor", self.logits.bias))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits at stride 4."""
        total = None
        for block, feature in zip(self.blocks, features, strict=True):
            x = block(feature)  # (N, channels, H/4, W/4)
            total = x if total is None else total + x
        return self.logits(total)


def upsample_stuff_logits(logits: Tensor) -> Tensor:
    """Upsample logits from stride 4 to the size of the images, bilinearly with aligned corners."""
    return upsample(logits, 4)


def upsample(x: Tensor, factor: int) -> Tensor:
    """Upsample bilinearly with aligned corners by a whole factor."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)
