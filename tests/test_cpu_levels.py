# SPDX-License-Identifier: Apache-2.0
"""The CPU libraries that this processor runs and would not choose: the other tests reach only the best one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spatialflow import _library

TESTS = Path(__file__).resolve().parent
OPERATORS = sorted(
    str(path) for path in TESTS.glob("test_*.py") if re.search(r"^class .*\(OpMatrix\)", path.read_text(), re.MULTILINE)
)
# bfloat16 for the conversions; gradients have kernels of their own.
QUESTIONS = "(test_reference and (float32 or bfloat16)) or (test_gradient_against_reference and float32)"


@pytest.mark.parametrize("level", _library.cpu_levels()[1:])
def test_operators_equal_their_twins(level):
    environment = os.environ | {"SPATIALFLOW_CPU_LEVEL": level, "SPATIALFLOW_BACKEND": "cpu"}
    used = "from spatialflow import _library; print(_library.backend_library())"
    loaded = subprocess.run(
        [sys.executable, "-c", used], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == f"cpu_{level}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", QUESTIONS, *OPERATORS]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 4 * len(OPERATORS)
