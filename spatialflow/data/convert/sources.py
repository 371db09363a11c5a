# SPDX-License-Identifier: Apache-2.0
"""What the readers of all formats give to the conversion, and reading of text files that other programs wrote."""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spatialflow.data.convert.shapes import Mask, ShapeError, polygon


class ConversionError(ValueError):
    """A source that cannot be converted at all; the message names the file and the rule."""


class UnknownClassError(ShapeError):
    """A region of a class that is not in the class list."""


class UnlistedClassError(ShapeError):
    """A region of a class that the user's class list leaves out; the argument is the label."""


class Problem(NamedTuple):
    """A defect of the source, because of which an image or a region was left out."""

    rule: str
    text: str  # names the file and the entry, the rule and the value


class Class(NamedTuple):
    """A class of the source."""

    id: int
    name: str
    isthing: bool | None = None  # None: the source does not say
    color: tuple[int, int, int] | None = None  # red, green, blue


class Region(NamedTuple):
    """Pixels of one class in an image; of one object, where the class is a thing."""

    category: Class | None  # None: its pixels become void
    mask: Mask
    level: int = 0  # regions of higher levels cover those of lower levels
    group: Any = None  # regions of one class and group are one object
    crowd: bool = False


class Report:
    """Collects what happened to the regions of one image.

    Attributes:
        problems: regions or images that were left out.
        counts: number of cases by a text such as "boxes left out".
        unlisted: number of regions by a label that the user's class list leaves out.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self.unlisted: Counter[str] = Counter()

    def add(self, rule: str, text: str) -> None:
        """Record a problem."""
        self.problems.append(Problem(rule, text))


class Context(NamedTuple):
    """The image for which an `Item` makes regions."""

    size: tuple[int, int]  # (height, width)
    name: str  # of the photograph, relative to its folder
    place: str  # of the image in the source, for messages
    report: Report
    classes: Mapping[Any, Class]  # by name and by id
    fill_boxes: bool
    chosen: bool  # whether `classes` are those that the user's list chooses among the labels of the source

    def box(self, points: Any, rule: str = "boxes") -> Mask | None:
        """Draw a box that the source has in place of a mask; None, with a count, unless boxes are filled."""
        if self.fill_boxes:
            self.report.counts["boxes filled"] += 1
            return polygon(points, self.size)
        self.report.counts[f"{rule} left out"] += 1
        return None

    def regions(self, shapes: Iterable[tuple[str, Callable[[], Region | None]]]) -> list[Region]:
        """Make regions, and record a problem for each shape that cannot be drawn.

        Args:
            shapes: for each shape its location in the source, and a function that returns its region, or None for a
                shape that is left out and counted.
        """
        regions = []
        for place, make in shapes:
            try:
                region = make()
            except UnlistedClassError as error:
                self.report.unlisted[str(error)] += 1
                continue
            except ShapeError as error:
                rule = "class" if isinstance(error, UnknownClassError) else "region"
                self.report.add(rule, f"{place}: {error}")
                continue
            if region is not None and not region.mask.bits.size:
                self.report.counts["regions without pixels in the image"] += 1
            elif region is not None:
                regions.append(region)
        return regions

    def class_of(self, label: Any) -> Class:
        """Find a class by its name or id.

        Raises:
            UnlistedClassError: the user's list does not have this label.
            UnknownClassError: there is no such class.
        """
        if isinstance(label, str | int) and not isinstance(label, bool) and label in self.classes:
            return self.classes[label]
        if self.chosen and isinstance(label, str):
            raise UnlistedClassError(label)
        raise UnknownClassError(f"unknown class {label!r:.60}")


class Item(NamedTuple):
    """One annotated image of a source."""

    name: str  # the photograph's path or name in the source, with "/"
    place: str  # file and entry, for messages
    read: Callable[[Context], list[Region]]  # in a worker thread; ShapeError: the whole image is left out
    size: tuple[int, int] | None = None  # (height, width) in the source
    image_id: int | str | None = None
    with_ending: bool = False  # `name` may have an ending after the photograph's name, as masks have


class Source(NamedTuple):
    """An opened source."""

    format: str
    classes: list[Class]
    items: list[Item]
    problems: list[Problem]
    smaller_on_top: bool  # among regions of one level; otherwise the later one is on top
    images: Path  # folder with the photographs, if the user names none
    found_classes: bool = False  # the classes are the labels that occur, in alphabetical order


class Options(NamedTuple):
    """What readers need to know beside the source's path."""

    classes: tuple[Class, ...] | None = None  # of a class list that the user gave
    by_color: bool = False  # that list identifies classes by color
    stuff: Path | None = None
    instances: Path | None = None


def read_text(path: Path) -> str:
    """Read a UTF-8 (or, with a byte order mark, UTF-16) file.

    Raises:
        ConversionError: the file cannot be read, or is not valid text.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConversionError(f"{path}: line {line}: is not {encoding.removesuffix('-sig').upper()} text") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; ConversionError names the line of a syntax error."""
    text = read_text(path)
    if not text.strip():
        raise ConversionError(f"{path}: is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, reason = error.lineno, error.msg
        content = text.rstrip()
        if error.pos >= len(content) or reason.startswith("Unterminated string"):
            line, reason = content.count("\n") + 1, "the file ends there, before the JSON is complete"
        raise ConversionError(f"{path}: line {line}: is not JSON: {reason}") from None
    except (RecursionError, ValueError) as error:
        raise ConversionError(f"{path}: is not JSON that can be read: {error}") from None


def with_slashes(name: str) -> str:
    r"""Return a path with "/" where it has the separator "\" of Windows."""
    return name.replace("\\", "/")


def size_of(height: Any, width: Any) -> tuple[int, int] | None:
    """Return (height, width) if both are positive integers."""
    return (height, width) if all(type(side) is int and side > 0 for side in (height, width)) else None


def numbered(names: Iterable[str], options: Options) -> list[Class]:
    """Number class names from 1, unless the user gave a class list."""
    if options.classes is not None:
        return [*options.classes]
    return [Class(number, name) for number, name in enumerate(names, start=1)]
