# SPDX-License-Identifier: Apache-2.0
"""What Python checks of arguments: numbers and sequences always, values within `checked()` only.

Bad values are otherwise ignored safely; shapes, dtypes and devices are checked in C++ (`csrc/ops`).
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

_checking: contextvars.ContextVar[bool] = contextvars.ContextVar("spatialflow_checking", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Within this context a bad value raises ValueError instead of being ignored.

    Bad values are: a box, delta, offset, mask, score, or logit of a candidate that is not finite, and a batch index
    outside the batch. Outside this context they mean the same on every back end (zeros, no gradient, never kept) and
    cost nothing to handle; inside it each call reads a verdict back from the device, so it is for finding a mistake,
    not for production. Calls being traced by `torch.compile` are not checked.
    """
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def is_checking() -> bool:
    return not torch.compiler.is_compiling() and _checking.get()


def items(op: str, name: str, values: Iterable[Any]) -> list[Any]:
    """What `values` holds; ValueError if it is no sequence."""
    if not hasattr(values, "__iter__"):
        raise ValueError(f"{op}: {name} must be a sequence, got {values!r}")
    return list(values)


def number(op: str, name: str, value: Any) -> float:
    """`value` as a float; ValueError if it is no number. A text is none."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor without values
        pass
    raise ValueError(f"{op}: {name} must be a number, got {value!r}")


def numbers(op: str, name: str, values: Iterable[Any]) -> list[float]:
    """What `values` holds, as floats; ValueError if it is no sequence of numbers."""
    return [number(op, f"{name}[{index}]", value) for index, value in enumerate(items(op, name, values))]


def height_and_width(op: str, name: str, value: Sequence[int]) -> Sequence[int]:
    """`value`, if it is a pair; ValueError otherwise."""
    if not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{op}: {name} must be (height, width), got {value!r}")
    return value


def pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """`value` for rows and for columns: one integer for both, or two; ValueError if it is neither."""
    if type(value) is int:
        return value, value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(map(_is_integer, values)):
        raise ValueError(f"{op}: {name} must be one integer or a pair, got {value!r}")
    return values


def _is_integer(value: Any) -> bool:
    if isinstance(value, (int, torch.SymInt)):
        return True
    try:
        operator.index(value)
    except (TypeError, RuntimeError):
        return False
    return True


def require_finite(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError naming the first entry of `tensor` that is not finite."""
    bad = ~torch.isfinite(tensor.detach())
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} must be finite, got {tensor[where].item()} at index {where}")


def require_batch_indices(op: str, name: str, indices: torch.Tensor, batch: int) -> None:
    """Raises ValueError naming the first of `indices` that is no image of a batch of size `batch`."""
    indices = indices.detach()
    bad = ~((indices >= 0) & (indices < batch))
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: {name} must have batch indices in [0, {batch}), got {indices[where].item()} in row {where}"
        )


def require_labels(op: str, name: str, labels: torch.Tensor, classes: int) -> None:
    """Raises ValueError naming the first of `labels` that is no class, background (`classes`) or ignored (-1)."""
    bad = (labels < -1) | (labels > classes)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} must be in [-1, {classes}], got {labels[where].item()} at index {where}")
