# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow synthesize`."""

from __future__ import annotations

import argparse

from spatialflow.cli.arguments import numbers
from spatialflow.cli.common import CommandError, add_path, as_command_errors, path_in_oserror
from spatialflow.requirements import require_packages

SUMMARY = "draw landscapes with exact panoptic ground truth"
DESCRIPTION = "Draw synthetic landscapes and their exact ground truth in the COCO panoptic format."
EXAMPLES = ("synthesize scenes --count 20 --size 256x384",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_path(parser, "output", "FOLDER", "folder for images/, panoptic/ and panoptic.json")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="number of scenes (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=numbers,
        default=(480, 640),
        metavar="HEIGHTxWIDTH",
        help="size of every scene in pixels (default: 480x640)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the scenes (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Draw the scenes; return the exit code."""
    require_packages()
    from tqdm import tqdm

    from spatialflow.data.synthetic import synthesize

    if options.seed < 0:
        raise CommandError(f"--seed must not be negative, got {options.seed}")
    if len(options.size) != 2:
        raise CommandError(
            f"--size takes a height and a width, such as 480x640, got {'x'.join(map(str, options.size))}"
        )
    if min(options.size) < 32:
        raise CommandError(f"--size must be at least 32 x 32, got {options.size[0]} x {options.size[1]}")
    with as_command_errors(ValueError), path_in_oserror(options.output):
        scenes = synthesize(options.output, options.count, tuple(options.size), options.seed)
        count = sum(1 for _ in tqdm(scenes, desc="synthesize", unit="scene", total=options.count, disable=None))
    print(f"{count} scenes: {options.output / 'images'}/, {options.output / 'panoptic.json'}")
    return 0
