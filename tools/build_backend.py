# SPDX-License-Identifier: Apache-2.0
"""Build backend: setuptools, with torch as a build requirement only where no torch is installed.

A fixed requirement in pyproject.toml would make every isolated build download a second torch. The wheel would then be
compiled against that torch instead of the installed one. The libraries use the stable ABI, so any torch from 2.11 on
will do.
"""

import os
import subprocess
import sys

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

TORCH = "torch>=2.11"


def torch_folder() -> str | None:
    """Find the torch to build against: that of the target environment, else that of the build environment.

    pip's isolated build hides the target environment behind PYTHONPATH, so the first search leaves PYTHONPATH out.

    Returns:
        The folder of the torch package; None if neither environment has one.
    """
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for environment in (without_path, dict(os.environ)):
        done = subprocess.run(
            [sys.executable, "-c", find], env=environment, cwd="/", capture_output=True, text=True, check=True
        )
        if done.stdout.strip():
            return done.stdout.strip()
    return None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Add torch to setuptools' requirements if it is not installed."""
    return build_meta.get_requires_for_build_wheel(config_settings) + ([] if torch_folder() else [TORCH])


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Add torch to setuptools' requirements if it is not installed."""
    return build_meta.get_requires_for_build_editable(config_settings) + ([] if torch_folder() else [TORCH])
