# SPDX-License-Identifier: Apache-2.0
"""Class lists that the user gives, and the decision which classes are things and which are stuff."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatialflow.data.categories import TABLES, read_rows
from spatialflow.data.convert.sources import Class, ConversionError, read_json, read_text
from spatialflow.errors import did_you_mean
from spatialflow.panoptic.colors import color_of
from spatialflow.panoptic.rules import is_color

NO_CLASSES = ("__ignore__", "_background_")  # in class lists of LabelMe


def read_classes(value: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> tuple[tuple[Class, ...], bool]:
    """Read a class list.

    Args:
        value: COCO category rows; or a JSON with such rows or with `categories`; or a text file with one class per
            line: `NAME` (numbered from 1), `ID NAME`, `RED GREEN BLUE NAME` or, as CVAT writes it,
            `NAME:RED,GREEN,BLUE`; or names separated by commas, numbered from 1.

    Returns:
        The classes, and whether they are identified by their colors: in a text file with colors.

    Raises:
        ConversionError: the file cannot be read, or breaks the form; the message names the line or the entry.
    """
    if not isinstance(value, str | os.PathLike):
        return _from_rows(value, "classes"), False
    path, by_color = Path(value), False
    if isinstance(value, str) and not os.path.exists(path) and ("," in value or not path.suffix):
        names = [name.strip() for name in value.split(",") if name.strip()]
        if names and all(map(_NUMBER_FIRST.fullmatch, names)):
            raise ConversionError(
                f"classes: {value!r:.80} is taken as names, numbered from 1; ids before names need a text file with a "
                "row per line"
            )
        classes = _numbered(names)
    elif path.suffix.lower() == ".json":
        content = read_json(path)
        rows = content.get("categories") if isinstance(content, dict) else content
        classes = _from_rows(rows, str(path))
    else:
        classes = _from_text(path)
        by_color = any(row.color is not None for row in classes)
    if not classes:
        raise ConversionError(f"{value}: lists no class")
    return classes, by_color


def _from_rows(rows: Any, source: str) -> tuple[Class, ...]:
    if not isinstance(rows, list | tuple):
        raise ConversionError(f"{source}: a class list is a list of mappings, or a mapping with `categories`")
    classes = [class_of_row(row, f"{source}: classes[{i}]") for i, row in enumerate(rows)]
    _check_unique(classes, source)
    return tuple(classes)


def class_of_row(row: Any, place: str) -> Class:
    """Make a class from a COCO category row; ConversionError, which begins with `place`, for an invalid one."""
    number = row.get("id") if isinstance(row, Mapping) else None
    if type(number) is not int or not 0 <= number < 1 << 53:
        raise ConversionError(f'{place}: must be a mapping with an "id", an integer from 0, got {row!r:.80}')
    name, isthing, color = row.get("name", f"category {number}"), row.get("isthing"), row.get("color")
    if not isinstance(name, str) or not name:
        raise ConversionError(f'{place}: "name" must be text, got {name!r:.60}')
    if isthing not in (None, 0, 1):
        raise ConversionError(f'{place}: "isthing" must be 0 or 1, got {isthing!r:.60}')
    if not is_color(color):
        return Class(number, name, None if isthing is None else bool(isthing))
    red, green, blue = (int(channel) for channel in color)
    return Class(number, name, None if isthing is None else bool(isthing), (red, green, blue))


_COLOR_FIRST = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(.+)")
_COLOR_LAST = re.compile(r"(.+?):\s*(\d{1,3}),\s*(\d{1,3}),\s*(\d{1,3})(?::.*)?")
_NUMBER_FIRST = re.compile(r"(\d{1,9})[\s,:]+(.+)")


def _from_text(path: Path) -> tuple[Class, ...]:
    lines = [(n, line.strip()) for n, line in enumerate(read_text(path).splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#") and line not in NO_CLASSES]
    rows: list[Class] = []
    forms = set()
    for number, line in lines:
        if match := _COLOR_FIRST.fullmatch(line):
            form, name, channels = "color", match[4], match.groups()[:3]
        elif match := _COLOR_LAST.fullmatch(line):
            form, name, channels = "color", match[1], match.groups()[1:]
        elif match := _NUMBER_FIRST.fullmatch(line):
            form, name, channels = "number", match[2], ()
        else:
            form, name, channels = "name", line, ()
        forms.add(form)
        if len(forms) > 1:
            raise ConversionError(f"{path}: line {number}: has another form than the lines before: {line!r:.60}")
        color = tuple(map(int, channels))
        if color and max(color) > 255:
            raise ConversionError(f"{path}: line {number}: colors are numbers from 0 to 255, got {line!r:.60}")
        if color == (0, 0, 0) and name.lower() in ("background", "void", "unlabeled"):
            continue
        class_id = int(match[1]) if match and form == "number" else len(rows) + 1
        rows.append(Class(class_id, name.strip(), None, (color[0], color[1], color[2]) if color else None))
    _check_unique(rows, str(path))
    return tuple(rows)


def _numbered(names: Sequence[str]) -> tuple[Class, ...]:
    classes = [Class(number, name) for number, name in enumerate(names, start=1)]
    _check_unique(classes, "classes")
    return tuple(classes)


def _check_unique(classes: Sequence[Class], source: str) -> None:
    for field in ("id", "name"):
        values = [getattr(row, field) for row in classes]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ConversionError(f"{source}: two classes have the {field} {min(twice)!r:.60}")


def decide_kinds(classes: Sequence[Class], stuff: Collection[str] | None) -> list[Class]:
    """Make every class a thing or stuff: as `stuff` says, else as the source says, else a thing.

    Raises:
        ConversionError: `stuff` names a class that does not exist; the message has a similar name, or all names.
    """
    names = [row.name for row in classes]
    for name in stuff or ():
        if name not in names:
            hint = did_you_mean(name, names) or f"; the classes are {', '.join(names)[:500]}"
            raise ConversionError(f"stuff classes: there is no class {name!r:.60}{hint}")
    return [
        row._replace(isthing=row.name not in (stuff or ()) and (row.isthing is None or row.isthing)) for row in classes
    ]


def likely_stuff(classes: Sequence[Class], stuff: Collection[str]) -> list[str]:
    """List the classes that neither the source nor `stuff` calls things or stuff, and whose name suggests stuff.

    COCO or Cityscapes have a stuff class of that name. Case, a plural "s", and "_" or "-" in place of a blank do not
    matter.
    """
    known = {"sign"}  # short for "traffic sign"
    for row in (row for name in ("coco", "cityscapes") for row in read_rows(TABLES / f"{name}.json")):
        if not row["isthing"]:
            known |= {_plain(row["name"]), row["name"].split("-")[0]}  # "floor-wood" is a kind of floor
    undecided = [row.name for row in classes if row.isthing is None and row.name not in stuff]
    return [name for name in undecided if known & {_plain(name), _plain(name).removesuffix("s")}]


def _plain(name: str) -> str:
    return re.sub("[ _-]+", " ", name.lower())


def category_rows(classes: Sequence[Class]) -> list[dict[str, Any]]:
    """Return the classes as rows of a COCO panoptic JSON."""
    return [
        {
            "id": row.id,
            "name": row.name,
            "isthing": int(bool(row.isthing)),
            "color": list(row.color if row.color is not None else color_of(row.id)),
        }
        for row in classes
    ]
