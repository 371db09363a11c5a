# SPDX-License-Identifier: Apache-2.0
"""Convolutions with a fused epilogue equal separate operations, for every library. The fixture `cudnn` mocks cuDNN."""

import itertools

import pytest
import torch
from helpers.op_matrix import DispatchRecorder
from helpers.tensors import DEVICE, assert_near
from torch.nn import functional as F

from spatialflow.models.optimized import conv as fused_conv
from spatialflow.models.optimized.conv import Shape, fused_conv2d, linear_relu

SHAPES = {
    "1x1": (1, Shape((1, 1), (0, 0), 1)),
    "3x3, stride 2": (3, Shape((2, 2), (1, 1), 1)),
    "3x3, groups": (3, Shape((1, 1), (1, 1), 2)),
}


def tensors(kernel, shape, channels=16, outputs=24):
    """Make channels-last x, weight, bias and residual on the default device."""
    torch.manual_seed(0)
    x = torch.randn(2, channels, 9, 7)
    weight = torch.randn(outputs, channels // shape.groups, kernel, kernel)
    bias = torch.randn(outputs)
    residual = torch.randn_like(F.conv2d(x, weight, None, shape.stride, shape.padding, 1, shape.groups))
    x, weight, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, residual))
    return x, weight, bias, residual


def expected(x, weight, bias, shape, relu, residual):
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *shape[:2], 1, shape.groups)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


@pytest.fixture
def cudnn(monkeypatch):
    """Mock cuDNN's two operators on the CPU and record their arguments."""
    calls = []

    def convolution(x, weight, bias, stride, padding, dilation, groups):
        calls.append(groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    class Operator:
        def __init__(self, function):
            self.default = function

    monkeypatch.setattr(fused_conv, "_unsupported", set())
    monkeypatch.setattr(fused_conv, "_has_onednn_epilogue", lambda x: False)
    monkeypatch.setattr(fused_conv, "_is_registered", lambda device: True)
    relu = Operator(lambda *args: convolution(*args).relu())
    add_relu = Operator(lambda x, w, z, alpha, *rest: (convolution(x, w, *rest) + alpha * z).relu())
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", add_relu)
    return calls


def cases():
    return itertools.product(SHAPES.values(), (True, False), (True, False), (True, False))


class TestNumbers:
    @pytest.mark.parametrize("library", ["onednn", "plain", "cudnn"])
    def test_equals_separate_passes(self, library, request, monkeypatch):
        if library == "cudnn":
            calls = request.getfixturevalue("cudnn")
        if library == "plain":
            monkeypatch.setattr(fused_conv, "_has_onednn_epilogue", lambda x: False)
        for (kernel, shape), relu, with_bias, with_residual in cases():
            x, weight, bias, residual = tensors(kernel, shape)
            bias, residual = bias if with_bias else None, residual if with_residual else None
            right = expected(x, weight, bias, shape, relu, residual)
            y = fused_conv2d(x, weight, bias, shape, relu, residual)
            torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-4)
            assert y.is_contiguous(memory_format=torch.channels_last)
        if library == "cudnn":
            assert len(calls) == len(SHAPES) * 4  # cuDNN has only the epilogue with ReLU

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_matrix_product(self, with_bias):
        kernel, shape = SHAPES["1x1"]
        x, weight, bias, _ = tensors(kernel, shape)
        bias = bias if with_bias else None
        y = fused_conv._run_matrix_product(x, weight, bias)
        torch.testing.assert_close(y.double(), expected(x, weight, bias, shape, False, None), rtol=1e-5, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_which_convolutions_are_matrix_products(self):
        """On a GPU, 16-bit 1x1 convolutions without stride, padding or groups are matrix products."""
        x, weight = torch.empty(1, 8, 4, 4, device="meta"), torch.empty(8, 8, 1, 1, device="meta")
        is_matrix_product = fused_conv._is_matrix_product
        shape = Shape((1, 1), (0, 0), 1)
        assert is_matrix_product(x.half(), weight.half(), shape) and is_matrix_product(
            x.bfloat16(), weight.bfloat16(), shape
        )
        assert not is_matrix_product(x, weight, shape) and not is_matrix_product(
            torch.empty(1, 8, 4, 4, device="cpu").half(), weight, shape
        )
        for other_shape in (Shape((2, 2), (0, 0), 1), Shape((1, 1), (1, 1), 1), Shape((1, 1), (0, 0), 2)):
            assert not is_matrix_product(x.half(), weight.half(), other_shape)
        assert not is_matrix_product(x.half(), torch.empty(8, 8, 3, 3, device="meta").half(), shape)

    def test_linear_relu(self):
        x, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
        right = F.linear(x, weight, bias).relu()
        torch.testing.assert_close(linear_relu(x, weight, bias), right)
        torch.testing.assert_close(torch._addmm_activation(bias, x, weight.t()), right)  # the function used on a GPU


class TestConv1x1Kernel:
    """16-bit 1x1 convolutions by this package's kernel; the selection of GPUs of compute capability 9.0 is mocked."""

    @pytest.fixture
    def hopper(self, monkeypatch):
        monkeypatch.setattr(fused_conv, "_runs_conv1x1_kernel", lambda device: True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
    def test_equals_separate_passes(self, hopper, stride, dtype):
        """The convolution is one operator call, on a strided view of x if the stride is not 1."""
        shape = Shape(stride, (0, 0), 1)
        for relu, with_bias, with_residual in itertools.product((True, False), repeat=3):
            x, weight, bias, residual = (t.to(dtype) for t in tensors(1, shape))
            bias, residual = bias if with_bias else None, residual if with_residual else None
            right = expected(x, weight, bias, shape, relu, residual)
            with DispatchRecorder() as recorder:
                y = fused_conv2d(x, weight, bias, shape, relu, residual)
            names = [function.name() for function in recorder.calls]
            assert [name for name in names if name != "aten::slice.Tensor"] == ["spatialflow::_conv1x1"]
            assert ("aten::slice.Tensor" in names) == (stride != (1, 1))
            assert_near(y, right, dtype)
            assert y.is_contiguous(memory_format=torch.channels_last)

    def test_which_convolutions_use_the_kernel(self, hopper):
        x, weight = torch.empty(1, 8, 4, 4).half(), torch.empty(16, 8, 1, 1).half()
        shape, has_kernel = Shape((1, 1), (0, 0), 1), fused_conv._has_conv1x1_kernel
        assert has_kernel(x, weight, shape) and has_kernel(x.bfloat16(), weight.bfloat16(), Shape((2, 2), (0, 0), 1))
        for other_shape in (Shape((1, 1), (1, 1), 1), Shape((1, 1), (0, 0), 2)):
            assert not has_kernel(x, weight, other_shape)
        for size in ((12, 8, 1, 1), (16, 4, 1, 1), (16, 8, 3, 3)):
            assert not has_kernel(x, torch.empty(size).half(), shape)
        assert not has_kernel(x.float(), weight.float(), shape)

    @pytest.mark.parametrize(
        "built, capability, is_supported",
        [
            ("80-real 90a-real", (9, 0), True),
            ("80-real 90a-real", (8, 0), False),
            ("90a-real", (10, 0), False),
            ("80", (9, 0), False),
            ("", (9, 0), False),
        ],
    )
    def test_devices(self, monkeypatch, built, capability, is_supported):
        """A device is queried at most once, and torch.compile uses the result as a constant."""
        queried = []
        monkeypatch.setattr(fused_conv, "build_description", lambda: {"cuda_architectures": built})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: queried.append(device) or capability)
        fused_conv._is_built_for.cache_clear()
        device = torch.device("cuda", 3)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda t: t + 1 if fused_conv._runs_conv1x1_kernel(device) else t, backend="eager", fullgraph=True
        )
        try:
            for _ in range(3):
                assert fused_conv._runs_conv1x1_kernel(device) == is_supported
                assert not fused_conv._runs_conv1x1_kernel(torch.device("cpu"))
            assert compiled(torch.zeros(1)).item() == is_supported
            assert len(queried) == ("90a" in built)
        finally:
            fused_conv._is_built_for.cache_clear()


class TestRefusals:
    def failing(self, monkeypatch, error):
        calls = []

        class Failing:
            @staticmethod
            def default(*args):
                calls.append(args)
                raise error

        monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", Failing)
        return calls

    @pytest.mark.parametrize(
        "message", ["Unable to find an engine to execute this computation", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"]
    )
    def test_a_convolution_without_a_kernel_is_tried_once(self, cudnn, monkeypatch, message):
        calls = self.failing(monkeypatch, RuntimeError(message))
        kernel, shape = SHAPES["1x1"]
        x, weight, bias, _ = tensors(kernel, shape)
        for _ in range(3):
            y = fused_conv2d(x, weight, bias, shape, True)
            torch.testing.assert_close(y.double(), expected(x, weight, bias, shape, True, None), rtol=1e-5, atol=1e-4)
        assert len(calls) == 1
        fused_conv2d(*tensors(*SHAPES["3x3, stride 2"])[:3], SHAPES["3x3, stride 2"][1], True)
        assert len(calls) == 2  # another shape is tried

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("shapes do not fit")])
    def test_other_errors_are_raised(self, cudnn, monkeypatch, error):
        self.failing(monkeypatch, error)
        kernel, shape = SHAPES["1x1"]
        with pytest.raises(type(error), match=str(error)):
            fused_conv2d(*tensors(kernel, shape)[:3], shape, True)

    @pytest.mark.parametrize("channels, outputs", [(3, 24), (16, 27)])
    def test_channels_that_do_not_fill_16_bytes(self, cudnn, channels, outputs):
        kernel, shape = SHAPES["1x1"]
        x, weight, bias, _ = tensors(kernel, shape, channels, outputs)
        y = fused_conv2d(x, weight, bias, shape, True)
        torch.testing.assert_close(y.double(), expected(x, weight, bias, shape, True, None), rtol=1e-5, atol=1e-4)
        assert cudnn == []

    def test_cudnn_disabled_or_not_registered(self, cudnn, monkeypatch):
        kernel, shape = SHAPES["1x1"]
        x, weight, bias, _ = tensors(kernel, shape)
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
        fused_conv2d(x, weight, bias, shape, True)
        assert cudnn == []
        monkeypatch.undo()
        assert not fused_conv._is_registered("cpu") and fused_conv._is_registered("meta")


class TestDtypes:
    """Different dtypes of features and weight are refused or, under autocast, cast."""

    @pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_another_dtype_than_the_weight(self, cudnn, x_dtype):
        kernel, shape = SHAPES["1x1"]
        x, weight, bias, _ = tensors(kernel, shape)
        rule = f"x must be torch.float32 on {x.device}, as the weight is, got {x_dtype} on {x.device}"
        with pytest.raises(RuntimeError, match=f"fused_conv2d: {rule}"):
            fused_conv2d(x.to(x_dtype), weight, bias, shape, True)
        with pytest.raises(RuntimeError, match=f"linear_relu: {rule}"):
            linear_relu(x[:, :, 0, 0].to(x_dtype), weight[:, :, 0, 0], bias)
        assert cudnn == [] and fused_conv._unsupported == set()

    def test_another_device_than_the_weight(self):
        kernel, shape = SHAPES["1x1"]
        x, weight, bias, _ = tensors(kernel, shape)
        rule = f"x must be torch.float32 on {weight.device}, as the weight is, got torch.float32 on meta"
        with pytest.raises(RuntimeError, match=f"fused_conv2d: {rule}"):
            fused_conv2d(x.to("meta"), weight, bias, shape, True)

    @pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float32, torch.bfloat16])), ids=str)
    @pytest.mark.parametrize("library", ["onednn", "cudnn"])
    def test_autocast(self, library, dtypes, request):
        if library == "cudnn":
            request.getfixturevalue("cudnn")
        for (kernel, shape), relu, with_bias, with_residual in cases():
            x, weight, bias, residual = tensors(kernel, shape)
            x, weight, bias = x.to(dtypes[0]), weight.to(dtypes[1]), bias.to(dtypes[1]) if with_bias else None
            residual = residual if with_residual else None
            right = expected(x, weight, bias, shape, relu, residual)
            with torch.autocast(DEVICE, torch.bfloat16):
                y = fused_conv2d(x, weight, bias, shape, relu, residual)
            assert y.dtype == torch.bfloat16
            assert (y - right).abs().max() < 0.02 * right.abs().max()

    @pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float32, torch.bfloat16])), ids=str)
    def test_autocast_of_linear_relu(self, dtypes):
        x, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = linear_relu(x.to(dtypes[0]), weight.to(dtypes[1]), bias.to(dtypes[1]))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), F.linear(x, weight, bias).relu(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fake_kernels_describe_the_result(dtype):
    """Fake kernels predict shape, dtype and layout of both cuDNN operators on meta tensors."""
    for kernel, shape in SHAPES.values():
        x, weight, bias, residual = (t.to("meta", dtype) for t in tensors(kernel, shape))
        for added in (None, residual):
            y = fused_conv2d(x, weight, bias, shape, True, added)
            assert y.shape == residual.shape and y.dtype == dtype
            assert y.is_contiguous(memory_format=torch.channels_last)
        assert fused_conv._unsupported == set()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cudnn(dtype):
    """The operators of cuDNN are right; the test prints convolutions for which they have no kernel."""
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-3}[dtype]
    fused_conv._unsupported.clear()
    for (kernel, shape), relu, with_bias, with_residual in cases():
        x, weight, bias, residual = (t.to("cuda", dtype) for t in tensors(kernel, shape, 64, 64))
        bias, residual = bias if with_bias else None, residual if with_residual else None
        right = expected(x, weight, bias, shape, relu, residual)
        y = fused_conv2d(x, weight, bias, shape, relu, residual)
        assert float((y.double() - right).abs().max() / right.abs().max()) < tolerance
    print("without a fused kernel:", fused_conv._unsupported)
