# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow validate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spatialflow.cli.common import (
    add_path,
    add_workers_option,
    as_command_errors,
    check_count,
    check_output,
    counted,
    panoptic_json,
    path_in_oserror,
    png_folder,
)

if TYPE_CHECKING:
    from spatialflow.panoptic.validation import Validation

SHOWN_PROBLEMS = 3
"""Number of problems that the table shows for each rule."""

SUMMARY = "find errors in panoptic annotations"
DESCRIPTION = (
    "Check a panoptic JSON, its PNGs and photographs: ids, areas, boxes, categories, sizes, missing files.\n"
    "For every broken rule (docs/annotations.md) a table shows the effect in a ground truth and in a prediction\n"
    "(`evaluate`), and in training: the command stops, the problem is reported, the image is skipped, or there\n"
    "is no effect (-). Exit codes: 0 no problems, 1 problems found, 2 not readable."
)
EXAMPLES = (
    "validate annotations/panoptic_val2017.json --images val2017",
    "validate gtFine/cityscapes_panoptic_val.json --images leftImg8bit/val --output problems.json",
    "validate out",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    source = "the panoptic JSON, a folder that holds panoptic.json, or the folder of PNGs beside the JSON"
    add_path(parser, "annotations", "ANNOTATIONS", source)
    add_path(parser, "--folder", "FOLDER", "PNGs, if they are not beside the JSON")
    add_path(parser, "--images", "FOLDER", "photographs: check that each can be read and has the size of its PNG")
    add_workers_option(parser)
    add_path(parser, "--output", "FILE", "write all problems as JSON")


def run(options: argparse.Namespace) -> int:
    """Check the annotations and print a table of problems; return the exit code."""
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.validation import validate

    check_count("--workers", options.workers)
    path = panoptic_json(options.annotations)
    folder = png_folder(path, options.folder, "--folder")
    check_output(options.output, path, folder, options.images)
    with as_command_errors(PanopticFormatError):
        result = validate(path, folder, options.images, workers=options.workers, progress=sys.stderr.isatty())
        if options.output is not None:
            with path_in_oserror(options.output):
                _write(options.output, path, result)
    print(problem_table(result), end="")
    print(verdict(path, result))
    return 1 if result.problems else 0


def verdict(path: Path, result: Validation) -> str:
    """Summarize the check of a panoptic JSON in one line."""
    count = len(result.problems)
    problems = f"{count} problem{'s' * (count > 1)}" if count else "clean"
    return f"{path}: {counted(result.images, 'image')}, {counted(result.segments, 'segment')}: {problems}"


def problem_table(result: Validation) -> str:
    """Make a table with a line for every broken rule and its first examples below."""
    from spatialflow.panoptic.rules import PREDICTION, RULES, TRAINING, TRUTH

    if not result.problems:
        return ""
    lines = [f"{'rule':18}{'count':>8}  {'ground truth':14}{'prediction':12}{'training':12}"]
    for name, rule in RULES.items():
        texts = [problem.text for problem in result.problems if problem.rule == name]
        if texts:
            effects = f"{rule.effect(TRUTH):14}{rule.effect(PREDICTION):12}{rule.effect(TRAINING):12}"
            lines.append(f"{name:18}{len(texts):8d}  {effects}".rstrip())
            lines += [f"    {text}" for text in texts[:SHOWN_PROBLEMS]]
            lines += [f"    and {len(texts) - SHOWN_PROBLEMS} more"] * (len(texts) > SHOWN_PROBLEMS)
    # Names in a JSON may contain unpaired surrogates, which a terminal cannot print.
    return "\n".join((*lines, "")).encode("utf-8", "backslashreplace").decode()


def _write(output: Path, annotations: Path, result: Validation) -> None:
    """Write all problems as JSON."""
    from spatialflow.files import write_json
    from spatialflow.panoptic.rules import PREDICTION, RULES, TRAINING, TRUTH

    uses = {"ground_truth": TRUTH, "prediction": PREDICTION, "training": TRAINING}
    problems = [
        {
            "rule": problem.rule,
            "image": problem.image,
            "segment": problem.segment,
            "value": problem.value,
            "text": problem.text,
            **{name: RULES[problem.rule].effect(use) for name, use in uses.items()},
        }
        for problem in result.problems
    ]
    content = {"annotations": str(annotations), "images": result.images, "segments": result.segments}
    write_json(output, {**content, "problems": problems}, indent=1)
