# SPDX-License-Identifier: Apache-2.0
"""The images that the viewer shows: panoptic JSONs joined by image, with the problems of their entries."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spatialflow.panoptic.category_names import different_names, ids_by_name, moved_names, names_by_id
from spatialflow.panoptic.colors import color_of, segment_colors
from spatialflow.panoptic.formats import load_json, read_id_map
from spatialflow.panoptic.photographs import find_photograph, match_images, photograph_key, photograph_names, read_list
from spatialflow.panoptic.quality import default_folder
from spatialflow.panoptic.rules import PREDICTION, RULES, TRUTH, PanopticFormatError, id_of, is_color, json_problems

TRUTH_SIDE, PREDICTION_SIDE, OTHER_SIDE = "truth", "prediction", "other"
"""Keys of the sides: the ground truth, the predictions, and the predictions that they are compared with."""


class ViewError(ValueError):
    """A file that the viewer cannot show; the message names the file and the reason."""


@dataclass
class Side:
    """A panoptic JSON and its PNGs.

    Attributes:
        key: `TRUTH_SIDE`, `PREDICTION_SIDE` or `OTHER_SIDE`.
        title: the name on the page.
        path: the JSON.
        folder: its PNGs.
        categories: the rows of "categories" with an integer id.
        annotations: by image id; entries that break the format are left out.
        names: file name of the photograph by image id.
        rows: the rows of "images" by image id.
        problems: messages about the file.
        problems_of: messages by image id.
    """

    key: str
    title: str
    path: Path
    folder: Path
    categories: list[dict[str, Any]]
    annotations: dict[int | str, dict[str, Any]]
    names: dict[int | str, str]
    rows: dict[int | str, dict[str, Any]]
    problems: list[str]
    problems_of: dict[int | str, list[str]]

    @property
    def use(self) -> str:
        """The rules that the segments must follow: `rules.TRUTH` or `rules.PREDICTION`."""
        return TRUTH if self.key == TRUTH_SIDE else PREDICTION

    @property
    def has_scores(self) -> bool:
        """Whether a segment has a score, as those of predictions have."""
        return any("score" in segment for row in self.annotations.values() for segment in row["segments_info"])


@dataclass
class Image:
    """One image of the page.

    Attributes:
        name: the photograph's file name.
        ids: image id by key of the side.
        problems: messages about its entries in the JSONs.
    """

    name: str
    ids: dict[str, int | str]
    problems: list[str] = field(default_factory=list)


class Category(NamedTuple):
    """A category of the page."""

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]  # red, green, blue


def read_side(key: str, title: str, path: Path, folder: Path | None = None) -> Side:
    """Read a panoptic JSON; entries that break the format become messages.

    Args:
        key: see `Side`.
        title: see `Side`.
        path: the JSON.
        folder: its PNGs; None: the JSON's path without its suffix.

    Raises:
        PanopticFormatError: the file is absent or is not a panoptic JSON.
    """
    content = load_json(path)
    found = list(json_problems(content))
    if any(problem.rule == "json" for problem in found):
        raise PanopticFormatError(f"{path}: {found[0].text}", "json")
    malformed = {problem.entry for problem in found}
    annotations: dict[int | str, dict[str, Any]] = {}
    for i, row in enumerate(content["annotations"]):
        if f"annotations[{i}]" not in malformed:
            segments = [
                segment
                for j, segment in enumerate(row["segments_info"])
                if f"annotations[{i}]: segments_info[{j}]" not in malformed
            ]
            annotations.setdefault(row["image_id"], row | {"segments_info": segments})
    rows: dict[int | str, dict[str, Any]] = {}
    listed = content.get("images")
    for row in listed if isinstance(listed, list) else ():
        number = id_of(row, "id")
        if number is not None:
            rows.setdefault(number, row)
    usable = {"images": list(rows.values()), "annotations": list(annotations.values())}
    categories = content.get("categories")
    side = Side(
        key,
        title,
        path,
        Path(default_folder(path) if folder is None else folder),
        [row for row in categories if isinstance(row, dict) and type(row.get("id")) is int]
        if isinstance(categories, list)
        else [],
        annotations,
        dict(zip(annotations, photograph_names(usable), strict=True)),
        rows,
        [],
        {},
    )
    for problem in found:
        if RULES[problem.rule].effect(side.use) in ("stops", "reported"):
            messages = side.problems if problem.image is None else side.problems_of.setdefault(problem.image, [])
            messages.append(problem.text)
    return side


class Catalog:
    """The images of one or more sides.

    Args:
        sides: the ground truth first, if there is one, then the predictions. Images of all are joined with those of the
            first predictions, or of the ground truth if it is alone.
        images: folder of the photographs; None: the paths in the JSONs, or folders or lists of paths beside them.
    """

    def __init__(self, sides: list[Side], images: Path | None = None) -> None:
        self.warnings: list[str] = []  # messages on what makes scores and classes of the whole page wrong
        self.notes = [f"{side.path}: {text}" for side in sides for text in side.problems]
        sides = self._match_categories(sides)
        self.sides = {side.key: side for side in sides}
        self.main = self.sides.get(PREDICTION_SIDE) or sides[0]
        self.missing: list[str] = []  # messages on images that only some sides have, which is no problem
        self.images = self._join()
        self.categories = self._merge_categories()
        self._category_rows = [row._asdict() for row in self.categories.values()]
        self._folder = images
        self._folders = {side.key: _guess_folder(side) for side in sides} if images is None else {}
        self._listed = {side.key: _listed_photographs(side) for side in sides} if images is None else {}
        self._count_absent()

    def _match_categories(self, sides: list[Side]) -> list[Side]:
        """Give all sides the category ids of the ground truth, else of the file with most categories.

        Only a side of which an id has another name there, or a name another id, gets other ids, and only if all its
        names are known.
        """
        reference = next((side for side in sides if side.key == TRUTH_SIDE), None)
        reference = reference or max(sides, key=lambda side: len(side.categories))
        known = names_by_id(reference.categories)
        matched = {reference.key: reference}
        for side in sides:
            names = names_by_id(side.categories)
            different = [] if side is reference else different_names(known, names)
            moved = [] if side is reference or different else moved_names(known, names)
            if not different and not moved:
                matched[side.key] = side
                continue
            first, more = (different or moved)[0], len(different or moved) - 1
            text = f"{side.path}: category {first} is {names[first]!r:.60}, in {reference.path} "
            text += f"it is {known[first]!r:.60}" if different else "this name has another id"
            text += f"{f', and {more} more differ' * (more > 0)}; categories are "
            renumbered = _renumbered(side, ids_by_name(names, known))
            if renumbered is None:
                text += "compared by id, so classes, errors and PQ are wrong unless both names mean one class"
                self.warnings.append(text)
            else:
                self.notes.append(text + "matched by name")
            matched[side.key] = renumbered or side
        return [matched[side.key] for side in sides]

    def _join(self) -> list[Image]:
        main = self.main
        order = list(main.annotations) + [i for i in main.problems_of if i not in main.annotations]
        found = {i: Image(main.names.get(i, str(i)), {main.key: i}, list(main.problems_of.get(i, ()))) for i in order}
        for side in self.sides.values():
            if side is main:
                continue
            # A ground truth is matched as in scoring: each of its images with at most one prediction.
            first, second = (side, main) if side.key == TRUTH_SIDE else (main, side)
            matches = match_images(_as_content(first), _as_content(second))
            pairs = ((b, a) for a, b in matches.items()) if side.key == TRUTH_SIDE else matches.items()
            matched = {main_id: side_id for main_id, side_id in pairs if main_id in found}
            for main_id, image in found.items():
                if main_id in matched:
                    image.ids[side.key] = matched[main_id]
                    image.problems += side.problems_of.get(matched[main_id], ())
            if count := sum(i in main.annotations and i not in matched for i in found):
                counts = f"{side.path}: {count} of {len(found)} image{'s' * (len(found) != 1)}"
                verbs = ("has", "is") if count == 1 else ("have", "are")
                lacking = "no ground truth" if side.key == TRUTH_SIDE else "no result"
                effect = "without a PQ" if side.key == TRUTH_SIDE else "without one"
                self.missing.append(f"{counts} {verbs[0]} {lacking} and {verbs[1]} shown {effect}")
            rest = len(side.annotations) - len(matched)
            if rest:
                words = ("image has", "is") if rest == 1 else ("images have", "are")
                text = f"{rest} {words[0]} no prediction in {main.path} and {words[1]} not shown"
                self.notes.append(f"{side.path}: {text}")
        return list(found.values())

    def _merge_categories(self) -> dict[int, Category]:
        """Collect the categories of all sides, and of segments whose category no side lists."""
        categories: dict[int, Category] = {}
        for side in self.sides.values():
            for row in side.categories:
                number, name, color = row["id"], str(row.get("name", row["id"])), row.get("color")
                if number not in categories:
                    base = color if is_color(color) else None
                    categories[number] = Category(number, name, row.get("isthing") == 1, color_of(number, 0, base))
        for side in self.sides.values():
            for annotation in side.annotations.values():
                for segment in annotation["segments_info"]:
                    number = segment["category_id"]
                    if number not in categories:
                        isthing = segment.get("isthing") in (1, True)
                        categories[number] = Category(number, str(number), isthing, color_of(number))
        return categories

    def annotation(self, image: Image, key: str) -> dict[str, Any] | None:
        """Return the annotation of an image on one side; None if the side has none."""
        side = self.sides.get(key)
        return None if side is None or key not in image.ids else side.annotations.get(image.ids[key])

    def colors(self, segments: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int, int]]:
        """Compute the color (red, green, blue) of each segment of an image by its id, as overlays have it."""
        numbers = (segment["id"] for segment in segments)
        return dict(zip(numbers, segment_colors(segments, self._category_rows), strict=True))

    def read_map(self, index: int, key: str) -> np.ndarray:
        """Read the id map of an image on one side, (H, W) int32.

        Raises:
            PanopticFormatError: the PNG is absent or damaged.
            ViewError: the side has no such image, or its JSON names a file outside the folder.
        """
        image = self.images[index]
        annotation = self.annotation(image, key)
        if annotation is None:
            raise ViewError(f"{image.name}: has no annotation that can be read")
        return read_id_map(inside(self.sides[key].folder, annotation["file_name"]))

    def photograph(self, image: Image) -> Path:
        """Find the photograph of an image.

        Raises:
            ViewError: it is not found, or its name cannot be one of a file.
        """
        try:
            return self._find_photograph(image)
        except ViewError:
            raise
        except ValueError:  # a zero byte, or a character that no path has
            raise ViewError(f"{image.name!r:.80}: is not a file name") from None

    def _count_absent(self) -> None:
        """Add a message with the number of photographs that are not found."""
        absent = 0
        for image in self.images:
            try:
                self.photograph(image)
            except ViewError:
                absent += 1
        if absent:
            text = f"{absent} of {len(self.images)} photograph{'s' * (len(self.images) != 1)} "
            text += "is not " if absent == 1 else "are not "
            where = "found; --images names the folder" if self._folder is None else f"in the folder {self._folder}"
            self.missing.append(text + where)

    def _find_photograph(self, image: Image) -> Path:
        if self._folder is not None:
            path = inside(self._folder, os.path.relpath(find_photograph(self._folder, image.name), self._folder))
            if os.path.isfile(path):
                return path
            raise ViewError(f"{image.name}: is not in the folder {self._folder}")
        for key in (self.main.key, *self.sides):
            if key not in image.ids:
                continue
            side, image_id = self.sides[key], image.ids[key]
            recorded = side.rows.get(image_id, {}).get("path")
            if isinstance(recorded, str) and os.path.isfile(
                path := Path(os.path.realpath(side.path.parent / recorded))
            ):
                return path
            name = side.names.get(image_id, image.name)
            folder = self._folders[key]
            if folder is not None and os.path.isfile(path := inside(folder, name)):
                return path
            listed = self._listed[key]
            found = listed.get(name) or (None if "/" in name else listed.get(photograph_key(name)))
            if found is not None and os.path.isfile(found):
                return Path(os.path.realpath(found))
        raise ViewError(f"{image.name}: the photograph is not found; give its folder with --images")


def _renumbered(side: Side, id_of: Mapping[int, int] | None) -> Side | None:
    """Return a side with other category ids; None without `id_of`, or if a category of the side is not in it."""
    segments = (segment for row in side.annotations.values() for segment in row["segments_info"])
    used = {row["id"] for row in side.categories} | {segment["category_id"] for segment in segments}
    if id_of is None or not used <= id_of.keys():
        return None
    annotations = {
        image: row | {"segments_info": [s | {"category_id": id_of[s["category_id"]]} for s in row["segments_info"]]}
        for image, row in side.annotations.items()
    }
    return replace(
        side, categories=[row | {"id": id_of[row["id"]]} for row in side.categories], annotations=annotations
    )


def _as_content(side: Side) -> dict[str, Any]:
    return {"images": list(side.rows.values()), "annotations": list(side.annotations.values())}


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file below a folder, with links resolved.

    Raises:
        ViewError: the file lies outside the folder, or the name cannot be one of a file.
    """
    try:
        root = os.path.realpath(folder)
        path = os.path.realpath(os.path.join(root, name))
    except ValueError:  # a zero byte
        raise ViewError(f"{name!r:.80}: is not a file name") from None
    if not path.startswith(os.path.join(root, "")):
        raise ViewError(f"{name!r:.80}: lies outside the folder {folder}, and is not shown")
    return Path(path)


def _listed_photographs(side: Side) -> dict[str, Path | None]:
    """Map names of photographs to the paths in the list beside a JSON; empty without a list.

    A name is the last parts of a path, as many as names in the JSON have, or the `photograph_key` of the path. It is
    mapped to None if several paths have it.
    """
    try:
        lines = read_list(side.path)
    except OSError:
        return {}
    found: dict[str, Path | None] = {}
    lengths = {name.count("/") + 1 for name in side.names.values()}
    for path in {side.path.parent / line for line in lines}:
        names = {"/".join(path.parts[-length:]) for length in lengths} | {photograph_key(path.name)}
        for name in names:
            found[name] = None if name in found else path
    return found


def _guess_folder(side: Side) -> Path | None:
    """Find the folder of a JSON's photographs by its first name: `images`, or named like the JSON, beside it or above.

    COCO has `annotations/panoptic_val2017.json` and `val2017/`.
    """
    name: str | None = next(iter(side.names.values()), None)
    if name is None:
        return None
    parent = Path(os.path.realpath(side.path.parent))
    short = side.path.stem.removeprefix("panoptic_")
    candidates = (parent / "images", parent / short, parent.parent / short, parent.parent / "images", parent)
    try:
        return next((folder for folder in candidates if os.path.isfile(find_photograph(folder, name))), None)
    except ValueError:  # not a file name
        return None
