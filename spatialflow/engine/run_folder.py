# SPDX-License-Identifier: Apache-2.0
"""Protection of the folder of a training run: one process at a time, and no file of others is replaced."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from spatialflow.engine.checkpoint_store import TrainingError

LOCK = ".lock"
"""File that the process of a run locks."""


def check_replaced_files(folder: Path) -> None:
    """Check that a new run replaces no file but those of a run that ended before its first checkpoint.

    Args:
        folder: of the run, which has no checkpoint.

    Raises:
        TrainingError: the folder has weights, or a file that is not of a run.
    """
    names = ["model.safetensors"]
    if not _is_log(folder / "log.jsonl"):
        names += ["log.jsonl", "config.yaml", "curves.png"]
    for name in names:
        if os.path.lexists(folder / name):
            raise TrainingError(
                f"{folder / name}: would be replaced, and there is no checkpoint.pt beside it to continue from; use "
                f"another folder, or start over (--restart)"
            )


def _is_log(path: Path) -> bool:
    """Tell whether a file is the log of a run; it is empty before the first step."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(100_000)
        row = json.loads(line) if line else {"kind": None}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "kind" in row


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Within the block, let no other process train into the folder, which is created.

    The lock ends with the process, whatever ends it, and does not pass to processes that load data. Where the file
    system has no locks, there is none.

    Raises:
        TrainingError: another process trains into the folder.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise TrainingError(f"{folder}: another process trains into this folder; use another one") from None
        yield
    finally:
        os.close(handle)
