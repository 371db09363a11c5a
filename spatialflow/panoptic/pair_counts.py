# SPDX-License-Identifier: Apache-2.0
"""The only pass over pixels that panoptic quality needs."""

import numpy as np

from spatialflow import _evaluation


def count_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many pixels carry each pair of ids in two images of one size.

    Args:
        first: (H, W) int32 ids or (H, W, 3) uint8 colours, red first.
        second: the same; the two may differ in kind.

    Returns:
        Three (pairs,) int64 arrays: ids of first, ids of second, pixels. A row per pair that occurs, ascending by the
        first, then the second id.

    Raises:
        ValueError: an image has another shape or dtype, or the sizes differ.

    Made for segments. Maps in which the pair changes every few pixels are sorted by numpy.
    """
    counted = _evaluation.count_pairs(first, second)
    if counted is not None:
        return counted
    ids = [_evaluation.decode_ids(image) if image.ndim == 3 else image for image in (first, second)]
    # A sum, not a bit pattern: keys ascend by first, then second id, negative ones included.
    keys, pixels = np.unique((ids[0].astype(np.int64) << 32) + ids[1], return_counts=True)
    second_ids = keys.astype(np.int32).astype(np.int64)
    return (keys - second_ids) >> 32, second_ids, pixels
