# SPDX-License-Identifier: Apache-2.0
"""A modulated deformable 3x3 convolution whose offsets come from its own input (DCN v2)."""

from torch import Tensor, nn

from spatialflow.ops import deform_conv2d

OFFSETS, OFFSET_CHANNELS = 18, 27
"""18 offsets, (dy, dx) per tap, taps row-major, then 9 mask logits."""


def split_offsets(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 27, H, W) -> offsets (N, 18, H, W) and mask (N, 9, H, W) in 0..1."""
    return prediction[:, :OFFSETS], prediction[:, OFFSETS:].sigmoid()


class DeformConv2d(nn.Conv2d):
    """A 3x3 convolution whose sampling points `conv_offset`, an ordinary convolution of the same input, predicts."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.conv_offset = nn.Conv2d(in_channels, OFFSET_CHANNELS, kernel_size, stride, padding)
        self.zero_offsets()

    def zero_offsets(self):
        """Starts as an ordinary convolution of half the weight: no offsets, mask 0.5."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = split_offsets(self.conv_offset(x))  # (N, 18, H', W'), (N, 9, H', W')
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
