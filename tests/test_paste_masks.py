# SPDX-License-Identifier: Apache-2.0
"""paste_masks: `OpMatrix`, the released masks, hand-made cases, degenerate and bad values."""

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import DEVICE

from spatialflow import ops
from spatialflow.ops import reference


def instances(count: int, cells: tuple[int, int], extent: float) -> list[torch.Tensor]:
    logits = torch.nn.functional.interpolate(
        torch.randn(count, 1, 4, 4, dtype=torch.float64) * 5, cells, mode="bilinear"
    )
    center = torch.rand(count, 2, dtype=torch.float64) * extent
    radius = torch.rand(count, 2, dtype=torch.float64) * extent * 0.6 + 0.1
    return [logits[:, 0], torch.cat([center - radius, center + radius], dim=1)]


def sample(count: int, cells: tuple[int, int], size: tuple[int, int], **options):
    def tensors(extra: int = 0) -> list:
        return instances(count + extra, (cells[0] + extra, cells[1] + extra), 90.0)

    def raw(mask_logits, boxes, size, threshold=0.5):
        return torch.ops.spatialflow.paste_masks, (mask_logits, boxes, *size, threshold)

    def build() -> OpSample:
        return OpSample(
            op=ops.paste_masks,
            reference=reference.paste_masks,
            tensors=tensors(),
            options={"size": size} | options,
            differentiable=(),
            images=(),
            raw=raw,
            resized=tensors,
        )

    return build


class TestPasteMasks(OpMatrix):
    has_gradient = False
    samples = {
        "28 cells": sample(7, (28, 28), (88, 101)),
        "not square": sample(5, (14, 9), (130, 60), threshold=0.7),
        "low threshold": sample(5, (3, 5), (64, 64), threshold=0.2),
        "two cells": sample(6, (2, 2), (33, 70)),
    }
    thin_samples = {
        "one mask": sample(1, (5, 6), (64, 64)),
        "no masks": sample(0, (5, 6), (64, 64)),
        "masks of one row": sample(3, (1, 6), (64, 64)),
        "masks of one column": sample(3, (5, 1), (64, 64)),
        "masks of one cell": sample(3, (1, 1), (64, 64)),
        "one row": sample(3, (5, 6), (1, 64)),
        "one column": sample(3, (5, 6), (64, 1)),
        "no rows": sample(3, (5, 6), (0, 64)),
    }

    def test_autocast(self, make_sample):
        """Autocast changes nothing, as masks are only compared with a threshold."""
        sample = make_sample()
        tensors = [value.float() for value in sample.tensors]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = sample.op(*tensors, **sample.options)
        assert torch.equal(actual, sample.op(*tensors, **sample.options))

    def test_layouts(self, make_sample):
        sample = make_sample()
        logits, boxes = sample.tensors
        expected = sample.op(logits, boxes, **sample.options)
        for strided in (logits.mT.contiguous().mT, torch.stack([logits, logits], -1)[..., 1], logits.flip(0).flip(0)):
            assert torch.equal(sample.op(strided, boxes.T.contiguous().T, **sample.options), expected)


class TestGoldens:
    """Masks of the released implementation, at original size with rescaled boxes and at a larger size."""

    @pytest.mark.parametrize("case", ["rescale", "norescale"])
    def test_masks(self, large_goldens, case):
        arrays = np.load(large_goldens / "ops" / "mask_paste.npz")
        labels = torch.as_tensor(arrays["labels"]).long()
        logits = torch.as_tensor(arrays["mask_logits"])[torch.arange(len(labels)), labels]
        boxes = torch.as_tensor(arrays["boxes_netscale"])
        if case == "rescale":
            boxes = boxes / torch.as_tensor(arrays["scale_factor"])
        expected = torch.as_tensor(arrays[f"masks_{case}"])
        masks = ops.paste_masks(logits, boxes, tuple(expected.shape[1:]))
        # A box without area yields a band of pixels in the released code; here it yields none.
        proper = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        assert int(proper.sum()) == 10
        assert torch.equal(masks[proper], expected[proper])
        assert not masks[~proper].any()


class TestHandMade:
    def test_full_mask_covers_exactly_the_pixels_with_their_center_in_the_box(self):
        logits = torch.full((1, 28, 28), 50.0)
        for box in ([2.0, 3.0, 9.0, 7.0], [2.4, 3.4, 9.4, 7.4], [2.6, 3.6, 9.6, 7.6], [-3.0, -2.0, 30.0, 40.0]):
            mask = ops.paste_masks(logits, torch.tensor([box]), (10, 12))[0]
            xs, ys = torch.arange(12) + 0.5, torch.arange(10) + 0.5
            expected = ((ys > box[1]) & (ys < box[3]))[:, None] & ((xs > box[0]) & (xs < box[2]))
            assert torch.equal(mask, expected), box

    def test_probability_exactly_at_the_threshold_is_inside(self):
        mask = ops.paste_masks(torch.zeros(1, 7, 7), torch.tensor([[0.0, 0.0, 35.0, 35.0]]), (35, 35))
        assert mask[0, 3:-3, 3:-3].all()

    def test_one_cell_fades_to_half_at_the_edge_of_the_box(self):
        """The probability falls linearly from the only cell to the zeros around it: 0.5 at the box's edge."""
        mask = ops.paste_masks(torch.full((1, 1, 1), 50.0), torch.tensor([[4.5, 0.0, 10.5, 9.0]]), (9, 15))[0]
        assert torch.equal(mask[4].nonzero().flatten(), torch.arange(4, 11))

    def test_half_a_mask(self):
        logits = torch.full((1, 2, 2), -20.0)
        logits[0, :, 1] = 20.0
        mask = ops.paste_masks(logits, torch.tensor([[10.0, 0.0, 30.0, 6.0]]), (6, 40))[0]
        assert torch.equal(mask.any(0).nonzero().flatten(), torch.arange(20, 30))

    def test_threads_do_not_matter(self):
        logits, boxes = instances(9, (28, 28), 200.0)
        before = torch.get_num_threads()
        try:
            masks = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                masks.append(ops.paste_masks(logits, boxes, (190, 210)))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
        assert masks[0].any()


class TestBadValues:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("corner", range(4))
    def test_box_that_is_not_finite_has_no_pixels(self, bad, corner):
        boxes = torch.tensor([[1.0, 1.0, 9.0, 9.0], [0.0, 0.0, 10.0, 10.0]])
        boxes[0, corner] = bad
        masks = ops.paste_masks(torch.full((2, 4, 4), 9.0), boxes, (10, 10))
        assert not masks[0].any() and masks[1, 1:-1, 1:-1].all()
        with ops.checked(), pytest.raises(ValueError, match=r"paste_masks: boxes must be finite.*\(0, "):
            ops.paste_masks(torch.full((2, 4, 4), 9.0), boxes, (10, 10))

    @pytest.mark.parametrize(
        "box", [[5, 0, 5, 9], [0, 5, 9, 5], [9, 9, 1, 1], [9, 0, 1, 9], [20, 20, 30, 30], [-9, -9, -1, -1]]
    )
    def test_box_without_pixels(self, box):
        assert not ops.paste_masks(torch.full((1, 4, 4), 9.0), torch.tensor([box]).float(), (10, 10)).any()

    @pytest.mark.parametrize("extent", [1e-30, 1e-5, 1e9, 1e30, 3e38])
    def test_tiny_and_huge_boxes(self, extent):
        boxes = torch.tensor([[-extent, -extent, extent, extent]], dtype=torch.float64)
        masks = ops.paste_masks(torch.full((1, 5, 5), 9.0), boxes, (8, 8))
        assert masks.all() if extent > 1 else not masks.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_logits_that_are_not_finite(self, dtype):
        logits = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)[:, None, None].expand(3, 4, 4)
        masks = ops.paste_masks(logits, torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(3, 4), (8, 8))
        assert not masks[0].any() and masks[1, 1:-1, 1:-1].all() and not masks[2].any()


class TestShapes:
    @pytest.mark.parametrize("size", [(0, 5), (5, 0), (4, 6)])
    def test_empties(self, size):
        assert ops.paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), size).shape == (0, *size)
        masks = ops.paste_masks(torch.zeros(2, 3, 3), torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(2, 4), size)
        assert masks.shape == (2, *size) and masks.dtype == torch.bool
        for cells in ((0, 3), (3, 0)):
            assert not ops.paste_masks(torch.zeros(2, *cells), torch.ones(2, 4), size).any()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.zeros(3, 3), torch.zeros(3, 4), (2, 2)), r"mask_logits must be \(K, MH, MW\), got shape \(3, 3\)"),
            ((torch.zeros(1, 3, 3).int(), torch.zeros(1, 4), (2, 2)), "mask_logits must be float32.*got int32"),
            ((torch.zeros(2, 3, 3), torch.zeros(1, 4), (2, 2)), r"boxes must have shape \(2, 4\).*got \(1, 4\)"),
            ((torch.zeros(1, 3, 3), torch.zeros(1, 4).int(), (2, 2)), "boxes must be float32.*got int32"),
            ((torch.zeros(1, 3, 3), torch.zeros(1, 4), (-2, 2)), r"size must not be negative, got \(-2, 2\)"),
            ((torch.zeros(1, 3, 3), torch.zeros(1, 4), (2, 2), 0.0), r"threshold must lie in \(0, 1\], got 0"),
            # Not zero in double precision, but zero in float32, the type of the comparison.
            ((torch.zeros(1, 3, 3), torch.zeros(1, 4), (2, 2), 1e-46), r"threshold must lie in \(0, 1\], got 1e-46"),
            ((torch.zeros(1, 3, 3), torch.zeros(1, 4), (2, 2), float("nan")), "threshold must lie in .*, got nan"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, arguments, message):
        with pytest.raises(RuntimeError, match="paste_masks: " + message):
            ops.paste_masks(*arguments)
