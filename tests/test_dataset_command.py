# SPDX-License-Identifier: Apache-2.0
"""`spatialflow dataset convert`: a sentence for every kind of bad input, and for what is left out."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
from helpers.annotation_formats import write_json
from helpers.command_line import error_messages
from helpers.scenes import write_coco

from spatialflow.cli.main import main

SQUARE = [[2, 2], [12, 2], [12, 12], [2, 12]]
FLAT = [2, 2, 12, 2, 12, 12, 2, 12]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with photos/a.jpg and photos/b.jpg of 20 x 30 pixels."""
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / "photos" / f"{name}.jpg"), np.full((20, 30, 3), 99, np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labelme(folder, *shapes, name="a", **fields):
    (folder / "json").mkdir(exist_ok=True)
    content = {"shapes": [{"label": "cat", "points": SQUARE, **shape} for shape in shapes or ({},)]}
    content |= {"imagePath": f"{name}.jpg", "imageHeight": 20, "imageWidth": 30}
    return write_json(folder / "json" / f"{name}.json", content | fields)


def coco(folder, **fields):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 20, "width": 30}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [FLAT]}],
    }
    return write_json(folder / "instances.json", content | fields)


def cvat(folder, shapes):
    image = '<image id="0" name="a.jpg" width="30" height="20"><polygon label="cat" points="2,2;12,2;12,12"/>'
    (folder / "annotations.xml").write_text(f"<annotations>{image}{shapes}</image></annotations>")


def convert(*arguments, source="json"):
    return main(["dataset", "convert", source, "--images", "photos", "--output", "out", *arguments])


class TestBadRegions:
    """The region is named and left out, everything else is converted, and the exit code is 1."""

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"points": SQUARE[:2]}, "a polygon needs at least 3 points, got 2"),
            ({"points": [[0, 0], [1, float("nan")], [5, 5]]}, "finite numbers up to a million, got nan"),
            ({"points": [[0, 0], [1, 1e30], [5, 5]]}, "finite numbers up to a million, got 1e+30"),
            ({"points": [[0, 0], [1, 10**30], [5, 5]]}, "finite numbers up to a million, got 1000"),
            ({"points": [[0, 0], ["1", 2], [5, 5]]}, "finite numbers up to a million, got '1'"),
            ({"points": None}, "points must be a list of pairs [x, y], got None"),
            ({"points": [[0, 0, 0]] * 3}, "points must be a list of pairs"),
            ({"label": None}, "label must be text, got None"),
            ({"shape_type": "spline"}, "unknown shape_type 'spline'"),
            ({"shape_type": "circle"}, "a circle needs 2 points, got 4"),
            ({"shape_type": "circle", "points": [[3, 3], [3, 3]]}, "radii must be positive, got 0 and 0"),
            ({"shape_type": "mask", "points": SQUARE[:2]}, '"mask" must be a PNG in base64, got None'),
            ({"group_id": []}, "group_id must be a number or null, got []"),
        ],
    )
    def test_labelme(self, folder, capsys, shape, message):
        labelme(folder, {}, shape)
        assert convert() == 1
        (text,) = error_messages(capsys)
        assert text.startswith("json/a.json: shapes[1]: ") and message in text
        (annotation,) = json.loads((folder / "out" / "panoptic.json").read_text())["annotations"]
        assert [segment["area"] for segment in annotation["segments_info"]] == [100]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"category_id": 9}, "unknown class 9"),
            ({"category_id": "cat"}, "category_id must be an integer, got 'cat'"),
            ({"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
            ({"segmentation": [[1, 1, 5, 5, 1]]}, "must have x and y of every point, got 5 numbers"),
            ({"segmentation": [[1, 1, 5, 5]]}, "a polygon needs at least 3 points, got 2"),
            ({"segmentation": "x"}, "segmentation must be a list of polygons or an RLE, got 'x'"),
            ({"segmentation": {"size": [2, 2], "counts": [4]}}, "the RLE has size [2, 2], the image has [20, 30]"),
            ({"segmentation": None}, "without segmentation, bbox must be a list of numbers, got None"),
        ],
    )
    def test_coco(self, folder, capsys, row, message):
        good = {"image_id": 1, "category_id": 1, "segmentation": [FLAT]}
        coco(folder, annotations=[good, {**good, **row}])
        assert convert(source="instances.json") == 1
        (text,) = error_messages(capsys)
        assert text.startswith("instances.json: annotations[1]: ") and message in text

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ('<polygon label="cat" points="1,2;3"/>', 'points must be "x,y;x,y;...", got'),
            ('<polygon label="cat" points="1,2;3,x;5,6"/>', "points must be numbers, got"),
            ('<polygon points="1,2;3,4;5,6"/>', "unknown class None"),
            ('<ellipse label="cat" cx="1"/>', "cy must be one number, got ''"),
            ('<mask label="cat" rle="1,a" left="0" top="0" width="2" height="2"/>', "rle must be integers, got '1,a'"),
            ('<mask label="cat" rle="3" left="0" top="0" width="2" height="2"/>', "the number of pixels, 4, got 3"),
            ('<mask label="cat" rle="4" left="29" top="0" width="2" height="2"/>', "the mask covers x 29 to 31"),
            ('<polygon label="cat" points="1,2;3,4;5,6" z_order="inf"/>', "z_order must be integers, got 'inf'"),
            ('<blob label="cat"/>', "unknown shape <blob>"),
        ],
    )  # fmt: skip
    def test_cvat(self, folder, capsys, shape, message):
        cvat(folder, shape)
        assert convert("--classes", "cat", "--format", "cvat", source="annotations.xml") == 1
        (text,) = error_messages(capsys)
        assert text.startswith("annotations.xml: image 0 (a.jpg): ") and message in text

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("7 0 0 1 0 1 1", "unknown class '7'; numbers of classes start at 0"),
            ("cat 0 0 1 0 1 1", "unknown class 'cat'"),
            ("0 0 0 300 0 300 200", "coordinates are shares of the width and the height, 0 to 1, got 300"),
            ("0 0 0 nan 0 1 1", "0 to 1, got nan"),
            ("0 0 0 x 0 1 1", "coordinates must be numbers, got '0 0 0 x 0 1 1'"),
            ("0 0 0 1 0 1", "a polygon has x and y of every point, got 5 numbers"),
            ("0 0 0", "a polygon needs at least 3 points, got 1"),
        ],
    )
    def test_yolo(self, folder, capsys, line, message):
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_text(f"0 0 0 0.5 0 0.5 1\n{line}\n")
        assert convert("--classes", "cat", source="labels") == 1
        (text,) = error_messages(capsys)
        assert text.startswith("labels/a.txt: line 2: ") and message in text

    def test_masks(self, folder, capsys):
        (folder / "masks").mkdir()
        mask = np.zeros((20, 30), np.uint8)
        mask[:5], mask[5, 5:8], mask[10:] = 1, 44, 255
        cv2.imwrite("masks/a.png", mask)
        cv2.imwrite("masks/b.png", np.zeros((10, 30), np.uint8))
        assert convert("--classes", "cat", "--stuff-classes", "cat", source="masks") == 1
        assert error_messages(capsys) == [
            "masks/a.png: 3 pixels have the value 44, which is no class",
            "masks/b.png: has 30x10 pixels, the photograph 30x20",
        ]


class TestBadFiles:
    def test_damaged_files_of_labelme(self, folder, capsys):
        labelme(folder)
        for name, content in {
            "b1": b"{",
            "b2": b"[1]",
            "b3": '{"shapes": [], "imagePath": "\xe4.jpg"}'.encode("latin-1"),
            "b4": b'{"shapes": [3]}',
            "b5": b"[" * 100_000,
        }.items():
            (folder / "json" / f"{name}.json").write_bytes(content)
        assert convert("--format", "labelme") == 1
        texts = error_messages(capsys)
        assert texts[0] == "json/b1.json: line 1: is not JSON: the file ends there, before the JSON is complete"
        assert texts[1] == 'json/b2.json: a LabelMe file is a mapping with a list "shapes"'
        assert texts[2] == "json/b3.json: line 1: is not UTF-8 text"
        assert texts[3] == "json/b4.json: shapes[0]: must be a mapping, got 3"
        assert texts[4].startswith("json/b5.json: is not JSON that can be read: ") and len(texts) == 5

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"shapes":\n[\n\n', "line 2: is not JSON: the file ends there, before the JSON is complete"),
            ('{"shapes": [],\n"imageData": "iVBORw0KG', "line 2: is not JSON: the file ends there, before"),
            ('{"shapes": []', "line 1: is not JSON: the file ends there, before"),
            (" \n", "is empty"),
            ('{"shapes": x', "line 1: is not JSON: Expecting value"),
            ('{"shapes": []}}', "line 1: is not JSON: Extra data"),
        ],
    )
    def test_incomplete_json(self, folder, capsys, content, message):
        labelme(folder)
        (folder / "json" / "b.json").write_text(content)
        assert convert() == 1
        (text,) = error_messages(capsys)
        assert text.startswith(f"json/b.json: {message}")

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_byte_order_marks_are_read(self, folder, encoding):
        path = labelme(folder, {"label": "Straße"}, imagePath="..\\photos\\a.jpg")
        path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode(encoding))
        assert convert("--format", "labelme") == 0
        assert "Straße" in json.loads((folder / "out" / "panoptic.json").read_text())["categories"][0]["name"]

    def test_photographs_that_do_not_fit(self, folder, capsys):
        labelme(folder)
        labelme(folder, name="b", imageHeight=30, imageWidth=20)
        labelme(folder, name="c")
        (folder / "photos" / "d.jpg").write_bytes(b"no image")
        labelme(folder, name="d")
        assert convert() == 1
        texts = error_messages(capsys)
        assert texts == [
            "json/c.json: has no photograph 'c.jpg' in photos",
            "json/b.json: the source has 20x30 pixels, the photograph b.jpg has 30x20; it may have been annotated "
            "without its EXIF orientation, or been turned since",
            "json/d.json: photos/d.jpg: is no image that can be read",
        ]
        assert [p.name for p in (folder / "out" / "panoptic").iterdir()] == ["a.png"]

    def test_many_problems_are_counted(self, folder, capsys):
        labelme(folder, {}, *[{"points": SQUARE[:2]}] * 9)
        assert convert("--problems", "problems.json") == 1
        printed = capsys.readouterr()
        rows = json.loads((folder / "problems.json").read_text())
        assert len(rows) == 9 and rows[8]["text"].startswith("json/a.json: shapes[9]: a polygon needs")
        assert printed.err.splitlines()[-1] == "spatialflow: and 4 more problems of the kind 'region'"
        assert "left out: 9 damaged or unknown entries, all listed in problems.json\n" in printed.out
        assert convert() == 1
        text = "left out: 9 damaged or unknown entries, of which 5 are named above; --problems FILE lists all\n"
        assert text in capsys.readouterr().out
        labelme(folder, {}, {"points": SQUARE[:2]})
        assert convert() == 1
        assert "left out: 1 damaged or unknown entry, named above\n" in capsys.readouterr().out

    def test_photographs_of_one_name(self, folder, capsys):
        """A name without a folder that fits two photographs, and an image without a name."""
        for place in ("x", "y"):
            (folder / "photos" / place).mkdir()
            shutil.copy(folder / "photos" / "a.jpg", folder / "photos" / place / "c.jpg")
        images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "c.jpg"}, {"id": 3}]
        coco(folder, images=images)
        assert convert(source="instances.json") == 1
        assert error_messages(capsys) == [
            "instances.json: images[2]: must have an id and a file_name, got {'id': 3}",
            "instances.json: images[1]: 'c.jpg' may be several files in photos: 'x/c.jpg', 'y/c.jpg'",
        ]

    def test_stuff_of_another_size(self, folder, capsys):
        coco(folder, categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "road"}])
        (folder / "stuff").mkdir()
        cv2.imwrite("stuff/a.png", np.full((10, 30), 2, np.uint8))
        assert convert("--stuff", "stuff", "--stuff-classes", "road", source="instances.json") == 1
        printed = capsys.readouterr()
        reason = "the stuff PNG has 30x10 pixels, another size than the image"
        assert printed.err == f"spatialflow: instances.json: images[0]: {reason}\n"
        assert printed.out.endswith("out/panoptic.json: 0 images\n")  # there is nothing to check next

    def test_twice_annotated_photographs(self, folder, capsys):
        labelme(folder)
        write_json(folder / "json" / "z.json", json.loads((folder / "json" / "a.json").read_text()))
        assert convert() == 1
        assert error_messages(capsys) == [
            "json/z.json: the photograph 'a.jpg' is annotated twice; the first is json/a.json"
        ]

    def test_names_are_printed_on_one_line(self, folder, capsys):
        coco(folder, images=[{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b\n\x1b[2J\ud800.jpg"}])
        assert convert(source="instances.json") == 1
        (text,) = error_messages(capsys)
        assert "\x1b" not in text and "photograph" in text


class TestRefused:
    """Exit code 2, with one sentence."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--split", "1"], "split must be between 0 and 1, got 1"),
            (["--split", "nan"], "split must be between 0 and 1, got nan"),
            (["--workers", "0"], "--workers must be from 1 to 1024, got 0"),
            (["--stuff-classes", "cta"], "stuff classes: there is no class 'cta'; did you mean cat?"),
            (["--stuff-classes", "sky"], "stuff classes: there is no class 'sky'; the classes are cat"),
            (["--classes", "none.json"], "none.json: cannot be read: No such file or directory"),
            (["--classes", "dog"], None),
            (["--classes", "a,a"], "classes: two classes have the name 'a'"),
            (
                ["--classes", "3 car, 6 cat"],
                "classes: '3 car, 6 cat' is taken as names, numbered from 1; ids before names need a text file with "
                "a row per line",
            ),
            (["--background", "cat"], "background: 'cat' is a thing; name a stuff class, or a new one"),
            (["--instances", "none"], "instances: none: no such folder"),
            (["--format", "yolo"], "json: holds no label file (labels/*.txt)"),
            (["--format", "masks"], "json: holds no mask (.png, .tif, .tiff, .bmp, .pgm, .ppm, .webp)"),
            (["--format", "cvat"], "json/annotations.xml: cannot be read: No such file or directory"),
            (["--format", "coco-instances"], "json: holds no COCO file"),
        ],
    )
    def test_arguments(self, folder, capsys, arguments, message):
        labelme(folder)
        code = convert(*arguments)
        if message is None:
            assert code == 1  # the label is unknown, the image is converted
            return
        assert code == 2 and not (folder / "out").exists()
        (text,) = error_messages(capsys)
        assert message in text

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.zip", "PK", "is of no known format (coco-instances, labelme, cvat, masks, yolo); unpack it first"),
            ("x.csv", "a,b", "is of no known format"),
            ("x.json", "{", "x.json: line 1: is not JSON"),
            ("x.json", '{"images": 1, "annotations": []}', 'a COCO file is a mapping with the lists "images" and'),
            ("x.json", '{"images": [], "annotations": [{"segments_info": []}]}', "is a COCO panoptic file already"),
            ("x.json", '{"images": [], "annotations": []}', "x.json: has no class"),
            ("x.json", '{"images": [], "annotations": [], "categories": 3}', '"categories" must be a list, got 3'),
            ("x.json", '{"images": [], "annotations": [], "categories": [{}]}', 'with an "id", an integer from 0'),
            ("x.json", '{"images": [], "annotations": [], "categories": [{"id": 1}]}', "no image can be converted"),
            ("x.xml", "<annotations>", "x.xml: is not XML that can be read: no element found: line 1"),
            ("x.xml", "<html/>", "a CVAT file begins with <annotations>, this one with <html>"),
            ("x.xml", "<annotations><track/></annotations>", 'is "CVAT for video"; export it as "CVAT for images 1.1"'),
            ("x.xml", '<?xml version="1.0" encoding="zz"?><annotations/>', "is not XML that can be read"),
            ("x.yaml", "names: [", "x.yaml: is not YAML"),
            ("x.yaml", "names: 3", 'x.yaml: "names" must list the classes, got 3'),
            ("x.yaml", "names: [a, a]", "two classes have one name"),
        ],
    )  # fmt: skip
    def test_sources(self, folder, capsys, name, content, message):
        (folder / name).write_text(content)
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_text("")
        assert convert(source=name) == 2
        (text,) = error_messages(capsys)
        assert message in text and text.startswith(name)

    def test_absent_and_empty_sources(self, folder, capsys):
        assert convert(source="none") == 2
        assert error_messages(capsys) == ["none: no such file or folder"]
        (folder / "empty").mkdir()
        assert convert(source="empty") == 2
        (text,) = error_messages(capsys)
        assert text.startswith("empty: holds no annotation of a known format: JSON of COCO or LabelMe")

    def test_masks_without_class_list(self, folder, capsys):
        (folder / "masks").mkdir()
        cv2.imwrite("masks/a.png", np.array([[0, 3], [3, 7]], np.uint8))
        assert convert(source="masks") == 2
        assert error_messages(capsys) == ["masks: a.png holds the values 0, 3, 7; --classes must name the classes"]

    def test_outputs_that_cannot_be_written(self, folder, capsys):
        labelme(folder)
        (folder / "out").write_text("mine")
        assert convert() == 2
        (text,) = error_messages(capsys)
        assert text == "out: cannot be written: Not a directory" or text == "out: cannot be written: File exists"
        assert convert("--problems", "json/a.json") == 2 and (folder / "out").read_text() == "mine"

    def test_options_of_other_formats(self, folder, capsys):
        labelme(folder)
        for option in ("stuff", "instances"):
            assert convert(f"--{option}", "photos") == 2
        texts = error_messages(capsys)
        assert texts == [
            "stuff: is for the format coco-instances; json has the format labelme",
            "instances: is for the format masks; json has the format labelme",
        ]

    def test_absent_folder_of_photographs(self, folder, capsys):
        (folder / "annotations").mkdir()
        coco(folder).rename(folder / "annotations" / "instances.json")
        assert main(["dataset", "convert", "annotations", "--output", "out"]) == 2
        (text,) = error_messages(capsys)
        assert text.startswith("annotations: no image can be converted; the first problem: annotations/instances")
        assert text.endswith("; name the folder of the photographs by --images")

    def test_several_coco_files(self, folder, capsys):
        for name in ("train", "val"):
            coco(folder).rename(folder / f"{name}.json")
        assert convert(source=".") == 2
        assert error_messages(capsys) == [".: holds 2 COCO files (train.json, val.json); name one of them"]

    def test_several_formats_in_one_folder(self, folder, capsys):
        labelme(folder)
        (folder / "json" / "annotations.xml").write_text("<annotations/>")
        assert convert() == 2
        assert error_messages(capsys) == ["json: may be cvat or labelme; choose by --format"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("cat\n3 dog\n", "labels.txt: line 2: has another form than the lines before: '3 dog'"),
            ("300,0,0 cat\n", "line 1: colors are numbers from 0 to 255, got '300,0,0 cat'"),
            ("# nothing\n", "labels.txt: lists no class"),
            ("1 cat\n1 dog\n", "labels.txt: two classes have the id 1"),
        ],
    )
    def test_class_lists(self, folder, capsys, text, message):
        labelme(folder)
        (folder / "labels.txt").write_text(text)
        assert convert("--classes", "labels.txt") == 2
        (printed,) = error_messages(capsys)
        assert message in printed


def test_the_summary_of_a_conversion(folder, capsys):
    labelme(folder, {"label": "sky"}, {"shape_type": "line"})
    (folder / "photos" / "my photos").mkdir()
    assert convert() == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines() == [
        "format: labelme; photographs: photos",
        "things: cat, sky",
        "stuff: -",
        "segments: 1 things",
        "note: photographs in photos without annotation: 1",
        "note: shapes of kind line left out: 1",
        "note: the classes sky are taken as things; --stuff-classes sky makes them stuff",
        "note: classes are numbered in the order of the labels found; --classes out/panoptic.json gives those of a "
        "further source the same numbers",
        "out/panoptic.json: 1 image",
        "next: spatialflow dataset check out/panoptic.json --images photos --pictures examples.jpg",
    ]


class TestAnnotationsOfOtherFormats:
    """Commands that read a panoptic JSON name the conversion."""

    def commands(self, path):
        return [
            ["dataset", "check", path],
            ["validate", path],
            ["view", path, "--no-browser"],
            ["evaluate", path, "scenes"],
            ["train", "--images", "photos", "--annotations", path, "--output", "run"],
            ["train", "demo", "--images", "photos", "--annotations", path, "--output", "run"],
        ]

    @pytest.mark.parametrize("format", ["labelme", "coco-instances", "cvat", "yolo"])
    def test_folders(self, folder, capsys, format):
        {"labelme": labelme, "coco-instances": coco, "cvat": lambda f: cvat(f, "")}.get(format, str)(folder)
        if format == "yolo":
            (folder / "labels").mkdir()
            (folder / "data.yaml").write_text("names: [cat]")
        path = str(folder / "json" if format == "labelme" else folder)
        write_coco(folder / "scenes", 1, (64, 96))
        for command in self.commands(path):
            assert main(command) == 2
            (text,) = error_messages(capsys)
            assert text == (
                f"{path}: holds annotations of the format {format}; make a panoptic JSON of them first: "
                f"spatialflow dataset convert {path} --output mydata"
            )

    def test_a_file(self, folder, capsys):
        path = str(labelme(folder))
        for command in (["dataset", "check", path], ["view", path]):
            assert main(command) == 2
            (text,) = error_messages(capsys)
            assert text.startswith(f"{path}: holds annotations of the format labelme; make a panoptic JSON of them ")

    def test_validation_annotations(self, folder, capsys):
        labelme(folder)
        write_coco(folder / "scenes", 1, (64, 96))
        data = ["--images", "scenes/images", "--annotations", "scenes/panoptic.json", "--output", "run"]
        assert main(["train", *data, "--validation-images", "photos", "--validation-annotations", "json"]) == 2
        (text,) = error_messages(capsys)
        assert text.startswith("json: holds annotations of the format labelme; make a panoptic JSON of them first: ")

    def test_other_folders(self, folder, capsys):
        """Photographs, panoptic JSONs without PNGs, and pipes are not taken for annotations of other formats."""
        write_json(folder / "photos" / "x.json", {"annotations": [{"segments_info": []}]})
        os.mkfifo(folder / "photos" / "pipe.json")
        cv2.imwrite(str(folder / "photos" / "c.png"), np.zeros((4, 4), np.uint8))
        for command in self.commands("photos")[:3]:
            assert main(command) == 2
            (text,) = error_messages(capsys)
            assert text.startswith("photos: holds no panoptic.json, and there is no photos.json; give a panoptic JSON")


class TestLeftOutClasses:
    """Regions of labels that --classes does not name are counted; they are not problems."""

    TEXT = "left out, as --classes does not name them: "

    def test_labelme(self, folder, capsys):
        dogs = [{"label": "dog"}, {"label": "dog", "points": SQUARE[:2]}]
        labelme(folder, {}, {"label": "wall"}, *dogs)
        labelme(folder, {"label": "wall"}, {"label": "__ignore__"}, name="b")
        assert convert("--classes", "cat") == 0
        printed = capsys.readouterr()
        assert printed.err == "" and f"note: {self.TEXT}dog (2), wall (2)\n" in printed.out
        assert "left out: " not in printed.out
        assert len(json.loads((folder / "out" / "panoptic.json").read_text())["annotations"]) == 2

    def test_cvat(self, folder, capsys):
        cvat(folder, '<ellipse label="dog" cx="5" cy="5" rx="2" ry="2"/><polygon points="1,2;3,4;5,6"/>')
        assert convert("--classes", "cat", "--format", "cvat", source="annotations.xml") == 1
        printed = capsys.readouterr()
        assert printed.err.endswith("polygon 2: unknown class None\n") and f"note: {self.TEXT}dog (1)\n" in printed.out

    def test_many(self, folder, capsys):
        labelme(folder, {}, *[{"label": f"c{number:02}"} for number in range(40)], {"label": "c39"})
        assert convert("--classes", "cat") == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if self.TEXT in line]
        assert line.startswith(f"note: {self.TEXT}c39 (2), c00 (1), ") and line.endswith(", c28 (1), and 10 more")

    def test_all(self, folder, capsys):
        """A list without any of the labels is a problem."""
        labelme(folder, {}, {"label": "wall"})
        assert convert("--classes", "dog") == 1
        text = "there is no segment, and --classes does not name cat (1), wall (1)"
        assert error_messages(capsys) == [f"json: {text}"]


def kind_notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "taken as things" in line]


def test_things_with_names_of_stuff_are_named(folder, capsys):
    """Unless the user has said that they are things."""
    labels = ["cat", "building", "pole", "sign", "Traffic_Sign", "trees", "floor-wood", "traffic", "stop sign", "sky"]
    labelme(folder, *[{"label": label} for label in labels])
    assert convert("--stuff-classes", "sky,building") == 0
    names = "Traffic_Sign,floor-wood,pole,sign,trees"
    assert kind_notes(capsys) == [
        f"note: the classes {names} are taken as things; --stuff-classes sky,building,{names} makes them stuff"
    ]
    rows = [{"id": i, "name": name, "isthing": 1} for i, name in enumerate(labels, 1)]
    write_json(folder / "classes.json", rows)
    assert convert("--classes", "classes.json", "--stuff-classes", "sky") == 0
    assert kind_notes(capsys) == []


def test_names_with_blanks_are_quoted(folder, capsys):
    labelme(folder, {"label": "traffic sign"})
    assert convert() == 0
    (note,) = kind_notes(capsys)
    assert note.endswith("--stuff-classes 'traffic sign' makes them stuff")


def test_an_interrupted_conversion_says_what_exists(folder, capsys, monkeypatch):
    """Ctrl-C after the first of two images."""
    from spatialflow.data.convert import conversion

    labelme(folder)
    labelme(folder, name="b")
    compose, calls = conversion.compose, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compose(*arguments)

    monkeypatch.setattr(conversion, "compose", interrupted)
    assert convert("--workers", "1") == 130
    assert error_messages(capsys)[-1] == "interrupted: out has 1 of 2 images; the same command starts over"
    assert convert() == 0
    assert len(json.loads((folder / "out" / "panoptic.json").read_text())["images"]) == 2


def test_check_names_the_validation_set_of_a_split(folder, capsys):
    for name in ("a", "b"):
        labelme(folder, name=name)
    assert convert("--split", "0.5") == 0
    capsys.readouterr()
    assert main(["dataset", "check", "out/train.json", "--images", "photos"]) == 0
    training = "spatialflow train --images photos --annotations out/train.json"
    validation = "--validation-images photos --validation-annotations out/val.json"
    assert capsys.readouterr().out.splitlines()[-1] == f"next: {training} {validation} --output run"
    for arguments in (["out/val.json", "--images", "photos"], ["out/train.json"]):  # not to train on, or no photographs
        assert main(["dataset", "check", *arguments]) == 0
        assert "next: " not in capsys.readouterr().out
