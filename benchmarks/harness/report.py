# SPDX-License-Identifier: Apache-2.0
"""Output of a benchmark: tables on screen, JSON, plots and Markdown."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.benchmark import OURS, Benchmark, Problem

ROOT = Path(__file__).resolve().parents[2]
"""The source tree, or the folder of the installed package."""

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Default folder of results."""


def print_case(label: str, problem: Problem, rows: list[dict[str, Any]]) -> None:
    with_kernels = any("kernel_ms" in row for row in rows)
    print(f"\n  {label}")
    print(
        f"    {'provider':<24}{'median ms':>11}{'10 %':>10}{'90 %':>10}{'runs':>6}{'error':>10}{'ratio':>8}"
        + (f"{'kernel ms':>11}{'ratio':>8}" if with_kernels else "")
    )
    for row in rows:
        print(
            f"    {row['provider']:<24}{row['median_ms']:>11.3f}{row['q10_ms']:>10.3f}{row['q90_ms']:>10.3f}"
            f"{row['runs']:>6}{row['error']:>10.1e}{row['ratio']:>8.2f}"
            + (f"{row['kernel_ms']:>11.4f}" if "kernel_ms" in row else "")
            + (f"{row['kernel_ratio']:>8.2f}" if "kernel_ratio" in row else "")
        )
    parts = []
    for key, total, unit, rate in (
        ("gigabytes_per_second", problem.bytes, "MB", "GB/s"),
        ("gigaflops_per_second", problem.operations, "MFLOP", "GFLOP/s"),
    ):
        reached = next((row[key] for row in rows if row["provider"] == OURS and key in row), None)
        if reached is not None:
            parts.append(f"{total / 1e6:.1f} {unit} at {reached:.1f} {rate}")
    if parts:
        print(f"    spatialflow: {', '.join(parts)}")
    sys.stdout.flush()


def device_name(device: str) -> str:
    """Return the name of a GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the source tree, with "-modified" if tracked files differ from it; None if unknown."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        packed = ROOT / "commit.txt"  # in an archive of tools/gpu_pack.py
        return packed.read_text().strip() if packed.is_file() else None
    return commit.stdout.strip() + ("-modified" if state.stdout.strip() else "")


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions of a measurement: device, threads, CPU level, versions, commit, date."""
    import spatialflow
    from spatialflow import _library

    versions = {"torch": torch.__version__, "python": platform.python_version(), "spatialflow": spatialflow.__version__}
    for name in ("torchvision", "numpy", "cupy"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = module.__version__
    return {
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "cpu_level": _library.cpu_level(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def results_path(folder: Path, device: str, name: str) -> Path:
    """Return `<folder>/<device>/<name>.json` and create the folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    path = folder / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def image_paths(folder: Path, count: int) -> list[Path]:
    """Return the first `count` image files of a folder by name; end the program with an error if it has none."""
    entries = folder.iterdir() if folder.is_dir() else ()
    paths = sorted(path for path in entries if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        sys.exit(f"{folder}: contains no .jpg or .png")
    return paths[:count]


def write_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure under a temporary name, rename it, and close the figure."""
    from matplotlib import pyplot

    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    os.replace(temporary, path)


def plot(benchmark: Benchmark, setting: Mapping[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Plot median times as bars, one group per case and mode, with the quantiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = {row["dtype"] for row in rows}

    def group_of(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["case"], row["mode"] + (f", {row['dtype']}" if len(dtypes) > 1 else "")

    groups = list(dict.fromkeys(map(group_of, rows)))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.28 * len(groups) * (len(names) + 1)), layout="constrained")
    for position, name in enumerate(names):
        provider_rows = [row for row in rows if row["provider"] == name]
        at = [groups.index(group_of(row)) + (position - (len(names) - 1) / 2) * height for row in provider_rows]
        median = [row["median_ms"] for row in provider_rows]
        whiskers = [
            [row["median_ms"] - row["q10_ms"] for row in provider_rows],
            [row["q90_ms"] - row["median_ms"] for row in provider_rows],
        ]
        axes.barh(at, median, height * 0.9, xerr=whiskers, label=name, error_kw={"linewidth": 0.8})
        for y, row in zip(at, provider_rows):
            text = f" {row['median_ms']:.3g} ms" + ("" if name == OURS else f", {row['ratio']:.3g}x")
            axes.text(row["q90_ms"], y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [f"{case}\n{mode}" for case, mode in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=max(row["q90_ms"] for row in rows) * 6)
    axes.set_xlabel("median time in ms (whiskers: 10 % and 90 % quantiles)")
    versions = ", ".join(
        f"{name} {setting['versions'][name]}" for name in ("torch", "torchvision") if name in setting["versions"]
    )
    axes.set_title(
        f"{benchmark.name}: {benchmark.title}\n{setting['device']}, {setting['threads']} threads, {versions}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    write_figure(figure, path)


def markdown(paths: Sequence[Path]) -> str:
    """Return the results of a device as Markdown, a row per case, mode and dtype; "" if there are none."""
    contents = [json.loads(path.read_text()) for path in paths]
    contents = [c for c in contents if c.get("rows") and "mode" in c["rows"][0]]
    if not contents:
        return ""
    baselines = list(dict.fromkeys(r["provider"] for content in contents for r in content["rows"]))
    baselines.remove(OURS)
    timings = [("median_ms", "ratio")]
    if any("kernel_ms" in row for content in contents for row in content["rows"]):
        timings.append(("kernel_ms", "kernel_ratio"))
    tables = []
    for time_key, ratio_key in timings:
        lines = ["| " + " | ".join(["op", "case", "", "", OURS, *baselines]) + " |", "|" + "---|" * 4]
        lines[1] += "---:|" * (1 + len(baselines))
        for content in contents:
            groups: dict[tuple, dict[str, Any]] = {}
            for row in content["rows"]:
                key = (row["case"], row["mode"], row.get("dtype", content.get("dtype", "float32")))
                groups.setdefault(key, {})[row["provider"]] = row
            for key, rows in groups.items():
                cells = [_cell(rows.get(OURS), time_key, None)]
                cells += [_cell(rows.get(name), time_key, ratio_key) for name in baselines]
                lines.append("| " + " | ".join([f"`{content['op']}`", *key, *cells]) + " |")
        tables.append("\n".join(lines))
    settings = sorted({f"{c['device']}, {c['threads']} threads, torch {c['versions']['torch']}" for c in contents})
    if len(tables) == 1:
        return "\n\n".join(["; ".join(settings), *tables])
    call, kernel = tables
    headings = "Calls, from the call to its completion:", "GPU work alone:"
    return "\n\n".join(["; ".join(settings), headings[0], call, headings[1], kernel])


def _cell(row: Mapping[str, Any] | None, time_key: str, ratio_key: str | None) -> str:
    """Return a time and, for a baseline, its ratio to that of spatialflow."""
    if row is None or time_key not in row:
        return ""
    ratio = f" ({row[ratio_key]:.1f}x)" if ratio_key in row else ""
    return f"{row[time_key]:.3g} ms{ratio}"
