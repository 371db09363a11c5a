# SPDX-License-Identifier: Apache-2.0
"""Tests of the file fuzzer: valid files are read, edits have their effect, and `execute` reports every defect."""

import json
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
from fuzz import mutate, read_files, workspace
from fuzz.files import FILES

SCENE = np.arange(40 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 50, 3)


def case(kind: str, base: int = 0, edits: list = ()) -> dict:
    return {"op": kind, "arguments": {"base": base, "edits": list(edits)}, "valid": not edits}


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "setting"])
def test_valid_files_are_read(kind):
    for base in range(FILES[kind][0]):
        report = read_files.execute(case(kind, base))
        refused = base in read_files.REFUSED_WITHOUT_EDITS.get(kind, ())
        assert report["differences"] == [] and report["status"] == ("refused" if refused else "right"), (kind, base)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_split_and_joined(suffix):
    _, encoded = cv2.imencode(suffix, SCENE)
    content = encoded.tobytes()
    split, join = {
        ".png": (mutate._png_chunks, mutate._png),
        ".jpg": (mutate._jpeg_segments, mutate._jpeg),
    }[suffix]
    parts = split(content)
    assert join(parts) == content and len(parts) >= 3


def test_edits_of_fields_keep_checksums_right():
    _, encoded = cv2.imencode(".png", SCENE)
    chunks = mutate._png_chunks(mutate.mutate_picture(encoded.tobytes(), [["field", 0, 64 * 2]]))
    before = encoded.tobytes()[16:29]
    assert chunks[0][1] == before[:11] + b"\xff\xff"
    data = mutate._png(chunks)
    assert zlib.crc32(data[12:29]) == int.from_bytes(data[29:33], "big")


def test_edits_of_trees():
    tree = {"a": [1, {"b": 2}]}
    assert mutate.mutate_tree(tree, [["replace", 2, 0]]) == {"a": [None, {"b": 2}]}
    assert mutate.mutate_tree(tree, [["delete", 1, 0]]) == {}
    assert mutate.mutate_tree(tree, [["double", 2, 0]]) == {"a": [1, 1, {"b": 2}]}
    assert tree == {"a": [1, {"b": 2}]}
    for value in range(len(mutate.SPECIAL)):
        json.dumps(mutate.mutate_tree(tree, [["replace", 2, value], ["move", 3, 1], ["replace", 3, value]]))


def _raises(*_):
    raise KeyError("annotations")


def _raises_a_long_message(*_):
    raise read_files.ImageError("a" * 2000)


def _takes_memory(*_):
    return int(np.ones(1_100_000_000 // 8).sum())


def _writes_the_canary(*_):
    return workspace.canary().write_text("")


def _prints_a_traceback(*_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace.cli, "main", lambda _: print("Traceback (most recent call last):", file=sys.stderr))
        return workspace.run_command("info")[0]


def _exits_without_a_message(*_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace.cli, "main", lambda _: 1)
        return workspace.run_command("info")[0]


def _warns_with_a_source_line(*_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace.cli, "main", lambda _: warnings.warn("area 1 and 2 pixels", stacklevel=1) or 0)
        return workspace.run_command("info")[0]


def _warns(*_):
    warnings.warn("overflow encountered", RuntimeWarning, stacklevel=1)
    return 1


@pytest.mark.parametrize(
    "reader, words",
    [
        (_raises_a_long_message, "that is not one line"),
        (_takes_memory, "megabytes"),
        (_writes_the_canary, "code of the file was run"),
        (_prints_a_traceback, "a line that is not a message"),
        (_exits_without_a_message, "exit code 1 with 0 lines"),
        (_warns, "RuntimeWarning: overflow encountered"),
        (_warns_with_a_source_line, "a warning with a line of source: UserWarning: area 1 and 2 pixels"),
    ],
)
def test_the_judge_reports(reader, words, monkeypatch):
    monkeypatch.setitem(read_files.READERS, "setting", reader)
    report = read_files.execute(case("setting", edits=[["text", 0, 0]]))
    assert report["status"] == "wrong" and words in report["differences"][0]


def test_other_exceptions_reach_the_supervisor(monkeypatch):
    monkeypatch.setitem(read_files.READERS, "setting", _raises)
    with pytest.raises(KeyError):
        read_files.execute(case("setting"))
