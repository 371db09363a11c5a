# SPDX-License-Identifier: Apache-2.0
"""The build finds the torch of the user's environment, and downloads none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"

pytestmark = pytest.mark.skipif(not (TOOLS / "build_backend.py").is_file(), reason="not in a source tree")
pytest.importorskip("setuptools")


@pytest.fixture
def environment(tmp_path):
    """Make an environment whose interpreter reports the torch of a folder, by name and version."""

    def make(name: str, version: str | None) -> Path:
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        torch = tmp_path / name / "torch"
        if version is not None:
            torch.mkdir()
            (torch / "version.py").write_text(f"__version__ = '{version}'\n")
        python.write_text(f"#!/bin/sh\necho {torch if version is not None else ''}\n")
        python.chmod(0o755)
        return python

    return make


def torch_folder(python: Path, **variables) -> subprocess.CompletedProcess:
    """Call the backend's search in a process whose own interpreter is `python`; PATH has nothing else."""
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import build_backend as b; "
    code += f"sys.executable = {str(python)!r}; b._interpreters_of_parents = lambda: iter(()); print(b.torch_folder())"
    environment = {"PATH": "/nowhere", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_interpreter_of_the_build(environment):
    python = environment("target", "2.13.0+cpu")
    assert torch_folder(python).stdout.strip() == str(python.parents[1] / "torch")


def test_the_activated_environment(environment):
    isolated, target = environment("isolated", None), environment("target", "2.11.0")
    done = torch_folder(isolated, PATH=f"{isolated.parent}{os.pathsep}{target.parent}")
    assert done.stdout.strip() == str(target.parents[1] / "torch")


def test_conda(environment):
    isolated, target = environment("isolated", None), environment("target", "2.14.1")
    done = torch_folder(isolated, CONDA_PREFIX=str(target.parents[1]))
    assert done.stdout.strip() == str(target.parents[1] / "torch")


def test_the_chosen_interpreter_comes_first(environment):
    other, chosen = environment("other", "2.13.0"), environment("chosen", "2.12.0")
    done = torch_folder(other, SPATIALFLOW_TORCH_PYTHON=str(chosen))
    assert done.stdout.strip() == str(chosen.parents[1] / "torch")


@pytest.mark.parametrize("code", [0, 1])
def test_the_build_shows_progress_and_names_what_failed(environment, tmp_path, code):
    """With a cmake that prints the form of Ninja's lines instead of building."""
    python = environment("target", "2.13.0")
    pytest.importorskip("pybind11")
    (tmp_path / "cmake").write_text(f'#!/bin/sh\necho "$NINJA_STATUS"\nexit {code}\n')
    (tmp_path / "cmake").chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SPATIALFLOW_TORCH_PYTHON": str(python)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp"]
    command.append(str(tmp_path / "temp"))
    done = subprocess.run(command, cwd=TOOLS.parent, env=os.environ | variables, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("spatialflow: ")]
    assert lines == ["spatialflow: %f of %t files in %e s: "] * (1 if code else 2) and done.returncode == code
    failure = done.stderr.splitlines()[-1] if code else ""
    assert not code or failure.startswith("spatialflow: the build failed in `cmake -S ")
    assert not code or failure.endswith("`; the reason is above")


def test_without_torch_the_build_ends_with_one_sentence(environment):
    done = torch_folder(environment("isolated", None))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        "spatialflow: building needs torch 2.11 or later in the environment: install it first (`pip install torch`), "
        "or set SPATIALFLOW_TORCH_PYTHON to the Python interpreter of an environment that has it"
    )


def test_an_older_torch_is_named(environment):
    python = environment("old", "2.5.1")
    done = torch_folder(python)
    assert done.returncode == 1 and done.stderr.strip().endswith(f"; {python.parents[1] / 'torch'} is torch 2.5")


def test_the_interpreter_that_a_parent_process_names(environment, tmp_path):
    """`python -m build` and `uv pip install --python` build in an environment of their own."""
    target = environment("target", "2.13.0")
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import build_backend as b; "
    code += "print(*b._interpreters_of_parents(), sep='\\n')"
    fake_uv = tmp_path / "uv"
    fake_uv.symlink_to(sys.executable)
    script = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[-2:]])"
    command = [str(fake_uv), "-c", script, f"--python={target.parents[1].name}", "-c", code]
    done = subprocess.run(command, executable=sys.executable, cwd=tmp_path, capture_output=True, text=True)
    assert str(target) in done.stdout.splitlines()
