# SPDX-License-Identifier: Apache-2.0
"""16-bit convolutions with 64 channels or more, the domain of the kernels for compute capability 9.0 (sm90_*.cu).

Tests of operators run on every back end. On the interpreter they also check which kernel ran: with
SPATIALFLOW_SIMT_SM90=late or early the kernel for 9.0, by default the portable one.
"""

import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from helpers.fused_subnets_cases import SIZES, WIRINGS, by_reference, parameters_of, pyramid, run_fused_subnets, wiring
from helpers.tensors import assert_near, channels_last, map_tensors

from spatialflow import ops
from spatialflow.ops import reference

DTYPES = [torch.float16, torch.bfloat16]
ROOT = Path(__file__).resolve().parents[1]
ON_INTERPRETER = os.environ.get("SPATIALFLOW_BACKEND", "cpu").startswith("simt")
ON_SM90 = ON_INTERPRETER and os.environ.get("SPATIALFLOW_SIMT_SM90", "off") != "off"
EXACT = "direct"
"""The algorithm whose sums of integers are exact on the CPU. On a GPU 16-bit types have only one algorithm."""


@pytest.fixture
def launched(monkeypatch, capfd):
    """Return a function that gives the kernels launched since its last call; None except on the interpreter."""
    monkeypatch.setenv("SPATIALFLOW_SIMT_TRACE", "1")

    def names() -> list[str] | None:
        lines = capfd.readouterr().err.splitlines()
        return [line for line in lines if line.startswith("launch: ")] if ON_INTERPRETER else None

    return names


def ran_as_expected(names: list[str] | None, kernel: str, possible: bool = True) -> bool:
    """Check on the interpreter that `kernel` for 9.0 ran if and only if it is enabled and `possible`."""
    return names is None or any(f"{kernel}_sm90_kernel" in name for name in names) == (ON_SM90 and possible)


def few(*size: int, largest: int = 1, share: float = 1.0) -> torch.Tensor:
    """Generate integers from -largest to largest, each of which is nonzero with a probability of at most `share`."""
    return torch.randint(-largest, largest + 1, size) * (torch.rand(size) < share).double()


class TestFlowConv2d:
    """Sums of integers are exact in 16 bits as long as they are below 256."""

    shapes = [
        # channels, outputs, levels, batch
        (64, 64, [(8, 8)], 1),
        (64, 8, [(1, 1)], 1),
        (64, 36, [(9, 7), (5, 4), (3, 2), (2, 1), (1, 1)], 2),
        (128, 72, [(16, 24)], 1),
        (192, 136, [(17, 9), (8, 17)], 3),
        (64, 200, [(40, 1), (1, 40)], 1),
        (256, 128, [(23, 31), (12, 16)], 1),
    ]

    @staticmethod
    def case(shape, flow):
        channels, outputs, sizes, batch = shape
        x = [few(batch, channels, *size, share=0.2) for size in sizes]
        flows = [few(*level.shape, share=0.2) for level in x] if flow else None
        return x, flows, few(outputs, channels, 3, 3, share=0.3), few(outputs, largest=9)

    @pytest.mark.parametrize("flow", [False, True], ids=["x", "x and flow"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", shapes, ids=str)
    def test_whole_numbers_are_exact(self, shape, dtype, flow, launched):
        x, flows, weight, bias = self.case(shape, flow)
        expected = reference.flow_conv2d(x, flows, weight, bias, True)
        assert max(level.max() for level in expected) < 256
        x, flows, weight, bias = map_tensors(lambda t: t.to(dtype), [x, flows, weight, bias])
        launched()
        x, flows = map_tensors(channels_last, [x, flows])
        result = ops.flow_conv2d(x, flows, weight, bias, algorithm=EXACT)
        assert ran_as_expected(launched(), "conv3x3")
        assert all(torch.equal(actual.double(), wanted) for actual, wanted in zip(result, expected, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_views(self, dtype, launched):
        """TMA reads strided views if each stride, in the order C, W, H, N, is a multiple of the previous one."""
        whole = few(2, 10, 11, 200, share=0.2)
        weight, bias = few(72, 64, 3, 3, share=0.3), few(72, largest=9)
        views = [
            (True, lambda t: t.permute(0, 3, 1, 2)[:, 64:128]),
            (True, lambda t: t.permute(0, 3, 1, 2)[:, 8:72, ::2]),
            (True, lambda t: t.permute(0, 3, 1, 2)[:, :64, 2:, 3:]),
            (False, lambda t: t.permute(0, 3, 1, 2)[:, :64, ::3]),
            (False, lambda t: t.transpose(0, 1).permute(0, 3, 1, 2)[:, 128:192]),
        ]
        for possible, view in views:
            launched()
            result = ops.flow_conv2d(view(whole.to(dtype)), None, weight.to(dtype), bias.to(dtype), algorithm=EXACT)
            assert ran_as_expected(launched(), "conv3x3", possible)
            assert torch.equal(result.double(), reference.flow_conv2d(view(whole), None, weight, bias, True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_unsupported_inputs(self, dtype, launched):
        """Channels that are not a multiple of 64, or pixels that are not aligned to 16 bytes."""
        for x in (few(1, 9, 7, 72).to(dtype), few(1, 9, 7, 132).to(dtype)[..., 4:68]):
            x, weight = x.permute(0, 3, 1, 2), few(16, x.shape[3], 3, 3, share=0.3)
            launched()
            result = ops.flow_conv2d(x, None, weight.to(dtype))
            assert ran_as_expected(launched(), "conv3x3", possible=False)
            assert_near(result, reference.flow_conv2d(x.double(), None, weight, None, True), dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_many_levels(self, dtype, launched):
        """More levels than the table of a launch holds."""
        x, flows, weight, bias = self.case((64, 64, [(3, 5)] * 23 + [(9, 9)] * 4, 1), True)
        expected = reference.flow_conv2d(x, flows, weight, bias, True)
        x, flows, weight, bias = map_tensors(lambda t: t.to(dtype), [x, flows, weight, bias])
        result = ops.flow_conv2d(x, flows, weight, bias, algorithm=EXACT)
        assert all(torch.equal(actual.double(), wanted) for actual, wanted in zip(result, expected, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("flags", [(1, 0, 1), (0, 0, 0), (0, 1, 0)], ids=str)
    def test_active(self, flags, dtype, launched):
        x, _, weight, bias = self.case((64, 72, [(9, 17), (4, 4)], 3), False)
        active = torch.tensor(flags, dtype=torch.bool)
        expected = [level * active.view(-1, 1, 1, 1) for level in reference.flow_conv2d(x, None, weight, bias, True)]
        x = [torch.where(active.view(-1, 1, 1, 1), level, torch.nan).to(dtype) for level in x]
        launched()
        packed = ops.pack_conv3x3(weight.to(dtype), bias.to(dtype), EXACT)
        result = ops.flow_conv2d(x, None, packed, active=active)
        assert ran_as_expected(launched(), "conv3x3")
        assert all(torch.equal(actual.double(), wanted) for actual, wanted in zip(result, expected, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_infinities_stay_where_they_are(self, dtype):
        """An infinity or NaN reaches only the outputs of its 3 x 3 neighborhood, as in the reference."""
        x = torch.zeros(1, 64, 9, 10)
        x[0, 5, 4, 4] = torch.inf
        x[0, 6, 0, 9] = torch.nan
        weight = torch.ones(8, 64, 3, 3)
        expected = reference.flow_conv2d(x, None, weight, None, True)
        result = ops.flow_conv2d(x.to(dtype), None, weight.to(dtype))
        assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())


class TestFusedSubnets:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", list(WIRINGS.values()), ids=list(WIRINGS))
    def test_every_wiring(self, case, dtype, launched):
        """Every wiring of the sub-networks agrees with the reference in float64."""
        case = {**case, **({"inner": 128} if "inner" in case else {})}
        levels, convs = map_tensors(lambda t: t.to(dtype), [pyramid(64, SIZES, batch=2), wiring(channels=64, **case)])
        source = {"flow_source": case.get("source", "reg")}
        expected = by_reference(*map_tensors(torch.Tensor.double, [levels, convs]), **source)
        launched()
        packed = ops.pack_subnets(parameters_of(convs, **source))
        result = list(ops.fused_subnets(map_tensors(channels_last, levels), packed))
        assert ran_as_expected(launched(), "conv3x3", possible=case["stages"] != (0, 0, 0, 0))
        assert_near(result, expected, dtype, factor=4)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("segmentation_levels", [0, 1, 4])
    def test_segmentation_levels(self, segmentation_levels, dtype):
        wired = {"segmentation_levels": segmentation_levels}
        levels, convs = map_tensors(
            lambda t: t.to(dtype), [pyramid(64, SIZES[1:]), wiring(channels=64, stages=(2, 2, 2, 1))]
        )
        expected = by_reference(*map_tensors(torch.Tensor.double, [levels, convs]), **wired)
        assert_near(run_fused_subnets(levels, convs, **wired), expected, dtype, factor=4)


class TestDeformConv2d:
    shapes = [
        # channels, outputs, offset groups, kernel, size, stride, padding, dilation, batch
        (64, 72, 1, (3, 3), (9, 7), 1, 1, 1, 1),
        (128, 128, 2, (3, 3), (12, 11), 2, 1, 2, 2),
        (64, 136, 1, (1, 1), (5, 6), 1, 0, 1, 1),
        (64, 256, 1, (3, 3), (7, 9), 1, 1, 1, 3),
        (192, 264, 3, (3, 2), (8, 8), 1, 1, 1, 1),
        # More than 132 tiles of 64 pixels: a block sums over all channels and taps.
        (64, 128, 1, (3, 3), (65, 67), 1, 1, 1, 2),
    ]

    @staticmethod
    def case(shape):
        channels, outputs, groups, kernel, size, stride, padding, dilation, batch = shape
        taps = kernel[0] * kernel[1]
        padded = [side + 2 * padding - dilation * (length - 1) - 1 for side, length in zip(size, kernel, strict=True)]
        out = [length // stride + 1 for length in padded]
        return (
            torch.randn(batch, channels, *size),
            torch.randn(batch, 2 * groups * taps, *out) * 3,
            torch.randn(outputs, channels, *kernel) / (channels * taps) ** 0.5,
            torch.randn(outputs),
            torch.rand(batch, groups * taps, *out),
        ), (stride, padding, dilation)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", shapes, ids=str)
    def test_against_float64(self, shape, dtype, launched):
        tensors, geometry = self.case(shape)
        x, offset, weight, bias, mask = (tensor.to(dtype) for tensor in tensors)
        tensors64 = [tensor.double() for tensor in (x, offset, weight, bias, mask)]
        launched()
        result = ops.deform_conv2d(channels_last(x), offset, weight, bias, *geometry, mask, relu=True)
        assert ran_as_expected(launched(), "deform_conv2d")
        expected = reference.deform_conv2d(*tensors64[:4], *geometry, tensors64[4]).relu()
        assert_near(result, expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_whole_offsets_are_exact(self, dtype, launched):
        """Integers sampled at integer positions: sums are exact, so that a wrong cell is detected."""
        shape = (64, 136, 1, (3, 3), (11, 12), 1, 1, 1, 2)
        (_, offset, _, _, _), geometry = self.case(shape)
        x, weight, bias = few(2, 64, 11, 12, share=0.3), few(136, 64, 3, 3, share=0.3), few(136, largest=9)
        offset, mask = few(*offset.shape, largest=4), few(2, 9, 11, 12).abs()
        expected = reference.deform_conv2d(x, offset, weight, bias, *geometry, mask)
        assert expected.abs().max() < 256
        x, offset, weight, bias, mask = (tensor.to(dtype) for tensor in (x, offset, weight, bias, mask))
        launched()
        result = ops.deform_conv2d(channels_last(x), offset, weight, bias, *geometry, mask)
        assert ran_as_expected(launched(), "deform_conv2d")
        assert torch.equal(result.double(), expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_far_and_undefined_offsets(self, dtype):
        (x, offset, weight, bias, mask), geometry = self.case(self.shapes[0])
        offset[:, :, 0] = 1e4
        offset[:, :, 1] = -torch.inf
        tensors = [tensor.to(dtype) for tensor in (x, offset, weight, bias, mask)]
        tensors64 = [tensor.double() for tensor in tensors]
        result = ops.deform_conv2d(*tensors[:4], *geometry, tensors[4])
        assert_near(result, reference.deform_conv2d(*tensors64[:4], *geometry, tensors64[4]), dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_unsupported_inputs(self, dtype, launched):
        """64 outputs or fewer, several groups, and offset groups whose channels are not a multiple of 64."""
        for channels, outputs, groups, offset_groups in ((64, 64, 1, 1), (128, 128, 2, 1), (64, 72, 1, 2)):
            (x, offset, weight, bias, mask), geometry = self.case(
                (channels, outputs, offset_groups, (3, 3), (5, 6), 1, 1, 1, 1)
            )
            tensors = [tensor.to(dtype) for tensor in (x, offset, weight[:, : channels // groups], bias, mask)]
            tensors64 = [tensor.double() for tensor in tensors]
            launched()
            result = ops.deform_conv2d(*tensors[:4], *geometry, tensors[4])
            assert ran_as_expected(launched(), "deform_conv2d", possible=False)
            assert_near(result, reference.deform_conv2d(*tensors64[:4], *geometry, tensors64[4]), dtype)


@pytest.mark.skipif(shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="needs nvcc")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a source tree")
@pytest.mark.skipif(ON_INTERPRETER, reason="compiles for GPUs: once, beside the CPU's kernels")
def test_other_architectures_have_no_such_kernels():
    """Kernels for 9.0a have static shared memory only on 9.0a: the host selects the portable kernels elsewhere."""
    tool = runpy.run_path(str(ROOT / "tools" / "kernel_resources.py"))
    source, architectures = ROOT / "csrc" / "cuda" / "sm90_deform_conv2d.cu", ["90a", "90", "80", "120"]
    output = tool["compile_output"](source, architectures, Path(torch.__file__).parent)
    assert "warning" not in output  # such as C7510, which says that wgmma instructions are serialized
    resources = {name: uses["deform_conv2d_sm90_kernel"] for name, uses in tool["resources"](output).items()}
    assert sorted(resources) == sorted(architectures)
    for name, uses in resources.items():
        assert all((shared > 0) == (name == "90a") and spilled == 0 for _, shared, _, spilled in uses)
