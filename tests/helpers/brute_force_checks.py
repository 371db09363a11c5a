# SPDX-License-Identifier: Apache-2.0
"""Comparison of operators and reference implementations with `fuzz.brute_force`, and functions that make inputs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import brute_force
from torch import Tensor

from helpers.tensors import TOLERANCE, leaves
from spatialflow import ops
from spatialflow.ops import reference

NAN, INF = math.nan, math.inf
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))


def arrays(value: Any) -> list[np.ndarray]:
    """Return the leaves of nested lists and tuples as a flat list of arrays; floating-point tensors become float64."""
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in arrays(item)]
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    return [np.asarray(value)]


def compare(name: str, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[np.ndarray]:
    """Assert that the operator and its reference equal the brute force; return the results of the brute force.

    `dtype` selects the tolerance; the arguments are not converted.
    """
    expected = arrays(getattr(brute_force, name)(*args, **options))
    for implementation in (ops, reference):
        actual = arrays(getattr(implementation, name)(*args, **options))
        assert len(actual) == len(expected)
        for array, wanted in zip(actual, expected):
            assert_same(array, wanted, TOLERANCE[dtype], implementation.__name__)
    return expected


def assert_same(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Assert that arrays of integers or bools are equal, and that arrays of floating-point numbers are close.

    NaN and infinities must be equal. Finite numbers may differ by `tolerance * max(m, 1e-3)`, where m is the largest
    finite expected magnitude.
    """
    assert actual.shape == expected.shape, what
    if expected.dtype.kind != "f":
        assert np.array_equal(actual, expected), f"{what}: {actual} instead of {expected}"
        return
    finite = np.isfinite(expected)
    nonfinite_equal = np.array_equal(actual[~finite], expected[~finite], equal_nan=True)
    assert nonfinite_equal and np.isfinite(actual[finite]).all(), f"{what}: {actual} instead of {expected}"
    scale = max(np.abs(expected[finite]).max(initial=0), 1e-3)
    assert np.abs(actual[finite] - expected[finite]).max(initial=0) <= tolerance * scale, what


def compare_gradients(name: str, *args: Any, differentiable: tuple[int, ...], **options: Any) -> None:
    """Assert that float64 gradients of the operator equal central differences of the brute force."""

    def total(*call: Any) -> float:
        return sum(float((array * weight).sum()) for array, weight in zip(run(*call), weights))

    def run(*call: Any) -> list[np.ndarray]:
        return arrays(getattr(brute_force, name)(*call, **options))

    weights = [np.random.standard_normal(array.shape) for array in run(*args)]
    inputs = [leaf for index in differentiable for leaf in leaves(args[index])]
    tracked = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    outputs = leaves(getattr(ops, name)(*replace(args, inputs, tracked), **options))
    cotangents = [torch.as_tensor(weight, dtype=o.dtype, device=o.device) for o, weight in zip(outputs, weights)]
    gradients = torch.autograd.grad(outputs, tracked, cotangents)
    for index, gradient in enumerate(gradients):

        def moved(tensor: Tensor) -> float:
            return total(*replace(args, [inputs[index]], [tensor]))

        expected = brute_force.numeric_gradient(moved, inputs[index])
        assert np.abs(expected).max() > 0.01, "the case must have a gradient to compare"
        np.testing.assert_allclose(gradient.cpu().numpy(), expected, atol=1e-7, rtol=1e-6)


def replace(args: Any, old: list[Tensor], new: list[Tensor]) -> Any:
    """Return nested `args` in which each tensor that is one of `old` is replaced by the same entry of `new`."""
    if isinstance(args, Tensor):
        return next((new_tensor for old_tensor, new_tensor in zip(old, new) if old_tensor is args), args)
    if isinstance(args, (list, tuple)):
        parts = [replace(item, old, new) for item in args]
        return type(args)(*parts) if hasattr(args, "_fields") else type(args)(parts)
    return args


def rows(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
