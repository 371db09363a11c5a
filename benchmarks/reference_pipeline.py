# SPDX-License-Identifier: Apache-2.0
"""Baseline pipeline from a photograph to a panoptic map, in plain PyTorch, torchvision and numpy.

It has plain modules, torchvision's NMS and RoIAlign (without torchvision, those of `spatialflow.ops.reference`), and a
merge loop in numpy. The masks of a float32 network are pasted one by one, those of a 16-bit network all at once.

`end_to_end.py` compares spatialflow with this pipeline, which has all steps of the released implementations:

- mmdetection: detections, mask head over all classes, logits resized to the padded image
- detectron2: the merge loop, and each mask pasted within its box, detectron2's fastest way on the CPU
- panopticapi: Pillow writes the PNG

Reading and resizing use OpenCV, with the same code as the package.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import optional
from torch import Tensor, nn
from torch.nn import functional as F

from spatialflow.config import DataConfig, InferenceConfig
from spatialflow.data.categories import load_categories
from spatialflow.data.transforms import compute_resized_size, normalize, pad, resize_image, resize_labels
from spatialflow.images import read_image
from spatialflow.models.anchors import STRIDES, base_anchors
from spatialflow.models.heads import upsample_stuff_logits
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import reference
from spatialflow.ops.reference.select_candidates import decode_boxes, grid_anchors
from spatialflow.panoptic.formats import encode_ids

pillow = optional("PIL.Image")
torchvision = optional("torchvision.ops")
batched_nms, roi_align = (torchvision or reference).batched_nms, (torchvision or reference).roi_align

STAGES = (
    "load",
    "backbone + FPN",
    "sub-networks",
    "dense heads",
    "detections",
    "masks",
    "stuff labels",
    "merge",
    "write",
)
"""Stages of a pipeline, in order."""


class Clock:
    """Seconds by stage: `with clock("masks"): ...` adds to that stage. `waits`: synchronize the device at both ends."""

    def __init__(self, device: torch.device, waits: bool):
        self.times = dict.fromkeys(STAGES, 0.0)
        self._device, self._waits = device, waits

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = self._now()
        yield
        self.times[stage] += self._now() - begin

    def _now(self) -> float:
        if self._waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class ReferencePipeline:
    """Pipeline that reads an image, predicts its panoptic map and writes it as a PNG.

    Args:
        model: from `build_model`, with weights loaded, without deformable convolutions.
        test: sizes and thresholds.
        device: device of the network.
        channels_last: use the channels-last memory format for the network's weights and inputs.
        dtype: dtype of the network. In 16 bits, RoIAlign runs in float32, as under autocast, because float16 boxes are
            off by pixels. In 16 bits, masks are pasted on the device, all at once, and stage times are taken without
            synchronizing the device.

    Raises:
        ValueError: the model has deformable convolutions, for which plain PyTorch has no module.
    """

    def __init__(
        self,
        model: SpatialFlow,
        test: InferenceConfig,
        device: torch.device,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        if any("conv_offset" in name for name, _ in model.named_parameters()):
            raise ValueError(f"{model.config.name}: the reference pipeline has no deformable convolutions")
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model, self.dtype = model.to(device, dtype).to(memory_format=self.format).eval(), dtype
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()  # takes features in 16 bits, and keeps its statistics exact
        self.test, self.device, self.shape = test, device, model.config.model
        self.categories = load_categories(model.config.data.categories, self.shape.num_things, self.shape.num_stuff)

    @torch.inference_mode()
    def __call__(self, path: Path, png: Path) -> tuple[np.ndarray, list[dict[str, Any]], int, dict[str, float]]:
        """Return (H, W) int32 ids, the segments, the number of detections, and seconds by stage."""
        model, test, data, clock = (
            self.model,
            self.test,
            self.model.config.data,
            Clock(self.device, self.dtype == torch.float32),
        )
        with clock("load"):
            pixels = read_image(path)
            original = pixels.shape[:2]
            valid, images = network_input(pixels, test, data)
            images = images.to(self.device, self.dtype).contiguous(memory_format=self.format)
            scale = torch.tensor([valid[1] / original[1], valid[0] / original[0]] * 2, device=self.device)
        with clock("backbone + FPN"):
            pyramid = model.fpn(model.backbone(images))
        with clock("sub-networks"):
            tasks = model.subnets(pyramid)
        with clock("dense heads"):
            class_logits, box_deltas = model.box_head(tasks.cls, tasks.reg)
            stuff_logits = model.stuff_head(tasks.stuff)
        with clock("detections"):
            boxes, scores, labels = self.detect(class_logits, box_deltas, valid, scale)
        with clock("masks"):
            probabilities = self.mask_probabilities(tasks.thing, boxes * scale, labels)
            selected = scores >= test.instance_score_threshold
            if self.dtype == torch.float32:
                boxes, scores, labels = boxes[selected].cpu(), scores[selected].cpu(), labels[selected].cpu()
                masks = paste(probabilities[selected].cpu(), boxes, original, test.mask_threshold)
            else:
                masks = paste_at_once(probabilities[selected], boxes[selected], original, test.mask_threshold)
                boxes, scores, labels = boxes[selected].cpu(), scores[selected].cpu(), labels[selected].cpu()
        with clock("stuff labels"):
            stuff = upsample_stuff_logits(stuff_logits.float())[0].argmax(dim=0)[: valid[0], : valid[1]]
            stuff = resize_labels(stuff.cpu().numpy(), original)
        with clock("merge"):
            id_map, segments = self.merge(masks, scores.numpy(), labels.numpy(), boxes.numpy(), stuff)
        with clock("write"):
            write_png(png, id_map)
        return id_map, segments, len(probabilities), clock.times

    def detect(
        self,
        class_logits: Sequence[Tensor],
        box_deltas: Sequence[Tensor],
        valid_size: tuple[int, int],
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels: the best anchors of each level, decoded, after class-wise NMS."""
        all_boxes, all_scores = [], []
        for level, (logits, deltas) in enumerate(zip(class_logits, box_deltas)):
            scores = logits[0].float().permute(1, 2, 0).reshape(-1, self.shape.num_things).sigmoid()
            deltas = deltas[0].float().permute(1, 2, 0).reshape(-1, 4)
            base = base_anchors(
                STRIDES[level],
                self.shape.anchor_octave_scale,
                self.shape.anchor_scales_per_octave,
                self.shape.anchor_ratios,
            )
            anchors = grid_anchors(tuple(logits.shape[-2:]), STRIDES[level], base.to(self.device))
            if 0 < self.test.candidates_per_level < len(scores):
                best = scores.max(dim=1).values.topk(self.test.candidates_per_level).indices
                scores, deltas, anchors = scores[best], deltas[best], anchors[best]
            all_boxes.append(decode_boxes(anchors, deltas))
            all_scores.append(scores)
        height, width = valid_size
        limits = torch.tensor([width, height, width, height], device=self.device)
        boxes = torch.cat(all_boxes).clamp(min=0).minimum(limits) / scale
        scores = torch.cat(all_scores)
        rows, labels = (scores > self.test.score_threshold).nonzero(as_tuple=True)
        boxes, scores = boxes[rows], scores[rows, labels]
        kept = batched_nms(boxes, scores, labels, self.test.nms_threshold)[: self.test.max_detections]
        return boxes[kept], scores[kept], labels[kept]

    def mask_probabilities(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Return (K, 2S, 2S), S = `roi_size`: RoIAlign by level, mask head for all classes, mask of the box's class."""
        shape = self.shape
        areas = (rois[:, 2] - rois[:, 0]).clamp(min=0) * (rois[:, 3] - rois[:, 1]).clamp(min=0)
        levels = (areas.sqrt() / shape.finest_scale + 1e-6).log2().floor().clamp(0, len(features) - 1).long()
        crops = features[0].new_zeros((len(rois), features[0].shape[1], shape.roi_size, shape.roi_size))
        for level, feature in enumerate(features):
            indices = (levels == level).nonzero()[:, 0]
            if len(indices) > 0:
                rows, scale = F.pad(rois[indices], (1, 0)), 1 / STRIDES[level]
                pooled = roi_align(feature.float(), rows, shape.roi_size, scale, sampling_ratio=-1, aligned=True)
                crops[indices] = pooled.to(self.dtype)
        logits = self.model.thing_head(crops.contiguous(memory_format=self.format))  # (K, classes, 2S, 2S)
        return logits[torch.arange(len(rois)), labels].float().sigmoid()

    def merge(
        self, masks: np.ndarray, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, stuff: np.ndarray
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Merge instances by score, then stuff by class; then fill the void pixels of boxes."""
        test, things, stuffs = self.test, self.categories.thing_ids, self.categories.stuff_ids
        id_map, used = np.zeros(stuff.shape, np.int32), np.zeros(stuff.shape, bool)
        segments: list[dict[str, Any]] = []
        segment_of: dict[int, int] = {}

        def add(category_id: int, isthing: int) -> int:
            segments.append({"id": len(segments) + 1, "category_id": int(category_id), "isthing": isthing})
            return len(segments)

        order = np.argsort(-scores, kind="stable")
        for k in order:
            area = masks[k].sum()
            if area == 0 or (masks[k] & used).sum() / area > test.instance_overlap_threshold:
                continue
            used |= masks[k]
            segment_of[k] = add(things[labels[k]], 1)
            id_map[masks[k] & (id_map == 0)] = segment_of[k]
        for label in np.unique(stuff):
            free = (stuff == label) & (id_map == 0)
            if label != self.categories.other_index and free.sum() >= max(test.stuff_area_threshold, 1):
                id_map[free] = add(stuffs[label], 0)
        for k in order if test.box_fill else ():
            x1, y1, x2, y2 = np.maximum(boxes[k].astype(int), 0)
            window = id_map[y1:y2, x1:x2]
            void = window == 0
            if void.any() and void.mean() >= test.box_overlap_threshold:
                window[void] = segment_of.get(k) or add(things[labels[k]], 1)
        return id_map, segments


def network_input(pixels: np.ndarray, test: InferenceConfig, data: DataConfig) -> tuple[tuple[int, int], Tensor]:
    """Return the size of the resized image, and the network's input, (1, 3, H, W), normalized and padded."""
    valid = compute_resized_size(pixels.shape[:2], test.test_short_edges[0], test.test_long_edge)
    image = normalize(resize_image(pixels, valid), data.image_mean, data.image_std)
    return valid, torch.from_numpy(pad(image, data.size_divisor))[None]


def paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> np.ndarray:
    """Paste masks (K, M, M) in boxes (K, 4) on the CPU, each sampled within its box; return (K, H, W) bool."""
    height, width = size
    masks = np.zeros((len(boxes), height, width), bool)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
        right, bottom = min(int(x2) + 2, width), min(int(y2) + 2, height)
        if not (x1 < x2 and y1 < y2 and left < right and top < bottom):
            continue
        x = (torch.arange(left, right) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack([x.expand(len(y), len(x)), y[:, None].expand(len(y), len(x))], dim=-1)
        values = F.grid_sample(probabilities[k][None, None], grid[None], align_corners=False)[0, 0]
        masks[k, top:bottom, left:right] = (values >= threshold).numpy()
    return masks


def paste_at_once(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> np.ndarray:
    """Paste masks on the device; each mask is sampled at all pixels of the image, as in detectron2."""
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    x, y = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, *size), y[:, :, None].expand(-1, *size)], dim=-1)
    return (F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= threshold).cpu().numpy()


def write_png(path: Path, id_map: np.ndarray) -> None:
    """Write the ids as colors, with Pillow if it is installed, else with OpenCV."""
    if pillow is not None:
        pillow.fromarray(encode_ids(id_map)).save(path)
        return
    import cv2

    cv2.imwrite(str(path), encode_ids(id_map, bgr=True))
