# SPDX-License-Identifier: Apache-2.0
"""Folders of mask images: a class per pixel, and optionally the number of the object.

A gray or palette image holds class ids; a value from 1000 on is `1000 * class + instance`, as in Cityscapes. A color
image holds the colors of a class list. With a second folder, its images number the objects.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spatialflow.data.convert.photographs import Photographs
from spatialflow.data.convert.shapes import ShapeError, crop
from spatialflow.data.convert.sources import Class, Context, ConversionError, Item, Options, Region, Source
from spatialflow.panoptic.extents import extents, ids_of

FORMAT = "masks"
_LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".pgm", ".ppm", ".webp")
_NO_CLASS = (0, 255)  # values that need not be in the class list
_NO_COLOR = (0, 0xFFFFFF)
_NUMBERLESS = "things without object number, made crowds (see --instances and --stuff-classes)"
_SHOWN = 12


def mask_files(folder: Path) -> list[str]:
    """List the mask images below a folder, relative to it; of a Cityscapes tree, those with instances.

    Raises:
        ConversionError: there is none.
    """
    names = [name for name in Photographs(folder).names if name.lower().endswith(_LOSSLESS)]
    if not names:
        raise ConversionError(f"{folder}: holds no mask ({', '.join(_LOSSLESS)})")
    return [name for name in names if name.endswith("_instanceIds.png")] or names


def open_source(path: Path, options: Options) -> Source:
    """List the masks of a folder; raise ConversionError if there are none, or no class list was given."""
    if not os.path.isdir(path):
        raise ConversionError(f"{path}: masks are read from a folder")
    names = mask_files(path)
    if options.classes is None:
        raise ConversionError(f"{path}: {_found(path / names[0])}; --classes must name the classes")
    instances = None
    if options.instances is not None:
        mask_files(options.instances)
        instances = Photographs(options.instances, kind="mask")
    items = [
        Item(
            name,
            str(path / name),
            functools.partial(_regions, path, name, options.instances, instances, options.by_color),
            with_ending=True,
        )
        for name in names
    ]
    sibling = path.parent / "images"
    return Source(FORMAT, [*options.classes], items, [], False, sibling if os.path.isdir(sibling) else path)


def _found(path: Path) -> str:
    """Describe the values of one mask."""
    try:
        mask, is_color = read_mask(path, by_color=False)
    except ShapeError as error:
        return str(error)
    values = ids_of(mask)
    shown = [_hexadecimal(value) if is_color else str(value) for value in values[:_SHOWN].tolist()]
    return f"{path.name} holds the values {', '.join(shown)}{', ...' * (len(values) > _SHOWN)}"


def _hexadecimal(value: int) -> str:
    """Format red + 256 * green + 65536 * blue."""
    return f"#{value % 256:02x}{value // 256 % 256:02x}{value >> 16:02x}"


def read_mask(path: Path | BinaryIO, by_color: bool) -> tuple[np.ndarray, bool]:
    """Read a mask as (H, W) int64: the gray value, the index in the palette, or red + 256 * green + 65536 * blue.

    Args:
        path: the image, or an open file.
        by_color: read the colors of a palette image in place of its indices.

    Returns:
        The values, and whether they are colors.

    Raises:
        ShapeError: the file cannot be read, a value is beyond 24 bits, or the image is neither gray nor color.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode in ("P", "PA") and not by_color:
                pixels = np.asarray(image)
            else:
                pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "RGBA", "CMYK") else image)
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is no image, or is damaged"
        raise ShapeError(f"{path}: {reason}") from None
    if pixels.dtype.kind not in "iub" or pixels.ndim not in (2, 3):
        raise ShapeError(f"{path}: a mask must be gray or color, got {pixels.shape} {pixels.dtype}")
    values = pixels.astype(np.int64)
    if values.ndim == 3 and values.shape[2] < 3:  # gray or palette with transparency
        values = values[..., 0]
    if values.ndim == 3:
        return values[..., 0] + 256 * values[..., 1] + 65536 * values[..., 2], True
    if values.size and not 0 <= values.min() <= values.max() < 1 << 24:
        raise ShapeError(f"{path}: values must be from 0 to 2^24 - 1, got {values.min()} to {values.max()}")
    return values, False


def _regions(
    folder: Path,
    name: str,
    instance_folder: Path | None,
    instance_files: Photographs | None,
    by_color: bool,
    context: Context,
) -> list[Region]:
    path = folder / name
    mask, is_color = read_mask(path, by_color)
    _check_size(mask, path, context)
    instances = None
    if instance_folder is not None and instance_files is not None:
        instance_path = instance_folder / instance_files.find(context.name)
        instances, _ = read_mask(instance_path, by_color=False)
        _check_size(instances, instance_path, context)
    known: Mapping[int, Class] = {row.id: row for row in context.classes.values()}
    if is_color:
        known = {row.color[0] + 256 * row.color[1] + 65536 * row.color[2]: row for row in known.values() if row.color}
    elif instances is None:
        has_instance = mask >= 1000
        instances = np.where(has_instance, mask % 1000 + 1, 0)
        mask = np.where(has_instance, mask // 1000, mask)
    return class_regions(mask, instances, known, context, is_color=is_color)


def _check_size(mask: np.ndarray, path: Path, context: Context) -> None:
    if mask.shape != context.size:
        height, width = context.size
        raise ShapeError(f"{path}: has {mask.shape[1]}x{mask.shape[0]} pixels, the photograph {width}x{height}")


def class_regions(
    mask: np.ndarray,
    instances: np.ndarray | None,
    known: Mapping[int, Class],
    context: Context,
    *,
    level: int = 0,
    is_color: bool = False,
) -> list[Region]:
    """Make the regions of a map of classes and a map of objects.

    Args:
        mask: (H, W) int64 values of `known`. Other values become void; all but 0 and 255 are reported.
        instances: (H, W) int64 number of the object within its class, 0 for none; None: none anywhere.
        known: class by value.
        context: receives the report. Pixels of a thing class without object number become a crowd.
        level: of the regions.
        is_color: whether values are colors, for which 0 and 0xffffff are not reported.
    """
    offset = 1 << 26
    keys = mask if instances is None else mask + instances * offset
    regions = []
    for key, extent in extents(keys).items():
        number, value = divmod(key, offset)
        category = known.get(value)
        if category is None:
            if value not in (_NO_COLOR if is_color else _NO_CLASS):
                shown = _hexadecimal(value) if is_color else value
                text = f"{extent.pixels} pixels have the value {shown}, which is no class"
                context.report.add("class", f"{context.place}: {text}")
            continue
        part = keys[extent.y : extent.y + extent.height, extent.x : extent.x + extent.width] == key
        crowd = bool(category.isthing) and number == 0
        context.report.counts[_NUMBERLESS] += crowd
        regions.append(Region(category, crop(part, extent.x, extent.y), level, group=number or None, crowd=crowd))
    return regions


def has_masks(folder: Path) -> bool:
    """Tell whether a folder has images that may be masks."""
    return any(name.lower().endswith(".png") for _, _, files in os.walk(folder) for name in files)
