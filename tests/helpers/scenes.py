# SPDX-License-Identifier: Apache-2.0
"""Small data sets of every kind, generated from synthetic scenes."""

import re
from pathlib import Path

import cv2
import numpy as np

from spatialflow.data.categories import Categories
from spatialflow.data.synthetic import CATEGORIES, make_scene, synthesize

CITYSCAPES_LABEL = {1: 24, 2: 26, 3: 28, 4: 27, 5: 31, 6: 33, 11: 23, 12: 21, 13: 22, 14: 8, 15: 7, 16: 11}
"""Cityscapes label id by synthetic category."""


def scene_categories(has_other: bool = False) -> Categories:
    return Categories(CATEGORIES, has_other)


def write_coco(folder: Path, count: int = 4, size: tuple[int, int] = (96, 128), seed: int = 0) -> Path:
    """Write images/, panoptic/ and panoptic.json to `folder`."""
    for _ in synthesize(folder, count, size, seed):
        pass
    return folder


def write_cityscapes(
    root: Path, count: int = 4, size: tuple[int, int] = (96, 192), split: str = "train", seed: int = 0
) -> Path:
    """Write a Cityscapes tree; the first car of every scene has no instance number, so it is a crowd."""
    for index in range(count):
        scene = make_scene(size, seed, index)
        city = f"city{index % 2}"
        images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        values, counts = np.zeros(scene.id_map.shape, np.uint16), {}
        for segment in scene.segments:
            label = CITYSCAPES_LABEL[segment["category_id"]]
            number = counts[label] = counts.get(label, -1) + 1
            isthing = segment["category_id"] < 10
            group = segment["category_id"] == 2 and number == 0
            values[scene.id_map == segment["id"]] = label * 1000 + number if isthing and not group else label
        stem = f"{city}_{index:06d}_000019"
        cv2.imwrite(str(images / f"{stem}_leftImg8bit.png"), scene.image)
        cv2.imwrite(str(labels / f"{stem}_gtFine_instanceIds.png"), values)
    return root


def contents(folder):
    """Return the bytes of every file below a folder by relative path.

    The paths of photographs in `panoptic.json`, which are relative to the folder, are removed.
    """
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "panoptic.json" in files:
        files["panoptic.json"] = re.sub(rb'"path": "[^"]*"', b'"path": ""', files["panoptic.json"])
    return files
