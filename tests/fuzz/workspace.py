# SPDX-License-Identifier: Apache-2.0
"""Folder, valid input files and command runner that the readers of the file fuzzer share."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from fuzz.mutate import mutate_bytes, mutate_tree
from spatialflow.cli import main as cli
from spatialflow.data.synthetic import synthesize

SIZE = (48, 64)
MESSAGE_LENGTH = 1000


class WrongResult(Exception):
    """A reader has returned a wrong result, or a command has a forbidden message or exit code."""


def message_difference(text: str) -> str | None:
    """Return None for a message of one line with at most MESSAGE_LENGTH characters, else the difference."""
    if "\n" in text.strip() or len(text) > MESSAGE_LENGTH or not text.strip():
        return f"a message of {len(text)} characters that is not one line: {text[:300]!r}"
    return None


@functools.cache
def input_folder() -> Path:
    """Return a temporary folder with two valid scenes, created once per worker; readers add their own valid files."""
    root = Path(tempfile.mkdtemp(prefix="fuzz_files_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for _ in synthesize(root / "scenes", 2, SIZE, 0):
        pass
    return root


def canary() -> Path:
    """Return the path of a file that exists only if a reader has run code contained in its input."""
    return input_folder() / "canary"


def scenes() -> Path:
    return input_folder() / "scenes"


def json_bytes(tree: Any) -> bytes:
    """Encode as JSON; non-finite numbers become NaN and Infinity, as Python's json writes them."""
    return json.dumps(tree, ensure_ascii=True, default=str).encode()


def edited_json(tree: Any, changes: list) -> bytes:
    return mutate_bytes(json_bytes(mutate_tree(tree, changes)), changes)


def run_command(*arguments: Any, silent: bool = False) -> tuple[int, str]:
    """Run a command; return its exit code and standard error.

    Raise `WrongResult` for a forbidden exit code, message or warning.

    Args:
        arguments: command line.
        silent: whether standard error may be empty with exit code 1, because the message is on standard output.
    """
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # unlike StringIO, it fails on characters that cannot be encoded
    err = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as shown,
        ):
            warnings.simplefilter("default")
            code = cli.main(list(map(str, arguments)))
    except SystemExit as error:
        code = error.code
    for warning in shown:  # the command prints each DataWarning; other warnings reach this list
        if not issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | ImportWarning):
            raise WrongResult(f"a warning with a line of source: {warning.category.__name__}: {warning.message}")
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    for line in lines:
        if not line.startswith(("spatialflow: ", "usage: ", "skipped: ")) or len(line) > MESSAGE_LENGTH:
            raise WrongResult(f"standard error has a line that is not a message: {line[:500]!r}")
    if code not in (0, 1, 2) or (code > silent and not lines):
        raise WrongResult(f"exit code {code} with {len(lines)} lines on standard error")
    return code, "\n".join(lines)
