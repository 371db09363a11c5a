# SPDX-License-Identifier: Apache-2.0
"""RoIAlign, NMS and candidates against `tests/fuzz/brute_force`: small cases, bad values and ties."""

import numpy as np
import pytest
import torch
from fuzz import brute_force
from helpers.brute_force_checks import DTYPES, INF, NAN, assert_same, compare, compare_gradients, random, rows
from helpers.tensors import TOLERANCE

from spatialflow import ops

# A valid RoI, then RoIs that are each unusual or invalid in one way.
ROIS = rows(
    [0, 1.3, 2.1, 9.7, 8.2],
    [1, -3.0, -2.0, 30.0, 25.0],  # reaches beyond the map
    [0, 9.7, 8.2, 1.3, 2.1],  # reversed
    [0, 9.7, 2.1, 1.3, 8.2],  # reversed along x: a negative area
    [0, 4.0, 4.0, 4.0, 4.0],  # empty
    [0, 40.0, 40.0, 50.0, 50.0],  # outside
    [2, 1.3, 2.1, 9.7, 8.2],  # no such image
    [-1, 1.3, 2.1, 9.7, 8.2],
    [-0.5, 1.3, 2.1, 9.7, 8.2],
    [1.5, 1.3, 2.1, 9.7, 8.2],  # the index is truncated: image 1
    [NAN, 1.3, 2.1, 9.7, 8.2],
    [0, NAN, 2.1, 9.7, 8.2],
    [0, 1.3, 2.1, INF, 8.2],
    [0, 1.3, 2.1, 1e300, 8.2],  # infinite in float32
    [0, 1.3, 2.1, 3e38, 8.2],  # so large that the mean is 0
)


class TestRoiAlign:
    @DTYPES
    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    def test_boxes(self, dtype: torch.dtype, aligned: bool, sampling_ratio: int) -> None:
        features = random(2, 3, 6, 7).to(dtype)
        compare("roi_align", features, ROIS, (2, 3), 0.5, sampling_ratio, aligned, dtype=dtype)

    def test_list_of_boxes_and_no_boxes(self) -> None:
        features, boxes = random(2, 3, 6, 7), [ROIS[:2, 1:], ROIS[2:3, 1:]]
        of_list = ops.roi_align(features, boxes, 2).cpu().numpy()
        assert_same(of_list, brute_force.roi_align(features, boxes, 2), 1e-12, "boxes per image")
        compare("roi_align", random(2, 3, 6, 7), ROIS[:0], 2, dtype=torch.float64)

    @pytest.mark.parametrize("shape", [(2, 3, 0, 7), (0, 3, 6, 7), (2, 0, 6, 7)])
    def test_empty_map(self, shape: tuple[int, ...]) -> None:
        compare("roi_align", random(*shape), ROIS, 2, 0.5, 2, dtype=torch.float64)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_features_that_are_not_finite(self, bad: float) -> None:
        """A non-finite cell reaches only bins in which its weight is nonzero."""
        features = random(1, 1, 5, 5)
        features[0, 0, 2, 2] = bad
        places = [(y, x) for y in (0.5, 1.0, 1.5, 2.5, 3.5) for x in (1.5, 2.0, 2.5, 3.4)]
        boxes = rows(*([0, x, y, x, y] for y, x in places))
        pooled = compare("roi_align", features, boxes, 1, 1.0, 1, True, dtype=torch.float64)[0]
        assert 0 < np.isfinite(pooled).sum() < pooled.size

    def test_sample_at_the_border(self) -> None:
        """If rounding decides whether a sample is on the map, the result is that of one of the perturbed boxes."""
        features = random(1, 2, 3, 5).float()
        boxes = rows([0, -1.75, 3.5, -0.75, 12.25]).float()  # the first sample is at x = -1 up to rounding
        args = (2, 0.3, 3, True)
        actual = ops.roi_align(features, boxes, *args).cpu().numpy()
        sides = [brute_force.roi_align(features, moved, *args) for moved in brute_force.perturbed_boxes(boxes)]
        assert max(np.abs(side - sides[0]).max() for side in sides) > 0.1
        assert np.all(np.min([np.abs(side - actual) for side in sides], axis=0) < 1e-5)

    def test_gradient(self) -> None:
        features = random(2, 2, 4, 5)
        compare_gradients("roi_align", features, ROIS[[0, 1, 2, 6, 11]], (2, 3), 0.5, 0, True, differentiable=(0,))


class TestMultilevelRoiAlign:
    @DTYPES
    @pytest.mark.parametrize("aligned", [False, True])
    def test_boxes(self, dtype: torch.dtype, aligned: bool) -> None:
        levels = [random(2, 3, 9, 8).to(dtype), random(2, 3, 5, 4).to(dtype), random(2, 3, 3, 2).to(dtype)]
        compare("multilevel_roi_align", levels, ROIS, (2, 3), (2, 4, 8), 0, aligned, 4, dtype=dtype)

    def test_level_by_size(self) -> None:
        """A RoI of twice the finest scale is assigned to the second level, a smaller one to the first."""
        levels = [torch.full((1, 1, 40, 40), float(level)) for level in range(3)]
        sides = (0.0, 5.0, 9.99, 10.0, 19.99, 20.0, 39.0, 1e3, 1e19, 3e38)
        boxes = rows(*([0, 0, 0, side, side] for side in sides)).float()
        pooled = compare("multilevel_roi_align", levels, boxes, 1, (1, 1, 1), 1, False, 5.0)[0]
        assert pooled[:7].ravel().tolist() == [0, 0, 0, 1, 1, 2, 2]

    def test_level_without_cells(self) -> None:
        levels = [random(2, 3, 0, 8), random(2, 3, 5, 4)]
        compare("multilevel_roi_align", levels, ROIS, 2, (2, 4), 2, False, 4, dtype=torch.float64)

    def test_gradient(self) -> None:
        levels = [random(2, 2, 4, 4), random(2, 2, 2, 2)]
        compare_gradients("multilevel_roi_align", levels, ROIS, 2, (2, 4), 0, True, 4, differentiable=(0,))


# A box, exact copies of it, and boxes that differ from it in one coordinate or more.
NMS_BOXES = rows(
    [0, 0, 10, 10],
    [0, 0, 10, 5],  # intersection over union 0.5 with the first
    [0, 0, 10, 10],
    [20, 20, 30, 30],
    [10, 10, 0, 0],  # reversed
    [0, 0, 0, 10],  # empty
    [0, NAN, 10, 10],
    [0, 0, INF, 10],
    [-INF, -INF, INF, INF],
    [0, 0, 3e38, 3e38],  # finite, but its area overflows in float32
    [0, 0, 1e300, 1e300],
    [0, 0, 1e-30, 1e-30],  # its area is 0 in float32
    [0, 0, 10, 10],
)
NMS_SCORES = rows(0.5, 0.75, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, NAN)


class TestNms:
    @DTYPES
    @pytest.mark.parametrize("threshold", [0, 0.25, 0.5, 1 / 3, 1])
    def test_boxes(self, dtype: torch.dtype, threshold: float) -> None:
        boxes = NMS_BOXES.clamp(-6e4, 6e4) if dtype == torch.float16 else NMS_BOXES
        compare("nms", boxes.to(dtype), NMS_SCORES.to(dtype), threshold)

    def test_overlap_at_the_threshold(self) -> None:
        """A box whose overlap equals the threshold is kept; one float64 tensor makes the comparison float64."""
        boxes = rows([0, 0, 10, 10], [0, 0, 10, 7])
        for scores_dtype in (torch.float32, torch.float64):
            for threshold in (0.7, 0.7 - 1e-9, 0.7 + 1e-9):
                compare("nms", boxes.float(), rows(0.9, 0.8).to(scores_dtype), threshold)

    def test_scores(self) -> None:
        """Infinite scores are first and last, equal scores are ordered by row, and -0 equals 0."""
        boxes = rows(*([20 * k, 0, 20 * k + 10, 10] for k in range(7)))
        kept = compare("nms", boxes, rows(-0.0, 0.0, INF, -INF, 0.0, NAN, -0.0), 0.5)[0]
        assert kept.tolist() == [2, 0, 1, 4, 6, 3]

    def test_no_boxes(self) -> None:
        compare("nms", rows().reshape(0, 4), rows(), 0.5)

    def test_classes(self) -> None:
        idxs = torch.tensor([0, 2**62, -(2**63), 0, 1, 1, 0, 1, 1, 1, 1, 0, 0])
        compare("batched_nms", NMS_BOXES, NMS_SCORES, idxs, 0.3)


class TestMulticlassNms:
    @pytest.mark.parametrize("most", [0, 3, 50])
    def test_batch(self, most: int) -> None:
        boxes = torch.stack([NMS_BOXES, NMS_BOXES.flip(0)])
        scores = torch.stack([NMS_SCORES, NMS_SCORES * 0.5, torch.full_like(NMS_SCORES, 0.5)], dim=1).expand(2, -1, -1)
        for dtype in (torch.float64, torch.float32):
            compare("multiclass_nms", boxes.to(dtype), scores.to(dtype), 0.25, 0.3, most)

    def test_score_at_the_threshold(self) -> None:
        """A score must be strictly larger; for float32 scores the threshold is rounded to float32."""
        boxes = rows([0, 0, 10, 10], [20, 0, 30, 10]).float()
        for dtype in TOLERANCE:
            compare("multiclass_nms", boxes, rows([0.3, 0.25], [0.3000001, 0.5]).to(dtype), 0.3, 0.5, 4)

    def test_one_image_and_nothing(self) -> None:
        compare("multiclass_nms", NMS_BOXES, NMS_SCORES[:, None], 0.6, 0.5, 4)
        compare("multiclass_nms", NMS_BOXES, rows().reshape(13, 0), 0.6, 0.5, 4)
        compare("multiclass_nms", rows().reshape(0, 4), rows().reshape(0, 2), 0.6, 0.5, 4)


class TestSelectCandidates:
    @DTYPES
    @pytest.mark.parametrize("per_level", [0, 7, 100])
    def test_bad_values(self, dtype: torch.dtype, per_level: int) -> None:
        """Logits are tied or not finite, deltas not finite or huge, anchors reversed, empty or not finite."""
        logits = [(random(2, 6, 4, 5) * 2).round() / 2, random(2, 6, 2, 3)]
        deltas = [random(2, 8, 4, 5), random(2, 8, 2, 3)]
        logits[0][0, :, 1, 2], logits[0][1, :3, 0, 0] = rows(NAN, INF, -INF, NAN, NAN, NAN), -INF
        logits[1][1, 4] = NAN
        deltas[0][0, :, :2] = rows(NAN, INF, -INF, 3e38, 0, 0, NAN, -INF)[:, None, None]
        deltas[1][1, :4, 1, 1] = rows(-1e30, 1e30, 100, -100)
        base = rows([[-4, -6, 4, 6], [5, 5, -5, -5]], [[3, 3, 3, 3], [NAN, -4, INF, 4]]).float()
        levels = [[level.to(dtype) for level in tensors] for tensors in (logits, deltas)]
        valid, scale = torch.tensor([[30, 37], [-3, 1 << 62]]), rows([1, 1.5], [0.25, 2]).float()
        box_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        compare("select_candidates", *levels, base, (8, 16), valid, scale, per_level, dtype=box_dtype)

    def test_nothing(self) -> None:
        scale = torch.ones(0, 2)
        compare(
            "select_candidates",
            [random(0, 6, 2, 3)],
            [random(0, 8, 2, 3)],
            rows([[0, 0, 1, 1]] * 2).float(),
            (8,),
            torch.zeros(0, 2, dtype=torch.int64),
            scale,
            5,
        )
