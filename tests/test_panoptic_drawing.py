# SPDX-License-Identifier: Apache-2.0
"""Overlays: every segment visible and distinguishable, void unchanged, equal pictures for equal input."""

import itertools

import numpy as np
import pytest

from spatialflow.panoptic import color_of, overlay

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


def test_old_name_is_deprecated():
    with pytest.warns(DeprecationWarning, match="colour_of is deprecated, use color_of"):
        from spatialflow.panoptic import colour_of
    assert colour_of is color_of
