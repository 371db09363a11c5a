# SPDX-License-Identifier: Apache-2.0
"""From regions that may overlap to a map of segments."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from spatialflow.data.convert.sources import Class, Region
from spatialflow.panoptic.colors import color_of, free_id
from spatialflow.panoptic.extents import extents, ids_of
from spatialflow.panoptic.rules import VOID


def compose(
    regions: Sequence[Region], size: tuple[int, int], smaller_on_top: bool, background: Class | None = None
) -> tuple[np.ndarray, list[dict[str, Any]], int]:
    """Paint regions over each other, from the bottom to the top.

    A region of a higher `level` covers one of a lower level. Among equal levels, the later region is on top; or, with
    `smaller_on_top`, first stuff, then crowds, then objects, each from the largest to the smallest. All regions of a
    stuff class become one segment, as do regions of one class and group.

    Args:
        regions: in the order of the source.
        size: (height, width) of the image.
        smaller_on_top: whether the order of the source has no meaning.
        background: stuff class of the pixels outside all regions; None: they are void.

    Returns:
        The map (H, W) int32, its segments, and the number of segments that others cover wholly. An id is the color in
        which the segment appears in the PNG, close to that of its class.
    """
    order = list(range(len(regions)))
    if smaller_on_top:
        order.sort(key=lambda i: (regions[i].level, _layer(regions[i]), -regions[i].mask.area))
    else:
        order.sort(key=lambda i: regions[i].level)
    painted = np.zeros(size, np.int32)
    if background is not None:
        painted[:] = len(regions) + 1
    for i in order:
        mask = regions[i].mask
        height, width = mask.bits.shape
        painted[mask.top : mask.top + height, mask.left : mask.left + width][mask.bits] = i + 1
    keys = [_key(region, i) for i, region in enumerate(regions)]
    extra = [] if background is None else [(background.id, "stuff")]
    present = set(ids_of(painted).tolist())
    ids = np.zeros(len(regions) + 2, np.int32)
    id_by_key: dict[Any, int] = {}
    row_by_id: dict[int, dict[str, Any]] = {}
    last_index: Counter[int] = Counter()
    for number, key in enumerate([*keys, *extra], start=1):
        if key is None or number not in present:
            continue
        if key not in id_by_key:
            region = regions[number - 1] if number <= len(regions) else None
            category = background if region is None else region.category
            assert category is not None
            color = color_of(category.id, last_index[category.id], category.color)
            segment_id = free_id(color, row_by_id)
            last_index[category.id] += 1
            id_by_key[key] = segment_id
            crowd = int(region is not None and region.crowd)
            row_by_id[segment_id] = {"id": segment_id, "category_id": category.id, "iscrowd": crowd}
        ids[number] = id_by_key[key]
    id_map = ids[painted]
    for number, extent in extents(id_map).items():
        if number != VOID:
            row_by_id[number] |= {"area": extent.pixels, "bbox": extent.box}
    hidden = len({key for key in keys if key is not None} - id_by_key.keys())
    return id_map, list(row_by_id.values()), hidden


def _layer(region: Region) -> int:
    if region.category is None or not region.category.isthing:
        return 0
    return 1 if region.crowd else 2


def _key(region: Region, index: int) -> Any:
    """Return what regions of one segment have in common; None for void."""
    if region.category is None:
        return None
    if not region.category.isthing:
        return region.category.id, "stuff"
    return region.category.id, region.crowd, ("group", region.group) if region.group is not None else index
