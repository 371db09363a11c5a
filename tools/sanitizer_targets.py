# SPDX-License-Identifier: Apache-2.0
"""Kernels that compute-sanitizer checks in `make gpu-check`: every operator at small sizes, or a planted fault.

export SPATIALFLOW_BACKEND=cuda    # otherwise the operators run on the CPU
compute-sanitizer --tool racecheck python tools/sanitizer_targets.py operators
compute-sanitizer --tool racecheck python tools/sanitizer_targets.py planted-racecheck    # must be reported
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Every tensor is a separate allocation of the driver, so that its bounds and unwritten bytes are known.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
# torch asks for the toolkit's headers before it compiles a kernel, though the planted ones include none.
os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

PLANTED = {
    "memcheck": """extern "C" __global__ void planted(float* data) { data[1024 + threadIdx.x] = 1; }""",
    "racecheck": """extern "C" __global__ void planted(float* data) {
        __shared__ float shared[64];
        shared[threadIdx.x] = threadIdx.x;
        data[threadIdx.x] = shared[63 - threadIdx.x];
    }""",
    "initcheck": """extern "C" __global__ void planted(float* data) { data[threadIdx.x] += 1; }""",
    "synccheck": """extern "C" __global__ void planted(float* data) {
        if (threadIdx.x < 40) __syncthreads();
        data[threadIdx.x] = 1;
    }""",
}
"""Tool -> a kernel with the fault that the tool looks for. It has 64 threads; `data` has 1024 unwritten numbers."""


def run_planted(tool: str) -> None:
    data = torch.empty(1024, device="cuda")
    kernel = torch.cuda._compile_kernel(PLANTED[tool], "planted")
    kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[data])
    torch.cuda.synchronize()


def run_operators(device: str) -> int:
    """Run every operator and its backward pass, if any; most of them run in float32 and in bfloat16.

    Returns:
        The number of calls of the inner function `run`.
    """
    from spatialflow import ops

    torch.manual_seed(0)
    calls = 0

    def run(function, *inputs):
        nonlocal calls
        calls += 1
        tracked = [t.detach().requires_grad_() for t in inputs]
        result = function(*tracked)
        if tracked:
            outputs = result if isinstance(result, (list, tuple)) else [result]
            torch.autograd.grad(outputs, tracked, [torch.ones_like(t) for t in outputs])

    def draw(*size, dtype=torch.float32):
        return torch.randn(size, dtype=dtype).to(device)

    corner = torch.rand(40, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(40, 2) * 40], dim=1).to(device)
    scores, labels = torch.rand(40, 6).to(device), torch.randint(6, (40,)).to(device)
    rois = torch.cat([torch.zeros(40, 1, device=device), boxes], dim=1)
    for dtype in (torch.float32, torch.bfloat16):
        levels = [
            draw(1, 16, *size, dtype=dtype).contiguous(memory_format=torch.channels_last) for size in ((13, 14), (7, 7))
        ]
        weight, bias = draw(16, 16, 3, 3, dtype=dtype), draw(16, dtype=dtype)
        offset, mask = draw(1, 18, 13, 14), torch.rand(1, 9, 13, 14).to(device)
        run(lambda f: ops.roi_align(f, rois, 7, 1 / 8), levels[0])
        run(lambda *f: ops.multilevel_roi_align(f, rois, 7, (8, 16)), *levels)
        run(lambda *t: ops.deform_conv2d(*t[:4], padding=1, mask=t[4]), levels[0], offset, weight, bias, mask)
        run(lambda *t: ops.flow_conv2d(*t), levels[0], levels[0] * 0.5, weight, bias)
        # These sizes reach the kernels for compute capability 9.0, where `deform_conv2d` needs more than 64 outputs.
        pyramid = [draw(1, 64, *size, dtype=dtype).to(memory_format=torch.channels_last) for size in ((19, 23), (7, 7))]
        weight64, bias64 = draw(64, 64, 3, 3, dtype=dtype), draw(64, dtype=dtype)
        run(lambda *t: ops.flow_conv2d(*t), pyramid[0], pyramid[0] * 0.5, weight64, bias64)
        pointwise = draw(72, 64, 1, 1, dtype=dtype)
        run(lambda: ops.conv1x1(pyramid[0], pointwise, None, draw(1, 72, 19, 23, dtype=dtype), True))
        weight72, bias72 = draw(72, 64, 3, 3, dtype=dtype), draw(72, dtype=dtype)
        offset64, mask64 = draw(1, 18, 19, 23), torch.rand(1, 9, 19, 23).to(device)
        run(
            lambda *t: ops.deform_conv2d(*t[:4], padding=1, mask=t[4]),
            pyramid[0],
            offset64,
            weight72,
            bias72,
            mask64,
        )
        with torch.no_grad():
            stage = ((weight64, bias64),)
            parameters = ops.SubnetParameters(cls=stage, reg=stage, flow_cls=stage, segmentation_levels=1)
            subnets = ops.pack_subnets(parameters)
            run(lambda: ops.fused_subnets(pyramid, subnets))
            stage = ((weight, bias),)
            parameters = ops.SubnetParameters(cls=stage, reg=stage, flow_cls=stage, segmentation_levels=1)
            subnets = ops.pack_subnets(parameters)
            run(lambda: ops.fused_subnets(levels, subnets))
        logits, deltas = ([level[:, :channels] for level in levels] for channels in (16, 8))
        base, valid = torch.ones(2, 2, 4, device=device), torch.tensor([[100, 112]], device=device)
        factors = torch.ones(1, 2, device=device)
        run(lambda: ops.select_candidates(logits, deltas, base, (8, 16), valid, factors, 90))
        for upsample in (False, True):
            run(lambda *t: ops.group_norm_relu(t[0], 4, *t[1:], upsample=upsample), levels[0], bias, bias * 0.5)
        run(lambda x: ops.sigmoid_focal_loss(x, labels, 2.0, 0.25, reduction="sum"), draw(40, 6, dtype=dtype))
        pictures = [torch.randint(0, 256, (21, 30, 3), dtype=torch.uint8).to(device)]
        run(lambda: ops.preprocess_images(pictures, [(33, 47)], (1, 2, 3), (4, 5, 6), 32, dtype))
        masks = ops.paste_masks(draw(40, 14, 14, dtype=dtype), boxes, (60, 70))
        run(lambda: ops.stuff_labels(draw(6, 13, 14, dtype=dtype), (50, 53), (60, 70)))
        run(lambda: ops.stuff_labels(draw(13, 14, 6, dtype=dtype).permute(2, 0, 1), (50, 53), (60, 70)))
        stuff = torch.randint(0, 5, (60, 70), dtype=torch.int32).to(device)
        run(lambda: ops.panoptic_merge(masks, scores[:, 0], labels, boxes, stuff, 5, stuff_area_threshold=10))
    run(lambda: ops.nms(boxes, scores[:, 0], 0.5))
    run(lambda: ops.batched_nms(boxes, scores[:, 0], labels, 0.5))
    run(lambda: ops.multiclass_nms(boxes, scores, 0.05, 0.5, 20))
    run(lambda: ops.panoptic_quality_counts(stuff, stuff.flip(0), 5, 5))
    return calls


def main(arguments: list[str]) -> int:
    names = ["operators", *(f"planted-{tool}" for tool in PLANTED)]
    if len(arguments) != 1 or arguments[0] not in names:
        print(f"one argument: {', '.join(names)}", file=sys.stderr)
        return 2
    if arguments[0] == "operators":
        device = "cuda" if os.environ.get("SPATIALFLOW_BACKEND") == "cuda" else "cpu"
        print(f"{run_operators(device)} calls of operators on {device}")
    else:
        run_planted(arguments[0].removeprefix("planted-"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
