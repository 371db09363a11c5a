# SPDX-License-Identifier: Apache-2.0
"""nms and batched_nms: `OpMatrix`, hand-made cases, thresholds, properties, oracles, and difficult inputs."""

import pytest
import torch
from helpers.nms_cases import iou_matrix, nms_sample, oracle, random_boxes
from helpers.op_matrix import OpMatrix, assert_unchanged_by_autocast
from helpers.tensors import leaves, map_tensors

from spatialflow import ops
from spatialflow.ops import reference

NAN, INF = float("nan"), float("inf")


def sample(count: int, classes: int, iou_threshold: float):
    """Return the builder of a sample of nms if `classes` is 0, else of batched_nms."""
    name = "batched_nms" if classes else "nms"

    def tensors(size: int = 0) -> list:
        boxes, scores = random_boxes(count + size), torch.rand(count + size, dtype=torch.float64)
        return [boxes, scores] + ([torch.randint(classes, (count + size,)) - 3] if classes else [])

    def raw(*tensors, iou_threshold):
        return getattr(torch.ops.spatialflow, name), (*tensors, iou_threshold)

    return lambda: nms_sample(name, tensors, {"iou_threshold": iou_threshold}, raw)


class TestNms(OpMatrix):
    has_gradient = False
    samples = {
        "one class": sample(120, 0, 0.5),
        "one class, low threshold": sample(120, 0, 0.1),
        "classes": sample(120, 5, 0.4),
    }
    thin_samples = {
        "one box": sample(1, 0, 0.5),
        "no boxes": sample(0, 0, 0.5),
        "one box of a class": sample(1, 5, 0.5),
        "no boxes of classes": sample(0, 5, 0.5),
    }

    @pytest.fixture(autouse=True)
    def dynamic_outputs(self):
        """Allow torch.compile to trace a result whose length depends on values."""
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            yield

    def test_layouts(self, make_sample):
        sample = make_sample()
        plain = sample.op(*sample.tensors, **sample.options)
        layouts = {
            "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
            "reversed twice": lambda t: t.flip(0).flip(0),
            "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
            "sliced": lambda t: torch.cat([t, t])[len(t) :],
        }
        for name, layout in layouts.items():
            assert torch.equal(sample.op(*map_tensors(layout, sample.tensors), **sample.options), plain), name
        expanded = [t[:1].expand(t.shape) for t in sample.tensors]
        assert sample.op(*expanded, **sample.options).tolist() == [0]

    def test_autocast(self, make_sample):
        """Boxes and scores keep their precision."""
        assert_unchanged_by_autocast(make_sample())

    def test_gradients_stop_here(self, make_sample):
        """Inputs may require gradients; the result, row numbers, has none, in forward mode too."""
        sample = make_sample()
        boxes, scores, *rest = sample.tensors
        expected = sample.op(boxes, scores, *rest, **sample.options)
        result = sample.op(boxes.clone().requires_grad_(), scores.clone().requires_grad_(), *rest, **sample.options)
        assert torch.equal(result, expected) and not result.requires_grad

        def best(boxes, scores):
            return scores[sample.op(boxes, scores, *rest, **sample.options)].sum()

        _, tangent = torch.func.jvp(best, (boxes, scores), (torch.ones_like(boxes), torch.ones_like(scores)))
        assert tangent == len(expected)
        gradient = torch.func.grad(best, argnums=1)(boxes, scores)
        assert torch.equal(gradient.nonzero()[:, 0], expected.sort().values)

    def test_all_precisions_rank_alike(self, make_sample):
        """All dtypes give the same result for values that every dtype represents exactly."""
        sample = make_sample()
        boxes, scores, *rest = sample.tensors
        boxes, scores = boxes.round().clamp(max=250), (scores * 100).round() / 128
        results = [sample.op(boxes.to(d), scores.to(d), *rest, **sample.options) for d in self.dtypes]
        assert all(torch.equal(result, results[0]) for result in leaves(results))


A = [0.0, 0.0, 10.0, 10.0]
HALF = [0.0, 5.0, 10.0, 10.0]  # IoU 0.5 with A
FAR = [50.0, 50.0, 60.0, 60.0]


class TestCases:
    """Known answers."""

    @pytest.mark.parametrize(
        "boxes, scores, threshold, expected",
        [
            ([A], [0.1], 0.5, [0]),
            ([A, A], [0.1, 0.2], 0.5, [1]),
            ([A, A], [0.2, 0.2], 0.5, [0]),  # tie: the lower row
            ([FAR, A, A], [0.2, 0.2, 0.2], 0.5, [0, 1]),
            ([A, FAR], [0.1, 0.2], 0.5, [1, 0]),
            ([A, HALF], [0.9, 0.8], 0.5, [0, 1]),  # IoU equal to the threshold: both are kept
            ([A, HALF], [0.9, 0.8], 0.49999, [0]),
            ([A, HALF], [0.9, 0.8], 0.50001, [0, 1]),
            ([A, A], [0.9, 0.8], 1.0, [0, 1]),
            ([A, A], [0.9, 0.8], INF, [0, 1]),
            ([A, [9.0, 9.0, 20.0, 20.0]], [0.9, 0.8], 0.0, [0]),
            ([A, [10.0, 0.0, 20.0, 10.0]], [0.9, 0.8], 0.0, [0, 1]),  # only touching
            # The middle box is dropped, so it does not suppress the last. A does not either: their IoU is 0.11.
            ([A, [4.0, 0.0, 14.0, 10.0], [8.0, 0.0, 18.0, 10.0]], [0.9, 0.8, 0.7], 0.4, [0, 2]),
            ([A, FAR], [0.0, -0.0], 0.5, [0, 1]),  # zeros of either sign are equal
            ([FAR, A], [-0.0, 0.0], 0.5, [0, 1]),
            ([A, FAR, HALF], [-INF, INF, 0.0], 0.4, [1, 2]),  # infinite scores rank
        ],
    )
    def test_known(self, boxes, scores, threshold, expected):
        boxes, scores = torch.tensor(boxes), torch.tensor(scores)
        for dtype in (torch.float32, torch.float64):
            assert ops.nms(boxes.to(dtype), scores.to(dtype), threshold).tolist() == expected
            assert reference.nms(boxes.to(dtype), scores.to(dtype), threshold).tolist() == expected

    @pytest.mark.parametrize("repeat", [1, 400])  # from 384 boxes on, the CPU kernel uses a grid over box centers
    @pytest.mark.parametrize(
        "boxes, scores, expected",
        [
            ([A, [NAN, 0, 10, 10]], [0.1, 0.9], [0]),
            ([A, [0, 0, 10, NAN]], [0.1, 0.9], [0]),
            ([A, FAR], [NAN, 0.1], [1]),
            ([[NAN] * 4], [0.5], []),
            ([A], [NAN], []),
            ([A, [10.0, 10, 0, 0], [10.0, 10, 0, 0]], [0.3, 0.2, 0.1], [0, 1, 2]),  # reversed: no area
            ([[5.0, 5, 5, 5], A, [5.0, 5, 5, 5]], [0.3, 0.2, 0.1], [0, 1, 2]),  # a point
            ([[0.0, 5, 10, 5], [0.0, 5, 10, 5]], [0.3, 0.2], [0, 1]),  # a line
            ([[-INF, -INF, INF, INF], A, [-INF, -INF, INF, INF]], [0.3, 0.2, 0.1], [0, 1, 2]),
            ([[0.0, 0, INF, 10], A], [0.3, 0.2], [0, 1]),
            ([[INF, INF, INF, INF], A], [0.3, 0.2], [0, 1]),
            ([[-3e38, -3e38, 3e38, 3e38], [-3e38, -3e38, 3e38, 3e38]], [0.3, 0.2], [0, 1]),  # area overflows
            ([[0.0, 0, 1e-30, 1e-30], [0.0, 0, 1e-30, 1e-30]], [0.3, 0.2], [0, 1]),  # area underflows
        ],
    )
    def test_bad_and_degenerate_values(self, boxes, scores, expected, repeat):
        """NaN is never kept; boxes whose area is not positive and finite suppress nothing, also among distant boxes."""
        boxes, scores = torch.tensor(boxes), torch.tensor(scores)
        distant = torch.arange(repeat - 1.0)[:, None] * torch.tensor([3.0, 0, 3, 0]) + torch.tensor(
            [1e3, 1e3, 1e3 + 2, 1e3 + 2]
        )
        all_boxes, all_scores = torch.cat([boxes, distant]), torch.cat([scores, torch.full((repeat - 1,), -1.0)])
        everything = expected + list(range(len(boxes), len(boxes) + repeat - 1))
        assert ops.nms(all_boxes, all_scores, 0.4).tolist() == everything
        assert ops.batched_nms(all_boxes, all_scores, torch.zeros(len(all_boxes)).long(), 0.4).tolist() == everything
        assert reference.nms(boxes, scores, 0.4).tolist() == expected

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_checked(self, bad):
        boxes, scores = torch.tensor([A, FAR]), torch.tensor([0.5, 0.4])
        wrong_boxes, wrong_scores = boxes.clone(), scores.clone()
        wrong_boxes[1, 2] = wrong_scores[1] = bad
        idxs = torch.zeros(2).long()
        with ops.checked():
            assert ops.nms(boxes, scores, 0.5).tolist() == [0, 1]
            with pytest.raises(ValueError, match=r"nms: boxes must be finite, got (nan|inf) at index \(1, 2\)"):
                ops.nms(wrong_boxes, scores, 0.5)
            with pytest.raises(ValueError, match=r"batched_nms: scores must be finite, got (nan|inf) at index \(1,\)"):
                ops.batched_nms(boxes, wrong_scores, idxs, 0.5)

    def test_empty(self):
        none = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
        assert none.shape == (0,) and none.dtype == torch.int64
        none = ops.batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5)
        assert none.shape == (0,) and none.dtype == torch.int64

    @pytest.mark.parametrize(
        "boxes, scores, idxs, threshold, message",
        [
            (torch.zeros(3, 5), torch.zeros(3), None, 0.5, r"nms: boxes must have shape \(N, 4\).*got shape \(3, 5\)"),
            (torch.zeros(4), torch.zeros(4), None, 0.5, r"boxes must have shape \(N, 4\).*got shape \(4\)"),
            (torch.zeros(3, 4), torch.zeros(2), None, 0.5, r"scores must have shape \(3\).*got shape \(2\)"),
            (torch.zeros(3, 4), torch.zeros(3, 1), None, 0.5, r"scores must have shape \(3\).*got shape \(3, 1\)"),
            (torch.zeros(3, 4).int(), torch.zeros(3), None, 0.5, "boxes must be float32.*got int32"),
            (torch.zeros(3, 4), torch.zeros(3).long(), None, 0.5, "scores must be float32.*got int64"),
            (torch.zeros(3, 4), torch.zeros(3), None, -0.5, "iou_threshold must be a number >= 0, got -0.5"),
            (torch.zeros(3, 4), torch.zeros(3), None, NAN, "iou_threshold must be a number >= 0, got nan"),
            (
                torch.zeros(3, 4),
                torch.zeros(3),
                torch.zeros(2).long(),
                0.5,
                r"idxs must have shape \(3\).*got shape \(2\)",
            ),
            (
                torch.zeros(3, 4),
                torch.zeros(3),
                torch.zeros(3, dtype=torch.complex64),
                0.5,
                "batched_nms: idxs must be int64, got ComplexFloat",
            ),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, boxes, scores, idxs, threshold, message):
        with pytest.raises(RuntimeError, match=message):
            ops.nms(boxes, scores, threshold) if idxs is None else ops.batched_nms(boxes, scores, idxs, threshold)


class TestThreshold:
    """Decisions at the threshold are exact in float32."""

    @pytest.mark.parametrize("threshold", [0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9])
    def test_pairs_that_straddle_it(self, threshold):
        """Pairs whose decision in float32 changes within a few ulps of one coordinate."""
        height = torch.tensor(10 * threshold, dtype=torch.float32)
        heights = [height]
        for _ in range(40):
            heights.append(torch.nextafter(heights[-1], torch.tensor(INF)))
            heights.insert(0, torch.nextafter(heights[0], torch.tensor(-INF)))
        decisions = []
        limit = torch.tensor(threshold, dtype=torch.float32)
        for height in heights:
            boxes = torch.tensor([A, [0.0, 0.0, 10.0, float(height)]])
            inter = torch.tensor(10.0) * height
            expected = [0] if inter > limit * ((torch.tensor(100.0) + inter) - inter) else [0, 1]
            assert ops.nms(boxes, torch.tensor([0.9, 0.8]), threshold).tolist() == expected
            decisions.append(len(expected))
        assert decisions == sorted(decisions, reverse=True) and set(decisions) == {1, 2}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_integer_boxes_full_of_ties(self, dtype):
        """Small integer boxes often have an IoU of exactly 2/5 or 1/2; scores tie as well."""
        for threshold in (0.25, 0.4, 0.5, 0.6, 0.7):
            corner = torch.randint(0, 30, (500, 2))
            boxes = torch.cat([corner, corner + torch.randint(1, 12, (500, 2))], dim=1).to(dtype)
            scores = torch.randint(0, 30, (500,)).to(dtype) / 32
            assert torch.equal(ops.nms(boxes, scores, threshold), reference.nms(boxes, scores, threshold))


class TestOracles:
    def test_properties(self):
        """Kept boxes overlap up to the threshold; each dropped box overlaps a better kept box of its class."""
        boxes, scores = random_boxes(3000).float(), torch.rand(3000)
        idxs = torch.randint(4, (3000,))
        kept = ops.batched_nms(boxes, scores, idxs, 0.5)
        assert torch.equal(scores[kept], scores[kept].sort(descending=True).values)
        overlap = torch.from_numpy(iou_matrix(boxes.double().cpu().numpy())).to(idxs.device) * (idxs[:, None] == idxs)
        among_kept = overlap[kept][:, kept].fill_diagonal_(0)
        assert among_kept.max() <= 0.5 + 1e-6
        dropped = torch.ones(3000, dtype=torch.bool)
        dropped[kept] = False
        by_better = overlap[dropped][:, kept] * (scores[dropped][:, None] <= scores[kept])
        assert by_better.max(dim=1).values.min() >= 0.5 - 1e-6

    def test_many_classes_small_boxes(self):
        """With 1,203 classes, offsets by class would lose the last bits of small float32 boxes."""
        for _ in range(100):
            boxes = random_boxes(1000, extent=30.0, size=4.0).float()
            scores, idxs = torch.rand(1000), torch.randint(1203, (1000,))
            assert torch.equal(ops.batched_nms(boxes, scores, idxs, 0.5), oracle(boxes, scores, idxs, 0.5))

    def test_negative_coordinates(self):
        """With negative coordinates, offsets by the largest coordinate would make boxes of two classes overlap."""
        for _ in range(100):
            boxes = random_boxes(400, extent=300.0, size=90.0, offset=-1000.0).float()
            scores, idxs = torch.rand(400), torch.randint(6, (400,))
            assert torch.equal(ops.batched_nms(boxes, scores, idxs, 0.5), oracle(boxes, scores, idxs, 0.5))

    def test_classes_of_a_batch_of_images(self):
        """80 classes x 16 images in one call."""
        boxes = random_boxes(16000, extent=1000.0, size=200.0).float()
        scores = torch.rand(16000)
        image, label = torch.randint(16, (16000,)), torch.randint(80, (16000,))
        kept = ops.batched_nms(boxes, scores, image * 80 + label, 0.5)
        assert torch.equal(kept, oracle(boxes, scores, image * 80 + label, 0.5))

    def test_extreme_class_numbers(self):
        """Class numbers may be any int64, although their range exceeds int64."""
        low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
        names = torch.tensor([low, low + 1, -1, 0, 5, 10**12, high - 1, high])
        boxes, scores, label = random_boxes(600).float(), torch.rand(600), torch.randint(8, (600,))
        expected = ops.batched_nms(boxes, scores, label, 0.4)
        assert torch.equal(ops.batched_nms(boxes, scores, names[label], 0.4), expected)
        assert torch.equal(expected, oracle(boxes, scores, label, 0.4))
        assert len(expected) > len(ops.nms(boxes, scores, 0.4))

    @pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
    @pytest.mark.parametrize("scene", ["mixed", "tiny far from the origin", "one cluster", "long and flat", "outliers"])
    def test_large_classes_equal_the_plain_greedy_pass(self, scene, threshold):
        """The grid over box centers only skips pairs; the reference tests every pair, with the same float32 steps."""
        boxes = random_boxes(450, extent=150.0)
        if scene == "tiny far from the origin":
            boxes = random_boxes(450, extent=1.0, size=0.3) + 1e5  # at most 39 float32 steps wide
        elif scene == "one cluster":
            boxes = random_boxes(450, extent=3.0)
        elif scene == "long and flat":
            boxes = random_boxes(450, extent=150.0) * torch.tensor([1.0, 0.01, 1.0, 0.01])
        elif scene == "outliers":
            boxes[::100] *= 1e6
        boxes, scores = boxes.float(), torch.rand(450)
        assert torch.equal(ops.nms(boxes, scores, threshold), reference.nms(boxes, scores, threshold))

    def test_any_number_of_boxes(self):
        """Counts around limits of the CPU kernel: the vector width, 256 (radix sort), 384 (grid); 1 and 3 classes."""
        boxes, scores, idxs = random_boxes(600).float(), torch.rand(600), torch.randint(3, (600,))
        for count in [*range(1, 36), 255, 256, 257, 383, 384, 385, 600]:
            part = (boxes[:count], scores[:count])
            assert torch.equal(ops.nms(*part, 0.5), oracle(*part, torch.zeros(count).long(), 0.5))
            assert torch.equal(ops.batched_nms(*part, idxs[:count], 0.5), oracle(*part, idxs[:count], 0.5))


class TestOrder:
    """Boxes of a cell are equal and cells do not overlap: the best box of every class in every cell is kept."""

    def check(self, scores, idxs, cells):
        cell = torch.randint(cells, scores.shape)
        corner = torch.stack([cell % 64, cell // 64], dim=1).to(scores.dtype) * 4
        boxes = torch.cat([corner, corner + 2], dim=1)
        order = torch.sort(scores, descending=True, stable=True).indices
        best = {}
        for row, *place in zip(order.tolist(), idxs[order].tolist(), cell[order].tolist(), strict=False):
            best.setdefault(tuple(place), row)
        assert ops.batched_nms(boxes, scores, idxs, 0.5).tolist() == list(best.values())
        if len(idxs.unique()) == 1:
            assert ops.nms(boxes, scores, 0.5).tolist() == list(best.values())

    @pytest.mark.parametrize(
        "sizes",
        [
            [1023, 1, 1024, 1, 1025, 2, 2047, 3],
            [1] * 2100,
            [3] * 500 + [3000] + [40] * 30,
            [700, 700, 700, 700],
            [8192],
            [1, 8600],
            [9500, 1, 600],
        ],
    )
    def test_classes_of_very_different_sizes(self, sizes):
        idxs = torch.repeat_interleave(torch.tensor(sizes))
        low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
        names = torch.randint(low, high, (len(sizes),)).sort().values
        shuffled = torch.randperm(len(idxs))
        self.check(torch.rand(len(idxs)), names[idxs][shuffled], cells=max(sizes) // 3 + 2)

    @pytest.mark.parametrize("classes", [1, 7])
    @pytest.mark.parametrize("count", [1023, 1024, 1025, 2047, 2048, 2049, 3073, 4095, 4097, 6145])
    def test_counts(self, count, classes):
        self.check(torch.rand(count), torch.randint(classes, (count,)), cells=300)

    @pytest.mark.parametrize("classes", [1, 7])
    @pytest.mark.parametrize(
        "values",
        [
            torch.tensor([0.5]),
            torch.tensor([0.0, -0.0]),
            torch.tensor([-1.0, -0.0, 0.0, 1.0, INF, -INF, 1e-45, -1e-45]),
            1 + torch.arange(4000, dtype=torch.float64) * 2.0**-52,  # differ in the low 12 bits only
            1 + torch.arange(4000, dtype=torch.float64) * 2.0**-21,  # differ in higher bits
        ],
        ids=["equal", "zeros", "signs", "low bits", "high bits"],
    )
    def test_scores(self, values, classes):
        self.check(values[torch.randint(len(values), (5000,))], torch.randint(classes, (5000,)), cells=300)
