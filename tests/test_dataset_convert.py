# SPDX-License-Identifier: Apache-2.0
"""Conversion of every format: exact maps of synthetic scenes, overlaps, classes, splits, and safe output."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
from helpers.annotation_formats import KINDS, NAMES, STUFF, Scenes, assert_same_maps, mutate, read_maps, write_json
from helpers.scenes import contents

from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.convert import ConversionError, to_panoptic
from spatialflow.data.convert.composing import compose
from spatialflow.data.convert.shapes import Mask
from spatialflow.data.convert.sources import Class, Region
from spatialflow.panoptic import validate

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return Scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def photographs(tmp_path):
    """Three gray photographs of 20 x 30 pixels: a.jpg, b.jpg and sub/c.png."""
    for name in ("a.jpg", "b.jpg", "sub/c.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((20, 30, 3), 99, np.uint8))
    return tmp_path / "photos"


def coco(folder, annotations, **fields):
    """Write a COCO file about a.jpg with the classes cat and sky."""
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 20, "width": 30}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "sky"}],
        "annotations": [{"image_id": 7, "category_id": 1, "iscrowd": 0} | row for row in annotations],
    }
    return write_json(folder / "instances.json", content | fields)


def box(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def labelme(folder, name, shapes, **fields):
    folder.mkdir(exist_ok=True)
    content = {"version": "5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.jpg"}
    return write_json(folder / f"{name}.json", content | {"imageHeight": 20, "imageWidth": 30} | fields)


def shape(label, *points, **fields):
    return {"label": label, "points": [list(point) for point in points], "shape_type": "polygon"} | fields


SQUARE = ((2, 2), (12, 2), (12, 12), (2, 12))


@pytest.mark.parametrize("format", ["auto", "named"])
@pytest.mark.parametrize("kind", KINDS)
def test_scenes_come_back(scenes, tmp_path, kind, format):
    source = scenes.write(kind, tmp_path / kind)
    before = contents(tmp_path / kind)
    given = kind if format == "named" else "auto"
    result = to_panoptic(source, tmp_path / "out", format=given, workers=2, **scenes.arguments(kind))
    assert (result.format, result.problems, result.image_counts) == (kind, [], [3])
    assert contents(tmp_path / kind) == before
    (path,) = result.json_paths
    assert path == tmp_path / "out" / "panoptic.json"
    checked = validate(path, images=scenes.images)
    assert checked.problems == [] and checked.images == 3
    maps = read_maps(path)
    if kind != "yolo":
        assert_same_maps(maps, scenes.maps)
        return
    for name, (ids, categories) in maps.items():  # each run of pixels is an object
        truth, classes = scenes.maps[name]
        assert np.array_equal(np.vectorize({0: 0, **categories}.get)(ids), np.vectorize({0: 0, **classes}.get)(truth))


def test_the_result_can_be_trained_on(scenes, tmp_path):
    from spatialflow.data.categories import Categories

    source = scenes.write("masks", tmp_path / "masks")
    result = to_panoptic(source, tmp_path / "out", **scenes.arguments("masks"))
    data = CocoPanoptic(result.json_paths[0], scenes.images, None, Categories(result.categories, False), scored=True)
    assert len(data) == 3 and data[0].image.shape[:2] == (48, 64)


def test_coco_polygons_are_those_of_pycocotools(photographs, tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(5)
    parts = [(rng.uniform(-4, 34, (6, 2))).ravel().tolist() for _ in range(2)]
    path = coco(tmp_path, [{"segmentation": parts}])
    to_panoptic(path, tmp_path / "out", photographs)
    ((ids, categories),) = read_maps(tmp_path / "out" / "panoptic.json").values()
    rle = coco_mask.merge(coco_mask.frPyObjects(parts, 20, 30))
    assert np.array_equal(ids > 0, coco_mask.decode(rle).astype(bool)) and list(categories.values()) == [1]


@pytest.mark.parametrize(("on_top", "visible"), [("auto", 1), ("smaller", 1), ("later", 0)])
def test_a_smaller_object_is_on_top_in_coco(photographs, tmp_path, on_top, visible):
    rows = [{"segmentation": [box(4, 4, 9, 9)]}, {"segmentation": [box(0, 0, 20, 20)]}]
    result = to_panoptic(coco(tmp_path, rows), tmp_path / "out", photographs, on_top=on_top)
    ((ids, _),) = read_maps(result.json_paths[0]).values()
    assert len(np.unique(ids)) == 2 + visible and np.count_nonzero(ids) == 400
    assert ("segments hidden by others: 1" in result.notes) == (not visible)


def test_objects_cover_crowds_and_crowds_cover_stuff(photographs, tmp_path):
    rows = [
        {"segmentation": [box(0, 0, 9, 9)]},
        {"segmentation": {"size": [20, 30], "counts": [0, 200, 400]}, "iscrowd": 1},
        {"segmentation": [box(0, 0, 5, 5)], "category_id": 5},
    ]
    result = to_panoptic(coco(tmp_path, rows), tmp_path / "out", photographs, stuff_classes=["sky"])
    content = json.loads(result.json_paths[0].read_text())
    segments = {s["category_id"] + 10 * s["iscrowd"]: s["area"] for s in content["annotations"][0]["segments_info"]}
    assert segments == {1: 81, 11: 200 - 81}
    assert content["annotations"][0]["image_id"] == 7
    assert [c["isthing"] for c in content["categories"]] == [1, 0] and result.segments == {"things": 1, "crowds": 1}


def test_stuff_masks_lie_below_coco_objects(photographs, tmp_path):
    (tmp_path / "stuff").mkdir()
    mask = np.full((20, 30), 5, np.uint8)
    mask[:, 20:] = 1  # a thing class: not taken from here
    mask[0, 29] = 77
    cv2.imwrite(str(tmp_path / "stuff" / "a.png"), mask)
    path = coco(tmp_path, [{"segmentation": [box(0, 0, 10, 10)]}])
    result = to_panoptic(path, tmp_path / "out", photographs, stuff=tmp_path / "stuff", stuff_classes=["sky"])
    ((ids, categories),) = read_maps(result.json_paths[0]).values()
    assert sorted(categories.values()) == [1, 5] and np.count_nonzero(ids) == 400
    assert np.count_nonzero(ids == next(n for n, c in categories.items() if c == 1)) == 100


def test_background_fills_void(photographs, tmp_path):
    path = coco(tmp_path, [{"segmentation": [box(0, 0, 10, 10)]}])
    result = to_panoptic(path, tmp_path / "out", photographs, background="other")
    assert result.categories[-1]["name"] == "other" and result.categories[-1]["id"] == 6
    ((ids, categories),) = read_maps(result.json_paths[0]).values()
    assert sorted(categories.values()) == [1, 6] and (ids > 0).all()
    with pytest.raises(ConversionError, match="background: 'cat' is a thing"):
        to_panoptic(path, tmp_path / "out", photographs, background="cat")


def test_boxes_are_left_out_unless_they_are_filled(photographs, tmp_path):
    path = coco(tmp_path, [{"segmentation": [], "bbox": [1, 2, 10, 5]}])
    result = to_panoptic(path, tmp_path / "out", photographs)
    assert "boxes left out: 1" in result.notes and result.segments == {} and result.problems == []
    result = to_panoptic(path, tmp_path / "out", photographs, fill_boxes=True)
    ((ids, _),) = read_maps(result.json_paths[0]).values()
    assert (ids[2:7, 1:11] > 0).all() and np.count_nonzero(ids) == 50


def test_labelme_shapes(photographs, tmp_path):
    shapes = [
        shape("sky", (0, 0), (30, 0), (30, 20), (0, 20)),
        shape("cat", *SQUARE, group_id=1),
        shape("cat", (20, 2), (25, 2), (25, 7), group_id=1),  # a further part of the same object
        shape("cat", (15, 15), (18, 15), shape_type="circle"),
        shape("__ignore__", (0, 18), (30, 18), (30, 20), (0, 20)),
        shape("cat", (1, 1), shape_type="point"),
        shape("cat", (1, 1), (5, 5), shape_type="rectangle"),
    ]
    labelme(tmp_path / "json", "a", shapes, imagePath="C:\\Users\\me\\photos\\A.JPG")
    result = to_panoptic(tmp_path / "json", tmp_path / "out", photographs, stuff_classes=["sky"])
    assert result.problems == [] and result.segments == {"things": 2, "stuff": 1}
    assert {"boxes left out: 1", "shapes of kind point left out: 1"} <= set(result.notes)
    ((name, (ids, categories)),) = read_maps(result.json_paths[0]).items()
    assert name == "a.jpg" and ids[18:].max() == 0 and ids[5, 5] == ids[4, 23] != ids[14, 15]
    assert sorted(categories.values()) == [1, 1, 2]


def test_later_shapes_of_labelme_are_on_top(photographs, tmp_path):
    labelme(tmp_path / "json", "a", [shape("cat", *SQUARE), shape("dog", (0, 0), (30, 0), (30, 20), (0, 20))])
    for on_top, things in (("auto", 1), ("smaller", 2)):
        result = to_panoptic(tmp_path / "json", tmp_path / "out", photographs, on_top=on_top)
        assert result.segments == {"things": things}


def test_cvat_shapes(photographs, tmp_path):
    xml = """<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>
    <meta><job><labels><label><name>dog</name><color>#ff8000</color></label><label><name>cat</name></label></labels></job></meta>
    <image id="0" name="sub\\c.png" width="30" height="20">
      <polygon label="cat" source="manual" points="0.00,0.00;10.00,0.00;10.00,10.00;0.00,10.00" z_order="1"/>
      <polygon label="dog" points="5,0;20,0;20,10;5,10" z_order="0" group_id="3"/>
      <ellipse label="dog" cx="25" cy="15" rx="3" ry="2" group_id="3"/>
      <box label="cat" xtl="1" ytl="11" xbr="4" ybr="15" rotation="90"/>
      <polyline label="cat" points="1,2;3,4"/>
    </image></annotations>"""
    (tmp_path / "annotations.xml").write_text(xml)
    result = to_panoptic(tmp_path / "annotations.xml", tmp_path / "out", photographs)
    assert result.problems == [] and result.segments == {"things": 2}
    assert next((c["id"], c["name"], c["color"]) for c in result.categories) == (1, "dog", [255, 128, 0])
    assert {"boxes left out: 1", "shapes of kind polyline left out: 1"} <= set(result.notes)
    ((name, (ids, categories)),) = read_maps(result.json_paths[0]).items()
    assert name == "sub/c.png" and categories[ids[5, 7]] == 2 and ids[5, 15] == ids[15, 25] != ids[5, 7]


def test_semantic_and_instance_masks(photographs, tmp_path):
    semantic, instances = np.zeros((2, 20, 30), np.uint8)
    semantic[:10], semantic[10:, :20] = 3, 1
    instances[10:, :10], instances[10:, 10:15] = 1, 2
    for folder, mask in (("semantic", semantic), ("instances", instances)):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / f"a_{folder}.png"), mask)
    (tmp_path / "labels.txt").write_text("1 cat\n3 sky\n")
    result = to_panoptic(
        tmp_path / "semantic",
        tmp_path / "out",
        photographs,
        instances=tmp_path / "instances",
        classes=tmp_path / "labels.txt",
        stuff_classes=["sky"],
    )
    assert result.problems == [] and result.segments == {"things": 2, "stuff": 1, "crowds": 1}
    assert "things without object number, made crowds (see --instances and --stuff-classes): 1" in result.notes
    assert list(read_maps(result.json_paths[0])) == ["a.jpg"]


@pytest.mark.parametrize("palette", [False, True])
def test_masks_by_color(photographs, tmp_path, palette):
    """The export "Segmentation mask" of CVAT: colors, which labelmap.txt lists."""
    from PIL import Image

    mask = np.zeros((20, 30, 3), np.uint8)
    mask[:10], mask[12:] = (128, 0, 0), (0, 128, 255)
    (tmp_path / "masks").mkdir()
    image = Image.fromarray(mask)
    (image.quantize(4) if palette else image).save(tmp_path / "masks" / "a.png")
    text = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\nsky:0,128,255::\n"
    (tmp_path / "labelmap.txt").write_text(text)
    result = to_panoptic(
        tmp_path / "masks", tmp_path / "out", photographs, classes=tmp_path / "labelmap.txt", stuff_classes=["sky"]
    )
    assert result.problems == [] and result.segments == {"stuff": 1, "crowds": 1}
    assert [row["color"] for row in result.categories] == [[128, 0, 0], [0, 128, 255]]


def test_yolo_lines(photographs, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("names: {0: cat, 2: sky}\n")
    (tmp_path / "labels" / "a.txt").write_text("0 0 0 0.5 0 0.5 1 0 1\n2 0.5 0 1 0 1 1\n\n0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "labels" / "b.txt").write_text("")
    result = to_panoptic(tmp_path, tmp_path / "out", photographs, format="yolo", stuff_classes=["sky"])
    assert result.problems == [] and result.segments == {"things": 1, "stuff": 1}
    assert {"boxes left out: 1", "images without a segment: 1"} <= set(result.notes)
    assert f"photographs in {photographs} without annotation: 1" in result.notes
    ids, categories = read_maps(result.json_paths[0])["a.jpg"]
    assert (ids[:, :15] > 0).all() and sorted(categories.values()) == [1, 3]


def test_the_split_does_not_depend_on_order_and_threads(scenes, tmp_path):
    many = Scenes(tmp_path / "many", count=10, size=(32, 40))
    source = many.write("labelme", tmp_path / "json")
    result = to_panoptic(source, tmp_path / "out", many.images, split=0.7, workers=1)
    assert result.image_counts == [7, 3] and [p.name for p in result.json_paths] == ["train.json", "val.json"]
    assert_same_maps(
        read_maps(result.json_paths[0]) | read_maps(result.json_paths[1]),
        {name: (ids, {n: sorted(NAMES.values()).index(NAMES[c]) + 1 for n, c in categories.items()})
         for name, (ids, categories) in many.maps.items()},
    )  # fmt: skip
    first = contents(tmp_path / "out")
    to_panoptic(source, tmp_path / "out", many.images, split=0.7, workers=4)
    assert contents(tmp_path / "out") == first
    to_panoptic(source, tmp_path / "out", many.images, split=0.7, seed=1)
    assert contents(tmp_path / "out").keys() != first.keys() or contents(tmp_path / "out") != first


def test_a_repeated_run_replaces_its_own_files_alone(photographs, tmp_path):
    folder = tmp_path / "json"
    for name in ("a", "b"):
        labelme(folder, name, [shape("cat", *SQUARE)])
    out = tmp_path / "out"
    to_panoptic(folder, out, photographs)
    (out / "notes.txt").write_text("mine")
    (out / "panoptic" / "mine.png").write_text("mine")
    (folder / "b.json").unlink()
    to_panoptic(folder, out, photographs)
    assert sorted(contents(out)) == ["notes.txt", "panoptic.json", "panoptic/a.png", "panoptic/mine.png"]


def test_files_of_others_are_not_replaced(photographs, tmp_path):
    labelme(tmp_path / "json", "a", [shape("cat", *SQUARE)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "panoptic.json").write_text('{"annotations": []}')
    with pytest.raises(ConversionError, match="panoptic.json: would be replaced, and was not written by"):
        to_panoptic(tmp_path / "json", out, photographs)
    (out / "panoptic.json").unlink()
    (out / "panoptic").mkdir()
    (out / "panoptic" / "a.png").write_text("mine")
    with pytest.raises(ConversionError, match="panoptic: exists, and was not written by"):
        to_panoptic(tmp_path / "json", out, photographs)
    shutil.copytree(tmp_path / "json", tmp_path / "train")
    with pytest.raises(ConversionError, match="train: is an input and would be replaced"):
        to_panoptic(tmp_path / "train", tmp_path, photographs, split=0.5)
    assert sorted(contents(out)) == ["panoptic/a.png"]


def test_a_failed_run_starts_over(photographs, tmp_path, monkeypatch):
    for name in ("a", "b"):
        labelme(tmp_path / "json", name, [shape("cat", *SQUARE)])

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_panoptic(tmp_path / "json", tmp_path / "out", photographs, progress=stop)
    assert len(json.loads((tmp_path / "out" / "panoptic.json").read_text())["images"]) == 1
    result = to_panoptic(tmp_path / "json", tmp_path / "out", photographs)
    assert result.image_counts == [2] and validate(result.json_paths[0]).problems == []


def test_photographs_turned_by_exif(tmp_path):
    """Sizes are those of the picture as it is shown and as training reads it."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(tmp_path / "photos" / "a.jpg", exif=exif)
    labelme(tmp_path / "json", "a", [shape("cat", *SQUARE)])  # 20 rows, 30 columns
    result = to_panoptic(tmp_path / "json", tmp_path / "out", tmp_path / "photos")
    assert result.problems == [] and validate(result.json_paths[0], images=tmp_path / "photos").problems == []


def test_photographs_beside_annotations_and_outputs(tmp_path):
    """The folder of photographs may hold the annotations, the output, and links to other folders."""
    folder = tmp_path / "train"
    labelme(folder, "a", [shape("cat", *SQUARE)])
    labelme(folder, "b", [shape("cat", *SQUARE)])
    (tmp_path / "elsewhere").mkdir()
    for path in (folder / "a.jpg", tmp_path / "elsewhere" / "b.jpg"):
        cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    for _ in range(2):  # the PNGs of the first run are no photographs in the second one
        result = to_panoptic(folder, tmp_path, tmp_path)
        names = list(read_maps(result.json_paths[0]))
        assert result.problems == [] and names == ["train/a.jpg", "elsewhere/b.jpg"]
        assert f"photographs in {tmp_path} without annotation" not in " ".join(result.notes)
        (folder / "link").unlink(missing_ok=True)


def test_names_that_share_a_stem(tmp_path):
    for name in ("x/a.jpg", "y/a.jpg", "a.png", "a.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    for number, name in enumerate(("x/a.jpg", "..\\photos\\y\\a.jpg", "a.png", "a.jpg", "z/other.jpg")):
        labelme(tmp_path / "json", f"{number}", [shape("cat", *SQUARE)], imagePath=name)
    result = to_panoptic(tmp_path / "json", tmp_path / "out", tmp_path / "photos")
    content = json.loads(result.json_paths[0].read_text())
    assert [row["file_name"] for row in content["images"]] == ["x/a.jpg", "y/a.jpg", "a.png", "a.jpg"]
    assert (
        len({row["id"] for row in content["images"]}) == len({row["file_name"] for row in content["annotations"]}) == 4
    )
    (problem,) = result.problems
    assert "4.json: has no photograph 'z/other.jpg' in" in problem.text


def test_compose_gives_colors_near_the_class():
    cat, sky = Class(1, "cat", True, (200, 10, 10)), Class(2, "sky", False, (200, 10, 10))
    bits = np.ones((2, 2), bool)
    regions = [Region(category, Mask(2 * i, 0, bits)) for i, category in enumerate((cat, cat, sky, sky))]
    regions.append(Region(None, Mask(0, 0, np.ones((1, 1), bool))))
    ids, segments, hidden = compose(regions, (3, 8), smaller_on_top=False)
    first = 200 + 256 * 10 + 65536 * 10
    assert ids[0, 1] == first and ids[0, 0] == ids[2, 0] == 0 and hidden == 0
    assert ids[0, 4] == ids[0, 6] == first + 1  # the color of the first cat is taken
    assert [(s["category_id"], s["area"], s["bbox"]) for s in segments] == [
        (1, 3, [0, 0, 2, 2]),
        (1, 4, [2, 0, 2, 2]),
        (2, 8, [4, 0, 4, 2]),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_never_raise_other_errors(tmp_path, kind):
    scenes = Scenes(tmp_path, count=2, size=(32, 40))
    source = scenes.write(kind, tmp_path / "source")
    rng = np.random.default_rng(len(kind))
    files = sorted(path for path in (tmp_path / "source").rglob("*") if path.is_file())
    good = {
        path: b"\n".join(path.read_bytes().split(b"\n")[:30]) if kind == "yolo" else path.read_bytes() for path in files
    }
    for path, content in good.items():
        path.write_bytes(content)
    outcomes = set()
    for _ in range(25):
        path = files[rng.integers(len(files))]
        path.write_bytes(mutate(good[path], rng))
        try:
            result = to_panoptic(source, tmp_path / "out", format=kind, workers=1, **scenes.arguments(kind))
        except ConversionError as error:
            assert os.fspath(tmp_path) in str(error)
            outcomes.add("refused")
        else:
            assert all(str(tmp_path) in problem.text for problem in result.problems)
            outcomes.add("problems" if result.problems else "converted")
        path.write_bytes(good[path])
    assert len(outcomes) > 1, outcomes


def test_stuff_names_of_the_scenes_are_used(scenes, tmp_path):
    source = scenes.write("cvat", tmp_path / "cvat")
    result = to_panoptic(source, tmp_path / "out", scenes.images, stuff_classes=STUFF)
    assert_same_maps(
        read_maps(result.json_paths[0]),
        {
            name: (ids, {n: list(NAMES).index(c) + 1 for n, c in found.items()})
            for name, (ids, found) in scenes.maps.items()
        },
    )
