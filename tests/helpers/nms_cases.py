# SPDX-License-Identifier: Apache-2.0
"""Random boxes, samples and a NumPy implementation that the tests of the NMS operators share."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from helpers.op_matrix import OpSample
from spatialflow import ops
from spatialflow.ops import reference


def random_boxes(count: int, extent: float = 200.0, size: float = 60.0, offset: float = 0.0) -> Tensor:
    """Generate (count, 4) float64 boxes, most of them small and a few large."""
    corner = torch.rand(count, 2, dtype=torch.float64) * extent + offset
    return torch.cat([corner, corner + torch.rand(count, 2, dtype=torch.float64) ** 2 * size], dim=1)


def nms_sample(name: str, tensors: Callable[..., list], options: dict, raw: Callable) -> OpSample:
    """Return the sample of an NMS operator whose first two tensors are boxes and scores; `tensors` takes a size."""
    return OpSample(
        op=getattr(ops, name),
        reference=getattr(reference, name),
        tensors=tensors(),
        options=options,
        differentiable=(),
        converted=(0, 1),
        raw=raw,
        images=(),
        resized=tensors,
    )


def iou_matrix(boxes: np.ndarray) -> np.ndarray:
    """Return the (N, N) IoUs of finite float64 boxes that are not reversed; 0 for pairs of empty boxes."""
    size = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    inter = size.clip(min=0).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    union = area[:, None] + area[None, :] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def oracle(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS per class over a matrix of float64 IoUs, independent of the kernel and of the reference.

    It runs in NumPy because a loop over CUDA tensors would synchronize at every box.
    """
    corners, labels = boxes.double().cpu().numpy(), idxs.cpu().numpy()
    ranks = np.argsort(-scores.double().cpu().numpy(), kind="stable")  # equal scores are ordered by row
    kept = np.zeros(len(ranks), dtype=bool)
    for label in np.unique(labels):
        rows = ranks[labels[ranks] == label]
        overlaps = iou_matrix(corners[rows]) > iou_threshold
        selected = np.ones(len(rows), dtype=bool)
        for i in range(len(rows)):
            if selected[i]:
                selected[i + 1 :] &= ~overlaps[i, i + 1 :]
        kept[rows[selected]] = True
    return torch.from_numpy(ranks[kept[ranks]]).to(boxes.device)
