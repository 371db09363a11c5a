# SPDX-License-Identifier: Apache-2.0
"""Reports of panoptic quality: tables of groups and classes, and a JSON file."""

import os
import sys
import warnings
from collections.abc import Mapping
from typing import IO, Any

from spatialflow.errors import printable
from spatialflow.files import write_json
from spatialflow.panoptic.detection import average_precision, read_detections, rename_images
from spatialflow.panoptic.quality import AnnotationFiles, default_folder, score_files
from spatialflow.panoptic.rules import AnnotationWarning

GROUPS = ("All", "Things", "Stuff")


def evaluate_and_report(
    gt_json: str | os.PathLike[str],
    gt_folder: str | os.PathLike[str] | None,
    pred_json: str | os.PathLike[str],
    pred_folder: str | os.PathLike[str] | None,
    *,
    output: str | os.PathLike[str] | None = None,
    detections: str | os.PathLike[str] | None = None,
    per_class: bool = True,
    workers: int | None = None,
    progress: bool = False,
    stream: IO[str] | None = None,
) -> dict[str, Any]:
    """Score a folder of predictions, print tables and write the scores, as `spatialflow evaluate`.

    Args:
        gt_json: as for `spatialflow.panoptic.evaluate`.
        gt_folder: folder of its PNGs; None for the JSON's path without its suffix.
        pred_json: as for `spatialflow.panoptic.evaluate`.
        pred_folder: like gt_folder, for the predictions.
        output: JSON file for the result, with category ids as strings and category names; None writes no file.
        detections: JSON of COCO results; their average precision is printed and added to the result as "detection".
        per_class: also print the table of classes.
        workers: threads; None: one per core.
        progress: show a progress bar on standard error.
        stream: output of the tables; None for standard output.

    Returns:
        The result of `spatialflow.panoptic.evaluate`, with the average precision if `detections` is not None.

    Raises:
        PanopticFormatError: as for `evaluate`; or no detection is of an image of the ground truth.
        OSError: output cannot be written.
    """
    # Before the scoring, so that an invalid file fails early.
    results = None if detections is None else read_detections(detections)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no segment of any category")  # the table says it
        truth_files, prediction_files = AnnotationFiles(gt_json, gt_folder), AnnotationFiles(pred_json, pred_folder)
        scored = score_files(truth_files, prediction_files, workers=workers, progress=progress)
    for text in scored.reports:
        warnings.warn(text, AnnotationWarning, stacklevel=2)
    result, truth = scored.result, scored.truth
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth["categories"]}
    print(_count_line(len(scored.prediction_of), scored.left_out), file=stream or sys.stdout)
    print(quality_table(result, names if per_class else None), file=stream or sys.stdout)
    if results is not None:
        rows = rename_images(results, scored.prediction_of)
        precision = average_precision(truth, gt_folder or default_folder(gt_json), rows)
        for kind, row in precision.items():
            shown = (f"{name} {100 * value:.1f}" if value >= 0 else f"{name} -" for name, value in row.items())
            print(f"{kind} AP " + "  ".join(shown), file=stream or sys.stdout)
        result["detection"] = precision
    if output is not None:
        write_json(output, named_result(result, names), indent=1)
    return result


def _count_line(scored: int, left_out: int) -> str:
    """Say how many images were scored, and how many predictions are of images without ground truth."""
    text = f"{scored} image{'s' * (scored != 1)} scored"
    if left_out:
        words = ("prediction has", "is") if left_out == 1 else ("predictions have", "are")
        text += f"; {left_out} {words[0]} no ground truth and {words[1]} left out"
    return text


def quality_table(result: Mapping[str, Any], names: Mapping[int, str] | None = None) -> str:
    """Format a result of `evaluate`: a table of groups in percent, and of classes if `names` (by id) is not None.

    Classes without a true positive, false positive or false negative are left out.
    """
    lines = [f"{'':10}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'N':>5}"]
    for group in GROUPS:
        row = result[group]
        lines.append(f"{group:10}{100 * row['pq']:7.1f}{100 * row['sq']:7.1f}{100 * row['rq']:7.1f}{row['n']:5d}")
    if result["All"]["n"] == 0:
        lines.append("no segment of any category was annotated or predicted")
    if names is not None:
        names = {category: printable(name) for category, name in names.items()}
        seen = {category: row for category, row in result["per_class"].items() if row["n"]}
        width = max([len(names[category]) for category in seen] + [8]) + 2
        lines += ["", f"{'class':{width}}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'TP':>7}{'FP':>7}{'FN':>7}"]
        for category, row in seen.items():
            lines.append(
                f"{names[category]:{width}}{100 * row['pq']:7.1f}{100 * row['sq']:7.1f}{100 * row['rq']:7.1f}"
                f"{row['tp']:7d}{row['fp']:7d}{row['fn']:7d}"
            )
    return "\n".join(lines)


def named_result(result: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """Convert a result of `evaluate` for JSON: category ids become strings, and each class has its name."""
    classes = {str(category): {"name": names[category], **row} for category, row in result["per_class"].items()}
    extra = {"detection": result["detection"]} if "detection" in result else {}
    return {**{group: result[group] for group in GROUPS}, **extra, "per_class": classes}
