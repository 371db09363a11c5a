# SPDX-License-Identifier: Apache-2.0
"""Private names of torch: the installed version has them, and only one module of the package uses them."""

import re
from pathlib import Path

import pytest
import torch

import spatialflow
from spatialflow.ops import _torch_private

PACKAGE = Path(spatialflow.__file__).parent

# Private attributes and modules of torch. Exceptions: `torch._check` is documented; `torch.ops` holds operators;
# PyTorch's documentation refers users to `torch._dynamo.config`.
PRIVATE = re.compile(r"\b(?:torch|forward_ad)(?:\.(?!ops\b)\w+)*\.(?!_check\b|__|_dynamo\.config\b)_\w+")
PRIVATE_IMPORT = re.compile(r"^ *from torch[\w.]* import .*\b_\w+|^ *(?:from|import) torch[\w.]*\._\w+", re.M)


def test_names():
    """The list has more than ten private names and no duplicates."""
    assert len(_torch_private.NAMES) == len(set(_torch_private.NAMES)) > 10


@pytest.mark.parametrize("name", _torch_private.NAMES)
def test_installed_torch_has(name):
    """The installed torch has the name; the message of a failure has the name and the version."""
    value = torch
    for part in name.split(".")[1:]:
        assert hasattr(value, part), f"torch {torch.__version__} has no {name}"
        value = getattr(value, part)


@pytest.mark.parametrize("name", ["torch._C._no_such_name", "torch._no_such_module.name"])
def test_missing_name(name):
    message = f"^spatialflow: torch {re.escape(torch.__version__)} has no {re.escape(name)}, a private name"
    with pytest.raises(ImportError, match=message):
        _torch_private._private(name)
    _torch_private.NAMES.remove(name)


def test_one_module_uses_private_names():
    uses = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_torch_private.py":
            continue
        text = path.read_text()
        uses += [f"{path.relative_to(PACKAGE)}: {match[0]}" for match in PRIVATE.finditer(text)]
        uses += [f"{path.relative_to(PACKAGE)}: {match[0]}" for match in PRIVATE_IMPORT.finditer(text)]
    assert uses == []
