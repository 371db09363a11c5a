# SPDX-License-Identifier: Apache-2.0
"""Mutation testing of the operator tests and the sanitizers: break one line at a time and expect a failure.

A mutation breaks a CUDA kernel, and its tests on the SIMT interpreter must fail. A fault breaks a CPU kernel or
`spatialflow._evaluation`, and a sanitizer must report it (docs/sanitizers.md).

`make mutation-round`, or `python tools/mutation_round.py [TEXT ...]` for the mutations and faults whose file or name
contains a text. A copy of the tree is mutated, built and tested under build/mutations; the working tree is only read.
It is an error if a test file fails on the copy without a mutation. Exit codes: 0 all caught, 1 one survived, 2 one
could not be tried.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NamedTuple

from mutated_tree import COPY, build, copy_tree, mutated, run, select


class Mutation(NamedTuple):
    """Mutation that replaces `before`, which is unique in csrc/cuda/`file`, by `after`; tests of `operator` must fail.

    "sm90" stands for kernels for compute capability 9.0 of several operators, whose tests are in test_sm90.py.
    """

    name: str
    file: str
    before: str
    after: str
    operator: str


MUTATIONS = (
    Mutation(
        "barrier removed",
        "nms.cuh",
        "        __syncthreads();\n        if (warp == deciding_warp - 1 && is_kept) {",
        "        if (warp == deciding_warp - 1 && is_kept) {",
        "nms",
    ),
    Mutation(
        "barrier removed",
        "panoptic_merge_stuff.cuh",
        "// rows may share a word\n        __syncthreads();",
        "",
        "panoptic_merge",
    ),
    Mutation(
        "barrier for a warp alone",
        "nms.cuh",
        "        entries[base + kWarpSize + lane] = high;\n    }\n    __syncthreads();",
        "        entries[base + kWarpSize + lane] = high;\n    }\n    __syncwarp();",
        "multiclass_nms",
    ),
    Mutation(
        "< made <=",
        "paste_masks.cu",
        "y < rows_end",
        "y <= rows_end",
        "paste_masks",
    ),
    Mutation(
        ">= made >",
        "preprocess_images.cu",
        "if (first_x + p >= resize.x.target) {",
        "if (first_x + p > resize.x.target) {",
        "preprocess_images",
    ),
    Mutation(
        "bound too large",
        "panoptic_quality_counts.cu",
        "if (kVectorized && first + kWidth <= problem.pixels) {",
        "if (kVectorized && first + kWidth <= problem.pixels + 1) {",
        "panoptic_quality_counts",
    ),
    Mutation(
        "bound too small",
        "nms.cu",
        "high = i < from_left ? size : from_left;",
        "high = i < from_left ? size - 1 : from_left;",
        "nms",
    ),
    Mutation(
        "strides swapped",
        "deform_conv2d.cuh",
        "y * stride[2] + x * stride[3]",
        "y * stride[3] + x * stride[2]",
        "deform_conv2d",
    ),
    Mutation(
        "strides swapped",
        "stuff_labels.cu",
        "const int64_t at = i * outer_stride + j * inner_stride;",
        "const int64_t at = i * inner_stride + j * outer_stride;",
        "stuff_labels",
    ),
    Mutation(
        "accumulator in half",
        "tile_product.cuh",
        "multiply_add(sums_[i][j / 8 + half], a[i], b[half]);",
        "multiply_add(sums_[i][j / 8 + half], a[i], b[half]);\n"
        "for (float& sum : sums_[i][j / 8 + half]) { scalar_t low; store(low, sum); sum = load(low); }",
        "deform_conv2d",
    ),
    Mutation(
        "lane mask wrong",
        "panoptic_merge_stuff.cuh",
        "const unsigned all = __ballot_sync(kAllLanes, kept);",
        "const unsigned all = __ballot_sync(kAllLanes >> 1, kept);",
        "panoptic_merge",
    ),
    Mutation(
        "lane mask wrong",
        "multiclass_nms.cu",
        "base + __popc(above_threshold[item] & ((1u << lane) - 1u));",
        "base + __popc(above_threshold[item] & ((2u << lane) - 1u));",
        "multiclass_nms",
    ),
    Mutation(
        "lane mask wrong",
        "sigmoid_focal_loss.cu",
        "value += __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(step));",
        "value += __shfl_down_sync(kAllLanes >> 16, value, static_cast<unsigned>(step));",
        "sigmoid_focal_loss",
    ),
    Mutation(
        "proxy fence removed",
        "sm90_conv3x3_kernel.cuh",
        "fence_async_proxy();\n        __syncwarp();",
        "__syncwarp();",
        "sm90",
    ),
    Mutation(
        "warp not synchronized before the arrival",
        "sm90_conv3x3_kernel.cuh",
        "            __syncwarp();\n            if (lane == 0) {\n",
        "            if (lane == 0) {\n",
        "sm90",
    ),
    Mutation(
        "bytes of one box not expected",
        "sm90_conv3x3_kernel.cuh",
        "mbarrier_expect(full, kSubTiles * kHaloBytes);",
        "mbarrier_expect(full, (kSubTiles - 1) * kHaloBytes);",
        "sm90",
    ),
    Mutation(
        "parity kept",
        "sm90_pipeline.cuh",
        "            stage = 0;\n            parity ^= 1;",
        "            stage = 0;",
        "sm90",
    ),
    Mutation(
        "stage released while it is read",
        "sm90_conv3x3_kernel.cuh",
        "read_stage >= 0) {\n                mbarrier_arrive(weight_empty + 8 * read_stage);",
        "read_stage >= 0) {\n                mbarrier_arrive(weight_empty + 8 * weight.stage);",
        "sm90",
    ),
    Mutation(
        "stage free when half of its readers are done",
        "sm90_conv3x3_kernel.cuh",
        "mbarrier_init(input_empty + 8 * i, 8);",
        "mbarrier_init(input_empty + 8 * i, 4);",
        "sm90",
    ),
    Mutation(
        "sums not waited for",
        "sm90_conv3x3_kernel.cuh",
        "            finish_products(sums);\n",
        "            pin_all(sums);\n",
        "sm90",
    ),
    Mutation(
        "wgmma.fence removed",
        "sm90_pipeline.cuh",
        "    wgmma_fence();\n    multiply();",
        "    multiply();",
        "sm90",
    ),
    Mutation(
        "taps transposed",
        "sm90_conv3x3_kernel.cuh",
        "tap / 3 * kHaloSide + tap % 3",
        "tap % 3 * kHaloSide + tap / 3",
        "sm90",
    ),
    Mutation(
        "wrong distance between rows of the halo",
        "sm90_conv3x3_kernel.cuh",
        "inputs + shift * kRowBytes, 16, kHaloSide * kRowBytes",
        "inputs + shift * kRowBytes, 16, kSubTileSide * kRowBytes",
        "sm90",
    ),
    Mutation(
        "offsets of the descriptor exchanged",
        "sm90_conv3x3_kernel.cuh",
        "matrix_descriptor(weights, kWeightBytes, 8 * kRowBytes)",
        "matrix_descriptor(weights, 8 * kRowBytes, kWeightBytes)",
        "sm90",
    ),
    Mutation(
        "< made <=",
        "sm90_conv3x3_kernel.cuh",
        "const bool inside = y < level.height && x < level.width;",
        "const bool inside = y <= level.height && x < level.width;",
        "sm90",
    ),
    Mutation(
        "residual of another output",
        "sm90_conv3x3_kernel.cuh",
        "bias[block][2 * i + 1] + load(residual[2 * i + 1])",
        "bias[block][2 * i + 1] + load(residual[2 * i])",
        "sm90",
    ),
    Mutation(
        "proxy fence removed",
        "sm90_deform_conv2d.cu",
        "                fence_async_proxy();\n",
        "",
        "sm90",
    ),
    Mutation(
        "producer not counted",
        "sm90_deform_conv2d.cu",
        "mbarrier_init(full + 8 * i, kProducers / kWarpSize + 1);",
        "mbarrier_init(full + 8 * i, kProducers / kWarpSize);",
        "sm90",
    ),
    Mutation(
        "named barrier removed",
        "sm90_deform_conv2d.cu",
        "            named_barrier<1, kProducers>();\n            int channel",
        "            int channel",
        "sm90",
    ),
    Mutation(
        "swizzle of one side only",
        "sm90_deform_conv2d.cu",
        "(thread % kRowItems ^ thread_row % 8) * 16",
        "thread % kRowItems * 16",
        "sm90",
    ),
    Mutation(
        "stage released while it is read",
        "sm90_deform_conv2d.cu",
        "mbarrier_arrive(empty + 8 * read_stage);",
        "mbarrier_arrive(empty + 8 * state.stage);",
        "sm90",
    ),
    Mutation(
        "rows of another warpgroup",
        "sm90_deform_conv2d.cu",
        "columns + consumer * 64 * kRowBytes",
        "columns",
        "sm90",
    ),
    Mutation(
        "neighbors exchange the wrong half",
        "sm90_deform_conv2d.cu",
        "odd ? words[0] : words[1], 1",
        "odd ? words[1] : words[0], 1",
        "sm90",
    ),
    Mutation(
        "parity of the other phase",
        "sm90_conv1x1.cu",
        "mbarrier_wait(empty + 8 * state.stage, state.parity);",
        "mbarrier_wait(empty + 8 * state.stage, state.parity ^ 1);",
        "conv1x1",
    ),
    Mutation(
        "bytes of weights not expected",
        "sm90_conv1x1.cu",
        "mbarrier_expect(ready, Config::kStage);",
        "mbarrier_expect(ready, Config::kPixelStage);",
        "conv1x1",
    ),
    Mutation(
        "descriptor not advanced",
        "sm90_conv1x1.cu",
        "/ 16, b + k * 32 / 16,",
        "/ 16, b,",
        "conv1x1",
    ),
    Mutation(
        "sums of the previous tile kept",
        "sm90_conv1x1.cu",
        "b + k * 32 / 16, (step | k) != 0,",
        "b + k * 32 / 16, 1,",
        "conv1x1",
    ),
    Mutation(
        "pairs of outputs exchanged",
        "sm90_conv1x1.cu",
        "const int element = (i * kOutputBlocks + block) * 4 + half * 2;",
        "const int element = (block * 4 + i) * 4 + half * 2;",
        "conv1x1",
    ),
)


class Fault(NamedTuple):
    """Fault that replaces `before`, which is unique in csrc/`file`, by `after`; make's `target` must print `report`."""

    name: str
    file: str
    before: str
    after: str
    target: str
    tests: str
    report: str


FAULTS = (
    Fault(
        "vector read past a tensor",
        "cpu/sigmoid_focal_loss.cpp",
        "            for (; i + kLanes<real_t> <= total; i += kLanes<real_t>) {\n"
        "                store_vector(values + i, load_vector(source + i));",
        "            for (; i < total; i += kLanes<real_t>) {\n"
        "                store_vector(values + i, load_vector(source + i));",
        "sanitize",
        "tests/test_sigmoid_focal_loss.py",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "shift by the width",
        "cpu/bits.h",
        "(kWordPixels - end)",
        "(kWordPixels - begin)",
        "sanitize",
        "tests/test_panoptic_merge.py",
        "runtime error: shift exponent 64 is too large",
    ),
    Fault(
        "use after free",
        "evaluation/pair_counts.cpp",
        "        slots_[i].count += count;\n        if (4 * used_ > slots_.size()) {\n            grow();\n        }",
        "        int64_t& sum = slots_[i].count;\n"
        "        if (4 * used_ > slots_.size()) {\n            grow();\n        }\n"
        "        sum += count;",
        "sanitize",
        "tests/test_panoptic_quality.py",
        "AddressSanitizer: heap-use-after-free",
    ),
    Fault(
        "race in a loop",
        "cpu/conv3x3.h",
        "std::atomic<int64_t> next{0};",
        "int64_t next{0};",
        "sanitize-threads",
        "tests/test_threads.py",
        "ThreadSanitizer: data race",
    ),
    Fault(
        "race of callers",
        "evaluation/png_filters.cpp",
        "    std::vector<uint8_t> buffer(2 * (bytes + kBytes));",
        "    static std::vector<uint8_t> buffer;\n    buffer.assign(2 * (bytes + kBytes), 0);",
        "sanitize-threads",
        "tests/test_threads.py",
        "ThreadSanitizer: data race",
    ),
)


def test(operator: str) -> tuple[int, str]:
    """Run the operator's tests until the first failure; return exit code and last line."""
    environment = {**os.environ, "SPATIALFLOW_BACKEND": "simt", "PYTHONPATH": str(COPY)}
    if operator in ("conv1x1", "sm90"):
        environment["SPATIALFLOW_SIMT_SM90"] = "late"
    files = [path for ending in ("", "_*") for path in COPY.glob(f"tests/test_{operator}{ending}.py")]
    done = run(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files, env=environment)
    return done.returncode, (done.stdout.strip() or done.stderr.strip()).rsplit("\n", 1)[-1]


def report(mutation: Mutation | Fault, line: int, survived: bool, begin: float, verdict: str) -> bool:
    result = "SURVIVED" if survived else "caught"
    print(
        f"{result:>8}  {mutation.file}:{line}, {mutation.name} ({time.monotonic() - begin:.0f} s): {verdict}",
        flush=True,
    )
    return survived


def survives(mutation: Mutation) -> bool:
    begin = time.monotonic()
    with mutated(f"csrc/cuda/{mutation.file}", mutation.before, mutation.after) as line:
        build("simt")
        code, verdict = test(mutation.operator)
    if code not in (0, 1):
        raise RuntimeError(f"{mutation.file}, {mutation.name}: {verdict}")
    return report(mutation, line, code == 0, begin, verdict)


def sanitize(fault: Fault) -> tuple[int, str]:
    """Run the sanitizer's target of the Makefile with the tests of the fault; return exit code and output."""
    environment = {**os.environ, "PYTHONPATH": str(COPY)}
    done = run(
        "make",
        fault.target,
        f"PYTHON={sys.executable}",
        f"SANITIZE_TESTS={fault.tests}",
        "SANITIZE_FUZZ=0",
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


def escapes(fault: Fault) -> bool:
    """Tell whether the sanitizer does not report the fault."""
    begin = time.monotonic()
    with mutated(f"csrc/{fault.file}", fault.before, fault.after) as line:
        code, output = sanitize(fault)
    is_reported = fault.report in output
    if code == 0 or not is_reported:
        print(output[-2000:], file=sys.stderr)
    return report(fault, line, code == 0 or not is_reported, begin, fault.report if is_reported else "no report")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="only mutations whose file or name contains one of these"
    )
    texts = parser.parse_args().texts
    mutations, faults = select(MUTATIONS, texts), select(FAULTS, texts)
    copy_tree()
    try:
        if mutations:
            build("simt")
        for operator in sorted({mutation.operator for mutation in mutations}):
            code, verdict = test(operator)
            if code != 0:
                raise RuntimeError(f"the tests of {operator} fail without a mutation: {verdict}")
            print(f"   clean  tests of {operator}: {verdict}", flush=True)
        survivors = sum(survives(mutation) for mutation in mutations)
        for fault in {(fault.target, fault.tests): fault for fault in faults}.values():
            code, output = sanitize(fault)
            if code != 0:
                raise RuntimeError(f"make {fault.target} fails on {fault.tests} without a fault: {output[-2000:]}")
            print(f"   clean  make {fault.target}, {fault.tests}", flush=True)
        survivors += sum(escapes(fault) for fault in faults)
    except RuntimeError as error:
        print(f"mutation_round: {error}", file=sys.stderr)
        return 2
    print(f"{len(mutations) + len(faults) - survivors} caught, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
