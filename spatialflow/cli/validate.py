# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow validate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spatialflow.cli.common import (
    check_count,
    keep_inputs,
    named,
    panoptic_json,
    png_folder,
    sentence,
    to_path,
    with_examples,
)
from spatialflow.errors import CommandError

EXAMPLES = 3


def add_validate(commands: Any) -> None:
    """Adds the command to the subparsers of `spatialflow`."""
    validate = commands.add_parser(
        "validate",
        help="find what is wrong with panoptic annotations",
        description="Checks a panoptic JSON, its PNGs and photographs: ids, areas, boxes, categories, sizes, "
        "missing files.\nFor every broken rule (docs/annotations.md) it says what a breach does in a "
        "ground truth and in a\nprediction for `evaluate`, and in `train`: the command stops, it is "
        "reported, the image is\nskipped, or it does not matter (-). Exit codes: 0 clean, 1 problems "
        "found, 2 not readable at all.",
        **with_examples(
            "validate annotations/panoptic_val2017.json --images val2017",
            "validate gtFine/cityscapes_panoptic_val.json --images leftImg8bit/val --output problems.json",
            "validate out",
        ),
    )
    validate.set_defaults(run=run_validate)
    validate.add_argument(
        "annotations",
        type=to_path,
        metavar="ANNOTATIONS",
        help="the panoptic JSON, the folder of PNGs beside it, or what `predict` wrote",
    )
    validate.add_argument("--folder", type=to_path, metavar="FOLDER", help="PNGs, if not beside the JSON")
    validate.add_argument(
        "--images",
        type=to_path,
        metavar="FOLDER",
        help="photographs: check that each can be read and has its PNG's size",
    )
    validate.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")
    validate.add_argument("--output", type=to_path, metavar="FILE", help="write all problems as JSON")


def run_validate(options: argparse.Namespace) -> int:
    """Carries the command out; returns the exit code."""
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.validation import validate

    check_count("--workers", options.workers)
    path = panoptic_json(options.annotations)
    folder = png_folder(path, options.folder, "--folder")
    keep_inputs(options.output, path, folder, options.images)
    try:
        found = validate(path, folder, options.images, workers=options.workers, progress=sys.stderr.isatty())
        if options.output is not None:
            with named(options.output):
                _write(options.output, path, found)
    except PanopticFormatError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(sentence(error)) from None
    print(_table(found), end="")
    count = len(found.problems)
    verdict = f"{count} problem{'s' * (count > 1)}" if count else "clean"
    print(f"{path}: {found.images} images, {found.segments} segments: {verdict}")
    return 1 if found.problems else 0


def _table(found: Any) -> str:
    """A line for every rule that is broken, with its first examples below."""
    from spatialflow.panoptic.rules import PREDICTION, RULES, TRAINING, TRUTH

    if not found.problems:
        return ""
    lines = [f"{'rule':18}{'count':>8}  {'ground truth':14}{'prediction':12}{'training':12}"]
    for name, rule in RULES.items():
        texts = [problem.text for problem in found.problems if problem.rule == name]
        if texts:
            effects = f"{rule.effect(TRUTH):14}{rule.effect(PREDICTION):12}{rule.effect(TRAINING):12}"
            lines.append(f"{name:18}{len(texts):8d}  {effects}".rstrip())
            lines += [f"    {text}" for text in texts[:EXAMPLES]]
            lines += [f"    and {len(texts) - EXAMPLES} more"] * (len(texts) > EXAMPLES)
    # Names in a JSON may hold unpaired surrogates, which no terminal can print.
    return "\n".join((*lines, "")).encode("utf-8", "backslashreplace").decode()


def _write(output: Path, path: Path, found: Any) -> None:
    from spatialflow.files import atomic_write
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
        for problem in found.problems
    ]
    content = {"annotations": str(path), "images": found.images, "segments": found.segments, "problems": problems}
    with atomic_write(output, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
