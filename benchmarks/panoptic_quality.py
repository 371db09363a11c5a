# SPDX-License-Identifier: Apache-2.0
"""The counts behind panoptic quality: pixels shared by every pair of segments of two 640x480 id maps."""

import numpy as np
import torch
from harness import Benchmark, Problem, main
from panoptic_scenes import HEIGHT, WIDTH, id_map

from spatialflow.panoptic import encode_ids
from spatialflow.panoptic.pair_counts import count_pairs


def setup(pixels: str, shift: int) -> Problem:
    truth = id_map() if pixels != "noise" else torch.randint(0, 1 << 24, (HEIGHT, WIDTH), dtype=torch.int32)
    prediction = torch.roll(truth, (shift, -shift), dims=(0, 1)) * 7 % (1 << 24)
    maps = [np.ascontiguousarray(ids.numpy(), dtype=np.int32) for ids in (truth, prediction)]
    if pixels == "RGB":
        maps = [encode_ids(ids) for ids in maps]
    return Problem(inputs=tuple(maps), bytes=sum(ids.nbytes for ids in maps))


def ids_of(image):
    """Return the ids of a map as uint64; those of an RGB image as panopticapi computes them."""
    if image.ndim == 2:
        return image.astype(np.uint64)
    image = image.astype(np.uint32)
    return (image[..., 0] + 256 * image[..., 1] + 256 * 256 * image[..., 2]).astype(np.uint64)


def unique_of_combined_ids(truth, prediction):
    keys, counts = np.unique(ids_of(truth) * (1 << 24) + ids_of(prediction), return_counts=True)
    return keys >> 24, keys & 0xFFFFFF, counts


BENCHMARK = Benchmark(
    name="panoptic_quality",
    title=f"pair counts of two {WIDTH}x{HEIGHT} id maps with 20 segments; noise is the worst case, not a realistic one",
    setup=setup,
    sweep={
        "ids": {"pixels": "ids", "shift": 4},
        "ids, equal maps": {"pixels": "ids", "shift": 0},
        "RGB": {"pixels": "RGB", "shift": 4},
        "noise": {"pixels": "noise", "shift": 4},
    },
    providers={"spatialflow": count_pairs, "numpy.unique": unique_of_combined_ids},
    oracle=unique_of_combined_ids,
    tolerance=0,
)

if __name__ == "__main__":
    main(BENCHMARK)
