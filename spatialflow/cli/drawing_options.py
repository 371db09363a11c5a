# SPDX-License-Identifier: Apache-2.0
"""Options for pictures of results, which several commands have, and the contact sheet."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatialflow.cli.common import CommandError, path_in_oserror

CONTACT_SHEET = "contact_sheet.jpg"
"""Name of the contact sheet in the output folder."""

DEFAULT_STYLE = {"opacity": 0.5, "labels": True, "legend": False, "outlines": True}
"""The style of pictures without options: keyword arguments of `spatialflow.panoptic.overlay`."""

_LARGEST_SHEET = 100
_JPEG_QUALITY = 90


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for colors, labels, legend and outlines of pictures, and for a contact sheet."""
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--opacity",
        type=float,
        default=DEFAULT_STYLE["opacity"],
        metavar="X",
        help="weight of the colors of segments over the photograph, 0 to 1 (default: %(default)s)",
    )
    add("--no-labels", action="store_true", help="do not write names and scores on segments")
    add("--no-outlines", action="store_true", help="do not draw the borders of segments")
    add("--legend", action="store_true", help="add lines below each picture with the colors and names of its classes")
    add(
        "--contact-sheet",
        type=int,
        metavar="N",
        help=f"also write {CONTACT_SHEET}: small versions of N pictures, at even distances in the list of images",
    )


def drawing_style(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `spatialflow.panoptic.overlay`; raise CommandError for values out of range."""
    if not 0 <= options.opacity <= 1:
        raise CommandError(f"--opacity must lie in [0, 1], got {options.opacity:g}")
    if options.contact_sheet is not None and not 1 <= options.contact_sheet <= _LARGEST_SHEET:
        raise CommandError(f"--contact-sheet must be from 1 to {_LARGEST_SHEET}, got {options.contact_sheet}")
    return {
        "opacity": options.opacity,
        "labels": not options.no_labels,
        "legend": options.legend,
        "outlines": not options.no_outlines,
    }


def write_contact_sheet(folder: Path, pictures: Sequence[tuple[str, Path]], count: int, cell: int = 320) -> Path:
    """Write a sheet of `count` of the pictures, or of all if there are fewer, at even distances in the list.

    Args:
        folder: receives the sheet.
        pictures: one or more pairs of a title and the file of a picture, which must exist.
        count: largest number of pictures.
        cell: width of a small picture in pixels.

    Returns:
        Path of the sheet.

    Raises:
        ImageError: a picture cannot be read.
        OSError: the sheet cannot be written.
    """
    from spatialflow.files import write_jpeg
    from spatialflow.images import read_image
    from spatialflow.panoptic.pages import thumbnails

    count = min(count, len(pictures))
    chosen = [pictures[index * len(pictures) // count] for index in range(count)]
    columns = math.ceil(math.sqrt(count) * 320 / cell)  # the sheet of the command `predict` is about as wide as high
    sheet = thumbnails(((title, read_image(path)) for title, path in chosen), columns, cell)
    path = folder / CONTACT_SHEET
    with path_in_oserror(path):
        write_jpeg(path, sheet, _JPEG_QUALITY)
    return path
