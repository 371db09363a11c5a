# SPDX-License-Identifier: Apache-2.0
"""panoptic_quality_counts: `OpMatrix`, equality with the counts computed without torch, ids out of range."""

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample

from spatialflow import ops
from spatialflow.ops import reference


def id_maps(height: int, width: int, segments: int, cell: int) -> list[torch.Tensor]:
    coarse = torch.randint(0, segments + 1, (2, height // cell + 1, width // cell + 1), dtype=torch.int32)
    return list(coarse.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width])


def sample(height: int, width: int, segments: int, cell: int):
    def tensors(extra: int = 0) -> list:
        return id_maps(height + extra, width + 2 * extra, segments, cell)

    def build() -> OpSample:
        return OpSample(
            op=ops.panoptic_quality_counts,
            reference=reference.panoptic_quality_counts,
            tensors=tensors(),
            options={"gt_segments": segments, "pred_segments": segments + 2},
            differentiable=(),
            converted=(),
            images=(),
            raw=lambda gt, pred, gt_segments, pred_segments: (
                torch.ops.spatialflow.panoptic_quality_counts,
                (gt, pred, gt_segments, pred_segments),
            ),
            resized=tensors,
        )

    return build


class TestPanopticQualityCounts(OpMatrix):
    has_gradient = False
    samples = {"large segments": sample(90, 121, 7, 11), "single pixels": sample(33, 70, 30, 1)}
    thin_samples = {
        f"{height} x {width}": sample(height, width, 7, 3)
        for height, width in ((1, 70), (70, 1), (1, 1), (0, 70), (70, 0))
    }

    def test_layouts(self, make_sample):
        sample = make_sample()
        expected = sample.op(*sample.tensors, **sample.options)
        turned = [value.T.contiguous().T for value in sample.tensors]
        assert torch.equal(sample.op(*turned, **sample.options), expected)
        sliced = [torch.stack([value, value], -1)[..., 0] for value in sample.tensors]
        assert torch.equal(sample.op(*sliced, **sample.options), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_equal_to_the_counting_without_torch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gt, pred = id_maps(201, 150, 12, 7)
        counts = ops.panoptic_quality_counts(gt, pred, 12, 12)
    finally:
        torch.set_num_threads(before)
    pytest.importorskip("spatialflow._evaluation", reason="spatialflow._evaluation is not built for this Python")
    from spatialflow.panoptic.pair_counts import count_pairs

    gt_ids, pred_ids, pixels = count_pairs(gt.cpu().numpy(), pred.cpu().numpy())
    expected = np.zeros((13, 13), np.int64)
    expected[gt_ids, pred_ids] = pixels
    np.testing.assert_array_equal(counts.cpu().numpy(), expected)
    assert int(counts.sum()) == gt.numel()


def test_table_of_pairs_overflows():
    """Nearly every pixel is a different pair: a bounded table of pairs overflows, and no pair is lost."""
    maps = id_maps(90, 100, 250, 1)
    expected = reference.panoptic_quality_counts(*maps, 250, 250)
    assert int((expected != 0).sum()) > 7000
    assert torch.equal(ops.panoptic_quality_counts(*maps, 250, 250), expected)


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 31, 33, 34, 35, 1023, 8193])
def test_any_number_of_pixels(pixels):
    """Maps end inside a vector, or one pixel after those of the first block."""
    gt, pred = id_maps(1, pixels, 3, 5)
    assert torch.equal(ops.panoptic_quality_counts(gt, pred, 3, 3), reference.panoptic_quality_counts(gt, pred, 3, 3))


def test_maps_that_begin_between_vectors():
    gt, pred = (
        torch.cat([torch.zeros(1, dtype=torch.int32), m.flatten()])[1:].view(90, 121) for m in id_maps(90, 121, 5, 9)
    )
    assert gt.is_contiguous() and gt.data_ptr() % 16 == 4
    assert torch.equal(ops.panoptic_quality_counts(gt, pred, 5, 5), reference.panoptic_quality_counts(gt, pred, 5, 5))


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_are_not_counted(bad):
    gt = torch.tensor([[1, 1, bad, 3]], dtype=torch.int32)
    pred = torch.tensor([[2, bad, 2, 0]], dtype=torch.int32)
    counts = ops.panoptic_quality_counts(gt, pred, 3, 3)
    assert counts.nonzero().tolist() == [[1, 2], [3, 0]] and int(counts.sum()) == 2


def test_empties():
    for shape in ((0, 4), (3, 0)):
        maps = torch.zeros(shape, dtype=torch.int32)
        assert not ops.panoptic_quality_counts(maps, maps, 2, 5).any()
    maps = torch.zeros((3, 4), dtype=torch.int32)
    assert ops.panoptic_quality_counts(maps, maps, 0, 0).tolist() == [[12]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3).int(), torch.zeros(3).int(), 1, 1), r"gt_map must be \(H, W\), got shape \(3\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 2).int(), 1, 1), "gt_map must be int32, got float32"),
        ((torch.zeros(3, 2).int(), torch.zeros(3, 2).long(), 1, 1), "pred_map must be int32, got int64"),
        (
            (torch.zeros(3, 2).int(), torch.zeros(2, 3).int(), 1, 1),
            r"pred_map must have gt_map's shape \(3, 2\), got \(2, 3\)",
        ),
        ((torch.zeros(3, 2).int(), torch.zeros(3, 2).int(), -1, 1), "gt_segments must be from 0 to 2.31 - 1, got -1"),
        ((torch.zeros(3, 2).int(), torch.zeros(3, 2).int(), 1, -4), "pred_segments must be from 0 to 2.31 - 1, got -4"),
        (
            (torch.zeros(3, 2).int(), torch.zeros(3, 2).int(), 2**63 - 1, 1),
            "gt_segments must be from 0 .*, got 9223372036854775807",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(arguments, message):
    with pytest.raises(RuntimeError, match="panoptic_quality_counts: " + message):
        ops.panoptic_quality_counts(*arguments)
