# SPDX-License-Identifier: Apache-2.0
"""Operators within torch.jit.trace: a trace of one call is right for inputs of other sizes."""

import pytest
import torch

from spatialflow import ops

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)

WEIGHT, BIAS = torch.rand(8, 8, 3, 3) - 0.5, torch.rand(8)
PACKED, PACKED_DEFORM = ops.pack_conv3x3(WEIGHT, BIAS), ops.pack_deform_conv2d(WEIGHT, BIAS)
CONV = ((WEIGHT, BIAS),)
SUBNETS = ops.pack_subnets(ops.SubnetParameters(CONV, CONV, CONV, CONV, flow_cls=CONV, segmentation_levels=1))
ANCHORS, SIZES, FACTORS = torch.tensor([[[-4.0, -4, 4, 4]]]), torch.tensor([[200, 200]]), torch.ones(1, 2)


def maps(count, *size):
    return torch.rand(count, 8, *size)


def boxes(count):
    corners = torch.rand(count, 2) * 20
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * 20], dim=1)


def rois(count, images=2):
    return torch.cat([torch.randint(images, (count, 1)).float(), boxes(count)], dim=1)


def labels(count, classes):
    return torch.randint(classes, (count,))


# By name: the traced function, and a function of three sizes that returns its inputs.
CASES = {
    "roi_align": (
        lambda x, first, second: ops.roi_align(x, [first, second], (3, 2), 0.5, 0, True),
        lambda n, h, w: (maps(2, h, w), boxes(n), boxes(n + 1)),
    ),
    "multilevel_roi_align": (
        lambda x, y, r: ops.multilevel_roi_align([x, y], r, 3, [2, 4], finest_scale=5),
        lambda n, h, w: (maps(2, h, w), maps(2, h // 2, w // 2), rois(n)),
    ),
    "nms": (lambda b, s: ops.nms(b, s, 0.3), lambda n, h, w: (boxes(n), torch.rand(n))),
    "batched_nms, int32": (
        lambda b, s, i: ops.batched_nms(b, s, i, 0.3),
        lambda n, h, w: (boxes(n), torch.rand(n), labels(n, 3).int()),
    ),
    "batched_nms, float": (
        lambda b, s, i: ops.batched_nms(b, s, i, 0.3),
        lambda n, h, w: (boxes(n), torch.rand(n), labels(n, 3) / 2),
    ),
    "multiclass_nms": (
        lambda b, s: tuple(ops.multiclass_nms(b, s, 0.1, 0.3, 5)),
        lambda n, h, w: (boxes(n), torch.rand(n, 3)),
    ),
    "deform_conv2d": (
        lambda x, o, m: ops.deform_conv2d(x, o, WEIGHT, BIAS, 1, "same", 1, m, mask_sigmoid=True, relu=True),
        lambda n, h, w: (maps(n, h, w), torch.randn(n, 18, h, w), torch.randn(n, 9, h, w)),
    ),
    "deform_conv2d, packed": (
        lambda x, o, m: ops.deform_conv2d(x, o, PACKED_DEFORM, padding=1, mask=m, mask_sigmoid=True, relu=True),
        lambda n, h, w: (maps(n, h, w), torch.randn(n, 18, h, w), torch.randn(n, 9, h, w)),
    ),
    "flow_conv2d": (lambda x, f: ops.flow_conv2d(x, f, WEIGHT, BIAS), lambda n, h, w: (maps(n, h, w), maps(n, h, w))),
    "flow_conv2d, levels": (
        lambda x, y: ops.flow_conv2d([x, y], None, PACKED),
        lambda n, h, w: (maps(n, h, w), maps(n, h // 2, w // 2)),
    ),
    "flow_conv2d, several weights": (
        lambda x, y: [level for levels in ops.flow_conv2d([[x, y], [y]], None, [PACKED, PACKED]) for level in levels],
        lambda n, h, w: (maps(n, h, w), maps(n, h // 2, w // 2)),
    ),
    "fused_subnets": (
        lambda x, y: [level for levels in ops.fused_subnets([x, y], SUBNETS) for level in levels],
        lambda n, h, w: (maps(n, h, w), maps(n, h // 2, w // 2)),
    ),
    "group_norm_relu": (
        lambda x: ops.group_norm_relu(x, 2, BIAS, BIAS, upsample=True),
        lambda n, h, w: (maps(n, h, w),),
    ),
    "sigmoid_focal_loss": (
        lambda x, c: ops.sigmoid_focal_loss(x, c, 1.5, 0.3, "mean"),
        lambda n, h, w: (torch.randn(n, w), labels(n, w + 1)),
    ),
    "sigmoid_focal_loss, targets": (
        lambda x, t: ops.sigmoid_focal_loss(x, t, 0.3, 1.5, "mean"),
        lambda n, h, w: (torch.randn(n, w), torch.rand(n, w)),
    ),
    "paste_masks": (
        lambda m, b: ops.paste_masks(m, b, (30, 40)),
        lambda n, h, w: (torch.randn(n, h, w), boxes(n)),
    ),
    "stuff_labels": (lambda x: ops.stuff_labels(x, (8, 8), (30, 40)), lambda n, h, w: (torch.randn(4, h, w),)),
    "panoptic_merge": (
        lambda m, s, c, b, x: tuple(ops.panoptic_merge(m, s, c, b, x, 4, stuff_area_threshold=1)),
        lambda n, h, w: (torch.rand(n, h, w) > 0.5, torch.rand(n), labels(n, 3), boxes(n), torch.randint(4, (h, w))),
    ),
    "panoptic_quality_counts": (
        lambda x, y: ops.panoptic_quality_counts(x, y, 3, 4),
        lambda n, h, w: (torch.randint(4, (h, w)).int(), torch.randint(5, (h, w)).int()),
    ),
    "preprocess_images": (
        lambda x: ops.preprocess_images(x, (16, 24), [1, 2, 3], [1, 1, 1], 8),
        lambda n, h, w: (torch.randint(256, (h, w, 3)).byte(),),
    ),
    "select_candidates": (
        lambda c, d: tuple(ops.select_candidates([c], [d], ANCHORS, (8,), SIZES, FACTORS, 7)),
        lambda n, h, w: (torch.randn(1, 3, h, w), torch.randn(1, 4, h, w)),
    ),
}


def test_every_operator_is_traced():
    functions = {name for name in ops.__all__ if name[0].islower()} - {"checked"}
    assert {name for name in functions if not name.startswith("pack_")} == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_trace_is_right_for_other_sizes(name):
    function, inputs = CASES[name]
    torch.manual_seed(0)
    traced = torch.jit.trace(function, inputs(3, 16, 16))
    for size in ((7, 24, 20), (3, 16, 16), (1, 18, 32), (7, 24, 20)):  # TorchScript optimizes between the first calls
        arguments = inputs(*size)
        torch.testing.assert_close(traced(*arguments), function(*arguments))


def test_a_traced_module_has_gradients():
    module, x = ops.DeformConv2d(4, 6, 3, padding="same"), torch.rand(2, 4, 9, 8, requires_grad=True)
    traced = torch.jit.trace(module, (torch.rand(1, 4, 5, 5), torch.rand(1, 18, 5, 5)))
    offset = torch.randn(2, 18, 9, 8)
    (expected,) = torch.autograd.grad(module(x, offset).square().sum(), x)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(traced(x, offset).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
