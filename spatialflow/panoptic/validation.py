# SPDX-License-Identifier: Apache-2.0
"""Validation of the JSON, PNGs and photographs of a panoptic data set by the rules of `rules`, without torch."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from spatialflow.panoptic.extents import extents
from spatialflow.panoptic.formats import load_json, read_id_map
from spatialflow.panoptic.photographs import find_photograph
from spatialflow.panoptic.quality import default_folder, with_progress
from spatialflow.panoptic.rules import PanopticFormatError, Problem, json_problems, pixel_problems, segment_id
from spatialflow.threads import available_cores


class Validation(NamedTuple):
    """The result of `validate`."""

    images: int  # number of annotations checked
    segments: int
    problems: list[Problem]  # of annotations, images and categories in the JSON, then of each annotation's files


def validate(
    json_path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> Validation:
    """Find all breaches of the rules of `docs/annotations.md` in a panoptic data set.

    Args:
        json_path: COCO panoptic JSON.
        folder: folder of its PNGs; None for the JSON's path without its suffix.
        images: folder of the photographs, which are decoded as in training; None: they are not checked.
        workers: threads; default: one per core. The result does not depend on it.
        progress: show a progress bar on standard error.

    Raises:
        PanopticFormatError: the file is absent or not a panoptic JSON, or a folder is absent.
        ValueError: workers is less than 1.

    Example:
        >>> from spatialflow import panoptic
        >>> result = panoptic.validate("panoptic_val2017.json", images="val2017")    # doctest: +SKIP
        >>> [(p.image, p.segment, p.rule, p.value) for p in result.problems]        # doctest: +SKIP
        [(139, 3226956, 'area-pixels', 2000)]
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    content = load_json(json_path)
    problems = list(json_problems(content))
    if any(problem.rule == "json" for problem in problems):
        raise PanopticFormatError(f"{json_path}: {problems[0].text}", "json")
    folder = Path(default_folder(json_path) if folder is None else folder)
    for path in (folder, images):
        if path is not None and not os.path.isdir(path):
            raise PanopticFormatError(f"{path}: no such folder")
    # Malformed entries have been reported, and are left out from here on.
    malformed = {problem.entry for problem in problems if problem.entry}
    rows: dict[int | str, Mapping[str, Any]] = {}
    for i, row in enumerate(_list(content, "images")):
        if f"images[{i}]" not in malformed:
            rows.setdefault(row["id"], row)
    checked = []
    for i, annotation in enumerate(content["annotations"]):
        if f"annotations[{i}]" not in malformed:
            usable, unusable = [], []
            for j, segment in enumerate(annotation["segments_info"]):
                if f"annotations[{i}]: segments_info[{j}]" not in malformed:
                    usable.append(segment)
                elif (number := segment_id(segment)) is not None:
                    unusable.append(number)
            checked.append((annotation | {"segments_info": usable}, unusable))

    def check(annotation: Mapping[str, Any], unusable: Sequence[int]) -> list[Problem]:
        return _image_problems(annotation, unusable, rows.get(annotation["image_id"]), folder, images)

    with ThreadPoolExecutor(workers or available_cores()) as pool:
        futures = [pool.submit(check, *item) for item in checked]
        try:
            for future in with_progress(futures, "validate", progress):
                problems += future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return Validation(len(checked), sum(len(annotation["segments_info"]) for annotation, _ in checked), problems)


def _list(content: Mapping[str, Any], field: str) -> list[Any]:
    return content[field] if isinstance(content.get(field), list) else []


def _image_problems(
    annotation: Mapping[str, Any],
    unusable: Sequence[int],
    row: Mapping[str, Any] | None,
    folder: Path,
    images: str | os.PathLike[str] | None,
) -> list[Problem]:
    """Find the problems of one image's PNG and photograph.

    Args:
        annotation: with its valid segments.
        unusable: ids of its malformed segments.
        row: the image's entry in the JSON's `images`; None if it has none.
        folder: of the PNGs.
        images: folder of the photographs; None: they are not checked.
    """
    image = annotation["image_id"]
    problems: list[Problem] = []
    size = None
    try:
        id_map = read_id_map(folder / annotation["file_name"])
    except PanopticFormatError as error:
        problems.append(
            Problem(cast("str", error.rule), f"image {image}: {error}", image, value=annotation["file_name"])
        )
    else:
        size = (id_map.shape[1], id_map.shape[0])
        problems += pixel_problems(annotation["segments_info"], image, extents(id_map), unusable)
    if row is not None and size not in (None, (row["width"], row["height"])):
        text = f"image {image}: the PNG has {size[0]}x{size[1]} pixels, `images` has {row['width']}x{row['height']}"
        problems.append(Problem("image-size", text, image, value=f"{size[0]}x{size[1]}"))
    if images is not None and row is not None:
        problems += _photograph_problems(image, row["file_name"], Path(images), size)
    return problems


def _photograph_problems(image: int | str, name: str, folder: Path, size: tuple[int, int] | None) -> list[Problem]:
    from spatialflow.images import ImageError, read_image

    path = find_photograph(folder, name)
    if not os.path.isfile(path):
        return [Problem("photograph", f"image {image}: {path}: no such file", image, value=name)]
    try:
        height, width, _ = read_image(path).shape
    except ImageError as error:
        return [Problem("photograph", f"image {image}: {error}", image, value=name)]
    photograph_size = (width, height)
    if size in (None, photograph_size):
        return []
    text = f"image {image}: {path} has {photograph_size[0]}x{photograph_size[1]} pixels, the PNG {size[0]}x{size[1]}"
    return [Problem("photograph-size", text, image, value=f"{photograph_size[0]}x{photograph_size[1]}")]
