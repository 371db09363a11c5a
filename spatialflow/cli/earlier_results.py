# SPDX-License-Identifier: Apache-2.0
"""The results of earlier runs of `spatialflow predict` in its output folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from spatialflow.cli.common import print_error
from spatialflow.cli.drawing_options import CONTACT_SHEET
from spatialflow.cli.input_images import without_suffix
from spatialflow.cli.label_folders import RESULT_INFO, RESULTS

SUFFIXES = (".png", ".jpg")
"""Suffixes of the files of an image, for each folder of `RESULTS`."""


def files_of(root: Path, stem: str) -> list[Path]:
    """Return the files of an image in the output folder `root`: one for each folder of `RESULTS`."""
    return [root / folder / f"{stem}{suffix}" for folder, suffix in zip(RESULTS, SUFFIXES, strict=True)]


class EarlierResults:
    """What `panoptic.json`, and optionally the journal beside it, list as results of `predict`.

    Args:
        root: the output folder.
        with_journal: include the images in a journal.

    Attributes:
        settings: of the run that wrote `panoptic.json`; None if it has none, as in old versions.
        videos: paths of overlay videos relative to the folder.
        has_contact_sheet: whether the run wrote a contact sheet.
        stamps: `file_stamp` of the photographs by image name.
        pngs: path of the PNG by image name.
    """

    def __init__(self, root: Path, with_journal: bool = False) -> None:
        from spatialflow.panoptic.writer import earlier_files

        self._root, self._json = root, root / "panoptic.json"
        self._content: dict[str, Any] = {"images": [], "annotations": []}
        files = earlier_files(self._json, RESULT_INFO)[0]
        if self._json in files:
            self._read_json()
        run = self._content.get("run")
        run = run if isinstance(run, dict) else {}
        self.settings: dict[str, Any] | None = run.get("settings")
        self.videos: list[str] = [name for name in run.get("videos", []) if _is_inside(name)]
        self.has_contact_sheet: bool = run.get("contact_sheet", False)
        self.stamps: dict[str, Any] = run.get("photographs", {})
        images = {image.get("id"): image for image in self._content["images"] if "file_name" in image}
        self._pairs = [
            (images[row["image_id"]], row)
            for row in self._content["annotations"]
            if row["image_id"] in images and _is_inside(row["file_name"])
        ]
        self.pngs: dict[str, str] = {image["file_name"]: row["file_name"] for image, row in self._pairs}
        for path in files:
            if with_journal and path != self._json:
                self.pngs |= _journal_pngs(path)

    def _read_json(self) -> None:
        from spatialflow.panoptic import PanopticFormatError, read_panoptic_json

        try:
            self._content = read_panoptic_json(self._json)
        except PanopticFormatError as error:
            print_error(f"{error}; the files of the run that wrote it are not removed")

    def remove(self) -> None:
        """Delete the files listed, and folders that are then empty; `panoptic.json` last.

        Raises:
            OSError: a file cannot be deleted.
        """
        settings = self.settings or {}
        overlays = settings.get("overlays", True)
        for png in self.pngs.values():
            for path in files_of(self._root, without_suffix(png))[: 2 if overlays else 1]:
                remove_file(path, self._root)
        for video in self.videos:
            remove_file(self._root / video, self._root)
        if self.has_contact_sheet:
            (self._root / CONTACT_SHEET).unlink(missing_ok=True)
        if settings.get("detections", False):
            (self._root / "detections.json").unlink(missing_ok=True)
        self._json.unlink(missing_ok=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the images as rows of `PanopticWriter`, those whose PNG exists."""
        from spatialflow.panoptic.writer import file_stamp

        detections = self._detections()
        for image, annotation in self._pairs:
            png = file_stamp(self._root / RESULTS[0] / annotation["file_name"])
            if png is None:
                continue
            path = image.get("path")
            yield {
                "image": image,
                "annotation": annotation,
                "detections": detections.get(image["id"], []),
                "photograph": self.stamps.get(image["file_name"]),
                "path": None if path is None else os.path.normpath(os.path.join(os.path.realpath(self._root), path)),
                "png_bytes": png[0],
            }

    def _detections(self) -> dict[Any, list[dict[str, Any]]]:
        from spatialflow.panoptic.formats import load_json

        by_image: dict[Any, list[dict[str, Any]]] = {}
        if (self.settings or {}).get("detections", False):
            for row in load_json(self._root / "detections.json"):
                by_image.setdefault(row["image_id"], []).append(row)
        return by_image


def remove_file(path: Path, root: Path) -> None:
    """Delete a file below `root` if it exists, and its folders as far as they are empty.

    The folders of `RESULTS` are kept.
    """
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for folder in path.parents:
            if folder.parent == root:
                break
            folder.rmdir()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _journal_pngs(path: Path) -> dict[str, str]:
    """Read the PNGs by image name that a journal lists, up to the first incomplete line."""
    pngs: dict[str, str] = {}
    with open(path, "rb") as stream:
        next(stream, None)
        for line in stream:
            try:
                row = json.loads(line)
                name, png = row["image"]["file_name"], row["annotation"]["file_name"]
            except (ValueError, KeyError, TypeError):
                break
            if _is_inside(png):
                pngs[name] = png
    return pngs
