# SPDX-License-Identifier: Apache-2.0
"""Peak rates of this GPU: bytes copied per second, and matrix products in bfloat16 and float32.

The times of kernels are compared with them. `--device cpu` is a dry run at a small size, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import environment, results_path, write_text


def seconds_of(function: Callable[[], object], device: str, runs: int = 10) -> float:
    """Return the median time of a call in seconds, on CUDA between two events."""
    times = []
    for _ in range(runs + 3):  # the first three calls are the warm-up
        if device.startswith("cuda"):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measure(device: str) -> dict[str, float]:
    """Return GB/s of a copy (bytes read and written) and TFLOP/s of matrix products of random numbers."""
    small = not device.startswith("cuda")
    source = torch.empty(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = {"copy_gigabytes_per_second": 2 * source.numel() / seconds_of(lambda: target.copy_(source), device) / 1e9}
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    for dtype, side in ((torch.bfloat16, 64 if small else 8192), (torch.float32, 64 if small else 4096)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = seconds_of(partial(torch.matmul, a, b), device)
        rates[f"{str(dtype).removeprefix('torch.')}_teraflops_per_second"] = 2 * side**3 / seconds / 1e12
    torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    parser = argparse.ArgumentParser(description="Peak rates of this GPU: copies and matrix products.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="receives <device>/card.json (default: rates are only printed)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rates = measure(options.device)
    print(", ".join(f"{name.replace('_', ' ')} {rate:.4g}" for name, rate in rates.items()))
    if options.output is not None:
        content = {"op": "card", **environment(options), "rates": rates}
        path = results_path(options.output, content["device"], "card")
        write_text(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
