# SPDX-License-Identifier: Apache-2.0
"""Markdown page of `gpu_check.py`: its steps and the measurements of its benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import markdown

if TYPE_CHECKING:
    from gpu_execution import Outcome


def as_markdown(about: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> str:
    """Return the page: steps, roofline shares, times and pipeline stages, as far as they were measured."""
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
    text = "\n".join(lines) + "\n"
    for title, part in (
        ("Share of the roofline", roofline(folder, about["commit"])),
        ("Times", markdown(results_of(folder, about["commit"]))),
        ("Pipeline by stage", stages(folder, about["commit"])),
    ):
        text += f"\n## {title}\n\n{part}\n" if part else ""
    return text


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def results_of(folder: Path, commit: str | None) -> list[Path]:
    """Return the JSON files in `folder` that were written at this commit."""
    return [path for path in sorted(folder.glob("*.json")) if read_json(path).get("commit") == commit]


def roofline(folder: Path, commit: str | None) -> str:
    """Compare forward kernels with the time of their bytes and operations at this GPU's measured rates."""
    rates = read_json(folder / "card.json").get("rates")
    if not rates:
        return ""
    contents = [read_json(path) for path in results_of(folder, commit)]
    lines = [
        ", ".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in rates.items()) + ".",
        "",
        "| op | case | dtype | floor us | kernel us | share |",
        "|---|---|---|---:|---:|---:|",
    ]
    for content in contents:
        for row in content.get("rows", []):
            if row.get("provider") not in ("spatialflow", "spatialflow packed") or "kernel_ms" not in row:
                continue
            if row["mode"] != "forward" or not (row.get("bytes") or row.get("operations")):
                continue
            kind = "float32" if row["dtype"] == "float32" else "bfloat16"
            by_bytes = (row.get("bytes") or 0) / rates["copy_gigabytes_per_second"] / 1e3
            by_operations = (row.get("operations") or 0) / rates[f"{kind}_teraflops_per_second"] / 1e6
            floor, kernel = max(by_bytes, by_operations), row["kernel_ms"] * 1e3
            name = content["op"] + (" packed" if row["provider"].endswith("packed") else "")
            lines.append(
                f"| `{name}` | {row['case']} | {row['dtype']} | {floor:.1f} | {kernel:.1f} | "
                f"{100 * floor / kernel:.0f} % |"
            )
    return "\n".join(lines) if len(lines) > 4 else ""


def stages(folder: Path, commit: str | None) -> str:
    """Return the speed of the pipeline in each form (eager, CUDA graph), and its table of stages."""
    content = read_json(folder / "stages.json")
    if not content or content.get("commit") != commit:
        return ""
    size = "x".join(map(str, content["size"]))
    lines = [f"{content['config']}, {size}, {content['dtype']}, from array to map."]
    for row in content["forms"]:
        replay = f", replay {row['replay_ms']:.2f} ms on the GPU" if "replay_ms" in row else ""
        lines.append(f"{row['form']}: {row['images_per_second']:.1f} images/s, {row['median_ms']:.2f} ms{replay}.")
    if "stages" not in content:
        return "\n".join(lines)
    lines += ["", "| stage | kernels | ms |", "|---|---:|---:|"]
    lines += [f"| {row['stage']} | {row['kernels']} | {row['ms']:.3f} |" for row in content["stages"]]
    total = [sum(row[key] for row in content["stages"]) for key in ("kernels", "ms")]
    return "\n".join([*lines, f"| sum | {total[0]} | {total[1]:.3f} |"])
