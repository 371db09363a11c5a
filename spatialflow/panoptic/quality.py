# SPDX-License-Identifier: Apache-2.0
"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", 2019), equal to panopticapi's in every number."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow.panoptic.formats import (
    VOID,
    PanopticFormatError,
    as_id_map,
    check_panoptic,
    read_id_map,
    read_panoptic_json,
)
from spatialflow.panoptic.pair_counts import count_pairs


@dataclass(slots=True)
class ClassCounts:
    """What panoptic quality of one class is made of: matches, their summed IoU, and what stayed unmatched."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def add(self, other: "ClassCounts") -> None:
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn

    def quality(self) -> dict[str, float | int]:
        """pq, sq, rq as fractions (0 where nothing was counted), n = 1 if anything was, and the counts."""
        seen = self.tp + self.fp + self.fn > 0
        weight = self.tp + 0.5 * self.fp + 0.5 * self.fn
        return {
            "pq": self.iou / weight if seen else 0.0,
            "sq": self.iou / self.tp if self.tp else 0.0,
            "rq": self.tp / weight if seen else 0.0,
            "n": int(seen),
            "tp": self.tp,
            "fp": self.fp,
            "fn": self.fn,
            "iou": self.iou,
        }


class PanopticQuality:
    """Accumulate panoptic quality over images that are in memory; `evaluate` does it for folders.

    Args:
        categories: the COCO list of {id, isthing, ...}, or a mapping from category id to isthing.

    Matching: a predicted and a ground-truth segment of one class match if their IoU exceeds 0.5, where the union leaves
    out the prediction's pixels on void. A prediction without match is not counted if more than half of it lies on void
    or on the crowd of its class; if a class has several crowd segments in an image, the last one listed counts.
    A ground-truth segment's area is the one in its `area` field, where it has one.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]] | Mapping[int, Any]):
        if isinstance(categories, Mapping):
            self._things = {key: bool(value) for key, value in categories.items()}
        else:
            self._things = {category["id"]: category["isthing"] == 1 for category in categories}
        self._counts: dict[int, ClassCounts] = {}

    def update(
        self,
        gt_map: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_map: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str = "",
    ) -> None:
        """Add one image.

        Args:
            gt_map: (H, W) integer ids or (H, W, 3) uint8 colours (red first) of the ground truth.
            gt_segments: mappings with id, category_id and, if they have them, area and iscrowd.
            pred_map: like gt_map, for the prediction.
            pred_segments: mappings with id and category_id.
            image_id: named in errors.

        Raises:
            PanopticFormatError: sizes differ, a predicted segment is in the map and not in the list or the other way
                round, or its category is unknown.
        """
        self.add(self.count(gt_map, gt_segments, pred_map, pred_segments, image_id))

    def count(
        self,
        gt_map: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_map: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str = "",
    ) -> dict[int, ClassCounts]:
        """The counts of one image by category id, nothing accumulated; arguments and errors as for `update`."""
        gt_map, pred_map = _pixels(gt_map, "gt_map"), _pixels(pred_map, "pred_map")
        if gt_map.shape[:2] != pred_map.shape[:2]:
            raise PanopticFormatError(
                f"image {image_id}: the ground truth is {gt_map.shape[1]}x{gt_map.shape[0]} pixels, "
                f"the prediction {pred_map.shape[1]}x{pred_map.shape[0]}"
            )
        gt_ids, pred_ids, pixels = count_pairs(gt_map, pred_map)
        shared = dict(zip(zip(gt_ids.tolist(), pred_ids.tolist(), strict=True), pixels.tolist(), strict=True))
        return _match_image(shared, gt_segments, pred_segments, self._things, image_id)

    def add(self, counts: Mapping[int, ClassCounts]) -> None:
        """Add the counts of one image, as `count` gives them."""
        for category, counted in counts.items():
            self._counts.setdefault(category, ClassCounts()).add(counted)

    def compute(self) -> dict[str, Any]:
        """The mapping that `evaluate` returns, over all images so far."""
        per_class = {category: self._counts.get(category, ClassCounts()).quality() for category in self._things}
        groups = {"All": None, "Things": True, "Stuff": False}
        result: dict[str, Any] = {}
        for group, isthing in groups.items():
            rows = [
                row
                for category, row in per_class.items()
                if row["n"] and (isthing is None or self._things[category] == isthing)
            ]
            result[group] = {key: sum(row[key] for row in rows) / max(len(rows), 1) for key in ("pq", "sq", "rq")}
            result[group]["n"] = len(rows)
        if result["All"]["n"] == 0:
            warnings.warn(
                "no segment of any category was annotated or predicted: all qualities are 0 with n = 0", stacklevel=2
            )
        result["per_class"] = per_class
        return result


def evaluate(
    gt_json: str | os.PathLike | Mapping[str, Any],
    gt_folder: str | os.PathLike | None,
    pred_json: str | os.PathLike | Mapping[str, Any],
    pred_folder: str | os.PathLike | None,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a folder of panoptic predictions against the ground truth.

    Args:
        gt_json: COCO panoptic JSON with `annotations` and `categories`, a path or its content.
        gt_folder: folder of the PNGs it names; None for the JSON's path without ".json".
        pred_json: COCO panoptic JSON with `annotations`. Every image of the ground truth must be in it.
        pred_folder: like gt_folder, for the predictions.
        workers: threads that read, decode and count; default: one per core. The result does not depend on it.
        progress: show a progress bar on standard error.

    Returns:
        A mapping. "All", "Things" and "Stuff" hold {pq, sq, rq, n}: means, as fractions, over the n classes that occur
        in the ground truth or the prediction. "per_class" maps every category id to {pq, sq, rq, n, tp, fp, fn, iou},
        iou being the sum over matches.

    Raises:
        PanopticFormatError: a file is absent, damaged or breaks the format, an image has no prediction, or segments
            and pixels disagree. The message names the file or the image and the segment.

    Without a single annotated or predicted segment the qualities are 0 with n = 0, and a warning says so.
    Neither torch nor OpenCV is imported. Source: panopticapi, `pq_compute`.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    gt_folder = _folder(gt_folder, gt_json, "gt")
    pred_folder = _folder(pred_folder, pred_json, "pred")
    gt = _annotations(gt_json, "gt_json", with_categories=True)
    pred = _annotations(pred_json, "pred_json", with_categories=False)
    predicted = {annotation["image_id"]: annotation for annotation in pred["annotations"]}
    for annotation in gt["annotations"]:
        if annotation["image_id"] not in predicted:
            raise PanopticFormatError(f"no prediction for the image with id {annotation['image_id']!r}")

    quality = PanopticQuality(gt["categories"])

    def count_image(annotation: Mapping[str, Any]) -> dict[int, ClassCounts]:
        prediction = predicted[annotation["image_id"]]
        return quality.count(
            read_id_map(os.path.join(gt_folder, annotation["file_name"])),
            annotation["segments_info"],
            read_id_map(os.path.join(pred_folder, prediction["file_name"])),
            prediction["segments_info"],
            annotation["image_id"],
        )

    with ThreadPoolExecutor(workers or _available_cores()) as pool:
        futures = [pool.submit(count_image, annotation) for annotation in gt["annotations"]]
        try:
            if not progress:
                # One wake-up at the end. One per image would take the interpreter's lock from the worker each time.
                wait(futures, return_when=FIRST_EXCEPTION)
            for future in _with_progress(futures, progress):
                quality.add(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return quality.compute()


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    return array if array.ndim == 3 else as_id_map(array, name)


def default_folder(json_path: str | os.PathLike) -> Path:
    """Where the PNGs of a panoptic JSON are if nothing else is said: its path without the ending."""
    return Path(json_path).with_suffix("")


def _folder(folder: str | os.PathLike | None, content: Any, which: str) -> Path:
    if folder is None:
        if isinstance(content, Mapping):
            raise ValueError(f"{which}_folder must be given where {which}_json is not a path")
        folder = default_folder(content)
    if not Path(folder).is_dir():
        raise PanopticFormatError(f"{which}_folder {folder} is not a folder")
    return Path(folder)


def _annotations(source: Any, name: str, with_categories: bool) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        check_panoptic(source, name, with_categories)
        return source
    return read_panoptic_json(source, with_categories)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_progress(items: Sequence, progress: bool) -> Iterable:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="evaluate", unit="image")


def _match_image(
    shared: Mapping[tuple[int, int], int],
    gt_segments: Sequence[Mapping[str, Any]],
    pred_segments: Sequence[Mapping[str, Any]],
    categories: Mapping[int, bool],
    image_id: int | str,
) -> dict[int, ClassCounts]:
    """Match the segments of one image; `shared` maps (ground-truth id, predicted id) to pixels."""
    # A dict keeps the first position and the last content of an id that is listed twice, like panopticapi's.
    gt_info = {segment["id"]: segment for segment in gt_segments}
    pred_category = {segment["id"]: segment["category_id"] for segment in pred_segments}
    gt_pixels: dict[int, int] = {}
    pred_pixels: dict[int, int] = {}
    for (gt_id, pred_id), count in shared.items():
        gt_pixels[gt_id] = gt_pixels.get(gt_id, 0) + count
        pred_pixels[pred_id] = pred_pixels.get(pred_id, 0) + count
    _check_prediction(pred_pixels, pred_category, categories, image_id)

    result: dict[int, ClassCounts] = {}

    def counts(category: int) -> ClassCounts:
        return result.setdefault(category, ClassCounts())

    gt_matched, pred_matched = set(), set()
    for (gt_id, pred_id), intersection in shared.items():
        segment = gt_info.get(gt_id)
        if segment is None or pred_id not in pred_category or segment.get("iscrowd", 0) == 1:
            continue
        category = segment["category_id"]
        if category != pred_category[pred_id]:
            continue
        gt_area = segment.get("area", gt_pixels[gt_id])
        union = pred_pixels[pred_id] + gt_area - intersection - shared.get((VOID, pred_id), 0)
        if union < intersection and gt_id == VOID:
            raise PanopticFormatError(f"image {image_id}: a ground-truth segment has the id 0, which stands for void")
        if union < intersection:  # never with the area that the segment has: qualities would exceed 1
            raise PanopticFormatError(
                f"image {image_id}: ground-truth segment {gt_id} has area {gt_area} in the JSON and "
                f"{gt_pixels[gt_id]} pixels in the PNG"
            )
        iou = intersection / union
        if iou > 0.5:
            counts(category).tp += 1
            counts(category).iou += iou
            gt_matched.add(gt_id)
            pred_matched.add(pred_id)

    crowd_of_category = {}
    for gt_id, segment in gt_info.items():
        if gt_id in gt_matched:
            continue
        if segment.get("iscrowd", 0) == 1:
            crowd_of_category[segment["category_id"]] = gt_id
        else:
            counts(segment["category_id"]).fn += 1

    for pred_id, category in pred_category.items():
        if pred_id in pred_matched:
            continue
        ignored = shared.get((VOID, pred_id), 0)
        if category in crowd_of_category:
            ignored += shared.get((crowd_of_category[category], pred_id), 0)
        if ignored / pred_pixels[pred_id] <= 0.5:
            counts(category).fp += 1
    return result


def _check_prediction(
    pixels: Mapping[int, int], category_of: Mapping[int, int], categories: Mapping[int, bool], image_id: int | str
) -> None:
    for pred_id in pixels:
        if pred_id not in category_of:
            if pred_id != VOID:
                raise PanopticFormatError(f"image {image_id}: segment {pred_id} is in the PNG and not in the JSON")
        elif category_of[pred_id] not in categories:
            raise PanopticFormatError(
                f"image {image_id}: segment {pred_id} has the unknown category {category_of[pred_id]}"
            )
    absent = sorted(set(category_of) - set(pixels))
    if absent:
        raise PanopticFormatError(f"image {image_id}: segments {absent} are in the JSON and not in the PNG")
