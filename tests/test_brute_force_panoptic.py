# SPDX-License-Identifier: Apache-2.0
"""Images, masks, stuff labels and panoptic maps against `tests/fuzz/brute_force`: small cases, bad values and ties."""

import numpy as np
import pytest
import torch
from fuzz import brute_force
from helpers.brute_force_checks import DTYPES, INF, NAN, compare, random, rows
from helpers.tensors import TOLERANCE
from torch import Tensor

from spatialflow import ops


def squares(height: int, width: int, *corners: tuple[int, int, int, int]) -> Tensor:
    masks = torch.zeros(len(corners), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners):
        mask[y1:y2, x1:x2] = True
    return masks


class TestPanopticMerge:
    masks = squares(6, 8, (0, 0, 4, 4), (0, 0, 4, 5), (2, 2, 8, 6), (0, 0, 0, 0), (1, 1, 3, 3), (6, 0, 8, 2))
    labels = torch.tensor([3, 5, -7, 2**40, 1, 0])
    stuff = (torch.arange(48).reshape(6, 8) // 7 - 1).to(torch.int32)  # includes -1 and labels that are too large
    boxes = rows([0, 0, 4, 4], [-5, -5, 9, 9], [2.9, 2.9, 8.9, 6.9], [NAN, 0, 8, 8], [3, 3, 1, 1], [6.5, -0.5, INF, 2])

    @pytest.mark.parametrize("box_overlap_threshold", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("overlap_threshold", [0.0, 0.25, 0.5, 1.0])
    def test_thresholds(self, overlap_threshold: float, box_overlap_threshold: float) -> None:
        for scores in ((0.9, 0.8, 0.7, 0.6, 0.5, 0.4), (0.5,) * 6, (NAN, INF, 0.2, 1, -INF, 1e300)):
            for boxes, area in ((None, 0), (self.boxes, 0), (self.boxes.float(), 3)):
                compare(
                    "panoptic_merge",
                    self.masks,
                    rows(*scores),
                    self.labels,
                    boxes,
                    self.stuff,
                    5,
                    ignored_stuff=(1,),
                    overlap_threshold=overlap_threshold,
                    box_overlap_threshold=box_overlap_threshold,
                    stuff_area_threshold=area,
                )

    def test_score_at_the_threshold(self) -> None:
        """The comparison is in float64: 0.7 in float32 is 0.69999999, which is below a threshold of 0.7."""
        for dtype in TOLERANCE:
            scores = torch.full((6,), 0.7, dtype=dtype)
            compare("panoptic_merge", self.masks, scores, self.labels, None, self.stuff, 2, score_threshold=0.7)

    def test_shares_at_the_threshold(self) -> None:
        """Equality is accepted for the overlap of a mask, the free share of a box and the area of stuff."""
        masks = squares(2, 6, (0, 0, 2, 2), (1, 0, 3, 2), (0, 0, 0, 0))
        boxes = rows([0, 0, 1, 1], [0, 0, 1, 1], [2, 0, 4, 2])
        stuff = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
        merged = compare(
            "panoptic_merge",
            masks,
            rows(0.9, 0.8, 0.7),
            torch.tensor([7, 8, 9]),
            boxes,
            stuff,
            1,
            overlap_threshold=0.5,
            box_overlap_threshold=0.5,
            stuff_area_threshold=4,
        )
        assert merged[0][0].tolist() == [1, 1, 2, 4, 3, 3]

    def test_nothing(self) -> None:
        none = (torch.zeros(0, 3, 4, dtype=torch.uint8), rows(), torch.zeros(0, dtype=torch.int64))
        compare("panoptic_merge", *none, rows().reshape(0, 4), torch.zeros(3, 4, dtype=torch.uint8), 1)
        compare("panoptic_merge", self.masks[:, :0], rows(*[1] * 6), self.labels, self.boxes, self.stuff[:0], 2)


def test_panoptic_quality_counts() -> None:
    truth, prediction = torch.randint(-2, 6, (2, 9, 11)).int()
    compare("panoptic_quality_counts", truth, prediction, 3, 2)
    compare("panoptic_quality_counts", truth[:0], prediction[:0], 0, 1)


class TestPasteMasks:
    @DTYPES
    @pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
    def test_boxes(self, dtype: torch.dtype, threshold: float) -> None:
        boxes = rows(
            [1.2, 0.7, 8.1, 6.6],
            [-3, -4, 20, 15],
            [2, 2, 6, 5],
            [3, 3, 3, 6],
            [6, 5, 2, 2],
            [NAN, 0, 5, 5],
            [0, 0, INF, 5],
            [-1e30, -1e30, 1e30, 1e30],
            [0, 0, 1e-300, 5],
        )
        compare("paste_masks", (random(9, 3, 4) * 4).to(dtype), boxes, (7, 9), threshold)

    def test_logits(self) -> None:
        """Logits of 0, inf and -inf have probabilities 0.5, 1 and 0; pixels that interpolate NaN are not set."""
        logits = rows([[0, 0, INF, INF], [0, 0, -INF, NAN], [-1, -INF, 40, 40]])
        for dtype in (torch.float64, torch.float16):
            compare("paste_masks", logits.to(dtype), rows([0, 0, 8, 8]), (9, 9), 0.5)


class TestPreprocessImages:
    @pytest.mark.parametrize("size", [(5, 7), (10, 14), (2, 3), (9, 4), (1, 1), (3, 20)])
    def test_sizes(self, size: tuple[int, int]) -> None:
        """Cover the original size, twice and exactly half of it (the mean of four pixels), and odd ratios."""
        image = torch.randint(0, 256, (5, 7, 3)).to(torch.uint8)
        halved = torch.randint(0, 256, (2 * size[0], 2 * size[1], 3)).to(torch.uint8)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            settings = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 4, dtype)
            compare("preprocess_images", [image, halved], [size, size], *settings, dtype=dtype)
            compare("preprocess_images", image, size, *settings, dtype=dtype)
        exact = ops.preprocess_images([image, halved], [size, size], *settings[:3]).cpu().numpy()
        assert np.array_equal(exact, brute_force.preprocess_images([image, halved], [size, size], *settings[:3]))


class TestStuffLabels:
    @DTYPES
    @pytest.mark.parametrize("sizes", [((12, 16), (12, 16)), ((10, 13), (7, 20)), ((1, 1), (3, 2))], ids=str)
    def test_sizes(self, dtype: torch.dtype, sizes: tuple) -> None:
        compare("stuff_labels", random(5, 3, 4).to(dtype), *sizes)

    def test_ties(self) -> None:
        compare("stuff_labels", torch.randint(0, 2, (1, 3, 4)).float().expand(3, 3, 4), (12, 16), (12, 16))

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_logits_that_are_not_finite(self, bad: float) -> None:
        """NaN and minus infinity lose in all pixels that read them; plus infinity wins where no NaN results."""
        logits = random(3, 4, 4)
        logits[0] += 3
        logits[0, 1, 2] = bad
        labels = compare("stuff_labels", logits, (16, 16), (16, 16))[0]
        assert 0 < (labels != 0).sum() < labels.size
        compare("stuff_labels", torch.full((3, 2, 2), bad), (8, 8), (8, 8))
