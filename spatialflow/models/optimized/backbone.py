# SPDX-License-Identifier: Apache-2.0
"""Backbone and FPN for inference."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialflow import __version__
from spatialflow.models.fpn import FPN
from spatialflow.models.optimized.layers import FusedConv, PackedModule, optimize_conv, pack
from spatialflow.models.resnet import Bottleneck, ResNet
from spatialflow.ops import PackedConv, flow_conv2d


class FusedStem(FusedConv):
    """First convolution of the backbone with a ReLU: (N, 3, H, W) -> (N, O, H/2, W/2).

    On a GPU the images are padded with channels of zeros, as cuDNN's fused kernels load channels in 16-byte vectors.

    Args:
        conv: the convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, relu=True)
        if self.weight.device.type != "cpu":
            missing = -self.weight.shape[1] % (16 // self.weight.element_size())
            self.weight = _pad_channels(self.weight, missing)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # the stem has no residual sum
        """Convolve the images, of any layout."""
        x = images.contiguous(memory_format=torch.channels_last)
        return super().forward(_pad_channels(x, self.weight.shape[1] - x.shape[1]))


def _pad_channels(x: Tensor, count: int) -> Tensor:
    """Append `count` channels of zeros to `x`, (N, C, H, W) channels-last."""
    return F.pad(x, (0, 0, 0, 0, 0, count)) if count else x


class FusedBottleneck(nn.Module):
    """`Bottleneck` with folded norms in three fused convolutions; the shortcut is summed in place.

    (N, C, H, W) -> (N, 4 * planes, H / stride, W / stride).

    Args:
        block: the plain block, its norms folded.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1 = FusedConv(block.conv1, relu=True)
        self.conv2 = optimize_conv(block.conv2, relu=True)
        self.conv3 = FusedConv(block.conv3, relu=True)
        self.downsample: FusedConv | None = None
        if block.downsample is not None:
            self.downsample = FusedConv(cast("nn.Conv2d", block.downsample[0]))
            # conv3 adds the bias of the shortcut, so that `downsample` needs no pass for it.
            self.conv3.bias = cast("Tensor", self.conv3.bias) + cast("Tensor", self.downsample.bias)
            self.downsample.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; without downsampling it may overwrite `x`."""
        out = self.conv2(self.conv1(x))
        return self.conv3(out, residual=x if self.downsample is None else self.downsample(x))


class FusedResNet(nn.Module):
    """`ResNet` with folded norms, channels-last: (N, 3, H, W) -> [C3 (H/8), C4 (H/16), C5 (H/32)].

    Its pickle contains the version of the package, because the layout of optimized weights may differ between versions.
    Every result of `optimize_for_inference` has this module.

    Args:
        backbone: the plain backbone, its norms folded.
    """

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.stem = FusedStem(backbone.conv1)
        self.maxpool = backbone.maxpool
        self.layers = nn.ModuleList(
            nn.Sequential(*map(FusedBottleneck, getattr(backbone, f"layer{i}"))) for i in range(1, 5)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C3, C4 and C5."""
        x = self.maxpool(self.stem(images))
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features[1:]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"version": __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        version = state.pop("version", "an earlier version")
        if version != __version__:
            raise RuntimeError(
                f"an optimized network was pickled by spatialflow {version}, and this is {__version__}: create it "
                f"again from its checkpoint, with optimize_for_inference or Predictor"
            )
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch


class PackedFPN(PackedModule):
    """`FPN` with the three output convolutions packed and in one call: [C3, C4, C5] -> [P3, ..., P7].

    Args:
        fpn: the plain FPN.
    """

    packed: list[PackedConv]

    def __init__(self, fpn: FPN) -> None:
        super().__init__([pack(cast("nn.Conv2d", conv)) for conv in fpn.output])
        self.lateral = nn.ModuleList(FusedConv(cast("nn.Conv2d", conv)) for conv in fpn.lateral)
        self.p6, self.p7 = FusedConv(fpn.p6), FusedConv(fpn.p7)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute P3 to P7 from C3, C4 and C5; shapes as in `FPN`."""
        merged = [self.lateral[-1](features[-1])]
        for lateral, feature in zip(reversed(self.lateral[:-1]), reversed(features[:-1]), strict=True):
            above = F.interpolate(merged[0], size=feature.shape[-2:], mode="nearest")
            merged.insert(0, lateral(feature, residual=above))  # `above` is a new tensor, so it may hold the sum
        p6 = self.p6(features[-1])
        return [*flow_conv2d(merged, None, self.packed, relu=False), p6, self.p7(p6)]
