# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow benchmark`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from spatialflow.cli.common import CommandError, print_error

_PACKAGE = Path(__file__).resolve().parents[1]

SUMMARY = "time operators and their baselines"
DESCRIPTION = (
    "Check every result against float64, then time it. Baselines whose packages are not installed are skipped;\n"
    "`pip install torchvision` provides most of them. Without torchvision, nms is checked against its reference,\n"
    "which takes minutes."
)
EXAMPLES = ("benchmark --list", "benchmark roi_align nms --seconds 2 --output results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="operators and other benchmarks (default: all)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    for name, metavar, text in (
        ("device", "DEVICE", "cpu or cuda (default: cpu)"),
        ("threads", "N", "CPU threads (default: 2)"),
        ("seconds", "S", "time per provider, case and mode (default: 1)"),
        ("output", "FOLDER", "folder for <device>/<op>.json and .png (default: benchmarks/results)"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, help=text)


def run(options: argparse.Namespace) -> int:
    """Run the scripts of the chosen operators; return the exit code."""
    folder = _benchmark_folder()
    scripts = [path for path in folder.glob("*.py") if "main(BENCHMARK)" in path.read_text(encoding="utf-8")]
    available = sorted(path.stem for path in scripts)  # other scripts have other options
    if options.list:
        print("\n".join(available))
        return 0
    unknown = [op for op in options.ops if op not in available]
    if unknown:
        raise CommandError(f"no benchmark named {', '.join(unknown)}; available are {', '.join(available)}")
    arguments = [
        f"--{name}={getattr(options, name)}"
        for name in ("device", "threads", "seconds", "output")
        if getattr(options, name) is not None
    ]
    if options.output is None and folder.parent == _PACKAGE:
        arguments.append(f"--output={Path('benchmarks', 'results')}")  # not into the installed package
    failed = [
        op
        for op in options.ops or available
        if subprocess.run([sys.executable, "-u", str(folder / f"{op}.py"), *arguments]).returncode != 0
    ]
    if failed:
        print_error(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _benchmark_folder() -> Path:
    """Find `benchmarks` of the source tree, or the copy that is installed with the package."""
    for folder in (_PACKAGE.parent / "benchmarks", _PACKAGE / "benchmarks"):
        if os.path.isdir(folder / "harness"):
            return folder
    raise CommandError(f"the benchmark scripts are missing in {_PACKAGE / 'benchmarks'}")
