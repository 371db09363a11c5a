# SPDX-License-Identifier: Apache-2.0
"""Readers of images, panoptic maps, detections, category tables and Cityscapes trees."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from helpers.scenes import scene_categories, write_cityscapes

from fuzz.mutate import mutate_picture
from fuzz.workspace import SIZE, WrongResult, edited_json, input_folder, message_difference, run_command, scenes
from spatialflow.data.categories import load_categories
from spatialflow.data.cityscapes import Cityscapes
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.samples import SampleError
from spatialflow.data.synthetic import CATEGORIES, make_scene
from spatialflow.images import read_image
from spatialflow.panoptic import read_id_map
from spatialflow.panoptic.detection import detection_truth


def read_png(folder: Path, base: int, changes: list) -> int:
    """Check that an id map equals that of OpenCV for the same file, if both read it."""
    rng = np.random.default_rng(base)
    size = ((1, 1), (48, 64), (7, 300), (40, 5))[base]
    pixels = np.repeat(rng.integers(0, 256, (*size, 3), np.uint8)[:, ::4], 4, axis=1)[:, : size[1]]
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(pixels))
    path = folder / "ids.png"
    path.write_bytes(mutate_picture(encoded.tobytes(), changes))
    ids = read_id_map(path)
    if not changes and not np.array_equal(ids, pixels[..., ::-1].astype(np.int32) @ [1, 256, 65536]):
        raise WrongResult("other ids than were written")
    by_opencv = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if by_opencv is not None and not np.array_equal(ids, by_opencv[..., ::-1].astype(np.int32) @ [1, 256, 65536]):
        raise WrongResult("other ids than OpenCV reads")
    return ids.size


def read_photograph(folder: Path, base: int, changes: list) -> int:
    scene = make_scene(SIZE, 0, 0).image
    kind, pixels, options = (
        (".jpg", scene, []),
        (".jpg", scene, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        (".jpg", scene[..., 0], []),
        (".png", scene, []),
        (".png", scene[..., 0], []),
        (".png", scene.astype(np.uint16) * 257, []),
        (".jpg", scene, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
        (".bmp", scene, []),
    )[base]
    _, encoded = cv2.imencode(kind, pixels, options)
    path = folder / f"photograph{kind}"
    path.write_bytes(mutate_picture(encoded.tobytes(), changes))
    image = read_image(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise WrongResult(f"read_image gave {image.shape} {image.dtype}")
    return image.size


def read_panoptic(folder: Path, base: int, changes: list) -> int:
    """Read the file as truth or prediction of `evaluate`, by `visualize`, by `validate`, or as training data."""
    truth = scenes() / "panoptic.json"
    (folder / "edited.json").write_bytes(edited_json(json.loads(truth.read_text()), changes))
    (folder / "edited").symlink_to(scenes() / "panoptic")
    edited = folder / "edited.json"
    if base == 0:
        code, _ = run_command("evaluate", edited, truth, "--output", folder / "scores.json")
    elif base == 1:
        code, _ = run_command("evaluate", truth, edited, "--per-class")
    elif base == 2:
        maps = ("--ground-truth", edited, "--prediction", truth)
        code, _ = run_command("visualize", scenes() / "images", *maps, "--output", folder / "out")
    elif base == 3:
        code, _ = run_command("validate", edited, "--images", scenes() / "images", silent=True)
    else:
        data = CocoPanoptic(edited, scenes() / "images", None, scene_categories())
        return sum(data[index].image.size for index in range(min(len(data), 2)))
    if code != 0 and not changes:
        raise WrongResult(f"exit code {code} for a valid file")
    return 1 - min(code, 1)


@functools.cache
def _detections() -> list[dict]:
    """Return the first four things of the ground truth as perfect detections, so that scoring matches every mask."""
    path = scenes() / "panoptic.json"
    truth = detection_truth(json.loads(path.read_text()), path.with_suffix(""))["annotations"]
    fields = ("image_id", "category_id", "bbox", "segmentation")
    return [{name: row[name] for name in fields} | {"score": 0.5} for row in truth[:4]]


def read_detections(folder: Path, base: int, changes: list) -> int:
    rows = [dict(row) for row in _detections()]
    counts_edits = [edit for edit in changes if edit[0] == "counts"]  # each replaces a character of a run-length code
    for _, place, value in counts_edits:
        row = rows[value % len(rows)]
        code = dict(row["segmentation"])
        at = place % len(code["counts"])
        code["counts"] = code["counts"][:at] + chr(33 + value % 94) + code["counts"][at + 1 :]
        row["segmentation"] = code
    if base == 1:
        for row in rows:
            row.pop("segmentation")
    (folder / "detections.json").write_bytes(edited_json(rows, changes))
    truth = scenes() / "panoptic.json"
    code, _ = run_command("evaluate", truth, truth, "--detections", folder / "detections.json")
    if code != 0 and not changes:
        raise WrongResult(f"exit code {code} for a valid file")
    return 1 - min(code, 1)


def read_categories(folder: Path, base: int, changes: list) -> int:
    rows = [dict(row) for row in CATEGORIES]
    (folder / "table.json").write_bytes(edited_json(rows if base == 0 else {"categories": rows}, changes))
    categories = load_categories(folder / "table.json", 6, 6)
    return len(categories.as_coco())


@functools.cache
def _cityscapes() -> Path:
    return write_cityscapes(input_folder() / "cityscapes", 2, SIZE, split="val")


def read_cityscapes(folder: Path, base: int, changes: list) -> int:
    """Read a Cityscapes tree with an edited label map, photograph, or JSON of an earlier evaluation."""
    root = folder / "tree"
    shutil.copytree(_cityscapes(), root)
    categories = load_categories("cityscapes", 8, 11)
    data = Cityscapes(root, "val", categories)
    if base == 2:
        path, _ = data.panoptic_truth(folder)
        path.write_bytes(edited_json(json.loads(path.read_text()), changes))
    else:
        path = next((root / ("gtFine" if base == 0 else "leftImg8bit")).rglob("*.png"))
        path.write_bytes(mutate_picture(path.read_bytes(), changes))
        data = Cityscapes(root, "val", categories)
    pixels = 0
    for index in range(len(data)):
        try:
            pixels += data[index].image.size
        except SampleError as error:
            if problem := message_difference(str(error)):
                raise WrongResult(problem) from None
    data.panoptic_truth(folder)
    return pixels
