# SPDX-License-Identifier: Apache-2.0
"""The same network, arranged for training: operators of the package between the parameters of the plain modules where
they are faster, on the CPU with BatchNorm of fixed statistics folded into the convolutions; channels-last.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialflow.models.deform import DeformConv2d, split_offsets
from spatialflow.models.heads import BoxHead, StuffHead, upsample
from spatialflow.models.optimized.inference import is_3x3
from spatialflow.models.resnet import Bottleneck, ResNet
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.subnets import SEGMENTATION_LEVELS, SubnetFeatures, Subnets
from spatialflow.ops import SubnetParameters, deform_conv2d, flow_conv2d, fused_subnets, group_norm_relu


class TrainingConv(nn.Module):
    """A convolution with the parameters of the plain module, and an optional BatchNorm and ReLU in the same pass.

    Args:
        conv: the convolution.
        norm: the BatchNorm behind it; its running statistics are used, its affine parameters train.
        relu: whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, relu: bool = False):
        super().__init__()
        self.conv, self.norm, self.relu = conv, norm, relu
        self.offsets = TrainingConv(conv.conv_offset) if isinstance(conv, DeformConv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        conv, (weight, bias) = self.conv, self._folded()
        if self.offsets is not None:
            offset, mask = split_offsets(self.offsets(x))
            y = deform_conv2d(x, offset, weight, bias, conv.stride, conv.padding, conv.dilation, mask)
        elif is_3x3(conv):
            return flow_conv2d(x, None, weight, bias, self.relu)
        else:
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.relu_() if self.relu else y

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of convolution and norm together; gradients reach the parameters of both."""
        if self.norm is None:
            return self.conv.weight, self.conv.bias
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], self.norm.bias - self.norm.running_mean * scale


class TrainingBottleneck(nn.Module):
    """`Bottleneck` with fixed statistics."""

    def __init__(self, block: Bottleneck):
        super().__init__()
        self.convs = nn.Sequential(
            TrainingConv(block.conv1, block.bn1, relu=True),
            TrainingConv(block.conv2, block.bn2, relu=True),
            TrainingConv(block.conv3, block.bn3),
        )
        self.downsample = None if block.downsample is None else TrainingConv(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x).add_(x if self.downsample is None else self.downsample(x)).relu_()


class TrainingSubnets(nn.Module):
    """`Subnets` without deformable stages, all levels in one call."""

    def __init__(self, subnets: Subnets):
        super().__init__()
        self.plain = subnets

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        plain = self.plain
        modules = {
            "cls": plain.cls,
            "reg": plain.reg,
            "stuff": plain.stuff,
            "thing": plain.thing,
            "flow_cls": plain.flows(plain.follower),
            "flow_stuff": plain.flows("stuff"),
            "flow_thing": plain.flows("thing"),
            "semantic_flow": plain.semantic_flow,
        }
        convs = {name: tuple((conv.weight, conv.bias) for conv in part) for name, part in modules.items()}
        flows = any(convs[name] for name in ("flow_cls", "flow_stuff", "flow_thing"))
        source = plain.source if flows else None
        parameters = SubnetParameters(**convs, flow_source=source, segmentation_levels=SEGMENTATION_LEVELS)
        return SubnetFeatures(*fused_subnets(list(pyramid), parameters))


class TrainingBoxHead(nn.Module):
    """`BoxHead`, all levels in one call per predictor.

    Args:
        head: whose parameters train.
        on_cuda: run only the predictors that `is_faster_on_cuda`; the others convolve level by level.
    """

    def __init__(self, head: BoxHead, on_cuda: bool = False):
        super().__init__()
        self.plain = head
        self.at_once = [
            not on_cuda or is_faster_on_cuda(conv.out_channels) for conv in (head.class_logits, head.box_deltas)
        ]

    def forward(self, cls: Sequence[Tensor], reg: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        convs = (self.plain.class_logits, self.plain.box_deltas)
        return tuple(
            flow_conv2d(list(features), None, conv.weight, conv.bias, relu=False)
            if at_once
            else [conv(feature) for feature in features]
            for features, conv, at_once in zip((cls, reg), convs, self.at_once)
        )


def is_faster_on_cuda(out_channels: int) -> bool:
    """Whether `flow_conv2d` over P3 to P7, with its gradients, takes less time of a GPU than cuDNN level by level.

    By measurement (docs/training.md): with few outputs. Single levels, wide predictors and the sub-networks, whose
    convolutions have 256 outputs, are not faster.
    """
    return out_channels <= MOST_OUTPUTS_ON_CUDA


MOST_OUTPUTS_ON_CUDA = 64
"""A tile of `flow_conv2d`; 36 outputs were measured to be faster than cuDNN's, 256 not."""


class TrainingStuffHead(StuffHead):
    """`StuffHead` with norm, ReLU and upsampling in one pass, without the last upsampling: summed and classified before
    it, which all branches share, as both are linear.

    Args:
        head: whose parameters train.
        on_cuda: leave the convolutions to cuDNN.
    """

    def __init__(self, head: StuffHead, on_cuda: bool = False):
        nn.Module.__init__(self)
        self.blocks, self.logits = head.blocks if on_cuda else arrange(head.blocks), head.logits

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        total = None
        for branch, x in zip(self.blocks, features):
            for i, block in enumerate(branch):
                norm = block.norm
                x = group_norm_relu(
                    block.conv(x), norm.num_groups, norm.weight, norm.bias, norm.eps, upsample=i + 1 < len(branch)
                )
            total = x if total is None else total + x
        return upsample(self.logits(total), 2)


def arrange(module: nn.Module) -> nn.Module:
    """`module` with every part replaced that has a faster form; other parts are new, their parameters the same."""
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
        return TrainingConv(module)
    shallow = copy.copy(module)
    shallow._modules = {name: None if part is None else arrange(part) for name, part in module._modules.items()}
    return shallow


def optimize_for_training(model: SpatialFlow) -> SpatialFlow:
    """Rearranges a network for training, by what is faster on the device of its parameters.

    On the CPU (float32) every part takes its fused form. On CUDA the passes after the stuff head's convolutions do, and
    of the box head the predictors for which `is_faster_on_cuda`. There the weights of convolutions become
    channels-last, as cuDNN otherwise rearranges them in every call. RoIAlign, deformable convolutions and the focal
    loss are operators of the package anyway.

    Args:
        model: in training mode. It keeps the parameters, and is what is saved and evaluated.

    Returns:
        A SpatialFlow that computes the same outputs to rounding; gradients arrive at the parameters of `model`. Its
        input should be channels-last.
    """
    if next(model.parameters()).device.type == "cpu":
        return arrange(model)
    model.to(memory_format=torch.channels_last)
    shallow = copy.copy(model)
    shallow._modules = {**model._modules, "box_head": TrainingBoxHead(model.box_head, on_cuda=True)}
    if model.stuff_head is not None:
        shallow._modules["stuff_head"] = TrainingStuffHead(model.stuff_head, on_cuda=True)
    return shallow
