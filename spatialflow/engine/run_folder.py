# SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: one run at a time, files of others, configuration, what an interrupted run saved."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from spatialflow.config import SECTIONS, Config
from spatialflow.engine.checkpoint_store import CheckpointStore, TrainingError
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.files import atomic_write, open_locked


@contextlib.contextmanager
def only_run_in(folder: Path, group: ProcessGroup) -> Iterator[None]:
    """Keep other runs out of a folder during the block, which ends with the process at the latest.

    Args:
        folder: created if it is absent, and removed again if the block writes nothing.
        group: processes of the run; the first one locks the folder for all.

    Raises:
        TrainingError: another process trains in the folder; raised in all processes of the group.
        OSError: the folder cannot be written.
    """
    path, is_new, error = folder / ".training.lock", not os.path.exists(folder), None
    with contextlib.ExitStack() as stack:
        if group.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(open_locked(path))
            except BlockingIOError:
                error = f"{folder}: is being written by another process; use another output folder"
            else:
                stack.callback(_remove_lock, path, is_new)
        for message in group.gather(error):
            if message is not None:
                raise TrainingError(message)
        yield


def _remove_lock(path: Path, with_folder: bool) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
        if with_folder:
            path.parent.rmdir()  # fails if the run has written a file


def check_replaced_files(folder: Path, group: ProcessGroup) -> None:
    """Check that a run without a checkpoint replaces no file but those of a run that ended before its first one.

    Args:
        folder: of the run.
        group: processes of the run; the first one looks.

    Raises:
        TrainingError: the folder has weights, or a file that is not of a run; raised in all processes of the group.
    """
    (message, *_) = group.gather(_replaced_file(folder) if group.is_first else None)
    if message is not None:
        raise TrainingError(message)


def _replaced_file(folder: Path) -> str | None:
    """Return the message about a file that a new run would replace; None if there is none."""
    if os.path.isfile(folder / "checkpoint.pt"):
        return None
    names = ["model.safetensors"]
    if not _is_log(folder / "log.jsonl"):
        names += ["log.jsonl", "config.yaml", "curves.png"]
    for name in names:
        if os.path.lexists(folder / name):
            return (
                f"{folder / name}: would be replaced, and there is no checkpoint.pt beside it to continue from; use "
                f"another folder, or start over (--restart)"
            )
    return None


def _is_log(path: Path) -> bool:
    """Tell whether a file is the log of a run; it is empty before the first step."""
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(100_000)
        row = json.loads(line) if line else {"kind": None}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "kind" in row


def write_config(config: Config, folder: Path) -> None:
    """Write the whole configuration of a run to `config.yaml` of its folder.

    Raises:
        OSError: the file cannot be written.
    """
    sections = {
        section: {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(getattr(config, section)).items()
        }
        for section in SECTIONS
    }
    with atomic_write(folder / "config.yaml", "w") as file:
        yaml.safe_dump(sections, file, sort_keys=False, allow_unicode=True)


def describe_saved(store: CheckpointStore, total_steps: int) -> str:
    """Say what an interrupted run has saved, and what the same command will do.

    Args:
        store: with the checkpoint.
        total_steps: of the run.
    """
    if store.saved_step is not None:
        return f"the same command continues at step {store.saved_step} of {total_steps}, from {store.path}"
    return "nothing is saved yet, so the same command starts again"
