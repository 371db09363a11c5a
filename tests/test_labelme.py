# SPDX-License-Identifier: Apache-2.0
"""Polygons of LabelMe files: filled as LabelMe fills them, they give the map again."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from spatialflow.panoptic.labelme import labelme_content, polygons_of


def filled(shape, polygons):
    """Fill polygons as `labelme.utils.shape_to_mask` does."""
    mask = Image.fromarray(np.zeros(shape, np.uint8))
    for polygon in polygons:
        assert len(polygon) > 2  # LabelMe refuses others
        ImageDraw.Draw(mask).polygon([tuple(point) for point in polygon], outline=1, fill=1)
    return np.asarray(mask).astype(bool)


def ring():
    mask = np.zeros((30, 40), bool)
    mask[2:28, 3:37] = True
    mask[8:14, 8:14] = mask[16:24, 10:20] = mask[5:25, 25:33] = False
    mask[10:20, 28:30] = True  # an island in the third hole
    return mask


def blobs(seed):
    """Return smooth noise above a threshold: parts and holes of many forms."""
    noise = np.random.default_rng(seed).normal(size=(60, 80))
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-2, 3))
    return noise > 0


@pytest.mark.parametrize("mask", [ring(), *map(blobs, range(4)), np.ones((5, 7), bool)])
def test_polygons_give_the_mask_again(mask):
    assert np.array_equal(filled(mask.shape, polygons_of(mask)), mask)


def test_parts_and_holes():
    polygons = polygons_of(ring())
    assert len(polygons) == 2  # the ring, and the island in its hole
    assert polygons_of(np.zeros((4, 4), bool)) == []


@pytest.mark.parametrize("pixels", [([3], [4]), ([3, 3], [4, 5]), ([2, 3], [2, 3])])
def test_parts_without_area_have_three_points(pixels):
    mask = np.zeros((6, 8), bool)
    mask[pixels] = True
    (polygon,) = polygons_of(mask)
    assert len(polygon) >= 3 and np.array_equal(filled(mask.shape, [polygon]), mask)


def test_tolerance_saves_points():
    mask = np.hypot(*np.mgrid[-50:51, -50:51]) < 45
    exact, rough = polygons_of(mask)[0], polygons_of(mask, 1.0)[0]
    assert len(rough) < len(exact) / 3
    difference = filled(mask.shape, [rough]) ^ mask
    assert 0 < difference.sum() < 0.03 * mask.sum()


def content_of(id_map, segments, **options):
    return labelme_content(id_map, segments, {7: "tree"}, "a/photo.jpg", **options)


def test_content():
    """Several parts share a group; names, ids and points are of the types that LabelMe checks."""
    id_map = np.zeros((30, 40), np.int32)
    id_map[5:10, 5:10] = id_map[20:25, 30:35] = 4
    id_map[15:18, 2:6] = 9
    segments = [{"id": 4, "category_id": 7, "score": None}, {"id": 9, "category_id": 8}, {"id": 5, "category_id": 7}]
    content = json.loads(json.dumps(content_of(id_map, segments)))
    assert [(shape["label"], shape["group_id"]) for shape in content["shapes"]] == [("tree", 4), ("tree", 4), ("8", 9)]
    again = np.zeros_like(id_map)
    for shape in content["shapes"]:
        assert shape["shape_type"] == "polygon" and shape["flags"] == {} and shape["mask"] is None
        assert all(type(value) is float for point in shape["points"] for value in point)
        again[filled(id_map.shape, [shape["points"]])] = shape["group_id"]
    assert np.array_equal(again, id_map)
    assert content["imagePath"] == "a/photo.jpg" and content["imageData"] is None


def test_a_negative_tolerance_is_refused():
    for tolerance in (-1, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be at least 0 pixels, got "):
            content_of(np.zeros((3, 3), np.int32), [], tolerance=tolerance)
