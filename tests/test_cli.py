# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, and one clear sentence for everything that can be wrong with its input."""

import argparse
import ast
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import spatialflow
from spatialflow import cli, images
from spatialflow.cli import main
from spatialflow.console import list_images
from spatialflow.engine import predict
from spatialflow.engine.pipeline import Pipeline
from spatialflow.panoptic import read_id_map, read_panoptic_json, writer
from spatialflow.prediction_folder import HELD, PredictionFolder

FAST = ["--config", "tiny", "--size", "64", "96", "--set", "stuff_area_threshold=20"]


def picture(height: int, width: int, channels: int = 3, dtype=np.uint8) -> np.ndarray:
    coarse = np.random.default_rng(height * width).integers(0, 256, (9, 11, channels), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return smooth.astype(dtype) * (257 if dtype == np.uint16 else 1)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Readable pictures of every kind, by name."""
    folder = tmp_path_factory.mktemp("photographs")
    pictures = {
        "plain.jpg": picture(60, 80),
        "grey.png": picture(50, 70, 1),
        "transparent.png": picture(50, 70, 4),
        "deep.png": picture(50, 70, 3, np.uint16),
        "dot.png": picture(1, 1),
        "line.png": picture(1, 5000),
    }
    for name, pixels in pictures.items():
        assert cv2.imwrite(str(folder / name), pixels)
    return folder


def sentences(capsys) -> list[str]:
    """Complaints on standard error, one line each; the progress bar is off where there is no terminal."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert all(line.startswith("spatialflow: ") for line in lines), lines
    return [line.removeprefix("spatialflow: ") for line in lines]


def assert_complete(output, names):
    """Exactly the files of `names` are there, and JSON, maps and pictures agree."""
    content = read_panoptic_json(output / "panoptic.json", with_categories=True)
    stems = sorted(name.split(".")[0] for name in names)
    assert sorted(path.stem for path in (output / "panoptic").iterdir()) == stems
    assert sorted(path.stem for path in (output / "overlays").iterdir()) == stems
    assert sorted(image["file_name"] for image in content["images"]) == sorted(names)
    for image, annotation in zip(content["images"], content["annotations"]):
        ids = read_id_map(output / "panoptic" / annotation["file_name"])
        assert ids.shape == (image["height"], image["width"])
        assert {segment["id"] for segment in annotation["segments_info"]} == set(np.unique(ids)) - {0}
        stem = annotation["file_name"].split(".")[0]
        assert cv2.imread(str(output / "overlays" / f"{stem}.jpg")).shape[:2] == ids.shape


class TestPredict:
    def test_every_kind_of_image(self, photographs, weights, tmp_path, capsys):
        assert main(["predict", str(photographs), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]) == 0
        assert_complete(tmp_path, [path.name for path in photographs.iterdir()])
        printed = capsys.readouterr()
        assert "6 of 6 images done" in printed.out and "network" in printed.out and printed.err == ""

    def test_same_map_as_the_python_api(self, photographs, weights, tmp_path):
        path = photographs / "plain.jpg"
        assert main(["predict", str(path), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]) == 0
        model = spatialflow.load_checkpoint(spatialflow.build_model("tiny"), weights).eval()
        predictor = spatialflow.Predictor(model, test_short_edges=[64], test_long_edge=96, stuff_area_threshold=20)
        assert np.array_equal(read_id_map(tmp_path / "panoptic" / "plain.png"), predictor(path).id_map)

    def test_low_precision(self, photographs, weights, tmp_path):
        arguments = [str(photographs / "plain.jpg"), "--checkpoint", str(weights), "--output", str(tmp_path)]
        assert main(["predict", *arguments, "--dtype", "bfloat16", *FAST]) == 0
        assert_complete(tmp_path, ["plain.jpg"])

    def test_bad_files_are_named_and_skipped(self, photographs, weights, tmp_path, capsys):
        bad = tmp_path / "bad"
        bad.mkdir()
        whole = (photographs / "plain.jpg").read_bytes()
        (bad / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (bad / "text.jpg").write_text("not a picture")
        (bad / "empty.png").touch()
        given = [bad / "missing.jpg", photographs / "plain.jpg", bad, photographs / "dot.png"]
        output = tmp_path / "out"
        code = main(["predict", *map(str, given), "--checkpoint", str(weights), "--output", str(output), *FAST])
        assert code == 1
        said = sentences(capsys)
        for name, reason in {
            "missing.jpg": "No such file",
            "cut.jpg": "truncated",
            "text.jpg": "not an image",
            "empty.png": "empty",
        }.items():
            assert len([line for line in said if f"/{name}: " in line and reason in line]) == 1, (name, said)
        assert len(said) == 4
        assert_complete(output, ["plain.jpg", "dot.png"])

    def test_defects_are_sentences(self, photographs, weights, tmp_path, capsys):
        (tmp_path / "a.jpg").write_bytes((photographs / "plain.jpg").read_bytes()[:-2])
        command = ["predict", str(tmp_path / "a.jpg"), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
        assert main(command) == 0
        assert sentences(capsys) == [f"{tmp_path}/a.jpg: has no end marker; all its pixels are there"]

    def test_interrupted(self, photographs, weights, tmp_path, monkeypatch):
        """What is done when Ctrl-C comes is complete, JSON included."""
        read = images.read_image

        def interrupted(path):
            if path.name == "grey.png":
                raise KeyboardInterrupt
            return read(path)

        monkeypatch.setattr(predict, "read_image", interrupted)
        arguments = [str(photographs), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
        assert main(["predict", *arguments]) == 130
        assert_complete(tmp_path, ["deep.png", "dot.png"])

    def test_errors_are_in_the_order_of_the_images(self, photographs, weights, tmp_path, monkeypatch, capsys):
        """Whether reading or writing fails, and although reading is ahead of writing."""
        names = [f"{number}.jpg" for number in range(8)]
        for number, name in enumerate(names):
            (tmp_path / name).write_bytes(b"no image" if number in (1, 4) else (photographs / "plain.jpg").read_bytes())
        write = writer.write_id_map

        def full(path, ids):
            time.sleep(0.05)
            if path.stem in ("2", "5"):
                raise OSError(28, "No space left on device")
            write(path, ids)

        monkeypatch.setattr(writer, "write_id_map", full)
        command = ["predict", *(str(tmp_path / name) for name in names), "--checkpoint", str(weights), *FAST]
        assert main([*command, "--output", str(tmp_path / "out")]) == 1
        said = [": ".join(sentence.split("/")[-1].split(": ")[:2]) for sentence in sentences(capsys)]
        damaged = "is not an image of a known format, or is damaged"
        refused = "cannot be written"
        assert said == [f"1.jpg: {damaged}", f"2.png: {refused}", f"4.jpg: {damaged}", f"5.png: {refused}"]
        assert_complete(tmp_path / "out", ["0.jpg", "3.jpg", "6.jpg", "7.jpg"])
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("map_ahead")]

    def test_slow_writing_holds_few_results(self, photographs, weights, tmp_path, monkeypatch):
        for number in range(20):
            (tmp_path / f"{number}.jpg").write_bytes((photographs / "plain.jpg").read_bytes())
        write, predicted, most = writer.write_id_map, [], []
        run = Pipeline.__call__

        def slow(path, ids):
            deadline = time.monotonic() + 30
            while len(most) < 10 and len(predicted) - len(most) < HELD and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)  # for more of them
            most.append(len(predicted) - len(most))
            write(path, ids)

        monkeypatch.setattr(writer, "write_id_map", slow)
        monkeypatch.setattr(Pipeline, "__call__", lambda *args: (predicted.append(0), run(*args))[1])
        command = ["predict", str(tmp_path), "--checkpoint", str(weights), "--output", str(tmp_path / "out"), *FAST]
        assert main(command) == 0
        assert len(most) == 20 and max(most) == HELD

    @pytest.mark.parametrize("place", ["network", "writing"])
    def test_an_error_that_ends_the_run(self, photographs, weights, tmp_path, monkeypatch, place):
        """It reaches the caller from any thread, and the images before it are complete."""
        target, name = {"network": (Pipeline, "__call__"), "writing": (PredictionFolder, "_add")}[place]
        plain, left = getattr(target, name), [3]

        def failing(*args):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("a mistake in the program")
            return plain(*args)

        monkeypatch.setattr(target, name, failing)
        command = ["predict", str(photographs), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
        with pytest.raises(RuntimeError, match="a mistake in the program") as caught:
            main(command)
        assert "in failing" in "".join(traceback.format_exception(caught.value))
        assert_complete(tmp_path, ["deep.png", "dot.png", "grey.png"])

    def test_the_end_waits_for_the_image_that_is_being_written(self, photographs, weights, tmp_path, monkeypatch):
        """Although a second interrupt may have ended the wait for the thread."""
        images, _ = list_images([photographs / "dot.png"])
        folder = PredictionFolder(tmp_path, images, [], {}, overlays=False, detections=False, resume=False)
        write, begun = writer.write_id_map, threading.Event()

        def slow(path, ids):
            begun.set()
            time.sleep(0.2)
            write(path, ids)

        monkeypatch.setattr(writer, "write_id_map", slow)
        result = argparse.Namespace(id_map=np.zeros((1, 1), np.int32), segments=[])
        with folder:
            thread = threading.Thread(target=folder.add, args=(images[0], result, None))
            thread.start()
            assert begun.wait(30)
        assert [image["file_name"] for image in read_panoptic_json(tmp_path / "panoptic.json")["images"]] == ["dot.png"]
        thread.join()

    def test_ids_that_coincide(self, photographs, weights, tmp_path):
        """Two numbers that are one become the texts that they are."""
        for name in ("7.jpg", "007.jpg", "8.jpg"):
            (tmp_path / name).write_bytes((photographs / "plain.jpg").read_bytes())
        output = tmp_path / "out"
        assert main(["predict", str(tmp_path), "--checkpoint", str(weights), "--output", str(output), *FAST]) == 0
        assert_complete(output, ["007.jpg", "7.jpg", "8.jpg"])
        images = read_panoptic_json(output / "panoptic.json")["images"]
        assert [(image["file_name"], image["id"]) for image in images] == [
            ("007.jpg", "007"), ("7.jpg", "7"), ("8.jpg", 8)
        ]  # fmt: skip

    @pytest.mark.parametrize("names", [("a/x.jpg", "b/x.jpg"), ("a/x.jpg", "a/x.png")])
    def test_names_that_coincide(self, photographs, tmp_path, capsys, names):
        """Refused before any work: one would overwrite the other's results."""
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((photographs / "plain.jpg").read_bytes())
        assert main(["predict", *map(str, paths), "--output", str(tmp_path / "out"), *FAST]) == 2
        (said,) = sentences(capsys)
        assert said.startswith(f"{paths[1]}: has the same name as {paths[0]}, and output files are named by it")
        assert not (tmp_path / "out").exists()

    def test_one_file_given_twice(self, photographs, weights, tmp_path):
        given = [str(photographs / "dot.png"), str(photographs), os.path.relpath(photographs / "dot.png")]
        assert main(["predict", *given, "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]) == 0
        assert_complete(tmp_path, [path.name for path in photographs.iterdir()])

    @pytest.mark.parametrize("output", ["out", "."])
    def test_images_in_sub_folders(self, photographs, weights, tmp_path, capsys, output):
        """Left out with a sentence that counts them; earlier results in the same folder are no images."""
        for name in ("plain.jpg", "one/plain.jpg", "one/two/dot.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((photographs / name.split("/")[-1]).read_bytes())
        output = tmp_path / output
        command = ["predict", str(tmp_path), "--checkpoint", str(weights), "--output", str(output), *FAST]
        replaces = f"{output}: holds the results of an earlier run, which this one replaces"
        for said in ([], [replaces]):
            assert main([*command, "--recursive"]) == 0 and sentences(capsys) == said
        content = read_panoptic_json(output / "panoptic.json")
        names = ["one/plain.jpg", "one/two/dot.png", "plain.jpg"]
        assert [image["file_name"] for image in content["images"]] == names
        assert [image["id"] for image in content["images"]] == ["one/plain", "dot", "plain"]
        for annotation, name in zip(content["annotations"], names):
            assert annotation["file_name"] == name.split(".")[0] + ".png"
            assert read_id_map(output / "panoptic" / annotation["file_name"]).shape
            assert (output / "overlays" / name).with_suffix(".jpg").is_file()
        assert main(command) == 0
        left_out = "2 images in its sub-folders are left out; --recursive takes them too"
        assert sentences(capsys) == [f"{tmp_path}: {left_out}", replaces]
        assert [image["id"] for image in read_panoptic_json(output / "panoptic.json")["images"]] == ["plain"]

    def test_a_folder_of_folders_alone(self, photographs, weights, tmp_path, capsys):
        """As Cityscapes' cities: read without being asked, the id without the folder."""
        path = tmp_path / "val" / "ulm" / "ulm_1_leftImg8bit.png"
        path.parent.mkdir(parents=True)
        path.write_bytes((photographs / "dot.png").read_bytes())
        output = tmp_path / "out"
        command = ["predict", str(tmp_path / "val"), "--checkpoint", str(weights), "--output", str(output), *FAST]
        assert main(command) == 0
        assert sentences(capsys) == [f"{tmp_path / 'val'}: holds no image itself; its sub-folders hold 1 (ulm: 1)"]
        (image,) = read_panoptic_json(output / "panoptic.json")["images"]
        assert (image["file_name"], image["id"]) == ("ulm/ulm_1_leftImg8bit.png", "ulm_1")

    def test_linked_folders(self, photographs, tmp_path, capsys):
        """Links are followed, but for one that leads back; a folder with the name of an image is a folder."""
        for name in ("a.jpg", "other/b.png", "folder.jpg/c.png"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(b"")
        (tmp_path / "in" / "linked").symlink_to(tmp_path / "in" / "other")
        (tmp_path / "in" / "other" / "back").symlink_to(tmp_path / "in")
        (tmp_path / "in" / "gone.jpg").symlink_to(tmp_path / "absent.jpg")
        (tmp_path / "in" / "loop.jpg").symlink_to(tmp_path / "in" / "loop.jpg")
        images, failed = list_images([tmp_path / "in"], recursive=True)
        names = ["a.jpg", "folder.jpg/c.png", "gone.jpg", "linked/b.png", "loop.jpg", "other/b.png"]
        assert [image.name for image in images] == names and not failed
        list_images([tmp_path / "in"])
        left_out = "2 images in its sub-folders are left out; --recursive takes them too"  # links are not followed
        assert sentences(capsys) == [f"{tmp_path / 'in'}: {left_out}"]

    def test_a_folder_that_cannot_be_read(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "a.jpg").touch()
        (tmp_path / "closed").mkdir()
        iterdir = Path.iterdir

        def refusing(path):
            if path.name == "closed":
                raise PermissionError(13, "Permission denied", str(path))
            return iterdir(path)

        monkeypatch.setattr(Path, "iterdir", refusing)
        images, failed = list_images([tmp_path])
        assert [image.name for image in images] == ["a.jpg"]
        assert failed == sentences(capsys) == []  # it would be passed over anyway
        images, failed = list_images([tmp_path], recursive=True)
        assert [image.name for image in images] == ["a.jpg"]
        assert failed == sentences(capsys) == [f"{tmp_path / 'closed'}: cannot be read: Permission denied"]

    @pytest.mark.parametrize("name", ["panoptic.json", "panoptic/plain.png", "overlays/plain.jpg", "detections.json"])
    def test_files_of_others_are_not_replaced(self, photographs, weights, tmp_path, capsys, name):
        """As the ground truth in the folder above the photographs."""
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
        command = ["predict", str(photographs / "plain.jpg"), "--checkpoint", str(weights), *FAST, "--detections"]
        assert main([*command, "--output", str(tmp_path)]) == 2
        said = f"{tmp_path / name}: would be replaced, and is no result of `predict`; use another --output"
        assert sentences(capsys) == [said]
        assert (tmp_path / name).read_bytes() == b"mine"

    def test_a_folder_with_a_journal_of_others(self, photographs, weights, tmp_path, capsys):
        """An empty one too: a ground truth beside it is none of `predict`."""
        command = ["predict", str(photographs / "plain.jpg"), "--checkpoint", str(weights), *FAST]
        assert main(["synthesize", str(tmp_path), "--count", "1", "--size", "48", "64"]) == 0
        truth = (tmp_path / "panoptic.json").read_bytes()
        for content in (b"", b"my notes\n", b'{"info": {"description": "written by spatialflow synthesize"}, '):
            (tmp_path / "panoptic.journal.jsonl").write_bytes(content)
            assert main([*command, "--output", str(tmp_path)]) == 2
            assert "panoptic.json: would be replaced" in sentences(capsys)[-1]
            assert (tmp_path / "panoptic.json").read_bytes() == truth
        (tmp_path / "panoptic.json").unlink()
        assert main([*command, "--output", str(tmp_path)]) == 2
        assert "panoptic.journal.jsonl: would be replaced" in sentences(capsys)[-1]
        assert (tmp_path / "panoptic.journal.jsonl").read_bytes() == content

    def test_a_result_that_cannot_be_read(self, photographs, weights, tmp_path, monkeypatch, capsys):
        def refusing(path, info):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(writer, "earlier_files", refusing)
        command = ["predict", str(photographs / "plain.jpg"), "--checkpoint", str(weights), *FAST]
        assert main([*command, "--output", str(tmp_path)]) == 2
        assert sentences(capsys) == [f"{tmp_path / 'panoptic.json'}: cannot be read: Permission denied"]

    def test_empty_paths(self, capsys):
        for arguments in (["", "--output", "out"], ["a.jpg", "--output", ""], ["a.jpg", "--checkpoint", ""]):
            with pytest.raises(SystemExit):
                main(["predict", *arguments])
            assert "must not be empty" in capsys.readouterr().err

    def test_random_weights_are_said_plainly(self, photographs, tmp_path, capsys):
        assert main(["predict", str(photographs / "dot.png"), "--output", str(tmp_path), *FAST, "--no-overlay"]) == 0
        assert sentences(capsys) == ["no --checkpoint: the weights are random, so the maps mean nothing"]
        assert not (tmp_path / "overlays").exists()

    @pytest.mark.parametrize(
        "change, reason",
        [
            (
                ["--config", "no_such_config"],
                "config: must be a path ending in .yaml or one of .*tiny.*'no_such_config'",
            ),
            (["--config", "no_such_file.yaml"], "no such file: no_such_file.yaml"),
            (["--checkpoint", "no_such.pth"], "no_such.pth: cannot be read: No such file"),
            (["--checkpoint", __file__], "neither a safetensors nor a torch file"),
            (["--set", "num_things=7"], "does not fit the model: .* of the wrong shape"),
            (["--set", "nonsense=1"], "nonsense"),
            (["--set", "score_threshold"], "settings have the form FIELD=VALUE, got 'score_threshold'"),
            (["--score", "nan"], "instance_score_threshold"),
            (["--size", "0"], "--size must be positive, got 0"),
            (["--device", "cuda:99"], "--device cuda:99: torch .* sees . CUDA devices"),
            (["--device", "toaster"], "--device must be cpu, cuda or cuda:<number>, got 'toaster'"),
            (["--cuda-graph"], "--cuda-graph needs a CUDA device, got --device cpu"),
            (["--threads", "0"], "--threads must be from 1 to 1024, got 0"),
            (["--threads", "99999"], "--threads must be from 1 to 1024, got 99999"),
        ],
    )
    def test_wrong_options(self, photographs, weights, tmp_path, capsys, change, reason):
        arguments = [str(photographs / "dot.png"), "--output", str(tmp_path / "out"), "--checkpoint", str(weights)]
        usual = FAST[2:] if "--config" in change else FAST
        assert main(["predict", *arguments, *usual, *change]) == 2
        (said,) = sentences(capsys)
        assert re.search(reason, said), said
        assert not (tmp_path / "out").exists()

    def test_full_disk(self, photographs, weights, tmp_path):
        """Files may not grow beyond 8 KiB: the large picture is named, nothing of it stays, the small one is done."""
        large = tmp_path / "large.jpg"
        assert cv2.imwrite(str(large), np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
        images = [str(large), str(photographs / "dot.png")]
        output = tmp_path / "out"
        result = subprocess.run(
            [sys.executable, "-m", "spatialflow.cli", "predict", *images, "--output", str(output),
             "--checkpoint", str(weights), *FAST],
            capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        )  # fmt: skip
        assert result.returncode == 1, result.stderr
        (said,) = result.stderr.splitlines()
        assert said.endswith("overlays/large.jpg: cannot be written: File too large"), said
        assert_complete(output, ["dot.png"])

    def test_output_that_is_a_file(self, photographs, weights, tmp_path, capsys):
        """Known before the first image, and said once."""
        output = tmp_path / "out"
        output.write_text("in the way")
        assert main(["predict", str(photographs), "--checkpoint", str(weights), "--output", str(output), *FAST]) == 2
        (said,) = sentences(capsys)
        assert said == f"{output}/panoptic: cannot be written: Not a directory"
        assert output.read_text() == "in the way"

    def test_no_image(self, tmp_path, capsys):
        assert main(["predict", str(tmp_path), "--output", str(tmp_path / "out"), *FAST]) == 1
        assert sentences(capsys) == [f"{tmp_path}: holds no image file", "no image to predict"]
        assert not (tmp_path / "out").exists()


class TestEvaluate:
    @pytest.fixture
    def prediction(self, photographs, weights, tmp_path):
        output = tmp_path / "prediction"
        images = [str(photographs / name) for name in ("plain.jpg", "grey.png")]
        assert main(["predict", *images, "--checkpoint", str(weights), "--output", str(output), *FAST]) == 0
        return output

    def test_a_prediction_against_itself(self, prediction, tmp_path, capsys):
        numbers = tmp_path / "numbers.json"
        capsys.readouterr()
        arguments = [str(prediction), str(prediction / "panoptic"), "--output", str(numbers), "--per-class"]
        assert main(["evaluate", *arguments]) == 0
        result = json.loads(numbers.read_text())
        assert result["All"]["n"] > 0 and result["All"]["pq"] == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["PQ", "SQ", "RQ", "N"]
        assert lines[1].split() == ["All", "100.0", "100.0", "100.0", str(result["All"]["n"])]
        assert len([line for line in lines[5:] if line.split()[1:]]) == 1 + result["All"]["n"]

    def test_errors(self, prediction, tmp_path, capsys):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "none.json"), str(prediction)]) == 2
        assert main(["evaluate", str(prediction), str(prediction), "--workers", "0"]) == 2
        (prediction / "panoptic" / "grey.png").write_bytes(b"")
        assert main(["evaluate", str(prediction), str(prediction), "--output", str(tmp_path / "numbers.json")]) == 2
        said = sentences(capsys)
        assert len(said) == 3
        assert "none.json: no such file" in said[0] and "--workers must be" in said[1] and "grey.png" in said[2]
        assert not (tmp_path / "numbers.json").exists()

    def test_torch_is_not_imported(self, prediction):
        code = (
            "import sys; from spatialflow.cli import main; code = main(sys.argv[1:]); "
            "sys.exit(code or ('torch' in sys.modules and 3))"
        )
        command = [sys.executable, "-c", code, "evaluate", str(prediction), str(prediction)]
        assert subprocess.run(command, capture_output=True).returncode == 0

    def test_inputs_are_not_replaced(self, prediction, weights, capsys):
        """Also not where another path leads to the file."""
        link = prediction / "link.json"
        link.symlink_to(prediction / "panoptic.json")
        paths = list(map(str, (prediction, prediction, prediction)))
        before = (prediction / "panoptic.json").read_bytes(), weights.read_bytes()
        capsys.readouterr()
        for output in (prediction / "panoptic.json", link):
            assert main(["evaluate", *paths[:2], "--output", str(output)]) == 2
            assert main(["validate", paths[0], "--output", str(output)]) == 2
        assert main(["convert", str(weights), str(weights), "--half"]) == 2
        for picture in (prediction / "panoptic").iterdir():
            assert main(["validate", paths[0], "--output", str(picture)]) == 2
        said = sentences(capsys)
        assert len(said) == 7 and all("is an input of this command, which does not replace it" in line for line in said)
        assert before == ((prediction / "panoptic.json").read_bytes(), weights.read_bytes())
        report = prediction / "report.json"
        report.touch()
        assert main(["validate", paths[0], "--images", str(prediction / "absent"), "--output", str(report)]) == 2
        assert main(["convert", str(prediction / "absent.pth"), str(weights)]) == 2
        assert [line.split(": ")[0] for line in sentences(capsys)] == [
            str(prediction / "absent"),
            str(prediction / "absent.pth"),
        ]


class TestConvert:
    def test_converted_weights_load(self, weights, tmp_path, capsys):
        target = tmp_path / "copy.safetensors"
        assert main(["convert", str(weights), str(target)]) == 0
        assert "tensors" in capsys.readouterr().out
        spatialflow.load_checkpoint(spatialflow.build_model("tiny"), target)

    @pytest.mark.parametrize(
        "source, target, reason",
        [
            ("none.pth", "copy.safetensors", "none.pth: cannot be read"),
            (None, "copy.txt", "must end in .safetensors"),
            (None, "folder/is/a/file.safetensors", "cannot be written"),
        ],
    )
    def test_errors(self, weights, tmp_path, capsys, source, target, reason):
        (tmp_path / "folder").write_text("")
        assert main(["convert", str(source or weights), str(tmp_path / target)]) == 2
        (said,) = sentences(capsys)
        assert reason in said
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class TestSynthesize:
    def test_scenes_are_a_data_set(self, tmp_path, capsys):
        assert main(["synthesize", str(tmp_path / "a"), "--count", "2", "--size", "48", "64"]) == 0
        assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
        assert "100.0" in capsys.readouterr().out
        assert cv2.imread(str(next((tmp_path / "a" / "images").iterdir()))).shape == (48, 64, 3)

    @pytest.mark.parametrize("change", [["--count", "0"], ["--size", "4", "4"], ["--seed", "-1"]])
    def test_errors(self, tmp_path, capsys, change):
        assert main(["synthesize", str(tmp_path / "a"), *change]) == 2
        assert len(sentences(capsys)) == 1 and not (tmp_path / "a" / "panoptic.json").exists()


class TestOutput:
    @pytest.mark.parametrize("command", ["info", "evaluate", "benchmark"])
    def test_reader_that_has_left(self, command, tmp_path):
        """As in `spatialflow info | head -1`: no traceback, no complaint."""
        scenes = tmp_path / "scenes"
        assert main(["synthesize", str(scenes), "--count", "1", "--size", "64", "96"]) == 0
        arguments = {"evaluate": [scenes, scenes], "benchmark": ["--list"]}.get(command, [])
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run(
            [sys.executable, "-m", "spatialflow.cli", command, *map(str, arguments)],
            stdout=writing,
            stderr=subprocess.PIPE,
        )
        os.close(writing)
        assert (result.returncode, result.stderr) == (141, b"")

    def test_a_name_that_is_no_utf8(self, tmp_path):
        """The work is done; the sentence about it must not fail."""
        result = subprocess.run(
            [sys.executable, "-m", "spatialflow.cli", "synthesize", tmp_path / "caf\udce9", "--count", "1", "--size",
             "64", "64"],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
        )  # fmt: skip
        assert result.returncode == 0 and b"caf\\udce9/panoptic.json" in result.stdout, result.stderr

    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second one is that of the C locale
    def test_a_category_that_no_terminal_can_print(self, tmp_path, errors):
        assert main(["synthesize", str(tmp_path), "--count", "1", "--size", "64", "96"]) == 0
        path = tmp_path / "panoptic.json"
        content = json.loads(path.read_text())
        for row in content["categories"]:
            row["name"] = "\ud800"
        path.write_text(json.dumps(content))
        result = subprocess.run(
            [sys.executable, "-m", "spatialflow.cli", "evaluate", tmp_path, tmp_path, "--per-class"],
            env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
            capture_output=True,
        )
        assert result.returncode == 0 and b"\\ud800" in result.stdout, result.stderr

    def test_a_ground_truth_of_others_is_not_replaced(self, tmp_path, capsys):
        (tmp_path / "panoptic.json").write_text('{"images": []}')
        assert main(["synthesize", str(tmp_path), "--count", "1", "--size", "48", "64"]) == 2
        said = f"{tmp_path / 'panoptic.json'}: would be replaced, and is not of synthetic scenes"
        assert sentences(capsys) == [said] and [path.name for path in tmp_path.iterdir()] == ["panoptic.json"]


class TestInfoAndBenchmark:
    def test_info(self, capsys):
        assert main(["info"]) == 0
        printed = capsys.readouterr().out
        assert spatialflow.__version__ in printed and torch.__version__ in printed and "in use" in printed

    def test_benchmark_names(self, capsys):
        assert main(["benchmark", "--list"]) == 0
        assert "roi_align" in capsys.readouterr().out.split()
        assert main(["benchmark", "no_such_op"]) == 2
        assert "no benchmark named no_such_op" in sentences(capsys)[0]

    def test_help_lists_the_commands(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert all(command in printed for command in ("predict", "evaluate", "convert", "benchmark", "info"))


def test_detections_without_pycocotools(photographs, weights, tmp_path, capsys, monkeypatch):
    """Said before the work: predict writes boxes alone, evaluate has nothing to score with."""
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    arguments = ["predict", str(photographs / "plain.jpg"), *FAST, "--checkpoint", str(weights), "--detections"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert sentences(capsys) == [
        "--detections: the package pycocotools is missing, so detections.json has boxes without masks"
    ]
    assert not any("segmentation" in row for row in json.loads((tmp_path / "detections.json").read_text()))
    assert main(["evaluate", str(tmp_path), str(tmp_path), "--detections", str(tmp_path / "detections.json")]) == 2
    captured = capsys.readouterr()
    assert "needs the package pycocotools" in captured.err and captured.out == ""


def _options() -> list[tuple[str, str]]:
    """Every command with the destination of each of its options."""
    (commands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [
        (name, action.dest)
        for name, command in commands.choices.items()
        for action in command._actions
        if action.dest != "help"
    ]


def test_every_option_is_read():
    """`options.<name>`, or the name as a text for getattr, in the sources of the commands."""
    root = Path(cli.__file__).parent
    trees = [ast.parse((root / name).read_text()) for name in ("cli.py", *(p.name for p in root.glob("*_command.py")))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "options"}
    defining = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    own = {id(part) for call in defining for part in ast.walk(call)}
    read |= {n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in own}
    options = _options()
    assert len(options) > 50
    assert [(command, name) for command, name in options if name not in read] == []


@pytest.mark.parametrize(
    "setting", ["fpn_channels=1000000000", "num_things=100000000000", "size_divisor=16000000"]
)
def test_settings_that_ask_for_more_memory_than_there_is(photographs, tmp_path, capsys, setting):
    arguments = ["predict", str(photographs / "plain.jpg"), "--config", "tiny", "--set", setting, "--no-overlay"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "out of memory: " in sentences(capsys)[-1]


def test_other_runtime_errors_are_not_hidden(monkeypatch):
    def fails(_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(cli, "_info", fails)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["info"])


LONG = "a" * 300  # longer than a file name may be, which pathlib's is_file() raises for


@pytest.mark.parametrize(
    "command",
    [
        f"predict {LONG} --config tiny --output OUT",
        f"predict PHOTOGRAPHS --config {LONG} --output OUT",
        f"predict PHOTOGRAPHS --config tiny --checkpoint {LONG} --output OUT",
        f"predict PHOTOGRAPHS --config tiny --set categories={LONG} --output OUT",
        f"validate {LONG}",
        f"evaluate {LONG} {LONG}",
        f"visualize {LONG} --config tiny --output OUT",
        f"train tiny --cityscapes {LONG} --output OUT",
        f"train tiny --images PHOTOGRAPHS --annotations {LONG} --output OUT",
    ],
)
def test_names_that_are_too_long(photographs, tmp_path, capsys, command):
    words = command.replace("PHOTOGRAPHS", str(photographs)).replace("OUT", str(tmp_path / "out")).split()
    assert main(words) in (1, 2)
    assert LONG[:30] in "".join(sentences(capsys))
