# SPDX-License-Identifier: Apache-2.0
"""Forms of arguments that programs for torchvision.ops use, without torchvision."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spatialflow import ops

FEATURES = torch.rand(2, 4, 12, 14)
BOXES = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, 9, 10], [20, 20, 30, 30]])
SCORES = torch.tensor([0.6, 0.9, 0.8, 0.3])


class TestClassesOfBatchedNms:
    @pytest.mark.parametrize(
        "dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float64, torch.float16]
    )
    def test_any_real_dtype(self, dtype):
        classes = torch.tensor([7, 3, 7, 3])
        expected = ops.batched_nms(BOXES, SCORES, classes, 0.5)
        assert expected.tolist() == [1, 2, 3]
        assert torch.equal(ops.batched_nms(BOXES, SCORES, classes.to(dtype), 0.5), expected)

    def test_bool(self):
        classes = torch.tensor([True, False, True, False])
        assert ops.batched_nms(BOXES, SCORES, classes, 0.5).tolist() == [1, 2, 3]

    def test_numbers_that_are_not_whole_are_classes_too(self):
        assert ops.batched_nms(BOXES, SCORES, torch.tensor([0.2, 0.4, 0.2, 0.4]), 0.5).tolist() == [1, 2, 3]
        assert ops.batched_nms(BOXES, SCORES, torch.tensor([0.0, -0.0, 0.0, 1.0]), 0.5).tolist() == [1, 3]

    def test_arrays(self):
        classes = np.array([7, 3, 7, 3], dtype=np.int32)
        assert ops.batched_nms(BOXES.numpy(), SCORES.numpy(), classes, 0.5).tolist() == [1, 2, 3]

    def test_complex_numbers_are_refused(self):
        with pytest.raises(RuntimeError, match="^batched_nms: idxs must be int64, got ComplexFloat"):
            ops.batched_nms(BOXES, SCORES, torch.zeros(4, dtype=torch.complex64), 0.5)


class TestPaddingByName:
    @pytest.mark.parametrize("kernel, dilation", [((3, 3), 1), ((5, 3), (1, 2)), ((2, 1), 2)])
    def test_same_is_that_of_a_convolution(self, kernel, dilation):
        weight = torch.rand(6, 4, *kernel)
        offset = torch.zeros(2, 2 * kernel[0] * kernel[1], 12, 14)
        expected = F.conv2d(FEATURES, weight, padding="same", dilation=dilation)
        result = ops.deform_conv2d(FEATURES, offset, weight, padding="same", dilation=dilation)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        packed = ops.pack_deform_conv2d(weight)
        result = ops.deform_conv2d(FEATURES, offset, packed, padding="same", dilation=dilation)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        module = ops.DeformConv2d(4, 6, kernel, padding="same", dilation=dilation)
        assert module(FEATURES, offset).shape == expected.shape

    def test_valid_is_none(self):
        offset, weight = torch.zeros(2, 18, 5, 6), torch.rand(6, 4, 3, 3)
        result = ops.deform_conv2d(FEATURES, offset, weight, stride=2, padding="valid")
        torch.testing.assert_close(result, ops.deform_conv2d(FEATURES, offset, weight, stride=2))
        assert ops.DeformConv2d(4, 6, 3, stride=2, padding="valid").padding == (0, 0)

    @pytest.mark.parametrize(
        "kernel, options, message",
        [
            (
                3,
                {"stride": 2},
                r"if stride is not 1, got 'same' for a stride of (2|\(2, 2\))$",
            ),
            (
                2,
                {},
                r"if dilation \* \(kernel size - 1\) is odd, got 'same' for a kernel of \(2, 2",
            ),
        ],
    )
    def test_what_same_cannot_be(self, kernel, options, message):
        with pytest.raises(ValueError, match=f"^deform_conv2d: padding must be numbers {message}"):
            ops.deform_conv2d(FEATURES, FEATURES, torch.rand(6, 4, kernel, kernel), padding="same", **options)
        with pytest.raises(ValueError, match=f"^DeformConv2d: padding must be numbers {message}"):
            ops.DeformConv2d(4, 6, kernel, padding="same", **options)

    def test_an_unknown_name(self):
        rule = "padding must be one integer, a pair, 'same' or 'valid', got 'full'$"
        with pytest.raises(ValueError, match=f"^deform_conv2d: {rule}"):
            ops.deform_conv2d(FEATURES, FEATURES, torch.rand(6, 4, 3, 3), padding="full")
        with pytest.raises(ValueError, match=f"^DeformConv2d: {rule}"):
            ops.DeformConv2d(4, 6, 3, padding="full")


class TestTargetsOfSigmoidFocalLoss:
    LOGITS, LABELS = torch.randn(6, 4), torch.tensor([0, 3, 4, 2, 4, 1])
    TARGETS = F.one_hot(LABELS, 5)[:, :4].float()

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_one_hot_rows_are_classes(self, reduction):
        expected = ops.sigmoid_focal_loss(self.LOGITS, self.LABELS, 1.5, 0.3, reduction)
        for loss in (
            ops.sigmoid_focal_loss(self.LOGITS, self.TARGETS, 0.3, 1.5, reduction),
            ops.sigmoid_focal_loss(self.LOGITS, self.TARGETS, 0.3, gamma=1.5, reduction=reduction),
            ops.sigmoid_focal_loss(self.LOGITS, self.TARGETS, gamma=1.5, alpha=0.3, reduction=reduction),
        ):
            torch.testing.assert_close(loss, expected)

    def test_defaults_and_no_weights(self):
        for options in ({}, {"alpha": -1}, {"gamma": 0}):
            expected = ops.sigmoid_focal_loss(self.LOGITS, self.LABELS, **options)
            torch.testing.assert_close(ops.sigmoid_focal_loss(self.LOGITS, self.TARGETS, **options), expected)

    def test_gradients(self):
        logits = self.LOGITS.clone().requires_grad_()
        gradients = [
            torch.autograd.grad(ops.sigmoid_focal_loss(logits, labels, reduction="sum"), logits)[0]
            for labels in (self.LABELS, self.TARGETS)
        ]
        torch.testing.assert_close(*gradients)

    def test_arrays(self):
        expected = ops.sigmoid_focal_loss(self.LOGITS, self.TARGETS, 0.3, 1.5).numpy()
        loss = ops.sigmoid_focal_loss(self.LOGITS.numpy(), self.TARGETS.numpy(), 0.3, 1.5)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)

    def test_compiled(self):
        compiled = torch.compile(ops.sigmoid_focal_loss, backend="eager", fullgraph=True)
        for labels in (self.LABELS, self.TARGETS):
            torch.testing.assert_close(
                compiled(self.LOGITS, labels, 0.3), ops.sigmoid_focal_loss(self.LOGITS, labels, 0.3)
            )

    @pytest.mark.parametrize(
        "labels, options, named, error, message",
        [
            (TARGETS[:3], (), {}, RuntimeError, r"targets must have the shape of logits, \(6, 4\), got \(3, 4\)"),
            (TARGETS, (2.0,), {}, RuntimeError, "alpha must be a number <= 1 .*, got 2"),
            (TARGETS, (), {"gamma": -1}, RuntimeError, "gamma must be a finite number >= 0, got -1"),
            (TARGETS, ("x",), {}, ValueError, "alpha must be a number, got 'x'"),
            (LABELS, ("x",), {}, ValueError, "gamma must be a number, got 'x'"),
            (TARGETS, (0.3, 1.5, "avg"), {}, ValueError, "reduction must be 'none', 'sum' or 'mean', got 'avg'"),
            (TARGETS, (0.3,), {"alpha": 0.4}, TypeError, "alpha must be given once, got 0.3 and 0.4"),
            (LABELS, (0.3,), {"gamma": 0.4}, TypeError, "gamma must be given once, got 0.3 and 0.4"),
            (LABELS, (2.0, 0.3, "sum", 1), {}, TypeError, "takes at most 5 arguments by position, got 6"),
            (F.one_hot(LABELS, 5), (), {}, RuntimeError, r"labels must have the shape of logits without the classes"),
            (
                TARGETS.long(),
                (),
                {},
                RuntimeError,
                r"must be floating-point, got int64; use labels.to\(logits.dt",
            ),
            (TARGETS.bool(), (), {}, RuntimeError, r"must be floating-point, got bool; use labels.to\(logits.dt"),
        ],
    )
    def test_errors(self, labels, options, named, error, message):
        with pytest.raises(error, match=f"^sigmoid_focal_loss: .*{message}"):
            ops.sigmoid_focal_loss(self.LOGITS, labels, *options, **named)

    def test_checked(self):
        with ops.checked(), pytest.raises(ValueError, match="labels must be finite, got nan at index \\(0, 0\\)"):
            ops.sigmoid_focal_loss(self.LOGITS, self.TARGETS * float("nan"))


class TestMultiScaleRoIAlign:
    IMAGES = ((256, 256), (200, 256))
    ROIS = (torch.tensor([[0.0, 0, 20, 20], [5, 9, 100, 120], [0, 0, 250, 250]]), torch.tensor([[3.0, 4, 60, 60]]))

    @staticmethod
    def maps(*strides):
        return {str(stride): torch.rand(2, 3, 256 // stride, 256 // stride) for stride in strides}

    def test_is_multilevel_roi_align_of_the_named_maps(self):
        maps = self.maps(4, 8, 16)
        module = ops.MultiScaleRoIAlign(["8", "16"], (4, 3), 2, canonical_scale=100, canonical_level=4)
        features = [maps["8"], maps["16"]]
        expected = ops.multilevel_roi_align(features, list(self.ROIS), (4, 3), (8, 16), 2, False, finest_scale=50)
        torch.testing.assert_close(module(maps, list(self.ROIS), list(self.IMAGES)), expected)
        assert module.scales == [1 / 8, 1 / 16]

    def test_scales_are_kept_until_they_are_reset(self):
        module, boxes = ops.MultiScaleRoIAlign(["4", "8"], 2, 2), list(self.ROIS)
        module(self.maps(4, 8), boxes, list(self.IMAGES))
        module(self.maps(4, 8), boxes, [(512, 512)] * 2)
        assert module.scales == [1 / 4, 1 / 8]
        module.scales = None
        module(self.maps(4, 8), boxes, [(512, 512)] * 2)
        assert module.scales == [1 / 8, 1 / 16]

    def test_rois_of_a_level_without_a_map_give_zeros(self):
        """Torchvision counts three levels from stride 8 to stride 32, and has maps for the first two."""
        result = ops.MultiScaleRoIAlign(["8", "32"], 2, 2)(
            self.maps(8, 32), [torch.tensor([[0.0, 0, 50, 50], [0, 0, 500, 500]]), self.ROIS[1]], list(self.IMAGES)
        )
        assert [bool(roi.any()) for roi in result] == [True, False, True]

    def test_copies_and_repr(self):
        module = ops.MultiScaleRoIAlign(["a", "b"], np.int64(7), 2)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(copied) == "MultiScaleRoIAlign(featmap_names=['a', 'b'], output_size=(7, 7), sampling_ratio=2)"
        assert module.state_dict() == {}

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("a", 7, 2), "featmap_names must be a list of names, got 'a'"),
            ((None, 7, 2), "featmap_names must be a sequence, got None"),
            ((["a"], 7.0, 2), "output_size must be one integer or a pair, got 7.0"),
            ((["a"], 7, 2.0), "sampling_ratio must be an integer, got 2.0"),
        ],
    )
    def test_errors_of_the_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=f"^MultiScaleRoIAlign: {message}$"):
            ops.MultiScaleRoIAlign(*arguments)

    @pytest.mark.parametrize(
        "names, strides, images, message",
        [
            (["a"], [4], IMAGES, r"x must hold a map of featmap_names, \['a'\], got \['4'\]"),
            (["4"], [4], (), "image_shapes must have the size of every image, got none"),
            (["4", "8"], [8, 4], IMAGES, r"the maps of x must be ordered finest first, got strides \[8.0, 4.0\]"),
        ],
    )
    def test_errors_of_calls(self, names, strides, images, message):
        with pytest.raises(ValueError, match=f"^MultiScaleRoIAlign: {message}$"):
            ops.MultiScaleRoIAlign(names, 2, 2)(self.maps(*strides), list(self.ROIS), list(images))


@pytest.mark.parametrize("form", [list, tuple])
def test_boxes_may_be_a_list_or_a_tuple(form):
    boxes = form([BOXES, BOXES[:0]])
    rows = F.pad(BOXES, (1, 0))
    assert torch.equal(ops.roi_align(FEATURES, boxes, 2), ops.roi_align(FEATURES, rows, 2))
    expected = ops.multilevel_roi_align([FEATURES], rows, 2, [4])
    assert torch.equal(ops.multilevel_roi_align([FEATURES], boxes, 2, [4]), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_dtypes_that_are_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=f"^roi_align: input must be float32, .* got {name}"):
        ops.roi_align(FEATURES.to(dtype), F.pad(BOXES, (1, 0)), 2)
    with pytest.raises(RuntimeError, match=f"^roi_align: boxes must be float32, .* got {name}"):
        ops.roi_align(FEATURES, F.pad(BOXES, (1, 0)).to(dtype), 2)
    with pytest.raises(RuntimeError, match=f"^nms: boxes must be float32, .* got {name}"):
        ops.nms(BOXES.to(dtype), SCORES, 0.5)
    with pytest.raises(RuntimeError, match=f"^nms: scores must be float32, .* got {name}"):
        ops.nms(BOXES, SCORES.to(dtype), 0.5)
