# SPDX-License-Identifier: Apache-2.0
"""Scores of a network: average precision equals pycocotools, panoptic quality equals that of written files."""

import json

import numpy as np
import pytest
import torch
from helpers.scenes import scene_categories, write_coco

from spatialflow.cli.main import main
from spatialflow.data.coco import CocoPanoptic
from spatialflow.engine.checkpoints import load_checkpoint, save_checkpoint
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.evaluate import evaluate_network
from spatialflow.engine.predict import Outcome
from spatialflow.engine.result import PanopticResult
from spatialflow.models.build import build_model
from spatialflow.panoptic.detection import (
    _is_rle,
    average_precision,
    detection_truth,
    encode_mask,
    read_detections,
)
from spatialflow.panoptic.formats import read_id_map
from spatialflow.panoptic.quality import evaluate

coco_mask = pytest.importorskip("pycocotools.mask")
ALONE = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_coco(tmp_path_factory.mktemp("scenes"), 4, (96, 128))
    return CocoPanoptic(folder / "panoptic.json", folder / "images", None, scene_categories())


def rows_of(data, shift: int, keep: float, rng):
    """Return the ground truth, and detections: the ground truth shifted, with random scores and some missing."""
    truth = detection_truth(json.loads(data.json_path.read_text()), data.panoptic_folder)
    rows = []
    for annotation in truth["annotations"]:
        if rng.random() < keep:
            mask = np.roll(coco_mask.decode(annotation["segmentation"]), shift, axis=1)
            x, y, w, h = annotation["bbox"]
            rows.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": [x + shift, y, w, h],
                    "score": float(rng.random()),
                    "segmentation": encode_mask(mask),
                }
            )
    return truth, rows


@pytest.mark.parametrize("shift, keep", [(0, 1.0), (3, 1.0), (2, 0.6)])
def test_average_precision_is_that_of_pycocotools(data, tmp_path, shift, keep):
    """Average precision equals that of pycocotools on files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, rows = rows_of(data, shift, keep, np.random.default_rng(0))
    ours = average_precision(json.loads(data.json_path.read_text()), data.panoptic_folder, rows)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        fields = {"image_id", "category_id", "score", "bbox" if kind == "box" else "segmentation"}
        (tmp_path / "rows.json").write_text(json.dumps([{k: v for k, v in row.items() if k in fields} for row in rows]))
        coco = COCO(str(tmp_path / "truth.json"))
        scorer = COCOeval(coco, coco.loadRes(str(tmp_path / "rows.json")), name)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        assert list(ours[kind].values()) == pytest.approx(list(scorer.stats[:6]), abs=1e-12)
    assert (ours["box"]["ap"] == 1.0) == (shift == 0)


@pytest.mark.parametrize(
    "ids",
    [
        ("cat", 2, 3, 4),  # `predict` writes such ids for a folder with cat.jpg and 2.jpg
        (-1, 2**63, 2**63 + 1, 2**63 + 2),  # rounded to equal floats in a NumPy array
        ("a", "a\0", "b", 10**30),  # a NumPy array strips trailing NUL characters
    ],
)
def test_average_precision_takes_ids_of_every_kind(data, ids):
    content = json.loads(data.json_path.read_text())
    _, rows = rows_of(data, 2, 0.6, np.random.default_rng(0))
    expected = average_precision(content, data.panoptic_folder, rows)
    new_ids = dict(zip((annotation["image_id"] for annotation in content["annotations"]), ids, strict=False))
    for row in (*content["annotations"], *rows):
        row["image_id"] = new_ids[row["image_id"]]
    scores = average_precision(content, data.panoptic_folder, rows)
    assert all(scores[kind] == pytest.approx(expected[kind], abs=1e-12) for kind in ("box", "mask"))


def test_evaluation_of_images_with_numbers_and_names(tmp_path, capsys):
    """`predict --detections` on 1.jpg and cat.jpg, then `evaluate --detections`."""
    write_coco(tmp_path / "data", 2, (64, 96))
    (tmp_path / "photos").mkdir()
    for old, new in (("000001", "1"), ("000002", "cat")):
        (tmp_path / f"data/images/{old}.jpg").rename(tmp_path / f"photos/{new}.jpg")
    text = (tmp_path / "data/panoptic.json").read_text()
    (tmp_path / "data/panoptic.json").write_text(text.replace("000001.jpg", "1.jpg").replace("000002.jpg", "cat.jpg"))
    settings = ["num_things=6", "num_stuff=6", "categories=synthetic", "test_short_edges=[64]", "test_long_edge=96"]
    predict = ["predict", str(tmp_path / "photos"), "--config", "tiny", "--detections", "--no-overlay"]
    assert main([*predict, "--output", str(tmp_path / "out"), "--set", *settings, "score_threshold=0.005"]) == 0
    rows = read_detections(tmp_path / "out/detections.json")
    assert {row["image_id"] for row in rows} == {1, "cat"}
    for truth in ("data/panoptic.json", "out"):  # a prediction used as ground truth has both kinds of ids too
        paths = [str(tmp_path / truth), str(tmp_path / "out")]
        assert main(["evaluate", *paths, "--detections", str(tmp_path / "out/detections.json")]) == 0
        assert "box AP ap " in capsys.readouterr().out


def test_no_results_score_zero(data):
    assert average_precision(json.loads(data.json_path.read_text()), data.panoptic_folder, [])["box"]["ap"] == 0


def test_truth_has_the_things_alone(data):
    truth = detection_truth(json.loads(data.json_path.read_text()), data.panoptic_folder)
    things = sum(s["category_id"] < 10 for a in data.annotations for s in a["segments_info"])
    assert len(truth["annotations"]) == things and {row["id"] for row in truth["categories"]} == {1, 2, 3, 4, 5, 6}


class Oracle:
    """Predictor that returns the ground truth, except for the images in `missed`."""

    def __init__(self, data, missed=()):
        self.data, self.missed, self.categories = data, missed, data.categories

    def outcomes(self, paths):
        for path in paths:
            yield Outcome(self.predict(path), None, None)

    def predict(self, path):
        index = [self.data.image_path(i) for i in range(len(self.data))].index(path)
        annotation = self.data.annotations[index]
        id_map = read_id_map(self.data.panoptic_folder / annotation["file_name"])
        segments = annotation["segments_info"]
        if index in self.missed:
            id_map, segments = np.zeros_like(id_map), []
        empty = np.zeros((0, 4), np.float32)
        return PanopticResult(
            id_map,
            segments,
            empty,
            empty[:, 0],
            empty[:, 0].astype(np.int64),
            None,
            0.5,
            self.categories,
            path.name,
            {},
        )


def test_scores_are_those_of_the_files(data, tmp_path):
    """A perfect predictor scores 1; one that misses an image scores as `evaluate` does for its files."""
    assert evaluate_network(Oracle(data), data, tmp_path / "all", ALONE)["All"]["pq"] == 1.0
    scores = evaluate_network(Oracle(data, missed=(1,)), data, tmp_path / "some", ALONE)
    files = evaluate(
        data.json_path, data.panoptic_folder, tmp_path / "some" / "panoptic.json", tmp_path / "some" / "panoptic"
    )
    assert scores["All"] == files["All"] and 0 < scores["All"]["pq"] < 1 and scores["problems"] == []
    assert json.loads((tmp_path / "some" / "scores.json").read_text())["All"] == scores["All"]


def test_commands(tmp_path, capsys):
    """`evaluate --detections` reports AP and PQ of `predict --detections` as text and JSON, and refuses bad files."""
    write_coco(tmp_path / "data", 2, (64, 96))
    settings = ["num_things=6", "num_stuff=6", "categories=synthetic", "test_short_edges=[64]", "test_long_edge=96"]
    predict = ["predict", str(tmp_path / "data/images"), "--config", "tiny", "--detections", "--no-overlay"]
    assert main([*predict, "--output", str(tmp_path / "out"), "--set", *settings, "score_threshold=0.005"]) == 0
    rows = read_detections(tmp_path / "out/detections.json")
    assert rows and all("segmentation" in row for row in rows)
    paths = [str(tmp_path / "data/panoptic.json"), str(tmp_path / "out")]
    assert (
        main(
            [
                "evaluate",
                *paths,
                "--detections",
                str(tmp_path / "out/detections.json"),
                "--output",
                str(tmp_path / "scores.json"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "box AP ap " in printed and "ap_large -\n" in printed  # small scenes have no large things
    assert set(json.loads((tmp_path / "scores.json").read_text())["detection"]) == {"box", "mask"}
    row = {key: value for key, value in rows[0].items() if key != "segmentation"}
    for content, message in (
        ("{}", "are a list"),
        ("[1]", "row 0"),
        ("[", "not a JSON"),
        (json.dumps([row | {"image_id": 99}]), "none of the 1 rows has an image_id of the ground truth"),
        (json.dumps([row | {"image_id": [1]}]), "row 0: image_id and category_id must be ids, got [1]"),
        (json.dumps([row | {"image_id": True}]), "row 0: image_id and category_id must be ids, got True"),
        (json.dumps([row | {"category_id": True}]), "row 0: image_id and category_id must be ids, got"),
        (json.dumps([row | {"segmentation": {"size": [1, True], "counts": "1"}}]), "segmentation must be a COCO RLE"),
        (json.dumps([row | {"bbox": [1, 2, 3]}]), "row 0: bbox must be four numbers"),
        (json.dumps([row | {"score": True}]), "row 0: bbox must be four numbers and score one"),
        (json.dumps([row | {"score": 10**400}]), "row 0: bbox must be four numbers and score one"),
        (json.dumps([row | {"score": "x"}]), "row 0: bbox must be four numbers and score one"),
        (json.dumps([row | {"bbox": [1, 2, 3, float("nan")]}]), "row 0: bbox must be four numbers"),
        (json.dumps([row | {"bbox": [1, 2, 3, 10**400]}]), "row 0: bbox must be four numbers"),
        *(  # runs that do not fill the mask, for which pycocotools hangs or reads out of bounds
            (json.dumps([row | {"segmentation": {"size": size, "counts": counts}}]), "must be a COCO RLE")
            for size, counts in (([8, 8], "zzzz"), ([8, 8], ""), ([8, 8], "0000"), ([0, 8], "0"), ([8, 8], "\u00e9"))
        ),
        (json.dumps([row | {"segmentation": 3}]), "row 0: segmentation must be a COCO RLE, got 3"),
        (json.dumps([row | {"segmentation": [[1, 2, 3, 4, 5, 6]]}]), "row 0: segmentation must be a COCO RLE"),
        (
            json.dumps([rows[0] | {"segmentation": encode_mask(np.ones((9, 9), bool))}]),
            "mask of 9x9 pixels, image 1 has 96x64",
        ),
        (json.dumps([row | {"segmentation": {"size": [64, 96], "counts": "nnnnnn0"}}]), "row 0: segmentation must be"),
        (json.dumps([row | {"segmentation": {"size": [64, 96], "counts": "!"}}]), "row 0: segmentation must be"),
        (json.dumps([row | {"segmentation": {"size": [64, 96], "counts": "0a"}}]), "row 0: segmentation must be"),
        ("[" * 100_000, "not a JSON"),
    ):
        (tmp_path / "bad.json").write_text(content)
        assert main(["evaluate", *paths, "--detections", str(tmp_path / "bad.json")]) == 2
        assert message in capsys.readouterr().err


def test_half_precision_file(tmp_path):
    """`convert --half` rounds every weight to float16 and halves the file."""
    model = build_model("tiny", backbone_base_channels=4)
    save_checkpoint(model, tmp_path / "whole.safetensors")
    assert main(["convert", "--half", str(tmp_path / "whole.safetensors"), str(tmp_path / "half.safetensors")]) == 0
    halved = load_checkpoint(build_model("tiny", backbone_base_channels=4), tmp_path / "half.safetensors").state_dict()
    assert all(
        torch.equal(value.half().float(), halved[name]) for name, value in model.state_dict().items() if value.dim()
    )
    assert (tmp_path / "half.safetensors").stat().st_size < 0.65 * (tmp_path / "whole.safetensors").stat().st_size


def test_masks_that_are_filled():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 1.0):
        code = encode_mask(rng.random((37, 53)) < share)
        assert _is_rle(code) and not _is_rle(code | {"size": [37, 54]}) and not _is_rle(code | {"counts": ""})
