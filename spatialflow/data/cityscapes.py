# SPDX-License-Identifier: Apache-2.0
"""Cityscapes in its original folder layout.

Photographs are leftImg8bit/<split>/<city>/*_leftImg8bit.png, labels gtFine/<split>/<city>/*_gtFine_instanceIds.png.
"""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spatialflow.data.categories import Categories
from spatialflow.data.samples import Sample, SampleError, make_sample
from spatialflow.images import ImageError, decode_image, read_image
from spatialflow.panoptic.extents import extents
from spatialflow.panoptic.formats import read_panoptic_json
from spatialflow.panoptic.rules import TRUTH, VOID
from spatialflow.panoptic.writer import PanopticWriter

IMAGE_SUFFIX, LABEL_SUFFIX = "_leftImg8bit.png", "_gtFine_instanceIds.png"


class CityscapesError(ValueError):
    """A folder that is not a Cityscapes tree; the message names the missing part."""


class Cityscapes:
    """One split of Cityscapes.

    Pixels of value v >= 1000 are instance v % 1000 of label v // 1000; smaller values are labels. A label of a thing
    class without an instance number is a group of instances and becomes a crowd. Labels outside the category table are
    void.

    Args:
        root: folder with leftImg8bit and gtFine.
        split: "train", "val" or another folder that leftImg8bit and gtFine have.
        categories: numbering of the classes; ids are Cityscapes' label ids.

    Attributes:
        names, image_ids, sizes: as in CocoPanoptic; an id is the file name without `_leftImg8bit.png`.

    Raises:
        CityscapesError: a folder is absent, or the folder of photographs has none.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, categories: Categories) -> None:
        self.root, self.split, self.categories = Path(root), split, categories
        self.images = self.root / "leftImg8bit" / split
        self.labels = self.root / "gtFine" / split
        for folder in (self.images, self.labels):
            if not os.path.isdir(folder):
                raise CityscapesError(
                    f"{folder}: no such folder; a Cityscapes tree has leftImg8bit/{split} and gtFine/{split}"
                )
        self.paths = sorted(self.images.glob(f"*/*{IMAGE_SUFFIX}"))
        if not self.paths:
            raise CityscapesError(f"{self.images}: holds no <city>/*{IMAGE_SUFFIX}")
        self.names = [str(path.relative_to(self.images)) for path in self.paths]
        self.image_ids = [path.name[: -len(IMAGE_SUFFIX)] for path in self.paths]
        self.sizes = [_png_size(path) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def image_path(self, index: int) -> Path:
        """Path of the photograph."""
        return self.paths[index]

    def __getitem__(self, index: int) -> Sample:
        """Read one image with its ground truth.

        Raises:
            SampleError: a file is absent or damaged, or image and labels do not match; the message names the file.
        """
        try:
            image = read_image(self.paths[index])
        except ImageError as error:
            raise SampleError(str(error)) from None
        return make_sample(str(self.paths[index]), image, *self._annotation(index), self.categories)

    def _is_written(self, json_path: Path) -> bool:
        """Return whether the file has these categories and no other images, and is newer than every label file."""
        if not os.path.isfile(json_path):
            return False
        content = read_panoptic_json(json_path, with_categories=True, use=TRUTH)
        if content["categories"] != self.categories.as_coco():
            return False
        if not {annotation["image_id"] for annotation in content["annotations"]} <= set(self.image_ids):
            return False
        # An unpacked file keeps its old modification time; the time of its last status change is new.
        written = json_path.stat().st_mtime_ns
        labels = filter(Path.is_file, map(self._label_path, range(len(self))))
        return all(path.stat().st_ctime_ns <= written for path in labels)

    def _label_path(self, index: int) -> Path:
        return self.labels / self.paths[index].parent.name / f"{self.image_ids[index]}{LABEL_SUFFIX}"

    def _read_labels(self, index: int) -> np.ndarray:
        path = self._label_path(index)
        try:
            content = path.read_bytes()
            labels = decode_image(path, content, cv2.IMREAD_UNCHANGED) if content else None
        except OSError as error:
            raise SampleError(f"{path}: cannot be read: {error.strerror}") from None
        except ImageError as error:
            raise SampleError(str(error)) from None
        if labels is None or labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
            raise SampleError(f"{path}: is damaged, or is not a grayscale PNG of 8 or 16 bits")
        return labels.astype(np.int32)

    def _annotation(self, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Make the id map, (H, W) int32, and the segments. Ids are the pixel values, 0 for labels outside the table."""
        id_map = self._read_labels(index)
        category_by_id = {row.id: row for row in self.categories.rows}
        segments = []
        for value, extent in extents(id_map).items():
            category = category_by_id.get(value // 1000 if value >= 1000 else value)
            if value > 0 and category is not None:
                crowd = int(category.isthing and value < 1000)
                segment: dict[str, Any] = {"id": value, "category_id": category.id, "iscrowd": crowd}
                segments.append(segment | {"area": extent.pixels, "bbox": extent.box})
        id_map[~np.isin(id_map, [segment["id"] for segment in segments])] = VOID
        return id_map, segments

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]:
        """Write the ground truth in the COCO panoptic format, for scoring.

        Nothing is written if the JSON is up to date: with these categories, without other images, and newer than every
        label file.

        Args:
            folder: for `cityscapes_<split>.json` and, beside it, the folder of PNGs.

        Returns:
            Paths of the JSON and of the folder of PNGs. Images whose label file is absent or damaged are left out.
        """
        folder = Path(folder)
        json_path, png_folder = folder / f"cityscapes_{self.split}.json", folder / f"cityscapes_{self.split}"
        if self._is_written(json_path):
            return json_path, png_folder
        writer = PanopticWriter(png_folder, json_path, self.categories.as_coco())
        for index, (image_id, name) in enumerate(zip(self.image_ids, self.names, strict=True)):
            try:
                id_map, segments = self._annotation(index)
            except SampleError:
                continue
            writer.add(image_id, name, id_map, segments)
        writer.write_json()
        writer.close()
        return json_path, png_folder


def _png_size(path: Path) -> tuple[int, int]:
    """Read (height, width) from the header of a PNG.

    It is (1, 1) for an absent or damaged file, for which `__getitem__` raises SampleError.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError:
        return 1, 1
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n":
        return 1, 1
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
