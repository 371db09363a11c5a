# SPDX-License-Identifier: Apache-2.0
"""Fake (meta) kernels: shape, dtype and strides of the result, for tracing and for meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spatialflow.ops._torch_private import disable_current_modes


def register_fake(name: str, op: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers the fake kernel of an operator in the namespace `spatialflow`.

    Errors name the public operator, `op`; None: `name` without a leading underscore.

    The operator of the same name in the namespace `spatialflow_checks` checks the arguments with the code of the real
    operator. It is called if all sizes are known. If sizes are symbols, the real operator checks them when it runs.

    The tensors of a call must be on one device. Torch calls the fake kernel if any tensor is a meta tensor. A call with
    real tensors beside it would then return uninitialized memory.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        public = op or name.removeprefix("_")
        arguments = getattr(torch.ops.spatialflow, name).default._schema.arguments
        check = getattr(torch.ops.spatialflow_checks, name).default
        names = [argument.name for argument in arguments]
        checked = [names.index(argument.name) for argument in check._schema.arguments]

        def on_one_device(*args: Any) -> Any:
            args = (*args, *(argument.default_value for argument in arguments[len(args) :]))  # torch omits defaults
            _require_one_device(public, [argument.name for argument in arguments], args)
            values = [args[index] for index in checked]
            if _is_concrete(values):
                with disable_current_modes():
                    check(*(_without_data(value) for value in values))
            return kernel(*args)

        torch.library.register_fake(f"spatialflow::{name}", on_one_device)
        return kernel

    return register


def _require_one_device(op: str, names: list[str], args: tuple[Any, ...]) -> None:
    """Raise RuntimeError naming the first argument that is not on the device of the first tensor."""
    first: tuple[str, torch.device] | None = None
    for name, value in zip(names, args, strict=True):
        is_list = isinstance(value, (list, tuple))
        for tensor in value if is_list else (value,):
            if not isinstance(tensor, Tensor):
                continue
            first = first or (name, tensor.device)
            checked = f"every tensor of {name}" if is_list else name
            like = "the first one" if name == first[0] else first[0]
            message = f"{op}: {checked} must be on the device of {like}, {first[1]}, got {tensor.device}"
            torch._check(tensor.device == first[1], partial(str, message))


def _is_concrete(value: Any) -> bool:
    """Return whether all sizes and numbers of `value` are known."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_concrete, value))
    if isinstance(value, Tensor):
        return _is_concrete(value.shape) and _is_concrete(value.stride())
    return not isinstance(value, (torch.SymInt, torch.SymFloat))


def _without_data(value: Any) -> Any:
    """Return `value` with meta tensors of the same shapes and strides."""
    if isinstance(value, (list, tuple)):
        return [_without_data(item) for item in value]
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
