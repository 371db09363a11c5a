# SPDX-License-Identifier: Apache-2.0
"""The ids of an id map, and the number of pixels and the bounding box of every segment."""

from typing import NamedTuple

import numpy as np


class Extent(NamedTuple):
    """The area and the bounding box (x, y, width, height) of a segment, in pixels."""

    pixels: int
    x: int
    y: int
    width: int
    height: int

    @property
    def box(self) -> list[int]:
        """[x, y, width, height]."""
        return [self.x, self.y, self.width, self.height]


def extents(id_map: np.ndarray) -> dict[int, Extent]:
    """Compute the extent of every id of a map, id 0 included, ascending by id.

    Args:
        id_map: (H, W) integer segment ids.

    Returns:
        A mapping from id to `Extent`; empty where the map has no pixels.

    Runs of pixels of one row and one id are sorted instead of pixels, as there are fewer runs.
    """
    if id_map.size == 0:
        return {}
    width = id_map.shape[1]
    flat = np.ascontiguousarray(id_map).ravel()
    begins = run_begins(flat)
    begins[::width] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=flat.size)
    order = np.argsort(flat[starts], kind="stable")  # stable: the rows of one id stay ascending
    starts, lengths = starts[order], lengths[order]
    ids = flat[starts]
    first = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    last = np.append(first[1:], len(ids)) - 1
    rows, columns = np.divmod(starts, width)
    left, top = np.minimum.reduceat(columns, first), rows[first]
    right, bottom = np.maximum.reduceat(columns + lengths, first), rows[last] + 1
    pixels = np.add.reduceat(lengths, first)
    table = np.stack([ids[first], pixels, left, top, right - left, bottom - top], axis=1)
    return {row[0]: Extent(*row[1:]) for row in table.tolist()}


def run_begins(flat: np.ndarray) -> np.ndarray:
    """Return (N,) bool: True for the first element and every element that differs from the previous one."""
    begins = np.ones(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    return begins


def ids_of(id_map: np.ndarray) -> np.ndarray:
    """Return the ids (N,) of an integer map of any shape, in ascending order."""
    flat = np.ascontiguousarray(id_map).ravel()
    return np.unique(flat[run_begins(flat)])


def number_ids(id_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (N,) of the map in ascending order, and the (H, W) int32 map of each pixel's index into them.

    For speed, only the first pixel of each run of equal ids is sorted.
    """
    flat = np.ascontiguousarray(id_map).ravel()
    starts = np.flatnonzero(run_begins(flat))
    ids, numbers = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, flat.size))
    return ids, np.repeat(numbers.ravel().astype(np.int32), lengths).reshape(id_map.shape)
