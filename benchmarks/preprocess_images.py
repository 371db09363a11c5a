# SPDX-License-Identifier: Apache-2.0
"""preprocess_images at the start of the network: a photograph of 480 x 640, resized and padded for the network."""

import numpy as np
import torch
from harness import Benchmark, Problem, main

from spatialflow import ops
from spatialflow.data.transforms import normalize, pad, resize_image
from spatialflow.ops import reference


def setup(size: tuple[int, int]) -> Problem:
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = torch.from_numpy(resize_image(coarse, (480, 640)))
    padded = [-(-side // 32) * 32 for side in size]
    return Problem(
        inputs=(image, size, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        bytes=image.numel() + 3 * 4 * padded[0] * padded[1],  # the photograph is read and the batch is written
    )


def opencv_steps(image, size, mean, std):
    """Resize, normalize, convert to planes and pad, step by step, as training does."""
    return torch.from_numpy(pad(normalize(resize_image(image.cpu().numpy(), size), mean, std), 32))[None]


BENCHMARK = Benchmark(
    name="preprocess_images",
    title="a photograph of 480 x 640, float32",
    setup=setup,
    sweep={"to 800x1067": {"size": (800, 1067)}, "to 240x320": {"size": (240, 320)}},
    providers={
        "spatialflow": ops.preprocess_images,
        "reference": reference.preprocess_images,
        "opencv + numpy": opencv_steps,
    },
    tolerance=0,
)

if __name__ == "__main__":
    main(BENCHMARK)
