# SPDX-License-Identifier: Apache-2.0
"""multilevel_roi_align: `OpMatrix`, the level rule, the goldens, and inputs that torchvision's pooler gets wrong."""

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import THIN_SHAPES, assert_near

from spatialflow import ops
from spatialflow.ops import reference
from spatialflow.ops.reference.multilevel_roi_align import roi_levels

STRIDES = (2, 4, 8)


def pyramid(
    channels: int, size: int = 0, dtype: torch.dtype = torch.float64, batch: int = 2, coarsest=None
) -> list[torch.Tensor]:
    shapes = [(16 + 4 * size, 24 + 4 * size), (8 + 2 * size, 12 + 2 * size), coarsest or (4 + size, 6 + size)]
    return [torch.randn(batch, channels, height, width, dtype=dtype) for height, width in shapes]


def boxes_of_all_levels(count: int) -> torch.Tensor:
    """Return (count, 5) boxes with sides of about 1 to 60 pixels; with finest_scale 6 they use all three levels."""
    side = torch.logspace(0, 5.9, count, base=2, dtype=torch.float64)[:, None] * (
        0.8 + 0.4 * torch.rand(count, 2).double()
    )
    corner = torch.rand(count, 2, dtype=torch.float64) * 30 - 4
    index = torch.randint(2, (count, 1)).double()
    return torch.cat([index, corner, corner + side], dim=1)


def sample(channels: int, count: int, output_size=(2, 3), batch: int = 2, coarsest=None, **options):
    def tensors(size: int = 0) -> list:
        return [pyramid(channels, size, batch=batch, coarsest=coarsest), boxes_of_all_levels(count + size)]

    def build() -> OpSample:
        return OpSample(
            op=ops.multilevel_roi_align,
            reference=reference.multilevel_roi_align,
            tensors=tensors(),
            options={"output_size": output_size, "strides": STRIDES, "finest_scale": 6.0, **options},
            raw=raw,
            resized=tensors,
        )

    return build


def raw(features, boxes, output_size, strides, sampling_ratio=0, aligned=True, finest_scale=56.0):
    height, width = output_size
    args = (features, boxes, height, width, [float(s) for s in strides], sampling_ratio, aligned, finest_scale)
    return torch.ops.spatialflow.multilevel_roi_align, args


class TestMultilevelRoiAlign(OpMatrix):
    has_gradient = True
    samples = {
        "adaptive": sample(5, 7),
        "two samples": sample(70, 9, sampling_ratio=2),
        "not aligned": sample(3, 11, output_size=(3, 1), aligned=False),
        "one level used": sample(3, 4, finest_scale=1000.0),
    }
    linear_samples = tuple(samples)
    thin_samples = {
        name: sample(channels, 7, output_size=(2, 1), batch=batch, coarsest=(height, width))
        for name, (batch, channels, height, width) in THIN_SHAPES.items()
    } | {"one box": sample(8, 1, output_size=(1, 1)), "no boxes": sample(8, 0)}


class TestLevels:
    def test_boundaries(self):
        """Sides just below and at 2^l * finest_scale; smaller and larger RoIs use the first and the last level."""
        sides = torch.tensor([1.0, 55.9, 56, 111.9, 112, 223.9, 224, 5000])
        boxes = torch.stack([torch.zeros(8), torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
        assert roi_levels(boxes, 3, 56).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
        features = [torch.full((1, 1, 8, 8), float(level)) for level in range(3)]
        pooled = ops.multilevel_roi_align(features, boxes, 1, (700, 700, 700))
        assert pooled.flatten().round().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]

    def test_random_boxes_take_the_level_of_the_reference(self):
        sides = 2 ** (torch.rand(20000, 2) * 12)
        boxes = torch.cat([torch.zeros(20000, 3), sides], dim=1)
        features = [torch.full((1, 1, 4, 4), float(level)) for level in range(5)]
        pooled = ops.multilevel_roi_align(features, boxes, 1, (2048,) * 5)
        assert torch.equal(pooled.flatten().round().long(), roi_levels(boxes, 5, 56))

    def test_two_image_sizes_through_one_pooler(self):
        """Torchvision's pooler keeps the scales of its first image size; strides are explicit here."""
        pooler = ops.MultilevelRoIAlign(2, STRIDES, finest_scale=6)
        boxes = boxes_of_all_levels(6)
        for size in (0, 3):
            features = pyramid(4, size)
            expected = reference.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6)
            assert_near(pooler(features, boxes), expected, torch.float64)

    def test_order_of_boxes_is_kept(self):
        features, boxes = pyramid(3), boxes_of_all_levels(9)
        order = torch.randperm(9)
        pooled = ops.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6)
        permuted = ops.multilevel_roi_align(features, boxes[order], 2, STRIDES, finest_scale=6)
        assert torch.equal(pooled[order], permuted)


class TestValues:
    bad = {
        "nan": [0, float("nan"), 1, 5, 5],
        "infinite": [0, 1, 1, float("inf"), 5],
        "negative index": [-1, 1, 1, 5, 5],
        "index too large": [2, 1, 1, 5, 5],
        "nan index": [float("nan"), 1, 1, 5, 5],
        "overflowing product": [0, -3e38, -3e38, 3e38, 3e38],
    }

    @pytest.mark.parametrize("row", list(bad.values()), ids=list(bad))
    def test_zeros_and_no_gradient(self, row):
        features = [feature.float().requires_grad_() for feature in pyramid(3)]
        boxes = torch.tensor([[0, 1, 1, 6, 6], row, [1, 0, 0, 30, 30]], dtype=torch.float32)
        pooled = ops.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6)
        assert not pooled[1].any()
        good = ops.multilevel_roi_align(features, boxes[[0, 2]], 2, STRIDES, finest_scale=6)
        assert torch.equal(pooled[[0, 2]], good)
        assert not any(grad.any() for grad in torch.autograd.grad(pooled[1].sum(), features))

    @pytest.mark.parametrize("name", ["nan", "infinite", "negative index", "index too large"])
    def test_checked(self, name):
        boxes = torch.tensor([[0, 1, 1, 6, 6], self.bad[name]], dtype=torch.float32)
        with ops.checked(), pytest.raises(ValueError, match="multilevel_roi_align: boxes must"):
            ops.multilevel_roi_align(pyramid(3), boxes, 2, STRIDES)

    def test_box_reversed_on_one_side_is_empty(self):
        """A negative area gives the level NaN: the finest level is used, where the box has no samples."""
        pooled = ops.multilevel_roi_align(pyramid(3), torch.tensor([[0, 9.0, 1, 2, 8]]), 2, STRIDES)
        assert not pooled.any()

    def test_huge_roi_is_bounded_work(self):
        pooled = ops.multilevel_roi_align(pyramid(2), torch.tensor([[0, -1e30, -1e30, 1e30, 1e30]]), 3, STRIDES)
        assert torch.isfinite(pooled).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_features_with_float32_boxes(self, dtype):
        """Float16 cannot hold fractions of coordinates above 2048, so boxes are never cast to it."""
        feature = (torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 4, 64) % 7).contiguous()
        boxes = torch.tensor([[0, 2049.3, 0, 2052.7, 3]])
        full = ops.multilevel_roi_align([feature, feature], boxes, 1, (64, 128), 2)
        half = ops.multilevel_roi_align([feature.to(dtype), feature.to(dtype)], boxes, 1, (64, 128), 2)
        assert_near(half, full, dtype)


class TestShapes:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_empties(self, layout):
        features = [feature.contiguous(memory_format=layout).requires_grad_() for feature in pyramid(3)]
        none = ops.multilevel_roi_align(features, torch.zeros(0, 5), (2, 3), STRIDES)
        assert none.shape == (0, 3, 2, 3)
        assert not any(grad.any() for grad in torch.autograd.grad(none.sum(), features))
        boxes = boxes_of_all_levels(6)
        assert ops.multilevel_roi_align(pyramid(0), boxes, 2, STRIDES).shape == (6, 0, 2, 2)
        no_images = [feature[:0] for feature in pyramid(3)]
        assert not ops.multilevel_roi_align(no_images, boxes, 2, STRIDES).any()

    def test_level_without_cells_gives_zeros(self):
        features = pyramid(3)
        features[1] = features[1][:, :, :0]
        boxes = boxes_of_all_levels(9)
        features = [feature.requires_grad_() for feature in features]
        pooled = ops.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6)
        assert_near(pooled, reference.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6), torch.float64)
        grads = torch.autograd.grad(pooled.sum(), features)
        assert [grad.shape for grad in grads] == [feature.shape for feature in features]

    def test_gradient_of_some_levels(self):
        """Only some levels may need a gradient, in reverse and in forward mode."""
        features, boxes = pyramid(3), boxes_of_all_levels(9)
        features[1].requires_grad_()
        pooled = ops.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6)
        (grad,) = torch.autograd.grad(pooled.sum(), features[1])
        expected = reference.multilevel_roi_align(features, boxes, 2, STRIDES, finest_scale=6)
        assert_near(grad, torch.autograd.grad(expected.sum(), features[1])[0], torch.float64)
        tangent = torch.randn_like(features[1])
        zeros = [torch.zeros_like(features[0]), tangent, torch.zeros_like(features[2])]
        _, pushed = torch.func.jvp(
            lambda middle: ops.multilevel_roi_align(
                [features[0], middle, features[2]], boxes, 2, STRIDES, finest_scale=6
            ),
            (features[1].detach(),),
            (tangent,),
        )
        assert_near(pushed, ops.multilevel_roi_align(zeros, boxes, 2, STRIDES, finest_scale=6), torch.float64)

    def test_box_list_and_module(self):
        features = pyramid(3)
        boxes = [torch.tensor([[1.0, 1, 5, 5], [0, 0, 30, 40]]), torch.tensor([[2.0, 2, 17, 16]])]
        rows = torch.tensor([[0, 1.0, 1, 5, 5], [0, 0, 0, 30, 40], [1, 2, 2, 17, 16]])
        expected = ops.multilevel_roi_align(features, rows, 2, STRIDES, 2, True, 6)
        assert torch.equal(ops.multilevel_roi_align(features, boxes, 2, STRIDES, 2, True, 6), expected)
        module = ops.MultilevelRoIAlign(2, STRIDES, 2, True, 6)
        assert torch.equal(module(features, boxes), expected)
        assert "strides=(2.0, 4.0, 8.0)" in repr(module)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"features": []}, "features must be a sequence of at least one level, got none"),
            ({"features": torch.randn(2, 3, 8, 8)}, r"got a tensor of shape \(2, 3, 8, 8\)"),
            ({"features": [torch.randn(2, 3, 8)] * 3}, r"features\[0\] must be \(N, C, H, W\), got shape \(2, 3, 8\)"),
            ({"features": [torch.ones(2, 3, 8, 8).int()] * 3}, r"features\[0\] must be float32.*got int32"),
            (
                {"features": [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4).half(), torch.randn(2, 3, 2, 2)]},
                r"features\[1\] must be float32, got float16",
            ),
            (
                {"features": [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)]},
                r"features\[2\] must have the batch size and the channels .* \(2, 3\), got shape \(2, 4, 2, 2\)",
            ),
            ({"boxes": torch.zeros(1, 4)}, r"boxes must have shape \(K, 5\).*got shape \(1, 4\)"),
            ({"boxes": [torch.zeros(1, 4)]}, "one tensor per image, got 1 for a batch of 2"),
            ({"output_size": (2, 0)}, r"output_size must be positive, got \(2, 0\)"),
            ({"strides": (8, 16)}, "strides must have one number per level, got 2 for 3 levels"),
            ({"strides": (8, 16, 0)}, "strides must be positive and finite, got 0"),
            ({"finest_scale": -1.0}, "finest_scale must be positive and finite, got -1"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, change, message):
        arguments = {
            "features": [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)],
            "boxes": torch.zeros(1, 5),
            "output_size": 2,
            "strides": (8, 16, 32),
        }
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.multilevel_roi_align(**{**arguments, **change})


class TestGoldens:
    def test_released_extractor(self, goldens):
        arrays = {name: torch.as_tensor(a) for name, a in np.load(goldens / "ops" / "roi_align.npz").items()}
        assert torch.equal(roi_levels(arrays["ext_rois"], 3, 56), arrays["ext_levels"].long())
        features = [arrays[f"ext_feat{level}"] for level in range(3)]
        out = ops.multilevel_roi_align(features, arrays["ext_rois"], 14, (8, 16, 32))
        assert_near(out, arrays["ext_out"], torch.float32)
