# SPDX-License-Identifier: Apache-2.0
"""Feature pyramid network with the levels P3..P7 of RetinaNet."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Feature pyramid: [C3, C4, C5] -> [P3, ..., P7] with strides 8 to 128.

    Each level is (N, channels, H / stride, W / stride), rounded up, where (H, W) is the size of the images.

    P3 to P5 are made from C3 to C5 by 1x1 convolutions, a top-down pathway and 3x3 convolutions. P6 is a strided
    convolution of C5, P7 one of P6, without a ReLU between. Convolutions have a bias and no norm.

    Args:
        in_channels: channels of C3, C4, C5.
        channels: channels of every output level.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.p6 = nn.Conv2d(in_channels[-1], channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(cast("Tensor", module.bias))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the pyramid from C3, C4 and C5."""
        # `merged` has one map (N, channels, H / stride, W / stride) for each of the strides 8, 16 and 32.
        merged = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        p6 = self.p6(features[-1])  # (N, channels, H/64, W/64), rounded up
        return [*(conv(m) for conv, m in zip(self.output, merged, strict=True)), p6, self.p7(p6)]
