# SPDX-License-Identifier: Apache-2.0
"""The task heads: RetinaNet's predictors, the mask head for things and the semantic head for stuff."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BoxHead(nn.Module):
    """RetinaNet's two predictors, shared by all levels.

    Channels of `class_logits` are anchor-major (anchor, class), of `box_deltas` (anchor, dx dy dw dh). Classes are
    sigmoids without a background class.

    Args:
        in_channels: channels of the sub-network features.
        num_classes: thing classes.
        num_anchors: anchors per cell.
    """

    def __init__(self, in_channels: int, num_classes: int, num_anchors: int):
        super().__init__()
        self.class_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        for conv in (self.class_logits, self.box_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.class_logits.bias, -math.log(99))  # every anchor starts at probability 0.01

    def forward(self, cls: Sequence[Tensor], reg: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level (N, C, H, W) twice -> per level (N, A * classes, H, W) and (N, A * 4, H, W)."""
        return [self.class_logits(f) for f in cls], [self.box_deltas(f) for f in reg]


class ThingHead(nn.Module):
    """Mask R-CNN's mask head: 3x3 convolutions, a 2x2/2 deconvolution, one mask per class.

    Args:
        in_channels: channels of the RoI features.
        channels: channels inside.
        num_classes: thing classes.
        num_convs: 3x3 convolutions before the deconvolution.
    """

    def __init__(self, in_channels: int = 256, channels: int = 256, num_classes: int = 80, num_convs: int = 4):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1) for i in range(num_convs)
        )
        self.upsample = nn.ConvTranspose2d(channels if num_convs else in_channels, channels, 2, stride=2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, roi_features: Tensor, labels: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Mask logits of RoIs.

        Args:
            roi_features: (K, C, S, S).
            labels: (K,) int64 class of each RoI; None: all classes.
            active: (K,) bool, RoIs whose logits are wanted; None: all. Here all are computed; the optimized head leaves
                work out.

        Returns:
            (K, 2S, 2S) logits of the class `labels`, or (K, num_classes, 2S, 2S) without them; unspecified for RoIs
            that are not active.
        """
        x = self.features(roi_features)  # (K, channels, 2S, 2S)
        return self.logits(x) if labels is None else self.class_logits(x, labels)

    def features(self, roi_features: Tensor) -> Tensor:
        """(K, C, S, S) -> (K, channels, 2S, 2S), what the last 1x1 convolution sees."""
        for conv in self.convs:
            roi_features = conv(roi_features).relu()
        return self.upsample(roi_features).relu()

    def class_logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """The row `labels[k]` of the last 1x1 convolution, for every k alone: (K, channels, 2S, 2S) -> (K, 2S, 2S)."""
        weight = self.logits.weight[labels].flatten(1)  # (K, channels)
        logits = torch.einsum("kchw,kc->khw", features, weight)
        return logits + self.logits.bias[labels][:, None, None]


class ConvNormUp(nn.Module):
    """3x3 convolution without bias, GroupNorm, ReLU, and 2x bilinear upsampling with aligned corners."""

    def __init__(self, in_channels: int, channels: int, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return upsample(self.norm(self.conv(x)).relu(), 2)


class StuffHead(nn.Module):
    """P3, P4 and P5 brought to stride 4 by 1, 2 and 3 blocks, summed and classified.

    Args:
        in_channels: channels of the stuff features.
        channels: channels inside.
        num_classes: stuff classes.
        groups: groups of the GroupNorm.
    """

    def __init__(self, in_channels: int = 256, channels: int = 128, num_classes: int = 54, groups: int = 32):
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
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[P3, P4, P5], each (N, C, H, W), -> logits (N, num_classes, H, W) at stride 4; `enlarge` completes them."""
        total = None
        for block, feature in zip(self.blocks, features):
            x = block(feature)  # (N, channels, H/4, W/4)
            total = x if total is None else total + x
        return self.logits(total)

    @staticmethod
    def enlarge(logits: Tensor) -> Tensor:
        """Logits at stride 4 -> logits at the size of the images, bilinear with aligned corners."""
        return upsample(logits, 4)


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling with aligned corners by a whole factor."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)
