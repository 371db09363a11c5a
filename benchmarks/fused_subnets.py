# SPDX-License-Identifier: Apache-2.0
"""fused_subnets, the four sub-networks of the paper's model: P3..P7 of an 800x1344 image, 256 channels.

Forward only: with gradients fused_subnets consists of calls of flow_conv2d, which has a separate benchmark.
"""

from functools import partial

import torch
from harness import Benchmark, Problem, Provider, compiled, main, with_conv_precision

from spatialflow import ops
from spatialflow.ops import reference

SIZES = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # P3..P7
STAGES = {
    "cls": 4,
    "reg": 4,
    "stuff": 4,
    "thing": 1,
    "flow_cls": 4,
    "flow_stuff": 4,
    "flow_thing": 1,
    "semantic_flow": 1,
}
ALL_LEVELS = ("cls", "reg", "flow_cls")


def setup(stages: dict[str, int], channels: int = 256) -> Problem:
    def conv() -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.randn(channels, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        return weight.contiguous(memory_format=torch.channels_last), torch.randn(channels) * 0.1

    levels = [torch.randn(1, channels, *size).contiguous(memory_format=torch.channels_last) for size in SIZES]
    parameters = ops.SubnetParameters(**{name: tuple(conv() for _ in range(n)) for name, n in stages.items()})
    pixels = [height * width for height, width in SIZES]
    convolved = sum(sum(pixels if name in ALL_LEVELS else pixels[:3]) * n for name, n in stages.items())
    return Problem(
        inputs=(levels, parameters),
        features=(0, 1),
        operations=2 * 9 * channels**2 * convolved,  # of the direct form; Winograd needs about a quarter
    )


def packed(algorithm, levels, parameters):
    """Return the arguments with packed weights; packing is not timed."""
    return levels, ops.pack_subnets(parameters, algorithm)


BENCHMARK = Benchmark(
    name="fused_subnets",
    title="four sub-networks and flows, P3..P7 of 800x1344, 256 channels, channels-last",
    setup=setup,
    sweep={
        "R50, COCO": {"stages": STAGES},
        "RetinaNet, no flows": {"stages": {"cls": 4, "reg": 4}},
    },
    providers={
        "spatialflow": with_conv_precision("ieee", Provider(ops.fused_subnets, partial(packed, "auto"))),
        "spatialflow direct": Provider(ops.fused_subnets, partial(packed, "direct")),
        "reference": with_conv_precision(
            "ieee", reference.fused_subnets
        ),  # eager; the CPU uses oneDNN, CUDA uses cuDNN
        "reference, torch.compile": with_conv_precision("ieee", compiled(reference.fused_subnets)),
        "spatialflow TF32": with_conv_precision(
            "tf32", Provider(ops.fused_subnets, partial(packed, "auto"))
        ),  # other dtypes: as "spatialflow"
        "reference TF32": with_conv_precision("tf32", reference.fused_subnets),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
