# SPDX-License-Identifier: Apache-2.0
"""Recorder of the `algorithm` that raw operators run with, for tests of how "auto" is resolved."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Codes(TorchDispatchMode):
    """Record (operator, algorithm) of every raw operator except for `_pack_conv3x3`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "spatialflow" and function is not torch.ops.spatialflow._pack_conv3x3.default:
            operator = function._schema.name.split("::")[1]
            names = [argument.name for argument in function._schema.arguments]
            self.seen += [(operator, value) for name, value in zip(names, arguments) if name.startswith("algorithm")]
        return function(*arguments, **(options or {}))
