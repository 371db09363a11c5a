# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow dataset`: convert annotations, and check and show a data set."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import (
    CommandError,
    add_command,
    add_path,
    add_workers_option,
    as_command_errors,
    check_count,
    check_output,
    counted,
    panoptic_json,
    path_in_oserror,
    png_folder,
    print_error,
    printable,
    quoted,
)
from spatialflow.cli.validate import problem_table, verdict

if TYPE_CHECKING:
    import numpy as np

    from spatialflow.data.convert import Conversion
    from spatialflow.data.survey import Survey

SUMMARY = "convert your annotations to the COCO panoptic format, and check them"
DESCRIPTION = (
    "Prepare a data set for training and scoring.\n"
    "  convert  rewrite annotations of other tools in the COCO panoptic format\n"
    "  check    find errors, count classes and sizes, and draw examples\n"
    "docs/datasets.md describes the formats. `spatialflow dataset convert --help` lists the options."
)
EXAMPLES = (
    "dataset convert labelme/ --images photos --output mydata --stuff-classes sky,road --split 0.9",
    "dataset check mydata/train.json --images photos --pictures examples.jpg",
)
_CONVERT_DESCRIPTION = (
    "Convert annotations to the COCO panoptic format: panoptic.json with classes and segments, and a PNG per image.\n"
    "The source is not changed. A repeated run replaces the files of the earlier one, and no others. Damaged files\n"
    "and regions are named and left out. Exit codes: 0 no damage, 1 some left out, 2 nothing can be converted.\n\n"
    "SOURCE of each format:\n"
    "  coco-instances  the JSON file, or the folder that holds it\n"
    "  labelme         the folder of JSON files, or one of them\n"
    '  cvat            annotations.xml of the export "CVAT for images 1.1"\n'
    "  masks           the folder of images (PNG, TIFF, BMP) with a class per pixel, or 1000 * class + instance\n"
    "  yolo            data.yaml, or the folder that holds it or `labels`"
)
_CHECK_DESCRIPTION = (
    "Check a panoptic JSON as `spatialflow validate` does, print a table of its classes, and point out what may hurt\n"
    "training. Exit codes: 0 no errors, 1 errors found, 2 not readable."
)
_CONVERT_EXAMPLES = (
    "dataset convert instances.json --images photos --output mydata --background other",
    "dataset convert labelme --output mydata --stuff-classes sky,road --split 0.9",
    "dataset convert annotations.xml --images photos --output mydata",
    "dataset convert masks --images photos --classes classes.json --output mydata",
    "dataset convert semantic --instances instances --images photos --classes labels.txt --output mydata",
    "dataset convert data.yaml --output mydata",
)
_CHECK_EXAMPLES = ("dataset check mydata/panoptic.json --images photos --pictures examples.jpg",)

SHOWN_PROBLEMS = 5
"""Number of problems that are printed for each rule."""

_COLUMNS, _ROWS = 4, 4  # of the sheet of examples
_CELL = 320  # longer side of an example, in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two actions of the command and their arguments."""
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    convert = add_command(
        actions, "convert", "rewrite annotations of other tools", _CONVERT_DESCRIPTION, _CONVERT_EXAMPLES
    )
    add_path(convert, "source", "SOURCE", "file or folder of annotations")
    add_path(convert, "--output", "FOLDER", "folder for panoptic.json and panoptic/", required=True)
    place = "default: where the format usually has them"
    add_path(convert, "--images", "FOLDER", f"photographs, with sub-folders ({place})")
    formats = ("auto", "coco-instances", "labelme", "cvat", "masks", "yolo")
    convert.add_argument("--format", choices=formats, default="auto", help="format of SOURCE (default: recognized)")
    convert.add_argument(
        "--stuff-classes",
        metavar="NAMES",
        help="classes that are stuff, such as sky,road; all others are things, unless the source says otherwise",
    )
    convert.add_argument(
        "--classes",
        metavar="LIST",
        help="a COCO category list (JSON), a text file with a class per line, or names as in person,car,sky",
    )
    convert.add_argument("--background", metavar="NAME", help="make all pixels without annotation this stuff class")
    add_path(convert, "--instances", "FOLDER", "masks: PNGs that number the objects, 0 for none")
    add_path(convert, "--stuff", "FOLDER", "coco-instances: PNGs with the ids of stuff classes")
    convert.add_argument(
        "--on-top",
        choices=("auto", "later", "smaller"),
        default="auto",
        help="region that covers others where they overlap (default: smaller for COCO and YOLO, later for the others)",
    )
    convert.add_argument(
        "--fill-boxes", action="store_true", help="convert boxes as masks; otherwise they are left out"
    )
    convert.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="write train.json with this share of the images, such as 0.9, and val.json; train.txt and val.txt list "
        "their photographs, for `predict - < val.txt`",
    )
    add_path(convert, "--problems", "FILE", "write all problems as JSON; only the first ones are printed")
    convert.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the split (default: %(default)s)")
    add_workers_option(convert)

    check = add_command(
        actions, "check", "find errors, count classes, draw examples", _CHECK_DESCRIPTION, _CHECK_EXAMPLES
    )
    add_path(
        check,
        "annotations",
        "ANNOTATIONS",
        "the panoptic JSON, a folder that holds panoptic.json, or the folder of PNGs beside the JSON",
    )
    add_path(check, "--images", "FOLDER", "photographs: check that each can be read and has the size of its PNG")
    add_path(check, "--folder", "FOLDER", "PNGs, if they are not beside the JSON")
    add_path(check, "--pictures", "FILE", "draw 16 examples into this picture")
    add_workers_option(check)


def run(options: argparse.Namespace) -> int:
    """Run one of the actions; return the exit code."""
    check_count("--workers", options.workers)
    return _convert(options) if options.action == "convert" else _check(options)


def _convert(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from spatialflow.data.convert import ConversionError, to_panoptic
    from spatialflow.files import write_json
    from spatialflow.panoptic import InUseError

    check_output(options.problems, options.source, options.images, options.stuff, options.instances)

    stuff_classes = options.stuff_classes
    done = total = 0
    with (
        tqdm(desc="convert", unit="image", disable=None, leave=False) as bar,
        as_command_errors(ConversionError, InUseError),
        path_in_oserror(options.output),
    ):

        def show(now: int, of: int) -> None:
            nonlocal done, total
            done, total = now, of
            bar.total = of
            bar.update()

        try:
            result = to_panoptic(
                options.source,
                options.output,
                options.images,
                format=options.format,
                classes=options.classes,
                stuff_classes=None
                if stuff_classes is None
                else [n.strip() for n in stuff_classes.split(",") if n.strip()],
                stuff=options.stuff,
                instances=options.instances,
                background=options.background,
                on_top=options.on_top,
                fill_boxes=options.fill_boxes,
                split=options.split,
                seed=options.seed,
                workers=options.workers,
                progress=show,
            )
        except KeyboardInterrupt as stop:
            if total:
                stop.args = (f"{options.output} has {done} of {total} images; the same command starts over",)
            raise
    if options.problems is not None:
        with as_command_errors(), path_in_oserror(options.problems):
            write_json(options.problems, [problem._asdict() for problem in result.problems], indent=1)
    shown = _print_problems(result)
    _print_conversion(result, shown, options.problems)
    return 1 if result.problems else 0


def _print_problems(result: Conversion) -> int:
    """Print the first problems of each rule on standard error; return how many."""
    texts_by_rule: dict[str, list[str]] = {}
    for problem in result.problems:
        texts_by_rule.setdefault(problem.rule, []).append(problem.text)
    for rule, texts in texts_by_rule.items():
        for text in texts[:SHOWN_PROBLEMS]:
            print_error(printable(text))
        if len(texts) > SHOWN_PROBLEMS:
            print_error(f"and {len(texts) - SHOWN_PROBLEMS} more problems of the kind {rule!r}")
    return sum(min(len(texts), SHOWN_PROBLEMS) for texts in texts_by_rule.values())


def _print_conversion(result: Conversion, shown: int, problems: Path | None) -> None:
    """Summarize a conversion, of which `shown` problems were printed; all are in the file `problems`, if any."""
    things = [printable(row["name"]) for row in result.categories if row["isthing"]]
    stuff = [printable(row["name"]) for row in result.categories if not row["isthing"]]
    counts = ", ".join(
        f"{result.segments[kind]} {kind}" for kind in ("things", "stuff", "crowds") if result.segments[kind]
    )
    print(f"format: {result.format}; photographs: {result.images}")
    print(f"things: {', '.join(things) or '-'}")
    print(f"stuff: {', '.join(stuff) or '-'}")
    print(f"segments: {counts or '0'}")
    for note in result.notes:
        print(f"note: {printable(note)}")
    if count := len(result.problems):
        place = f"of which {shown} are named above; --problems FILE lists all"
        if problems is not None:
            place = f"all listed in {printable(str(problems))}"
        elif shown == count:
            place = "named above"
        print(f"left out: {count} damaged or unknown {'entry' if count == 1 else 'entries'}, {place}")
    for path, count in zip(result.json_paths, result.image_counts, strict=True):
        listed = f"; list of photographs: {path.with_suffix('.txt')}" if len(result.json_paths) > 1 else ""
        print(f"{path}: {counted(count, 'image')}{listed}")
    if not any(result.image_counts):
        return
    paths = [quoted(path) for path in (result.json_paths[0], result.images)]
    print(f"next: spatialflow dataset check {paths[0]} --images {paths[1]} --pictures examples.jpg")


def _check(options: argparse.Namespace) -> int:
    from spatialflow.config import load_config
    from spatialflow.data.survey import advice, survey
    from spatialflow.engine.run_settings import DEFAULT_MODEL, chosen_edges
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.validation import validate

    path = panoptic_json(options.annotations)
    folder = png_folder(path, options.folder, "--folder")
    check_output(options.pictures, path, folder, options.images)
    if options.pictures is not None and options.pictures.suffix.lower() not in (".jpg", ".jpeg"):
        raise CommandError(f"--pictures must end in .jpg, got {options.pictures}")
    progress = sys.stderr.isatty()
    with as_command_errors(PanopticFormatError):
        problems = validate(path, folder, options.images, workers=options.workers, progress=progress)
        result = survey(path, folder, examples=_ROWS * _COLUMNS, workers=options.workers, progress=progress)
        print(_class_table(result), end="")
        print(problem_table(problems), end="")
        sizes = [*result.sizes.elements()]
        for text in advice(result, chosen_edges(load_config(DEFAULT_MODEL), sizes) if sizes else None):
            print(f"note: {printable(text)}")
        if options.pictures is not None:
            with path_in_oserror(options.pictures):
                count = _write_examples(options.pictures, result, folder, options.images)
            print(f"{options.pictures}: {counted(count, 'example')}")
    print(verdict(path, problems))
    if options.images is not None and path.stem != "val" and problems.images and not problems.problems:
        print(f"next: {_training_command(path, options.folder, options.images)}")
    return 1 if problems.problems else 0


def _training_command(path: Path, folder: Path | None, images: Path) -> str:
    """Make the command that trains on a data set, and evaluates on the other part of a split."""
    words: list[str | Path] = ["spatialflow", "train", "--images", images, "--annotations", path]
    if folder is not None:
        words += ["--panoptic", folder]
    validation = path.with_name("val.json")
    if path.stem == "train" and os.path.isfile(validation):
        words += ["--validation-images", images, "--validation-annotations", validation]
    return " ".join(quoted(word) for word in [*words, "--output", "run"])


def _class_table(result: Survey) -> str:
    """Make the table of classes, and the lines about void pixels and sizes."""
    rows = [("id", "class", "kind", "segments", "images", "pixels", "median size")]
    for row in result.classes:
        kind = "thing" if row.category["isthing"] else "stuff"
        crowds = f" + {row.crowds} crowds" if row.crowds else ""
        median = f"{row.median_area:,.0f} px" if row.segments else "-"
        name = printable(row.category["name"][:40])
        numbers = (f"{row.segments:,}{crowds}", f"{row.images:,}", f"{100 * row.share:.2f} %", median)
        rows.append((str(row.category["id"]), name, kind, *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        "  ".join(cell.ljust(width) if i in (1, 2) else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines = [line.rstrip() for line in aligned]
    lines.append(f"void: {100 * result.void_share:.2f} % of all pixels")
    sizes = [f"{width}x{height} ({count})" for (height, width), count in result.sizes.most_common(4)]
    lines.append(
        f"sizes (width x height): {', '.join(sizes)}{f', {len(result.sizes) - 4} more' * (len(result.sizes) > 4)}"
    )
    return "\n".join((*lines, ""))


def _write_examples(output: Path, result: Survey, folder: Path, images: Path | None) -> int:
    """Draw the examples as a sheet of 4 x 4 pictures; return their number."""
    from spatialflow.files import write_jpeg
    from spatialflow.panoptic.pages import thumbnails

    if not result.examples:
        raise CommandError(f"{folder}: holds no image to draw")
    categories = [row.category for row in result.classes]
    pictures = (
        (f"{number}: {printable(annotation['name'])}", _example(annotation, folder, images, categories))
        for number, annotation in enumerate(result.examples, start=1)
    )
    write_jpeg(output, thumbnails(pictures, _COLUMNS, _CELL), quality=90)
    return len(result.examples)


def _example(annotation: dict[str, Any], folder: Path, images: Path | None, categories: list[Any]) -> np.ndarray:
    """Draw one example; without its photograph, on gray.

    It is drawn at twice the size of a cell, so that lines and labels stay legible.
    """
    import cv2
    import numpy as np

    from spatialflow.images import ImageError, read_image
    from spatialflow.panoptic import overlay, read_id_map
    from spatialflow.panoptic.pages import fit
    from spatialflow.panoptic.photographs import find_photograph

    id_map = read_id_map(folder / annotation["file_name"])
    photograph = None
    if images is not None:
        with contextlib.suppress(ImageError):  # `validate` reports it
            photograph = read_image(find_photograph(images, annotation["name"]))
    size = fit(id_map.shape, 2 * _CELL, enlarge=True)[::-1]
    small_ids = cv2.resize(id_map, size, interpolation=cv2.INTER_NEAREST)
    background = np.full((*small_ids.shape, 3), 128, np.uint8)
    if photograph is not None and photograph.shape[:2] == id_map.shape:
        background = cv2.resize(photograph, size, interpolation=cv2.INTER_AREA)
    return overlay(background, small_ids, annotation["segments_info"], categories)
