# SPDX-License-Identifier: Apache-2.0
"""A second run of `predict` into one folder: results are replaced as a whole, or kept with --skip-existing."""

import json
import os

import pytest
from helpers.command_line import FAST, error_messages
from helpers.scenes import contents

from spatialflow.cli.main import main
from spatialflow.engine.pipeline import Pipeline
from spatialflow.panoptic import read_panoptic_json

FEW = [*FAST, "score_threshold=0.001", "max_detections=5"]


@pytest.fixture
def photos(photographs, tmp_path):
    """Three photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes((photographs / "dot.png").read_bytes())
    return folder


@pytest.fixture
def predict(weights, tmp_path, monkeypatch):
    """A function that runs `predict` into one folder; it returns the exit code and the number of images predicted."""
    plain, calls = Pipeline.__call__, []
    monkeypatch.setattr(Pipeline, "__call__", lambda *args: (calls.append(0), plain(*args))[1])

    def run(*arguments, output="out"):
        calls.clear()
        command = ["predict", *map(str, arguments), "--checkpoint", str(weights), *FEW]
        return main([*command, "--output", str(tmp_path / output)]), len(calls)

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names_of(out):
    return [image["file_name"] for image in read_panoptic_json(out / "panoptic.json")["images"]]


def files_of(out):
    return sorted(contents(out))


class TestReplaced:
    def test_everything_of_the_earlier_run(self, photos, predict, out, capsys):
        """Maps, pictures and detections of the earlier run are removed, and nothing else."""
        assert predict(photos, "--detections") == (0, 3)
        (out / "panoptic" / "mine.png").write_bytes(b"mine")
        (out / "notes.txt").write_bytes(b"mine")
        capsys.readouterr()
        assert predict(photos / "b.png") == (0, 1)
        assert error_messages(capsys) == [
            f"{out}: holds the results of an earlier run, which this one replaces; the results of 2 images "
            "not among the inputs now are removed: a.png, c.png"
        ]
        assert files_of(out) == ["notes.txt", "overlays/b.jpg", "panoptic.json", "panoptic/b.png", "panoptic/mine.png"]
        assert names_of(out) == ["b.png"]

    def test_pictures(self, photos, predict, out):
        assert predict(photos) == (0, 3)
        assert predict(photos / "a.png", "--no-overlay") == (0, 1)
        assert files_of(out) == ["panoptic.json", "panoptic/a.png"] and not (out / "overlays").exists()

    def test_folders(self, photos, predict, out):
        (photos / "deep").mkdir()
        (photos / "c.png").rename(photos / "deep" / "c.png")
        assert predict(photos, "--recursive") == (0, 3)
        assert predict(photos / "a.png") == (0, 1)
        assert files_of(out) == ["overlays/a.jpg", "panoptic.json", "panoptic/a.png"]
        assert not (out / "panoptic" / "deep").exists()

    def test_detections_of_another_program(self, photos, predict, out, capsys):
        assert predict(photos / "a.png") == (0, 1)
        (out / "detections.json").write_text("[]")
        assert predict(photos / "a.png") == (0, 1)
        assert error_messages(capsys)[-1] == f"{out}/detections.json: is not a result of this run, and stays"

    def test_an_interrupted_run_with_restart(self, photos, predict, out, monkeypatch):
        from spatialflow.cli.prediction_folder import PredictionFolder

        add = PredictionFolder._add

        def stopping(folder, image, *rest):
            if image.name == "c.png":
                raise KeyboardInterrupt
            add(folder, image, *rest)

        monkeypatch.setattr(PredictionFolder, "_add", stopping)
        assert predict(photos)[0] == 130
        (out / "panoptic.json").unlink()  # as after SIGKILL
        monkeypatch.undo()
        assert predict(photos / "c.png", "--restart")[0] == 0
        assert files_of(out) == ["overlays/c.jpg", "panoptic.json", "panoptic/c.png"]

    def test_names_that_lead_out_of_the_folder(self, photos, predict, out, tmp_path):
        """A panoptic.json that was changed cannot delete files elsewhere."""
        assert predict(photos / "a.png") == (0, 1)
        (tmp_path / "mine.png").write_bytes(b"mine")
        content = json.loads((out / "panoptic.json").read_text())
        content["annotations"][0]["file_name"] = "../../mine.png"
        content["run"]["videos"] = ["../mine.png", str(tmp_path / "mine.png")]
        (out / "panoptic.json").write_text(json.dumps(content))
        assert predict(photos / "b.png") == (0, 1)
        assert (tmp_path / "mine.png").read_bytes() == b"mine"

    def test_a_damaged_list(self, photos, predict, out, capsys):
        assert predict(photos / "a.png") == (0, 1)
        path = out / "panoptic.json"
        path.write_bytes(path.read_bytes()[:-20])
        capsys.readouterr()
        assert predict(photos / "b.png") == (0, 1)
        assert f"{path}: not a JSON file" in (messages := error_messages(capsys))[0]
        assert messages[0].endswith("the files of the run that wrote it are not removed")
        assert names_of(out) == ["b.png"]


class TestKept:
    def test_same_files_as_one_run(self, photos, predict, out, tmp_path, capsys):
        assert predict(photos, "--detections", output="whole") == (0, 3)
        assert predict(photos / "b.png", "--detections") == (0, 1)
        time = (out / "panoptic" / "b.png").stat().st_mtime_ns
        capsys.readouterr()
        assert predict(photos, "--detections", "--skip-existing") == (0, 2)
        assert error_messages(capsys) == [f"{out}: keeps the results of 1 of 3 images"]
        assert contents(out) == contents(tmp_path / "whole")
        assert (out / "panoptic" / "b.png").stat().st_mtime_ns == time
        assert predict(photos, "--detections", "--skip-existing") == (0, 0)
        assert contents(out) == contents(tmp_path / "whole")

    def test_other_images_stay(self, photos, predict, out, capsys):
        assert predict(photos / "a.png") == (0, 1)
        capsys.readouterr()
        assert predict(photos / "c.png", "--skip-existing") == (0, 1)
        assert error_messages(capsys) == [f"{out}: keeps the results of 0 of 1 image, and of 1 other image"]
        assert names_of(out) == ["c.png", "a.png"]

    @pytest.mark.parametrize("change", ["photograph", "map", "picture"])
    def test_what_changed_is_predicted_again(self, photographs, photos, predict, out, capsys, change):
        assert predict(photos) == (0, 3)
        if change == "photograph":
            (photos / "b.png").write_bytes((photographs / "gray.png").read_bytes())
        else:
            (out / {"map": "panoptic/b.png", "picture": "overlays/b.jpg"}[change]).unlink()
        capsys.readouterr()
        assert predict(photos, "--skip-existing") == (0, 1)
        messages = error_messages(capsys)
        if change != "map":
            assert messages[1] == f"{out}: predicts 1 image again, as the photograph has changed or a file is missing"
        assert names_of(out) == ["a.png", "b.png", "c.png"] and len(files_of(out)) == 7

    @pytest.mark.parametrize(
        "change, difference",
        [
            (["--score", "0.9"], "instance_score_threshold 0.[0-9]+ -> 0.9"),
            (["--detections"], "detections False -> True"),
            (["--no-overlay"], "overlays True -> False"),
        ],
    )
    def test_other_settings_are_refused(self, photos, predict, out, capsys, change, difference):
        assert predict(photos) == (0, 3)
        before = contents(out)
        capsys.readouterr()
        assert predict(photos, "--skip-existing", *change) == (2, 0)
        (message,) = error_messages(capsys)
        assert message.startswith(f"{out}: holds results of other settings: {difference.split(' ')[0]}")
        assert message.endswith("so use another --output, or leave out --skip-existing, which replaces them")
        assert contents(out) == before

    def test_an_older_version(self, photos, predict, out, capsys):
        assert predict(photos) == (0, 3)
        content = json.loads((out / "panoptic.json").read_text())
        del content["run"]
        (out / "panoptic.json").write_text(json.dumps(content))
        assert predict(photos, "--skip-existing") == (2, 0)
        assert f"{out}: holds results of an older version of spatialflow; " in error_messages(capsys)[-1]

    def test_files_and_ids_that_coincide(self, photographs, photos, predict, out, tmp_path):
        """A new image takes neither the files nor the id of a result that is kept."""
        assert predict(photos / "a.png") == (0, 1)
        (photos / "a.bmp").write_bytes((photographs / "dot.png").read_bytes())
        assert predict(photos / "a.bmp", "--skip-existing") == (0, 1)
        images = read_panoptic_json(out / "panoptic.json")["images"]
        assert [(image["file_name"], image["id"]) for image in images] == [("a.bmp", "a.bmp"), ("a.png", "a")]
        assert sorted(os.listdir(out / "panoptic")) == ["a.bmp.png", "a.png"]
        assert predict(photos / "a.bmp", photos / "a.png", "--skip-existing") == (0, 0)
        assert sorted(os.listdir(out / "panoptic")) == ["a.bmp.png", "a.png"]

    def test_another_photograph_of_the_same_name(self, photographs, photos, predict, out, tmp_path):
        """It does not replace the result of the first one, in any number of runs."""
        other = tmp_path / "other" / "a.png"
        other.parent.mkdir()
        other.write_bytes((photographs / "dot.png").read_bytes())
        assert predict(photos / "a.png") == (0, 1)
        for count in (1, 0):
            assert predict(other, "--skip-existing") == (0, count)
            assert names_of(out) == ["other/a.png", "a.png"]
            assert (out / "panoptic" / "other" / "a.png").is_file() and (out / "panoptic" / "a.png").is_file()

    def test_a_photograph_by_another_path(self, photos, predict, out, tmp_path):
        """The name of its result stays, whatever argument leads to it."""
        assert predict(photos / "a.png") == (0, 1)
        assert predict(tmp_path, "--recursive", "--skip-existing") == (0, 2)
        assert names_of(out) == ["a.png", "photos/b.png", "photos/c.png"]

    def test_no_earlier_results(self, photos, predict, capsys):
        assert predict(photos, "--skip-existing") == (0, 3)
        assert error_messages(capsys) == []

    def test_a_video(self, predict, out, tmp_path, capsys):
        from test_predict_video import write_video

        clip = write_video(tmp_path / "clip.mp4", 4)
        assert predict(clip, "--frames", "2") == (0, 2)
        assert predict(clip, "--skip-existing") == (0, 2)
        assert error_messages(capsys) == [f"{out}: keeps the results of 2 frames"]
        assert names_of(out) == [f"clip/00000{number}.png" for number in range(4)]
        write_video(clip, 3, rate=5)
        assert predict(clip, "--skip-existing") == (0, 3)  # the video changed
        assert names_of(out) == [f"clip/00000{number}.png" for number in range(3)]
        assert sorted(os.listdir(out / "panoptic" / "clip")) == [f"00000{number}.png" for number in range(3)]
        assert predict(clip, "--skip-existing", "--every", "2") == (2, 0)
        capsys.readouterr()
        assert predict(clip) == (0, 3)
        assert error_messages(capsys) == [f"{out}: holds the results of an earlier run, which this one replaces"]
