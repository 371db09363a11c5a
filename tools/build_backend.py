# SPDX-License-Identifier: Apache-2.0
"""Build backend: setuptools, compiling against the torch that is installed in the user's environment.

A requirement in pyproject.toml would make every isolated build download a second torch. The libraries use the stable
ABI, so any torch from 2.11 on will do.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "torch_folder",
]

MIN_TORCH = (2, 11)
"""Oldest torch that has the stable ABI that the libraries use."""

NO_TORCH = (
    "spatialflow: building needs torch 2.11 or later in the environment: install it first (`pip install torch`), or "
    "set SPATIALFLOW_TORCH_PYTHON to the Python interpreter of an environment that has it{found}"
)


def torch_folder() -> str:
    """Find the torch to build against, see `_interpreters`.

    Returns:
        The folder of the torch package.

    Raises:
        SystemExit: no environment has torch 2.11 or later.
    """
    found = ""
    for interpreter in dict.fromkeys(_interpreters()):
        folder, version = _torch_of(interpreter)
        if folder is not None and version >= MIN_TORCH:
            return folder
        if folder is not None and not found:
            found = f"; {folder} is torch {'.'.join(map(str, version))}"
    sys.exit(NO_TORCH.format(found=found))


def _interpreters() -> Iterator[str]:
    """List the Python interpreters whose torch the user may mean, the likeliest first.

    An isolated build runs in an environment of its own. That of pip has the interpreter of the target; those of uv and
    `python -m build` do not. Their target is the activated environment, whose folder is on PATH, or the interpreter
    that the command line of a parent process names.
    """
    if chosen := os.environ.get("SPATIALFLOW_TORCH_PYTHON"):
        yield chosen
        return
    yield sys.executable
    yield from _interpreters_of_parents()
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if path := shutil.which("python", path=folder) or shutil.which("python3", path=folder):
            yield path
    if prefix := os.environ.get("CONDA_PREFIX"):
        yield f"{prefix}/bin/python"


def _interpreters_of_parents() -> Iterator[str]:
    """List the interpreters and environments that command lines of parent processes name; on Linux only."""
    process = os.getppid()
    while process > 1:
        try:
            words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            folder = Path(os.readlink(f"/proc/{process}/cwd"))
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return
        is_uv = Path(words[0]).name == "uv"
        for word in (words[0], *(words[1:] if is_uv else ()), *([".venv"] if is_uv else ())):
            path = folder / word.rpartition("=")[2]
            for candidate in (path, path / "bin" / "python"):
                if candidate.name.startswith("python") and os.access(candidate, os.X_OK) and candidate.is_file():
                    yield str(candidate)


def _torch_of(interpreter: str) -> tuple[str | None, tuple[int, ...]]:
    """Find the folder and the version of an interpreter's torch; None and () if it has none.

    pip's isolated build hides the target's packages behind PYTHONPATH, so PYTHONPATH is left out.
    """
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run([interpreter, "-c", find], env=environment, cwd="/", capture_output=True, text=True)
    except OSError:
        return None, ()
    folder = done.stdout.strip()
    if done.returncode != 0 or not os.path.isfile(f"{folder}/version.py"):
        return None, ()
    version = re.search(r"__version__ = '(\d+)\.(\d+)", Path(folder, "version.py").read_text())
    return folder, (int(version[1]), int(version[2])) if version else ()


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Return setuptools' requirements; end the build in seconds if there is no torch."""
    torch_folder()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Return setuptools' requirements; end the build in seconds if there is no torch."""
    torch_folder()
    return build_meta.get_requires_for_build_editable(config_settings)
