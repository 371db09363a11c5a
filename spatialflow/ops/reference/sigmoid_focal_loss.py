# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.sigmoid_focal_loss` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25, reduction: str = "none"
) -> Tensor:
    """Compute `spatialflow.ops.sigmoid_focal_loss` with a one-hot target."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    classes = logits.shape[-1]
    ignored = ((labels < 0) | (labels > classes))[..., None]  # (..., 1)
    target = labels[..., None] == torch.arange(classes, device=labels.device)  # (..., C)
    x = logits.to(real).masked_fill(ignored, 0)
    wrong = torch.where(target, -x, x)  # (..., C); its sigmoid is the probability of the wrong answer
    weight = x.new_full(x.shape, 1 - alpha).masked_fill(target, alpha) if alpha >= 0 else 1.0
    # sigmoid(wrong) ** gamma by its logarithm: a sigmoid near 1 has too few digits for a large gamma.
    modulation = torch.exp(gamma * F.logsigmoid(wrong)) if gamma > 0 else 1.0
    loss = weight * modulation * -F.logsigmoid(-wrong)
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss.to(logits.dtype)
    return loss.mean() if reduction == "mean" else loss.sum()
