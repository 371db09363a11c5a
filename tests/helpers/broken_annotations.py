# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes whose annotations contradict each other, with the problem that `spatialflow validate` reports.

Each function of `BREAKS` modifies a `Broken` data set and returns the rule, the image, the segment and the value of the
reported problem.
"""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers.scenes import write_coco
from spatialflow.panoptic import read_id_map, write_id_map


@pytest.fixture(scope="session")
def valid_scenes(tmp_path_factory):
    """Write three scenes, which tests must not modify; return their folder."""
    return write_coco(tmp_path_factory.mktemp("scenes"), 3)


@pytest.fixture
def scenes_copy(valid_scenes, tmp_path):
    """Return a copy of `valid_scenes` for a test to damage."""
    return Path(shutil.copytree(valid_scenes, tmp_path / "scenes"))


class Broken:
    """A data set to modify: its second image, and the first large thing there away from the top left corner."""

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
ALONGSIDE = {  # rules of further problems that a modification causes
    "id_beyond_three_bytes": {"no-segment"},
    "id_negative": {"no-segment"},
    "id_true": {"no-segment"},
    "category_id_true": {"category-unknown"},
}
