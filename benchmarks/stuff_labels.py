# SPDX-License-Identifier: Apache-2.0
"""stuff_labels at the end of the stuff head: 54 or 12 classes at stride 4, to the photograph's size."""

import torch
from harness import Benchmark, Problem, Provider, compiled, main
from torch.nn import functional as F

from spatialflow import ops
from spatialflow.ops import reference


def setup(classes: int, cells: tuple[int, int], valid: tuple[int, int], original: tuple[int, int]) -> Problem:
    logits = F.interpolate(torch.randn(1, classes, 13, 17), cells, mode="bicubic")
    return Problem(
        inputs=(logits.contiguous(memory_format=torch.channels_last)[0], valid, original),
        features=(0,),
        fixed_bytes=original[0] * original[1],
        bytes=4 * logits.numel() + original[0] * original[1],  # every logit is read once, and every label written
    )


def torch_steps(logits, valid, original):
    """Upsample all logits, take the argmax without the padding, resize with nearest neighbor."""
    enlarged = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=True)[0]
    labels = enlarged[:, : valid[0], : valid[1]].argmax(dim=0)
    rows, columns = (
        (torch.arange(target, dtype=torch.float64, device=logits.device) * (1.0 / (target / source))).long()
        for source, target in zip(valid, original)
    )
    return labels[rows[:, None], columns]


BENCHMARK = Benchmark(
    name="stuff_labels",
    title="channels-last logits at stride 4, to labels of the photograph",
    setup=setup,
    sweep={
        "54 classes, 800x1067 to 480x640": {
            "classes": 54,
            "cells": (200, 272),
            "valid": (800, 1067),
            "original": (480, 640),
        },
        "54 classes, 800x1333": {"classes": 54, "cells": (200, 336), "valid": (800, 1333), "original": (800, 1333)},
        "12 classes, 1024x2048": {"classes": 12, "cells": (256, 512), "valid": (1024, 2048), "original": (1024, 2048)},
    },
    providers={
        "spatialflow": ops.stuff_labels,
        "reference": reference.stuff_labels,
        "torch": torch_steps,
        "torch, contiguous": Provider(torch_steps, lambda logits, *sizes: (logits.contiguous(), *sizes)),
        "torch.compile": compiled(torch_steps),
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
