# SPDX-License-Identifier: Apache-2.0
"""Convolution with bias, residual sum and ReLU in its epilogue, by the fastest operator of the device.

The first operator that applies is used:

1. 1x1 in 16 bits on a GPU of compute capability 9.0: the package's kernel `conv1x1`.
2. float32 on the CPU: oneDNN's convolution with an epilogue.
3. With a ReLU on a GPU: cuDNN's convolution with an epilogue.
4. 1x1 in 16 bits on a GPU, without a ReLU: a matrix product with a bias.
5. Everything else: `F.conv2d`, followed by elementwise operators.

torch exposes the operators of oneDNN and cuDNN, but only its compiler uses them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow._library import build_description
from spatialflow.ops._torch_private import addmm_activation, assume_constant_result, dispatch_has_kernel
from spatialflow.ops.conv1x1 import conv1x1
from spatialflow.ops.differentiable import autocast


class Shape(NamedTuple):
    """Stride, padding and groups of a convolution; the dilation is 1."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int


def fused_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, relu: bool, residual: Tensor | None = None
) -> Tensor:
    """Compute relu(conv2d(x) + bias + residual), without gradients.

    Args:
        x: (N, C, H, W), channels-last; of the dtype of the weight. Under autocast both may be any of float32, float16
            and bfloat16.
        weight: (O, C / groups, kernel height, kernel width), channels-last.
        bias: (O,) of the dtype of the weight, or None.
        shape: stride, padding, groups.
        relu: whether to apply the ReLU.
        residual: (N, O, H', W') channels-last, which may be overwritten; or None.

    Returns:
        (N, O, H', W'), channels-last.

    Raises:
        RuntimeError: `x` and `weight` differ in dtype or device.
    """
    if x.dtype != weight.dtype or x.device != weight.device:
        x, weight, bias, residual = _cast("fused_conv2d", x, weight, bias, residual)
    if _has_conv1x1_kernel(x, weight, shape):
        y_step, x_step = shape.stride
        pixels = x if shape.stride == (1, 1) else x[:, :, ::y_step, ::x_step]
        return conv1x1(pixels, weight, bias, residual, relu)
    if _has_onednn_epilogue(x):
        return _run_onednn(x, weight, bias, shape, relu, residual)
    if relu and _has_cudnn_epilogue(x, weight, shape):
        try:
            return _run_cudnn(x, weight, bias, shape, residual)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not _is_unsupported(error):
                raise
            _unsupported.add((x.dtype, weight.shape, shape))
    if not relu and _is_matrix_product(x, weight, shape):
        y = _run_matrix_product(x, weight, bias)
    else:
        y = F.conv2d(x, weight, bias, shape.stride, shape.padding, 1, shape.groups)
    y = y if residual is None else residual.add_(y)
    return y.relu_() if relu else y


def _cast(name: str, x: Tensor, weight: Tensor, *optional: Tensor | None) -> list[Any]:
    """Cast all tensors as autocast does; RuntimeError if dtype or device of `x` and `weight` still differ."""
    cast: list[Any] = [tensor if tensor is None else autocast(tensor) for tensor in (x, weight, *optional)]
    if cast[0].dtype != cast[1].dtype or cast[0].device != cast[1].device:
        raise RuntimeError(
            f"{name}: x must be {weight.dtype} on {weight.device}, as the weight is, got {x.dtype} on {x.device}"
        )
    return cast


def _has_conv1x1_kernel(x: Tensor, weight: Tensor, shape: Shape) -> bool:
    """Return whether `conv1x1` has a fast kernel for a convolution; the kernel loads channels in 16-byte vectors."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[2:] == (1, 1)
        and shape.padding == (0, 0)
        and shape.groups == 1
        and weight.shape[0] % 8 == 0
        and weight.shape[1] % 8 == 0
        and _runs_conv1x1_kernel(x.device)
    )


@assume_constant_result
def _runs_conv1x1_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and _is_built_for(device)


@functools.cache
def _is_built_for(device: torch.device) -> bool:
    """Return whether a GPU is of compute capability 9.0 and the library has kernels for that."""
    built = build_description().get("cuda_architectures", "")
    return "90a" in built and torch.cuda.get_device_capability(device) == (9, 0)


def _has_onednn_epilogue(x: Tensor) -> bool:
    return (
        _HAS_ONEDNN  # type: ignore[return-value]  # torch annotates `enabled` by the class of its descriptor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()  # the operators have no fake kernels; the compiler fuses the epilogue
    )


# The operators are private to torch, and a later version may not have them.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _run_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, relu: bool, residual: Tensor | None
) -> Tensor:
    arguments = (shape.padding, shape.stride, (1, 1), shape.groups)
    if residual is None:
        activation = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *arguments, activation, [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, weight, bias, *arguments, "add", 1.0, "relu" if relu else None, [], ""
    )


_unsupported: set[tuple[torch.dtype, torch.Size, Shape]] = set()
"""Convolutions without a fused kernel in cuDNN: dtype of the features, shape of the weight, and `Shape`."""


def _has_cudnn_epilogue(x: Tensor, weight: Tensor, shape: Shape) -> bool:
    """Return whether to try cuDNN; its fused kernels end with a ReLU and load channels in vectors of 16 bytes."""
    vector = 16 // x.element_size()
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and weight.shape[0] % vector == 0
        and weight.shape[1] % vector == 0
        and (x.dtype, weight.shape, shape) not in _unsupported
        and _is_registered(x.device.type)
        and (torch.backends.cudnn.enabled or x.device.type == "meta")
    )


def _is_registered(device: str) -> bool:
    """Return whether cuDNN's operators exist: in builds of torch with CUDA, and for meta tensors as fake kernels."""
    return device in _registered


def _run_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, residual: Tensor | None) -> Tensor:
    arguments = (shape.stride, shape.padding, (1, 1), shape.groups)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu.default(x, weight, bias, *arguments)
    return torch.ops.aten.cudnn_convolution_add_relu.default(x, weight, residual, 1.0, bias, *arguments)


def _is_unsupported(error: RuntimeError) -> bool:
    """Return whether an error means that cuDNN has no kernel for the convolution."""
    text = str(error).lower()
    return "engine" in text or "cudnn" in text or "not supported" in text


def _is_matrix_product(x: Tensor, weight: Tensor, shape: Shape) -> bool:
    """Return whether to compute a convolution as a matrix product.

    float32 is excluded, as torch has separate TF32 settings for cuDNN and for matrix products.
    """
    return weight.shape[2:] == (1, 1) and shape == _POINTWISE and x.device.type != "cpu" and x.element_size() == 2


_POINTWISE = Shape((1, 1), (0, 0), 1)


def _run_matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, c)  # a view of channels-last maps
    return F.linear(pixels, weight.flatten(1), bias).view(n, h, w, -1).permute(0, 3, 1, 2)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute relu(x @ weight.T + bias), x (N, I), weight (O, I); one kernel on a GPU. Dtypes as in `fused_conv2d`."""
    if x.dtype != weight.dtype or x.device != weight.device:
        x, weight, bias = _cast("linear_relu", x, weight, bias)
    if x.device.type == "cpu":
        return F.linear(x, weight, bias).relu_()
    return addmm_activation(bias, x, weight.t())


def _register_fake_cudnn() -> None:
    """Register fake kernels for cuDNN's fused convolutions, for meta tensors and tracing; torch has none."""

    def convolution_relu(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        result = torch.ops.aten.convolution.default(
            x, weight, None, stride, padding, dilation, False, [0] * len(padding), groups
        )
        channels_last = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def convolution_add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float | None, *arguments: Any) -> Tensor:
        return convolution_relu(x, weight, *arguments)

    for fake in (convolution_relu, convolution_add_relu):
        name = f"aten::cudnn_{fake.__name__}"
        if not dispatch_has_kernel(name, "Meta"):
            torch.library.register_fake(name, fake)


_register_fake_cudnn()
_registered = {
    device
    for device, key in (("cuda", "CUDA"), ("meta", "Meta"))
    if dispatch_has_kernel("aten::cudnn_convolution_add_relu", key)
}
