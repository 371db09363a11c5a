# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of all operators on the GPU, in order of importance, in as few processes as possible.

A process runs as many entries of `PLAN` as it can. If it dies, for example after an illegal access, or takes too long,
the remaining cases of its current entry are lost. A new process then starts with the next entry. Results are written
after each case. A row of the same case, mode, dtype and provider is replaced; rows of another commit are removed.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from harness import main as run_benchmark
from harness import require_positive


class Entry(NamedTuple):
    """Benchmark script with a selection of cases, modes, dtypes and providers; an empty selection means all."""

    name: str
    dtypes: tuple[str, ...]
    cases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()


EAGER = ("spatialflow packed", "spatialflow deterministic", "reference")
TORCHVISION = ("torchvision", "spatialflow deterministic")
TF32 = ("spatialflow packed TF32", "reference TF32", "spatialflow direct")
HALF = ("float16", "float32")
PLAN = (
    Entry("fused_subnets", ("bfloat16",), ("R50",), EAGER),
    Entry("multilevel_roi_align", HALF, ("2x2",), TORCHVISION),
    Entry(
        "deform_conv2d",
        HALF,
        ("P3, channels-last", "P4, channels-last", "P5, channels-last"),
        ("spatialflow TF32", "spatialflow direct", *TORCHVISION),
    ),
    Entry("flow_conv2d", ("bfloat16",), (), EAGER),
    Entry("flow_conv2d", ("float32",), ("P3..P7, 256 to 256", "P4"), ("reference", *TF32)),
    Entry("conv1x1", ("bfloat16",), (), ("reference", "cuDNN")),
    Entry("multiclass_nms", ("float32",), (), ("torchvision, composed",)),
    Entry("select_candidates", ("bfloat16",), (), ("torch",)),
    Entry("batched_nms", ("float32",), (), ("torchvision",)),
    Entry("sigmoid_focal_loss", ("float32",), (), ("torchvision",)),
    Entry("group_norm_relu", ("bfloat16",), (), ("torch",)),
    Entry("panoptic_merge", ("float32",), (), ("none",)),
    Entry("paste_masks", ("float16",), (), ("torchvision",)),
    Entry("stuff_labels", ("bfloat16",), (), ("torch",)),
    Entry("preprocess_images", ("float32",), (), ("none",)),
    Entry("roi_align", HALF, (), TORCHVISION),
    Entry("nms", ("float32",), ("10-100", "16-400"), ("torchvision",)),
    Entry("multilevel_roi_align", ("float16",), ("adaptive",), TORCHVISION),
    Entry("panoptic_quality_counts", ("float32",), (), ("none",)),
    Entry("deform_conv2d", ("float16",), ("stage", "contiguous"), TORCHVISION),
    Entry("network", ("bfloat16",), (), ("plain modules, channels-last",)),
)
"""Entries in order of importance: a run that is ended early has the first ones."""


ENTRY_SECONDS = 45
"""Seconds after which an entry is ended, so that a kernel that hangs leaves time for the other entries."""

FAST_ON_CPU = ("sigmoid_focal_loss", "paste_masks", "stuff_labels", "preprocess_images")
"""Operators of a dry run; the oracles of the others take minutes on a CPU."""


def plan(options: argparse.Namespace) -> tuple[Entry, ...]:
    """Return the selected entries; for a dry run, the first case of some, forward only, without baselines."""
    if not options.dry:
        return tuple(entry for entry in PLAN if not options.names or entry.name in options.names)
    cases = {name: next(iter(importlib.import_module(name).BENCHMARK.sweep)) for name in FAST_ON_CPU}
    return tuple(Entry(name, ("float32",), (case,), ("none",), ("forward",)) for name, case in cases.items())


def run_from(first: int, options: argparse.Namespace) -> None:
    """Run the entries from `first` on in this process; print the error of an entry and continue with the next."""
    for index, entry in enumerate(plan(options)[first:], first):
        print(f"entry {index}", flush=True)
        arguments = [
            "--device",
            options.device,
            "--seconds",
            str(options.seconds),
            "--no-plot",
            "--add",
            "--output",
            str(options.output),
            "--dtype",
            *entry.dtypes,
        ]
        for name in ("cases", "providers", "modes"):
            if getattr(entry, name):
                arguments += [f"--{name}", *getattr(entry, name)]
        begin = time.perf_counter()
        try:
            run_benchmark(importlib.import_module(entry.name).BENCHMARK, arguments)
        except SystemExit as ended:
            print(f"  FAILED: {ended}", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"  FAILED: {entry.name}", flush=True)
            if options.device.startswith("cuda") and not usable():
                sys.exit(3)
        print(f"  {entry.name}: {time.perf_counter() - begin:.1f} s", flush=True)


def usable() -> bool:
    """Tell whether CUDA still works in this process; after an illegal access it does not."""
    import torch

    try:
        torch.zeros(1, device="cuda").add_(1).item()
        return True
    except Exception:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of this script; exit with 1 if an entry failed."""
    parser = argparse.ArgumentParser(description="Every operator on the GPU beside its strongest baselines.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per provider, case and mode (default: 0.1)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="receives <device>/<op>.json")
    parser.add_argument("--dry", action="store_true", help="first case of some operators, without baselines")
    parser.add_argument(
        "--names", nargs="+", choices=sorted({entry.name for entry in PLAN}), metavar="OP", help="only these operators"
    )
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    require_positive(parser, options, "seconds")
    if options.first is not None:
        run_from(options.first, options)
        return 0
    first, failed, forwarded = 0, False, ["--dry"] if options.dry else []
    if options.names:
        forwarded += ["--names", *options.names]
    while first < len(plan(options)):
        command = [
            sys.executable,
            "-u",
            __file__,
            "--device",
            options.device,
            "--seconds",
            str(options.seconds),
            "--output",
            str(options.output),
            "--first",
            str(first),
            *forwarded,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        begun, limit = first, None
        for line in process.stdout:
            print(line, end="", flush=True)
            failed |= "FAILED" in line
            if line.startswith("entry "):
                first = int(line.split()[1]) + 1
                if limit is not None:
                    limit.cancel()
                limit = threading.Timer(ENTRY_SECONDS, process.kill)
                limit.daemon = True
                limit.start()
        if limit is not None:
            limit.cancel()
        if process.wait() == 0:
            break
        failed = True
        print(f"FAILED: the process ended with code {process.returncode} before entry {first}", flush=True)
        if first == begun:  # the process ended before its first entry
            break
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
