# SPDX-License-Identifier: Apache-2.0
"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", 2019).

All numbers equal panopticapi's, except where an `area` is less than the number of pixels (`docs/annotations.md`).
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spatialflow.panoptic.category_names import check_names
from spatialflow.panoptic.formats import as_id_map, check_panoptic, load_json, read_id_map
from spatialflow.panoptic.pair_counts import count_pairs
from spatialflow.panoptic.photographs import join_images
from spatialflow.panoptic.rules import (
    PREDICTION,
    TRUTH,
    VOID,
    AnnotationWarning,
    PanopticFormatError,
    Problem,
    pixel_problems,
    raise_first,
    segment_problems,
    summary,
)
from spatialflow.threads import available_cores


@dataclass(slots=True)
class ClassCounts:
    """The counts of one class: sum of IoU over matches, true positives, false positives, false negatives."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def add(self, counts: "ClassCounts") -> None:
        """Add the counts of another image."""
        self.iou += counts.iou
        self.tp += counts.tp
        self.fp += counts.fp
        self.fn += counts.fn

    def quality(self) -> dict[str, float | int]:
        """Compute pq, sq and rq as fractions, and n = 1 (all 0 if nothing was counted); also return the counts."""
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


def image_quality(counts: Mapping[int, ClassCounts]) -> float | None:
    """Compute the PQ of one image: the mean over the classes that occur in it; None if none does."""
    qualities = [row.quality() for row in counts.values()]
    values = [row["pq"] for row in qualities if row["n"]]
    return sum(values) / len(values) if values else None


class Matches(NamedTuple):
    """Which segments of one image match."""

    iou_of: dict[tuple[int, int], float]  # IoU of every match, by ground-truth id and predicted id
    false_positives: list[int]  # predicted ids
    false_negatives: list[int]  # ground-truth ids
    shared: Mapping[tuple[int, int], int]  # pixels by ground-truth id and predicted id, `VOID` included
    problems: list[Problem]  # contradictions to report


class PanopticQuality:
    """Accumulate panoptic quality over images in memory; see `evaluate` for folders.

    Args:
        categories: the COCO list of {id, isthing, ...}, or a mapping from category id to isthing.

    A predicted and a ground-truth segment of one class match if their IoU exceeds 0.5. The union excludes the pixels of
    the prediction on void. A prediction without a match is not counted if more than half of it is on void or on the
    crowd of its class. Of several crowds of a class in an image, the last one listed is used. The area of a
    ground-truth segment is its `area` field, where present, but at least its number of pixels.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]] | Mapping[int, Any]) -> None:
        if isinstance(categories, Mapping):
            self._things = {key: bool(value) for key, value in categories.items()}
        else:
            self._things = {category["id"]: category["isthing"] == 1 for category in categories}
        self._counts: dict[int, ClassCounts] = {}

    @property
    def categories(self) -> Set[int]:
        """The ids of the categories."""
        return self._things.keys()

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
            gt_map: (H, W) integer ids or (H, W, 3) uint8 colors (red first) of the ground truth.
            gt_segments: mappings with id, category_id and, optionally, area and iscrowd.
            pred_map: like gt_map, for the prediction.
            pred_segments: mappings with id and category_id.
            image_id: named in errors.

        Raises:
            PanopticFormatError: sizes differ; the predicted map and list have different segments; a ground-truth
                segment has the id 0 or is listed twice; an area is negative or not finite; or a category is unknown.

        Other contradictions between a list and its map (`docs/annotations.md`) are an `AnnotationWarning` each.
        """
        counts, problems = self.count(gt_map, gt_segments, pred_map, pred_segments, image_id)
        for problem in problems:
            warnings.warn(problem.text, AnnotationWarning, stacklevel=2)
        self.add(counts)

    def count(
        self,
        gt_map: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_map: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str = "",
    ) -> tuple[dict[int, ClassCounts], list[Problem]]:
        """Compute the counts of one image by category id, and problems to report; nothing is accumulated.

        Arguments and errors as for `update`.
        """
        self._check_segments(gt_segments, pred_segments, image_id)
        return _count_image(_shared_pixels(gt_map, pred_map, image_id), gt_segments, pred_segments, image_id)

    def match(
        self,
        gt_map: np.ndarray,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_map: np.ndarray,
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str = "",
    ) -> Matches:
        """Compute which segments of one image are matches, false positives and false negatives, as `count` does.

        Arguments and errors as for `update`; nothing is accumulated.
        """
        self._check_segments(gt_segments, pred_segments, image_id)
        return _match_image(_shared_pixels(gt_map, pred_map, image_id), gt_segments, pred_segments, image_id)

    def _check_segments(
        self,
        gt_segments: Sequence[Mapping[str, Any]],
        pred_segments: Sequence[Mapping[str, Any]],
        image_id: int | str,
    ) -> None:
        raise_first(segment_problems(gt_segments, image_id, self._things), TRUTH)
        raise_first(segment_problems(pred_segments, image_id, self._things), PREDICTION)

    def add(self, counts: Mapping[int, ClassCounts]) -> None:
        """Add the counts of one image, from `count`."""
        for category, counted in counts.items():
            self._counts.setdefault(category, ClassCounts()).add(counted)

    def compute(self) -> dict[str, Any]:
        """Compute the result of `evaluate` over all images so far."""
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
                "no segment of any category was annotated or predicted: all qualities are 0 with n = 0",
                AnnotationWarning,
                stacklevel=2,
            )
        result["per_class"] = per_class
        return result


def evaluate(
    gt_json: str | os.PathLike[str] | Mapping[str, Any],
    gt_folder: str | os.PathLike[str] | None,
    pred_json: str | os.PathLike[str] | Mapping[str, Any],
    pred_folder: str | os.PathLike[str] | None,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a folder of panoptic predictions against the ground truth.

    Args:
        gt_json: COCO panoptic JSON with `annotations` and `categories`, a path or its content.
        gt_folder: folder of its PNGs; None for the JSON's path without its suffix.
        pred_json: COCO panoptic JSON with `annotations`. Every image of the ground truth must be in it, by its id or
            by the name of its photograph (`join_images`). Names in its `categories`, if any, must be those of the
            ground truth.
        pred_folder: like gt_folder, for the predictions.
        workers: threads that read, decode and count; default: one per core. The result does not depend on it.
        progress: show a progress bar on standard error.

    Returns:
        A mapping. "All", "Things" and "Stuff" are {pq, sq, rq, n}: means, as fractions, over the n classes that have a
        true positive, false positive or false negative. "per_class" maps every category id to {pq, sq, rq, n, tp, fp,
        fn, iou}, where iou is the sum over matches.

    Raises:
        PanopticFormatError: a file is absent, damaged or breaks the format, an image has no prediction, or the
            segments and pixels of a prediction disagree. The message names the file or the image and the segment. Also
            raised if both files have names of categories, and one id has two names.

    Without any annotated or predicted segment the qualities are 0 with n = 0, with an `AnnotationWarning`. Further
    warnings name contradictory annotations; see `docs/annotations.md` for the rules and the computation.
    Neither torch nor OpenCV is imported. Source: panopticapi, `pq_compute`.
    """
    truth, prediction = AnnotationFiles(gt_json, gt_folder), AnnotationFiles(pred_json, pred_folder)
    scored = score_files(truth, prediction, workers=workers, progress=progress)
    for text in scored.reports:
        warnings.warn(text, AnnotationWarning, stacklevel=2)
    return scored.result


class AnnotationFiles(NamedTuple):
    """A panoptic JSON and the folder of its PNGs."""

    json: str | os.PathLike[str] | Mapping[str, Any]  # a path, or its content
    folder: str | os.PathLike[str] | None  # None for the JSON's path without its suffix


class Scored(NamedTuple):
    """The result of `score_files`."""

    result: dict[str, Any]  # as `evaluate` returns it
    truth: Mapping[str, Any]  # content of the ground truth's JSON
    prediction_of: dict[int | str, int | str]  # image_id of the ground truth -> image_id of its prediction
    reports: list[str]  # messages about contradictory annotations, which were scored
    left_out: int  # number of predictions of images without ground truth


def score_files(
    truth: AnnotationFiles, prediction: AnnotationFiles, *, workers: int | None = None, progress: bool = False
) -> Scored:
    """Score as `evaluate`, with the same errors; return contradictory annotations as messages, not as warnings."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    gt_folder, pred_folder = _folder(truth, "gt"), _folder(prediction, "pred")
    gt, gt_name = _content(truth.json, "gt_json")
    gt_problems = check_panoptic(gt, gt_name, with_categories=True, use=TRUTH)
    quality = PanopticQuality(gt["categories"])
    pred, pred_name = _content(prediction.json, "pred_json")
    check_names(gt["categories"], gt_name, pred.get("categories") if isinstance(pred, Mapping) else None, pred_name)
    try:
        pred_problems = check_panoptic(pred, pred_name, use=PREDICTION, categories=quality.categories)
    except PanopticFormatError as error:
        if error.rule != "category-unknown":
            raise
        known = ", ".join(f"{row['id']} ({row.get('name', '')})" for row in gt["categories"][:3])
        known += ", ..." * (len(gt["categories"]) > 3)
        reason = f"the ground truth has {known}; the network must have been trained on its categories"
        raise PanopticFormatError(f"{error}: {reason}", error.rule) from None
    prediction_of = join_images(gt, pred)
    predicted = {annotation["image_id"]: annotation for annotation in pred["annotations"]}

    def count_image(gt_image: Mapping[str, Any]) -> tuple[dict[int, ClassCounts], list[Problem]]:
        image_id = gt_image["image_id"]
        pred_image = predicted[prediction_of[image_id]]
        gt_map, pred_map = (
            read_id_map(os.path.join(folder, image["file_name"]))
            for folder, image in ((gt_folder, gt_image), (pred_folder, pred_image))
        )
        # `check_panoptic` has checked the segments.
        shared = _shared_pixels(gt_map, pred_map, image_id)
        return _count_image(shared, gt_image["segments_info"], pred_image["segments_info"], image_id)

    with ThreadPoolExecutor(workers or available_cores()) as pool:
        futures = [pool.submit(count_image, annotation) for annotation in gt["annotations"]]
        try:
            if not progress:
                # One wake-up at the end, as a wake-up per image would take the interpreter lock from a worker.
                wait(futures, return_when=FIRST_EXCEPTION)
            for future in with_progress(futures, "evaluate", progress):
                counts, problems = future.result()
                quality.add(counts)
                gt_problems += problems
        finally:
            pool.shutdown(cancel_futures=True)
    reports = [
        summary(problems, name) for problems, name in ((gt_problems, gt_name), (pred_problems, pred_name)) if problems
    ]
    return Scored(quality.compute(), gt, prediction_of, reports, len(predicted) - len(prediction_of))


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    return array if array.ndim == 3 else as_id_map(array, name)


def default_folder(json_path: str | os.PathLike[str]) -> Path:
    """Return the default folder of the PNGs of a panoptic JSON: its path without the suffix."""
    path = Path(json_path)
    return path.with_suffix("") if path.name else path


def _folder(files: AnnotationFiles, prefix: str) -> Path:
    """Return the folder of the PNGs; errors name the arguments `<prefix>_folder` and `<prefix>_json`."""
    folder = files.folder
    if folder is None:
        if isinstance(files.json, Mapping):
            raise ValueError(f"{prefix}_folder must be given where {prefix}_json is not a path")
        folder = default_folder(files.json)
    if not os.path.isdir(folder):
        raise PanopticFormatError(f"{prefix}_folder {folder} is not a folder")
    return Path(folder)


def _content(source: Any, name: str) -> tuple[Any, str]:
    """Return the content of a JSON, and its name in errors."""
    return (source, name) if isinstance(source, Mapping) else (load_json(source), str(source))


def with_progress(items: Sequence[Any], title: str, progress: bool) -> Iterable[Any]:
    """Iterate over items, with a progress bar titled `title` on standard error if `progress` is true."""
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=title, unit="image")


def _shared_pixels(gt_map: np.ndarray, pred_map: np.ndarray, image_id: int | str) -> dict[tuple[int, int], int]:
    """Map each pair of a ground-truth id and a predicted id to the number of pixels that have both."""
    gt_map, pred_map = _pixels(gt_map, "gt_map"), _pixels(pred_map, "pred_map")
    if gt_map.shape[:2] != pred_map.shape[:2]:
        raise PanopticFormatError(
            f"image {image_id}: the ground truth is {gt_map.shape[1]}x{gt_map.shape[0]} pixels, "
            f"the prediction {pred_map.shape[1]}x{pred_map.shape[0]}"
        )
    gt_ids, pred_ids, pixels = count_pairs(gt_map, pred_map)
    return dict(zip(zip(gt_ids.tolist(), pred_ids.tolist(), strict=True), pixels.tolist(), strict=True))


def _count_image(
    shared: Mapping[tuple[int, int], int],
    gt_segments: Sequence[Mapping[str, Any]],
    pred_segments: Sequence[Mapping[str, Any]],
    image_id: int | str,
) -> tuple[dict[int, ClassCounts], list[Problem]]:
    """Match the segments of one image, with the errors of `_match_image`; return the counts by category id."""
    matches = _match_image(shared, gt_segments, pred_segments, image_id)
    gt_category, pred_category = (
        {segment["id"]: segment["category_id"] for segment in segments} for segments in (gt_segments, pred_segments)
    )
    result: dict[int, ClassCounts] = {}

    def counts(category: int) -> ClassCounts:
        return result.setdefault(category, ClassCounts())

    for (gt_id, _), iou in matches.iou_of.items():
        row = counts(gt_category[gt_id])
        row.tp += 1
        row.iou += iou
    for gt_id in matches.false_negatives:
        counts(gt_category[gt_id]).fn += 1
    for pred_id in matches.false_positives:
        counts(pred_category[pred_id]).fp += 1
    return result, matches.problems


def _match_image(
    shared: Mapping[tuple[int, int], int],
    gt_segments: Sequence[Mapping[str, Any]],
    pred_segments: Sequence[Mapping[str, Any]],
    image_id: int | str,
) -> Matches:
    """Match the segments of one image; `shared` maps (ground-truth id, predicted id) to pixels.

    A contradiction between lists and pixels that stops scoring is raised; others are returned.
    """
    # A dict keeps the first position and the last content of an id that is listed twice, like panopticapi's.
    gt_info = {segment["id"]: segment for segment in gt_segments}
    pred_category = {segment["id"]: segment["category_id"] for segment in pred_segments}
    gt_pixels: dict[int, int] = {}
    pred_pixels: dict[int, int] = {}
    for (gt_id, pred_id), count in shared.items():
        gt_pixels[gt_id] = gt_pixels.get(gt_id, 0) + count
        pred_pixels[pred_id] = pred_pixels.get(pred_id, 0) + count
    problems = raise_first(pixel_problems(gt_segments, image_id, gt_pixels), TRUTH)
    raise_first(pixel_problems(pred_segments, image_id, pred_pixels), PREDICTION)

    iou_of: dict[tuple[int, int], float] = {}
    gt_matched, pred_matched = set(), set()
    for (gt_id, pred_id), intersection in shared.items():
        segment = gt_info.get(gt_id)
        if segment is None or pred_id not in pred_category or segment.get("iscrowd", 0) == 1:
            continue
        if segment["category_id"] != pred_category[pred_id]:
            continue
        # An `area` less than the number of pixels would raise the IoU, in panopticapi even above 1.
        gt_area = max(segment.get("area", 0), gt_pixels[gt_id])
        union = pred_pixels[pred_id] + gt_area - intersection - shared.get((VOID, pred_id), 0)
        iou = intersection / union
        if iou > 0.5:
            iou_of[gt_id, pred_id] = iou
            gt_matched.add(gt_id)
            pred_matched.add(pred_id)

    crowd_of_category = {}
    false_negatives = []
    for gt_id, segment in gt_info.items():
        if gt_id in gt_matched:
            continue
        if segment.get("iscrowd", 0) == 1:
            crowd_of_category[segment["category_id"]] = gt_id
        else:
            false_negatives.append(gt_id)

    false_positives = []
    for pred_id, category in pred_category.items():
        if pred_id in pred_matched:
            continue
        ignored = shared.get((VOID, pred_id), 0)
        if category in crowd_of_category:
            ignored += shared.get((crowd_of_category[category], pred_id), 0)
        if ignored / pred_pixels[pred_id] <= 0.5:
            false_positives.append(pred_id)
    return Matches(iou_of, false_positives, false_negatives, shared, problems)
