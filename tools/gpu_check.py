# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one command: `make gpu-check`, or `python tools/gpu_check.py`.

Steps run one after the other, each in processes of its own under a time limit; one that fails or runs out of time is
recorded and the others go on. What a machine lacks (torchvision, CuPy, compute-sanitizer, goldens) takes its column or
step with it, never the run. Compiled libraries that were built elsewhere are enough: nothing is compiled here.

Results go to <output>/<device>/: `gpu_check.json`, `gpu_check.md`, the logs of the steps, and the JSON and plot of each
benchmark.

Exit codes: 0 all steps passed, 1 a step failed, 2 wrong arguments or nothing built, 77 no GPU.

`--backend simt` is the dry run on a machine without one: the same steps on the interpreted kernels, at small sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import markdown, results_path, write_text  # noqa: E402

NO_GPU = 77
TOTAL_SECONDS = 480
BENCHMARK_SECONDS = 0.15
"""Time per provider, case and mode of a benchmark."""

AT_ONCE = 6
"""Test files that share the GPU: most of the time of a test is spent on the host."""


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    status: str  # "passed", "failed", "timed out", "skipped"
    seconds: float
    detail: str  # one line: counts, or the reason
    log: str | None = None  # file name


@dataclass(frozen=True)
class Step:
    """A command line, its limit in seconds, and how its output becomes one line; or the reason to skip it.

    With `each` the command is run for every one of these further arguments, `AT_ONCE` at a time.
    """

    name: str
    command: list[str] = field(default_factory=list)
    each: list[str] = field(default_factory=list)
    limit: float = 60.0
    detail: Callable[[str], str] = lambda output: output.strip().rsplit("\n", 1)[-1][:200]
    skipped: str = ""
    expected_code: int = 0


def run_step(step: Step, folder: Path, environment: dict[str, str], remaining: float) -> Outcome:
    """Runs a step within its limit and what remains of the whole; its output goes to `folder`."""
    if step.skipped:
        return Outcome(step.name, "skipped", 0.0, step.skipped)
    limit, begin = min(step.limit, remaining), time.monotonic()
    if limit <= 1:
        return Outcome(step.name, "timed out", 0.0, f"no time left of {TOTAL_SECONDS} s")
    log = folder / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower()).strip('-')}.log"
    commands = [[*step.command, argument] for argument in step.each] or [step.command]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(lambda command: run_command(command, environment, begin + limit), commands))
    output = "\n".join(text for _, text in ended)
    codes = {code for code, _ in ended}
    if None in codes:
        status, detail = "timed out", f"more than {limit:.0f} s"
    else:
        status, detail = "passed" if codes == {step.expected_code} else "failed", step.detail(output)
    log.write_text(output)
    return Outcome(step.name, status, round(time.monotonic() - begin, 1), detail, log.name)


def run_command(command: list[str], environment: dict[str, str], deadline: float) -> tuple[int | None, str]:
    """Exit code and output; no code where `deadline`, of the monotonic clock, ends the command or comes before it."""
    if time.monotonic() >= deadline:
        return None, ""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=deadline - time.monotonic())
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the command's own session: its children end with it
        return None, process.communicate()[0]


def pytest_detail(output: str) -> str:
    """The counts that pytest ends with, summed up where it ran several times."""
    counts: Counter[str] = Counter()
    for line in re.findall(
        r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*) in [\d.]+s", output, re.MULTILINE
    ):
        counts.update({kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", line)})
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return summary or output.strip().rsplit("\n", 1)[-1][:200]


def device_of(backend: str) -> dict[str, Any] | None:
    """Device, driver and versions, as a process of its own sees them; None without a GPU (or for nothing built)."""
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
    about["packages"] = {name: importlib.util.find_spec(name) is not None for name in ("torchvision", "cupy", "triton")}
    return about


def driver_version() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment_of(backend: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "SPATIALFLOW_BACKEND": backend, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def operators() -> list[str]:
    """Operators that have a test file; sources of gradients belong to their operator."""
    listed = re.findall(r"^    (\w+)", (ROOT / "cmake" / "ops.cmake").read_text(), re.MULTILINE)
    return [op for op in listed if (ROOT / "tests" / f"test_{op}.py").is_file()]


def make_steps(backend: str, output: Path) -> list[Step]:
    """All steps, in order; in the dry run at small sizes, and without what only a GPU has."""
    on_gpu = backend == "cuda"
    only_gpu = "" if on_gpu else "needs a GPU"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    files = [f"tests/test_{op}.py" for op in operators()]
    selection = [] if on_gpu else ["-k", "test_reference and float32"]
    steps = [
        Step("operator tests", [*pytest, *selection], files, 150 if on_gpu else 900, pytest_detail),
        Step("large tensors and repeated runs", pytest, ["tests/test_scale.py"], 60 if on_gpu else 900, pytest_detail),
        Step(
            "predictor: graphs and sync debug mode",
            pytest,
            ["tests/test_cuda_predictor.py", "tests/test_no_host_reads.py"],
            60 if on_gpu else 900, pytest_detail,
        ),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    missing = only_gpu or ("" if sanitizer else "compute-sanitizer is not installed")
    target = [sys.executable, "tools/sanitizer_targets.py"]
    steps.append(Step("sanitizer targets, bare", [*target, "operators"], limit=60 if on_gpu else 900))
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        watched = [
            sanitizer or "",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--target-processes",
            "application-only",
            *target,
        ]
        steps.append(
            Step(f"{tool}: planted fault is found", [*watched, f"planted-{tool}"], [], 25, last_summary, missing, 9)
        )
        steps.append(Step(f"{tool}: operators", [*watched, "operators"], [], 35, last_summary, missing))
    benchmark = ["--output", str(output), "--seconds", str(BENCHMARK_SECONDS if on_gpu else 0.001)]
    benchmark += ["--device", "cuda", "--dtype", "bfloat16"] if on_gpu else []
    for script, first_case in benchmark_scripts():
        cases = [] if on_gpu else ["--cases", first_case, "--providers", "none"]
        command = [sys.executable, f"benchmarks/{script}.py", *benchmark, *cases]
        seconds = 90 if script.startswith("flow") else 40  # torch.compile takes its time over those
        steps.append(
            Step(
                f"benchmark {script}", command, [], seconds if on_gpu else 900, skipped="" if on_gpu else heavy(script)
            )
        )
    end_to_end = [sys.executable, "benchmarks/end_to_end.py", "--device", "cuda", "--seconds", "4",
                  "--short-edges", "800", "--dtype", "bfloat16", "--cuda-graph", "--output", str(output)]  # fmt: skip
    steps.append(Step("benchmark end to end", end_to_end, limit=90, skipped=only_gpu or missing_for_files()))
    return steps


def missing_for_files() -> str:
    """Why panoptic PNGs cannot be written here: unlike the libraries, that module is built per Python version."""
    if importlib.util.find_spec("deflate") is None:
        return "the package deflate is not installed"
    built = any(Path(ROOT, "spatialflow", f"_evaluation{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
    return (
        "" if built else f"spatialflow._evaluation is not built for Python {sys.version_info[0]}.{sys.version_info[1]}"
    )


def heavy(script: str) -> str:
    """Why the dry run leaves a benchmark out: the interpreter would take minutes for its smallest case."""
    return "" if script == "paste_masks" else "the interpreter is too slow for its sizes"


def benchmark_scripts() -> list[tuple[str, str]]:
    """(name, label of the first case) of every benchmark of an operator."""
    found = []
    for op in operators():
        path = ROOT / "benchmarks" / f"{op}.py"
        if path.is_file():
            sweep = path.read_text().split("sweep={", 1)[1]
            found.append((op, re.search(r'"([^"]+)":', sweep).group(1)))
    return found


def last_summary(output: str) -> str:
    """compute-sanitizer's verdict."""
    lines = [line for line in output.split("\n") if "SUMMARY" in line]
    return lines[-1].strip("= ") if lines else output.strip().rsplit("\n", 1)[-1][:200]


def as_markdown(about: dict[str, Any], outcomes: list[Outcome], tables: str) -> str:
    lines = [
        f"# gpu-check on {about['device']}",
        "",
        f"Driver {about['driver'] or 'unknown'}, torch {about['torch']} (CUDA {about['cuda']}), "
        f"commit {about['commit']}, back end {about['backend']}, {about['seconds']:.0f} s in all.",
        "",
        "| step | result | seconds | |",
        "|---|---|---:|---|",
    ]
    for outcome in outcomes:
        detail = outcome.detail.replace("|", "\\|")
        lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds} | {detail} |")
    return "\n".join(lines) + "\n" + (f"\n## Times\n\n{tables}\n" if tables else "")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checks and times the CUDA kernels on this machine's GPU.")
    parser.add_argument("--backend", choices=("cuda", "simt"), default="cuda", help="simt: dry run on the interpreter")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="receives <device>/gpu_check.* (default: "
                        "benchmarks/results; build/gpu_check in the dry run, whose times mean nothing)")  # fmt: skip
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="TEXT", help="only steps whose name contains one of these"
    )
    options = parser.parse_args(arguments)
    folder = Path("benchmarks", "results") if options.backend == "cuda" else Path("build", "gpu_check")
    options.output = (options.output or ROOT / folder).resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    begin = time.monotonic()
    about = device_of(options.backend)
    if about is None:
        if options.backend == "cuda":
            print("gpu-check: no GPU that torch and the CUDA library can use here; nothing was checked (exit code 77)")
            return NO_GPU
        print("gpu-check: the interpreted kernels are not built: make test-simt", file=sys.stderr)
        return 2
    about["backend"] = options.backend
    steps = make_steps(options.backend, options.output)
    chosen = [step for step in steps if not options.steps or any(text in step.name for text in options.steps)]
    if not chosen:
        print(f"gpu-check: no step contains {' or '.join(options.steps)}; steps: {'; '.join(s.name for s in steps)}")
        return 2
    path = results_path(options.output, about["device"], "gpu_check")
    logs = path.with_name("gpu_check_logs")
    logs.mkdir(exist_ok=True)
    outcomes: list[Outcome] = []
    environment, total = environment_of(options.backend), TOTAL_SECONDS if options.backend == "cuda" else 3600
    for step in chosen:
        outcomes.append(run_step(step, logs, environment, total - (time.monotonic() - begin)))
        print(
            f"{outcomes[-1].status:>9}  {outcomes[-1].seconds:6.1f} s  {step.name}: {outcomes[-1].detail}", flush=True
        )
        about["seconds"] = round(time.monotonic() - begin, 1)
        write_text(path, json.dumps({**about, "steps": [asdict(o) for o in outcomes]}, indent=1) + "\n")
        write_text(path.with_suffix(".md"), as_markdown(about, outcomes, markdown(path.parent)))
    bad = [outcome.name for outcome in outcomes if outcome.status in ("failed", "timed out")]
    print(f"written: {path.with_suffix('.md')}" + (f"; not passed: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
