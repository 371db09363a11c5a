# SPDX-License-Identifier: Apache-2.0
"""Location and loading of the compiled operator libraries."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple


class _Backend(NamedTuple):
    kernels: str  # "cpu" or "simt"
    target: str  # target of `make` that builds the libraries
    build: str = ""  # folder in build/ that contains the libraries; empty: they are in this package


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
"""Folder of the compiled files: this package, or the output of a build with sanitizers or coverage."""

FOLDER = BUILD / "lib"
"""Folder of the compiled libraries."""

# Levels, best first, by the result of torch's `get_cpu_capability`. The environment variable ATEN_CPU_CAPABILITY may
# lower that result.
_LEVELS = {
    "AVX512": ("x86-64-v4", "x86-64-v3", "x86-64-v2"),
    "AVX2": ("x86-64-v3", "x86-64-v2"),
    "DEFAULT": ("x86-64-v2",),
}


def library_path(name: str) -> Path:
    """Return the path of a library by its name, for instance "schema"; the file need not exist."""
    return FOLDER / f"libspatialflow_{name}.so"


def built_libraries() -> list[str]:
    """List the names of the libraries that were built: "schema", "cpu_x86-64-v4", "cuda", ..."""
    return sorted(path.stem.removeprefix("libspatialflow_") for path in FOLDER.glob("libspatialflow_*.so"))


def build_description() -> dict[str, str]:
    """Read the build description of the libraries: torch, compilers, CUDA architectures; empty if not built."""
    import json

    try:
        description: dict[str, str] = json.loads((FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return description


def cpu_levels() -> list[str]:
    """List the instruction-set levels that were built and that this processor runs, best first."""
    return [level for level in _processor_levels() if library_path(f"cpu_{level}").is_file()]


def _processor_levels() -> tuple[str, ...]:
    """List the instruction-set levels that this processor runs, best first."""
    import platform

    import torch

    if platform.machine() in ("x86_64", "AMD64"):
        return _LEVELS.get(torch.backends.cpu.get_cpu_capability(), _LEVELS["DEFAULT"])
    return ("native",)


def cpu_level() -> str:
    """Choose the instruction-set level of the CPU library: the best of `cpu_levels()`.

    The environment variable SPATIALFLOW_CPU_LEVEL selects a lower level.

    Raises:
        ImportError: no library was built, or none for this processor, or SPATIALFLOW_CPU_LEVEL names a level that is
            not in `cpu_levels()`.
    """
    usable = cpu_levels()
    selected = os.environ.get("SPATIALFLOW_CPU_LEVEL")
    if selected:
        if selected not in usable:
            raise ImportError(
                f"SPATIALFLOW_CPU_LEVEL={selected}: not a level that is built and that this processor runs; "
                f"those are {', '.join(usable) or 'none'}"
            )
        return selected
    if usable:
        return usable[0]
    built = [name.removeprefix("cpu_") for name in built_libraries() if name.startswith("cpu_")]
    if built:
        raise ImportError(
            f"spatialflow's CPU libraries in {FOLDER} are built for {', '.join(built)}, but this processor runs "
            f"{', '.join(_processor_levels())}: rebuild them on this machine with `pip install .` or "
            f"`make {_BACKEND.target}`"
        )
    raise ImportError(
        f"spatialflow's compiled libraries are missing in {FOLDER}: build them with `pip install .` or "
        f"`make {_BACKEND.target}`"
    )


def backend_library() -> str:
    """Choose the library with the kernels for CPU tensors, and return its name.

    The environment variable SPATIALFLOW_BACKEND selects the back end of tests. The value "simt" replaces the CPU
    kernels by interpreted CUDA kernels (docs/simt.md). The values "cpu_sanitized", "simt_sanitized" and
    "cpu_thread_sanitized" are builds with sanitizers (docs/sanitizers.md). The value "cpu_coverage" counts executed
    lines (`make coverage`). The value "cuda" selects the CPU library too, but requires the CUDA library; the tests then
    create their tensors on the GPU.

    Raises:
        ImportError: SPATIALFLOW_BACKEND is not the name of a back end, its library is missing, or there is no CPU
            library for this processor.
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


@functools.cache
def load() -> None:
    """Register all operators with torch (`torch.ops.spatialflow`); further calls do nothing."""
    import ctypes

    import torch

    backend = backend_library()
    _load("schema")
    _load(backend)
    if backend.startswith("cpu_") and hasattr(os, "register_at_fork"):
        library = ctypes.CDLL(str(library_path(backend)))
        threads_were_used = ctypes.c_bool.in_dll(library, "spatialflow_threads_were_used")

        def use_one_thread() -> None:
            # A fork does not copy threads: a parallel loop in the child would wait forever for threads of the parent.
            if threads_were_used.value:
                torch.set_num_threads(1)

        os.register_at_fork(after_in_child=use_one_thread)
    if torch.version.cuda is not None and library_path("cuda").is_file():
        _load("cuda")


def _load(name: str) -> None:
    import torch

    torch.ops.load_library(str(library_path(name)))
