# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from spatialflow.cli.common import (
    add_path,
    add_workers_option,
    as_command_errors,
    check_count,
    check_output,
    ground_truth_json,
    panoptic_json,
    path_in_oserror,
    png_folder,
    print_error,
)
from spatialflow.cli.label_folders import RESULT_INFO

SUMMARY = "compute the panoptic quality of a folder of predictions"
DESCRIPTION = (
    "Print panoptic quality (PQ), segmentation quality (SQ) and recognition quality (RQ) in percent, and N, the\n"
    "number of classes that are averaged. Images are matched by id, or by the photograph's name\n"
    "(docs/prediction.md). Inconsistent annotations are reported or end the command (docs/annotations.md)."
)
EXAMPLES = (
    "evaluate panoptic_val2017.json out",
    "evaluate panoptic_val2017.json out --detections out/detections.json --per-class --output scores.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    source = "the panoptic JSON, a folder that holds panoptic.json, the folder of PNGs beside the JSON, or"
    for name, text in (
        ("ground_truth", f"ground truth: {source} a Cityscapes tree (its split val)"),
        ("prediction", f"predictions: {source} the folder of a training run"),
    ):
        add_path(parser, name, name.upper(), text)
    for name in ("ground-truth", "prediction"):
        argument = name.upper().replace("-", "_")
        add_path(parser, f"--{name}-folder", "FOLDER", f"PNGs of {argument} if they are not beside the JSON")
    add_path(parser, "--output", "FILE", "write all numbers as JSON")
    add_path(
        parser,
        "--detections",
        "FILE",
        "COCO results, as written by `predict --detections`: also compute box and mask AP",
    )
    parser.add_argument("--per-class", action="store_true", help="add a line for every class to the table")
    add_workers_option(parser)


def run(options: argparse.Namespace) -> int:
    """Print the scores of a folder of predictions; return the exit code."""
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.report import evaluate_and_report

    check_count("--workers", options.workers)
    prediction = panoptic_json(options.prediction)
    with as_command_errors(PanopticFormatError):
        truth, failed = ground_truth_json(options.ground_truth, prediction.parent)
        truth_folder = png_folder(truth, options.ground_truth_folder, "--ground-truth-folder")
        prediction_folder = png_folder(prediction, options.prediction_folder, "--prediction-folder")
        check_output(options.output, truth, truth_folder, prediction, prediction_folder, options.detections)
        hint = _order_hint(truth, prediction)
        with path_in_oserror(options.output), _hint_in_error(hint):
            evaluate_and_report(
                truth,
                truth_folder,
                prediction,
                prediction_folder,
                output=options.output,
                detections=options.detections,
                per_class=options.per_class,
                workers=options.workers,
                progress=sys.stderr.isatty(),
            )
    if hint:
        print_error(hint)
    return 1 if failed else 0


def _order_hint(truth: Path, prediction: Path) -> str:
    """Say the order of the arguments if the ground truth alone is a result of `predict`; else return ""."""
    from spatialflow.panoptic.writer import earlier_files

    is_result = [path in earlier_files(path, RESULT_INFO)[0] for path in (truth, prediction)]
    if is_result != [True, False]:
        return ""
    return f"the first argument is the ground truth, the second the prediction; {truth} holds results of `predict`"


@contextlib.contextmanager
def _hint_in_error(hint: str) -> Iterator[None]:
    """Within the block, append a hint to the message of a PanopticFormatError."""
    from spatialflow.panoptic import PanopticFormatError

    try:
        yield
    except PanopticFormatError as error:
        raise PanopticFormatError(f"{error}; {hint}" if hint else str(error), error.rule) from None
