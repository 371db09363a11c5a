# SPDX-License-Identifier: Apache-2.0
"""Timing of the providers of a benchmark, in turns within one process."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
import torch

from harness.benchmark import (
    MODES,
    OURS,
    TOLERANCES,
    Benchmark,
    Problem,
    Provider,
    in_float32,
    largest_error,
    leaves,
    map_tensors,
    widen,
)
from harness.report import print_case


class Call:
    """A provider with the inputs of one case in one mode; `run` is the timed call."""

    def __init__(self, provider: Callable | Provider, problem: Problem, mode: str) -> None:
        provider = provider if isinstance(provider, Provider) else Provider(provider)
        inputs = list(problem.inputs)
        self._function, self._options, self._differentiable, self._grads = (
            provider.call,
            dict(problem.options),
            [],
            None,
        )
        if provider.lowered and problem.features:
            dtype = leaves(inputs[problem.features[0]])[0].dtype
            for index in provider.lowered:
                if index < len(inputs):
                    inputs[index] = map_tensors(methodcaller("to", dtype), inputs[index])
        if mode == "forward+backward":
            for index in problem.differentiable:
                inputs[index] = map_tensors(lambda t: t.detach().requires_grad_(), inputs[index])
                self._differentiable += leaves(inputs[index])
        self._inputs, self._around, self.waits = tuple(inputs), provider.around, provider.waits
        if provider.prepare is not None:
            self._inputs, self._options = tuple(provider.prepare(*inputs, **self._options)), {}

    def run(self) -> Any:
        """Compute the result, or the gradients in mode "forward+backward"."""
        with self._around():
            return self._run()

    def _run(self) -> Any:
        if not self._differentiable:
            with torch.no_grad():
                return self._function(*self._inputs, **self._options)
        outputs = [leaf for leaf in leaves(self._function(*self._inputs, **self._options)) if leaf.requires_grad]
        if self._grads is None:
            generator = torch.Generator(device="cpu").manual_seed(1)
            self._grads = [
                torch.randn(o.shape, generator=generator, dtype=torch.float32, device="cpu")
                .to(o)
                .contiguous(memory_format=_memory_format(o))
                for o in outputs
            ]
        return torch.autograd.grad(outputs, self._differentiable, self._grads)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    is_channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last and not tensor.is_contiguous() else torch.contiguous_format


def _flush(buffer: torch.Tensor | None) -> None:
    """Overwrite the L2 cache of the GPU with `buffer`, from `_flush_buffer`; do nothing on the CPU."""
    if buffer is not None:
        buffer.zero_()
        torch.cuda.synchronize()


def _clock(call: Call, buffer: torch.Tensor | None) -> float:
    """Return the seconds from the call to its completion."""
    _flush(buffer)
    begin = time.perf_counter()
    call.run()
    if buffer is not None:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(calls: Mapping[str, Call], seconds: float, device: str) -> dict[str, list[float]]:
    """Time the calls in turns; return seconds per run. Each call gets about `seconds`, and 3 to 200 runs."""
    buffer = _flush_buffer(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warm-up: allocator, thread pool, caches
        begin = time.perf_counter()
        for _ in range(3):
            call.run()
            if time.perf_counter() - begin > seconds / 4:
                break
    unfinished = set(calls)
    while unfinished:
        for name in [name for name in calls if name in unfinished]:
            times[name].append(_clock(calls[name], buffer))
            if len(times[name]) >= 3 and (sum(times[name]) > seconds or len(times[name]) >= 200):
                unfinished.discard(name)
    return times


def _flush_buffer(device: str) -> torch.Tensor | None:
    """Return a tensor larger than the L2 cache of any GPU; None on the CPU."""
    return torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.startswith("cuda") else None


def measure_kernels(calls: Mapping[str, Call], seconds: float, device: str) -> dict[str, float]:
    """Return the seconds of GPU work of each call (see `harness`), except those that cannot be captured or profiled."""
    buffer, replays, result = _flush_buffer(device), {}, {}
    for name, call in calls.items():
        try:
            if call.waits:
                result[name] = _profiled_seconds(call)
            else:
                replays[name] = _captured(call)
        except Exception as problem:
            torch.cuda.synchronize()
            failed = "FAILED: " if name == OURS else ""
            print(f"  {failed}{name}: no kernel time: {(str(problem).splitlines() or ['?'])[0]}")
    times: dict[str, list[float]] = {name: [] for name in replays}
    unfinished = set(replays)
    while unfinished:
        for name in [name for name in replays if name in unfinished]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            buffer.zero_()  # overwrites the L2 cache; the host queues the graph while this kernel runs
            begin.record()
            replays[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
            if len(times[name]) >= 5 and (sum(times[name]) > seconds / 2 or len(times[name]) >= 50):
                unfinished.discard(name)
    return {**result, **{name: statistics.median(seconds) for name, seconds in times.items()}}


def _captured(call: Call) -> torch.cuda.CUDAGraph:
    """Capture one run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.captured = call.run()  # keeps the memory that the graph writes
    return graph


def _profiled_seconds(call: Call, runs: int = 3) -> float:
    """Return the total duration of the kernels and copies of a run, by torch's profiler, as a mean over `runs`."""
    from torch.profiler import ProfilerActivity, profile

    buffer = _flush_buffer("cuda")
    total = 0.0
    for _ in range(runs):
        _flush(buffer)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call.run()
            torch.cuda.synchronize()
        total += sum(event.self_device_time_total for event in profiler.key_averages())
    return total / 1e6 / runs


def run(benchmark: Benchmark, arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each selected case and mode; raise SystemExit if a result of spatialflow is wrong."""
    providers = {
        name: provider
        for name, provider in benchmark.providers.items()
        if provider is not None
        and (not arguments.providers or name in arguments.providers or name == OURS)
        and (arguments.device.startswith("cuda") or not getattr(provider, "only_cuda", False))
    }
    cases = [
        (label, case)
        for label, case in benchmark.sweep.items()
        if not arguments.cases or any(wanted in label for wanted in arguments.cases)
    ]
    for dtype, (label, case) in itertools.product(arguments.dtype, cases):
        torch.manual_seed(0)
        np.random.seed(0)
        problem = benchmark.setup(**case)
        to_dtype = partial(map_tensors, methodcaller("to", getattr(torch, dtype)))
        to_device = partial(map_tensors, methodcaller("to", arguments.device))
        byte_count = problem.bytes
        if byte_count is not None and problem.features:
            itemsize = getattr(torch, dtype).itemsize
            byte_count = problem.fixed_bytes + (byte_count - problem.fixed_bytes) * itemsize / 4
        inputs = (to_device(to_dtype(v) if i in problem.features else v) for i, v in enumerate(problem.inputs))
        problem = Problem(**{**problem.__dict__, "inputs": tuple(inputs), "bytes": byte_count})
        for mode in MODES if problem.differentiable else MODES[:1]:
            if not arguments.modes or mode in arguments.modes:
                yield _run_case(benchmark, providers, label, problem, mode, dtype, arguments)


def _run_case(
    benchmark: Benchmark,
    providers: Mapping[str, Any],
    label: str,
    problem: Problem,
    mode: str,
    dtype: str,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    oracle = benchmark.oracle or benchmark.providers["reference"]
    float64_problem = Problem(
        **{**problem.__dict__, "inputs": tuple(map_tensors(widen, value) for value in problem.inputs)}
    )
    expected = Call(oracle, float64_problem, mode).run()
    compare = benchmark.compare if benchmark.compare is not None and mode == "forward" else largest_error
    calls, errors = {}, {}
    tolerance = max(benchmark.tolerance, benchmark.rounding * TOLERANCES[dtype] if problem.features else 0)
    for name, provider in providers.items():
        if mode != "forward" and getattr(provider, "only_forward", False):
            continue
        attempts = {name: problem}
        if name != OURS and problem.features and dtype != "float32":
            attempts[f"{name}, float32"] = in_float32(problem)
        for attempt_name, attempt in attempts.items():
            try:
                call = Call(provider, attempt, mode)
                errors[attempt_name] = compare(call.run(), expected)
            except Exception as failure:  # a baseline that fails is tried in float32 or left out
                if name == OURS:
                    raise
                print(f"  {attempt_name} fails on {label}, {mode}: {(str(failure).splitlines() or ['?'])[0]}")
                continue
            calls[attempt_name] = call
            break
    if not errors[OURS] <= tolerance:
        sys.exit(
            f"{benchmark.name}, {label}, {mode}: spatialflow is off by {errors[OURS]:.2e} of the largest expected "
            f"value, more than {tolerance:.0e}; nothing is timed"
        )
    times = measure(calls, arguments.seconds, arguments.device)
    on_cuda = arguments.device.startswith("cuda")
    kernels = measure_kernels(calls, arguments.seconds, arguments.device) if on_cuda else {}
    ours = statistics.median(times[OURS])
    rows = []
    for name in calls:
        median = statistics.median(times[name])
        low, high = (float(np.quantile(times[name], q)) for q in (0.1, 0.9))
        row = {
            "case": label,
            "mode": mode,
            "dtype": dtype if problem.features else "float32",
            "provider": name,
            "median_ms": median * 1e3,
            "q10_ms": low * 1e3,
            "q90_ms": high * 1e3,
            "runs": len(times[name]),
            "error": errors[name],
            "ratio": median / ours,
        }
        if name in kernels:
            row["kernel_ms"] = kernels[name] * 1e3
            row["kernel_by"] = "profiler" if calls[name].waits else "graph"
            if OURS in kernels:
                row["kernel_ratio"] = kernels[name] / kernels[OURS]
        if mode == "forward":
            row["bytes"], row["operations"] = problem.bytes, problem.operations
            if problem.bytes is not None:
                row["gigabytes_per_second"] = problem.bytes / median / 1e9
            if problem.operations is not None:
                row["gigaflops_per_second"] = problem.operations / median / 1e9
        rows.append(row)
    print_case(f"{label}, {mode}" + (f", {dtype}" if problem.features else ""), problem, rows)
    return rows
