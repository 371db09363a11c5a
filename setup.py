# SPDX-License-Identifier: Apache-2.0
"""Build with CMake; metadata is in pyproject.toml.

Environment: SPATIALFLOW_CUDA=on|off|auto, SPATIALFLOW_CPU_LEVELS=x86-64-v3,..., CMAKE_CUDA_ARCHITECTURES=80;90a or
TORCH_CUDA_ARCH_LIST="8.0;9.0a", CMAKE_BUILD_PARALLEL_LEVEL=N, SPATIALFLOW_TORCH_PYTHON=/path/to/python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # not on the path if setup.py is run without the build backend

from build_backend import torch_folder  # noqa: E402  # tools/ is on the path from here on

PASSED_THROUGH = ("SPATIALFLOW_CUDA", "SPATIALFLOW_CPU_LEVELS", "CMAKE_CUDA_ARCHITECTURES")


class CMakeBuild(build_ext):
    """Configure and build with CMake, which writes all libraries into the package folder."""

    def run(self) -> None:
        """Build into the package folder: of the source tree for an in-place build, else of the wheel."""
        import pybind11

        torch = torch_folder()
        package = ROOT / "spatialflow" if self.inplace else Path(self.build_lib).resolve() / "spatialflow"
        folder = ROOT / "build" / "develop" if self.inplace else Path(self.build_temp).resolve()
        # CMake remembers options. -U resets those that are not set now to their defaults.
        options = [f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}" for name in PASSED_THROUGH]
        self.cmake(
            "-S",
            ROOT,
            "-B",
            folder,
            "-G",
            "Ninja",
            "--log-level=WARNING",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DSPATIALFLOW_TORCH_DIR={torch}",
            f"-DSPATIALFLOW_PACKAGE_DIR={package}",
            *options,
        )
        self.cmake("--build", folder)

    @staticmethod
    def cmake(*arguments: object) -> None:
        """Run CMake; exit with the command line if it fails."""
        command = ["cmake", *map(str, arguments)]
        progress = {"NINJA_STATUS": "spatialflow: %f of %t files in %e s: "}
        if subprocess.run(command, env=progress | os.environ).returncode != 0:
            sys.exit(f"spatialflow: the build failed in `{' '.join(command)}`; the reason is above")


setup(
    # The mapping of benchmarks/ into the package cannot be expressed beside `packages.find` in pyproject.toml.
    packages=[
        *find_packages(include=["spatialflow", "spatialflow.*"]),
        "spatialflow.benchmarks",
        "spatialflow.benchmarks.harness",
    ],
    package_dir={"spatialflow.benchmarks": "benchmarks"},
    ext_modules=[Extension("spatialflow._evaluation", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
