# SPDX-License-Identifier: Apache-2.0
"""Python-side argument checks: types always, values only inside `checked()`.

Outside `checked()`, bad values have a defined meaning. Shapes, dtypes and devices are checked in C++ (`csrc/ops`).
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch

Size = TypeVar("Size", bound=Sequence[int])

_checking: contextvars.ContextVar[bool] = contextvars.ContextVar("spatialflow_checking", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Return a context in which a bad value raises ValueError instead of being ignored.

    A box, anchor, delta, scale factor, offset, mask, score or logit is bad if it is not finite. A batch index is bad
    outside the batch, and a label if it is neither a class, background nor ignored. The documentation of each operator
    says what bad values do outside this context; this is the same on every back end. Inside the context each call
    waits for the device to check its values, so use it for debugging, not for production. Calls being traced by
    `torch.compile` are not checked.
    """
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def is_checking() -> bool:
    """Return whether the call is inside `checked()` and not being traced."""
    return not torch.compiler.is_compiling() and _checking.get()


def items(op: str, name: str, values: Iterable[Any]) -> list[Any]:
    """Return the items of `values` as a list; ValueError if `values` is not iterable."""
    if not hasattr(values, "__iter__"):
        raise ValueError(f"{op}: {name} must be a sequence, got {values!r}")
    return list(values)


def integer(op: str, name: str, value: Any) -> int:
    """Return `value` if it is an integer, also one of another library; ValueError otherwise."""
    if not _is_integer(value):
        raise ValueError(f"{op}: {name} must be an integer, got {value!r}")
    return value


def integers(op: str, name: str, values: Iterable[Any]) -> list[int]:
    """Return the items of `values`; ValueError if `values` is not an iterable of integers."""
    return [integer(op, f"{name}[{index}]", value) for index, value in enumerate(items(op, name, values))]


def flag(op: str, name: str, value: Any) -> bool:
    """Return `value` as a bool; ValueError if it is a string, of which all but the empty one are true."""
    if isinstance(value, (str, bytes)):
        raise ValueError(f"{op}: {name} must be True or False, got {value!r}")
    return bool(value)


def number(op: str, name: str, value: Any) -> float:
    """Return `value` as a float; ValueError if it is not a number. Strings and bytes are not numbers."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor without values
        pass
    raise ValueError(f"{op}: {name} must be a number, got {value!r}")


def numbers(op: str, name: str, values: Iterable[Any]) -> list[float]:
    """Return the items of `values` as floats; ValueError if `values` is not an iterable of numbers."""
    return [number(op, f"{name}[{index}]", value) for index, value in enumerate(items(op, name, values))]


def height_and_width(op: str, name: str, value: Size) -> Size:
    """Return `value` if it is a pair of integers; ValueError otherwise."""
    if not hasattr(value, "__len__") or len(value) != 2 or not all(map(_is_integer, value)):
        raise ValueError(f"{op}: {name} must be (height, width) in integers, got {value!r}")
    return value


def pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return `value`, one integer or two, as a pair for rows and columns; ValueError if it is neither.

    Two integers may be a tuple, a list or an array.
    """
    if type(value) is int:
        return value, value
    is_sequence = isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) == 1  # an array of numbers
    values = tuple(cast("Sequence[int]", value)) if is_sequence else (cast("int", value),) * 2
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
    """Raise ValueError naming the first entry of `tensor` that is not finite."""
    bad = ~torch.isfinite(tensor.detach())
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} must be finite, got {tensor[index].item()} at index {index}")


def require_batch_indices(op: str, name: str, indices: torch.Tensor, batch: int) -> None:
    """Raise ValueError naming the first of `indices` that is not an image of a batch of size `batch`."""
    indices = indices.detach()
    bad = ~((indices >= 0) & (indices < batch))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: {name} must have batch indices in [0, {batch}), got {indices[index].item()} in row {index}"
        )


def require_labels(op: str, name: str, labels: torch.Tensor, classes: int) -> None:
    """Raise ValueError naming the first label that is not a class, background (`classes`) or ignored (-1)."""
    bad = (labels < -1) | (labels > classes)
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} must be in [-1, {classes}], got {labels[index].item()} at index {index}")
