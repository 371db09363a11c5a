# SPDX-License-Identifier: Apache-2.0
"""Training augmentation: random scale, crop and flip of an image with its boxes, masks and semantic map."""

from typing import NamedTuple

import numpy as np

from spatialflow.config import DataConfig
from spatialflow.data.samples import Sample
from spatialflow.data.transforms import compute_resized_size, normalize, pad, resize_image, resize_labels
from spatialflow.structures import UNLABELED


class TrainingSample(NamedTuple):
    """A network input with ground truth at its scale; (H, W) is the padded size."""

    image: np.ndarray  # (3, H, W) float32, normalized RGB, zero where padded
    boxes: np.ndarray  # (K, 4) float32
    labels: np.ndarray  # (K,) int64
    instances: np.ndarray  # (H, W) int32: k + 1 on the mask of the thing with box k, 0 elsewhere
    semantic: np.ndarray  # (H, W) uint8, 255 where ignored or padded
    valid_size: tuple[int, int]  # (height, width) without padding


def augment(sample: Sample, config: DataConfig, rng: np.random.Generator) -> TrainingSample:
    """Scale, crop, flip, normalize and pad a sample.

    Args:
        sample: at original size.
        config: `train_short_edges` (one value, or a range to draw from), `train_long_edge`, `train_crop` with
            `train_scale_range`, `flip_probability`, normalization and padding.
        rng: the only source of random numbers.

    Returns:
        TrainingSample. Boxes are clipped to the image. With `train_crop`, a thing is dropped if a side of its box is
        shorter than a pixel, or its mask has no pixel left.
    """
    size = _random_size(sample.image.shape[:2], config, rng)
    image = resize_image(sample.image, size)
    instances, semantic = resize_labels(sample.instances, size), resize_labels(sample.semantic, size)
    height, width = sample.image.shape[:2]
    factor = np.array([size[1] / width, size[0] / height] * 2, np.float32)
    boxes = sample.boxes * factor
    if config.train_crop is not None:
        (top, left), size = _random_window(size, config.train_crop, rng)
        window = (slice(top, top + size[0]), slice(left, left + size[1]))
        image, instances, semantic = image[window], instances[window], semantic[window]
        boxes = boxes - np.array([left, top, left, top], np.float32)
    boxes = boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))
    labels = sample.labels
    if config.train_crop is not None:
        boxes, labels, instances = _drop_cropped_out(boxes, labels, instances)
    if rng.random() < config.flip_probability:
        image, instances, semantic = image[:, ::-1], instances[:, ::-1], semantic[:, ::-1]
        boxes = np.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], axis=1)
    tensor = pad(normalize(np.ascontiguousarray(image), config.image_mean, config.image_std), config.size_divisor)
    border = [(0, full - valid) for full, valid in zip(tensor.shape[1:], size, strict=True)]
    return TrainingSample(
        tensor,
        boxes.astype(np.float32),
        labels,
        np.pad(instances, border),
        np.pad(semantic, border, constant_values=UNLABELED),
        size,
    )


def _random_size(size: tuple[int, int], config: DataConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the size (H, W) to which an image of `size` is scaled."""
    short = config.train_short_edges[0]
    if len(config.train_short_edges) == 2:
        short = int(rng.integers(min(config.train_short_edges), max(config.train_short_edges) + 1))
    height, width = compute_resized_size(size, short, config.train_long_edge)
    if config.train_crop is None:
        return height, width
    low, high = config.train_scale_range
    factor = rng.uniform(low, high)
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def _random_window(
    size: tuple[int, int], crop: tuple[int, ...], rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw a window of at most `crop` inside `size`; return its (top, left) corner and its size."""
    window = (min(size[0], crop[0]), min(size[1], crop[1]))
    return (int(rng.integers(size[0] - window[0] + 1)), int(rng.integers(size[1] - window[1] + 1))), window


def _drop_cropped_out(
    boxes: np.ndarray, labels: np.ndarray, instances: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Remove things without pixels or with a side of the box shorter than a pixel, and renumber the others."""
    pixels = np.bincount(instances.ravel(), minlength=len(boxes) + 1)[1:]
    keep = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1) & (pixels > 0)
    number = np.zeros(len(boxes) + 1, np.int32)
    number[1:][keep] = np.arange(1, keep.sum() + 1)
    return boxes[keep], labels[keep], number[instances]
