# SPDX-License-Identifier: Apache-2.0
"""Functions that several commands use: error output, path arguments, and panoptic folders."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spatialflow.errors import printable as printable  # also exported by this module
from spatialflow.image_formats import IMAGE_SUFFIXES as IMAGE_SUFFIXES  # also exported by this module
from spatialflow.packaged import RUN_FILES, WEIGHT_SUFFIXES
from spatialflow.threads import available_cores

MAX_WORKERS = 1024
"""Largest number of threads or processes that an option accepts; OpenMP aborts the process at about ten thousand."""


class CommandError(Exception):
    """Ends a command with one message for the user and exit code 2."""


def add_path(parser: argparse.ArgumentParser, name: str, metavar: str, help: str, **options: Any) -> None:
    """Add an argument that is one path or, by `options` of `add_argument`, several."""
    parser.add_argument(name, type=path_argument, metavar=metavar, help=help, **options)


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--workers` of commands that read files in threads."""
    parser.add_argument("--workers", type=int, metavar="N", help="number of threads (default: one per core)")


def add_command(
    commands: Any, name: str, summary: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Add the parser of a command, or of one of its actions; its help ends with the examples."""
    lines = ("examples:", *(f"  spatialflow {line}" for line in examples))
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="\n".join(lines) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def nonempty(text: str) -> str:
    """Check an argument; an empty one is an error, as `Path("")` is the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path_argument(text: str) -> Path:
    """Convert an argument that is not empty to a path."""
    return Path(nonempty(text))


def check_count(option: str, value: int | None, minimum: int = 1) -> None:
    """Raise CommandError unless `value`, a number of threads or processes, is None or in `minimum`..`MAX_WORKERS`."""
    if value is not None and not minimum <= value <= MAX_WORKERS:
        raise CommandError(f"{option} must be from {minimum} to {MAX_WORKERS}, got {value}")


def print_error(text: str) -> None:
    """Print a message on standard error, after the program's name; it may have several lines."""
    lines = [printable(line) for line in text.split("\n")]
    print("spatialflow: " + "\n".join(lines), file=sys.stderr)


def set_threads(count: int | None) -> None:
    """Set the number of torch's CPU threads to `--threads`; None: torch's default, at most `available_cores()`."""
    import torch

    check_count("--threads", count)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()) if count is None else count)


class _ErrorHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage())


def counted(count: int, noun: str) -> str:
    """Put a number before a noun, which gets its plural "s" if needed: "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def show_log() -> None:
    """Print the log messages of the package on standard error."""
    logger = logging.getLogger("spatialflow")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ErrorHandler())


def panoptic_json(path: Path) -> Path:
    """Find a panoptic JSON.

    It is `path` itself, the one in the output of `predict`, that of the evaluation in the folder of a training run, or
    the one beside a folder of PNGs.
    """
    if not os.path.exists(path):
        raise CommandError(f"{path}: no such file or folder")
    if not os.path.isdir(path):  # includes pipes
        if path.suffix in WEIGHT_SUFFIXES:
            raise CommandError(f"{path}: holds weights, not results; {_predict_advice(path)}")
        return path
    # `Path(".").name` is empty and `Path("..").name` is "..": only the resolved path has the folder's name.
    folder = path.resolve() if path.name in ("", "..") else path
    beside = folder.parent / f"{folder.name}.json"
    for candidate in (path / "panoptic.json", path / "evaluation" / "panoptic.json", beside):
        if os.path.exists(candidate) and not os.path.isdir(candidate):
            return candidate
    if any(os.path.isfile(path / name) for name in RUN_FILES):
        raise CommandError(f"{path}: is a training run without an evaluation; {_predict_advice(path)}")
    others = [str(file) for file in sorted(path.glob("*.json")) if os.path.isdir(file.with_suffix(""))]
    if others:  # such as the two sets of `dataset convert --split`
        raise CommandError(f"{path}: holds no panoptic.json; name {'one of ' * (len(others) > 1)}{', '.join(others)}")
    from spatialflow.data.convert.formats import conversion_advice

    raise CommandError(
        conversion_advice(path)
        or f"{path}: holds no panoptic.json, and there is no {beside}; give a panoptic JSON or the output of `predict`"
    )


def _predict_advice(model: Path) -> str:
    return f"predict photographs with it first: spatialflow predict PHOTOGRAPHS --model {model} --output predicted"


def png_folder(path: Path, chosen: Path | None = None, option: str | None = None) -> Path:
    """Find the PNGs of a panoptic JSON: in the folder `chosen` by `option`, or else in the folder beside the JSON."""
    from spatialflow.panoptic.quality import default_folder

    folder = default_folder(path) if chosen is None else chosen
    if os.path.isdir(folder):
        return folder
    if chosen is not None:
        raise CommandError(f"{chosen}: no such folder")
    from spatialflow.data.convert.formats import conversion_advice

    hint = "" if option is None else f"; pass its path with {option}"
    raise CommandError(conversion_advice(path) or f"{path}: there is no folder {folder} with its PNGs{hint}")


def ground_truth_json(path: Path, folder: Path) -> tuple[Path, list[str]]:
    """Find a panoptic JSON as `panoptic_json` does; for a Cityscapes tree, convert its split val into `folder` first.

    Returns:
        The JSON, and messages about images of the tree whose labels cannot be read, which the JSON does not list.
    """
    if not os.path.isdir(path / "gtFine"):
        return panoptic_json(path), []
    from spatialflow.data.categories import load_categories
    from spatialflow.data.cityscapes import Cityscapes, CityscapesError
    from spatialflow.panoptic import read_panoptic_json

    try:
        data = Cityscapes(path, "val", load_categories("cityscapes", 8, 11))
        truth, _ = data.panoptic_truth(folder)
    except CityscapesError as error:
        raise CommandError(str(error)) from None
    usable = {annotation["image_id"] for annotation in read_panoptic_json(truth)["annotations"]}
    failed = [
        f"{name}: has no ground truth that can be read"
        for name, image_id in zip(data.names, data.image_ids, strict=True)
        if image_id not in usable
    ]
    for text in failed:
        print_error(text)
    return truth, failed


def check_output(output: Path | None, *inputs: Path | None) -> None:
    """Raise CommandError if an output file is one of the input files, or an image in one of the input folders.

    Args:
        output: the output file; None for no file.
        inputs: files and folders; None for no input.
    """
    if output is None or not os.path.exists(output):
        return
    is_image, real_path = output.suffix.lower() in IMAGE_SUFFIXES, os.path.realpath(output)
    for path in inputs:
        if path is None or not os.path.exists(path):  # reported when the input is read
            continue
        is_inside = is_image and real_path.startswith(os.path.join(os.path.realpath(path), ""))
        if is_inside or os.path.samefile(output, path):
            raise CommandError(f"{output}: is an input of this command, which does not replace it")


@contextlib.contextmanager
def path_in_oserror(path: Path | None) -> Iterator[None]:
    """Within the block, let every OSError name `path` instead of the temporary file beside it."""
    try:
        yield
    except OSError as error:
        if path is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def as_command_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Within the block, turn exceptions of `kinds` and OSError, except BrokenPipeError, into CommandError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(format_error(error)) from None
    except kinds as error:
        raise CommandError(str(error)) from None


def format_error(error: Exception) -> str:
    """Format an exception as a one-line message; an OSError with a file name is taken for a failed write to it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be written: {error.strerror}"
    return str(error)


def quoted(word: object) -> str:
    """Return a word of a command as a shell takes it, without control characters."""
    return shlex.quote(printable(str(word)))
