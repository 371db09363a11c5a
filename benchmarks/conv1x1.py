# SPDX-License-Identifier: Apache-2.0
"""1x1 convolutions with their epilogue at the sizes of a ResNet-50 on an 800x1333 image, padded to 800x1344.

The network uses `conv1x1` only in 16 bits on compute capability 9.0; in other cases its kernel is slow.
"""

import torch
from harness import Benchmark, Problem, Provider, main
from torch.nn import functional as F

from spatialflow.ops.conv1x1 import conv1x1

SIZES = [(200, 336), (100, 168), (50, 84), (25, 42)]  # layer1 to layer4


def setup(
    layer: int, channels: int, outputs: int, residual: bool = False, relu: bool = True, stride: int = 1
) -> Problem:
    height, width = SIZES[layer - 1]
    x = torch.randn(1, channels, stride * height, stride * width).contiguous(memory_format=torch.channels_last)
    shortcut = torch.randn(1, outputs, height, width).contiguous(memory_format=torch.channels_last)
    weight, pixels = torch.randn(outputs, channels, 1, 1) / channels**0.5, height * width
    return Problem(
        inputs=(x, weight, torch.randn(outputs), shortcut if residual else None, relu, stride),
        features=(0, 1, 2, 3),
        bytes=4 * (pixels * (channels + outputs * (2 if residual else 1)) + weight.numel()),
        operations=2 * channels * outputs * pixels,
    )


def ours(x, weight, bias, residual, relu, stride):
    return conv1x1(x[:, :, ::stride, ::stride], weight, bias, residual, relu)


def separate(x, weight, bias, residual, relu, stride):
    y = F.conv2d(x, weight, bias, stride)
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y


def cudnn(x, weight, bias, residual, relu, stride):
    """Run convolution, residual and ReLU in one call of cuDNN; without a ReLU, run a plain convolution."""
    arguments = bias, (stride, stride), (0, 0), (1, 1), 1
    if residual is not None:
        return torch.ops.aten.cudnn_convolution_add_relu.default(x, weight, residual, 1.0, *arguments)
    if relu:
        return torch.ops.aten.cudnn_convolution_relu.default(x, weight, *arguments)
    return F.conv2d(x, weight, bias, stride)


BENCHMARK = Benchmark(
    name="conv1x1",
    title="relu(conv1x1(x) + bias + residual) in a ResNet-50, channels-last",
    setup=setup,
    sweep={
        "layer1, 64 to 256, residual": {"layer": 1, "channels": 64, "outputs": 256, "residual": True},
        "layer1, 256 to 64": {"layer": 1, "channels": 256, "outputs": 64},
        "layer2, 128 to 512, residual": {"layer": 2, "channels": 128, "outputs": 512, "residual": True},
        "layer2, 512 to 128": {"layer": 2, "channels": 512, "outputs": 128},
        "layer3, 256 to 1024, residual": {"layer": 3, "channels": 256, "outputs": 1024, "residual": True},
        "layer3, 1024 to 256": {"layer": 3, "channels": 1024, "outputs": 256},
        "layer4, 512 to 2048, residual": {"layer": 4, "channels": 512, "outputs": 2048, "residual": True},
        "layer4, 2048 to 512": {"layer": 4, "channels": 2048, "outputs": 512},
        "layer3's shortcut, stride 2": {"layer": 3, "channels": 512, "outputs": 1024, "relu": False, "stride": 2},
    },
    providers={
        "spatialflow": ours,
        "reference": separate,
        "cuDNN": Provider(cudnn, only_cuda=True),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
