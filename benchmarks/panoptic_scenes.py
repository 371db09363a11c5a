# SPDX-License-Identifier: Apache-2.0
"""Synthetic panoptic inputs with the statistics of real ones: smooth regions, elliptic things, about 20 segments."""

import torch

HEIGHT, WIDTH = 480, 640  # the usual size of a COCO image


def stuff_map(labels: int, height: int = HEIGHT, width: int = WIDTH, grid: tuple[int, int] = (15, 20)) -> torch.Tensor:
    """Generate (H, W) int64 labels in smooth regions; a finer grid gives smaller regions."""
    coarse = torch.randn(1, labels, *grid)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].argmax(0)


def ellipses(count: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate (K, H, W) bool masks, each a few percent of the image, and their (K, 4) boxes."""
    size = torch.tensor([height, width])
    center = torch.rand(count, 2) * size
    radius = (torch.rand(count, 2) * 0.16 + 0.02) * size
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    masks = torch.stack([(((grid - c) / r) ** 2).sum(-1) < 1 for c, r in zip(center, radius)])
    return masks, torch.cat([(center - radius).flip(1), (center + radius).flip(1)], dim=1)


def id_map(segments: int = 8, things: int = 12) -> torch.Tensor:
    """Generate (H, W) int32 ids as in COCO: up to 24 bits, unsorted, 0 for void pixels, about 20 segments per image."""
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, 1 << 24, (segments + things,))])
    result = ids[stuff_map(segments, grid=(6, 8))]
    for index, mask in enumerate(ellipses(things)[0]):
        result[mask] = ids[segments + index]
    return result.int()
