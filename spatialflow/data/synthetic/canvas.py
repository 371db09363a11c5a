# SPDX-License-Identifier: Apache-2.0
"""The canvas of synthetic scenes: an image and its segment ids, painted from back to front, and a brush."""

from typing import Any, NamedTuple

import cv2
import numpy as np

from spatialflow.data.categories import TABLES, read_rows
from spatialflow.panoptic.extents import extents

CATEGORIES: tuple[dict[str, Any], ...] = tuple(read_rows(TABLES / "synthetic.json"))
"""The category table of synthetic scenes."""

SMALLEST_SHARE = 0.001
"""Segments with a smaller share of the image's pixels, or with fewer than 4 pixels, become void."""

_ID_BY_NAME = {row["name"]: row["id"] for row in CATEGORIES}

Color = tuple[float, float, float]  # blue, green, red, 0 to 255


class Scene(NamedTuple):
    """One image with its segments."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    id_map: np.ndarray  # (H, W) int32, 0 = void
    segments: list[dict[str, Any]]  # id, category_id, area, bbox, iscrowd


class Canvas:
    """An image and its segment ids, painted from back to front.

    Args:
        height, width: of the image.
        rng: decides the row of the horizon and the side of the sun.

    Attributes:
        unit: the shorter side, by which sizes scale.
        image: (H, W, 3) float32 BGR.
        ids: (H, W) int32 segment of every pixel.
        category: name of the category by segment.
        horizon: row of the horizon.
        light: side of the sun, from -1 (left) to 1 (right).
        rows, columns: (H, W) float32 coordinates of every pixel.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width = height, width
        self.unit = float(min(height, width))
        self.image = np.zeros((height, width, 3), np.float32)
        self.ids = np.zeros((height, width), np.int32)
        self.category: dict[int, str] = {}
        self.horizon = int(height * rng.uniform(0.32, 0.5))
        self.light = rng.uniform(-1, 1)
        self.rows, self.columns = np.mgrid[0:height, 0:width].astype(np.float32)

    def new_segment(self, category: str) -> int:
        """Add a segment without pixels, and return its number."""
        self.category[len(self.category) + 1] = category
        return len(self.category)

    def noise(self, rng: np.random.Generator, cell: float, octaves: int = 4, stretch: float = 1.0) -> np.ndarray:
        """Draw smooth noise of several octaves, (H, W) float32 in about -1..1.

        Args:
            rng: source of the values.
            cell: size of the largest features in pixels.
            octaves: number of octaves; each has features of half the size of those before it.
            stretch: factor by which features are wider than high.
        """
        total, weight = np.zeros((self.height, self.width), np.float32), 0.0
        for octave in range(octaves):
            rows = max(int(self.height / cell * 2**octave), 1) + 2
            columns = max(int(self.width / (cell * stretch) * 2**octave), 1) + 2
            grid = rng.uniform(-1, 1, (min(rows, self.height), min(columns, self.width))).astype(np.float32)
            total += cv2.resize(grid, (self.width, self.height), interpolation=cv2.INTER_CUBIC) * 0.55**octave
            weight += 0.55**octave
        return total * (1.6 / weight)

    def paint(self, mask: np.ndarray, color: np.ndarray, segment: int) -> None:
        """Set the pixels of a mask to a color, (H, W, 3) or (3,), and to a segment."""
        np.copyto(self.image, color, where=mask[..., None])
        self.ids[mask] = segment

    def depth(self, row: float) -> float:
        """Return the nearness of the ground at a row: 0 at the horizon, 1 at the lower edge."""
        return max(row - self.horizon, 0) / max(self.height - self.horizon, 1)

    def finish(self, rng: np.random.Generator) -> Scene:
        """Apply tint, blur and grain, and turn segments below `SMALLEST_SHARE` into void."""
        image: np.ndarray = self.image * rng.uniform(0.88, 1.08, 3).astype(np.float32) * rng.uniform(0.85, 1.12)
        image = cv2.GaussianBlur(image, (3, 3), 0.55)
        image += rng.normal(0, rng.uniform(1.5, 5), image.shape).astype(np.float32)
        smallest = max(int(SMALLEST_SHARE * self.ids.size), 4)
        extent_by_segment = extents(self.ids)
        segments: list[dict[str, Any]] = []
        id_by_segment = np.zeros(len(self.category) + 1, np.int32)
        for segment, category in self.category.items():
            extent = extent_by_segment.get(segment)
            if extent is not None and extent.pixels >= smallest:
                id_by_segment[segment] = len(segments) + 1
                row = {"id": len(segments) + 1, "category_id": _ID_BY_NAME[category]}
                segments.append(row | {"area": extent.pixels, "bbox": extent.box, "iscrowd": 0})
        return Scene(image.clip(0, 255).astype(np.uint8), id_by_segment[self.ids], segments)


def shade(base: Color, noise: np.ndarray, amount: float) -> np.ndarray:
    """Modulate a color by noise (H, W): (H, W, 3) float32."""
    return np.array(base, np.float32) * (1 + amount * noise[..., None])


def vary_color(rng: np.random.Generator, base: Color, amount: float = 0.12) -> Color:
    """Multiply each channel of a color by a random factor from 1 - amount to 1 + amount."""
    blue, green, red = (float(np.clip(c * rng.uniform(1 - amount, 1 + amount), 0, 255)) for c in base)
    return blue, green, red


class Brush:
    """Brush that draws a new segment in the coordinates of a thing: origin at its foot, x to the right, y up, height 1.

    Args:
        canvas: the canvas to draw on.
        x, y: foot of the thing, in pixels.
        size: height of the thing, in pixels.
        category: category of the segment.
        mirror: whether to flip x.
    """

    def __init__(self, canvas: Canvas, x: float, y: float, size: float, category: str, mirror: bool = False) -> None:
        self.canvas, self.x, self.y, self.size, self.mirror = canvas, x, y, size, mirror
        self.segment = canvas.new_segment(category)

    def _place(self, points: np.ndarray) -> np.ndarray:
        points = np.asarray(points, np.float64).reshape(-1, 2) * [-1 if self.mirror else 1, -1] * self.size + [
            self.x,
            self.y,
        ]
        return np.round(points * 16).astype(np.int32)  # OpenCV's fixed-point coordinates, 4 fractional bits

    def polygon(self, points: list[tuple[float, float]], color: Color, texture: float = 0.0) -> None:
        """Fill a polygon, brighter toward the sun; `texture` is the amplitude of a wavy pattern."""
        canvas, corners = self.canvas, self._place(np.array(points))
        left, top = np.maximum(corners.min(axis=0) // 16, 0)
        right, bottom = np.minimum(corners.max(axis=0) // 16 + 2, (canvas.width, canvas.height))
        if left >= right or top >= bottom:
            return
        window = (slice(top, bottom), slice(left, right))  # the bounding box of the polygon
        rows, columns = canvas.rows[window], canvas.columns[window]
        mask = np.zeros(rows.shape, np.uint8)
        cv2.fillPoly(mask, [(corners - np.array([left, top]) * 16).astype(np.int32)], 1, shift=4)
        light = 1 + 0.22 * np.clip((columns - self.x) / max(self.size, 1) * 2 * canvas.light, -1, 1)
        if texture:
            light = light * (1 + texture * np.sin(columns * 1.7 + 3 * np.sin(rows * 0.9)) * np.sin(rows * 1.3))
        inside = mask.astype(bool)
        canvas.image[window][inside] = np.array(color, np.float32) * light[inside][:, None]
        canvas.ids[window][inside] = self.segment

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color, texture: float = 0.0) -> None:
        """Fill an ellipse of center (x, y) and radii (rx, ry), as `polygon`."""
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        self.polygon(list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle), strict=True)), color, texture)

    def shadow(self, width: float) -> None:
        """Darken the ground beside the foot; the ground keeps its segment."""
        canvas, radius = self.canvas, max(width * self.size, 1)
        center, height = self.x - canvas.light * width * 0.5 * self.size, max(0.13 * radius, 1)
        top, bottom = int(max(self.y - height - 1, canvas.horizon + 1)), int(max(self.y + height + 2, 0))
        window = (slice(top, bottom), slice(int(max(center - radius - 1, 0)), int(max(center + radius + 2, 0))))
        distance = np.hypot((canvas.columns[window] - center) / radius, (canvas.rows[window] - self.y) / height)
        canvas.image[window] *= np.where(distance < 1, np.float32(0.62), np.float32(1))[..., None]
