# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives: torch.func's transforms inside one another, against the plain-PyTorch references.

torch's own autograd.Function gives wrong numbers for forward mode within forward mode, without a word: its `jvp` runs
with forward mode off, so that tangents of the outer transform are lost in it.
"""

import pytest
import torch
from torch.func import grad, jvp

from spatialflow import ops
from spatialflow.ops import reference

BOXES = torch.tensor([[0, 0.3, 0.2, 3, 3.1], [0, 1, 0.5, 2.2, 3.7]], dtype=torch.float64)
OFFSET = torch.linspace(0.2, 0.6, 288, dtype=torch.float64).reshape(1, 18, 4, 4)
WEIGHT = torch.linspace(-1, 1, 54, dtype=torch.float64).reshape(3, 2, 3, 3)
LABELS = torch.tensor([[[0, 3, 4, -1], [1, 2, 3, 4]]])

# Functions of one tensor (1, 2, 4, 4) in which every differentiable argument depends on it.
FUNCTIONS = {
    "roi_align": lambda op, x: op(x * x, BOXES, 2),
    "flow_conv2d": lambda op, x: op(x, x * 2, WEIGHT * x.sum(), relu=False),
    "deform_conv2d": lambda op, x: op(
        x, OFFSET, WEIGHT * x.sum(), padding=1, mask=x.sum() * torch.ones(1, 9, 4, 4, dtype=torch.float64)
    ),
    "group_norm_relu": lambda op, x: op(x, 2, x.sum((0, 2, 3)), -x.mean((0, 2, 3)), upsample=True),
    "sigmoid_focal_loss": lambda op, x: op(x, LABELS),
}


def forward(function):
    return lambda x: jvp(function, (x,), (torch.linspace(-1, 2, 32, dtype=torch.float64).reshape(1, 2, 4, 4),))[1]


def reverse(function):
    return grad(lambda x: function(x).square().sum())


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize(
    "transforms", [(forward, forward), (forward, reverse), (reverse, forward), (reverse, reverse)],
    ids=lambda transforms: " of ".join(t.__name__ for t in transforms),
)  # fmt: skip
def test_nested_transforms(op, transforms):
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)

    def derivative(kernel):
        outer, inner = transforms
        return outer(inner(lambda x: FUNCTIONS[op](kernel, x)))(x)

    expected = derivative(getattr(reference, op))
    assert expected.any()
    torch.testing.assert_close(derivative(getattr(ops, op)), expected)


def test_no_grad_within_a_transform():
    """What is computed under no_grad is a constant to the transform inside which that is."""
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)

    def constant(x):
        with torch.no_grad():
            return ops.roi_align(x, BOXES, 2).sum()

    assert not grad(lambda x: x.sum() * 0 + constant(x))(x).any()
    assert not torch.autograd.grad(x.requires_grad_().sum() * 0 + constant(x), x)[0].any()
