# SPDX-License-Identifier: Apache-2.0
"""The formats that can be converted, and their recognition."""

import os
import shlex
from pathlib import Path

from spatialflow.data.convert import coco, cvat, labelme, masks, yolo
from spatialflow.data.convert.sources import ConversionError, Options, Source
from spatialflow.files import is_special_file

_MODULES = {module.FORMAT: module for module in (coco, labelme, cvat, masks, yolo)}
FORMATS = tuple(_MODULES)
"""Names of the formats."""

_HEAD = 1 << 16  # bytes; LabelMe has `shapes` or `flags` at the beginning, before the encoded photograph


def open_source(path: Path, format: str, options: Options) -> Source:
    """Open a source.

    Args:
        path: file or folder.
        format: one of `FORMATS`, or "auto".
        options: for the reader.

    Raises:
        ConversionError: the source is absent, of an unknown or another format, or cannot be read at all.
    """
    if not os.path.exists(path):
        raise ConversionError(f"{path}: no such file or folder")
    if format == "auto":
        format, path = _recognize(path)
    elif format == coco.FORMAT and os.path.isdir(path):
        path = _only_json(path)
    if format not in _MODULES:
        raise ConversionError(f"format must be auto, {', '.join(FORMATS)}, got {format!r:.60}")
    source: Source = _MODULES[format].open_source(path, options)
    return source


def _recognize(path: Path) -> tuple[str, Path]:
    """Return the format of a source, and the file to read."""
    if not os.path.isdir(path):
        suffix = path.suffix.lower()
        if suffix == ".json":
            return (labelme.FORMAT if _is_labelme(path) else coco.FORMAT), path
        if suffix in (".yaml", ".yml"):
            return yolo.FORMAT, path
        if suffix == ".xml":
            return cvat.FORMAT, path
        hint = "; unpack it first" if suffix in (".zip", ".gz", ".tar", ".tgz", ".7z", ".rar") else ""
        raise ConversionError(f"{path}: is of no known format ({', '.join(FORMATS)}){hint}")
    found: dict[str, Path] = {}
    files = labelme.files_of(path)
    if os.path.isfile(path / "annotations.xml"):
        found[cvat.FORMAT] = path
    if any(_is_labelme(file) for file in files[:20]):
        found[labelme.FORMAT] = path
    elif any(_is_coco(file) for file in files):
        found[coco.FORMAT] = path
    labels = yolo.label_files(path)
    is_named = "labels" in (path.resolve().name, *(part for file in labels[:1] for part in file.parts))
    if labels and (yolo.class_file(path) is not None or (is_named and not found)):
        found[yolo.FORMAT] = path
    if not found and masks.has_masks(path):
        found[masks.FORMAT] = path
    if not found:
        raise ConversionError(
            f"{path}: holds no annotation of a known format: JSON of COCO or LabelMe, annotations.xml of CVAT, "
            "data.yaml and labels of YOLO, or PNG masks"
        )
    if len(found) > 1:
        raise ConversionError(f"{path}: may be {' or '.join(found)}; choose by --format")
    ((format, source),) = found.items()
    return format, _only_json(source) if format == coco.FORMAT else source


def conversion_advice(path: str | os.PathLike[str]) -> str | None:
    """Say which command makes a panoptic JSON of annotations of another format; None for other files and folders.

    Sub-folders are not searched, and a folder of PNGs is not taken for masks. The path begins the sentence.
    """
    path = Path(path)
    format = _format_in(path) if os.path.isdir(path) else labelme.FORMAT if _is_labelme(path) else None
    if format is None:
        return None
    command = f"spatialflow dataset convert {shlex.quote(str(path))} --output mydata"
    return f"{path}: holds annotations of the format {format}; make a panoptic JSON of them first: {command}"


def _format_in(folder: Path) -> str | None:
    files = sorted(folder.glob("*.json"))[:20]
    if any(map(_is_labelme, files)):
        return labelme.FORMAT
    if os.path.isfile(folder / "annotations.xml"):
        return cvat.FORMAT
    if os.path.isdir(folder / "labels") and yolo.class_file(folder) is not None:
        return yolo.FORMAT
    is_found = any(_is_coco(file) and b'"segments_info"' not in file.read_bytes() for file in files)
    return coco.FORMAT if is_found else None


def _is_labelme(path: Path) -> bool:
    if is_special_file(path):
        return False
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False
    return (b'"shapes"' in head or b'"imagePath"' in head) and b'"segments_info"' not in head


def _is_coco(path: Path) -> bool:
    if is_special_file(path):
        return False
    try:
        return b'"annotations"' in path.read_bytes()
    except OSError:
        return False


def _only_json(folder: Path) -> Path:
    files = [file for file in labelme.files_of(folder) if _is_coco(file)]
    if not files:
        raise ConversionError(f"{folder}: holds no COCO file")
    if len(files) > 1:
        examples = ", ".join(file.name for file in files[:3]) + ", ..." * (len(files) > 3)
        raise ConversionError(f"{folder}: holds {len(files)} COCO files ({examples}); name one of them")
    return files[0]
