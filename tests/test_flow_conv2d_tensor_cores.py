# SPDX-License-Identifier: Apache-2.0
"""flow_conv2d in float32 on tensor cores: "tf32", "tf32x3", and the resolution of "auto"."""

import os
import sys

import pytest
import torch
from helpers.algorithm_codes import Codes
from helpers.flow_conv2d_cases import CODES, tensors_of
from helpers.tensors import assert_near, map_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from spatialflow import ops
from spatialflow.ops import reference
from spatialflow.ops.flow_conv2d import algorithm_code

HAS_TENSOR_CORES = not os.environ.get("SPATIALFLOW_BACKEND", "cpu").startswith("cpu")


class TestTensorCores:
    """Algorithms with TF32 on CUDA; on the CPU these names mean "auto"."""

    cases = {
        "one pixel": (1, 1, [(1, 1)]),
        "few channels": (3, 5, [(7, 8), (4, 9)]),
        "steps": (20, 36, [(9, 19), (20, 3)]),
        "wide tiles": (40, 136, [(17, 35), (2, 3)]),
        "odd channels": (33, 70, [(9, 31)]),
    }
    factors = {"tf32": 50, "tf32x3": 1}  # times the tolerance of float32: 1e-3 and 2e-5
    of_each = pytest.mark.parametrize("algorithm", list(factors))

    @staticmethod
    def full_numbers(*case) -> list:
        """Make float32 tensors with full 24-bit mantissas, unlike multiples of 1/8."""
        return map_tensors(lambda t: (t * 1.1).float(), tensors_of(*case, True, True, 2)())

    @of_each
    @pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))
    def test_errors(self, algorithm, case):
        x, flow, weight, bias = self.full_numbers(*case)
        for added, offset, relu in ((flow, bias, True), (None, None, False)):
            single = [x, added, weight, offset]
            expected = reference.flow_conv2d(*map_tensors(torch.Tensor.double, single), relu=relu)
            actual = ops.flow_conv2d(*single, relu=relu, algorithm=algorithm)
            assert_near(actual, expected, torch.float32, factor=self.factors[algorithm])

    @of_each
    def test_gradients(self, algorithm):
        """Data and weight gradients are right for more pixels and channels than a tile has."""
        x, flow, weight, bias = self.full_numbers(70, 36, [(23, 30), (9, 8), (3, 5)])
        gradients = [torch.randn(2, 36, *level.shape[2:]) for level in x]

        def derived(op, cast):
            leaves = map_tensors(lambda t: cast(t).requires_grad_(), [x, flow, weight, bias])
            y = op(*leaves, relu=False, algorithm=algorithm)
            flat = [*leaves[0], *leaves[1], *leaves[2:]]
            return list(torch.autograd.grad(y, flat, [cast(gradient) for gradient in gradients]))

        actual, expected = derived(ops.flow_conv2d, torch.clone), derived(reference.flow_conv2d, torch.Tensor.double)
        assert_near(actual, expected, torch.float32, factor=self.factors[algorithm])

    @of_each
    @pytest.mark.parametrize("channels", [(5, 3), (40, 36), (64, 136)], ids=str)
    def test_short_numbers_are_exact(self, algorithm, channels):
        """Results are exact if 11 bits hold every input and 24 bits every sum."""
        if not HAS_TENSOR_CORES:
            pytest.skip("the CPU uses Winograd here, which is not exact")
        x, flow, weight, bias = tensors_of(*channels, [(9, 18), (2, 9)], True, True, 2)()
        weight, bias = (weight * 64).round() / 8, (bias * 8).round() / 8
        tensors = [*x, *flow, weight, bias]
        results = []
        for op, dtype in ((ops.flow_conv2d, torch.float32), (reference.flow_conv2d, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            y = list(op(leaves[:2], leaves[2:4], leaves[4], leaves[5], relu=False, algorithm=algorithm))
            gradients = torch.autograd.grad(y, leaves, [level.detach().round().clamp(-5, 5) for level in y])
            results.append([*y, *gradients])
        for actual, expected in zip(*results):
            assert torch.equal(actual.double(), expected)

    def test_long_sums(self):
        """Sums of 2304 products and of 1920 pixels are accurate by "tf32x3", although tensor cores truncate."""
        x, weight = torch.randn(1, 256, 40, 48), torch.randn(8, 256, 3, 3) * 0.02
        weight = weight.abs()  # truncation errors of the same sign accumulate
        x = x.abs()
        leaf, weight64 = weight.clone().requires_grad_(), weight.double().requires_grad_()
        expected = reference.flow_conv2d(x.double(), None, weight64)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), weight64)
        errors = {}
        for algorithm in ("direct", *self.factors):
            y = ops.flow_conv2d(x, None, leaf, algorithm=algorithm)
            (gradient,) = torch.autograd.grad(y.sum(), leaf)
            pairs = ((y.detach(), expected.detach()), (gradient, expected_gradient))
            errors[algorithm] = [float((first - second).abs().max() / second.max()) for first, second in pairs]
        assert max(errors["tf32x3"]) < (3e-6 if HAS_TENSOR_CORES else 1e-5)
        assert max(errors["tf32"]) < 1e-3
        if HAS_TENSOR_CORES:
            assert min(errors["tf32"]) > 1e-5, "this is not TF32"

    @of_each
    def test_names_on_the_cpu(self, algorithm):
        if HAS_TENSOR_CORES:
            pytest.skip("tests how the CPU resolves the names of CUDA algorithms")
        x, weight = torch.randn(1, 40, 30, 31), torch.randn(40, 40, 3, 3)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            leaf, map_ = weight.to(dtype).requires_grad_(), x.to(dtype)
            results = []
            for name in (algorithm, "auto"):
                y = ops.flow_conv2d(map_, None, leaf, algorithm=name)
                packed = ops.flow_conv2d(map_, None, ops.pack_conv3x3(leaf.detach(), None, name))
                results.append([y, packed, *torch.autograd.grad(y.sum(), leaf)])
            assert all(torch.equal(first, second) for first, second in zip(*results))

    @of_each
    def test_values(self, algorithm):
        """NaN reaches only its neighborhood, and an infinity does not give finite results."""
        x = torch.zeros(1, 2, 9, 20)
        x[0, 0, 2, 2], x[0, 1, 6, 17] = float("nan"), float("inf")
        result = ops.flow_conv2d(x, None, torch.ones(3, 2, 3, 3), algorithm=algorithm)
        assert result[:, :, 1:4, 1:4].isnan().all() and not result[:, :, 5:8, 16:19].isfinite().any()
        assert result.isfinite().sum() == 3 * (9 * 20 - 18)

    @of_each
    def test_fused_subnets(self, algorithm):
        """A launch may mix algorithms, and the composition of operators gives the same bits."""
        convs = [(torch.randn(24, 24, 3, 3) / 12, torch.randn(24)) for _ in range(4)]
        packed = [ops.pack_conv3x3(*conv, name) for conv, name in zip(convs, (algorithm, "direct", "auto", algorithm))]
        lists = {"cls": packed[:1], "reg": packed[1:2], "stuff": convs[2:3], "flow_cls": packed[3:], "thing": convs[:1]}
        parameters = ops.SubnetParameters(**{name: tuple(value) for name, value in lists.items()})
        levels = [torch.randn(2, 24, *size) for size in ((9, 11), (5, 3), (2, 2))]
        actual = ops.fused_subnets(levels, parameters, algorithm)
        tracked = ops.fused_subnets([level.clone().requires_grad_() for level in levels], parameters, algorithm)
        for first, second in zip(actual, tracked):
            assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.usefixtures("precision_restored")
class TestAuto:
    """On CUDA, "auto" in float32 follows torch's precision setting for convolutions at the time of the call."""

    @staticmethod
    def codes(dtype=torch.float32, device="cuda", algorithm="auto") -> list:
        with FakeTensorMode(), Codes() as codes:
            x = torch.empty(1, 33, 6, 6, dtype=dtype, device=device)
            weight = torch.empty(33, 33, 3, 3, dtype=dtype, device=device)
            ops.flow_conv2d(x, None, weight, algorithm=algorithm)
            packed = ops.pack_conv3x3(weight, None, algorithm)
            ops.flow_conv2d(x, None, packed)
            ops.fused_subnets([x], ops.SubnetParameters(cls=(packed, packed), segmentation_levels=0), "direct")
        return [code for _, code in codes.seen]

    @pytest.mark.parametrize("allow", [True, False])
    @pytest.mark.parametrize("way", ["allow_tf32", "conv.fp32_precision", "cudnn.fp32_precision", "mixed"])
    def test_settings_of_torch(self, allow, way):
        cudnn, precision = torch.backends.cudnn, "tf32" if allow else "ieee"
        cudnn.conv.fp32_precision = "none"
        before = cudnn.fp32_precision
        try:
            if way == "allow_tf32":
                cudnn.allow_tf32 = allow
            elif way == "cudnn.fp32_precision":
                cudnn.fp32_precision = precision
            else:
                if way == "mixed":  # reading the old setting raises in this state
                    cudnn.allow_tf32 = not allow
                cudnn.conv.fp32_precision = precision
            code = CODES["tf32" if allow else "auto"]
            assert self.codes() == [code, code, [code, code]]
        finally:
            cudnn.fp32_precision = before

    def test_only_auto_in_float32_on_cuda(self):
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert self.codes(dtype) == [0, 0, [0, 0]]
        assert self.codes(device="cpu") == [0, 0, [0, 0]]
        for name, code in CODES.items():
            if name != "auto":
                assert self.codes(algorithm=name) == [code, code, [code, code]]

    def test_compile(self, monkeypatch):
        """torch.compile reads the setting during tracing as a constant, without a graph break."""
        module = sys.modules[algorithm_code.__module__]
        monkeypatch.setattr(module, "_may_use_tf32", lambda x: module._allows_tf32())  # as if `x` were on CUDA
        x, weight = torch.randn(1, 33, 6, 6), torch.randn(33, 33, 3, 3)
        packed = ops.pack_conv3x3(weight)
        for setting, code in (("tf32", CODES["tf32"]), ("ieee", CODES["auto"])):
            torch.backends.cudnn.conv.fp32_precision = setting
            graph_codes = []

            def backend(graph, inputs):
                for node in graph.graph.nodes:
                    if "spatialflow" in str(node.target):
                        graph_codes.append(node.args[-1])
                return graph.forward

            torch._dynamo.reset()
            call = torch.compile(
                lambda t: (ops.flow_conv2d(t, None, weight), ops.flow_conv2d(t, None, packed)),
                backend=backend,
                fullgraph=True,
            )
            assert_near(list(call(x)), [ops.flow_conv2d(x, None, weight)] * 2, torch.float32)
            assert graph_codes == [code, code]
