# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` without a GPU: its message, its steps after failures, and the dry run on the SIMT interpreter."""

import importlib.util
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
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
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def gpu_execution(gpu_check):
    return importlib.import_module("gpu_execution")


@pytest.fixture(scope="module")
def gpu_steps(gpu_check):
    return importlib.import_module("gpu_steps")


@pytest.fixture(autouse=True)
def signals():
    """Restore the signal handlers that the script replaces."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def run_check(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run_check("--output", str(tmp_path))
    assert done.returncode == 77, done.stderr
    assert "no GPU" in done.stdout and "exit code 77" in done.stdout
    assert list(tmp_path.iterdir()) == []


DEVICE = dict(device="Test GPU", torch="2.11", cuda="13.0", commit="abc", driver="1.2")


def python(code):
    return [sys.executable, "-c", code]


def test_steps_go_on_whatever_becomes_of_one(gpu_check, gpu_execution, gpu_steps, tmp_path, monkeypatch, capsys):
    Step = gpu_execution.Step
    steps = [
        Step("good", python("print('first'); print('3 passed')")),
        Step(
            "many",
            python("import sys; print(sys.argv[1] + ' passed, 1 skipped in 2.5s')"),
            ["3", "4"],
            limit=30,
            detail=gpu_steps.pytest_detail,
        ),
        Step("one of many", python("import sys; sys.exit(int(sys.argv[1]))"), ["0", "2"]),
        Step("bad", python("print('why it failed'); raise SystemExit(3)")),
        Step("slow", python("import time; print('begun', flush=True); time.sleep(60)"), limit=2),
        Step("planted", python("raise SystemExit(9)"), expected_code=9),
        Step("planted, not found", python("pass"), expected_code=9),
        Step("absent", skip_reason="no such tool"),
    ]
    monkeypatch.setattr(gpu_check, "make_steps", lambda backend, kind, output: steps)
    monkeypatch.setattr(gpu_check, "device_of", lambda backend: dict(DEVICE))
    begin = time.monotonic()
    packed = tmp_path / "results.tgz"
    assert gpu_check.main(["--output", str(tmp_path), "--pack", str(packed)]) == 1
    assert time.monotonic() - begin < 30
    with tarfile.open(packed) as archive:
        assert {"test-gpu/gpu_check.json", "test-gpu/gpu_check_logs/bad.log"} <= set(archive.getnames())
    content = json.loads((tmp_path / "test-gpu" / "gpu_check.json").read_text())
    statuses = {step["name"]: step["status"] for step in content["steps"]}
    assert statuses == {
        "good": "passed",
        "many": "passed",
        "one of many": "failed",
        "bad": "failed",
        "slow": "timed out",
        "planted": "passed",
        "planted, not found": "failed",
        "absent": "skipped",
    }
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
    assert gpu_check.main(["--output", str(tmp_path), "--second", "--steps", "good"]) == 0
    assert (tmp_path / "test-gpu" / "gpu_check_second.json").is_file()  # next to the report of the first run
    assert gpu_check.main(["--output", str(tmp_path), "--steps", "good", "absent"]) == 0


ENDED = """============================= test session starts ==============================
tests/test_a.py::TestA::test_one PASSED                                  [ 50%]
tests/test_a.py::TestA::test_two[a b] PASSED                             [100%]

=============================== warnings summary ===============================
tests/test_a.py::TestA::test_one
  /lib/torch.py:365: DeprecationWarning: about torch
=================== 2 passed, 3 warnings in 73.64s (0:01:13) ===================
"""
CUT_OFF = """============================= test session starts ==============================
tests/test_b.py::test_one PASSED                                         [ 50%]
tests/test_b.py::test_two[one row, left out-float64] """
NOTHING_TO_DO = """============================= test session starts ==============================
============================ no tests ran in 0.02s =============================
"""


def test_what_did_not_end_is_named(gpu_steps):
    """The file of an unfinished test is named; files in pytest's summary of warnings have finished."""
    detail = gpu_steps.pytest_detail
    assert detail(ENDED) == "2 passed, 3 warnings"
    for runs, counts in (
        ([ENDED, CUT_OFF, ENDED, NOTHING_TO_DO], "4 passed, 6 warnings"),
        ([CUT_OFF, ENDED], "2 passed, 3 warnings"),
    ):
        assert detail("\n".join(runs)) == f"{counts}; not ended: tests/test_b.py"
    assert detail("No module named pytest") == "No module named pytest"


@pytest.mark.parametrize("kind", ["first", "second", "quick"])
def test_time_of_all_steps_is_bounded(gpu_check, gpu_execution, gpu_steps, kind):
    """The time reserved for the steps is at most the total; a step without any time left is timed out."""
    steps = gpu_steps.make_steps("cuda", kind, Path("results"))
    assert len({step.name for step in steps}) == len(steps) and gpu_check.TOTALS[kind] <= 480
    assert all(0 < step.reserved <= step.limit for step in steps)
    assert gpu_execution.reserved_seconds(gpu_execution.group_steps(steps)) <= gpu_check.TOTALS[kind]
    late = gpu_execution.Step("late", python("pass"))
    outcome = gpu_execution.run_step(late, Path("."), dict(os.environ), remaining=0.0)
    assert outcome.status == "timed out" and "no time was left" in outcome.detail


def test_time_is_kept_for_later_steps(gpu_check, gpu_execution, tmp_path, monkeypatch):
    """A step that would use all the time ends where the time reserved for later steps begins."""
    sleep = python("import time; time.sleep(30)")
    Step = gpu_execution.Step
    steps = [Step("greedy", sleep, limit=60), Step("kept", python("print('done')"), reserved=20)]
    monkeypatch.setattr(gpu_check, "make_steps", lambda backend, kind, output: steps)
    monkeypatch.setattr(gpu_check, "device_of", lambda backend: dict(DEVICE))
    assert gpu_check.main(["--output", str(tmp_path), "--seconds", "23"]) == 1
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--output", str(tmp_path), "--seconds", "nan"])
    assert ended.value.code == 2
    content = json.loads((tmp_path / "test-gpu" / "gpu_check.json").read_text())
    statuses = [(step["name"], step["status"]) for step in content["steps"]]
    assert statuses == [("greedy", "timed out"), ("kept", "passed")]


def test_steps_together(gpu_check, gpu_execution, tmp_path, monkeypatch):
    steps = [gpu_execution.Step(name, python("import time; time.sleep(2)"), group="all") for name in ("a", "b", "c")]
    monkeypatch.setattr(gpu_check, "make_steps", lambda backend, kind, output: steps)
    monkeypatch.setattr(gpu_check, "device_of", lambda backend: dict(DEVICE))
    begin = time.monotonic()
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert time.monotonic() - begin < 5


def test_the_page_has_roofline_and_stages(gpu_check, tmp_path):
    gpu_page = importlib.import_module("gpu_page")
    rates = {"copy_gigabytes_per_second": 4000.0, "bfloat16_teraflops_per_second": 800.0}
    (tmp_path / "card.json").write_text(json.dumps({"rates": rates}))
    row = {
        "case": "one",
        "mode": "forward",
        "dtype": "float16",
        "provider": "spatialflow",
        "kernel_ms": 0.01,
        "bytes": 8e6,
        "operations": 1e6,
    }
    content = {"op": "square", "commit": "abc", "rows": [row, {**row, "provider": "peer"}]}
    (tmp_path / "square.json").write_text(json.dumps(content))
    assert gpu_page.roofline(tmp_path, "abc").endswith("| `square` | one | float16 | 2.0 | 10.0 | 20 % |")
    forms = [{"form": "graph", "images_per_second": 100.0, "median_ms": 10.0, "replay_ms": 9.0}]
    content = {
        "config": "tiny",
        "commit": "abc",
        "size": [8, 9],
        "dtype": "bfloat16",
        "forms": forms,
        "stages": [{"stage": "fpn", "kernels": 3, "ms": 0.5}],
    }
    (tmp_path / "stages.json").write_text(json.dumps(content))
    page = gpu_page.stages(tmp_path, "abc")
    assert "graph: 100.0 images/s" in page and "| sum | 3 | 0.500 |" in page
    assert gpu_page.stages(tmp_path, "another") == "" and gpu_page.results_of(tmp_path, "another") == []


def test_shares_of_time_are_no_speeds(gpu_steps):
    """The table of images per second precedes the table of shares of time, whose rows have the same names."""
    text = "    spatialflow    50.487  19.8 \n    share of the time in %: load\n    spatialflow    11.7  0.6 \n"
    assert gpu_steps.end_to_end_detail(text) == "spatialflow 50.487 images/s"


def test_prediction_from_files_is_summed_up_by_two_rows(gpu_steps):
    text = "    decode    400.10  0.2\n    network   222.50  0.3\n    write  300.0 0.1\n    overlapped  210.75  0.3\n"
    assert gpu_steps.throughput_detail(text) == "network 222.50 images/s; overlapped 210.75 images/s"
    assert gpu_steps.throughput_detail("an error") == "an error"


def test_what_kernels_rest_on_is_asked_of_the_probes():
    """All assumptions of kernels hold in the results of an H200; a missing or contradicting probe is named."""
    probes = runpy.run_path(str(ROOT / "benchmarks" / "hopper_probes" / "run.py"))["broken_facts"]
    lines = (ROOT / "benchmarks" / "results" / "nvidia-h200" / "hopper_probes.jsonl").read_text().splitlines()
    findings = [json.loads(line) for line in lines]
    assert probes(findings) == [] and len(probes([])) == 3
    changed = [{**row, "fit_xor_by_address": 0} if row.get("target_offset") == 512 else row for row in findings]
    assert probes(changed) == ["TMA swizzles by address"]


def test_pack(tmp_path, monkeypatch):
    """The archive has the files of the repository, the CUDA library, the commit, and the downloaded wheels."""
    spec = importlib.util.spec_from_file_location("gpu_pack", ROOT / "tools" / "gpu_pack.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
        if not _library.library_path("cuda").is_file():
            assert module.main([str(tmp_path / "x.tgz")]) == 2
            pytest.skip("needs the CUDA library")
        patch.setattr(module, "download_wheels", lambda folder: (folder / "some-1-py3-none-any.whl").write_bytes(b"x"))
        if module.tracked_files() == []:
            pytest.skip("needs git")
        assert module.main([str(tmp_path / "gpu.tgz")]) == 0
    with tarfile.open(tmp_path / "gpu.tgz") as archive:
        names = set(archive.getnames())
    wanted = {
        "tools/gpu_check.py",
        "spatialflow/lib/libspatialflow_cuda.so",
        "wheels/some-1-py3-none-any.whl",
        "commit.txt",
        "tests/conftest.py",
    }
    assert {f"spatialflow/{name}" for name in wanted} <= names and not any("simt" in n and ".so" in n for n in names)
    assert (tmp_path / "gpu.tgz").stat().st_size < module.LIMIT


def test_a_dry_run_leaves_committed_results_alone(gpu_check):
    assert gpu_check.parse_arguments([]).output == ROOT / "benchmarks" / "results"
    assert gpu_check.parse_arguments(["--backend", "simt"]).output == ROOT / "build" / "gpu_check"


def test_every_command_names_a_file_that_is_there(gpu_steps):
    for backend, kind in itertools.product(("cuda", "simt"), ("first", "second", "quick")):
        for step in gpu_steps.make_steps(backend, kind, Path("results")):
            for word in [*step.command[1:], *step.each]:
                if word.endswith(".py"):
                    assert (ROOT / word).is_file(), f"{step.name}: {word}"


def test_every_operator_is_watched_and_timed(gpu_steps):
    ops = gpu_steps.operators()
    targets = (ROOT / "tools" / "sanitizer_targets.py").read_text()
    plan = (ROOT / "benchmarks" / "gpu.py").read_text()
    assert len(ops) >= 8
    for op in ops:
        assert f"ops.{op}(" in targets and f'Entry("{op}"' in plan


def test_every_test_file_of_an_operator_runs(gpu_steps):
    """All test files of operators run on the GPU and on the interpreter; a quick run has one per operator."""
    names = ["flow_conv2d", "flow_conv2d_group", "flow_conv2d_tensor_cores", "fused_subnets", "nms", "panoptic_merge"]
    wanted = {f"tests/test_{name}.py" for name in names}
    (step,) = [step for step in gpu_steps.first_steps(True, Path("results")) if step.name == "operator tests"]
    assert wanted <= set(step.each) and len(step.each) == len(set(step.each))
    assert "tests/test_panoptic_quality.py" not in step.each
    (quick,) = [step for step in gpu_steps.quick_steps(True, Path("results")) if step.name == "operator tests"]
    assert quick.each == [f"tests/test_{op}.py" for op in gpu_steps.operators()]
    if shutil.which("make"):
        rule = "print-simt-tests: ; @echo $(SIMT_TESTS)"
        command = ["make", "-s", f"PYTHON={sys.executable}", "--eval", rule, "print-simt-tests"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        assert set(step.each) <= set(listed) and len(listed) == len(set(listed))


@pytest.mark.skipif(not _library.library_path("simt").is_file(), reason="needs the interpreted kernels: make test-simt")
def test_dry_run(tmp_path):
    """Operators run on the interpreted kernels, benchmarks on the CPU kernels; `make gpu-check-dry` runs all steps."""
    steps = ("every operator once", "times of kernels")
    done = run_check("--backend", "simt", "--output", str(tmp_path), "--steps", *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/gpu_check.json")
    content = json.loads(path.read_text())
    assert content["backend"] == "simt" and content["torch"] and content["built"]
    statuses = {step["name"]: step["status"] for step in content["steps"]}
    assert statuses == dict.fromkeys(statuses, "passed") and len(statuses) == 2
    assert "`paste_masks`" in path.with_suffix(".md").read_text()


def test_planted_faults_are_kernels():
    """Each planted fault compiles with nvcc, so that the sanitizer can find it."""
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
