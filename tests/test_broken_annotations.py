# SPDX-License-Identifier: Apache-2.0
"""Effects of contradictory annotations on scores, on training data and on pictures."""

import json
import warnings

import cv2
import numpy as np
import pytest
from helpers.broken_annotations import (
    BREAKS,
    Broken,
    area_infinite,
    id_zero,
    pixels_without_segment,
    segment_without_pixels,
    two_entries_of_an_image,
)
from helpers.scenes import scene_categories

from spatialflow.cli.main import main
from spatialflow.config import DataConfig
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.loader import Schedule, make_loader
from spatialflow.data.samples import SampleError
from spatialflow.panoptic import PanopticFormatError, PanopticQuality, write_id_map
from spatialflow.panoptic.rules import PREDICTION, RULES, TRUTH

pytest_plugins = ["helpers.broken_annotations"]  # fixtures `valid_scenes` and `scenes_copy`


class TestScores:
    """Scores equal panopticapi's if areas are correct or too large; if they are too small, pixels are counted."""

    CATEGORIES = [{"id": 1, "isthing": 1}]

    def iou(self, area):
        quality = PanopticQuality(self.CATEGORIES)
        segment = {"id": 1, "category_id": 1} | ({} if area is None else {"area": area})
        prediction = np.array([[1] * 7 + [0] * 3])
        quality.update(np.ones((1, 10), int), [segment], prediction, [{"id": 1, "category_id": 1}])
        return quality.compute()["per_class"][1]["iou"]

    def test_an_area_below_the_pixels_does_not_raise_the_quality(self):
        assert self.iou(None) == self.iou(10) == 0.7
        for area in (0, 1, 7, 9.5):
            with pytest.warns(UserWarning, match="segment 1 has area .* in the JSON and 10 pixels in the PNG"):
                assert self.iou(area) == 0.7

    def test_an_area_above_the_pixels_counts_as_in_panopticapi(self):
        with pytest.warns(UserWarning, match="area 12"):
            assert self.iou(12) == 7 / 12

    @pytest.mark.parametrize("area", [float("nan"), float("inf"), -1, 10**400])
    def test_an_area_that_cannot_be_is_refused(self, area):
        with pytest.raises(PanopticFormatError, match="image : segment 1 has area"):
            self.iou(area)

    def test_a_predicted_segment_of_id_zero_counts_as_any_other(self):
        truth, segments = np.array([[0, 0, 1, 1, 1, 1, 1, 1]]), [{"id": 1, "category_id": 1}]
        scores = []
        for number in (0, 5):
            quality = PanopticQuality(self.CATEGORIES)
            prediction = np.array([[number] * 6 + [6, 6]])
            predicted = [{"id": number, "category_id": 1}, {"id": 6, "category_id": 1}]
            quality.update(truth, segments, prediction, predicted)
            scores.append(quality.compute())
        assert scores[0] == scores[1] and scores[0]["per_class"][1]["iou"] == 4 / 6

    def test_segments_without_pixels_and_pixels_without_segment_count_as_in_panopticapi(self):
        """The segment is missed; the pixels are not void, so they count in the union."""
        truth = np.array([[1, 1, 1, 9]])
        segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 1}]
        quality = PanopticQuality(self.CATEGORIES)
        with pytest.warns(UserWarning) as reports:
            quality.update(truth, segments, np.full((1, 4), 3), [{"id": 3, "category_id": 1}])
        row = quality.compute()["per_class"][1]
        assert (row["iou"], row["tp"], row["fn"], row["fp"]) == (3 / 4, 1, 1, 0) and len(reports) == 2

    def test_id_zero_in_a_ground_truth_is_refused(self):
        """Otherwise void pixels would be the pixels of a segment, and predictions would match them."""
        truth = np.zeros((10, 20), int)
        truth[:, 10:] = 1
        segments = [{"id": 0, "category_id": 1}, {"id": 1, "category_id": 1}]
        with pytest.raises(PanopticFormatError, match="segment 0: the id 0 stands for void"):
            PanopticQuality(self.CATEGORIES).update(truth, segments, truth + 1, [{"id": 1, "category_id": 1}])

    @pytest.mark.parametrize("setting", ["ignore", "error"])
    def test_reports_whatever_the_settings_of_warnings(self, valid_scenes, scenes_copy, capsys, setting):
        broken = Broken(scenes_copy)
        broken.segment["area"] += 4
        with warnings.catch_warnings():
            warnings.simplefilter(setting)
            assert main(["evaluate", str(broken.save()), str(valid_scenes / "panoptic.json")]) == 0
        assert "1 x area-pixels" in capsys.readouterr().err

    def test_reports_of_many_images_are_one_sentence(self, valid_scenes, scenes_copy, capsys):
        broken = Broken(scenes_copy)
        for annotation in broken.content["annotations"]:
            annotation["segments_info"][0]["area"] += 1
        assert main(["evaluate", str(broken.save()), str(valid_scenes / "panoptic.json")]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "scenes/panoptic.json: 3 x area-pixels, e.g. image 1: segment" in line


class TestTraining:
    def test_a_segment_without_pixels_is_left_out(self, valid_scenes, scenes_copy):
        broken = Broken(scenes_copy)
        segment_without_pixels(broken)
        unbroken = CocoPanoptic(valid_scenes / "panoptic.json", valid_scenes / "images", None, scene_categories())[1]
        sample = CocoPanoptic(broken.save(), scenes_copy / "images", None, scene_categories())[1]
        for value, expected in zip(sample[1:6], unbroken[1:6], strict=True):
            np.testing.assert_array_equal(value, expected)
        assert [note.segment for note in sample.notes] == [424242]

    def test_boxes_of_corners_do_not_reach_the_network(self, valid_scenes, scenes_copy):
        broken = Broken(scenes_copy)
        for segment in broken.annotation["segments_info"]:
            x, y, width, height = segment["bbox"]
            segment["bbox"] = [x, y, x + width, y + height]
        unbroken = CocoPanoptic(valid_scenes / "panoptic.json", valid_scenes / "images", None, scene_categories())[1]
        sample = CocoPanoptic(broken.save(), scenes_copy / "images", None, scene_categories())[1]
        np.testing.assert_array_equal(sample.boxes, unbroken.boxes)
        assert {note.rule for note in sample.notes} == {"bbox-pixels"}

    def test_an_annotation_without_any_pixel_is_not_used(self, scenes_copy):
        broken = Broken(scenes_copy)
        write_id_map(broken.png, np.zeros_like(broken.ids))
        with pytest.raises(SampleError, match="none of its .* segments has pixels"):
            CocoPanoptic(broken.save(), scenes_copy / "images", None, scene_categories())[1]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_batches_carry_notes(self, scenes_copy, workers):
        broken = Broken(scenes_copy)
        segment_without_pixels(broken)
        data = CocoPanoptic(broken.save(), scenes_copy / "images", None, scene_categories())
        config = DataConfig(train_short_edges=(96,), train_long_edge=160)
        (batch,) = make_loader(data, config, Schedule(data.sizes, 3, 0).batches(0, 1, 0, 1, 1), workers)
        assert [note.rule for note in batch.notes] == ["no-pixels"] and batch.problems == []

    def test_the_command_reports_each_kind_once_and_counts(self, scenes_copy, tmp_path, capsys):
        broken = Broken(scenes_copy)
        for annotation in broken.content["annotations"]:
            annotation["segments_info"].append({"id": 424242, "category_id": 1})
        settings = [
            "num_things=6",
            "num_stuff=7",
            "categories=synthetic",
            "epochs=2",
            "train_short_edges=[64]",
            "train_long_edge=96",
            "images_per_step=1",
        ]
        data = ["--images", str(scenes_copy / "images"), "--annotations", str(broken.save()), "--workers", "0"]
        assert main(["train", "tiny", *settings, *data, "--output", str(tmp_path / "run")]) == 0
        out = capsys.readouterr().out
        assert out.count("segment 424242 is in the JSON and not in the PNG") == 1
        assert "3 x no-pixels" in out
        rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert [row["rule"] for row in rows if row["kind"] == "note"] == ["no-pixels"]

    def test_validation_data_that_cannot_be_scored_are_refused_at_the_start(self, scenes_copy):
        broken = Broken(scenes_copy)
        area_infinite(broken)
        path = broken.save()
        CocoPanoptic(path, scenes_copy / "images", None, scene_categories())  # training does not read areas
        with pytest.raises(PanopticFormatError, match="has area inf"):
            CocoPanoptic(path, scenes_copy / "images", None, scene_categories(), scored=True)

    def test_evaluations_report_areas_in_a_sentence(self, scenes_copy, tmp_path, capsys):
        broken = Broken(scenes_copy)
        for annotation in broken.content["annotations"]:
            annotation["segments_info"][0]["area"] += 1
        settings = [
            "num_things=6",
            "num_stuff=7",
            "categories=synthetic",
            "epochs=1",
            "train_short_edges=[64]",
            "train_long_edge=96",
            "images_per_step=3",
        ]
        data = ["--images", str(scenes_copy / "images"), "--annotations", str(broken.save()), "--workers", "0"]
        validation = [option.replace("--", "--validation-") for option in data[:4]]
        assert main(["train", "tiny", *settings, *data, *validation, "--output", str(tmp_path / "run")]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "area-pixels" in line]
        assert len(lines) == 1 and lines[0].startswith(
            f"spatialflow: {scenes_copy}/panoptic.json: 3 x area-pixels, e.g. "
        )

    def test_the_command_refuses_id_zero_at_the_start(self, scenes_copy, tmp_path, capsys):
        broken = Broken(scenes_copy)
        id_zero(broken)
        data = ["--images", str(scenes_copy / "images"), "--annotations", str(broken.save())]
        settings = ["num_things=6", "num_stuff=7", "categories=synthetic", "epochs=1"]
        assert main(["train", "tiny", *settings, *data, "--output", str(tmp_path / "run")]) == 2
        assert "segment 0: the id 0 stands for void" in capsys.readouterr().err and not (tmp_path / "run").exists()


class TestVisualize:
    def test_id_zero_is_refused(self, scenes_copy, tmp_path, capsys):
        broken = Broken(scenes_copy)
        id_zero(broken)
        arguments = ["--ground-truth", str(broken.save()), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(scenes_copy / "images"), *arguments]) == 2
        assert "segment 0: the id 0 stands for void" in capsys.readouterr().err

    @pytest.mark.parametrize("title", ["ground-truth", "prediction"])
    @pytest.mark.parametrize("has_other_file", [False, True], ids=["alone", "beside"])
    @pytest.mark.parametrize(
        "damage",
        [*BREAKS[:10], two_entries_of_an_image, segment_without_pixels, pixels_without_segment],
        ids=lambda damage: damage.__name__,
    )
    def test_breaches_stop_or_are_reported_once(
        self, valid_scenes, scenes_copy, tmp_path, capsys, title, has_other_file, damage
    ):
        """The effect of each problem is that in docs/annotations.md; problems of pixels skip only their image."""
        broken = Broken(scenes_copy)
        name = damage(broken)[0]
        use, path = TRUTH if title == "ground-truth" else PREDICTION, broken.save()
        arguments = [f"--{title}", str(path), "--output", str(tmp_path / "out")]
        if has_other_file:
            arguments += [f"--{'prediction' if use == TRUTH else 'ground-truth'}", str(valid_scenes)]
        code = main(["visualize", str(scenes_copy / "images"), *arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spatialflow: ")]
        if use in RULES[name].stops:
            (line,) = lines
            assert code == (1 if name in ("no-pixels", "no-segment") else 2) and f"{path}: " in line
            return
        reported = [line for line in lines if line.startswith(f"spatialflow: {path}: 1 x {name}, e.g. ")]
        assert code == 0 and len(reported) == len(lines) == (use in RULES[name].reported)

    def test_a_prediction_without_categories(self, valid_scenes, scenes_copy, tmp_path, capsys):
        """Names and colors are those of the ground truth; without one, colors are derived from ids."""
        broken = Broken(scenes_copy)
        del broken.content["categories"]
        arguments = ["--prediction", str(broken.save()), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(scenes_copy / "images"), *arguments]) == 0
        without_truth = cv2.imread(str(tmp_path / "out/pictures/000002.jpg"))
        for prediction, name in ((broken.folder, "broken"), (valid_scenes, "scenes")):
            files = [
                "--prediction",
                str(prediction),
                "--ground-truth",
                str(valid_scenes),
                "--output",
                str(tmp_path / name),
            ]
            assert main(["visualize", str(scenes_copy / "images"), *files]) == 0
        pictures = [tmp_path / name / "pictures/000002.jpg" for name in ("broken", "scenes")]
        assert without_truth is not None and pictures[0].read_bytes() == pictures[1].read_bytes()
        assert capsys.readouterr().err.count("spatialflow: ") == 0

    def test_names_without_a_name(self, scenes_copy, tmp_path, capsys):
        for name in ("", ".", "/", ".."):
            broken = Broken(scenes_copy)
            broken.row["file_name"] = name
            arguments = ["--ground-truth", str(broken.save()), "--output", str(tmp_path / "out")]
            assert main(["visualize", str(scenes_copy / "images"), *arguments]) == 0
            assert "has no ground truth in" in capsys.readouterr().err
