# SPDX-License-Identifier: Apache-2.0
"""Resizing, normalizing and padding of images, with the released arithmetic; numpy in, numpy out.

Training uses the steps one by one, between its other transforms; at inference `spatialflow.ops.preprocess_images` does
them in one pass, with equal results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from spatialflow.images import ImageError as ImageError  # these names can be imported from here too
from spatialflow.images import ImageWarning as ImageWarning
from spatialflow.images import read_image as read_image

LARGEST_SIDE = 2**24
"""Pixels of the longest side that `spatialflow.ops.preprocess_images` makes."""


class Fitted(NamedTuple):
    """How an image becomes a network input, and what is needed to go back."""

    valid_size: tuple[int, int]  # (H, W) of the resized image
    padded_size: tuple[int, int]  # (H, W) with the padding at the right and bottom
    original_size: tuple[int, int]  # (H, W) of the image as read
    scale: tuple[float, float]  # x and y factor original -> valid, rounded to float32


def check_image(image: np.ndarray, name: str = "image") -> np.ndarray:
    """`image` if it is (H, W, 3) uint8 with at least one pixel; ImageError otherwise."""
    if not isinstance(image, np.ndarray):
        raise ImageError(f"{name}: must be a path or an (H, W, 3) uint8 array, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(f"{name}: must be (H, W, 3) uint8 in BGR order, got {image.shape} {image.dtype}")
    if image.size == 0:
        raise ImageError(f"{name}: has no pixels, got shape {image.shape}")
    return image


def fit_size(size: tuple[int, int], short_edge: int, long_edge: float) -> tuple[int, int]:
    """(H, W) scaled until it fits `short_edge` and `long_edge`; each side is int(x * factor + 0.5) and at least 1."""
    h, w = size
    factor = min(long_edge / max(h, w), short_edge / min(h, w))
    return max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize to (H, W), half-pixel centers, no antialias: OpenCV's."""
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resize of a label map to (H, W): source index floor(i * source / target), as OpenCV's INTER_NEAREST."""
    rows, columns = (
        np.minimum((np.arange(target) * (1.0 / (target / source))).astype(np.int64), source - 1)
        for source, target in zip(labels.shape, size)
    )
    return labels[rows][:, columns]


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(H, W, 3) uint8 BGR -> (3, H, W) float32 RGB, (x - mean) * (1 / std) in the released order of roundings."""
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)
    cv2.subtract(rgb, (*np.float64(mean), 0.0), rgb)
    cv2.multiply(rgb, (*(1.0 / np.float64(std)), 0.0), rgb)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def pad(image: np.ndarray, divisor: int) -> np.ndarray:
    """(C, H, W) with zeros at the right and bottom up to multiples of `divisor`."""
    _, h, w = image.shape
    return np.pad(image, ((0, 0), (0, -h % divisor), (0, -w % divisor)))


def fit_image(size: tuple[int, int], short_edge: int, long_edge: float, divisor: int = 32) -> Fitted:
    """What `spatialflow.ops.preprocess_images` makes of an image of `size` (H, W) for the network."""
    valid = fit_size(size, short_edge, long_edge)
    padded = tuple(side + -side % divisor for side in valid)
    scale = tuple(float(np.float32(new / old)) for new, old in zip(reversed(valid), reversed(size)))
    return Fitted(valid, padded, tuple(size), scale)
