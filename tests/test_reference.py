# SPDX-License-Identifier: Apache-2.0
"""The reference implementations accept the operators' inputs: extreme boxes, weights of any strides."""

import pytest
import torch
from helpers.tensors import leaves

from spatialflow import ops
from spatialflow.ops import reference

INF, NAN = float("inf"), float("nan")
COORDINATES = (0.0, 1.5, -3.0, 7.0, 1e5, -1e9, 1e20, -1e30, 3e38, -3e38, INF, -INF, NAN)
DTYPES = (torch.float32, torch.float64)


def boxes_of(dtype: torch.dtype, count: int = 80) -> torch.Tensor:
    """Return (count, 4) boxes of any coordinates, including finite ones whose extent or area overflows."""
    values = COORDINATES if dtype == torch.float32 else (*COORDINATES, 1e300, -1.7e308)
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (count, 4))]


def rois_of(dtype: torch.dtype) -> torch.Tensor:
    boxes = boxes_of(dtype)
    return torch.cat([torch.randint(-1, 3, (len(boxes), 1)).to(dtype), boxes], dim=1)


def assert_agree(name: str, *arguments, **options) -> None:
    """Compare operator and reference up to the rounding of coordinates, which is large for huge boxes."""
    actual, expected = (leaves(getattr(module, name)(*arguments, **options)) for module in (ops, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestBoxes:
    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("sampling_ratio", [-1, 2, 9])
    def test_roi_align(self, dtype, aligned, sampling_ratio):
        feature = torch.randn(2, 3, 6, 7, dtype=dtype)
        for scale in (0.25, 10.0):
            assert_agree("roi_align", feature, rois_of(dtype), (2, 3), scale, sampling_ratio, aligned)

    def test_multilevel_roi_align(self, dtype):
        features = [torch.randn(2, 3, 6, 7, dtype=dtype), torch.randn(2, 3, 3, 4, dtype=dtype)]
        assert_agree("multilevel_roi_align", features, rois_of(dtype), 2, (4, 8))

    def test_nms(self, dtype):
        assert_agree("nms", boxes_of(dtype), torch.rand(80, dtype=dtype), 0.5)

    def test_paste_masks(self, dtype):
        assert_agree("paste_masks", 3 * torch.randn(80, 5, 6, dtype=dtype), boxes_of(dtype), (9, 11))

    @pytest.mark.parametrize("stuff", [torch.uint8, torch.int8, torch.int64], ids=str)
    def test_panoptic_merge(self, dtype, stuff):
        """There are more stuff labels than an 8-bit map can hold."""
        masks, scores, labels = torch.rand(80, 9, 11) > 0.9, torch.rand(80, dtype=dtype), torch.randint(0, 80, (80,))
        labels_of_pixels = torch.randint(0, 127, (9, 11)).to(stuff)
        assert_agree(
            "panoptic_merge", masks, scores, labels, boxes_of(dtype), labels_of_pixels, 300, stuff_area_threshold=1
        )


def test_permuted_weights():
    input, offset = torch.randn(1, 4, 5, 6), torch.randn(1, 18, 5, 6)
    weight = torch.randn(3, 3, 3, 4).permute(0, 3, 1, 2)
    assert_agree("deform_conv2d", input, offset, weight, padding=1)
    assert_agree("flow_conv2d", input, None, weight)


def test_box_outside_the_batch_reads_no_feature():
    """The result and the gradient of the feature are zeros, not products of 0 and NaN."""
    feature = torch.full((1, 2, 4, 4), NAN, requires_grad=True)
    pooled = reference.roi_align(feature, torch.tensor([[3, 0.0, 0, 2, 2]]), 2)
    (gradient,) = torch.autograd.grad(pooled.sum(), feature)
    assert not pooled.any() and not gradient.any()
