# SPDX-License-Identifier: Apache-2.0
"""The SIMT interpreter: clean kernels compute and pass, every planted fault is reported at its line (docs/simt.md)."""

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
    "atomic and plain": "races",
    "copy over readers": "races: writes what another thread reads",
    "divergent barrier": "divergent barrier",
    "dynamic bounds": "out of bounds: 4 bytes at byte 128 of shared array",
    "early copy": "before the cp.async into it was waited for",
    "exited lane": "names lane 9, which has exited",
    "global read": "out of bounds: element 32 of a global buffer of 32",
    "global vector": "out of bounds: element 64 and 3 after it of a global buffer of 65",
    "global write": "out of bounds: element -1 of a global buffer of 65",
    "misaligned": "misaligned: 16 bytes",
    "missing lanes": "names lane 16, which the block does not have",
    "mixed collectives": "waits in __ballot_sync",
    "not in mask": "lane 0 is not in its own mask 0xfffffffe",
    "not rounded": "register 1 of b in lane 6, 0.333333, is no TF32 number",
    "outside source": "reads from lane 20, which is not in the mask",
    "read-write race": "races: writes what another thread reads",
    "reader forgotten": "races: writes what another thread reads",
    "shared bounds": "of shared array 'first' of 128 bytes",
    "shuffle is no fence": "races: reads what another thread writes",
    "skipped barrier": "thread (5, 0, 0) has exited",
    "uninitialised": "reads shared memory that nobody wrote",
    "uninitialised dynamic": "reads shared memory that nobody wrote",
    "write-read race": "races",
    "write-write race": "races: writes what another thread writes",
    "wrong half": "races",
}
# Of compute capability 9.0: tests/simt/sm90_kernels.cpp, with copies and products as late and as early as may be.
ORDERS = ("late", "early")
SM90_CLEAN = (
    "after_faults",
    "boxes",
    "exited_producer",
    "halo",
    "lanes_arrive",
    "named_barriers",
    "orders",
    "pipeline",
    "products_bfloat16",
    "products_float16",
    "registers",
    "reused",
    "ring",
    "two_copies",
    "written_pipeline",
)
SM90_FAULTS = {
    "TMA over a store": "TMA writes where a thread has written without a fence.proxy.async between",
    "TMA over an mbarrier": "writes to an mbarrier, initialized at sm90_kernels.cpp:",
    "TMA over atomics": "TMA writes where a thread has written without a fence.proxy.async between",
    "TMA over readers": "races: writes what another thread reads",
    "arrival before read": "races: writes what another thread reads",
    "atomic beside TMA": "reads what TMA writes without having waited for its mbarrier",
    "base offset": "base offset 1 in the descriptor of a",
    "broken chain": "races: reads what another thread writes",
    "copy at exit": "the block ends and no thread has waited for this copy",
    "cp.async without proxy fence": "wgmma reads what was written without a fence.proxy.async between",
    "different descriptors": "threads of the warpgroup differ in their descriptors",
    "early parity": "races: writes what another thread reads",
    "elected lane fences": "wgmma reads what was written without a fence.proxy.async between",
    "elected lane waits": "reads what TMA writes without having waited for its mbarrier",
    "elected lane waits, the last": "reads what TMA writes without having waited for its mbarrier",
    "endless wait": "deadlock: mbarrier.try_wait never ends\n  mbarrier at byte 81920 (sm90_kernels.cpp:",
    "exchanged offsets": "line 8, 16 bytes 0 of operand b are not where the copy at sm90_kernels.cpp:",
    "exchanged offsets of a": "line 8, 16 bytes 0 of operand a are those of another line too",
    "fence of one thread": "wgmma reads what was written without a fence.proxy.async between",
    "fewer registers by inc": "setmaxnreg.inc: from 168 to 160 registers",
    "halves of warps": "bar.sync: 64 threads of 4 warps have come: it is for whole warps",
    "invisible mbarrier": "is not visible to this thread: no barrier between",
    "invisible to TMA": "is not visible to it: no fence between",
    "lanes apart": "wgmma.fence: lane 31 of the warp is at sm90_kernels.cpp:",
    "late proxy fence": "wgmma reads what was written without a fence.proxy.async between",
    "live mbarrier": "there is a live mbarrier, initialized at sm90_kernels.cpp:",
    "long expect": "phase 0 of parity 0, 0 of 1 arrivals and 16 bytes pending",
    "many mbarriers": "more than 64 mbarriers of a block",
    "mbarrier of another stage": "reads what TMA writes without having waited for its mbarrier",
    "mbarrier of the first block": "mbarrier.arrive: there is no mbarrier at byte 81920",
    "mbarrier read": "reads an mbarrier, initialized at sm90_kernels.cpp:",
    "mbarrier written": "writes to an mbarrier, initialized at sm90_kernels.cpp:",
    "misaligned mbarrier": "mbarrier.init: at address 83076 for 1 arrivals; a multiple of 8",
    "misaligned target": "TMA: target at address 2112, no multiple of 128",
    "more registers by dec": "setmaxnreg.dec: from 168 to 176 registers",
    "named barrier skipped": "deadlock: bar.sync never ends\n  barrier 3: 32 of 64 threads have come",
    "no commit": "touches sums of a wgmma that has not been waited for",
    "no mbarrier": "there is no mbarrier at byte 81928",
    "no proxy fence": "wgmma reads what was written without a fence.proxy.async between",
    "no syncwarp before release": "races: writes what another thread reads",
    "no wgmma fence": "wgmma without a wgmma.fence since this thread has last touched the sums",
    "odd registers": "setmaxnreg.dec: 60 registers, it takes a multiple of 8 from 24 to 256",
    "one warp releases": "writes what wgmma reads without having waited for the group",
    "one warpgroup releases": "writes what wgmma reads without having waited for the group",
    "operand out of bounds": "out of bounds: operand b of wgmma, 16 bytes at byte 82816",
    "operands of the first block": "reads shared memory that nobody wrote",
    "outside sums": "sum 32 of 32",
    "overwritten by copy": "writes what wgmma reads without having waited for the group",
    "overwritten by store": "writes what wgmma reads without having waited for the group",
    "parity of two": "parity 2, it is 0 or 1",
    "phase not waited for": "phase 0 of the mbarrier is complete, and no thread has waited for it yet",
    "read before TMA": "reads what TMA writes without having waited for its mbarrier",
    "registers of some": "setmaxnreg.dec is not reached by all threads of the warpgroup: thread (96, 0, 0) has exited",
    "released too early": "writes what wgmma reads without having waited for the group",
    "row beyond the swizzle": "a row of the box has 128 bytes, more than the 64 of 64-byte swizzle",
    "row not in 16 bytes": "a row of the box has 24 bytes, no multiple of 16",
    "row within the swizzle": "a row of the box has 64 bytes, fewer than the 128 of 128-byte swizzle",
    "rows without swizzle": "line 1, 16 bytes 0 of operand a are those of another line too",
    "second producer": "mbarrier.arrive.expect_tx: phase 0 of the mbarrier",
    "seen parity": "parity 0 is that of phase 0, which this thread has waited for already",
    "short expect": ("too few bytes were expected", "reads what TMA writes without having waited for its mbarrier"),
    "start not shifted": "bit 15 of the descriptor of a belongs to no field",
    "start of the low kilobytes": "reads shared memory that nobody wrote",
    "store after fence": "wgmma reads what was written without a fence.proxy.async between",
    "store after own wait": "writes what wgmma reads without having waited for the group",
    "sums before wait": "touches sums of a wgmma that has not been waited for",
    "sums end": "sums of this wgmma end before it has been waited for",
    "swizzle of one side": "wgmma reads operand b with 64-byte swizzle, and TMA has written it with 128-byte swizzle",
    "target out of bounds": "out of bounds: target of TMA, 8192 bytes at byte 80768",
    "tensor too small": "it reaches 17408 elements, beyond the tensor",
    "too many arrivals": "phase 0 of the mbarrier has had all its 1 arrivals and waits for 8192 bytes",
    "too many registers": "warpgroups take 520 registers of 504",
    "two bytes after TMA": "wgmma reads what was written without a fence.proxy.async between",
    "two copies in one place": "writes where TMA writes without having waited for its mbarrier",
    "two counts": "barrier 1 is for 96 threads here and for 64 at sm90_kernels.cpp:",
    "unexpected copy": "1 of 1 arrivals and -8192 bytes pending",
    "wide box": "the box has 257 elements in dimension 1, it may have 1 to 256",
    "write before TMA": "writes where TMA writes without having waited for its mbarrier",
    "wrong dimensions": "4 coordinates for a tensor map of 3 dimensions",
    "wrong first warp": "wgmma.mma_async is for all four warps of a warpgroup, and thread (0, 0, 0) of it has exited",
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
    """Runs a case of the program of a source, compiled once: (source, case name, order) -> (exit status, output)."""
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
        # A fault abandons fibers with what they own: leaks are expected there.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "SPATIALFLOW_SIMT_SM90": order}
        done = subprocess.run([str(compiled), name], capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stdout + done.stderr

    return run


def marked_line(source: str, mark: str) -> int:
    lines = enumerate((SOURCES / source).read_text().split("\n"), 1)
    (number,) = [number for number, line in lines if line.endswith(f"// line: {mark}")]
    return number


def reported_line(source: str, name: str, output: str) -> int:
    """The line of a report, which must name the kernel of the case if there is one, block and thread."""
    kernel = re.sub(r"\W", "_", name) + "_kernel"
    place = "" if name in ON_THE_HOST else rf"kernel .*{kernel}.*, block \(\d, 0, 0\), thread \(\d+, 0, 0\), "
    report = re.match(rf"simt: {place}{source}:(\d+): ", output)
    assert report, output
    return int(report[1])


@pytest.mark.parametrize(
    "source, clean, faults", [("kernels.cpp", CLEAN, FAULTS), ("sm90_kernels.cpp", SM90_CLEAN, SM90_FAULTS)]
)
def test_every_case_is_tested(program, source, clean, faults):
    assert program(source, "list-clean")[1].split("\n")[:-1] == sorted(clean)
    assert program(source, "list-faults")[1].split("\n")[:-1] == sorted(faults)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_compute_and_pass(program, name):
    assert program("kernels.cpp", name) == (0, "ok\n")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SM90_CLEAN)
def test_clean_sm90_kernels_compute_and_pass(program, name, order):
    assert program("sm90_kernels.cpp", name, order) == (0, "ok\n")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_reported(program, name):
    status, output = program("kernels.cpp", name)
    assert status == 1, output
    assert FAULTS[name] in output
    reported_line("kernels.cpp", name, output)
    # Which of two threads that race comes second is not the program's choice.
    assert re.search(rf"kernels.cpp:{marked_line('kernels.cpp', name)}\b", output)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SM90_FAULTS)
def test_planted_sm90_fault_is_reported(program, name, order):
    status, output = program("sm90_kernels.cpp", name, order)
    assert status == 1, output
    sentence, mark = SM90_FAULTS[name], name.removesuffix(", the last")
    if isinstance(sentence, tuple):  # early, another line learns of it
        sentence, mark = sentence[ORDERS.index(order)], f"{name}, {order}"
    assert sentence in output
    assert reported_line("sm90_kernels.cpp", mark.split(",")[0], output) == marked_line("sm90_kernels.cpp", mark)


def test_unknown_order_is_named(program):
    status, output = program("sm90_kernels.cpp", "boxes", "soon")
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
