# SPDX-License-Identifier: Apache-2.0
"""ResNet and ResNeXt backbones with optional deformable stages; layout and names of parameters are torchvision's."""

from collections.abc import Sequence

from torch import Tensor, nn

from spatialflow.models.deform import SelfOffsetDeformConv2d

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks per stage by depth."""


class Bottleneck(nn.Module):
    """Residual block: 1x1, 3x3 with the stride, 1x1 with four times the planes, and the shortcut.

    (N, in_channels, H, W) -> (N, 4 * planes, H / stride, W / stride).

    Args:
        in_channels: channels of the input.
        planes: a quarter of the output's channels.
        width: channels of the 3x3 convolution.
        groups: groups of the 3x3 convolution.
        stride: of the 3x3 convolution and of the shortcut.
        deformable: whether the 3x3 convolution is deformable.
    """

    def __init__(self, in_channels: int, planes: int, width: int, groups: int, stride: int, deformable: bool) -> None:
        super().__init__()
        out_channels = planes * 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        conv = SelfOffsetDeformConv2d if deformable else nn.Conv2d
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on `x`, (N, in_channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))  # (N, width, H, W)
        out = self.relu(self.bn2(self.conv2(out)))  # (N, width, H/stride, W/stride)
        out = self.bn3(self.conv3(out))  # (N, 4*planes, H/stride, W/stride)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Backbone of four stages of bottlenecks: (N, 3, H, W) -> [C3, C4, C5], of H/8, H/16 and H/32.

    BatchNorm uses its running statistics in `train()` mode too, unless `norm_trains`. Its affine parameters are
    trained, except in frozen stages.

    Args:
        depth: 50 or 101.
        base_channels: channels of the stem.
        groups: groups of the 3x3 convolutions (ResNeXt: 32 or 64).
        group_width: channels per group in the first stage; used where groups > 1.
        deformable_stages: stages (2..4) whose 3x3 convolutions are modulated deformable.
        frozen_stages: stem and this many stages take no gradient; 0 = the stem alone, -1 = nothing frozen.
        norm_trains: in `train()` mode BatchNorm of stages that are not frozen uses the statistics of the batch, and
            updates its running statistics.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        depth: int = 50,
        base_channels: int = 64,
        groups: int = 1,
        group_width: int = 64,
        deformable_stages: Sequence[int] = (),
        frozen_stages: int = 1,
        norm_trains: bool = False,
    ) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        self.norm_trains = norm_trains
        self.conv1 = nn.Conv2d(3, base_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = base_channels
        for index, blocks in enumerate(BLOCKS[depth]):
            planes = base_channels * 2**index
            width = planes if groups == 1 else group_width * groups * 2**index
            stage = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(Bottleneck(channels, planes, width, groups, stride, index + 1 in deformable_stages))
                channels = planes * 4
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.out_channels = tuple(base_channels * 4 * 2**i for i in (1, 2, 3))
        self._initialize()
        self._freeze()
        self.train()  # nn.Module starts in training mode without calling train()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, SelfOffsetDeformConv2d):
                module.zero_offsets()
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # at first a block adds nothing to its shortcut

    def _freeze(self) -> None:
        for module in self._frozen():
            module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        stem = [self.conv1, self.bn1] if self.frozen_stages >= 0 else []
        return [*stem, *(getattr(self, f"layer{i}") for i in range(1, self.frozen_stages + 1))]

    def train(self, mode: bool = True) -> "ResNet":
        """Set the mode as `nn.Module.train`, but BatchNorm that does not train keeps its running statistics."""
        super().train(mode)
        for fixed in self._frozen() if self.norm_trains else [self]:
            for module in fixed.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C3, C4 and C5 from images (N, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (N, base, H/4, W/4)
        x = self.layer1(x)  # (N, 4*base, H/4, W/4)
        c3 = self.layer2(x)  # (N, 8*base, H/8, W/8)
        c4 = self.layer3(c3)  # (N, 16*base, H/16, W/16)
        c5 = self.layer4(c4)  # (N, 32*base, H/32, W/32)
        return [c3, c4, c5]
