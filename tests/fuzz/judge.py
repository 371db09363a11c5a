# SPDX-License-Identifier: Apache-2.0
"""Comparison of results with those of a judge: a reference implementation or the brute force.

An element is right if it is within a tolerance relative to the largest expected one. Otherwise three more checks, in
this order, decide whether it is wrong:

1. Does the judge spread non-finite values further than the operator does? Then only its finite elements count.
2. How large were the terms of the sum? The judge computes again with absolute values of the linear arguments. The
   tolerance of sums that cancel is relative to these sizes. Elements are excluded if their terms are so
   large that sums may overflow.
3. Is the result discontinuous there? The judge computes again with arguments perturbed by a rounding. Elements that
   change by more than half of the tolerance are excluded.

Excluded elements are counted. Integers must be equal; only the third check applies to them, without a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from helpers.tensors import TOLERANCE
from torch import Tensor

FACTOR = 8.0  # times the tolerances of `OpMatrix`, because sizes and values are more extreme here
LARGEST_SUM = {torch.float64: torch.finfo(torch.float64).max, torch.float32: torch.finfo(torch.float32).max}


class Verdict(NamedTuple):
    difference: str | None  # a sentence, or None
    compared: int = 0
    excluded: int = 0


def compare(
    actual: Tensor,
    expected: Tensor,
    tolerance: float,
    accumulator: torch.dtype,
    magnitude: Callable[[], Tensor | None],
    nearby: Callable[[], Iterable[Tensor]],
    poisons: bool,
) -> Verdict:
    """Compare a result with the expected one.

    Args:
        actual: result of the operator.
        expected: result in float64, or integers, which must be equal.
        tolerance: relative to the largest expected element.
        accumulator: dtype of the operator's sums.
        magnitude: returns the result for absolute values, of the shape of `expected` or without dimensions, or None.
        nearby: returns the results for arguments perturbed by a rounding.
        poisons: elements where `expected` is not finite are not compared.
    """
    if actual.shape != expected.shape:
        return Verdict(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return Verdict(None)
    if not actual.dtype.is_floating_point:
        wrong = actual != expected
        for variant in nearby() if bool(wrong.any()) else ():
            wrong = wrong & (variant == expected) if variant.shape == expected.shape else torch.zeros_like(wrong)
        return _verdict(wrong, actual, expected, 0, 0.0)
    dtype, actual, expected = actual.dtype, actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    scale = _largest(expected)
    floor = _floor(dtype, accumulator)
    wrong = _wrong(actual, expected, finite, tolerance * scale + floor, dtype)
    if not bool(wrong.any()):
        return Verdict(None, int(finite.sum()))
    excluded = torch.zeros_like(wrong)
    if poisons:
        excluded |= ~finite
    sizes = magnitude()
    if sizes is not None:
        sizes = torch.where(sizes.isnan(), torch.inf, sizes)
        excluded |= sizes > LARGEST_SUM[accumulator] / 1000
        excluded |= ~actual.isfinite() & (sizes > torch.finfo(dtype).max / 4)  # terms are rounded to the dtype
        scale = max(scale, _largest(sizes))
        wrong = _wrong(actual, expected, finite, tolerance * scale + floor, dtype)
    wrong &= ~excluded
    if bool(wrong.any()):
        for variant in nearby():
            jumps = ~((variant - expected).abs() <= tolerance * scale / 2)
            excluded |= jumps & (finite | variant.isfinite())
        wrong &= ~excluded
    return _verdict(wrong, actual, expected, int(excluded.sum()), tolerance * scale + floor)


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    return FACTOR * max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=0.0)


def _largest(values: Tensor) -> float:
    return float(torch.where(values.isfinite(), values, 0).abs().max())


def _floor(dtype: torch.dtype, accumulator: torch.dtype) -> float:
    """Return the largest error by underflow."""
    tiny = 8 * torch.finfo(accumulator).tiny
    return max(tiny, 2.0**-24) if dtype == torch.float16 else tiny


def _wrong(actual: Tensor, expected: Tensor, finite: Tensor, allowed: float, dtype: torch.dtype) -> Tensor:
    near = (actual - expected).abs() <= allowed
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    # A finite number that is too large for the dtype becomes infinite.
    overflows = finite & (expected.abs() + allowed >= torch.finfo(dtype).max)
    overflows &= (actual.isinf() & ((actual > 0) == (expected > 0))) | near
    return ~(near | same | overflows)


def _verdict(wrong: Tensor, actual: Tensor, expected: Tensor, excluded: int, allowed: float) -> Verdict:
    count = actual.numel()
    if not bool(wrong.any()):
        return Verdict(None, count - excluded, excluded)
    where = wrong.nonzero()
    if actual.dtype.is_floating_point:
        errors = (actual - expected).abs().nan_to_num(nan=float("inf"))[wrong]
        where = where[int(errors.argmax())]
    else:
        where = where[0]
    place = tuple(where.tolist())
    text = (
        f"{int(wrong.sum())} of {count} elements differ; at {list(place)} "
        f"{actual[place].item()!r}, expected {expected[place].item()!r}"
    )
    if actual.dtype.is_floating_point:
        text += f" within {allowed:.3g}"
    return Verdict(text, count - excluded, excluded)


def metadata_difference(real: Any, fake: Any, strides: bool = True) -> str | None:
    """Describe how fake results differ from real ones in shape, dtype or, with `strides`, strides; None if equal."""
    if len(real) != len(fake):
        return f"{len(fake)} tensors, really {len(real)}"
    for index, (actual, predicted) in enumerate(zip(real, fake)):
        if actual.dtype != predicted.dtype:
            return f"[{index}] has dtype {predicted.dtype}, really {actual.dtype}"
        if actual.dim() != predicted.dim():
            return f"[{index}] has {predicted.dim()} dimensions, really {actual.dim()}"
        if any(isinstance(side, torch.SymInt) for side in predicted.shape):
            continue  # sizes that depend on values are symbols
        if actual.shape != predicted.shape:
            return f"[{index}] has shape {tuple(predicted.shape)}, really {tuple(actual.shape)}"
        pairs = [(a, b) for a, b, size in zip(actual.stride(), predicted.stride(), actual.shape) if size > 1]
        if strides and actual.numel() and any(a != b for a, b in pairs):
            shape, predicted_strides = tuple(actual.shape), tuple(predicted.stride())
            return f"[{index}] has strides {predicted_strides}, really {tuple(actual.stride())}, of {shape}"
    return None
