# SPDX-License-Identifier: Apache-2.0
"""Check the SASS of every CUDA kernel against tools/sass_limits.py (docs/sass.md).

    python tools/check_sass.py [--library FILE] [--table | --loads PATTERN]

No GPU is needed, only cuobjdump and nvdisasm: from PyPI (pyproject.toml, extra "sass"), or from a CUDA toolkit on
PATH. FILE may be a shared library, an object file or a cubin.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from sass_limits import LIMITS, Limit

LIBRARY = ROOT / "spatialflow" / "lib" / "libspatialflow_cuda.so"
ARCHITECTURE = "sm_90a"

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
REGISTER = re.compile(r"(?<![A-Za-z])R(\d+)((?:\.\w+)*)")
PREDICATE = re.compile(r"!?U?P(\d|T)")

ALWAYS, NEVER = ("", "PT", "UPT"), ("!PT", "!UPT")
INDIRECT = {"BRX", "BRXU", "JMX", "JMXU"}
LEAVING = INDIRECT | {"EXIT", "RET"}
MATRIX = {"HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA"}
GLOBAL_LOADS = {"LD", "LDG", "LDGSTS", "UTMALDG"}
GLOBAL_STORES = {"ST", "STG", "RED", "REDG", "UTMASTG", "UTMAREDG"}
STORES = {"ST", "STG", "STS", "STL", "STSM", "RED", "REDG", "REDS"}
# Instructions without a destination register: each register that they name is read.
ONLY_READ = (
    STORES
    | LEAVING
    | {
        "BAR",
        "BRA",
        "CALL",
        "CCTL",
        "FCHK",
        "LDGSTS",
        "NANOSLEEP",
        "R2P",
        "WARPSYNC",
    }
)


class Instruction:
    __slots__ = ("_accesses", "address", "base", "guard", "opcode", "operands")

    def __init__(self, address: int, guard: str, opcode: str, operands: list[str]):
        self.address, self.guard, self.opcode, self.operands = address, guard, opcode, operands
        self.base = opcode.split(".")[0]
        self._accesses: tuple[frozenset[int], frozenset[int]] | None = None

    @property
    def is_matrix(self) -> bool:
        return self.base in MATRIX

    @property
    def is_global_load(self) -> bool:
        return self.base in ("LD", "LDG") and bool(self.written)

    @property
    def written(self) -> frozenset[int]:
        return self._registers()[0]

    @property
    def read(self) -> frozenset[int]:
        return self._registers()[1]

    def _registers(self) -> tuple[frozenset[int], frozenset[int]]:
        if self._accesses is None:
            # SHFL.BFLY PT, R5, ...; ISETP P0, PT, R2, ...; IMAD.WIDE R4, P0, R2, ...
            values = [operand for operand in self.operands if not PREDICATE.fullmatch(operand)]
            written: frozenset[int] = frozenset()
            if self.base not in ONLY_READ and not re.search(r"SETP2?$", self.base) and values:
                if re.fullmatch(r"U?R(\d+|Z)(\.\w+)*", values[0]):
                    written = named_registers(values.pop(0), value_width(self.opcode, "to"))
            read: set[int] = set()
            for position, operand in enumerate(values):
                read |= named_registers(operand, value_width(self.opcode, "abc"[min(position, 2)]))
            self._accesses = written, frozenset(read)
        return self._accesses


def named_registers(operand: str, width: int) -> frozenset[int]:
    """Return the 32-bit registers of an operand that holds values of `width` registers, or an address."""
    numbers: set[int] = set()
    for match in REGISTER.finditer(operand):
        wide = 2 if ".64" in match[2] else 1 if "[" in operand else width
        numbers.update(range(int(match[1]), int(match[1]) + wide))
    return frozenset(numbers)


def access_bytes(opcode: str) -> int:
    """Return the bytes that a thread moves with a memory instruction."""
    parts = opcode.split(".")
    if parts[0].startswith("UTMA"):
        return 16  # the grain of TMA
    if match := re.search(r"\.(?:B?F(\d+))x(\d+)", opcode):  # REDG.E.ADD.F32x4
        return int(match[1]) * int(match[2]) // 8
    if parts[0] == "LDSM" or parts[0] == "STSM":
        return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "F64": 8}
    return next((narrow[part] for part in parts if part in narrow), 4)


@functools.cache
def value_width(opcode: str, role: str) -> int:
    """Return the registers of one operand: `to` is the destination; `a`, `b` and `c` are the sources in order."""
    base, *parts = opcode.split(".")
    if base.startswith(("LD", "ST", "RED", "ATOM")):
        return -(-access_bytes(opcode) // 4)
    if base in ("HGMMA", "IGMMA", "QGMMA"):
        columns = int(re.search(r"\.\d+x(\d+)x\d+", opcode)[1])
        return 4 if role == "a" else columns // (4 if parts[1] == "F16" else 2)
    if base in MATRIX:
        small = "1688" in parts and "TF32" not in parts
        return {"a": 2 if small else 4, "b": 1 if small else 2}.get(role, 2 if parts[1] == "F16" else 4)
    if base in ("F2F", "F2I", "I2F"):
        types = [part for part in parts if re.fullmatch(r"[FSU]\d+", part)]
        if len(types) == 1:  # the other one is 32 bits
            types = ["F32", types[0]] if (base == "I2F") == (types[0][0] in "SU") else [types[0], "F32"]
        return 2 if types and types[0 if role == "to" else 1].endswith("64") else 1
    if base in ("DADD", "DMUL", "DFMA", "DMNMX", "DSETP") or "64" in parts or "F64" in parts:
        return 2
    if base == "IMAD" and "WIDE" in parts:
        return 2 if role in ("to", "c") else 1
    return 2 if base == "CS2R" and "32" not in parts else 1


@dataclass
class Kernel:
    """Instructions of a kernel, its basic blocks (positions of first and one past last), and their edges."""

    name: str
    code: list[Instruction]
    registers: int = 0
    stack: int = 0  # bytes of stack and local memory that the resource table names
    blocks: list[tuple[int, int]] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        at = {instruction.address: position for position, instruction in enumerate(self.code)}
        leaders, jumps, called = {0}, {}, set()
        for position, instruction in enumerate(self.code):
            # BRA.DIV leads to code that repeats one shuffle for lanes that have diverged; it comes back behind it.
            if instruction.base == "BRA" and ".DIV" not in instruction.opcode:
                jumps[position] = at[int(instruction.operands[-1], 16)]
                leaders |= {jumps[position], position + 1}
            elif instruction.base in LEAVING:
                leaders.add(position + 1)
            elif instruction.base == "CALL" and re.fullmatch("0x[0-9a-f]+", instruction.operands[-1]):
                called.add(at[int(instruction.operands[-1], 16)])
        bounds = sorted((leaders | called) - {len(self.code)})
        self.blocks = list(zip(bounds, [*bounds[1:], len(self.code)]))
        block_of = {begin: number for number, (begin, _) in enumerate(self.blocks)}
        self.entries = [block_of[position] for position in sorted({0} | called)]
        for _, end in self.blocks:
            last = self.code[end - 1]
            targets = {jumps[end - 1]} if end - 1 in jumps and last.guard not in NEVER else set()
            # BRA P1, 0x40 has its condition among the operands.
            leaves = last.base in LEAVING or (end - 1 in jumps and len(last.operands) == 1)
            if end < len(self.code) and not (leaves and last.guard in ALWAYS):
                targets.add(end)
            self.successors.append(sorted(block_of[target] for target in targets))

    def dominators(self) -> dict[int, int]:
        """Return the immediate dominator of each reachable block (Cooper, Harvey, Kennedy); -1 precedes all entries."""
        order: list[int] = []
        seen = {-1}
        edges = {-1: self.entries, **dict(enumerate(self.successors))}
        stack: list[tuple[int, Iterator[int]]] = [(-1, iter(self.entries))]
        while stack:
            block, left = stack[-1]
            for successor in left:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.successors[successor])))
                    break
            else:
                order.append(block)
                stack.pop()
        rank = {block: number for number, block in enumerate(order)}
        predecessors: dict[int, list[int]] = defaultdict(list)
        for block in order:
            for successor in edges[block]:
                predecessors[successor].append(block)
        above = {-1: -1}
        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                candidates = [one for one in predecessors[block] if one in above]
                common = candidates[0]
                for other in candidates[1:]:
                    while common != other:
                        if rank[common] < rank[other]:
                            common = above[common]
                        else:
                            other = above[other]
                if above.get(block) != common:
                    above[block] = common
                    changed = True
        return above

    def loops(self) -> list[set[int]]:
        """Return the blocks of each natural loop: the loop of an edge back to a block that dominates its start."""
        above = self.dominators()
        predecessors: dict[int, list[int]] = defaultdict(list)
        for block in above:
            for successor in self.successors[block] if block >= 0 else []:
                predecessors[successor].append(block)

        def dominates(header: int, block: int) -> bool:
            while block not in (header, -1):
                block = above[block]
            return block == header

        found: dict[int, set[int]] = {}
        for header in predecessors:
            ends = [block for block in predecessors[header] if dominates(header, block)]
            if ends:
                body = found.setdefault(header, {header})
                while ends:
                    block = ends.pop()
                    if block not in body:
                        body.add(block)
                        ends += predecessors[block]
        return list(found.values())

    def positions(self, blocks: Iterable[int]) -> list[int]:
        return [position for block in sorted(blocks) for position in range(*self.blocks[block])]

    def main_loops(self) -> list[list[int]]:
        """Return the positions of the instructions of each main loop.

        With matrix instructions: the innermost loops that contain some, without those that have less than half as many
        as another. Otherwise: the innermost loops that contain a load from global memory.
        """
        for wanted in (lambda one: one.is_matrix, lambda one: one.is_global_load):
            counts = [(body, sum(wanted(self.code[at]) for at in self.positions(body))) for body in self.loops()]
            holding = [(body, count) for body, count in counts if count]
            inner = [(body, count) for body, count in holding if not any(other < body for other, _ in holding)]
            if inner:
                least = max(count for _, count in inner) / 2 if any(one.is_matrix for one in self.code) else 0
                return [self.positions(body) for body, count in inner if count >= least]
        return []

    def outer_loops(self) -> list[list[int]]:
        """Return the positions of the instructions of each outermost loop."""
        bodies = self.loops()
        return [self.positions(body) for body in bodies if not any(body < other for other in bodies)]

    def first_readers(self, position: int, body: list[int]) -> dict[int, int]:
        """Find the instructions that may be the first to read the result of a load.

        Jumps over matrix instructions of the loop `body` are not followed: only warps without outputs take them.

        Returns:
            Position of each such instruction -> steps of the shortest path.
        """
        block_of = next(number for number, (begin, end) in enumerate(self.blocks) if begin <= position < end)
        matrix = [at for at in body if self.code[at].is_matrix]
        found: dict[int, int] = {}
        seen: set[tuple[int, frozenset[int]]] = set()
        waiting = [(0, position + 1, block_of, self.code[position].written)]
        while waiting:
            steps, place, block, loaded = heapq.heappop(waiting)
            for here in range(place, self.blocks[block][1]):
                steps += 1
                instruction = self.code[here]
                if instruction.read & loaded:
                    found[here] = min(steps, found.get(here, steps))
                    break
                if instruction.guard in ALWAYS:
                    loaded -= instruction.written
                    if not loaded:
                        break
            else:
                for successor in self.successors[block]:
                    if (successor, loaded) not in seen and not self._jumps_over(matrix, block, successor):
                        seen.add((successor, loaded))
                        heapq.heappush(waiting, (steps, self.blocks[successor][0], successor, loaded))
        return found

    def _jumps_over(self, positions: list[int], block: int, successor: int) -> bool:
        """Tell whether an edge leads forward over some of `positions` to a place that the code between also reaches.

        Both branches of an `if ... else` count as paths, but not the jump around an `if`.
        """
        end, target = self.blocks[block][1], self.blocks[successor][0]
        if not any(end <= at < target for at in positions):
            return False
        reached, waiting = set(), [other for other in self.successors[block] if other != successor]
        while waiting:
            here = waiting.pop()
            if here not in reached and block < here <= successor:
                reached.add(here)
                waiting += self.successors[here]
        return successor in reached


@dataclass(frozen=True)
class Load:
    """Global load of a main loop, or of the scope that replaces it."""

    address: int
    bytes: int
    distance: int  # instructions up to and including the first that reads it, on the shortest way; 1 is the next one
    matrix: int  # matrix instructions of the loop between, in the order of the code
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
    in_flight: int = 0  # loads of the widest kind on the way at once, in the order of the code; the best loop
    scope: str = ""  # place of the loads, if no main loop has any

    def __post_init__(self) -> None:
        code = self.kernel.code
        opcodes = Counter(instruction.base for instruction in code)
        self.instructions = sum(count for base, count in opcodes.items() if base != "NOP")
        self.matrix = sum(opcodes[base] for base in MATRIX)
        self.local = opcodes["LDL"] + opcodes["STL"]
        self.indirect = sum(opcodes[base] for base in INDIRECT)
        self.widest_load = max((access_bytes(one.opcode) for one in code if one.base in GLOBAL_LOADS), default=0)
        self.widest_store = max((access_bytes(one.opcode) for one in code if one.base in GLOBAL_STORES), default=0)
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
        on_the_way = [0] * len(body)
        for number, position in enumerate(body):
            readers = self.kernel.first_readers(position, body) if code[position].is_global_load else {}
            if not readers:
                continue
            ways = []
            for reader in readers:
                end = order.get(reader, len(body))  # a reader after the loop counts as its end
                ways.append([*range(number + 1, end)] if end > number else [*range(number + 1, len(body)), *range(end)])
            for step in (number, *min(ways, key=len)):
                on_the_way[step] += access_bytes(code[position].opcode) == widest
            nearest = min(readers, key=readers.__getitem__)
            self.loads.append(
                Load(
                    code[position].address,
                    access_bytes(code[position].opcode),
                    readers[nearest],
                    min(sum(code[body[step]].is_matrix for step in way) for way in ways),
                    code[position].opcode,
                    f"{code[nearest].opcode} at {code[nearest].address:#x}",
                )
            )
        self.in_flight = max(self.in_flight, *on_the_way)

    def faults(self, limit: Limit) -> list[str]:
        found = []

        def expect(holds: bool, violation: str) -> None:
            if not holds:
                found.append(violation)

        expect(not self.local, f"{self.local} accesses to local memory")
        expect(not self.kernel.stack, f"{self.kernel.stack} bytes of stack and local memory")
        expect(not self.indirect, "an indirect branch: loops behind it are not seen")
        expect(self.kernel.registers <= limit.registers, f"{self.kernel.registers} registers, not {limit.registers}")
        expect(self.widest_load >= limit.load, f"widest global load {self.widest_load} bytes, not {limit.load}")
        expect(self.widest_store >= limit.store, f"widest global store {self.widest_store} bytes, not {limit.store}")
        narrow = [load for load in self.loads if load.bytes < limit.load and not self.scope]
        if limit.narrow is not None:
            expect(
                len(narrow) <= limit.narrow,
                f"{len(narrow)} loads below {limit.load} bytes in the main loop, not {limit.narrow}: {listed(narrow)}",
            )
        if limit.per_matrix is not None:
            expect(self.per_matrix > 0, "no loop with matrix instructions")
            expect(
                self.per_matrix <= limit.per_matrix,
                f"{self.per_matrix:.1f} instructions for each matrix instruction, not {limit.per_matrix}",
            )
        data = [load for load in self.loads if load.bytes >= limit.load]
        soon = [load for load in data if load.distance < limit.distance]
        expect(not soon, f"{len(soon)} of {len(data)} loads with a distance below {limit.distance}: {listed(soon)}")
        exposed = [load for load in data if load.matrix < limit.matrix]
        expect(
            not exposed, f"{len(exposed)} of {len(data)} loads with less than {limit.matrix} HMMA: {listed(exposed)}"
        )
        expect(self.in_flight >= limit.in_flight, f"{self.in_flight} loads on the way at once, not {limit.in_flight}")
        return found


def parse(sass: str) -> dict[str, list[Instruction]]:
    """Parse the output of `cuobjdump -sass`; return the instructions of each function by symbol."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in sass.splitlines():
        if match := LINE.match(line):
            operands = [operand.strip() for operand in match[4].split(",")] if match[4] else []
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))
        elif "Function :" in line:
            code = functions.setdefault(line.split("Function :")[1].strip(), [])
    return functions


def parse_resources(text: str) -> dict[str, tuple[int, int]]:
    """Parse the output of `cuobjdump -res-usage`.

    Returns:
        By symbol of a function: registers, bytes of stack and bytes of local memory.
    """
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {name: (int(used), int(stack) + int(local)) for name, used, stack, local in re.findall(pattern, text)}


def short_names(symbols: list[str]) -> list[str]:
    """Return short names such as `deform_conv2d_kernel<bf16, 64, 8>`: no return type, namespaces or arguments."""
    demangled = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = []
    for line in demangled.splitlines():
        name = line.replace("(anonymous namespace)::", "").removeprefix("void ").split("(")[0]
        name = re.sub(r"\b\w+::", "", name)
        names.append(name.replace("__nv_bfloat16", "bf16").replace("__half", "half"))
    return names


def disassembler() -> str:
    """Return the path of cuobjdump: from the PyPI package, else from PATH."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    found = str(packaged[-1]) if packaged else shutil.which("cuobjdump")
    return found or sys.exit(
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
    """Return the first row that matches."""
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
    has an L, for internal linkage, before the name of the kernel.
    """
    names = {name.decode() for name in re.findall(rb"(?<!\w)_ZN\w+_kernel\w*", library)}
    return sorted(
        name
        for name in names
        if "Xad" not in name  # a function with a kernel as its template argument, as `launch`
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
    """Return a line for each row of the limits; kernels without a row are grouped by name."""
    groups: dict[str, list[Facts]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda one: one.name):
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
            span(one.kernel.registers for one in group),
            span(one.instructions for one in group),
            span(one.matrix for one in group),
            span(one.per_matrix or None for one in group),
            ", ".join([span(len(one.loads) for one in group), *sorted({one.scope for one in group} - {""})]),
            span(min((load.distance for load in one.loads), default=None) for one in group),
            span(statistics.median(load.distance for load in one.loads) if one.loads else None for one in group),
            span(min((load.matrix for load in one.loads), default=None) if one.matrix else None for one in group),
            span(one.in_flight or None for one in group),
            f"{span(one.widest_load for one in group)}, {span(one.widest_store for one in group)}",
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
