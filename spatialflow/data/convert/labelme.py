# SPDX-License-Identifier: Apache-2.0
"""LabelMe: a JSON per image with polygons, rectangles, circles and masks."""

import base64
import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow.data.convert.classes import NO_CLASSES
from spatialflow.data.convert.masks import read_mask
from spatialflow.data.convert.shapes import Mask, ShapeError, crop, ellipse, points_of, polygon, rectangle
from spatialflow.data.convert.sources import (
    Context,
    ConversionError,
    Item,
    Options,
    Problem,
    Region,
    Source,
    numbered,
    read_json,
    size_of,
    with_slashes,
)

FORMAT = "labelme"


def files_of(path: Path) -> list[Path]:
    """List the JSON files of a folder and its sub-folders, or the file itself."""
    if not os.path.isdir(path):
        return [path]
    found = [Path(root, f) for root, _, files in os.walk(path) for f in files if f.lower().endswith(".json")]
    return sorted(found)


def open_source(path: Path, options: Options) -> Source:
    """Read the labels of all files; files that are damaged become problems."""
    items, problems, labels = [], [], set()
    folder = path if os.path.isdir(path) else path.parent
    for file in files_of(path):
        try:
            content = _load(file)
        except ConversionError as error:
            problems.append(Problem("file", str(error)))
            continue
        labels |= {shape["label"] for shape in content["shapes"] if isinstance(shape.get("label"), str)}
        name = content.get("imagePath")
        # `imagePath` is relative to the JSON, often with folders of the annotator's computer.
        stated = with_slashes(name) if isinstance(name, str) and name else f"{file.stem}.jpg"
        inner = [part for part in stated.split("/") if part not in (".", "..")]
        parts = [*file.relative_to(folder).parent.parts, *inner]
        size = size_of(content.get("imageHeight"), content.get("imageWidth"))
        items.append(Item("/".join(parts), str(file), functools.partial(_regions, file), size))
    names = sorted(labels - set(NO_CLASSES) - {""})
    classes = numbered(names, options)
    return Source(FORMAT, classes, items, problems, False, folder, found_classes=options.classes is None)


def _load(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ConversionError(f'{path}: a LabelMe file is a mapping with a list "shapes"')
    for i, shape in enumerate(content["shapes"]):
        if not isinstance(shape, dict):
            raise ConversionError(f"{path}: shapes[{i}]: must be a mapping, got {shape!r:.60}")
    return content


def _regions(path: Path, context: Context) -> list[Region]:
    try:
        shapes = _load(path)["shapes"]
    except ConversionError as error:
        raise ShapeError(str(error)) from None
    return context.regions(
        (f"{path}: shapes[{i}]", functools.partial(_region, shape, context)) for i, shape in enumerate(shapes)
    )


def _region(shape: Mapping[str, Any], context: Context) -> Region | None:
    kind, label = shape.get("shape_type") or "polygon", shape.get("label")
    if kind in ("point", "points", "line", "linestrip"):
        context.report.counts[f"shapes of kind {kind} left out"] += 1
        return None
    if label == "_background_":
        return None
    if not isinstance(label, str):
        raise ShapeError(f"label must be text, got {label!r:.60}")
    category = None if label == "__ignore__" else context.class_of(label)
    mask = _mask(kind, shape, context)
    group = shape.get("group_id")
    if type(group) not in (int, str, type(None)):
        raise ShapeError(f"group_id must be a number or null, got {group!r:.60}")
    return None if mask is None else Region(category, mask, group=group)


def _mask(kind: Any, shape: Mapping[str, Any], context: Context) -> Mask | None:
    points = points_of(shape.get("points"))
    if kind in ("polygon", "oriented_rectangle"):
        return polygon(points, context.size)
    if kind not in ("rectangle", "circle", "mask"):
        raise ShapeError(f"unknown shape_type {kind!r:.60}")
    if len(points) != 2 and not (kind == "rectangle" and len(points) == 4):
        raise ShapeError(f"a {kind} needs 2 points, got {len(points)}")
    if kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        return polygon(ellipse(points[0, 0], points[0, 1], radius, radius), context.size)
    if kind == "rectangle":
        return context.box(points if len(points) == 4 else rectangle(*points.ravel().tolist()))
    return _pixels(shape.get("mask"), points, context.size)


def _pixels(text: Any, points: np.ndarray, size: tuple[int, int]) -> Mask:
    """Decode a mask: a PNG in base64 whose first pixel is at the upper left of two points."""
    try:
        bits = read_mask(io.BytesIO(base64.b64decode(text, validate=True)), by_color=False)[0] > 0
    except (TypeError, ValueError):
        raise ShapeError(f'"mask" must be a PNG in base64, got {text!r:.40}') from None
    left, top = (round(value) for value in points.min(0).tolist())
    right, bottom = left + bits.shape[1], top + bits.shape[0]
    if left < 0 or top < 0 or right > size[1] or bottom > size[0]:
        raise ShapeError(f"the mask covers x {left} to {right} and y {top} to {bottom}, beyond the image")
    return crop(bits, left, top)
