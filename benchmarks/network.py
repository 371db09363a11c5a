# SPDX-License-Identifier: Apache-2.0
"""Network and heads of the R50 model at 800x1344, with 100 RoIs in the thing head.

The model optimized for inference is compared with the same model of plain PyTorch modules, in the same dtype and on the
same device.
"""

import copy
from functools import cache, partial

import torch
from harness import Benchmark, Problem, Provider, main
from untrained import settle_norms

from spatialflow import build_model
from spatialflow.models.optimized.inference import optimize_for_inference


@cache
def plain_network():
    torch.manual_seed(0)
    model = build_model("spatialflow_r50_coco").eval()
    settle_norms(model.backbone, torch.randn(1, 3, 224, 224))
    return model


@cache
def network(kind: str, device: torch.device, dtype: torch.dtype):
    """Return the model as plain modules ("plain", "channels-last") or optimized for inference ("optimized")."""
    if kind == "optimized":
        return optimize_for_inference(plain_network(), device, dtype)
    layout = torch.channels_last if kind == "channels-last" else torch.preserve_format
    return copy.deepcopy(plain_network()).to(device, dtype).to(memory_format=layout)


def compute(model, layout: torch.memory_format, image: torch.Tensor, rois: torch.Tensor, labels: torch.Tensor) -> list:
    output = model(image.to(memory_format=layout))
    mask_logits = model.thing_head(model.roi_features(output.thing_features, rois), labels)
    return [*output.class_logits, *output.box_deltas, output.stuff_logits, mask_logits]


@torch.inference_mode()
def run(kind: str, image: torch.Tensor, rois: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    layout = torch.channels_last if kind == "channels-last" else torch.preserve_format
    return compute(network(kind, image.device, image.dtype), layout, image, rois, labels)


@torch.inference_mode()
def run_compiled(call, *inputs) -> list[torch.Tensor]:
    return call(*inputs)


@torch.inference_mode()
def compile_network(image: torch.Tensor, rois: torch.Tensor, labels: torch.Tensor) -> tuple:
    """Compile plain channels-last modules with torch.compile, with CUDA graphs and its search for the fastest kernels.

    The model is created once, here; the compiled function refers to it.
    """
    model = network("channels-last", image.device, image.dtype)
    call = partial(compute, model, torch.channels_last)
    return torch.compile(call, mode="max-autotune", dynamic=False), image, rois, labels


def setup(height: int, width: int, num_rois: int = 100) -> Problem:
    corners = torch.rand(num_rois, 2) * torch.tensor([width * 0.75, height * 0.6])
    sizes = torch.rand(num_rois, 2) * 300 + 10
    rois = torch.cat([torch.zeros(num_rois, 1), corners, corners + sizes], dim=1)
    inputs = (torch.randn(1, 3, height, width), rois, torch.randint(80, (num_rois,)))
    return Problem(inputs=inputs, features=(0,))


BENCHMARK = Benchmark(
    name="network",
    title="R50 network and heads, 800x1344, 100 RoIs",
    setup=setup,
    sweep={"800x1344": {"height": 800, "width": 1344}},
    providers={
        "spatialflow": partial(run, "optimized"),
        "plain modules": partial(run, "plain"),
        "plain modules, channels-last": partial(run, "channels-last"),
        "torch.compile": Provider(run_compiled, compile_network, only_cuda=True, waits=True),
    },
    oracle=partial(run, "plain"),
    rounding=3.0,  # some seventy layers round one after the other
)

if __name__ == "__main__":
    main(BENCHMARK)
