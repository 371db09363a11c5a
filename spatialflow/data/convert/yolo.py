# SPDX-License-Identifier: Apache-2.0
"""YOLO segmentation: a text file per image, with a class and the points of a polygon in every line."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow.data.convert.shapes import Mask, ShapeError, polygon, rectangle
from spatialflow.data.convert.sources import (
    Class,
    Context,
    ConversionError,
    Item,
    Options,
    Region,
    Source,
    UnknownClassError,
    read_text,
)

FORMAT = "yolo"
_FARTHEST = 1.5  # coordinates are shares of the image; annotations at its border exceed 1 a little


def class_file(path: Path) -> Path | None:
    """Find the YAML with the class names: the file itself, or one in the folder or above it, preferably data.yaml."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return path
    for folder in (path, path.resolve().parent):
        found = sorted(p for suffix in ("yaml", "yml") for p in folder.glob(f"*.{suffix}"))
        named = [p for p in found if p.stem in ("data", "dataset")] or found
        if len(named) == 1:
            return named[0]
    return None


def label_files(path: Path) -> list[Path]:
    """List the text files in the folders `labels`, or all if the folder itself is one of labels."""
    found = [Path(root, f) for root, _, files in os.walk(path) for f in files if f.endswith(".txt")]
    in_labels = [file for file in found if "labels" in file.relative_to(path).parent.parts]
    return sorted(in_labels or [file for file in found if file.stem not in ("classes", "train", "val", "test")])


def open_source(path: Path, options: Options) -> Source:
    """List the label files and read the class names; ConversionError if either is absent."""
    root = path if os.path.isdir(path) else path.parent
    files = label_files(root)
    if not files:
        raise ConversionError(f"{root}: holds no label file (labels/*.txt)")
    classes = [*options.classes] if options.classes is not None else _classes(path)
    # A class list of the user is in the order of the numbers in the files.
    numbers = range(len(classes)) if options.classes is not None else [row.id - 1 for row in classes]
    names = {number: row.name for number, row in zip(numbers, classes, strict=True)}
    items = []
    for file in files:
        parts = file.relative_to(root).with_suffix(".jpg").parts
        name = "/".join("images" if part == "labels" else part for part in parts)
        items.append(Item(name, str(file), functools.partial(_regions, file, names)))
    images = root.parent / "images" if root.name == "labels" else root
    return Source(FORMAT, classes, items, [], smaller_on_top=True, images=images)


def _classes(path: Path) -> list[Class]:
    import yaml

    file = class_file(path)
    if file is None:
        raise ConversionError(f"{path}: has no data.yaml with the class names; --classes can name them")
    try:
        content: Any = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{file}: is not YAML: {' '.join(str(error).split()):.200}") from None
    names = content.get("names") if isinstance(content, dict) else None
    rows = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(rows, dict) or not rows or not all(type(n) is int and 0 <= n < 1 << 30 for n in rows):
        raise ConversionError(f'{file}: "names" must list the classes, got {names!r:.60}')
    texts = {number: str(name) for number, name in rows.items()}
    if len(set(texts.values())) < len(texts):
        raise ConversionError(f"{file}: two classes have one name in {sorted(texts.values())!r:.200}")
    return [Class(number + 1, name) for number, name in sorted(texts.items())]


def _regions(file: Path, names: Mapping[int, str], context: Context) -> list[Region]:
    try:
        lines = read_text(file).splitlines()
    except ConversionError as error:
        raise ShapeError(str(error)) from None
    return context.regions(
        (f"{file}: line {number}", functools.partial(_region, line.split(), names, context))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )


def _region(words: list[str], names: Mapping[int, str], context: Context) -> Region | None:
    if not words[0].isascii() or not words[0].isdigit() or len(words[0]) > 9 or int(words[0]) not in names:
        raise UnknownClassError(f"unknown class {words[0]!r:.60}; numbers of classes start at 0")
    category = context.class_of(names[int(words[0])])
    try:
        values = np.array([float(word) for word in words[1:]])
    except ValueError:
        raise ShapeError(f"coordinates must be numbers, got {' '.join(words)!r:.60}") from None
    if not np.all(np.abs(values) <= _FARTHEST):  # also for NaN
        wrong = values[~(np.abs(values) <= _FARTHEST)][0]
        raise ShapeError(f"coordinates are shares of the width and the height, 0 to 1, got {wrong:g}")
    mask = _mask(values, context)
    return None if mask is None else Region(category, mask)


def _mask(values: np.ndarray, context: Context) -> Mask | None:
    height, width = context.size
    if len(values) == 4:  # a box: center and size
        x, y, w, h = values * [width, height, width, height]
        return context.box(rectangle(x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    if len(values) % 2:
        raise ShapeError(f"a polygon has x and y of every point, got {len(values)} numbers")
    return polygon(values.reshape(-1, 2) * [width, height], context.size)
