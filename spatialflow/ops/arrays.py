# SPDX-License-Identifier: Apache-2.0
"""Calls with arrays of another library, such as CuPy, NumPy or JAX, instead of tensors: through DLPack, without copies.

An operator begins with

    if not are_tensors(boxes, scores):
        return with_arrays(nms, locals())

so that a call with tensors has no other cost. docs/arrays.md documents the guarantees for users.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def are_tensors(*values: object, optional: Sequence[object] = ()) -> bool:
    """Return whether all `values` are tensors, and all of `optional` tensors or None."""
    for value in values:
        if not isinstance(value, Tensor):
            return False
    for value in optional:
        if value is not None and not isinstance(value, Tensor):
            return False
    return True


def as_list(value: Any) -> list[Any]:
    """Return the items of a list or tuple, or any other value as the only item."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def with_arrays(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call an operator with tensors on the memory of arrays, and return arrays on the memory of its results.

    Args:
        function: the operator; its annotations determine which arguments are tensors.
        values: its arguments by name; other names are ignored. Lists and named tuples may have arrays as items.

    Returns:
        The result of the operator, with arrays of the arguments' library instead of tensors. A result that is an
        argument itself is returned as the same array.

    Raises:
        TypeError: no arrays at all, arrays beside tensors, or arrays of two libraries, naming the argument.
        BufferError: an array, or a result, that cannot be shared without a copy, naming the argument.
    """
    op = function.__name__
    if torch.compiler.is_compiling():  # a graph break; with fullgraph=True the compiler raises
        raise TypeError(f"{op}: arrays of other libraries cannot be part of a compiled graph")
    arguments = {name: values[name] for name in _annotations(function)}
    arrays: dict[str, Any] = {}
    tensors: list[str] = []

    def classify(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(name)
        elif _is_array(value):
            arrays[name] = value

    for name, value in arguments.items():
        _map(classify, name, value)
    if not arrays:
        error = _type_error(_annotations(function), arguments)
        raise TypeError(f"{op}: {error or 'lists must hold tensors, and be nested no deeper than the arguments say'}")
    first, library = next((name, _library_of(array)) for name, array in arrays.items())
    for name, array in arrays.items():
        if tensors:
            kind = type(array).__name__
            raise TypeError(f"{op}: {name} must be a tensor, got {kind}, as {tensors[0]} is a tensor, not an array")
        if _library_of(array) is not library:
            raise TypeError(
                f"{op}: {name} must be an array of {library.__name__} as {first} is, got {type(array).__name__} of "
                f"{_library_of(array).__name__}"
            )
    # id of a tensor -> tensor, array; a reference to the tensor keeps its id unique.
    sources: dict[int, tuple[Tensor, Any]] = {}

    def to_tensor(name: str, value: Any) -> Any:
        if name not in arrays:
            return value
        tensor = _tensor_of(op, name, value)
        sources[id(tensor)] = tensor, value
        return tensor

    def to_array(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return sources[id(value)][1] if id(value) in sources else _array_of(op, value, library)

    result = function(**{name: _map(to_tensor, name, value) for name, value in arguments.items()})
    return _map(to_array, "result", result)


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, str]:
    """Return the annotations of the operator's arguments, as written."""
    parameters = inspect.signature(function).parameters.items()
    return {name: value.annotation for name, value in parameters if value.kind is not value.VAR_POSITIONAL}


def _map(function: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """Apply `function` to the name and value of every part of `value` that is not a list or tuple."""
    if not isinstance(value, (list, tuple)):
        return function(name, value)
    if hasattr(value, "_fields"):
        return type(value)(*(_map(function, f"{name}.{field}", getattr(value, field)) for field in value._fields))
    return type(value)(_map(function, f"{name}[{index}]", item) for index, item in enumerate(value))


def _is_array(value: Any) -> bool:
    return hasattr(type(value), "__dlpack__") and not isinstance(value, Tensor)


def _library_of(array: Any) -> Any:
    """Return the module whose `from_dlpack` makes arrays of the type of `array`."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]


def _tensor_of(op: str, name: str, array: Any) -> Tensor:
    if getattr(array, "mask", None) is not None:
        raise BufferError(f"{op}: {name} must have no mask, which would be lost, got {type(array).__name__}")
    strides = zip(getattr(array, "shape", ()), getattr(array, "strides", None) or (), strict=False)
    if any(size > 1 and stride < 0 for size, stride in strides):  # torch 2.13 would abort
        raise BufferError(f"{op}: {name} must not have negative strides, got {array.strides}; copy it first")
    try:
        tensor = torch.from_dlpack(array)  # type: ignore[attr-defined]  # not in the names that torch exports
    except Exception as problem:
        raise BufferError(f"{op}: {name} must be shared without a copy, and cannot be: {problem}") from problem
    if tensor.numel() and tensor.data_ptr() % tensor.element_size():
        raise BufferError(
            f"{op}: {name} must be aligned to its {tensor.element_size()} bytes per element; copy it first"
        )
    return tensor


def _array_of(op: str, tensor: Tensor, library: Any) -> Any:
    try:
        with torch.cuda.device_of(tensor):  # torch exports tensors of its current device only
            return library.from_dlpack(tensor)
    except Exception as problem:
        raise BufferError(
            f"{op}: a result of dtype {str(tensor.dtype).removeprefix('torch.')} cannot be an array of "
            f"{library.__name__}: {problem}"
        ) from problem


def _type_error(kinds: Mapping[str, object], values: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return an error message for the first of `values` that is annotated as a tensor and is not one, else None."""
    for name, annotation in kinds.items():
        value, kind = values[name], str(annotation)  # annotations of a named tuple are ForwardRef
        if hasattr(value, "_fields"):
            if type(value).__name__ not in kind:
                return f"{prefix}{name} must be {kind}, got {type(value).__name__}"
            if error := _type_error(type(value).__annotations__, value._asdict(), f"{prefix}{name}."):
                return error
            continue
        if "Tensor" not in kind or (value is None and "None" in kind):
            continue
        depth = 2 if "list[Tensor | list[" in kind else 1 if "list[" in kind or "Sequence[" in kind else 0
        for part, item in _parts(name, value, depth):
            if not isinstance(item, Tensor) and not hasattr(item, "_fields"):
                return f"{prefix}{part} must be a tensor, got {type(item).__name__}"
    return None


def _parts(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the items of nested lists to a depth, each with its name; named tuples count as items."""
    if depth > 0 and isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        for index, item in enumerate(value):
            yield from _parts(f"{name}[{index}]", item, depth - 1)
    else:
        yield name, value
