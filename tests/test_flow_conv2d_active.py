# SPDX-License-Identifier: Apache-2.0
"""flow_conv2d with `active`: inactive images give zeros, are never read, and do not change the others."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import flow_conv2d_cases
from helpers.flow_conv2d_cases import CODES
from helpers.op_matrix import OpMatrix
from helpers.tensors import DEVICE, LAYOUTS, assert_near, leaves, map_tensors

from spatialflow import ops
from spatialflow.ops import reference


def tensors_of(channels: int, out_channels: int, sizes: list[tuple[int, int]], flow: bool, bias: bool, flags: list):
    """Return a function that makes x, flow, weight and bias in float64, and active."""
    make_tensors = flow_conv2d_cases.tensors_of(channels, out_channels, sizes, flow, bias, len(flags))
    return lambda grow=0: [*make_tensors(grow), torch.tensor(flags, dtype=torch.bool)]


def packed_call(x, flow, weight, bias, active, relu=True, algorithm="auto"):
    return ops.flow_conv2d(x, flow, ops.pack_conv3x3(weight, bias, algorithm), relu=relu, active=active)


def by_reference(x, flow, weight, bias, active, relu=True, algorithm="auto"):
    return reference.flow_conv2d(x, flow, weight, bias, relu, algorithm, active)


def raw(x, flow, weight, bias, active, relu=True, algorithm="auto"):
    conv = ops.pack_conv3x3(weight, bias, algorithm)
    arguments = (x, flow or [], conv.packed, conv.packed_bias, weight.shape[0], relu, CODES[algorithm], active)
    return torch.ops.spatialflow._flow_conv2d_packed, arguments


def sample(channels, out_channels, sizes, flow=True, bias=True, flags=(True, False), **options):
    tensors = tensors_of(channels, out_channels, sizes, flow, bias, list(flags))
    return flow_conv2d_cases.sample_of(packed_call, by_reference, raw, tensors, flow, bias, options)


class TestFlowConv2dActive(OpMatrix):
    has_gradient = True
    samples = {
        "pyramid with flow": sample(5, 6, [(7, 8), (4, 9)]),
        "winograd, linear": sample(4, 35, [(9, 5)], flags=(False, True, True), relu=False, algorithm="winograd"),
        "direct, no flow": sample(33, 3, [(5, 9)], flow=False, bias=False, relu=False, algorithm="direct"),
        "none": sample(8, 8, [(5, 4)], flags=(False, False), relu=False),
    }
    linear_samples = ("winograd, linear", "direct, no flow", "none")
    thin_samples = {
        "one image": sample(8, 8, [(5, 6)], flags=(True,), relu=False),
        "one image, left out": sample(8, 8, [(5, 6)], flags=(False,), relu=False),
        "one pixel": sample(8, 8, [(1, 1)], relu=False),
        "no images": sample(8, 8, [(5, 6)], flags=(), relu=False),
        "no channels": sample(0, 8, [(5, 6)], relu=False),
        "no outputs": sample(8, 0, [(5, 6)], relu=False),
        "no rows": sample(8, 8, [(0, 6)], relu=False),
    }


FLAGS = {
    "all": [True] * 5,
    "none": [False] * 5,
    "first": [True, True, False, False, False],
    "last": [False, False, False, True, True],
    "every other": [False, True, False, True, False],
}
# Winograd and direct; full and partial tiles of 64 and 128 outputs; rows with and without 16-byte alignment.
CHANNELS = [(3, 5), (64, 64), (40, 136), (33, 70)]


class TestImages:
    @pytest.mark.parametrize("flags", list(FLAGS.values()), ids=list(FLAGS))
    @pytest.mark.parametrize("channels", CHANNELS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_active_images_are_unchanged(self, dtype, channels, flags):
        """Results of active images do not depend on inactive images, to the last bit."""
        build = tensors_of(*channels, [(9, 17), (4, 4), (1, 3)], True, True, flags)
        *tensors, active = build()
        x, flow, weight, bias = map_tensors(lambda t: t.to(dtype), tensors)
        conv = ops.pack_conv3x3(weight, bias)
        expected = ops.flow_conv2d(x, flow, conv)
        for level, added in zip(x, flow):
            level[~active], added[~active] = float("nan"), float("inf")
        for result, all_active in zip(ops.flow_conv2d(x, flow, conv, active=active), expected, strict=True):
            assert torch.equal(result[active], all_active[active])
            assert torch.equal(result[~active], torch.zeros_like(all_active[~active]))

    @pytest.mark.parametrize("algorithm", list(CODES))
    def test_algorithms(self, algorithm):
        *tensors, active = tensors_of(36, 40, [(20, 21), (5, 3)], False, True, [True, False, True])()
        x, flow, weight, bias = map_tensors(torch.Tensor.float, tensors)
        conv = ops.pack_conv3x3(weight, bias, algorithm)
        for relu in (True, False):
            expected = ops.flow_conv2d(x, flow, conv, relu=relu)
            for result, all_active in zip(ops.flow_conv2d(x, flow, conv, relu=relu, active=active), expected):
                assert torch.equal(result[active], all_active[active]) and not result[1].any()

    @pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
    def test_layouts(self, layout):
        *tensors, active = tensors_of(16, 8, [(6, 7)], True, True, [False, True, False])()
        x, flow, weight, bias = map_tensors(torch.Tensor.half, tensors)
        conv = ops.pack_conv3x3(weight, bias)
        x, flow = layout(x[0]), layout(flow[0])
        result, all_active = ops.flow_conv2d(x, flow, conv, active=active), ops.flow_conv2d(x, flow, conv)
        assert result.stride() == all_active.stride()
        assert torch.equal(result[1], all_active[1]) and not result[::2].any()

    def test_flags_of_any_form(self):
        """Flags may be strided, expanded, and bytes other than 0 and 1."""
        x, conv = torch.randn(4, 8, 5, 6), ops.pack_conv3x3(torch.randn(8, 8, 3, 3))
        all_active = ops.flow_conv2d(x, None, conv)
        every_third = torch.zeros(12, dtype=torch.bool)
        every_third[[0, 6, 7]] = True
        odd_bytes = torch.tensor([2, 0, 128, 0], dtype=torch.uint8).view(torch.bool)
        for active in (every_third[::3], odd_bytes):
            result = ops.flow_conv2d(x, None, conv, active=active)
            assert torch.equal(result[::2], all_active[::2]) and not result[1::2].any()
        for flag in (True, False):
            result = ops.flow_conv2d(x, None, conv, active=torch.tensor(flag).expand(4))
            assert torch.equal(result, all_active if flag else torch.zeros_like(all_active))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_more_tiles_than_a_block_takes(self, dtype):
        """With flags, a block takes at most 128 tiles; 450 images need more than the interpreter's three blocks."""
        count = 450
        x = torch.randn(count, 8, 2, 1, dtype=dtype)
        conv = ops.pack_conv3x3(torch.randn(8, 8, 3, 3, dtype=dtype))
        active = torch.rand(count) < 0.1
        all_active = ops.flow_conv2d(x, None, conv)
        result = ops.flow_conv2d(x, None, conv, active=active)
        assert torch.equal(result, torch.where(active[:, None, None, None], all_active, 0))

    def test_more_levels_than_a_launch_takes(self):
        active = torch.tensor([False, True, False])
        x = [torch.randn(3, 64, 1 + i % 4, 2 + i % 3, dtype=torch.bfloat16) for i in range(30)]
        conv = ops.pack_conv3x3(torch.randn(8, 64, 3, 3, dtype=torch.bfloat16))
        results, wholes = ops.flow_conv2d(x, None, conv, active=active), ops.flow_conv2d(x, None, conv)
        for result, all_active in zip(results, wholes, strict=True):
            assert torch.equal(result[1], all_active[1]) and not result[::2].any()

    @pytest.mark.parametrize("threads", [1, 2, 5])
    @pytest.mark.parametrize("algorithm", ["winograd", "direct"])
    def test_threads(self, algorithm, threads):
        """Results are bitwise equal for any number of threads."""
        x, active = torch.randn(6, 33, 13, 9), torch.tensor([True, False, True, True, False, True])
        conv = ops.pack_conv3x3(torch.randn(34, 33, 3, 3), None, algorithm)
        before = torch.get_num_threads()
        expected = ops.flow_conv2d(x, x * 0.5, conv, active=active)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(ops.flow_conv2d(x, x * 0.5, conv, active=active), expected)
        finally:
            torch.set_num_threads(before)

    def test_empty(self):
        conv = ops.pack_conv3x3(torch.randn(8, 4, 3, 3))
        nothing = torch.zeros(0, dtype=torch.bool)
        assert ops.flow_conv2d([], None, conv, active=nothing) == []
        assert ops.flow_conv2d(torch.zeros(0, 4, 5, 6), None, conv, active=nothing).shape == (0, 8, 5, 6)
        x = [torch.randn(2, 4, 0, 3), torch.randn(2, 4, 3, 3)]
        results = ops.flow_conv2d(x, None, conv, active=torch.tensor([False, True]))
        assert results[0].shape == (2, 8, 0, 3)
        assert torch.equal(results[1][1], ops.flow_conv2d(x[1], None, conv)[1]) and not results[1][0].any()


# Image 1 of x and of flow is in memory without read permission, so a read ends the process.
FORBIDDEN = """
import ctypes
import mmap
import sys

import torch

from spatialflow import ops

dtype, algorithm, channels, flow = getattr(torch, sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "flow"
side, images, libc = 32, 3, ctypes.CDLL(None, use_errno=True)
bytes_of_image = side * side * channels * torch.empty(0, dtype=dtype).element_size()
assert bytes_of_image % mmap.PAGESIZE == 0


def guarded():
    memory = mmap.mmap(-1, images * bytes_of_image)
    values = torch.frombuffer(memory, dtype=dtype).view(images, side, side, channels).permute(0, 3, 1, 2)
    values.copy_(torch.randn(values.shape))
    address = ctypes.c_void_p(values.data_ptr() + bytes_of_image)
    return values, lambda rights: libc.mprotect(address, ctypes.c_size_t(bytes_of_image), rights)


x, protect_x = guarded()
added, protect_flow = guarded()
weight, bias = torch.randn(channels, channels, 3, 3, dtype=dtype), torch.randn(channels, dtype=dtype)
conv = ops.pack_conv3x3(weight, bias, algorithm)
active = torch.tensor([True, False, True])
expected = ops.flow_conv2d(x, added if flow else None, conv)
assert protect_x(0) == 0 and protect_flow(0) == 0
result = ops.flow_conv2d(x, added if flow else None, conv, active=active if sys.argv[5] == "active" else None)
assert torch.equal(result[::2], expected[::2]) and not result[1].any()
print("not read")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="protects host memory, which CUDA kernels do not read")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs mprotect of Linux")
class TestReads:
    def run(self, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", FORBIDDEN, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    @pytest.mark.parametrize("flow", ["flow", "no flow"])
    @pytest.mark.parametrize(
        "dtype, algorithm, channels",
        [
            ("float64", "direct", 4),
            ("float32", "direct", 4),
            ("float32", "winograd", 32),
            ("float32", "tf32", 32),
            ("bfloat16", "auto", 64),
            ("float16", "direct", 2),
        ],
    )
    def test_inactive_images_are_not_read(self, dtype, algorithm, channels, flow):
        """Neither the interpreter nor the CPU reads inactive images."""
        process = self.run(dtype, algorithm, channels, flow, "active")
        assert process.returncode == 0 and process.stdout == "not read\n", process.stderr[-2000:]

    def test_reads_are_found(self):
        """Without `active` the read ends the process without a Python exception, so the test above can fail."""
        process = self.run("float32", "direct", 4, "flow", "all")
        assert process.returncode != 0 and process.stdout == "" and "Traceback" not in process.stderr


class TestGradients:
    @pytest.mark.parametrize("fill", [float("nan"), float("inf")])
    def test_nothing_of_other_images_enters(self, fill):
        """Gradients and tangents depend on active images only."""
        *tensors, active = tensors_of(4, 6, [(7, 5), (3, 2)], True, True, [False, True, True])()
        x, flow, weight, bias = tensors
        for level, added in zip(x, flow):
            level[~active], added[~active] = fill, -fill
        incoming = [torch.randn(3, 6, *level.shape[2:], dtype=torch.float64) for level in x]

        def derived(x, flow, incoming, active):
            parameters = [leaf.detach().clone().requires_grad_() for leaf in leaves([x, flow, weight, bias])]
            maps, parts = parameters[: len(x)], parameters[len(x) : 2 * len(x)]
            conv = ops.pack_conv3x3(parameters[-2], parameters[-1])
            y = ops.flow_conv2d(maps, parts, conv, active=active)
            return y, torch.autograd.grad(y, parameters, incoming)

        results, gradients = derived(x, flow, incoming, active)
        kept = [[level[active] for level in levels] for levels in (x, flow, incoming)]
        expected_results, expected = derived(*kept, None)
        for result, wanted in zip(results, expected_results):
            assert torch.equal(result[active], wanted) and not result[~active].any()
        assert_near(list(gradients[-2:]), list(expected[-2:]), torch.float64)
        for gradient, wanted in zip(gradients[:-2], expected[:-2]):
            assert_near(gradient[active], wanted, torch.float64)
            assert not gradient[~active].any()

        conv = ops.pack_conv3x3(weight, bias)
        directions = [torch.randn_like(level) for level in x]
        _, tangents = torch.func.jvp(lambda t: ops.flow_conv2d(t, flow, conv, active=active), (x,), (directions,))
        assert all(level.isfinite().all() and not level[~active].any() for level in tangents)


class TestErrors:
    level, conv = torch.randn(2, 4, 5, 5), ops.pack_conv3x3(torch.randn(8, 4, 3, 3))
    both = torch.tensor([True, False])

    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize(
        "active, message",
        [
            (both.float(), "active must be bool, got float32"),
            (both[:1], r"active must have a flag for each image of x\[0\], 2, got 1"),
            (both[None], r"active must be \(N,\), got shape \(1, 2\)"),
            (both[0], r"active must be \(N,\), got shape \(\)"),
        ],
        ids=["dtype", "number", "matrix", "number of dimensions"],
    )
    def test_flags(self, active, message, gradient):
        x = self.level.clone().requires_grad_(gradient)
        with pytest.raises(RuntimeError, match="^flow_conv2d: " + message):
            ops.flow_conv2d(x, None, self.conv, active=active)

    @pytest.mark.parametrize("gradient", [False, True])
    def test_levels_of_other_batches(self, gradient):
        x = [self.level.clone().requires_grad_(gradient), torch.randn(3, 4, 5, 5)]
        with pytest.raises(RuntimeError, match=r"active must have a flag for each image of x\[1\], 3, got 2"):
            ops.flow_conv2d(x, None, self.conv, active=self.both)

    def test_device(self):
        with pytest.raises(RuntimeError, match="active must be on the device of"):
            ops.flow_conv2d(self.level, None, self.conv, active=self.both.to("meta"))

    def test_weights(self):
        with pytest.raises(ValueError, match="flow_conv2d: active must be None unless weight is a PackedConv"):
            ops.flow_conv2d(self.level, None, self.conv.weight, active=self.both)
        with pytest.raises(ValueError, match="flow_conv2d: active must be None when weight is a list"):
            ops.flow_conv2d([self.level], None, [self.conv], active=self.both)
        with pytest.raises(TypeError, match="flow_conv2d: active must be a tensor, got list"):
            ops.flow_conv2d(self.level, None, self.conv, active=[True, False])
