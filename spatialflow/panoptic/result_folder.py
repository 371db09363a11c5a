# SPDX-License-Identifier: Apache-2.0
"""A folder to which results are added one by one: a panoptic JSON, PNGs and pictures, laid out as by `predict`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spatialflow.errors import DataWarning
from spatialflow.files import atomic_write, write_jpeg
from spatialflow.panoptic.colors import color_ids
from spatialflow.panoptic.formats import load_json, write_id_map
from spatialflow.panoptic.journal import dumps
from spatialflow.panoptic.rules import PanopticFormatError
from spatialflow.panoptic.writer import earlier_files, panoptic_row

SAVED_INFO = {"description": "written by PanopticResult.save"}
"""Beginning of the panoptic JSON of `PanopticResult.save`."""


def add_to_folder(
    folder: str | os.PathLike[str],
    image_id: int | str,
    image_name: str,
    id_map: np.ndarray,
    segments: Iterable[Mapping[str, Any]],
    categories: list[dict[str, Any]],
    picture: np.ndarray | None,
) -> Path:
    """Add a result to `panoptic.json`, `panoptic/` and `overlays/` of a folder.

    A result of the same name is replaced, with a warning. Several threads and processes may add to one folder.

    Args:
        folder: created if it is absent.
        image_id: id of the image. Where another image of the folder has it, the name without suffix is the id.
        image_name: name of the photograph; folders in it become folders in `panoptic/` and `overlays/`.
        id_map: as for `panoptic_row`.
        segments: as for `panoptic_row`. Their ids are replaced by those of `color_ids`.
        categories: category rows of the JSON.
        picture: (H, W, 3) uint8 BGR for `overlays/`; None writes no picture.

    Returns:
        Path of the PNG of ids.

    Raises:
        PanopticFormatError: the format forbids an argument, or a file that would be replaced was not written by this
            function, or has other categories.
        OSError: a file cannot be written.
    """
    folder, name = Path(folder), PurePosixPath(image_name)
    if not name.name:
        raise PanopticFormatError(f"name: must be a file name, got {image_name!r}")
    png_name = name.with_suffix(".png").as_posix()
    panoptic_row(image_id, image_name, png_name, id_map, segments := list(segments))  # checks the arguments
    id_map, segments = color_ids(id_map, segments, categories)
    png, overlay = folder / "panoptic" / png_name, folder / "overlays" / name.with_suffix(".jpg")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        content = _content_of(folder / "panoptic.json", dumps(categories), (png, overlay))
        if png_name in content.ids:
            rule = "has results of the same names, which are replaced; for other images, pass other names to save"
            warnings.warn(f"{folder}: {rule}", DataWarning, stacklevel=3)
        if content.is_taken(image_id, png_name):
            image_id = name.with_suffix("").as_posix()
        with _unchanged_after_errors(content.path, (png, overlay)):
            if picture is not None:
                write_jpeg(overlay, picture)
            write_id_map(png, id_map)
            content.add(panoptic_row(image_id, image_name, png_name, id_map, segments))
            content.write()
    return png


@contextlib.contextmanager
def _unchanged_after_errors(json_path: Path, files: Iterable[Path]) -> Iterator[None]:
    """Within the block, write `files` and the JSON; after an exception, restore the files that there were before.

    Otherwise the JSON would not list new files, or not the ids of a result that was to replace another one.
    """
    earlier: dict[Path, Path] = {}
    try:
        for path in files:
            if os.path.lexists(path):
                aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # a renaming needs no space on disk
                os.replace(path, aside)
                earlier[path] = aside
        yield
    except BaseException:
        _contents.pop(json_path, None)
        for path in files:
            path.unlink(missing_ok=True)
        for path, aside in earlier.items():
            os.replace(aside, path)
        raise
    for aside in earlier.values():
        aside.unlink(missing_ok=True)


class _Content:
    """The JSON of a folder with its rows as text, so that a further row costs no parsing and encoding of the others."""

    def __init__(self, path: Path, categories: str) -> None:
        self.path = path
        self.categories = categories  # as JSON
        self.images: dict[str, str] = {}  # by the PNG's name: the row as JSON
        self.annotations: dict[str, str] = {}
        self.ids: dict[str, int | str] = {}
        self.png_by_id: dict[int | str, str] = {}
        self.stamp: tuple[int, ...] | None = None  # of the file that `write` wrote

    def is_taken(self, image_id: int | str, png_name: str) -> bool:
        """Tell whether an image with another PNG has the id."""
        return self.png_by_id.get(image_id, png_name) != png_name

    def add(self, row: Mapping[str, Any]) -> None:
        """Add or replace the row of `panoptic_row` for one image."""
        png_name, image_id = row["annotation"]["file_name"], row["annotation"]["image_id"]
        self.images[png_name], self.annotations[png_name] = dumps(row["image"]), dumps(row["annotation"])
        self.png_by_id.pop(self.ids.get(png_name, image_id), None)
        self.ids[png_name], self.png_by_id[image_id] = image_id, png_name

    def write(self) -> None:
        """Write the file, and keep its state."""
        lists = {"images": self.images, "annotations": self.annotations}
        rows = [f'"{name}": [{", ".join(row_by_png.values())}]' for name, row_by_png in lists.items()]
        fields = [f'"info": {dumps(SAVED_INFO)}', *rows, f'"categories": {self.categories}']
        with atomic_write(self.path, "w") as file:
            file.write("{" + ", ".join(fields) + "}\n")
        self.stamp = _stamp(self.path)
        _contents[self.path] = self


_contents: dict[Path, _Content] = {}
"""What this process wrote last; used where the file is still that one."""


def _content_of(path: Path, categories: str, files: Iterable[Path]) -> _Content:
    """Read the JSON, or make one without images.

    Raises:
        PanopticFormatError: the JSON was not written by this module or has other categories; or there is none, and one
            of `files` exists.
    """
    path = Path(os.path.abspath(path))
    content = _contents.get(path)
    if content is None or content.stamp != _stamp(path):
        content = _read(path, categories, files)
    if content.categories != categories:
        raise PanopticFormatError(f"{path}: has results of other categories; use another folder")
    return content


def _read(path: Path, categories: str, files: Iterable[Path]) -> _Content:
    results, unrelated = earlier_files(path, SAVED_INFO)
    if not results and not unrelated:
        unrelated = [file for file in files if os.path.lexists(file)]
    if unrelated:
        raise PanopticFormatError(
            f"{unrelated[0]}: would be changed, and was not written by PanopticResult.save; use another folder"
        )
    if not results:
        return _Content(path, categories)
    data: dict[str, Any] = load_json(path)
    content = _Content(path, dumps(data["categories"]))
    for image, annotation in zip(data["images"], data["annotations"], strict=True):
        content.add({"image": image, "annotation": annotation})
    return content


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what identifies a version of a file, which is always a new file renamed to `path`; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this thread; other threads and processes wait."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
