# SPDX-License-Identifier: Apache-2.0
"""Options of the wrong kind: the error names the operator, the option and the value."""

import re

import numpy as np
import pytest
import torch

from spatialflow import ops

BOXES, SCORES = torch.rand(3, 4), torch.rand(3)
ROIS, FEATURES = torch.zeros(1, 5), torch.rand(1, 4, 5, 5)
MASKS, LABELS, STUFF = torch.zeros(1, 4, 4).bool(), torch.zeros(1).long(), torch.zeros(4, 4).long()
PHOTOGRAPH = torch.zeros(4, 4, 3).byte()

CALLS = {
    "nms": (lambda **options: ops.nms(BOXES, SCORES, **options), {"iou_threshold": 0.5}),
    "batched_nms": (
        lambda **options: ops.batched_nms(BOXES, SCORES, torch.zeros(3).long(), **options),
        {"iou_threshold": 0.5},
    ),
    "multiclass_nms": (
        lambda **options: ops.multiclass_nms(BOXES, torch.rand(3, 2), max_detections=2, **options),
        {"score_threshold": 0.1, "iou_threshold": 0.5},
    ),
    "roi_align": (lambda **options: ops.roi_align(FEATURES, ROIS, 2, **options), {"spatial_scale": 1.0}),
    "multilevel_roi_align": (
        lambda strides=4.0, **options: ops.multilevel_roi_align([FEATURES], ROIS, 2, [strides], **options),
        {"strides": 4.0, "finest_scale": 56.0},
    ),
    "group_norm_relu": (lambda **options: ops.group_norm_relu(FEATURES, 2, **options), {"eps": 1e-5}),
    "paste_masks": (
        lambda **options: ops.paste_masks(FEATURES[0], BOXES[[0] * 4], (9, 9), **options),
        {"threshold": 0.5},
    ),
    "sigmoid_focal_loss": (
        lambda **options: ops.sigmoid_focal_loss(torch.rand(1, 2), LABELS, **options),
        {"gamma": 2.0, "alpha": 0.25},
    ),
    "panoptic_merge": (
        lambda **options: ops.panoptic_merge(MASKS, SCORES[:1], LABELS, None, STUFF, 2, **options),
        {"score_threshold": 0.4, "overlap_threshold": 0.4, "box_overlap_threshold": 0.5},
    ),
    "preprocess_images": (
        lambda mean=0.0, std=1.0: ops.preprocess_images(PHOTOGRAPH, (8, 8), [mean] * 3, [std] * 3),
        {"mean": 0.0, "std": 1.0},
    ),
}
"""Operators with real-valued options, by name: a call, and valid values of these options."""


@pytest.mark.parametrize("op, option", [(op, option) for op, (_, options) in CALLS.items() for option in options])
@pytest.mark.parametrize(
    "value", ["x", "0.5", b"1", None, [0.5], torch.ones((), device="meta"), torch.tensor(1j)], ids=str
)
def test_what_is_no_number_is_named(op, option, value):
    call, options = CALLS[op]
    call(**options)
    with pytest.raises(ValueError, match=rf"^{op}: {option}(\[0\])? must be a number, got ") as caught:
        call(**options | {option: value})
    assert str(caught.value).endswith(repr(value))


PAIRS = {
    "roi_align: output_size": lambda value: ops.roi_align(FEATURES, ROIS, value),
    "multilevel_roi_align: output_size": lambda value: ops.multilevel_roi_align([FEATURES], ROIS, value, [4]),
    "deform_conv2d: stride": lambda value: ops.deform_conv2d(FEATURES, FEATURES, FEATURES, stride=value),
    "deform_conv2d: padding": lambda value: ops.deform_conv2d(FEATURES, FEATURES, FEATURES, padding=value),
    "deform_conv2d: dilation": lambda value: ops.deform_conv2d(FEATURES, FEATURES, FEATURES, dilation=value),
    "DeformConv2d: kernel_size": lambda value: ops.DeformConv2d(4, 4, value),
}


@pytest.mark.parametrize("option", PAIRS)
@pytest.mark.parametrize(
    "value", [(1, 2, 3), "a", None, 1.5, 7.0, (1, "a"), range(2), np.array([1.5, 1]), np.array([1])], ids=str
)
def test_what_is_no_pair_is_named(option, value):
    padding = "padding" in option and isinstance(value, str)
    allowed = "one integer, a pair, 'same' or 'valid'" if padding else "one integer or a pair"
    with pytest.raises(ValueError, match=rf"^{option} must be {allowed}, got ") as caught:
        PAIRS[option](value)
    assert str(caught.value).endswith(repr(value))


SIZES = {
    "paste_masks: size": lambda value: ops.paste_masks(FEATURES[0], BOXES[[0] * 4], value),
    "stuff_labels: valid_size": lambda value: ops.stuff_labels(FEATURES[0], value, (8, 8)),
    "stuff_labels: original_size": lambda value: ops.stuff_labels(FEATURES[0], (8, 8), value),
    "preprocess_images: sizes[0]": lambda value: ops.preprocess_images(PHOTOGRAPH, value, [0] * 3, [1] * 3),
}


@pytest.mark.parametrize("option", SIZES)
@pytest.mark.parametrize("value", [(8.0, 8), (8, "8"), (8, None), (1, 2, 3), 8, np.array([8.0, 8.0])], ids=str)
def test_what_is_no_size_is_named(option, value):
    SIZES[option]((8, 8))
    with pytest.raises(
        ValueError, match=rf"^{re.escape(option)} must be \(height, width\) in integers, got "
    ) as caught:
        SIZES[option](value)
    assert str(caught.value).endswith(repr(value))


def select(strides=8, per_level=7):
    anchors, sizes, factors = torch.ones(1, 1, 4), torch.tensor([[20, 20]]), torch.ones(1, 2)
    return ops.select_candidates([FEATURES], [FEATURES], anchors, [strides], sizes, factors, per_level)


def merge(stuff_labels=2, stuff_area_threshold=1, ignored_stuff=1):
    options = {"stuff_area_threshold": stuff_area_threshold, "ignored_stuff": [ignored_stuff]}
    return ops.panoptic_merge(MASKS, SCORES[:1], LABELS, None, STUFF, stuff_labels, **options)


def counts(gt_segments=2, pred_segments=2):
    return ops.panoptic_quality_counts(STUFF.int(), STUFF.int(), gt_segments, pred_segments)


INTEGERS = {
    "multiclass_nms: max_detections": lambda value: ops.multiclass_nms(BOXES, torch.rand(3, 2), 0.1, 0.5, value),
    "group_norm_relu: num_groups": lambda value: ops.group_norm_relu(FEATURES, value),
    "preprocess_images: divisor": lambda value: ops.preprocess_images(PHOTOGRAPH, (8, 8), [0] * 3, [1] * 3, value),
    "panoptic_merge: stuff_labels": lambda value: merge(stuff_labels=value),
    "panoptic_merge: stuff_area_threshold": lambda value: merge(stuff_area_threshold=value),
    "panoptic_merge: ignored_stuff[0]": lambda value: merge(ignored_stuff=value),
    "panoptic_quality_counts: gt_segments": lambda value: counts(gt_segments=value),
    "panoptic_quality_counts: pred_segments": lambda value: counts(pred_segments=value),
    "select_candidates: strides[0]": lambda value: select(strides=value),
    "select_candidates: per_level": lambda value: select(per_level=value),
    "DeformConv2d: in_channels": lambda value: ops.DeformConv2d(value, 4, 3),
    "DeformConv2d: out_channels": lambda value: ops.DeformConv2d(4, value, 3),
    "DeformConv2d: groups": lambda value: ops.DeformConv2d(4, 4, 3, groups=value),
}


@pytest.mark.parametrize("option", INTEGERS)
@pytest.mark.parametrize("value", [2.0, 2.5, "2", None, (2, 2)], ids=str)
def test_what_is_no_integer_is_named(option, value):
    for right in (2, np.int64(2)):
        INTEGERS[option](right)
    with pytest.raises(ValueError, match=rf"^{re.escape(option)} must be an integer, got ") as caught:
        INTEGERS[option](value)
    assert str(caught.value).endswith(repr(value))


def test_integers_of_other_libraries_are_integers():
    expected = ops.roi_align(FEATURES, ROIS, (2, 3))
    for size in ((np.int64(2), np.int32(3)), np.array([2, 3]), torch.tensor([2, 3]), [2, 3], torch.Size([2, 3])):
        assert torch.equal(ops.roi_align(FEATURES, ROIS, size), expected)


@pytest.mark.parametrize("op", ["roi_align", "multilevel_roi_align"])
def test_boxes_of_images_are_named(op):
    def call(boxes):
        return (
            ops.roi_align(FEATURES, boxes, 2)
            if op == "roi_align"
            else ops.multilevel_roi_align([FEATURES], boxes, 2, [4])
        )

    with pytest.raises(
        ValueError, match=f"^{op}: boxes as a list must hold one tensor per image, got 2 for a batch of 1"
    ):
        call([ROIS[:, 1:]] * 2)
    with pytest.raises(ValueError, match=rf"^{op}: boxes\[0\] must have shape \(K, 4\), got \(1, 5\)"):
        call([ROIS])


@pytest.mark.parametrize("value", [2.0, 2.5, "2", None, (2, 2), np.array([2, 2])], ids=str)
@pytest.mark.parametrize("op", ["roi_align", "multilevel_roi_align", "MultiScaleRoIAlign"])
def test_a_sampling_ratio_that_is_no_integer_is_named(op, value):
    calls = {
        "roi_align": lambda: ops.roi_align(FEATURES, ROIS, 2, 1.0, value),
        "multilevel_roi_align": lambda: ops.multilevel_roi_align([FEATURES], ROIS, 2, [4], value),
        "MultiScaleRoIAlign": lambda: ops.MultiScaleRoIAlign(["0"], 2, value),
    }
    with pytest.raises(ValueError, match=f"^{op}: sampling_ratio must be an integer, got ") as caught:
        calls[op]()
    assert str(caught.value).endswith(repr(value))


@pytest.mark.parametrize("value", ["no", "False", b"1"], ids=str)
@pytest.mark.parametrize("op", ["roi_align", "multilevel_roi_align"])
def test_a_string_is_not_true(op, value):
    call = {
        "roi_align": lambda: ops.roi_align(FEATURES, ROIS, 2, aligned=value),
        "multilevel_roi_align": lambda: ops.multilevel_roi_align([FEATURES], ROIS, 2, [4], aligned=value),
    }[op]
    with pytest.raises(ValueError, match=f"^{op}: aligned must be True or False, got ") as caught:
        call()
    assert str(caught.value).endswith(repr(value))
