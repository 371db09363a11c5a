# SPDX-License-Identifier: Apache-2.0
"""Random boxes and oracles shared by the tests of the NMS operators."""

import numpy as np
import torch
from torch import Tensor


def random_boxes(count: int, extent: float = 200.0, size: float = 60.0, offset: float = 0.0) -> Tensor:
    """(count, 4) float64, mostly small boxes with a few large ones."""
    corner = torch.rand(count, 2, dtype=torch.float64) * extent + offset
    return torch.cat([corner, corner + torch.rand(count, 2, dtype=torch.float64) ** 2 * size], dim=1)


def iou_matrix(boxes: np.ndarray) -> np.ndarray:
    """(N, N), for float64 boxes that are neither reversed nor infinite; 0 for pairs of empty boxes."""
    size = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    inter = size.clip(min=0).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    union = area[:, None] + area[None, :] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def oracle(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS class by class over a matrix of IoUs in float64; another program than kernel and reference.

    In NumPy, wherever the boxes are: its loop would wait for a GPU at every box.
    """
    own_boxes, labels = boxes.double().cpu().numpy(), idxs.cpu().numpy()
    ranks = np.argsort(-scores.double().cpu().numpy(), kind="stable")  # equal scores rank by row
    kept = np.zeros(len(ranks), dtype=bool)
    for one in np.unique(labels):
        rows = ranks[labels[ranks] == one]
        overlaps = iou_matrix(own_boxes[rows]) > iou_threshold
        alive = np.ones(len(rows), dtype=bool)
        for i in range(len(rows)):
            if alive[i]:
                alive[i + 1 :] &= ~overlaps[i, i + 1 :]
        kept[rows[alive]] = True
    return torch.from_numpy(ranks[kept[ranks]]).to(boxes.device)
