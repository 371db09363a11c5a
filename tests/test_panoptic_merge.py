# SPDX-License-Identifier: Apache-2.0
"""panoptic_merge: `OpMatrix`, the released maps pixel for pixel, invariants, thresholds, bad values; and merge()."""

import json

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import DEVICE

from spatialflow import ops
from spatialflow.ops import reference
from spatialflow.panoptic import merge

RAW_OPTIONS = ("ignored_stuff", "score_threshold", "overlap_threshold", "stuff_area_threshold", "box_overlap_threshold")
DEFAULTS = {
    "ignored_stuff": (),
    "score_threshold": 0.37,
    "overlap_threshold": 0.37,
    "stuff_area_threshold": 4900,
    "box_overlap_threshold": 0.5,
}


def scene(count: int, height: int, width: int, stuff_labels: int = 7) -> list:
    """Return masks of ellipses, scores with ties, labels, boxes that do not always fit the masks, and a stuff map.

    The ellipses overlap; every fifth mask is empty. The stuff map consists of blocks of 13 x 17 pixels.
    """
    ys, xs = torch.arange(height)[:, None], torch.arange(width)
    center = torch.rand(count, 2) * torch.tensor([height, width])
    radius = torch.rand(count, 2) * 0.4 * torch.tensor([height, width]) + 1
    offset = (torch.stack(torch.broadcast_tensors(ys, xs), -1) - center[:, None, None]) / radius[:, None, None]
    masks = (offset**2).sum(-1) < 1
    masks[::5] = 0
    box_center = center + torch.randn(count, 2) * 3
    boxes = torch.cat([(box_center - radius).flip(1), (box_center + radius).flip(1)], dim=1).double()
    scores = (torch.rand(count, dtype=torch.float64) * 10).round() / 10
    stuff = torch.randint(0, stuff_labels + 2, (height // 13 + 1, width // 17 + 1))
    stuff = stuff.repeat_interleave(13, 0).repeat_interleave(17, 1)[:height, :width].contiguous()
    stuff[stuff > stuff_labels] = 255
    return [masks, scores, torch.randint(0, 80, (count,)), boxes, stuff]


def sample(*size: int, fill: bool = True, stuff_dtype: torch.dtype = torch.int64, **options):
    def tensors(extra: int = 0) -> list:
        values = scene(size[0] + extra, size[1] + 3 * extra, size[2] + 5 * extra)
        values[4] = values[4].to(stuff_dtype)
        return values if fill else [*values[:3], values[4]]

    def call(function):
        def run(masks, scores, labels, *rest, **options):
            boxes, stuff = rest if fill else (None, *rest)
            return function(masks, scores, labels, boxes, stuff, 7, **options)

        return run

    def raw(masks, scores, labels, *rest, **options):
        boxes, stuff = rest if fill else (None, *rest)
        settings = DEFAULTS | options
        arguments = (masks, scores, labels, boxes, stuff, 7, *(settings[name] for name in RAW_OPTIONS))
        return torch.ops.spatialflow.panoptic_merge, arguments

    def build() -> OpSample:
        return OpSample(
            op=call(ops.panoptic_merge),
            reference=call(reference.panoptic_merge),
            tensors=tensors(),
            options={"stuff_area_threshold": 60, "ignored_stuff": [3]} | options,
            differentiable=(),
            converted=(1, 3) if fill else (1,),
            images=(),
            raw=raw,
            resized=tensors,
        )

    return build


class TestPanopticMerge(OpMatrix):
    has_gradient = False
    samples = {
        "with box fill": sample(12, 75, 131),
        "without box fill": sample(12, 64, 128, fill=False),
        "int32 stuff": sample(9, 33, 65, stuff_dtype=torch.int32, overlap_threshold=0.8, box_overlap_threshold=0.1),
        "uint8 stuff": sample(9, 40, 63, stuff_dtype=torch.uint8, overlap_threshold=0.0, box_overlap_threshold=0.0),
    }
    thin_samples = {
        f"{count} masks of {height} x {width}": sample(count, height, width, stuff_area_threshold=2)
        for count, height, width in ((1, 9, 11), (5, 1, 64), (5, 64, 1), (1, 1, 1), (0, 9, 11), (5, 0, 11), (5, 9, 0))
    }

    # Scores and boxes of any dtype are converted to float64. The scores of segments are float32. Autocast changes
    # nothing.
    def test_reference(self, make_sample, dtype):
        sample = make_sample()
        tensors = [value.to(dtype) if i in sample.converted else value for i, value in enumerate(sample.tensors)]
        assert_same(sample.op(*tensors, **sample.options), sample.reference(*tensors, **sample.options))

    def test_autocast(self, make_sample):
        sample = make_sample()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = sample.op(*sample.tensors, **sample.options)
        assert_same(actual, sample.op(*sample.tensors, **sample.options))

    def test_layouts(self, make_sample):
        sample = make_sample()
        expected = sample.op(*sample.tensors, **sample.options)
        transposed = [value.T.contiguous().T if value.dim() == 2 else value for value in sample.tensors]
        transposed[0] = sample.tensors[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert_same(sample.op(*transposed, **sample.options), expected)
        sliced = [torch.stack([value, value], dim=-1)[..., 0] for value in sample.tensors]
        assert_same(sample.op(*sliced, **sample.options), expected)


def assert_same(actual: ops.PanopticMergeOutput, expected: ops.PanopticMergeOutput) -> None:
    for name, value, wanted in zip(actual._fields, actual, expected, strict=True):
        assert value.dtype == wanted.dtype, name
        assert torch.equal(value, wanted), name


def assert_consistent(result: ops.PanopticMergeOutput, masks: torch.Tensor, stuff_labels: int) -> None:
    """Check, for any input, that the table lists exactly the segments of the map."""
    rows = masks.shape[0] + stuff_labels
    count = int(result.count)
    assert [tensor.shape[0] for tensor in result[1:7]] == [rows] * 6 and result.count.shape == ()
    assert result.id_map.dtype == torch.int32 and result.id_map.shape == masks.shape[1:]
    assert torch.equal(result.id_map.unique()[-count:] if count else torch.tensor([]), torch.arange(1.0, count + 1))
    for row in range(rows):
        pixels = torch.nonzero(result.id_map == row + 1)
        assert int(result.areas[row]) == len(pixels) and (len(pixels) > 0) == (row < count)
        if row < count:
            (y1, x1), (y2, x2) = pixels.min(0).values.tolist(), pixels.max(0).values.tolist()
            assert result.boxes[row].tolist() == [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
    instances = result.instances[:count][result.is_thing[:count]]
    assert len(instances.unique()) == len(instances)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_random_scenes(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for trial in range(25):
            masks, scores, labels, boxes, stuff = scene(trial, 1 + 9 * trial % 71, 1 + 37 * trial % 150)
            options = {
                "score_threshold": float(torch.rand(())) * 0.6,
                "overlap_threshold": float(torch.rand(())) * 1.3,
                "stuff_area_threshold": int(torch.randint(0, 200, ())),
                "box_overlap_threshold": float(torch.rand(())),
            }
            arguments = (masks, scores, labels, boxes if trial % 4 else None, stuff, 7)
            result = ops.panoptic_merge(*arguments, **options)
            assert_same(result, reference.panoptic_merge(*arguments, **options))
            assert_consistent(result, masks, 7)
    finally:
        torch.set_num_threads(before)


class TestGoldens:
    """The released maps of 6 random and 15 hand-made images, as ids in order of creation."""

    @pytest.fixture
    def inputs(self, goldens):
        folder = goldens / "panoptic"
        content = {
            name: json.loads((folder / "in" / f"{name}.json").read_text())
            for name in ("inst", "bbox", "stuff", "categories", "images")
        }
        maps = {
            fill: np.load(folder / f"config_{'bbox' if fill else 'nobbox'}_canonical.npz") for fill in (False, True)
        }
        return content, maps

    @staticmethod
    def decoded(annotation):
        rle = annotation["segmentation"]
        coco_mask = pytest.importorskip("pycocotools.mask")
        return coco_mask.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)

    @pytest.mark.parametrize("image_id", range(1000, 1021))
    @pytest.mark.parametrize("fill", [False, True], ids=["masks only", "box fill"])
    def test_map(self, inputs, image_id, fill):
        content, maps = inputs
        instances, detections, stuff = (
            [a for a in content[name] if a["image_id"] == image_id] for name in ("inst", "bbox", "stuff")
        )
        is_thing = {category["id"]: category["isthing"] for category in content["categories"]}
        masks = np.zeros((len(instances), 120, 160), bool)
        for mask, annotation in zip(masks, instances, strict=True):
            mask[:] = self.decoded(annotation)
        boxes = np.array([a["bbox"] for a in detections], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # The stuff masks become a map; where two overlap, the first one is used, as in the released code.
        label_map = np.full((120, 160), 255)
        for label, annotation in reversed(list(enumerate(stuff))):
            if is_thing.get(annotation["category_id"], 1) == 0:
                label_map[self.decoded(annotation)] = label
        result = merge(
            masks,
            [a["score"] for a in instances],
            [a["category_id"] for a in instances],
            boxes,
            label_map,
            stuff_categories=[a["category_id"] for a in stuff],
            box_overlap_threshold=0.5 if fill else None,
        )
        np.testing.assert_array_equal(result.id_map, maps[fill][str(image_id)])
        assert [s["id"] for s in result.segments] == list(range(1, result.id_map.max() + 1))
        for segment in result.segments:
            assert segment["area"] == (result.id_map == segment["id"]).sum() > 0
            assert segment["isthing"] == (is_thing[segment["category_id"]] == 1) == (segment["score"] is not None)


def one_row(*runs: tuple[int, int], width: int = 20) -> np.ndarray:
    """Return a mask of one row of pixels for each run [begin, end)."""
    masks = np.zeros((len(runs), 1, width), np.uint8)
    for mask, (begin, end) in zip(masks, runs, strict=True):
        mask[0, begin:end] = 1
    return masks


class TestThresholds:
    def test_score_and_order(self):
        masks = one_row((0, 8), (4, 12), (4, 12), (18, 20))
        result = merge(masks, [0.37, 0.9, 0.9, 0.36], [5, 6, 7, 8], None, None, overlap_threshold=0.5)
        # Of the two instances with score 0.9, the first wins. The one with 0.37 is kept: exactly half is covered.
        assert result.id_map.tolist() == [[2] * 4 + [1] * 8 + [0] * 8]
        assert [(s["category_id"], s["area"], s["bbox"]) for s in result.segments] == [
            (6, 8, [4, 0, 8, 1]),
            (5, 4, [0, 0, 4, 1]),
        ]

    def test_overlap_exactly_at_the_threshold_is_kept(self):
        masks = one_row((0, 10), (5, 15))
        assert len(merge(masks, [0.9, 0.8], [1, 1], None, None, overlap_threshold=0.5).segments) == 2
        assert len(merge(masks, [0.9, 0.8], [1, 1], None, None, overlap_threshold=0.499).segments) == 1

    def test_dropped_instance_does_not_block_later_ones(self):
        masks = one_row((0, 10), (2, 14), (10, 14))
        result = merge(masks, [0.9, 0.8, 0.7], [1, 2, 3], None, None)
        assert [s["category_id"] for s in result.segments] == [1, 3]

    def test_stuff_area_threshold_counts_free_pixels(self):
        stuff = np.array([[4] * 10 + [9] * 10])
        result = merge(one_row((8, 12)), [0.9], [1], None, stuff, stuff_area_threshold=8)
        assert [(s["category_id"], s["area"]) for s in result.segments] == [(1, 4), (4, 8), (9, 8)]
        assert [s["score"] for s in result.segments] == [pytest.approx(0.9), None, None]
        assert [
            s["category_id"] for s in merge(one_row((8, 12)), [0.9], [1], None, stuff, stuff_area_threshold=9).segments
        ] == [1]

    def test_no_empty_segment_even_if_every_overlap_is_allowed(self):
        result = merge(
            one_row((0, 10), (2, 8)),
            [0.9, 0.8],
            [1, 2],
            [[0, 0, 5, 1], [15, 0, 15, 1]],
            None,
            overlap_threshold=1.0,
            stuff_area_threshold=0,
        )
        assert [s["category_id"] for s in result.segments] == [1]

    def test_box_fill(self):
        boxes = [[0, 0, 8.9, 1.0], [10.9, 0, 20.5, 1], [4, 0, 12, 1]]
        masks = one_row((0, 4), (2, 4), (5, 5))
        stuff = np.full((1, 20), 255)
        stuff[0, 18:] = 3
        result = merge(masks, [0.9, 0.8, 0.7], [1, 2, 3], boxes, stuff, stuff_area_threshold=1)
        # Box 0 has pixels 0..7, 4 of them void: they join segment 1. Instance 1 was dropped: box 1 makes segment 3.
        # Box 2 has pixels 4..11, of which only 8 and 9 are still void.
        assert result.id_map.tolist() == [[1] * 8 + [0, 0] + [3] * 8 + [2] * 2]
        assert [(s["category_id"], s["area"]) for s in result.segments] == [(1, 8), (3, 2), (2, 8)]
        assert result.segments[2]["score"] == pytest.approx(0.8)
        result = merge(
            masks, [0.9, 0.8, 0.7], [1, 2, 3], boxes, stuff, stuff_area_threshold=1, box_overlap_threshold=0.51
        )
        # Now box 0 is below the threshold, and 6 of the 8 pixels of box 2 are void.
        assert result.id_map.tolist() == [[1] * 4 + [4] * 6 + [3] * 8 + [2] * 2]


class TestBadValues:
    def test_nan_score_never_enters(self):
        result = merge(one_row((0, 4), (4, 8)), [float("nan"), 0.5], [1, 2], [[0, 0, 4, 1], [4, 0, 8, 1]], None)
        assert [s["category_id"] for s in result.segments] == [2]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("corner", range(4))
    def test_box_that_is_not_finite_fills_nothing(self, bad, corner):
        boxes = [[0.0, 0.0, 20.0, 1.0]]
        boxes[0][corner] = bad
        assert merge(one_row((0, 4)), [0.9], [1], boxes, None).segments[0]["area"] == 4

    @pytest.mark.parametrize("box", [[-1e30, -5, 1e30, 9], [0, 0, 1e9, 1e18], [-0.9, -0.9, 20.9, 1.9]])
    def test_box_beyond_the_image_is_cut(self, box):
        assert merge(one_row((0, 4)), [0.9], [1], [box], None).segments[0]["area"] == 20

    @pytest.mark.parametrize("box", [[8, 0, 3, 1], [3, 1, 8, 0], [30, 0, 40, 1], [-9, 0, -2, 1], [5.2, 0, 5.9, 1]])
    def test_box_without_pixels(self, box):
        assert merge(one_row((0, 4)), [0.9], [1], [box], None).segments[0]["area"] == 4

    def test_score_beyond_float32_is_infinite(self):
        masks, stuff = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int64)
        score = torch.tensor([1e300], dtype=torch.float64)
        for function in (ops.panoptic_merge, reference.panoptic_merge):
            scores = function(masks, score, torch.tensor([0]), None, stuff, 0).scores
            assert scores.tolist() == [float("inf")]

    def test_stuff_outside_the_labels_is_void(self):
        masks = torch.zeros(0, 2, 70, dtype=torch.bool)
        for dtype, values in (
            (torch.int64, [-1, 2, 1 << 40, -(1 << 63)]),
            (torch.int32, [-1, 2]),
            (torch.uint8, [2, 255]),
        ):
            for value in values:
                stuff = torch.full((2, 70), value, dtype=dtype)
                stuff[0, 3] = 1
                result = ops.panoptic_merge(
                    masks, torch.zeros(0), torch.zeros(0).long(), None, stuff, 2, stuff_area_threshold=1
                )
                assert int(result.id_map.sum()) == 1 and int(result.count) == 1

    def test_checked_names_the_value(self):
        arguments = [
            torch.ones(1, 2, 2).bool(),
            torch.tensor([float("nan")]),
            torch.tensor([1]),
            torch.tensor([[0, 0, float("inf"), 1]]),
            torch.zeros(2, 2).long(),
            1,
        ]
        with ops.checked(), pytest.raises(ValueError, match="panoptic_merge: scores must be finite, got nan"):
            ops.panoptic_merge(*arguments)
        arguments[1] = torch.tensor([0.5])
        with ops.checked(), pytest.raises(ValueError, match="panoptic_merge: boxes must be finite, got inf"):
            ops.panoptic_merge(*arguments)


class TestShapes:
    @pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
    @pytest.mark.parametrize("stuff_labels", [0, 4])
    def test_empties(self, shape, stuff_labels):
        masks = torch.ones(shape, dtype=torch.bool)
        arguments = (masks, torch.ones(shape[0]), torch.ones(shape[0]).int(), torch.ones(shape[0], 4))
        result = ops.panoptic_merge(*arguments, torch.zeros(shape[1:]).short(), stuff_labels, stuff_area_threshold=1)
        assert_consistent(result, masks, stuff_labels)
        assert merge(masks.cpu().numpy(), *(a.cpu().numpy() for a in arguments[1:]), None).segments == []
        assert merge(np.zeros((0, 3, 4), bool), [], [], [], None).id_map.shape == (3, 4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: torch.ones(2, 3).bool()}, r"masks must be \(K, H, W\), got shape \(2, 3\)"),
            ({0: torch.ones(2, 3, 4)}, "masks must be bool or uint8, got float32"),
            ({1: torch.ones(3)}, r"scores must have shape \(2\), one per mask, got \(3\)"),
            ({1: torch.ones(2).int()}, "scores must be float32.*got int32"),
            ({2: torch.ones(2, 1).int()}, r"labels must have shape \(2\).*got \(2, 1\)"),
            ({2: torch.ones(2)}, "labels must be integers, got float32"),
            ({3: torch.ones(2, 5)}, r"boxes must have shape \(2, 4\).*got \(2, 5\)"),
            ({3: torch.ones(2, 4).int()}, "boxes must be float32.*got int32"),
            ({4: torch.ones(3, 5).int()}, r"stuff must have the masks' size \(3, 4\), got \(3, 5\)"),
            ({4: torch.ones(3, 4)}, "stuff must hold integers, got float32"),
            ({5: -1}, "stuff_labels must not be negative, got -1"),
            ({5: 2**63 - 1}, "masks and stuff labels must be fewer than 2.31, got . and 9223372036854775807"),
            ({5: 1 << 31}, "masks and stuff labels must be fewer than 2.31"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, change, message):
        arguments = [
            torch.ones(2, 3, 4).bool(),
            torch.ones(2),
            torch.ones(2).int(),
            torch.ones(2, 4),
            torch.ones(3, 4).int(),
            3,
        ]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match="panoptic_merge: " + message):
            ops.panoptic_merge(*arguments)

    @pytest.mark.parametrize("name", ["score_threshold", "overlap_threshold", "box_overlap_threshold"])
    def test_nan_threshold(self, name):
        arguments = (torch.ones(0, 3, 4).bool(), torch.ones(0), torch.ones(0).int(), None, torch.ones(3, 4).int(), 3)
        with pytest.raises(RuntimeError, match=f"panoptic_merge: {name} must be a number, got nan"):
            ops.panoptic_merge(*arguments, **{name: float("nan")})


class TestPublicMerge:
    def test_categories(self):
        stuff = np.array([[0, 1, 2, 255, 3, 3]], np.uint8)
        masks = one_row((4, 5), width=6)
        result = merge(
            masks,
            [0.9],
            [1],
            None,
            stuff,
            thing_categories=[10, 11],
            stuff_categories=[20, None, 22],
            stuff_area_threshold=1,
        )
        assert [(s["category_id"], s["isthing"]) for s in result.segments] == [(11, True), (20, False), (22, False)]
        result = merge(
            masks, [0.9], [1], None, stuff, thing_categories={1: 7}, stuff_categories={3: 44}, stuff_area_threshold=1
        )
        assert [s["category_id"] for s in result.segments] == [7, 44]
        with pytest.raises(ValueError, match="thing_categories must have a category for every label, got none for 1"):
            merge(masks, [0.9], [1], None, stuff, thing_categories=[10])
        with pytest.raises(ValueError, match="got none for -1"):
            merge(masks, [0.9], [-1], None, stuff, thing_categories=[10])

    @pytest.mark.parametrize("void", [255, 4, 0])
    def test_labels_as_categories(self, void):
        stuff = np.array([[0, 4, -1, 255, 4, 2]])
        result = merge(np.zeros((0, 1, 6), bool), [], [], None, stuff, void_label=void, stuff_area_threshold=1)
        expected = [label for label in (0, 2, 4, 255) if label != void]
        assert [s["category_id"] for s in result.segments] == expected
        np.testing.assert_array_equal(result.id_map > 0, np.isin(stuff, expected))

    @pytest.mark.parametrize("void", [255, -1, -5])
    def test_only_negative_labels(self, void):
        stuff = np.array([[-5, -7, -5]])
        result = merge(np.zeros((0, 1, 3), bool), [], [], None, stuff, void_label=void, stuff_area_threshold=1)
        assert result.segments == [] and not result.id_map.any()

    def test_tensors_in_tensor_out(self):
        masks, scores, labels, boxes, stuff = scene(6, 40, 50)
        from_tensors = merge(masks, scores.requires_grad_(), labels, boxes, stuff, stuff_area_threshold=20)
        arrays = [t.detach().cpu().numpy() for t in (masks, scores, labels, boxes, stuff)]
        from_arrays = merge(*arrays, stuff_area_threshold=20)
        assert isinstance(from_tensors.id_map, torch.Tensor) and isinstance(from_arrays.id_map, np.ndarray)
        np.testing.assert_array_equal(from_tensors.id_map.cpu().numpy(), from_arrays.id_map)
        assert from_tensors.segments == from_arrays.segments
        assert json.loads(json.dumps(from_arrays.segments)) == from_arrays.segments
        flipped = merge(
            *(np.flip(a, 0).copy()[::-1] for a in arrays[:4]),
            np.flip(arrays[4], 0).copy()[::-1],
            stuff_area_threshold=20,
        )
        assert flipped.segments == from_arrays.segments

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: np.ones((2, 3, 4))}, r"masks must be \(K, H, W\) bool or uint8, got \(2, 3, 4\) torch.float64"),
            ({1: [0.5]}, r"scores must have shape \(2,\) to fit the masks, got \(1,\)"),
            ({1: ["a", "b"]}, "scores must hold numbers"),
            ({2: [0.5, 1.5]}, "labels must hold integers"),
            ({3: np.ones((4, 2))}, r"boxes must have shape \(2, 4\)"),
            ({4: np.ones((4, 3), int)}, r"stuff must have shape \(3, 4\)"),
            ({4: np.full((3, 4), 1 << 20)}, "stuff labels must be below 65536, got 1048576"),
        ],
    )
    def test_errors(self, change, message):
        arguments = [np.ones((2, 3, 4), bool), [0.5, 0.6], [1, 2], np.ones((2, 4)), np.zeros((3, 4), int)]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=message):
            merge(*arguments)
