# SPDX-License-Identifier: Apache-2.0
"""deform_conv2d in float32 on tensor cores: errors of each algorithm, exact cases, and the resolution of "auto"."""

import os
import sys

import pytest
import torch
from helpers.algorithm_codes import Codes
from helpers.tensors import DEVICE, assert_near
from test_deform_conv2d import deterministic, off_grid
from torch._subclasses.fake_tensor import FakeTensorMode

from spatialflow import ops
from spatialflow.ops import reference
from spatialflow.ops.flow_conv2d import algorithm_code

HAS_TENSOR_CORES = not os.environ.get("SPATIALFLOW_BACKEND", "cpu").startswith("cpu")
CODES = {"auto": 0, "direct": 2, "tf32": 3, "tf32x3": 4}
FACTORS = {"tf32": 50, "tf32x3": 1}  # multiples of the tolerance of float32, 2e-5
NAMES = ("result", "input", "offset", "weight", "bias", "mask", "input, deterministic")
each_algorithm = pytest.mark.parametrize("algorithm", list(FACTORS))

# channels, outputs, groups, offset groups, kernel, (height, width). Tiles have 64, 128 or 256 columns. A column is an
# output channel in the forward pass and the weight gradient, and an input channel in the data gradient.
CASES = {
    "channels that do not fill a vector": (5, 3, 1, 1, 3, (5, 6)),
    "tiles of 64": (20, 36, 1, 1, 3, (7, 9)),
    "tiles of 128": (96, 104, 1, 2, 3, (6, 7)),
    "tiles of 256": (264, 200, 1, 1, 1, (9, 9)),
    "groups": (24, 16, 2, 3, 2, (6, 7)),
    "tiles of 128 pixels": (16, 264, 1, 1, 1, (83, 81)),
}
each_case = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def tensors_of(channels, outputs, groups, offset_groups, kernel, size) -> list[torch.Tensor]:
    """Make input, offset, weight, bias and mask in float32; values use all bits of the mantissa."""
    padding = kernel // 2
    out = [side + 2 * padding - kernel + 1 for side in size]
    samples = offset_groups * kernel * kernel
    return [
        torch.randn(1, channels, *size),
        off_grid(1.5 * torch.randn(1, 2 * samples, *out, dtype=torch.float64)).float(),
        torch.randn(outputs, channels // groups, kernel, kernel) / (channels // groups * kernel),
        torch.randn(outputs),
        torch.rand(1, samples, *out),
    ]


def results(op, tensors, dtype, grad_output, algorithm="auto") -> list[torch.Tensor]:
    """Return the result, all gradients, and the input gradient once more, by the deterministic kernel."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    input, offset, weight, bias, mask = leaves
    y = op(input, offset, weight, bias, padding=weight.shape[2] // 2, mask=mask, algorithm=algorithm)
    grad_output = grad_output(y.detach()).to(dtype)
    gradients = torch.autograd.grad(y, leaves, grad_output, retain_graph=True)
    with deterministic():
        (gathered,) = torch.autograd.grad(y, input, grad_output)
    return [y.detach(), *gradients, gathered]


class TestErrors:
    @each_algorithm
    @each_case
    def test_against_float64(self, algorithm, case):
        """Errors are at most 1e-3 of the maximum with "tf32", and at most 2e-5 with "tf32x3", as in float32."""
        tensors = tensors_of(*case)
        grad_output = torch.randn(1, case[1], *tensors[4].shape[2:])
        actual = results(ops.deform_conv2d, tensors, torch.float32, lambda y: grad_output, algorithm)
        expected = results(reference.deform_conv2d, tensors, torch.float64, lambda y: grad_output)
        for name, result, wanted in zip(NAMES, actual, expected):
            assert_near([result], [wanted], torch.float32, factor=FACTORS[algorithm], what=name)
        if HAS_TENSOR_CORES and algorithm == "tf32":
            # A lower bound of the error shows that TF32 was used, except in the gradient of the bias, which has no
            # products. The maximum of the result is taken without the bias. TF32 does not round the bias, which is
            # several times as large as the sums of products.
            products = [expected[0] - tensors[3].double()[:, None, None], *expected[1:]]
            for name, result, wanted, of_products in zip(NAMES, actual, expected, products):
                error = float((result.double() - wanted).abs().max() / of_products.abs().max())
                assert name == "bias" or error > 1e-5, f"{name} is not computed in TF32: {error:.1e}"

    @each_algorithm
    @each_case
    def test_short_numbers_are_exact(self, algorithm, case):
        """Results are exact if 11 bits hold every input and 24 bits every sum."""
        input, offset, weight, bias, mask = tensors_of(*case)
        integers = [(4 * t).round().clamp(-7, 7) for t in (input, 8 * weight, bias)]
        # Offsets are multiples of a quarter and the mask is 1, so a sample has at most seven bits.
        tensors = [integers[0], (offset * 4).floor() / 4, *integers[1:], torch.ones_like(mask)]
        computed = [
            results(op, tensors, dtype, lambda y: (y / 16).round().clamp(-3, 3), algorithm)
            for op, dtype in ((ops.deform_conv2d, torch.float32), (reference.deform_conv2d, torch.float64))
        ]
        for name, first, second in zip(NAMES, *computed):
            assert torch.equal(first.double(), second), name

    def test_long_sums(self):
        """Sums over 2304 products and over 1920 pixels are accurate with "tf32x3", although tensor cores truncate."""
        input, offset, weight, _, mask = tensors_of(256, 8, 1, 1, 3, (40, 48))
        input, weight = input.abs(), weight.abs()  # truncation errors of the same sign accumulate
        computed = {}
        for name, op, dtype in (
            ("float64", reference.deform_conv2d, torch.float64),
            *((name, ops.deform_conv2d, torch.float32) for name in ("direct", *FACTORS)),
        ):
            leaf = weight.to(dtype).requires_grad_()
            algorithm = name if op is ops.deform_conv2d else "auto"
            y = op(*(t.to(dtype) for t in (input, offset)), leaf, None, 1, 1, 1, mask.to(dtype), algorithm)
            computed[name] = (y.detach(), torch.autograd.grad(y.sum(), leaf)[0])
        expected = computed.pop("float64")
        errors = {
            name: [float((first - second).abs().max() / second.max()) for first, second in zip(tensors, expected)]
            for name, tensors in computed.items()
        }
        assert max(errors["tf32x3"]) < 3e-6 and max(errors["direct"]) < 3e-6, errors
        assert max(errors["tf32"]) < 1e-3, errors
        if HAS_TENSOR_CORES:
            assert min(errors["tf32"]) > 1e-5, "this is not TF32"


class TestNumbers:
    @each_algorithm
    def test_names_on_the_cpu(self, algorithm):
        if HAS_TENSOR_CORES:
            pytest.skip("tests how the CPU resolves the names of CUDA algorithms")
        tensors = tensors_of(*CASES["groups"])
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            leaves = [t.to(dtype) for t in tensors]
            weight = leaves[2].requires_grad_()
            computed = []
            for name in (algorithm, "auto", "direct"):
                y = ops.deform_conv2d(*leaves[:4], padding=1, mask=leaves[4], algorithm=name)
                computed.append((y, *torch.autograd.grad(y.sum(), weight)))
            assert all(torch.equal(first, second) for result in computed for first, second in zip(result, computed[0]))

    def test_auto_is_tf32x3(self):
        """If torch does not allow TF32, "auto" is "tf32x3"; on the SIMT interpreter (docs/simt.md) it always is."""
        if not HAS_TENSOR_CORES:
            pytest.skip("tests the selection of CUDA kernels")
        tensors = tensors_of(*CASES["groups"])
        gradient = torch.randn_like(results(ops.deform_conv2d, tensors, torch.float32, torch.clone)[0])
        auto, tf32x3, direct = (
            results(ops.deform_conv2d, tensors, torch.float32, lambda y: gradient, name)
            for name in ("auto", "tf32x3", "direct")
        )
        assert torch.equal(auto[0], tf32x3[0]) and torch.equal(auto[3], tf32x3[3])
        assert not torch.equal(auto[0], direct[0]) and not torch.equal(auto[3], direct[3])

    @each_algorithm
    def test_other_dtypes_use_direct(self, algorithm):
        """In dtypes other than float32, "tf32" and "tf32x3" give the result of "direct"."""
        tensors = tensors_of(*CASES["tiles of 64"])
        for dtype in (torch.float64, torch.bfloat16):
            computed = [
                ops.deform_conv2d(
                    *(t.to(dtype) for t in tensors[:4]), padding=1, mask=tensors[4].to(dtype), algorithm=name
                )
                for name in (algorithm, "direct")
            ]
            assert torch.equal(*computed)

    @each_algorithm
    def test_values(self, algorithm):
        """NaN reaches only the pixels that read it, and an infinity does not give finite results."""
        input = torch.zeros(1, 8, 9, 20)
        input[0, 0, 2, 2], input[0, 1, 6, 17] = float("nan"), float("inf")
        offset = torch.zeros(1, 18, 9, 20)
        result = ops.deform_conv2d(input, offset + 0.5, torch.ones(3, 8, 3, 3), padding=1, algorithm=algorithm)
        assert result[:, :, 0:4, 0:4].isnan().all() and not result[:, :, 4:8, 15:19].isfinite().any()
        assert result.isfinite().sum() == 3 * (9 * 20 - 32)

    @each_algorithm
    def test_derivatives_of_derivatives(self, algorithm):
        """Second derivatives use the same algorithm and are near the reference."""
        tensors = tensors_of(*CASES["groups"])

        def second(op, dtype):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            input, offset, weight, bias, mask = leaves
            y = op(input, offset, weight, bias, padding=1, mask=mask, algorithm=algorithm)
            first = torch.autograd.grad(y.square().sum(), leaves[:3], create_graph=True)
            return list(torch.autograd.grad(sum(t.sin().sum() for t in first), leaves[:3]))

        actual, expected = second(ops.deform_conv2d, torch.float32), second(reference.deform_conv2d, torch.float64)
        assert_near(actual, expected, torch.float32, factor=8 * FACTORS[algorithm])


@pytest.mark.usefixtures("precision_restored")
class TestAuto:
    """On CUDA, "auto" in float32 follows torch's precision setting for convolutions at the time of the call."""

    @staticmethod
    def codes(dtype=torch.float32, device="cuda", algorithm="auto") -> list[int]:
        with FakeTensorMode(), Codes() as codes:
            tensors = [torch.empty(t.shape, dtype=dtype, device=device) for t in tensors_of(*CASES["groups"])]
            ops.deform_conv2d(*tensors[:4], padding=1, mask=tensors[4], algorithm=algorithm)
        return [code for _, code in codes.seen]

    def test_only_auto_in_float32_on_cuda(self):
        for setting, code in (("tf32", CODES["tf32"]), ("ieee", CODES["auto"])):
            torch.backends.cudnn.conv.fp32_precision = setting
            assert self.codes() == [code]
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert self.codes(dtype) == [CODES["auto"]]
        assert self.codes(device="cpu") == [CODES["auto"]]
        for name in ("direct", "tf32", "tf32x3"):
            assert self.codes(algorithm=name) == [CODES[name]]

    @pytest.mark.parametrize("algorithm", list(CODES))
    def test_derivatives_follow_the_call(self, monkeypatch, algorithm):
        """First and second derivatives use the algorithm of the call, even if torch's setting has changed."""
        module = sys.modules[algorithm_code.__module__]
        monkeypatch.setattr(module, "_may_use_tf32", lambda x: module._allows_tf32())  # as if `x` were on CUDA
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        leaves = [t.requires_grad_() for t in tensors_of(*CASES["groups"])]
        with Codes() as codes:
            y = ops.deform_conv2d(*leaves[:4], padding=1, mask=leaves[4], algorithm=algorithm)
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
        assert {name for name, _ in codes.seen} == {
            "deform_conv2d",
            "_deform_conv2d_backward_data",
            "_deform_conv2d_backward_weight",
        }
        assert {code for _, code in codes.seen} == {CODES["tf32" if algorithm == "auto" else algorithm]}

    def test_autocast_decides_first(self, monkeypatch):
        module = sys.modules[algorithm_code.__module__]
        monkeypatch.setattr(module, "_may_use_tf32", lambda x: x.dtype == torch.float32)  # as if `x` were on CUDA
        input, offset, weight, bias, mask = tensors_of(*CASES["groups"])
        with Codes() as codes:
            ops.deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)
            with torch.autocast(DEVICE, torch.bfloat16):
                ops.deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)
        assert [code for _, code in codes.seen] == [CODES["tf32"], CODES["auto"]]

    def test_compile(self, monkeypatch):
        """torch.compile reads the setting during tracing as a constant, without a graph break."""
        module = sys.modules[algorithm_code.__module__]
        monkeypatch.setattr(module, "_may_use_tf32", lambda x: module._allows_tf32())  # as if `x` were on CUDA
        tensors = tensors_of(*CASES["groups"])
        for setting, code in (("tf32", CODES["tf32"]), ("ieee", CODES["auto"])):
            torch.backends.cudnn.conv.fp32_precision = setting
            graph_codes = []

            def backend(graph, inputs):
                graph_codes.extend(node.args[-1] for node in graph.graph.nodes if "deform_conv2d" in str(node.target))
                return graph.forward

            torch._dynamo.reset()
            call = torch.compile(
                lambda *t: ops.deform_conv2d(*t[:4], padding=1, mask=t[4]), backend=backend, fullgraph=True
            )
            assert_near([call(*tensors)], [ops.deform_conv2d(*tensors[:4], padding=1, mask=tensors[4])], torch.float32)
            assert graph_codes == [code]


class TestRawOperators:
    """Kernels and fake kernels refuse Winograd and unknown algorithm codes."""

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("code, message", [(1, "must not be 1"), (5, "must be 0 .* got 5"), (-1, "got -1")])
    def test_refused(self, device, code, message):
        input, offset, weight, _, mask = (t.to(device) for t in tensors_of(*CASES["groups"]))
        grad_output = torch.zeros(1, 16, *mask.shape[2:], device=device)
        settings = (1, 1, 1, 1, 1, 1, code)
        raw = torch.ops.spatialflow
        calls = (
            lambda: raw.deform_conv2d(input, offset, weight, None, mask, None, *settings),
            lambda: raw._deform_conv2d_backward_data(
                grad_output, input, offset, weight, mask, None, *settings, True, True, False
            ),
            lambda: raw._deform_conv2d_backward_weight(
                grad_output, input, offset, mask, None, *settings, *weight.shape[1:]
            ),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match=rf"deform_conv2d\w*: algorithm .*{message}"):
                call()
