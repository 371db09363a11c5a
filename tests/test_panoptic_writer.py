# SPDX-License-Identifier: Apache-2.0
"""PanopticWriter: a process killed at any moment, damaged journals, several writers, refused input."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.scenes import contents

from spatialflow.panoptic import (
    InUseError,
    PanopticFormatError,
    PanopticWriter,
    ResumeError,
    journal,
    read_id_map,
    read_panoptic_json,
)
from spatialflow.panoptic import writer as writer_module


def write_five(folder, moment="never", number=0):
    """Write five images with a writer that resumes; return the images that were not done already.

    The process kills itself when it reaches `moment` for the `number`-th time.
    """
    calls, added = Counter(), []

    def killing(name, function, before=lambda *_: None):
        def call(*arguments):
            calls[name] += 1
            if moment == name and calls[name] == number:
                before(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    def half(stream, content):
        line = json.dumps(content, default=str).encode()
        stream.write(line[: len(line) // 2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "write_id_map", killing("before the PNG", writer_module.write_id_map))
        patch.setattr(journal, "_write", killing("half a row", killing("before the row", journal._write), half))
        patch.setattr(writer_module, "_write_list", killing("while the JSON is written", writer_module._write_list))
        with PanopticWriter(
            folder / "maps",
            categories=[{"id": 1, "isthing": 1}],
            settings={"score": 0.5},
            resume=True,
            detections_path=folder / "detections.json",
        ) as writer:
            for index in range(5):
                if not writer.is_done(index, f"{index}.jpg"):
                    added.append(index)
                    segments = [{"id": index + 1, "category_id": 1, "score": np.float32(index / 3), "name": "ä"}]
                    results = [{"image_id": index, "category_id": 1, "bbox": [0, 0, 1, 2], "score": index / 7}]
                    writer.add(index, f"{index}.jpg", np.full((2, 3), index + 1), segments, detections=results)
    return added


def kill(folder, moment, number):
    """Run `write_five` in a child process, which kills itself."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            write_five(folder, moment, number)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert write_five(folder) == list(range(5))
    return contents(folder)


class TestWriter:
    @pytest.mark.parametrize(
        "moment, number, kept",
        [
            ("before the PNG", 1, 0),
            ("before the PNG", 4, 3),
            ("before the row", 1, 0),  # the first row describes the run
            ("before the row", 2, 0),
            ("before the row", 4, 2),
            ("half a row", 1, 0),
            ("half a row", 2, 0),
            ("half a row", 6, 4),
            ("while the JSON is written", 1, 5),
            ("while the JSON is written", 3, 5),
        ],
    )
    def test_killed_at_any_moment(self, uninterrupted, tmp_path, moment, number, kept):
        kill(tmp_path, moment, number)
        assert write_five(tmp_path) == list(range(kept, 5))
        assert {name: value for name, value in contents(tmp_path).items() if not name.endswith(".tmp")} == uninterrupted
        content = read_panoptic_json(tmp_path / "maps.json", with_categories=True)
        assert len(content["annotations"]) == 5 and len(json.loads((tmp_path / "detections.json").read_text())) == 5

    def test_killed_again_and_again(self, uninterrupted, tmp_path):
        for moment, number in (("half a row", 3), ("before the row", 2), ("half a row", 1), ("before the PNG", 2)):
            kill(tmp_path, moment, number)
        assert write_five(tmp_path) == [3, 4]
        assert contents(tmp_path) == uninterrupted

    @pytest.mark.parametrize("damage", [b"{", b"\0" * 100, b"[]\n", b'{"image": 1}\n', b"\xff\n", b'{"image": {}}\n'])
    def test_damaged_rows_are_done_again(self, uninterrupted, tmp_path, damage):
        kill(tmp_path, "before the PNG", 5)
        path = tmp_path / "maps.journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3]) + damage + b"".join(lines[3:]))
        kill(tmp_path, "before the PNG", 2)
        assert path.read_bytes() == b"".join(lines[:4])  # damaged rows and all rows after them are removed
        path.write_bytes(b"".join(lines[:3]) + damage + b"".join(lines[3:]))
        assert write_five(tmp_path) == [2, 3, 4]
        assert contents(tmp_path) == uninterrupted

    @pytest.mark.parametrize("damage", [b"", b"{", b"\0\n", b"[1]\n"])
    def test_a_damaged_first_line_starts_over(self, uninterrupted, tmp_path, damage):
        (tmp_path / "maps.journal.jsonl").write_bytes(damage)
        assert write_five(tmp_path) == list(range(5))
        assert contents(tmp_path) == uninterrupted

    def test_without_resume_a_journal_is_replaced(self, tmp_path):
        kill(tmp_path, "before the PNG", 4)
        with PanopticWriter(tmp_path / "maps") as writer:
            assert not writer.is_done(0, "0.jpg") and len(writer) == 0
            writer.add(7, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
        assert [row["id"] for row in json.loads((tmp_path / "maps.json").read_text())["images"]] == [7]

    def test_other_settings_and_categories(self, tmp_path):
        def writer(settings, categories):
            return PanopticWriter(tmp_path / "maps", categories=categories, settings=settings, resume=True)

        row = [{"id": 1, "isthing": 1}]
        with pytest.raises(KeyError), writer({"score": 0.5, "sizes": (1, 2)}, row) as first:
            first.add(1, "a.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
            raise KeyError
        assert writer({"score": 0.5, "sizes": [1, 2]}, row).is_done(1, "a.jpg")
        with pytest.raises(ResumeError, match=r"maps.journal.jsonl: .* score 0.5 -> 0.25, sizes \[1, 2\] -> None"):
            writer({"score": 0.25}, row)
        with pytest.raises(ResumeError, match="with other settings: category table '"):
            writer({"score": 0.5, "sizes": [1, 2]}, [])

    def test_a_journal_without_images_binds_no_later_run(self, tmp_path):
        """After a run that was killed before its first image, other settings are allowed."""
        first = PanopticWriter(tmp_path / "maps", settings={"score": 0.5})
        first.__enter__()
        line = (tmp_path / "maps.journal.jsonl").read_bytes()
        first.close(keep_journal=True)
        (tmp_path / "maps.journal.jsonl").write_bytes(line)
        with PanopticWriter(tmp_path / "maps", settings={"score": 0.25}, resume=True) as second:
            second.add(0, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
            lines = (tmp_path / "maps.journal.jsonl").read_bytes().splitlines()
        assert len(lines) == 2 and b"0.25" in lines[0]

    def test_images_of_an_earlier_run_are_replaced_and_others_are_not(self, tmp_path):
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        with pytest.raises(KeyError), PanopticWriter(tmp_path / "maps") as writer:
            for index in range(3):
                writer.add(index, f"{index}.jpg", ids, segments)
            raise KeyError
        with PanopticWriter(tmp_path / "maps", resume=True) as writer:
            assert len(writer) == 3
            writer.add(1, "new.jpg", 2 * ids, [{"id": 2, "category_id": 1}])  # replaces 1.jpg, which has the same id
            with pytest.raises(PanopticFormatError, match="other.jpg: the id 1 is already used by new.jpg"):
                writer.add(1, "other.jpg", ids, segments)
        names = [image["file_name"] for image in json.loads((tmp_path / "maps.json").read_text())["images"]]
        assert names == ["0.jpg", "2.jpg", "new.jpg"]

    def test_a_row_that_cannot_be_written_leaves_nothing(self, tmp_path, monkeypatch):
        """If a row cannot be written, as on a full disk, its PNG is removed; the rows before and after are complete."""
        write = journal._write

        def failing(stream, content):
            if content.get("image", {}).get("file_name") == "1.jpg":
                stream.write(b'{"image": {"id')
                raise OSError(28, "No space left on device")
            write(stream, content)

        monkeypatch.setattr(journal, "_write", failing)
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        with PanopticWriter(tmp_path / "maps") as writer:
            writer.add(0, "0.jpg", ids, segments)
            before = (tmp_path / "maps.journal.jsonl").read_bytes()
            with pytest.raises(OSError, match="No space"):
                writer.add(1, "1.jpg", ids, segments)
            assert (tmp_path / "maps.journal.jsonl").read_bytes() == before
            writer.add(2, "2.jpg", ids, segments)
        assert sorted(contents(tmp_path)) == ["maps.json", "maps/0.png", "maps/2.png"]
        assert len(json.loads((tmp_path / "maps.json").read_text())["images"]) == 2

    def test_an_interrupt_between_png_and_row_leaves_nothing(self, tmp_path, monkeypatch):
        write = journal._write

        def interrupted(stream, content):
            if "image" in content:
                raise KeyboardInterrupt
            write(stream, content)

        monkeypatch.setattr(journal, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt), PanopticWriter(tmp_path / "maps") as writer:
            writer.add(0, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
        assert not list((tmp_path / "maps").iterdir())

    def test_memory_does_not_grow_with_the_segments(self, tmp_path):
        """Segments stay on disk: a writer of large rows keeps only a small part in memory."""
        import tracemalloc

        segments = [{"id": 1, "category_id": 1, "text": "x" * 100_000}]
        tracemalloc.start()
        with PanopticWriter(tmp_path / "maps") as writer:
            for index in range(100):
                writer.add(index, f"{index}.jpg", np.ones((1, 1), int), segments)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (tmp_path / "maps.json").stat().st_size > 10_000_000 > 4 * peak

    def test_writers_of_several_processes(self, tmp_path):
        """Two writers, as of two processes, keep separate rows; the first writer then copies the rows of the second."""
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        writers = [PanopticWriter(tmp_path / "maps", tmp_path / f"{name}.json") for name in ("maps", "other")]
        for index in range(4):
            results = [{"image_id": index}]
            writers[index % 2].add(index, f"{index}.jpg", ids, segments, detections=results)
        writers[0].extend(list(writers[1].rows()))
        writers[0].write_json()
        for writer in writers:
            writer.close()
        assert sorted(contents(tmp_path)) == ["maps.json", *(f"maps/{index}.png" for index in range(4))]
        assert [row["id"] for row in json.loads((tmp_path / "maps.json").read_text())["images"]] == [0, 2, 1, 3]

    def test_two_processes_never_share_a_journal(self, tmp_path):
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        first, second = (PanopticWriter(tmp_path / "maps", resume=True) for _ in range(2))
        first.add(0, "0.jpg", ids, segments)
        before = (tmp_path / "maps.journal.jsonl").read_bytes()
        (tmp_path / "maps" / "1.png").write_bytes(b"of the first")
        with pytest.raises(InUseError, match="maps.journal.jsonl: is being written by another process"):
            second.add(1, "1.jpg", ids, segments)
        assert (tmp_path / "maps" / "1.png").read_bytes() == b"of the first"
        (tmp_path / "maps" / "1.png").unlink()
        with pytest.raises(InUseError, match="is being written by another process"):
            PanopticWriter(tmp_path / "maps", resume=True)
        assert (tmp_path / "maps.journal.jsonl").read_bytes() == before
        assert sorted(contents(tmp_path)) == ["maps.journal.jsonl", "maps/0.png"]
        first.close(keep_journal=True)
        assert PanopticWriter(tmp_path / "maps", resume=True).is_done(0, "0.jpg")

    def test_by_hand_no_journal_appears(self, tmp_path):
        """A writer without `with` and `resume` has no journal, so a second one can write to the folder."""
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        writers = [PanopticWriter(tmp_path / "maps") for _ in range(2)]
        for index, writer in enumerate(writers):
            writer.add(index, f"{index}.jpg", ids, segments)
            assert not list(tmp_path.glob("*journal*"))
            writer.write_json()
            writer.add(7, "7.jpg", ids, segments)
            writer.write_json()
            assert [row["id"] for row in json.loads((tmp_path / "maps.json").read_text())["images"]] == [index, 7]
        assert sorted(contents(tmp_path)) == ["maps.json", "maps/0.png", "maps/1.png", "maps/7.png"]

    @pytest.mark.parametrize("resume", [False, True])
    def test_after_its_block_a_writer_can_still_be_used(self, tmp_path, resume):
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        if resume:
            kill(tmp_path, "before the PNG", 3)
        settings, categories = {"score": 0.5}, [{"id": 1, "isthing": 1}]
        with PanopticWriter(tmp_path / "maps", None, categories, settings=settings, resume=resume) as writer:
            if not resume:
                writer.add(0, "0.jpg", ids, segments)
        assert not list(tmp_path.glob("*journal*"))
        before = [row["image"]["id"] for row in writer.rows()]
        writer.add(7, "7.jpg", ids, segments)
        writer.write_json()
        assert [row["id"] for row in json.loads((tmp_path / "maps.json").read_text())["images"]] == [*before, 7]
        assert len(before) == (2 if resume else 1) and not list(tmp_path.glob("*journal*"))

    def test_a_block_has_the_journal_from_its_beginning(self, tmp_path):
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        with PanopticWriter(tmp_path / "maps") as first:
            for resume in (False, True):
                with pytest.raises(InUseError), PanopticWriter(tmp_path / "maps", resume=resume):
                    pass
            first.add(0, "0.jpg", ids, segments)
            assert (tmp_path / "maps.journal.jsonl").is_file()
        assert [row["id"] for row in json.loads((tmp_path / "maps.json").read_text())["images"]] == [0]
        assert not list(tmp_path.glob("*journal*"))

    def test_a_run_that_ends_while_another_begins(self, tmp_path, monkeypatch):
        """The second run opens the journal just before the first removes it, and creates a new file."""
        first = PanopticWriter(tmp_path / "maps", resume=True)
        first.add(0, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
        flock = journal.fcntl.flock

        def late(stream, kind):
            monkeypatch.setattr(journal.fcntl, "flock", flock)
            first.close()
            flock(stream, kind)

        monkeypatch.setattr(journal.fcntl, "flock", late)
        with PanopticWriter(tmp_path / "maps") as second:
            second.add(1, "1.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
            assert len((tmp_path / "maps.journal.jsonl").read_bytes().splitlines()) == 2

    def test_closed_and_used_again(self, tmp_path):
        """A writer that was closed with `keep_journal=True` can be used again, and no row is lost."""
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        writer = PanopticWriter(tmp_path / "maps", resume=True)
        writer.add(0, "0.jpg", ids, segments)
        writer.close(keep_journal=True)
        writer.add(1, "1.jpg", ids, segments)
        writer.close(keep_journal=True)
        with PanopticWriter(tmp_path / "maps", resume=True) as second:
            assert second.is_done(0, "0.jpg") and second.is_done(1, "1.jpg")

    def test_closed_and_removed_by_another(self, tmp_path):
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        first = PanopticWriter(tmp_path / "maps", resume=True)
        first.add(0, "0.jpg", ids, segments)
        first.close(keep_journal=True)
        with PanopticWriter(tmp_path / "maps", resume=True):
            pass
        with pytest.raises(ResumeError, match="was removed by another run, with the images in it"):
            first.add(1, "1.jpg", ids, segments)

    def test_closed_before_the_first_image(self, tmp_path):
        """Closing after an image that failed deletes the journal; the next image creates it again."""
        kill(tmp_path, "before the PNG", 1)
        writer = PanopticWriter(tmp_path / "maps", resume=True)
        for _index in range(2):
            with pytest.raises(PanopticFormatError):
                writer.add(0, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1, "score": float("nan")}])
            writer.close(keep_journal=True)
            assert not (tmp_path / "maps.journal.jsonl").exists()
        writer.add(0, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
        writer.close(keep_journal=True)
        assert len(PanopticWriter(tmp_path / "maps", resume=True)) == 1

    def test_closed_while_a_forked_process_lives(self, tmp_path):
        writer = PanopticWriter(tmp_path / "maps", resume=True)
        writer.add(0, "0.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        writer.close(keep_journal=True)
        try:
            assert len(PanopticWriter(tmp_path / "maps", resume=True)) == 1
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_a_block_after_an_image_that_failed(self, tmp_path):
        ids, segments = np.ones((2, 2), int), [{"id": 1, "category_id": 1}]
        writer = PanopticWriter(tmp_path / "maps")
        with pytest.raises(PanopticFormatError):
            writer.add(0, "0.jpg", ids, [segments[0] | {"score": float("nan")}])
        with writer:
            writer.add(0, "0.jpg", ids, segments)
            assert len((tmp_path / "maps.journal.jsonl").read_bytes().splitlines()) == 2

    def test_rows_that_are_none_are_refused(self, tmp_path):
        writer = PanopticWriter(tmp_path / "maps", resume=True)
        annotation = {"image_id": 1, "file_name": "a.png", "segments_info": []}
        uninterrupted = {
            "image": {"file_name": "a"},
            "annotation": annotation,
            "detections": [],
            "png_bytes": 1,
            "photograph": None,
            "path": None,
        }
        unhashable = uninterrupted | {"annotation": annotation | {"image_id": [1]}}
        for row in ({}, {"image": {"file_name": "a"}, "annotation": annotation}, None, unhashable):
            with pytest.raises(PanopticFormatError, match="a row must be one of another writer's `rows`, got"):
                writer.extend([row])
        writer.add(2, "b.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
        writer.close(keep_journal=True)
        assert len(PanopticWriter(tmp_path / "maps", resume=True)) == 1

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"image_id": 1.5}, "image_id must be an integer or a string, got 1.5"),
            ({"image_id": None}, "image_id must be an integer or a string, got None"),
            ({"image_id": True}, "image_id must be an integer or a string, got True"),
            ({"id_map": np.ones((2, 2, 3), int)}, r"id_map must have shape \(H, W\), got \(2, 2, 3\)"),
            ({"segments": [{"id": 1}]}, "a segment's category_id must be an integer, got None"),
            ({"segments": [{"category_id": 1}]}, "a segment's id must be an integer, got None"),
            ({"png_name": "../a.png"}, "png_name must be a path inside the folder, got '../a.png'"),
            ({"png_name": "/a.png"}, "png_name must be a path inside the folder, got '/a.png'"),
            ({"segments": [{"id": 1, "category_id": 1, "score": float("nan")}]}, "cannot be written as JSON"),
            ({"detections": [{"score": np.float32("inf")}]}, "cannot be written as JSON"),
            ({"detections": [{"score": {1}}]}, "cannot be written as JSON: set cannot be"),
        ],
    )
    def test_what_no_reader_takes_is_refused(self, tmp_path, change, message):
        image = {"image_id": 1, "image_name": "a.jpg", "id_map": np.ones((2, 2), int)}
        image |= {"segments": [{"id": 1, "category_id": 1}]} | change
        with PanopticWriter(tmp_path / "maps") as writer:
            with pytest.raises(PanopticFormatError, match=message):
                writer.add(**image)
        assert sorted(contents(tmp_path)) == ["maps.json"]

    def test_a_folder_without_a_name(self, tmp_path, monkeypatch):
        (tmp_path / "maps").mkdir()
        monkeypatch.chdir(tmp_path / "maps")
        assert PanopticWriter(".").json_path == tmp_path / "maps.json"

    def test_settings_under_any_name(self, tmp_path):
        """Settings may have the names of the journal's fields."""
        for name in ("categories", "category table", "info", "settings"):
            first = PanopticWriter(tmp_path / name, settings={name: "A"}, resume=True)
            first.add(1, "a.jpg", np.ones((2, 2), int), [{"id": 1, "category_id": 1}])
            first.close(keep_journal=True)
            with pytest.raises(ResumeError):
                PanopticWriter(tmp_path / name, settings={name: "B"}, resume=True)

    def test_a_block_without_images_leaves_no_journal(self, tmp_path):
        with pytest.raises(KeyError), PanopticWriter(tmp_path / "maps"):
            raise KeyError
        assert sorted(contents(tmp_path)) == ["maps.json"]

    def test_read_back(self, tmp_path):
        ids = np.array([[0, 5], [9, 9]])
        with PanopticWriter(tmp_path / "maps") as writer:
            path = writer.add(
                3, "x/a.jpg", ids, [{"id": 5, "category_id": 1}, {"id": 9, "category_id": 2}], png_name="x/a.png"
            )
        assert path == tmp_path / "maps" / "x" / "a.png" and np.array_equal(read_id_map(path), ids)
        assert read_panoptic_json(tmp_path / "maps.json")["annotations"][0]["file_name"] == "x/a.png"


class TestThreads:
    """Calls of `add` in several threads at once."""

    def test_rows_are_whole_and_where_they_are_looked_for(self, tmp_path, monkeypatch):
        """Threads are switched between the steps of writing a row."""
        write = journal._write

        def slow(stream, content):
            time.sleep(0.002)
            write(stream, content)

        monkeypatch.setattr(journal, "_write", slow)
        detections = {number: [{"score": number / 7, "text": "x" * number}] for number in range(40)}
        with PanopticWriter(tmp_path / "maps", resume=True) as writer, ThreadPoolExecutor(8) as pool:

            def add(number):
                segments = [{"id": number + 1, "category_id": 1}]
                writer.add(
                    number, f"{number}.jpg", np.full((2, 3), number + 1), segments, detections=detections[number]
                )

            interval = sys.getswitchinterval()
            sys.setswitchinterval(1e-6)
            try:
                list(pool.map(add, range(40)))
            finally:
                sys.setswitchinterval(interval)
            rows = list(writer.rows(f"{number}.jpg" for number in range(40)))
        assert [row["image"]["id"] for row in rows] == list(range(40))
        assert [row["detections"] for row in rows] == list(detections.values())
        for number in range(40):
            assert (read_id_map(tmp_path / "maps" / f"{number}.png") == number + 1).all()

    def test_maps_are_written_at_once(self, tmp_path, monkeypatch):
        write, both = writer_module.write_id_map, threading.Barrier(2)

        def wait_for_both(path, ids):
            both.wait(30)
            write(path, ids)

        monkeypatch.setattr(writer_module, "write_id_map", wait_for_both)
        with PanopticWriter(tmp_path / "maps") as writer, ThreadPoolExecutor(2) as pool:
            for number in range(2):
                pool.submit(writer.add, number, f"{number}.jpg", np.zeros((2, 3), int), [])
        assert len(writer) == 2

    @pytest.mark.parametrize(
        "image_id, name, png, kind", [(1, "b", "b.png", "id"), (2, "b", "a.png", "PNG"), (2, "a", "b.png", "name")]
    )
    def test_an_image_that_is_being_written_keeps_what_is_its_own(
        self, tmp_path, monkeypatch, image_id, name, png, kind
    ):
        """The id, PNG and name of an image are reserved before its row is written, and released after a failure."""
        write, begun, resume = writer_module.write_id_map, threading.Event(), threading.Event()

        def waiting(path, ids):
            begun.set()
            assert resume.wait(10)
            write(path, ids)
            if full:
                path.unlink()
                raise OSError(28, "No space left on device")

        second = image_id, name, np.zeros((2, 3), int), []
        for full in (False, True):
            monkeypatch.setattr(writer_module, "write_id_map", waiting)
            begun.clear(), resume.clear()
            with PanopticWriter(tmp_path / str(full)) as writer, ThreadPoolExecutor(1) as pool:
                first = pool.submit(writer.add, 1, "a", np.ones((2, 3), int), [{"id": 1, "category_id": 1}])
                assert begun.wait(30)
                with pytest.raises(PanopticFormatError, match=f"{name}: the {kind} .* is already used by a"):
                    writer.add(*second, png_name=png)
                resume.set()
                monkeypatch.setattr(writer_module, "write_id_map", write)
                if full:
                    with pytest.raises(OSError):
                        first.result()
                    writer.add(*second, png_name=png)
                else:
                    assert (read_id_map(first.result()) == 1).all()
                assert len(writer) == 1


def test_ids_that_are_colors(tmp_path):
    """With `colors`, PNG and JSON have the colors of the categories; the ids given are still checked."""
    categories = [{"id": 4, "isthing": 1, "color": [200, 100, 50]}]
    id_map = np.array([[0, 1], [2, 2]])
    with PanopticWriter(tmp_path / "maps", categories=categories, colors=True) as writer:
        writer.add(1, "a.jpg", id_map, [{"id": 1, "category_id": 4}, {"id": 2, "category_id": 4}])
        with pytest.raises(PanopticFormatError, match=r"map \[1, 2\], listed \[1\]"):
            writer.add(2, "b.jpg", id_map, [{"id": 1, "category_id": 4}])
    (annotation,) = read_panoptic_json(tmp_path / "maps.json")["annotations"]
    first, second = (segment["id"] for segment in annotation["segments_info"])
    assert first == 200 + 256 * 100 + 65536 * 50 and second > 1000
    assert read_id_map(tmp_path / "maps" / "a.png").tolist() == [[0, first], [second, second]]
