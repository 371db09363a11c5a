# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes written in the formats of annotation tools."""

import base64
import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from helpers.scenes import write_coco
from spatialflow.data.synthetic import CATEGORIES
from spatialflow.panoptic import read_id_map

STUFF = [row["name"] for row in CATEGORIES if not row["isthing"]]
NAMES = {row["id"]: row["name"] for row in CATEGORIES}
KINDS = ("coco-instances", "labelme", "cvat", "masks", "yolo")


class Scenes:
    """Scenes with their exact maps, and their export to each format.

    Attributes:
        images: folder of the photographs.
        maps: id map, and category id by segment id, of every photograph by its name.
    """

    def __init__(self, folder: Path, count: int = 3, size: tuple[int, int] = (48, 64), seed: int = 0) -> None:
        self.folder = write_coco(folder / "truth", count, size, seed)
        self.images = self.folder / "images"
        self.maps = read_maps(self.folder / "panoptic.json")

    def masks(self, name):
        """(category id, (H, W) bool) of every segment of a photograph."""
        ids, categories = self.maps[name]
        return [(categories[number], ids == number) for number in sorted(categories)]

    def write(self, kind: str, folder: Path) -> Path:
        """Write one format, and return the source to convert."""
        folder.mkdir(parents=True, exist_ok=True)
        return getattr(self, "_" + kind.replace("-", "_"))(folder)

    def arguments(self, kind: str) -> dict:
        """Arguments of `to_panoptic` with which the conversion gives the exact maps."""
        given = {"images": self.images, "classes": self.folder / "panoptic.json"}
        return {**given, "instances": None} if kind == "masks" else given

    def _coco_instances(self, folder: Path) -> Path:
        content: dict = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": n} for i, n in NAMES.items()],
        }
        for number, name in enumerate(self.maps, start=1):
            height, width = self.maps[name][0].shape
            content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
            for category, mask in self.masks(name):
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
                row = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category}
                content["annotations"].append({**row, "segmentation": segmentation, "iscrowd": 0})
        return write_json(folder / "instances.json", content)

    def _labelme(self, folder: Path) -> Path:
        for name in self.maps:
            height, width = self.maps[name][0].shape
            shapes = []
            for category, mask in self.masks(name):
                (left, right), (top, bottom) = (np.flatnonzero(mask.any(axis))[[0, -1]].tolist() for axis in (0, 1))
                png = cv2.imencode(".png", mask[top : bottom + 1, left : right + 1] * np.uint8(255))[1].tobytes()
                shape = {"label": NAMES[category], "points": [[left, top], [right, bottom]], "shape_type": "mask"}
                shapes.append({**shape, "group_id": None, "flags": {}, "mask": base64.b64encode(png).decode()})
            content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\images\\{name}"}
            content |= {"imageData": None, "imageHeight": height, "imageWidth": width}
            write_json(folder / f"{Path(name).stem}.json", content)
        return folder

    def _cvat(self, folder: Path) -> Path:
        labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES.values())
        lines = [f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"]
        for number, name in enumerate(self.maps):
            height, width = self.maps[name][0].shape
            lines.append(f'<image id="{number}" name={quoteattr(name)} width="{width}" height="{height}">')
            for category, mask in self.masks(name):
                flat = mask.ravel().astype(np.int8)
                runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
                text = ", ".join(map(str, [0] * int(flat[0]) + runs))
                lines.append(
                    f'<mask label={quoteattr(NAMES[category])} rle="{text}" left="0" top="0" width="{width}" '
                    f'height="{height}" z_order="0"/>'
                )
            lines.append("</image>")
        (folder / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]))
        return folder / "annotations.xml"

    def _masks(self, folder: Path) -> Path:
        for name, (ids, _) in self.maps.items():
            mask = np.zeros(ids.shape, np.uint16)
            for number, (category, part) in enumerate(self.masks(name), start=1):
                mask[part] = 1000 * category + number
            cv2.imwrite(str(folder / f"{Path(name).stem}.png"), mask)
        return folder

    def _yolo(self, folder: Path) -> Path:
        """Write a rectangle for each run of pixels: classes are exact, and objects are divided."""
        (folder / "labels").mkdir(exist_ok=True)
        numbers = list(NAMES)
        for name, (ids, _) in self.maps.items():
            height, width = ids.shape
            lines = []
            for category, mask in self.masks(name):
                for row, left, right in _runs(mask):
                    corners = [(left, row), (right, row), (right, row + 1), (left, row + 1)]
                    words = [f"{x / width:.9f} {y / height:.9f}" for x, y in corners]
                    lines.append(" ".join([str(numbers.index(category)), *words]))
            (folder / "labels" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
        (folder / "data.yaml").write_text(f"names: {json.dumps(list(NAMES.values()))}\n")
        return folder / "data.yaml"


def _runs(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, first column, end column) of every run of pixels."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    begins, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [(int(row), int(left), int(right)) for (row, left), (_, right) in zip(begins, ends, strict=True)]


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def read_maps(json_path: Path) -> dict:
    """Read the id map, and the category id by segment id, of every photograph by its name."""
    content = json.loads(json_path.read_text())
    names = {row["id"]: row["file_name"] for row in content["images"]}
    folder = json_path.with_suffix("")
    return {
        names[row["image_id"]]: (
            read_id_map(folder / row["file_name"]),
            {segment["id"]: segment["category_id"] for segment in row["segments_info"]},
        )
        for row in content["annotations"]
    }


def assert_same_maps(first: dict, second: dict) -> None:
    """Compare maps pixel by pixel, except for the numbering of the segments."""
    assert first.keys() == second.keys()
    for name, (ids, categories) in first.items():
        others, other_categories = second[name]
        pairs = np.unique(np.stack([ids.ravel(), others.ravel()]), axis=1).T.tolist()
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs), name
        assert all(categories.get(a) == other_categories.get(b) for a, b in pairs), name


_TOKENS = (
    b"NaN",
    b"1e999",
    b"-1",
    b"99999999999999999999",
    b"null",
    b"{}",
    b"[]",
    b'"',
    b"<",
    b"\xff",
    b"\xef\xbb\xbf",
)
_TOKENS += (
    b"\\u0000",
    b"\\ud800",
    b"&x;",
    b"true",
    b"0",
    b"1e-300",
    b"\x00",
    b"..",
    b"/",
    b",",
    b" ",
    b"\n",
    b"999999",
)


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Replace, insert, remove or repeat a few parts of a file."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        begin = int(rng.integers(0, len(data) + 1))
        end = min(begin + int(rng.choice([0, 1, 1, 2, 5, 40])), len(data))
        kind = rng.integers(0, 4)
        if kind == 0:
            data[begin:end] = _TOKENS[rng.integers(len(_TOKENS))]
        elif kind == 1:
            data[begin:end] = bytes(rng.integers(0, 256, end - begin, dtype=np.uint8))
        elif kind == 2:
            data[begin:end] = b""
        else:
            data[begin:begin] = data[begin:end] * int(rng.integers(1, 30))
    return bytes(data)
