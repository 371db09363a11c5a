# SPDX-License-Identifier: Apache-2.0
"""Fake kernels: what a result is without its values, for tracing and for meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers the fake kernel of an operator in the namespace `spatialflow`, for tensors of one device.

    torch sends a call with one meta tensor here whatever the others are; what the fake kernel makes for real tensors is
    memory that nobody writes.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        arguments = getattr(torch.ops.spatialflow, name).default._schema.arguments

        def on_one_device(*args: Any) -> Any:
            first = None
            for argument, value in zip(arguments, args):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if not isinstance(tensor, Tensor):
                        continue
                    first = first or (argument.name, tensor.device)
                    torch._check(
                        tensor.device == first[1],
                        lambda: (
                            f"{name}: {argument.name} must be on the device of {first[0]}, {first[1]}, "
                            f"got {tensor.device}"
                        ),
                    )
            return kernel(*args)

        torch.library.register_fake(f"spatialflow::{name}", on_one_device)
        return kernel

    return register
