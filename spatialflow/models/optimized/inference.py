# SPDX-License-Identifier: Apache-2.0
"""The same network, arranged for inference: BatchNorm folded, bias and ReLU in the convolutions, weights packed once.

Every class here stands in for one of the plain modules, computes the same function to rounding, and holds plain buffers
instead of parameters. The plain modules are the reference.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialflow import __version__
from spatialflow.models.deform import OFFSETS, DeformConv2d
from spatialflow.models.fpn import FPN
from spatialflow.models.heads import BoxHead, ConvNormUp, StuffHead, ThingHead, upsample
from spatialflow.models.optimized.conv import Shape, fused_conv2d, linear_relu
from spatialflow.models.resnet import Bottleneck, ResNet
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.subnets import SEGMENTATION_LEVELS, SubnetFeatures, Subnets
from spatialflow.ops import (
    PackedConv,
    PackedDeformConv,
    SubnetParameters,
    deform_conv2d,
    flow_conv2d,
    fused_subnets,
    group_norm_relu,
    pack_conv3x3,
    pack_deform_conv2d,
    pack_subnets,
)

Levels = TypeVar("Levels", Tensor, list[Tensor])


def fold_norms(backbone: ResNet) -> None:
    """Multiplies every BatchNorm of a backbone, in evaluation mode, into the convolution before it, in float64."""
    pairs = [(backbone.conv1, backbone.bn1)]
    for block in backbone.modules():
        if isinstance(block, Bottleneck):
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
            if block.downsample is not None:
                pairs.append(tuple(block.downsample))
    for conv, norm in pairs:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = 0 if conv.bias is None else conv.bias.double()
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
        weight = conv.weight.double() * scale[:, None, None, None]
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype))
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


class FusedConv(nn.Module):
    """A convolution with an optional residual sum and ReLU in the same pass.

    Args:
        conv: the convolution.
        relu: whether a ReLU follows (after the residual sum, where there is one).
    """

    def __init__(self, conv: nn.Conv2d, relu: bool = False):
        super().__init__()
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        self.shape, self.relu = Shape(conv.stride, conv.padding, conv.groups), relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W'). `residual`, of the output's shape, may be overwritten."""
        return fused_conv2d(x, self.weight, self.bias, self.shape, self.relu, residual)


class FusedStem(FusedConv):
    """The first convolution, with a ReLU. On a GPU it reads zeros as further channels, since cuDNN's fused kernels want
    16 bytes of them.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv, relu=True)
        if self.weight.device.type != "cpu":
            missing = -self.weight.shape[1] % (16 // self.weight.element_size())
            self.weight = _more_channels(self.weight, missing)

    def forward(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        return super().forward(_more_channels(x, self.weight.shape[1] - x.shape[1]))


def _more_channels(x: Tensor, count: int) -> Tensor:
    """`x`, (N, C, H, W) channels-last, with `count` channels of zeros behind its own."""
    return F.pad(x, (0, 0, 0, 0, 0, count)) if count else x


class FusedBottleneck(nn.Module):
    """`Bottleneck` with folded norms in three fused convolutions; the shortcut is summed in place."""

    def __init__(self, block: Bottleneck):
        super().__init__()
        self.conv1 = FusedConv(block.conv1, relu=True)
        self.conv2 = _arranged(block.conv2, relu=True)
        self.conv3 = FusedConv(block.conv3, relu=True)
        self.downsample = None
        if block.downsample is not None:
            self.downsample = FusedConv(block.downsample[0])
            self.conv3.bias = self.conv3.bias + self.downsample.bias  # one pass less: both biases enter the sum
            self.downsample.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """May overwrite `x` where there is no downsampling."""
        out = self.conv2(self.conv1(x))
        return self.conv3(out, residual=x if self.downsample is None else self.downsample(x))


class FusedResNet(nn.Module):
    """`ResNet` with folded norms, channels-last.

    Every optimized network has one, so it also carries the version of the package through pickles: how weights are
    arranged here may change between versions.
    """

    def __init__(self, backbone: ResNet):
        super().__init__()
        self.stem = FusedStem(backbone.conv1)
        self.maxpool = backbone.maxpool
        self.layers = nn.ModuleList(
            nn.Sequential(*map(FusedBottleneck, getattr(backbone, f"layer{i}"))) for i in range(1, 5)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
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
                f"an optimized network was pickled by spatialflow {version}, and this is {__version__}: make it again "
                f"from its checkpoint, by optimize_for_inference or Predictor"
            )
        super().__setstate__(state)


def is_3x3(conv: nn.Conv2d) -> bool:
    """Whether `flow_conv2d` computes this convolution."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and not isinstance(conv, DeformConv2d)


def pack(conv: nn.Conv2d) -> PackedConv:
    """A 3x3 convolution of stride 1, its weights arranged once."""
    return pack_conv3x3(conv.weight.detach(), None if conv.bias is None else conv.bias.detach())


class PackedModule(nn.Module):
    """A module with packed convolutions, which are packed again where `.to` changes their device or dtype.

    Args:
        packed: the convolutions.
    """

    def __init__(self, packed: PackedConv | PackedDeformConv | list[PackedConv] | SubnetParameters):
        super().__init__()
        self.packed = packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        """What `.to`, `.cuda`, `.half` and the like call for every tensor of a module."""
        super()._apply(fn, recurse)
        self.packed = _moved(self.packed, fn)
        return self


def _moved(packed: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """`packed` with every convolution packed again whose weight `fn` changes."""
    if isinstance(packed, (PackedConv, PackedDeformConv)):
        weight, bias = fn(packed.weight), None if packed.bias is None else fn(packed.bias)
        return packed if weight is packed.weight else packed.packed_again(weight, bias)
    if isinstance(packed, SubnetParameters):
        return SubnetParameters(*(_moved(field, fn) for field in packed))
    return type(packed)(_moved(one, fn) for one in packed) if isinstance(packed, (list, tuple)) else packed


class PackedConv3x3(PackedModule):
    """A 3x3 convolution of stride 1 over a tensor or a list of levels, its weights arranged once.

    Args:
        conv: the convolution.
        relu: whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool = False):
        super().__init__(pack(conv))
        self.relu = relu

    def forward(self, x: Levels, flow: Levels | None = None, active: Tensor | None = None) -> Levels:
        """relu(conv(x + flow)), of the structure of `x`; zeros for images that are not `active`, (N,) bool."""
        return flow_conv2d(x, flow, self.packed, None, self.relu, active=active)


class PackedDeform(PackedModule):
    """A deformable convolution over a tensor or a list of levels, its weight arranged once.

    Args:
        conv: weight, bias and settings.
        relu: whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool = False):
        bias = None if conv.bias is None else conv.bias.detach()
        super().__init__(pack_deform_conv2d(conv.weight.detach(), bias, conv.groups))
        self.geometry, self.relu = (conv.stride, conv.padding, conv.dilation), relu

    def forward(self, x: Levels, prediction: Levels) -> Levels:
        """(N, C, H, W) and its offsets and mask logits, (N, 27, H', W'), -> (N, O, H', W')."""
        if not isinstance(x, Tensor):
            return [self(level, own) for level, own in zip(x, prediction)]
        offset, logits = prediction[:, :OFFSETS], prediction[:, OFFSETS:]
        return deform_conv2d(x, offset, self.packed, None, *self.geometry, logits, mask_sigmoid=True, relu=self.relu)


class FusedDeform(nn.Module):
    """`DeformConv2d` over a tensor or a list of levels; `relu`: whether a ReLU follows."""

    def __init__(self, conv: DeformConv2d, relu: bool = False):
        super().__init__()
        self.offsets, self.conv = _arranged(conv.conv_offset), PackedDeform(conv, relu)

    def forward(self, x: Levels) -> Levels:
        return self.conv(x, self.offsets(x))


def _arranged(conv: nn.Conv2d, relu: bool = False) -> nn.Module:
    """The module here that stands in for a convolution, and a ReLU behind it."""
    if isinstance(conv, DeformConv2d):
        return FusedDeform(conv, relu)
    return (PackedConv3x3 if is_3x3(conv) else FusedConv)(conv, relu)


class PackedFPN(PackedModule):
    """`FPN`, the three output convolutions packed."""

    def __init__(self, fpn: FPN):
        super().__init__([pack(conv) for conv in fpn.output])
        self.lateral = nn.ModuleList(map(FusedConv, fpn.lateral))
        self.p6, self.p7 = FusedConv(fpn.p6), FusedConv(fpn.p7)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        merged = [self.lateral[-1](features[-1])]
        for lateral, feature in zip(reversed(self.lateral[:-1]), reversed(features[:-1])):
            above = F.interpolate(merged[0], size=feature.shape[-2:], mode="nearest")
            merged.insert(0, lateral(feature, residual=above))  # the upsampled map is fresh: the sum goes on top of it
        p6 = self.p6(features[-1])
        return [*flow_conv2d(merged, None, self.packed, relu=False), p6, self.p7(p6)]


class FusedSubnets(PackedModule):
    """`Subnets` without deformable stages, all levels in one call of `fused_subnets`."""

    def __init__(self, subnets: Subnets):
        convs = {
            name: tuple((conv.weight.detach(), conv.bias.detach()) for conv in modules)
            for name, modules in (
                ("cls", subnets.cls),
                ("reg", subnets.reg),
                ("stuff", subnets.stuff),
                ("thing", subnets.thing),
                ("flow_cls", subnets.flows(subnets.follower)),
                ("flow_stuff", subnets.flows("stuff")),
                ("flow_thing", subnets.flows("thing")),
                ("semantic_flow", subnets.semantic_flow),
            )
        }
        flows = any(convs[name] for name in ("flow_cls", "flow_stuff", "flow_thing"))
        source = subnets.source if flows else None
        parameters = SubnetParameters(**convs, flow_source=source, segmentation_levels=SEGMENTATION_LEVELS)
        super().__init__(pack_subnets(parameters))

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        return SubnetFeatures(*fused_subnets(list(pyramid), self.packed))


class PackedSubnets(nn.Module):
    """`Subnets` with deformable stages, stage by stage, the plain convolutions packed."""

    def __init__(self, subnets: Subnets):
        super().__init__()
        self.source, self.follower = subnets.source, subnets.follower
        names = ("cls", "reg", "stuff", "thing")
        self.convs = nn.ModuleDict({name: nn.ModuleList(_stages(subnets, name)) for name in names})
        self.flow_convs = nn.ModuleDict(
            {name: nn.ModuleList(PackedConv3x3(conv) for conv in subnets.flows(name)) for name in names}
        )
        self.semantic = nn.ModuleList(PackedConv3x3(conv) for conv in subnets.semantic_flow)

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        source, follower = self.source, self.follower
        pyramid, small = list(pyramid), list(pyramid[:SEGMENTATION_LEVELS])
        f = {"cls": pyramid, "reg": pyramid, "stuff": small}
        for s, conv in enumerate(self.convs[source]):
            f[source] = conv(f[source])
            f[follower] = self._stage(follower, s, f[follower], f[source])
            if s < len(self.convs["stuff"]):
                f["stuff"] = self._stage("stuff", s, f["stuff"], f[source][:SEGMENTATION_LEVELS])
        spatial, stuff, thing = f[source][:SEGMENTATION_LEVELS], f["stuff"], small
        if len(self.convs["stuff"]) == 0 and len(self.flow_convs["stuff"]) > 0:
            stuff = _add(stuff, self.flow_convs["stuff"][0](spatial))
        for s in range(len(self.convs["thing"])):
            thing = self._stage("thing", s, thing, spatial, self.semantic[s](stuff) if len(self.semantic) else None)
        if len(self.convs["thing"]) == 0:
            thing = _add(thing, self.semantic[0](stuff)) if len(self.semantic) else thing
            thing = _add(thing, self.flow_convs["thing"][0](spatial)) if len(self.flow_convs["thing"]) else thing
        return SubnetFeatures(f["cls"], f["reg"], stuff, thing)

    def _stage(
        self, name: str, s: int, f: list[Tensor], source: list[Tensor], semantic: list[Tensor] | None = None
    ) -> list[Tensor]:
        conv = self.convs[name][s]
        if len(self.flow_convs[name]) == 0:
            return conv(f if semantic is None else _add(f, semantic))
        flow = self.flow_convs[name][s]
        if isinstance(conv, PackedDeform):  # the offsets come from flow(f + source), without `semantic`
            return conv(f if semantic is None else _add(f, semantic), flow(f, source))
        spatial = flow(source)
        return conv(f, spatial if semantic is None else _add(spatial, semantic))


def _stages(subnets: Subnets, name: str) -> list[nn.Module]:
    """Those of a sub-network, with ReLU. A deformable one with a flow takes its offsets from there."""
    by_flow = subnets.deformable.get(name, ()) if len(subnets.flows(name)) else ()
    return [
        PackedDeform(conv, relu=True) if s in by_flow else _arranged(conv, relu=True)
        for s, conv in enumerate(subnets.get_submodule(name))
    ]


def _add(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b)]


class PackedBoxHead(PackedModule):
    """`BoxHead`, both predictors on all levels in one call."""

    def __init__(self, head: BoxHead):
        super().__init__([pack(head.class_logits), pack(head.box_deltas)])

    def forward(self, cls: Sequence[Tensor], reg: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tuple(flow_conv2d([list(cls), list(reg)], None, self.packed, relu=False))


class PackedThingHead(ThingHead):
    """`ThingHead`, the 3x3 convolutions packed and the deconvolution a matrix product.

    The 2x2 outputs of a deconvolution of stride 2 do not overlap, so each input pixel gives 4 output pixels by itself.
    Where only one class per RoI is wanted, its dot product follows before the pixels are rearranged. The 3x3
    convolutions, nine tenths of the work, leave out RoIs that are not active.
    """

    rois_at_once = 32
    """On the CPU: keeps the widest intermediate, 4 pixels x channels per input pixel, near the cache."""

    def __init__(self, head: ThingHead):
        nn.Module.__init__(self)
        self.convs = nn.ModuleList(PackedConv3x3(conv, relu=True) for conv in head.convs)
        self.logits = head.logits
        weight = head.upsample.weight.detach()  # (I, O, 2, 2)
        self.register_buffer(
            "weight", weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(), persistent=False
        )  # (4*O, I)
        self.register_buffer("bias", head.upsample.bias.detach().repeat(4), persistent=False)

    def forward(self, roi_features: Tensor, labels: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        x = roi_features.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = conv(x, active=active)
        k, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(k, h * w, c)
        if labels is None:
            weight, bias = self.logits.weight.flatten(1).t(), self.logits.bias
        else:
            weight, bias = self.logits.weight[labels].flatten(1)[..., None], self.logits.bias[labels][:, None, None]
        step = self.rois_at_once if x.device.type == "cpu" else max(k, 1)
        parts = []
        for i in range(0, k, step):
            part = slice(i, i + step)
            up = linear_relu(pixels[part].flatten(0, 1), self.weight, self.bias)
            up = up.view(-1, h * w * 4, up.shape[1] // 4)  # (k, S*S*4, O)
            parts.append(up @ weight + bias if labels is None else torch.baddbmm(bias[part], up, weight[part]))
        if not parts:
            parts = [pixels.new_zeros((0, h * w * 4, weight.shape[-1]))]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)  # (K, S*S*4, classes or 1)
        logits = logits.view(k, h, w, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(k, -1, 2 * h, 2 * w)
        return logits if labels is None else logits[:, 0]


class PackedStuffHead(StuffHead):
    """`StuffHead` with its 3x3 convolutions packed; classifies before the last 2x upsampling.

    All three branches end with the same upsampling from stride 8, and the 1x1 convolution acts on each pixel alone.
    Both are linear and the interpolation weights sum to one, so they may change places: sum and classify at stride 8,
    then upsample the logits.
    """

    def __init__(self, head: StuffHead):
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(PackedConvNorm(block, upsample=block is not branch[-1]) for block in branch))
            for branch in head.blocks
        )
        self.logits = FusedConv(head.logits)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        total = None
        for branch, x in zip(self.blocks, features):
            x = branch(x)
            total = x if total is None else total.add_(x)
        return upsample(self.logits(total), 2)


class PackedConvNorm(nn.Module):
    """`ConvNormUp` with its convolution packed, and norm, ReLU and upsampling in one pass.

    Args:
        block: the plain block.
        upsample: whether it keeps its upsampling.
    """

    def __init__(self, block: ConvNormUp, upsample: bool):
        super().__init__()
        self.conv = PackedConv3x3(block.conv)
        self.groups, self.eps, self.upsample = block.norm.num_groups, block.norm.eps, upsample
        dtype = torch.promote_types(block.norm.weight.dtype, torch.float32)  # that of the statistics
        self.register_buffer("weight", block.norm.weight.detach().to(dtype), persistent=False)
        self.register_buffer("bias", block.norm.bias.detach().to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_relu(self.conv(x), self.groups, self.weight, self.bias, self.eps, self.upsample)


def optimize_for_inference(
    model: SpatialFlow, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> SpatialFlow:
    """Rearranges a network for inference.

    Args:
        model: from `build_model`, with its weights loaded. It is not changed.
        device: where the result runs; None: where the model is.
        dtype: of weights and features; None: that of the model. BatchNorm is folded before the weights are rounded to
        it.

    Returns:
        A SpatialFlow that computes the same outputs to rounding, channels-last and without gradients. It shares no
        weights with `model`, and cannot be trained. It can be pickled and copied: packed weights are packed again
        where it is loaded, for the instruction set there, and where `.to` moves it to another device or dtype. Images
        of another dtype than its weights raise a RuntimeError.
    """
    with torch.no_grad():
        source = copy.deepcopy(model).to(device)
        fold_norms(source.backbone)
        source.to(dtype)
        fast = SpatialFlow(
            FusedResNet(source.backbone),
            PackedFPN(source.fpn),
            (PackedSubnets if any(source.subnets.deformable.values()) else FusedSubnets)(source.subnets),
            PackedBoxHead(source.box_head),
            None if source.thing_head is None else PackedThingHead(source.thing_head),
            None if source.stuff_head is None else PackedStuffHead(source.stuff_head),
            source.config,
        )
    return fast.requires_grad_(False).eval()
