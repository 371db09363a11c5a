# SPDX-License-Identifier: Apache-2.0
"""Pixel counts of pairs of ids in two maps, the input of panoptic quality."""

import numpy as np

from spatialflow import _evaluation

_OFFSET = 1 << 31  # makes every int32 non-negative


def count_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the pixels of each pair of ids in two images of one size.

    Args:
        first: (H, W) int32 ids or (H, W, 3) uint8 colors, red first.
        second: the same; the two may differ in kind.

    Returns:
        Three (pairs,) int64 arrays: ids of first, ids of second, pixels. A row per pair that occurs, ascending by the
        first, then the second id.

    Raises:
        ValueError: an image has another shape or dtype, or the sizes differ.

    The compiled code is fast for maps of segments. Maps in which the pair changes every few pixels are sorted by numpy.
    """
    counted = _evaluation.count_pairs(first, second)
    if counted is not None:
        return counted
    ids = [_evaluation.decode_ids(image) if image.ndim == 3 else image for image in (first, second)]
    # Keys that ascend by the first, then the second id, also for negative ids. They are computed in place, as an
    # allocation costs more than a sum.
    keys = ids[0].astype(np.int64)
    keys <<= 32
    keys += ids[1]
    keys += _OFFSET
    keys, pixels = np.unique(keys, return_counts=True)
    second_ids = keys & 0xFFFFFFFF
    second_ids -= _OFFSET
    keys >>= 32
    return keys, second_ids, pixels
