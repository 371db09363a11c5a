# SPDX-License-Identifier: Apache-2.0
"""Statements of docs/migration.md about torchvision hold for the installed torchvision."""

import inspect

import pytest
import torch
from torch.nn.functional import one_hot

from spatialflow import ops

vision = pytest.importorskip("torchvision", reason="`make test-migration` installs the torchvision for this torch").ops


def boxes_in(count: int, side: float) -> torch.Tensor:
    corners = torch.rand(count, 2) * side * 0.7
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * side * 0.3], dim=1)


@pytest.mark.parametrize("name", ["roi_align", "nms", "batched_nms", "deform_conv2d"])
def test_same_arguments_in_the_same_order(name):
    """Calls of torchvision's function work unchanged; options that only this package has come last."""
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(getattr(home, name)).parameters.values()]
        for home in (ops, vision)
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", ["RoIAlign", "DeformConv2d"])
def test_same_modules(name):
    ours, theirs = (inspect.signature(getattr(home, name).__init__).parameters for home in (ops, vision))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align(aligned):
    features, boxes = torch.rand(2, 3, 20, 30), [boxes_in(4, 150), boxes_in(3, 150)]
    settings = (7, 1 / 8, -1, aligned)
    torch.testing.assert_close(ops.roi_align(features, boxes, *settings), vision.roi_align(features, boxes, *settings))


def test_deform_conv2d():
    features, weight, bias = torch.rand(2, 4, 9, 11), torch.rand(6, 4, 3, 3), torch.rand(6)
    offset, mask = torch.randn(2, 18, 9, 11), torch.rand(2, 9, 9, 11)
    ours, theirs = (f(features, offset, weight, bias, 1, 1, 1, mask) for f in (ops.deform_conv2d, vision.deform_conv2d))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert {k: v.shape for k, v in ops.DeformConv2d(4, 6, 3).state_dict().items()} == {
        k: v.shape for k, v in vision.DeformConv2d(4, 6, 3).state_dict().items()
    }


class TestNms:
    def test_same_rows(self):
        boxes, scores, classes = boxes_in(300, 100), torch.rand(300), torch.randint(0, 5, (300,))
        assert torch.equal(ops.nms(boxes, scores, 0.4), vision.nms(boxes, scores, 0.4))
        args = (boxes, scores, classes, 0.4)
        assert torch.equal(ops.batched_nms(*args), vision.batched_nms(*args))

    def test_negative_coordinates(self):
        """Torchvision's shift by class assumes coordinates >= 0; these boxes of two classes coincide after it."""
        boxes = torch.tensor([[0.0, 0, 10, 10], [-11, -11, -1, -1]])
        args = (boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.4)
        assert ops.batched_nms(*args).tolist() == [0, 1] and vision.batched_nms(*args).tolist() == [0]

    def test_nan_scores(self):
        boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]), torch.tensor([float("nan"), 0.5])
        assert ops.nms(boxes, scores, 0.4).tolist() == [1] and vision.nms(boxes, scores, 0.4).tolist() == [0]


def test_sigmoid_focal_loss():
    """The operator takes class indices (C is background) instead of one-hot rows, and gamma before alpha."""
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 4, 2, 4, 1])
    targets = one_hot(labels, 5)[:, :4].float()
    ours = ops.sigmoid_focal_loss(logits, labels, 1.5, 0.3)
    torch.testing.assert_close(ours, vision.sigmoid_focal_loss(logits, targets, 0.3, 1.5))


@pytest.mark.parametrize("first", [2, 3])
def test_multiscale_roi_align(first):
    """`finest_scale` is torchvision's canonical_scale / 2 ** (canonical_level - log2(strides[0]))."""
    strides = [2**level for level in range(first, first + 3)]
    features = [torch.rand(1, 2, 256 // stride, 256 // stride) for stride in strides]
    boxes = [torch.cat([boxes_in(8, side) for side in (30, 120, 250)])]
    names = [str(stride) for stride in strides]
    theirs = vision.MultiScaleRoIAlign(names, 7, 2)(dict(zip(names, features)), boxes, [(256, 256)])
    ours = ops.multilevel_roi_align(features, boxes, 7, strides, 2, aligned=False, finest_scale=224 / 2 ** (4 - first))
    torch.testing.assert_close(ours, theirs)


def test_paste_masks():
    """The IoU of the two results is above 0.8, but they are not equal.

    The operator takes logits, not probabilities. It does not enlarge and truncate the boxes, as torchvision does.
    """
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    logits, boxes = torch.randn(3, 28, 28).add_(3), boxes_in(3, 100) * torch.tensor([1.0, 1, 1.3, 1.3])
    ours = ops.paste_masks(logits, boxes, (140, 150))
    theirs = paste_masks_in_image(logits.sigmoid()[:, None], boxes, (140, 150))[:, 0] >= 0.5
    assert ours.shape == theirs.shape and ours.dtype == torch.bool
    assert (ours & theirs).sum() > 0.8 * (ours | theirs).sum() and not torch.equal(ours, theirs)
