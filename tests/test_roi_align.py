# SPDX-License-Identifier: Apache-2.0
"""roi_align: `OpMatrix`, the goldens, and values that other implementations get wrong."""

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import THIN_SHAPES, assert_near

from spatialflow import ops
from spatialflow.ops import reference


def random_boxes(count: int, batch: int, extent: float) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=torch.float64) * extent * 1.2 - 0.1 * extent
    size = torch.rand(count, 2, dtype=torch.float64) * extent * 0.6
    index = torch.randint(batch, (count, 1)).double()
    return torch.cat([index, corner, corner + size], dim=1)


def sample(channels: int, count: int, *, batch: int = 2, height: int = 9, width: int = 11, **options):
    def tensors(size: int = 0) -> list:
        feature = torch.randn(batch, channels, height + size, width + size, dtype=torch.float64)
        return [feature, random_boxes(count + size, max(batch, 1), 40.0)]

    def build() -> OpSample:
        return OpSample(
            op=ops.roi_align,
            reference=reference.roi_align,
            tensors=tensors(),
            options=options,
            raw=raw,
            resized=tensors,
        )

    return build


def raw(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    height, width = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    return torch.ops.spatialflow.roi_align, (input, boxes, height, width, spatial_scale, sampling_ratio, aligned)


class TestRoiAlign(OpMatrix):
    has_gradient = True
    samples = {
        "adaptive": sample(5, 7, output_size=(3, 4), spatial_scale=0.25),
        "aligned adaptive": sample(5, 7, output_size=3, spatial_scale=0.25, aligned=True),
        "two samples": sample(70, 4, output_size=(2, 3), spatial_scale=0.3, sampling_ratio=2, aligned=True),
        "seven samples": sample(3, 4, output_size=(1, 2), spatial_scale=1.0, sampling_ratio=7),
    }
    linear_samples = tuple(samples)
    thin_samples = {
        name: sample(channels, 5, batch=batch, height=height, width=width, output_size=(2, 1), spatial_scale=0.2)
        for name, (batch, channels, height, width) in THIN_SHAPES.items()
    } | {"one box": sample(8, 1, output_size=1, spatial_scale=0.2), "no boxes": sample(8, 0, output_size=(1, 2))}


class TestValues:
    """Invalid values give zeros and no gradient; checked() raises errors that name them."""

    bad = {
        "nan": [0, float("nan"), 1, 5, 5],
        "infinite": [0, 1, 1, float("inf"), 5],
        "minus infinite": [0, -float("inf"), 1, 4, 5],
        "negative index": [-1, 1, 1, 5, 5],
        "index too large": [2, 1, 1, 5, 5],
        "nan index": [float("nan"), 1, 1, 5, 5],
        "overflowing product": [0, -3e38, -3e38, 3e38, 3e38],
    }

    @pytest.mark.parametrize("row", list(bad.values()), ids=list(bad))
    @pytest.mark.parametrize("sampling_ratio", [-1, 2])
    def test_zeros_and_no_gradient(self, row, sampling_ratio):
        feature = torch.randn(2, 3, 8, 8, requires_grad=True)
        boxes = torch.tensor([[0, 1, 1, 6, 6], row, [1, 0, 0, 8, 8]], dtype=torch.float32)
        pooled = ops.roi_align(feature, boxes, 2, 1.0, sampling_ratio)
        assert not pooled[1].any()
        good = ops.roi_align(feature, boxes[[0, 2]], 2, 1.0, sampling_ratio)
        assert torch.equal(pooled[[0, 2]], good)
        (grad,) = torch.autograd.grad(pooled[1].sum(), feature)
        assert not grad.any()

    @pytest.mark.parametrize("name", ["nan", "infinite", "negative index", "index too large"])
    def test_checked(self, name):
        boxes = torch.tensor([[0, 1, 1, 6, 6], self.bad[name]], dtype=torch.float32)
        with ops.checked(), pytest.raises(ValueError, match="roi_align: boxes must"):
            ops.roi_align(torch.randn(2, 3, 8, 8), boxes, 2)

    @pytest.mark.parametrize("extent", [1e4, 1e9, 1e30])
    def test_huge_roi_is_bounded_work(self, extent):
        """An adaptive grid of a huge RoI has up to 4e60 samples; only samples on the map cost time."""
        feature = torch.ones(1, 2, 6, 6)
        pooled = ops.roi_align(feature, torch.tensor([[0, -extent, -extent, extent, extent]]), 3)
        assert torch.isfinite(pooled).all()
        if extent == 1e4:
            expected = reference.roi_align(feature, torch.tensor([[0, -extent, -extent, extent, extent]]), 3)
            assert_near(pooled, expected, torch.float32, factor=100)

    @pytest.mark.parametrize("sampling_ratio", [0, 2, 5])
    @pytest.mark.parametrize(
        "layout, dtype", [(torch.contiguous_format, torch.float32), (torch.channels_last, torch.float64)]
    )
    def test_bins_of_all_sizes(self, layout, sampling_ratio, dtype):
        """Bins much smaller and much larger than a cell, reversed boxes, more bins than a GPU block takes."""
        feature = torch.randn(1, 4, 40, 50, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        sides = 2.0 ** torch.arange(-6, 7, dtype=torch.float64)
        corner = torch.rand(26, 2, dtype=torch.float64) * 30 - 2
        size = torch.stack([sides, sides.roll(1)], dim=1).repeat(2, 1)
        size[20:] *= torch.tensor([[-1.0, 1], [1, -1], [-1, -1]]).repeat(2, 1)
        boxes = torch.cat([torch.zeros(26, 1), corner, corner + size], dim=1)
        boxes[13:20, 1:] = boxes[13:20, 1:].round()
        for output_size in ((3, 2), (5, 18)):
            expected = reference.roi_align(feature, boxes.to(dtype), output_size, 1.0, sampling_ratio, True)
            actual = ops.roi_align(feature, boxes, output_size, 1.0, sampling_ratio, True)
            assert_near(actual, expected, dtype, factor=10)
            grad = torch.randn_like(expected)
            expected_grad = torch.autograd.grad(expected, feature, grad)
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                try:
                    actual_grad = torch.autograd.grad(actual, feature, grad, retain_graph=True)
                finally:
                    torch.use_deterministic_algorithms(False)
                assert_near(actual_grad, expected_grad, dtype, factor=10, what="gradient")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_cells_between_samples_are_not_read(self, value):
        """Two samples per axis in a bin 16 cells wide skip most cells, whose values have no effect."""
        feature = torch.ones(1, 8, 16, 16)
        feature[:, :, 8, 8] = value
        boxes = torch.tensor([[0, 0.5, 0.5, 16.5, 16.5]])
        assert torch.equal(ops.roi_align(feature, boxes, 1, sampling_ratio=2), torch.ones(1, 8, 1, 1))

    def test_checked_leaves_shapes_to_the_operator(self):
        with ops.checked(), pytest.raises(RuntimeError, match=r"boxes must have shape \(K, 5\).*got shape \(5\)"):
            ops.roi_align(torch.randn(2, 3, 8, 8), torch.zeros(5), 2)

    @pytest.mark.parametrize("aligned", [False, True])
    def test_largest_sampling_ratio(self, aligned):
        """The largest sampling ratio gives the same means as a small one, for proper, empty and reversed RoIs."""
        feature = torch.full((1, 2, 6, 6), 3.0, dtype=torch.float64)
        boxes = torch.tensor([[0, 1, 1, 4, 4], [0, 2, 2, 2, 2], [0, 4, 4, 1, 1]], dtype=torch.float64)
        assert_near(
            ops.roi_align(feature, boxes, 1, 1.0, 1 << 16, aligned),
            ops.roi_align(feature, boxes, 1, 1.0, 2, aligned),
            torch.float64,
        )

    def test_reversed_box_is_empty_when_aligned(self):
        boxes = torch.tensor([[0, 5.0, 5.0, 1.0, 1.0]])
        assert not ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2, aligned=True).any()
        assert ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2, aligned=False).all()

    def test_half_features_keep_box_precision(self):
        """Float16 cannot hold fractions of coordinates above 2048, so boxes are never cast to it."""
        feature = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 4, 64) % 7
        boxes = torch.tensor([[0, 2049.3, 0, 2052.7, 3]])
        full = ops.roi_align(feature, boxes, 1, 1 / 64, 2)
        half = ops.roi_align(feature.half(), boxes, 1, 1 / 64, 2)
        assert_near(half, full, torch.float16)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_sums_are_kept_in_float32(self, dtype):
        """In 16 bits, the sums of 4096 ones and of 4608 gradients would stop growing."""
        feature = torch.ones(1, 8, 64, 64, dtype=dtype, requires_grad=True)
        pooled = ops.roi_align(feature, torch.tensor([[0, 0.0, 0.0, 64.0, 64.0]]), 1, sampling_ratio=-1, aligned=True)
        assert torch.equal(pooled, torch.ones_like(pooled))
        boxes = torch.tensor([[0, 0.0, 0.0, 1.0, 1.0]]).expand(4608, 5)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                feature = torch.ones(1, 8, 1, 1, dtype=dtype, requires_grad=True)
                ops.roi_align(feature, boxes, 1, sampling_ratio=1, aligned=True).sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
            assert torch.equal(feature.grad, torch.full_like(feature, 4608))


class TestShapes:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_empties(self, layout):
        feature = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout).requires_grad_()
        none = ops.roi_align(feature, torch.zeros(0, 5), (2, 3))
        assert none.shape == (0, 3, 2, 3)
        (grad,) = torch.autograd.grad(none.sum(), feature)
        assert not grad.any()
        assert ops.roi_align(torch.randn(2, 0, 8, 8), torch.zeros(4, 5), 2).shape == (4, 0, 2, 2)
        assert not ops.roi_align(torch.randn(0, 3, 8, 8), torch.zeros(4, 5), 2).any()
        assert not ops.roi_align(torch.randn(2, 3, 0, 8), torch.zeros(4, 5), 2).any()

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("channels", [129, 260])
    def test_channels_in_several_passes(self, layout, channels):
        """More channels than a warp of the CUDA kernels holds at a time, in accesses of one and of two channels."""
        feature = torch.randn(2, channels, 9, 11, dtype=torch.float64).contiguous(memory_format=layout)
        boxes = random_boxes(5, 2, 10.0)
        torch.testing.assert_close(ops.roi_align(feature, boxes, 3), reference.roi_align(feature, boxes, 3))

    def test_box_list_and_module(self):
        feature = torch.randn(2, 3, 8, 8)
        boxes = [torch.tensor([[1.0, 1, 5, 5], [0, 0, 3, 4]]), torch.tensor([[2.0, 2, 7, 6]])]
        rows = torch.tensor([[0, 1.0, 1, 5, 5], [0, 0, 0, 3, 4], [1, 2, 2, 7, 6]])
        expected = ops.roi_align(feature, rows, 2, 0.5, 2, True)
        assert torch.equal(ops.roi_align(feature, boxes, 2, 0.5, 2, True), expected)
        module = ops.RoIAlign(2, 0.5, 2, True)
        assert torch.equal(module(feature, boxes), expected)
        assert "sampling_ratio=2" in repr(module)

    def test_box_list_of_many_images_in_16_bits(self):
        """bfloat16 cannot represent 257, so image indices do not have the dtype of the boxes."""
        feature = torch.arange(300.0).view(300, 1, 1, 1).expand(300, 1, 4, 4)
        boxes = [torch.tensor([[0.0, 0, 2, 2]], dtype=torch.bfloat16)] * 300
        assert torch.equal(ops.roi_align(feature, boxes, 1).flatten(), torch.arange(300.0))

    def test_vmap_over_nothing(self):
        with pytest.raises(NotImplementedError, match="roi_align: vmap over a dimension of size 0"):
            torch.func.vmap(lambda x: ops.roi_align(x, torch.zeros(1, 5), 2))(torch.zeros(0, 1, 3, 8, 8))

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((torch.randn(3, 8, 8), torch.zeros(1, 5), 2), r"input must be \(N, C, H, W\), got shape \(3, 8, 8\)"),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 4), 2), r"boxes must have shape \(K, 5\).*got shape \(1, 4\)"),
            ((torch.ones(1, 3, 8, 8).int(), torch.zeros(1, 5), 2), "input must be float32.*got int32"),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 5).int(), 2), "boxes must be float32.*got int32"),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 5), 0), r"output_size must be positive, got \(0, 0\)"),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 5), 2, -1.0), "spatial_scale must be positive.* got -1"),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 5), 2, float("inf")), "spatial_scale must be .*finite, got inf"),
            (
                (torch.randn(1, 3, 8, 8), torch.zeros(1, 5), 2, 1.0, 2**62),
                "sampling_ratio must be at most 65536, got 4",
            ),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 5), 2, 1.0, 2.5), "sampling_ratio must be an integer, got 2.5"),
            (
                (torch.randn(1, 3, 8, 8), torch.zeros(1, 5), 2**22),
                r"out of memory.*shape \(1, 3, 4194304, 4194304\) and dtype",
            ),
            ((torch.randn(1, 3, 8, 8), torch.zeros(1, 5), (1, 2, 3)), r"output_size must be .* pair, got \(1, 2, 3\)"),
            ((torch.randn(1, 3, 8, 8), [torch.zeros(1, 4)] * 2, 2), "one tensor per image, got 2 for a batch of 1"),
            ((torch.randn(1, 3, 8, 8), [torch.zeros(1, 5)], 2), r"boxes\[0\] must have shape \(K, 4\), got \(1, 5\)"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, arguments, message):
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.roi_align(*arguments)


class TestGoldens:
    """RoIAlign of the released implementation (mmcv, aligned, adaptive or two samples), forward and backward."""

    @pytest.fixture
    def arrays(self, goldens):
        return {name: torch.as_tensor(a) for name, a in np.load(goldens / "ops" / "roi_align.npz").items()}

    def test_forward(self, arrays):
        out = ops.roi_align(arrays["feat"], arrays["rois"], 14, 1 / 8, 0, True)
        assert_near(out, arrays["out14_stride8"], torch.float32)
        out = ops.roi_align(arrays["feat"], arrays["rois"], 7, 1 / 16, 2, True)
        assert_near(out, arrays["out7_stride16_s2"], torch.float32)

    def test_backward(self, arrays):
        feature = arrays["feat"].clone().requires_grad_()
        out = ops.roi_align(feature, arrays["rois"], 14, 1 / 8, 0, True)
        (grad,) = torch.autograd.grad(out, feature, arrays["grad_weights14_stride8"])
        assert_near(grad, arrays["grad_feat14_stride8"], torch.float32)
