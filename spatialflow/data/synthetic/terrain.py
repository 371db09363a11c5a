# SPDX-License-Identifier: Apache-2.0
"""The terrain of synthetic scenes: sky, mountains, and grass with a field, a lake and a road."""

import numpy as np

from spatialflow.data.synthetic.canvas import CATEGORIES, Canvas, shade, vary_color

_STUFF = [row["name"] for row in CATEGORIES if not row["isthing"]]


def draw_terrain(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint all stuff, from far to near. Sky and grass are always drawn, each other part with some probability."""
    segment_by_name = {name: canvas.new_segment(name) for name in _STUFF}
    _draw_sky(canvas, rng, segment_by_name["sky"])
    if rng.random() < 0.85:
        _draw_mountains(canvas, rng, segment_by_name["mountain"])
    _draw_grass(canvas, rng, segment_by_name["grass"])
    if rng.random() < 0.6:
        _draw_field(canvas, rng, segment_by_name["field"])
    if rng.random() < 0.55:
        _draw_lake(canvas, rng, segment_by_name["water"])
    if rng.random() < 0.7:
        _draw_road(canvas, rng, segment_by_name["road"])


def _ground(canvas: Canvas) -> np.ndarray:
    """(H, W) bool: at or below the horizon."""
    return canvas.rows >= canvas.horizon


def _nearness(canvas: Canvas) -> np.ndarray:
    """(H, W) nearness of the ground: 0 at the horizon and above, 1 at the lower edge."""
    return np.clip((canvas.rows - canvas.horizon) / max(canvas.height - canvas.horizon, 1), 0, 1)


def _draw_sky(canvas: Canvas, rng: np.random.Generator, segment: int) -> None:
    """Fill the canvas with a color gradient from the zenith to the horizon, and clouds."""
    to_horizon = np.clip(canvas.rows / canvas.horizon, 0, 1)[..., None]
    zenith, haze = (
        np.array(vary_color(rng, (215, 150, 90)), np.float32),
        np.array(vary_color(rng, (235, 215, 190), 0.06), np.float32),
    )
    clouds = np.clip(canvas.noise(rng, canvas.unit * 0.45, 5, stretch=2.2) - rng.uniform(-0.1, 0.5), 0, 1)[..., None]
    sky = zenith + (haze - zenith) * to_horizon
    canvas.paint(np.ones(canvas.ids.shape, bool), sky + (np.array((248, 246, 244), np.float32) - sky) * clouds, segment)


def _draw_mountains(canvas: Canvas, rng: np.random.Generator, segment: int) -> None:
    """Paint one to three ridges above the horizon, with snow on their high parts."""
    for layer in range(int(rng.integers(1, 4))):
        ridge = canvas.noise(rng, canvas.unit * rng.uniform(0.3, 0.6), 5)[0]
        ridge = ridge * rng.uniform(0.08, 0.16) + rng.uniform(0.02, 0.12)
        top = (canvas.horizon - ridge * canvas.height * (1 - 0.25 * layer))[None]  # (1, W) row of the ridge
        rock = canvas.noise(rng, canvas.unit * 0.12, 5)
        color = shade(vary_color(rng, (128 - 14 * layer, 112 - 12 * layer, 104 - 14 * layer)), rock, 0.22)
        below_top = canvas.rows - top
        snow = (below_top < canvas.height * (0.03 + 0.015 * rock)) & (top < canvas.horizon * 0.72)
        color[snow] = np.array((235, 232, 228), np.float32)
        canvas.paint((canvas.rows >= top) & (canvas.rows < canvas.horizon), color, segment)


def _draw_grass(canvas: Canvas, rng: np.random.Generator, segment: int) -> None:
    """Fill everything below the horizon with grass."""
    blades = canvas.noise(rng, canvas.unit * 0.05, 3) * (0.4 + _nearness(canvas))
    blades = blades + 0.6 * canvas.noise(rng, canvas.unit * 0.4, 3, stretch=2)
    canvas.paint(_ground(canvas), shade(vary_color(rng, (58, 132, 88)), blades, 0.2), segment)


def _draw_field(canvas: Canvas, rng: np.random.Generator, segment: int) -> None:
    """Paint a band of the ground with furrows that run to a vanishing point."""
    near = _nearness(canvas)
    start, end = sorted(rng.uniform(0.02, 0.75, 2))
    edge = canvas.noise(rng, canvas.unit * 0.8, 2)[0] * 0.03
    side = rng.choice([-1, 1])
    limit = canvas.width * rng.uniform(0.25, 0.75) + (canvas.rows - canvas.horizon) * rng.uniform(-0.8, 0.8)
    band = (near > start + edge[None]) & (near < end + 0.12 + edge[None])
    band &= _ground(canvas) & ((canvas.columns - limit) * side > 0)
    vanishing_x = canvas.width * rng.uniform(-0.2, 1.2)
    angle = np.arctan2(canvas.columns - vanishing_x, canvas.rows - canvas.horizon + 0.06 * canvas.height)
    furrows = np.sin(angle * rng.uniform(50, 90)) + 0.6 * canvas.noise(rng, canvas.unit * 0.06, 3)
    canvas.paint(band, shade(vary_color(rng, (92, 182, 212)), furrows, 0.12), segment)


def _draw_lake(canvas: Canvas, rng: np.random.Generator, segment: int) -> None:
    """Paint an ellipse of water, flattened by perspective, with an irregular shore."""
    row = canvas.horizon + (canvas.height - canvas.horizon) * rng.uniform(0.1, 0.6)
    radius_x = canvas.width * rng.uniform(0.22, 0.5)
    radius_y = (row - canvas.horizon) * rng.uniform(0.4, 0.9) + 3
    shore = canvas.noise(rng, canvas.unit * 0.3, 3) * 0.12
    center_x = canvas.width * rng.uniform(0, 1)
    distance = np.hypot((canvas.columns - center_x) / np.float64(radius_x), (canvas.rows - row) / np.float64(radius_y))
    ripples = canvas.noise(rng, canvas.unit * 0.05, 3, stretch=6)
    color = shade(vary_color(rng, (176, 128, 62)), ripples, 0.16)
    canvas.paint((distance + shore < 1) & _ground(canvas), color, segment)


def _draw_road(canvas: Canvas, rng: np.random.Generator, segment: int) -> None:
    """Paint a road from the lower edge to the horizon, with a dashed center line and side lines."""
    near = _nearness(canvas)
    bottom, top = canvas.width * rng.uniform(0.05, 0.95), canvas.width * rng.uniform(0.3, 0.7)
    bend = canvas.width * rng.uniform(-0.25, 0.25)
    center = top + (bottom - top) * near + bend * near * (1 - near)
    half_width = canvas.unit * (0.012 + rng.uniform(0.16, 0.3) * near)
    offset = canvas.columns - center
    asphalt = shade(vary_color(rng, (104, 102, 104)), canvas.noise(rng, canvas.unit * 0.03, 2), 0.1)
    dashes = (np.abs(offset) < half_width * 0.05) & (np.sin(14 / (near + 0.12)) > 0)
    side_lines = np.abs(np.abs(offset) - half_width * 0.9) < half_width * 0.04
    asphalt[dashes | side_lines] = np.array((225, 228, 230), np.float32)
    canvas.paint((np.abs(offset) < half_width) & _ground(canvas), asphalt, segment)
