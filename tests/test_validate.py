# SPDX-License-Identifier: Apache-2.0
"""Contradictory annotations: the command names each problem, and scoring and training refuse or report them."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.scenes import scene_categories, write_cityscapes, write_coco
from PIL import Image

from spatialflow.cli.main import main
from spatialflow.config import DataConfig
from spatialflow.data.categories import load_categories
from spatialflow.data.cityscapes import Cityscapes
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.loader import Schedule, make_loader
from spatialflow.data.samples import SampleError
from spatialflow.panoptic import PanopticFormatError, PanopticQuality, evaluate, read_id_map, validate, write_id_map
from spatialflow.panoptic.extents import Extent, extents, ids_of
from spatialflow.panoptic.photographs import find_photograph, join_images, photograph_key
from spatialflow.panoptic.rules import PREDICTION, RULES, TRAINING, TRUTH, AnnotationWarning, json_problems

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 3)


@pytest.fixture
def folder(scenes, tmp_path):
    """A copy of the data set, for tests to damage."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


class Broken:
    """The second image of a data set and its first thing away from the top left corner, for tests to modify."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content = json.loads((folder / "panoptic.json").read_text())
        self.annotation = self.content["annotations"][1]
        self.image = self.annotation["image_id"]
        self.row = self.content["images"][1]
        things = {row["id"] for row in self.content["categories"] if row["isthing"]}
        self.segment = next(
            s
            for s in self.annotation["segments_info"]
            if s["category_id"] in things and min(s["bbox"]) > 2 and s["area"] > 20
        )
        self.png = folder / "panoptic" / self.annotation["file_name"]
        self.ids = read_id_map(self.png)

    def recolor(self, new: int) -> None:
        """Change the id of the segment's pixels."""
        self.ids[self.ids == self.segment["id"]] = new
        write_id_map(self.png, self.ids)

    def save(self) -> Path:
        path = self.folder / "panoptic.json"
        path.write_text(json.dumps(self.content))
        return path


def id_zero(b):
    b.recolor(0)
    b.segment["id"] = 0
    return "id-zero", b.image, 0, 0


def id_beyond_three_bytes(b):
    b.segment["id"] = 1 << 24
    return "id-range", b.image, 1 << 24, 1 << 24


def id_negative(b):
    b.segment["id"] = -5
    return "id-range", b.image, -5, -5


def id_listed_twice(b):
    b.annotation["segments_info"].append(dict(b.segment))
    return "id-twice", b.image, b.segment["id"], b.segment["id"]


def area_below_the_pixels(b):
    b.segment["area"] -= 3
    return "area-pixels", b.image, b.segment["id"], b.segment["area"]


def area_above_the_pixels(b):
    b.segment["area"] += 0.5
    return "area-pixels", b.image, b.segment["id"], b.segment["area"]


def area_negative(b):
    b.segment["area"] = -1
    return "area", b.image, b.segment["id"], -1


def area_not_a_number(b):
    b.segment["area"] = float("nan")
    return "area", b.image, b.segment["id"], "nan"


def area_infinite(b):
    b.segment["area"] = float("inf")
    return "area", b.image, b.segment["id"], "inf"


def area_null(b):
    b.segment["area"] = None
    return "segment", b.image, b.segment["id"], "None"


def area_true(b):
    b.segment["area"] = True
    return "segment", b.image, b.segment["id"], True


def crowd_null(b):
    b.segment["iscrowd"] = None
    return "segment", b.image, b.segment["id"], "None"


def id_true(b):
    b.recolor(1 << 23)
    b.segment["id"] = True
    return "segment", b.image, None, f"{b.segment!r:.80}"


def category_true(b):
    b.segment["category_id"] = True
    return "segment", b.image, b.segment["id"], f"{b.segment!r:.80}"


def height_true(b):
    b.row["height"] = True
    return "image", b.image, None, True


def image_id_true(b):
    b.annotation["image_id"] = True
    return "annotation", None, None, True


def category_id_true(b):
    b.content["categories"][-1]["id"] = True
    return "category", None, None, True


def area_as_text(b):
    b.segment["area"] = "12"
    return "segment", b.image, b.segment["id"], "'12'"


def box_moved(b):
    b.segment["bbox"][0] += 2
    return "bbox-pixels", b.image, b.segment["id"], b.segment["bbox"]


def box_of_corners(b):
    x, y, width, height = b.segment["bbox"]
    b.segment["bbox"] = [x, y, x + width, y + height]
    return "bbox-pixels", b.image, b.segment["id"], b.segment["bbox"]


def box_of_three_numbers(b):
    b.segment["bbox"] = [1, 2, 3]
    return "bbox", b.image, b.segment["id"], "[1, 2, 3]"


def box_of_a_huge_integer(b):
    b.segment["bbox"][2] = 10**400
    return "bbox", b.image, b.segment["id"], f"{b.segment['bbox']!r:.80}"


def segment_without_pixels(b):
    b.annotation["segments_info"].append({"id": 424242, "category_id": 1, "area": 5, "bbox": [1, 1, 2, 2]})
    return "no-pixels", b.image, 424242, 0


def pixels_without_segment(b):
    b.annotation["segments_info"].remove(b.segment)
    return "no-segment", b.image, b.segment["id"], b.segment["id"]


def segment_no_mapping(b):
    b.annotation["segments_info"].append(7)
    return "segment", b.image, None, 7


def crowd_of_two(b):
    b.segment["iscrowd"] = 2
    return "segment", b.image, b.segment["id"], 2


def two_annotations_of_an_image(b):
    b.content["annotations"].append(b.annotation)
    return "annotation-twice", b.image, None, b.image


def two_entries_of_an_image(b):
    b.content["images"].append(dict(b.row))
    return "image-twice", b.image, None, b.image


def image_not_listed(b):
    b.content["images"].remove(b.row)
    return "image-unlisted", b.image, None, b.image


def image_without_pixels(b):
    b.row["height"] = 0
    return "image", b.image, None, "128x0"


def image_of_another_size(b):
    b.row["height"] += 1
    return "image-size", b.image, None, "128x96"


def no_images(b):
    del b.content["images"]
    return "images", None, None, "None"


def category_unknown(b):
    b.segment["category_id"] = 999
    return "category-unknown", b.image, b.segment["id"], 999


def category_listed_twice(b):
    b.content["categories"].append(b.content["categories"][0] | {"isthing": 0})
    return "category-twice", None, None, b.content["categories"][0]["id"]


def category_without_isthing(b):
    del b.content["categories"][2]["isthing"]
    return "isthing", None, None, f"{b.content['categories'][2]!r:.80}"


def category_without_id(b):
    b.content["categories"].append({"isthing": 1})
    return "category", None, None, "{'isthing': 1}"


def annotation_without_segments(b):
    del b.annotation["segments_info"]
    return "annotation", b.image, None, f"{b.annotation!r:.80}"


def png_absent(b):
    b.png.unlink()
    return "png", b.image, None, b.png.name


def png_name_of_a_folder(b):
    b.annotation["file_name"] = ""
    return "png", b.image, None, ""


def png_truncated(b):
    b.png.write_bytes(b.png.read_bytes()[:-30])
    return "png", b.image, None, b.png.name


def png_with_palette(b):
    Image.fromarray((b.ids % 251).astype(np.uint8)).convert("P").save(b.png)
    return "png-kind", b.image, None, b.png.name


def png_grayscale(b):
    Image.fromarray((b.ids % 251).astype(np.uint8)).save(b.png)
    return "png-kind", b.image, None, b.png.name


def png_of_16_bits(b):
    cv2.imwrite(str(b.png), (b.ids % 65521).astype(np.uint16))
    return "png-kind", b.image, None, b.png.name


def photograph_absent(b):
    (b.folder / "images" / b.row["file_name"]).unlink()
    return "photograph", b.image, None, b.row["file_name"]


def photograph_no_picture(b):
    (b.folder / "images" / b.row["file_name"]).write_bytes(b"no picture")
    return "photograph", b.image, None, b.row["file_name"]


def photograph_truncated(b):
    """Truncate the photograph but keep its header, so that its size can be read."""
    path = b.folder / "images" / b.row["file_name"]
    path.write_bytes(path.read_bytes()[:-400])
    return "photograph", b.image, None, b.row["file_name"]


def photograph_of_another_size(b):
    path = str(b.folder / "images" / b.row["file_name"])
    cv2.imwrite(path, cv2.imread(path)[:-1])
    return "photograph-size", b.image, None, "128x95"


BREAKS = [
    id_zero,
    id_beyond_three_bytes,
    id_negative,
    id_listed_twice,
    area_below_the_pixels,
    area_above_the_pixels,
    area_negative,
    area_not_a_number,
    area_infinite,
    area_as_text,
    box_moved,
    box_of_corners,
    box_of_three_numbers,
    box_of_a_huge_integer,
    segment_without_pixels,
    pixels_without_segment,
    segment_no_mapping,
    crowd_of_two,
    two_annotations_of_an_image,
    two_entries_of_an_image,
    image_not_listed,
    image_without_pixels,
    image_of_another_size,
    no_images,
    category_unknown,
    category_listed_twice,
    category_without_isthing,
    category_without_id,
    annotation_without_segments,
    png_absent,
    png_name_of_a_folder,
    png_truncated,
    png_with_palette,
    png_grayscale,
    png_of_16_bits,
    photograph_absent,
    photograph_no_picture,
    photograph_of_another_size,
    area_null,
    area_true,
    crowd_null,
    id_true,
    category_true,
    height_true,
    image_id_true,
    category_id_true,
    photograph_truncated,
]
ALONGSIDE = {  # other problems that a broken rule causes
    "id_beyond_three_bytes": {"no-segment"},
    "id_negative": {"no-segment"},
    "id_true": {"no-segment"},
    "category_id_true": {"category-unknown"},
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
class TestEveryBreak:
    def test_is_named_by_the_command(self, folder, tmp_path, capsys, damage):
        broken = Broken(folder)
        expected = damage(broken)
        path = broken.save()
        output = tmp_path / "problems.json"
        arguments = ["validate", str(path), "--images", str(folder / "images"), "--output", str(output)]
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

    def test_stops_scoring_or_is_reported(self, scenes, folder, damage):
        """As ground truth and as prediction: scoring stops, or reports the problem with a quality of at most 1."""
        broken = Broken(folder)
        rule = RULES[damage(broken)[0]]
        path, clean = broken.save(), scenes / "panoptic.json"
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

    def test_stops_training_or_is_survived(self, folder, damage):
        broken = Broken(folder)
        rule = RULES[damage(broken)[0]]
        path = broken.save()
        if TRAINING in rule.stops:
            with pytest.raises(PanopticFormatError, match="panoptic.json: "):
                CocoPanoptic(path, folder / "images", None, scene_categories())
            return
        data = CocoPanoptic(path, folder / "images", None, scene_categories())
        if rule.skipped:
            with pytest.raises(SampleError):
                data[1]
        else:
            notes = data[1].notes
            assert [note.rule for note in notes] == [rule_name(rule)] * (TRAINING in rule.reported)


def rule_name(rule):
    return next(name for name, candidate in RULES.items() if candidate is rule)


class TestCommand:
    def test_clean(self, scenes, capsys):
        arguments = ["validate", str(scenes / "panoptic.json"), "--images", str(scenes / "images"), "--workers", "2"]
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert printed.out.endswith(" segments: clean\n") and printed.out.count("\n") == 1 and printed.err == ""

    @pytest.mark.parametrize("content", ["{", "[]", '{"annotations": 3}', "[" * 100_000])
    def test_not_readable(self, tmp_path, capsys, content):
        (tmp_path / "a").mkdir()
        (tmp_path / "a.json").write_text(content)
        assert main(["validate", str(tmp_path / "a.json")]) == 2
        assert "a.json" in capsys.readouterr().err

    def test_wrong_arguments(self, scenes, tmp_path, capsys):
        path = str(scenes / "panoptic.json")
        for arguments, message in (
            (["nowhere.json"], "nowhere.json: no such file"),
            ([path, "--folder", "nowhere"], "nowhere: no such folder"),
            ([path, "--images", "nowhere"], "nowhere: no such folder"),
            ([path, "--workers", "0"], "--workers must be from 1 to 1024, got 0"),
        ):
            assert main(["validate", *arguments]) == 2
            assert message in capsys.readouterr().err

    def test_many_problems_are_counted(self, folder, capsys):
        broken = Broken(folder)
        for annotation in broken.content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["area"] += 1
        segments = sum(len(a["segments_info"]) for a in broken.content["annotations"])
        assert main(["validate", str(broken.save())]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["area-pixels", str(segments), "reported", "-", "-"]
        assert len(lines) == 7 and lines[5] == f"    and {segments - 3} more"

    def test_corners_are_recognized(self, folder, capsys):
        broken = Broken(folder)
        box_of_corners(broken)
        main(["validate", str(broken.save())])
        assert "the JSON gives x1 y1 x2 y2 where the format has x y width height" in capsys.readouterr().out

    def test_names_that_no_file_can_have(self, folder, capsys):
        """An unpaired surrogate is allowed in JSON, but neither in paths nor on a terminal."""
        broken = Broken(folder)
        broken.annotation["image_id"] = broken.annotation["file_name"] = "\ud800"
        broken.row |= {"id": "\ud800", "file_name": "\ud800.jpg"}
        broken.content["annotations"][2]["image_id"] = "\ud801"
        path = broken.save()
        assert main(["validate", str(path), "--images", str(folder / "images")]) == 1
        printed = capsys.readouterr().out
        assert "file_name must be a string without NUL or unpaired surrogates, got '\\ud800" in printed
        assert "image '\\ud801' has an annotation and is not listed" in printed
        with pytest.raises(PanopticFormatError, match="without NUL or unpaired surrogates"):
            CocoPanoptic(path, folder / "images", None, scene_categories())

    def test_torch_is_not_imported_and_opencv_for_photographs_alone(self, scenes):
        for images, absent in (([], ("torch", "cv2")), (["--images", str(scenes / "images")], ("torch",))):
            arguments = ["validate", str(scenes / "panoptic.json"), *images]
            code = (
                f"import sys; from spatialflow.cli.main import main; code = main({arguments!r});"
                f"sys.exit(code or any(name in sys.modules for name in {absent!r}))"
            )
            assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_folders_without_a_name_of_their_own(self, scenes, tmp_path, monkeypatch, capsys):
        for place, argument in (
            (scenes, "."),
            (scenes / "panoptic", "."),
            (scenes / "panoptic", ".."),
            (scenes / "images", "../panoptic"),
            (scenes / "panoptic", "../images/.."),
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
            ["visualize", str(scenes / "images"), "--ground-truth", ".", "--output", "out"],
        ):
            assert main(command) == 2
            assert ".json: no such file" in capsys.readouterr().err
        data = ["--annotations", ".", "--images", str(scenes / "images"), "--output", "run"]
        assert main(["train", "demo", *data]) == 2
        assert ".: cannot be read" in capsys.readouterr().err
        with pytest.raises(PanopticFormatError, match="cannot be read"):
            evaluate(".", None, ".", None)

    def test_a_pipe_and_a_name_without_ending(self, scenes, tmp_path, capsys):
        content, folder = (scenes / "panoptic.json").read_bytes(), str(scenes / "panoptic")
        for command in (
            ["validate", "{}", "--folder", folder],
            ["evaluate", "{}", str(scenes), "--ground-truth-folder", folder],
            ["evaluate", str(scenes), "{}", "--prediction-folder", folder],
        ):
            for option, hint in (([], ""), (command[-2:], f"; pass its path with {command[-2]}")):
                ends = os.pipe()
                os.write(ends[1], content)
                os.close(ends[1])
                path = f"/dev/fd/{ends[0]}"
                arguments = [path if part == "{}" else part for part in command]
                if option:
                    assert main(arguments[:-2]) == 2
                    said = capsys.readouterr().err
                    assert f"{path}: there is no folder {path} with its PNGs{hint}" in said
                else:
                    assert main(arguments) == 0
                os.close(ends[0])
        (tmp_path / "annotations").write_bytes(content)
        assert main(["validate", str(tmp_path / "annotations")]) == 2
        assert "with its PNGs; pass its path with --folder" in capsys.readouterr().err

    def test_a_negative_area_of_a_segment_without_pixels(self, scenes, folder, capsys):
        broken = Broken(folder)
        broken.annotation["segments_info"].append({"id": 424242, "category_id": 1, "area": -5})
        path = broken.save()
        assert main(["validate", str(path)]) == 1
        assert "segment 424242 has area -5" in capsys.readouterr().out
        with pytest.raises(PanopticFormatError, match="segment 424242 has area -5"):
            evaluate(path, None, scenes / "panoptic.json", None)

    def test_the_first_of_two_entries_of_an_image_counts(self, folder, capsys):
        broken = Broken(folder)
        broken.content["images"].append(broken.row | {"file_name": "absent.jpg", "height": 7})
        assert main(["validate", str(broken.save()), "--images", str(folder / "images")]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and lines[1].startswith("image-twice "), lines

    def test_a_large_photograph_gives_no_warning(self, folder, capsys, monkeypatch):
        """Pillow's warning about many pixels, with a line of its source, is not shown."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 96 - 1)
        broken = Broken(folder)
        photograph_truncated(broken)
        assert main(["validate", str(broken.save()), "--images", str(folder / "images")]) == 1
        printed = capsys.readouterr()
        assert printed.err == "" and ": is truncated or damaged" in printed.out

    def test_photographs_that_a_camera_has_turned(self, folder, capsys):
        """The size is that of the rotated picture, as in training."""
        broken = Broken(folder)
        path = folder / "images" / broken.row["file_name"]
        rotated = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        orientation = Image.Exif()
        orientation[0x0112] = 6
        rotated.save(path, exif=orientation)
        assert main(["validate", str(broken.save()), "--images", str(folder / "images")]) == 0, capsys.readouterr().out
        CocoPanoptic(broken.save(), folder / "images", None, scene_categories())[1]

    def test_problems_do_not_depend_on_workers(self, folder):
        broken = Broken(folder)
        segment_without_pixels(broken)
        path = broken.save()
        assert validate(path, workers=1) == validate(path, workers=5)


def test_no_entry_of_a_json_ends_in_another_exception(scenes):
    """Every value of a small JSON is replaced by every strange value: problems are named, nothing raises."""
    content = json.loads((scenes / "panoptic.json").read_text())
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
        """Void pixels would count as matched: 60 of 140 pixels would score 0.75."""
        truth = np.zeros((10, 20), int)
        truth[:, 10:] = 1
        segments = [{"id": 0, "category_id": 1}, {"id": 1, "category_id": 1}]
        with pytest.raises(PanopticFormatError, match="segment 0: the id 0 stands for void"):
            PanopticQuality(self.CATEGORIES).update(truth, segments, truth + 1, [{"id": 1, "category_id": 1}])

    @pytest.mark.parametrize("setting", ["ignore", "error"])
    def test_reports_whatever_the_settings_of_warnings(self, scenes, folder, capsys, setting):
        broken = Broken(folder)
        broken.segment["area"] += 4
        with warnings.catch_warnings():
            warnings.simplefilter(setting)
            assert main(["evaluate", str(broken.save()), str(scenes / "panoptic.json")]) == 0
        assert "1 x area-pixels" in capsys.readouterr().err

    def test_reports_of_many_images_are_one_sentence(self, scenes, folder, capsys):
        broken = Broken(folder)
        for annotation in broken.content["annotations"]:
            annotation["segments_info"][0]["area"] += 1
        assert main(["evaluate", str(broken.save()), str(scenes / "panoptic.json")]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "scenes/panoptic.json: 3 x area-pixels, e.g. image 1: segment" in line


class TestTraining:
    def test_a_segment_without_pixels_is_left_out(self, scenes, folder):
        broken = Broken(folder)
        segment_without_pixels(broken)
        whole = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())[1]
        sample = CocoPanoptic(broken.save(), folder / "images", None, scene_categories())[1]
        for mine, theirs in zip(sample[1:6], whole[1:6], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert [note.segment for note in sample.notes] == [424242]

    def test_boxes_of_corners_do_not_reach_the_network(self, scenes, folder):
        broken = Broken(folder)
        for segment in broken.annotation["segments_info"]:
            x, y, width, height = segment["bbox"]
            segment["bbox"] = [x, y, x + width, y + height]
        whole = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())[1]
        sample = CocoPanoptic(broken.save(), folder / "images", None, scene_categories())[1]
        np.testing.assert_array_equal(sample.boxes, whole.boxes)
        assert {note.rule for note in sample.notes} == {"bbox-pixels"}

    def test_an_annotation_without_any_pixel_is_not_used(self, folder):
        broken = Broken(folder)
        write_id_map(broken.png, np.zeros_like(broken.ids))
        with pytest.raises(SampleError, match="none of its .* segments has pixels"):
            CocoPanoptic(broken.save(), folder / "images", None, scene_categories())[1]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_batches_carry_notes(self, folder, workers):
        broken = Broken(folder)
        segment_without_pixels(broken)
        data = CocoPanoptic(broken.save(), folder / "images", None, scene_categories())
        config = DataConfig(train_short_edges=(96,), train_long_edge=160)
        (batch,) = make_loader(data, config, Schedule(data.sizes, 3, 0).batches(0, 1, 0, 1, 1), workers)
        assert [note.rule for note in batch.notes] == ["no-pixels"] and batch.problems == []

    def test_the_command_reports_each_kind_once_and_counts(self, folder, tmp_path, capsys):
        broken = Broken(folder)
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
        data = ["--images", str(folder / "images"), "--annotations", str(broken.save()), "--workers", "0"]
        assert main(["train", "tiny", *settings, *data, "--output", str(tmp_path / "run")]) == 0
        out = capsys.readouterr().out
        assert out.count("segment 424242 is in the JSON and not in the PNG") == 1
        assert "3 x no-pixels" in out.splitlines()[-1]
        rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert [row["rule"] for row in rows if row["kind"] == "note"] == ["no-pixels"]

    def test_validation_data_that_cannot_be_scored_are_refused_at_the_start(self, folder):
        broken = Broken(folder)
        area_infinite(broken)
        path = broken.save()
        CocoPanoptic(path, folder / "images", None, scene_categories())  # training does not read areas
        with pytest.raises(PanopticFormatError, match="has area inf"):
            CocoPanoptic(path, folder / "images", None, scene_categories(), scored=True)

    def test_evaluations_report_areas_in_a_sentence(self, folder, tmp_path, capsys):
        broken = Broken(folder)
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
        data = ["--images", str(folder / "images"), "--annotations", str(broken.save()), "--workers", "0"]
        validation = [option.replace("--", "--validation-") for option in data[:4]]
        assert main(["train", "tiny", *settings, *data, *validation, "--output", str(tmp_path / "run")]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "area-pixels" in line]
        assert len(lines) == 1 and lines[0].startswith(f"spatialflow: {folder}/panoptic.json: 3 x area-pixels, e.g. ")

    def test_the_command_refuses_id_zero_at_the_start(self, folder, tmp_path, capsys):
        broken = Broken(folder)
        id_zero(broken)
        data = ["--images", str(folder / "images"), "--annotations", str(broken.save())]
        settings = ["num_things=6", "num_stuff=7", "categories=synthetic", "epochs=1"]
        assert main(["train", "tiny", *settings, *data, "--output", str(tmp_path / "run")]) == 2
        assert "segment 0: the id 0 stands for void" in capsys.readouterr().err and not (tmp_path / "run").exists()


class TestVisualize:
    def test_id_zero_is_refused(self, folder, tmp_path, capsys):
        broken = Broken(folder)
        id_zero(broken)
        arguments = ["--ground-truth", str(broken.save()), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(folder / "images"), *arguments]) == 2
        assert "segment 0: the id 0 stands for void" in capsys.readouterr().err

    @pytest.mark.parametrize("title", ["ground-truth", "prediction"])
    @pytest.mark.parametrize("others", [False, True], ids=["alone", "beside"])
    @pytest.mark.parametrize(
        "damage",
        [*BREAKS[:10], two_entries_of_an_image, segment_without_pixels, pixels_without_segment],
        ids=lambda damage: damage.__name__,
    )
    def test_breaches_stop_or_are_reported_once(self, scenes, folder, tmp_path, capsys, title, others, damage):
        """As in docs/annotations.md; problems of pixels skip only their image."""
        broken = Broken(folder)
        name = damage(broken)[0]
        use, path = TRUTH if title == "ground-truth" else PREDICTION, broken.save()
        arguments = [f"--{title}", str(path), "--output", str(tmp_path / "out")]
        if others:
            arguments += [f"--{'prediction' if use == TRUTH else 'ground-truth'}", str(scenes)]
        code = main(["visualize", str(folder / "images"), *arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spatialflow: ")]
        if use in RULES[name].stops:
            (line,) = lines
            assert code == (1 if name in ("no-pixels", "no-segment") else 2) and f"{path}: " in line
            return
        reported = [line for line in lines if line.startswith(f"spatialflow: {path}: 1 x {name}, e.g. ")]
        assert code == 0 and len(reported) == len(lines) == (use in RULES[name].reported)

    def test_a_prediction_without_categories(self, scenes, folder, tmp_path, capsys):
        """Names and colors are those of the ground truth; without one, colors are derived from ids."""
        broken = Broken(folder)
        del broken.content["categories"]
        arguments = ["--prediction", str(broken.save()), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(folder / "images"), *arguments]) == 0
        alone = cv2.imread(str(tmp_path / "out/pictures/000002.jpg"))
        for prediction, name in ((broken.folder, "broken"), (scenes, "scenes")):
            files = ["--prediction", str(prediction), "--ground-truth", str(scenes), "--output", str(tmp_path / name)]
            assert main(["visualize", str(folder / "images"), *files]) == 0
        pictures = [tmp_path / name / "pictures/000002.jpg" for name in ("broken", "scenes")]
        assert alone is not None and pictures[0].read_bytes() == pictures[1].read_bytes()
        assert capsys.readouterr().err.count("spatialflow: ") == 0

    def test_names_without_a_name(self, folder, tmp_path, capsys):
        for name in ("", ".", "/", ".."):
            broken = Broken(folder)
            broken.row["file_name"] = name
            arguments = ["--ground-truth", str(broken.save()), "--output", str(tmp_path / "out")]
            assert main(["visualize", str(folder / "images"), *arguments]) == 1
            assert "has no image of that name" in capsys.readouterr().err


def listed(images):
    """Return a panoptic JSON for (id, name of the photograph or None, name of the PNG)."""
    return {
        "images": [{"id": i, "file_name": name, "height": 1, "width": 1} for i, name, _ in images if name is not None],
        "annotations": [{"image_id": i, "file_name": png, "segments_info": []} for i, _, png in images],
    }


class TestJoin:
    PREDICTED = [(123, "000123.jpg", "000123.png"), ("street", "street.jpg", "street.png")]

    @pytest.mark.parametrize(
        "truth, joined",
        [
            ([(123, None, "x.png"), ("street", None, "y.png")], {123: 123, "street": "street"}),
            ([(1, "street.png", "1.png"), (2, "000123.png", "2.png")], {1: "street", 2: 123}),
            (
                [("000123", "000123.jpg", "a.png"), ("street", "street.jpg", "b.png")],
                {"000123": 123, "street": "street"},
            ),
            ([("000123", None, "a.png")], {"000123": 123}),
            ([(7, None, "000123.png")], {7: 123}),
            ([(7, "val/street.jpg", "7.png")], {7: "street"}),
        ],
    )
    def test_by_id_else_by_name(self, truth, joined):
        assert join_images(listed(truth), listed(self.PREDICTED)) == joined

    def test_equal_running_ids_of_other_images_are_not_joined(self):
        truth = [(1, "b.jpg", "b.png"), (2, "a.jpg", "a.png")]
        prediction = [(1, "a.jpg", "a.png"), (2, "b.jpg", "b.png")]
        assert join_images(listed(truth), listed(prediction)) == {1: 2, 2: 1}
        prediction = [(1, None, "a.png"), (2, None, "b.png")]  # names of PNGs alone: ids count, as in panopticapi
        assert join_images(listed(truth), listed(prediction)) == {1: 1, 2: 2}

    def test_equal_ids_of_images_whose_names_differ_are_refused(self):
        truth = [(1, "a.jpg", "a.png"), (2, "b.jpg", "b.png")]
        with pytest.raises(PanopticFormatError) as error:
            join_images(listed(truth), listed([(1, "other_1.jpg", "1.png"), (2, "other_2.jpg", "2.png")]))
        assert "ids are ignored, because id 1 is 'a.jpg' in the ground truth and 'other_1.jpg'" in str(error.value)
        with pytest.raises(PanopticFormatError, match="because id 2 is 'b.jpg'"):
            join_images(listed(truth), listed([(1, "a.jpg", "1.png"), (2, "c.jpg", "2.png")]))
        for names in (("val/a.jpg", "b.png"), (None, None), ("a_leftImg8bit.png", None)):
            prediction = listed([(i, name, f"{i}.png") for i, name in enumerate(names, 1)])
            assert join_images(listed(truth), prediction) == {1: 1, 2: 2}
        unnamed = listed([(1, None, "x.png"), (2, None, "y.png")])
        assert join_images(unnamed, listed(truth)) == {1: 1, 2: 2}

    def test_equal_names_in_different_folders(self):
        """The folder decides, as for cameras or cities, whichever file has the longer path."""
        truth = [(1, "a/x.jpg", "1.png"), (2, "b/x.jpg", "2.png")]
        for names, joined in (
            (("a/x.jpg", "b/x.jpg"), {1: 1, 2: 2}),
            (("b/x.jpg", "a/x.jpg"), {1: 2, 2: 1}),
            (("x.jpg", "x.jpg"), {1: 1, 2: 2}),
            (("all/a/x.jpg", "all/b/x.jpg"), {1: 1, 2: 2}),
        ):
            prediction = listed([(i, name, f"{i}.png") for i, name in enumerate(names, 1)])
            assert join_images(listed(truth), prediction) == joined
            assert join_images(prediction, listed(truth)) == joined
        with pytest.raises(PanopticFormatError, match="ids are ignored"):
            join_images(listed(truth), listed([(1, "all/b/x.jpg", "1.png"), (2, "all/a/x.jpg", "2.png")]))
        with pytest.raises(PanopticFormatError, match="ids are ignored"):  # a/x.jpg has another id there
            join_images(listed(truth), listed([(1, "c/x.jpg", "1.png"), (7, "a/x.jpg", "7.png")]))

    def test_a_prediction_serves_one_image(self):
        truth = [(1, "p.jpg", "1.png"), (7, "000001.jpg", "7.png")]
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 7, neither of that id nor"):
            join_images(listed(truth), listed([(1, None, "000001.png")]))
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 's'"):
            join_images(listed([(1, "s.jpg", "1.png"), ("s", "t.jpg", "2.png")]), listed([(9, "s.jpg", "s.png")]))

    def test_names_in_folders(self):
        truth = [(1, "x/1.jpg", "p1.png"), (2, "y/1.jpg", "p2.png")]
        prediction = [("a", "y/1.jpg", "q1.png"), ("b", "x/1.jpg", "q2.png")]
        assert join_images(listed(truth), listed(prediction)) == {1: "b", 2: "a"}
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 1"):
            join_images(listed(truth), listed([("a", "1.jpg", "q1.png")]))
        with pytest.raises(PanopticFormatError, match="no prediction for the image with id 7"):
            join_images(listed([(7, "1.jpg", "p.png")]), listed(prediction))

    def test_neither_is_said_with_examples(self):
        with pytest.raises(PanopticFormatError) as error:
            join_images(listed([(1, "c.jpg", "1.png"), (2, "d.jpg", "2.png")]), listed(self.PREDICTED))
        for part in ("id 1,", "'c.jpg'", "id 2 ('d.jpg')", "id 123 ('000123.jpg')", "id 'street' ('street.jpg')"):
            assert part in str(error.value)

    def test_evaluate_with_running_ids(self, folder, tmp_path, capsys):
        """A ground truth with running ids in another order and text ids, with predictions as `predict` writes them."""
        content = json.loads((folder / "panoptic.json").read_text())
        prediction = tmp_path / "prediction"
        shutil.copytree(folder / "panoptic", prediction)
        (tmp_path / "prediction.json").write_text(json.dumps(content))
        clean = evaluate(folder / "panoptic.json", None, tmp_path / "prediction.json", None)
        things = {row["id"] for row in content["categories"] if row["isthing"]}
        rows = [
            {"image_id": a["image_id"], "category_id": s["category_id"], "bbox": s["bbox"], "score": 0.9}
            for a in content["annotations"]
            for s in a["segments_info"]
            if s["category_id"] in things
        ]
        (tmp_path / "detections.json").write_text(json.dumps(rows))
        for new_id in ({1: 3, 2: 1, 3: 2}, {1: "000001", 2: "000002", 3: "000003"}):
            changed = json.loads(json.dumps(content))
            for row in changed["images"]:
                row["id"] = new_id[row["id"]]
            for annotation in changed["annotations"]:
                annotation["image_id"] = new_id[annotation["image_id"]]
            (folder / "panoptic.json").write_text(json.dumps(changed))
            files = ["--detections", str(tmp_path / "detections.json"), "--output", str(tmp_path / "scores.json")]
            assert main(["evaluate", str(folder / "panoptic.json"), str(tmp_path / "prediction.json"), *files]) == 0
            scores = json.loads((tmp_path / "scores.json").read_text())
            assert scores["All"] == clean["All"] and clean["All"]["pq"] == 1
            assert scores["detection"]["box"]["ap"] == pytest.approx(1)
            output = ["--output", str(tmp_path / "pictures"), "--prediction", str(tmp_path / "prediction.json")]
            truth = ["--ground-truth", str(folder / "panoptic.json")]
            assert main(["visualize", str(folder / "images"), *truth, *output]) == 0
            assert "PQ 100.0" in (tmp_path / "pictures" / "index.html").read_text()


def official_cityscapes(tree: Path, split: str = "val") -> Path:
    """Write the output of cityscapesscripts' createPanopticImgs.py for a tree: its names, ids and fields."""
    data = Cityscapes(tree, split, load_categories("cityscapes", 8, 11))
    folder = tree / "gtFine" / f"cityscapes_panoptic_{split}"
    content = {"images": [], "annotations": [], "categories": data.categories.as_coco()}
    for index, (image_id, (height, width)) in enumerate(zip(data.image_ids, data.sizes, strict=True)):
        id_map, segments = data._annotation(index)
        write_id_map(folder / f"{image_id}_gtFine_panoptic.png", id_map)
        content["images"].append(
            {"id": image_id, "width": width, "height": height, "file_name": f"{image_id}_gtFine_leftImg8bit.png"}
        )
        content["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id}_gtFine_panoptic.png", "segments_info": segments}
        )
    folder.with_suffix(".json").write_text(json.dumps(content))
    return folder.with_suffix(".json")


class TestOfficialCityscapes:
    @pytest.fixture
    def tree(self, tmp_path):
        return write_cityscapes(tmp_path / "tree", 3, split="val")

    def test_photographs_are_found(self, tree, capsys):
        """In the split's folder of cities, in the root, and in a folder without cities; training finds them, too."""
        path = official_cityscapes(tree)
        categories = load_categories("cityscapes", 8, 11)
        as_downloaded = Cityscapes(tree, "val", categories)
        flat = tree / "flat"
        flat.mkdir()
        for photograph in as_downloaded.paths:
            shutil.copy(photograph, flat)
        for images in (tree / "leftImg8bit" / "val", tree / "leftImg8bit", flat):
            assert main(["validate", str(path), "--images", str(images)]) == 0, capsys.readouterr().out
            data = CocoPanoptic(path, images, None, categories)
            for index in range(3):
                for mine, theirs in zip(data[index][1:6], as_downloaded[index][1:6], strict=True):
                    np.testing.assert_array_equal(mine, theirs)
        assert find_photograph(flat, "a_b_c_gtFine_leftImg8bit.png") == flat / "a_b_c_gtFine_leftImg8bit.png"

    def test_scores_and_pictures(self, tree, tmp_path):
        """Predictions have the names of the photographs."""
        path = official_cityscapes(tree)
        content = json.loads(path.read_text())
        folder = tmp_path / "out" / "panoptic"
        for row, annotation in zip(content["images"], content["annotations"], strict=True):
            name = f"{annotation['image_id']}_leftImg8bit"
            write_id_map(folder / f"{name}.png", read_id_map(path.with_suffix("") / annotation["file_name"]))
            row["file_name"], annotation["file_name"] = f"{name}.png", f"{name}.png"
            row["id"] = annotation["image_id"] = (
                f"{annotation['image_id']}_0"  # so that images can only be matched by name
            )
        (tmp_path / "out" / "panoptic.json").write_text(json.dumps(content))
        assert evaluate(path, None, tmp_path / "out" / "panoptic.json", folder)["All"]["pq"] == 1
        files = ["--ground-truth", str(path), "--prediction", str(tmp_path / "out")]
        assert main(["visualize", str(tree / "leftImg8bit/val"), *files, "--output", str(tmp_path / "pictures")]) == 0

    def test_keys(self):
        names = ["x/a_1_2_leftImg8bit.png", "a_1_2_gtFine_leftImg8bit.png", "a_1_2_gtFine_panoptic.png", "a_1_2.png"]
        assert {photograph_key(name) for name in names} == {"a_1_2"}


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
