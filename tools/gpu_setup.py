# SPDX-License-Identifier: Apache-2.0
"""Preparation of `gpu_check.py`: the device, missing packages, and the compilation of `spatialflow._evaluation`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from gpu_execution import ROOT, start_command

SITE = ROOT / "build" / "gpu_check_site"
"""Folder into which the packages from `wheels/` are installed."""


def device_of(backend: str) -> dict[str, Any] | None:
    """Return device, driver and versions as seen by a separate process; None without a GPU or libraries."""
    code = (
        "import json, os, torch, harness, spatialflow.ops\n"
        "from spatialflow import _library\n"
        "cuda = os.environ['SPATIALFLOW_BACKEND'] == 'cuda'\n"
        "about = dict(device=harness.device_name('cuda' if cuda else 'cpu'), torch=torch.__version__,\n"
        "             cuda=torch.version.cuda, commit=harness.commit(), built=_library.build_description())\n"
        "print(json.dumps(about))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        env=environment_of(backend),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        print(done.stderr.strip().rsplit("\n", 1)[-1], file=sys.stderr)
        return None
    about = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    about["driver"] = driver_version()
    about["packages"] = {name: has_module(name) for name in ("torchvision", "cupy", "triton", "deflate", "pycocotools")}
    return about


def driver_version() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment_of(backend: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(SITE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "SPATIALFLOW_BACKEND": backend, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None or any(SITE.glob(f"{name}*"))


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit."""
    folders = ["/usr/local/cuda/bin", *sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def install_wheels() -> None:
    """Install missing packages from `wheels/` into `SITE`, without a network."""
    wheels = ROOT / "wheels"
    names = {wheel.name.split("-")[0] for wheel in wheels.glob("*.whl")}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    for name in sorted(name for name in names if not has_module(name)):
        command = [*pip, "--find-links", str(wheels), "--target", str(SITE), name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"gpu-check: {name} could not be installed: {done.stderr.strip()[-200:]}", file=sys.stderr)


def compile_evaluation() -> subprocess.Popen | None:
    """Start the compilation of `spatialflow._evaluation`; return None if it exists or cannot be compiled."""
    package = ROOT / "spatialflow"
    compiler = shutil.which("c++") or shutil.which("g++")
    if any((package / f"_evaluation{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        return None
    if compiler is None or not has_module("pybind11"):
        return None
    import pybind11

    headers = (str(ROOT / "csrc"), pybind11.get_include(), sysconfig.get_path("include"))
    sources = sorted(str(path) for path in (ROOT / "csrc" / "evaluation").glob("*.cpp"))
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", *(f"-I{folder}" for folder in headers), *sources]
    return start_command([*command, "-o", str(package / f"_evaluation{EXTENSION_SUFFIXES[0]}")])
