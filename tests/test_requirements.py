# SPDX-License-Identifier: Apache-2.0
"""The operators need torch and numpy alone; panoptic segmentation names the packages that are missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spatialflow.requirements import _PACKAGE_BY_MODULE

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, missing=tuple(_PACKAGE_BY_MODULE)) -> subprocess.CompletedProcess:
    """Run code in a process in which the modules `missing` cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); "
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True)


def test_operators_need_torch_and_numpy_alone():
    done = run("import torch; from spatialflow.ops import nms; print(nms(torch.rand(3, 4), torch.rand(3), 0.5).dtype)")
    assert (done.stdout.strip(), done.returncode) == ("torch.int64", 0), done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import spatialflow; spatialflow.Predictor",
        "import spatialflow; spatialflow.ImageError",
        "import spatialflow; spatialflow.load_config('demo')",
        "import spatialflow.panoptic",
        "import spatialflow.data",
        "import spatialflow.engine.trainer",
    ],
)
def test_missing_packages_are_named_in_one_sentence(code):
    last = run(code).stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"ImportError: panoptic segmentation needs packages that are not installed: [-a-z, ]+; "
        r"`pip install 'spatialflow\[panoptic\]'` installs them",
        last,
    )


@pytest.mark.parametrize("module", _PACKAGE_BY_MODULE)
def test_only_the_missing_package_is_named(module):
    """Also one that few functions use: its part of the results is never left out without a word."""
    last = run("import spatialflow.engine", missing=(module,)).stderr.strip().splitlines()[-1]
    assert f"not installed: {_PACKAGE_BY_MODULE[module]};" in last


@pytest.mark.parametrize("command", ["predict a.jpg --config demo --output out", "evaluate a b", "synthesize out"])
def test_commands_end_with_the_sentence(command, tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); from spatialflow.cli.main import main; "
    done = run(f"{code}sys.exit(main({command.split()!r}))")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("spatialflow: panoptic segmentation needs packages that are not installed:")


def test_help_and_info_need_nothing():
    for arguments in (["--help"], ["predict", "--help"], ["info"]):
        done = run(f"from spatialflow.cli.main import main; sys.exit(main({arguments!r}))")
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not in a source tree")
def test_the_extra_has_the_same_packages():
    listed = re.search(r"^panoptic = \[.*?\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    assert re.findall(r'^    "([-\w]+)', listed, re.M) == sorted(_PACKAGE_BY_MODULE.values())
