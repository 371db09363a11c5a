# SPDX-License-Identifier: Apache-2.0
"""Folders whose pictures are annotations or results, not photographs."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

RESULT_INFO = {"description": "written by spatialflow predict"}
"""Beginning of the panoptic JSON of `predict`. It has no version, so that `predict` may replace files of others."""

RESULTS = ("panoptic", "overlays")
"""Folders of pictures in the output folder of `predict`."""

RESULT_FILES = ("panoptic.json", "panoptic.journal.jsonl", "detections.json")
"""Further files in the output folder of `predict`."""

_MOST_SEGMENTS = 1024
"""A picture with more colors than this is not a map of segment ids."""

_CITYSCAPES_LABELS = re.compile(r"_gt(Fine|Coarse)_\w+\.png$")


def is_cityscapes_label(name: str) -> bool:
    """Tell whether a file name is that of a label picture of Cityscapes."""
    return _CITYSCAPES_LABELS.search(name) is not None


def label_folder(folder: Path) -> str | None:
    """Describe a folder whose pictures are not photographs.

    Such a folder is a part of the output of `predict` or `PanopticResult.save`, or holds the id maps of a panoptic JSON
    beside it. The JSON then lists the folder's first PNG, and the ids in this.

    Args:
        folder: an existing folder.

    Returns:
        What the folder is, and where the photographs are if they can be found; None for any other folder.
    """
    shown_parent, folder = folder.parent, Path(os.path.realpath(folder))
    for part in (folder, *islice(folder.parents, 3)):
        json_path = part.parent / "panoptic.json"
        if part.name in RESULTS and (writer := _writer_of(json_path)) is not None:
            kind = "maps" if part.name == RESULTS[0] else "pictures"
            return f"holds {kind} that `{writer}` wrote, not photographs" + _place(json_path, folder)
    first = next(iter(sorted(folder.glob("*.png"))), None)
    if first is None:
        return None
    for path in sorted(folder.parent.glob("*.json"), key=lambda path: path.stem != folder.name)[:20]:
        if os.path.isfile(path) and _is_map(first, path):  # a pipe would block
            return f"holds the segment ids of {shown_parent / path.name}, not photographs" + _place(path, folder)
    return None


def _writer_of(json_path: Path) -> str | None:
    """Return what wrote a panoptic JSON of results, and the pictures beside it; None for other files."""
    from spatialflow.panoptic.result_folder import SAVED_INFO
    from spatialflow.panoptic.writer import earlier_files

    infos = {"predict": RESULT_INFO, "PanopticResult.save": SAVED_INFO}
    try:
        return next((name for name, info in infos.items() if json_path in earlier_files(json_path, info)[0]), None)
    except OSError:
        return None


@contextlib.contextmanager
def _content(path: Path) -> Iterator[mmap.mmap | bytes]:
    """Give the content of a file for searches, without reading it as a whole; nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: the file is empty
        yield b""
        return
    with content:
        yield content


def _is_map(png: Path, json_path: Path) -> bool:
    """Tell whether a panoptic JSON lists a PNG, and all ids in that PNG."""
    with _content(json_path) as content:
        name = re.escape(json.dumps(png.name).encode()[1:])
        if content.find(b'"segments_info"') < 0 or not re.search(rb'"file_name":\s*"(?:[^"]*/)?' + name, content):
            return False
        ids = _ids(png)
        return 0 < len(ids) <= _MOST_SEGMENTS and ids <= {
            int(match[1]) for match in re.finditer(rb'"id":\s*(\d+)', content)
        }


def _ids(png: Path) -> set[int]:
    """Return the segment ids of a picture, except void; the empty set if it cannot be read."""
    from spatialflow.panoptic import PanopticFormatError, read_id_map
    from spatialflow.panoptic.extents import ids_of

    try:
        return set(ids_of(read_id_map(png)).tolist()) - {0}
    except PanopticFormatError:
        return set()


def _texts(key: bytes, content: mmap.mmap | bytes) -> Iterator[str]:
    """Yield the texts that a JSON has for a key in quotes."""
    for match in re.finditer(key + rb':\s*("(?:[^"\\]|\\.)*")', content):
        with contextlib.suppress(ValueError):  # the file is no JSON
            yield json.loads(match[1])


def _place(json_path: Path, folder: Path) -> str:
    """Find the photographs of a panoptic JSON by the first names in it; "" if they are not near."""
    with _content(json_path) as content:
        paths, names = (list(islice(_texts(key, content), 50)) for key in (b'"path"', b'"file_name"'))
    parent = json_path.parent
    places = [(parent / path).parent for path in paths if os.path.isfile(parent / path)]
    for base in (parent, parent.parent):
        folders = (base, *islice((path for path in sorted(base.glob("*")) if os.path.isdir(path)), 100))
        places += [
            place for place in folders if place != folder and any(os.path.isfile(place / name) for name in names)
        ]
    if not places:
        return ""
    place, here = os.path.normpath(places[0]), os.path.join(os.getcwd(), "")
    return f"; the photographs are in {place.removeprefix(here)}"
