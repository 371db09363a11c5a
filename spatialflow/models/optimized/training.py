# SPDX-License-Identifier: Apache-2.0
"""The network optimized for training: the package's fused operators applied to the parameters of the plain modules.

On the CPU, BatchNorm with fixed statistics is folded into the convolutions. Features are channels-last.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialflow.models.deform import Geometry, SelfOffsetDeformConv2d, split_offsets
from spatialflow.models.heads import BoxHead, StuffHead, upsample
from spatialflow.models.optimized.layers import is_3x3
from spatialflow.models.resnet import Bottleneck, ResNet
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.subnets import SubnetFeatures, Subnets
from spatialflow.ops import deform_conv2d, flow_conv2d, fused_subnets, group_norm_relu


class FoldedConv(nn.Module):
    """Convolution with optional BatchNorm and ReLU; each call folds the norm: (N, C, H, W) -> (N, O, H', W').

    Args:
        conv: the convolution, whose parameters train.
        norm: the BatchNorm after it; its running statistics are used, its affine parameters train.
        relu: whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, relu: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = conv, norm, relu
        self.offsets = FoldedConv(conv.conv_offset) if isinstance(conv, SelfOffsetDeformConv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, (N, C, H, W)."""
        conv, (weight, bias) = self.conv, self._fold()
        if self.offsets is not None:
            offset, mask = split_offsets(self.offsets(x))
            geometry = cast("Geometry", (conv.stride, conv.padding, conv.dilation))
            y = deform_conv2d(x, offset, weight, bias, *geometry, mask)
        elif is_3x3(conv):
            return flow_conv2d(x, None, weight, bias, self.relu)
        else:
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.relu_() if self.relu else y

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        """Fold the norm into weight and bias; gradients reach the parameters of both modules."""
        if self.norm is None:
            return self.conv.weight, self.conv.bias
        mean, variance = cast("tuple[Tensor, Tensor]", (self.norm.running_mean, self.norm.running_var))
        scale = self.norm.weight * (variance + self.norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], self.norm.bias - mean * scale


class TrainingBottleneck(nn.Module):
    """`Bottleneck` with fixed statistics, its norms folded: (N, C, H, W) -> (N, 4 * planes, H / stride, W / stride).

    Args:
        block: the plain block, whose parameters train.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            FoldedConv(block.conv1, block.bn1, relu=True),
            FoldedConv(block.conv2, block.bn2, relu=True),
            FoldedConv(block.conv3, block.bn3),
        )
        self.downsample = None if block.downsample is None else FoldedConv(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on `x`, (N, C, H, W)."""
        return self.convs(x).add_(x if self.downsample is None else self.downsample(x)).relu_()


class TrainingSubnets(nn.Module):
    """`Subnets` without deformable stages, all levels in one call of `fused_subnets`; shapes as in `Subnets`.

    Args:
        subnets: the plain sub-networks, whose parameters train.
    """

    def __init__(self, subnets: Subnets) -> None:
        super().__init__()
        self.plain = subnets

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        """Compute the features of the four tasks."""
        return SubnetFeatures(*fused_subnets(list(pyramid), self.plain.fused_parameters()))


class TrainingBoxHead(nn.Module):
    """`BoxHead` with all levels in one call per predictor; shapes as in `BoxHead`.

    Args:
        head: the plain head, whose parameters train.
        on_cuda: fuse only the predictors for which `is_faster_on_cuda` is true; the others run level by level.
    """

    def __init__(self, head: BoxHead, on_cuda: bool = False) -> None:
        super().__init__()
        self.plain = head
        self.is_fused = [
            not on_cuda or is_faster_on_cuda(conv.out_channels) for conv in (head.class_logits, head.box_deltas)
        ]

    def forward(self, cls: Sequence[Tensor], reg: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute class logits and box deltas of every level."""
        convs = (self.plain.class_logits, self.plain.box_deltas)
        class_logits, box_deltas = (
            flow_conv2d(list(features), None, conv.weight, conv.bias, relu=False)
            if is_fused
            else [conv(feature) for feature in features]
            for features, conv, is_fused in zip((cls, reg), convs, self.is_fused, strict=True)
        )
        return class_logits, box_deltas


def is_faster_on_cuda(out_channels: int) -> bool:
    """Return whether `flow_conv2d` over P3 to P7, with its gradients, takes less GPU time than cuDNN level by level.

    It does with few output channels, as measured (docs/training.md). It does not on single levels, in wide
    predictors, or in the sub-networks, whose convolutions have 256 output channels.
    """
    return out_channels <= MAX_OUTPUTS_ON_CUDA


MAX_OUTPUTS_ON_CUDA = 64
"""Largest number of output channels for which `is_faster_on_cuda` is true. With 36 channels, `flow_conv2d` was
measured to be faster than cuDNN; with 256, it was not."""


class TrainingStuffHead(StuffHead):
    """`StuffHead` with norm, ReLU and upsampling in one pass; shapes as in `StuffHead`.

    As in `PackedStuffHead`, the branches are summed and classified before the last 2x upsampling.

    Args:
        head: the plain head, whose parameters train.
        on_cuda: leave the convolutions to cuDNN.
    """

    def __init__(self, head: StuffHead, on_cuda: bool = False) -> None:
        nn.Module.__init__(self)
        self.blocks = head.blocks if on_cuda else cast("nn.ModuleList", replace_modules(head.blocks))
        self.logits = head.logits

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits at stride 4."""
        total = None
        branch: Any
        for branch, x in zip(self.blocks, features, strict=True):
            for i, block in enumerate(branch):
                norm = block.norm
                x = group_norm_relu(
                    block.conv(x), norm.num_groups, norm.weight, norm.bias, norm.eps, upsample=i + 1 < len(branch)
                )
            total = x if total is None else total + x
        return upsample(self.logits(total), 2)


def replace_modules(module: nn.Module) -> nn.Module:
    """Copy `module`, and replace every part that has a faster form; the copy shares the parameters."""
    batch_statistics = isinstance(module, ResNet) and module.norm_trains
    deformable = isinstance(module, Subnets) and any(module.deformable.values())
    if batch_statistics or deformable:
        return module
    if isinstance(module, Bottleneck):
        return TrainingBottleneck(module)
    if isinstance(module, Subnets):
        return TrainingSubnets(module)
    if isinstance(module, BoxHead):
        return TrainingBoxHead(module)
    if isinstance(module, StuffHead):
        return TrainingStuffHead(module)
    if type(module) is nn.Conv2d and is_3x3(module):
        return FoldedConv(module)
    shallow = copy.copy(module)
    shallow._modules = {name: None if part is None else replace_modules(part) for name, part in module._modules.items()}
    return shallow


def optimize_for_training(model: SpatialFlow) -> SpatialFlow:
    """Make a faster form of a network for training, on the device of its parameters.

    On the CPU every part that has a fused form is replaced; the trainer calls this function there only without mixed
    precision. On CUDA only two heads are replaced: the stuff head, except its convolutions, and the predictors of the
    box head for which `is_faster_on_cuda` is true. On CUDA the weights of convolutions become channels-last, as cuDNN
    otherwise rearranges them in every call. RoIAlign, deformable convolutions and the focal loss are operators of the
    package in the plain network too.

    Args:
        model: in training mode. The result shares its parameters; checkpoints and evaluation use `model`.

    Returns:
        A SpatialFlow that computes the same outputs to rounding; gradients reach the parameters of `model`. The input
        of the result should be channels-last.
    """
    if next(model.parameters()).device.type == "cpu":
        return cast("SpatialFlow", replace_modules(model))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented, but without a stub
    shallow = copy.copy(model)
    shallow._modules = {**model._modules, "box_head": TrainingBoxHead(cast("BoxHead", model.box_head), on_cuda=True)}
    if model.stuff_head is not None:
        shallow._modules["stuff_head"] = TrainingStuffHead(cast("StuffHead", model.stuff_head), on_cuda=True)
    return shallow
