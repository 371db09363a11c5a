# SPDX-License-Identifier: Apache-2.0
"""Perturbed boxes and numeric gradients, to compare operators with the brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def perturbed_boxes(boxes: Tensor, amount: float = 1e-6) -> list[Tensor]:
    """Return the boxes in float64 and four copies perturbed by about a rounding error of float32.

    The copies are shifted toward larger x and y, shifted toward smaller x and y, enlarged, and shrunk.

    RoIAlign is discontinuous where a sample crosses the border, a bin gets one more sample, or a RoI changes its level.
    There, a value of the operator is correct if it equals the value for one of these boxes.

    Args:
        boxes: (K, 5) of batch index and corners, or (K, 4).
        amount: size of the perturbation, relative to the largest coordinate of each box, or to 1 if that is larger.
    """
    boxes64 = boxes.detach().double().cpu()
    corners = boxes64[:, -4:]
    step = amount * corners.abs().amax(dim=1, keepdim=True).clamp(min=1)
    moved = []
    for first, second in ((0, 0), (1, 1), (-1, -1), (-1, 1), (1, -1)):
        signs = torch.tensor([first, first, second, second], dtype=torch.float64, device="cpu")
        moved.append(torch.cat((boxes64[:, :-4], torch.where(step.isfinite(), corners + signs * step, corners)), dim=1))
    return moved


def numeric_gradient(function: Callable[[Tensor], float], tensor: Tensor, step: float = 1e-5) -> np.ndarray:
    """Compute the gradient of a number with respect to `tensor`, by central differences in float64.

    Args:
        function: takes a float64 tensor of the shape of `tensor` and returns a number.
        tensor: argument of the gradient; the function is smooth within `step` of it.
        step: half of the distance between the two points of each difference.
    """
    point = tensor.detach().double().cpu().contiguous().clone()
    gradient = np.zeros(tuple(point.shape))
    for index in np.ndindex(*point.shape):
        value = float(point[index])
        point[index] = value + step
        above = float(function(point))
        point[index] = value - step
        below = float(function(point))
        point[index] = value
        gradient[index] = (above - below) / (2 * step)
    return gradient
