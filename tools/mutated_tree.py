# SPDX-License-Identifier: Apache-2.0
"""Copy of the tree under build/mutations, for tools that break a line and expect a test or the fuzzer to fail.

The working tree is only read.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutations" / "tree"
T = TypeVar("T", bound=Any)


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], cwd=COPY, capture_output=True, text=True, **options)


def select(faults: Sequence[T], texts: Sequence[str]) -> list[T]:
    """Return the faults whose file or name contains one of the texts; all of them without texts."""
    return [f for f in faults if not texts or any(text in f"{f.file} {f.name}" for text in texts)]


def copy_tree() -> None:
    """Copy the tracked files and `spatialflow._evaluation`; write only changed files, for incremental rebuilds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    built = [path.relative_to(ROOT) for path in (ROOT / "spatialflow").glob("_evaluation*.so")]
    for name in [*listed.stdout.strip("\0").split("\0"), *built]:
        content, target = (ROOT / name).read_bytes(), COPY / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def build(*libraries: str) -> None:
    """Build libraries, such as "simt" or "cpu_x86-64-v3"; raise RuntimeError with the output of a failed build."""
    folder = COPY.parent / "build"
    level = next((name.removeprefix("cpu_") for name in libraries if name.startswith("cpu_")), "")
    configured = run(
        "cmake",
        "--log-level=WARNING",
        "-S",
        COPY,
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DSPATIALFLOW_SIMT=on",
        "-DSPATIALFLOW_CUDA=off",
        *([f"-DSPATIALFLOW_CPU_LEVELS={level}"] if level else []),
    )
    if configured.returncode != 0:
        raise RuntimeError(configured.stdout + configured.stderr)
    targets = [f"spatialflow_{name}" for name in ("schema", *libraries)]
    built = run("cmake", "--build", folder, "--target", *targets)
    if built.returncode != 0:
        raise RuntimeError(built.stdout + built.stderr)


@contextlib.contextmanager
def mutated(file: str, before: str, after: str) -> Iterator[int]:
    """Replace `before`, which is unique in the copy's `file`, by `after` inside the block; yield its line number."""
    path = COPY / file
    source = path.read_text()
    if source.count(before) != 1:
        raise RuntimeError(f"{file} holds {source.count(before)} times: {before}")
    try:
        path.write_text(source.replace(before, after))
        yield source[: source.index(before)].count("\n") + 1
    finally:
        path.write_text(source)
