# SPDX-License-Identifier: Apache-2.0
"""Overlays: every segment visible and distinguishable, void unchanged, equal pictures for equal input."""

import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from spatialflow.panoptic import color_ids, color_of, overlay

CATEGORIES = [{"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]}, {"id": 7, "name": "sky", "isthing": 0}]


def scene(height=120, width=160):
    id_map = np.zeros((height, width), np.int32)
    id_map[: height // 2, : width // 2] = 3
    id_map[: height // 2, width // 2 :] = 9
    id_map[height // 2 :, : width // 2] = 4
    segments = [
        {"id": 3, "category_id": 1, "isthing": True, "score": 0.9},
        {"id": 9, "category_id": 1, "isthing": True, "score": 0.8},
        {"id": 4, "category_id": 7, "isthing": False, "score": None},
    ]
    return np.full((height, width, 3), 100, np.uint8), id_map, segments


def test_void_keeps_the_photograph_and_the_input_is_not_written():
    image, id_map, segments = scene()
    picture = overlay(image, id_map, segments, CATEGORIES, labels=False)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert (picture[id_map == 0] == 100).all()
    assert (image == 100).all()
    inner = [picture[20, 20], picture[20, 120], picture[90, 20]]
    for a, b in itertools.combinations([*inner, np.full(3, 100)], 2):
        assert np.abs(a.astype(int) - b).max() > 25


def test_same_arguments_same_picture_and_labels_appear():
    image, id_map, segments = scene()
    picture = overlay(image, id_map, segments, CATEGORIES)
    np.testing.assert_array_equal(picture, overlay(image, id_map, segments, CATEGORIES))
    plain = overlay(image, id_map, segments, CATEGORIES, labels=False)
    for y, x in ((30, 40), (30, 120), (90, 40)):
        region = np.s_[y - 20 : y + 20, x - 30 : x + 30]
        assert (picture[region] != plain[region]).any()
    np.testing.assert_array_equal(overlay(image, id_map, [], CATEGORIES), image)
    np.testing.assert_array_equal(overlay(image, id_map, [{"id": 77, "category_id": 1}]), image)


def test_a_label_is_white_text_on_a_dark_translucent_box():
    image, id_map, segments = scene()
    picture = overlay(image, id_map, segments, CATEGORIES).astype(int)
    plain = overlay(image, id_map, segments, CATEGORIES, labels=False).astype(int)
    color = np.array(color_of(7))[::-1]
    rows, columns = np.nonzero((picture != plain)[60:, :80].any(axis=-1))
    inside = rows.min() + 60 + 1, columns.min() + 3  # a pixel of the box, left of the letters
    np.testing.assert_allclose(picture[inside], plain[inside] * 50 / 255 + color / 4 * 205 / 255, atol=1.5)
    assert (picture[60:, :80].min(axis=-1) > 240).sum() > 5  # letters
    assert abs((rows.min() + rows.max()) / 2 - 30) < 3  # halfway between the segment's upper and lower border


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 100_000, "\u9053\u8def"])
def test_any_name(name):
    """A label that is larger than the picture is not drawn."""
    image, id_map, segments = scene()
    categories = [{**category, "name": name} for category in CATEGORIES]
    picture = overlay(image, id_map, segments, categories)
    plain = overlay(image, id_map, segments, categories, labels=False)
    assert (picture != plain).any() == (len(name) < 1000)


@pytest.mark.parametrize("base", [None, (220, 20, 60), (128, 128, 128)])
def test_instances_of_a_category_differ(base):
    colors = [np.array(color_of(1, index, base)) for index in range(8)]
    for a, b in itertools.combinations(colors, 2):
        assert np.abs(a - b).max() > 8
    assert all(((0 <= color) & (color <= 255)).all() for color in colors)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 400), (300, 1), (2, 2)])
def test_any_size(shape):
    image = np.zeros((*shape, 3), np.uint8)
    id_map = np.ones(shape, np.int64)
    assert overlay(image, id_map, [{"id": 1, "category_id": 1}], CATEGORIES).shape == image.shape


def test_errors():
    image, id_map, segments = scene()
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8"):
        overlay(image[..., 0], id_map, segments)
    with pytest.raises(ValueError, match=r"id_map must have the image's size \(120, 160\), got \(60, 160\)"):
        overlay(image, id_map[:60], segments)
    with pytest.raises(ValueError, match="opacity must lie in .0, 1., got 2"):
        overlay(image, id_map, segments, opacity=2)
    with pytest.raises(ValueError, match="opacity must lie in .0, 1., got 'half'"):
        overlay(image, id_map, segments, opacity="half")
    for base in ((1, 2), (1, 2, 3, 4), (300, 0, 0), (float("nan"), 0, 0), "red"):
        with pytest.raises(ValueError, match="base must be three numbers from 0 to 255, got "):
            color_of(1, base=base)
        with pytest.raises(ValueError, match="base must be three numbers from 0 to 255, got "):
            overlay(image, id_map, segments, [{**CATEGORIES[0], "color": base}])


@pytest.mark.parametrize("category_id", [10**400, -(10**400), -1], ids=["huge", "huge negative", "negative"])
def test_any_category_id(category_id):
    image, id_map, segments = scene()
    picture = overlay(image, id_map, [{**segment, "category_id": category_id} for segment in segments])
    assert (picture != image).any()
    assert color_of(category_id) != color_of(category_id + 1)


@pytest.mark.parametrize("count, least", [(12, 20), (20, 12), (40, 7)])
def test_colors_of_categories_differ_visibly(count, least):
    """With one lightness for all, 20 categories had two colors at a distance of 8 in CIELAB, and 40 at 3."""
    colors = np.array([[color_of(category_id) for category_id in range(1, count + 1)]], np.float32)
    lab = cv2.cvtColor(colors / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=2)
    assert distances[~np.eye(count, dtype=bool)].min() > least


@pytest.mark.parametrize("score", ["high", 10**400, [1], {}], ids=["text", "huge", "list", "mapping"])
def test_a_score_that_is_no_number_is_not_shown(score):
    image, id_map, segments = scene()
    expected = overlay(image, id_map, [{**segment, "score": None} for segment in segments])
    picture = overlay(image, id_map, [{**segment, "score": score} for segment in segments])
    np.testing.assert_array_equal(picture, expected)


def test_opacity_of_any_number_type():
    image, id_map, segments = scene()
    for opacity in (True, np.float32(0.5), np.int64(1)):
        expected = overlay(image, id_map, segments, opacity=float(opacity))
        np.testing.assert_array_equal(overlay(image, id_map, segments, opacity=opacity), expected)


def test_without_outlines_and_labels_each_segment_has_one_color():
    image, id_map, segments = scene()
    picture = overlay(image, id_map, segments, CATEGORIES, labels=False, outlines=False)
    for segment_id in (3, 9, 4):
        assert len(np.unique(picture[id_map == segment_id], axis=0)) == 1
    outlined = overlay(image, id_map, segments, CATEGORIES, labels=False)
    assert (outlined != picture).any() and (outlined[20, 20] == picture[20, 20]).all()


def test_a_pil_image_is_rgb():
    image, id_map, segments = scene()
    image[..., 0] = 200  # blue
    expected = overlay(image, id_map, segments, CATEGORIES)
    for mode in ("RGB", "RGBA"):
        photograph = Image.fromarray(image[..., ::-1].copy()).convert(mode)
        np.testing.assert_array_equal(overlay(photograph, id_map, segments, CATEGORIES), expected)
    rotated = Image.fromarray(image[..., ::-1].copy()).rotate(90, expand=True)
    rotated.getexif()[0x0112] = 6  # shown turned by 90 degrees to the right
    np.testing.assert_array_equal(overlay(rotated, id_map, segments, CATEGORIES), expected)


class TestLegend:
    def test_it_lists_the_categories_in_the_picture(self):
        """The picture stays as it is; swatches have the colors of the segments, the largest category first."""
        image, id_map, segments = scene()
        plain = overlay(image, id_map, segments, CATEGORIES)
        picture = overlay(image, id_map, segments, CATEGORIES, legend=True)
        legend = picture[120:]
        np.testing.assert_array_equal(picture[:120], plain)
        assert picture.shape[1] == 160 and (legend[0] == 255).all()
        line = legend[3 + 5]  # the middle of the first line of letters of 10 pixels
        first, second = (np.array(color_of(1, index, (220, 20, 60)))[::-1] for index in (0, 1))
        columns = [np.flatnonzero((line == color).all(axis=1)) for color in (first, second)]
        assert columns[0].min() == 3 and columns[1].min() == columns[0].max() + 1
        everything = legend.reshape(-1, 3)
        assert (everything == np.array(color_of(7))[::-1]).all(axis=1).sum() > 100
        only_sky = overlay(image, np.where(id_map == 4, 4, 0), segments, CATEGORIES, legend=True)[120:]
        assert not (only_sky == first).all(axis=-1).any()

    @pytest.mark.parametrize("width", [1, 30, 400])
    def test_many_and_long_names(self, width):
        """Names go to further lines where the picture is narrow; a long one is cut."""
        id_map = np.arange(40 * width).reshape(40, width) % 40 + 1
        segments = [{"id": i, "category_id": i} for i in range(1, 41)]
        categories = [{"id": i, "name": f"class\n{i} " + "x" * 10_000 * (i % 2)} for i in range(1, 41)]
        picture = overlay(np.zeros((40, width, 3), np.uint8), id_map, segments, categories, legend=True)
        present = min(40, 40 * width)
        assert picture.shape[1] == width and present / 8 * 16 < picture.shape[0] - 40 < 41 * 16 + 10

    def test_a_picture_without_segments_has_none(self):
        image, id_map, segments = scene()
        assert overlay(image, id_map, [], CATEGORIES, legend=True).shape == image.shape
        assert overlay(image[:0], id_map[:0], segments, legend=True).shape == (0, 160, 3)


class TestColorIds:
    def test_ids_are_the_colors_of_the_overlay(self):
        image, id_map, segments = scene()
        colored, renamed = color_ids(id_map, segments, CATEGORIES)
        assert colored.dtype == np.int32 and [row["score"] for row in renamed] == [0.9, 0.8, None]
        assert [row["id"] for row in segments] == [3, 9, 4]
        plain = overlay(image, id_map, segments, CATEGORIES, opacity=1, labels=False, outlines=False)
        for old, new in zip(segments, renamed, strict=True):
            blue, green, red = plain[id_map == old["id"]][0].tolist()
            assert new["id"] == red + 256 * green + 65536 * blue
            np.testing.assert_array_equal(colored == new["id"], id_map == old["id"])
        assert (colored[id_map == 0] == 0).all()
        assert renamed[0]["id"] == 220 + 256 * 20 + 65536 * 60  # the first instance has the category's color

    def test_ids_are_unique_and_never_void(self):
        """Categories of one color, of black and of white, and more instances than there are colors near theirs."""
        count = 3000
        colors = [[0, 0, 0], [0, 0, 0], [255, 255, 255], [255, 255, 255]]
        categories = [{"id": i, "isthing": 0, "color": color} for i, color in enumerate(colors, 1)]
        categories.append({"id": 5, "isthing": 1, "color": [9, 9, 9]})
        segments = [{"id": i + 1, "category_id": i % 5 + 1} for i in range(count)]
        colored, renamed = color_ids(np.arange(1, count + 1).reshape(50, -1), segments, categories)
        ids = [row["id"] for row in renamed]
        assert len(set(ids)) == count and min(ids) >= 1 and max(ids) < 2**24
        assert colored.ravel().tolist() == ids

    def test_nothing_to_color(self):
        colored, renamed = color_ids(np.full((2, 3), 8), [], CATEGORIES)
        assert not colored.any() and renamed == []
        assert color_ids(np.zeros((0, 3), int), [], None)[0].shape == (0, 3)


def test_old_name_is_deprecated():
    with pytest.warns(DeprecationWarning, match="colour_of is deprecated, use color_of"):
        from spatialflow.panoptic import colour_of
    assert colour_of is color_of
