# SPDX-License-Identifier: Apache-2.0
"""Scoring a network: average precision is pycocotools' own, panoptic quality that of the files it leaves."""

import json

import numpy as np
import pytest
import torch
from scenes import scene_categories, write_coco

from spatialflow.data.coco import CocoPanoptic
from spatialflow.engine.distributed import World
from spatialflow.engine.evaluate import average_precision, detection_truth, encode_mask, evaluate_network
from spatialflow.engine.predict import PanopticResult
from spatialflow.panoptic.formats import read_id_map
from spatialflow.panoptic.quality import evaluate

coco_mask = pytest.importorskip("pycocotools.mask")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_coco(tmp_path_factory.mktemp("scenes"), 4, (96, 128))
    return CocoPanoptic(folder / "panoptic.json", folder / "images", None, scene_categories())


def rows_of(data, shift: int, keep: float, rng):
    """Results like a network's: ground truth, shifted, some missing, with scores."""
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
    """Through files, as a user of pycocotools would: the same numbers."""
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


def test_no_results_score_zero(data):
    assert average_precision(json.loads(data.json_path.read_text()), data.panoptic_folder, [])["box"]["ap"] == 0


def test_truth_has_the_things_alone(data):
    truth = detection_truth(json.loads(data.json_path.read_text()), data.panoptic_folder)
    things = sum(s["category_id"] < 10 for a in data.annotations for s in a["segments_info"])
    assert len(truth["annotations"]) == things and {row["id"] for row in truth["categories"]} == {1, 2, 3, 4, 5, 6}


class Oracle:
    """A predictor that knows the ground truth, except of images it is told to miss."""

    def __init__(self, data, missed=()):
        self.data, self.missed, self.categories = data, missed, data.categories

    def __call__(self, path):
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
    """A perfect predictor scores 1; one that misses an image scores what `evaluate` says of the files on the disk."""
    assert evaluate_network(Oracle(data), data, tmp_path / "all", ALONE)["All"]["pq"] == 1.0
    scores = evaluate_network(Oracle(data, missed=(1,)), data, tmp_path / "some", ALONE)
    files = evaluate(
        data.json_path, data.panoptic_folder, tmp_path / "some" / "panoptic.json", tmp_path / "some" / "panoptic"
    )
    assert scores["All"] == files["All"] and 0 < scores["All"]["pq"] < 1 and scores["problems"] == []
    assert json.loads((tmp_path / "some" / "scores.json").read_text())["All"] == scores["All"]
