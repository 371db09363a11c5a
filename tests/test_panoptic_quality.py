# SPDX-License-Identifier: Apache-2.0
"""Panoptic quality: equal to panopticapi's numbers, with a clear message for every malformed input."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from spatialflow import _evaluation
from spatialflow.panoptic import (
    PanopticFormatError,
    PanopticQuality,
    PanopticWriter,
    evaluate,
    evaluate_and_report,
    write_id_map,
)
from spatialflow.panoptic.pair_counts import count_pairs

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 2, "name": "car", "isthing": 1},
    {"id": 7, "name": "sky", "isthing": 0},
]


@pytest.mark.parametrize("gt", ["gt", "gt_morecrowd"])
@pytest.mark.parametrize("pred", ["same", "shift_5_3", "dropped"])
def test_equal_to_panopticapi_on_coco(goldens, gt, pred):
    folder = goldens / "pq"
    expected = json.loads((folder / "results.json").read_text())[f"{gt}__{pred}"]
    result = evaluate(folder / f"{gt}.json", folder / "gt", folder / f"{pred}.json", folder / pred)
    for group in ("All", "Things", "Stuff"):
        assert result[group] == pytest.approx(expected[group], abs=1e-9), group
    for category, row in result["per_class"].items():
        counts = expected["stat"].get(str(category), {"iou": 0, "tp": 0, "fp": 0, "fn": 0})
        fractions = expected["per_class"].get(str(category), {"pq": 0, "sq": 0, "rq": 0})
        assert {key: row[key] for key in counts} == pytest.approx(counts, abs=1e-9), category
        assert {key: row[key] for key in fractions} == pytest.approx(fractions, abs=1e-9), category


def test_result_does_not_depend_on_workers(goldens):
    folder = goldens / "pq"
    arguments = (folder / "gt.json", folder / "gt", folder / "shift_5_3.json", folder / "shift_5_3")
    assert evaluate(*arguments, workers=1) == evaluate(*arguments, workers=7)


def one_image(gt_map, gt_segments, pred_map, pred_segments):
    quality = PanopticQuality(CATEGORIES)
    quality.update(np.asarray(gt_map), gt_segments, np.asarray(pred_map), pred_segments, image_id=5)
    return quality.compute()


def test_hand_made_match_and_miss():
    gt = [[1, 1, 1, 1], [2, 2, 2, 2]]
    pred = [[1, 1, 1, 3], [3, 3, 3, 3]]
    result = one_image(
        gt,
        [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 7}],
        pred,
        [{"id": 1, "category_id": 1}, {"id": 3, "category_id": 2}],
    )
    assert result["per_class"][1] == {"pq": 0.75, "sq": 0.75, "rq": 1.0, "n": 1, "tp": 1, "fp": 0, "fn": 0, "iou": 0.75}
    assert result["per_class"][2] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 1, "tp": 0, "fp": 1, "fn": 0, "iou": 0.0}
    assert result["per_class"][7]["fn"] == 1
    assert result["All"] == {"pq": 0.25, "sq": 0.25, "rq": pytest.approx(1 / 3), "n": 3}
    assert result["Stuff"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 1}


def test_iou_of_exactly_one_half_is_no_match():
    result = one_image(
        [[1, 1, 0, 0]],
        [{"id": 1, "category_id": 1}],
        [[1, 9, 0, 0]],
        [{"id": 1, "category_id": 1}, {"id": 9, "category_id": 7}],
    )
    assert (result["per_class"][1]["tp"], result["per_class"][1]["fp"], result["per_class"][1]["fn"]) == (0, 1, 1)


def test_void_leaves_the_union_and_a_prediction_more_than_half_on_it_is_no_false_positive():
    # Segment 1 has two further pixels on void: IoU 1. Segment 4 lies half on void: it is still a false positive.
    gt = [[1, 1, 0, 0], [7, 7, 0, 0], [7, 7, 7, 0]]
    pred = [[1, 1, 1, 1], [4, 4, 4, 4], [0, 0, 6, 6]]
    segments = [{"id": 1, "category_id": 1}, {"id": 4, "category_id": 1}, {"id": 6, "category_id": 2}]
    result = one_image(gt, [{"id": 1, "category_id": 1}, {"id": 7, "category_id": 7}], pred, segments)
    assert result["per_class"][1]["iou"] == 1.0
    assert result["per_class"][1]["fp"] == 1
    pred[1] = [0, 4, 4, 4]
    assert (
        one_image(gt, [{"id": 1, "category_id": 1}, {"id": 7, "category_id": 7}], pred, segments)["per_class"][1]["fp"]
        == 0
    )


def test_only_the_last_crowd_of_a_class_prevents_false_positives():
    gt = [[1, 1, 1, 1], [2, 2, 2, 2]]
    crowds = [{"id": 1, "category_id": 1, "iscrowd": 1}, {"id": 2, "category_id": 1, "iscrowd": 1}]
    pred = [[5, 5, 5, 5], [6, 6, 6, 6]]
    segments = [{"id": 5, "category_id": 1}, {"id": 6, "category_id": 1}]
    result = one_image(gt, crowds, pred, segments)
    assert (result["per_class"][1]["fp"], result["per_class"][1]["fn"]) == (1, 0)


def test_ground_truth_area_comes_from_the_list_if_it_is_there():
    segment = {"id": 1, "category_id": 1, "area": 6}
    pred = [{"id": 1, "category_id": 1}]
    assert one_image([[1, 1, 1, 1]], [segment], [[1, 1, 1, 1]], pred)["per_class"][1]["iou"] == pytest.approx(4 / 6)
    del segment["area"]
    assert one_image([[1, 1, 1, 1]], [segment], [[1, 1, 1, 1]], pred)["per_class"][1]["iou"] == 1.0


def test_nothing_annotated_is_zero_with_a_message():
    with pytest.warns(UserWarning, match="no segment of any category"):
        result = one_image(np.zeros((3, 4), int), [], np.zeros((3, 4), int), [])
    assert result["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}
    assert all(row["n"] == 0 for row in result["per_class"].values())


def test_quality_equals_a_plain_count_on_random_maps():
    rng = np.random.default_rng(3)
    for _ in range(20):
        gt, pred = (np.kron(rng.integers(0, 6, (5, 6)), np.ones((4, 4), int)) for _ in range(2))
        pred = np.roll(pred if rng.random() < 0.3 else gt, rng.integers(0, 3), axis=1)
        category = {i: int(rng.choice([1, 2, 7])) for i in range(1, 6)}
        gt_list = [{"id": i, "category_id": category[i]} for i in np.unique(gt) if i]
        pred_list = [{"id": i, "category_id": category[i]} for i in np.unique(pred) if i]
        if not gt_list and not pred_list:
            continue
        got = one_image(gt, gt_list, pred, pred_list)["per_class"]
        for c in (1, 2, 7):
            tp = iou_sum = 0
            gt_ids = [s["id"] for s in gt_list if s["category_id"] == c]
            pred_ids = [s["id"] for s in pred_list if s["category_id"] == c]
            free = set(pred_ids)
            for g in gt_ids:
                for p in pred_ids:
                    union = ((gt == g) | ((pred == p) & (gt != 0))).sum()
                    iou = ((gt == g) & (pred == p)).sum() / union
                    if iou > 0.5:
                        tp, iou_sum = tp + 1, iou_sum + iou
                        free.discard(p)
            fp = sum(((pred == p) & (gt == 0)).sum() / (pred == p).sum() <= 0.5 for p in free)
            assert (got[c]["tp"], got[c]["fp"], got[c]["fn"]) == (tp, fp, len(gt_ids) - tp)
            assert got[c]["iou"] == pytest.approx(iou_sum)


@pytest.fixture
def folder_pair(tmp_path):
    """A ground truth of two images and a perfect prediction, for tests to damage: (folder, truth, prediction)."""
    rng = np.random.default_rng(0)
    content = {"annotations": []}
    for name in ("gt", "pred"):
        (tmp_path / name).mkdir()
    for image_id in (10, 11):
        ids = np.kron(rng.permutation(np.arange(1, 5)).reshape(2, 2), np.ones((6, 8), int)) * 70000
        for name in ("gt", "pred"):
            write_id_map(tmp_path / name / f"{image_id}.png", ids)
        segments = [{"id": int(i), "category_id": int([1, 2, 7, 7][k])} for k, i in enumerate(np.unique(ids))]
        content["annotations"].append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    return tmp_path, content | {"categories": CATEGORIES}, content


def score(tmp_path, gt, pred):
    return evaluate(gt, tmp_path / "gt", pred, tmp_path / "pred")


def test_in_memory_content_and_default_folders(folder_pair):
    tmp_path, gt, pred = folder_pair
    assert score(tmp_path, gt, pred)["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 3}
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "pred.json").write_text(json.dumps(pred))
    assert evaluate(tmp_path / "gt.json", None, tmp_path / "pred.json", None)["All"]["pq"] == 1.0
    with pytest.raises(ValueError, match="gt_folder must be given"):
        evaluate(gt, None, pred, None)


def damage_segment_without_pixels(pred):
    pred["annotations"][1]["segments_info"].append({"id": 424242, "category_id": 1})
    return r"image 11: segment 424242 is in the JSON and not in the PNG"


def damage_pixels_without_segment(pred):
    pred["annotations"][0]["segments_info"].pop(0)
    return "image 10: segment 70000 is in the PNG and not in the JSON"


def damage_unknown_category(pred):
    pred["annotations"][0]["segments_info"][2]["category_id"] = 99999
    reason = r"the ground truth has 1 \(.*\), .*; the network must have been trained on its categories$"
    return f"image 10: segment 210000 has the unknown category 99999: {reason}"


def damage_missing_image(pred):
    pred["annotations"].pop()
    return "no prediction for the image with id 11"


def damage_missing_field(pred):
    del pred["annotations"][1]["file_name"]
    return r'pred_json: annotations\[1\] must be a mapping with "file_name"'


def damage_segment_field(pred):
    pred["annotations"][0]["segments_info"][3] = {"id": 280000}
    return r'annotations\[0\]: segments_info\[3\] must be a mapping with integers "id" and "category_id"'


def damage_segments_type(pred):
    pred["annotations"][0]["segments_info"] = None
    return r"annotations\[0\]: segments_info must be a list"


def damage_file_name(pred):
    pred["annotations"][0]["file_name"] = "absent.png"
    return "absent.png: cannot be read: No such file"


@pytest.mark.parametrize("damage", [value for name, value in globals().items() if name.startswith("damage_")])
def test_malformed_prediction_is_named(folder_pair, damage):
    tmp_path, gt, pred = folder_pair
    pred = copy.deepcopy(pred)
    message = damage(pred)
    with pytest.raises(PanopticFormatError, match=message):
        score(tmp_path, gt, pred)


def renamed(pred, *names):
    """Return a prediction with categories: those of the ground truth, the first ones with other names."""
    rows = [row | {"name": f"class of {row['id']}"} for row in CATEGORIES]
    return pred | {"categories": [row | {"name": name} for row, name in zip(rows, names)] + rows[len(names) :]}


def test_categories_of_other_names_are_refused(folder_pair):
    tmp_path, gt, pred = folder_pair
    gt = renamed(gt, "person", "traffic light")
    (first, second), rest = CATEGORIES[:2], "the prediction is of a model with other classes; predict with a model "
    for names, number, name, other in (
        (("car",), first["id"], "car", "person"),
        (("person", "car"), second["id"], "car", "traffic light"),
    ):
        message = f"pred_json: category {number} is '{name}', in the ground truth gt_json it is '{other}'; {rest}"
        with pytest.raises(PanopticFormatError, match=re.escape(message)):
            score(tmp_path, gt, renamed(pred, *names))
    (tmp_path / "pred.json").write_text(json.dumps(renamed(pred, "car")))
    with pytest.raises(PanopticFormatError, match=f"^{tmp_path}/pred.json: category {first['id']} is 'car'"):
        score(tmp_path, gt, tmp_path / "pred.json")


def test_equal_or_absent_names_of_categories_are_scored(folder_pair):
    tmp_path, gt, pred = folder_pair
    gt = renamed(gt, "person", "traffic light")
    first, second = (row["id"] for row in CATEGORIES[:2])
    for prediction in (
        pred,
        pred | {"categories": [{"id": first}, "no row", {"name": "car"}, {"id": second, "name": None}]},
        pred | {"categories": "no list"},
        renamed(pred, "Person ", "traffic_light"),
        renamed(pred, f"thing {first}", f"category {second}"),  # what a network without a category table has
        renamed(pred, str(first), f"stuff {second}"),
    ):
        assert score(tmp_path, gt, prediction)["All"]["pq"] == 1.0


def test_duplicated_entry_is_accepted_like_panopticapi(folder_pair):
    tmp_path, gt, pred = folder_pair
    pred = copy.deepcopy(pred)
    pred["annotations"][0]["segments_info"].append(dict(pred["annotations"][0]["segments_info"][0]))
    assert score(tmp_path, gt, pred)["All"]["pq"] == 1.0


def test_other_bad_input(folder_pair):
    tmp_path, gt, pred = folder_pair
    write_id_map(tmp_path / "pred" / "10.png", np.full((3, 5), 70000))
    with pytest.raises(PanopticFormatError, match="image 10: the ground truth is 16x12 pixels, the prediction 5x3"):
        score(tmp_path, gt, pred)
    (tmp_path / "pred" / "10.png").write_bytes(b"no picture")
    with pytest.raises(PanopticFormatError, match=r"10\.png: not a PNG file"):
        score(tmp_path, gt, pred)
    with pytest.raises(PanopticFormatError, match="gt_folder .* is not a folder"):
        evaluate(gt, tmp_path / "nowhere", pred, tmp_path / "pred")
    with pytest.raises(PanopticFormatError, match='needs a list "categories"'):
        score(tmp_path, pred, pred)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        evaluate(gt, tmp_path / "gt", pred, tmp_path / "pred", workers=0)
    with pytest.raises(PanopticFormatError, match="segment 1 has area -4; it must be"):
        one_image([[1] * 4], [{"id": 1, "category_id": 1, "area": -4}], [[1] * 4], [{"id": 1, "category_id": 1}])
    with pytest.raises(PanopticFormatError, match="image 5: segment 0: the id 0 stands for void"):
        one_image([[0] * 4], [{"id": 0, "category_id": 1}], [[1] * 4], [{"id": 1, "category_id": 1}])


@pytest.mark.parametrize("kinds", ["ii", "bb", "ib", "bi"])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 5), (37, 61), (64, 2048), (90, 91)])
def test_pair_counts_equal_numpy(kinds, shape):
    rng = np.random.default_rng(sum(shape))
    for cell in (1, 7):
        maps = [np.kron(rng.integers(0, 1 << 24, (9, 9)), np.ones((cell, cell), int)) for _ in range(2)]
        maps = [np.resize(m[: shape[0] or 1, : shape[1]], shape).astype(np.int32) for m in maps]
        keys, counts = np.unique(maps[0].astype(np.int64) << 24 | maps[1], return_counts=True)
        inputs = [m if kind == "i" else _evaluation.encode_ids(m) for m, kind in zip(maps, kinds, strict=True)]
        first, second, pixels = count_pairs(*inputs)
        np.testing.assert_array_equal(first << 24 | second, keys)
        np.testing.assert_array_equal(pixels, counts)


def test_pair_counts_of_noise_and_strided_views():
    rng = np.random.default_rng(1)
    noise = rng.integers(-(2**31), 2**31, (300, 301), dtype=np.int32)
    first, second, pixels = count_pairs(noise, noise)
    np.testing.assert_array_equal(first, np.unique(noise))
    np.testing.assert_array_equal(second, first)
    assert pixels.sum() == noise.size
    small = rng.integers(-3, 3, noise.shape, dtype=np.int32)
    first, second, pixels = count_pairs(noise // 2**28, small)
    expected = np.unique(np.stack([noise.ravel() // 2**28, small.ravel()]), axis=1, return_counts=True)
    np.testing.assert_array_equal(np.stack([first, second]), expected[0])
    np.testing.assert_array_equal(pixels, expected[1])
    flipped = count_pairs(noise[::-1, ::2], noise[::-1, ::2])
    np.testing.assert_array_equal(flipped[0], np.unique(noise[:, ::2]))


def test_noise_is_given_up_and_segments_are_not():
    """The compiled `count_pairs` returns None for noise, which numpy sorts faster, but counts segments."""
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 1 << 24, (240, 320), dtype=np.int32)
    segments = np.kron(rng.permutation(1920).reshape(60, 32).astype(np.int32), np.ones((4, 10), np.int32))
    assert _evaluation.count_pairs(noise, noise) is None
    assert _evaluation.count_pairs(noise, np.zeros_like(noise)) is None
    assert _evaluation.count_pairs(segments, segments)[2].tolist() == [40] * 1920
    half = np.concatenate([segments, noise])
    first, _, pixels = count_pairs(half, half)
    np.testing.assert_array_equal(first, np.unique(half))
    assert pixels.sum() == half.size


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.zeros((2, 3, 4), np.uint8), np.zeros(6, np.int32)])
def test_pair_counts_reject_other_arrays(bad):
    good = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="second must be an .H, W. int32 id map"):
        count_pairs(good, bad)
    with pytest.raises(ValueError, match="same height and width"):
        count_pairs(good, good.T)


def test_scoring_imports_neither_torch_nor_opencv(folder_pair):
    tmp_path, _gt, _pred = folder_pair
    with PanopticWriter(tmp_path / "pred", categories=CATEGORIES) as writer:
        writer.add(10, "10.jpg", np.full((12, 16), 3), [{"id": 3, "category_id": np.int64(7)}])
    (tmp_path / "gt.json").write_text((tmp_path / "pred.json").read_text())
    program = (
        "import sys, spatialflow.panoptic as p;"
        f"r = p.evaluate({str(tmp_path / 'gt.json')!r}, {str(tmp_path / 'pred')!r},"
        f" {str(tmp_path / 'pred.json')!r}, None);"
        f"p.evaluate_and_report({str(tmp_path / 'gt.json')!r}, {str(tmp_path / 'pred')!r},"
        f" {str(tmp_path / 'pred.json')!r}, None, stream=sys.stderr);"
        "assert r['All']['pq'] == 1.0; print([m for m in ('torch', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_report(goldens, tmp_path, capsys):
    folder = goldens / "pq"
    output = tmp_path / "scores.json"
    result = evaluate_and_report(folder / "gt.json", None, folder / "dropped.json", folder / "dropped", output=output)
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(0).endswith(" images scored")
    assert lines[0].split() == ["PQ", "SQ", "RQ", "N"]
    assert lines[1].split() == ["All", "56.2", "62.5", "56.2", "8"]
    assert [line.split() for line in lines if line.startswith("person")] == [
        ["person", "79.1", "100.0", "79.1", "17", "0", "9"]
    ]
    assert len(lines) == 4 + 2 + 8
    written = json.loads(output.read_text())
    assert written["All"] == result["All"]
    assert written["per_class"]["1"] == {"name": "person"} | result["per_class"][1]
    evaluate_and_report(folder / "gt.json", None, folder / "dropped.json", None, per_class=False)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_report_says_when_nothing_is_annotated(tmp_path, capsys):
    content = {"annotations": [], "categories": CATEGORIES}
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt.json").write_text(json.dumps(content))
    evaluate_and_report(tmp_path / "gt.json", None, tmp_path / "gt.json", None)
    assert "no segment of any category was annotated or predicted" in capsys.readouterr().out
