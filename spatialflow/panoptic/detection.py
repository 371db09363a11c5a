# SPDX-License-Identifier: Apache-2.0
"""COCO average precision of boxes and masks against a panoptic ground truth. Torch is not imported."""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow.panoptic.extents import Extent, extents
from spatialflow.panoptic.formats import read_id_map
from spatialflow.panoptic.rules import PanopticFormatError, box_of, is_box, is_finite


def detection_rows(result: Any, image_id: Any) -> list[dict[str, Any]]:
    """Convert the detections of a `PanopticResult` to COCO results.

    Args:
        result: a `PanopticResult`.
        image_id: id of its image.

    Returns:
        A row per detection with `bbox` as [x, y, width, height], and with `segmentation` (RLE) where there are masks.
    """
    rows = [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "score": float(score),
        }
        for (x1, y1, x2, y2), score, label in zip(result.boxes.astype(float), result.scores, result.labels, strict=True)
    ]
    masks = result.masks
    if masks is not None:
        for row, mask in zip(rows, masks, strict=True):
            row["segmentation"] = encode_mask(mask)
    return rows


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) bool as COCO RLE with counts as a string, for JSON."""
    from pycocotools import mask as coco_mask

    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts: Any = code["counts"]  # always bytes, whatever the type stub of pycocotools says
    return {"size": code["size"], "counts": counts.decode("ascii")}


def detection_truth(content: Mapping[str, Any], panoptic_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Convert the things of a panoptic ground truth to COCO's detection format, with masks as RLE and with crowds.

    A box that contradicts the mask is replaced by the box of the mask.

    Args:
        content: content of the panoptic JSON.
        panoptic_folder: folder of the PNGs.
    """
    things = {row["id"] for row in content["categories"] if row["isthing"]}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for annotation in content["annotations"]:
        id_map = read_id_map(Path(panoptic_folder) / annotation["file_name"])
        extent_by_id = extents(id_map)
        images.append({"id": annotation["image_id"], "height": id_map.shape[0], "width": id_map.shape[1]})
        for segment in annotation["segments_info"]:
            if segment["category_id"] in things:
                extent = extent_by_id.get(segment["id"], Extent(0, 0, 0, 0, 0))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": annotation["image_id"],
                        "area": extent.pixels,
                        "category_id": segment["category_id"],
                        "iscrowd": int(segment.get("iscrowd", 0)),
                        "bbox": box_of(segment, extent),
                        "segmentation": encode_mask(id_map == segment["id"]),
                    }
                )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [row for row in content["categories"] if row["isthing"]],
    }


def average_precision(
    content: Mapping[str, Any], panoptic_folder: str | os.PathLike[str], results: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Compute COCO average precision of boxes and masks with pycocotools.

    Args:
        content: content of the panoptic ground truth's JSON, whose things are the objects.
        panoptic_folder: folder of its PNGs.
        results: rows of `detection_rows`; those of images outside the ground truth are left out.

    Returns:
        {"box": {...}, "mask": {...}} with `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`. A value is -1
        where no object of that size is annotated; all are 0 if there are no results. "mask" is present if all results
        have masks.

    Raises:
        PanopticFormatError: no result is of an image of the ground truth, or a mask differs in size from its image.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    images = {annotation["image_id"] for annotation in content["annotations"]}
    all_results, results = results, [row for row in results if row["image_id"] in images]
    if all_results and not results:
        raise PanopticFormatError(
            f"detections: none of the {len(all_results)} rows has an image_id of the ground truth; the first has "
            f"{all_results[0]['image_id']!r}"
        )
    kinds = ["box"] + (["mask"] if results and all("segmentation" in row for row in results) else [])
    if not results:
        return {"box": dict.fromkeys(names, 0.0)}
    dataset = detection_truth(content, panoptic_folder)
    if "mask" in kinds:
        _check_mask_sizes({image["id"]: image for image in dataset["images"]}, results)
    numbers = _numbers(images)
    dataset["images"] = [image | {"id": numbers[image["id"]]} for image in dataset["images"]]
    dataset["annotations"], results = (
        [row | {"image_id": numbers[row["image_id"]]} for row in rows] for rows in (dataset["annotations"], results)
    )
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()  # the stubs of pycocotools declare other dictionary types
        truth.dataset = dataset
        truth.createIndex()
        for kind in kinds:
            # pycocotools would take the area of a mask, by which it groups objects by size, from the box.
            omitted = "bbox" if kind == "mask" else "segmentation"
            rows = [{key: value for key, value in row.items() if key != omitted} for row in results]
            scorer = COCOeval(truth, truth.loadRes(rows), "segm" if kind == "mask" else "bbox")
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
            scores[kind] = dict(zip(names, map(float, scorer.stats[:6]), strict=True))
    return scores


def _numbers(image_ids: Iterable[int | str]) -> dict[int | str, int]:
    """Number the image ids, as pycocotools stores ids in an array, which cannot mix integers and strings.

    The numbers are in the order of the ids, because pycocotools ranks detections of equal scores by image id.
    """
    ordered = sorted(image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    return {image_id: number for number, image_id in enumerate(ordered)}


def rename_images(results: list[dict[str, Any]], prediction_of: Mapping[int | str, int | str]) -> list[dict[str, Any]]:
    """Replace the image ids of the predictions by those of the ground truth.

    Args:
        results: rows of COCO results.
        prediction_of: image_id of the ground truth -> image_id of the prediction, from `join_images`.

    Returns:
        The rows of images of the ground truth. If no row has an id of the predictions, all rows are unchanged: they may
        have been written with the ids of the ground truth.
    """
    image_of = {predicted: image for image, predicted in prediction_of.items()}
    renamed = [row | {"image_id": image_of[row["image_id"]]} for row in results if row["image_id"] in image_of]
    return renamed or results


def _check_mask_sizes(images: Mapping[Any, Mapping[str, Any]], results: list[dict[str, Any]]) -> None:
    """Raise PanopticFormatError if a mask differs in size from its image; pycocotools would report no overlap."""
    for row in results:
        (height, width), image = row["segmentation"]["size"], images[row["image_id"]]
        if (height, width) != (image["height"], image["width"]):
            raise PanopticFormatError(
                f"detections: mask of {width}x{height} pixels, "
                f"image {row['image_id']} has {image['width']}x{image['height']}"
            )


def read_detections(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read COCO results from a JSON file.

    Raises:
        PanopticFormatError: the file cannot be read or is not a JSON list, or a field of a row is absent or invalid.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PanopticFormatError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(rows, list):
        raise PanopticFormatError(f"{path}: COCO results are a list, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image_id", "category_id", "bbox", "score"} <= row.keys():
            raise PanopticFormatError(f'{path}: row {i} must have "image_id", "category_id", "bbox" and "score"')
        # JSON's true and false are integers to isinstance.
        if type(row["image_id"]) not in (int, str) or type(row["category_id"]) is not int:
            ids = f"{row['image_id']!r:.40} and {row['category_id']!r:.40}"
            raise PanopticFormatError(f"{path}: row {i}: image_id and category_id must be ids, got {ids}")
        if not is_box(row["bbox"]) or not is_finite(row["score"]):
            values = f"{row['bbox']!r:.80} and {row['score']!r:.40}"
            raise PanopticFormatError(f"{path}: row {i}: bbox must be four numbers and score one, got {values}")
        if "segmentation" in row and not _is_rle(row["segmentation"]):
            raise PanopticFormatError(
                f"{path}: row {i}: segmentation must be a COCO RLE, got {row['segmentation']!r:.80}"
            )
    return rows


def _is_rle(code: Any) -> bool:
    """Accept {"size": [height, width], "counts": string} whose runs fill the mask; pycocotools hangs on others."""
    if not isinstance(code, dict) or not isinstance(code.get("counts"), str):
        return False
    size = code.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return False
    runs: list[int] = []
    value = shift = 0
    for character in code["counts"]:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return False
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the end of a number: signed, and from the fourth on relative to the run two before
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return shift == 0 and min(runs, default=-1) >= 0 and sum(runs) == size[0] * size[1]
