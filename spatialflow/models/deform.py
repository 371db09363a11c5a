# SPDX-License-Identifier: Apache-2.0
"""Modulated deformable 3x3 convolutions (DCN v2)."""

from typing import TypeAlias, cast

from torch import Tensor, nn

from spatialflow.ops import deform_conv2d

Geometry: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding and dilation of a convolution, (rows, columns) each; torch's annotations are less exact."""

OFFSETS, OFFSET_CHANNELS = 18, 27
"""A prediction has 27 channels: 18 offsets, (dy, dx) per tap with the taps row-major, then 9 mask logits."""


def split_offsets(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Split (N, 27, H, W) into offsets (N, 18, H, W) and the mask (N, 9, H, W), the sigmoid of its logits."""
    return prediction[:, :OFFSETS], prediction[:, OFFSETS:].sigmoid()


class FlowOffsetDeformConv2d(nn.Conv2d):
    """Deformable convolution with offsets and mask logits that another convolution has predicted.

    (N, C, H, W), (N, 27, H', W') -> (N, O, H', W').
    """

    def forward(  # type: ignore[override]  # takes the offsets, too
        self, x: Tensor, prediction: Tensor
    ) -> Tensor:
        """Convolve `x` (N, C, H, W) with the offsets and mask in `prediction` (N, 27, H', W')."""
        offset, mask = split_offsets(prediction)  # (N, 18, H', W'), (N, 9, H', W')
        geometry = cast("Geometry", (self.stride, self.padding, self.dilation))
        return deform_conv2d(x, offset, self.weight, self.bias, *geometry, mask=mask)


class SelfOffsetDeformConv2d(nn.Conv2d):
    """Deformable convolution that predicts offsets and mask from its input: (N, C, H, W) -> (N, O, H', W').

    `conv_offset`, an ordinary convolution of the same input, predicts them.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: must be 3.
        stride: of both convolutions.
        padding: of both convolutions.
        groups: of the deformable convolution.
        bias: whether the deformable convolution has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.conv_offset = nn.Conv2d(in_channels, OFFSET_CHANNELS, kernel_size, stride, padding)
        self.zero_offsets()

    def zero_offsets(self) -> None:
        """Set the offsets to 0 and the mask to 0.5: before the bias, the result is half that of a plain convolution."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(cast("Tensor", self.conv_offset.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, (N, C, H, W)."""
        offset, mask = split_offsets(self.conv_offset(x))  # (N, 18, H', W'), (N, 9, H', W')
        geometry = cast("Geometry", (self.stride, self.padding, self.dilation))
        return deform_conv2d(x, offset, self.weight, self.bias, *geometry, mask=mask)
