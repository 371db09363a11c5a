# SPDX-License-Identifier: Apache-2.0
"""Resize, normalization and padding of images in numpy, with the arithmetic of the released code.

Training calls the steps separately, between its other transforms. Inference calls `spatialflow.ops.preprocess_images`,
which does all of them in one pass with equal results.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from spatialflow.images import ImageError as ImageError  # also exported by this module
from spatialflow.images import ImageWarning as ImageWarning
from spatialflow.images import read_image as read_image

LARGEST_SIDE = 2**24
"""Largest side, in pixels, of an output of `spatialflow.ops.preprocess_images`."""


class ResizeGeometry(NamedTuple):
    """Sizes and scale factors of an image that is resized and padded for the network."""

    valid_size: tuple[int, int]  # (H, W) of the resized image
    padded_size: tuple[int, int]  # (H, W) with the padding at the right and bottom
    original_size: tuple[int, int]  # (H, W) of the image as read
    scale: tuple[float, float]  # x and y factor original -> valid, rounded to float32


def compute_resized_size(size: tuple[int, int], short_edge: int, long_edge: float) -> tuple[int, int]:
    """Compute the largest size (H, W) of the same aspect ratio within `short_edge` and `long_edge`.

    Each side is int(x * factor + 0.5) and at least 1.
    """
    h, w = size
    factor = min(long_edge / max(h, w), short_edge / min(h, w))
    return max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize bilinearly to (H, W) with half-pixel centers, without antialiasing, by OpenCV."""
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map to (H, W) by nearest neighbor, as OpenCV's INTER_NEAREST.

    The source index is floor(i * source / target).
    """
    rows, columns = (
        np.minimum((np.arange(target) * (1.0 / (target / source))).astype(np.int64), source - 1)
        for source, target in zip(labels.shape, size, strict=True)
    )
    return labels[rows][:, columns]


def normalize(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalize an image: (H, W, 3) uint8 BGR to (3, H, W) float32 RGB.

    The value is (x - mean) * (1 / std), with the roundings of the released code.
    """
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)
    shift: Any = (*np.asarray(mean, np.float64), 0.0)  # a scalar of cv2, which its stubs do not allow
    scale: Any = (*(1.0 / np.asarray(std, np.float64)), 0.0)
    cv2.subtract(rgb, shift, rgb)
    cv2.multiply(rgb, scale, rgb)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def pad(image: np.ndarray, divisor: int) -> np.ndarray:
    """Pad (C, H, W) with zeros at the right and bottom to multiples of `divisor`."""
    _, h, w = image.shape
    return np.pad(image, ((0, 0), (0, -h % divisor), (0, -w % divisor)))


def compute_resize(size: tuple[int, int], short_edge: int, long_edge: float, divisor: int = 32) -> ResizeGeometry:
    """Compute the geometry of an image of `size` (H, W) that `spatialflow.ops.preprocess_images` resizes and pads.

    Args:
        size: (H, W) of the image.
        short_edge: largest length of the shorter side.
        long_edge: largest length of the longer side.
        divisor: of the sides of the padded size.
    """
    valid = compute_resized_size(size, short_edge, long_edge)
    padded = (valid[0] + -valid[0] % divisor, valid[1] + -valid[1] % divisor)
    scale = (float(np.float32(valid[1] / size[1])), float(np.float32(valid[0] / size[0])))
    return ResizeGeometry(valid, padded, (size[0], size[1]), scale)
