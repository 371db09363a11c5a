# SPDX-License-Identifier: Apache-2.0
"""Fake kernels: what a result is without its values, for tracing and for meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spatialflow.ops._torch_private import disable_current_modes


def register_fake(name: str, op: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers the fake kernel of an operator in the namespace `spatialflow`, for tensors of one device.

    Errors name the public operator, `op`; None: `name` without a leading underscore.

    Arguments that the operator refuses are refused here, by the same code: the operator of the same name in the
    namespace `spatialflow_checks`. It is asked where all sizes are known; where they are symbols, the operator itself
    refuses when it runs.

    torch sends a call with one meta tensor here whatever the others are; what the fake kernel makes for real tensors is
    memory that is never written.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        public = op or name.removeprefix("_")
        arguments = getattr(torch.ops.spatialflow, name).default._schema.arguments
        check = getattr(torch.ops.spatialflow_checks, name).default
        names = [argument.name for argument in arguments]
        checked = [names.index(argument.name) for argument in check._schema.arguments]

        def on_one_device(*args: Any) -> Any:
            args = (*args, *(argument.default_value for argument in arguments[len(args) :]))  # torch leaves them out
            first = None
            for argument, value in zip(arguments, args):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if not isinstance(tensor, Tensor):
                        continue
                    first = first or (argument.name, tensor.device)
                    torch._check(
                        tensor.device == first[1],
                        lambda: (
                            f"{public}: {argument.name} must be on the device of {first[0]}, {first[1]}, "
                            f"got {tensor.device}"
                        ),
                    )
            values = [args[index] for index in checked]
            if _is_concrete(values):
                with disable_current_modes():
                    check(*(_without_data(value) for value in values))
            return kernel(*args)

        torch.library.register_fake(f"spatialflow::{name}", on_one_device)
        return kernel

    return register


def _is_concrete(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_concrete, value))
    if isinstance(value, Tensor):
        return _is_concrete(value.shape) and _is_concrete(value.stride())
    return not isinstance(value, (torch.SymInt, torch.SymFloat))


def _without_data(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_data(item) for item in value]
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
