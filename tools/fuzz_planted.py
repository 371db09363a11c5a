# SPDX-License-Identifier: Apache-2.0
"""Check the fuzzer: plant one known fault at a time in a copy of the tree, and expect the fuzzer to find it.

`make fuzz-planted`, or `python tools/fuzz_planted.py [TEXT ...]` for the faults whose file or name contains a text. The
working tree is only read. It is an error if fuzzing fails on the copy without a fault. Exit codes: 0 all faults found,
1 a fault was not found within --seconds, 2 a fault could not be tried.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from typing import NamedTuple

from mutated_tree import COPY, ROOT, build, copy_tree, mutated, run, select

CLEAN_SECONDS = 20.0  # how long the fuzzer tries an operator without a fault


class Fault(NamedTuple):
    """Fault that replaces `before`, which is unique in `file`, by `after`; fuzzing `operator` must find it."""

    name: str
    file: str
    before: str
    after: str
    operator: str
    backend: str = "cpu"


FAULTS = (
    Fault(
        "stride of a dimension of size 1",
        "csrc/cpu/deform_conv2d_backward.cpp",
        "!dense ? shape.out_channels : shape.out_width > 1 ? column_stride : row_stride;",
        "!dense ? shape.out_channels : grad_output.stride(3);",
        "deform_conv2d",
    ),
    Fault(
        "fake kernel that accepts zero input channels",
        "spatialflow/ops/fake.py",
        "if _is_concrete(values):",
        "if _is_concrete(values) and not (name == 'deform_conv2d' and args[2].dim() == 4 and args[2].shape[1] == 0):",
        "deform_conv2d",
    ),
    Fault(
        "gradient wrong for one layout",
        "spatialflow/ops/roi_align.py",
        "grad = _roi_align_backward(grad_output, boxes,",
        "dense = torch.empty(grad_output.shape, device='meta').stride()\n"
        "    grad_output = torch.as_strided(grad_output, grad_output.shape, dense) if 0 not in grad_output.stride() "
        "else grad_output\n"
        "    grad = _roi_align_backward(grad_output, boxes,",
        "roi_align",
    ),
    Fault(
        "gradient wrong for one dtype",
        "spatialflow/ops/flow_conv2d_backward.py",
        "grad_bias = _bias_gradient(gradients)",
        "grad_bias = _bias_gradient(gradients) * (0.5 if weight.dtype == torch.bfloat16 else 1)",
        "flow_conv2d",
    ),
    Fault(
        "results of images that are left out not cleared",
        "csrc/cpu/conv3x3.cpp",
        "} else if (size > 0) {",
        "} else if (size > 4096) {",
        "pack_conv3x3",
    ),
    Fault(
        "read beyond a tensor",
        "csrc/cpu/panoptic_quality_counts.cpp",
        "while (end < pixels && gt[end] == g",
        "while (end <= pixels && gt[end] == g",
        "panoptic_quality_counts",
    ),
    Fault(
        "strides swapped in a CUDA kernel",
        "csrc/cuda/deform_conv2d.cuh",
        "y * stride[2] + x * stride[3]",
        "y * stride[3] + x * stride[2]",
        "deform_conv2d",
        "simt",
    ),
)


def library(backend: str) -> str:
    if backend != "cpu":
        return backend
    sys.path.insert(0, str(ROOT))
    from spatialflow import _library

    return f"cpu_{_library.cpu_level()}"


def fuzz(operator: str, backend: str, seconds: float) -> tuple[int, str]:
    """Run the fuzzer; return its exit code and one line: when and what it found, or its last line of output."""
    environment = {**os.environ, "PYTHONPATH": str(COPY)}
    environment.pop("SPATIALFLOW_CPU_LEVEL", None)
    done = run(
        sys.executable, "tests/fuzz", "--ops", operator, "--backend", backend, "--seconds", seconds, env=environment
    )
    if match := re.search(r"^found after .*", done.stdout, re.M):
        difference = re.search(r"^found after [^\n]*\n([^\n]*)", done.stdout, re.M)[1]
        return done.returncode, f"{match[0]}: {difference}"
    return done.returncode, (done.stdout + done.stderr).strip().rsplit("\n", 1)[-1]


def is_found(fault: Fault, seconds: float) -> bool:
    with mutated(fault.file, fault.before, fault.after) as line:
        build(library(fault.backend))  # also for a fault in Python: the previous fault may have been in C++
        code, verdict = fuzz(fault.operator, fault.backend, seconds)
    if code not in (0, 1):
        raise RuntimeError(f"{fault.file}, {fault.name}: {verdict}")
    print(f"{'found' if code else 'NOT FOUND':>9}  {fault.file}:{line}, {fault.name}: {verdict}", flush=True)
    return code == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="only faults whose file or name contains one of these")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each fault (default: 120)")
    options = parser.parse_args()
    if not 0 < options.seconds < float("inf"):  # false for NaN too
        parser.error(f"--seconds must be positive and finite, got {options.seconds:g}")
    chosen = select(FAULTS, options.texts)
    copy_tree()
    try:
        build(*sorted({library(fault.backend) for fault in chosen}))
        for operator, backend in sorted({(fault.operator, fault.backend) for fault in chosen}):
            code, verdict = fuzz(operator, backend, CLEAN_SECONDS)
            if code != 0:
                raise RuntimeError(f"{operator} on {backend} fails without a fault: {verdict}")
            print(f"    clean  {operator} on {backend}: {verdict}", flush=True)
        missed = sum(not is_found(fault, options.seconds) for fault in chosen)
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"fuzz_planted: {error}", file=sys.stderr)
        return 2
    print(f"{len(chosen) - missed} found, {missed} not found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
