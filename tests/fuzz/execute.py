# SPDX-License-Identifier: Apache-2.0
"""Execution of one case in the worker: call the operator and compare it with its reference and other judges.

The supervisor starts the worker, which calls `execute`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuzz import judge
from fuzz.files import FILES
from fuzz.operators import EPSILON, OPERATORS, Operator, leaves, map_tensors
from fuzz.tensors import Memory, build_tensor

# Exceptions by which an operator may refuse a call; any other one, such as an IndexError, is a defect.
REFUSALS = (RuntimeError, ValueError, TypeError)
BRUTE_FORCE_ELEMENTS = 250  # limit over all tensors of a case; the loops are slow
MODE_CALLS = 200  # calls per FakeTensorMode, which stores every size that depends on values

_memory = Memory()
_fake_modes: list = []


def execute(case: dict) -> dict:
    """Execute a case and return its report.

    Returns:
        status: "right", "refused" or "wrong"; differences: texts; compared, excluded: numbers of elements; skipped:
        "result", "gradient" or "tangent" if it was not compared with the reference.
    """
    if case["op"] in FILES:
        from fuzz import read_files

        return read_files.execute(case)
    return _CaseRun(case).run()


class _CaseRun:
    """Execution of one case; every comparison adds to the report."""

    def __init__(self, case: dict) -> None:
        self.case = case
        self.operator: Operator = OPERATORS[case["op"]]
        self.report = {"status": "right", "differences": [], "compared": 0, "excluded": 0, "skipped": []}
        _memory.begin()
        self.arguments = _map(case["arguments"], self._build)
        self.tensors = leaves(self.arguments)
        self.incoming: list[Tensor] = []  # gradients and tangents
        floats = [t.dtype for t in self.tensors if t.dtype.is_floating_point]
        self.tolerance = judge.tolerance_of(floats)
        # Sums are in float64 if the first floating-point tensor (features, boxes or logits) is, otherwise in float32.
        self.accumulator = torch.float64 if floats and floats[0] == torch.float64 else torch.float32

    @staticmethod
    def _build(description: dict) -> Tensor:
        tensor = build_tensor(description, _memory)
        return tensor.requires_grad_() if description.get("grad") else tensor

    def differs(self, what: str) -> None:
        self.report["status"] = "wrong"
        self.report["differences"].append(what)

    def run(self) -> dict:
        _memory.remember()
        try:
            result = self.operator.call(**self.arguments)
        except Exception as error:
            self._refused(error)
            return self.report
        outputs = leaves(result)
        self.real = outputs
        self._result(outputs)
        needs = [t.requires_grad for t in self.tensors]
        tracked = [i for i, o in enumerate(outputs) if o.requires_grad]
        gradients = None
        if any(needs) and self.operator.differentiable:
            if tracked:
                self.incoming = [self._incoming(outputs[i], i) for i in tracked]
                gradients = self._gradient(outputs, tracked)
            elif self._reference_tracks():
                self.differs("no result requires a gradient")
            if self.case.get("jvp"):
                self._tangents()
        elif tracked:
            self.differs("a result requires a gradient")
        if self.case.get("fake"):
            self._fake(outputs, gradients)
        if _memory.changed():
            self.differs("the operator wrote to its arguments or outside them")
        return self.report

    # --- judges ---

    def _refused(self, error: Exception) -> None:
        self.report["status"] = "refused"
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        self.report["refusal"] = text
        if self.case["valid"]:
            self.differs(f"a valid call was refused: {text}")
        elif not isinstance(error, REFUSALS) or "INTERNAL ASSERT" in str(error):
            self.differs(f"refused without a clear reason: {text}")
        elif "out of memory" not in str(error):
            try:
                with _fake_mode():
                    self.operator.call(**map_tensors(_fake_of, self.arguments))
            except Exception:
                return
            if re.search(self.operator.unpredicted_errors, text):
                return
            self.differs(f"the fake kernel accepts a call that the operator refuses: {text}")

    def _result(self, outputs: list[Tensor]) -> None:
        def results_of(function: Callable, arguments: dict, _: bool) -> list[Tensor]:
            return leaves(function(**arguments))

        self._compare_with_reference("result", outputs, results_of, nearby="result")
        if sum(t.numel() for t in (*self.tensors, *outputs)) <= BRUTE_FORCE_ELEMENTS:
            self._compare_with_brute_force(outputs)

    def _compare_with_brute_force(self, outputs: list[Tensor]) -> None:
        operator, plain = self.operator, map_tensors(Tensor.detach, self.arguments)
        if operator.unstable(plain, self.tensors):
            return

        def brute_results(arguments: dict) -> list[Tensor]:
            return [torch.from_numpy(np.asarray(array)) for array in _arrays(operator.brute(**arguments))]

        nearby = operator.nearby if "result" in operator.nearby_for else lambda *_: ()
        # Tensors of a narrower dtype may lose a perturbation by a rounding.
        arguments64 = map_tensors(_to_float64, plain)
        variants = functools.cache(lambda: [brute_results(variant) for variant in nearby(arguments64, self._epsilon())])
        expected = brute_results(plain)
        if len(expected) != len(outputs):
            self.differs(f"result: {len(outputs)} tensors, {len(expected)} of the brute force")
            return
        sizes = functools.cache(lambda: self._sizes(lambda f, a, _: leaves(f(**a)), map_tensors(_to_float64, plain)))
        for index, (result, wanted) in enumerate(zip(outputs, expected)):
            if operator.excused and result.shape == wanted.shape:
                wanted = torch.where(operator.excused(plain, result), result.to(wanted.dtype), wanted)
            self._judge(f"result[{index}]", "brute force", result, wanted, sizes, variants, index)

    def _gradient(self, outputs: list[Tensor], tracked: list[int]) -> list[Tensor | None]:
        """Compare the gradients of all tensors that require one, through the outputs at `tracked`; return them."""
        inputs = [t for t in self.tensors if t.requires_grad]
        _memory.remember()
        actual = torch.autograd.grad([outputs[i] for i in tracked], inputs, self.incoming, allow_unused=True)
        is_differentiable = [name in self.operator.differentiable for name in self._names()]
        indices = [i for i, t in enumerate(self.tensors) if t.requires_grad]
        compared, positions = [], []
        for tensor, gradient, is_expected, index in zip(inputs, actual, is_differentiable, indices):
            if not is_expected:
                if gradient is not None and bool((gradient != 0).any()):
                    self.differs(f"argument {index} has a gradient and should have none")
                continue
            compared.append(torch.zeros_like(tensor) if gradient is None else gradient)
            positions.append(index)
            if gradient is not None and gradient.dtype != tensor.dtype:
                self.differs(f"gradient of argument {index} has dtype {gradient.dtype}, the argument {tensor.dtype}")
        incoming64 = [c.double() for c in self.incoming]

        def gradients_of(function: Callable, arguments: dict, absolute: bool) -> list[Tensor]:
            tracked_arguments, chosen = _tracked(arguments, positions)
            results = leaves(function(**tracked_arguments))
            incoming = [c.abs() if absolute else c for c in incoming64]
            pairs = [(results[i], c) for i, c in zip(tracked, incoming) if results[i].requires_grad]
            if not pairs:  # no result depends on the inputs
                return [torch.zeros_like(c) for c in chosen]
            input_gradients = torch.autograd.grad(
                [r for r, _ in pairs], chosen, [c for _, c in pairs], allow_unused=True
            )
            return [torch.zeros_like(c) if g is None else g for c, g in zip(chosen, input_gradients)]

        if compared:
            self._compare_with_reference(
                "gradient", compared, gradients_of, nearby="gradient", names=[self._all_names()[p] for p in positions]
            )
        return list(actual)

    def _reference_tracks(self) -> bool:
        positions = [i for i, t in enumerate(self.tensors) if t.requires_grad]
        arguments, _ = _tracked(map_tensors(_to_float64, self.arguments), positions)
        return any(o.requires_grad for o in leaves(self.operator.reference(**arguments)))

    def _tangents(self) -> None:
        positions = [
            i
            for i, (t, name) in enumerate(zip(self.tensors, self._all_names()))
            if t.requires_grad and name in self.operator.differentiable
        ]
        if not positions:
            return
        tangents = [self._incoming(self.tensors[p], 100 + p) for p in positions]
        self.incoming += tangents
        _memory.remember()
        plain = map_tensors(Tensor.detach, self.arguments)
        pushed = _pushed(self.operator.call, plain, positions, tangents)

        def tangents_of(function: Callable, arguments: dict, absolute: bool) -> list[Tensor]:
            pushed_tangents = [t.double().abs() if absolute else t.double() for t in tangents]
            return _pushed(function, arguments, positions, pushed_tangents)

        def sizes_of_sum(arguments: dict) -> list[Tensor]:
            """Return the size of the terms of a result that is one sum over all elements.

            The smallest normal number of each dtype is added, because terms in float16 may underflow.
            """
            tracked_arguments, chosen = _tracked(arguments, positions)
            gradients = torch.autograd.grad(leaves(self.operator.reference(**tracked_arguments)), chosen)
            smallest = [torch.finfo(t.dtype).tiny for t in tangents]
            return [sum(((g.abs() + s) * t.double().abs() + s).sum() for g, s, t in zip(gradients, smallest, tangents))]

        is_sum = len(pushed) == 1 and pushed[0].dim() == 0
        self._compare_with_reference(
            "tangent", pushed, tangents_of, nearby="gradient", sizes_of=sizes_of_sum if is_sum else None
        )

    def _fake(self, outputs: list[Tensor], gradients: list[Tensor | None] | None) -> None:
        try:
            with _fake_mode():
                arguments = map_tensors(_fake_of, self.arguments)
                results = leaves(self.operator.call(**arguments))
                strides = not (self.operator.composed and gradients is not None)
                difference = judge.metadata_difference(outputs, results, strides)
                if difference is None and gradients is not None:
                    tracked = [o for o, real in zip(results, outputs) if real.requires_grad]
                    inputs = [t for t in leaves(arguments) if t.requires_grad]
                    cotangents = [_fake_of(c) for c in self.incoming[: len(tracked)]]
                    fake_gradients = torch.autograd.grad(tracked, inputs, cotangents, allow_unused=True)
                    pairs = [(r, f) for r, f in zip(gradients, fake_gradients) if r is not None and f is not None]
                    difference = judge.metadata_difference([r for r, _ in pairs], [f for _, f in pairs], strides)
                    difference = difference and f"gradient {difference}"
        except Exception as error:
            difference = f"refuses a call that the operator accepts: {type(error).__name__}: {error}".split("\n")[0]
        if difference:
            self.differs(f"fake kernel: {difference}")

    # --- the reference ---

    def _compare_with_reference(
        self,
        what: str,
        actual: list[Tensor],
        compute: Callable,
        nearby: str,
        names: list[str] | None = None,
        sizes_of: Callable | None = None,
    ) -> None:
        """Compare `actual`, the tensors named by `what`, with the same tensors of the operator's reference.

        `compute(function, arguments, absolute)` returns the results, gradients or tangents of a function. If `absolute`
        is true, it replaces incoming gradients and tangents by their absolute values. `sizes_of(arguments)` returns the
        sizes of the terms; None: they are computed from absolute values of the linear arguments.
        """
        operator = self.operator
        plain = map_tensors(Tensor.detach, self.arguments)
        if operator.unstable(plain, [*self.tensors, *self.incoming]):
            self.report["skipped"].append(what)
            return
        reference_arguments = plain if operator.exact else map_tensors(_to_float64, plain)
        try:
            expected = compute(operator.reference, reference_arguments, False)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            if "allocate memory" in text:
                self.report["skipped"].append(what)
                return
            self.differs(f"{what}: the reference raises where the operator works: {text}")
            return
        if len(actual) != len(expected):
            self.differs(f"{what}: {len(actual)} tensors, expected {len(expected)}")
            return
        variants = functools.cache(lambda: list(self._variants(compute, reference_arguments, nearby)))
        sizes = functools.cache(
            lambda: sizes_of(reference_arguments) if sizes_of else self._sizes(compute, reference_arguments)
        )
        for index, (result, wanted) in enumerate(zip(actual, expected)):
            name = f"{what} of {names[index]}" if names else f"{what}[{index}]"
            self._judge(name, "reference", result, wanted, sizes, variants, index)

    def _judge(
        self,
        what: str,
        judged_by: str,
        actual: Tensor,
        expected: Tensor,
        sizes: Callable,
        variants: Callable,
        index: int,
    ) -> None:
        # An exact operator must equal its reference; the brute force does not round, so it has a tolerance.
        exact = self.operator.exact and judged_by == "reference"
        tolerance = 0.0 if exact else max(self.tolerance, judge.tolerance_of([actual.dtype]))
        verdict = judge.compare(
            actual,
            expected,
            tolerance,
            self.accumulator,
            lambda: sizes()[index] if sizes() else None,
            lambda: (variant[index] for variant in variants()),
            self.operator.poisons,
        )
        self.report["compared"] += verdict.compared
        self.report["excluded"] += verdict.excluded
        if verdict.difference:
            self.differs(f"{what} ({actual.dtype}, {judged_by}): {verdict.difference}")

    def _epsilon(self) -> float:
        """Return the relative rounding error of the sums or, for several layers, of the layers' outputs."""
        first = next((t.dtype for t in self.tensors if t.dtype.is_floating_point), torch.float32)
        return torch.finfo(first).eps if self.operator.layered else EPSILON[self.accumulator]

    def _variants(self, compute: Callable, arguments: dict, nearby: str) -> Iterator[list[Tensor]]:
        if nearby in self.operator.nearby_for:
            for variant in self.operator.nearby(arguments, self._epsilon()):
                yield compute(self.operator.reference, variant, False)

    def _sizes(self, compute: Callable, arguments: dict) -> list[Tensor] | None:
        """Return the results for absolute values of the linear arguments, or None if there are none."""
        operator = self.operator
        if not operator.linear:
            return None
        absolute = operator.absolute(arguments)
        sizes = compute(operator.sizes or operator.reference, absolute, True)
        if operator.has_sampling_points and self.incoming:
            # Gradients w.r.t. sampling points are differences of neighbors, summed over the outputs; this bounds them.
            results = leaves(operator.reference(**absolute))
            largest = max(float(t.detach().abs().nan_to_num().max()) for t in self.incoming if t.numel())
            bound = max(float(r.abs().max()) * r.shape[1] * largest for r in results if r.numel())
            sizes = [size + 4 * bound for size in sizes]
        return sizes

    def _all_names(self) -> list[str]:
        """Return the argument name of every tensor."""
        return [name for name, value in self.arguments.items() for _ in leaves(value)]

    def _names(self) -> list[str]:
        return [name for name, tensor in zip(self._all_names(), self.tensors) if tensor.requires_grad]

    def _incoming(self, like: Tensor, index: int) -> Tensor:
        """Return an incoming gradient, or a tangent, for a tensor with the shape and dtype of `like`."""
        gradient = self.case["gradient"]
        values = gradient["values"] | {"seed": gradient["values"]["seed"] + index + 1}
        dtype = str(like.dtype).removeprefix("torch.")
        described = {"tensor": list(like.shape), "dtype": dtype, "values": values, "layout": gradient["layout"]}
        return build_tensor(described, _memory)


def _map(value: Any, build: Callable[[dict], Any]) -> Any:
    """Build the described tensors within nested lists and dictionaries."""
    if isinstance(value, dict):
        return build(value) if "tensor" in value else {name: _map(item, build) for name, item in value.items()}
    return [_map(item, build) for item in value] if isinstance(value, list) else value


def _arrays(value: Any) -> list:
    """Return the arrays within nested lists and tuples, in order."""
    return [array for item in value for array in _arrays(item)] if isinstance(value, (list, tuple)) else [value]


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double().contiguous().clone() if tensor.is_floating_point() else tensor


def _tracked(arguments: dict, positions: list[int]) -> tuple[dict, list[Tensor]]:
    """Return the arguments with the tensors at `positions` requiring gradients, and those tensors."""
    chosen: list[Tensor] = []
    counter = iter(range(1 << 30))

    def track(tensor: Tensor) -> Tensor:
        if next(counter) not in positions:
            return tensor.detach()
        chosen.append(tensor.detach().clone().requires_grad_())
        return chosen[-1]

    return map_tensors(track, arguments), chosen


def _pushed(function: Callable, arguments: dict, positions: list[int], tangents: list[Tensor]) -> list[Tensor]:
    """Return the tangents of the results, with zeros for results without tangent."""
    counter, rest = iter(range(1 << 30)), list(tangents)
    with forward_ad.dual_level():

        def dual(tensor: Tensor) -> Tensor:
            if next(counter) not in positions:
                return tensor
            if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
                tensor = tensor.contiguous()  # torch cannot make a dual tensor of an expanded tensor
            return forward_ad.make_dual(tensor, rest.pop(0))

        results = leaves(function(**map_tensors(dual, arguments)))
        unpacked = [forward_ad.unpack_dual(result) for result in results]
        return [torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked]


def _fake_mode() -> FakeTensorMode:
    if not _fake_modes or _fake_modes[0][1] > MODE_CALLS:
        _fake_modes[:] = [[FakeTensorMode(shape_env=ShapeEnv()), 0]]
    _fake_modes[0][1] += 1
    return _fake_modes[0][0]


def _fake_of(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return fake.requires_grad_() if tensor.requires_grad else fake
