# SPDX-License-Identifier: Apache-2.0
"""The rules of panoptic annotations: the effect of a breach on each use, and checks that read no file.

`docs/annotations.md` is the table for users. Scoring, training, pictures and `spatialflow validate` share these checks.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from spatialflow.errors import DataWarning
from spatialflow.panoptic.extents import Extent

VOID = 0  # the id of pixels that are not part of a segment
LARGEST_ID = (1 << 24) - 1
TRUTH, PREDICTION, TRAINING = "truth", "prediction", "training"  # uses of annotations
_ALL = (TRUTH, PREDICTION, TRAINING)
_LARGEST_NUMBER = 2.0**53  # larger areas and boxes are invalid; NaN and infinity fail the comparison too
_BOX_TOLERANCE = 1  # pixels; boxes made from polygons, or that exclude the last pixel, differ by up to one


class Rule(NamedTuple):
    """The uses of annotations that stop at a breach, those that report it, and whether training skips the image."""

    stops: tuple[str, ...]
    reported: tuple[str, ...] = ()
    skipped: bool = False

    def effect(self, use: str) -> str:
        """Return the effect of a breach on one use: "stops", "reported", "skipped" or "-" (no effect)."""
        if use in self.stops:
            return "stops"
        if use in self.reported:
            return "reported"
        return "skipped" if self.skipped and use == TRAINING else "-"


RULES: dict[str, Rule] = {
    "json": Rule(_ALL),
    "annotation": Rule(_ALL),
    "annotation-twice": Rule(_ALL),
    "segment": Rule(_ALL),
    "id-range": Rule(_ALL),
    "id-zero": Rule((TRUTH, TRAINING), (PREDICTION,)),
    "id-twice": Rule((TRUTH, TRAINING), (PREDICTION,)),
    "categories": Rule((TRUTH,)),
    "category": Rule((TRUTH, TRAINING)),
    "isthing": Rule((TRUTH, TRAINING)),
    "category-twice": Rule((TRUTH, TRAINING)),
    "category-unknown": Rule(_ALL),
    "area": Rule((TRUTH,)),
    "area-pixels": Rule((), (TRUTH,)),
    "bbox": Rule((TRAINING,)),
    "bbox-pixels": Rule((), (TRAINING,)),
    "no-pixels": Rule((PREDICTION,), (TRUTH, TRAINING)),
    "no-segment": Rule((PREDICTION,), (TRUTH, TRAINING)),
    "images": Rule((TRAINING,)),
    "image": Rule((TRAINING,)),
    "image-twice": Rule((TRAINING,), (TRUTH, PREDICTION)),
    "image-unlisted": Rule((TRAINING,)),
    "image-size": Rule(()),
    "png": Rule((TRUTH, PREDICTION), skipped=True),
    "png-kind": Rule((TRUTH, PREDICTION), skipped=True),
    "photograph": Rule((), skipped=True),
    "photograph-size": Rule((), skipped=True),
}
"""Every rule by name, in the order in which `spatialflow validate` prints broken rules."""

CATEGORY_RULES = ("categories", "category", "isthing", "category-twice")


class Problem(NamedTuple):
    """A breach of a rule."""

    rule: str
    text: str  # names the image or the entry, the segment, the rule and the value
    image: int | str | None = None  # id of the image, where it is known
    segment: int | None = None
    value: Any = None  # the value that breaks the rule
    entry: str | None = None  # location in the JSON of a malformed entry


class PanopticFormatError(ValueError):
    """A panoptic JSON, PNG or id map that breaks the format; the message names the file and the rule.

    Attributes:
        rule: the name in `RULES`, or None.
    """

    def __init__(self, message: str, rule: str | None = None) -> None:
        super().__init__(message)
        self.rule = rule


class AnnotationWarning(DataWarning):
    """Contradictory annotations, or annotations without any segment, that were scored."""


def summary(problems: Sequence[Problem], source: str) -> str:
    """Make one message about problems that did not stop the work: a count and an example for each rule."""
    counts = Counter(problem.rule for problem in problems)
    examples = {problem.rule: problem.text for problem in reversed(problems)}
    listed = "; ".join(f"{count} x {rule}, e.g. {examples[rule]}" for rule, count in counts.items())
    return f"{source}: {listed}; `spatialflow validate` lists all (docs/annotations.md)"


def raise_first(problems: Iterable[Problem], use: str, source: str = "", also: Collection[str] = ()) -> list[Problem]:
    """Raise the first problem that stops one use of the annotations.

    Args:
        problems: the breaches found, checked one after the other.
        use: `TRUTH`, `PREDICTION` or `TRAINING`.
        source: name of the file, as the beginning of the message.
        also: further rules that stop.

    Returns:
        The problems that this use reports.

    Raises:
        PanopticFormatError: a problem stops this use.
    """
    reported = []
    for problem in problems:
        rule = RULES[problem.rule]
        if use in rule.stops or problem.rule in also:
            raise PanopticFormatError(f"{source}: {problem.text}" if source else problem.text, problem.rule)
        if use in rule.reported:
            reported.append(problem)
    return reported


# ---------------------------------------------------------------------------------------------------------- the JSON


def json_problems(content: Any, categories: Collection[int] | None = None) -> Iterator[Problem]:
    """Find the problems of the content of a panoptic JSON, without its PNGs.

    Malformed entries are reported, and not checked further.

    Args:
        content: the parsed content of the file.
        categories: category ids that segments may have; None: those that the content lists, if it lists any.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
        yield Problem("json", 'a panoptic JSON is a mapping with a list "annotations"', value=_short(content))
        return
    category_problems, category_ids = _category_problems(content)
    image_problems, listed = _image_problems(content)
    seen: set[int | str] = set()
    for index, annotation in enumerate(content["annotations"]):
        location = f"annotations[{index}]"
        if error := _field_error(annotation, {"image_id": _ID, "file_name": _TEXT, "segments_info": _LIST}, location):
            image = id_of(annotation, "image_id")
            yield Problem("annotation", error[0] + _image_suffix(image), image, None, error[1], location)
            continue
        image = annotation["image_id"]
        if image in seen:
            yield Problem("annotation-twice", f"image {image!r:.80} has more than one annotation", image, value=image)
        seen.add(image)
        if isinstance(content.get("images"), list) and image not in listed:
            text = f"image {image!r:.80} has an annotation and is not listed in images"
            yield Problem("image-unlisted", text, image, value=image)
        segments = []
        for position, segment in enumerate(annotation["segments_info"]):
            malformed = _malformed_segment(segment, image, index, position)
            if malformed is None:
                segments.append(segment)
            else:
                yield malformed
        yield from segment_problems(segments, image, category_ids or None if categories is None else categories)
    yield from image_problems
    yield from category_problems


def segment_problems(
    segments: Sequence[Mapping[str, Any]], image: int | str, categories: Collection[int] | None
) -> Iterator[Problem]:
    """Find the problems of the segments of one image, without its PNG.

    Args:
        segments: mappings with integers `id` and `category_id`.
        image: the image's id.
        categories: category ids that segments may have; None: any.
    """
    seen: set[int] = set()
    for segment in segments:
        number, category = segment["id"], segment["category_id"]
        area, box = segment.get("area", 0), segment.get("bbox")
        if number == VOID:
            yield _segment_problem("id-zero", image, number, number, ": the id 0 stands for void; ids start at 1")
        if number in seen:
            yield _segment_problem("id-twice", image, number, number, " is listed twice")
        seen.add(number)
        if categories is not None and category not in categories:
            detail = f" has the unknown category {_label(category)}"
            yield _segment_problem("category-unknown", image, number, category, detail)
        if not is_finite(area) or area < 0:
            detail = f" has area {area!r:.40}; it must be a finite number of pixels, 0 or more"
            yield _segment_problem("area", image, number, _short(area), detail)
        if box is not None and not is_box(box):
            detail = f": bbox must be four finite numbers, got {box!r:.80}"
            yield _segment_problem("bbox", image, number, _short(box), detail)


def _segment_problem(rule: str, image: int | str, segment: int, value: Any, detail: str) -> Problem:
    return Problem(rule, f"image {_label(image)}: segment {segment}{detail}", image, segment, value)


def _category_problems(content: Mapping[str, Any]) -> tuple[list[Problem], set[int]]:
    """Return the problems of `categories` and the category ids listed there."""
    problems: list[Problem] = []
    listed: set[int] = set()
    rows = content.get("categories", [])
    if "categories" not in content:
        problems.append(Problem("categories", 'a ground truth needs a list "categories"'))
    elif not isinstance(rows, list):
        text = f'"categories" must be a list, got {rows!r:.80}'
        problems.append(Problem("category", text, value=_short(rows)))
        rows = []
    for index, category in enumerate(rows):
        location = f"categories[{index}]"
        if error := _field_error(category, {"id": _INTEGER}, location):
            problems.append(Problem("category", error[0], value=error[1]))
            continue
        number = category["id"]
        if error := _field_error(category, {"isthing": _FLAG}, location):
            problems.append(Problem("isthing", f"{error[0]} (category {_label(number)})", value=error[1]))
        if number in listed:
            text = f"{location}: category {_label(number)} is listed twice"
            problems.append(Problem("category-twice", text, value=number))
        listed.add(number)
    return problems, listed


def _image_problems(content: Mapping[str, Any]) -> tuple[list[Problem], set[int | str]]:
    """Return the problems of `images` and the image ids listed there."""
    rows = content.get("images")
    if not isinstance(rows, list):
        return [Problem("images", 'a data set needs a list "images"', value=_short(rows))], set()
    problems: list[Problem] = []
    listed: set[int | str] = set()
    for index, image in enumerate(rows):
        location, number = f"images[{index}]", id_of(image, "id")
        if error := _image_error(image, location):
            text = error[0] + _image_suffix(number)
            problems.append(Problem("image", text, number, None, error[1], location))
        if number in listed:
            text = f"{location}: image {number!r:.80} is listed twice"
            problems.append(Problem("image-twice", text, number, value=number))
        if number is not None:
            listed.add(number)
    return problems, listed


def _image_error(image: Any, location: str) -> tuple[str, Any] | None:
    fields = {"id": _ID, "file_name": _TEXT, "height": _INTEGER, "width": _INTEGER}
    if error := _field_error(image, fields, location):
        return error
    if min(image["height"], image["width"]) < 1:
        size = f"{image['width']}x{image['height']}"
        return f"{location}: must have pixels, got {size}", size
    return None


def segment_id(segment: Any) -> int | None:
    """Return the id of an entry of `segments_info`; None if it has no integer id."""
    number = segment.get("id") if isinstance(segment, Mapping) else None
    return number if type(number) is int else None  # isinstance would accept true and false


def _malformed_segment(segment: Any, image: int | str, index: int, position: int) -> Problem | None:
    number = segment_id(segment)
    if (
        number is not None
        and type(segment.get("category_id")) is int
        and 0 <= number <= LARGEST_ID
        and _is_number(segment.get("area", 0))
        and segment.get("iscrowd", 0) in (0, 1)
    ):
        return None
    location, suffix = f"annotations[{index}]: segments_info[{position}]", f"(image {_label(image)}"
    if number is None or type(segment.get("category_id")) is not int:
        text = f'{location} must be a mapping with integers "id" and "category_id", got {segment!r:.80} {suffix})'
        return Problem("segment", text, image, number, _short(segment), location)
    rule = "segment"
    if not 0 <= number <= LARGEST_ID:
        rule, value, text = "id-range", number, f"id must lie in [0, {LARGEST_ID}], got {_label(number)}"
    elif not _is_number(segment.get("area", 0)):
        value = segment["area"]
        text = f"area must be a number, got {value!r:.80}"
    else:
        value = segment["iscrowd"]
        text = f"iscrowd must be 0 or 1, got {value!r:.80}"
    return Problem(
        rule, f"{location}: {text} {suffix}, segment {_label(number)})", image, number, _short(value), location
    )


_INTEGER, _TEXT, _LIST, _FLAG = (int, np.integer), (str,), (list,), (int, np.integer, np.bool_)
_NUMBER: tuple[Any, ...] = (int, float, np.integer)
_ID = _INTEGER + _TEXT
_KINDS: dict[tuple[type, ...], str] = {
    _INTEGER: "an integer",
    _TEXT: "a string",
    _LIST: "a list",
    _ID: "an integer or a string",
    _FLAG: "0 or 1",
}


def _field_error(item: Any, fields: Mapping[str, tuple[type, ...]], location: str) -> tuple[str, Any] | None:
    """Describe the first field that is absent or of another kind: a message and its value; None if all fit."""
    for field, kinds in fields.items():
        if not isinstance(item, Mapping) or field not in item:
            return f'{location} must be a mapping with "{field}" ({_KINDS[kinds]})', _short(item)
        value = item[field]
        if not _has_type(value, kinds) or (kinds is _FLAG and value not in (0, 1)):
            return f"{location}: {field} must be {_KINDS[kinds]}, got {value!r:.80}", _short(value)
        if kinds is _TEXT and not _names_a_file(value):
            rule = "must be a string without NUL or unpaired surrogates"
            return f"{location}: {field} {rule}, got {value!r:.80}", _short(value)
    return None


def _has_type(value: Any, kinds: tuple[type, ...]) -> bool:
    """Test as `isinstance`, except that JSON's true and false are flags and not numbers."""
    return isinstance(value, kinds) and (kinds is _FLAG or not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return _has_type(value, _NUMBER)


def _names_a_file(text: str) -> bool:
    """Return whether a string can be a path: it has no NUL, and `os.fsencode` can encode it."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def id_of(item: Any, field: str) -> int | str | None:
    """Return the id in `field` of an item; None if the field is absent or is not an id."""
    value = item.get(field) if isinstance(item, Mapping) else None
    return value if _has_type(value, _ID) else None


def _image_suffix(image: int | str | None) -> str:
    return "" if image is None else f" (image {_label(image)})"


def _label(name: Any) -> str:
    """Format an id or a file name, without its middle if it is longer than 160 characters."""
    text = str(name)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-77:]}"


def _short(value: Any) -> Any:
    """Return a number of magnitude up to 2^53 unchanged, and any other value as the beginning of its `repr`."""
    return value if isinstance(value, _NUMBER) and abs(value) <= _LARGEST_NUMBER else f"{value!r:.80}"


# ------------------------------------------------------------------------------------------------ the JSON and the PNG


def pixel_problems(
    segments: Sequence[Mapping[str, Any]],
    image: int | str,
    pixels_by_id: Mapping[int, int | Extent],
    unusable: Collection[int] = (),
) -> Iterator[Problem]:
    """Find contradictions between the segments and the id map of one image.

    Args:
        segments: mappings with integers `id` and `category_id`.
        image: the image's id.
        pixels_by_id: number of pixels of every id of the map, or its `Extent`; boxes are checked only with the latter.
        unusable: ids of further listed segments, which are malformed.
    """
    listed = {VOID, *unusable}
    for segment in segments:
        number, extent = segment["id"], pixels_by_id.get(segment["id"])
        listed.add(number)
        if extent is None:
            yield _segment_problem("no-pixels", image, number, 0, " is in the JSON and not in the PNG")
            continue
        pixels = extent.pixels if isinstance(extent, Extent) else extent
        area, box = segment.get("area", pixels), segment.get("bbox")
        if area != pixels and is_finite(area) and area >= 0:
            detail = f" has area {area} in the JSON and {pixels} pixels in the PNG"
            yield _segment_problem("area-pixels", image, number, area, detail)
        if isinstance(extent, Extent) and contradicts(box, extent):
            yield _segment_problem("bbox-pixels", image, number, box, _box_text(cast("Sequence[float]", box), extent))
    for number in pixels_by_id:
        if number not in listed:
            yield _segment_problem("no-segment", image, number, number, " is in the PNG and not in the JSON")


def is_box(box: Any) -> bool:
    """Return whether a value is four finite numbers."""
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(is_finite, box))


def contradicts(box: Any, extent: Extent) -> bool:
    """Return whether a side of a box (x, y, width, height) is more than a pixel from the bounding box of the pixels."""
    return is_box(box) and not _is_near(_corners(*box), _corners(*extent.box))


def box_of(segment: Mapping[str, Any], extent: Extent) -> list[float]:
    """Return the `bbox` of a segment, or the bounding box of its pixels if `bbox` is absent or contradicts them."""
    box = segment.get("bbox")
    if box is None or not is_box(box) or contradicts(box, extent):
        return [*extent.box]
    return list(box)


def _box_text(box: Sequence[float], extent: Extent) -> str:
    text = f" has bbox {list(box)} in the JSON and {extent.box} in the PNG"
    if _is_near(box, _corners(*extent.box)):
        text += "; the JSON gives x1 y1 x2 y2 where the format has x y width height"
    return text


def _corners(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x, y, x + width, y + height


def _is_near(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(abs(a - b) <= _BOX_TOLERANCE for a, b in zip(first, second, strict=True))


def is_finite(value: Any) -> bool:
    """Return whether a value is a number of magnitude up to 2^53; not NaN, infinity, or JSON's true and false."""
    return _is_number(value) and -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER


def is_color(value: Any) -> bool:
    """Return whether a value is three numbers from 0 to 255."""
    numbers = isinstance(value, (list, tuple)) and all(is_finite(c) for c in value)
    return numbers and len(value) == 3 and all(0 <= c <= 255 for c in value)
