# SPDX-License-Identifier: Apache-2.0
"""PredictionFolder: files written in several threads equal those of one thread, even after an interruption."""

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from helpers.scenes import CATEGORIES, contents, make_scene

from spatialflow.cli import prediction_folder
from spatialflow.cli.input_images import InputImage
from spatialflow.cli.prediction_folder import MAX_UNWRITTEN, PredictionFolder, writers
from spatialflow.engine.predict import Outcome
from spatialflow.panoptic import PanopticFormatError, formats, journal, overlay, writer

COUNT = 12


@pytest.fixture(scope="module")
def outcomes():
    """Outcomes as those of a Predictor, one per image, with empty times."""
    scenes = [make_scene((48, 64), seed=0, index=index) for index in range(COUNT)]
    return [Outcome(_Result(scene), scene.image, None) for scene in scenes]


class _Result(argparse.Namespace):
    def __init__(self, scene):
        super().__init__(id_map=scene.id_map, segments=scene.segments, times={})
        self.boxes, self.scores, self.labels = np.ones((1, 4), np.float32), np.array([scene.id_map.mean()]), [1]
        self.masks = None

    def overlay(self, pixels):
        return overlay(pixels, self.id_map, self.segments, CATEGORIES)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs whose order is not that of their sorted names."""
    folder = tmp_path_factory.mktemp("photographs")
    images = [InputImage(folder / f"{number}.jpg", f"{number}.jpg") for number in range(COUNT)]
    for image in images:
        image.path.write_bytes(image.name.encode())
        os.utime(image.path, ns=(0, 0))
    return images


def run(root, photographs, outcomes, threads):
    """Write the images that are not done yet; return the positions of those written, and the errors by position."""
    folder = PredictionFolder(root, photographs, CATEGORIES, {}, overlays=True, detections=True, resume=True)
    todo = [position for position, image in enumerate(photographs) if image.name not in folder.done]
    written, failed = [], {}
    futures = folder.add_all([photographs[i] for i in todo], (outcomes[i] for i in todo), threads)
    with folder, contextlib.closing(futures) as files:
        for position, future in zip(todo, files, strict=True):
            try:
                assert list(future.result()) == ["write"]
                written.append(position)
            except (OSError, PanopticFormatError) as error:
                failed[position] = error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("map_ahead")]
    return written, failed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, photographs, outcomes):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder, photographs, outcomes, threads=1) == (list(range(COUNT)), {})
    return contents(folder)


@pytest.fixture
def shuffled(monkeypatch):
    """Make encoders take random times, so that images are written out of order."""
    chance = random.Random(0)

    def slow(function, *arguments):
        time.sleep(chance.random() / 50)
        return function(*arguments)

    for module, name in ((cv2, "imencode"), (formats, "encode_png")):
        monkeypatch.setattr(module, name, functools.partial(slow, getattr(module, name)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("module, name", [(cv2, "imencode"), (formats, "encode_png"), (overlay, "__call__")])
def test_images_are_encoded_at_once(tmp_path, monkeypatch, photographs, outcomes, uninterrupted, module, name):
    """Two images are encoded at the same time: each waits for the other."""
    both = threading.Barrier(2)
    if module is overlay:
        module, name = _Result, "overlay"
    encode = getattr(module, name)

    def wait_for_both(*arguments):
        both.wait(30)
        return encode(*arguments)

    monkeypatch.setattr(module, name, wait_for_both)
    assert run(tmp_path, photographs, outcomes, threads=2) == (list(range(COUNT)), {})
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("threads", [1, 2, 4, 16])
def test_same_files_in_any_interleaving(tmp_path, shuffled, photographs, outcomes, uninterrupted, threads):
    assert run(tmp_path, photographs, outcomes, threads) == (list(range(COUNT)), {})
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("place", ["disk", "row", "segments"])
def test_an_image_fails_alone(tmp_path, shuffled, monkeypatch, photographs, outcomes, uninterrupted, place):
    """The image leaves no files, its error comes in the order of the images, and the next run writes it."""
    bad, inputs = (2, 3, 9), list(outcomes)
    function = {"disk": (writer, "write_id_map"), "row": (journal, "_write"), "segments": (journal, "_write")}[place]
    plain = getattr(*function)

    def failing(target, content):
        name = target.stem if place == "disk" else content.get("image", {}).get("file_name", ".").split(".")[0]
        if name in map(str, bad):
            raise OSError(28, "No space left on device")
        plain(target, content)

    if place == "segments":
        for position in bad:
            result = argparse.Namespace(**{**vars(outcomes[position].result), "segments": []})
            result.overlay = outcomes[position].result.overlay
            inputs[position] = Outcome(result, outcomes[position].pixels, None)
    else:
        monkeypatch.setattr(*function, failing)
    written, failed = run(tmp_path, photographs, inputs, threads=4)
    assert written == [position for position in range(COUNT) if position not in bad]
    assert list(failed) == list(bad)
    assert {type(error) for error in failed.values()} == {PanopticFormatError if place == "segments" else OSError}
    remaining = contents(tmp_path)
    assert [name for name in uninterrupted if name not in remaining] == [
        name for name in uninterrupted if name.split("/")[-1].split(".")[0] in map(str, bad)
    ]
    assert [image["id"] for image in json.loads(remaining["panoptic.json"])["images"]] == written
    monkeypatch.undo()
    assert run(tmp_path, photographs, outcomes, threads=4)[1] == {} and contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("moment", ["overlay", "PNG", "row", "half a row", "rename"])
@pytest.mark.parametrize("number", [1, 6])
def test_killed_while_several_are_written(tmp_path, photographs, outcomes, uninterrupted, moment, number):
    """Images in the journal are complete; after the next run, the files are those of an uninterrupted run."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            module, name = {
                "overlay": (_Result, "overlay"),
                "PNG": (formats, "encode_png"),
                "rename": (os, "replace"),
            }.get(moment, (journal, "_write"))
            plain, calls = getattr(module, name), iter(range(1, 1000))

            def killing(*arguments):
                if next(calls) == number:
                    time.sleep(0.02)  # so that the other threads run
                    if moment == "half a row":
                        arguments[0].write(journal.dumps(arguments[1]).encode()[:20])
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*arguments)

            setattr(module, name, killing)
            run(tmp_path, photographs, outcomes, threads=4)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    path = tmp_path / "panoptic.journal.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().splitlines()[1:] if line.endswith(b"}")]
    done = sorted(int(row["annotation"]["file_name"].removesuffix(".png")) for row in rows)
    if moment in ("row", "half a row"):
        assert len(done) == max(number - 2, 0)  # the first row describes the run
    for position in done:
        for name in (f"panoptic/{position}.png", f"overlays/{position}.jpg"):
            assert (tmp_path / name).read_bytes() == uninterrupted[name]
    assert run(tmp_path, photographs, outcomes, threads=4) == ([i for i in range(COUNT) if i not in done], {})
    assert {name: value for name, value in contents(tmp_path).items() if not name.endswith(".tmp")} == uninterrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_between_images(tmp_path, shuffled, photographs, outcomes, uninterrupted, error):
    """Started images are complete, the JSON lists them, and the next run resumes."""

    class Ending(list):
        def __getitem__(self, position):
            if position == 7:
                raise error
            return super().__getitem__(position)

    with pytest.raises(error):
        run(tmp_path, photographs, Ending(outcomes), threads=4)
    remaining = contents(tmp_path)
    assert [image["id"] for image in json.loads(remaining["panoptic.json"])["images"]] == list(range(7))
    assert {name: remaining[name] for name in remaining if "/" in name} == {
        name: value
        for name, value in uninterrupted.items()
        if "/" in name and int(name.split("/")[1].split(".")[0]) < 7
    }
    assert run(tmp_path, photographs, outcomes, threads=2) == (list(range(7, COUNT)), {})
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("threads", [1, 3])
def test_few_images_are_held(tmp_path, monkeypatch, photographs, outcomes, threads):
    """The number of images in memory is bounded, even if the disk is slow."""
    taken, most, write = [], [], writer.write_id_map

    class Counted(list):
        def __getitem__(self, position):
            taken.append(position)
            return super().__getitem__(position)

    def slow(path, ids):
        time.sleep(0.03)
        most.append(len(taken) - len(most))
        write(path, ids)

    monkeypatch.setattr(writer, "write_id_map", slow)
    run(tmp_path, photographs, Counted(outcomes), threads)
    assert len(most) == COUNT and max(most) == MAX_UNWRITTEN + threads - 1


def test_the_end_waits_for_images_that_are_being_written(tmp_path, monkeypatch, photographs, outcomes):
    """The `with` block ends only after other threads have written their images."""
    write, begun = writer.write_id_map, threading.Barrier(3)

    def slow(path, ids):
        begun.wait(30)
        time.sleep(0.1 * (1 + int(path.stem)))
        write(path, ids)

    monkeypatch.setattr(writer, "write_id_map", slow)
    folder = PredictionFolder(tmp_path, photographs, [], {}, overlays=False, detections=False, resume=False)
    with folder:
        for image, outcome in zip(photographs[:2], outcomes[:2], strict=True):
            threading.Thread(target=folder.add, args=(image, outcome.result, None)).start()
        begun.wait(30)
    assert [image["id"] for image in json.loads((tmp_path / "panoptic.json").read_text())["images"]] == [0, 1]


@pytest.mark.parametrize(
    "kind, cores, threads",
    [
        ("cpu", 1, 1),
        ("cpu", 64, 1),
        ("cuda", 1, 1),
        ("cuda", 2, 1),
        ("cuda", 3, 2),
        ("cuda", 5, 4),
        ("cuda", 64, 8),
    ],
)
def test_number_of_threads(monkeypatch, kind, cores, threads):
    """`WRITERS` limits the number, and one core is left for the thread that runs the network."""
    monkeypatch.setattr(prediction_folder, "available_cores", lambda: cores)
    assert writers(kind) == threads
