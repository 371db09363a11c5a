# SPDX-License-Identifier: Apache-2.0
"""Task heads for inference."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spatialflow.models.heads import BoxHead, ConvNormUp, StuffHead, ThingHead, upsample
from spatialflow.models.optimized.conv import linear_relu
from spatialflow.models.optimized.layers import FusedConv, PackedConv3x3, PackedModule, pack
from spatialflow.ops import PackedConv, flow_conv2d, group_norm_relu


class PackedBoxHead(PackedModule):
    """`BoxHead` with both predictors on all levels in one call; shapes as in `BoxHead`.

    Args:
        head: the plain head.
    """

    packed: list[PackedConv]

    def __init__(self, head: BoxHead) -> None:
        super().__init__([pack(head.class_logits), pack(head.box_deltas)])

    def forward(self, cls: Sequence[Tensor], reg: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute class logits and box deltas of every level."""
        class_logits, box_deltas = flow_conv2d([list(cls), list(reg)], None, self.packed, relu=False)
        return class_logits, box_deltas


class PackedThingHead(ThingHead):
    """`ThingHead` with packed 3x3 convolutions and the deconvolution as a matrix product; shapes as in `ThingHead`.

    The 2x2 outputs of a deconvolution of stride 2 do not overlap: each input pixel gives 4 output pixels. The
    last 1x1 convolution is applied before these pixels are rearranged; with labels, only for each RoI's class. The 3x3
    convolutions, nine tenths of the work, skip RoIs that are not active.

    Args:
        head: the plain head.
    """

    weight: Tensor
    bias: Tensor

    rois_at_once = 32
    """RoIs per chunk on the CPU, so that the largest intermediate, 4 x channels per input pixel, fits the cache."""

    def __init__(self, head: ThingHead) -> None:
        nn.Module.__init__(self)
        self.convs = nn.ModuleList(PackedConv3x3(cast("nn.Conv2d", conv), relu=True) for conv in head.convs)
        self.logits = head.logits
        weight = head.upsample.weight.detach().permute(2, 3, 1, 0)  # (2, 2, O, I)
        self.register_buffer("weight", weight.flatten(0, 2).contiguous(), persistent=False)  # (4*O, I)
        self.register_buffer("bias", cast("Tensor", head.upsample.bias).detach().repeat(4), persistent=False)

    def forward(self, roi_features: Tensor, labels: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Compute the mask logits of RoIs, see `ThingHead.forward`."""
        x = roi_features.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = conv(x, active=active)
        k, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(k, h * w, c)
        bias = cast("Tensor", self.logits.bias)
        if labels is None:
            weight = self.logits.weight.flatten(1).t()
        else:
            weight, bias = self.logits.weight[labels].flatten(1)[..., None], bias[labels][:, None, None]
        step = self.rois_at_once if x.device.type == "cpu" else max(k, 1)
        parts = []
        for i in range(0, k, step):
            part = slice(i, i + step)
            up = linear_relu(pixels[part].flatten(0, 1), self.weight, self.bias)
            up = up.view(-1, h * w * 4, up.shape[1] // 4)  # (RoIs of the chunk, S*S*4, O)
            parts.append(up @ weight + bias if labels is None else torch.baddbmm(bias[part], up, weight[part]))
        if not parts:
            parts = [pixels.new_zeros((0, h * w * 4, weight.shape[-1]))]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)  # (K, S*S*4, classes or 1)
        logits = logits.view(k, h, w, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(k, -1, 2 * h, 2 * w)
        return logits if labels is None else logits[:, 0]


class PackedStuffHead(StuffHead):
    """`StuffHead` with packed 3x3 convolutions, classifying before the last 2x upsampling; shapes as in `StuffHead`.

    All three branches end with the same upsampling from stride 8, and the 1x1 convolution acts on each pixel alone.
    Both are linear and the interpolation weights sum to one, so their order does not matter. The head sums the
    branches and classifies at stride 8, then upsamples the logits.

    Args:
        head: the plain head.
    """

    def __init__(self, head: StuffHead) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(PackedConvNorm(block, upsample=block is not branch[-1]) for block in branch))
            for branch in cast("Iterable[Any]", head.blocks)
        )
        self.logits = cast("nn.Conv2d", FusedConv(head.logits))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits at stride 4."""
        total = None
        for branch, feature in zip(self.blocks, features, strict=True):
            x = branch(feature)
            total = x if total is None else total.add_(x)
        return upsample(self.logits(total), 2)


class PackedConvNorm(nn.Module):
    """`ConvNormUp` with a packed convolution, and norm, ReLU and upsampling in one pass.

    (N, C, H, W) -> (N, O, 2H, 2W), or (N, O, H, W) without upsampling.

    Args:
        block: the plain block.
        upsample: whether to upsample.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, block: ConvNormUp, upsample: bool) -> None:
        super().__init__()
        self.conv = PackedConv3x3(block.conv)
        self.groups, self.eps, self.upsample = block.norm.num_groups, block.norm.eps, upsample
        # The dtype in which `group_norm_relu` computes.
        dtype = torch.promote_types(block.norm.weight.dtype, torch.float32)
        self.register_buffer("weight", block.norm.weight.detach().to(dtype), persistent=False)
        self.register_buffer("bias", block.norm.bias.detach().to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on `x`, (N, C, H, W)."""
        return group_norm_relu(self.conv(x), self.groups, self.weight, self.bias, self.eps, self.upsample)
