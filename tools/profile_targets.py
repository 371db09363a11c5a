# SPDX-License-Identifier: Apache-2.0
"""Operators whose kernels ncu profiles in `make gpu-check`, each at the size of one case of its benchmark.

export SPATIALFLOW_BACKEND=cuda
ncu --clock-control none -k regex:roi_align_kernel -c 1 python tools/profile_targets.py multilevel_roi_align
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import OURS, Call, Problem, map_tensors

TARGETS = {
    "flow_conv2d": ("P3, 256 to 256, flow", "spatialflow packed", "bfloat16", "forward"),
    "flow_conv2d_backward": ("P3..P7, 256 to 256, flow", OURS, "bfloat16", "forward+backward"),
    "multilevel_roi_align": ("1000 RoIs, 2x2 samples", OURS, "float16", "forward+backward"),
    "deform_conv2d": ("v2 on P3, channels-last", OURS, "float16", "forward+backward"),
    "sigmoid_focal_loss": ("sum", OURS, "float32", "forward"),
}
"""Name -> case, provider, dtype and mode of the operator's benchmark."""


def run_target(name: str, device: str) -> None:
    """Run a target twice; the first run is the warm-up."""
    import torch

    case, provider, dtype, mode = TARGETS[name]
    benchmark = importlib.import_module(name.removesuffix("_backward")).BENCHMARK
    torch.manual_seed(0)
    problem = benchmark.setup(**benchmark.sweep[case])
    inputs = tuple(
        map_tensors(lambda t: t.to(device, getattr(torch, dtype)) if i in problem.features else t.to(device), value)
        for i, value in enumerate(problem.inputs)
    )
    problem = Problem(**{**problem.__dict__, "inputs": inputs})
    call = Call(benchmark.providers[provider], problem, mode)
    for _ in range(2):
        call.run()
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    if not arguments or any(name not in TARGETS for name in arguments):
        print(f"one or more of: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    device = "cuda" if os.environ.get("SPATIALFLOW_BACKEND") == "cuda" else "cpu"
    for name in arguments:
        run_target(name, device)
        print(f"{name} on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
