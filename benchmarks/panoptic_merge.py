# SPDX-License-Identifier: Apache-2.0
"""panoptic_merge at the size of a COCO image: 60 instances and 54 stuff labels at 480x640."""

import numpy as np
import torch
from harness import Benchmark, Problem, Provider, main, optional
from panoptic_scenes import HEIGHT, WIDTH, ellipses, stuff_map

from spatialflow import ops
from spatialflow.ops import reference

coco_mask = optional("pycocotools.mask")
SCORE, OVERLAP, AREA, BOX = 0.37, 0.37, 4900, 0.5


def setup(count: int, stuff_labels: int, fill: bool) -> Problem:
    masks, boxes = ellipses(count)
    stuff = stuff_map(stuff_labels)
    return Problem(
        inputs=(masks, torch.rand(count) * 0.7 + 0.3, torch.randint(80, (count,)), boxes if fill else None, stuff),
        options={"stuff_labels": stuff_labels},
        bytes=masks.numel()
        + 8 * stuff.numel()
        + 4 * HEIGHT * WIDTH,  # masks and stuff are read once, the id map is written once
    )


def encode(masks, scores, labels, boxes, stuff, stuff_labels):
    """Encode masks as run lengths, the input of a merge with pycocotools; the encoding is not timed."""
    rle = [coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in masks]
    stuff_rle = [
        coco_mask.encode(np.asfortranarray((stuff == s).cpu().numpy().astype(np.uint8))) for s in range(stuff_labels)
    ]
    return rle, scores.cpu().numpy(), None if boxes is None else boxes.cpu().numpy(), stuff_rle


def merge_with_pycocotools(rle, scores, boxes, stuff_rle):
    """Merge run-length encoded masks one by one, with arrays of the size of the image."""
    id_map = np.zeros((HEIGHT, WIDTH), np.int32)
    used, ids, id_of = None, 0, {}
    order = [k for k in np.argsort(-scores, kind="stable") if scores[k] >= SCORE]
    for k in order:
        area = coco_mask.area(rle[k])
        if area == 0:
            continue
        overlap = 0 if used is None else coco_mask.area(coco_mask.merge([used, rle[k]], intersect=True))
        if overlap / area > OVERLAP:
            continue
        used = rle[k] if used is None else coco_mask.merge([used, rle[k]])
        ids += 1
        id_of[k] = ids
        id_map[(coco_mask.decode(rle[k]) == 1) & (id_map == 0)] = ids
    for mask in stuff_rle:
        free = (coco_mask.decode(mask) == 1) & (id_map == 0)
        if free.sum() >= AREA:
            ids += 1
            id_map[free] = ids
    for k in order if boxes is not None else ():
        x1, y1, x2, y2 = boxes[k].astype(int)
        box = np.zeros((HEIGHT, WIDTH), bool)
        box[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = True
        free = box & (id_map == 0)
        if not free.any() or free.sum() / box.sum() < BOX:
            continue
        if k not in id_of:
            ids += 1
            id_of[k] = ids
        id_map[free] = id_of[k]
    return id_map


BENCHMARK = Benchmark(
    name="panoptic_merge",
    title="60 instances and 54 stuff labels at 480x640; for pycocotools, encoding the masks is not timed",
    setup=setup,
    sweep={
        "masks and stuff": {"count": 60, "stuff_labels": 54, "fill": False},
        "with box fill": {"count": 60, "stuff_labels": 54, "fill": True},
    },
    providers={
        "spatialflow": ops.panoptic_merge,
        "reference": reference.panoptic_merge,
        "numpy + pycocotools": coco_mask and Provider(merge_with_pycocotools, prepare=encode),
    },
    # Only id maps are compared: the baseline with pycocotools returns no tables of segments.
    compare=lambda result, expected: float((as_map(result) != as_map(expected)).mean()),
)


def as_map(result) -> np.ndarray:
    return result if isinstance(result, np.ndarray) else result.id_map.cpu().numpy()


if __name__ == "__main__":
    main(BENCHMARK)
