# SPDX-License-Identifier: Apache-2.0
"""The images that files and folders on the command line contain."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from spatialflow.cli.common import IMAGE_SUFFIXES, CommandError, print_error


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
