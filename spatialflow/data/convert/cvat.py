# SPDX-License-Identifier: Apache-2.0
"""CVAT for images 1.1: one XML with polygons, masks, ellipses and boxes."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from spatialflow.data.convert.shapes import Mask, ShapeError, crop, ellipse, numbers, polygon, rectangle, runs
from spatialflow.data.convert.sources import (
    Class,
    Context,
    ConversionError,
    Item,
    Options,
    Problem,
    Region,
    Source,
    size_of,
    with_slashes,
)

FORMAT = "cvat"
_KINDS = ("polygon", "mask", "ellipse", "box")
_OTHER_KINDS = ("polyline", "points", "cuboid", "skeleton", "tag")

_Shape = tuple[str, str, dict[str, str]]  # location, kind, attributes


def open_source(path: Path, options: Options) -> Source:
    """Read an XML; ConversionError if it is malformed, or of another kind."""
    file = path / "annotations.xml" if os.path.isdir(path) else path
    items: list[Item] = []
    problems: list[Problem] = []
    labels: dict[str, tuple[int, int, int] | None] = {}
    used: set[str] = set()
    listed = False
    try:
        events = ElementTree.iterparse(file, ("start", "end"))
        _, root = next(events)
        if root.tag != "annotations":
            raise ConversionError(f"{file}: a CVAT file begins with <annotations>, this one with <{root.tag:.40}>")
        for event, element in events:
            if event == "start":
                continue
            if element.tag == "track":
                raise ConversionError(f'{file}: is "CVAT for video"; export it as "CVAT for images 1.1"')
            if element.tag == "meta":
                for label in element.iter("label"):
                    name = label.findtext("name")
                    if name:
                        labels[name], listed = _color(label.findtext("color")), True
            elif element.tag == "image":
                _add_image(element, file, len(items) + len(problems), items, problems, used)
                root.clear()
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also of unknown encodings
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{file}: is not XML that can be read: {error}") from None
    if not listed:
        labels = dict.fromkeys(sorted(used))
    classes = [Class(number, name, None, color) for number, (name, color) in enumerate(labels.items(), start=1)]
    folder = file.parent / "images"
    images = folder if os.path.isdir(folder) else file.parent
    found = not listed and options.classes is None
    return Source(FORMAT, [*(options.classes or classes)], items, problems, False, images, found_classes=found)


def _color(text: str | None) -> tuple[int, int, int] | None:
    match = re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text or "")
    return (int(match[1], 16), int(match[2], 16), int(match[3], 16)) if match else None


def _add_image(
    element: ElementTree.Element, file: Path, index: int, items: list[Item], problems: list[Problem], used: set[str]
) -> None:
    name = element.get("name")
    place = f"{file}: image {index} ({name})"
    if not name:
        problems.append(Problem("image", f"{place}: has no name"))
        return
    shapes: list[_Shape] = []
    for i, child in enumerate(element):
        if child.tag in _KINDS or child.tag in _OTHER_KINDS:
            attributes = dict(child.attrib)
            shapes.append((f"{place}: {child.tag} {i}", child.tag, attributes))
            if child.tag in _KINDS and attributes.get("label"):
                used.add(attributes["label"])
        else:
            problems.append(Problem("shape", f"{place}: unknown shape <{child.tag:.40}>"))
    sides = [int(text) if re.fullmatch("[0-9]{1,9}", text) else None for text in (element.get(s, "") for s in _SIDES)]
    items.append(Item(with_slashes(name), place, functools.partial(_regions, shapes), size_of(*sides)))


_SIDES = ("height", "width")


def _regions(shapes: Sequence[_Shape], context: Context) -> list[Region]:
    return context.regions(
        (place, functools.partial(_region, kind, attributes, context)) for place, kind, attributes in shapes
    )


def _region(kind: str, attributes: dict[str, str], context: Context) -> Region | None:
    if kind in _OTHER_KINDS:
        context.report.counts[f"shapes of kind {kind} left out"] += 1
        return None
    category = context.class_of(attributes.get("label"))
    mask = _mask(kind, attributes, context)
    if mask is None:
        return None
    level = _integers(attributes.get("z_order", "0"), "z_order")
    if len(level) != 1 or abs(level[0]) > 1e9:
        raise ShapeError(f"z_order must be one integer, got {attributes['z_order']!r:.40}")
    return Region(category, mask, level[0], group=attributes.get("group_id"))


def _mask(kind: str, attributes: dict[str, str], context: Context) -> Mask | None:
    if kind == "polygon":
        texts = [text for text in attributes.get("points", "").split(";") if text.strip()]
        if any(text.count(",") != 1 for text in texts):
            raise ShapeError(f'points must be "x,y;x,y;...", got {attributes.get("points", "")!r:.60}')
        return polygon(_floats(",".join(texts), "points").reshape(-1, 2), context.size)
    rotation = float(_floats(attributes.get("rotation", "0"), "rotation", 1)[0])
    if kind == "box":
        x1, y1, x2, y2 = (_number(attributes, name) for name in ("xtl", "ytl", "xbr", "ybr"))
        return context.box(rectangle(x1, y1, x2, y2, rotation))
    if kind == "ellipse":
        x, y, rx, ry = (_number(attributes, name) for name in ("cx", "cy", "rx", "ry"))
        return polygon(ellipse(x, y, rx, ry, rotation), context.size)
    left, top, width, height = (_integer(attributes, name) for name in ("left", "top", "width", "height"))
    if min(left, top) < 0 or min(width, height) < 1 or left + width > context.size[1] or top + height > context.size[0]:
        text = f"x {left} to {left + width} and y {top} to {top + height}"
        raise ShapeError(f"the mask covers {text}, beyond the image of {context.size[1]}x{context.size[0]}")
    bits = runs(_integers(attributes.get("rle", ""), "rle"), width * height)
    return crop(bits.reshape(height, width), left, top)


def _floats(text: str, name: str, count: int | None = None) -> np.ndarray:
    try:
        values = [float(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise ShapeError(f"{name} must be numbers, got {text!r:.60}") from None
    if count is not None and len(values) != count:
        raise ShapeError(f"{name} must be one number, got {text!r:.60}")
    return numbers(values, name)


def _number(attributes: dict[str, str], name: str) -> float:
    return float(_floats(attributes.get(name, ""), name, 1)[0])


def _integers(text: str, name: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?[0-9]{1,10}", part) for part in parts):
        raise ShapeError(f"{name} must be integers, got {text!r:.60}")
    return [int(part) for part in parts]


def _integer(attributes: dict[str, str], name: str) -> int:
    values = _integers(attributes.get(name, ""), name)
    if len(values) != 1:
        raise ShapeError(f"{name} must be one integer, got {attributes[name]!r:.60}")
    return values[0]
