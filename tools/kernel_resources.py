# SPDX-License-Identifier: Apache-2.0
"""Write registers, shared memory and spills of every CUDA kernel, as ptxas reports them, into docs/kernels.md.

    python tools/kernel_resources.py [--architectures 90a 80 ...] [--torch FOLDER] [--check]

nvcc is needed (CUDACXX, or on PATH), but no GPU. Kernels are grouped by name, with the range over their instantiations.
The table is for the first architecture; lines above it summarize the others. `--check` changes nothing and fails if a
kernel spills or nvcc warns.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- resources: made by tools/kernel_resources.py -->", "<!-- end of resources -->"


def compile_output(source: Path, architectures: list[str], torch: Path) -> str:
    """Compile `source` with the flags of cmake/cuda.cmake; return the output of nvcc and ptxas."""
    flags = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-Wall", "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    if source.stem in unfused_sources():
        flags.append("--fmad=false")
    with tempfile.NamedTemporaryFile(suffix=".o") as target:
        done = subprocess.run(
            [
                os.environ.get("CUDACXX", "nvcc"),
                *flags,
                "-DUSE_CUDA",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                f"-I{ROOT / 'csrc'}",
                f"-isystem={torch / 'include'}",
                "-c",
                str(source),
                "-o",
                target.name,
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def unfused_sources() -> list[str]:
    """Return the names of the CUDA sources that cmake/ops.cmake lists for `--fmad=false`."""
    return re.search(r"set\(cuda_unfused ([\w ]+)\)", (ROOT / "cmake" / "ops.cmake").read_text())[1].split()


def kernel_name(symbol: str) -> str:
    """Return the first name in a mangled symbol that ends in _kernel; the symbol itself if there is none."""
    position = 0
    while match := re.compile(r"(\d+)").search(symbol, position):
        length, begin = int(match[1]), match.end()
        name = symbol[begin : begin + length]
        if name.endswith("_kernel"):
            return name
        position = begin + (length if name.isidentifier() else 0)
    return symbol


def resources(output: str) -> dict[str, dict[str, list[tuple[int, int, int, int]]]]:
    """Return the resources of each instantiation, by architecture and kernel.

    Returns:
        Architecture -> kernel -> list of (registers, static shared bytes, stack bytes, spilled bytes).
    """
    by_architecture: dict[str, dict[str, list[tuple[int, int, int, int]]]] = defaultdict(lambda: defaultdict(list))
    architecture, kernel, stack, spilled = "", "", 0, 0
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel, architecture = kernel_name(match[1]), match[2]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            by_architecture[architecture][kernel].append(
                (int(match[1]), int(shared[1]) if shared else 0, stack, spilled)
            )
    return by_architecture


def span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["90a", "80", "86", "89", "100", "120"])
    parser.add_argument("--torch", type=Path, help="folder of the torch package (default: that of this Python)")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch = options.torch or Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    tabled, *other_architectures = options.architectures
    rows, failures = [], []
    totals: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (registers, spilled bytes) of all instantiations
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        output = compile_output(source, options.architectures, torch)
        failures += [line for line in output.splitlines() if "warning" in line]
        for architecture, kernels in resources(output).items():
            for kernel, uses in sorted(kernels.items()):
                registers, shared, stack, spilled = (list(column) for column in zip(*uses))
                totals[architecture] += zip(registers, spilled)
                if architecture == tabled:
                    sizes = " | ".join(span(column) for column in (registers, shared, stack, spilled))
                    rows.append(f"| `{source.name}` | `{kernel}` | {len(uses)} | {sizes} |")
                if any(spilled):
                    failures.append(f"sm_{architecture}: {source.name}: {kernel} spills {span(spilled)} bytes")
    summary = failures or [f"{len(rows)} kernels on {len(options.architectures)} architectures: no spills, no warnings"]
    if options.check:
        print("\n".join(summary))
        sys.exit(1 if failures else 0)
    ranges = [
        f"- sm_{name}: {span([registers for registers, _ in totals[name]])} registers,"
        f" {sum(spilled for _, spilled in totals[name])} spilled bytes."
        for name in other_architectures
    ]
    table = [
        f"sm_{tabled}; ranges over the instantiations (dtypes, access widths).",
        *(
            ["The list below summarizes the same kernels on other architectures.", "", *ranges]
            if other_architectures
            else []
        ),
        "",
        "| file | kernel | instantiations | registers | static shared bytes | stack bytes | spilled bytes |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n{chr(10).join(table)}\n{END}{after}")
    temporary.replace(PAGE)
    print("\n".join(summary))


if __name__ == "__main__":
    main()
