# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled operator libraries; the only module that knows where they are."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from pathlib import Path
from typing import NamedTuple


class _Backend(NamedTuple):
    kernels: str
    target: str
    """What `make` builds it with."""
    build: str = ""
    """Folder of build/ with a package folder of its own; empty: what is compiled lies in this package."""


_BACKENDS = {
    "cpu": _Backend("cpu", "build"),
    "cuda": _Backend("cpu", "build"),
    "simt": _Backend("simt", "test-simt"),
    "cpu_sanitized": _Backend("cpu", "sanitize", "sanitized"),
    "simt_sanitized": _Backend("simt", "test-simt-sanitize", "sanitized"),
    "cpu_coverage": _Backend("cpu", "coverage", "coverage"),
    "cpu_thread_sanitized": _Backend("cpu", "sanitize-threads", "thread_sanitized"),
}
_NAME = os.environ.get("SPATIALFLOW_BACKEND", "cpu")
_BACKEND = _BACKENDS.get(_NAME, _BACKENDS["cpu"])
_PACKAGE = Path(__file__).resolve().parent

BUILD = _PACKAGE.parent / "build" / _BACKEND.build / "package" if _BACKEND.build else _PACKAGE
"""The folder with all that is compiled: this package, or the one that a build with sanitizers filled."""

FOLDER = BUILD / "lib"

# torch's name for what the processor offers (and ATEN_CPU_CAPABILITY may lower) -> our libraries, best first.
_LEVELS = {
    "AVX512": ("x86-64-v4", "x86-64-v3", "x86-64-v2"),
    "AVX2": ("x86-64-v3", "x86-64-v2"),
    "DEFAULT": ("x86-64-v2",),
}


def library_path(name: str) -> Path:
    return FOLDER / f"libspatialflow_{name}.so"


def built_libraries() -> list[str]:
    """Names of the libraries that were built: "schema", "cpu_x86-64-v4", "cuda", ..."""
    return sorted(path.stem.removeprefix("libspatialflow_") for path in FOLDER.glob("libspatialflow_*.so"))


def build_description() -> dict[str, str]:
    """What the libraries were built with: torch, compiler, cuda_architectures, cuda_compiler; empty if not built."""
    try:
        return json.loads((FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}


def cpu_levels() -> list[str]:
    """Instruction-set levels that were built and that this processor runs, best first."""
    import torch

    if platform.machine() in ("x86_64", "AMD64"):
        usable = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), _LEVELS["DEFAULT"])
    else:
        usable = ("native",)
    return [level for level in usable if library_path(f"cpu_{level}").is_file()]


def cpu_level() -> str:
    """Instruction-set level of the CPU library to use: the best of `cpu_levels()`.

    The environment variable SPATIALFLOW_CPU_LEVEL asks for a lower one.

    Raises:
        ImportError: no built library fits, or SPATIALFLOW_CPU_LEVEL names one that does not.
    """
    candidates = cpu_levels()
    wanted = os.environ.get("SPATIALFLOW_CPU_LEVEL")
    if wanted:
        if wanted not in candidates:
            raise ImportError(
                f"SPATIALFLOW_CPU_LEVEL={wanted}: not a level that is built and that this processor runs; "
                f"those are {', '.join(candidates) or 'none'}"
            )
        return wanted
    if not candidates:
        raise ImportError(
            f"spatialflow's compiled libraries are missing in {FOLDER}: build them with `pip install .` or "
            f"`make {_BACKEND.target}`"
        )
    return candidates[0]


def backend_library() -> str:
    """Name of the library with the kernels for CPU tensors.

    The environment variable SPATIALFLOW_BACKEND chooses the back end of tests: "simt" replaces the CPU kernels by
    interpreted CUDA kernels (docs/simt.md); "cpu_sanitized", "simt_sanitized" and "cpu_thread_sanitized" are builds
    with sanitizers (docs/sanitizers.md); "cpu_coverage" counts executed lines (`make coverage`); "cuda" changes nothing
    here, but insists on the CUDA library, and the tests then make their tensors on the GPU.

    Raises:
        ImportError: SPATIALFLOW_BACKEND names no back end, or one that is not there; or no CPU library fits.
    """
    import torch

    if _NAME not in _BACKENDS:
        raise ImportError(f"SPATIALFLOW_BACKEND must be one of {', '.join(_BACKENDS)}, got {_NAME!r}")
    if _NAME == "cuda" and not (library_path("cuda").is_file() and torch.cuda.is_available()):
        raise ImportError(
            f"SPATIALFLOW_BACKEND=cuda: needs {library_path('cuda')} and a CUDA device; torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} devices"
        )
    if _BACKEND.kernels == "cpu":
        return f"cpu_{cpu_level()}"
    if not library_path("simt").is_file():
        raise ImportError(
            f"SPATIALFLOW_BACKEND={_NAME}: {library_path('simt')} is missing, `make {_BACKEND.target}` builds it"
        )
    return "simt"


def load() -> None:
    """Registers all operators with torch (`torch.ops.spatialflow`). Loading twice does nothing."""
    import torch

    if getattr(load, "done", False):
        return
    backend = backend_library()
    torch.ops.load_library(str(library_path("schema")))
    torch.ops.load_library(str(library_path(backend)))
    if backend.startswith("cpu_") and hasattr(os, "register_at_fork"):
        library = ctypes.CDLL(str(library_path(backend)))
        threads_were_used = ctypes.c_bool.in_dll(library, "spatialflow_threads_were_used")
        # Threads are not forked. Kernels, and torch's own copies within operators, would wait forever for the parent's.
        os.register_at_fork(after_in_child=lambda: threads_were_used.value and torch.set_num_threads(1))
    if torch.version.cuda is not None and library_path("cuda").is_file():
        torch.ops.load_library(str(library_path("cuda")))
    load.done = True
