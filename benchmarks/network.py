# SPDX-License-Identifier: Apache-2.0
"""Network and heads of the R50 model at 800x1344, 100 RoIs in the thing head: arranged for inference, against the same
model from plain PyTorch modules."""

import copy
from functools import cache, partial

import torch
from harness import Benchmark, Problem, main

from spatialflow import build_model
from spatialflow.models.optimize import optimize_for_inference


@cache
def network(kind: str):
    """The same weights as plain modules ("plain", "channels-last", "float64") or arranged for inference."""
    if kind == "plain":
        torch.manual_seed(0)
        model = build_model("spatialflow_r50_coco").eval()
        for module in model.modules():  # an untrained residual network without statistics overflows
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(4.0)
        return model
    plain = network("plain")
    if kind == "optimized":
        return optimize_for_inference(plain)
    if kind == "float64":
        return copy.deepcopy(plain).double()
    return copy.deepcopy(plain).to(memory_format=torch.channels_last)


@torch.inference_mode()
def run(kind: str, image: torch.Tensor, rois: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    model = network(kind)
    if kind == "channels-last":
        image = image.contiguous(memory_format=torch.channels_last)
    output, stuff_logits = model.dense(image)
    mask_logits = model.thing_head(model.roi_features(output.thing_features, rois), labels)
    return [*output.class_logits, *output.box_deltas, stuff_logits, mask_logits]


def setup(height: int, width: int, num_rois: int = 100) -> Problem:
    corners = torch.rand(num_rois, 2) * torch.tensor([width * 0.75, height * 0.6])
    sizes = torch.rand(num_rois, 2) * 300 + 10
    rois = torch.cat([torch.zeros(num_rois, 1), corners, corners + sizes], dim=1)
    return Problem(inputs=(torch.randn(1, 3, height, width), rois, torch.randint(80, (num_rois,))))


BENCHMARK = Benchmark(
    name="network",
    title="R50 network and heads, 800x1344, 100 RoIs, float32",
    setup=setup,
    sweep={"800x1344": {"height": 800, "width": 1344}},
    providers={
        "spatialflow": partial(run, "optimized"),
        "plain modules": partial(run, "plain"),
        "plain modules, channels-last": partial(run, "channels-last"),
    },
    oracle=partial(run, "float64"),
)

if __name__ == "__main__":
    main(BENCHMARK)
