# SPDX-License-Identifier: Apache-2.0
"""What the commands share: complaints, and the files that arguments stand for."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from spatialflow.errors import CommandError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


MOST_WORKERS = 1024
"""Threads or processes that an option may ask for; the OpenMP library ends the process at some ten thousand."""


def package_configs() -> str:
    """A paragraph that names the configurations of the package, except those of the paper's ablations and of tests."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
    shown = [name for name in names if not name.startswith(("ablation_", "tiny"))]
    return textwrap.fill(f"Configurations of the package: {', '.join(shown)}.", 116)


def with_examples(*lines: str) -> dict[str, Any]:
    """Arguments of `add_parser` by which the help of a command ends with examples."""
    return {
        "epilog": "\n".join(("examples:", *(f"  spatialflow {line}" for line in lines))),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def to_path(text: str) -> Path:
    """A path of the command line; an empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def check_count(option: str, value: int | None, least: int = 1) -> None:
    """CommandError unless `value`, a number of threads or processes, is None or from `least` to `MOST_WORKERS`."""
    if value is not None and not least <= value <= MOST_WORKERS:
        raise CommandError(f"{option} must be from {least} to {MOST_WORKERS}, got {value}")


def complain(text: str) -> None:
    """A sentence on standard error, with the program's name before it."""
    print(f"spatialflow: {text}", file=sys.stderr)


class _Complaints(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def show_log() -> None:
    """Prints what the package logs, for instance what it removed around the weights of a trainer."""
    logger = logging.getLogger("spatialflow")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Complaints())


class InputImage(NamedTuple):
    """One image that a command is given."""

    path: Path
    name: str  # path as seen from the folder that was given, with "/"; outputs take it


def list_images(
    given: Sequence[Path], recursive: bool = False, results: Collection[Path] = ()
) -> tuple[list[InputImage], list[str]]:
    """The images that files and folders stand for.

    A folder stands for the images in it; for those in its sub-folders too with `recursive`, or where it holds no image
    itself, such as Cityscapes' folder of cities. Links to folders are then followed.

    Args:
        given: files and folders.
        recursive: look into sub-folders.
        results: files and folders that the command writes, which are no input.

    Returns:
        Images, and complaints about folders that hold none, or should be read and cannot.

    Raises:
        CommandError: two images would get the same outputs, as their names differ at most in the suffix.
    """
    failed: list[str] = []
    images: dict[str, InputImage] = {}
    for path in given:
        found = [InputImage(path, path.name)]
        if os.path.isdir(path):
            left_out = {os.path.realpath(result) for result in results}
            found = [] if recursive else list(_images_below(path, left_out))
            top = [image for image in found if "/" not in image.name]
            if len(top) < len(found) and top:
                complain(
                    f"{path}: {len(found) - len(top)} images in its sub-folders are left out; --recursive takes "
                    f"them too"
                )
            found = top or list(_images_below(path, left_out, failed))
            if found and not top and not recursive:
                folders = Counter(image.name.split("/")[0] for image in found)
                most = ", ".join(f"{name}: {count}" for name, count in folders.most_common(3))
                complain(
                    f"{path}: holds no image itself; its sub-folders hold {len(found)} ({most}"
                    f"{', ...' * (len(folders) > 3)})"
                )
            if not found:
                failed.append(f"{path}: holds no image file")
        for image in found:
            other = images.setdefault(without_suffix(image.name), image)
            if other != image and other.path.resolve() != image.path.resolve():
                raise CommandError(
                    f"{image.path}: has the same name as {other.path}, and output files are named by it; use two "
                    f"output folders, or give the folder above both with --recursive"
                )
    for text in failed:
        complain(text)
    return list(images.values()), failed


def without_suffix(name: str) -> str:
    """A path of an image, with "/", without its suffix."""
    path = PurePosixPath(name)
    return path.as_posix().removesuffix(path.suffix)


def _images_below(
    folder: Path, left_out: set[str], failed: list[str] | None = None, prefix: str = "", above: tuple[str, ...] = ()
) -> Iterator[InputImage]:
    """Images in a folder and its sub-folders in the order of their paths.

    Args:
        left_out: real paths of files and folders that are no input.
        failed: gets a complaint about each folder that cannot be read. None: the images are only counted; such folders
            and links to folders are passed over.
        prefix: what the names of the images begin with.
        above: real paths of the folders above, to which a link may lead back.
    """
    place = os.path.realpath(folder)
    if place in left_out or place in above:
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
                yield from _images_below(path, left_out, failed, f"{name}/", (*above, place))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            if (os.path.realpath(path) if is_link else f"{place}/{path.name}") not in left_out:
                yield InputImage(path, name)


def panoptic_json(path: Path) -> Path:
    """The JSON that `path` stands for: itself, that inside the output of `predict`, or that beside a folder of PNGs."""
    candidates = [path]
    if os.path.isdir(path):
        folder = path.resolve() if path.name in ("", "..") else path  # "." and ".." have no name of their own
        candidates = [path / "panoptic.json", folder.parent / f"{folder.name}.json"]
    for candidate in candidates:
        if os.path.exists(candidate) and not os.path.isdir(candidate):  # a pipe is no regular file
            return candidate
    raise CommandError(f"{' and '.join(map(str, candidates))}: no such file")


def png_folder(path: Path, given: Path | None = None, option: str | None = None) -> Path:
    """The folder with the PNGs of a panoptic JSON: the one that `option` gives, else that beside the JSON."""
    from spatialflow.panoptic.quality import default_folder

    folder = default_folder(path) if given is None else given
    if os.path.isdir(folder):
        return folder
    if given is not None:
        raise CommandError(f"{given}: no such folder")
    hint = "" if option is None else f"; {option} names another"
    raise CommandError(f"{path}: there is no folder {folder} with its PNGs{hint}")


def ground_truth_json(path: Path, folder: Path) -> tuple[Path, list[str]]:
    """As `panoptic_json`; of a Cityscapes tree the split val, whose JSON and PNGs are written into `folder`, without
    the images whose labels cannot be read. Complaints about those come second.
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
        for name, image_id in zip(data.names, data.image_ids)
        if image_id not in usable
    ]
    for text in failed:
        complain(text)
    return truth, failed


def keep_inputs(output: Path | None, *inputs: Path | None) -> None:
    """Refuses an output file that is one of the command's input files, or a picture in one of its input folders.

    Args:
        output: the file; None for no file.
        inputs: files and folders; None for no input.

    Raises:
        CommandError: it is.
    """
    if output is None or not os.path.exists(output):
        return
    is_picture, place = output.suffix.lower() in IMAGE_SUFFIXES, os.path.realpath(output)
    for path in inputs:
        if path is None or not os.path.exists(path):  # who reads it says so
            continue
        is_inside = is_picture and place.startswith(os.path.join(os.path.realpath(path), ""))
        if is_inside or os.path.samefile(output, path):
            raise CommandError(f"{output}: is an input of this command, which does not replace it")


class named:
    """An OSError inside the block names `path`, not the temporary file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def sentence(error: Exception) -> str:
    """An error in one sentence, for a user who chose the file it is about."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be written: {error.strerror}"
    return str(error)


def load_model(config: str, checkpoint: Path | None, overrides: Mapping[str, Any], ema: bool = False) -> Any:
    """The network of `--config` with the weights of `--checkpoint`, else those of the package, else random ones."""
    import torch

    from spatialflow.config import ConfigError
    from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint, packaged_weights
    from spatialflow.models.build import build_model

    torch.manual_seed(0)
    try:
        model = build_model(config, **overrides).eval()
        checkpoint = checkpoint or packaged_weights(config)
        if checkpoint is None:
            complain("no --checkpoint: the weights are random, so the maps mean nothing")
            return model
        return load_checkpoint(model, checkpoint, ema)
    except (ConfigError, CheckpointError) as error:
        raise CommandError(str(error)) from None


def load_models(
    configs: Sequence[str], checkpoints: Sequence[Path], overrides: Mapping[str, Any], ema: bool = False
) -> list[Any]:
    """The networks of an ensemble: one configuration for all checkpoints, or one for each."""
    if ema and not checkpoints:
        raise CommandError("--ema needs --checkpoint")
    count = max(len(configs), len(checkpoints))
    of_each = list(configs) * count if len(configs) == 1 else configs
    files = checkpoints or [None] * count
    if len(of_each) != len(files):
        raise CommandError(
            f"give one --config for all of the {len(files)} --checkpoint, or one for each, got {len(configs)}"
        )
    return [load_model(config, file, overrides, ema) for config, file in zip(of_each, files)]
