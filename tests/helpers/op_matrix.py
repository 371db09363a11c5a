# SPDX-License-Identifier: Apache-2.0
"""Tests that every operator must pass, shared through the base class `OpMatrix`.

A test file subclasses `OpMatrix` with samples; pytest then runs each test of the class for each sample:

    class TestRoiAlign(OpMatrix):
        has_gradient = True
        samples = {"adaptive": lambda: OpSample(...), ...}
        linear_samples = tuple(samples)
        thin_samples = {"one row": lambda: OpSample(...), ...}

Tests that do not apply to an operator are not generated. With `has_gradient = False`, `test_no_gradient` replaces the
tests of gradients. Second derivatives are tested only for samples in `linear_samples`. Other classes of the same file
test behavior specific to the operator: bad values, ties, errors, and defects of other libraries.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tensors import DEVICE, EXPANDED, LAYOUTS, THIN_LAYOUTS, assert_near, leaves, map_tensors

# Gradients that are summed by atomics differ between runs on a GPU in the last bits, unless torch is set to be
# deterministic.
NONDETERMINISM = 0.0 if DEVICE == "cpu" else 1e-9

SLOW_GRADCHECK_ELEMENTS = 600
"""Largest number of elements of inputs and results for which slow gradcheck takes less than about two seconds."""


@dataclass
class OpSample:
    """Arguments of one call: `op(*tensors, **options)`, and of the reference implementation.

    Attributes:
        op: the public operator.
        reference: its reference implementation.
        tensors: positional arguments; items may be lists of tensors.
        options: keyword arguments.
        differentiable: indices of the tensors with a gradient.
        converted: indices of the tensors that get the tested dtype; others (boxes, scores) keep theirs.
        raw: takes the tensors and options; returns the raw operator and its arguments for the same call.
        images: indices of tensors (or lists) with layout (N, C, H, W).
        resized: returns tensors of another size, for dynamic shapes.
        unpredicted_errors: pattern of errors that the operator raises and its fake kernel does not.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: list
    options: dict = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0,)
    converted: tuple[int, ...] = (0,)
    raw: Callable[..., tuple[Any, tuple]] | None = None
    images: tuple[int, ...] = (0,)
    resized: Callable[[int], list] | None = None
    unpredicted_errors: str = "$^"


GRAD_MODES = {"default": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class FunctionRecorder(TorchFunctionMode):
    """Record the functions that are called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class DispatchRecorder(TorchDispatchMode):
    """Record the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class RecordingTensor(Tensor):
    """A tensor that records the functions called on it; results have the same class."""

    calls: list[Callable] = []

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def metadata(value: Any) -> list[tuple]:
    """Return the metadata of every tensor: dtype, shape, and the strides of dimensions of size above 1.

    If a size is a symbol, the metadata are the dtype and the number of dimensions.
    """
    result: list[tuple] = []
    for t in leaves(value):
        if all(isinstance(size, int) for size in t.shape):
            strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]
            result.append((t.dtype, tuple(t.shape), strides))
        else:
            result.append((t.dtype, t.dim()))
    return result


def assert_described(fake: Any, real: Any, what: str) -> None:
    """Assert that two results of `outcome` or `metadata` agree, except for sizes that are symbols."""
    if isinstance(fake, list) and isinstance(real, list):
        real = [r if len(f) == 3 else (r[0], len(r[1])) for f, r in zip(fake, real, strict=True)]
    assert fake == real, f"fake kernel, {what}"


def outcome(op: Callable, args: Sequence) -> Any:
    """Return the metadata of the result, or the first line of the error."""
    try:
        return metadata(op(*args))
    except RuntimeError as error:
        return str(error).splitlines()[0]


def invalid_variants(value: Any) -> list:
    """Return variations of an argument; most of them are invalid for every operator."""
    if isinstance(value, Tensor):
        dtype = torch.int16 if value.is_floating_point() else torch.float32
        shorter = [value.narrow(d, 0, n) for d, size in enumerate(value.shape) for n in {0, size - 1} if n >= 0]
        return [value[None], value.flatten(), value.to(dtype), *shorter]
    if isinstance(value, (list, tuple)) and value:
        return [[], value[:-1], *([*value[:-1], last] for last in invalid_variants(value[-1]))]
    if isinstance(value, int) and not isinstance(value, bool):
        return [-1, 0, value + 1]
    return [float("nan"), float("inf"), -1.0] if isinstance(value, float) else []


def to_dtype(sample: OpSample, dtype: torch.dtype) -> list:
    return [
        map_tensors(lambda t: t.to(dtype), value) if index in sample.converted else value
        for index, value in enumerate(sample.tensors)
    ]


def assert_unchanged_by_autocast(sample: OpSample) -> None:
    """Assert that autocast to bfloat16 changes neither the values nor the dtypes of the results for float32 inputs."""
    tensors = to_dtype(sample, torch.float32)
    expected = leaves(sample.op(*tensors, **sample.options))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = leaves(sample.op(*tensors, **sample.options))
    assert len(results) == len(expected)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))


GRADIENT_TESTS = frozenset(
    {
        "test_gradient_against_reference",
        "test_gradcheck",
        "test_slow_gradcheck",
        "test_gradgradcheck",
        "test_func_transforms",
        "test_compiled_func_transforms",
    }
)


class OpMatrix:
    """Base class of the tests of an operator.

    Attributes:
        samples: name -> function that makes an `OpSample` in float64.
        thin_samples: the same with sizes of 1 and 0, for `test_thin_layouts` and `test_slow_gradcheck` only.
        dtypes: dtypes of the tensors in `OpSample.converted`.
        has_gradient: whether the operator has a gradient; every subclass must set it.
        linear_samples: names of samples that are linear in their differentiable tensors, so that second derivatives
            exist; set exactly if the operator has a gradient.
    """

    samples: dict[str, Callable[[], OpSample]] = {}
    thin_samples: dict[str, Callable[[], OpSample]]
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    has_gradient: bool
    linear_samples: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        if "has_gradient" not in vars(cls) or cls.has_gradient != ("linear_samples" in vars(cls)):
            raise TypeError(f"{cls.__name__} must set has_gradient, and linear_samples exactly if that is True")
        if cls.has_gradient and not set(cls.linear_samples) <= set(cls.samples):
            raise TypeError(f"{cls.__name__}.linear_samples names samples that it does not have")
        if not vars(cls).get("thin_samples"):
            raise TypeError(f"{cls.__name__} must set thin_samples")
        omitted = {"test_no_gradient"} if cls.has_gradient else GRADIENT_TESTS
        if cls.has_gradient and not cls.linear_samples:
            omitted = omitted | {"test_gradgradcheck"}
        for name in omitted:
            setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "make_sample" in metafunc.fixturenames:
            samples = self._samples_of(metafunc.function.__name__)
            metafunc.parametrize("make_sample", samples.values(), ids=samples)
        if "make_thin_sample" in metafunc.fixturenames:
            names = list(self.thin_samples)
            metafunc.parametrize("make_thin_sample", [self.thin_samples[name] for name in names], ids=names)
            # float64 and float16: kernels for 16-bit dtypes differ.
            dtypes = [dtype for dtype in self.dtypes if dtype in (torch.float64, torch.float16)] or self.dtypes[:1]
            metafunc.parametrize("thin_dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=lambda d: str(d).removeprefix("torch."))

    def _samples_of(self, test: str) -> dict[str, Callable[[], OpSample]]:
        """Return the samples, by name, of the test with the name `test`."""
        if test == "test_gradgradcheck":
            return {name: self.samples[name] for name in self.linear_samples}
        if test == "test_slow_gradcheck":
            candidates = self.samples | self.thin_samples
            elements = {name: self._elements(make_sample()) for name, make_sample in candidates.items()}
            small = [name for name, count in elements.items() if count <= SLOW_GRADCHECK_ELEMENTS]
            name = max(small, key=elements.get) if small else min(elements, key=elements.get)
            return {name: candidates[name]}
        return self.samples

    def _elements(self, sample: OpSample) -> float:
        """Return the number of elements of the differentiable tensors and the results; infinity if one is empty."""
        function, inputs = self._bound(sample, sample.tensors)
        sizes = [leaf.numel() for leaf in [*inputs, *leaves(function(*inputs))]]
        return sum(sizes) if all(sizes) else math.inf

    def _bound(self, sample: OpSample, tensors: list) -> tuple[Callable, list[Tensor]]:
        """Return the operator as a function of the leaves of its differentiable tensors, and those leaves."""
        which = sample.differentiable
        inputs = [leaf for index in which for leaf in leaves(tensors[index])]

        def function(*flat: Tensor) -> Any:
            rest, args = list(flat), list(tensors)
            for index in which:
                args[index] = map_tensors(lambda _: rest.pop(0), tensors[index])
            result = leaves(sample.op(*args, **sample.options))
            return result[0] if len(result) == 1 else tuple(result)

        return function, inputs

    def test_reference(self, make_sample: Callable[[], OpSample], dtype: torch.dtype) -> None:
        """The kernel agrees with the reference implementation in float64 on the same rounded inputs."""
        sample = make_sample()
        tensors = to_dtype(sample, dtype)
        actual = sample.op(*tensors, **sample.options)
        tensors64 = [
            map_tensors(lambda t: t.double(), value) if index in sample.converted else value
            for index, value in enumerate(tensors)
        ]
        assert_near(actual, sample.reference(*tensors64, **sample.options), dtype)
        assert all(leaf.dtype == dtype for leaf in leaves(actual) if leaf.is_floating_point())

    def test_gradient_against_reference(self, make_sample: Callable[[], OpSample], dtype: torch.dtype) -> None:
        """Reverse-mode gradients agree with autograd through the reference implementation, in every dtype."""
        sample = make_sample()
        tensors = to_dtype(sample, dtype)
        function, inputs = self._bound(sample, tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = leaves(function(*inputs))
        grads = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
        actual = torch.autograd.grad(outputs, inputs, grads)
        tensors64 = [
            map_tensors(lambda t: t.double(), value) if index in sample.converted else value
            for index, value in enumerate(tensors)
        ]
        as_reference = OpSample(**{**sample.__dict__, "op": sample.reference})
        function, inputs64 = self._bound(as_reference, tensors64)
        inputs64 = [t.detach().requires_grad_() for t in inputs64]
        expected = torch.autograd.grad(
            leaves(function(*inputs64)), inputs64, [g.double() for g in grads], allow_unused=True
        )
        expected = [torch.zeros_like(i) if e is None else e for i, e in zip(inputs64, expected, strict=True)]
        assert_near(list(actual), expected, dtype, factor=4, what="gradient")

    def test_gradcheck(self, make_sample: Callable[[], OpSample]) -> None:
        """Reverse and forward mode agree with finite differences in float64."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        assert inputs, "an op with a gradient names its differentiable tensors"
        inputs = [t.detach().double().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, nondet_tol=NONDETERMINISM, fast_mode=True
        )

    def test_slow_gradcheck(self, make_sample: Callable[[], OpSample]) -> None:
        """The whole Jacobian agrees with finite differences, element by element; fast mode tests random projections."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, nondet_tol=NONDETERMINISM, fast_mode=False
        )

    def test_gradgradcheck(self, make_sample: Callable[[], OpSample]) -> None:
        """Second derivatives exist if the operator is linear in its differentiable tensors."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double().requires_grad_() for t in inputs]
        assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=NONDETERMINISM, fast_mode=True)

    def test_no_gradient(self, make_sample: Callable[[], OpSample]) -> None:
        """The result of an operator without gradient does not require one."""
        sample = make_sample()
        assert not sample.differentiable
        tensors = [
            map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, value)
            for value in sample.tensors
        ]
        assert not any(leaf.requires_grad for leaf in leaves(sample.op(*tensors, **sample.options)))

    @pytest.mark.parametrize("grad_mode", GRAD_MODES)
    def test_recorded(self, make_sample: Callable[[], OpSample], grad_mode: str) -> None:
        """Modes of torch, tensor subclasses and the profiler record a call without gradients and keep its result."""
        sample = make_sample()
        raw = sample.raw(*sample.tensors, **sample.options)[0].default
        expected = leaves(sample.op(*sample.tensors, **sample.options))

        def called(tensors: list) -> list[Tensor]:
            with GRAD_MODES[grad_mode]():
                return leaves(sample.op(*tensors, **sample.options))

        def assert_same(results: list[Tensor]) -> None:
            assert_near(results, expected, torch.float64, what=grad_mode)

        for recorder in (FunctionRecorder(), DispatchRecorder()):
            with recorder:
                assert_same(called(sample.tensors))
            assert raw in recorder.calls, type(recorder).__name__
        RecordingTensor.calls.clear()
        results = called([map_tensors(lambda t: t.as_subclass(RecordingTensor), value) for value in sample.tensors])
        assert raw in RecordingTensor.calls and all(type(leaf) is RecordingTensor for leaf in results)
        assert_same([leaf.as_subclass(Tensor) for leaf in results])
        if grad_mode != "inference_mode":  # there, torch fails on views of TwoTensors
            results = called([map_tensors(lambda t: TwoTensor(t, t), value) for value in sample.tensors])
            assert all(type(leaf) is TwoTensor for leaf in results)
            assert_same([leaf.a for leaf in results])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert_same(called(sample.tensors))
        assert raw.name().split(".")[0] in [event.name for event in profile.events()]

    def test_opcheck(self, make_sample: Callable[[], OpSample]) -> None:
        """Schema, autograd registration, fake kernel and AOT dispatch of the raw operator are consistent."""
        sample = make_sample()
        assert sample.raw is not None, "every sample has a raw operator"
        op, args = sample.raw(*sample.tensors, **sample.options)
        differentiable = {id(leaf) for index in sample.differentiable for leaf in leaves(sample.tensors[index])}
        args = [
            map_tensors(lambda t: t.detach().clone().requires_grad_() if id(t) in differentiable else t, arg)
            for arg in args
        ]
        torch.library.opcheck(op, tuple(args))
        # The fake kernel must predict the result's strides for other layouts too, including slices.
        for layout in (LAYOUTS["channels last"], LAYOUTS["channels-last slice"]):
            tensors = [
                map_tensors(layout, value) if index in sample.images else value
                for index, value in enumerate(sample.tensors)
            ]
            op, args = sample.raw(*tensors, **sample.options)
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))

    def test_func_transforms(self, make_sample: Callable[[], OpSample]) -> None:
        """torch.func grad, vjp, jvp and vmap agree with autograd and a loop."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double() for t in inputs]
        outputs = leaves(function(*inputs))
        weights = [torch.randn_like(o) for o in outputs]

        def scalar(*flat: Tensor) -> Tensor:
            return sum((o * w).sum() for o, w in zip(leaves(function(*flat)), weights, strict=True))

        tracked = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(scalar(*tracked), tracked)
        numbers = tuple(range(len(inputs)))
        assert_near(list(torch.func.grad(scalar, argnums=numbers)(*inputs)), list(expected), torch.float64)
        _, pullback = torch.func.vjp(function, *inputs)
        cotangent = weights[0] if len(weights) == 1 else tuple(weights)
        assert_near(list(pullback(cotangent)), list(expected), torch.float64)
        tangents = tuple(torch.randn_like(t) for t in inputs)
        _, pushed = torch.func.jvp(function, tuple(inputs), tangents)
        forward = sum((p * w).sum() for p, w in zip(leaves(pushed), weights, strict=True))
        backward = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
        torch.testing.assert_close(forward, backward)
        stacked = tuple(torch.stack([t, t * 0.5]) for t in inputs)
        mapped = torch.func.vmap(function)(*stacked)
        halves = function(*(t * 0.5 for t in inputs))
        for batch, output, half in zip(leaves(mapped), outputs, leaves(halves), strict=True):
            assert_near([batch[0], batch[1]], [output, half], torch.float64)

    def test_compiled_func_transforms(self, make_sample: Callable[[], OpSample]) -> None:
        """torch.func grad and jvp agree inside and outside torch.compile; forward mode does not return zeros."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double() for t in inputs]
        tangents = tuple(torch.randn_like(t) for t in inputs)
        weights = [torch.randn_like(o) for o in leaves(function(*inputs))]

        def scalar(*flat: Tensor) -> Tensor:
            return sum((o * w).sum() for o, w in zip(leaves(function(*flat)), weights, strict=True))

        def derivatives(*flat: Tensor) -> list[Tensor]:
            gradients = torch.func.grad(scalar, argnums=tuple(range(len(flat))))(*flat)
            return [*gradients, torch.func.jvp(scalar, flat, tangents)[1]]

        torch._dynamo.reset()
        compiled = torch.compile(derivatives, backend="aot_eager", fullgraph=True)
        assert_near(compiled(*inputs), derivatives(*inputs), torch.float64)

    def test_one_device(self, make_sample: Callable[[], OpSample]) -> None:
        """Mixing meta and real tensors raises instead of returning uninitialized memory."""
        sample = make_sample()
        op, args = sample.raw(*sample.tensors, **sample.options)
        indices = [index for index, value in enumerate(args) if leaves(value)]
        if sum(len(leaves(args[index])) for index in indices) < 2:
            return
        for index in indices:
            moved = map_tensors(lambda t: t.to("meta"), args[index])
            if isinstance(args[index], (list, tuple)):
                moved = [*args[index][:-1], moved[-1]]
            with pytest.raises(RuntimeError, match=r"^(?!_).*: .* must be on the device of"):
                op(*args[:index], moved, *args[index + 1 :])

    def test_compile(self, make_sample: Callable[[], OpSample]) -> None:
        """torch.compile traces the operator in one graph, once for all sizes, forward and backward."""
        sample = make_sample()
        torch._dynamo.reset()

        def call(*tensors: Any) -> Any:
            return sample.op(*tensors, **sample.options)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
        assert sample.resized is not None, "every sample has other sizes"
        for size in range(3):
            tensors = sample.resized(size)
            inputs = []
            for index in sample.differentiable:
                tensors[index] = map_tensors(lambda t: t.detach().requires_grad_(), tensors[index])
                inputs += leaves(tensors[index])
            # The first call compiles. A later call raises if it would compile again.
            with torch.compiler.set_stance("fail_on_recompile" if size else "default"):
                actual = leaves(compiled(*tensors))
            expected = leaves(call(*tensors))
            assert_near(actual, expected, torch.float64)
            if inputs:
                grads = [torch.ones_like(o) for o in expected if o.is_floating_point()]
                assert_near(
                    list(torch.autograd.grad([o for o in actual if o.is_floating_point()], inputs, grads)),
                    list(torch.autograd.grad([o for o in expected if o.is_floating_point()], inputs, grads)),
                    torch.float64,
                )

    def test_device(self, make_sample: Callable[[], OpSample]) -> None:
        """Operator and reference create tensors on the device of their inputs, not on torch's default device."""
        sample = make_sample()
        tensors = [map_tensors(torch.clone, value) for value in sample.tensors]
        for function in (sample.op, sample.reference):
            with torch.device("meta"):
                result = function(*tensors, **sample.options)
            assert all(leaf.device.type == DEVICE for leaf in leaves(result))

    def test_layouts(self, make_sample: Callable[[], OpSample]) -> None:
        """Strides of inputs and incoming gradients do not change the result; channels-last stays channels-last."""
        sample = make_sample()
        plain = sample.op(*sample.tensors, **sample.options)
        for name, layout in LAYOUTS.items():
            tensors = [
                map_tensors(layout, value) if index in sample.images else value
                for index, value in enumerate(sample.tensors)
            ]
            result = sample.op(*tensors, **sample.options)
            assert_near(result, plain, torch.float64, what=name)
            if name == "channels last":
                for leaf in leaves(result):
                    if leaf.dim() == 4 and leaf.is_floating_point():
                        assert leaf.is_contiguous(memory_format=torch.channels_last), "channels-last in, not out"
        if not sample.differentiable:
            return
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = leaves(function(*inputs))
        dense = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs], retain_graph=True)
        expanded = torch.autograd.grad(
            outputs, inputs, [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs], retain_graph=True
        )
        assert_near(list(expanded), list(dense), torch.float64, what="expanded gradient")
        transposed = torch.autograd.grad(
            outputs, inputs, [torch.ones_like(o.transpose(-1, -2).contiguous()).transpose(-1, -2) for o in outputs]
        )
        assert_near(list(transposed), list(dense), torch.float64, what="transposed gradient")

    def test_thin_layouts(self, make_thin_sample: Callable[[], OpSample], thin_dtype: torch.dtype) -> None:
        """Results for sizes of 1 and 0 agree with the reference, at any strides of inputs and incoming gradients.

        Fake kernels predict the layout of the results.
        """
        sample = make_thin_sample()
        tensors = map_tensors(lambda t: t.contiguous(), to_dtype(sample, thin_dtype))
        plain, gradients = self._differentiated(sample, tensors)
        tensors64 = [map_tensors(torch.Tensor.double, v) if i in sample.converted else v for i, v in enumerate(tensors)]
        as_reference = OpSample(**{**sample.__dict__, "op": sample.reference})
        expected = self._differentiated(as_reference, tensors64)
        self._assert_equal_up_to_rounding((plain, gradients), expected, thin_dtype, "reference")
        for name, layout in THIN_LAYOUTS.items():
            arranged = map_tensors(layout, tensors)
            assert all(torch.equal(a, b) for a, b in zip(leaves(arranged), leaves(tensors), strict=True))
            result = self._differentiated(sample, arranged, layout)
            self._assert_equal_up_to_rounding(result, (plain, gradients), thin_dtype, name)
            mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
            fake = map_tensors(mode.from_tensor, arranged)
            with mode:
                described = self._differentiated(sample, fake, layout)
            assert_described(metadata(described), metadata(result), name)
        for name, layout in EXPANDED.items():
            arranged = map_tensors(layout, tensors)
            result = self._differentiated(sample, arranged, layout)
            expected = self._differentiated(sample, map_tensors(torch.Tensor.contiguous, arranged), layout)
            self._assert_equal_up_to_rounding(result, expected, thin_dtype, name)

    def test_fake_kernel_refuses_the_same(self, make_sample: Callable[[], OpSample]) -> None:
        """The fake kernel raises the errors of the raw operator, with the same message, or predicts the result."""
        sample = make_sample()
        op, args = sample.raw(*sample.tensors, **sample.options)
        for index, argument in enumerate(args):
            for value in invalid_variants(argument):
                changed = [*args[:index], value, *args[index + 1 :]]
                real = outcome(op, changed)
                if isinstance(real, str) and re.search(sample.unpredicted_errors, real):
                    continue
                mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
                fakes = [map_tensors(mode.from_tensor, value) for value in changed]
                with mode:
                    assert_described(outcome(op, fakes), real, f"argument {index}")

    def _differentiated(self, sample: OpSample, tensors: list, layout: Callable = lambda t: t) -> tuple[list, list]:
        """Return the results, and the gradients of all differentiable tensors for incoming gradients in `layout`."""
        function, inputs = self._bound(sample, tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = leaves(function(*inputs))
        tracked = [output for output in outputs if output.requires_grad]
        if not tracked:
            return outputs, [torch.zeros_like(i) for i in inputs]
        generator = torch.Generator(device="cpu").manual_seed(0)
        # Numbers that every tested dtype represents, so that operator and reference get the same ones.
        incoming = [torch.randn(o.shape, generator=generator, dtype=torch.float16, device="cpu").to(o) for o in tracked]
        gradients = torch.autograd.grad(tracked, inputs, [layout(g) for g in incoming], allow_unused=True)
        return outputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]

    def _assert_equal_up_to_rounding(self, actual: tuple, expected: tuple, dtype: torch.dtype, what: str) -> None:
        assert_near(actual[0], expected[0], dtype, what=f"{what}: result")
        assert_near(actual[1], expected[1], dtype, factor=4, what=f"{what}: gradient")

    def test_autocast(self, make_sample: Callable[[], OpSample]) -> None:
        """Under autocast float32 features are cast to the autocast dtype; boxes and scores keep theirs."""
        sample = make_sample()
        tensors = to_dtype(sample, torch.float32)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = sample.op(*tensors, **sample.options)
        expected = sample.op(*to_dtype(sample, torch.bfloat16), **sample.options)
        assert_near(actual, expected, torch.bfloat16)
        if sample.converted:
            assert any(leaf.dtype == torch.bfloat16 for leaf in leaves(actual) if leaf.is_floating_point())

    def test_deterministic(self, make_sample: Callable[[], OpSample]) -> None:
        """Under use_deterministic_algorithms two runs agree to the last bit, gradients included."""
        sample = make_sample()
        torch.use_deterministic_algorithms(True)
        try:
            runs = []
            for _ in range(2):
                function, inputs = self._bound(sample, to_dtype(sample, torch.float32))
                inputs = [t.detach().requires_grad_() for t in inputs]
                if not inputs:
                    runs.append(leaves(sample.op(*sample.tensors, **sample.options)))
                    continue
                outputs = leaves(function(*inputs))
                runs.append(outputs + list(torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
