# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` without a GPU: it says so, its steps run one after the other whatever becomes of them, and the dry
run on the interpreted kernels goes through."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatialflow import _library

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.py"
if not SCRIPT.is_file():
    pytest.skip("not in a source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
        yield module
    del sys.modules["gpu_check"]


def run_check(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run_check("--output", str(tmp_path))
    assert done.returncode == 77, done.stderr
    assert "no GPU" in done.stdout and "exit code 77" in done.stdout
    assert list(tmp_path.iterdir()) == []


def python(code):
    return [sys.executable, "-c", code]


def test_steps_go_on_whatever_becomes_of_one(gpu_check, tmp_path, monkeypatch, capsys):
    Step = gpu_check.Step
    steps = [
        Step("good", python("print('first'); print('3 passed')")),
        Step(
            "many",
            python("import sys; print(sys.argv[1] + ' passed, 1 skipped in 2.5s')"),
            ["3", "4"],
            30,
            gpu_check.pytest_detail,
        ),
        Step("one of many", python("import sys; sys.exit(int(sys.argv[1]))"), ["0", "2"]),
        Step("bad", python("print('why it failed'); raise SystemExit(3)")),
        Step("slow", python("import time; print('begun', flush=True); time.sleep(60)"), limit=2),
        Step("planted", python("raise SystemExit(9)"), expected_code=9),
        Step("planted, not found", python("pass"), expected_code=9),
        Step("absent", skipped="no such tool"),
    ]
    about = dict(device="Test GPU", torch="2.11", cuda="13.0", commit="abc", driver="1.2")
    monkeypatch.setattr(gpu_check, "make_steps", lambda backend, output: steps)
    monkeypatch.setattr(gpu_check, "device_of", lambda backend: dict(about))
    begin = time.monotonic()
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 30
    content = json.loads((tmp_path / "test-gpu" / "gpu_check.json").read_text())
    statuses = {step["name"]: step["status"] for step in content["steps"]}
    assert statuses == {
        "good": "passed", "many": "passed", "one of many": "failed", "bad": "failed", "slow": "timed out",
        "planted": "passed", "planted, not found": "failed",
        "absent": "skipped",
    }  # fmt: skip
    assert content["device"] == "Test GPU" and content["commit"] == "abc" and content["backend"] == "cuda"
    text = (tmp_path / "test-gpu" / "gpu_check.md").read_text()
    assert (
        "| good | passed |" in text
        and "3 passed" in text
        and "7 passed, 2 skipped" in text
        and "why it failed" in text
        and "no such tool" in text
    )
    logs = tmp_path / "test-gpu" / "gpu_check_logs"
    assert (logs / "bad.log").read_text() == "why it failed\n" and "begun" in (logs / "slow.log").read_text()
    assert "not passed: one of many, bad, slow, planted, not found" in capsys.readouterr().out
    assert gpu_check.main(["--output", str(tmp_path), "--steps", "good", "absent"]) == 0


def test_time_of_all_steps_is_bounded(gpu_check):
    """The limits of the steps on a GPU, were each used up, may exceed the whole; the whole is what holds."""
    steps = gpu_check.make_steps("cuda", Path("results"))
    assert len({step.name for step in steps}) == len(steps) and gpu_check.TOTAL_SECONDS <= 480
    outcome = gpu_check.run_step(gpu_check.Step("late", python("pass")), Path("."), dict(os.environ), remaining=0.0)
    assert outcome.status == "timed out" and "no time left" in outcome.detail


def test_a_dry_run_leaves_committed_results_alone(gpu_check):
    assert gpu_check.parse_arguments([]).output == ROOT / "benchmarks" / "results"
    assert gpu_check.parse_arguments(["--backend", "simt"]).output == ROOT / "build" / "gpu_check"


def test_every_command_names_a_file_that_is_there(gpu_check):
    for backend in ("cuda", "simt"):
        for step in gpu_check.make_steps(backend, Path("results")):
            for word in [*step.command[1:], *step.each]:
                if word.endswith(".py"):
                    assert (ROOT / word).is_file(), f"{step.name}: {word}"


def test_every_operator_is_watched_and_timed(gpu_check):
    ops = gpu_check.operators()
    targets = (ROOT / "tools" / "sanitizer_targets.py").read_text()
    assert len(ops) >= 8
    for op in ops:
        assert f"ops.{op}(" in targets
        assert any(op == name for name, _ in gpu_check.benchmark_scripts()) or op == "nms"


@pytest.mark.skipif(not _library.library_path("simt").is_file(), reason="needs the interpreted kernels: make test-simt")
def test_dry_run(tmp_path):
    """A program, a sanitizer and a benchmark on the interpreted kernels; `make gpu-check BACKEND=simt` runs all."""
    steps = ("sanitizer targets", "memcheck", "benchmark paste_masks")
    done = run_check("--backend", "simt", "--output", str(tmp_path), "--steps", *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/gpu_check.json")
    content = json.loads(path.read_text())
    assert content["backend"] == "simt" and content["torch"] and content["built"]
    statuses = {step["name"]: step["status"] for step in content["steps"]}
    assert statuses.pop("memcheck: operators") == statuses.pop("memcheck: planted fault is found") == "skipped"
    assert statuses == dict.fromkeys(statuses, "passed") and len(statuses) == 2
    assert "`paste_masks`" in path.with_suffix(".md").read_text() and path.with_name("paste_masks.png").is_file()


def test_planted_faults_are_kernels():
    """Each is CUDA that a compiler takes: what the sanitizer must find, not what NVRTC would refuse."""
    nvcc = next((p for p in map(Path, ("/usr/local/cuda/bin/nvcc", "/usr/bin/nvcc")) if p.is_file()), None)
    if nvcc is None:
        pytest.skip("needs nvcc")
    spec = importlib.util.spec_from_file_location("sanitizer_targets", ROOT / "tools" / "sanitizer_targets.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(os, "environ", dict(os.environ))
        spec.loader.exec_module(module)
    for source in module.PLANTED.values():
        command = [str(nvcc), "-arch=sm_90", "-x", "cu", "-", "-ptx", "-o", os.devnull]
        subprocess.run(command, input=source, text=True, check=True)
