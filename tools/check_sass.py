# SPDX-License-Identifier: Apache-2.0
"""Check the SASS of every CUDA kernel against tools/sass_limits.py (docs/sass.md).

    python tools/check_sass.py [--library FILE] [--table | --loads PATTERN]

No GPU is needed, only cuobjdump and nvdisasm: from PyPI (pyproject.toml, extra "sass"), or from a CUDA toolkit on
PATH. FILE may be a shared library, an object file or a cubin.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from sass_code import (
    GLOBAL_LOADS,
    GLOBAL_STORES,
    INDIRECT,
    MATRIX,
    Kernel,
    access_bytes,
    parse,
    parse_resources,
    short_names,
)
from sass_limits import LIMITS, Limit

LIBRARY = ROOT / "spatialflow" / "lib" / "libspatialflow_cuda.so"
ARCHITECTURE = "sm_90a"


@dataclass(frozen=True)
class Load:
    """Global load of a main loop, or of the scope that replaces it."""

    address: int
    bytes: int
    distance: int  # instructions up to and including the first reader, on the shortest path; 1: the next one reads it
    matrix: int  # matrix instructions between load and reader, in the order of the code
    opcode: str
    reader: str

    def __str__(self) -> str:
        return (
            f"{self.opcode} at {self.address:#x}, read by {self.reader}: distance {self.distance}, {self.matrix} HMMA"
        )


def listed(loads: list[Load]) -> str:
    return "; ".join([*map(str, loads[:2]), *(["..."] if len(loads) > 2 else [])])


@dataclass
class Facts:
    """Measurements of a kernel's machine code."""

    kernel: Kernel
    loads: list[Load] = field(default_factory=list)
    per_matrix: float = 0.0  # instructions of a main loop for each matrix instruction in it; the worst loop
    in_flight: int = 0  # widest loads in flight at once, in the order of the code; the best loop
    scope: str = ""  # where the loads were measured, if no main loop has any

    def __post_init__(self) -> None:
        code = self.kernel.code
        opcodes = Counter(instruction.base for instruction in code)
        self.instructions = sum(count for base, count in opcodes.items() if base != "NOP")
        self.matrix = sum(opcodes[base] for base in MATRIX)
        self.local = opcodes["LDL"] + opcodes["STL"]
        self.indirect = sum(opcodes[base] for base in INDIRECT)
        self.widest_load = max((access_bytes(i.opcode) for i in code if i.base in GLOBAL_LOADS), default=0)
        self.widest_store = max((access_bytes(i.opcode) for i in code if i.base in GLOBAL_STORES), default=0)
        main_loops = self.kernel.main_loops()
        for body in main_loops:
            if matrix := sum(code[at].is_matrix for at in body):
                self.per_matrix = max(self.per_matrix, len(body) / matrix)
        bodies = main_loops
        if not main_loops:
            self.scope, bodies = "no loop", [list(range(len(code)))]
        elif not any(code[at].is_global_load for body in main_loops for at in body):
            self.scope, bodies = "loop around", self.kernel.outer_loops()
        sizes = [access_bytes(code[at].opcode) for body in bodies for at in body if code[at].is_global_load]
        for body in bodies:
            self._measure(body, max(sizes, default=0))

    def _measure(self, body: list[int], widest: int) -> None:
        code = self.kernel.code
        order = {position: number for number, position in enumerate(body)}
        pending = [0] * len(body)
        for number, position in enumerate(body):
            readers = self.kernel.first_readers(position, body) if code[position].is_global_load else {}
            if not readers:
                continue
            paths = []
            for reader in readers:
                end = order.get(reader, len(body))  # a reader after the loop counts as its end
                paths.append(
                    [*range(number + 1, end)] if end > number else [*range(number + 1, len(body)), *range(end)]
                )
            for step in (number, *min(paths, key=len)):
                pending[step] += access_bytes(code[position].opcode) == widest
            nearest = min(readers, key=readers.__getitem__)
            self.loads.append(
                Load(
                    code[position].address,
                    access_bytes(code[position].opcode),
                    readers[nearest],
                    min(sum(code[body[step]].is_matrix for step in path) for path in paths),
                    code[position].opcode,
                    f"{code[nearest].opcode} at {code[nearest].address:#x}",
                )
            )
        self.in_flight = max(self.in_flight, *pending)

    def faults(self, limit: Limit) -> list[str]:
        violations = []

        def expect(holds: bool, violation: str) -> None:
            if not holds:
                violations.append(violation)

        expect(not self.local, f"{self.local} accesses to local memory")
        expect(not self.kernel.stack, f"{self.kernel.stack} bytes of stack and local memory")
        expect(not self.indirect, "an indirect branch: loops after it are not found")
        expect(
            self.kernel.registers <= limit.registers, f"{self.kernel.registers} registers, more than {limit.registers}"
        )
        expect(self.widest_load >= limit.load, f"widest global load {self.widest_load} bytes, less than {limit.load}")
        expect(
            self.widest_store >= limit.store, f"widest global store {self.widest_store} bytes, less than {limit.store}"
        )
        narrow = [load for load in self.loads if load.bytes < limit.load and not self.scope]
        if limit.narrow is not None:
            expect(
                len(narrow) <= limit.narrow,
                f"{len(narrow)} loads below {limit.load} bytes in the main loop, more than {limit.narrow}: "
                + listed(narrow),
            )
        if limit.per_matrix is not None:
            expect(self.per_matrix > 0, "no loop with matrix instructions")
            expect(
                self.per_matrix <= limit.per_matrix,
                f"{self.per_matrix:.1f} instructions for each matrix instruction, more than {limit.per_matrix}",
            )
        data = [load for load in self.loads if load.bytes >= limit.load]
        soon = [load for load in data if load.distance < limit.distance]
        expect(not soon, f"{len(soon)} of {len(data)} loads with a distance below {limit.distance}: {listed(soon)}")
        exposed = [load for load in data if load.matrix < limit.matrix]
        expect(
            not exposed, f"{len(exposed)} of {len(data)} loads with less than {limit.matrix} HMMA: {listed(exposed)}"
        )
        expect(
            self.in_flight >= limit.in_flight, f"{self.in_flight} loads in flight at once, fewer than {limit.in_flight}"
        )
        return violations


def disassembler() -> str:
    """Return the path of cuobjdump: from the PyPI package, else from PATH."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    path = str(packaged[-1]) if packaged else shutil.which("cuobjdump")
    return path or sys.exit(
        "check_sass: no cuobjdump; python -m pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def kernels_of(library: Path) -> list[Kernel]:
    def output(what: str) -> str:
        command = [disassembler(), "-arch", ARCHITECTURE, what, str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"check_sass: {' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    functions, resources = parse(output("-sass")), parse_resources(output("-res-usage"))
    if not functions:
        sys.exit(f"check_sass: {library} has no code for {ARCHITECTURE}")
    names = short_names(list(functions))
    return [Kernel(name, code, *resources[symbol]) for name, (symbol, code) in zip(names, functions.items())]


def limit_of(name: str) -> Limit | None:
    """Return the first row of the limits whose pattern matches a kernel's name."""
    return next((limit for limit in LIMITS if fnmatchcase(name, limit.kernel)), None)


def check(kernels: list[Kernel], whole: bool = True) -> list[str]:
    """Return the violations of the limits and, for the `whole` library, the rows that no kernel uses."""
    violations, used = [], set()
    for kernel in kernels:
        limit = limit_of(kernel.name)
        if limit is None:
            violations.append(f"{kernel.name}: no row in tools/sass_limits.py")
            continue
        used.add(limit)
        violations += [f"{kernel.name}: {fault} ({limit.why})" for fault in Facts(kernel).faults(limit)]
    return violations + [f"{limit.kernel}: no such kernel" for limit in LIMITS if whole and limit not in used]


def unlaunchable(library: bytes) -> list[str]:
    """Return kernels that the host launches by a name that the device does not have.

    If a kernel has a restrict-qualified pointer among its template arguments, nvcc gives it different names on host and
    device. A launch then fails with "invalid device function". The host's name of a kernel in an unnamed namespace
    has an L, for internal linkage, before the name of the kernel. Names within other names are left out: those of
    host stubs and of template arguments.
    """
    names = {name.decode() for name in re.findall(rb"(?<!__device_stub_)(?<!adL)_ZN\w+_kernel\w*", library)}
    return sorted(
        name
        for name in names
        if "Xad" not in name  # a function with a kernel as its template argument, such as `launch`
        and re.search(r"L\d+\w*?_kernel", name)
        and re.sub(r"L(\d+\w*?_kernel)", r"\1", name) not in names
    )


def span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = (f"{round(value, 1):g}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def table(kernels: list[Kernel]) -> str:
    """Return a line for each row of the limits; kernels without a row, or with the row "*", are grouped by name."""
    groups: dict[str, list[Facts]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda kernel: kernel.name):
        limit = limit_of(kernel.name)
        groups[limit.kernel if limit and limit.kernel != "*" else kernel.name.split("<")[0]].append(Facts(kernel))
    lines = [
        "| kernel | variants | registers | instructions | HMMA | instructions per HMMA in the main loop"
        " | loads in the main loop | shortest load to use | typical | HMMA between | loads in flight"
        " | widest load, store |",
        "|" + "---|" * 12,
    ]
    for name, group in groups.items():
        columns = [
            f"`{name}`",
            str(len(group)),
            span(facts.kernel.registers for facts in group),
            span(facts.instructions for facts in group),
            span(facts.matrix for facts in group),
            span(facts.per_matrix or None for facts in group),
            ", ".join([span(len(facts.loads) for facts in group), *sorted({facts.scope for facts in group} - {""})]),
            span(min((load.distance for load in facts.loads), default=None) for facts in group),
            span(statistics.median(load.distance for load in facts.loads) if facts.loads else None for facts in group),
            span(min((load.matrix for load in facts.loads), default=None) if facts.matrix else None for facts in group),
            span(facts.in_flight or None for facts in group),
            f"{span(facts.widest_load for facts in group)}, {span(facts.widest_store for facts in group)}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, metavar="FILE", help="default: the one built here")
    parser.add_argument("--table", action="store_true", help="print a Markdown table and check nothing")
    parser.add_argument("--loads", metavar="PATTERN", help="print each measured load of kernels: 'roi_align_kernel<*'")
    options = parser.parse_args()
    library = options.library or LIBRARY
    if not library.is_file():
        sys.exit(f"check_sass: {library} is missing; make test-sass builds it where nvcc is")
    kernels = kernels_of(library)
    if options.table:
        print(table(kernels))
        return
    if options.loads:
        for kernel in kernels:
            if fnmatchcase(kernel.name, options.loads):
                print("\n  ".join([kernel.name, *map(str, Facts(kernel).loads)]))
        return
    violations = check(kernels, whole=options.library is None)
    unknown = unlaunchable(library.read_bytes())
    violations += [f"{name}: launched by a name that the device does not know" for name in unknown]
    print("\n".join(violations or [f"{len(kernels)} kernels within the limits of tools/sass_limits.py"]))
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
