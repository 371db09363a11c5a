# SPDX-License-Identifier: Apache-2.0
"""Times operators; every script beside this file declares what to time and calls `main`.

A script gives a `Benchmark`: a `setup` that makes the inputs of one case, the `providers` that compute the same thing
from them, the `sweep` of cases, and the float64 oracle. The harness does the rest, the same way for every op:

1. each provider's result (and gradient) is compared with the oracle in float64; a wrong `spatialflow` stops the run, a
   peer that cannot do a 16-bit dtype does the case in float32, under a name that says so;
2. warm-up, then rounds in which the providers take turns in one process, so that a disturbance hits all alike;
3. medians with the 10 % and 90 % quantiles; `ratio` is a provider's median over spatialflow's;
4. a table on screen, `results/<device>/<op>.json` and a plot beside it.

On CUDA there are two times, both with the L2 cache overwritten before. `median_ms` is the call: from the call to its
completion, by the host's clock. `kernel_ms` is the work of the GPU alone: the replay of a CUDA graph. A provider that
no graph can hold has the sum of its kernels by the profiler, without the gaps between them.

`python benchmarks/harness.py` prints the kept results as Markdown tables, one per device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "spatialflow" / "__init__.py").is_file():  # in a source tree that tree is timed, installed or not
    sys.path.insert(1, str(_ROOT))

OURS = "spatialflow"
MODES = ("forward", "forward+backward")

TOLERANCES = {"float32": 0.0, "bfloat16": 4e-2, "float16": 5e-3}
"""Least tolerance of results in a dtype."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one case: every provider is called as `provider(*inputs, **options)`.

    Args:
        inputs: tensors, lists of tensors, arrays or plain values.
        options: keyword arguments.
        features: indices of the inputs that are in the dtype asked for; the others keep theirs.
        differentiable: indices of the inputs whose gradient "forward+backward" computes; none: forward only.
        bytes: what the forward pass must at least read and write, with features in float32, for the GB/s line.
        fixed_bytes: the part of `bytes` that is in the same dtype whatever the features are in.
        operations: floating-point operations of the forward pass (a multiply-add counts two), for the GFLOP/s line.
    """

    inputs: tuple
    options: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()
    bytes: float | None = None
    fixed_bytes: float = 0.0
    operations: float | None = None


@dataclass(frozen=True)
class Provider:
    """A way to compute the result.

    Args:
        call: the function that is timed.
        prepare: `prepare(*inputs, **options)` gives the arguments of `call`, outside the timing.
        only_cuda: left out on other devices.
        only_forward: left out where gradients are asked for.
        waits: no CUDA graph can hold it: it reads values back from the device, or leaves the current stream.
        around: a context manager that calls, and gradients, run in.
        lowered: indices of inputs, beside the features, that it takes in the features' dtype alone, as torchvision's
            operators do; converted outside the timing.
    """

    call: Callable[..., Any]
    prepare: Callable[..., tuple] | None = None
    only_cuda: bool = False
    only_forward: bool = False
    waits: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    lowered: tuple[int, ...] = ()


def compiled(function: Callable[..., Any]) -> Provider:
    """The same through torch.compile; on CUDA alone, where its compiler comes with torch."""

    def prepare(*inputs: Any, **options: Any) -> tuple:
        return torch.compile(partial(function, **options), dynamic=False), *inputs

    return Provider(lambda call, *inputs: call(*inputs), prepare, only_cuda=True)


def deterministic(function: Callable[..., Any] | Provider | None) -> Provider | None:
    """The same under torch.use_deterministic_algorithms; on CUDA alone, where it chooses other kernels."""
    if function is None:
        return None
    own = function if isinstance(function, Provider) else Provider(function)

    return replace(own, only_cuda=True, around=deterministic_algorithms)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Chooses torch's deterministic algorithms, without its filling of new tensors, which is for finding faults."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def convolving(precision: str, function: Callable[..., Any] | Provider) -> Provider:
    """The same with float32 convolutions in "ieee" or in "tf32", which is torch's default; "tf32" on CUDA alone."""
    own = function if isinstance(function, Provider) else Provider(function)
    return replace(own, only_cuda=own.only_cuda or precision == "tf32", around=partial(_convolutions_in, precision))


@contextlib.contextmanager
def _convolutions_in(precision: str) -> Iterator[None]:
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class Benchmark:
    """What a script declares.

    Args:
        name: the operator.
        setup: `setup(**case) -> Problem`.
        sweep: label of a case -> keyword arguments of `setup`.
        providers: name -> function or `Provider`; "spatialflow" is one of them. None: not installed, left out.
        oracle: the reference, run on the inputs widened to float64. None: the provider "reference".
        tolerance: largest error of spatialflow, as a share of the largest expected value.
        rounding: factor of TOLERANCES, for what rounds more than once.
        compare: `(result, expected) -> error`; default: largest difference over the largest expected value, and for
            integers the share of entries that differ.
        title: caption of table and plot; say which layer of the model the sizes come from.
    """

    name: str
    setup: Callable[..., Problem]
    sweep: Mapping[str, Mapping[str, Any]]
    providers: Mapping[str, Callable[..., Any] | Provider | None]
    oracle: Callable[..., Any] | None = None
    tolerance: float = 1e-4
    rounding: float = 1.0
    compare: Callable[[Any, Any], float] | None = None
    title: str = ""


def optional(module: str) -> Any | None:
    """The module, or None where it is not installed or cannot be used.

    `(tv := optional("torchvision.ops")) and tv.nms` is a provider. A torchvision built for another torch raises
    RuntimeError when it registers what it has no kernels for.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return None


def leaves(value: Any) -> list:
    """Tensors and arrays in a result or input, in order."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [leaf for item in value for leaf in leaves(item)]


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def largest_error(result: Any, expected: Any) -> float:
    """Largest difference as a share of the largest expected value; infinite where the shapes differ."""
    results, expecteds = leaves(result), leaves(expected)
    if len(results) != len(expecteds):
        return float("inf")
    worst = 0.0
    for one, other in zip(results, expecteds):
        one, other = (np.asarray(_as_array(value)) for value in (one, other))
        if one.shape != other.shape:
            return float("inf")
        if other.size == 0:
            continue
        if not np.issubdtype(other.dtype, np.floating):
            error = float(np.mean(one != other))
        else:
            error = float(np.abs(one.astype(np.float64) - other).max()) / max(float(np.abs(other).max()), 1e-30)
        worst = max(worst, float("inf") if np.isnan(error) else error)
    return worst


def _as_array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _in_float32(problem: Problem) -> Problem:
    inputs = [
        map_tensors(torch.Tensor.float, value) if index in problem.features else value
        for index, value in enumerate(problem.inputs)
    ]
    return replace(problem, inputs=tuple(inputs))


class _Call:
    """One provider on one case in one mode: `run()` is what is timed."""

    def __init__(self, provider: Callable | Provider, problem: Problem, mode: str) -> None:
        provider = provider if isinstance(provider, Provider) else Provider(provider)
        inputs = list(problem.inputs)
        self._function, self._options, self._wanted, self._grads = provider.call, dict(problem.options), [], None
        if provider.lowered and problem.features:
            dtype = leaves(inputs[problem.features[0]])[0].dtype
            for index in provider.lowered:
                if index < len(inputs):
                    inputs[index] = map_tensors(lambda t: t.to(dtype), inputs[index])
        if mode == "forward+backward":
            for index in problem.differentiable:
                inputs[index] = map_tensors(lambda t: t.detach().requires_grad_(), inputs[index])
                self._wanted += leaves(inputs[index])
        self._inputs, self._around, self.waits = tuple(inputs), provider.around, provider.waits
        if provider.prepare is not None:
            self._inputs, self._options = tuple(provider.prepare(*inputs, **self._options)), {}

    def run(self) -> Any:
        with self._around():
            return self._run()

    def _run(self) -> Any:
        if not self._wanted:
            with torch.no_grad():
                return self._function(*self._inputs, **self._options)
        outputs = [leaf for leaf in leaves(self._function(*self._inputs, **self._options)) if leaf.requires_grad]
        if self._grads is None:
            generator = torch.Generator(device="cpu").manual_seed(1)
            self._grads = [
                torch.randn(o.shape, generator=generator, dtype=torch.float32, device="cpu")
                .to(o)
                .contiguous(memory_format=_format_of(o))
                for o in outputs
            ]
        return torch.autograd.grad(outputs, self._wanted, self._grads)


def _format_of(tensor: torch.Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format


def _flush(cache: torch.Tensor | None) -> None:
    """Overwrites the L2 cache of the GPU; nothing on the CPU."""
    if cache is not None:
        cache.zero_()
        torch.cuda.synchronize()


def _clock(call: _Call, cache: torch.Tensor | None) -> float:
    """Seconds from the call to its completion."""
    _flush(cache)
    begin = time.perf_counter()
    call.run()
    if cache is not None:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(calls: Mapping[str, _Call], seconds: float, device: str) -> dict[str, list[float]]:
    """Times of each call in seconds. Calls take turns; each gets about `seconds`, but at least three runs."""
    cache = _l2_cache(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warm-up: allocator, thread pool, caches
        begin = time.perf_counter()
        for _ in range(3):
            call.run()
            if time.perf_counter() - begin > seconds / 4:
                break
    open_calls = set(calls)
    while open_calls:
        for name in [name for name in calls if name in open_calls]:
            times[name].append(_clock(calls[name], cache))
            if len(times[name]) >= 3 and (sum(times[name]) > seconds or len(times[name]) >= 200):
                open_calls.discard(name)
    return times


def _l2_cache(device: str) -> torch.Tensor | None:
    """A tensor larger than the L2 cache of any GPU; None on the CPU."""
    return torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.startswith("cuda") else None


def measure_kernels(calls: Mapping[str, _Call], seconds: float, device: str) -> dict[str, float]:
    """Seconds of GPU work of each call, see the module's docstring; a provider that fails in a graph is left out."""
    cache, replays, result = _l2_cache(device), {}, {}
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
    open_calls = set(replays)
    while open_calls:
        for name in [name for name in replays if name in open_calls]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()  # while it runs, the graph's launch is queued
            begin.record()
            replays[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
            if len(times[name]) >= 5 and (sum(times[name]) > seconds / 2 or len(times[name]) >= 50):
                open_calls.discard(name)
    return {**result, **{name: statistics.median(own) for name, own in times.items()}}


def _captured(call: _Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call.captured = call.run()  # what the graph writes lives as long as the call
    return graph


def _profiled_seconds(call: _Call, runs: int = 3) -> float:
    """Summed duration of the kernels and copies of a run, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    cache = _l2_cache("cuda")
    total = 0.0
    for _ in range(runs):
        _flush(cache)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call.run()
            torch.cuda.synchronize()
        total += sum(event.self_device_time_total for event in profiler.key_averages())
    return total / 1e6 / runs


def run(benchmark: Benchmark, arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case and mode asked for; raises SystemExit where spatialflow is wrong."""
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
        move = lambda value: map_tensors(lambda t: t.to(arguments.device), value)
        lower = lambda value: map_tensors(lambda t: t.to(getattr(torch, dtype)), value)
        known = problem.bytes
        if known is not None and problem.features:
            itemsize = getattr(torch, dtype).itemsize
            known = problem.fixed_bytes + (known - problem.fixed_bytes) * itemsize / 4
        inputs = (move(lower(v) if i in problem.features else v) for i, v in enumerate(problem.inputs))
        problem = Problem(**{**problem.__dict__, "inputs": tuple(inputs), "bytes": known})
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
    wide = Problem(**{**problem.__dict__, "inputs": tuple(map_tensors(_widen, value) for value in problem.inputs)})
    expected = _Call(oracle, wide, mode).run()
    compare = benchmark.compare if benchmark.compare is not None and mode == "forward" else largest_error
    calls, errors = {}, {}
    tolerance = max(benchmark.tolerance, benchmark.rounding * TOLERANCES[dtype] if problem.features else 0)
    for name, provider in providers.items():
        if mode != "forward" and getattr(provider, "only_forward", False):
            continue
        attempts = {name: problem}
        if name != OURS and problem.features and dtype != "float32":
            attempts[f"{name}, float32"] = _in_float32(problem)
        for own_name, own_problem in attempts.items():
            try:
                call = _Call(provider, own_problem, mode)
                errors[own_name] = compare(call.run(), expected)
            except Exception as problem_of_peer:  # a peer that cannot do a case loses that row, not the run
                if name == OURS:
                    raise
                print(f"  {own_name} fails on {label}, {mode}: {(str(problem_of_peer).splitlines() or ['?'])[0]}")
                continue
            calls[own_name] = call
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
    _print_case(f"{label}, {mode}" + (f", {dtype}" if problem.features else ""), problem, rows)
    return rows


def _print_case(label: str, problem: Problem, rows: list[dict[str, Any]]) -> None:
    with_kernels = any("kernel_ms" in row for row in rows)
    print(f"\n  {label}")
    print(
        f"    {'provider':<24}{'median ms':>11}{'10 %':>10}{'90 %':>10}{'runs':>6}{'error':>10}{'ratio':>8}"
        + (f"{'kernel ms':>11}{'ratio':>8}" if with_kernels else "")
    )
    for row in rows:
        print(
            f"    {row['provider']:<24}{row['median_ms']:>11.3f}{row['q10_ms']:>10.3f}{row['q90_ms']:>10.3f}"
            f"{row['runs']:>6}{row['error']:>10.1e}{row['ratio']:>8.2f}"
            + (f"{row['kernel_ms']:>11.4f}" if "kernel_ms" in row else "")
            + (f"{row['kernel_ratio']:>8.2f}" if "kernel_ratio" in row else "")
        )
    parts = []
    for key, total, unit, rate in (
        ("gigabytes_per_second", problem.bytes, "MB", "GB/s"),
        ("gigaflops_per_second", problem.operations, "MFLOP", "GFLOP/s"),
    ):
        reached = next((row[key] for row in rows if row["provider"] == OURS and key in row), None)
        if reached is not None:
            parts.append(f"{total / 1e6:.1f} {unit} at {reached:.1f} {rate}")
    if parts:
        print(f"    spatialflow: {', '.join(parts)}")
    sys.stdout.flush()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the source tree that this file is in, "-modified" where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        packed = _ROOT / "commit.txt"  # of an archive of tools/gpu_pack.py
        return packed.read_text().strip() if packed.is_file() else None
    return commit.stdout.strip() + ("-modified" if state.stdout.strip() else "")


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a figure must be read with: device, threads, versions, commit, date."""
    import spatialflow
    from spatialflow import _library

    versions = {"torch": torch.__version__, "python": platform.python_version(), "spatialflow": spatialflow.__version__}
    for name in ("torchvision", "numpy", "cupy"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = module.__version__
    return {
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "cpu_level": _library.cpu_level(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def results_path(folder: Path, device: str, name: str) -> Path:
    """`<folder>/<device>/<name>.json`; the folder is made."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    path = folder / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def pictures(folder: Path, count: int) -> list[Path]:
    """The first image files of a folder by name; ends the program with a sentence where there is none."""
    found = folder.iterdir() if folder.is_dir() else ()
    paths = sorted(path for path in found if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        sys.exit(f"{folder}: holds no .jpg or .png")
    return paths[:count]


def write_figure(figure: Any, path: Path) -> None:
    """Saves a figure of matplotlib and closes it."""
    from matplotlib import pyplot

    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    os.replace(temporary, path)


def plot(benchmark: Benchmark, setting: Mapping[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of median times, one group per case and mode, with the quantiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = {row["dtype"] for row in rows}
    group_of = lambda row: (row["case"], row["mode"] + (f", {row['dtype']}" if len(dtypes) > 1 else ""))
    groups = list(dict.fromkeys(map(group_of, rows)))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.28 * len(groups) * (len(names) + 1)), layout="constrained")
    for position, name in enumerate(names):
        own = [row for row in rows if row["provider"] == name]
        at = [groups.index(group_of(row)) + (position - (len(names) - 1) / 2) * height for row in own]
        median = [row["median_ms"] for row in own]
        whiskers = [
            [row["median_ms"] - row["q10_ms"] for row in own],
            [row["q90_ms"] - row["median_ms"] for row in own],
        ]
        axes.barh(at, median, height * 0.9, xerr=whiskers, label=name, error_kw={"linewidth": 0.8})
        for y, row in zip(at, own):
            text = f" {row['median_ms']:.3g} ms" + ("" if name == OURS else f", {row['ratio']:.3g}x")
            axes.text(row["q90_ms"], y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [f"{case}\n{mode}" for case, mode in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=max(row["q90_ms"] for row in rows) * 6)
    axes.set_xlabel("median time in ms (whiskers: 10 % and 90 % quantiles)")
    versions = ", ".join(
        f"{name} {setting['versions'][name]}" for name in ("torch", "torchvision") if name in setting["versions"]
    )
    axes.set_title(
        f"{benchmark.name}: {benchmark.title}\n{setting['device']}, {setting['threads']} threads, {versions}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    write_figure(figure, path)


def parse_arguments(benchmark: Benchmark, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{benchmark.name}: {benchmark.title}",
        epilog=f"cases: {'; '.join(benchmark.sweep)}. providers: {', '.join(benchmark.providers)}.",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=tuple(TOLERANCES),
        help="of features, one or several (default: float32)",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="only these (default: both where there are gradients)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per provider, case and mode (default: 1)")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases whose label contains one of these")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these beside spatialflow")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder of <device>/<op>.json and .png (default: benchmarks/results; nothing is written for a selection "
        "of cases or providers unless this is given)",
    )
    parser.add_argument("--add", action="store_true", help="keep the other rows of this commit in the file")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON alone")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "threads", "seconds")
    if options.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    return options


def require_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Ends the program with exit code 2 where one of these options is not positive, or not finite."""
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):  # false for NaN too
            parser.error(f"--{name} must be positive and finite, got {getattr(options, name)}")


def main(benchmark: Benchmark, arguments: list[str] | None = None) -> None:
    """Command line of a script: checks, times, prints and saves."""
    options = parse_arguments(benchmark, arguments)
    torch.set_num_threads(options.threads)
    setting = environment(options)
    print(f"{benchmark.name}: {benchmark.title}")
    about = f"{setting['device']}, {setting['threads']} threads, torch {torch.__version__}"
    print(f"  {about}, CPU level {setting['cpu_level']}")
    kept = options.output is not None or not (options.cases or options.providers or options.modes)
    rows: list[dict[str, Any]] = []
    content = {"op": benchmark.name, "title": benchmark.title, **setting, "rows": rows}
    path = _target(options, setting["device"], benchmark.name) if kept else None
    if options.add and path is not None and path.is_file():
        before = json.loads(path.read_text())
        rows += before["rows"] if before.get("commit") == setting["commit"] else []
    for more in run(benchmark, options):
        new = {_key(row) for row in more}
        rows[:] = [row for row in rows if _key(row) not in new] + more
        if kept:  # after every case: what ends a run early leaves the cases before
            write_text(path, json.dumps(content, indent=1) + "\n")
    if not rows:
        wanted = [*(options.cases or []), *(options.modes or [])]
        sys.exit(f"no case contains {' or '.join(wanted)}; cases: {'; '.join(benchmark.sweep)}")
    if not kept or options.no_plot:
        return
    plot(benchmark, setting, rows, path.with_suffix(".png"))
    print(f"\n  written: {path}, {path.with_suffix('.png').name}")


def _target(options: argparse.Namespace, device: str, name: str) -> Path:
    return results_path(options.output or Path(__file__).parent / "results", device, name)


def _key(row: Mapping[str, Any]) -> tuple:
    return row["case"], row["mode"], row.get("dtype"), row["provider"]


def markdown(paths: Sequence[Path]) -> str:
    """Results of a device's operators as Markdown: a row per case and mode with each peer's time; "" for none."""
    contents = [json.loads(path.read_text()) for path in paths]
    contents = [c for c in contents if c.get("rows") and "mode" in c["rows"][0]]
    if not contents:
        return ""
    peers = list(dict.fromkeys(r["provider"] for content in contents for r in content["rows"]))
    peers.remove(OURS)
    timings = [("median_ms", "ratio")]
    if any("kernel_ms" in row for content in contents for row in content["rows"]):
        timings.append(("kernel_ms", "kernel_ratio"))
    tables = []
    for time_key, ratio_key in timings:
        lines = ["| " + " | ".join(["op", "case", "", "", OURS, *peers]) + " |", "|" + "---|" * 4]
        lines[1] += "---:|" * (1 + len(peers))
        for content in contents:
            groups: dict[tuple, dict[str, Any]] = {}
            for row in content["rows"]:
                key = (row["case"], row["mode"], row.get("dtype", content.get("dtype", "float32")))
                groups.setdefault(key, {})[row["provider"]] = row
            for key, rows in groups.items():
                cells = [_cell(rows.get(OURS), time_key, None)]
                cells += [_cell(rows.get(name), time_key, ratio_key) for name in peers]
                lines.append("| " + " | ".join([f"`{content['op']}`", *key, *cells]) + " |")
        tables.append("\n".join(lines))
    settings = sorted({f"{c['device']}, {c['threads']} threads, torch {c['versions']['torch']}" for c in contents})
    if len(tables) == 1:
        return "\n\n".join(["; ".join(settings), *tables])
    call, kernel = tables
    headings = "Calls, from the call to its completion:", "GPU work alone:"
    return "\n\n".join(["; ".join(settings), headings[0], call, headings[1], kernel])


def _cell(row: Mapping[str, Any] | None, time_key: str, ratio_key: str | None) -> str:
    """A time and, of a peer, its ratio to ours."""
    if row is None or time_key not in row:
        return ""
    ratio = f" ({row[ratio_key]:.1f}x)" if ratio_key in row else ""
    return f"{row[time_key]:.3g} ms{ratio}"


if __name__ == "__main__":
    devices = sorted(path for path in (Path(__file__).parent / "results").iterdir() if path.is_dir())
    print("\n\n".join(filter(None, (markdown(sorted(device.glob("*.json"))) for device in devices))))
