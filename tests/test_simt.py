# SPDX-License-Identifier: Apache-2.0
"""The SIMT interpreter: clean kernels compute and pass, every planted fault is reported at its line (docs/simt.md)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).parent / "simt" / "kernels.cpp"

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


@pytest.fixture(scope="module", params=["", "address,undefined"], ids=["plain", "sanitized"])
def kernels(request, tmp_path_factory):
    """The compiled program as a function: case name -> (exit status, output)."""
    program = tmp_path_factory.mktemp("simt") / "kernels"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g1", "-pthread"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    if request.param:
        command += [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    subprocess.run([*command, "-I", str(REPOSITORY / "csrc"), str(SOURCE), "-o", str(program)], check=True)

    def run(*arguments: str) -> tuple[int, str]:
        # A fault abandons fibers with what they own: leaks are expected there.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, done.stdout + done.stderr

    return run


def test_every_case_is_tested(kernels):
    assert kernels("list-clean")[1].split("\n")[:-1] == sorted(CLEAN)
    assert kernels("list-faults")[1].split("\n")[:-1] == sorted(FAULTS)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_compute_and_pass(kernels, name):
    assert kernels(name) == (0, "ok\n")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_reported(kernels, name):
    status, output = kernels(name)
    assert status == 1, output
    assert FAULTS[name] in output
    kernel = name.replace(" ", "_").replace("-", "_") + "_kernel"
    assert re.search(rf"simt: kernel .*{kernel}.*, block \(\d, 0, 0\), thread \(\d+, 0, 0\), kernels.cpp:\d+: ", output)
    marked = [i for i, line in enumerate(SOURCE.read_text().split("\n"), 1) if line.endswith(f"// line: {name}")]
    assert len(marked) == 1 and f"kernels.cpp:{marked[0]}" in output


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
