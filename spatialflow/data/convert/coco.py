# SPDX-License-Identifier: Apache-2.0
"""COCO instances: a JSON with polygons and run-length encodings, and optionally PNGs of stuff classes."""

import functools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow.data.convert.classes import class_of_row
from spatialflow.data.convert.masks import class_regions, mask_files, read_mask
from spatialflow.data.convert.photographs import Photographs
from spatialflow.data.convert.shapes import ShapeError, coco_rle, numbers, polygon, rectangle, union
from spatialflow.data.convert.sources import (
    Class,
    Context,
    ConversionError,
    Item,
    Options,
    Problem,
    Region,
    Source,
    read_json,
    size_of,
    with_slashes,
)

FORMAT = "coco-instances"


def open_source(path: Path, options: Options) -> Source:
    """Read a COCO instances JSON; raise ConversionError if it is none."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(f), list) for f in ("images", "annotations")):
        raise ConversionError(f'{path}: a COCO file is a mapping with the lists "images" and "annotations"')
    annotations = content["annotations"]
    if annotations and isinstance(annotations[0], dict) and "segments_info" in annotations[0]:
        raise ConversionError(f"{path}: is a COCO panoptic file already; `spatialflow dataset check` examines it")
    problems: list[Problem] = []
    by_image: dict[Any, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for i, row in enumerate(annotations):
        image = row.get("image_id") if isinstance(row, dict) else None
        if type(image) not in (int, str):
            problems.append(Problem("annotation", f"{path}: annotations[{i}]: has no image_id, got {row!r:.80}"))
        else:
            by_image[image].append((f"{path}: annotations[{i}]", row))
    stuff = _StuffMasks(options.stuff) if options.stuff is not None else None
    items, seen = [], set()
    for i, row in enumerate(content["images"]):
        place = f"{path}: images[{i}]"
        image, name = (row.get("id"), row.get("file_name")) if isinstance(row, dict) else (None, None)
        if type(image) not in (int, str) or not isinstance(name, str) or not name:
            problems.append(Problem("image", f"{place}: must have an id and a file_name, got {row!r:.80}"))
        elif image in seen:
            problems.append(Problem("image", f"{place}: the id {image!r:.60} is listed twice"))
        else:
            seen.add(image)
            name = with_slashes(name)
            read = functools.partial(_regions, by_image.pop(image, []), stuff)
            items.append(Item(name, place, read, size_of(row.get("height"), row.get("width")), image))
    for image, rows in by_image.items():
        problems.append(
            Problem("image", f"{rows[0][0]}: image {image!r:.60} is not listed in images ({len(rows)} annotations)")
        )
    folder = path.parent / "images"
    images = folder if os.path.isdir(folder) else path.parent
    return Source(FORMAT, _classes(content, path, options), items, problems, smaller_on_top=True, images=images)


def _classes(content: Mapping[str, Any], path: Path, options: Options) -> list[Class]:
    """Return the file's categories, replaced and extended by those of the user's class list."""
    rows = content.get("categories", [])
    if not isinstance(rows, list):
        raise ConversionError(f'{path}: "categories" must be a list, got {rows!r:.60}')
    by_id: dict[int, Class] = {}
    for i, row in enumerate(rows):
        category = class_of_row(row, f"{path}: categories[{i}]")
        if category.id in by_id:
            raise ConversionError(f"{path}: categories[{i}]: the id {category.id} is listed twice")
        by_id[category.id] = category
    by_id |= {category.id: category for category in options.classes or ()}
    return list(by_id.values())


class _StuffMasks:
    """PNGs of stuff classes by the name of the photograph."""

    def __init__(self, folder: Path) -> None:
        mask_files(folder)  # there must be some
        self.folder = folder
        self._index = Photographs(folder, kind="mask")

    def path(self, name: str) -> Path:
        """Find the PNG of a photograph; ShapeError if there is none."""
        return self.folder / self._index.find(name)


def _regions(rows: Sequence[tuple[str, dict[str, Any]]], stuff: _StuffMasks | None, context: Context) -> list[Region]:
    regions = []
    if stuff is not None:
        mask, _ = read_mask(stuff.path(context.name), by_color=False)
        if mask.shape != context.size:
            raise ShapeError(f"the stuff PNG has {mask.shape[1]}x{mask.shape[0]} pixels, another size than the image")
        known = {row.id: row for row in context.classes.values() if not row.isthing}
        mask = np.where(np.isin(mask, list(known)), mask, 0)  # things come from the JSON
        regions = class_regions(mask, None, known, context, level=-1)
    return regions + context.regions((place, functools.partial(_region, row, context)) for place, row in rows)


def _region(row: Mapping[str, Any], context: Context) -> Region | None:
    label = row.get("category_id")
    if type(label) is not int:
        raise ShapeError(f"category_id must be an integer, got {label!r:.60}")
    category, crowd, segmentation = context.class_of(label), row.get("iscrowd", 0), row.get("segmentation")
    if crowd not in (0, 1):
        raise ShapeError(f"iscrowd must be 0 or 1, got {crowd!r:.60}")
    if isinstance(segmentation, dict):
        mask = coco_rle(segmentation, context.size)
    elif segmentation:
        if not isinstance(segmentation, list):
            raise ShapeError(f"segmentation must be a list of polygons or an RLE, got {segmentation!r:.60}")
        mask = union([polygon(_points(part), context.size) for part in segmentation])
    else:
        box = numbers(row.get("bbox"), "without segmentation, bbox")
        if len(box) != 4:
            raise ShapeError(f"bbox must be four numbers, got {len(box)}")
        drawn = context.box(rectangle(box[0], box[1], box[0] + box[2], box[1] + box[3]))
        if drawn is None:
            return None
        mask = drawn
    return Region(category, mask, crowd=bool(crowd and category.isthing))


def _points(part: Any) -> np.ndarray:
    values = numbers(part, "a polygon")
    if len(values) % 2:
        raise ShapeError(f"a polygon must have x and y of every point, got {len(values)} numbers")
    return values.reshape(-1, 2)
