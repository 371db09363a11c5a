# SPDX-License-Identifier: Apache-2.0
"""SASS of a kernel: instructions with their registers, basic blocks, loops, and the first readers of loads.

The input is the output of cuobjdump.
"""

from __future__ import annotations

import functools
import heapq
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
REGISTER = re.compile(r"(?<![A-Za-z])R(\d+)((?:\.\w+)*)")
PREDICATE = re.compile(r"!?U?P(\d|T)")

# Guards that are always true, and guards that are never true.
ALWAYS, NEVER = ("", "PT", "UPT"), ("!PT", "!UPT")
# Branches to an address in a register.
INDIRECT = {"BRX", "BRXU", "JMX", "JMXU"}
# Instructions that end the function or jump to an unknown address.
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
            # Predicates may stand on both sides of the destination: SHFL.BFLY PT, R5, ...; IMAD.WIDE R4, P0, R2, ...
            # Comparisons write only predicates: ISETP P0, PT, R2, ...
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
    """Return the 32-bit registers that an operand uses: `width` per name; in an address one, or two with `.64`."""
    numbers: set[int] = set()
    for match in REGISTER.finditer(operand):
        count = 2 if ".64" in match[2] else 1 if "[" in operand else width
        numbers.update(range(int(match[1]), int(match[1]) + count))
    return frozenset(numbers)


def access_bytes(opcode: str) -> int:
    """Return the bytes that a thread moves with a memory instruction."""
    parts = opcode.split(".")
    if parts[0].startswith("UTMA"):
        return 16  # TMA: one thread copies a whole tile, whose rows are multiples of 16 bytes
    if match := re.search(r"\.(?:B?F(\d+))x(\d+)", opcode):  # REDG.E.ADD.F32x4
        return int(match[1]) * int(match[2]) // 8
    if parts[0] == "LDSM" or parts[0] == "STSM":
        return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
    bytes_of = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "F64": 8}
    return next((bytes_of[part] for part in parts if part in bytes_of), 4)


@functools.cache
def value_width(opcode: str, role: str) -> int:
    """Return the number of registers of an operand: `to` is the destination; `a`, `b`, `c` are the sources in order."""
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
        if len(types) == 1:  # the other type has 32 bits
            types = ["F32", types[0]] if (base == "I2F") == (types[0][0] in "SU") else [types[0], "F32"]
        return 2 if types and types[0 if role == "to" else 1].endswith("64") else 1
    if base in ("DADD", "DMUL", "DFMA", "DMNMX", "DSETP") or "64" in parts or "F64" in parts:
        return 2
    if base == "IMAD" and "WIDE" in parts:
        return 2 if role in ("to", "c") else 1
    return 2 if base == "CS2R" and "32" not in parts else 1


@dataclass
class Kernel:
    """Instructions of a kernel, its basic blocks as positions (begin, end) in `code`, and the edges between blocks."""

    name: str
    code: list[Instruction]
    registers: int = 0
    stack: int = 0  # bytes of stack and local memory, from `parse_resources`
    blocks: list[tuple[int, int]] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)  # first blocks of the kernel and of called subroutines

    def __post_init__(self) -> None:
        at = {instruction.address: position for position, instruction in enumerate(self.code)}
        leaders, jumps, called = {0}, {}, set()
        for position, instruction in enumerate(self.code):
            # BRA.DIV adds no edge: its target repeats a shuffle for diverged lanes and returns to the next instruction.
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
        """Return the immediate dominator of each reachable block (Cooper, Harvey, Kennedy).

        Block -1 is virtual: it precedes all entries.
        """
        order: list[int] = []
        visited = {-1}
        edges = {-1: self.entries, **dict(enumerate(self.successors))}
        stack: list[tuple[int, Iterator[int]]] = [(-1, iter(self.entries))]
        while stack:
            block, remaining = stack[-1]
            for successor in remaining:
                if successor not in visited:
                    visited.add(successor)
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
        idom = {-1: -1}
        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                candidates = [predecessor for predecessor in predecessors[block] if predecessor in idom]
                common = candidates[0]
                for candidate in candidates[1:]:
                    while common != candidate:
                        if rank[common] < rank[candidate]:
                            common = idom[common]
                        else:
                            candidate = idom[candidate]
                if idom.get(block) != common:
                    idom[block] = common
                    changed = True
        return idom

    def loops(self) -> list[set[int]]:
        """Return the blocks of each natural loop, which an edge from a block to one of its dominators closes."""
        idom = self.dominators()
        predecessors: dict[int, list[int]] = defaultdict(list)
        for block in idom:
            for successor in self.successors[block] if block >= 0 else []:
                predecessors[successor].append(block)

        def dominates(header: int, block: int) -> bool:
            while block not in (header, -1):
                block = idom[block]
            return block == header

        loop_of: dict[int, set[int]] = {}
        for header in predecessors:
            ends = [block for block in predecessors[header] if dominates(header, block)]
            if ends:
                body = loop_of.setdefault(header, {header})
                while ends:
                    block = ends.pop()
                    if block not in body:
                        body.add(block)
                        ends += predecessors[block]
        return list(loop_of.values())

    def positions(self, blocks: Iterable[int]) -> list[int]:
        return [position for block in sorted(blocks) for position in range(*self.blocks[block])]

    def main_loops(self) -> list[list[int]]:
        """Return the positions of the instructions of each main loop.

        These are the innermost loops with matrix instructions, except those with fewer than half as many as another.
        Without such loops, they are the innermost loops with a load from global memory. The same exception applies to
        the number of loads only if the kernel has matrix instructions outside of loops.
        """
        for is_counted in (lambda instruction: instruction.is_matrix, lambda instruction: instruction.is_global_load):
            counts = [(body, sum(is_counted(self.code[at]) for at in self.positions(body))) for body in self.loops()]
            nonempty = [(body, count) for body, count in counts if count]
            inner = [
                (body, count) for body, count in nonempty if not any(other_body < body for other_body, _ in nonempty)
            ]
            if inner:
                threshold = (
                    max(count for _, count in inner) / 2
                    if any(instruction.is_matrix for instruction in self.code)
                    else 0
                )
                return [self.positions(body) for body, count in inner if count >= threshold]
        return []

    def outer_loops(self) -> list[list[int]]:
        """Return the positions of the instructions of each outermost loop."""
        bodies = self.loops()
        return [self.positions(body) for body in bodies if not any(body < enclosing for enclosing in bodies)]

    def first_readers(self, position: int, body: list[int]) -> dict[int, int]:
        """Find the instructions that may be the first to read the result of a load.

        Jumps over matrix instructions of the loop `body` are not followed: only warps without outputs take them.

        Returns:
            Position of each such instruction -> steps of the shortest path.
        """
        block_of = next(number for number, (begin, end) in enumerate(self.blocks) if begin <= position < end)
        matrix = [at for at in body if self.code[at].is_matrix]
        readers: dict[int, int] = {}
        visited: set[tuple[int, frozenset[int]]] = set()
        waiting = [(0, position + 1, block_of, self.code[position].written)]
        while waiting:
            steps, start, block, loaded = heapq.heappop(waiting)
            for here in range(start, self.blocks[block][1]):
                steps += 1
                instruction = self.code[here]
                if instruction.read & loaded:
                    readers[here] = min(steps, readers.get(here, steps))
                    break
                if instruction.guard in ALWAYS:
                    loaded -= instruction.written
                    if not loaded:
                        break
            else:
                for successor in self.successors[block]:
                    if (successor, loaded) not in visited and not self._jumps_over(matrix, block, successor):
                        visited.add((successor, loaded))
                        heapq.heappush(waiting, (steps, self.blocks[successor][0], successor, loaded))
        return readers

    def _jumps_over(self, positions: list[int], block: int, successor: int) -> bool:
        """Tell whether an edge jumps forward over some of `positions` to a block that the skipped code also reaches.

        This is true of the jump around an `if`. The skipped code does not reach an `else`, so a jump to it is followed.
        """
        end, target = self.blocks[block][1], self.blocks[successor][0]
        if not any(end <= at < target for at in positions):
            return False
        reached, waiting = set(), [branch for branch in self.successors[block] if branch != successor]
        while waiting:
            here = waiting.pop()
            if here not in reached and block < here <= successor:
                reached.add(here)
                waiting += self.successors[here]
        return successor in reached


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
        By symbol of a function: the number of registers, and the bytes of stack and local memory together.
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
