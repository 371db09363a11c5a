# SPDX-License-Identifier: Apache-2.0
"""Tests of the SIMT interpreter: clean kernels pass, each planted fault is reported at its line (docs/simt.md)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).parent / "simt"

CLEAN = (
    "collectives",
    "dynamic_shared",
    "histogram",
    "indices",
    "product_bfloat16",
    "product_float16",
    "product_tf32",
    "reverse",
    "round_tf32",
    "sum",
    "transpose",
    "truncation",
    "warp_exchange",
)
FAULTS = {
    "absent lane": "not reached by all its lanes",
    "atomic and plain": "race: ",
    "copy over readers": "race: writes what another thread reads",
    "divergent barrier": "divergent barrier",
    "dynamic bounds": "out of bounds: 4 bytes at byte 128 of shared array",
    "early copy": "reads the target of a cp.async without waiting for the copy",
    "exited lane": "includes lane 9, which has exited",
    "global read": "out of bounds: element 32 of a global buffer of 32",
    "global vector": "out of bounds: element 64 and 3 after it of a global buffer of 65",
    "global write": "out of bounds: element -1 of a global buffer of 65",
    "misaligned": "misaligned: 16 bytes",
    "missing lanes": "includes lane 16, which the block does not have",
    "mixed collectives": "waits in __ballot_sync",
    "not in mask": "lane 0 is not in its own mask 0xfffffffe",
    "not rounded": "register 1 of b in lane 6, 0.333333, is not a TF32 number",
    "outside source": "reads from lane 20, which is not in the mask",
    "read-write race": "race: writes what another thread reads",
    "reader forgotten": "race: writes what another thread reads",
    "shared bounds": "of shared array 'first' of 128 bytes",
    "shuffle is not a fence": "race: reads what another thread writes",
    "skipped barrier": "thread (5, 0, 0) has exited",
    "uninitialized": "reads uninitialized shared memory",
    "uninitialized dynamic": "reads uninitialized shared memory",
    "write-read race": "race: ",
    "write-write race": "race: writes what another thread writes",
    "wrong half": "race: ",
}
# Cases for compute capability 9.0. The interpreter runs TMA copies and wgmma products as late or as early as possible.
ORDERS = ("late", "early")
SM90_CLEAN = {
    "sm90_clean_barriers.cpp": (
        "after_faults",
        "exited_producer",
        "lanes_arrive",
        "named_barriers",
        "registers",
        "reused",
        "ring",
        "two_copies",
    ),
    "sm90_clean_products.cpp": (
        "after_faults",
        "boxes",
        "halo",
        "orders",
        "pipeline",
        "products_bfloat16",
        "products_float16",
        "written_pipeline",
    ),
}
WGMMA_FAULTS = {
    "base offset": "base offset 1 in the descriptor of a",
    "cp.async without proxy fence": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "different descriptors": "threads of the warpgroup pass different descriptors",
    "elected lane fences": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "elected lane waits": "reads the target of a TMA copy without waiting for its mbarrier",
    "elected lane waits, the last": "reads the target of a TMA copy without waiting for its mbarrier",
    "exchanged offsets": "line 8, 16 bytes 0 of operand b are not where the copy at sm90_wgmma_faults.cpp:",
    "exchanged offsets of a": "line 8, 16 bytes 0 of operand a also belong to another line",
    "fence of one thread": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "lanes at two lines": "wgmma.fence: lane 31 of the warp is at sm90_wgmma_faults.cpp:",
    "late proxy fence": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "no commit": "reads accumulators of a wgmma without waiting for its group",
    "no proxy fence": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "no wgmma fence": "wgmma without a wgmma.fence after the last access of this thread to the accumulators",
    "one warp releases": "writes to an operand of wgmma without waiting for its group",
    "one warpgroup releases": "writes to an operand of wgmma without waiting for its group",
    "operand out of bounds": "out of bounds: operand b of wgmma, 16 bytes at byte 82816",
    "operands of the first block": "reads uninitialized shared memory",
    "outside sums": "index 32 of 32 accumulators",
    "overwritten by copy": "writes to an operand of wgmma without waiting for its group",
    "overwritten by store": "writes to an operand of wgmma without waiting for its group",
    "released too early": "writes to an operand of wgmma without waiting for its group",
    "rows without swizzle": "line 1, 16 bytes 0 of operand a also belong to another line",
    "start not shifted": "bit 15 of the descriptor of a is reserved",
    "start of the low kilobytes": "reads uninitialized shared memory",
    "store after fence": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "store after own wait": "writes to an operand of wgmma without waiting for its group",
    "sums before wait": "reads accumulators of a wgmma without waiting for its group",
    "sums end": "accumulators of this wgmma go out of scope before a wgmma.wait_group",
    "swizzle of one side": "wgmma reads operand b with 64-byte swizzle, and TMA wrote it with 128-byte swizzle",
    "two bytes after TMA": "wgmma reads an operand that was written without a fence.proxy.async in between",
    "wrong first warp": "wgmma.mma_async needs all four warps of a warpgroup, and thread (0, 0, 0) of it has exited",
}
TMA_FAULTS = {
    "TMA over a store": "TMA writes where a thread has written, without a fence.proxy.async in between",
    "TMA over an mbarrier": "writes to the memory of an mbarrier, initialized at sm90_tma_faults.cpp:",
    "TMA over atomics": "TMA writes where a thread has written, without a fence.proxy.async in between",
    "TMA over readers": "race: writes what another thread reads",
    "atomic beside TMA": "reads the target of a TMA copy without waiting for its mbarrier",
    "copy at exit": "the block ends, and no thread has waited for this copy",
    "invisible to TMA": "is not visible to TMA: no fence in between",
    "long expect": "phase 0 of parity 0, 0 of 1 arrivals and 16 bytes pending",
    "mbarrier of another stage": "reads the target of a TMA copy without waiting for its mbarrier",
    "misaligned target": "TMA: target at address 2112, not a multiple of 128",
    "no syncwarp before release": "race: writes what another thread reads",
    "read before TMA": "reads the target of a TMA copy without waiting for its mbarrier",
    "row beyond the swizzle": "a row of the box has 128 bytes, more than the 64 of 64-byte swizzle",
    "row not in 16 bytes": "a row of the box has 24 bytes, not a multiple of 16",
    "row within the swizzle": "a row of the box has 64 bytes, fewer than the 128 of 128-byte swizzle",
    "second producer": "mbarrier.arrive.expect_tx: phase 0 of the mbarrier",
    "short expect": ("too few bytes are expected", "reads the target of a TMA copy without waiting for its mbarrier"),
    "target out of bounds": "out of bounds: target of TMA, 8192 bytes at byte 80768",
    "tensor too small": "reaches 17408 elements, beyond the tensor",
    "two copies in one place": "writes to the target of a TMA copy without waiting for its mbarrier",
    "unexpected copy": "1 of 1 arrivals and -8192 bytes pending",
    "wide box": "the box has 257 elements in dimension 1; must be 1 to 256",
    "write before TMA": "writes to the target of a TMA copy without waiting for its mbarrier",
    "wrong dimensions": "4 coordinates for a tensor map of 3 dimensions",
}
BARRIER_FAULTS = {
    "arrival before read": "race: writes what another thread reads",
    "broken chain": "race: reads what another thread writes",
    "early parity": "race: writes what another thread reads",
    "endless wait": "deadlock: mbarrier.try_wait never returns\n  mbarrier at byte 81920 (sm90_barrier_faults.cpp:",
    "fewer registers by inc": "setmaxnreg.inc: from 168 to 160 registers",
    "halves of warps": "bar.sync: 64 threads of 4 warps have arrived; all lanes of a warp must",
    "invisible mbarrier": "is not visible to this thread: no barrier in between",
    "live mbarrier": "an mbarrier exists there already, initialized at sm90_barrier_faults.cpp:",
    "many mbarriers": "more than 64 mbarriers in a block",
    "mbarrier of the first block": "mbarrier.arrive: there is no mbarrier at byte 81920",
    "mbarrier read": "reads the memory of an mbarrier, initialized at sm90_barrier_faults.cpp:",
    "mbarrier written": "writes to the memory of an mbarrier, initialized at sm90_barrier_faults.cpp:",
    "misaligned mbarrier": "mbarrier.init: at address 83076 for 1 arrivals; must be a multiple of 8",
    "more registers by dec": "setmaxnreg.dec: from 168 to 176 registers",
    "named barrier skipped": "deadlock: bar.sync never returns\n  barrier 3: 32 of 64 threads have arrived",
    "no mbarrier": "there is no mbarrier at byte 81928",
    "odd registers": "setmaxnreg.dec: 60 registers; must be a multiple of 8 from 24 to 256",
    "parity of two": "parity 2; must be 0 or 1",
    "phase not waited for": "phase 0 of the mbarrier is complete, and no thread has waited for it",
    "registers of some": "setmaxnreg.dec is not reached by all threads of the warpgroup: thread (96, 0, 0) has exited",
    "seen parity": "parity 0 is that of phase 0, for which this thread has waited already",
    "too many arrivals": "phase 0 of the mbarrier already has all its 1 arrivals and waits for 8192 bytes",
    "too many registers": "warpgroups use 520 registers of 504",
    "two counts": "barrier 1 has a count of 96 here and of 64 at sm90_barrier_faults.cpp:",
}
SM90_FAULTS = {
    "sm90_barrier_faults.cpp": BARRIER_FAULTS,
    "sm90_tma_faults.cpp": TMA_FAULTS,
    "sm90_wgmma_faults.cpp": WGMMA_FAULTS,
}
ON_THE_HOST = (
    "row beyond the swizzle",
    "row not in 16 bytes",
    "row within the swizzle",
    "tensor too small",
    "wide box",
)


@pytest.fixture(scope="module", params=["", "address,undefined"], ids=["plain", "sanitized"])
def program(request, tmp_path_factory):
    """Return a function that runs a case of a source: (source, case name, order) -> (exit status, output)."""
    folder = tmp_path_factory.mktemp("simt")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g1", "-pthread"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    if request.param:
        command += [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]

    def run(source: str, name: str, order: str = "off") -> tuple[int, str]:
        compiled = folder / source.removesuffix(".cpp")
        if not compiled.exists():
            command_of_source = ["-I", str(REPOSITORY / "csrc"), str(SOURCES / source), "-o", str(compiled)]
            subprocess.run([*command, *command_of_source], check=True)
        # A report abandons fibers and their objects, so leaks are expected.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "SPATIALFLOW_SIMT_SM90": order}
        done = subprocess.run([str(compiled), name], capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stdout + done.stderr

    return run


def marked_line(source: str, mark: str) -> int:
    lines = enumerate((SOURCES / source).read_text().split("\n"), 1)
    (number,) = [number for number, line in lines if line.endswith(f"// line: {mark}")]
    return number


def reported_line(source: str, name: str, output: str) -> int:
    """Return the source line that a report names. Reports of faults in kernels must name kernel, block and thread."""
    kernel = re.sub(r"\W", "_", name) + "_kernel"
    place = "" if name in ON_THE_HOST else rf"kernel .*{kernel}.*, block \(\d, 0, 0\), thread \(\d+, 0, 0\), "
    report = re.match(rf"simt: {place}{source}:(\d+): ", output)
    assert report, output
    return int(report[1])


@pytest.mark.parametrize(
    "source, clean, faults",
    [
        ("kernels.cpp", CLEAN, FAULTS),
        *((source, clean, ()) for source, clean in SM90_CLEAN.items()),
        *((source, (), faults) for source, faults in SM90_FAULTS.items()),
    ],
)
def test_every_case_is_tested(program, source, clean, faults):
    assert program(source, "list-clean")[1].split("\n")[:-1] == sorted(clean)
    assert program(source, "list-faults")[1].split("\n")[:-1] == sorted(faults)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_compute_and_pass(program, name):
    assert program("kernels.cpp", name) == (0, "ok\n")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source, name", [(source, name) for source, names in SM90_CLEAN.items() for name in names])
def test_clean_sm90_kernels_compute_and_pass(program, source, name, order):
    assert program(source, name, order) == (0, "ok\n")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_reported(program, name):
    status, output = program("kernels.cpp", name)
    assert status == 1, output
    assert FAULTS[name] in output
    reported_line("kernels.cpp", name, output)
    # A race is reported at the later of two accesses, so the marked line may be anywhere in the output.
    assert re.search(rf"kernels.cpp:{marked_line('kernels.cpp', name)}\b", output)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source, name", [(source, name) for source, faults in SM90_FAULTS.items() for name in faults])
def test_planted_sm90_fault_is_reported(program, source, name, order):
    status, output = program(source, name, order)
    assert status == 1, output
    expected, mark = SM90_FAULTS[source][name], name.removesuffix(", the last")
    if isinstance(expected, tuple):  # in the early order, another line reports the fault
        expected, mark = expected[ORDERS.index(order)], f"{name}, {order}"
    assert expected in output
    assert reported_line(source, mark.split(",")[0], output) == marked_line(source, mark)


def test_unknown_order_is_named(program):
    status, output = program("sm90_clean_products.cpp", "boxes", "soon")
    assert status == 1
    assert "SPATIALFLOW_SIMT_SM90 must be off, late or early, got 'soon'" in output


@pytest.mark.parametrize(
    "backend, reason",
    [
        ("cuda13", "SPATIALFLOW_BACKEND must be one of cpu, cuda, simt, .*cpu_thread_sanitized, got 'cuda13'"),
        ("cuda", "SPATIALFLOW_BACKEND=cuda: needs .*libspatialflow_cuda.so and a CUDA device; torch .* sees 0 devices"),
    ],
)
def test_missing_backend_is_named(backend, reason):
    code = "import spatialflow._library as library; library.backend_library()"
    environment = {**os.environ, "SPATIALFLOW_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert re.search(reason, done.stderr)
