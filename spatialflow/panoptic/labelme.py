# SPDX-License-Identifier: Apache-2.0
"""Polygons of segments in the JSON format of LabelMe, the program for annotation."""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from spatialflow.panoptic.extents import extents

_VERSION = "5.5.0"  # of LabelMe, whose format this is
_MOST_DISTANCES = 1 << 22  # computed at once, to limit the memory


def labelme_content(
    id_map: np.ndarray,
    segments: Iterable[Mapping[str, Any]],
    names: Mapping[int, str],
    image_name: str,
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """Convert a panoptic map to the content of a LabelMe file.

    Args:
        id_map: (H, W) integer segment ids; ids that are not in `segments` have no shape.
        segments: mappings with `id`, `category_id` and optionally `score`.
        names: name of each category id; the id is the name of others.
        image_name: path of the photograph relative to the file.
        tolerance: largest distance in pixels between a border and its polygon. With 0, polygons filled by Pillow, as
            LabelMe fills them, give the map again.

    Returns:
        A JSON-serializable mapping. Each connected part of a segment is a polygon, and the parts share the segment's id
        as `group_id`. A hole is cut out through a line of zero width from the border, since the format has no holes.

    Raises:
        ValueError: tolerance is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0 pixels, got {tolerance!r}")
    extent_by_id = extents(id_map)
    shapes = []
    for segment in segments:
        if segment["id"] not in extent_by_id:
            continue
        left, top, width, height = extent_by_id[segment["id"]].box
        mask = id_map[top : top + height, left : left + width] == segment["id"]
        score = segment.get("score")
        for polygon in polygons_of(mask, tolerance):
            shapes.append(
                {
                    "label": names.get(segment["category_id"], str(segment["category_id"])),
                    "points": (polygon + np.array([left, top])).astype(float).tolist(),
                    "group_id": int(segment["id"]),
                    "description": "" if score is None else f"score {score:.4f}",
                    "shape_type": "polygon",
                    "flags": {},
                    "mask": None,
                }
            )
    height, width = id_map.shape
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": PurePosixPath(image_name).as_posix(),
        "imageData": None,
        "imageHeight": int(height),
        "imageWidth": int(width),
    }


def polygons_of(mask: np.ndarray, tolerance: float = 0.0) -> list[np.ndarray]:
    """Convert a mask to polygons, one per part of pixels that touch at a side or a corner.

    Args:
        mask: (H, W) bool.
        tolerance: largest distance in pixels between a border and its polygon.

    Returns:
        Arrays (N, 2) int32 of x, y, the indices of pixels at the border; N is at least 3. A part without area, such as
        one pixel, has repeated points.
    """
    import cv2

    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if tolerance:
        contours = [cv2.approxPolyDP(contour, tolerance, True) for contour in contours]
    polygons = []
    for index, contour in enumerate(contours):
        _, _, hole, outer = hierarchy[0][index]
        if outer >= 0:  # a hole
            continue
        holes = []
        while hole >= 0:
            holes.append(contours[hole][:, 0])
            hole = hierarchy[0][hole][0]
        polygon = _without_straight_points(_cut_out(contour[:, 0], holes))
        polygons.append(np.concatenate([polygon, polygon[-1:].repeat(max(0, 3 - len(polygon)), axis=0)]))
    return polygons


def _cut_out(polygon: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """Join holes (M, 2) to the polygon (N, 2) around them by lines that are walked in both directions.

    The hole that is nearest to the polygon is joined first. So a line crosses no other hole: that one would be nearer.
    """
    lines = [_nearest(polygon, hole) for hole in holes]
    while lines:
        chosen = min(range(len(lines)), key=lambda index: lines[index][0])
        _, point, begin = lines.pop(chosen)
        hole = np.roll(holes.pop(chosen), -begin, axis=0)
        at = int(np.flatnonzero((polygon == point).all(axis=1))[0])
        polygon = np.concatenate([polygon[: at + 1], hole, hole[:1], polygon[at:]])
        for index, other in enumerate(holes):
            lines[index] = min(lines[index], _nearest(hole, other), key=lambda line: line[0])
    return polygon


def _nearest(points: np.ndarray, hole: np.ndarray) -> tuple[int, np.ndarray, int]:
    """Return the smallest squared distance between a point and a point of the hole, the first and the other's index."""
    best: tuple[int, np.ndarray, int] | None = None
    step = max(1, _MOST_DISTANCES // len(points))
    for begin in range(0, len(hole), step):
        distances = np.square(hole[begin : begin + step, None] - points[None]).sum(axis=2)
        row, column = divmod(int(distances.argmin()), len(points))
        if best is None or distances[row, column] < best[0]:
            best = int(distances[row, column]), points[column], begin + row
    assert best is not None  # a contour has a point
    return best


def _without_straight_points(polygon: np.ndarray) -> np.ndarray:
    """Remove points between two equal steps, such as those of a straight line of pixels."""
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    kept = (before != after).any(axis=1)
    return polygon[kept] if kept.any() else polygon
