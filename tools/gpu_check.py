# SPDX-License-Identifier: Apache-2.0
"""Run all checks that need a GPU: `make gpu-check`, or `python3 tools/gpu_check.py`.

It is made for machines that are rented for minutes. There are three runs, each within its total time:

    gpu_check.py            480 s: ceilings, operators, their tests, kernel times, the pipeline, ncu, images per second
    gpu_check.py --second   480 s: compute-sanitizer, large tensors, training, several processes, torch.compile
    gpu_check.py --quick    120 s: ceilings, operators, the shortest tests, the first kernel times

The steps that depend most on a GPU come first. Each step has reserved time and a limit, runs in separate processes, and
is recorded when it ends. A step that fails or times out does not affect the others. If a tool is missing (torchvision,
CuPy, ncu, compute-sanitizer), its column or step is skipped.

The libraries are those of the tree, built elsewhere. `make gpu-pack` puts them, the tree and the wheels of missing
packages in one archive. Only `spatialflow._evaluation`, which depends on the Python version, is compiled here, in the
background.

Results go to <output>/<device>/: `gpu_check.json` and `gpu_check.md` (`gpu_check_second.*`, `gpu_check_quick.*`), the
logs of the steps, and the JSON of each benchmark. `--pack FILE.tgz` puts that folder in one file after every step.

Exit codes: 0 all steps passed, 1 a step failed, 2 wrong arguments or nothing built, 77 no GPU.

`--backend simt` is a dry run on a machine without a GPU, at small sizes. Operators run on the interpreted kernels, and
everything else runs on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from gpu_page import as_markdown, read_json
from harness import results_path, write_text

NO_GPU = 77
TOTALS = {"first": 480.0, "second": 480.0, "quick": 120.0}
"""Seconds of a run on a GPU."""

DRY_TOTAL = 3600.0
BENCHMARK_SECONDS = 0.1
"""Time per provider, case and mode of a benchmark."""

AT_ONCE = 14
"""Test files that share the GPU: a test mostly uses the host."""

SITE = ROOT / "build" / "gpu_check_site"
"""Receives the packages that came as wheels."""


@dataclass
class Outcome:
    """Result of a step."""

    name: str
    status: str  # "passed", "failed", "timed out", "skipped"
    seconds: float
    detail: str  # one line: counts, or the reason
    log: str | None = None  # file name


@dataclass(frozen=True)
class Step:
    """Command of the check, with its time and the summary of its output; or the reason to skip it.

    Args:
        least: seconds that are reserved for it.
        limit: seconds after which it is ended.
        each: further arguments; the command runs once for each of them, `AT_ONCE` at a time.
        together: consecutive steps with the same word here run at the same time.
        backend: back end, if it is not that of the run.
        needed: text that its output must contain; otherwise it has failed.
    """

    name: str
    command: list[str] = field(default_factory=list)
    each: list[str] = field(default_factory=list)
    least: float = 0.0
    limit: float = 60.0
    detail: Callable[[str], str] = lambda output: output.strip().rsplit("\n", 1)[-1][:200]
    skipped: str = ""
    expected_code: int = 0
    together: str = ""
    backend: str = ""
    needed: str = ""


def run_step(step: Step, folder: Path, environment: dict[str, str], remaining: float) -> Outcome:
    """Run a step within its limit and the remaining time; write its output to `folder`."""
    if step.skipped:
        return Outcome(step.name, "skipped", 0.0, step.skipped)
    limit, begin = min(step.limit, remaining), time.monotonic()
    if limit <= 1:
        return Outcome(step.name, "timed out", 0.0, "no time was left")
    log = folder / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower()).strip('-')}.log"
    environment = {**environment, "SPATIALFLOW_BACKEND": step.backend} if step.backend else environment
    commands = [[*step.command, argument] for argument in step.each] or [step.command]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(lambda command: run_command(command, environment, begin + limit), commands))
    output = "\n".join(text for _, text in ended)
    codes = {code for code, _ in ended}
    status = "timed out" if None in codes else "passed" if codes == {step.expected_code} else "failed"
    if status == "passed" and step.needed not in output:
        status = "failed"
    detail = step.detail(output)
    if status == "timed out":
        detail = f"more than {limit:.0f} s; {detail}"
    log.write_text(output)
    return Outcome(step.name, status, round(time.monotonic() - begin, 1), detail, log.name)


def in_groups(steps: list[Step]) -> list[list[Step]]:
    """Group consecutive steps that run together."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.together and groups[-1][0].together == step.together:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def kept(groups: list[list[Step]]) -> float:
    """Return the seconds that are reserved for these groups."""
    return sum(max(0.0 if step.skipped else step.least for step in group) for group in groups)


def run_command(command: list[str], environment: dict[str, str], deadline: float) -> tuple[int | None, str]:
    """Run a command; return exit code and output. The code is None if `deadline` (monotonic clock) has passed."""
    if time.monotonic() >= deadline:
        return None, ""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=deadline - time.monotonic())
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, end_group(process)
    finally:
        _running.discard(process.pid)


def end_group(process: subprocess.Popen) -> str:
    """End a command and its children; return its output.

    SIGTERM comes first: the workers of torchrun have sessions of their own, and torchrun ends them. A child that still
    keeps the output open is not waited for.
    """
    output = ""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=3)[0]
        except subprocess.TimeoutExpired as still_open:
            output = still_open.output or output
    return output.decode(errors="replace") if isinstance(output, bytes) else output


_running: set[int] = set()
"""Commands at work, by process id."""


def end_commands(*_: object) -> None:
    """Handle SIGTERM and SIGINT: end the running commands with this process."""
    for pid in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(130)


def pytest_detail(output: str) -> str:
    """Return the counts that pytest reports, summed over its runs, and the files that did not end."""
    counts: Counter[str] = Counter()
    for line in re.findall(
        r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*) in [\d.]+s", output, re.MULTILINE
    ):
        counts.update({kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", line)})
    unfinished = []
    for run in re.split(r"^=+ test session starts =+$", output, flags=re.MULTILINE)[1:]:
        if not re.search(r"^=+ .* in [\d.]+s.* =+$", run, re.MULTILINE):
            unfinished += re.findall(r"^(\S+\.py)::", run, re.MULTILINE)
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    if unfinished:
        summary += f"; not ended: {', '.join(sorted(set(unfinished)))}"
    return summary or output.strip().rsplit("\n", 1)[-1][:200]


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


def install_wheels() -> None:
    """Install missing packages from `wheels/` into `SITE`, without a network."""
    names = {wheel.name.split("-")[0] for wheel in (ROOT / "wheels").glob("*.whl")}
    for name in sorted(name for name in names if not has_module(name)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--find-links",
            str(ROOT / "wheels"),
            "--target",
            str(SITE),
            name,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"gpu-check: {name} could not be installed: {done.stderr.strip()[-200:]}", file=sys.stderr)


def compile_evaluation() -> subprocess.Popen | None:
    """Start the compilation of `spatialflow._evaluation`; return None if it exists or cannot be compiled."""
    target = ROOT / "spatialflow" / f"_evaluation{EXTENSION_SUFFIXES[0]}"
    compiler = shutil.which("c++") or shutil.which("g++")
    if any(path.with_name(f"_evaluation{suffix}").is_file() for suffix in EXTENSION_SUFFIXES for path in [target]):
        return None
    if compiler is None or not has_module("pybind11"):
        return None
    import sysconfig

    import pybind11

    sources = sorted(str(path) for path in (ROOT / "csrc" / "evaluation").glob("*.cpp"))
    command = [
        compiler,
        "-O3",
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'csrc'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        *sources,
        "-o",
        str(target),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    _running.add(process.pid)
    return process


def operators() -> list[str]:
    """Return the operators that have a test file; sources of gradients belong to their operator."""
    listed = re.findall(r"^    (\w+)", (ROOT / "cmake" / "ops.cmake").read_text(), re.MULTILINE)
    return [op for op in listed if (ROOT / "tests" / f"test_{op}.py").is_file()]


def operator_tests() -> list[str]:
    """Return the test files of all operators: test_<operator>.py, test_<operator>_<subject>.py, test_sm90.py."""
    patterns = [f"tests/test_{op}{ending}.py" for op in operators() for ending in ("", "_*")] + ["tests/test_sm90.py"]
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)))


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit."""
    folders = ["/usr/local/cuda/bin", *sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def pytest_command(*options: str) -> list[str]:
    """Return a pytest command that prints each test when it ends, so that the log of a timeout is useful."""
    quiet = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-v", "--tb=short", "--no-header"]
    return [sys.executable, "-m", "pytest", *quiet, *options]


def make_steps(backend: str, kind: str, output: Path) -> list[Step]:
    """Return the steps of a run in order; in the dry run at small sizes, without the profilers and sanitizers."""
    steps = {"first": first_steps, "second": second_steps, "quick": quick_steps}[kind](backend == "cuda", output)
    if backend == "cuda":
        return steps
    interpreted = ("operator", "sanitizer", "check")  # what runs benchmarks at their sizes takes the CPU's kernels
    return [step if any(word in step.name for word in interpreted) else replace(step, backend="cpu") for step in steps]


def device_arguments(on_gpu: bool) -> list[str]:
    return ["--device", "cuda" if on_gpu else "cpu"]


def card_step(on_gpu: bool, output: Path) -> Step:
    command = [sys.executable, "benchmarks/card.py", *device_arguments(on_gpu), "--output", str(output)]
    return Step("ceilings of the card", command, least=15, limit=45)


def is_hopper() -> bool:
    import torch  # takes seconds, which the steps would rather have

    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def probes_step(on_gpu: bool, output: Path) -> Step:
    """Check the hardware facts that the kernels for compute capability 9.0 rely on."""
    program = ROOT / "build" / "hopper_probes" / "hopper_probes"
    command = [sys.executable, "benchmarks/hopper_probes/run.py", "--check", "--out", str(output / "probes.jsonl")]
    skipped = "" if program.is_file() else f"{program} is missing: benchmarks/hopper_probes/build.sh builds it"
    if not on_gpu or not is_hopper():
        skipped = "needs compute capability 9.0"
    return Step("layouts of Hopper", [*command, "--executable", str(program)], least=5, limit=30, skipped=skipped)


def operators_step(on_gpu: bool) -> Step:
    return Step(
        "every operator once",
        [sys.executable, "tools/sanitizer_targets.py", "operators"],
        least=15,
        limit=60 if on_gpu else 900,
    )


def tests_step(on_gpu: bool, least: float, limit: float, selection: str = "") -> Step:
    chosen = ["-k", selection] if selection else []
    if not on_gpu:
        chosen, limit = ["-k", "test_reference and float32"], 900
    # The selection is of tests of the matrix, which are in the first file of each operator.
    files = [f"tests/test_{op}.py" for op in operators()] if chosen else operator_tests()
    return Step("operator tests", pytest_command(*chosen), files, least, limit, pytest_detail, together="tests")


def cupy_step(on_gpu: bool) -> Step:
    """Run operators on CuPy arrays and compare with naive kernels; in the dry run with NumPy and C++."""
    missing = "CuPy is not installed" if on_gpu and not has_module("cupy") else ""
    return Step(
        "operators and CuPy",
        pytest_command(),
        ["tests/test_arrays.py", "tests/test_naive_kernels.py"],
        20,
        60 if on_gpu else 900,
        pytest_detail,
        together="tests",
        skipped=missing,
    )


def kernels_step(on_gpu: bool, output: Path, least: float, limit: float) -> Step:
    command = [sys.executable, "benchmarks/gpu.py", *device_arguments(on_gpu), "--output", str(output)]
    command += ["--seconds", str(BENCHMARK_SECONDS)] if on_gpu else ["--seconds", "0.001", "--dry"]
    return Step("times of kernels", command, least=least, limit=limit if on_gpu else 900, detail=benchmark_detail)


def quick_steps(on_gpu: bool, output: Path) -> list[Step]:
    questions = "test_reference or test_gradient_against_reference or test_deterministic"
    return [
        card_step(on_gpu, output),
        operators_step(on_gpu),
        tests_step(on_gpu, 20, 40, questions),
        kernels_step(on_gpu, output, 30, 60),
    ]


def first_steps(on_gpu: bool, output: Path) -> list[Step]:
    stages = ["--output", str(output), *device_arguments(on_gpu)]
    stages += [] if on_gpu else ["--config", "tiny", "--size", "96", "128", "--dtype", "float32", "--seconds", "0.01"]
    files = [
        "--seconds",
        "4",
        "--short-edges",
        "800",
        "--dtype",
        "bfloat16",
        "--threads",
        "8",
        "--providers",
        "spatialflow",
        "reference, 16 bits",
    ]
    overlapped = [
        "--config",
        "spatialflow_r50_coco",
        "--dtype",
        "bfloat16",
        "--size",
        "800",
        "1333",
        "--count",
        "40",
        "--threads",
        "8",
    ]
    if not on_gpu:
        files = ["--seconds", "0.01", "--short-edges", "64", "--config", "tiny"]
        overlapped = ["--size", "64", "96", "--count", "4", "--seconds", "0.01", "--config", "tiny"]
    return [
        probes_step(on_gpu, output),
        card_step(on_gpu, output),
        operators_step(on_gpu),
        tests_step(on_gpu, 90, 150),
        cupy_step(on_gpu),
        Step(
            "predictor: graphs and sync debug mode",
            pytest_command(),
            ["tests/test_cuda_predictor.py", "tests/test_no_host_reads.py", "tests/test_fused_conv.py"],
            60,
            150 if on_gpu else 900,
            pytest_detail,
            together="tests",
        ),
        kernels_step(on_gpu, output, 90, 170),
        Step("pipeline by stages", [sys.executable, "benchmarks/stages.py", *stages], least=30, limit=75, detail=rate),
        ncu_step(on_gpu),
        Step(
            "images per second from files",
            [sys.executable, "benchmarks/end_to_end.py", *device_arguments(on_gpu), *files, "--output", str(output)],
            least=45,
            limit=75 if on_gpu else 900,
            detail=images_per_second,
        ),
        Step(
            "stages of prediction from files",
            [
                sys.executable,
                "benchmarks/throughput.py",
                *device_arguments(on_gpu),
                *overlapped,
                "--output",
                str(output),
            ],
            least=30,
            limit=60 if on_gpu else 900,
            detail=overlap,
        ),
    ]


NCU_KERNELS = "conv3x3_sm90|conv3x3_tensor_core|conv3x3_weight_gradient_tensor|roi_align_|deform_conv2d_|focal_sum"


def ncu_step(on_gpu: bool) -> Step:
    """Read hardware counters of the most important kernels."""
    target = [
        sys.executable,
        "tools/profile_targets.py",
        "flow_conv2d",
        "deform_conv2d",
        "multilevel_roi_align",
        "flow_conv2d_backward",
        "sigmoid_focal_loss",
    ]
    ncu = find_tool("ncu")
    sections = [
        word
        for name in ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy")
        for word in ("--section", name)
    ]
    watched = [ncu or "", "--clock-control", "none", "-k", f"regex:{NCU_KERNELS}", "-c", "16", *sections, *target]
    return Step(
        "hardware counters (ncu)",
        watched if on_gpu else target,
        least=25,
        limit=60 if on_gpu else 900,
        detail=lambda output: f"{output.count('Duration')} kernels",
        needed="Duration" if on_gpu else "",
        skipped="ncu is not installed" if on_gpu and ncu is None else "",
    )


def second_steps(on_gpu: bool, output: Path) -> list[Step]:
    sanitizer = find_tool("compute-sanitizer")
    missing = "compute-sanitizer is not installed" if on_gpu and sanitizer is None else ""
    target = [sys.executable, "tools/sanitizer_targets.py"]
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    options = ["--error-exitcode", "9", "--target-processes", "application-only"]
    steps = []
    for tool in tools:
        watched = [sanitizer or "", "--tool", tool, *options, *target] if on_gpu else target
        what = f"planted-{tool}" if on_gpu else "operators"
        steps.append(
            Step(
                f"{tool}: planted fault is found",
                [*watched, what],
                least=60,
                limit=90,
                detail=last_summary,
                skipped=missing,
                expected_code=9 if on_gpu else 0,
                together="checks",
            )
        )
    for tool in tools:
        watched = [sanitizer or "", "--tool", tool, *options, *target] if on_gpu else target
        steps.append(
            Step(
                f"{tool}: operators",
                [*watched, "operators"],
                least=100,
                limit=180 if on_gpu else 900,
                detail=last_summary,
                skipped=missing,
                together="checks",
            )
        )
    training = (
        [
            "--device",
            "cuda",
            "--add",
            "--dtype",
            "bfloat16",
            "--providers",
            "plain modules, channels-last",
            "torch.compile",
        ]
        if on_gpu
        else ["--providers", "none"]
    )
    network = [sys.executable, "benchmarks/network.py", *device_arguments(on_gpu), "--output", str(output), "--add"]
    network += (
        ["--dtype", "bfloat16", "--seconds", "0.5", "--providers", "plain modules, channels-last", "torch.compile"]
        if on_gpu
        else ["--seconds", "0.001", "--providers", "none", "--no-plot"]
    )
    return [
        *steps,
        Step(
            "large tensors and repeated runs",
            pytest_command(),
            ["tests/test_scale.py"],
            60,
            180 if on_gpu else 900,
            pytest_detail,
            together="checks",
        ),
        Step(
            "training under torchrun",
            [sys.executable, "tools/gpu_training.py", *device_arguments(on_gpu)],
            least=60,
            limit=120 if on_gpu else 900,
            together="checks",
        ),
        Step(
            "training step",
            [
                sys.executable,
                "benchmarks/training_step.py",
                *training,
                "--seconds",
                "1" if on_gpu else "0.001",
                "--no-plot",
                "--output",
                str(output),
            ],
            least=110,
            limit=150 if on_gpu else 900,
            detail=benchmark_detail,
        ),
        Step("network beside torch.compile", network, least=150, limit=200 if on_gpu else 900, detail=benchmark_detail),
    ]


def benchmark_detail(output: str) -> str:
    """Return how many cases were timed, and the failures."""
    cases = len(re.findall(r"^    spatialflow {2,}", output, re.MULTILINE))
    failed = re.findall(r"FAILED:? ?(.*)", output)
    last = output.strip().rsplit("\n", 1)[-1][:120]
    return f"{cases} cases" + (f"; failed: {'; '.join(failed)[:300]}" if failed else "" if cases else f"; {last}")


def images_per_second(output: str) -> str:
    """Return the lines of benchmarks/end_to_end.py with the speed of each pipeline."""
    table = output.split("share of the time")[0]
    rows = re.findall(r"^    (spatialflow|reference\S*(?: \S+)*) +([\d.]+) +[\d.]+ ", table, re.MULTILINE)
    return "; ".join(f"{name.strip()} {value} images/s" for name, value in rows) or output.strip()[-200:]


def overlap(output: str) -> str:
    """Return the lines of benchmarks/throughput.py for the network alone and for all stages at once."""
    rows = re.findall(r"^    (network|overlapped) +([\d.]+)", output, re.MULTILINE)
    return "; ".join(f"{name} {value} images/s" for name, value in rows) or output.strip()[-200:]


def rate(output: str) -> str:
    """Return the lines of benchmarks/stages.py with the speed of each form."""
    return "; ".join(re.findall(r"^((?:eager|graph), .*)$", output, re.MULTILINE)) or output.strip()[-200:]


def last_summary(output: str) -> str:
    """Return the summary line of compute-sanitizer."""
    lines = [line for line in output.split("\n") if "SUMMARY" in line]
    return lines[-1].strip("= ") if lines else output.strip().rsplit("\n", 1)[-1][:200]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checks and times the CUDA kernels on this machine's GPU.")
    kind = parser.add_mutually_exclusive_group()
    for name, what in (("second", "compute-sanitizer, large tensors, training"), ("quick", "the shortest run")):
        kind.add_argument(
            f"--{name}",
            dest="kind",
            action="store_const",
            const=name,
            default="first",
            help=f"{what}: {TOTALS[name]:.0f} s",
        )
    parser.add_argument("--backend", choices=("cuda", "simt"), default="cuda", help="simt: dry run on the interpreter")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=f"total of the run (default: 480; --quick: 120; dry run: {DRY_TOTAL:.0f})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="receives <device>/gpu_check.* (default: "
        "benchmarks/results; build/gpu_check in the dry run, whose times mean nothing)",
    )
    parser.add_argument("--pack", type=Path, metavar="FILE.tgz", help="receives the results in one file")
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="TEXT", help="only steps whose name contains one of these"
    )
    options = parser.parse_args(arguments)
    if options.seconds is not None and not 0 < options.seconds < float("inf"):  # false for NaN too
        parser.error(f"--seconds must be positive and finite, got {options.seconds:g}")
    if options.seconds is None:
        options.seconds = TOTALS[options.kind] if options.backend == "cuda" else DRY_TOTAL
    folder = Path("benchmarks", "results") if options.backend == "cuda" else Path("build", "gpu_check")
    options.output = (options.output or ROOT / folder).resolve()
    return options


def pack(folder: Path, target: Path) -> None:
    """Write the folder of results as a compressed archive."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    os.replace(temporary, target)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    begin = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_commands)
    install_wheels()
    compilation = compile_evaluation() if options.backend == "cuda" else None
    about = device_of(options.backend)
    if about is None:
        if options.backend == "cuda":
            print("gpu-check: no GPU that torch and the CUDA library can use here; nothing was checked (exit code 77)")
            return NO_GPU
        print("gpu-check: the interpreted kernels are not built: make test-simt", file=sys.stderr)
        return 2
    about["backend"] = options.backend
    steps = make_steps(options.backend, options.kind, options.output)
    chosen = [step for step in steps if not options.steps or any(text in step.name for text in options.steps)]
    if not chosen:
        print(f"gpu-check: no step contains {' or '.join(options.steps)}; steps: {'; '.join(s.name for s in steps)}")
        return 2
    suffix = "" if options.kind == "first" else f"_{options.kind}"
    path = results_path(options.output, about["device"], f"gpu_check{suffix}")
    logs = path.with_name(f"gpu_check{suffix}_logs")
    logs.mkdir(exist_ok=True)
    before = read_json(path)
    chosen_names = {step.name for step in chosen}
    earlier = before.get("steps", []) if options.steps and before.get("commit") == about["commit"] else []
    outcomes = [Outcome(**outcome) for outcome in earlier if outcome["name"] not in chosen_names]
    others = len(outcomes)  # of earlier runs, which do not affect the exit code
    environment, groups = environment_of(options.backend), in_groups(chosen)
    share = min(1.0, options.seconds / max(kept(groups), 1.0))  # of a total that is shorter than the reserved time

    def record(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.status:>9}  {outcome.seconds:6.1f} s  {outcome.name}: {outcome.detail}", flush=True)
        about["seconds"] = round(time.monotonic() - begin, 1)
        write_text(path, json.dumps({**about, "steps": [asdict(o) for o in outcomes]}, indent=1) + "\n")
        write_text(path.with_suffix(".md"), as_markdown(about, outcomes, path.parent))
        if options.pack is not None:
            pack(path.parent, options.pack)

    for index, group in enumerate(groups):
        if compilation is not None and (compilation.poll() is not None or "pipeline" in group[0].name):
            try:
                text, code = compilation.communicate(timeout=60)[0], compilation.returncode
            except subprocess.TimeoutExpired:
                text, code = end_group(compilation), -1
            (logs / "compile.log").write_text(text)
            record(
                Outcome(
                    "spatialflow._evaluation compiled",
                    "passed" if code == 0 else "failed",
                    round(time.monotonic() - begin, 1),
                    text.strip()[-200:],
                    "compile.log",
                )
            )
            compilation = None
        remaining = options.seconds - (time.monotonic() - begin) - share * kept(groups[index + 1 :])
        with ThreadPoolExecutor(len(group)) as pool:
            for outcome in pool.map(lambda step: run_step(step, logs, environment, remaining), group):
                record(outcome)
    bad = [outcome.name for outcome in outcomes[others:] if outcome.status in ("failed", "timed out")]
    print(f"written: {path.with_suffix('.md')}" + (f"; not passed: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
