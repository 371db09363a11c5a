# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow evaluate`."""

from __future__ import annotations

import argparse
import sys

from spatialflow.cli.common import (
    CommandError,
    Subparsers,
    check_count,
    check_output,
    format_error,
    ground_truth_json,
    panoptic_json,
    path_argument,
    path_in_oserror,
    png_folder,
    with_examples,
)


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="compute the panoptic quality of a folder of predictions",
        description="Print panoptic quality (PQ), segmentation quality (SQ) and recognition quality (RQ) in percent, "
        "and N, the number\nof classes that are averaged. Images are matched by id, or by the photograph's name "
        "(docs/prediction.md).\nInconsistent annotations are reported or end the command (docs/annotations.md).",
        **with_examples(
            "evaluate panoptic_val2017.json out",
            "evaluate panoptic_val2017.json out --detections out/detections.json --per-class --output scores.json",
        ),
    )
    parser.set_defaults(run=run)
    for name, text in (
        ("ground_truth", "ground truth: a Cityscapes tree (its split val), or"),
        ("prediction", "predictions:"),
    ):
        parser.add_argument(
            name,
            type=path_argument,
            metavar=name.upper(),
            help=f"{text} the panoptic JSON, the folder of PNGs beside it, or the output of `predict`",
        )
    for name in ("ground-truth", "prediction"):
        parser.add_argument(
            f"--{name}-folder",
            type=path_argument,
            metavar="FOLDER",
            help=f"PNGs of {name.upper().replace('-', '_')} if they are not beside the JSON",
        )
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument(
        "--detections",
        type=path_argument,
        metavar="FILE",
        help="COCO results, as written by `predict --detections`: also compute box and mask AP",
    )
    parser.add_argument("--per-class", action="store_true", help="add a line for every class to the table")
    parser.add_argument("--workers", type=int, metavar="N", help="number of threads (default: one per core)")


def run(options: argparse.Namespace) -> int:
    """Print the scores of a folder of predictions; return the exit code."""
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.report import evaluate_and_report

    check_count("--workers", options.workers)
    prediction = panoptic_json(options.prediction)
    try:
        truth, failed = ground_truth_json(options.ground_truth, prediction.parent)
        truth_folder = png_folder(truth, options.ground_truth_folder, "--ground-truth-folder")
        prediction_folder = png_folder(prediction, options.prediction_folder, "--prediction-folder")
        check_output(options.output, truth, truth_folder, prediction, prediction_folder, options.detections)
        with path_in_oserror(options.output):
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
    except PanopticFormatError as error:
        raise CommandError(str(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(format_error(error)) from None
    return 1 if failed else 0
