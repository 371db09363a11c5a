# SPDX-License-Identifier: Apache-2.0
"""Scenes by seed and index, and data sets of them in the COCO panoptic format."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spatialflow.data.synthetic.canvas import CATEGORIES, Canvas, Scene
from spatialflow.data.synthetic.terrain import draw_terrain
from spatialflow.data.synthetic.things import draw_things
from spatialflow.files import write_jpeg
from spatialflow.panoptic.writer import PanopticWriter, earlier_files

_INFO = {"description": "written by spatialflow synthesize"}

DRAWN_SCENES = "drawn scenes of `spatialflow synthesize`"
"""What networks know that were trained on scenes alone, for `SpatialFlow.trained_on`."""


def is_drawn(json_path: str | os.PathLike[str]) -> bool:
    """Return whether a panoptic JSON, or its unfinished journal, is that of a data set from `synthesize`."""
    try:
        return bool(earlier_files(Path(json_path), _INFO)[0])
    except OSError:  # it cannot be read
        return False


def make_scene(size: tuple[int, int], seed: int, index: int) -> Scene:
    """Draw one scene.

    Args:
        size: (height, width), at least 32 each.
        seed: of the data set.
        index: of the scene. The same (size, seed, index) gives the same scene on each call.

    Returns:
        Scene.

    Raises:
        ValueError: a side is below 32.
    """
    height, width = size
    if min(height, width) < 32:
        raise ValueError(f"size: must be at least 32 x 32, got {height} x {width}")
    rng = np.random.default_rng([seed, index])
    canvas = Canvas(height, width, rng)
    draw_terrain(canvas, rng)
    draw_things(canvas, rng)
    return canvas.finish(rng)


def synthesize(folder: str | os.PathLike[str], count: int, size: tuple[int, int], seed: int = 0) -> Iterator[Path]:
    """Write a data set of scenes in the COCO panoptic format, one image at a time.

    Args:
        folder: for `images/`, `panoptic/` and `panoptic.json`.
        count: number of scenes.
        size: (height, width) of every scene.
        seed: data sets of different seeds share no scene.

    Returns:
        An iterator over the paths of the images as they are written. The JSON is complete when the iterator ends.

    Raises:
        ValueError: count is not positive, a side is below 32, or `panoptic.json` was not written by this function.
        InUseError: another process writes to the folder.
        OSError: a file cannot be written.
    """
    if count < 1:
        raise ValueError(f"count: must be positive, got {count}")
    folder = Path(folder)
    json_path = folder / "panoptic.json"
    if unrelated := earlier_files(json_path, _INFO)[1]:
        raise ValueError(f"{unrelated[0]}: would be replaced, and was not written by synthesize")
    with PanopticWriter(folder / "panoptic", json_path, CATEGORIES, info=_INFO) as writer:
        for index in range(count):
            scene = make_scene(size, seed, index)
            path = folder / "images" / f"{index + 1:06d}.jpg"
            write_jpeg(path, scene.image)
            writer.add(index + 1, path.name, scene.id_map, scene.segments)
            yield path
