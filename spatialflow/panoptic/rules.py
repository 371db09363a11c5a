# SPDX-License-Identifier: Apache-2.0
"""The rules of panoptic annotations: what each one says, which commands stop at it, and checks that read no file.

`docs/annotations.md` is the table for users. Scoring, training, pictures and `spatialflow validate` share these checks.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatialflow.panoptic.extents import Extent

VOID = 0  # the id of pixels that belong to no segment
LARGEST_ID = (1 << 24) - 1
TRUTH, PREDICTION, TRAINING = "truth", "prediction", "training"  # what annotations are read for
_ALL = (TRUTH, PREDICTION, TRAINING)
_LARGEST_NUMBER = 2.0**53  # areas and boxes beyond are no pixels; NaN and infinity fail the comparison too
_BOX_TOLERANCE = 1  # pixels: boxes of polygons, and conventions that count the last pixel or not


class Rule(NamedTuple):
    """Which uses of annotations stop at a breach, and which go on and report it."""

    stops: tuple[str, ...]
    reported: tuple[str, ...] = ()


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
    "png": Rule((TRUTH, PREDICTION)),
    "png-kind": Rule((TRUTH, PREDICTION)),
    "photograph": Rule(()),
    "photograph-size": Rule(()),
}
"""Every rule by name, in the order of reports."""

CATEGORY_RULES = ("categories", "category", "isthing", "category-twice")


class Problem(NamedTuple):
    """A breach of a rule."""

    rule: str
    text: str  # a sentence that names the image or the entry, the segment, the rule and the value
    image: int | str | None = None  # id of the image, where it is known
    segment: int | None = None
    value: Any = None  # what was found


class PanopticFormatError(ValueError):
    """A panoptic JSON, PNG or id map breaks the format; the message says which file and which rule."""


def summary(problems: Sequence[Problem], source: str) -> str:
    """One sentence about problems that were met and did not stop the work: a count for each rule and one example."""
    counts = Counter(problem.rule for problem in problems)
    examples = {problem.rule: problem.text for problem in reversed(problems)}
    found = "; ".join(f"{count} x {rule}, e.g. {examples[rule]}" for rule, count in counts.items())
    return f"{source}: {found}; `spatialflow validate` lists all (docs/annotations.md)"


def raise_first(problems: Iterable[Problem], use: str, source: str = "", also: Collection[str] = ()) -> list[Problem]:
    """Goes through problems for one use of the annotations.

    Args:
        use: `TRUTH`, `PREDICTION` or `TRAINING`.
        source: named before the sentence.
        also: rules that stop this time too.

    Returns:
        The problems that this use reports.

    Raises:
        PanopticFormatError: the first problem that stops this use.
    """
    reported = []
    for problem in problems:
        rule = RULES[problem.rule]
        if use in rule.stops or problem.rule in also:
            raise PanopticFormatError(f"{source}: {problem.text}" if source else problem.text)
        if use in rule.reported:
            reported.append(problem)
    return reported


# ---------------------------------------------------------------------------------------------------------- the JSON


def json_problems(content: Any, categories: Collection[int] | None = None) -> Iterator[Problem]:
    """What is wrong with the content of a panoptic JSON by itself; entries that cannot be read are passed over.

    Args:
        content: of the file.
        categories: ids that segments may have; None: those that the content lists, if it lists any.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
        yield Problem("json", 'a panoptic JSON is a mapping with a list "annotations"', value=_short(content))
        return
    of_categories, own = _category_problems(content)
    of_images, listed = _image_problems(content)
    seen: set[int | str] = set()
    for index, annotation in enumerate(content["annotations"]):
        where = f"annotations[{index}]"
        if misfit := _misfit(annotation, {"image_id": _ID, "file_name": _TEXT, "segments_info": _LIST}, where):
            yield Problem("annotation", misfit[0], _id_of(annotation, "image_id"), value=misfit[1])
            continue
        image = annotation["image_id"]
        if image in seen:
            yield Problem("annotation-twice", f"image {image!r:.80} has more than one annotation", image, value=image)
        seen.add(image)
        if isinstance(content.get("images"), list) and image not in listed:
            yield Problem("image-unlisted", f"image {image!r:.80} has an annotation and is not listed in images", image)
        segments = []
        for position, segment in enumerate(annotation["segments_info"]):
            malformed = _segment_misfit(segment, f"{where}: segments_info[{position}]", image)
            if malformed is None:
                segments.append(segment)
            else:
                yield malformed
        yield from segment_problems(segments, image, own or None if categories is None else categories)
    yield from of_images
    yield from of_categories


def segment_problems(
    segments: Sequence[Mapping[str, Any]], image: int | str, categories: Collection[int] | None
) -> Iterator[Problem]:
    """What is wrong with the segments of one image by themselves.

    Args:
        segments: mappings with integers `id` and `category_id`.
        image: the image's id.
        categories: ids that segments may have; None: any.
    """
    seen: set[int] = set()
    for segment in segments:
        number, category = segment["id"], segment["category_id"]
        where = f"image {image}: segment {number}"
        if number == VOID:
            yield Problem("id-zero", f"{where}: the id 0 stands for void; ids start at 1", image, number, number)
        if number in seen:
            yield Problem("id-twice", f"{where} is listed twice", image, number, number)
        seen.add(number)
        if categories is not None and category not in categories:
            yield Problem("category-unknown", f"{where} has the unknown category {category}", image, number, category)
        area, box = segment.get("area", 0), segment.get("bbox")
        if not _is_finite(area):
            text = f"{where} has area {area!r:.40}; it must be a finite number of pixels"
            yield Problem("area", text, image, number, area)
        if box is not None and not is_box(box):
            text = f"{where}: bbox must be four finite numbers, got {box!r:.80}"
            yield Problem("bbox", text, image, number, box)


def _category_problems(content: Mapping[str, Any]) -> tuple[list[Problem], set[int]]:
    """Problems, and the ids that are listed."""
    problems: list[Problem] = []
    listed: set[int] = set()
    rows = content.get("categories", [])
    if "categories" not in content:
        problems.append(Problem("categories", 'a ground truth needs a list "categories"'))
    elif not isinstance(rows, list):
        text = f'a ground truth needs a list "categories", got {rows!r:.80}'
        problems.append(Problem("category", text, value=_short(rows)))
        rows = []
    for index, category in enumerate(rows):
        where = f"categories[{index}]"
        if misfit := _misfit(category, {"id": _INTEGER}, where):
            problems.append(Problem("category", misfit[0], value=misfit[1]))
            continue
        number = category["id"]
        if misfit := _misfit(category, {"isthing": _FLAG}, where):
            problems.append(Problem("isthing", f"{misfit[0]} (category {number})", value=misfit[1]))
        if number in listed:
            problems.append(Problem("category-twice", f"{where}: category {number} is listed twice", value=number))
        listed.add(number)
    return problems, listed


def _image_problems(content: Mapping[str, Any]) -> tuple[list[Problem], set[int | str]]:
    """Problems, and the ids that are listed."""
    rows = content.get("images")
    if not isinstance(rows, list):
        return [Problem("images", 'a data set needs a list "images"', value=_short(rows))], set()
    problems: list[Problem] = []
    listed: set[int | str] = set()
    for index, image in enumerate(rows):
        where, number = f"images[{index}]", _id_of(image, "id")
        if misfit := _image_misfit(image, where):
            problems.append(Problem("image", misfit[0], number, value=misfit[1]))
        if number in listed:
            text = f"{where}: image {number!r:.80} is listed twice"
            problems.append(Problem("image-twice", text, number, value=number))
        if number is not None:
            listed.add(number)
    return problems, listed


def _image_misfit(image: Any, where: str) -> tuple[str, Any] | None:
    fields = {"id": _ID, "file_name": _TEXT, "height": _INTEGER, "width": _INTEGER}
    if misfit := _misfit(image, fields, where):
        return misfit
    if min(image["height"], image["width"]) < 1:
        size = f"{image['width']}x{image['height']}"
        return f"{where}: must have pixels, got {size}", size
    return None


def _segment_misfit(segment: Any, where: str, image: int | str) -> Problem | None:
    if not (
        isinstance(segment, Mapping)
        and isinstance(segment.get("id"), int)
        and isinstance(segment.get("category_id"), int)
    ):
        text = f'{where} must be a mapping with integers "id" and "category_id" (image {image})'
        return Problem("segment", text, image, value=_short(segment))
    rule, number = "segment", segment["id"]
    if not 0 <= number <= LARGEST_ID:
        rule, value, text = "id-range", number, f"id must lie in [0, {LARGEST_ID}], got {_short(number)}"
    elif not isinstance(segment.get("area", 0), _NUMBER):
        value = segment["area"]
        text = f"area must be a number, got {value!r:.80}"
    elif segment.get("iscrowd", 0) not in (0, 1):
        value = segment["iscrowd"]
        text = f"iscrowd must be 0 or 1, got {value!r:.80}"
    else:
        return None
    return Problem(rule, f"{where}: {text} (image {image}, segment {_short(number)})", image, number, _short(value))


_INTEGER, _TEXT, _LIST, _FLAG = (int, np.integer), (str,), (list,), (int, np.integer, np.bool_)
_NUMBER = (int, float, np.integer)
_ID = _INTEGER + _TEXT
_KINDS = {_INTEGER: "an integer", _TEXT: "a text", _LIST: "a list", _ID: "an integer or a text", _FLAG: "0 or 1"}


def _misfit(item: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> tuple[str, Any] | None:
    """A sentence about the first field that is absent or of another kind, and what is there instead."""
    for field, kinds in fields.items():
        if not isinstance(item, Mapping) or field not in item:
            return f'{where} must be a mapping with "{field}" ({_KINDS[kinds]})', _short(item)
        value = item[field]
        if not isinstance(value, kinds) or (kinds is _FLAG and value not in (0, 1)):
            return f"{where}: {field} must be {_KINDS[kinds]}, got {value!r:.80}", _short(value)
        if kinds is _TEXT and "\0" in value:  # no path holds one
            return f"{where}: {field} must be a text without NUL, got {value!r:.80}", _short(value)
    return None


def _id_of(item: Any, field: str) -> int | str | None:
    """The id under `field`, None where there is none."""
    value = item.get(field) if isinstance(item, Mapping) else None
    return value if isinstance(value, _ID) else None


def _short(value: Any) -> Any:
    """A value as it is, or the beginning of its text where it is no number."""
    return value if isinstance(value, _NUMBER) and abs(value) <= _LARGEST_NUMBER else f"{value!r:.80}"


# ------------------------------------------------------------------------------------------------ the JSON and the PNG


def pixel_problems(
    segments: Sequence[Mapping[str, Any]], image: int | str, found: Mapping[int, int | Extent]
) -> Iterator[Problem]:
    """What contradicts the pixels of one image's map.

    Args:
        segments: mappings with integers `id` and `category_id`.
        image: the image's id.
        found: pixels of every id of the map, or their `Extent`; without those boxes are not looked at.
    """
    listed = {VOID}
    for segment in segments:
        number, extent = segment["id"], found.get(segment["id"])
        where = f"image {image}: segment {number}"
        listed.add(number)
        if extent is None:
            yield Problem("no-pixels", f"{where} is in the JSON and not in the PNG", image, number, 0)
            continue
        pixels = extent.pixels if isinstance(extent, Extent) else extent
        area = segment.get("area", pixels)
        if _is_finite(area) and area != pixels:
            text = f"{where} has area {area} in the JSON and {pixels} pixels in the PNG"
            yield Problem("area" if area < 0 else "area-pixels", text, image, number, area)
        if isinstance(extent, Extent) and contradicts(segment.get("bbox"), extent):
            yield Problem("bbox-pixels", f"{where} {_box_text(segment['bbox'], extent)}", image, number, segment["bbox"])
    for number in found:
        if number not in listed:
            text = f"image {image}: segment {number} is in the PNG and not in the JSON"
            yield Problem("no-segment", text, image, number, number)


def is_box(box: Any) -> bool:
    """True for four finite numbers."""
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_finite, box))


def contradicts(box: Any, extent: Extent) -> bool:
    """True for a box (x, y, width, height) with a side more than a pixel away from that of the pixels."""
    return is_box(box) and not _is_near(_corners(*box), _corners(*extent.box))


def box_of(segment: Mapping[str, Any], extent: Extent) -> list[float]:
    """The segment's `bbox`, or the box of its pixels where it has none or one that contradicts them."""
    box = segment.get("bbox")
    return list(box) if is_box(box) and not contradicts(box, extent) else extent.box


def _box_text(box: Sequence[float], extent: Extent) -> str:
    text = f"has bbox {list(box)} in the JSON and {extent.box} in the PNG"
    if _is_near(box, _corners(*extent.box)):
        text += "; the JSON gives x1 y1 x2 y2 where the format has x y width height"
    return text


def _corners(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x, y, x + width, y + height


def _is_near(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(abs(a - b) <= _BOX_TOLERANCE for a, b in zip(first, second, strict=True))


def _is_finite(value: Any) -> bool:
    return isinstance(value, _NUMBER) and -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER
