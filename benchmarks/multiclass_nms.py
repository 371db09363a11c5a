# SPDX-License-Identifier: Apache-2.0
"""multiclass_nms at RetinaNet's size: 5,000 boxes (1,000 per level of P3..P7), 80 classes, 100 detections."""

import torch
from harness import Benchmark, Problem, Provider, main, optional

from spatialflow import ops
from spatialflow.ops import reference

torchvision = optional("torchvision.ops")


def setup(batch: int, sharpness: int, count: int = 5000, classes: int = 80) -> Problem:
    corner = torch.rand(batch, count, 2) * 1000
    boxes = torch.cat([corner, corner + 10 + torch.rand(batch, count, 2) * 200], dim=2)
    return Problem(
        inputs=(boxes, torch.rand(batch, count, classes) ** sharpness),
        options={"score_threshold": 0.05, "iou_threshold": 0.4, "max_detections": 100},
        bytes=4 * batch * count * classes,  # every score is read once
    )


def composed(
    boxes: torch.Tensor, scores: torch.Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> ops.Detections:
    """Compose the operator image by image: threshold, torchvision's batched_nms, best detections, padding."""
    images = []
    for image_boxes, image_scores in zip(boxes, scores):
        index, label = (image_scores > score_threshold).nonzero(as_tuple=True)
        values = image_scores[index, label]
        kept = torchvision.batched_nms(image_boxes[index], values, label, iou_threshold)[:max_detections]
        padding = (0, max_detections - len(kept))
        images.append(
            (
                torch.nn.functional.pad(image_boxes[index[kept]], (0, 0, *padding)),
                torch.nn.functional.pad(values[kept], padding),
                torch.nn.functional.pad(label[kept], padding, value=-1),
                torch.tensor(len(kept)),
                torch.nn.functional.pad(index[kept], padding, value=-1),
            )
        )
    return ops.Detections(*(torch.stack(parts) for parts in zip(*images)))


def largest_score_error(result: ops.Detections, expected: ops.Detections) -> float:
    """Compare scores by rank; rounding at the IoU threshold may keep another box, which moves later rows by one."""
    return float((result.scores.double() - expected.scores.double()).abs().max() / expected.scores.max())


BENCHMARK = Benchmark(
    name="multiclass_nms",
    title="5,000 boxes, 80 classes, 100 detections",
    setup=setup,
    sweep={
        "1 image, 1 % above 0.05": {"batch": 1, "sharpness": 300},
        "1 image, 7 % above 0.05": {"batch": 1, "sharpness": 40},
        "1 image, 18 % above 0.05": {"batch": 1, "sharpness": 15},
        "8 images, 1 % above 0.05": {"batch": 8, "sharpness": 300},
    },
    providers={
        "spatialflow": ops.multiclass_nms,
        "torchvision, composed": torchvision and Provider(composed, waits=True),
    },
    oracle=composed if torchvision else reference.multiclass_nms,
    tolerance=1e-3,
    compare=largest_score_error,
)

if __name__ == "__main__":
    main(BENCHMARK)
