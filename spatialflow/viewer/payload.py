# SPDX-License-Identifier: Apache-2.0
"""The data of the page as JSON-serializable mappings: all images, scores, classes, and the segments of one image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatialflow.images import ImageError
from spatialflow.panoptic.extents import Extent, extents
from spatialflow.panoptic.quality import Matches, PanopticQuality, image_quality
from spatialflow.panoptic.rules import VOID, PanopticFormatError, is_finite
from spatialflow.viewer.catalog import OTHER_SIDE, PREDICTION_SIDE, TRUTH_SIDE, Catalog, ViewError
from spatialflow.viewer.pictures import Pictures
from spatialflow.viewer.scan import BINS, SMALLEST_SHARE, Scan, map_problems

UNLISTED_COLOR = (255, 0, 255)
"""Color (red, green, blue) of segments that are in the PNG and not in the JSON."""


def index_payload(catalog: Catalog, indices: Sequence[int]) -> dict[str, Any]:
    """List the images `indices` with what is known without reading a PNG: a column for each value.

    Classes of an image are positions in `categories`.
    """
    position = {number: i for i, number in enumerate(catalog.categories)}
    columns: dict[str, list[Any]] = {
        name: [] for name in ("names", "segments", "scores", "classes", "truth", "problems")
    }
    for index in indices:
        image = catalog.images[index]
        annotation = catalog.annotation(image, catalog.main.key)
        segments = [] if annotation is None else annotation["segments_info"]
        scores = [float(segment["score"]) for segment in segments if is_finite(segment.get("score"))]
        shown = {
            position[segment["category_id"]]
            for key in catalog.sides
            if (row := catalog.annotation(image, key)) is not None
            for segment in row["segments_info"]
        }
        columns["names"].append(image.name)
        columns["segments"].append(len(segments))
        columns["scores"].append(round(sum(scores) / len(scores), 4) if scores else None)
        columns["classes"].append(sorted(shown))
        columns["truth"].append(TRUTH_SIDE in image.ids)
        columns["problems"].append(len(image.problems))
    return {
        "sides": [{"key": side.key, "title": side.title, "path": str(side.path)} for side in catalog.sides.values()],
        "main": catalog.main.key,
        "scored": [
            key for key in (PREDICTION_SIDE, OTHER_SIDE) if key in catalog.sides and TRUTH_SIDE in catalog.sides
        ],
        "categories": [
            {"id": row.id, "name": row.name, "thing": row.isthing, "color": list(row.color)}
            for row in catalog.categories.values()
        ],
        "bins": {"count": BINS, "smallest_share": SMALLEST_SHARE},
        "warnings": catalog.warnings,
        "notes": [*catalog.missing, *catalog.notes],
        "total": len(catalog.images),
        **columns,
    }


def scores_payload(catalog: Catalog, scan: Scan, position: int, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """List the scores computed since a position, as [index, PQ, PQ of the other predictions, number of problems].

    With `indices`, the images of the page, other images are left out, and an index is a position in `indices`.
    """
    position = max(0, position)
    scores = scan.since(position)
    place = None if indices is None else {index: i for i, index in enumerate(indices)}
    rows = [
        [
            score.index if place is None else place[score.index],
            _rounded(score.pq.get(PREDICTION_SIDE)),
            _rounded(score.pq.get(OTHER_SIDE)),
            len(score.problems) + len(catalog.images[score.index].problems),
        ]
        for score in scores
        if place is None or score.index in place
    ]
    return {"done": position + len(scores), "total": len(catalog.images), "rows": rows}


def _rounded(quality: float | None) -> float | None:
    return None if quality is None else round(quality, 5)


def image_payload(catalog: Catalog, scan: Scan, pictures: Pictures, index: int) -> dict[str, Any]:
    """Describe one image: the segments of every side with area, score, color and match, and all problems.

    Args:
        catalog: the images.
        scan: computes the PQ.
        pictures: knows the sizes of the photographs.
        index: of the image.
    """
    image = catalog.images[index]
    problems = list(image.problems)
    maps: dict[str, np.ndarray] = {}
    sides: dict[str, Any] = {}
    for key, side in catalog.sides.items():
        annotation = catalog.annotation(image, key)
        if annotation is None:
            continue
        try:
            maps[key] = catalog.read_map(index, key)
        except (PanopticFormatError, ViewError) as error:
            problems.append(str(error))
            continue
        extent_of = extents(maps[key])
        problems += map_problems(side, annotation, extent_of)
        segments = _segments(catalog, annotation["segments_info"], extent_of)
        height, width = maps[key].shape
        sides[key] = {"width": width, "height": height, "segments": segments, "id": image.ids[key]}
    counts, unscored = scan.counts(image, maps)
    problems += unscored
    for key in counts:
        _add_matches(catalog, index, key, maps, sides)
    sizes = {(row["width"], row["height"]) for row in sides.values()}
    if len(sizes) > 1 and not unscored:
        problems.append("the maps have different sizes: " + ", ".join(f"{w}x{h}" for w, h in sorted(sizes)))
    payload: dict[str, Any] = {"name": image.name, "sides": sides, "photo": False}
    try:
        width, height = pictures.photograph_size(index)
    except (ViewError, ImageError) as error:
        problems.append(str(error))
    else:
        payload["photo"] = True
        if sizes and (width, height) not in sizes:
            map_width, map_height = max(sizes)
            problems.append(f"the photograph is {width}x{height} pixels, the map {map_width}x{map_height}")
        sizes = sizes or {(width, height)}
    if sizes:
        width, height = max(sizes)
        payload |= {"width": width, "height": height, "shown": pictures.shown_size(width, height)}
    payload["pq"] = {key: _rounded(image_quality(row)) for key, row in counts.items()}
    payload["problems"] = list(dict.fromkeys(problems))
    return payload


def _segments(catalog: Catalog, listed: list[dict[str, Any]], extent_of: Mapping[int, Extent]) -> list[dict[str, Any]]:
    """Describe the segments of a map: those that the JSON lists, then others."""
    color_of = catalog.colors(listed)
    unlisted = extent_of.keys() - {VOID}
    rows: list[dict[str, Any]] = []
    for segment in listed:
        extent = extent_of.get(segment["id"])
        unlisted.discard(segment["id"])
        row = {
            "id": segment["id"],
            "category": segment["category_id"],
            "area": 0 if extent is None else extent.pixels,
            "color": list(color_of[segment["id"]]),
        }
        if is_finite(segment.get("score")):
            row["score"] = segment["score"]
        if segment.get("iscrowd", 0) == 1:
            row["crowd"] = True
        rows.append(row)
    for number in sorted(unlisted):
        rows.append({"id": number, "category": None, "area": extent_of[number].pixels, "color": list(UNLISTED_COLOR)})
    return rows


def _add_matches(catalog: Catalog, index: int, key: str, maps: dict[str, np.ndarray], sides: dict[str, Any]) -> None:
    """Add `status` to the segments of a scored side and of the ground truth, there by the key of that side."""
    image, truth = catalog.images[index], catalog.sides[TRUTH_SIDE]
    annotations = [catalog.annotation(image, name) for name in (TRUTH_SIDE, key)]
    assert annotations[0] is not None and annotations[1] is not None
    quality = PanopticQuality({row["id"]: row.get("isthing") == 1 for row in truth.categories})
    gt, pred = annotations[0]["segments_info"], annotations[1]["segments_info"]
    matches = quality.match(maps[TRUTH_SIDE], gt, maps[key], pred, image.name)
    gt_rows, pred_rows = ({row["id"]: row for row in sides[name]["segments"]} for name in (TRUTH_SIDE, key))
    confused = _confused(matches, gt_rows, pred_rows)
    for row in gt_rows.values():
        row.setdefault("status", {})[key] = "crowd" if row.get("crowd") else "none"
    for row in pred_rows.values():
        row["status"] = {key: "ignored" if row["category"] is not None else "none"}
    for number in matches.false_negatives:
        gt_rows[number]["status"][key] = "fn"
    for number in matches.false_positives:
        pred_rows[number]["status"][key] = "fp"
    for (gt_id, pred_id), iou in matches.iou_of.items():
        gt_rows[gt_id]["status"][key] = pred_rows[pred_id]["status"][key] = "tp"
        for row in (gt_rows[gt_id], pred_rows[pred_id]):
            row.setdefault("iou", {})[key] = _rounded(iou)
    for gt_id, pred_id in confused:
        gt_rows[gt_id]["status"][key] = pred_rows[pred_id]["status"][key] = "wrong"
        gt_rows[gt_id].setdefault("instead", {})[key] = pred_rows[pred_id]["category"]
        pred_rows[pred_id].setdefault("instead", {})[key] = gt_rows[gt_id]["category"]


def _confused(
    matches: Matches, gt_rows: dict[int, dict[str, Any]], pred_rows: dict[int, dict[str, Any]]
) -> list[tuple[int, int]]:
    """List the pairs of a false negative and a false positive that would match if they had one class."""
    missed, wrong = set(matches.false_negatives), set(matches.false_positives)
    pairs = []
    for (gt_id, pred_id), shared in matches.shared.items():
        if gt_id in missed and pred_id in wrong and gt_rows[gt_id]["category"] != pred_rows[pred_id]["category"]:
            void = matches.shared.get((VOID, pred_id), 0)
            if shared > 0.5 * (gt_rows[gt_id]["area"] + pred_rows[pred_id]["area"] - shared - void):
                pairs.append((gt_id, pred_id))
    return pairs
