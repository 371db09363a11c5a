# SPDX-License-Identifier: Apache-2.0
"""Tests of flow_conv2d: `OpMatrix`, algorithms, packed weights, edges of tiles and strips, bad values, errors."""

import copy
import pickle

import pytest
import torch
from helpers.flow_conv2d_cases import CODES, sample_of, tensors_of
from helpers.op_matrix import OpMatrix
from helpers.tensors import LAYOUTS, THIN_SHAPES, assert_near, map_tensors

from spatialflow import ops
from spatialflow.ops import reference

ALGORITHMS = ["winograd", "direct"]


def raw(x, flow, weight, bias, relu=True, algorithm="auto"):
    return torch.ops.spatialflow.flow_conv2d, (x, flow or [], weight, bias, relu, CODES[algorithm])


def sample(channels, out_channels, sizes, flow=True, bias=True, batch=1, **options):
    tensors = tensors_of(channels, out_channels, sizes, flow, bias, batch)
    return sample_of(ops.flow_conv2d, reference.flow_conv2d, raw, tensors, flow, bias, options)


class TestFlowConv2d(OpMatrix):
    has_gradient = True
    samples = {
        "pyramid with flow": sample(5, 6, [(7, 8), (4, 9)], batch=2),
        "winograd, linear": sample(4, 35, [(9, 11), (8, 5)], relu=False, algorithm="winograd"),
        "direct, no flow": sample(33, 3, [(5, 9)], flow=False, relu=False, algorithm="direct"),
        "auto, no bias": sample(32, 32, [(6, 5)], bias=False),
    }
    linear_samples = ("winograd, linear", "direct, no flow")
    thin_samples = {
        name: sample(channels, 8, [(height, width), (3, 4)], batch=batch, relu=False)
        for name, (batch, channels, height, width) in THIN_SHAPES.items()
    } | {
        "one output channel": sample(8, 1, [(3, 4)], batch=2, relu=False),
        "no output channels": sample(8, 0, [(3, 4)], batch=2, relu=False),
        "winograd, one column": sample(8, 8, [(5, 1)], batch=2, relu=False, algorithm="winograd"),
    }


class TestKernels:
    """Shapes at the edges of tiles, strips, panels and vectors, in dtypes whose kernels differ from float64."""

    sizes = {
        "one pixel": [(1, 1)],
        "one row": [(1, 37)],
        "one column": [(29, 1)],
        "below a tile": [(3, 2), (2, 3)],
        "one tile": [(4, 4)],
        "past a tile": [(5, 9)],
        "several strips": [(20, 60), (9, 31), (3, 3)],
        "wide": [(2, 400)],
    }
    channels = [(1, 1), (3, 5), (16, 36), (40, 70), (256, 33)]

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize("sizes", list(sizes.values()), ids=list(sizes))
    @pytest.mark.parametrize("channels", channels, ids=str)
    def test_sizes(self, algorithm, sizes, channels):
        """Results are right with a flow and without one; the CPU's direct kernel copies the input only with a flow."""
        x, added, weight, bias = tensors_of(*channels, sizes, True, True, 2)()
        for flow in (added, None):
            single = map_tensors(lambda t: t.float(), [x, flow, weight, bias])
            actual = ops.flow_conv2d(*single, algorithm=algorithm)
            assert_near(actual, reference.flow_conv2d(x, flow, weight, bias), torch.float32)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradients(self, algorithm, dtype):
        """Gradients are right in float32 and bfloat16; weight gradients are sums over several chunks."""
        tensors = tensors_of(20, 36, [(23, 50), (30, 41), (3, 5)], True, True, 2)()
        tensors = [
            [t.to(dtype) for t in tensors[0]],
            [t.to(dtype) for t in tensors[1]],
            tensors[2].to(dtype),
            tensors[3].to(dtype),
        ]
        inputs = [*tensors[0], *tensors[1], tensors[2], tensors[3]]

        def gradients(op, cast):
            leaf = [cast(t).requires_grad_() for t in inputs]
            y = op(leaf[:3], leaf[3:6], leaf[6], leaf[7], relu=False, algorithm=algorithm)
            return torch.autograd.grad(sum((level * (i + 1)).sum() for i, level in enumerate(y)), leaf)

        actual = gradients(ops.flow_conv2d, torch.clone)
        expected = gradients(reference.flow_conv2d, lambda t: t.double())
        assert_near(list(actual), list(expected), dtype, factor=4)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_large_batch_of_levels(self, algorithm):
        """Levels of different batch sizes share groups of tiles and do not affect each other."""
        x = [torch.randn(n, 8, 11, 6) for n in (3, 1, 2)]
        weight = torch.randn(40, 8, 3, 3)
        together = ops.flow_conv2d(x, None, weight, algorithm=algorithm)
        for level, result in zip(x, together, strict=False):
            assert_near(result, ops.flow_conv2d(level, None, weight, algorithm=algorithm), torch.float32)

    @pytest.mark.parametrize("channels", [3, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_many_levels(self, dtype, channels):
        """Outputs and the weight gradient are right for more levels than a launch takes."""
        x = [torch.randn(1, channels, 1 + i % 4, 2 + i % 3, dtype=dtype) for i in range(40)]
        weight = torch.randn(5, channels, 3, 3, dtype=dtype, requires_grad=True)
        weight64 = weight.detach().double().requires_grad_()
        actual = ops.flow_conv2d(x, None, weight, relu=False)
        expected = reference.flow_conv2d([level.double() for level in x], None, weight64, relu=False)
        assert_near(actual, expected, dtype)
        gradients = [torch.randn_like(y) for y in actual]
        expected_gradient = torch.autograd.grad(expected, weight64, [g.double() for g in gradients])
        assert_near(list(torch.autograd.grad(actual, weight, gradients)), list(expected_gradient), dtype)

    @pytest.mark.parametrize("threads", [1, 2, 5])
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_threads(self, algorithm, threads):
        """Results and weight gradients do not depend on the number of threads: they are bitwise equal."""
        x = torch.randn(1, 33, 13, 9)
        weight = torch.randn(34, 33, 3, 3)

        def run() -> list:
            leaf = weight.clone().requires_grad_()
            y = ops.flow_conv2d(x, x * 0.5, leaf, algorithm=algorithm)
            return [y.detach(), torch.autograd.grad(y.sum(), leaf)[0]]

        before = torch.get_num_threads()
        expected = run()
        torch.set_num_threads(threads)
        try:
            assert all(torch.equal(first, second) for first, second in zip(run(), expected, strict=False))
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_sums_are_kept_in_float32(self, dtype):
        """Sums of 2304 ones (channels, taps) and 4608 ones (pixels) are right; 16 bits would stop at 2048 or 256."""
        x = torch.ones(1, 256, 3, 3, dtype=dtype)
        y = ops.flow_conv2d(x, None, torch.ones(8, 256, 3, 3, dtype=dtype), algorithm="direct")
        assert (y[:, :, 1, 1] == 2304).all() and (y[:, :, 0, 0] == 1024).all()
        x, weight = torch.ones(1, 8, 48, 96, dtype=dtype), torch.zeros(8, 8, 3, 3, dtype=dtype, requires_grad=True)
        y = ops.flow_conv2d(x, None, weight, relu=False, algorithm="direct")
        (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
        assert (gradient[:, :, 1, 1] == 4608).all()

    @pytest.mark.parametrize("outputs", [40, 100, 200])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_16_bit_tiles(self, dtype, outputs):
        """Cover tiles of 64 and of 128 outputs on tensor cores, full and partial."""
        x, flow, weight, bias = tensors_of(40, outputs, [(17, 35), (9, 16), (2, 3)], True, True, 2)()
        for added in (flow, None):
            halves = map_tensors(lambda t: t.to(dtype), [x, added, weight, bias])
            expected = reference.flow_conv2d(*map_tensors(torch.Tensor.double, halves))
            assert_near(ops.flow_conv2d(*halves), expected, dtype)

    @pytest.mark.parametrize("channels", [(64, 64), (128, 136), (192, 36), (64, 33)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_16_bit_steps_of_64_channels(self, dtype, channels):
        """Cover multiples of 64 input channels, full tiles of outputs, and output pixels not a multiple of 16 bytes."""
        x, flow, weight, bias = tensors_of(*channels, [(9, 19), (8, 8), (1, 3), (17, 2)], True, True, 2)()
        for added, offset, relu in ((flow, bias, True), (None, None, False)):
            halves = map_tensors(lambda t: t.to(dtype), [x, added, weight, offset])
            expected = reference.flow_conv2d(*map_tensors(torch.Tensor.double, halves), relu=relu)
            assert_near(ops.flow_conv2d(*halves, relu=relu), expected, dtype)
            packed = ops.pack_conv3x3(halves[2], halves[3])
            assert_near(ops.flow_conv2d(halves[0], halves[1], packed, relu=relu), expected, dtype)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_16_bit_layouts_and_gradients(self, dtype):
        """Results are right for maps in all `LAYOUTS`; gradients of x are right for contiguous maps."""
        x, flow, weight, bias = map_tensors(
            lambda t: t.to(dtype), tensors_of(64, 64, [(7, 10), (3, 1)], True, True, 2)()
        )
        expected = reference.flow_conv2d(*map_tensors(torch.Tensor.double, [x, flow, weight, bias]))
        for name, layout in LAYOUTS.items():
            actual = ops.flow_conv2d(map_tensors(layout, x), map_tensors(layout, flow), weight, bias)
            assert_near(actual, expected, dtype, what=name)
        gradients = [torch.randn_like(level) for level in x]
        results = []
        for op, cast in ((ops.flow_conv2d, torch.clone), (reference.flow_conv2d, torch.Tensor.double)):
            leaves = [cast(level).requires_grad_() for level in x]
            y = op(leaves, map_tensors(cast, flow), cast(weight), None, relu=False)
            results.append(list(torch.autograd.grad(y, leaves, [cast(gradient) for gradient in gradients])))
        assert_near(*results, dtype)

    def test_winograd_error(self):
        """With 256 channels, errors are below 1e-5 (Winograd) and 3e-6 (direct) of the largest float64 output."""
        x = torch.randn(1, 256, 20, 20)
        weight = torch.randn(256, 256, 3, 3) * 0.02
        expected = reference.flow_conv2d(x.double(), None, weight.double())
        for algorithm, bound in (("winograd", 1e-5), ("direct", 3e-6)):
            error = (ops.flow_conv2d(x, None, weight, algorithm=algorithm) - expected).abs().max() / expected.max()
            assert error < bound, algorithm


class TestPacked:
    @pytest.mark.parametrize("algorithm", list(CODES))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
    def test_same_numbers(self, algorithm, dtype):
        x, flow, weight, bias = tensors_of(40, 45, [(20, 21), (5, 3)], True, True, 1)()
        x, flow, weight, bias = [t.to(dtype) for t in x], [t.to(dtype) for t in flow], weight.to(dtype), bias.to(dtype)
        for layout in (torch.channels_last, torch.contiguous_format):
            packed = ops.pack_conv3x3(weight.contiguous(memory_format=layout), bias, algorithm)
            actual = ops.flow_conv2d(x, flow, packed)
            expected = ops.flow_conv2d(x, flow, weight, bias, algorithm=algorithm)
            assert all(torch.equal(first, second) for first, second in zip(actual, expected, strict=False))

    def test_gradients_and_forward_mode_use_the_weights(self):
        weight = torch.randn(34, 33, 3, 3)
        packed = ops.pack_conv3x3(weight)
        x = torch.randn(1, 33, 6, 6, requires_grad=True)
        (actual,) = torch.autograd.grad(ops.flow_conv2d(x, None, packed).sum(), x)
        (expected,) = torch.autograd.grad(ops.flow_conv2d(x, None, weight).sum(), x)
        assert torch.equal(actual, expected)
        plain, tangent = x.detach(), torch.randn(1, 33, 6, 6)

        def pushed(weights: object) -> torch.Tensor:
            return torch.func.jvp(lambda t: ops.flow_conv2d(t, None, weights), (plain,), (tangent,))[1]

        assert pushed(packed).any() and torch.equal(pushed(packed), pushed(weight))
        compiled = torch.compile(lambda: pushed(packed), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(), pushed(weight))

    @pytest.mark.parametrize("algorithm", list(CODES))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_opcheck(self, algorithm, dtype):
        weight, x = torch.randn(33, 40, 3, 3, dtype=dtype), [torch.randn(1, 40, 5, 6, dtype=dtype)]
        packed = ops.pack_conv3x3(weight, None, algorithm).packed
        torch.library.opcheck(torch.ops.spatialflow._pack_conv3x3, (weight, CODES[algorithm]))
        torch.library.opcheck(
            torch.ops.spatialflow._flow_conv2d_packed, (x, [], packed, None, 33, True, CODES[algorithm])
        )

    def test_compile(self):
        packed = ops.pack_conv3x3(torch.randn(8, 4, 3, 3), torch.randn(8))
        x = [torch.randn(1, 4, 6, 6), torch.randn(1, 4, 3, 3)]
        call = torch.compile(lambda t: ops.flow_conv2d(t, None, packed), backend="aot_eager", fullgraph=True)
        assert_near(call(x), ops.flow_conv2d(x, None, packed), torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("begin", [1, 2])
    def test_slice_of_a_larger_tensor(self, begin, dtype):
        """Packed weights need no alignment to 16 bytes, the unit in which CUDA kernels read them."""
        x = torch.randn(1, 16, 6, 7, dtype=dtype)
        packed = ops.pack_conv3x3(torch.randn(8, 16, 3, 3, dtype=dtype), algorithm="direct")
        larger = torch.full((begin + packed.packed.numel(),), float("nan"), dtype=packed.packed.dtype)
        larger[begin:] = packed.packed
        sliced = packed._replace(packed=larger[begin:])
        assert torch.equal(ops.flow_conv2d(x, None, sliced), ops.flow_conv2d(x, None, packed))

    def test_foreign_packing_is_refused(self):
        packed = ops.pack_conv3x3(torch.randn(8, 4, 3, 3))
        with pytest.raises(RuntimeError, match="flow_conv2d: the packed weight was made for other channels"):
            ops.flow_conv2d(torch.randn(1, 5, 6, 6), None, packed)
        with pytest.raises(RuntimeError, match="flow_conv2d: packed weight must be float64"):
            ops.flow_conv2d(torch.randn(1, 4, 6, 6).double(), None, packed)

    def test_another_order_is_refused(self):
        """The length of packed weights encodes their layout; test_cpu_levels.py tests layouts of other libraries."""
        packed = ops.pack_conv3x3(torch.randn(8, 4, 3, 3))
        tag = packed.packed.numel() % 288
        assert packed.packed[-tag:].count_nonzero() == 0
        x = torch.randn(1, 4, 6, 6)
        for other_tag in (0, 1, tag - 2, tag + 1, 128):  # 0 for weights without a tag
            bare = packed.packed[:-tag]
            relabeled = packed._replace(packed=torch.cat([bare, bare.new_zeros(other_tag)]))
            message = rf"the packed weight has the layout of another .*\(tag {other_tag}, here {tag}\); pack the"
            with pytest.raises(RuntimeError, match="flow_conv2d: " + message):
                ops.flow_conv2d(x, None, relabeled)
            with pytest.raises(RuntimeError, match="fused_subnets: " + message):
                ops.fused_subnets([x], ops.SubnetParameters(cls=(relabeled,), segmentation_levels=0))
        packed64 = packed._replace(packed=packed.packed.double())
        message = "flow_conv2d: the packed weight was made for other channels, another algorithm or another dtype"
        with pytest.raises(RuntimeError, match=message):
            ops.flow_conv2d(x.double(), None, packed64)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_copies_are_packed_from_the_weight(self, copied):
        weight = torch.randn(33, 32, 3, 3, requires_grad=True)
        packed = ops.pack_conv3x3(weight, torch.randn(33), "winograd")
        again = copied(packed._replace(packed=torch.zeros(1)))  # a copy does not use packed values of another process
        assert torch.equal(again.packed, packed.packed) and torch.equal(again.weight, weight)
        assert again.weight.requires_grad and again.algorithm == "winograd" and torch.equal(again.bias, packed.bias)


class TestValues:
    def test_nan_reaches_its_neighborhood_only(self):
        """NaN reaches the 3x3 outputs around its pixel or, in Winograd, the outputs of the 4x4 tiles that read it."""
        x = torch.randn(1, 40, 14, 15)
        x[0, 7, 6, 8] = float("nan")
        weight = torch.randn(40, 40, 3, 3)
        for relu in (True, False):
            direct = ops.flow_conv2d(x, None, weight, relu=relu, algorithm="direct").isnan()
            assert direct[:, :, 5:8, 7:10].all() and direct.sum() == 9 * 40
            # Only the tile of rows 4..7 reads row 6 (it reads 3..8); tiles of columns 4..7 and 8..11 read column 8.
            winograd = ops.flow_conv2d(x, None, weight, relu=relu, algorithm="winograd").isnan()
            assert winograd[:, :, 5:8, 7:10].all() and winograd.sum() == winograd[:, :, 4:8, 4:12].sum()

    def test_no_derivative_touches_nan_elsewhere(self):
        """A level with NaN but without tangent or incoming gradient gives zeros, not 0 * NaN."""
        good, bad = torch.randn(1, 2, 3, 3), torch.full((1, 2, 3, 3), float("nan"))
        weight = torch.randn(2, 2, 3, 3, requires_grad=True)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(good, torch.ones_like(good))
            results = ops.flow_conv2d([dual, bad], None, weight.detach(), None, False, "direct")
            tangents = [torch.autograd.forward_ad.unpack_dual(result).tangent for result in results]
        expected = ops.flow_conv2d(torch.ones_like(good), None, weight.detach(), None, False)
        assert_near(tangents[0], expected, torch.float32)
        assert not tangents[1].any()
        leaf = good.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ops.flow_conv2d([leaf, bad], None, weight, None, False)[0].sum(), leaf)
        (expected,) = torch.autograd.grad(ops.flow_conv2d(leaf, None, weight, None, False).sum(), leaf)
        assert torch.equal(gradient, expected)

    def test_no_second_derivative_passes_the_mask_of_relu(self):
        """The mask of ReLU has no derivative; a zero derivative would become 0 * NaN where x is NaN."""
        x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3, requires_grad=True)
        x[0, 0, 0, 0] = float("nan")
        x.requires_grad_()
        y = ops.flow_conv2d(x, None, weight, None, True, "direct")
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), weight)
        assert second.isfinite().all()

    def test_infinity_spreads_to_its_window_only(self):
        x = torch.zeros(1, 2, 5, 5)
        x[0, 0, 2, 2] = float("inf")
        weight = torch.ones(1, 2, 3, 3)
        result = ops.flow_conv2d(x, None, weight, algorithm="direct")
        assert result[0, 0, 1:4, 1:4].isinf().all() and not result[0, 0, 0].any()

    def test_level_without_gradient(self):
        """A level that a loss does not depend on adds nothing to the gradients of weights, even if it is not finite."""
        x = [torch.randn(1, 2, 4, 5, requires_grad=True), torch.full((1, 2, 3, 3), float("nan"), requires_grad=True)]
        flow = [torch.randn(1, 2, 4, 5), torch.randn(1, 2, 3, 3)]
        weight, bias = torch.randn(3, 2, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
        result = ops.flow_conv2d(x, flow, weight, bias)[0]
        grads = torch.autograd.grad(result.sum(), (*x, weight, bias))
        expected = ops.flow_conv2d(x[:1], flow[:1], weight, bias)[0]
        first, *rest = torch.autograd.grad(expected.sum(), (x[0], weight, bias))
        assert not grads[1].any()
        assert all(torch.equal(*pair) for pair in zip(grads, (first, grads[1], *rest), strict=True))

    def test_relu_gradient_at_zero(self):
        """The gradient at a result of exactly zero is zero, as for torch.relu."""
        x = torch.zeros(1, 1, 3, 3, requires_grad=True)
        y = ops.flow_conv2d(x, None, torch.ones(1, 1, 3, 3))
        assert not torch.autograd.grad(y.sum(), x)[0].any()


class TestShapes:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize(
        "shape, out_channels",
        [((0, 3, 4, 5), 6), ((2, 3, 0, 5), 6), ((2, 3, 4, 0), 6), ((2, 3, 4, 5), 0), ((2, 0, 4, 5), 6)],
        ids=["batch", "height", "width", "outputs", "inputs"],
    )
    def test_empties(self, algorithm, shape, out_channels):
        weight = torch.randn(out_channels, shape[1], 3, 3, requires_grad=True)
        bias = torch.randn(out_channels, requires_grad=True)
        x = torch.randn(shape, requires_grad=True)
        y = ops.flow_conv2d(x, torch.randn(shape), weight, bias, algorithm=algorithm)
        assert y.shape == (shape[0], out_channels, *shape[2:])
        assert torch.equal(y, bias.relu().view(-1, 1, 1).expand_as(y))
        grads = torch.autograd.grad(y.sum(), (x, weight, bias), allow_unused=True)
        assert not grads[0].any() and not grads[1].any()

    def test_no_levels_and_empty_levels_between(self):
        weight = torch.randn(40, 33, 3, 3)
        assert ops.flow_conv2d([], None, weight) == []
        x = [torch.randn(1, 33, 9, 9), torch.randn(1, 33, 0, 4), torch.randn(0, 33, 9, 9), torch.randn(1, 33, 2, 2)]
        for algorithm in ALGORITHMS:
            together = ops.flow_conv2d(x, None, weight, algorithm=algorithm)
            assert [tuple(y.shape) for y in together[1:3]] == [(1, 40, 0, 4), (0, 40, 9, 9)]
            assert_near(together[::3], reference.flow_conv2d(x[::3], None, weight), torch.float32)

    def test_layout_is_per_level(self):
        x = [torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(1, 4, 6, 6)]
        first, second = ops.flow_conv2d(x, None, torch.randn(8, 4, 3, 3))
        assert first.is_contiguous(memory_format=torch.channels_last) and second.is_contiguous()

    level = torch.randn(1, 4, 5, 5)
    filters = torch.randn(8, 4, 3, 3)
    errors = {
        "weight": ([level], None, torch.randn(8, 4, 5, 5), None, r"weight must have shape \(C_out"),
        "channels": ([torch.randn(1, 3, 5, 5)], None, filters, None, r"x\[0\] must .*4"),
        "dims": ([torch.randn(4, 5, 5)], None, filters, None, r"x\[0\] must be"),
        "dtype": ([level.double()], None, filters, None, r"x\[0\] must have the dtype"),
        "integer": ([level.int()], None, filters.int(), None, "weight must be float32"),
        "bias": ([level], None, filters, torch.randn(4), r"bias must have shape \(8,\)"),
        "levels": ([level], [level] * 2, filters, None, "flow must have as many levels"),
        "flow size": ([level], [torch.randn(1, 4, 5, 6)], filters, None, r"flow\[0\] must"),
    }

    @pytest.mark.parametrize("case", list(errors.values()), ids=list(errors))
    def test_errors(self, case):
        x, flow, weight, bias, message = case
        with pytest.raises(RuntimeError, match="flow_conv2d: " + message):
            ops.flow_conv2d(x, flow, weight, bias)

    def test_options(self):
        x, weight = torch.randn(1, 4, 5, 5), torch.randn(8, 4, 3, 3)
        with pytest.raises(ValueError, match="flow_conv2d: algorithm must be one of 'auto', 'winograd', 'direct'"):
            ops.flow_conv2d(x, None, weight, algorithm="fft")
        with pytest.raises(ValueError, match="pack_conv3x3: algorithm must be one of"):
            ops.pack_conv3x3(weight, algorithm="fft")
        with pytest.raises(ValueError, match="flow must have the structure of x"):
            ops.flow_conv2d(x, [x], weight)
        with pytest.raises(ValueError, match="bias must be None when weight is a PackedConv"):
            ops.flow_conv2d(x, None, ops.pack_conv3x3(weight), torch.randn(8))
