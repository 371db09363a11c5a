# SPDX-License-Identifier: Apache-2.0
"""Panoptic quality of a folder of predictions on disk: 40 pairs of 640x480 PNGs, one core."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import Benchmark, Problem, main, optional
from panoptic_scenes import id_map

from spatialflow.panoptic import evaluate, write_id_map

pillow = optional("PIL.Image")
CATEGORIES = [{"id": index, "isthing": int(index < 20)} for index in range(40)]
_folder = tempfile.TemporaryDirectory(prefix="spatialflow-benchmark-")


def setup(images: int) -> Problem:
    root = Path(_folder.name)
    contents = {"gt": {"annotations": [], "categories": CATEGORIES}, "pred": {"annotations": []}}
    for image_id in range(images):
        truth = id_map()
        for name, ids in (("gt", truth), ("pred", torch.roll(truth, (3, 5), dims=(0, 1)))):
            file_name = f"{image_id}.png"
            write_id_map(root / name / file_name, ids.numpy())
            listed, areas = np.unique(ids, return_counts=True)
            segments = [
                {"id": int(i), "category_id": int(i) % len(CATEGORIES), "area": int(area), "iscrowd": 0}
                for i, area in zip(listed, areas)
                if i != 0
            ]
            contents[name]["annotations"].append(
                {"image_id": image_id, "file_name": file_name, "segments_info": segments}
            )
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return Problem(inputs=(str(root / "gt.json"), str(root / "gt"), str(root / "pred.json"), str(root / "pred")))


def as_array(per_class: dict) -> np.ndarray:
    """Return (categories, 4): summed IoU, tp, fp, fn."""
    return np.array([[float(per_class[c["id"]][key]) for key in ("iou", "tp", "fp", "fn")] for c in CATEGORIES])


def with_pillow_and_numpy(gt_json, gt_folder, pred_json, pred_folder):
    """Decode with Pillow and count with numpy.unique, image by image, as panopticapi does on one core."""
    truth, prediction = (json.loads(Path(path).read_text()) for path in (gt_json, pred_json))
    predicted = {annotation["image_id"]: annotation for annotation in prediction["annotations"]}
    result = {category["id"]: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0} for category in truth["categories"]}
    for annotation in truth["annotations"]:
        predicted_annotation = predicted[annotation["image_id"]]
        gt_ids, pred_ids = (
            _ids(Path(folder) / entry["file_name"])
            for folder, entry in ((gt_folder, annotation), (pred_folder, predicted_annotation))
        )
        gt_of = {segment["id"]: segment for segment in annotation["segments_info"]}
        pred_of = {segment["id"]: segment["category_id"] for segment in predicted_annotation["segments_info"]}
        pred_area = dict(zip(*(values.tolist() for values in np.unique(pred_ids, return_counts=True))))
        keys, counts = np.unique(gt_ids.astype(np.uint64) * (1 << 24) + pred_ids.astype(np.uint64), return_counts=True)
        shared = {(int(key) >> 24, int(key) & 0xFFFFFF): int(count) for key, count in zip(keys, counts)}
        matched_gt, matched_pred = set(), set()
        for (g, p), count in shared.items():
            if g not in gt_of or p not in pred_of or gt_of[g]["category_id"] != pred_of[p]:
                continue
            iou = count / (pred_area[p] + gt_of[g]["area"] - count - shared.get((0, p), 0))
            if iou > 0.5:
                result[pred_of[p]]["tp"] += 1
                result[pred_of[p]]["iou"] += iou
                matched_gt.add(g)
                matched_pred.add(p)
        for g in gt_of.keys() - matched_gt:
            result[gt_of[g]["category_id"]]["fn"] += 1
        for p in pred_of.keys() - matched_pred:
            if shared.get((0, p), 0) / pred_area[p] <= 0.5:
                result[pred_of[p]]["fp"] += 1
    return as_array(result)


def _ids(path: Path) -> np.ndarray:
    colors = np.array(pillow.open(path), dtype=np.uint32)
    return colors[:, :, 0] + 256 * colors[:, :, 1] + 256 * 256 * colors[:, :, 2]


BENCHMARK = Benchmark(
    name="panoptic_evaluate",
    title="40 pairs of 640x480 PNGs from disk to panoptic quality, one thread",
    setup=setup,
    sweep={"40 pairs": {"images": 40}},
    providers={
        "spatialflow": lambda *paths: as_array(evaluate(*paths, workers=1)["per_class"]),
        "pillow + numpy": pillow and with_pillow_and_numpy,
    },
    oracle=with_pillow_and_numpy,
    tolerance=1e-9,
)

if __name__ == "__main__":
    main(BENCHMARK)
