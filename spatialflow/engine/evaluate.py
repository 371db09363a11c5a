# SPDX-License-Identifier: Apache-2.0
"""Scoring a network on a data set: panoptic quality, and average precision of boxes and masks."""

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spatialflow.data.transforms import ImageError
from spatialflow.engine.distributed import World
from spatialflow.engine.predict import PanopticResult, Predictor
from spatialflow.files import atomic_write
from spatialflow.panoptic.formats import PanopticFormatError, PanopticWriter, read_id_map, read_panoptic_json
from spatialflow.panoptic.quality import evaluate


class ScoredData(Protocol):
    """What scoring needs of a data set."""

    names: list[str]
    image_ids: list

    def __len__(self) -> int: ...

    def image_path(self, index: int) -> Path: ...

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]: ...


def evaluate_network(
    predictor: Predictor, data: ScoredData, folder: Path, world: World, progress: bool = False
) -> dict[str, Any]:
    """Predicts every image of a data set and scores the results; several processes share the images.

    Args:
        predictor: the network.
        data: images with ground truth.
        folder: gets `panoptic.json`, `panoptic/` (PNGs), `detections.json` (COCO results) and `scores.json`.
        world: the processes.
        progress: show a bar.

    Returns:
        As `panoptic.evaluate`, and under "detection" as `average_precision` (None where pycocotools is missing); under
        "problems" messages about images and annotations that cannot be read, which are left out. The same on every
        process.
    """
    truth, truth_folder, problems = _usable_truth(data, folder, world)
    by_id = {image_id: index for index, image_id in enumerate(data.image_ids)}
    wanted = truth["annotations"][world.rank :: world.size]
    if progress and world.is_first:
        from tqdm import tqdm

        wanted = tqdm(wanted, desc="evaluate", leave=False)
    writer = PanopticWriter(folder / "panoptic", folder / "panoptic.json", predictor.categories.as_coco())
    detections, lost = [], set()
    for annotation in wanted:
        image_id = annotation["image_id"]
        try:
            result = predictor(data.image_path(by_id[image_id]))
        except ImageError as error:
            problems.append(str(error))
            lost.add(image_id)
            continue
        writer.add(image_id, data.names[by_id[image_id]], result.id_map, result.segments)
        detections += detection_rows(result, image_id)
    parts = world.gather((writer, detections, problems, lost))
    if world.is_first:
        merged = parts[0][0]
        for part in parts[1:]:
            merged.extend(part[0])
        merged.write_json()
        lost = set().union(*(part[3] for part in parts))
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] not in lost]
        rows = [row for part in parts for row in part[1]]
        with atomic_write(folder / "detections.json", "w") as file:
            json.dump(rows, file)
        scores = evaluate(truth, truth_folder, folder / "panoptic.json", folder / "panoptic")
        scores["detection"] = average_precision(truth, truth_folder, rows)
        scores["problems"] = [message for part in parts for message in part[2]]
        with atomic_write(folder / "scores.json", "w") as file:
            json.dump(scores, file, indent=1)
    return world.gather(scores if world.is_first else None)[0]


def _usable_truth(data: ScoredData, folder: Path, world: World) -> tuple[dict[str, Any], Path, list[str]]:
    """The ground truth without the images whose annotation cannot be read, its folder, and (in the first process)
    their messages.
    """
    if world.is_first:
        data.panoptic_truth(folder)  # data sets that must write it do so once, before the others look for it
    world.wait()
    json_path, png_folder = data.panoptic_truth(folder)
    content = read_panoptic_json(json_path, with_categories=True)
    listed = {annotation["image_id"] for annotation in content["annotations"]}
    problems = [
        f"{name}: has no ground truth that can be read"
        for name, image_id in zip(data.names, data.image_ids)
        if image_id not in listed
    ]
    usable = []
    for annotation in content["annotations"]:
        try:
            read_id_map(png_folder / annotation["file_name"])
        except PanopticFormatError as error:
            problems.append(str(error))
        else:
            usable.append(annotation)
    return {**content, "annotations": usable}, png_folder, problems if world.is_first else []


def detection_rows(result: PanopticResult, image_id: Any) -> list[dict[str, Any]]:
    """An image's detections as COCO results: `bbox` in (x, y, width, height), and `segmentation` as RLE where there
    are masks and pycocotools is installed."""
    rows = [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "score": float(score),
        }
        for (x1, y1, x2, y2), score, label in zip(result.boxes.astype(float), result.scores, result.labels)
    ]
    with contextlib.suppress(ImportError):
        masks = result.masks
        for row, mask in zip(rows, () if masks is None else masks):
            row["segmentation"] = encode_mask(mask)
    return rows


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> COCO RLE with a text of counts, as JSON holds it."""
    from pycocotools import mask as coco_mask

    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def detection_truth(content: Mapping[str, Any], panoptic_folder: str | os.PathLike) -> dict[str, Any]:
    """The things of a panoptic ground truth (content of its JSON) in COCO's detection format, masks as RLE, crowds
    marked.
    """
    things = {row["id"] for row in content["categories"] if row["isthing"]}
    images, annotations = [], []
    for annotation in content["annotations"]:
        id_map = read_id_map(Path(panoptic_folder) / annotation["file_name"])
        images.append({"id": annotation["image_id"], "height": id_map.shape[0], "width": id_map.shape[1]})
        for segment in annotation["segments_info"]:
            if segment["category_id"] in things:
                mask = id_map == segment["id"]
                rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
                box = (
                    [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
                    if len(rows)
                    else [0] * 4
                )
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": annotation["image_id"],
                        "area": int(mask.sum()),
                        "category_id": segment["category_id"],
                        "iscrowd": int(segment.get("iscrowd", 0)),
                        "bbox": segment.get("bbox", box),
                        "segmentation": encode_mask(mask),
                    }
                )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [row for row in content["categories"] if row["isthing"]],
    }


def average_precision(
    content: Mapping[str, Any], panoptic_folder: str | os.PathLike, results: list[dict[str, Any]]
) -> Any:
    """COCO's average precision of boxes and masks, by pycocotools.

    Args:
        content: panoptic ground truth, as its JSON holds it; its things are the objects.
        panoptic_folder: its PNGs.
        results: rows of `detection_rows`.

    Returns:
        {"box": {...}, "mask": {...}} with `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large` (-1 where
        nothing of that kind is annotated); "mask" only where the results have masks. None where pycocotools is missing.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        return None
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    kinds = ["box"] + (["mask"] if results and all("segmentation" in row for row in results) else [])
    if not results:
        return {"box": dict.fromkeys(names, 0.0)}
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = detection_truth(content, panoptic_folder)
        truth.createIndex()
        for kind in kinds:
            rows = [
                {key: value for key, value in row.items() if kind == "mask" or key != "segmentation"} for row in results
            ]
            if (
                kind == "mask"
            ):  # pycocotools takes areas, by which it sorts objects into sizes, from the box where there is one
                rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
            scorer = COCOeval(truth, truth.loadRes(rows), "segm" if kind == "mask" else "bbox")
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
            scores[kind] = dict(zip(names, (float(value) for value in scorer.stats[:6])))
    return scores
