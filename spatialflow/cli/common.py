# SPDX-License-Identifier: Apache-2.0
"""Functions that several commands use: error output, path arguments, and loading of networks."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from spatialflow.models.spatialflow import SpatialFlow

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

MAX_WORKERS = 1024
"""Largest number of threads or processes that an option accepts; OpenMP aborts the process at about ten thousand."""


class CommandError(Exception):
    """Ends a command with one message for the user and exit code 2."""


def configs_paragraph() -> str:
    """List the configurations of the package, except those of the paper's ablations and of tests, as a paragraph."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
    listed = [name for name in names if not name.startswith("tiny")]
    return textwrap.fill(f"Configurations of the package: {', '.join(listed)}.", 116)


def add_path(parser: argparse.ArgumentParser, name: str, metavar: str, help: str, **options: Any) -> None:
    """Add an argument that is one path or, by `options` of `add_argument`, several."""
    parser.add_argument(name, type=path_argument, metavar=metavar, help=help, **options)


def add_ema_option(parser: argparse.ArgumentParser, file: str = "--checkpoint") -> None:
    """Add the option `--ema`, which applies to the checkpoint of the argument `file`."""
    parser.add_argument("--ema", action="store_true", help=f"use the moving average (EMA) of the weights in {file}")


def check_ema(ema: bool, has_checkpoint: bool) -> None:
    """Raise CommandError if `--ema` is given without a checkpoint."""
    if ema and not has_checkpoint:
        raise CommandError("--ema needs --checkpoint")


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--workers` of commands that read files in threads."""
    parser.add_argument("--workers", type=int, metavar="N", help="number of threads (default: one per core)")


def path_argument(text: str) -> Path:
    """Convert an argument to a path; an empty argument is an error, as `Path("")` is the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def check_count(option: str, value: int | None, minimum: int = 1) -> None:
    """Raise CommandError unless `value`, a number of threads or processes, is None or in `minimum`..`MAX_WORKERS`."""
    if value is not None and not minimum <= value <= MAX_WORKERS:
        raise CommandError(f"{option} must be from {minimum} to {MAX_WORKERS}, got {value}")


def print_error(text: str) -> None:
    """Print a message on standard error, after the program's name."""
    print(f"spatialflow: {text}", file=sys.stderr)


def set_threads(count: int | None) -> None:
    """Set the number of torch's CPU threads to `--threads`; None keeps torch's default."""
    import torch

    check_count("--threads", count)
    if count is not None:
        torch.set_num_threads(count)


class _ErrorHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage())


def show_log() -> None:
    """Print the log messages of the package on standard error."""
    logger = logging.getLogger("spatialflow")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ErrorHandler())


class InputImage(NamedTuple):
    """An input image of a command."""

    path: Path
    name: str  # path relative to the folder argument, with "/", or name of the file argument; names the output files


def resolve_images(
    paths: Sequence[Path], recursive: bool = False, results: Collection[Path] = ()
) -> tuple[list[InputImage], list[str]]:
    """List the images that files and folders contain.

    A folder contributes its images. It also contributes those in its sub-folders if `recursive` is set or if it has no
    image itself, such as Cityscapes' folder of cities. In both cases symbolic links to folders are followed.

    Args:
        paths: files and folders.
        recursive: include sub-folders.
        results: files and folders that the command writes, which are not inputs.

    Returns:
        The images, and messages about folders without images or that cannot be read; the messages are also printed.

    Raises:
        CommandError: two images would have the same output files, as their names differ at most in the suffix.
    """
    failed: list[str] = []
    outputs = {os.path.realpath(result) for result in results}
    images: dict[str, InputImage] = {}
    for path in paths:
        is_folder = os.path.isdir(path)
        for image in (
            _images_of_folder(path, recursive, outputs, failed) if is_folder else [InputImage(path, path.name)]
        ):
            previous = images.setdefault(without_suffix(image.name), image)
            if previous != image and previous.path.resolve() != image.path.resolve():
                raise CommandError(
                    f"{image.path}: has the same name as {previous.path}, and output files are named by it; use two "
                    f"output folders, or pass their common parent folder with --recursive"
                )
    for text in failed:
        print_error(text)
    return list(images.values()), failed


def _images_of_folder(folder: Path, recursive: bool, outputs: set[str], failed: list[str]) -> list[InputImage]:
    """List the images of one folder as described in `resolve_images`, and print how sub-folders are treated."""
    images = [] if recursive else list(_images_below(folder, outputs))
    direct = [image for image in images if "/" not in image.name]
    if direct:
        if len(direct) < len(images):
            print_error(
                f"{folder}: {len(images) - len(direct)} images in its sub-folders are left out; --recursive "
                f"includes them"
            )
        return direct
    images = list(_images_below(folder, outputs, failed))
    if images and not recursive:
        counts = Counter(image.name.split("/")[0] for image in images)
        largest = ", ".join(f"{name}: {count}" for name, count in counts.most_common(3))
        print_error(
            f"{folder}: holds no image itself; its sub-folders hold {len(images)} ({largest}"
            f"{', ...' * (len(counts) > 3)})"
        )
    if not images:
        failed.append(f"{folder}: holds no image file")
    return images


def without_suffix(name: str) -> str:
    """Remove the suffix of an image's path; the result has "/" as separator."""
    path = PurePosixPath(name)
    return path.as_posix().removesuffix(path.suffix)


def _images_below(
    folder: Path, outputs: set[str], failed: list[str] | None = None, prefix: str = "", parents: tuple[str, ...] = ()
) -> Iterator[InputImage]:
    """List the images in a folder and its sub-folders in the order of their paths.

    Args:
        folder: the folder.
        outputs: real paths of files and folders that are not inputs.
        failed: receives a message about each folder that cannot be read. None: such folders are skipped silently, and
            links to folders are not followed.
        prefix: start of the images' names.
        parents: real paths of the folders above, to which a link may lead back.
    """
    real_path = os.path.realpath(folder)
    if real_path in outputs or real_path in parents:
        return
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        if failed is not None:
            failed.append(f"{folder}: cannot be read: {error.strerror}")
        return
    for path in paths:
        name, is_link = f"{prefix}{path.name}", os.path.islink(path)
        if os.path.isdir(path):
            if failed is not None or not is_link:
                yield from _images_below(path, outputs, failed, f"{name}/", (*parents, real_path))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            if (os.path.realpath(path) if is_link else f"{real_path}/{path.name}") not in outputs:
                yield InputImage(path, name)


def panoptic_json(path: Path) -> Path:
    """Find a panoptic JSON: `path` itself, the one in the output of `predict`, or the one beside a folder of PNGs."""
    candidates = [path]
    if os.path.isdir(path):
        # `Path(".").name` is empty and `Path("..").name` is "..": only the resolved path has the folder's name.
        folder = path.resolve() if path.name in ("", "..") else path
        candidates = [path / "panoptic.json", folder.parent / f"{folder.name}.json"]
    for candidate in candidates:
        if os.path.exists(candidate) and not os.path.isdir(candidate):  # includes pipes
            return candidate
    raise CommandError(f"{' and '.join(map(str, candidates))}: no such file")


def png_folder(path: Path, chosen: Path | None = None, option: str | None = None) -> Path:
    """Find the PNGs of a panoptic JSON: in the folder `chosen` by `option`, or else in the folder beside the JSON."""
    from spatialflow.panoptic.quality import default_folder

    folder = default_folder(path) if chosen is None else chosen
    if os.path.isdir(folder):
        return folder
    if chosen is not None:
        raise CommandError(f"{chosen}: no such folder")
    hint = "" if option is None else f"; pass its path with {option}"
    raise CommandError(f"{path}: there is no folder {folder} with its PNGs{hint}")


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


def load_model(config: str, checkpoint: Path | None, overrides: Mapping[str, Any], ema: bool = False) -> SpatialFlow:
    """Build the network of `--config` with the weights of `--checkpoint`.

    Without a checkpoint the network has the weights that come with the package, or random weights if there are none.
    """
    import torch

    from spatialflow.config import ConfigError
    from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint, packaged_weights
    from spatialflow.models.build import build_model

    torch.manual_seed(0)
    try:
        model = build_model(config, **overrides).eval()
        checkpoint = checkpoint or packaged_weights(config)
        if checkpoint is None:
            print_error("no --checkpoint: the weights are random, and so are the results")
            return model
        load_checkpoint(model, checkpoint, ema)
        return model
    except (ConfigError, CheckpointError) as error:
        raise CommandError(str(error)) from None


def load_models(
    configs: Sequence[str], checkpoints: Sequence[Path], overrides: Mapping[str, Any], ema: bool = False
) -> list[SpatialFlow]:
    """Build the networks of an ensemble; `configs` has one configuration for all checkpoints, or one for each."""
    check_ema(ema, bool(checkpoints))
    count = max(len(configs), len(checkpoints))
    config_per_model = list(configs) * count if len(configs) == 1 else configs
    files: Sequence[Path | None] = checkpoints or [None] * count
    if len(config_per_model) != len(files):
        raise CommandError(
            f"give one --config for all of the {len(files)} --checkpoint, or one for each, got {len(configs)}"
        )
    return [load_model(config, file, overrides, ema) for config, file in zip(config_per_model, files, strict=True)]
