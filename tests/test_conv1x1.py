# SPDX-License-Identifier: Apache-2.0
"""Tests of conv1x1, the package's 1x1 convolution: `OpMatrix`, shapes of ResNets, layouts, tiles and errors."""

import itertools
import os
import re

import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample, assert_unchanged_by_autocast
from helpers.tensors import THIN_SHAPES, assert_near, channels_last, surrounded_by_nans
from torch.nn import functional as F

from spatialflow.ops.conv1x1 import conv1x1

HAS_SM90 = os.environ.get("SPATIALFLOW_SIMT_SM90", "off") != "off"
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def expected(x, weight, bias, residual, relu):
    pixels, rows = x.movedim(1, -1), weight.flatten(1)
    y = F.linear(pixels, rows, bias).movedim(-1, 1)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def tensors_of(shape, outputs, with_bias=True, with_residual=True, dtype=torch.float64):
    batch, channels, height, width = shape
    bias = torch.randn(outputs, dtype=torch.float64) if with_bias else None
    residual = torch.randn(batch, outputs, height, width, dtype=torch.float64) if with_residual else None
    weight = torch.randn(outputs, channels, 1, 1, dtype=torch.float64) / max(channels, 1) ** 0.5
    tensors = torch.randn(shape, dtype=torch.float64), weight, bias, residual
    return [t if t is None else t.to(dtype) for t in tensors]


def sample(shape, outputs, with_bias, with_residual, relu):
    def tensors(extra: int = 0) -> list:
        batch, channels, height, width = shape
        return tensors_of((batch, channels, height + extra, width + 2 * extra), outputs, with_bias, with_residual)

    def build() -> OpSample:
        return OpSample(
            op=conv1x1,
            reference=expected,
            tensors=tensors(),
            options={"relu": relu},
            differentiable=(),
            converted=(0, 1, 2, 3),
            images=(0, 1, 3),
            raw=lambda *tensors, relu: (torch.ops.spatialflow._conv1x1, (*tensors, relu)),
            resized=tensors,
        )

    return build


class TestConv1x1(OpMatrix):
    has_gradient = False
    samples = {
        "bias, residual and relu": sample((2, 72, 5, 7), 40, True, True, True),
        "product only": sample((1, 16, 6, 5), 24, False, False, False),
        "odd channels": sample((2, 5, 3, 4), 7, True, False, True),
    }
    thin_samples = {name: sample(shape, 8, True, True, False) for name, shape in THIN_SHAPES.items()} | {
        "one output": sample((2, 8, 5, 6), 1, True, True, True),
        "no outputs": sample((2, 8, 5, 6), 0, True, True, True),
    }

    def test_autocast(self, make_sample):
        """The operator does not cast under autocast; `fused_conv2d` does."""
        assert_unchanged_by_autocast(make_sample())


# (N, C, H, W) and outputs: the shapes of a ResNet with fewer pixels and, from layer3, fewer channels. Then sizes that
# are not multiples of a tile.
CASES = {
    "layer1, first": ((1, 64, 13, 21), 64),
    "layer1, last": ((1, 64, 13, 21), 256),
    "layer1, next": ((1, 256, 9, 15), 64),
    "layer2, first": ((1, 256, 7, 11), 128),
    "layer2, last": ((2, 128, 7, 11), 512),
    "layer2, next": ((1, 512, 7, 11), 128),
    "layer3, last": ((1, 256, 5, 6), 512),
    "layer4, next": ((1, 1024, 3, 4), 128),
    "many pixels": ((1, 64, 17, 45), 128),
    "long sums in large tiles": ((1, 384, 17, 45), 128),  # more steps than there are stages in shared memory
    "long sums in square tiles": ((1, 512, 16, 24), 128),
    "long sums in narrow tiles": ((1, 640, 16, 24), 64),
    "eight by eight": ((1, 8, 1, 1), 8),
    "24 outputs": ((3, 40, 5, 13), 24),
    "72 outputs": ((1, 136, 8, 9), 72),
    "136 outputs": ((1, 72, 11, 12), 136),
}


@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
class TestCases:
    @HALVES
    def test_epilogues(self, case, dtype):
        """The result is right with and without each part of the epilogue."""
        for with_bias, with_residual, relu in itertools.product((True, False), repeat=3):
            x, weight, bias, residual = tensors_of(*case, with_bias, with_residual, dtype)
            x, residual = channels_last(x), None if residual is None else channels_last(residual)
            before = None if residual is None else residual.clone()
            y = conv1x1(x, weight, bias, residual, relu)
            assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert residual is None or torch.equal(residual, before)
            operands64 = [t if t is None else t.double() for t in (x, weight, bias, residual)]
            assert_near(y, expected(*operands64, relu), dtype)

    @HALVES
    def test_short_numbers_are_exact(self, case, dtype):
        """Results are exact for inputs whose sums are exact in float32 and whose results are exact in 16 bits."""
        (batch, channels, height, width), outputs = case
        x = channels_last(torch.randint(-1, 2, (batch, channels, height, width)).to(dtype))
        weight, rows = torch.zeros(outputs, channels, 1, 1), torch.arange(outputs)
        for _ in range(3):  # few nonzero values, so that sums are small
            weight[rows, torch.randint(channels, (outputs,))] = torch.randint(-9, 10, (outputs, 1, 1)).float()
        bias = torch.randint(-9, 10, (outputs,)).to(dtype)
        residual = channels_last(torch.randint(-9, 10, (batch, outputs, height, width)).to(dtype))
        y = conv1x1(x, weight.to(dtype), bias, residual, False)
        assert torch.equal(y.double(), expected(x.double(), weight.double(), bias.double(), residual.double(), False))

    def test_every_second_pixel(self, case):
        """The result is bitwise equal for a strided view, whose pixels are not at equal distances in memory."""
        x, weight, bias, residual = map(channels_last, tensors_of(*case, dtype=torch.bfloat16))
        view = channels_last(enlarged(x))[:, :, ::2, ::2]
        assert torch.equal(conv1x1(view, weight, bias, residual, True), conv1x1(x, weight, bias, residual, True))


def enlarged(t):
    """Repeat each pixel four times."""
    return t.repeat_interleave(2, 2).repeat_interleave(2, 3)


class TestLayouts:
    LAYOUTS = {
        "plain": torch.Tensor.contiguous,
        "surrounded by NaNs": surrounded_by_nans,
        "at an odd element": lambda t: (
            torch.cat([t.flatten()[:1], channels_last(t).movedim(1, -1).flatten()])[1:]
            .view(t.shape[0], *t.shape[2:], t.shape[1])
            .movedim(-1, 1)
        ),
        "channels of more": lambda t: channels_last(torch.cat([t, t], 1))[:, t.shape[1] :],
        "columns of more": lambda t: channels_last(torch.cat([t, t], 3))[..., : t.shape[3]],
        "every second pixel": lambda t: channels_last(enlarged(t))[:, :, ::2, ::2],
        "every second pixel of odd sides": lambda t: channels_last(enlarged(t)[:, :, :-1, :-1])[:, :, ::2, ::2],
        "every third row": lambda t: channels_last(t.repeat_interleave(3, 2))[:, :, ::3],
        "expanded": lambda t: t[:, :, :, :1].expand(t.shape),
    }

    @HALVES
    @pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
    def test_same_numbers(self, layout, dtype):
        """Strides of x and residual, and the alignment of weight and bias, do not change a bit of the result."""
        x, weight, bias, residual = tensors_of((2, 72, 9, 10), 72, dtype=dtype)
        x, residual = layout(x), layout(residual)
        right = conv1x1(*map(channels_last, (x, weight, bias, residual)), True)
        rows, offsets = surrounded_by_nans(weight), surrounded_by_nans(bias)
        for operands in (
            (x, weight, bias, channels_last(residual)),
            (channels_last(x), rows, offsets, residual),
            (x, channels_last(weight), bias, residual),
        ):
            y = conv1x1(*operands, True)
            assert torch.equal(y, right) and y.is_contiguous(memory_format=torch.channels_last)

    @HALVES
    def test_values_that_are_not_finite(self, dtype):
        """NaN passes ReLU and changes only the pixels and outputs that read it."""
        x, weight, bias, residual = tensors_of((1, 16, 5, 6), 16, dtype=dtype)
        x[0, 3, 1, 2] = float("nan")
        residual[0, 5, 4, 4], residual[0, 6, 4, 5] = float("nan"), float("inf")
        y = conv1x1(x, weight, bias, residual, True)
        wrong = torch.zeros(5, 6, dtype=torch.bool)
        wrong[1, 2] = True
        assert torch.equal(y.isnan().all(1)[0], wrong)
        assert y[0, 5, 4, 4].isnan() and y.isnan().sum() == 17 and y.isinf().nonzero().tolist() == [[0, 6, 4, 5]]


@pytest.mark.skipif(
    os.environ.get("SPATIALFLOW_BACKEND") != "simt",
    reason="needs the launch log of the interpreter: SPATIALFLOW_BACKEND=simt",
)
class TestKernels:
    """The selected kernels, and copies of their inputs."""

    @pytest.fixture
    def launched(self, monkeypatch, capfd):
        """Return a function that calls conv1x1 and returns the name of its kernel."""

        def call(*operands):
            capfd.readouterr()
            monkeypatch.setenv("SPATIALFLOW_SIMT_TRACE", "1")
            conv1x1(*operands, True)
            monkeypatch.delenv("SPATIALFLOW_SIMT_TRACE")
            (name,) = re.findall(r"launch: .*\b(conv1x1\w*<.*>)", capfd.readouterr().err)
            return name.replace("spatialflow::", "")

        return call

    def test_tiles(self, launched):
        """The cases above use all tiles of the kernel for compute capability 9.0."""
        names = {launched(*map(channels_last, tensors_of(*case, dtype=torch.float16))) for case in CASES.values()}
        tiles = {name.removeprefix("conv1x1_sm90_kernel<") for name in names}
        if HAS_SM90:
            assert tiles == {f"float16, {tile}>" for tile in ("128, 2, 2", "128, 1, 2", "64, 1, 2", "64, 1, 1")}
        else:
            assert tiles == {"conv1x1_kernel<float16>"}

    def test_other_channels_and_dtypes(self, launched):
        for channels, outputs, dtype in ((12, 8, torch.float16), (8, 12, torch.bfloat16), (8, 8, torch.float32)):
            assert launched(*tensors_of((1, channels, 3, 3), outputs, dtype=dtype)).startswith("conv1x1_kernel<")

    @pytest.mark.skipif(not HAS_SM90, reason="the portable kernel copies inputs that are not channels-last")
    def test_strided_views_are_read_in_place(self):
        x, weight, bias, _ = map(channels_last, tensors_of((1, 16, 9, 11), 8, dtype=torch.float16))
        more, copies = channels_last(torch.cat([x, x], 1)), []
        views = (
            x,
            x[:, :, ::2, ::2],
            x[:, :, 1:4, 2:7],
            more[:, 16:],
            x[:, :, :, :1],
            x.contiguous(),
            surrounded_by_nans(x),
        )
        for view in views:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                conv1x1(view, weight, bias, None, True)
            copies.append(sum(event.name == "aten::clone" for event in profile.events()))
        assert copies == [0, 0, 0, 0, 0, 1, 1]


def test_errors():
    x, weight, bias, residual = tensors_of((2, 8, 5, 6), 16, dtype=torch.float32)
    for arguments, message in (
        ((x[0], weight, bias, residual), r"x must be \(N, C, H, W\), got shape \(8, 5, 6\)"),
        ((x.int(), weight, bias, residual), "x must be float32, float64, float16 or bfloat16, got int32"),
        ((x, weight[:, :4], bias, residual), r"weight must have shape \(O, 8, 1, 1\), .*, got shape \(16, 4, 1, 1\)"),
        ((x, weight.expand(16, 8, 3, 3), bias, residual), r"weight must have shape .*, got shape \(16, 8, 3, 3\)"),
        ((x, weight.flatten(1), bias, residual), r"weight must have shape .*, got shape \(16, 8\)"),
        ((x, weight.half(), bias, residual), "weight must be float32, got float16"),
        ((x, weight, bias[1:], residual), r"bias must have shape \(16\), got shape \(15\)"),
        ((x, weight, bias.double(), residual), "bias must be float32, got float64"),
        ((x, weight, bias, residual[:1]), r"residual must have .* \(2, 16, 5, 6\), got shape \(1, 16, 5, 6\)"),
        ((x, weight, bias, residual.bfloat16()), "residual must be float32, got bfloat16"),
        ((x, weight.to("meta"), bias, residual), "weight must be on the device of x"),
    ):
        with pytest.raises(RuntimeError, match=f"^conv1x1: {message}"):
            conv1x1(*arguments, True)
