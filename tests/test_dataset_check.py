# SPDX-License-Identifier: Apache-2.0
"""`spatialflow dataset check`: the table of classes, the notes, and the sheet of examples."""

import json

import cv2
import numpy as np
import pytest
from helpers.annotation_formats import write_json
from helpers.scenes import write_coco

from spatialflow.cli.main import main
from spatialflow.data.survey import advice, survey


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), 5, (64, 96))


def test_check_prints_a_table_and_draws_examples(data, tmp_path, capsys):
    picture = tmp_path / "examples.jpg"
    code = main(
        ["dataset", "check", str(data / "panoptic.json"), "--images", str(data / "images"), "--pictures", str(picture)]
    )
    printed = capsys.readouterr()
    assert code == 0 and printed.err == ""
    lines = printed.out.splitlines()
    content = json.loads((data / "panoptic.json").read_text())
    segments = [segment for row in content["annotations"] for segment in row["segments_info"]]
    for row, line in zip(content["categories"], lines[1:], strict=False):
        areas = [segment["area"] for segment in segments if segment["category_id"] == row["id"]]
        words = line.split()
        assert words[:4] == [str(row["id"]), row["name"], "thing" if row["isthing"] else "stuff", str(len(areas))]
        assert line.endswith(f"{np.median(areas):,.0f} px" if areas else "-")
        assert f"{100 * sum(areas) / (5 * 64 * 96):.2f} %" in line
    assert "sizes (width x height): 96x64 (5)" in lines
    assert f"{picture}: 5 examples" in lines
    assert lines[-2] == f"{data / 'panoptic.json'}: 5 images, {len(segments)} segments: clean"
    paths = f"--images {data / 'images'} --annotations {data / 'panoptic.json'}"
    assert lines[-1] == f"next: spatialflow train {paths} --output run"
    image = cv2.imread(str(picture))
    assert image.shape[1] > 4 * 320 and 2 * 240 < image.shape[0] < 3 * 240  # two rows of up to four
    assert image.std() > 20


def test_check_reports_the_problems_of_validate(data, tmp_path, capsys):
    content = json.loads((data / "panoptic.json").read_text())
    content["annotations"][1]["segments_info"][0]["id"] = 4242
    content["annotations"][2]["file_name"] = "none.png"
    path = write_json(tmp_path / "panoptic.json", content)
    code = main(["dataset", "check", str(path), "--folder", str(data / "panoptic")])
    out = capsys.readouterr().out
    assert code == 1 and "no-pixels" in out and "no-segment" in out and "none.png" in out
    assert out.splitlines()[-1].endswith(" segments: 3 problems")
    assert main(["dataset", "check", str(tmp_path / "none.json")]) == 2
    assert main(["dataset", "check", str(path), "--pictures", str(tmp_path / "x.tiff")]) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("color", [0, 0, [1]]), ("color", "red"), ("name", 3), ("name", None), ("isthing", "x")]
)
def test_check_draws_malformed_annotations(data, tmp_path, field, value):
    content = json.loads((data / "panoptic.json").read_text())
    content["categories"][0][field] = value
    content["annotations"][0]["segments_info"][0]["id"] = value
    del content["annotations"][1]["segments_info"][0]["id"]
    path, picture = write_json(tmp_path / "panoptic.json", content), tmp_path / "x.jpg"
    assert main(["dataset", "check", str(path), "--folder", str(data / "panoptic"), "--pictures", str(picture)]) == 1
    assert picture.stat().st_size > 5000


def test_advice(tmp_path):
    (tmp_path / "panoptic").mkdir()
    from spatialflow.panoptic import PanopticWriter

    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "dog", "isthing": 1}]
    with PanopticWriter(tmp_path / "panoptic", categories=categories) as writer:
        small = np.zeros((2700, 30), np.int32)
        small[:12, :12] = 1
        writer.add(1, "a.jpg", small, [{"id": 1, "category_id": 1}])
        writer.add(2, "b.jpg", np.zeros((40, 30), np.int32), [])
    result = survey(tmp_path / "panoptic.json")
    assert result.sizes == {(2700, 30): 1, (40, 30): 1} and [row["name"] for row in result.examples] == ["a.jpg"]
    texts = advice(result)
    assert texts == [
        "1 class has no example: dog",
        "1 class is in fewer than 10 images: cat",
        "1 image has no segment: b.jpg",
        "there is no stuff: pixels outside objects are void, and nothing is learned there; `dataset convert "
        "--background NAME` makes them a class",
        "1 of 1 things (100.0 %) are smaller than 8 x 8 pixels once images are reduced to at most 800 x 1333",
        "image sizes vary greatly: the longer side has 40 to 2700 pixels; a crop or one size for all makes batches "
        "even",
        "1 image is more than twice as large as networks see (800 x 1333); smaller copies make reading faster, and "
        "tiles keep small objects",
    ]


def test_check_counts_small_things_at_the_size_of_a_default_run(tmp_path, capsys):
    """12 x 12 pixels of 480 x 640 are seen by a large network, but are less than 8 x 8 at 256 x 341."""
    from spatialflow.panoptic import PanopticWriter

    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    with PanopticWriter(tmp_path / "panoptic", categories=categories) as writer:
        for number in range(10):
            ids = np.full((480, 640), 2, np.int32)
            ids[:12, :12] = 1
            rows = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
            if number == 0:
                ids[20:23, 20:23] = 3
                rows.append({"id": 3, "category_id": 1})
            writer.add(number, f"{number}.jpg", ids, rows)
    assert main(["dataset", "check", str(tmp_path / "panoptic.json")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: 11 of 11 things (100.0 %) are smaller than 8 x 8 pixels once images are reduced to at most 256 x 341, "
        "which `train` chooses on its own; at 800 x 1333 it is 1 (9.1 %)"
    ]


def test_examples_show_rare_classes(tmp_path):
    from spatialflow.panoptic import PanopticWriter

    categories = [{"id": i, "name": f"c{i}", "isthing": 1} for i in (1, 2, 3)]
    with PanopticWriter(tmp_path / "panoptic", categories=categories) as writer:
        for number in range(40):
            ids = np.ones((4, 4), np.int32)
            ids[:2] = 2
            rare = {17: 2, 23: 3}.get(number, 1)
            writer.add(number, f"{number}.jpg", ids, [{"id": 1, "category_id": 1}, {"id": 2, "category_id": rare}])
    names = [row["name"] for row in survey(tmp_path / "panoptic.json", examples=5).examples]
    assert len(set(names)) == 5 and {"17.jpg", "23.jpg"} <= set(names)
    assert len(survey(tmp_path / "panoptic.json").examples) == 16
