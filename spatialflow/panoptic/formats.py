# SPDX-License-Identifier: Apache-2.0
"""The COCO panoptic format: a JSON of segments, and for every image a PNG whose colours are segment ids."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow import _evaluation
from spatialflow.files import atomic_write
from spatialflow.panoptic.png import decode_png

VOID = 0  # the id of pixels that belong to no segment


class PanopticFormatError(ValueError):
    """A panoptic JSON, PNG or id map breaks the format; the message says which file and which rule."""


def decode_ids(image: np.ndarray, bgr: bool = False) -> np.ndarray:
    """Turn the colours of a panoptic PNG into segment ids: red + 256 * green + 65536 * blue.

    Args:
        image: (H, W, 3) uint8.
        bgr: channels are in OpenCV's order.

    Returns:
        (H, W) int32.

    Raises:
        ValueError: image has another shape or dtype.
    """
    return _evaluation.decode_ids(np.asarray(image), bgr=bgr)


def encode_ids(ids: np.ndarray, bgr: bool = False) -> np.ndarray:
    """Turn segment ids into the colours of a panoptic PNG, the inverse of `decode_ids`.

    Args:
        ids: (H, W) of any integer dtype, values in [0, 2^24).
        bgr: write channels in OpenCV's order.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: ids has another shape or kind, or an id does not fit three bytes.
    """
    return _evaluation.encode_ids(as_id_map(ids, "ids"), bgr=bgr)


def as_id_map(ids: np.ndarray, name: str) -> np.ndarray:
    """`ids` as a contiguous (H, W) int32 array; the error names the argument `name`.

    Values are checked only where the dtype could hold one that int32 cannot.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be an (H, W) integer array, got {ids.shape} {ids.dtype}")
    if not np.can_cast(ids.dtype, np.int32) and ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f"{name} must lie in [0, 16777215], got values from {ids.min()} to {ids.max()}")
    return np.ascontiguousarray(ids, dtype=np.int32)


def read_id_map(path: str | os.PathLike) -> np.ndarray:
    """Read a panoptic PNG as an (H, W) int32 map of segment ids, 0 where there is none.

    Raises:
        PanopticFormatError: the file is absent, damaged, or not an 8-bit RGB or RGBA PNG.
    """
    try:
        with open(path, "rb", buffering=0) as stream:  # read whole: a buffer would only be copied
            return decode_png(stream.read())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise PanopticFormatError(f"{path}: {error}") from None


def write_id_map(path: str | os.PathLike, ids: np.ndarray) -> None:
    """Write a map of segment ids as a panoptic PNG; an existing file is replaced in one step.

    Args:
        path: the PNG to write.
        ids: (H, W) of any integer dtype, values in [0, 2^24).

    Raises:
        ValueError: ids has another shape or kind, is empty, or an id does not fit three bytes.
        OSError: the file cannot be written; nothing is left behind.
    """
    import cv2

    colours = encode_ids(ids, bgr=True)
    if colours.size == 0:
        raise ValueError(f"ids must have at least one pixel to be written as a PNG, got shape {colours.shape[:2]}")
    # OpenCV's own choice is made for photographs and triples the size of an id map.
    _, data = cv2.imencode(".png", colours, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    with atomic_write(path) as stream:
        stream.write(data.tobytes())


def read_panoptic_json(path: str | os.PathLike, with_categories: bool = False) -> dict[str, Any]:
    """Read a COCO panoptic JSON and check what everything else relies on.

    Args:
        path: the JSON file.
        with_categories: also require `categories` with `id` and `isthing`, as a ground truth has.

    Returns:
        The file's content: a mapping with `annotations`, a list of {image_id, file_name, segments_info}.

    Raises:
        PanopticFormatError: the file is absent, is no JSON, or a field is missing; the message says which.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PanopticFormatError(f"{path}: not a JSON file: {error}") from None
    check_panoptic(content, str(path), with_categories)
    return content


def check_panoptic(content: Any, source: str, with_categories: bool = False) -> None:
    """Raise `PanopticFormatError`, naming `source`, unless `content` is a COCO panoptic mapping."""
    if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
        raise PanopticFormatError(f'{source}: a panoptic JSON is a mapping with a list "annotations"')
    for index, annotation in enumerate(content["annotations"]):
        where = f"{source}: annotations[{index}]"
        _require(annotation, {"image_id": _ID, "file_name": _TEXT, "segments_info": _LIST}, where)
        for position, segment in enumerate(annotation["segments_info"]):
            _check_segment(segment, f"{where}: segments_info[{position}]")
    if with_categories:
        check_categories(content, source)


def check_categories(content: Mapping[str, Any], source: str) -> None:
    """Raise `PanopticFormatError`, naming `source`, unless `categories` lists mappings with id and isthing."""
    if not isinstance(content.get("categories"), list):
        raise PanopticFormatError(f'{source}: a ground truth needs a list "categories"')
    for index, category in enumerate(content["categories"]):
        _require(category, {"id": _INTEGER, "isthing": _FLAG}, f"{source}: categories[{index}]")


def check_images(content: Mapping[str, Any], source: str) -> None:
    """Raise `PanopticFormatError`, naming `source`, unless `images` lists photographs with name and size."""
    if not isinstance(content.get("images"), list):
        raise PanopticFormatError(f'{source}: a data set needs a list "images"')
    for index, image in enumerate(content["images"]):
        where = f"{source}: images[{index}]"
        _require(image, {"id": _ID, "file_name": _TEXT, "height": _INTEGER, "width": _INTEGER}, where)
        if min(image["height"], image["width"]) < 1:
            raise PanopticFormatError(f"{where}: must have pixels, got {image['width']}x{image['height']}")


def _check_segment(segment: Any, where: str) -> None:
    if not (
        isinstance(segment, Mapping)
        and isinstance(segment.get("id"), int)
        and isinstance(segment.get("category_id"), int)
    ):
        raise PanopticFormatError(f'{where} must be a mapping with integers "id" and "category_id"')
    if not 0 <= segment["id"] < 1 << 24:
        raise PanopticFormatError(f"{where}: id must lie in [0, 16777215], got {segment['id']}")
    if not isinstance(segment.get("area", 0), _NUMBER):
        raise PanopticFormatError(f"{where}: area must be a number, got {segment['area']!r:.80}")
    if segment.get("iscrowd", 0) not in (0, 1):
        raise PanopticFormatError(f"{where}: iscrowd must be 0 or 1, got {segment['iscrowd']!r:.80}")


_INTEGER, _TEXT, _LIST, _FLAG = (int, np.integer), (str,), (list,), (int, np.integer, np.bool_)
_NUMBER = (int, float, np.integer)
_ID = _INTEGER + _TEXT
_KINDS = {_INTEGER: "an integer", _TEXT: "a text", _LIST: "a list", _ID: "an integer or a text", _FLAG: "0 or 1"}


def _require(item: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    for field, kinds in fields.items():
        if not isinstance(item, Mapping) or field not in item:
            raise PanopticFormatError(f'{where} must be a mapping with "{field}" ({_KINDS[kinds]})')
        if not isinstance(item[field], kinds) or (kinds is _FLAG and item[field] not in (0, 1)):
            raise PanopticFormatError(f"{where}: {field} must be {_KINDS[kinds]}, got {item[field]!r:.80}")
        if kinds is _TEXT and "\0" in item[field]:  # no path holds one
            raise PanopticFormatError(f"{where}: {field} must be a text without NUL, got {item[field]!r:.80}")
