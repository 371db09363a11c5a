# SPDX-License-Identifier: Apache-2.0
"""Shapes of annotation tools: the pixels of pycocotools and Pillow, and a sentence for every shape that is none."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from spatialflow.data.convert.shapes import (
    ShapeError,
    coco_rle,
    crop,
    ellipse,
    numbers,
    points_of,
    polygon,
    rectangle,
    runs,
    union,
)

coco_mask = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def whole(mask, size):
    image = np.zeros(size, bool)
    height, width = mask.bits.shape
    image[mask.top : mask.top + height, mask.left : mask.left + width] = mask.bits
    return image


def by_pycocotools(points, size):
    return coco_mask.decode(coco_mask.frPyObjects([np.ravel(points).tolist()], *map(int, size)))[..., 0].astype(bool)


@pytest.mark.parametrize("kind", ["any", "integers", "halves", "repeated", "outside", "tiny"])
def test_polygons_are_those_of_pycocotools(kind):
    """Most of these polygons intersect themselves, and reach beyond the image."""
    rng = np.random.default_rng(len(kind))
    for _ in range(60):
        size = tuple(rng.integers(1, 70, 2))
        points = rng.uniform(-0.3, 1.3, (rng.integers(3, 12), 2)) * size[::-1]
        if kind == "integers":
            points = np.round(points)
        elif kind == "halves":
            points = np.round(2 * points) / 2
        elif kind == "repeated":
            points[1] = points[0]
        elif kind == "outside":
            points = points * 2 - np.array(size[::-1]) / 2
        elif kind == "tiny":
            points = points / 20 + 5
        assert np.array_equal(whole(polygon(points, size), size), by_pycocotools(points, size)), points.tolist()


def test_a_rectangle_has_the_pixels_between_its_edges():
    image = np.zeros((20, 30), bool)
    image[3:17, 5:29] = True
    assert np.array_equal(whole(polygon(rectangle(5, 3, 29, 17), (20, 30)), (20, 30)), image)
    assert np.array_equal(whole(polygon(rectangle(5, 3, 29, 17, rotation=180), (20, 30)), (20, 30)), image)


def test_polygons_differ_from_those_of_pillow_at_the_outline_alone():
    """Pillow draws the outline too; inside it both agree."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = 40 + rng.uniform(10, 35, (9, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        inside, outline = Image.new("1", (80, 80)), Image.new("1", (80, 80))
        corners = [tuple(point) for point in points - 0.5]  # Pillow counts from the centers of pixels
        ImageDraw.Draw(inside).polygon(corners, fill=1)
        ImageDraw.Draw(outline).line([*corners, corners[0]], fill=1, width=3)
        differs = whole(polygon(points, (80, 80)), (80, 80)) != np.asarray(inside)
        assert not (differs & ~np.asarray(outline)).any()


def test_distant_points_are_cut_off():
    band = whole(polygon(np.array([[-9e5, 10], [9e5, 10], [9e5, 40], [-9e5, 40]]), (60, 50)), (60, 50))
    assert band[10:40].all() and not band[:10].any() and not band[40:].any()
    cone = whole(polygon(np.array([[25, 0], [1e6, 1e6], [-1e6, 1e6]], float), (50, 50)), (50, 50))
    assert np.array_equal(cone, by_pycocotools([[25, 0], [525, 500], [-475, 500]], (50, 50)))
    assert polygon(np.array([[1e5, 1e5], [2e5, 1e5], [2e5, 2e5]]), (50, 50)).bits.size == 0


def test_an_ellipse_has_its_area_and_center():
    mask = whole(polygon(ellipse(50, 40, 30, 20, rotation=90), (90, 100)), (90, 100))
    rows, columns = np.nonzero(mask)
    assert abs(mask.sum() / (np.pi * 600) - 1) < 0.01
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (30, 69, 10, 69)
    y, x = np.mgrid[:90, :100] + 0.5
    assert np.count_nonzero(mask != (((x - 50) / 20) ** 2 + ((y - 40) / 30) ** 2 < 1)) < 20


def test_rotation_is_clockwise():
    """CVAT turns boxes and ellipses clockwise: the upper left corner moves to the right."""
    corners = rectangle(0, 0, 10, 10, rotation=45)
    assert corners[0] == pytest.approx([5, 5 - 50**0.5])
    assert corners[0, 0] > rectangle(0, 0, 10, 10)[0, 0]


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(100):
        size = tuple(rng.integers(1, 60, 2).tolist())
        image = rng.random(size) < rng.choice([0, 0.02, 0.5, 0.98, 1])
        encoded = coco_mask.encode(np.asfortranarray(image.astype(np.uint8)))
        value = {"size": list(size), "counts": encoded["counts"].decode()}
        assert np.array_equal(whole(coco_rle(value, size), size), image)
        flat = image.T.ravel().astype(int)
        counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
        value["counts"] = [0] * int(flat[0]) + counts
        assert np.array_equal(whole(coco_rle(value, size), size), image)


def test_union_and_crop():
    image = np.zeros((9, 9), bool)
    assert crop(image).bits.size == 0 and union([]).area == 0
    image[2, 3] = image[7, 5] = True
    parts = [crop(image[:5]), crop(image[5:], top=5), crop(np.zeros((2, 2), bool))]
    assert (parts[1].left, parts[1].top) == (5, 7)
    assert np.array_equal(whole(union(parts), (9, 9)), image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polygon(np.zeros((2, 2)), (5, 5)), "a polygon needs at least 3 points, got 2"),
        (lambda: ellipse(1, 1, 0, 2), "radii must be positive, got 0 and 2"),
        (lambda: numbers("12", "x"), "x must be a list of numbers, got '12'"),
        (lambda: numbers([1, float("nan")], "x"), "x must be finite numbers up to a million, got nan"),
        (lambda: numbers([1, 10**400], "x"), "x must be finite numbers up to a million, got 1000"),
        (lambda: numbers([True], "x"), "got True"),
        (lambda: numbers(["1"], "x"), "got '1'"),
        (lambda: points_of([[1, 2], [3]]), r"points must be a list of pairs \[x, y\], got"),
        (lambda: coco_rle([1], (2, 2)), 'an RLE must be a mapping with "size" and "counts"'),
        (lambda: coco_rle({"size": [3, 2], "counts": [6]}, (2, 2)), r"size \[3, 2\], the image has \[2, 2\]"),
        (lambda: coco_rle({"size": [2, 2], "counts": [3]}, (2, 2)), "must add up to the number of pixels, 4, got 3"),
        (lambda: coco_rle({"size": [2, 2], "counts": [-1, 5]}, (2, 2)), "integers from 0 to the number of pixels, 4"),
        (lambda: coco_rle({"size": [2, 2], "counts": "\x7f"}, (2, 2)), "malformed compressed counts"),
        (lambda: coco_rle({"size": [2, 2], "counts": "3P"}, (2, 2)), "end within a number"),
        (lambda: coco_rle({"size": [2, 2], "counts": "P" * 99}, (2, 2)), "malformed compressed counts"),
        (lambda: runs(None, 4), "got None"),
    ],
)
def test_shapes_that_are_none(make, message):
    with pytest.raises(ShapeError, match=message):
        make()
