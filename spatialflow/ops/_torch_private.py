# SPDX-License-Identifier: Apache-2.0
"""All private names of torch that the package uses.

These names have no public equivalent, and torch may rename them in any release. They are looked up when this module is
imported. `tests/test_torch_private.py` tests that no other module of the package uses such a name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

NAMES: list[str] = []
"""Full names of all objects that this module looks up."""


def _private(name: str) -> Any:
    """Return the private object of torch with a full name, such as "torch._C._is_any_autocast_enabled".

    Raises:
        ImportError: the installed torch has no object of that name.
    """
    NAMES.append(name)
    path = name.split(".")
    value: Any = torch
    for index, part in enumerate(path[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(path[:index]))
            except ImportError:
                pass
        if not hasattr(value, part):
            raise ImportError(
                f"spatialflow: torch {torch.__version__} has no {name}, a private name that it needs; "
                "install a version of torch that this version of spatialflow supports (docs/install.md)"
            )
        value = getattr(value, part)
    return value


# Autograd and forward mode: for kernels that the dispatcher calls at the Autograd key.
AutoDispatchBelowAutograd = _private("torch._C._AutoDispatchBelowAutograd")  # context: skip the Autograd keys
AFTER_AUTOGRAD = _private("torch._C._after_autograd_keyset")  # dispatch keys below Autograd
SingleLevelFunction = _private("torch.autograd.function._SingleLevelFunction")  # Function without functorch's handling
enable_single_level_autograd_function = _private("torch._functorch.utils.enable_single_level_autograd_function")
set_forward_grad_enabled = _private("torch.autograd.forward_ad._set_fwd_grad_enabled")  # context
is_forward_grad_enabled = _private("torch._C._is_fwd_grad_enabled")
unpack_dual = _private("torch._VF._unpack_dual")  # (tensor, level=) -> (primal, tangent)
_private("torch.autograd.forward_ad._current_level")  # a number that changes: see `is_forward_ad_active`

# State of the calling thread.
are_functorch_transforms_active = _private("torch._C._are_functorch_transforms_active")
is_torch_function_mode_enabled = _private("torch._C._is_torch_function_mode_enabled")
is_any_autocast_enabled = _private("torch._C._is_any_autocast_enabled")
disable_current_modes = _private("torch.utils._python_dispatch._disable_current_modes")  # context

# Operators.
dispatch_has_kernel = _private("torch._C._dispatch_has_kernel_for_dispatch_key")  # (operator, key) -> bool
addmm_activation = _private("torch._addmm_activation")  # relu(bias + a @ b)
if TYPE_CHECKING:
    from torch._ops import OpOverload as OpOverload
else:
    OpOverload = _private("torch._ops.OpOverload")


def assume_constant_result(function: Function) -> Function:
    """Mark a function as `torch.compiler.assume_constant_result` does, without the import of torch's compiler.

    That import takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read by torch.compile
    return function


def is_forward_ad_active() -> bool:
    """Return whether the calling code is inside a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0
