# SPDX-License-Identifier: Apache-2.0
"""Colors of categories and segments, and segment ids that are colors, as in COCO's panoptic PNGs."""

import colorsys
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spatialflow.panoptic.extents import number_ids
from spatialflow.panoptic.rules import LARGEST_ID, VOID, is_color

_GOLDEN_RATIO_CONJUGATE = 0.618033988749895  # its multiples, modulo 1, spread the lightness evenly over [0, 1)
# Inverse roots of x^4 = x + 1 and x^3 = x + 1. Pairs of their multiples, modulo 1, spread evenly over a square.
_HUE_STEP, _LIGHTNESS_STEP = 0.8191725133961645, 0.7548776662466927


def color_of(category_id: int, index: int = 0, base: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Compute the color of a segment from its category and its number within the category.

    Args:
        category_id: the category's id.
        index: 0 for stuff and the first instance of a category in an image, then 1, 2, ...
        base: (red, green, blue) of the category, 0 to 255; None for one derived from the id.

    Returns:
        (red, green, blue), 0 to 255. With an index above 0, the hue is at most 36 degrees from that of the category,
        and the lightness varies with the index.

    Raises:
        ValueError: base is not three numbers from 0 to 255.
    """
    if base is None:
        number = category_id % 2**32
        hue, lightness, saturation = number * _HUE_STEP % 1.0, 0.3 + 0.48 * (number * _LIGHTNESS_STEP % 1.0), 0.65
    elif not is_color(base):
        raise ValueError(f"base must be three numbers from 0 to 255, got {base!r:.80}")
    else:
        hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in base))
    if index:
        # Lightness is a low-discrepancy sequence over a visible range. The hue alternates around that of the category.
        # Grays get some saturation, so that the hue is visible.
        lightness = 0.3 + 0.48 * ((lightness + index * _GOLDEN_RATIO_CONJUGATE) % 1.0)
        hue = (hue + (-1) ** index * 0.02 * (1 + index % 5)) % 1.0
        saturation = max(saturation, 0.45)
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def segment_colors(
    segments: Iterable[Mapping[str, Any]], categories: Iterable[Mapping[str, Any]] | None
) -> list[tuple[int, int, int]]:
    """Compute the color of every segment of an image, (red, green, blue), with `color_of`.

    Args:
        segments: mappings with `category_id` and optionally `isthing`.
        categories: mappings with `id` and optionally `color` and `isthing`, which is used for segments without it.

    Returns:
        A color per segment. Instances of a thing category are numbered in the order of the segments.

    Raises:
        ValueError: a color of a category is not three numbers from 0 to 255.
    """
    category_by_id = {category["id"]: category for category in categories or ()}
    colors = []
    last_index: dict[int, int] = {}
    for segment in segments:
        category_id = int(segment["category_id"])
        category = category_by_id.get(category_id, {})
        index = 0
        if segment.get("isthing", category.get("isthing")):
            index = last_index[category_id] = last_index.get(category_id, -1) + 1
        colors.append(color_of(category_id, index, category.get("color")))
    return colors


def free_id(color: tuple[int, int, int], taken: Container[int]) -> int:
    """Return the segment id that a color (red, green, blue) stands for; the next free number if it is 0 or taken."""
    red, green, blue = color
    segment_id = red + (green << 8) + (blue << 16)
    while segment_id == VOID or segment_id in taken:
        segment_id = segment_id % LARGEST_ID + 1
    return segment_id


def color_ids(
    id_map: np.ndarray, segments: Iterable[Mapping[str, Any]], categories: Iterable[Mapping[str, Any]] | None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Replace segment ids by the colors of the segments, so that a panoptic PNG can be looked at, as COCO's can.

    Args:
        id_map: (H, W) integer segment ids, 0 = void.
        segments: mappings with `id` and `category_id`; see `segment_colors` for further fields.
        categories: see `segment_colors`.

    Returns:
        (H, W) int32 map and copies of the segments, with ids red + 256 * green + 65536 * blue. Where that is 0 or
        the id of an earlier segment, it is the next free number. Ids that are not listed become 0. The same arguments
        give the same ids.

    Raises:
        ValueError: a color of a category is not three numbers from 0 to 255.
    """
    renamed = [dict(segment) for segment in segments]
    new_by_old: dict[int, int] = {}
    taken: set[int] = set()
    for segment, color in zip(renamed, segment_colors(renamed, categories), strict=True):
        new = free_id(color, taken)
        taken.add(new)
        new_by_old[int(segment["id"])] = segment["id"] = new
    ids, slots = number_ids(id_map)
    table = np.array([new_by_old.get(segment_id, VOID) for segment_id in ids.tolist()], np.int32)
    return table.take(slots), renamed
