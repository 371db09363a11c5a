# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow info`."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import spatialflow
from spatialflow import _library

SUMMARY = "show versions, libraries, the instruction-set level and CUDA architectures"
DESCRIPTION = "Show versions, libraries, the instruction-set level and CUDA architectures."
EXAMPLES = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing, as the command has no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print a table of versions and libraries; return exit code 2 if torch or the CPU library is missing."""
    built = _library.build_description()
    code, devices = 0, "unknown"
    try:
        import torch

        running = str(torch.__version__)
        count = torch.cuda.device_count()
        devices = ", ".join(torch.cuda.get_device_name(index) for index in range(count)) or "none"
    except ImportError as error:
        running, code = f"no torch ({error})", 2
    try:
        level = f"{_library.cpu_level()} in use"
        _library.load()
    except (ImportError, OSError) as error:
        level, code = f"none: {error}", 2
    rows = [
        ("spatialflow", f"{spatialflow.__version__} in {Path(__file__).resolve().parents[1]}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"runs on {running}, built for {built.get('torch', 'unknown')} (any from 2.11 on)"),
        ("numpy, opencv", f"{_version('numpy')}, {_version('opencv-python-headless')}"),
        ("torchvision", _version("torchvision")),
        ("libraries", ", ".join(_library.built_libraries()) or "none"),
        ("compiler", built.get("compiler", "unknown")),
        ("CPU level", level),
        ("CUDA library", _cuda_library(built)),
        ("CUDA devices", devices),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    return code


def _version(package: str) -> str:
    import importlib.metadata  # slows the start of every command otherwise

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_library(built: dict[str, str]) -> str:
    if "cuda" in _library.built_libraries() and built.get("cuda_architectures"):
        return f"for {built['cuda_architectures']}, by {built['cuda_compiler']}"
    return "not built"
