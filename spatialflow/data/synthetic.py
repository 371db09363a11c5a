# SPDX-License-Identifier: Apache-2.0
"""Synthetic landscapes with exact panoptic ground truth: textured stuff, things that occlude each other, in
perspective.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from spatialflow.data.categories import TABLES, read_rows
from spatialflow.files import write_jpeg
from spatialflow.panoptic.writer import PanopticWriter, earlier_files

CATEGORIES: tuple[dict[str, Any], ...] = tuple(read_rows(TABLES / "synthetic.json"))
"""The category table of synthetic scenes."""

_INFO = {"description": "written by spatialflow synthesize"}
_ID = {row["name"]: row["id"] for row in CATEGORIES}
_STUFF = [row["name"] for row in CATEGORIES if not row["isthing"]]
SMALLEST_SHARE = 0.001
"""Of the image: what is left visible of a thing or region below this share is void."""


class Scene(NamedTuple):
    """One image with its segments."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    id_map: np.ndarray  # (H, W) int32, 0 = void
    segments: list[dict[str, Any]]  # id, category_id, area, bbox, iscrowd


def make_scene(size: tuple[int, int], seed: int, index: int) -> Scene:
    """Draws one scene.

    Args:
        size: (height, width), at least 32 each.
        seed: of the data set.
        index: of the scene; every (size, seed, index) has its own scene, the same on each call.

    Returns:
        Scene.

    Raises:
        ValueError: a side is below 32.
    """
    height, width = size
    if min(height, width) < 32:
        raise ValueError(f"size: must be at least 32 x 32, got {height} x {width}")
    rng = np.random.default_rng([seed, index])
    canvas = _Canvas(height, width, rng)
    _draw_ground(canvas, rng)
    _draw_things(canvas, rng)
    return canvas.finish(rng)


def synthesize(folder: str | os.PathLike, count: int, size: tuple[int, int], seed: int = 0) -> Iterator[Path]:
    """Writes a data set of scenes in the COCO panoptic format, one image at a time.

    Args:
        folder: gets `images/`, `panoptic/` and `panoptic.json`.
        count: scenes.
        size: (height, width) of every scene.
        seed: data sets of different seeds share no scene.

    Returns:
        An iterator over the paths of the images as they are written; the JSON is complete when it ends.

    Raises:
        ValueError: count is not positive, a side is below 32, or `panoptic.json` exists and is of no synthetic scenes.
        InUseError: another process writes to the folder.
        OSError: a file cannot be written.
    """
    if count < 1:
        raise ValueError(f"count: must be positive, got {count}")
    folder = Path(folder)
    json_path = folder / "panoptic.json"
    if others := earlier_files(json_path, _INFO)[1]:
        raise ValueError(f"{others[0]}: would be replaced, and is not of synthetic scenes")
    with PanopticWriter(folder / "panoptic", json_path, CATEGORIES, info=_INFO) as writer:
        for index in range(count):
            scene = make_scene(size, seed, index)
            path = folder / "images" / f"{index + 1:06d}.jpg"
            write_jpeg(path, scene.image)
            writer.add(index + 1, path.name, scene.id_map, scene.segments)
            yield path


class _Canvas:
    """Image and segment ids, painted from back to front."""

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.height, self.width = height, width
        self.unit = float(min(height, width))
        self.image = np.zeros((height, width, 3), np.float32)
        self.ids = np.zeros((height, width), np.int32)
        self.category: dict[int, str] = {}
        self.horizon = int(height * rng.uniform(0.32, 0.5))
        self.light = rng.uniform(-1, 1)  # where the sun stands: -1 left, 1 right
        self.rows, self.columns = np.mgrid[0:height, 0:width].astype(np.float32)

    def new_segment(self, category: str) -> int:
        self.category[len(self.category) + 1] = category
        return len(self.category)

    def noise(self, rng: np.random.Generator, cell: float, octaves: int = 4, stretch: float = 1.0) -> np.ndarray:
        """Smooth noise in about -1..1; `cell` is the size of its largest features in pixels, `stretch` widens them."""
        total, weight = np.zeros((self.height, self.width), np.float32), 0.0
        for octave in range(octaves):
            rows = max(int(self.height / cell * 2**octave), 1) + 2
            columns = max(int(self.width / (cell * stretch) * 2**octave), 1) + 2
            grid = rng.uniform(-1, 1, (min(rows, self.height), min(columns, self.width))).astype(np.float32)
            total += cv2.resize(grid, (self.width, self.height), interpolation=cv2.INTER_CUBIC) * 0.55**octave
            weight += 0.55**octave
        return total * (1.6 / weight)

    def paint(self, mask: np.ndarray, colour: np.ndarray, segment: int) -> None:
        """Sets the pixels of a mask; `colour` is (H, W, 3) or (3,)."""
        np.copyto(self.image, colour, where=mask[..., None])
        self.ids[mask] = segment

    def depth(self, row: float) -> float:
        """Nearness of the ground at a row: 0 at the horizon, 1 at the lower edge."""
        return max(row - self.horizon, 0) / max(self.height - self.horizon, 1)

    def finish(self, rng: np.random.Generator) -> Scene:
        """Camera and tidy-up: tint, blur, grain; slivers become void."""
        image = self.image * rng.uniform(0.88, 1.08, 3).astype(np.float32) * rng.uniform(0.85, 1.12)
        image = cv2.GaussianBlur(image, (3, 3), 0.55)
        image += rng.normal(0, rng.uniform(1.5, 5), image.shape).astype(np.float32)
        smallest = max(int(SMALLEST_SHARE * self.ids.size), 4)
        areas = np.bincount(self.ids.ravel(), minlength=len(self.category) + 1)
        segments, number = [], np.zeros(len(areas), np.int32)
        for segment, category in self.category.items():
            if areas[segment] >= smallest:
                number[segment] = len(segments) + 1
                mask = self.ids == segment
                rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
                box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
                segments.append(
                    {
                        "id": len(segments) + 1,
                        "category_id": _ID[category],
                        "area": int(areas[segment]),
                        "bbox": box,
                        "iscrowd": 0,
                    }
                )
        return Scene(image.clip(0, 255).astype(np.uint8), number[self.ids], segments)


def _shade(base: tuple[float, float, float], noise: np.ndarray, amount: float) -> np.ndarray:
    """A BGR color modulated by noise, (H, W, 3)."""
    return np.float32(base) * (1 + amount * noise[..., None])


def _vary(
    rng: np.random.Generator, base: tuple[float, float, float], amount: float = 0.12
) -> tuple[float, float, float]:
    return tuple(float(np.clip(c * rng.uniform(1 - amount, 1 + amount), 0, 255)) for c in base)


def _draw_ground(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Sky, mountains, then grass with fields, a lake and a road."""
    segments = {name: canvas.new_segment(name) for name in _STUFF}
    below = np.clip(canvas.rows / canvas.horizon, 0, 1)[..., None]
    zenith, haze = np.float32(_vary(rng, (215, 150, 90))), np.float32(_vary(rng, (235, 215, 190), 0.06))
    clouds = np.clip(canvas.noise(rng, canvas.unit * 0.45, 5, stretch=2.2) - rng.uniform(-0.1, 0.5), 0, 1)[..., None]
    sky = zenith + (haze - zenith) * below
    canvas.paint(np.ones(canvas.ids.shape, bool), sky + (np.float32((248, 246, 244)) - sky) * clouds, segments["sky"])

    if rng.random() < 0.85:
        for layer in range(int(rng.integers(1, 4))):
            ridge = canvas.noise(rng, canvas.unit * rng.uniform(0.3, 0.6), 5)[0] * rng.uniform(
                0.08, 0.16
            ) + rng.uniform(0.02, 0.12)
            top = canvas.horizon - ridge * canvas.height * (1 - 0.25 * layer)
            rock = canvas.noise(rng, canvas.unit * 0.12, 5)
            colour = _shade(_vary(rng, (128 - 14 * layer, 112 - 12 * layer, 104 - 14 * layer)), rock, 0.22)
            snow = (canvas.rows - top[None] < canvas.height * (0.03 + 0.015 * rock)) & (
                top[None] < canvas.horizon * 0.72
            )
            colour[snow] = np.float32((235, 232, 228))
            canvas.paint((canvas.rows >= top[None]) & (canvas.rows < canvas.horizon), colour, segments["mountain"])

    ground = canvas.rows >= canvas.horizon
    near = np.clip((canvas.rows - canvas.horizon) / max(canvas.height - canvas.horizon, 1), 0, 1)
    blades = canvas.noise(rng, canvas.unit * 0.05, 3) * (0.4 + near) + 0.6 * canvas.noise(
        rng, canvas.unit * 0.4, 3, stretch=2
    )
    canvas.paint(ground, _shade(_vary(rng, (58, 132, 88)), blades, 0.2), segments["grass"])

    if rng.random() < 0.6:  # a field: a band of the ground with furrows running to the vanishing point
        start, end = sorted(rng.uniform(0.02, 0.75, 2))
        edge = canvas.noise(rng, canvas.unit * 0.8, 2)[0] * 0.03
        side = rng.choice([-1, 1])
        limit = canvas.width * rng.uniform(0.25, 0.75) + (canvas.rows - canvas.horizon) * rng.uniform(-0.8, 0.8)
        band = (
            (near > start + edge[None])
            & (near < end + 0.12 + edge[None])
            & ground
            & ((canvas.columns - limit) * side > 0)
        )
        vanish = canvas.width * rng.uniform(-0.2, 1.2)
        angle = np.arctan2(canvas.columns - vanish, canvas.rows - canvas.horizon + 0.06 * canvas.height)
        furrows = np.sin(angle * rng.uniform(50, 90)) + 0.6 * canvas.noise(rng, canvas.unit * 0.06, 3)
        canvas.paint(band, _shade(_vary(rng, (92, 182, 212)), furrows, 0.12), segments["field"])

    if rng.random() < 0.55:  # a lake: an ellipse flattened by perspective
        row = canvas.horizon + (canvas.height - canvas.horizon) * rng.uniform(0.1, 0.6)
        radius = np.array([canvas.width * rng.uniform(0.22, 0.5), (row - canvas.horizon) * rng.uniform(0.4, 0.9) + 3])
        wobble = canvas.noise(rng, canvas.unit * 0.3, 3) * 0.12
        distance = np.hypot(
            (canvas.columns - canvas.width * rng.uniform(0, 1)) / radius[0], (canvas.rows - row) / radius[1]
        )
        ripples = canvas.noise(rng, canvas.unit * 0.05, 3, stretch=6)
        canvas.paint(
            (distance + wobble < 1) & ground, _shade(_vary(rng, (176, 128, 62)), ripples, 0.16), segments["water"]
        )

    if rng.random() < 0.7:  # a road from the lower edge to the horizon
        bottom, top = canvas.width * rng.uniform(0.05, 0.95), canvas.width * rng.uniform(0.3, 0.7)
        bend = canvas.width * rng.uniform(-0.25, 0.25)
        centre = top + (bottom - top) * near + bend * near * (1 - near)
        half = canvas.unit * (0.012 + rng.uniform(0.16, 0.3) * near)
        offset = canvas.columns - centre
        asphalt = _shade(_vary(rng, (104, 102, 104)), canvas.noise(rng, canvas.unit * 0.03, 2), 0.1)
        dashes = (np.abs(offset) < half * 0.05) & (np.sin(14 / (near + 0.12)) > 0)
        asphalt[dashes | (np.abs(np.abs(offset) - half * 0.9) < half * 0.04)] = np.float32((225, 228, 230))
        canvas.paint((np.abs(offset) < half) & ground, asphalt, segments["road"])


def _draw_things(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Things from far to near; each stands on the kind of ground it needs."""
    wanted: list[tuple[float, str]] = []
    span = canvas.height - canvas.horizon
    for name, share, most, nearest in (
        ("house", 0.6, 3, 0.55),
        ("tree", 0.75, 6, 0.8),
        ("car", 0.65, 4, 0.85),
        ("person", 0.65, 5, 0.95),
        ("boat", 0.8, 3, 0.9),
    ):
        if rng.random() < share:
            wanted += [
                (canvas.horizon + span * rng.uniform(0.04, nearest), name)
                for _ in range(int(rng.integers(1, most + 1)))
            ]
    balloons = [(0.0, "balloon")] * int(rng.integers(1, 4)) if rng.random() < 0.5 else []
    for row, name in balloons + sorted(wanted):
        place = _find_place(canvas, rng, row, name)
        if place is not None:
            _DRAW[name](canvas, rng, *place)


def _find_place(canvas: _Canvas, rng: np.random.Generator, row: float, name: str) -> tuple[float, float, float] | None:
    """(x, y, height) of the foot of a thing; None where the scene has no ground for it."""
    if name == "balloon":
        size = canvas.unit * rng.uniform(0.1, 0.3)
        return canvas.width * rng.uniform(0.05, 0.95), rng.uniform(0.75, 1.0) * canvas.horizon, size
    ground = {"boat": {"water"}, "car": {"road", "grass"}, "house": {"grass", "field"}}.get(
        name, {"grass", "field", "road"}
    )
    height = canvas.unit * {"person": 0.34, "car": 0.26, "house": 0.62, "tree": 0.7, "boat": 0.34}[name]
    for _ in range(12):
        x = canvas.width * rng.uniform(0.02, 0.98)
        segment = canvas.ids[min(int(row), canvas.height - 1), min(int(x), canvas.width - 1)]
        if canvas.category.get(int(segment)) in ground:
            return x, row, height * (0.2 + 0.9 * canvas.depth(row)) * rng.uniform(0.85, 1.15)
    return None


class _Brush:
    """Draws polygons and ellipses in a thing's own coordinates: x to the right, y up from its foot, its height is 1."""

    def __init__(self, canvas: _Canvas, x: float, y: float, size: float, category: str, mirror: bool = False):
        self.canvas, self.x, self.y, self.size, self.mirror = canvas, x, y, size, mirror
        self.segment = canvas.new_segment(category)

    def _place(self, points: np.ndarray) -> np.ndarray:
        points = np.asarray(points, np.float64).reshape(-1, 2) * [-1 if self.mirror else 1, -1] * self.size + [
            self.x,
            self.y,
        ]
        return np.round(points * 16).astype(np.int32)  # OpenCV's fixed-point coordinates, 4 fractional bits

    def polygon(
        self, points: list[tuple[float, float]], colour: tuple[float, float, float], texture: float = 0.0
    ) -> None:
        """Fills a polygon, lit from the scene's side (brighter towards the sun), with a grain of its own."""
        canvas, corners = self.canvas, self._place(np.array(points))
        left, top = np.maximum(corners.min(axis=0) // 16, 0)
        right, bottom = np.minimum(corners.max(axis=0) // 16 + 2, (canvas.width, canvas.height))
        if left >= right or top >= bottom:
            return
        window = (slice(top, bottom), slice(left, right))  # work on the polygon's surroundings alone
        rows, columns = canvas.rows[window], canvas.columns[window]
        mask = np.zeros(rows.shape, np.uint8)
        cv2.fillPoly(mask, [(corners - np.array([left, top]) * 16).astype(np.int32)], 1, shift=4)
        light = 1 + 0.22 * np.clip((columns - self.x) / max(self.size, 1) * 2 * canvas.light, -1, 1)
        if texture:
            light = light * (1 + texture * np.sin(columns * 1.7 + 3 * np.sin(rows * 0.9)) * np.sin(rows * 1.3))
        inside = mask.astype(bool)
        canvas.image[window][inside] = np.float32(colour) * light[inside][:, None]
        canvas.ids[window][inside] = self.segment

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, colour: tuple[float, float, float], texture: float = 0.0
    ) -> None:
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        self.polygon(list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle))), colour, texture)

    def shadow(self, width: float) -> None:
        """Darkens the ground beside the foot; the ground keeps its segment."""
        canvas, radius = self.canvas, max(width * self.size, 1)
        centre, height = self.x - canvas.light * width * 0.5 * self.size, max(0.13 * radius, 1)
        top, bottom = int(max(self.y - height - 1, canvas.horizon + 1)), int(max(self.y + height + 2, 0))
        window = (slice(top, bottom), slice(int(max(centre - radius - 1, 0)), int(max(centre + radius + 2, 0))))
        distance = np.hypot((canvas.columns[window] - centre) / radius, (canvas.rows[window] - self.y) / height)
        canvas.image[window] *= np.where(distance < 1, np.float32(0.62), np.float32(1))[..., None]


def _draw_house(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = _Brush(canvas, x, y, size, "house")
    half, wall = rng.uniform(0.45, 0.75), rng.uniform(0.5, 0.62)
    brush.shadow(half * 1.2)
    walls = _vary(rng, ((190, 210, 225), (120, 150, 205), (205, 200, 200), (110, 190, 220))[rng.integers(4)])
    brush.polygon([(-half, 0), (half, 0), (half, wall), (-half, wall)], walls, 0.04)
    roof = _vary(rng, ((60, 60, 150), (70, 75, 90), (60, 90, 140))[rng.integers(3)])
    brush.polygon(
        [
            (-half * 1.12, wall),
            (half * 1.12, wall),
            (half * rng.uniform(0.0, 0.6), 1),
            (-half * rng.uniform(0.0, 0.6), 1),
        ],
        roof,
        0.1,
    )
    brush.polygon([(-0.08, 0), (0.08, 0), (0.08, wall * 0.55), (-0.08, wall * 0.55)], (50, 70, 95))
    for column in (-0.62, 0.62):
        left, right = (column - 0.2) * half, (column + 0.2) * half
        brush.polygon(
            [(left, wall * 0.4), (right, wall * 0.4), (right, wall * 0.78), (left, wall * 0.78)], (120, 95, 70)
        )


def _draw_tree(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = _Brush(canvas, x, y, size * rng.uniform(0.8, 1.1), "tree")
    brush.shadow(0.4)
    brush.polygon([(-0.05, 0), (0.05, 0), (0.03, 0.5), (-0.03, 0.5)], _vary(rng, (45, 70, 95)))
    leaves = _vary(rng, (36, 92, 44), 0.2)
    if rng.random() < 0.4:  # a conifer
        for level in range(3):
            low, width = 0.2 + 0.22 * level, 0.32 - 0.08 * level
            brush.polygon(
                [(-width, low), (width, low), (0, low + 0.38)], tuple(c * (0.85 + 0.12 * level) for c in leaves), 0.16
            )
        return
    for _ in range(int(rng.integers(5, 9))):
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.17)
        brush.ellipse(
            radius * np.cos(angle),
            0.66 + radius * np.sin(angle),
            rng.uniform(0.14, 0.21),
            rng.uniform(0.12, 0.19),
            tuple(c * rng.uniform(0.85, 1.15) for c in leaves),
            0.18,
        )


def _draw_car(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = _Brush(canvas, x, y, size, "car", mirror=rng.random() < 0.5)
    brush.shadow(1.15)
    paint = _vary(
        rng,
        ((50, 50, 190), (170, 90, 40), (40, 170, 215), (225, 225, 225), (60, 60, 60), (70, 140, 60))[rng.integers(6)],
    )
    brush.polygon([(-1.1, 0.2), (1.1, 0.2), (1.12, 0.48), (0.75, 0.58), (-1.05, 0.6), (-1.14, 0.4)], paint)
    brush.polygon([(-0.8, 0.58), (0.62, 0.58), (0.3, 0.98), (-0.55, 1.0)], paint)
    brush.polygon([(-0.66, 0.6), (-0.08, 0.6), (-0.08, 0.9), (-0.48, 0.9)], (130, 110, 85))
    brush.polygon([(0.02, 0.6), (0.48, 0.6), (0.24, 0.9), (0.02, 0.9)], (130, 110, 85))
    for wheel in (-0.65, 0.65):
        brush.ellipse(wheel, 0.2, 0.22, 0.2, (32, 32, 32))
        brush.ellipse(wheel, 0.2, 0.1, 0.09, (165, 165, 165))


def _draw_person(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = _Brush(canvas, x, y, size, "person", mirror=rng.random() < 0.5)
    brush.shadow(0.3)
    shirt, trousers = (
        _vary(
            rng, ((40, 40, 200), (200, 80, 60), (60, 200, 220), (200, 200, 210), (140, 60, 150))[rng.integers(5)], 0.25
        ),
        _vary(rng, ((110, 60, 40), (50, 50, 55), (70, 95, 120))[rng.integers(3)], 0.2),
    )
    skin, step = _vary(rng, ((150, 180, 225), (90, 125, 175), (60, 85, 125))[rng.integers(3)]), rng.uniform(0.03, 0.12)
    brush.polygon([(-0.08, 0.5), (0.02, 0.5), (-step + 0.03, 0), (-step - 0.05, 0)], trousers)
    brush.polygon([(-0.02, 0.5), (0.08, 0.5), (step + 0.06, 0), (step - 0.02, 0)], trousers)
    arm = rng.uniform(0.12, 0.26)
    brush.polygon([(-0.09, 0.8), (-0.03, 0.82), (-arm + 0.02, 0.46), (-arm - 0.04, 0.46)], skin)
    brush.polygon([(0.03, 0.82), (0.09, 0.8), (arm + 0.04, 0.46), (arm - 0.02, 0.46)], skin)
    brush.polygon([(-0.11, 0.48), (0.11, 0.48), (0.12, 0.83), (-0.12, 0.83)], shirt)
    brush.ellipse(0, 0.91, 0.065, 0.085, skin)
    brush.ellipse(0, 0.955, 0.068, 0.045, _vary(rng, (40, 50, 60), 0.4))


def _draw_balloon(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = _Brush(canvas, x, y, size, "balloon")
    first, second = (
        _vary(rng, ((40, 40, 215), (30, 190, 240), (200, 70, 150), (215, 130, 40), (235, 235, 235))[i])
        for i in rng.choice(5, 2, replace=False)
    )
    brush.polygon([(-0.14, 0.34), (0.14, 0.34), (0.07, 0.14), (-0.07, 0.14)], (70, 90, 120))
    for i, width in enumerate((0.36, 0.26, 0.13)):
        brush.ellipse(0, 0.66, width, 0.36, first if i % 2 == 0 else second)
    brush.polygon([(-0.08, 0), (0.08, 0), (0.09, 0.15), (-0.09, 0.15)], (45, 75, 115), 0.1)


def _draw_boat(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = _Brush(canvas, x, y, size, "boat", mirror=rng.random() < 0.5)
    brush.shadow(0.7)
    brush.polygon([(-0.02, 0.1), (0.02, 0.1), (0.02, 1.0), (-0.02, 1.0)], (60, 80, 100))
    sail = _vary(rng, ((235, 240, 242), (120, 180, 240), (90, 90, 215))[rng.integers(3)], 0.05)
    brush.polygon([(0.04, 0.26), (0.5, 0.26), (0.04, 0.98)], sail)
    brush.polygon([(-0.04, 0.28), (-0.34, 0.28), (-0.04, 0.88)], tuple(c * 0.93 for c in sail))
    brush.polygon(
        [(-0.62, 0.22), (0.66, 0.22), (0.48, -0.02), (-0.48, -0.02)],
        _vary(rng, ((40, 60, 140), (120, 70, 40), (60, 60, 60))[rng.integers(3)]),
    )


_DRAW: dict[str, Callable[..., None]] = {
    "house": _draw_house,
    "tree": _draw_tree,
    "car": _draw_car,
    "person": _draw_person,
    "balloon": _draw_balloon,
    "boat": _draw_boat,
}
