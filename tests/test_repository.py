# SPDX-License-Identifier: Apache-2.0
"""Consistency of the files at the root of the repository."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import spatialflow

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not in a source tree")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_one_version():
    """The citation and the newest release of the changelog have the version of `spatialflow.__version__`."""
    assert re.search(r"^version: (.*)$", text("CITATION.cff"), re.M)[1] == spatialflow.__version__
    assert re.search(r"^## \[(\d.*?)\]", text("CHANGELOG.md"), re.M)[1] == spatialflow.__version__


def test_pre_commit_has_the_versions_of_make_lint():
    pinned = dict(re.findall(r'^    "([\w-]+)==([\d.]+)",$', text("pyproject.toml"), re.M))
    hooks = dict(re.findall(r"repo: .*/(\S+)\n    rev: v(\S+)", text(".pre-commit-config.yaml")))
    assert hooks["ruff-pre-commit"] == pinned["ruff"]
    assert hooks["mirrors-clang-format"] == pinned["clang-format"]
    assert hooks["codespell"] == pinned["codespell"]
    assert pinned["clang-format"] in text(".clang-format")
    assert hooks["actionlint"] in text(".github/workflows/ci.yml")


def test_workflows_run_make_targets():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M))
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    named = {name for path in workflows for name in re.findall(r"\bmake ([a-z-]+)", path.read_text())}
    assert named and named <= targets


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not in a git checkout")
def test_data_files_are_shipped():
    """Every file of the package is Python or matches a package-data pattern."""
    patterns = re.search(r"package-data\]\nspatialflow = \[(.*)\]", text("pyproject.toml"))[1]
    patterns = [pattern.replace("**/", "*") for pattern in re.findall(r'"(.*?)"', patterns)]
    listing = subprocess.run(["git", "ls-files", "spatialflow"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name.removeprefix("spatialflow/") for name in listing.stdout.splitlines() if not name.endswith(".py")]
    assert names and [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not in a git checkout")
def test_modules_are_shipped(tmp_path):
    """An installed package has every module of `spatialflow`, and the benchmarks except the Hopper probes."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    command = ["git", "ls-files", "spatialflow/*.py", "benchmarks/*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {re.sub("^benchmarks", "spatialflow/benchmarks", name) for name in listed if "hopper_probes" not in name}
    assert built == names and "spatialflow/benchmarks/harness/timing.py" in names
