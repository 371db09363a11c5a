# SPDX-License-Identifier: Apache-2.0
"""Numbers about a panoptic data set: segments per class, sizes of images, and notes on what may hurt training."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spatialflow.panoptic.extents import Extent, extents
from spatialflow.panoptic.formats import load_json, read_id_map
from spatialflow.panoptic.photographs import photograph_names
from spatialflow.panoptic.quality import default_folder, with_progress
from spatialflow.panoptic.rules import VOID, PanopticFormatError, is_color, segment_id
from spatialflow.threads import available_cores

USUAL_SHORT, USUAL_LONG = 800, 1333
"""Sides to which networks for photographs scale images, in pixels."""

_TINY_SIDE = 8  # pixels at that scale: about the smallest anchor's size and the stride of the finest level
_VARIED = 4  # ratio of the largest to the smallest image, in pixels on the longer side


class ClassNumbers(NamedTuple):
    """One class of a data set."""

    category: Mapping[str, Any]  # id, name, isthing and, where it is valid, color
    segments: int  # without crowds
    images: int  # that have a segment, or a crowd
    crowds: int
    share: float  # of all pixels, 0 to 1
    median_area: float  # of its segments, in pixels; NaN for none


class Survey(NamedTuple):
    """The result of `survey`."""

    classes: list[ClassNumbers]  # in the order of the JSON
    sizes: Counter[tuple[int, int]]  # images by (height, width)
    void_share: float  # of all pixels
    thing_areas: dict[tuple[int, int], list[int]]  # pixels of things by the (height, width) of their image
    without_segment: list[str]  # file names
    examples: list[dict[str, Any]]  # images that show rare classes: file_name of the PNG, name, segments_info


def survey(
    json_path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    examples: int = 16,
    workers: int | None = None,
    progress: bool = False,
) -> Survey:
    """Count the segments and pixels of every class of a panoptic data set.

    Entries and PNGs that cannot be used are left out; `spatialflow.panoptic.validate` reports them.

    Args:
        json_path: COCO panoptic JSON.
        folder: folder of its PNGs; None for the JSON's path without its suffix.
        examples: largest number of example images.
        workers: threads; default: one per core.
        progress: show a progress bar on standard error.

    Raises:
        PanopticFormatError: the file is absent, or is not a panoptic JSON.
    """
    content = load_json(json_path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise PanopticFormatError(f'{json_path}: a panoptic JSON is a mapping with a list "annotations"', "json")
    folder = Path(default_folder(json_path) if folder is None else folder)
    categories = _categories(content)
    annotations = [row for row in content["annotations"] if _is_usable(row)]

    def measure(annotation: Mapping[str, Any]) -> tuple[tuple[int, int], dict[int, Extent]] | None:
        try:
            id_map = read_id_map(folder / annotation["file_name"])
        except (PanopticFormatError, ValueError):
            return None
        return (id_map.shape[0], id_map.shape[1]), extents(id_map)

    counts = _Counts(categories)
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        futures = [pool.submit(measure, annotation) for annotation in annotations]
        try:
            names = photograph_names({"images": content.get("images"), "annotations": annotations})
            measured = with_progress(futures, "count", progress)
            for annotation, name, future in zip(annotations, names, measured, strict=True):
                if (found := future.result()) is not None:
                    counts.add(annotation, name, *found)
        finally:
            pool.shutdown(cancel_futures=True)
    return counts.survey(examples)


class _Counts:
    """Sums over the images read so far.

    Args:
        categories: by id, from `_categories`.
    """

    def __init__(self, categories: dict[int, Mapping[str, Any]]) -> None:
        self._categories = categories
        self._areas: dict[int, list[int]] = {number: [] for number in categories}  # of segments without crowds
        self._pixels: Counter[int] = Counter()
        self._crowds: Counter[int] = Counter()
        self._images: Counter[int] = Counter()
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._thing_areas: dict[tuple[int, int], list[int]] = {}
        self._total = 0
        self._without_segment: list[str] = []
        self._shown: list[tuple[set[int], dict[str, Any]]] = []  # category ids, and an example for `Survey.examples`

    def add(self, annotation: Mapping[str, Any], name: str, size: tuple[int, int], by_id: dict[int, Extent]) -> None:
        """Add an image of (height, width) `size` with the segments that its map has."""
        self._sizes[size] += 1
        self._total += size[0] * size[1]
        present, usable = set(), []
        for segment in annotation["segments_info"]:
            number, category = segment_id(segment), segment["category_id"]
            if number is None or number == VOID or number not in by_id or category not in self._categories:
                continue
            present.add(category)
            usable.append({"id": number, "category_id": category})
            self._add_segment(category, by_id[number].pixels, bool(segment.get("iscrowd")), size)
        self._images.update(present)
        self._shown.append((present, {"file_name": annotation["file_name"], "name": name, "segments_info": usable}))
        if not present:
            self._without_segment.append(name)

    def _add_segment(self, category: int, area: int, is_crowd: bool, size: tuple[int, int]) -> None:
        self._pixels[category] += area
        if is_crowd:
            self._crowds[category] += 1
            return
        self._areas[category].append(area)
        if self._categories[category]["isthing"]:
            self._thing_areas.setdefault(size, []).append(area)

    def survey(self, examples: int) -> Survey:
        """Return the numbers, with at most so many examples."""
        rows = [
            ClassNumbers(
                category,
                len(self._areas[number]),
                self._images[number],
                self._crowds[number],
                self._pixels[number] / self._total if self._total else 0.0,
                float(np.median(self._areas[number])) if self._areas[number] else float("nan"),
            )
            for number, category in self._categories.items()
        ]
        void = 1 - sum(self._pixels.values()) / self._total if self._total else 0.0
        shown = _choose(self._shown, self._images, examples)
        return Survey(rows, self._sizes, void, self._thing_areas, self._without_segment, shown)


def _categories(content: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the categories by id, with name and isthing, and with the color if it is valid."""
    rows = content.get("categories")
    found: dict[int, Mapping[str, Any]] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and type(row.get("id")) is int:
            color = {"color": row["color"]} if is_color(row.get("color")) else {}
            name = str(row.get("name", f"category {row['id']}"))
            found.setdefault(row["id"], {"id": row["id"], "name": name, "isthing": bool(row.get("isthing")), **color})
    return found


def _is_usable(annotation: Any) -> bool:
    return (
        isinstance(annotation, dict)
        and type(annotation.get("image_id")) in (int, str)
        and isinstance(annotation.get("file_name"), str)
        and isinstance(annotation.get("segments_info"), list)
        and all(
            isinstance(segment, dict) and type(segment.get("category_id")) is int
            for segment in annotation["segments_info"]
        )
    )


def _choose(shown: Sequence[tuple[set[int], dict[str, Any]]], images: Counter[int], count: int) -> list[dict[str, Any]]:
    """Choose images that show rare classes, then images evenly spaced in the data set."""
    chosen: list[int] = []
    missing = set(images)
    for category in sorted(images, key=lambda number: (images[number], number)):
        if category in missing and len(chosen) < count:
            index = max(range(len(shown)), key=lambda i: (category in shown[i][0], len(shown[i][0] & missing), -i))
            chosen.append(index)
            missing -= shown[index][0]
    rest = [i for i, (present, _) in enumerate(shown) if i not in chosen and present]
    free = min(count - len(chosen), len(rest))
    chosen += [rest[i * len(rest) // free] for i in range(free)]
    return [shown[i][1] for i in sorted(chosen)]


def advice(result: Survey, chosen_edges: tuple[int, int] | None = None) -> list[str]:
    """List what may hurt training on a data set, as sentences.

    Args:
        result: of `survey`.
        chosen_edges: short and long edge of images in a training run without configuration; None: not considered.
    """
    texts = []
    absent = [row.category["name"] for row in result.classes if not row.images]
    if absent:
        texts.append(f"{_many(len(absent), 'class has', 'classes have')} no example: {_examples(absent)}")
    rare = [row.category["name"] for row in result.classes if 0 < row.images < 10]
    if rare:
        texts.append(f"{_many(len(rare), 'class is', 'classes are')} in fewer than 10 images: {_examples(rare)}")
    if result.without_segment:
        count = len(result.without_segment)
        texts.append(f"{_many(count, 'image has', 'images have')} no segment: {_examples(result.without_segment)}")
    if not any(row.category["isthing"] for row in result.classes if row.images):
        texts.append("there is no thing: segments of one class are not separated")
    if not any(not row.category["isthing"] for row in result.classes if row.images):
        text = "there is no stuff: pixels outside objects are void, and nothing is learned there"
        texts.append(f"{text}; `dataset convert --background NAME` makes them a class")
    if tiny := _tiny_things(result, chosen_edges):
        texts.append(tiny)
    if result.sizes:
        longest = [max(size) for size in result.sizes]
        if max(longest) >= _VARIED * min(longest):
            texts.append(
                f"image sizes vary greatly: the longer side has {min(longest)} to {max(longest)} pixels; a crop or one "
                "size for all makes batches even"
            )
        large = sum(count for size, count in result.sizes.items() if max(size) > 2 * USUAL_LONG)
        if large:
            images = _many(large, "image is", "images are")
            texts.append(
                f"{images} more than twice as large as networks see ({USUAL_SHORT} x {USUAL_LONG}); smaller copies "
                "make reading faster, and tiles keep small objects"
            )
    return texts


def _tiny_things(result: Survey, chosen_edges: tuple[int, int] | None) -> str:
    """Describe how many things are smaller than 8 x 8 pixels where a network sees them; "" if none are."""
    things = sum(map(len, result.thing_areas.values()))

    def count(short: int, long: int) -> int:
        tiny = 0
        for size, areas in result.thing_areas.items():
            scale = min(short / min(size), long / max(size), 1)
            tiny += sum(area * scale * scale < _TINY_SIDE**2 for area in areas)
        return tiny

    usual = (USUAL_SHORT, USUAL_LONG)
    short, long = usual if chosen_edges is None else chosen_edges
    number = count(short, long)
    if not number:
        return ""
    text = (
        f"{number} of {things} things ({100 * number / things:.1f} %) are smaller than {_TINY_SIDE} x {_TINY_SIDE} "
        f"pixels once images are reduced to at most {short} x {long}"
    )
    if chosen_edges is None:
        return text
    at_usual = count(*usual)
    return (
        f"{text}, which `train` chooses on its own; at {USUAL_SHORT} x {USUAL_LONG} it is {at_usual} "
        f"({100 * at_usual / things:.1f} %)"
    )


def _many(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _examples(names: Sequence[str]) -> str:
    return ", ".join(f"{name:.80}" for name in names[:8]) + ", ..." * (len(names) > 8)
