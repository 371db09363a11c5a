# SPDX-License-Identifier: Apache-2.0
"""The COCO panoptic format: a JSON of segments, and for every image a PNG whose colors are segment ids."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow import _evaluation
from spatialflow.files import atomic_write
from spatialflow.panoptic import rules
from spatialflow.panoptic.png import PngKindError, decode_png, encode_png
from spatialflow.panoptic.rules import PanopticFormatError


def decode_ids(image: np.ndarray, bgr: bool = False) -> np.ndarray:
    """Decode the colors of a panoptic PNG to segment ids: red + 256 * green + 65536 * blue.

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
    """Encode segment ids as the colors of a panoptic PNG, the inverse of `decode_ids`.

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
    """Convert `ids` to a contiguous (H, W) int32 array; errors name the argument `name`.

    Values are checked only where the dtype has values that int32 does not.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be an (H, W) integer array, got {ids.shape} {ids.dtype}")
    if not np.can_cast(ids.dtype, np.int32) and ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f"{name} must lie in [0, 16777215], got values from {ids.min()} to {ids.max()}")
    return np.ascontiguousarray(ids, dtype=np.int32)


def read_id_map(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a panoptic PNG as an (H, W) int32 map of segment ids, 0 for void.

    Raises:
        PanopticFormatError: the file is absent, damaged, or not an 8-bit RGB or RGBA PNG.
    """
    try:
        with open(path, "rb", buffering=0) as stream:  # unbuffered, as the file is read at once
            return decode_png(stream.read())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}", "png") from None
    except PngKindError as error:
        raise PanopticFormatError(f"{path}: {error}", "png-kind") from None
    except ValueError as error:
        raise PanopticFormatError(f"{path}: {error}", "png") from None


def write_id_map(path: str | os.PathLike[str], ids: np.ndarray) -> None:
    """Write a map of segment ids as a panoptic PNG; an existing file is replaced atomically.

    Args:
        path: the PNG to write.
        ids: (H, W) of any integer dtype, values in [0, 2^24).

    Raises:
        ValueError: ids has another shape or kind, is empty, or an id does not fit three bytes.
        OSError: the file cannot be written; no part of it is left.
    """
    colors = encode_ids(ids)
    if colors.size == 0:
        raise ValueError(f"ids must have at least one pixel to be written as a PNG, got shape {colors.shape[:2]}")
    content = encode_png(colors)
    with atomic_write(path) as stream:
        stream.write(content)


def read_panoptic_json(
    path: str | os.PathLike[str], with_categories: bool = False, use: str = rules.PREDICTION
) -> dict[str, Any]:
    """Read a COCO panoptic JSON and check its format.

    Args:
        path: the JSON file.
        with_categories: also require `categories` with `id` and `isthing`, as a ground truth has.
        use: "truth", "prediction" or "training"; decides which rules must hold (`rules.RULES`).

    Returns:
        The file's content: a mapping with `annotations`, a list of {image_id, file_name, segments_info}.

    Raises:
        PanopticFormatError: the file is absent, is not JSON, or breaks a rule that stops this use; the message names
            the file.
    """
    content = load_json(path)
    check_panoptic(content, str(path), with_categories, use)
    return content


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read the content of a JSON file without further checks.

    Raises:
        PanopticFormatError: the file is absent or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PanopticFormatError(f"{path}: not a JSON file: {error}") from None


def check_panoptic(
    content: Any,
    source: str,
    with_categories: bool = False,
    use: str = rules.PREDICTION,
    categories: Collection[int] | None = None,
) -> list[rules.Problem]:
    """Raise `PanopticFormatError`, naming `source`, unless `content` is a COCO panoptic mapping fit for `use`.

    Args:
        content: the parsed content of the file.
        source: named in the error.
        with_categories: also require `categories` with `id` and `isthing`.
        use: as for `read_panoptic_json`.
        categories: category ids that segments may have; None: those that the content lists, if it lists any.

    Returns:
        Problems that this use reports and that do not stop it.
    """
    also = rules.CATEGORY_RULES if with_categories else ()
    return rules.raise_first(rules.json_problems(content, categories), use, source, also)
