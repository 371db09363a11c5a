# SPDX-License-Identifier: Apache-2.0
"""The command `predict`: its output, its input images, the files that it does not replace, and its exit codes."""

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
from helpers.command_line import FAST, error_messages

import spatialflow
from spatialflow import images
from spatialflow.cli import prediction_folder
from spatialflow.cli.input_images import resolve_images
from spatialflow.cli.main import main
from spatialflow.cli.prediction_folder import MAX_UNWRITTEN, PredictionFolder
from spatialflow.engine import predict
from spatialflow.engine.pipeline import Pipeline
from spatialflow.panoptic import color_ids, read_id_map, read_panoptic_json, writer
from spatialflow.panoptic.photographs import join_images


def resolved(*arguments, **options):
    with resolve_images(*arguments, **options) as inputs:
        return inputs


def assert_complete(output, names):
    """Check that exactly the files of `names` exist, and that JSON, maps and pictures agree."""
    content = read_panoptic_json(output / "panoptic.json", with_categories=True)
    stems = sorted(name.split(".")[0] for name in names)
    assert sorted(path.stem for path in (output / "panoptic").iterdir()) == stems
    assert sorted(path.stem for path in (output / "overlays").iterdir()) == stems
    assert sorted(image["file_name"] for image in content["images"]) == sorted(names)
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
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
        result = predictor(path)
        expected, segments = color_ids(result.id_map, result.segments, predictor.categories.as_coco())
        assert np.array_equal(read_id_map(tmp_path / "panoptic" / "plain.png"), expected)
        (annotation,) = read_panoptic_json(tmp_path / "panoptic.json")["annotations"]
        assert annotation["segments_info"] == segments

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
        inputs = [bad / "missing.jpg", photographs / "plain.jpg", bad, photographs / "dot.png"]
        output = tmp_path / "out"
        code = main(["predict", *map(str, inputs), "--checkpoint", str(weights), "--output", str(output), *FAST])
        assert code == 1
        messages = error_messages(capsys)
        for name, reason in {
            "missing.jpg": "No such file",
            "cut.jpg": "truncated",
            "text.jpg": "not an image",
            "empty.png": "empty",
        }.items():
            assert len([line for line in messages if f"/{name}: " in line and reason in line]) == 1, (name, messages)
        assert len(messages) == 4
        assert_complete(output, ["plain.jpg", "dot.png"])

    def test_defects_are_sentences(self, photographs, weights, tmp_path, capsys):
        (tmp_path / "a.jpg").write_bytes((photographs / "plain.jpg").read_bytes()[:-2])
        command = ["predict", str(tmp_path / "a.jpg"), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
        assert main(command) == 0
        assert error_messages(capsys) == [f"{tmp_path}/a.jpg: has no end marker, but all pixels"]

    def test_interrupted(self, photographs, weights, tmp_path, monkeypatch):
        """Images that are done at an interrupt (Ctrl-C) are complete, and the JSON lists them."""
        read = images.read_image

        def interrupted(path):
            if path.name == "gray.png":
                raise KeyboardInterrupt
            return read(path)

        monkeypatch.setattr(predict, "read_image", interrupted)
        arguments = [str(photographs), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
        assert main(["predict", *arguments]) == 130
        assert_complete(tmp_path, ["deep.png", "dot.png"])

    @pytest.mark.parametrize("threads", [1, 4])
    def test_errors_are_in_the_order_of_the_images(self, photographs, weights, tmp_path, monkeypatch, capsys, threads):
        """Errors of reading and writing are in the order of the images, although reading runs ahead."""
        monkeypatch.setattr(prediction_folder, "WRITERS", {"cpu": threads})
        monkeypatch.setattr(prediction_folder, "available_cores", lambda: 16)
        names = [f"{number}.jpg" for number in range(8)]
        for number, name in enumerate(names):
            (tmp_path / name).write_bytes(b"no image" if number in (1, 4) else (photographs / "plain.jpg").read_bytes())
        write, running, most = writer.write_id_map, [], []

        def full(path, ids):
            running.append(path)
            most.append(len(running))
            time.sleep(0.05)
            deadline = time.monotonic() + 30
            while threads > 1 and max(most) == 1 and time.monotonic() < deadline:  # until another write begins
                time.sleep(0.001)
            running.remove(path)
            if path.stem in ("2", "5"):
                raise OSError(28, "No space left on device")
            write(path, ids)

        monkeypatch.setattr(writer, "write_id_map", full)
        command = ["predict", *(str(tmp_path / name) for name in names), "--checkpoint", str(weights), *FAST]
        assert main([*command, "--output", str(tmp_path / "out")]) == 1
        messages = [": ".join(message.split("/")[-1].split(": ")[:2]) for message in error_messages(capsys)]
        damaged = "is not an image of a known format, or is damaged"
        refused = "cannot be written"
        assert messages == [f"1.jpg: {damaged}", f"2.png: {refused}", f"4.jpg: {damaged}", f"5.png: {refused}"]
        assert_complete(tmp_path / "out", ["0.jpg", "3.jpg", "6.jpg", "7.jpg"])
        assert max(most) == 1 if threads == 1 else max(most) > 1
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("map_ahead")]

    def test_slow_writing_holds_few_results(self, photographs, weights, tmp_path, monkeypatch):
        for number in range(20):
            (tmp_path / f"{number}.jpg").write_bytes((photographs / "plain.jpg").read_bytes())
        write, predicted, most = writer.write_id_map, [], []
        run = Pipeline.__call__

        def slow(path, ids):
            deadline = time.monotonic() + 30
            while len(most) < 10 and len(predicted) - len(most) < MAX_UNWRITTEN and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)  # time for further results
            most.append(len(predicted) - len(most))
            write(path, ids)

        monkeypatch.setattr(writer, "write_id_map", slow)
        monkeypatch.setattr(Pipeline, "__call__", lambda *args: (predicted.append(0), run(*args))[1])
        command = ["predict", str(tmp_path), "--checkpoint", str(weights), "--output", str(tmp_path / "out"), *FAST]
        assert main(command) == 0
        assert len(most) == 20 and max(most) == MAX_UNWRITTEN

    @pytest.mark.parametrize("place", ["network", "writing"])
    def test_an_error_that_ends_the_run(self, photographs, weights, tmp_path, monkeypatch, place):
        """An error in any thread reaches the caller, and the images before it are complete."""
        target, name = {"network": (Pipeline, "__call__"), "writing": (PredictionFolder, "_add")}[place]
        plain, remaining = getattr(target, name), [3]

        def failing(*args):
            remaining[0] -= 1
            if remaining[0] < 0:
                raise RuntimeError("a mistake in the program")
            return plain(*args)

        monkeypatch.setattr(target, name, failing)
        command = ["predict", str(photographs), "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
        with pytest.raises(RuntimeError, match="a mistake in the program") as caught:
            main(command)
        assert "in failing" in "".join(traceback.format_exception(caught.value))
        assert_complete(tmp_path, ["deep.png", "dot.png", "gray.png"])

    def test_ids_that_coincide(self, photographs, weights, tmp_path):
        """Names that are the same number, 7 and 007, become text ids."""
        for name in ("7.jpg", "007.jpg", "8.jpg"):
            (tmp_path / name).write_bytes((photographs / "plain.jpg").read_bytes())
        output = tmp_path / "out"
        assert main(["predict", str(tmp_path), "--checkpoint", str(weights), "--output", str(output), *FAST]) == 0
        assert_complete(output, ["007.jpg", "7.jpg", "8.jpg"])
        images = read_panoptic_json(output / "panoptic.json")["images"]
        assert [(image["file_name"], image["id"]) for image in images] == [
            ("007.jpg", "007"),
            ("7.jpg", "7"),
            ("8.jpg", 8),
        ]

    @pytest.mark.parametrize(
        "names, listed, stems",
        [
            (("a/x.jpg", "b/x.jpg"), ["a/x.jpg", "b/x.jpg"], ["a/x", "b/x"]),
            (("x.jpg", "x.png"), ["x.jpg", "x.png"], ["x.jpg", "x.png"]),
            (("a/x.jpg", "b/x.jpg", "b/x.bmp"), ["a/x.jpg", "b/x.jpg", "x.bmp"], ["a/x", "b/x", "x"]),
            (("x.jpg", "x.png", "x.jpg.bmp"), ["x.jpg", "x.png", "x.jpg.bmp"], ["x.jpg", "x.png", "x.jpg.bmp"]),
        ],
    )
    def test_names_that_coincide(self, photographs, weights, tmp_path, names, listed, stems):
        """Names that coincide get folders in front; names that differ in the suffix keep it in the output files."""
        paths, output = [tmp_path / name for name in names], tmp_path / "out"
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((photographs / "plain.jpg").read_bytes())
        command = ["predict", *map(str, paths), "--checkpoint", str(weights), "--output", str(output), *FAST]
        assert main(command) == 0
        content = read_panoptic_json(output / "panoptic.json")
        assert [image["file_name"] for image in content["images"]] == listed
        assert [row["file_name"] for row in content["annotations"]] == [f"{stem}.png" for stem in stems]
        assert len({image["id"] for image in content["images"]}) == len(names)
        for stem, image, path in zip(stems, content["images"], paths, strict=True):
            assert (output / "overlays" / f"{stem}.jpg").is_file() and (output / "panoptic" / f"{stem}.png").is_file()
            assert (output / image["path"]).samefile(path)
        truth = {"images": content["images"], "annotations": content["annotations"]}  # of the same names, other ids
        truth = json.loads(json.dumps(truth))
        for number, (image, row) in enumerate(zip(truth["images"], truth["annotations"], strict=True)):
            image["id"] = row["image_id"] = number
        joined = join_images(truth, content)
        assert [joined[number] for number in range(len(names))] == [image["id"] for image in content["images"]]

    def test_one_file_passed_twice(self, photographs, weights, tmp_path):
        inputs = [str(photographs / "dot.png"), str(photographs), os.path.relpath(photographs / "dot.png")]
        assert main(["predict", *inputs, "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]) == 0
        assert_complete(tmp_path, [path.name for path in photographs.iterdir()])

    @pytest.mark.parametrize("output", ["out", "."])
    def test_images_in_sub_folders(self, photographs, weights, tmp_path, capsys, output):
        """Without --recursive, images in sub-folders are only counted. Results in the input folder are not inputs."""
        for name in ("plain.jpg", "one/plain.jpg", "one/two/dot.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((photographs / name.split("/")[-1]).read_bytes())
        output = tmp_path / output
        command = ["predict", str(tmp_path), "--checkpoint", str(weights), "--output", str(output), *FAST]
        replaces = f"{output}: holds the results of an earlier run, which this one replaces"
        for messages in ([], [replaces]):
            assert main([*command, "--recursive"]) == 0 and error_messages(capsys) == messages
        content = read_panoptic_json(output / "panoptic.json")
        names = ["one/plain.jpg", "one/two/dot.png", "plain.jpg"]
        assert [image["file_name"] for image in content["images"]] == names
        assert [image["id"] for image in content["images"]] == ["one/plain", "dot", "plain"]
        for annotation, name in zip(content["annotations"], names, strict=True):
            assert annotation["file_name"] == name.split(".")[0] + ".png"
            assert read_id_map(output / "panoptic" / annotation["file_name"]).shape
            assert (output / "overlays" / name).with_suffix(".jpg").is_file()
        assert main(command) == 0
        left_out = "2 images in its sub-folders are left out; --recursive includes them"
        removed = "; the results of 2 images not among the inputs now are removed: one/plain.jpg, one/two/dot.png"
        assert error_messages(capsys) == [f"{tmp_path}: {left_out}", replaces + removed]
        assert [path.name for path in (output / "panoptic").iterdir()] == ["plain.png"]
        assert [image["id"] for image in read_panoptic_json(output / "panoptic.json")["images"]] == ["plain"]

    def test_a_folder_of_folders_alone(self, photographs, weights, tmp_path, capsys):
        """A folder that has images only in sub-folders, as in Cityscapes, needs no --recursive; ids have no folder."""
        path = tmp_path / "val" / "ulm" / "ulm_1_leftImg8bit.png"
        path.parent.mkdir(parents=True)
        path.write_bytes((photographs / "dot.png").read_bytes())
        output = tmp_path / "out"
        command = ["predict", str(tmp_path / "val"), "--checkpoint", str(weights), "--output", str(output), *FAST]
        assert main(command) == 0
        assert error_messages(capsys) == [f"{tmp_path / 'val'}: holds no image itself; its sub-folders hold 1 (ulm: 1)"]
        (image,) = read_panoptic_json(output / "panoptic.json")["images"]
        assert (image["file_name"], image["id"]) == ("ulm/ulm_1_leftImg8bit.png", "ulm_1")

    def test_linked_folders(self, photographs, tmp_path, capsys):
        """Links are followed, except those to a parent folder; a folder may have the name of an image."""
        for name in ("a.jpg", "other/b.png", "folder.jpg/c.png"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(b"")
        (tmp_path / "in" / "linked").symlink_to(tmp_path / "in" / "other")
        (tmp_path / "in" / "other" / "back").symlink_to(tmp_path / "in")
        (tmp_path / "in" / "gone.jpg").symlink_to(tmp_path / "absent.jpg")
        (tmp_path / "in" / "loop.jpg").symlink_to(tmp_path / "in" / "loop.jpg")
        images, _, failed = resolved([tmp_path / "in"], recursive=True)
        names = ["a.jpg", "folder.jpg/c.png", "gone.jpg", "linked/b.png", "loop.jpg", "other/b.png"]
        assert [image.name for image in images] == names and not failed
        resolved([tmp_path / "in"])
        left_out = "2 images in its sub-folders are left out; --recursive includes them"  # the count follows no links
        assert error_messages(capsys) == [f"{tmp_path / 'in'}: {left_out}"]

    def test_a_folder_that_cannot_be_read(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "a.jpg").touch()
        (tmp_path / "closed").mkdir()
        iterdir = Path.iterdir

        def refusing(path):
            if path.name == "closed":
                raise PermissionError(13, "Permission denied", str(path))
            return iterdir(path)

        monkeypatch.setattr(Path, "iterdir", refusing)
        images, _, failed = resolved([tmp_path])
        assert [image.name for image in images] == ["a.jpg"]
        assert failed == error_messages(capsys) == []  # sub-folders are skipped without --recursive
        images, _, failed = resolved([tmp_path], recursive=True)
        assert [image.name for image in images] == ["a.jpg"]
        assert failed == error_messages(capsys) == [f"{tmp_path / 'closed'}: cannot be read: Permission denied"]

    @pytest.mark.parametrize("name", ["panoptic.json", "panoptic/plain.png", "overlays/plain.jpg", "detections.json"])
    def test_files_of_others_are_not_replaced(self, photographs, weights, tmp_path, capsys, name):
        """In a folder without results of `predict`, files of others, such as a ground truth, are not replaced."""
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
        command = ["predict", str(photographs / "plain.jpg"), "--checkpoint", str(weights), *FAST, "--detections"]
        assert main([*command, "--output", str(tmp_path)]) == 2
        message = f"{tmp_path / name}: would be replaced, and is not a result of `predict`; use another --output"
        assert error_messages(capsys) == [message]
        assert (tmp_path / name).read_bytes() == b"mine"

    def test_a_folder_with_a_journal_of_others(self, photographs, weights, tmp_path, capsys):
        """A ground truth next to any journal, even an empty one, is not an output of `predict`."""
        command = ["predict", str(photographs / "plain.jpg"), "--checkpoint", str(weights), *FAST]
        assert main(["synthesize", str(tmp_path), "--count", "1", "--size", "48", "64"]) == 0
        truth = (tmp_path / "panoptic.json").read_bytes()
        for content in (b"", b"my notes\n", b'{"info": {"description": "written by spatialflow synthesize"}, '):
            (tmp_path / "panoptic.journal.jsonl").write_bytes(content)
            assert main([*command, "--output", str(tmp_path)]) == 2
            assert "panoptic.json: would be replaced" in error_messages(capsys)[-1]
            assert (tmp_path / "panoptic.json").read_bytes() == truth
        (tmp_path / "panoptic.json").unlink()
        assert main([*command, "--output", str(tmp_path)]) == 2
        assert "panoptic.journal.jsonl: would be replaced" in error_messages(capsys)[-1]
        assert (tmp_path / "panoptic.journal.jsonl").read_bytes() == content

    def test_a_result_that_cannot_be_read(self, photographs, weights, tmp_path, monkeypatch, capsys):
        def refusing(path, info):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(writer, "earlier_files", refusing)
        command = ["predict", str(photographs / "plain.jpg"), "--checkpoint", str(weights), *FAST]
        assert main([*command, "--output", str(tmp_path)]) == 2
        assert error_messages(capsys) == [f"{tmp_path / 'panoptic.json'}: cannot be read: Permission denied"]

    def test_empty_paths(self, capsys):
        for arguments in (["", "--output", "out"], ["a.jpg", "--output", ""], ["a.jpg", "--checkpoint", ""]):
            with pytest.raises(SystemExit):
                main(["predict", *arguments])
            assert "must not be empty" in capsys.readouterr().err

    def test_random_weights_are_said_plainly(self, photographs, tmp_path, capsys):
        assert main(["predict", str(photographs / "dot.png"), "--output", str(tmp_path), *FAST, "--no-overlay"]) == 0
        assert error_messages(capsys) == ["no --model: the weights are random, and so are the results"]
        assert not (tmp_path / "overlays").exists()

    @pytest.mark.parametrize(
        "change, reason",
        [
            (
                ["--config", "no_such_config"],
                "config: must be a path ending in .yaml or one of .*tiny.*'no_such_config'",
            ),
            (["--config", "no_such_file.yaml"], "no such file: no_such_file.yaml"),
            (
                ["--checkpoint", "no_such.pth"],
                "no_such.pth: there is no such file, folder of a run",
            ),
            (["--checkpoint", __file__], "neither a safetensors nor a torch file"),
            (["--set", "num_things=7"], "num_things: the weights of .* have 20, and 7 was given"),
            (["--set", "nonsense=1"], "nonsense"),
            (["--set", "score_threshold"], "settings have the form FIELD=VALUE, got 'score_threshold'"),
            (["--score", "nan"], "instance_score_threshold"),
            (["--size", "0"], "--size must be positive, got 0"),
            (["--size", "1x2x3"], "--size takes the short edge and the long one, got 1x2x3"),
            (["--short-edges", "64"], "--size and --short-edges exclude each other"),
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
        (message,) = error_messages(capsys)
        assert re.search(reason, message), message
        assert not (tmp_path / "out").exists()

    def test_full_disk(self, photographs, weights, tmp_path):
        """With a limit of 8 KiB per file, the large picture is named and leaves no file; the small one is done."""
        large = tmp_path / "large.jpg"
        assert cv2.imwrite(str(large), np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
        images = [str(large), str(photographs / "dot.png")]
        output = tmp_path / "out"
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "spatialflow.cli",
                "predict",
                *images,
                "--output",
                str(output),
                "--checkpoint",
                str(weights),
                *FAST,
            ],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        )
        assert result.returncode == 1, result.stderr
        (message,) = result.stderr.splitlines()
        assert message.endswith("overlays/large.jpg: cannot be written: File too large"), message
        assert_complete(output, ["dot.png"])

    def test_output_that_is_a_file(self, photographs, weights, tmp_path, capsys):
        """The error comes before the first image, and only once."""
        output = tmp_path / "out"
        output.write_text("in the way")
        assert main(["predict", str(photographs), "--checkpoint", str(weights), "--output", str(output), *FAST]) == 2
        (message,) = error_messages(capsys)
        assert message == f"{output}/panoptic: cannot be written: Not a directory"
        assert output.read_text() == "in the way"

    def test_no_image(self, tmp_path, capsys):
        assert main(["predict", str(tmp_path), "--output", str(tmp_path / "out"), *FAST]) == 1
        assert error_messages(capsys) == [f"{tmp_path}: holds no image file", "no image to predict"]
        assert not (tmp_path / "out").exists()
