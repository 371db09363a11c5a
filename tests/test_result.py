# SPDX-License-Identifier: Apache-2.0
"""`PanopticResult`: pictures, text, rows, saved folders, and the formats of other programs."""

import io
import json
import shutil
import threading
import types
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.scenes import write_coco
from PIL import Image

from spatialflow.cli.main import main
from spatialflow.data.categories import Categories
from spatialflow.engine import result as result_module
from spatialflow.engine.result import PanopticResult
from spatialflow.errors import DataWarning
from spatialflow.panoptic import PanopticFormatError, overlay, read_id_map, read_panoptic_json

ROWS = [
    {"id": 3, "name": "car", "isthing": 1, "color": [0, 0, 142]},
    {"id": 8, "name": "dog", "isthing": 1, "color": [220, 20, 60]},
    {"id": 20, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
]


def segment(segment_id, category_id, x, y, width, height, score=None):
    """Return a rectangular segment; with a score it is a thing."""
    area, box = width * height, [x, y, width, height]
    thing = int(score is not None)
    return {"id": segment_id, "category_id": category_id, "isthing": thing, "area": area, "bbox": box, "score": score}


SEGMENTS = [segment(1, 3, 2, 20, 10, 10, 0.9), segment(2, 3, 30, 20, 20, 10, 0.7), segment(3, 20, 0, 0, 64, 16)]


def make_result(segments=SEGMENTS, name="street.jpg", shape=(40, 64), detections=1, with_image=True, rows=ROWS):
    id_map = np.zeros(shape, np.int32)
    for row in segments:
        x, y, width, height = row["bbox"]
        id_map[y : y + height, x : x + width] = row["id"]
    boxes = np.array([[2, 20, 12, 30]] * detections, np.float32).reshape(-1, 4)
    logits = np.ones((detections, 8, 8), np.float32)
    scores, labels = np.full(detections, 0.9, np.float32), np.full(detections, 3, np.int64)
    image = np.full((*shape, 3), (10, 80, 160), np.uint8) if with_image else None
    categories = Categories(rows, has_other=False)
    return PanopticResult(id_map, [*segments], boxes, scores, labels, logits, 0.5, categories, name, {}, image)


@pytest.fixture
def without_package(monkeypatch):
    """Return a function that makes the import of a package fail."""

    def remove(name):
        real_import = result_module.importlib.import_module

        def fail(wanted, *arguments):
            if wanted == name:
                raise ModuleNotFoundError(f"No module named {wanted!r}")
            return real_import(wanted, *arguments)

        monkeypatch.setattr(result_module.importlib, "import_module", fail)

    return remove


class TestPictures:
    def test_overlay_needs_no_image(self):
        result = make_result()
        expected = overlay(result.image, result.id_map, result.segments, ROWS)
        assert np.array_equal(result.overlay(), expected) and np.array_equal(result.overlay(result.image), expected)
        other = np.full_like(result.image, 7)
        assert np.array_equal(result.overlay(other), overlay(other, result.id_map, result.segments, ROWS))
        plain = result.overlay(opacity=0, labels=False, outlines=False)
        assert np.array_equal(plain, result.image)

    def test_picture_is_rgb(self):
        """A BGR array and the PIL image of the same picture give the same overlay, in the order of each."""
        result = make_result(segments=[])
        picture = result.picture()
        assert picture.mode == "RGB" and picture.getpixel((5, 5)) == (160, 80, 10)
        photograph = Image.fromarray(np.full((40, 64, 3), (160, 80, 10), np.uint8))
        assert np.array_equal(result.overlay(photograph), result.overlay())
        assert result.picture(opacity=1.0, legend=True).size == (64, 40)  # nothing to list

    def test_a_dropped_image_is_asked_for(self):
        result = make_result()
        result.image = None
        with pytest.raises(ValueError, match=r"result.image is None.*pass it: result.overlay\(image\)"):
            result.overlay()
        with pytest.raises(ValueError, match="result.image is None"):
            result.picture(legend=True)
        assert result.overlay(np.zeros((40, 64, 3), np.uint8)).shape == (40, 64, 3)

    @pytest.mark.parametrize("with_image", [True, False])
    @pytest.mark.parametrize("shape", [(40, 64), (200, 3000), (2000, 40)])
    def test_a_notebook_shows_a_bounded_picture_with_a_legend(self, shape, with_image):
        result = make_result([segment(1, 20, 0, 0, shape[1] // 2, shape[0])], shape=shape, with_image=with_image)
        shown = Image.open(io.BytesIO(result._repr_png_()))
        scale = min(1, 960 / max(shape))
        assert shown.width == round(scale * shape[1]) and round(scale * shape[0]) < shown.height < 1100
        x, y = shown.width // 4, round(scale * shape[0]) - 3  # in the segment, away from its label
        red, green, blue = shown.convert("RGB").getpixel((max(x, 3), y))
        assert blue > green > red if not with_image else (red, green, blue) != (160, 80, 10)


class TestText:
    def test_print_lists_the_classes(self):
        expected = [
            "PanopticResult(street.jpg: 40 x 64, 3 segments, 1 detections)",
            "class   kind   segments  area %  best score",
            "sky     stuff         1    40.0           -",
            "car     thing         2    11.7        0.90",
            "(void)                     48.3",
        ]
        assert str(make_result()).splitlines() == expected and repr(make_result()) == str(make_result())

    def test_an_empty_result_and_many_classes(self):
        assert str(make_result([])).splitlines()[1:] == [
            "class   kind  segments  area %  best score",
            "(void)                   100.0",
        ]
        rows = [{"id": i, "name": f"class {i}", "isthing": 0} for i in range(1, 26)]
        segments = [segment(i, i, i - 1, 0, 1, i) for i in range(1, 26)]
        lines = str(make_result(segments, rows=rows)).splitlines()
        assert lines[2].startswith("class 25 ") and lines[-2].startswith("(void)")
        assert lines[-1] == "... and 5 more classes" and len(lines) == 24


class TestRows:
    def test_rows(self):
        first, second, third = make_result().rows()
        assert first == {
            "image": "street.jpg",
            "id": 1,
            "category_id": 3,
            "name": "car",
            "isthing": True,
            "score": 0.9,
            "area": 100,
            "share": 100 / 2560,
            "bbox": [2, 20, 10, 10],
        }
        assert third["score"] is None and third["isthing"] is False and second["share"] == 200 / 2560
        assert make_result([]).rows() == []

    def test_pandas_takes_the_rows(self):
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame(make_result().rows())
        assert table.groupby("name").area.sum().to_dict() == {"car": 300, "sky": 1024}

    def test_mask_of_a_segment(self):
        result = make_result()
        mask = result.mask(2)
        assert mask.dtype == bool and mask.sum() == 200 and mask[20:30, 30:50].all()
        assert result.mask(0).sum() == 40 * 64 - 1324
        with pytest.raises(ValueError, match=r"segment must be 0, one of \[1, 2, 3\] or the name of a class, got 7"):
            result.mask(7)

    def test_mask_of_a_class(self):
        result = make_result()
        assert (result.mask("car") == (result.mask(1) | result.mask(2))).all() and result.mask("car").sum() == 300
        with pytest.raises(ValueError, match="no class is named 'cars'; did you mean car?"):
            result.mask("cars")


class TestSave:
    def test_several_results_are_one_prediction(self, tmp_path, capsys):
        """Results saved one by one are what `evaluate` and `validate` read: here the ground truth itself."""
        truth = write_coco(tmp_path / "truth", 3, (64, 96))
        content = json.loads((truth / "panoptic.json").read_text())
        images = {row["id"]: row["file_name"] for row in content["images"]}
        for row in content["annotations"]:
            id_map = read_id_map(truth / "panoptic" / row["file_name"])
            result = make_result([], shape=id_map.shape, rows=content["categories"], name=images[row["image_id"]])
            isthing = {category["id"]: category["isthing"] for category in content["categories"]}
            result.id_map = id_map
            result.segments = [
                {**part, "isthing": isthing[part["category_id"]], "score": None} for part in row["segments_info"]
            ]
            png = result.save(tmp_path / "out")
            assert png == tmp_path / "out" / "panoptic" / row["file_name"]
            assert cv2.imread(str(tmp_path / "out" / "overlays" / f"{png.stem}.jpg")).shape == (64, 96, 3)
        assert main(["validate", str(tmp_path / "out")]) == 0
        assert main(["evaluate", str(truth / "panoptic.json"), str(tmp_path / "out")]) == 0
        assert "All         100.0" in capsys.readouterr().out

    def test_ids_are_colors(self, tmp_path):
        png = make_result().save(tmp_path)
        pixels = np.asarray(Image.open(png))
        assert tuple(pixels[5, 5]) == (70, 130, 180) and tuple(pixels[22, 4]) == (0, 0, 142)
        assert tuple(pixels[35, 60]) == (0, 0, 0)
        (annotation,) = read_panoptic_json(tmp_path / "panoptic.json", with_categories=True)["annotations"]
        assert annotation["segments_info"][2]["id"] == 70 + 256 * 130 + 65536 * 180
        assert len({row["id"] for row in annotation["segments_info"]}) == 3

    def test_a_name_gives_folders_and_ids(self, tmp_path):
        """Arrays have names by `name`; equal stems in two folders get different ids."""
        for name in ("a/000007.jpg", Path("b/000007.jpg"), "frankfurt_leftImg8bit.png"):
            make_result(name="image 0").save(tmp_path, name=name)
        content = read_panoptic_json(tmp_path / "panoptic.json")
        assert [row["id"] for row in content["images"]] == [7, "b/000007", "frankfurt"]
        assert content["images"][0]["file_name"] == "a/000007.jpg"
        assert (tmp_path / "panoptic/b/000007.png").is_file() and (tmp_path / "overlays/b/000007.jpg").is_file()

    def test_a_result_of_the_same_name_is_replaced_with_a_warning(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_result().save(tmp_path)
            make_result(name="other.jpg").save(tmp_path)
        with pytest.warns(DataWarning, match="has results of the same names, which are replaced"):
            make_result(SEGMENTS[:1]).save(tmp_path)
        content = read_panoptic_json(tmp_path / "panoptic.json")
        assert [row["file_name"] for row in content["images"]] == ["street.jpg", "other.jpg"]
        assert [len(row["segments_info"]) for row in content["annotations"]] == [1, 3]

    def test_without_the_image_no_picture_is_written(self, tmp_path):
        make_result(with_image=False).save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["panoptic", "panoptic.json"]

    @pytest.mark.parametrize("file", ["panoptic.json", "panoptic/street.png", "overlays/street.jpg"])
    def test_files_of_others_are_kept(self, tmp_path, file):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"images": []}')
        with pytest.raises(PanopticFormatError, match=f"{file}: would be changed, .*; use another folder$"):
            make_result().save(tmp_path)
        assert [path for path in tmp_path.rglob("*.*")] == [tmp_path / file]
        assert (tmp_path / file).read_text() == '{"images": []}'

    def test_other_categories_and_names_outside_are_refused(self, tmp_path):
        make_result().save(tmp_path)
        before = (tmp_path / "panoptic.json").read_bytes()
        with pytest.raises(PanopticFormatError, match="has results of other categories"):
            make_result(rows=[{**row, "name": "new"} for row in ROWS]).save(tmp_path)
        for name, words in (("../x.jpg", "inside the folder"), ("/x.jpg", "inside the folder"), ("", "a file name")):
            with pytest.raises(PanopticFormatError, match=words):
                make_result().save(tmp_path, name=name)
        assert (tmp_path / "panoptic.json").read_bytes() == before

    def test_a_failed_write_leaves_no_file_without_a_row(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        make_result().save(tmp_path)
        with monkeypatch.context() as context, pytest.raises(OSError, match="No space left"):
            context.setattr("spatialflow.panoptic.result_folder.atomic_write", fail)
            make_result(name="new.jpg").save(tmp_path)
        assert [path.name for path in (tmp_path / "panoptic").iterdir()] == ["street.png"]
        make_result(name="new.jpg").save(tmp_path)
        assert len(read_panoptic_json(tmp_path / "panoptic.json")["images"]) == 2

    @pytest.mark.parametrize("function", ["write_jpeg", "write_id_map", "atomic_write"])
    def test_a_result_that_cannot_be_replaced_is_kept(self, tmp_path, monkeypatch, function):
        """As on a full disk: all files are as before, and the next call succeeds."""

        def files():
            return {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

        def fail(*_):
            raise OSError(28, "No space left on device")

        make_result().save(tmp_path)
        before = files()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            patch.setattr(f"spatialflow.panoptic.result_folder.{function}", fail)
            make_result([segment(7, 3, 0, 0, 9, 9)]).save(tmp_path)
        assert files() == before
        make_result(name="b.jpg").save(tmp_path)
        assert len(files()) == 5

    def test_changes_by_others_are_seen(self, tmp_path):
        """A JSON that is not the one written last is read again; so is one of a folder that was removed."""
        make_result(name="a.jpg").save(tmp_path)
        kept = (tmp_path / "panoptic.json").read_text()
        make_result(name="b.jpg").save(tmp_path)
        (tmp_path / "panoptic.json").write_text(kept)
        (tmp_path / "panoptic" / "b.png").unlink()
        make_result(name="c.jpg").save(tmp_path)
        content = read_panoptic_json(tmp_path / "panoptic.json", with_categories=True)
        assert [row["file_name"] for row in content["images"]] == ["a.jpg", "c.jpg"]
        shutil.rmtree(tmp_path)
        make_result(name="d.jpg").save(tmp_path)
        assert len(read_panoptic_json(tmp_path / "panoptic.json")["images"]) == 1

    def test_threads_share_a_folder(self, tmp_path):
        results = [make_result(name=f"{i}.jpg") for i in range(12)]
        threads = [threading.Thread(target=result.save, args=(tmp_path,)) for result in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        names = {row["file_name"] for row in read_panoptic_json(tmp_path / "panoptic.json")["images"]}
        assert names == {f"{i}.jpg" for i in range(12)} == {f"{p.stem}.jpg" for p in (tmp_path / "panoptic").iterdir()}


class TestCoco:
    def test_content(self):
        content = json.loads(json.dumps(make_result(name="000012.jpg").to_coco()))
        assert content["images"] == [{"id": 12, "file_name": "000012.jpg", "height": 40, "width": 64}]
        (annotation,) = content["annotations"]
        assert annotation["file_name"] == "000012.png" and annotation["segments_info"] == SEGMENTS
        assert content["categories"] == ROWS
        (row,) = content["detections"]
        assert row["image_id"] == 12 and row["category_id"] == 3 and row["bbox"] == [2, 20, 10, 10]

    def test_masks_are_rle(self):
        coco_mask = pytest.importorskip("pycocotools.mask")
        result = make_result()
        (row,) = result.to_coco()["detections"]
        assert np.array_equal(coco_mask.decode(row["segmentation"]).astype(bool), result.masks[0])


class TestSupervision:
    def test_without_supervision_the_command_is_named(self, without_package):
        without_package("supervision")
        with pytest.raises(ImportError, match="needs the package supervision: pip install supervision"):
            make_result().to_supervision()

    def test_arguments(self, monkeypatch):
        """The arguments of `supervision.Detections`, with a module that returns them."""
        module = types.SimpleNamespace(Detections=dict)
        monkeypatch.setattr(result_module.importlib, "import_module", lambda name: {"supervision": module}[name])
        self.check(types.SimpleNamespace(**make_result().to_supervision()))
        empty = types.SimpleNamespace(**make_result([]).to_supervision())
        assert empty.xyxy.shape == (0, 4) and empty.mask.shape == (0, 40, 64) and empty.confidence.shape == (0,)

    def test_supervision(self):
        pytest.importorskip("supervision")
        self.check(make_result().to_supervision())
        assert len(make_result([]).to_supervision()) == 0
        assert len(make_result().to_supervision()[np.array([True, False, True])]) == 2

    def check(self, detections):
        assert detections.xyxy.tolist() == [[2, 20, 12, 30], [30, 20, 50, 30], [0, 0, 64, 16]]
        assert detections.mask.shape == (3, 40, 64) and detections.mask.dtype == bool
        assert detections.mask.sum(axis=(1, 2)).tolist() == [100, 200, 1024]
        np.testing.assert_allclose(detections.confidence, [0.9, 0.7, np.nan])
        assert detections.class_id.tolist() == [3, 3, 20]
        assert detections.data["class_name"].tolist() == ["car", "car", "sky"]
        assert detections.data["is_thing"].tolist() == [True, True, False]


def test_labelme():
    result = make_result()
    content = json.loads(json.dumps(result.to_labelme()))
    assert content["imagePath"] == "street.jpg" and (content["imageHeight"], content["imageWidth"]) == (40, 64)
    assert [shape["label"] for shape in content["shapes"]] == ["car", "car", "sky"]
    assert content["shapes"][0]["description"] == "score 0.9000" and content["shapes"][2]["description"] == ""
    assert content["shapes"][2]["points"] == [[0, 0], [0, 15], [63, 15], [63, 0]]
