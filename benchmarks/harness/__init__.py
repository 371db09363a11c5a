# SPDX-License-Identifier: Apache-2.0
"""Harness of benchmarks: a script declares its cases as a `Benchmark` and calls `main`.

A `Benchmark` has the `setup` of the inputs of a case, the `providers`, the `sweep` of cases, and the float64 oracle.
All providers compute the same result from the same inputs. The harness treats all operators alike:

1. It compares each provider's result and gradient with the oracle in float64. A wrong result of spatialflow ends the
   run. A baseline without support for a 16-bit dtype is timed in float32; its label has the dtype.
2. After a warm-up, the providers are timed in turns within one process, so that a disturbance affects all of them.
3. It reports medians with the 10 % and 90 % quantiles. `ratio` is a provider's median over that of spatialflow.
4. It prints a table and writes `results/<device>/<op>.json` with a plot.

On CUDA a call has two times, each measured after the L2 cache is overwritten. `median_ms` is the time of a call: from
the call to its completion, by the host's clock. `kernel_ms` is the work of the GPU alone: the replay of a CUDA graph.
A provider with `waits` cannot be captured in a graph: its `kernel_ms` is the sum of its kernels by the profiler,
without gaps.

`python benchmarks/harness` prints the saved results as Markdown tables, grouped by device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.benchmark import (
    MODES,
    OURS,
    TOLERANCES,
    Benchmark,
    Problem,
    Provider,
    compiled,
    deterministic,
    deterministic_algorithms,
    largest_error,
    leaves,
    map_tensors,
    optional,
    with_conv_precision,
)
from harness.report import (
    RESULTS,
    ROOT,
    commit,
    device_name,
    environment,
    image_paths,
    markdown,
    plot,
    results_path,
    write_figure,
    write_text,
)
from harness.timing import Call, measure, measure_kernels, run

__all__ = [
    "MODES",
    "OURS",
    "RESULTS",
    "ROOT",
    "TOLERANCES",
    "Benchmark",
    "Call",
    "Problem",
    "Provider",
    "commit",
    "compiled",
    "deterministic",
    "deterministic_algorithms",
    "device_name",
    "environment",
    "image_paths",
    "largest_error",
    "leaves",
    "main",
    "map_tensors",
    "markdown",
    "measure",
    "measure_kernels",
    "optional",
    "parse_arguments",
    "plot",
    "require_positive",
    "results_path",
    "run",
    "with_conv_precision",
    "write_figure",
    "write_text",
]

if (ROOT / "spatialflow" / "__init__.py").is_file():  # a script in a source tree times that tree
    sys.path.insert(1, str(ROOT))


def parse_arguments(benchmark: Benchmark, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of a benchmark script."""
    parser = argparse.ArgumentParser(
        description=f"{benchmark.name}: {benchmark.title}",
        epilog=f"cases: {'; '.join(benchmark.sweep)}. providers: {', '.join(benchmark.providers)}.",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=tuple(TOLERANCES),
        help="of features, one or several (default: float32)",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="only these (default: both, if the operator has gradients)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per provider, case and mode (default: 1)")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases whose label contains one of these")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these in addition to spatialflow")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder of <device>/<op>.json and .png (default: benchmarks/results; without this option, nothing is "
        "written for a selection of cases, providers or modes)",
    )
    parser.add_argument("--add", action="store_true", help="keep the other rows of this commit in the file")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON file only")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "threads", "seconds")
    if options.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    return options


def require_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End the program with exit code 2 if one of these options is not positive or not finite."""
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):  # false for NaN too
            parser.error(f"--{name} must be positive and finite, got {getattr(options, name)}")


def main(benchmark: Benchmark, arguments: list[str] | None = None) -> None:
    """Run a benchmark script: check the results, time the providers, print and save the times."""
    options = parse_arguments(benchmark, arguments)
    torch.set_num_threads(options.threads)
    setting = environment(options)
    print(f"{benchmark.name}: {benchmark.title}")
    about = f"{setting['device']}, {setting['threads']} threads, torch {torch.__version__}"
    print(f"  {about}, CPU level {setting['cpu_level']}")
    is_saved = options.output is not None or not (options.cases or options.providers or options.modes)
    rows: list[dict[str, Any]] = []
    content = {"op": benchmark.name, "title": benchmark.title, **setting, "rows": rows}
    path = _target(options, setting["device"], benchmark.name) if is_saved else None
    if options.add and path is not None and path.is_file():
        before = json.loads(path.read_text())
        rows += before["rows"] if before.get("commit") == setting["commit"] else []
    for more in run(benchmark, options):
        new = {_key(row) for row in more}
        rows[:] = [row for row in rows if _key(row) not in new] + more
        if is_saved:  # after every case, so that an aborted run keeps its results
            write_text(path, json.dumps(content, indent=1) + "\n")
    if not rows:
        wanted = [*(options.cases or []), *(options.modes or [])]
        sys.exit(f"no case contains {' or '.join(wanted)}; cases: {'; '.join(benchmark.sweep)}")
    if not is_saved or options.no_plot:
        return
    plot(benchmark, setting, rows, path.with_suffix(".png"))
    print(f"\n  written: {path}, {path.with_suffix('.png').name}")


def _target(options: argparse.Namespace, device: str, name: str) -> Path:
    return results_path(options.output or RESULTS, device, name)


def _key(row: Mapping[str, Any]) -> tuple:
    return row["case"], row["mode"], row.get("dtype"), row["provider"]
