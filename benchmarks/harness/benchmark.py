# SPDX-License-Identifier: Apache-2.0
"""Declarations of a benchmark, and the comparison of results with the float64 oracle."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

OURS = "spatialflow"
MODES = ("forward", "forward+backward")

TOLERANCES = {"float32": 0.0, "bfloat16": 4e-2, "float16": 5e-3}
"""Lower bound of the tolerance of results in a dtype."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one case; every provider is called as `provider(*inputs, **options)`.

    Args:
        inputs: tensors, lists of tensors, arrays or plain values.
        options: keyword arguments.
        features: indices of the inputs that are converted to the requested dtype.
        differentiable: indices of the inputs whose gradients "forward+backward" computes; if empty, forward only.
        bytes: least memory traffic of the forward pass, with features in float32, for the GB/s figure.
        fixed_bytes: the part of `bytes` that does not depend on the dtype of the features.
        operations: floating-point operations of the forward pass, two per multiply-add, for the GFLOP/s figure.
    """

    inputs: tuple
    options: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()
    bytes: float | None = None
    fixed_bytes: float = 0.0
    operations: float | None = None


@dataclass(frozen=True)
class Provider:
    """Implementation that is timed, with its settings.

    Args:
        call: the timed function.
        prepare: `prepare(*inputs, **options)` returns the arguments of `call`; it is not timed.
        only_cuda: skip the provider on other devices.
        only_forward: skip the provider in mode "forward+backward".
        waits: the call cannot be captured in a CUDA graph, because it reads device values or uses another stream.
        around: context manager for the call and its gradients.
        lowered: indices of further inputs that are converted to the dtype of the features, as torchvision's operators
            need them. The conversion is not timed.
    """

    call: Callable[..., Any]
    prepare: Callable[..., tuple] | None = None
    only_cuda: bool = False
    only_forward: bool = False
    waits: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    lowered: tuple[int, ...] = ()


def compiled(function: Callable[..., Any], prepared: Callable[..., tuple] | None = None) -> Provider:
    """Return a provider that runs the function through torch.compile; on CUDA only, where Triton compiles the code.

    Args:
        function: what is timed.
        prepared: inputs -> arguments of the function, not timed; None: the inputs themselves.
    """

    def prepare(*inputs: Any, **options: Any) -> tuple:
        arguments = inputs if prepared is None else prepared(*inputs)
        return torch.compile(partial(function, **options), dynamic=False), *arguments

    return Provider(lambda call, *inputs: call(*inputs), prepare, only_cuda=True)


def deterministic(function: Callable[..., Any] | Provider | None) -> Provider | None:
    """Return the provider under torch.use_deterministic_algorithms; on CUDA only, where this selects other kernels."""
    if function is None:
        return None
    provider = function if isinstance(function, Provider) else Provider(function)
    return replace(provider, only_cuda=True, around=deterministic_algorithms)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Enable torch's deterministic algorithms without `fill_uninitialized_memory`, a debugging aid that takes time."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def with_conv_precision(precision: str, function: Callable[..., Any] | Provider) -> Provider:
    """Return the provider with float32 convolutions in "ieee" or "tf32", torch's default; "tf32" on CUDA only."""
    provider = function if isinstance(function, Provider) else Provider(function)
    return replace(
        provider, only_cuda=provider.only_cuda or precision == "tf32", around=partial(_conv_precision, precision)
    )


@contextlib.contextmanager
def _conv_precision(precision: str) -> Iterator[None]:
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class Benchmark:
    """Declaration of a benchmark script.

    Args:
        name: the operator.
        setup: `setup(**case) -> Problem`.
        sweep: label of a case -> keyword arguments of `setup`.
        providers: name -> function or `Provider`; "spatialflow" is one of them. None: not installed, skipped.
        oracle: reference function, run on float64 inputs; by default the provider "reference".
        tolerance: largest allowed error of spatialflow, relative to the largest expected value.
        rounding: factor of TOLERANCES, for operators that round more than once.
        compare: `(result, expected) -> error`; by default `largest_error`.
        title: caption of table and plot; it names the layer of the model that the sizes come from.
    """

    name: str
    setup: Callable[..., Problem]
    sweep: Mapping[str, Mapping[str, Any]]
    providers: Mapping[str, Callable[..., Any] | Provider | None]
    oracle: Callable[..., Any] | None = None
    tolerance: float = 1e-4
    rounding: float = 1.0
    compare: Callable[[Any, Any], float] | None = None
    title: str = ""


def optional(module: str) -> Any | None:
    """Import a module; return None if it is not installed or cannot be used.

    `(tv := optional("torchvision.ops")) and tv.nms` is a provider. A torchvision built for another torch raises
    RuntimeError at import, because its compiled operators are not loaded.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return None


def leaves(value: Any) -> list:
    """Return the tensors and arrays in a result or input, in order."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [leaf for item in value for leaf in leaves(item)]


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def largest_error(result: Any, expected: Any) -> float:
    """Return the largest error of the tensors in a result; infinite if numbers or shapes of tensors differ, or for NaN.

    The error of a floating-point tensor is the largest difference relative to the largest expected value. The error of
    any other tensor is the share of entries that differ.
    """
    results, expecteds = leaves(result), leaves(expected)
    if len(results) != len(expecteds):
        return float("inf")
    worst = 0.0
    for pair in zip(results, expecteds, strict=True):
        actual, wanted = (np.asarray(_as_array(value)) for value in pair)
        if actual.shape != wanted.shape:
            return float("inf")
        if wanted.size == 0:
            continue
        if not np.issubdtype(wanted.dtype, np.floating):
            error = float(np.mean(actual != wanted))
        else:
            error = float(np.abs(actual.astype(np.float64) - wanted).max()) / max(float(np.abs(wanted).max()), 1e-30)
        worst = max(worst, float("inf") if np.isnan(error) else error)
    return worst


def _as_array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a floating-point tensor to float64."""
    return tensor.double() if tensor.is_floating_point() else tensor


def in_float32(problem: Problem) -> Problem:
    """Return the problem with its features in float32."""
    inputs = [
        map_tensors(torch.Tensor.float, value) if index in problem.features else value
        for index, value in enumerate(problem.inputs)
    ]
    return replace(problem, inputs=tuple(inputs))
