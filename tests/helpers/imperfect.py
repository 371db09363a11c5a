# SPDX-License-Identifier: Apache-2.0
"""Predictions with errors of every kind, made from a ground truth."""

import json
import os
from pathlib import Path

import numpy as np

from spatialflow.panoptic import PanopticWriter, read_id_map
from spatialflow.panoptic.extents import extents


def write_imperfect(truth: Path, output: Path, seed: int = 0, shift: int = 3) -> Path:
    """Write `panoptic.json` and `panoptic/` to `output`, as `predict` does, from a folder of `synthesize`.

    Every map is shifted to the right by up to `shift` pixels. A fifth of the things become void, another fifth have
    another class. Every segment has a score.
    """
    random = np.random.default_rng(seed)
    content = json.loads((truth / "panoptic.json").read_text())
    name_of = {row["id"]: row["file_name"] for row in content["images"]}
    things = [row["id"] for row in content["categories"] if row["isthing"]]
    with PanopticWriter(output / "panoptic", output / "panoptic.json", content["categories"]) as writer:
        for row in content["annotations"]:
            ids = np.roll(read_id_map(truth / "panoptic" / row["file_name"]), int(random.integers(shift + 1)), axis=1)
            category_of = {segment["id"]: segment["category_id"] for segment in row["segments_info"]}
            for number, category in list(category_of.items()):
                draw = random.random()
                if category in things and draw < 0.2:
                    ids[ids == number] = 0
                elif category in things and draw < 0.4:
                    category_of[number] = things[(things.index(category) + 1) % len(things)]
            segments = [
                {
                    "id": number,
                    "category_id": category_of[number],
                    "isthing": category_of[number] in things,
                    "score": round(float(random.uniform(0.4, 1)), 3),
                    "area": extent.pixels,
                    "bbox": extent.box,
                }
                for number, extent in extents(ids).items()
                if number
            ]
            writer.add(row["image_id"], name_of[row["image_id"]], ids, segments)
    return _with_paths(output, truth / "images")


def _with_paths(output: Path, images: Path) -> Path:
    """Add the photographs' paths to `panoptic.json`, as `predict` does."""
    path = output / "panoptic.json"
    content = json.loads(path.read_text())
    for row in content["images"]:
        row["path"] = os.path.relpath(images / row["file_name"], output)
    path.write_text(json.dumps(content))
    return output
