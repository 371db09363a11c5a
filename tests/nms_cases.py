# SPDX-License-Identifier: Apache-2.0
"""Random boxes and oracles shared by the tests of the NMS operators."""

import torch
from torch import Tensor


def random_boxes(count: int, extent: float = 200.0, size: float = 60.0, offset: float = 0.0) -> Tensor:
    """(count, 4) float64, mostly small boxes with a few large ones."""
    corner = torch.rand(count, 2, dtype=torch.float64) * extent + offset
    return torch.cat([corner, corner + torch.rand(count, 2, dtype=torch.float64) ** 2 * size], dim=1)


def iou_matrix(boxes: Tensor) -> Tensor:
    """(N, N) in float64, for boxes that are neither reversed nor infinite; 0 for pairs of empty boxes."""
    boxes = boxes.double()
    size = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    inter = size.clamp(min=0).prod(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    union = area[:, None] + area[None, :] - inter
    return torch.where(union > 0, inter / union, 0.0)


def oracle(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS class by class over a matrix of IoUs in float64; another program than kernel and twin.

    It runs on the CPU, wherever the boxes are: its loop would wait for a GPU at every box.
    """
    with torch.device("cpu"):
        return greedy(boxes.cpu(), scores.cpu(), idxs.cpu(), iou_threshold).to(boxes.device)


def greedy(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    kept = []
    for one in idxs.unique():
        rows = (idxs == one).nonzero()[:, 0]
        rows = rows[torch.sort(scores[rows], descending=True, stable=True).indices]
        overlaps = iou_matrix(boxes[rows]) > iou_threshold
        alive = torch.ones(len(rows), dtype=torch.bool)
        for i in range(len(rows)):
            if alive[i]:
                alive[i + 1 :] &= ~overlaps[i, i + 1 :]
        kept.append(rows[alive])
    kept = torch.cat(kept).sort().values  # equal scores rank by row
    return kept[torch.sort(scores[kept], descending=True, stable=True).indices]
