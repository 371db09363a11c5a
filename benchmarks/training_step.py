# SPDX-License-Identifier: Apache-2.0
"""Training step of the R50 model with two images of 480x640: forward, losses, backward, SGD.

The references are the same network from plain PyTorch modules: contiguous, channels-last, and channels-last through
torch.compile. All share the criterion with its operators (targets, focal loss, RoIAlign), so they differ in the network
alone. In 16 bits all run under autocast. `--peak-memory` prints the peak host memory of three steps on the CPU, in one
process per provider, without torch.compile.
"""

import copy
import resource
import subprocess
import sys
from functools import cache, partial

import torch
from harness import Benchmark, Problem, Provider, main
from untrained import settle_norms

from spatialflow import build_model
from spatialflow.models.optimized.training import optimize_for_training
from spatialflow.models.training_step import TrainingStep
from spatialflow.structures import GroundTruth

COMPARED = tuple(
    f"{module}.weight"
    for module in (
        "backbone.layer2.0.conv2",
        "fpn.output.0",
        "subnets.reg.0",
        "thing_head.convs.0",
        "stuff_head.logits",
    )
)
"""Parameters whose gradients are compared with those of the oracle."""


@cache
def training(kind: str, device: torch.device):
    """Return the model, the network that computes its step, and the optimizer."""
    torch.manual_seed(0)
    model = build_model("spatialflow_r50_coco").train()
    settle_norms(model.backbone, torch.randn(2, 3, 224, 224))
    if kind == "float64":
        model.double()
    model.to(device)
    if kind in ("channels-last", "compiled"):
        model.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    network = optimize_for_training(model) if kind == "spatialflow" else model
    if kind == "compiled":
        network = copy.copy(model)
        network.forward = torch.compile(model.forward, dynamic=False)
    # The learning rate is so low that all steps give nearly the same losses and gradients.
    optimizer = torch.optim.SGD(trained, 1e-7, 0.9, weight_decay=1e-4)
    return model, network, optimizer


def step(kind: str, images: torch.Tensor, truth: GroundTruth) -> list[torch.Tensor]:
    model, network, optimizer = training(kind, images.device)
    if kind != "plain":
        images = images.contiguous(memory_format=torch.channels_last)
    is_16_bit = images.dtype in (torch.bfloat16, torch.float16)
    with torch.enable_grad():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, images.dtype if is_16_bit else None, enabled=is_16_bit):
            losses = TrainingStep(network, model.config)(images.float() if is_16_bit else images, truth)
        losses.total().backward()
        optimizer.step()
    gradients = [model.get_parameter(name).grad for name in COMPARED]
    return [torch.stack(losses).detach(), *gradients]


def setup(height: int, width: int, batch: int = 2, things: int = 8) -> Problem:
    boxes, masks = [], []
    for _ in range(batch):
        corners = torch.rand(things, 2) * torch.tensor([width * 0.6, height * 0.6])
        boxes.append(torch.cat([corners, corners + torch.rand(things, 2) * 180 + 20], dim=1))
        masks.append(torch.zeros(things, height, width, dtype=torch.bool))
        for mask, (x1, y1, x2, y2) in zip(masks[-1], boxes[-1].int().tolist()):
            mask[y1:y2, x1:x2] = True
    size = torch.tensor([[height, width]] * batch)
    labels = list(torch.randint(80, (batch, things)))
    semantic = torch.randint(54, (batch, height, width), dtype=torch.uint8)
    truth = GroundTruth(boxes, labels, masks, semantic, size, size)
    return Problem(inputs=(torch.randn(batch, 3, height, width), truth), features=(0,))


BENCHMARK = Benchmark(
    name="training_step",
    title="R50 training step, 2 images of 480x640",
    setup=setup,
    sweep={"2 x 480x640": {"height": 480, "width": 640}},
    providers={
        "spatialflow": Provider(partial(step, "spatialflow"), waits=True),
        "plain modules": Provider(partial(step, "plain"), waits=True),
        "plain modules, channels-last": Provider(partial(step, "channels-last"), waits=True),
        "torch.compile": Provider(partial(step, "compiled"), only_cuda=True, waits=True),
    },
    oracle=partial(step, "float64"),
    # Some inputs of ReLU are near zero in an untrained network. A rounding error that changes the sign of an input adds
    # or removes a whole term of a gradient. In the first layers, the error of plain modules is 2e-4 to 4e-4 in float32,
    # and 0.4 in bfloat16.
    tolerance=1e-2,
    rounding=20.0,
)


def print_peak_memory(kind: str) -> None:
    """Run three steps and print the largest resident set of this process."""
    torch.manual_seed(0)
    problem = setup(480, 640)
    for _ in range(3):
        step(kind, *problem.inputs)
    print(f"{kind}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--peak-memory"]:
        for kind in ("spatialflow", "plain", "channels-last"):
            subprocess.run([sys.executable, __file__, "--peak-memory", kind], check=True)
    elif sys.argv[1:2] == ["--peak-memory"]:
        print_peak_memory(sys.argv[2])
    else:
        main(BENCHMARK)
