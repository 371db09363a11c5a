# SPDX-License-Identifier: Apache-2.0
"""The result of prediction for one image."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spatialflow.data.categories import Categories
from spatialflow.errors import did_you_mean
from spatialflow.ops import paste_masks
from spatialflow.panoptic.detection import detection_rows
from spatialflow.panoptic.drawing import overlay
from spatialflow.panoptic.labelme import labelme_content
from spatialflow.panoptic.pages import fit
from spatialflow.panoptic.photographs import image_id_of
from spatialflow.panoptic.result_folder import add_to_folder
from spatialflow.panoptic.rules import VOID
from spatialflow.panoptic.writer import panoptic_row

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_SIDE_SHOWN = 960
"""Largest side in pixels of the picture that a notebook shows."""

_MOST_LINES = 20
"""Largest number of classes that the text of a result lists."""


class PanopticResult:
    """The panoptic segmentation and the detections of one image.

    In a notebook, a result shows its overlay. `print(result)` lists its classes. Arrays of pixels are BGR, as OpenCV
    has them; `picture` returns a PIL image, whose order is RGB.

    Attributes:
        id_map: (H, W) int32, segment id per pixel, 0 = void.
        segments: one dict per id of the map: `id`, `category_id`, `isthing`, `area` (pixels), `bbox` ([x, y, width,
            height]), `score` (None for stuff).
        boxes: (K, 4) float32, x1, y1, x2, y2 in pixels of the image, best score first.
        scores: (K,) float32.
        labels: (K,) int64, category ids.
        mask_logits: (K, 2R, 2R) float32 over each box, R = `roi_size` of the model; None where the model has no thing
            head, or with `detection_masks=False`.
        mask_threshold: probability from which a pixel belongs to a mask.
        categories: the category table.
        image_name: file name of the image, or "image <position in the call>" for an array.
        times: seconds by stage, see `STAGES`. The time of a batch is divided equally among its images.
        image: (H, W, 3) uint8 BGR, the decoded image, for pictures; an array that was given is not copied. To free its
            memory, set `result.image = None`.
    """

    def __init__(
        self,
        id_map: np.ndarray,
        segments: list[dict[str, Any]],
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        mask_logits: np.ndarray | None,
        mask_threshold: float,
        categories: Categories,
        image_name: str,
        times: dict[str, float],
        image: np.ndarray | None = None,
    ) -> None:
        self.id_map, self.segments = id_map, segments
        self.boxes, self.scores, self.labels, self.mask_logits = boxes, scores, labels, mask_logits
        self.mask_threshold = mask_threshold
        self.categories, self.image_name, self.times = categories, image_name, times
        self.image = image

    @property
    def masks(self) -> np.ndarray | None:
        """(K, H, W) bool masks of the detections before the merge; None without `mask_logits`.

        They are pasted on every access.
        """
        if self.mask_logits is None:
            return None
        logits, boxes = torch.from_numpy(self.mask_logits), torch.from_numpy(self.boxes)
        return paste_masks(logits, boxes, self.id_map.shape, self.mask_threshold).numpy()

    @property
    def image_id(self) -> int | str:
        """Id of the image, derived from its name by `image_id_of`."""
        return image_id_of(self.image_name)

    def mask(self, segment: int | str) -> np.ndarray:
        """Return the pixels of a segment, or of all segments of a class.

        Args:
            segment: `id` of one of `segments`, 0 for void, or the name of a class.

        Returns:
            (H, W) bool; all False for a class that the image does not show.

        Raises:
            ValueError: no segment has this id, or no class this name; the message lists the ids or similar names.
        """
        if isinstance(segment, str):
            names = self._names()
            if segment not in names.values():
                raise ValueError(f"no class is named {segment!r:.40}{did_you_mean(segment, names.values())}")
            ids = [row["id"] for row in self.segments if names.get(row["category_id"]) == segment]
            of_class: np.ndarray = np.isin(self.id_map, ids)
            return of_class
        ids = [row["id"] for row in self.segments]
        if segment not in (VOID, *ids):
            raise ValueError(f"segment must be 0, one of {ids} or the name of a class, got {segment!r:.40}")
        pixels: np.ndarray = self.id_map == segment
        return pixels

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per segment for a table, such as `pandas.DataFrame(result.rows())`.

        Returns:
            Mappings with `image` (its name), `id`, `category_id`, `name`, `isthing` (bool), `score` (None for stuff),
            `area` (pixels), `share` (of the image's area, 0 to 1) and `bbox` ([x, y, width, height]); in the order of
            `segments`.
        """
        names = self._names()
        return [
            {
                "image": self.image_name,
                "id": segment["id"],
                "category_id": segment["category_id"],
                "name": names.get(segment["category_id"], str(segment["category_id"])),
                "isthing": bool(segment["isthing"]),
                "score": segment["score"],
                "area": segment["area"],
                "share": segment["area"] / self.id_map.size,
                "bbox": list(segment["bbox"]),
            }
            for segment in self.segments
        ]

    def save(self, folder: str | Path, name: str | Path | None = None) -> Path:
        """Add the result to a folder that `spatialflow evaluate` and `spatialflow visualize` read.

        The files are `panoptic.json` (COCO panoptic format, all results saved in the folder), `panoptic/<stem>.png`
        (segment ids, which are colors of the categories) and `overlays/<stem>.jpg` (not without `image`). A result of
        the same name is replaced, with a warning. The JSON is rewritten at each call; `PanopticWriter` writes it
        once for many images.

        Args:
            folder: created if it is absent.
            name: file name of the photograph, by which `evaluate` finds the ground truth; by default `image_name`.
                Folders in it, as in "a/x.jpg", become folders of the files.

        Returns:
            Path of the PNG of segment ids.

        Raises:
            PanopticFormatError: a file that would be changed was not written by this method; or `name` is not a path
                inside the folder.
            OSError: a file cannot be written; no part of it is left behind.
        """
        name = self.image_name if name is None else str(name)
        picture = None if self.image is None else self.overlay()
        table = self.categories.as_coco()
        return add_to_folder(folder, image_id_of(name), name, self.id_map, self.segments, table, picture)

    def overlay(
        self,
        image: np.ndarray | Image | None = None,
        *,
        opacity: float = 0.5,
        labels: bool = True,
        legend: bool = False,
        outlines: bool = True,
    ) -> np.ndarray:
        """Draw the segments over the image.

        Args:
            image: (H, W, 3) uint8 BGR of the size of the map, or a PIL image; by default the attribute `image`.
            opacity: weight of the colors of segments, 0 to 1.
            labels: write names and scores.
            legend: add lines below the picture with the colors and names of its categories.
            outlines: draw the borders of segments.

        Returns:
            (H, W, 3) uint8 BGR; with a legend more than H lines.

        Raises:
            ValueError: there is no image, it has another size or type, or `opacity` is not in [0, 1].
        """
        image = self.image if image is None else image
        if image is None:
            raise ValueError("image: the result has none (result.image is None), so pass it: result.overlay(image)")
        style: dict[str, Any] = dict(opacity=opacity, labels=labels, legend=legend, outlines=outlines)
        return overlay(image, self.id_map, self.segments, self.categories.as_coco(), **style)

    def picture(self, image: np.ndarray | Image | None = None, **style: Any) -> Image:
        """Draw the segments over the image, as a PIL image (RGB).

        Args:
            image: as for `overlay`.
            style: `opacity`, `labels`, `legend` and `outlines`, as for `overlay`.

        Raises:
            ValueError: as for `overlay`.
        """
        from PIL import Image

        return Image.fromarray(np.ascontiguousarray(self.overlay(image, **style)[..., ::-1]))

    def to_coco(self) -> dict[str, Any]:
        """Convert the result to the mappings of COCO's formats, which `json` can write.

        Returns:
            `images` (one row), `annotations` (one panoptic annotation, whose `file_name` is `<stem>.png`),
            `categories`, and `detections`: a row of COCO results per detection, with `segmentation` as RLE where
            there are masks. Segment ids are those of `id_map`; `spatialflow.panoptic.write_id_map` writes the PNG.
        """
        png_name = PurePosixPath(self.image_name).with_suffix(".png").name
        row = panoptic_row(self.image_id, self.image_name, png_name, self.id_map, self.segments)
        return {
            "images": [row["image"]],
            "annotations": [row["annotation"]],
            "categories": self.categories.as_coco(),
            "detections": detection_rows(self, self.image_id),
        }

    def to_supervision(self) -> Any:
        """Convert the segments, things and stuff, to `supervision.Detections`.

        Returns:
            `xyxy` (N, 4), `mask` (N, H, W) bool, `class_id` (N,) category ids, `confidence` (N,) scores, NaN for stuff,
            and in `data` the arrays `class_name`, `segment_id` and `is_thing`. Segments do not overlap.

        Raises:
            ImportError: the package supervision is missing.
        """
        try:
            supervision = importlib.import_module("supervision")
        except ImportError as error:
            missing = "to_supervision needs the package supervision: pip install supervision"
            raise ImportError(f"{missing} ({error})") from None
        rows = self.rows()
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ids = np.array([row["id"] for row in rows], np.int64)
        scores = [np.nan if row["score"] is None else row["score"] for row in rows]
        return supervision.Detections(
            xyxy=boxes,
            mask=self.id_map[None] == ids[:, None, None],
            confidence=np.array(scores, np.float32),
            class_id=np.array([row["category_id"] for row in rows], np.int64),
            data={
                "class_name": np.array([row["name"] for row in rows], str),
                "segment_id": ids,
                "is_thing": np.array([row["isthing"] for row in rows], bool),
            },
        )

    def to_labelme(self, tolerance: float = 1.0) -> dict[str, Any]:
        """Convert the segments to the content of a LabelMe file, for corrections by hand.

        Write it with `json.dump` to `<stem>.json` beside the photograph, whose name it has as `imagePath`. Each
        connected part of a segment is a polygon; the parts of a segment share its id as `group_id`. A hole is cut
        out through a line of zero width from the border, since the format has no holes.

        Args:
            tolerance: largest distance in pixels between a border and its polygon; 0 keeps every pixel, with many more
                points.

        Returns:
            A mapping that `json` can write.

        Raises:
            ValueError: tolerance is negative.
        """
        return labelme_content(self.id_map, self.segments, self._names(), self.image_name, tolerance)

    def _names(self) -> dict[int, str]:
        return {row.id: row.name for row in self.categories.rows}

    def __repr__(self) -> str:
        """Describe the result in a line and a table of its classes, the largest first."""
        height, width = self.id_map.shape
        counts = f"{len(self.segments)} segments, {len(self.scores)} detections"
        title = f"PanopticResult({self.image_name}: {height} x {width}, {counts})"
        by_class: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for row in self.rows():
            by_class.setdefault((row["name"], row["isthing"]), []).append(row)
        classes = sorted(by_class.items(), key=lambda item: -sum(row["area"] for row in item[1]))
        lines = [("class", "kind", "segments", "area %", "best score")]
        for (name, is_thing), rows in classes[:_MOST_LINES]:
            share = sum(row["share"] for row in rows)
            scores = [row["score"] for row in rows if row["score"] is not None]
            best = f"{max(scores):.2f}" if scores else "-"
            lines.append((name, "thing" if is_thing else "stuff", str(len(rows)), f"{100 * share:.1f}", best))
        void = self.id_map.size - sum(row["area"] for rows in by_class.values() for row in rows)
        if void:
            lines.append(("(void)", "", "", f"{100 * void / self.id_map.size:.1f}", ""))
        if len(lines) == 1:
            return title
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                _padded(cell, size, column) for column, (cell, size) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rest = len(classes) - _MOST_LINES
        return "\n".join([title, *table, *([f"... and {rest} more classes"] if rest > 0 else [])])

    def _repr_png_(self) -> bytes | None:
        """Return the picture for a notebook: the overlay with a legend, its long side at most 960 pixels."""
        import cv2

        if self.id_map.size == 0:
            return None
        size = fit(self.id_map.shape, _LARGEST_SIDE_SHOWN)[::-1]
        id_map = cv2.resize(self.id_map, size, interpolation=cv2.INTER_NEAREST)
        if self.image is None:
            image, opacity = np.full((*id_map.shape, 3), 255, np.uint8), 1.0
        else:
            image, opacity = cv2.resize(self.image, size, interpolation=cv2.INTER_AREA), 0.5
        shown = overlay(image, id_map, self.segments, self.categories.as_coco(), opacity=opacity, legend=True)
        return bytes(cv2.imencode(".png", shown)[1])


def _padded(cell: str, width: int, column: int) -> str:
    """Pad a cell of a table; text is at the left, numbers are at the right."""
    return cell.ljust(width) if column < 2 else cell.rjust(width)
