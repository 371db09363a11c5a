# SPDX-License-Identifier: Apache-2.0
"""panoptic_quality_counts: the table of shared pixels of two 640x480 id maps with small consecutive ids."""

import torch
from harness import Benchmark, Problem, main
from panoptic_scenes import HEIGHT, WIDTH, id_map

from spatialflow import ops
from spatialflow.ops import reference


def setup(shift: int) -> Problem:
    _, truth = torch.unique(id_map(), return_inverse=True)
    truth = truth.int()
    prediction = torch.roll(truth, (shift, -shift), dims=(0, 1))
    segments = int(truth.max())
    return Problem(inputs=(truth, prediction, segments, segments), bytes=2 * 4 * truth.numel())


BENCHMARK = Benchmark(
    name="panoptic_quality_counts",
    title=f"table of two {WIDTH}x{HEIGHT} id maps with 20 segments",
    setup=setup,
    sweep={"shifted": {"shift": 4}, "equal maps": {"shift": 0}},
    providers={
        "spatialflow": ops.panoptic_quality_counts,
        "reference": reference.panoptic_quality_counts,  # torch.bincount of combined ids
    },
    tolerance=0,
)

if __name__ == "__main__":
    main(BENCHMARK)
