# SPDX-License-Identifier: Apache-2.0
"""A folder to which results are added one by one: a panoptic JSON, PNGs and pictures, laid out as by `predict`."""

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from spatialflow.errors import DataWarning
from spatialflow.files import write_jpeg, write_json
from spatialflow.panoptic.colors import color_ids
from spatialflow.panoptic.formats import load_json, write_id_map
from spatialflow.panoptic.rules import PanopticFormatError
from spatialflow.panoptic.writer import earlier_files, panoptic_row

_INFO = {"description": "written by PanopticResult.save"}


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
    folder = Path(folder)
    name = PurePosixPath(image_name)
    if not name.name:
        raise PanopticFormatError(f"name: must be a file name, got {image_name!r}")
    png_name = name.with_suffix(".png").as_posix()
    panoptic_row(image_id, image_name, png_name, id_map, segments := list(segments))
    new_map, new_segments = color_ids(id_map, segments, categories)
    png = folder / "panoptic" / png_name
    overlay = folder / "overlays" / name.with_suffix(".jpg")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        content = _read(folder / "panoptic.json", categories, png, overlay)
        index_by_png = {row["file_name"]: index for index, row in enumerate(content["annotations"])}
        index = index_by_png.get(png_name, len(index_by_png))
        if index < len(index_by_png):
            rule = "has results of the same names, which are replaced; for other images, pass other names to save"
            warnings.warn(f"{folder}: {rule}", DataWarning, stacklevel=3)
        others = {row["id"] for position, row in enumerate(content["images"]) if position != index}
        if image_id in others:
            image_id = name.with_suffix("").as_posix()
        row = panoptic_row(image_id, image_name, png_name, new_map, new_segments)
        content["images"][index : index + 1] = [row["image"]]
        content["annotations"][index : index + 1] = [row["annotation"]]
        try:
            if picture is not None:
                write_jpeg(overlay, picture)
            write_id_map(png, new_map)
            write_json(folder / "panoptic.json", content)
        except BaseException:  # the JSON would not list the files, or list other ids
            for path in (png, overlay):
                path.unlink(missing_ok=True)
            raise
    return png


def _read(json_path: Path, categories: list[dict[str, Any]], *files: Path) -> dict[str, Any]:
    """Read the JSON, or make one without images; raise PanopticFormatError where another program's files are."""
    results, unrelated = earlier_files(json_path, _INFO)
    if not results and not unrelated:
        unrelated = [path for path in files if os.path.lexists(path)]
    if unrelated:
        raise PanopticFormatError(
            f"{unrelated[0]}: would be changed, and was not written by PanopticResult.save; use another folder"
        )
    if not results:
        return {"info": _INFO, "images": [], "annotations": [], "categories": categories}
    content: dict[str, Any] = load_json(json_path)
    if content["categories"] != categories:
        raise PanopticFormatError(f"{json_path}: has results of other categories; use another folder")
    return content


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this thread; other threads and processes wait."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
