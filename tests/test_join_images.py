# SPDX-License-Identifier: Apache-2.0
"""Images of a ground truth and a prediction are joined by id or by the name of the photograph, also for Cityscapes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.scenes import write_cityscapes

from spatialflow.cli.main import main
from spatialflow.data.categories import load_categories
from spatialflow.data.cityscapes import Cityscapes
from spatialflow.data.coco import CocoPanoptic
from spatialflow.panoptic import PanopticFormatError, evaluate, read_id_map, write_id_map
from spatialflow.panoptic.photographs import find_photograph, join_images, photograph_key

pytest_plugins = ["helpers.broken_annotations"]  # fixtures `valid_scenes` and `scenes_copy`


def listed(images):
    """Return a panoptic JSON for (id, name of the photograph or None, name of the PNG)."""
    return {
        "images": [{"id": i, "file_name": name, "height": 1, "width": 1} for i, name, _ in images if name is not None],
        "annotations": [{"image_id": i, "file_name": png, "segments_info": []} for i, _, png in images],
    }


class TestJoin:
    PREDICTED = [(123, "000123.jpg", "000123.png"), ("street", "street.jpg", "street.png")]

    @pytest.mark.parametrize(
        "truth, joined",
        [
            ([(123, None, "x.png"), ("street", None, "y.png")], {123: 123, "street": "street"}),
            ([(1, "street.png", "1.png"), (2, "000123.png", "2.png")], {1: "street", 2: 123}),
            (
                [("000123", "000123.jpg", "a.png"), ("street", "street.jpg", "b.png")],
                {"000123": 123, "street": "street"},
            ),
            ([("000123", None, "a.png")], {"000123": 123}),
            ([(7, None, "000123.png")], {7: 123}),
            ([(7, "val/street.jpg", "7.png")], {7: "street"}),
        ],
    )
    def test_by_id_else_by_name(self, truth, joined):
        assert join_images(listed(truth), listed(self.PREDICTED)) == joined

    def test_equal_consecutive_ids_of_other_images_are_not_joined(self):
        truth = [(1, "b.jpg", "b.png"), (2, "a.jpg", "a.png")]
        prediction = [(1, "a.jpg", "a.png"), (2, "b.jpg", "b.png")]
        assert join_images(listed(truth), listed(prediction)) == {1: 2, 2: 1}
        prediction = [(1, None, "a.png"), (2, None, "b.png")]  # names of PNGs alone: ids count, as in panopticapi
        assert join_images(listed(truth), listed(prediction)) == {1: 1, 2: 2}

    def test_equal_ids_of_images_whose_names_differ_are_refused(self):
        truth = [(1, "a.jpg", "a.png"), (2, "b.jpg", "b.png")]
        with pytest.raises(PanopticFormatError) as error:
            join_images(listed(truth), listed([(1, "other_1.jpg", "1.png"), (2, "other_2.jpg", "2.png")]))
        assert "ids are ignored, because id 1 is 'a.jpg' in the ground truth and 'other_1.jpg'" in str(error.value)
        with pytest.raises(PanopticFormatError, match="because id 2 is 'b.jpg'"):
            join_images(listed(truth), listed([(1, "a.jpg", "1.png"), (2, "c.jpg", "2.png")]))
        for names in (("val/a.jpg", "b.png"), (None, None), ("a_leftImg8bit.png", None)):
            prediction = listed([(i, name, f"{i}.png") for i, name in enumerate(names, 1)])
            assert join_images(listed(truth), prediction) == {1: 1, 2: 2}
        unnamed = listed([(1, None, "x.png"), (2, None, "y.png")])
        assert join_images(unnamed, listed(truth)) == {1: 1, 2: 2}

    def test_equal_names_in_different_folders(self):
        """The folder, for example of a camera or a city, decides; either file may have the longer path."""
        truth = [(1, "a/x.jpg", "1.png"), (2, "b/x.jpg", "2.png")]
        for names, joined in (
            (("a/x.jpg", "b/x.jpg"), {1: 1, 2: 2}),
            (("b/x.jpg", "a/x.jpg"), {1: 2, 2: 1}),
            (("x.jpg", "x.jpg"), {1: 1, 2: 2}),
            (("all/a/x.jpg", "all/b/x.jpg"), {1: 1, 2: 2}),
        ):
            prediction = listed([(i, name, f"{i}.png") for i, name in enumerate(names, 1)])
            assert join_images(listed(truth), prediction) == joined
            assert join_images(prediction, listed(truth)) == joined
        with pytest.raises(PanopticFormatError, match="ids are ignored"):
            join_images(listed(truth), listed([(1, "all/b/x.jpg", "1.png"), (2, "all/a/x.jpg", "2.png")]))
        with pytest.raises(PanopticFormatError, match="ids are ignored"):  # a/x.jpg has another id there
            join_images(listed(truth), listed([(1, "c/x.jpg", "1.png"), (7, "a/x.jpg", "7.png")]))

    def test_a_prediction_serves_one_image(self):
        truth = [(1, "p.jpg", "1.png"), (7, "000001.jpg", "7.png")]
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 7, neither of that id nor"):
            join_images(listed(truth), listed([(1, None, "000001.png")]))
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 's'"):
            join_images(listed([(1, "s.jpg", "1.png"), ("s", "t.jpg", "2.png")]), listed([(9, "s.jpg", "s.png")]))

    def test_names_in_folders(self):
        truth = [(1, "x/1.jpg", "p1.png"), (2, "y/1.jpg", "p2.png")]
        prediction = [("a", "y/1.jpg", "q1.png"), ("b", "x/1.jpg", "q2.png")]
        assert join_images(listed(truth), listed(prediction)) == {1: "b", 2: "a"}
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 1"):
            join_images(listed(truth), listed([("a", "1.jpg", "q1.png")]))
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 7"):
            join_images(listed([(7, "1.jpg", "p.png")]), listed(prediction))

    def test_error_has_examples_of_both_lists(self):
        with pytest.raises(PanopticFormatError) as error:
            join_images(listed([(1, "c.jpg", "1.png"), (2, "d.jpg", "2.png")]), listed(self.PREDICTED))
        for part in ("id 1,", "'c.jpg'", "id 2 ('d.jpg')", "id 123 ('000123.jpg')", "id 'street' ('street.jpg')"):
            assert part in str(error.value)

    def test_evaluate_with_other_ids(self, scenes_copy, tmp_path, capsys):
        """Ground truth whose ids are permuted, or strings, is matched with predictions by name."""
        content = json.loads((scenes_copy / "panoptic.json").read_text())
        prediction = tmp_path / "prediction"
        shutil.copytree(scenes_copy / "panoptic", prediction)
        (tmp_path / "prediction.json").write_text(json.dumps(content))
        clean = evaluate(scenes_copy / "panoptic.json", None, tmp_path / "prediction.json", None)
        things = {row["id"] for row in content["categories"] if row["isthing"]}
        rows = [
            {"image_id": a["image_id"], "category_id": s["category_id"], "bbox": s["bbox"], "score": 0.9}
            for a in content["annotations"]
            for s in a["segments_info"]
            if s["category_id"] in things
        ]
        (tmp_path / "detections.json").write_text(json.dumps(rows))
        for new_id in ({1: 3, 2: 1, 3: 2}, {1: "000001", 2: "000002", 3: "000003"}):
            changed = json.loads(json.dumps(content))
            for row in changed["images"]:
                row["id"] = new_id[row["id"]]
            for annotation in changed["annotations"]:
                annotation["image_id"] = new_id[annotation["image_id"]]
            (scenes_copy / "panoptic.json").write_text(json.dumps(changed))
            files = ["--detections", str(tmp_path / "detections.json"), "--output", str(tmp_path / "scores.json")]
            assert (
                main(["evaluate", str(scenes_copy / "panoptic.json"), str(tmp_path / "prediction.json"), *files]) == 0
            )
            scores = json.loads((tmp_path / "scores.json").read_text())
            assert scores["All"] == clean["All"] and clean["All"]["pq"] == 1
            assert scores["detection"]["box"]["ap"] == pytest.approx(1)
            output = ["--output", str(tmp_path / "pictures"), "--prediction", str(tmp_path / "prediction.json")]
            truth = ["--ground-truth", str(scenes_copy / "panoptic.json")]
            assert main(["visualize", str(scenes_copy / "images"), *truth, *output]) == 0
            assert "PQ 100.0" in (tmp_path / "pictures" / "index.html").read_text()


def official_cityscapes(tree: Path, split: str = "val") -> Path:
    """Write the output of cityscapesscripts' createPanopticImgs.py for a tree: its names, ids and fields."""
    data = Cityscapes(tree, split, load_categories("cityscapes", 8, 11))
    folder = tree / "gtFine" / f"cityscapes_panoptic_{split}"
    content = {"images": [], "annotations": [], "categories": data.categories.as_coco()}
    for index, (image_id, (height, width)) in enumerate(zip(data.image_ids, data.sizes, strict=True)):
        id_map, segments = data._annotation(index)
        write_id_map(folder / f"{image_id}_gtFine_panoptic.png", id_map)
        content["images"].append(
            {"id": image_id, "width": width, "height": height, "file_name": f"{image_id}_gtFine_leftImg8bit.png"}
        )
        content["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id}_gtFine_panoptic.png", "segments_info": segments}
        )
    folder.with_suffix(".json").write_text(json.dumps(content))
    return folder.with_suffix(".json")


class TestOfficialCityscapes:
    @pytest.fixture
    def tree(self, tmp_path):
        return write_cityscapes(tmp_path / "tree", 3, split="val")

    def test_photographs_are_found(self, tree, capsys):
        """Validation and training find photographs in the folder of cities, in the root, and in a flat folder."""
        path = official_cityscapes(tree)
        categories = load_categories("cityscapes", 8, 11)
        as_downloaded = Cityscapes(tree, "val", categories)
        flat = tree / "flat"
        flat.mkdir()
        for photograph in as_downloaded.paths:
            shutil.copy(photograph, flat)
        for images in (tree / "leftImg8bit" / "val", tree / "leftImg8bit", flat):
            assert main(["validate", str(path), "--images", str(images)]) == 0, capsys.readouterr().out
            data = CocoPanoptic(path, images, None, categories)
            for index in range(3):
                for value, expected in zip(data[index][1:6], as_downloaded[index][1:6], strict=True):
                    np.testing.assert_array_equal(value, expected)
        assert find_photograph(flat, "a_b_c_gtFine_leftImg8bit.png") == flat / "a_b_c_gtFine_leftImg8bit.png"

    def test_scores_and_pictures(self, tree, tmp_path):
        """Predictions have the names of the photographs."""
        path = official_cityscapes(tree)
        content = json.loads(path.read_text())
        folder = tmp_path / "out" / "panoptic"
        for row, annotation in zip(content["images"], content["annotations"], strict=True):
            name = f"{annotation['image_id']}_leftImg8bit"
            write_id_map(folder / f"{name}.png", read_id_map(path.with_suffix("") / annotation["file_name"]))
            row["file_name"], annotation["file_name"] = f"{name}.png", f"{name}.png"
            # With other ids, images can only be matched by name.
            row["id"] = annotation["image_id"] = f"{annotation['image_id']}_0"
        (tmp_path / "out" / "panoptic.json").write_text(json.dumps(content))
        assert evaluate(path, None, tmp_path / "out" / "panoptic.json", folder)["All"]["pq"] == 1
        files = ["--ground-truth", str(path), "--prediction", str(tmp_path / "out")]
        assert main(["visualize", str(tree / "leftImg8bit/val"), *files, "--output", str(tmp_path / "pictures")]) == 0

    def test_keys(self):
        names = ["x/a_1_2_leftImg8bit.png", "a_1_2_gtFine_leftImg8bit.png", "a_1_2_gtFine_panoptic.png", "a_1_2.png"]
        assert {photograph_key(name) for name in names} == {"a_1_2"}
