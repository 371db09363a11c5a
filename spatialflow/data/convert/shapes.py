# SPDX-License-Identifier: Apache-2.0
"""Pixels of polygons, ellipses and run-length encoded masks, as pycocotools draws them.

pycocotools does not check its input: a wrong run length or a huge coordinate can end the process. So the same masks are
computed here, with a sentence for every shape that cannot be drawn.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

_SCALE = 5  # pycocotools rounds points to fifths of a pixel
_LARGEST_COORDINATE = 1e6
_POINTS_AT_ONCE = 1 << 20


class ShapeError(ValueError):
    """A shape that cannot be drawn; the message names the rule and the value."""


class Mask(NamedTuple):
    """The pixels of a shape inside a rectangle of the image."""

    left: int
    top: int
    bits: np.ndarray  # (h, w) bool

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.bits))


EMPTY = Mask(0, 0, np.zeros((0, 0), bool))


def crop(bits: np.ndarray, left: int = 0, top: int = 0) -> Mask:
    """Make a mask from (h, w) bool pixels, without the empty rows and columns around them."""
    rows, columns = np.flatnonzero(bits.any(1)), np.flatnonzero(bits.any(0))
    if not len(rows):
        return EMPTY
    part = bits[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Mask(left + int(columns[0]), top + int(rows[0]), part)


def union(masks: Sequence[Mask]) -> Mask:
    """Unite masks of one image; the empty mask for none."""
    masks = [mask for mask in masks if mask.bits.size]
    if len(masks) < 2:
        return masks[0] if masks else EMPTY
    left, top = min(mask.left for mask in masks), min(mask.top for mask in masks)
    right = max(mask.left + mask.bits.shape[1] for mask in masks)
    bottom = max(mask.top + mask.bits.shape[0] for mask in masks)
    bits = np.zeros((bottom - top, right - left), bool)
    for mask in masks:
        height, width = mask.bits.shape
        bits[mask.top - top :, mask.left - left :][:height, :width] |= mask.bits
    return Mask(left, top, bits)


def numbers(values: Any, what: str) -> np.ndarray:
    """Convert a list of numbers to float64.

    Raises:
        ShapeError: a value is no finite number, or is larger than a million; the message begins with `what`.
    """
    if not isinstance(values, list | tuple):
        raise ShapeError(f"{what} must be a list of numbers, got {values!r:.60}")
    if set(map(type, values)) <= {int, float}:
        with contextlib.suppress(OverflowError):  # of a huge integer, which is named below
            array = np.array(values, np.float64)
            if np.all(np.abs(array) <= _LARGEST_COORDINATE):  # False for NaN too
                return array
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= _LARGEST_COORDINATE:  # NaN fails the comparison too
            raise ShapeError(f"{what} must be finite numbers up to a million, got {value!r:.60}")
    return np.array(values, np.float64)


def points_of(pairs: Any) -> np.ndarray:
    """Convert a list of (x, y) pairs to (N, 2) float64; ShapeError for anything else."""
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ShapeError(f"points must be a list of pairs [x, y], got {pairs!r:.60}")
    return numbers([value for pair in pairs for value in pair], "coordinates").reshape(-1, 2)


def polygon(points: np.ndarray, size: tuple[int, int]) -> Mask:
    """Draw the inside of a polygon by the even-odd rule, exactly as pycocotools does.

    Args:
        points: (N, 2) finite x and y in pixels. The left edge of the image is at x = 0, the right one at its width.
        size: (height, width) of the image. Parts outside it are cut off.

    Raises:
        ShapeError: fewer than three points.
    """
    if len(points) < 3:
        raise ShapeError(f"a polygon needs at least 3 points, got {len(points)}")
    height, width = size
    margin = 4 * max(height, width)
    for axis, length in ((0, width), (1, height)):  # distant points would need memory and time
        if points[:, axis].min() < -margin:
            points = _clip(points, axis, -margin, -1)
        if len(points) and points[:, axis].max() > length + margin:
            points = _clip(points, axis, length + margin, 1)
        if not len(points):
            return EMPTY
    left, top = (max(int(np.floor(low)) - 1, 0) for low in points.min(0))
    right, bottom = (min(int(np.ceil(high)) + 1, n) for high, n in zip(points.max(0), (width, height), strict=True))
    if left >= right or top >= bottom:
        return EMPTY
    rows, columns = bottom - top + 1, right - left
    toggles = np.zeros(columns * rows, np.int64)
    for x, y in _crossings(np.trunc(_SCALE * points + 0.5).astype(np.int64)):
        inside = (x >= left) & (x < right)
        row = np.clip(np.ceil(np.clip(y[inside], 0, height)).astype(np.int64), top, bottom) - top
        toggles += np.bincount((x[inside] - left) * rows + row, minlength=len(toggles))
    parity = np.cumsum(toggles.reshape(columns, rows)[:, :-1], axis=1) % 2
    return crop(np.ascontiguousarray(parity.T.astype(bool)), left, top)


def _clip(points: np.ndarray, axis: int, limit: float, sign: int) -> np.ndarray:
    """Cut a polygon at a line parallel to an axis (Sutherland and Hodgman), keeping the side below `limit` * sign."""
    distance = sign * (points[:, axis] - limit)
    following, next_points = np.roll(distance, -1), np.roll(points, -1, axis=0)
    inside = distance <= 0
    crosses = inside != (following <= 0)
    share = np.divide(distance, distance - following, out=np.zeros_like(distance), where=crosses)[:, None]
    both = np.stack([points, points + share * (next_points - points)], axis=1)
    return both[np.stack([inside, crosses], axis=1)]


def _crossings(corners: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generate the columns and heights (x, y) at which the outline crosses the centers of columns.

    Args:
        corners: (N, 2) int64 in fifths of a pixel.

    The steps are those of `rleFrPoly` in pycocotools, for many edges at once. Each edge is sampled at every fifth of a
    pixel along its longer side, from its left (or upper) end.
    """
    begin, end = corners, np.roll(corners, -1, axis=0)
    extent = np.abs(end - begin)
    is_flat = extent[:, 0] >= extent[:, 1]
    main = np.where(is_flat, 0, 1)
    index = np.arange(len(corners))
    swapped = begin[index, main] > end[index, main]
    first, last = np.where(swapped[:, None], end, begin), np.where(swapped[:, None], begin, end)
    length = extent[index, main]
    keep = extent[:, 0] > 0  # other edges cross no column
    first, last, length, is_flat = first[keep], last[keep], length[keep], is_flat[keep]
    slope = np.where(is_flat, last[:, 1] - first[:, 1], last[:, 0] - first[:, 0]) / np.maximum(length, 1)
    total = np.cumsum(length + 1)
    start = 0
    while start < len(length):
        stop = max(int(np.searchsorted(total, total[start] + _POINTS_AT_ONCE)), start + 1)
        counts = length[start:stop] + 1
        edge = np.repeat(np.arange(start, stop), counts)
        step = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
        flat = is_flat[edge]
        other = np.trunc(np.where(flat, first[edge, 1], first[edge, 0]) + slope[edge] * step + 0.5).astype(np.int64)
        u = np.where(flat, step + first[edge, 0], other)
        v = np.where(flat, other, step + first[edge, 1])
        moved = np.flatnonzero((u[1:] != u[:-1]) & (edge[1:] == edge[:-1]))
        low = np.minimum(u[moved], u[moved + 1])
        centered = low % _SCALE == _SCALE // 2
        moved, low = moved[centered], low[centered]
        yield low // _SCALE, (np.minimum(v[moved], v[moved + 1]) + 0.5) / _SCALE - 0.5
        start = stop


def rectangle(x1: float, y1: float, x2: float, y2: float, rotation: float = 0) -> np.ndarray:
    """Make the corners (4, 2) of a rectangle; `rotation` is clockwise in the picture, in degrees."""
    corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)
    return _rotated(corners, ((x1 + x2) / 2, (y1 + y2) / 2), rotation)


def ellipse(x: float, y: float, rx: float, ry: float, rotation: float = 0) -> np.ndarray:
    """Make a polygon (N, 2) that is less than a tenth of a pixel from an ellipse; `rotation` as for `rectangle`.

    Raises:
        ShapeError: a radius is not positive.
    """
    if min(rx, ry) <= 0:
        raise ShapeError(f"radii must be positive, got {rx:g} and {ry:g}")
    count = min(max(math.ceil(math.pi * math.sqrt(5 * max(rx, ry))), 16), 4096)  # sagitta: r * (1 - cos(pi / count))
    angle = np.arange(count) * (2 * math.pi / count)
    outline = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)
    return _rotated(outline, (x, y), rotation)


def _rotated(points: np.ndarray, center: tuple[float, float], degrees: float) -> np.ndarray:
    if not degrees:
        return points
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (points - center) @ np.array([[cosine, sine], [-sine, cosine]]) + center


def coco_rle(value: Any, size: tuple[int, int]) -> Mask:
    """Decode a COCO run-length encoding, {"size": [height, width], "counts": list or string}, column by column.

    Raises:
        ShapeError: another size than the image, or malformed counts.
    """
    height, width = size
    if not isinstance(value, dict) or "counts" not in value:
        raise ShapeError(f'an RLE must be a mapping with "size" and "counts", got {value!r:.60}')
    if value.get("size") != [height, width]:
        stated = value.get("size")
        raise ShapeError(f"the RLE has size {stated!r:.40}, the image has [{height}, {width}] (height, width)")
    counts = value["counts"]
    if isinstance(counts, str):
        counts = _decode_counts(counts)
    return crop(runs(counts, width * height).reshape(width, height).T)


def runs(counts: Any, total: int) -> np.ndarray:
    """Expand alternating run lengths, the first of zeros, to (total,) bool; ShapeError if they do not fit."""
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= total for count in counts):
        raise ShapeError(f"run lengths must be integers from 0 to the number of pixels, {total}, got {counts!r:.60}")
    if sum(counts) != total:
        raise ShapeError(f"run lengths must add up to the number of pixels, {total}, got {sum(counts)}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def _decode_counts(text: str) -> list[int]:
    """Decode COCO's compressed counts: groups of 5 bits, least significant first, relative to the count before last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ShapeError(f"the RLE has malformed compressed counts, {text!r:.60}")
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ShapeError(f"the compressed counts of the RLE end within a number, {text[-20:]!r}")
    return counts
