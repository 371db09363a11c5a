# SPDX-License-Identifier: Apache-2.0
"""Run all checks that need a GPU: `make gpu-check`, or `python3 tools/gpu_check.py`.

This script is made for machines that are rented for minutes. There are three runs, each within its total time:

    gpu_check.py            480 s: peak rates, operators, their tests, kernel times, pipeline, ncu, images per second
    gpu_check.py --second   480 s: compute-sanitizer, large tensors, training under torchrun, training step, network
    gpu_check.py --quick    120 s: peak rates, operators, the shortest tests, the first kernel times

The steps that depend most on a GPU come first. Each step has reserved time and a limit, runs in separate processes, and
is recorded when it ends. A step that fails or times out does not affect the others. If a tool is missing (torchvision,
CuPy, ncu, compute-sanitizer), its column or step is skipped.

The libraries are those of the tree, built elsewhere. `make gpu-pack` puts them, the tree and the wheels of missing
packages in one archive. Only `spatialflow._evaluation`, which depends on the Python version, is compiled here, in the
background.

Results go to <output>/<device>/: `gpu_check.json` and `gpu_check.md` (`gpu_check_second.*`, `gpu_check_quick.*`), the
logs of the steps, and the JSON of each benchmark. `--pack FILE.tgz` puts that folder in one file after every step.

Exit codes: 0 all steps passed or were skipped, 1 a step failed or timed out, 2 wrong arguments or nothing built for a
dry run, 77 no GPU or no CUDA library.

`--backend simt` is a dry run on a machine without a GPU, at small sizes. The operators and their tests run the CUDA
kernels on the SIMT interpreter (docs/simt.md); everything else runs the CPU kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from gpu_execution import Outcome, Step, end_commands, end_process_group, group_steps, reserved_seconds, run_step
from gpu_page import as_markdown, read_json
from gpu_setup import compile_evaluation, device_of, environment_of, install_wheels
from gpu_steps import make_steps
from harness import results_path, write_text

NO_GPU = 77
TOTALS = {"first": 480.0, "second": 480.0, "quick": 120.0}
"""Seconds of a run on a GPU."""

DRY_TOTAL = 3600.0


class Report:
    """Outcomes of a run, written as JSON and Markdown after every step.

    Args:
        path: the JSON file; the Markdown page is beside it.
        about: device, versions and commit.
        earlier: outcomes of earlier runs of other steps, which stay in the report.
        archive: receives the folder of `path` in one file, if it is not None.
        begin: start of the run, by the monotonic clock.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], earlier: list[Outcome], archive: Path | None, begin: float
    ) -> None:
        self.path = path
        self.begin = begin
        self._about = about
        self._earlier = earlier
        self._archive = archive
        self._outcomes: list[Outcome] = []
        self.logs = path.with_name(f"{path.stem}_logs")
        self.logs.mkdir(exist_ok=True)

    def record(self, outcome: Outcome) -> None:
        """Add an outcome, print it, and write the files."""
        self._outcomes.append(outcome)
        print(f"{outcome.status:>9}  {outcome.seconds:6.1f} s  {outcome.name}: {outcome.detail}", flush=True)
        self._about["seconds"] = round(time.monotonic() - self.begin, 1)
        outcomes = self._earlier + self._outcomes
        write_text(self.path, json.dumps({**self._about, "steps": [asdict(o) for o in outcomes]}, indent=1) + "\n")
        write_text(self.path.with_suffix(".md"), as_markdown(self._about, outcomes, self.path.parent))
        if self._archive is not None:
            pack(self.path.parent, self._archive)

    def failures(self) -> list[str]:
        """Return the names of the steps of this run that failed or timed out."""
        return [outcome.name for outcome in self._outcomes if outcome.status in ("failed", "timed out")]


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


def open_report(options: argparse.Namespace, about: dict[str, Any], steps: list[Step], begin: float) -> Report:
    """Create the report; with `--steps` it keeps the outcomes of other steps at the same commit."""
    suffix = "" if options.kind == "first" else f"_{options.kind}"
    path = results_path(options.output, about["device"], f"gpu_check{suffix}")
    before = read_json(path)
    names = {step.name for step in steps}
    recorded = before.get("steps", []) if options.steps and before.get("commit") == about["commit"] else []
    earlier = [Outcome(**outcome) for outcome in recorded if outcome["name"] not in names]
    return Report(path, about, earlier, options.pack, begin)


def end_compilation(compilation: subprocess.Popen, logs: Path, begin: float) -> Outcome:
    """Wait for the compilation of `spatialflow._evaluation`, at most 60 s; write its output to `logs`."""
    try:
        text, code = compilation.communicate(timeout=60)[0], compilation.returncode
    except subprocess.TimeoutExpired:
        text, code = end_process_group(compilation), -1
    (logs / "compile.log").write_text(text)
    status, seconds = "passed" if code == 0 else "failed", round(time.monotonic() - begin, 1)
    return Outcome("spatialflow._evaluation compiled", status, seconds, text.strip()[-200:], "compile.log")


def run_steps(
    steps: list[Step], options: argparse.Namespace, report: Report, compilation: subprocess.Popen | None
) -> None:
    """Run the steps in order within `options.seconds`; record each, and the compilation when it ends."""
    environment, groups = environment_of(options.backend), group_steps(steps)
    # If the total is less than the sum of the reserved times, each of them is scaled by this share.
    share = min(1.0, options.seconds / max(reserved_seconds(groups), 1.0))
    for index, group in enumerate(groups):
        if compilation is not None and (compilation.poll() is not None or "pipeline" in group[0].name):
            report.record(end_compilation(compilation, report.logs, report.begin))
            compilation = None
        remaining = options.seconds - (time.monotonic() - report.begin) - share * reserved_seconds(groups[index + 1 :])
        with ThreadPoolExecutor(len(group)) as pool:
            for outcome in pool.map(lambda step: run_step(step, report.logs, environment, remaining), group):
                report.record(outcome)


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
    report = open_report(options, about, chosen, begin)
    run_steps(chosen, options, report, compilation)
    failures = report.failures()
    print(f"written: {report.path.with_suffix('.md')}" + (f"; not passed: {', '.join(failures)}" if failures else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
