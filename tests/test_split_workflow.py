# SPDX-License-Identifier: Apache-2.0
"""Photographs of which a part has ground truth, as after `dataset convert --split`: every command tells how many."""

import io
import json
import shutil

import cv2
import numpy as np
import pytest
from helpers.command_line import FAST, error_messages
from helpers.imperfect import write_imperfect
from helpers.scenes import write_coco
from helpers.viewing import edit_json

from spatialflow.cli.main import main
from spatialflow.data.convert import ConversionError, to_panoptic
from spatialflow.viewer.catalog import Catalog, read_side
from spatialflow.viewer.payload import index_payload


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return a folder with photos/, data/ of a split, and out/, predictions of all photographs."""
    folder = tmp_path_factory.mktemp("split")
    truth = write_coco(folder / "scenes", 5, (64, 96))
    shutil.copytree(truth / "images", folder / "photos")
    classes = json.loads((truth / "panoptic.json").read_text())["categories"]
    to_panoptic(_masks(truth), folder / "data", folder / "photos", classes=classes, split=0.6)
    out = write_imperfect(truth, folder / "out")
    edit_json(out, lambda content: _as_result(out, content))
    return folder


def _masks(truth):
    """Write maps of class ids, in which every segment of a class is one region."""
    from spatialflow.panoptic import read_id_map

    folder = truth.parent / "masks"
    folder.mkdir()
    for row in json.loads((truth / "panoptic.json").read_text())["annotations"]:
        ids = read_id_map(truth / "panoptic" / row["file_name"])
        classes = np.zeros(ids.shape, np.uint16)
        for number, segment in enumerate(row["segments_info"]):
            thing = segment["category_id"] < 10
            classes[ids == segment["id"]] = segment["category_id"] * 1000 + number if thing else segment["category_id"]
        cv2.imwrite(str(folder / row["file_name"]), classes)
    return folder


def _as_result(out, content):
    """Give a JSON the beginning of a result of `predict`."""
    rest = dict(content)
    content.clear()
    content.update({"info": {"description": "written by spatialflow predict"}, **rest, "run": {}})


def _names(json_path):
    return sorted(row["file_name"] for row in json.loads(json_path.read_text())["images"])


class TestVisualize:
    def test_photographs_without_ground_truth(self, converted, tmp_path, capsys):
        truth = converted / "data" / "val.json"
        arguments = ["--ground-truth", str(truth), "--prediction", str(converted / "out"), "--output", str(tmp_path)]
        assert main(["visualize", str(converted / "photos"), *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.err == f"spatialflow: 3 of 5 photographs have no ground truth in {truth} and are left out\n"
        assert "2 of 2 pictures done" in printed.out
        assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == _names(truth)

    def test_no_photograph_has_ground_truth(self, converted, tmp_path, capsys):
        photographs = [str(converted / "photos" / name) for name in _names(converted / "data" / "train.json")]
        truth = converted / "data" / "val.json"
        starts = "none of 3 photographs has a", f"{photographs[0]}: has no"
        for chosen, start in zip((photographs, photographs[:1]), starts, strict=True):
            command = ["visualize", *chosen, "--ground-truth", str(truth), "--output", str(tmp_path / "out")]
            assert main(command) == 1
            assert error_messages(capsys) == [f"{start} ground truth in {truth}", "no picture could be drawn"]

    def test_photographs_without_prediction(self, converted, tmp_path, capsys):
        prediction = converted / "data" / "train.json"
        arguments = ["--prediction", str(prediction), "--output", str(tmp_path)]
        assert main(["visualize", str(converted / "photos"), *arguments]) == 0
        assert error_messages(capsys) == [f"2 of 5 photographs have no prediction in {prediction} and are left out"]

    def test_a_photograph_of_the_same_name_in_another_folder(self, converted, tmp_path, capsys):
        """Its ground truth is not drawn for a photograph that has none."""
        content = json.loads((converted / "data" / "val.json").read_text())
        first = content["images"][0]["file_name"]
        content["images"][0]["file_name"] = f"a/{first}"
        (tmp_path / "truth.json").write_text(json.dumps(content))
        shutil.copytree(converted / "data" / "val", tmp_path / "truth")
        for folder in ("a", "b"):
            shutil.copytree(converted / "photos", tmp_path / "photos" / folder)
        (tmp_path / "photos" / "b" / content["images"][1]["file_name"]).unlink()
        arguments = ["--ground-truth", str(tmp_path / "truth.json"), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(tmp_path / "photos"), "--recursive", *arguments]) == 0
        drawn = {
            path.relative_to(tmp_path / "out" / "pictures").as_posix() for path in tmp_path.rglob("out/pictures/*/*")
        }
        assert drawn == {f"a/{first}", f"a/{content['images'][1]['file_name']}"}
        assert "7 of 9 photographs have no ground truth" in capsys.readouterr().err


class TestEvaluate:
    def test_the_number_of_images(self, converted, capsys):
        assert main(["evaluate", str(converted / "data" / "val.json"), str(converted / "out")]) == 0
        printed = capsys.readouterr()
        first = "2 images scored; 3 predictions have no ground truth and are left out"
        assert printed.out.splitlines()[0] == first and printed.err == ""
        assert main(["evaluate", str(converted / "data" / "val.json"), str(converted / "data" / "val.json")]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "2 images scored"

    def test_swapped_arguments(self, converted, capsys):
        truth, out = converted / "data" / "val.json", converted / "out"
        hint = (
            "the first argument is the ground truth, the second the prediction; "
            f"{out}/panoptic.json holds results of `predict`"
        )
        assert main(["evaluate", str(out), str(truth)]) == 2
        (message,) = error_messages(capsys)
        assert message.startswith("no prediction for the image with id") and message.endswith(f"; {hint}")
        assert main(["evaluate", str(out), str(out)]) == 0  # two runs may be compared
        assert error_messages(capsys) == []
        assert main(["evaluate", str(truth), str(converted / "data" / "train.json")]) == 2
        assert hint not in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["evaluate {} {out}", "view {out} --ground-truth {}", "validate {}"])
    def test_the_folder_of_a_split(self, converted, capsys, command):
        data = converted / "data"
        assert main(command.format(data, out=converted / "out").split()) == 2
        assert error_messages(capsys) == [
            f"{data}: holds no panoptic.json; name one of {data}/train.json, {data}/val.json"
        ]


class TestView:
    def test_images_without_ground_truth(self, converted):
        truth = converted / "data" / "val.json"
        sides = [
            read_side("truth", "Ground truth", truth),
            read_side("prediction", "", converted / "out/panoptic.json"),
        ]
        catalog = Catalog(sides)
        assert [image.problems for image in catalog.images] == [[]] * 5 and catalog.notes == []
        flags = index_payload(catalog, range(5))["truth"]
        assert sorted(i.name for i, flag in zip(catalog.images, flags, strict=True) if flag) == _names(truth)

    def test_one_line_counts_them(self, converted, tmp_path, capsys):
        data = converted / "data"
        command = ["view", str(converted / "out"), "--export", str(tmp_path / "page.html")]
        assert main([*command, "--ground-truth", str(data / "val.json"), "--compare", str(data / "train.json")]) == 0
        assert error_messages(capsys) == [
            f"{data}/val.json: 3 of 5 images have no ground truth and are shown without a PQ",
            f"{data}/train.json: 2 of 5 images have no result and are shown without one",
        ]


class TestLists:
    def test_predict_reads_the_list(self, converted, tmp_path, monkeypatch, capsys):
        """The list works in every folder, and scores without predictions of other images."""
        monkeypatch.chdir(tmp_path)
        content = (converted / "data" / "val.txt").read_bytes()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["predict", "-", *FAST, "--output", "out"]) == 0
        assert _names(tmp_path / "out" / "panoptic.json") == _names(converted / "data" / "val.json")

    def test_the_conversion_names_the_lists(self, converted, tmp_path, capsys):
        files = ["--images", str(converted / "photos"), "--classes", str(converted / "data" / "val.json")]
        command = ["dataset", "convert", str(converted / "masks"), *files, "--output", str(tmp_path), "--split", "0.6"]
        assert main(command) == 0
        assert f"{tmp_path}/val.json: 2 images; list of photographs: {tmp_path}/val.txt" in capsys.readouterr().out

    def test_every_photograph_is_in_the_list_of_its_set(self, converted):
        for name in ("train", "val"):
            lines = (converted / "data" / f"{name}.txt").read_text().splitlines()
            expected = [str(converted / "photos" / name) for name in _names(converted / "data" / f"{name}.json")]
            assert sorted(lines) == expected

    def test_a_repeated_conversion(self, converted, tmp_path):
        """Lists of an earlier conversion are replaced; another file of that name is not."""
        arguments = [converted / "masks", tmp_path / "data", converted / "photos"]
        classes = tmp_path / "classes.json"
        shutil.copy(converted / "data" / "train.json", classes)
        to_panoptic(*arguments, classes=classes)
        assert not list((tmp_path / "data").glob("*.txt"))
        (tmp_path / "data" / "panoptic.txt").write_text("mine")
        to_panoptic(*arguments, classes=classes)
        to_panoptic(*arguments, classes=classes, split=0.5)
        to_panoptic(*arguments, classes=classes, split=0.8)
        listed = tmp_path / "data" / "val.txt"
        assert len(listed.read_text().splitlines()) == 1
        assert (tmp_path / "data" / "panoptic.txt").read_text() == "mine"
        listed.write_text("000001.jpg\n000002.jpg\n")
        with pytest.raises(ConversionError, match=r"val\.txt: would be replaced, and was not written by"):
            to_panoptic(*arguments, classes=classes, split=0.6)
        assert listed.read_text() == "000001.jpg\n000002.jpg\n"

    def test_a_name_with_a_line_break(self, converted, tmp_path, monkeypatch):
        photos, masks = tmp_path / "photos", tmp_path / "masks"
        for source, suffix in ((photos, ".jpg"), (masks, ".png")):
            source.mkdir()
            for number, name in enumerate(("a\nb", "c"), start=1):
                shutil.copy(converted / source.name / f"00000{number}{suffix}", source / f"{name}{suffix}")
        for _ in range(2):
            to_panoptic(masks, tmp_path / "data", photos, classes=converted / "data" / "val.json", split=0.5)
        contents = [(tmp_path / "data" / f"{name}.txt").read_bytes() for name in ("train", "val")]
        assert sorted(contents) == sorted([f"{photos}/a\nb.jpg\0".encode(), f"{photos}/c.jpg\n".encode()])


class TestNothingPredicted:
    @pytest.mark.parametrize("options", [[], ["--no-overlay"]])
    def test_no_folder_is_left(self, tmp_path, capsys, options):
        (tmp_path / "damaged.jpg").write_bytes(b"no image")
        output = tmp_path / "new" / "out"
        assert main(["predict", str(tmp_path / "damaged.jpg"), *FAST, *options, "--output", str(output)]) == 1
        assert not (tmp_path / "new").exists()

    def test_an_interrupt_before_the_first_result(self, converted, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("spatialflow.cli.prediction_run.PredictionRun.predict_images", stop)
        assert main(["predict", str(converted / "photos"), *FAST, "--output", str(tmp_path / "out")]) == 130
        assert not (tmp_path / "out").exists()

    def test_folders_of_others_stay(self, tmp_path):
        (tmp_path / "damaged.jpg").write_bytes(b"no image")
        (tmp_path / "out" / "overlays").mkdir(parents=True)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        assert main(["predict", str(tmp_path / "damaged.jpg"), *FAST, "--output", str(tmp_path / "out")]) == 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["notes.txt", "overlays"]


def test_numbers_of_one(converted, tmp_path, capsys):
    photograph = str(converted / "photos" / "000001.jpg")
    for _ in range(2):
        assert main(["predict", photograph, *FAST, "--output", str(tmp_path / "out")]) == 0
    assert "1 of 1 image done: " in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("1 image scored\n")
