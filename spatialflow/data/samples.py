# SPDX-License-Identifier: Apache-2.0
"""The sample of a data set: one image at original size with its ground truth."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from spatialflow.data.categories import Categories
from spatialflow.panoptic.extents import extents
from spatialflow.panoptic.rules import (
    TRAINING,
    PanopticFormatError,
    Problem,
    box_of,
    pixel_problems,
    raise_first,
    segment_problems,
)
from spatialflow.structures import UNLABELED


class SampleError(ValueError):
    """An image or annotation that cannot be used; the message names the file and the reason."""


class Sample(NamedTuple):
    """An image at original size with its ground truth."""

    name: str  # file name, for messages
    image: np.ndarray  # (H, W, 3) uint8 BGR
    boxes: np.ndarray  # (K, 4) float32, (x1, y1, x2, y2) in pixels; things except crowds
    labels: np.ndarray  # (K,) int64 thing labels
    instances: np.ndarray  # (H, W) int32: k + 1 on the mask of the thing with box k, 0 elsewhere
    semantic: np.ndarray  # (H, W) uint8 semantic indices, 255 for pixels without one
    notes: tuple[Problem, ...] = ()  # where the annotation contradicts its pixels; the pixels were used


def make_sample(
    name: str, image: np.ndarray, id_map: np.ndarray, segments: Iterable[Mapping[str, Any]], categories: Categories
) -> Sample:
    """Make a sample with boxes, instances and a semantic map from panoptic segments.

    Args:
        name: for messages.
        image: (H, W, 3) uint8.
        id_map: (H, W) integer segment ids, 0 for void.
        segments: mappings with `id` and `category_id`, and where given `iscrowd` and `bbox` (x, y, width, height).
        categories: numbering of the classes.

    Returns:
        Sample. Crowds have neither box nor mask; in the semantic map they are "other" (255 without that class), as all
        things. The same holds for things whose box, clipped to the image, is less than a pixel wide or high. Ids
        without a segment and categories not in the table are void. Segments without pixels are left out. A box that
        contradicts its mask is replaced by the box of the mask. `notes` has the ids without a segment, the segments
        without pixels and the replaced boxes.

    Raises:
        SampleError: image and map differ in size; segments are listed, but none has pixels; an id is 0 or not unique;
            or a box is not four finite numbers.
    """
    if image.shape[:2] != id_map.shape:
        raise SampleError(f"{name}: image of {_size(image)} pixels, but annotation of {_size(id_map)}")
    height, width = id_map.shape
    listed_segments = sorted(segments, key=lambda segment: segment["id"])
    extent_by_id = extents(id_map)
    try:
        raise_first(segment_problems(listed_segments, name, None), TRAINING)
        notes = raise_first(pixel_problems(listed_segments, name, extent_by_id), TRAINING)
    except PanopticFormatError as error:
        raise SampleError(str(error)) from None
    segments = [segment for segment in listed_segments if segment["id"] in extent_by_id]
    if listed_segments and not segments:
        raise SampleError(f"{name}: none of its {len(listed_segments)} segments has pixels")
    ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
    place = np.searchsorted(ids, id_map)  # (H, W) index of the candidate segment
    place[place == len(ids)] = 0
    listed = ids[place] == id_map if len(ids) else np.zeros(id_map.shape, bool)
    place = np.where(listed, place, len(ids))
    semantic_by_place, instance_by_place = np.full(len(ids) + 1, UNLABELED, np.uint8), np.zeros(len(ids) + 1, np.int32)
    boxes, labels = [], []
    for i, segment in enumerate(segments):
        semantic_by_place[i] = categories.semantic_index(segment["category_id"])
        label = categories.thing_label.get(segment["category_id"])
        if label is None or segment.get("iscrowd"):
            continue
        x, y, w, h = box_of(segment, extent_by_id[segment["id"]])
        box = np.array([max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)], np.float32)
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            continue
        boxes.append(box)
        labels.append(label)
        instance_by_place[i] = len(boxes)
    return Sample(
        name,
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        instance_by_place[place],
        semantic_by_place[place],
        tuple(notes),
    )


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
