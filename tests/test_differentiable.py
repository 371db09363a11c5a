# SPDX-License-Identifier: Apache-2.0
"""Nested transforms of torch.func, compared with the reference implementations.

torch.autograd.Function gives wrong results for forward mode within forward mode, without an error. Its `jvp` runs with
forward mode disabled, so tangents of the outer transform are lost.
"""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from spatialflow import ops
from spatialflow.ops import reference

BOXES = torch.tensor([[0, 0.3, 0.2, 3, 3.1], [0, 1, 0.5, 2.2, 3.7]], dtype=torch.float64)
OFFSET = torch.linspace(0.2, 0.6, 288, dtype=torch.float64).reshape(1, 18, 4, 4)
WEIGHT = torch.linspace(-1, 1, 54, dtype=torch.float64).reshape(3, 2, 3, 3)
LABELS = torch.tensor([[[0, 3, 4, -1], [1, 2, 3, 4]]])

# Functions of a tensor (1, 2, 4, 4) on which every differentiable argument except OFFSET depends.
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
    "transforms",
    [(forward, forward), (forward, reverse), (reverse, forward), (reverse, reverse)],
    ids=lambda transforms: " of ".join(t.__name__ for t in transforms),
)
def test_nested_transforms(op, transforms):
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)

    def derivative(kernel):
        outer, inner = transforms
        return outer(inner(lambda x: FUNCTIONS[op](kernel, x)))(x)

    expected = derivative(getattr(reference, op))
    assert expected.any()
    torch.testing.assert_close(derivative(getattr(ops, op)), expected)


def test_no_grad_within_a_transform():
    """A result computed under no_grad is a constant for the surrounding transform."""
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)

    def constant(x):
        with torch.no_grad():
            return ops.roi_align(x, BOXES, 2).sum()

    assert not grad(lambda x: x.sum() * 0 + constant(x))(x).any()
    assert not torch.autograd.grad(x.requires_grad_().sum() * 0 + constant(x), x)[0].any()


# Calls without gradients, which bypass autograd; `test_recorded` of `OpMatrix` tests that modes record them.
CALLS = {
    "roi_align": lambda x: ops.roi_align(x, BOXES, 2),
    "flow_conv2d": lambda x: ops.flow_conv2d([x], None, WEIGHT)[0],
    "deform_conv2d": lambda x: ops.deform_conv2d(x, OFFSET, WEIGHT, padding=1),
    "sigmoid_focal_loss": lambda x: ops.sigmoid_focal_loss(x, LABELS),
    "stuff_labels": lambda x: ops.stuff_labels(x[0], (16, 16), (16, 16)),
}


@pytest.mark.parametrize("by", ["mode", "subclass"])
def test_an_override_may_compute_with_gradients(by):
    """Autograd records what an override computes, although the inputs of the operator need no gradient."""
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def scaled(func, args, kwargs):
        result = func(*args, **(kwargs or {}))
        return result * factor if func is torch.ops.spatialflow.roi_align.default else result

    class Scaling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return scaled(func, args, kwargs)

    class Scaled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return scaled(func, args, kwargs)

    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    with Scaling() if by == "mode" else contextlib.nullcontext():
        result = ops.roi_align(x if by == "mode" else x.as_subclass(Scaled), BOXES, 2)
    (gradient,) = torch.autograd.grad(result.sum(), factor)
    torch.testing.assert_close(gradient, ops.roi_align(x, BOXES, 2).sum())


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_constant_of_the_inner_transform(op):
    """A tensor that is constant for the inner transform still has a gradient in the outer one."""
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)

    def value(kernel, x):
        def inner(y):
            return FUNCTIONS[op](kernel, x * y.detach()).square().sum() + y

        return torch.func.grad_and_value(inner)(torch.tensor(2.0, dtype=torch.float64))[1]

    expected = grad(lambda x: value(getattr(reference, op), x))(x)
    assert expected.any()
    torch.testing.assert_close(grad(lambda x: value(getattr(ops, op), x))(x), expected)


def test_dual_numbers_of_forward_mode():
    """Tangents of dual numbers are kept, although the inputs do not require a gradient."""
    x, tangent = torch.rand(2, 1, 2, 4, 4, dtype=torch.float64)
    packed = ops.pack_conv3x3(WEIGHT)
    for call in (CALLS["roi_align"], CALLS["flow_conv2d"], lambda x: ops.flow_conv2d(x, None, packed)):
        with torch.no_grad(), forward_ad.dual_level():
            result = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(result, jvp(call, (x,), (tangent,))[1])


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "functionalize"])
def test_operators_without_gradient_in_transforms(transform):
    """Results are constants for derivatives, and the same values under `vmap` and `functionalize`."""
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [4.0, 4.0, 5.0, 5.0]])
    scores = torch.tensor([0.5, 0.9, 0.1])

    def areas(boxes):
        detections = ops.multiclass_nms(boxes, scores[:, None], 0.05, 0.5, 3)
        return detections.boxes.sum() + 0 * boxes.sum() + ops.paste_masks(torch.ones(3, 2, 2), boxes, (5, 5)).sum()

    expected = areas(boxes)
    if transform == "grad":
        assert not torch.func.grad(areas)(boxes).any()
        assert not torch.autograd.grad(areas(boxes.requires_grad_()), boxes)[0].any()
    elif transform == "jvp":
        value, tangent = jvp(areas, (boxes,), (torch.ones_like(boxes),))
        assert value == expected and not tangent.any()
    elif transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(areas)(boxes[None]), expected[None])
    else:
        assert torch.func.functionalize(areas)(boxes) == expected


@pytest.mark.parametrize("op", CALLS)
def test_export(op):
    """The graph of torch.export contains only the operator, once."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return CALLS[op](x)

    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    for strict in (False, True):
        program = torch.export.export(Module(), (x,), strict=strict)
        calls = [node.target for node in program.graph.nodes if "spatialflow" in str(node.target)]
        assert calls == [getattr(torch.ops.spatialflow, op).default]
        assert torch.equal(program.module()(x), CALLS[op](x))


@pytest.mark.parametrize("op", CALLS)
def test_traced_by_make_fx(op):
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    for options in ({}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}):
        graph = make_fx(CALLS[op], _allow_non_fake_inputs=True, **options)(x).graph
        calls = [node.target for node in graph.nodes if "spatialflow" in str(node.target)]
        assert calls == [getattr(torch.ops.spatialflow, op).default], options
