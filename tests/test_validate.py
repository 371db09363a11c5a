# SPDX-License-Identifier: Apache-2.0
"""Contradictory annotations: `spatialflow validate` names each problem; scoring and training refuse or report it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.broken_annotations import (
    ALONGSIDE,
    BREAKS,
    Broken,
    box_of_corners,
    photograph_truncated,
    segment_without_pixels,
)
from helpers.scenes import scene_categories
from PIL import Image

from spatialflow.cli.main import main
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.samples import SampleError
from spatialflow.panoptic import PanopticFormatError, evaluate, validate
from spatialflow.panoptic.extents import Extent, extents, ids_of
from spatialflow.panoptic.rules import PREDICTION, RULES, TRAINING, TRUTH, AnnotationWarning, json_problems

DOCS = Path(__file__).resolve().parents[1] / "docs"
pytest_plugins = ["helpers.broken_annotations"]  # fixtures `valid_scenes` and `scenes_copy`


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
class TestEveryBreak:
    def test_is_named_by_the_command(self, scenes_copy, tmp_path, capsys, damage):
        broken = Broken(scenes_copy)
        expected = damage(broken)
        path = broken.save()
        output = tmp_path / "problems.json"
        arguments = ["validate", str(path), "--images", str(scenes_copy / "images"), "--output", str(output)]
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err == "" and f"\n{expected[0]} " in printed.out
        rows = json.loads(output.read_text())["problems"]
        (row,) = [r for r in rows if (r["rule"], r["image"], r["segment"], r["value"]) == expected]
        assert f"    {row['text']}\n" in printed.out
        assert {r["rule"] for r in rows} <= {expected[0]} | ALONGSIDE.get(damage.__name__, set())
        if expected[1] is not None:
            assert str(expected[1]) in row["text"]
        if expected[2] is not None:
            assert str(expected[2]) in row["text"]

    def test_stops_scoring_or_is_reported(self, valid_scenes, scenes_copy, damage):
        """As ground truth and as prediction: scoring stops, or reports the problem with a quality of at most 1."""
        broken = Broken(scenes_copy)
        rule = RULES[damage(broken)[0]]
        path, clean = broken.save(), valid_scenes / "panoptic.json"
        for use, arguments in ((TRUTH, (path, None, clean, None)), (PREDICTION, (clean, None, path, None))):
            with warnings.catch_warnings(record=True) as reports:
                warnings.simplefilter("always")
                if use in rule.stops:
                    with pytest.raises(PanopticFormatError):
                        evaluate(*arguments)
                    continue
                result = evaluate(*arguments)
            texts = [str(report.message) for report in reports]
            assert result["All"]["pq"] <= 1 and len(texts) == (use in rule.reported), texts
            assert all("1 x " in text and "spatialflow validate" in text for text in texts)
            assert all(report.category is AnnotationWarning for report in reports)

    def test_stops_training_or_is_survived(self, scenes_copy, damage):
        broken = Broken(scenes_copy)
        rule = RULES[damage(broken)[0]]
        path = broken.save()
        if TRAINING in rule.stops:
            with pytest.raises(PanopticFormatError, match="panoptic.json: "):
                CocoPanoptic(path, scenes_copy / "images", None, scene_categories())
            return
        data = CocoPanoptic(path, scenes_copy / "images", None, scene_categories())
        if rule.skipped:
            with pytest.raises(SampleError):
                data[1]
        else:
            notes = data[1].notes
            assert [note.rule for note in notes] == [rule_name(rule)] * (TRAINING in rule.reported)


def rule_name(rule):
    return next(name for name, candidate in RULES.items() if candidate is rule)


class TestCommand:
    def test_clean(self, valid_scenes, capsys):
        arguments = [
            "validate",
            str(valid_scenes / "panoptic.json"),
            "--images",
            str(valid_scenes / "images"),
            "--workers",
            "2",
        ]
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert printed.out.endswith(" segments: clean\n") and printed.out.count("\n") == 1 and printed.err == ""

    @pytest.mark.parametrize("content", ["{", "[]", '{"annotations": 3}', "[" * 100_000])
    def test_not_readable(self, tmp_path, capsys, content):
        (tmp_path / "a").mkdir()
        (tmp_path / "a.json").write_text(content)
        assert main(["validate", str(tmp_path / "a.json")]) == 2
        assert "a.json" in capsys.readouterr().err

    def test_wrong_arguments(self, valid_scenes, tmp_path, capsys):
        path = str(valid_scenes / "panoptic.json")
        for arguments, message in (
            (["nowhere.json"], "nowhere.json: no such file"),
            ([path, "--folder", "nowhere"], "nowhere: no such folder"),
            ([path, "--images", "nowhere"], "nowhere: no such folder"),
            ([path, "--workers", "0"], "--workers must be from 1 to 1024, got 0"),
        ):
            assert main(["validate", *arguments]) == 2
            assert message in capsys.readouterr().err

    def test_many_problems_are_counted(self, scenes_copy, capsys):
        broken = Broken(scenes_copy)
        for annotation in broken.content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["area"] += 1
        segments = sum(len(a["segments_info"]) for a in broken.content["annotations"])
        assert main(["validate", str(broken.save())]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["area-pixels", str(segments), "reported", "-", "-"]
        assert len(lines) == 7 and lines[5] == f"    and {segments - 3} more"

    def test_corners_are_recognized(self, scenes_copy, capsys):
        broken = Broken(scenes_copy)
        box_of_corners(broken)
        main(["validate", str(broken.save())])
        assert "the JSON gives x1 y1 x2 y2 where the format has x y width height" in capsys.readouterr().out

    def test_names_that_no_file_can_have(self, scenes_copy, capsys):
        """An unpaired surrogate is allowed in JSON, but neither in paths nor on a terminal."""
        broken = Broken(scenes_copy)
        broken.annotation["image_id"] = broken.annotation["file_name"] = "\ud800"
        broken.row |= {"id": "\ud800", "file_name": "\ud800.jpg"}
        broken.content["annotations"][2]["image_id"] = "\ud801"
        path = broken.save()
        assert main(["validate", str(path), "--images", str(scenes_copy / "images")]) == 1
        printed = capsys.readouterr().out
        assert "file_name must be a string without NUL or unpaired surrogates, got '\\ud800" in printed
        assert "image '\\ud801' has an annotation and is not listed" in printed
        with pytest.raises(PanopticFormatError, match="without NUL or unpaired surrogates"):
            CocoPanoptic(path, scenes_copy / "images", None, scene_categories())

    def test_torch_is_not_imported_and_opencv_for_photographs_alone(self, valid_scenes):
        for images, absent in (([], ("torch", "cv2")), (["--images", str(valid_scenes / "images")], ("torch",))):
            arguments = ["validate", str(valid_scenes / "panoptic.json"), *images]
            code = (
                f"import sys; from spatialflow.cli.main import main; code = main({arguments!r});"
                f"sys.exit(code or any(name in sys.modules for name in {absent!r}))"
            )
            assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_folders_without_a_name_of_their_own(self, valid_scenes, tmp_path, monkeypatch, capsys):
        for place, argument in (
            (valid_scenes, "."),
            (valid_scenes / "panoptic", "."),
            (valid_scenes / "panoptic", ".."),
            (valid_scenes / "images", "../panoptic"),
            (valid_scenes / "panoptic", "../images/.."),
        ):
            monkeypatch.chdir(place)
            assert main(["validate", argument]) == 0, (place, argument)
            assert main(["evaluate", argument, argument]) == 0
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        for command in (
            ["validate", "."],
            ["evaluate", ".", "."],
            ["validate", "/"],
            ["visualize", str(valid_scenes / "images"), "--ground-truth", ".", "--output", "out"],
        ):
            assert main(command) == 2
            assert ": holds no panoptic.json, and there is no " in capsys.readouterr().err
        data = ["--annotations", ".", "--images", str(valid_scenes / "images"), "--output", "run"]
        assert main(["train", "demo", *data]) == 2
        assert ".: is a folder; annotations must be a panoptic JSON" in capsys.readouterr().err
        with pytest.raises(PanopticFormatError, match="cannot be read"):
            evaluate(".", None, ".", None)

    def test_a_pipe_and_a_name_without_ending(self, valid_scenes, tmp_path, capsys):
        content, folder = (valid_scenes / "panoptic.json").read_bytes(), str(valid_scenes / "panoptic")
        for command in (
            ["validate", "{}", "--folder", folder],
            ["evaluate", "{}", str(valid_scenes), "--ground-truth-folder", folder],
            ["evaluate", str(valid_scenes), "{}", "--prediction-folder", folder],
        ):
            for option, hint in (([], ""), (command[-2:], f"; pass its path with {command[-2]}")):
                ends = os.pipe()
                os.write(ends[1], content)
                os.close(ends[1])
                path = f"/dev/fd/{ends[0]}"
                arguments = [path if part == "{}" else part for part in command]
                if option:
                    assert main(arguments[:-2]) == 2
                    message = capsys.readouterr().err
                    assert f"{path}: there is no folder {path} with its PNGs{hint}" in message
                else:
                    assert main(arguments) == 0
                os.close(ends[0])
        (tmp_path / "annotations").write_bytes(content)
        assert main(["validate", str(tmp_path / "annotations")]) == 2
        assert "with its PNGs; pass its path with --folder" in capsys.readouterr().err

    def test_a_negative_area_of_a_segment_without_pixels(self, valid_scenes, scenes_copy, capsys):
        broken = Broken(scenes_copy)
        broken.annotation["segments_info"].append({"id": 424242, "category_id": 1, "area": -5})
        path = broken.save()
        assert main(["validate", str(path)]) == 1
        assert "segment 424242 has area -5" in capsys.readouterr().out
        with pytest.raises(PanopticFormatError, match="segment 424242 has area -5"):
            evaluate(path, None, valid_scenes / "panoptic.json", None)

    def test_the_first_of_two_entries_of_an_image_counts(self, scenes_copy, capsys):
        broken = Broken(scenes_copy)
        broken.content["images"].append(broken.row | {"file_name": "absent.jpg", "height": 7})
        assert main(["validate", str(broken.save()), "--images", str(scenes_copy / "images")]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and lines[1].startswith("image-twice "), lines

    def test_a_large_photograph_gives_no_warning(self, scenes_copy, capsys, monkeypatch):
        """Pillow's warning about many pixels, with a line of its source, is not shown."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 96 - 1)
        broken = Broken(scenes_copy)
        photograph_truncated(broken)
        assert main(["validate", str(broken.save()), "--images", str(scenes_copy / "images")]) == 1
        printed = capsys.readouterr()
        assert printed.err == "" and ": is truncated or damaged" in printed.out

    def test_photographs_that_a_camera_has_turned(self, scenes_copy, capsys):
        """The size is that of the rotated picture, as in training."""
        broken = Broken(scenes_copy)
        path = scenes_copy / "images" / broken.row["file_name"]
        rotated = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        orientation = Image.Exif()
        orientation[0x0112] = 6
        rotated.save(path, exif=orientation)
        assert main(["validate", str(broken.save()), "--images", str(scenes_copy / "images")]) == 0, (
            capsys.readouterr().out
        )
        CocoPanoptic(broken.save(), scenes_copy / "images", None, scene_categories())[1]

    def test_problems_do_not_depend_on_workers(self, scenes_copy):
        broken = Broken(scenes_copy)
        segment_without_pixels(broken)
        path = broken.save()
        assert validate(path, workers=1) == validate(path, workers=5)


def test_no_entry_of_a_json_ends_in_another_exception(valid_scenes):
    """Every value of a small JSON is replaced by every strange value: problems are named, nothing raises."""
    content = json.loads((valid_scenes / "panoptic.json").read_text())
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["segments_info"] = content["annotations"][0]["segments_info"][:1]
    content |= {"images": content["images"][:1], "categories": content["categories"][:1]}
    strange = [None, True, -1, 10**400, float("nan"), float("-inf"), 1.5, "", "\ud800", "\0", [], [[]], {}, {"id": {}}]

    def places(node, path=()):
        yield path
        if isinstance(node, dict | list):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                yield from places(child, (*path, key))

    tried = 0
    for path in list(places(content)):
        for value in strange:
            changed = json.loads(json.dumps(content))
            if path:
                parent = changed
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = value
            else:
                changed = value
            for problem in json_problems(changed):
                assert problem.rule in RULES and isinstance(problem.text, str) and len(problem.text) < 500
                json.dumps(problem.value)
            tried += 1
    assert tried > 300


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 53)])
@pytest.mark.parametrize("cell", [1, 5])
def test_extents_equal_a_plain_count(shape, cell):
    rng = np.random.default_rng(cell)
    cells = rng.integers(0, 9, (shape[0] // cell + 1, shape[1] // cell + 1)) * 70000
    id_map = np.kron(cells, np.ones((cell, cell), int))[: shape[0], : shape[1]].astype(np.int32)
    expected = {}
    for number in np.unique(id_map).tolist():
        rows, columns = np.nonzero(id_map == number)
        left, top = columns.min(), rows.min()
        expected[number] = Extent(len(rows), left, top, columns.max() + 1 - left, rows.max() + 1 - top)
    assert extents(id_map) == expected
    assert ids_of(id_map[::-1, ::-1]).tolist() == list(expected)
    assert extents(np.zeros((0, 3), np.int32)) == {}
    assert ids_of(np.zeros((0, 3), np.int32)).size == 0


def test_every_rule_is_documented():
    """The table of docs/annotations.md agrees with `RULES`."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "annotations.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    documented = {row[0].strip("`"): tuple(row[2:5]) for row in rows}
    assert documented == {
        name: tuple(rule.effect(use) for use in (TRUTH, PREDICTION, TRAINING)) for name, rule in RULES.items()
    }
