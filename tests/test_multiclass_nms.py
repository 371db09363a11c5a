# SPDX-License-Identifier: Apache-2.0
"""multiclass_nms: `OpMatrix`, the goldens, known answers, and equivalence to NMS followed by a top-D selection."""

import json

import numpy as np
import pytest
import torch
from helpers.nms_cases import nms_sample, oracle, random_boxes
from helpers.op_matrix import OpMatrix, assert_unchanged_by_autocast
from helpers.tensors import leaves, map_tensors

from spatialflow import ops
from spatialflow.ops import reference

NAN = float("nan")


def sample(batch: int, count: int, classes: int, **options):
    """Return the builder of a sample; `batch` 0 is one image without a batch dimension."""

    def tensors(size: int = 0) -> list:
        images = max(batch, 1)
        boxes = random_boxes(images * (count + size)).view(images, count + size, 4)
        scores = torch.rand(images, count + size, classes, dtype=torch.float64) ** 2
        return [boxes, scores] if batch else [boxes[0], scores[0]]

    def raw(boxes, scores, score_threshold, iou_threshold, max_detections):
        boxes, scores = (boxes, scores) if batch else (boxes[None], scores[None])
        return torch.ops.spatialflow.multiclass_nms, (boxes, scores, score_threshold, iou_threshold, max_detections)

    return lambda: nms_sample("multiclass_nms", tensors, options, raw)


class TestMulticlassNms(OpMatrix):
    has_gradient = False
    samples = {
        "stops early": sample(2, 60, 4, score_threshold=0.05, iou_threshold=0.5, max_detections=20),
        "padded": sample(2, 40, 3, score_threshold=0.6, iou_threshold=0.4, max_detections=200),
        "one image": sample(0, 50, 7, score_threshold=0.3, iou_threshold=0.4, max_detections=30),
    }
    thin_samples = {
        f"{batch} images, {count} boxes, {classes} classes": sample(
            batch, count, classes, score_threshold=0.05, iou_threshold=0.5, max_detections=20
        )
        for batch, count, classes in ((1, 9, 4), (2, 1, 4), (2, 9, 1), (1, 1, 1), (2, 0, 4), (2, 9, 0))
    }

    def test_layouts(self, make_sample):
        sample = make_sample()
        plain = sample.op(*sample.tensors, **sample.options)
        layouts = {
            "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
            "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
            "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        }
        for name, layout in layouts.items():
            result = sample.op(*map_tensors(layout, sample.tensors), **sample.options)
            assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=False)), name

    def test_autocast(self, make_sample):
        """Boxes and scores keep their precision."""
        assert_unchanged_by_autocast(make_sample())

    def test_detached(self, make_sample):
        """Results have neither a gradient in reverse mode nor a tangent in forward mode."""
        sample = make_sample()
        boxes, scores = (t.clone().requires_grad_() for t in sample.tensors)
        assert not any(leaf.requires_grad for leaf in leaves(sample.op(boxes, scores, **sample.options)))
        tangents = tuple(torch.ones_like(t) for t in sample.tensors)
        _, pushed = torch.func.jvp(lambda *t: sample.op(*t, **sample.options)[:2], tuple(sample.tensors), tangents)
        assert not any(leaf.any() for leaf in leaves(pushed))

    def test_vmap(self, make_sample):
        """A mapped dimension is a further batch dimension."""
        sample = make_sample()
        boxes, scores = sample.tensors
        mapped = torch.func.vmap(lambda b, s: tuple(sample.op(b, s, **sample.options)), in_dims=(None, -1))(
            boxes, torch.stack([scores, scores.flip(-1)], dim=-1)
        )
        for index, scores_at_index in enumerate((scores, scores.flip(-1))):
            expected = sample.op(boxes, scores_at_index, **sample.options)
            assert all(torch.equal(m[index], e) for m, e in zip(mapped, expected, strict=False))
        nothing = torch.func.vmap(lambda b: tuple(sample.op(b, scores, **sample.options)))(
            boxes.expand(0, *boxes.shape)
        )
        assert [t.shape for t in nothing] == [(0, *e.shape) for e in expected]


class TestCases:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 1, 10, 11], [50.0, 50, 60, 60]])

    def test_known_answer(self):
        scores = torch.tensor([[0.9, 0.2, 0.5], [0.8, 0.3, 0.05], [0.7, 0.0, 0.9]])
        detections = ops.multiclass_nms(self.boxes, scores, 0.1, 0.5, 6)
        # In pairs (box, class): (0, 0) and (2, 2) tie at 0.9 and rank by row. (0, 0) suppresses (1, 0), and (1, 1)
        # suppresses (0, 1).
        assert detections.indices.tolist() == [0, 2, 2, 0, 1, -1]
        assert detections.labels.tolist() == [0, 2, 0, 2, 1, -1]
        assert torch.equal(detections.scores, torch.tensor([0.9, 0.9, 0.7, 0.5, 0.3, 0.0]))
        assert torch.equal(detections.boxes[:5], self.boxes[[0, 2, 2, 0, 1]]) and not detections.boxes[5].any()
        assert detections.count == 5

    def test_ties_rank_by_row_then_class(self):
        scores = torch.full((3, 2), 0.5)
        detections = ops.multiclass_nms(self.boxes, scores, 0.1, 1.0, 10)
        assert detections.indices[:6].tolist() == [0, 0, 1, 1, 2, 2]
        assert detections.labels[:6].tolist() == [0, 1, 0, 1, 0, 1]

    def test_score_threshold_is_strict(self):
        scores = torch.tensor([[0.05], [0.05], [0.0500001]])
        assert ops.multiclass_nms(self.boxes, scores, 0.05, 1.0, 10).indices[:2].tolist() == [2, -1]
        assert ops.multiclass_nms(self.boxes, scores.double(), 0.05, 1.0, 10).count == 3  # 0.05 of float32 is larger
        assert ops.multiclass_nms(self.boxes, scores - 1, -float("inf"), 1.0, 10).count == 3

    def test_bad_values_are_never_kept(self):
        boxes = torch.cat([self.boxes, torch.tensor([[0.0, NAN, 5, 5], [20.0, 20, 30, 30]])])
        scores = torch.tensor([[0.5], [NAN], [0.4], [0.9], [0.3]])
        detections = ops.multiclass_nms(boxes, scores, 0.1, 0.5, 10)
        assert detections.indices[: detections.count].tolist() == [0, 2, 4]
        for name, wrong in (("boxes", (boxes, scores.nan_to_num())), ("scores", (boxes.nan_to_num(), scores))):
            with ops.checked(), pytest.raises(ValueError, match=f"multiclass_nms: {name} must be finite, got nan at"):
                ops.multiclass_nms(*wrong, 0.1, 0.5, 10)

    @pytest.mark.parametrize("batch, count, classes, most", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
    def test_empties(self, batch, count, classes, most):
        detections = ops.multiclass_nms(torch.rand(batch, count, 4), torch.rand(batch, count, classes), 0.0, 0.5, most)
        assert [tuple(leaf.shape) for leaf in detections] == [
            (batch, most, 4),
            (batch, most),
            (batch, most),
            (batch,),
            (batch, most),
        ]
        assert (
            not detections.count.any()
            and not detections.boxes.any()
            and (detections.labels == -1).all()
            and (detections.indices == -1).all()
        )

    @pytest.mark.parametrize(
        "boxes, scores, options, message",
        [
            ((2, 5, 5), (2, 5, 3), {}, r"boxes must have shape \(B, N, 4\).*got shape \(2, 5, 5\)"),
            ((2, 5, 4), (2, 6, 3), {}, r"scores must have shape \(2, 5, C\), got shape \(2, 6, 3\)"),
            ((2, 5, 4), (5, 3), {}, r"or \(N, 4\) and \(N, C\), got \(2, 5, 4\) and \(5, 3\)"),
            ((2, 5, 4), (2, 5, 3), {"score_threshold": NAN}, "score_threshold must be a number, got nan"),
            ((2, 5, 4), (2, 5, 3), {"iou_threshold": -1.0}, "iou_threshold must be a number >= 0, got -1"),
            ((2, 5, 4), (2, 5, 3), {"max_detections": -1}, "max_detections must be from 0 to 2147483647, got -1"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, boxes, scores, options, message):
        settings = {"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 10, **options}
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.multiclass_nms(torch.rand(boxes), torch.rand(scores), **settings)
        with pytest.raises(RuntimeError, match="boxes must be float32.*got int64"):
            ops.multiclass_nms(torch.ones(1, 2, 4).long(), torch.rand(1, 2, 3), 0.1, 0.5, 10)

    def test_number_of_scores_is_limited(self):
        """An image may have at most 2^32 - 1 scores. Without images, the shapes need no memory."""
        for boxes, classes in ((2**32 // 80, 80), (2**32 - 1, 1), (1, 2**32 - 1)):
            found = ops.multiclass_nms(torch.empty(0, boxes, 4), torch.empty(0, boxes, classes), 0.1, 0.5, 10)
            assert found.count.shape == (0,)
        for boxes, classes in ((2**32 // 80 + 1, 80), (2**32, 1), (1, 2**32)):
            with pytest.raises(RuntimeError, match=r"scores must have fewer than 2\^32 entries per image"):
                ops.multiclass_nms(torch.empty(0, boxes, 4), torch.empty(0, boxes, classes), 0.1, 0.5, 10)


class TestOracles:
    @pytest.mark.parametrize("most", [1, 10, 100, 1000, 100000])
    @pytest.mark.parametrize("levels", [0, 7, 60])  # 0: distinct scores; 7: nearly all tie
    def test_equals_nms_then_top(self, most, levels):
        """With more candidates than one chunk holds, sorting chunk by chunk does not change the result."""
        boxes, scores = random_boxes(1500).float(), torch.rand(1500, 6)
        if levels:
            scores = (scores * levels).floor() / levels
        detections = ops.multiclass_nms(boxes, scores, 0.1, 0.4, most)
        index, label = (scores > 0.1).nonzero(as_tuple=True)
        kept = oracle(boxes[index], scores[index, label], label, 0.4)[:most]
        assert detections.count == len(kept)
        assert torch.equal(detections.indices[: len(kept)], index[kept])
        assert torch.equal(detections.labels[: len(kept)], label[kept])
        assert torch.equal(detections.boxes[: len(kept)], boxes[index[kept]])
        assert torch.equal(detections.scores[: len(kept)], scores[index, label][kept])

    def test_batch_equals_single_images(self):
        boxes, scores = random_boxes(5 * 300).float().view(5, 300, 4), torch.rand(5, 300, 9)
        batched = ops.multiclass_nms(boxes, scores, 0.2, 0.5, 50)
        for image in range(5):
            single = ops.multiclass_nms(boxes[image], scores[image], 0.2, 0.5, 50)
            assert all(torch.equal(a[image], b) for a, b in zip(batched, single, strict=False))

    def test_large_image_in_parts(self):
        """Few of 720,000 scores of one image are nonzero, all of them in the first half of the rows."""
        boxes, scores = random_boxes(9000, extent=2000.0).float(), torch.zeros(9000, 80)
        nonzero = torch.randint(9000 * 40, (700,))
        scores.view(-1)[nonzero] = torch.rand(700)
        detections = ops.multiclass_nms(boxes, scores, 0.05, 0.5, 1000)
        expected = reference.multiclass_nms(boxes, scores, 0.05, 0.5, 1000)
        assert all(torch.equal(a, b) for a, b in zip(detections, expected, strict=False))


class TestGoldens:
    """Detections of the released implementation; a box is suppressed if `inter > threshold * union`."""

    cases = ["random", "none_above_thr", "score_equal_thr", "iou_exactly_thr_0p4_and_0p25", "iou_exactly_thr_0p25"]

    @pytest.mark.parametrize("case", cases)
    def test_cases(self, goldens, case):
        arrays = np.load(goldens / "ops" / "multiclass_nms.npz")
        options = json.loads((goldens / "ops" / "multiclass_nms.json").read_text())[case]
        boxes, scores = (torch.as_tensor(arrays[f"{case}__{name}"]) for name in ("boxes", "scores"))
        # The last column of the released scores is the background, which is not an input here.
        detections = ops.multiclass_nms(
            boxes, scores[:, :-1], options["score_thr"], options["iou_threshold"], options["max_num"]
        )
        count = int(detections.count)
        rows = torch.cat([detections.boxes, detections.scores[:, None], detections.labels[:, None].float()], dim=1)[
            :count
        ]
        expected = np.concatenate(
            [arrays[f"{case}__gpu_rule_dets"], arrays[f"{case}__gpu_rule_labels"][:, None].astype(np.float32)], axis=1
        )
        assert count == options["n_gpu_rule"]
        actual_set = sorted(map(tuple, rows.tolist()))
        expected_set = sorted(map(tuple, expected.tolist()))
        np.testing.assert_allclose(np.array(actual_set), np.array(expected_set), rtol=1e-6, atol=1e-5)
