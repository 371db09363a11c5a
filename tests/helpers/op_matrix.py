# SPDX-License-Identifier: Apache-2.0
"""The questions every operator must answer, asked once.

A test file subclasses `OpMatrix` with its samples; pytest then runs each question for each sample:

    class TestRoiAlign(OpMatrix):
        has_gradient = True
        samples = {"adaptive": lambda: OpSample(...), ...}
        linear_samples = tuple(samples)
        thin_samples = {"one row": lambda: OpSample(...), ...}

Questions that an op cannot be asked are not generated: those of gradients where the class says `has_gradient = False`
(it is asked instead whether that is so), second derivatives for samples not in `linear_samples`. Further classes in the
same file hold what is particular to the op: bad values, ties, errors, peers' defects.
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

DEVICE = torch.get_default_device().type  # where the tests' tensors are: see conftest.py

# Gradients that add up by atomics differ between runs on a GPU in the last bits, unless determinism is asked for.
NONDETERMINISM = 0.0 if DEVICE == "cpu" else 1e-9

# Symmetric tolerances against the reference in float64, relative to the largest value of the result. float16 has 11
# bits, bfloat16 8; both round inputs and outputs once, sums are in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class OpSample:
    """One call: `op(*tensors, **options)` and the reference with the same arguments.

    `tensors` may hold lists of tensors. `differentiable` are indices of tensors with a gradient. `converted` are the
    tensors that follow the tested dtype; the others (boxes, scores) keep theirs. `raw` gives the raw operator and its
    arguments for opcheck.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: list
    options: dict = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0,)
    converted: tuple[int, ...] = (0,)
    raw: Callable[..., tuple[Any, tuple]] | None = None
    images: tuple[int, ...] = (0,)  # tensors (or lists) with layout (N, C, H, W)
    resized: Callable[[int], list] | None = None  # tensors of another size, for dynamic shapes
    unforeseen: str = "$^"  # pattern of the refusals that the fake kernel leaves to the operator


# Same values, other strides: what an (N, C, H, W) tensor looks like after common operations.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "channels-last slice": lambda t: torch.cat([t, t], 3).contiguous(memory_format=torch.channels_last)[
        ..., : t.shape[3]
    ],
}


# Shapes (N, C, H, W) for thin samples: each size one, or none. Eight channels make 16 bytes of float16.
THIN_SHAPES = {
    "one image": (1, 8, 5, 6),
    "one channel": (2, 1, 5, 6),
    "one row": (2, 8, 1, 6),
    "one column": (2, 8, 5, 1),
    "one pixel": (2, 8, 1, 1),
    "one value": (1, 1, 1, 1),
    "no images": (0, 8, 5, 6),
    "no channels": (2, 0, 5, 6),
    "no rows": (2, 8, 0, 6),
    "no columns": (2, 8, 5, 0),
}


def with_stride(tensor: Tensor, stride: int) -> Tensor:
    """The same values; `stride` along dimensions of size 1 or 0, where torch allows any."""
    strides = [own if size > 1 else stride for size, own in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(tensor.shape, strides)


def amid_nans(tensor: Tensor) -> Tensor:
    """The same values in a window of a larger tensor that begins at an odd element; NaN (or 99) is around it."""
    sizes = [size + 2 for size in tensor.shape]
    filling = float("nan") if tensor.is_floating_point() else 99
    storage = torch.full((math.prod(sizes) + 1,), filling, dtype=tensor.dtype)
    window = storage[1:].view(sizes)[tuple(slice(1, -1) for _ in sizes)]
    return window.copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


# Same values at strides that torch allows and a kernel has no use for.
THIN_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda t: with_stride(t, 0),
    "stride 5": lambda t: with_stride(t, 5),
    "channels last, stride 1": lambda t: with_stride(channels_last(t), 1),
    "channels last, stride 2^40": lambda t: with_stride(channels_last(t), 2**40),
    "amid NaNs": amid_nans,
    "amid NaNs, stride 3": lambda t: with_stride(amid_nans(t), 3),
}

# Others hold less than their size: one number, or one row again and again.
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda t: t.flatten()[:1].sum().to(t.dtype).expand(t.shape),
    "one row": lambda t: t[:1].expand(t.shape) if t.dim() > 1 else t,
}


GRAD_MODES = {"default": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class FunctionWatch(TorchFunctionMode):
    """Notes the functions that are called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Callable] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class DispatchWatch(TorchDispatchMode):
    """Notes the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Callable] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Watched(Tensor):
    """Notes the functions that are called on it, and makes results of its class."""

    seen: list[Callable] = []

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def metadata(value: Any) -> list[tuple]:
    """Shape, dtype and the strides that matter of every tensor; of a shape that depends on values its length alone."""
    found = []
    for t in leaves(value):
        if all(isinstance(size, int) for size in t.shape):
            strides = [stride for size, stride in zip(t.shape, t.stride()) if size > 1 and t.numel()]
            found.append((t.dtype, tuple(t.shape), strides))
        else:
            found.append((t.dtype, t.dim()))
    return found


def assert_described(fake: Any, real: Any, what: str) -> None:
    """Equal `outcome`s or `metadata`, up to sizes that the fake kernel cannot know."""
    if isinstance(fake, list) and isinstance(real, list):
        real = [other if len(one) == 3 else (other[0], len(other[1])) for one, other in zip(fake, real, strict=True)]
    assert fake == real, f"fake kernel, {what}"


def outcome(op: Callable, args: Sequence) -> Any:
    """The metadata of the result, or with which words the arguments were refused."""
    try:
        return metadata(op(*args))
    except RuntimeError as error:
        return str(error).splitlines()[0]


def wrong_versions(value: Any) -> list:
    """Arguments next to `value`, many of which no operator takes."""
    if isinstance(value, Tensor):
        other = torch.int16 if value.is_floating_point() else torch.float32
        shorter = [value.narrow(d, 0, n) for d, size in enumerate(value.shape) for n in {0, size - 1} if n >= 0]
        return [value[None], value.flatten(), value.to(other), *shorter]
    if isinstance(value, (list, tuple)) and value:
        return [[], value[:-1], *([*value[:-1], last] for last in wrong_versions(value[-1]))]
    if isinstance(value, int) and not isinstance(value, bool):
        return [-1, 0, value + 1]
    return [float("nan"), float("inf"), -1.0] if isinstance(value, float) else []


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [map_tensors(function, item) for item in value]
    return value


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def assert_near(actual: Any, expected: Any, dtype: torch.dtype, factor: float = 1.0, what: str = "result") -> None:
    actual, expected = leaves(actual), leaves(expected)
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected)):
        assert one.shape == other.shape, f"{what}[{index}]: shape {tuple(one.shape)}, expected {tuple(other.shape)}"
        if one.numel() == 0:
            continue
        if not other.is_floating_point():
            assert torch.equal(one, other), f"{what}[{index}] differs"
            continue
        one, other = one.detach().double(), other.detach().double()
        scale = max(float(other.abs().max()), 1e-30, torch.finfo(dtype).smallest_normal)
        error = float((one - other).abs().max()) / scale
        assert error <= TOLERANCE[dtype] * factor, f"{what}[{index}]: error {error:.2e} of the maximum {scale:.3g}"


def to_dtype(sample: OpSample, dtype: torch.dtype) -> list:
    return [
        map_tensors(lambda t: t.to(dtype), value) if index in sample.converted else value
        for index, value in enumerate(sample.tensors)
    ]


GRADIENT_QUESTIONS = frozenset(
    {
        "test_gradient_against_reference",
        "test_gradcheck",
        "test_gradgradcheck",
        "test_func_transforms",
        "test_compiled_func_transforms",
    }
)


class OpMatrix:
    """Subclasses set `samples`: name -> function of no arguments giving an `OpSample` in float64.

    Every subclass says itself whether the op has a gradient, and if so which samples (by name) are linear in their
    differentiable tensors, so that second derivatives exist. `thin_samples` have sizes of one and zero; they are asked
    about layouts alone.
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
        unasked = {"test_no_gradient"} if cls.has_gradient else GRADIENT_QUESTIONS
        if cls.has_gradient and not cls.linear_samples:
            unasked = unasked | {"test_gradgradcheck"}
        for name in unasked:
            setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "sample" in metafunc.fixturenames:
            asked = self.linear_samples if metafunc.function.__name__ == "test_gradgradcheck" else list(self.samples)
            metafunc.parametrize("sample", [self.samples[name] for name in asked], ids=list(asked))
        if "thin" in metafunc.fixturenames:
            names = list(self.thin_samples)
            metafunc.parametrize("thin", [self.thin_samples[name] for name in names], ids=names)
            # The widest and the narrowest: kernels of 16 bits are others.
            dtypes = [dtype for dtype in self.dtypes if dtype in (torch.float64, torch.float16)] or self.dtypes[:1]
            metafunc.parametrize("thin_dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=lambda d: str(d).removeprefix("torch."))

    def _bound(self, sample: OpSample, tensors: list) -> tuple[Callable, list[Tensor]]:
        """The op as a function of the leaves of its differentiable tensors alone, and those leaves."""
        which = sample.differentiable
        inputs = [leaf for index in which for leaf in leaves(tensors[index])]

        def function(*flat: Tensor) -> Any:
            rest, args = list(flat), list(tensors)
            for index in which:
                args[index] = map_tensors(lambda _: rest.pop(0), tensors[index])
            result = leaves(sample.op(*args, **sample.options))
            return result[0] if len(result) == 1 else tuple(result)

        return function, inputs

    def test_reference(self, sample: Callable, dtype: torch.dtype) -> None:
        """The kernel gives the numbers of the reference, computed in float64 from the same rounded inputs."""
        sample = sample()
        tensors = to_dtype(sample, dtype)
        actual = sample.op(*tensors, **sample.options)
        wide = [
            map_tensors(lambda t: t.double(), value) if index in sample.converted else value
            for index, value in enumerate(tensors)
        ]
        assert_near(actual, sample.reference(*wide, **sample.options), dtype)
        assert all(leaf.dtype == dtype for leaf in leaves(actual) if leaf.is_floating_point())

    def test_gradient_against_reference(self, sample: Callable, dtype: torch.dtype) -> None:
        """Reverse-mode gradients equal autograd through the reference, in every dtype."""
        sample = sample()
        tensors = to_dtype(sample, dtype)
        function, inputs = self._bound(sample, tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = leaves(function(*inputs))
        grads = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
        actual = torch.autograd.grad(outputs, inputs, grads)
        wide = [
            map_tensors(lambda t: t.double(), value) if index in sample.converted else value
            for index, value in enumerate(tensors)
        ]
        as_reference = OpSample(**{**sample.__dict__, "op": sample.reference})
        function, wide_inputs = self._bound(as_reference, wide)
        wide_inputs = [t.detach().requires_grad_() for t in wide_inputs]
        expected = torch.autograd.grad(
            leaves(function(*wide_inputs)), wide_inputs, [g.double() for g in grads], allow_unused=True
        )
        expected = [torch.zeros_like(i) if e is None else e for i, e in zip(wide_inputs, expected)]
        assert_near(list(actual), expected, dtype, factor=4, what="gradient")

    def test_gradcheck(self, sample: Callable) -> None:
        """Reverse and forward mode agree with finite differences in float64."""
        sample = sample()
        function, inputs = self._bound(sample, sample.tensors)
        assert inputs, "an op with a gradient names its differentiable tensors"
        inputs = [t.detach().double().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, nondet_tol=NONDETERMINISM, fast_mode=True
        )

    def test_gradgradcheck(self, sample: Callable) -> None:
        """Second derivatives exist where the op is linear in its differentiable tensors."""
        sample = sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double().requires_grad_() for t in inputs]
        assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=NONDETERMINISM, fast_mode=True)

    def test_no_gradient(self, sample: Callable) -> None:
        """An op that is declared to have no gradient does not track any."""
        sample = sample()
        assert not sample.differentiable
        tensors = [
            map_tensors(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, value)
            for value in sample.tensors
        ]
        assert not any(leaf.requires_grad for leaf in leaves(sample.op(*tensors, **sample.options)))

    @pytest.mark.parametrize("grad_mode", GRAD_MODES)
    def test_watched(self, sample: Callable, grad_mode: str) -> None:
        """A call without gradients is seen by all who may watch it, and gives the same."""
        sample = sample()
        raw = sample.raw(*sample.tensors, **sample.options)[0].default
        expected = leaves(sample.op(*sample.tensors, **sample.options))

        def called(tensors: list) -> list[Tensor]:
            with GRAD_MODES[grad_mode]():
                return leaves(sample.op(*tensors, **sample.options))

        def assert_same(results: list[Tensor]) -> None:
            assert_near(results, expected, torch.float64, what=grad_mode)

        for watch in (FunctionWatch(), DispatchWatch()):
            with watch:
                assert_same(called(sample.tensors))
            assert raw in watch.seen, type(watch).__name__
        Watched.seen.clear()
        results = called([map_tensors(lambda t: t.as_subclass(Watched), value) for value in sample.tensors])
        assert raw in Watched.seen and all(type(leaf) is Watched for leaf in results)
        assert_same([leaf.as_subclass(Tensor) for leaf in results])
        if grad_mode != "inference_mode":  # where views of such tensors fail within torch
            results = called([map_tensors(lambda t: TwoTensor(t, t), value) for value in sample.tensors])
            assert all(type(leaf) is TwoTensor for leaf in results)
            assert_same([leaf.a for leaf in results])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert_same(called(sample.tensors))
        assert raw.name().split(".")[0] in [event.name for event in profile.events()]

    def test_opcheck(self, sample: Callable) -> None:
        """Schema, autograd registration, fake kernel and AOT dispatch hold together for the raw operator."""
        sample = sample()
        assert sample.raw is not None, "every sample names its raw operator"
        op, args = sample.raw(*sample.tensors, **sample.options)
        differentiable = {id(leaf) for index in sample.differentiable for leaf in leaves(sample.tensors[index])}
        args = [
            map_tensors(lambda t: t.detach().clone().requires_grad_() if id(t) in differentiable else t, arg)
            for arg in args
        ]
        torch.library.opcheck(op, tuple(args))
        # The fake kernel must know the result's strides for other layouts too, slices included.
        for layout in (LAYOUTS["channels last"], LAYOUTS["channels-last slice"]):
            tensors = [
                map_tensors(layout, value) if index in sample.images else value
                for index, value in enumerate(sample.tensors)
            ]
            op, args = sample.raw(*tensors, **sample.options)
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))

    def test_func_transforms(self, sample: Callable) -> None:
        """torch.func grad, vjp, jvp and vmap give what autograd and a loop give."""
        sample = sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double() for t in inputs]
        outputs = leaves(function(*inputs))
        weights = [torch.randn_like(o) for o in outputs]

        def scalar(*flat: Tensor) -> Tensor:
            return sum((o * w).sum() for o, w in zip(leaves(function(*flat)), weights))

        tracked = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(scalar(*tracked), tracked)
        numbers = tuple(range(len(inputs)))
        assert_near(list(torch.func.grad(scalar, argnums=numbers)(*inputs)), list(expected), torch.float64)
        _, pullback = torch.func.vjp(function, *inputs)
        cotangent = weights[0] if len(weights) == 1 else tuple(weights)
        assert_near(list(pullback(cotangent)), list(expected), torch.float64)
        tangents = tuple(torch.randn_like(t) for t in inputs)
        _, pushed = torch.func.jvp(function, tuple(inputs), tangents)
        forward = sum((p * w).sum() for p, w in zip(leaves(pushed), weights))
        backward = sum((g * t).sum() for g, t in zip(expected, tangents))
        torch.testing.assert_close(forward, backward)
        stacked = tuple(torch.stack([t, t * 0.5]) for t in inputs)
        mapped = torch.func.vmap(function)(*stacked)
        halves = function(*(t * 0.5 for t in inputs))
        for batch, one, other in zip(leaves(mapped), outputs, leaves(halves)):
            assert_near([batch[0], batch[1]], [one, other], torch.float64)

    def test_compiled_func_transforms(self, sample: Callable) -> None:
        """torch.func grad and jvp inside torch.compile give what they give outside: forward mode not just zeros."""
        sample = sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().double() for t in inputs]
        tangents = tuple(torch.randn_like(t) for t in inputs)
        weights = [torch.randn_like(o) for o in leaves(function(*inputs))]

        def scalar(*flat: Tensor) -> Tensor:
            return sum((o * w).sum() for o, w in zip(leaves(function(*flat)), weights))

        def derivatives(*flat: Tensor) -> list[Tensor]:
            gradients = torch.func.grad(scalar, argnums=tuple(range(len(flat))))(*flat)
            return [*gradients, torch.func.jvp(scalar, flat, tangents)[1]]

        torch._dynamo.reset()
        compiled = torch.compile(derivatives, backend="aot_eager", fullgraph=True)
        assert_near(compiled(*inputs), derivatives(*inputs), torch.float64)

    def test_one_device(self, sample: Callable) -> None:
        """A meta tensor among real ones is an error, not a result that was never written."""
        sample = sample()
        op, args = sample.raw(*sample.tensors, **sample.options)
        places = [index for index, value in enumerate(args) if leaves(value)]
        if sum(len(leaves(args[index])) for index in places) < 2:
            return
        for index in places:
            moved = map_tensors(lambda t: t.to("meta"), args[index])
            if isinstance(args[index], (list, tuple)):
                moved = [*args[index][:-1], moved[-1]]
            with pytest.raises(RuntimeError, match=r"^(?!_).*: .* must be on the device of"):
                op(*args[:index], moved, *args[index + 1 :])

    def test_compile(self, sample: Callable) -> None:
        """torch.compile traces the op in one graph, once for all sizes, forward and backward."""
        sample = sample()
        torch._dynamo.reset()

        def call(*tensors: Any) -> Any:
            return sample.op(*tensors, **sample.options)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
        assert sample.resized is not None, "every sample gives other sizes"
        for size in range(3):
            tensors = sample.resized(size)
            inputs = []
            for index in sample.differentiable:
                tensors[index] = map_tensors(lambda t: t.detach().requires_grad_(), tensors[index])
                inputs += leaves(tensors[index])
            # The first call compiles; a later one that would compile again raises.
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

    def test_device(self, sample: Callable) -> None:
        """Op and reference make their tensors on the device of their inputs, whatever torch's default device is."""
        sample = sample()
        tensors = [map_tensors(torch.clone, value) for value in sample.tensors]
        for function in (sample.op, sample.reference):
            with torch.device("meta"):
                result = function(*tensors, **sample.options)
            assert all(leaf.device.type == DEVICE for leaf in leaves(result))

    def test_layouts(self, sample: Callable) -> None:
        """Any strides of inputs and incoming gradients give the same numbers; channels-last comes back as such."""
        sample = sample()
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
        turned = torch.autograd.grad(
            outputs, inputs, [torch.ones_like(o.transpose(-1, -2).contiguous()).transpose(-1, -2) for o in outputs]
        )
        assert_near(list(turned), list(dense), torch.float64, what="transposed gradient")

    def test_thin_layouts(self, thin: Callable, thin_dtype: torch.dtype) -> None:
        """Sizes of one and zero give the numbers of the reference, at any strides of inputs and incoming gradients; the
        fake kernels know the layout of what comes out.
        """
        sample = thin()
        tensors = map_tensors(lambda t: t.contiguous(), to_dtype(sample, thin_dtype))
        plain, gradients = self._differentiated(sample, tensors)
        wide = [map_tensors(torch.Tensor.double, v) if i in sample.converted else v for i, v in enumerate(tensors)]
        as_reference = OpSample(**{**sample.__dict__, "op": sample.reference})
        expected = self._differentiated(as_reference, wide)
        self._assert_equal_up_to_rounding((plain, gradients), expected, thin_dtype, "reference")
        for name, layout in THIN_LAYOUTS.items():
            arranged = map_tensors(layout, tensors)
            assert all(torch.equal(a, b) for a, b in zip(leaves(arranged), leaves(tensors)))
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

    def test_fake_kernel_refuses_the_same(self, sample: Callable) -> None:
        """What the raw operator refuses its fake kernel refuses with the same words; else it describes the result."""
        sample = sample()
        op, args = sample.raw(*sample.tensors, **sample.options)
        for index, argument in enumerate(args):
            for value in wrong_versions(argument):
                changed = [*args[:index], value, *args[index + 1 :]]
                found = outcome(op, changed)
                if isinstance(found, str) and re.search(sample.unforeseen, found):
                    continue
                mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
                fakes = [map_tensors(mode.from_tensor, value) for value in changed]
                with mode:
                    assert_described(outcome(op, fakes), found, f"argument {index}")

    def _differentiated(self, sample: OpSample, tensors: list, layout: Callable = lambda t: t) -> tuple[list, list]:
        """Results, and the gradients by all differentiable tensors for an incoming gradient of that layout."""
        function, inputs = self._bound(sample, tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = leaves(function(*inputs))
        tracked = [output for output in outputs if output.requires_grad]
        if not tracked:
            return outputs, [torch.zeros_like(i) for i in inputs]
        generator = torch.Generator(device="cpu").manual_seed(0)
        # Numbers that every thin dtype holds, so that operator and reference take the same ones.
        incoming = [torch.randn(o.shape, generator=generator, dtype=torch.float16, device="cpu").to(o) for o in tracked]
        gradients = torch.autograd.grad(tracked, inputs, [layout(g) for g in incoming], allow_unused=True)
        return outputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients)]

    def _assert_equal_up_to_rounding(self, actual: tuple, expected: tuple, dtype: torch.dtype, what: str) -> None:
        assert_near(actual[0], expected[0], dtype, what=f"{what}: result")
        assert_near(actual[1], expected[1], dtype, factor=4, what=f"{what}: gradient")

    def test_autocast(self, sample: Callable) -> None:
        """Under autocast float32 features are computed in the low precision; boxes and scores keep theirs."""
        sample = sample()
        tensors = to_dtype(sample, torch.float32)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = sample.op(*tensors, **sample.options)
        expected = sample.op(*to_dtype(sample, torch.bfloat16), **sample.options)
        assert_near(actual, expected, torch.bfloat16)
        if sample.converted:
            assert any(leaf.dtype == torch.bfloat16 for leaf in leaves(actual) if leaf.is_floating_point())

    def test_deterministic(self, sample: Callable) -> None:
        """Under use_deterministic_algorithms two runs agree to the last bit, gradients included."""
        sample = sample()
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
        assert all(torch.equal(one, other) for one, other in zip(*runs))
