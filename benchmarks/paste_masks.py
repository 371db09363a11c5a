# SPDX-License-Identifier: Apache-2.0
"""paste_masks at the end of the thing head: 100 detections, 28x28 logits, onto a COCO image."""

import naive_kernels
import torch
from harness import Benchmark, Problem, Provider, main, optional
from panoptic_scenes import ellipses

from spatialflow import ops
from spatialflow.ops import reference

detection = optional("torchvision.models.detection.roi_heads")


def setup(count: int, size: tuple[int, int]) -> Problem:
    logits = torch.nn.functional.interpolate(torch.randn(count, 1, 7, 7) * 6, (28, 28), mode="bicubic")[:, 0]
    return Problem(
        inputs=(logits, ellipses(count, *size)[1]),
        options={"size": size},
        features=(0,),
        fixed_bytes=count * size[0] * size[1],
        bytes=count * (size[0] * size[1] + 4 * 28 * 28),  # every pixel is written and every logit read once
    )


def torchvision_paste(logits, boxes, size):
    """Run torchvision, for its time only: it enlarges and truncates boxes, so its masks differ at the outline."""
    return detection.paste_masks_in_image(logits.sigmoid()[:, None], boxes, size)[:, 0] >= 0.5


BENCHMARK = Benchmark(
    name="paste_masks",
    title="28x28 logits, boxes of a few percent of the image",
    setup=setup,
    sweep={
        "100 masks, 480x640": {"count": 100, "size": (480, 640)},
        "10 masks, 800x1333": {"count": 10, "size": (800, 1333)},
    },
    providers={
        "spatialflow": ops.paste_masks,
        "reference": reference.paste_masks,
        "torchvision": detection and Provider(torchvision_paste, waits=True),
        "CuPy, naive kernel": naive_kernels.provider(naive_kernels.paste_masks, first=torch.sigmoid),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
