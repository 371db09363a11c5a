# SPDX-License-Identifier: Apache-2.0
"""Steps of the three runs of `gpu_check.py`, and the summaries of their output."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from gpu_execution import ROOT, Step, last_line
from gpu_setup import find_tool, has_module

DRY_LIMIT = 900.0
"""Limit of each step of the dry run, in seconds."""

BENCHMARK_SECONDS = 0.1
"""Seconds per provider, case and mode of a benchmark."""

NCU_KERNELS = "conv3x3_sm90|conv3x3_tensor_core|conv3x3_weight_gradient_tensor|roi_align_|deform_conv2d_|focal_sum"
NCU_SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def make_steps(backend: str, kind: str, output: Path) -> list[Step]:
    """Return the steps of a run in order; in the dry run at small sizes, without the profilers and sanitizers."""
    steps = {"first": first_steps, "second": second_steps, "quick": quick_steps}[kind](backend == "cuda", output)
    if backend == "cuda":
        return steps
    # The interpreter runs only steps with these words in the name; the sizes of benchmarks are too large for it.
    interpreted = ("operator", "check")
    on_cpu = [
        step if any(word in step.name for word in interpreted) else replace(step, backend="cpu") for step in steps
    ]
    return [replace(step, limit=DRY_LIMIT) for step in on_cpu]


def quick_steps(on_gpu: bool, output: Path) -> list[Step]:
    selection = "test_reference or test_gradient_against_reference or test_deterministic"
    return [
        ceilings_step(on_gpu, output),
        operators_step(),
        tests_step(on_gpu, 20, 40, selection),
        kernels_step(on_gpu, output, 30, 60),
    ]


def first_steps(on_gpu: bool, output: Path) -> list[Step]:
    return [
        probes_step(on_gpu, output),
        ceilings_step(on_gpu, output),
        operators_step(),
        tests_step(on_gpu, 90, 150),
        cupy_step(on_gpu),
        Step(
            "predictor: graphs and sync debug mode",
            pytest_command(),
            ["tests/test_cuda_predictor.py", "tests/test_no_host_reads.py", "tests/test_fused_conv.py"],
            reserved=60,
            limit=150,
            detail=pytest_detail,
            group="tests",
        ),
        kernels_step(on_gpu, output, 90, 170),
        stages_step(on_gpu, output),
        ncu_step(on_gpu),
        end_to_end_step(on_gpu, output),
        throughput_step(on_gpu, output),
    ]


def second_steps(on_gpu: bool, output: Path) -> list[Step]:
    return [
        *sanitizer_steps(on_gpu),
        Step(
            "large tensors and repeated runs",
            pytest_command(),
            ["tests/test_scale.py"],
            reserved=60,
            limit=180,
            detail=pytest_detail,
            group="checks",
        ),
        Step(
            "training under torchrun",
            [sys.executable, "tools/gpu_training.py", *device_arguments(on_gpu)],
            reserved=60,
            limit=120,
            group="checks",
        ),
        training_step(on_gpu, output),
        network_step(on_gpu, output),
    ]


# Operators and their tests


def operators() -> list[str]:
    """Return the operators that have a test file; the tests of a gradient are in the file of its operator."""
    listed = re.findall(r"^    (\w+)", (ROOT / "cmake" / "ops.cmake").read_text(), re.MULTILINE)
    return [op for op in listed if (ROOT / "tests" / f"test_{op}.py").is_file()]


def operator_tests() -> list[str]:
    """Return the test files of all operators: test_<operator>.py, test_<operator>_<subject>.py, test_sm90.py."""
    patterns = [f"tests/test_{op}{ending}.py" for op in operators() for ending in ("", "_*")] + ["tests/test_sm90.py"]
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)))


def pytest_command(*options: str) -> list[str]:
    """Return a pytest command that prints each test when it ends, so that the log of a timeout is useful."""
    shared = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-v", "--tb=short", "--no-header"]
    return [sys.executable, "-m", "pytest", *shared, *options]


def operators_step() -> Step:
    command = [sys.executable, "tools/sanitizer_targets.py", "operators"]
    return Step("every operator once", command, reserved=15, limit=60)


def tests_step(on_gpu: bool, reserved: float, limit: float, selection: str = "") -> Step:
    """Run the tests of the operators, or the part of `OpMatrix` that the expression `selection` selects."""
    if not on_gpu:
        selection = "test_reference and float32"
    # The `OpMatrix` of an operator is in test_<operator>.py.
    files = [f"tests/test_{op}.py" for op in operators()] if selection else operator_tests()
    command = pytest_command(*(["-k", selection] if selection else []))
    return Step("operator tests", command, files, reserved, limit, pytest_detail, group="tests")


def cupy_step(on_gpu: bool) -> Step:
    """Run the operators on CuPy arrays, and compare them with naive CuPy kernels.

    The dry run has NumPy arrays instead, and compiles the naive kernels as C++.
    """
    return Step(
        "operators and CuPy",
        pytest_command(),
        ["tests/test_arrays.py", "tests/test_naive_kernels.py"],
        reserved=20,
        limit=60,
        detail=pytest_detail,
        group="tests",
        skip_reason="CuPy is not installed" if on_gpu and not has_module("cupy") else "",
    )


def sanitizer_steps(on_gpu: bool) -> list[Step]:
    """Run compute-sanitizer on kernels with a planted fault, which it must find, and on all operators."""
    sanitizer = find_tool("compute-sanitizer")
    missing = "compute-sanitizer is not installed" if on_gpu and sanitizer is None else ""
    target = [sys.executable, "tools/sanitizer_targets.py"]

    def command(tool: str) -> list[str]:
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        return [sanitizer or "", *options, *target] if on_gpu else target

    planted = [
        Step(
            f"{tool}: planted fault is found",
            [*command(tool), f"planted-{tool}" if on_gpu else "operators"],
            reserved=60,
            limit=90,
            detail=sanitizer_detail,
            skip_reason=missing,
            expected_code=9 if on_gpu else 0,
            group="checks",
        )
        for tool in SANITIZER_TOOLS
    ]
    of_operators = [
        Step(
            f"{tool}: operators",
            [*command(tool), "operators"],
            reserved=100,
            limit=180,
            detail=sanitizer_detail,
            skip_reason=missing,
            group="checks",
        )
        for tool in SANITIZER_TOOLS
    ]
    return planted + of_operators


# The device


def device_arguments(on_gpu: bool) -> list[str]:
    return ["--device", "cuda" if on_gpu else "cpu"]


def ceilings_step(on_gpu: bool, output: Path) -> Step:
    command = [sys.executable, "benchmarks/card.py", *device_arguments(on_gpu), "--output", str(output)]
    return Step("ceilings of the card", command, reserved=15, limit=45)


def is_hopper() -> bool:
    import torch  # here, because the import takes seconds, which other runs need not spend

    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def probes_step(on_gpu: bool, output: Path) -> Step:
    """Check the hardware facts that the kernels for compute capability 9.0 rely on."""
    program = ROOT / "build" / "hopper_probes" / "hopper_probes"
    command = [sys.executable, "benchmarks/hopper_probes/run.py", "--check", "--out", str(output / "probes.jsonl")]
    reason = "" if program.is_file() else f"{program} is missing: benchmarks/hopper_probes/build.sh builds it"
    if not on_gpu or not is_hopper():
        reason = "needs compute capability 9.0"
    command += ["--executable", str(program)]
    return Step("layouts of Hopper", command, reserved=5, limit=30, skip_reason=reason)


# Benchmarks


def kernels_step(on_gpu: bool, output: Path, reserved: float, limit: float) -> Step:
    command = [sys.executable, "benchmarks/gpu.py", *device_arguments(on_gpu), "--output", str(output)]
    command += ["--seconds", str(BENCHMARK_SECONDS)] if on_gpu else ["--seconds", "0.001", "--dry"]
    return Step("times of kernels", command, reserved=reserved, limit=limit, detail=benchmark_detail)


def stages_step(on_gpu: bool, output: Path) -> Step:
    command = [sys.executable, "benchmarks/stages.py", "--output", str(output), *device_arguments(on_gpu)]
    if not on_gpu:
        command += ["--config", "tiny", "--size", "96", "128", "--dtype", "float32", "--seconds", "0.01"]
    return Step("pipeline by stages", command, reserved=30, limit=75, detail=stages_detail)


def ncu_step(on_gpu: bool) -> Step:
    """Read hardware counters of the most important kernels."""
    target = [sys.executable, "tools/profile_targets.py", "flow_conv2d", "deform_conv2d", "multilevel_roi_align"]
    target += ["flow_conv2d_backward", "sigmoid_focal_loss"]
    ncu = find_tool("ncu")
    sections = [word for name in NCU_SECTIONS for word in ("--section", name)]
    watched = [ncu or "", "--clock-control", "none", "-k", f"regex:{NCU_KERNELS}", "-c", "16", *sections, *target]
    return Step(
        "hardware counters (ncu)",
        watched if on_gpu else target,
        reserved=25,
        limit=60,
        detail=lambda output: f"{output.count('Duration')} kernels",
        required_text="Duration" if on_gpu else "",
        skip_reason="ncu is not installed" if on_gpu and ncu is None else "",
    )


def end_to_end_step(on_gpu: bool, output: Path) -> Step:
    options = ["--seconds", "4", "--short-edges", "800", "--dtype", "bfloat16", "--threads", "8"]
    options += ["--providers", "spatialflow", "reference, 16 bits"]
    if not on_gpu:
        options = ["--seconds", "0.01", "--short-edges", "64", "--config", "tiny"]
    command = [sys.executable, "benchmarks/end_to_end.py", *device_arguments(on_gpu), *options, "--output", str(output)]
    return Step("images per second from files", command, reserved=45, limit=75, detail=end_to_end_detail)


def throughput_step(on_gpu: bool, output: Path) -> Step:
    options = ["--config", "spatialflow_r50_coco", "--dtype", "bfloat16", "--size", "800", "1333", "--count", "40"]
    options += ["--threads", "8"]
    if not on_gpu:
        options = ["--size", "64", "96", "--count", "4", "--seconds", "0.01", "--config", "tiny"]
    command = [sys.executable, "benchmarks/throughput.py", *device_arguments(on_gpu), *options, "--output", str(output)]
    return Step("stages of prediction from files", command, reserved=30, limit=60, detail=throughput_detail)


def training_step(on_gpu: bool, output: Path) -> Step:
    command = [sys.executable, "benchmarks/training_step.py", "--no-plot", "--output", str(output)]
    if on_gpu:
        command += ["--device", "cuda", "--add", "--dtype", "bfloat16", "--seconds", "1"]
        command += ["--providers", "plain modules, channels-last", "torch.compile"]
    else:
        command += ["--seconds", "0.001", "--providers", "none"]
    return Step("training step", command, reserved=110, limit=150, detail=benchmark_detail)


def network_step(on_gpu: bool, output: Path) -> Step:
    command = [sys.executable, "benchmarks/network.py", *device_arguments(on_gpu), "--output", str(output), "--add"]
    if on_gpu:
        command += ["--dtype", "bfloat16", "--seconds", "0.5"]
        command += ["--providers", "plain modules, channels-last", "torch.compile"]
    else:
        command += ["--seconds", "0.001", "--providers", "none", "--no-plot"]
    return Step("network beside torch.compile", command, reserved=150, limit=200, detail=benchmark_detail)


# Summaries of output


def pytest_detail(output: str) -> str:
    """Return the counts that pytest reports, summed over its runs, and the files that did not end."""
    counts: Counter[str] = Counter()
    for line in re.findall(
        r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*) in [\d.]+s", output, re.MULTILINE
    ):
        counts.update({kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", line)})
    unfinished = []
    for run in re.split(r"^=+ test session starts =+$", output, flags=re.MULTILINE)[1:]:
        if not re.search(r"^=+ .* in [\d.]+s.* =+$", run, re.MULTILINE):
            unfinished += re.findall(r"^(\S+\.py)::", run, re.MULTILINE)
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    if unfinished:
        summary += f"; not ended: {', '.join(sorted(set(unfinished)))}"
    return summary or last_line(output)


def benchmark_detail(output: str) -> str:
    """Return how many cases were timed, and the failures."""
    cases = len(re.findall(r"^    spatialflow {2,}", output, re.MULTILINE))
    failed = re.findall(r"FAILED:? ?(.*)", output)
    reason = f"; failed: {'; '.join(failed)[:300]}" if failed else "" if cases else f"; {last_line(output)[:120]}"
    return f"{cases} cases{reason}"


def end_to_end_detail(output: str) -> str:
    """Return the speed of each pipeline from the output of benchmarks/end_to_end.py."""
    table = output.split("share of the time")[0]
    rows = re.findall(r"^    (spatialflow|reference\S*(?: \S+)*) +([\d.]+) +[\d.]+ ", table, re.MULTILINE)
    return "; ".join(f"{name.strip()} {value} images/s" for name, value in rows) or output.strip()[-200:]


def throughput_detail(output: str) -> str:
    """Return the speed of the network alone and of all stages at once from the output of benchmarks/throughput.py."""
    rows = re.findall(r"^    (network|overlapped) +([\d.]+)", output, re.MULTILINE)
    return "; ".join(f"{name} {value} images/s" for name, value in rows) or output.strip()[-200:]


def stages_detail(output: str) -> str:
    """Return the speed of each form from the output of benchmarks/stages.py."""
    return "; ".join(re.findall(r"^((?:eager|graph), .*)$", output, re.MULTILINE)) or output.strip()[-200:]


def sanitizer_detail(output: str) -> str:
    """Return the summary line of compute-sanitizer."""
    lines = [line for line in output.split("\n") if "SUMMARY" in line]
    return lines[-1].strip("= ") if lines else last_line(output)
