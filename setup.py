# SPDX-License-Identifier: Apache-2.0
"""Drives CMake, which describes the build; metadata is in pyproject.toml.

Environment: SPATIALFLOW_CUDA=on|off|auto, SPATIALFLOW_CPU_LEVELS=x86-64-v3,..., CMAKE_CUDA_ARCHITECTURES=80;90a or
TORCH_CUDA_ARCH_LIST="8.0;9.0a", CMAKE_BUILD_PARALLEL_LEVEL=N.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PASSED_THROUGH = ("SPATIALFLOW_CUDA", "SPATIALFLOW_CPU_LEVELS", "CMAKE_CUDA_ARCHITECTURES")


def torch_folder() -> str | None:
    """Folder of the torch to build against: that of the environment installed into, else of the build environment.

    A build frontend that isolates the build hides the first one behind PYTHONPATH. Looking there means that no
    second torch is downloaded, and that the wheel is built with the one it will meet.
    """
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for environment in (outside, dict(os.environ)):
        answer = subprocess.run(
            [sys.executable, "-c", find], env=environment, cwd="/", capture_output=True, text=True, check=True
        )
        if answer.stdout.strip():
            return answer.stdout.strip()
    return None


class CMakeBuild(build_ext):
    """Configures and builds; CMake places all libraries in the package itself."""

    def run(self) -> None:
        import pybind11

        torch = torch_folder()
        if torch is None:
            sys.exit("spatialflow: building needs torch: `pip install torch`, then build again")
        package = ROOT / "spatialflow" if self.inplace else Path(self.build_lib).resolve() / "spatialflow"
        folder = ROOT / "build" / "develop" if self.inplace else Path(self.build_temp).resolve()
        # One that is not given takes its default again, whatever the last build in this folder was given.
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
        command = ["cmake", *map(str, arguments)]
        if subprocess.run(command).returncode != 0:
            sys.exit(f"spatialflow: the build failed in `{' '.join(command)}`; the reason is above")


setup(
    ext_modules=[Extension("spatialflow._evaluation", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if torch_folder() else ["torch>=2.11"],
)
