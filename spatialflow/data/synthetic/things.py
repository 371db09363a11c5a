# SPDX-License-Identifier: Apache-2.0
"""The things of synthetic scenes: houses, trees, cars, persons, boats and balloons."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from spatialflow.data.synthetic.canvas import Brush, Canvas, Color, vary_color


def _draw_house(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = Brush(canvas, x, y, size, "house")
    half, wall = rng.uniform(0.45, 0.75), rng.uniform(0.5, 0.62)
    brush.shadow(half * 1.2)
    walls = vary_color(rng, ((190, 210, 225), (120, 150, 205), (205, 200, 200), (110, 190, 220))[rng.integers(4)])
    brush.polygon([(-half, 0), (half, 0), (half, wall), (-half, wall)], walls, 0.04)
    roof = vary_color(rng, ((60, 60, 150), (70, 75, 90), (60, 90, 140))[rng.integers(3)])
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


def _draw_tree(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = Brush(canvas, x, y, size * rng.uniform(0.8, 1.1), "tree")
    brush.shadow(0.4)
    brush.polygon([(-0.05, 0), (0.05, 0), (0.03, 0.5), (-0.03, 0.5)], vary_color(rng, (45, 70, 95)))
    leaves = vary_color(rng, (36, 92, 44), 0.2)
    if rng.random() < 0.4:  # a conifer
        for level in range(3):
            low, width = 0.2 + 0.22 * level, 0.32 - 0.08 * level
            brush.polygon(
                [(-width, low), (width, low), (0, low + 0.38)], _color(c * (0.85 + 0.12 * level) for c in leaves), 0.16
            )
        return
    for _ in range(int(rng.integers(5, 9))):
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.17)
        brush.ellipse(
            radius * np.cos(angle),
            0.66 + radius * np.sin(angle),
            rng.uniform(0.14, 0.21),
            rng.uniform(0.12, 0.19),
            _color(c * rng.uniform(0.85, 1.15) for c in leaves),
            0.18,
        )


def _draw_car(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = Brush(canvas, x, y, size, "car", mirror=rng.random() < 0.5)
    brush.shadow(1.15)
    paint = vary_color(
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


def _draw_person(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = Brush(canvas, x, y, size, "person", mirror=rng.random() < 0.5)
    brush.shadow(0.3)
    shirt, trousers = (
        vary_color(
            rng, ((40, 40, 200), (200, 80, 60), (60, 200, 220), (200, 200, 210), (140, 60, 150))[rng.integers(5)], 0.25
        ),
        vary_color(rng, ((110, 60, 40), (50, 50, 55), (70, 95, 120))[rng.integers(3)], 0.2),
    )
    skin, step = (
        vary_color(rng, ((150, 180, 225), (90, 125, 175), (60, 85, 125))[rng.integers(3)]),
        rng.uniform(0.03, 0.12),
    )
    brush.polygon([(-0.08, 0.5), (0.02, 0.5), (-step + 0.03, 0), (-step - 0.05, 0)], trousers)
    brush.polygon([(-0.02, 0.5), (0.08, 0.5), (step + 0.06, 0), (step - 0.02, 0)], trousers)
    arm = rng.uniform(0.12, 0.26)
    brush.polygon([(-0.09, 0.8), (-0.03, 0.82), (-arm + 0.02, 0.46), (-arm - 0.04, 0.46)], skin)
    brush.polygon([(0.03, 0.82), (0.09, 0.8), (arm + 0.04, 0.46), (arm - 0.02, 0.46)], skin)
    brush.polygon([(-0.11, 0.48), (0.11, 0.48), (0.12, 0.83), (-0.12, 0.83)], shirt)
    brush.ellipse(0, 0.91, 0.065, 0.085, skin)
    brush.ellipse(0, 0.955, 0.068, 0.045, vary_color(rng, (40, 50, 60), 0.4))


def _draw_balloon(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = Brush(canvas, x, y, size, "balloon")
    first, second = (
        vary_color(rng, ((40, 40, 215), (30, 190, 240), (200, 70, 150), (215, 130, 40), (235, 235, 235))[i])
        for i in rng.choice(5, 2, replace=False)
    )
    brush.polygon([(-0.14, 0.34), (0.14, 0.34), (0.07, 0.14), (-0.07, 0.14)], (70, 90, 120))
    for i, width in enumerate((0.36, 0.26, 0.13)):
        brush.ellipse(0, 0.66, width, 0.36, first if i % 2 == 0 else second)
    brush.polygon([(-0.08, 0), (0.08, 0), (0.09, 0.15), (-0.09, 0.15)], (45, 75, 115), 0.1)


def _draw_boat(canvas: Canvas, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    brush = Brush(canvas, x, y, size, "boat", mirror=rng.random() < 0.5)
    brush.shadow(0.7)
    brush.polygon([(-0.02, 0.1), (0.02, 0.1), (0.02, 1.0), (-0.02, 1.0)], (60, 80, 100))
    sail = vary_color(rng, ((235, 240, 242), (120, 180, 240), (90, 90, 215))[rng.integers(3)], 0.05)
    brush.polygon([(0.04, 0.26), (0.5, 0.26), (0.04, 0.98)], sail)
    brush.polygon([(-0.04, 0.28), (-0.34, 0.28), (-0.04, 0.88)], _color(c * 0.93 for c in sail))
    brush.polygon(
        [(-0.62, 0.22), (0.66, 0.22), (0.48, -0.02), (-0.48, -0.02)],
        vary_color(rng, ((40, 60, 140), (120, 70, 40), (60, 60, 60))[rng.integers(3)]),
    )


class _Kind(NamedTuple):
    """The drawing parameters of the things of a category."""

    category: str
    draw: Callable[[Canvas, np.random.Generator, float, float, float], None]
    height: float  # approximate, at the lower edge of the image, as a share of the shorter side of the image
    ground: frozenset[str]  # stuff that the foot may stand on
    probability: float  # that a scene tries to place at least one
    largest_count: int
    nearest: float  # largest distance of the foot from the horizon, as a share of the ground's height


_KINDS = (
    _Kind("house", _draw_house, 0.62, frozenset({"grass", "field"}), 0.6, 3, 0.55),
    _Kind("tree", _draw_tree, 0.7, frozenset({"grass", "field", "road"}), 0.75, 6, 0.8),
    _Kind("car", _draw_car, 0.26, frozenset({"road", "grass"}), 0.65, 4, 0.85),
    _Kind("person", _draw_person, 0.34, frozenset({"grass", "field", "road"}), 0.65, 5, 0.95),
    _Kind("boat", _draw_boat, 0.34, frozenset({"water"}), 0.8, 3, 0.9),
)
"""The things that stand on the ground. Another order would give other scenes for the same seed."""


def _color(channels: Iterable[float]) -> Color:
    blue, green, red = channels
    return blue, green, red


def draw_things(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw balloons, then the things on the ground from far to near, each on a kind of ground that it may stand on."""
    span = canvas.height - canvas.horizon
    requests: list[tuple[float, str, _Kind]] = []  # row of the foot, category (breaks ties), kind
    for kind in _KINDS:
        if rng.random() < kind.probability:
            for _ in range(int(rng.integers(1, kind.largest_count + 1))):
                requests.append((canvas.horizon + span * rng.uniform(0.04, kind.nearest), kind.category, kind))
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 4))):
            size = canvas.unit * rng.uniform(0.1, 0.3)
            x, y = canvas.width * rng.uniform(0.05, 0.95), rng.uniform(0.75, 1.0) * canvas.horizon
            _draw_balloon(canvas, rng, x, y, size)
    for row, _, kind in sorted(requests, key=lambda request: request[:2]):
        column = _find_column(canvas, rng, row, kind.ground)
        if column is not None:
            height = canvas.unit * kind.height * (0.2 + 0.9 * canvas.depth(row)) * rng.uniform(0.85, 1.15)
            kind.draw(canvas, rng, column, row, height)


def _find_column(canvas: Canvas, rng: np.random.Generator, row: float, ground: frozenset[str]) -> float | None:
    """Choose a random x at which `row` shows one of the stuff categories `ground`; None after 12 failed attempts."""
    for _ in range(12):
        x = canvas.width * rng.uniform(0.02, 0.98)
        segment = canvas.ids[min(int(row), canvas.height - 1), min(int(x), canvas.width - 1)]
        if canvas.category.get(int(segment)) in ground:
            return x
    return None
