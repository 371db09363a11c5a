# SPDX-License-Identifier: Apache-2.0
"""Training with broken images and annotations; a Cityscapes tree from training to scores."""

import json

import cv2
import pytest
from helpers.scenes import scene_categories, write_cityscapes, write_coco
from helpers.training import SINGLE_PROCESS, SMALL_RUN, small

from spatialflow.cli.main import main
from spatialflow.data.categories import load_categories
from spatialflow.data.cityscapes import Cityscapes
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.samples import SampleError
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.log import read_log
from spatialflow.engine.trainer import Trainer
from spatialflow.panoptic.formats import PanopticFormatError

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`


class TestBrokenData:
    def test_named_counted_and_survived(self, tmp_path, capsys):
        write_coco(tmp_path, 4, (64, 96))
        (tmp_path / "images/000003.jpg").unlink()
        data = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        trainer = Trainer(small(epochs=2), data, tmp_path / "run", SINGLE_PROCESS, validation=data)
        trainer.run()
        problems = [row for row in read_log(tmp_path / "run/log.jsonl") if row["kind"] == "problem"]
        assert len(problems) == 1 and "000003.jpg: cannot be read" in problems[0]["message"]
        assert capsys.readouterr().out.count("000003.jpg") == 1
        assert json.loads((tmp_path / "run/evaluation/scores.json").read_text())["problems"][0].endswith(
            "No such file or directory"
        )
        with pytest.raises(SampleError, match="000003.jpg"):
            Trainer(small(), data, tmp_path / "strict", SINGLE_PROCESS, strict=True).run()

    def test_problems_of_other_processes_are_counted(self, data, tmp_path, monkeypatch, capsys):
        """The first process prints and logs the problems of all processes, each one once."""
        elsewhere = ["b.jpg: is truncated"]
        monkeypatch.setattr(
            ProcessGroup, "gather", lambda self, item: [item, elsewhere] if isinstance(item, list) else [item]
        )
        trainer = Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS)
        trainer.run()
        assert [row["message"] for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "problem"] == elsewhere
        assert capsys.readouterr().out.count("b.jpg") == 1 and len(trainer.reporter.problems) == 1

    def test_validation_without_a_usable_image_is_an_error(self, data, tmp_path):
        absent = CocoPanoptic(data.json_path, tmp_path / "nowhere", data.panoptic_folder, scene_categories())
        with pytest.raises(PanopticFormatError, match="none of 4 images to evaluate on can be used; .*nowhere"):
            Trainer(small(), data, tmp_path / "run", SINGLE_PROCESS, validation=absent).run()
        assert (tmp_path / "run/checkpoint.pt").is_file() and (tmp_path / "run/model.safetensors").is_file()

    def test_validation_that_cannot_be_scored_is_refused_before_training(self, scenes, data, tmp_path, capsys):
        """Missing images, categories or folders are an error at the start, not at the first evaluation."""
        content = json.loads((scenes / "panoptic.json").read_text())
        settings = [f"{name}={value}" for name, value in SMALL_RUN.items()]
        files = {"--images": scenes / "images", "--annotations": scenes / "panoptic.json", "--output": tmp_path / "run"}
        files |= {"--validation-images": scenes / "images", "--validation-annotations": tmp_path / "val.json"}
        unlisted = {key: value for key, value in content.items() if key != "categories"}
        for truth, folder, message in (
            (unlisted, scenes / "panoptic", 'needs a list "categories"'),
            (content | {"annotations": []}, scenes / "panoptic", "the validation data set has no images"),
            (content, tmp_path / "nowhere", "nowhere: no such folder"),
        ):
            (tmp_path / "val.json").write_text(json.dumps(truth))
            files["--validation-panoptic"] = folder
            arguments = [str(part) for pair in files.items() for part in pair]
            assert main(["train", "tiny", *settings, "--workers", "0", *arguments]) == 2
            assert message in capsys.readouterr().err and not (tmp_path / "run" / "log.jsonl").exists()

    def test_annotations_of_another_size_do_not_end_an_evaluation(self, tmp_path):
        write_coco(tmp_path, 2, (64, 96))
        image = tmp_path / "images/000002.jpg"
        cv2.imwrite(str(image), cv2.imread(str(image))[:50])
        data = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        Trainer(small(), data, tmp_path / "run", SINGLE_PROCESS, validation=data).run()
        (problem,) = json.loads((tmp_path / "run/evaluation/scores.json").read_text())["problems"]
        assert problem == "image 2: the ground truth is 96x64 pixels, the prediction 96x50"

    def test_problems_of_the_validation_data_are_shown(self, data, tmp_path, capsys):
        write_coco(tmp_path, 2, (64, 96))
        (tmp_path / "panoptic/000002.png").write_bytes(b"")
        validation = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        Trainer(small(), data, tmp_path / "run", SINGLE_PROCESS, validation=validation).run()
        assert "skipped: " in capsys.readouterr().out
        (row,) = [row for row in read_log(tmp_path / "run/log.jsonl") if row["kind"] == "problem"]
        assert "000002.png: not a PNG" in row["message"]


def test_cityscapes_tree_trains_predicts_and_is_scored(tmp_path, capsys):
    """Training uses random crops and crowds; evaluation skips a damaged label file."""
    write_cityscapes(tmp_path, 2, (64, 128))
    write_cityscapes(tmp_path, 3, (64, 128), split="val", seed=1)
    next((tmp_path / "gtFine/val").rglob("*.png")).write_bytes(b"")
    settings = [f"{k}={v}" for k, v in SMALL_RUN.items() if k not in ("num_things", "num_stuff", "categories")]
    settings.append("train_crop=[64, 64]")
    data = ["--cityscapes", str(tmp_path), "--workers", "0"]
    assert main(["train", "spatialflow_r50_cityscapes", *settings, *data, "--output", str(tmp_path / "run")]) == 0
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert len(scores["problems"]) == 1 and scores["All"]["n"] > 3
    assert len(json.loads((tmp_path / "run/evaluation/panoptic.json").read_text())["annotations"]) == 2
    assert len(Cityscapes(tmp_path, "val", load_categories("cityscapes", 8, 11))) == 3
    # With the saved weights, the other commands give the same scores, and a picture per image with a ground truth.
    images, output = str(tmp_path / "leftImg8bit" / "val"), str(tmp_path / "out")
    weights = ["--config", "spatialflow_r50_cityscapes", "--checkpoint", str(tmp_path / "run/model.safetensors")]
    assert main(["predict", images, *weights, "--output", output, "--no-overlay", "--set", *settings]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), output, "--output", str(tmp_path / "numbers.json")]) == 1
    assert capsys.readouterr().err.count("has no ground truth that can be read") == 1
    assert json.loads((tmp_path / "numbers.json").read_text())["All"] == scores["All"]
    truth = str(tmp_path / "out" / "cityscapes_val.json")
    assert main(["visualize", images, "--ground-truth", truth, "--prediction", output, "--output", output]) == 0
    assert "1 of 3 photographs has no ground truth" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
