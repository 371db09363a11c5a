# SPDX-License-Identifier: Apache-2.0
"""From a batch of decoded images to panoptic maps on one device, in results of fixed shape.

On a GPU nothing here reads a value back: every shape follows from the sizes of the images, so the host queues all work at
once, and a CUDA graph can hold it. On the CPU, where reading costs nothing, rows that are only padding are left out early.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from spatialflow.data.transforms import Fitted
from spatialflow.models import inference
from spatialflow.models.anchors import STRIDES
from spatialflow.models.config import Config
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import PanopticMergeOutput, panoptic_merge, paste_masks, preprocess_images


class Plan(NamedTuple):
    """What the shapes of a batch determine, on the device before the work starts."""

    fitted: tuple[Fitted, ...]
    valid_sizes: Tensor  # (B, 2) int64, H and W
    scales: Tensor  # (B, 2) float32, x and y
    anchors: list[Tensor]  # per level (H * W * A, 4) float32


class FixedResult(NamedTuple):
    """What was found in one image; rows of detections from `count` on are padding."""

    boxes: Tensor  # (D, 4) float32, original scale
    scores: Tensor  # (D,) float32, descending
    labels: Tensor  # (D,) int64, -1 = padding
    count: Tensor  # () int64
    mask_logits: Optional[Tensor]  # (D, 28, 28) float32; None without a thing head
    merged: PanopticMergeOutput


class Pipeline:
    """The way from pixels to panoptic maps.

    Args:
        network: in evaluation mode, on `device`.
        config: thresholds, and the shape of the model.
        ignored_stuff: stuff labels that stay void.
        device: where `network` is.
        dtype: of its weights.
    """

    def __init__(
        self,
        network: SpatialFlow,
        config: Config,
        ignored_stuff: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.network, self.config, self.ignored_stuff = network, config, ignored_stuff
        self.device, self.dtype = device, dtype
        self.reads_counts = device.type == "cpu"

    def plan(self, fitted: tuple[Fitted, ...]) -> Plan:
        """What to call the pipeline with for images of these sizes, of one padded size."""
        levels = [tuple(-(-side // stride) for side in fitted[0].padded_size) for stride in STRIDES]

        def upload(values: list) -> Tensor:
            return torch.tensor(values).to(self.device, non_blocking=True)

        return Plan(
            fitted,
            upload([one.valid_size for one in fitted]),
            upload([one.scale for one in fitted]),
            inference.pyramid_anchors(self.config.model, levels, self.device),
        )

    @torch.inference_mode()
    def __call__(self, pixels: list[Tensor], plan: Plan, times: dict[str, float]) -> list[FixedResult]:
        """Runs a batch.

        Args:
            pixels: B images (H, W, 3) uint8 in BGR order, on the device.
            plan: from `plan`, for the same sizes.
            times: the seconds of each stage are added here, see `stopwatch`.

        Returns:
            One result per image, on the device. On the CPU D is the largest count of the batch, elsewhere
            `max_detections`.
        """
        data = self.config.data
        with stopwatch(times, "preprocess"):
            valid = [one.valid_size for one in plan.fitted]
            images = preprocess_images(pixels, valid, data.image_mean, data.image_std, data.size_divisor, self.dtype)
        with stopwatch(times, "network"):
            output, quarter_logits = self.network.dense(images)
        with stopwatch(times, "detect"):
            candidates = inference.select_candidates(
                output.class_logits,
                output.box_deltas,
                plan.anchors,
                plan.valid_sizes,
                plan.scales,
                self.config.test.candidates_per_level,
            )
            found = inference.detect(candidates, self.config.test)
            rows = self._leading(found.labels >= 0)
            boxes, scores, labels = found.boxes[:, :rows], found.scores[:, :rows], found.labels[:, :rows]
        logits = None
        if output.thing_features is not None:
            with stopwatch(times, "masks"):
                rois = inference.make_rois(boxes, plan.scales)
                logits = inference.mask_logits(
                    self.network, output.thing_features, rois, labels.clamp(min=0).flatten()
                ).unflatten(0, labels.shape)
        results = []
        for i, fitted in enumerate(plan.fitted):
            own_logits = None if logits is None else logits[i]
            quarter = None if quarter_logits is None else quarter_logits[i]
            merged = self._merge(boxes[i], scores[i], labels[i], own_logits, quarter, fitted, times)
            results.append(FixedResult(boxes[i], scores[i], labels[i], found.count[i], own_logits, merged))
        return results

    def _merge(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        mask_logits: Optional[Tensor],
        quarter_logits: Optional[Tensor],
        fitted: Fitted,
        times: dict[str, float],
    ) -> PanopticMergeOutput:
        """Masks and stuff labels of one image at original size, merged."""
        test, size = self.config.test, fitted.original_size
        with stopwatch(times, "stuff"):
            if quarter_logits is None:  # every label lies outside 0..num_stuff - 1 = nothing, so all is void
                stuff, num_stuff = torch.zeros(size, dtype=torch.uint8, device=self.device), 0
            else:
                stuff = inference.stuff_labels(quarter_logits, fitted.valid_size, size)
                num_stuff = self.config.model.num_stuff
        with stopwatch(times, "masks"):
            scores = torch.where(labels >= 0, scores, -1.0)  # padding enters at no threshold
            entering = self._leading(scores >= test.instance_score_threshold)
            if mask_logits is None:
                entering = 0
                masks = torch.zeros((0, *size), dtype=torch.bool, device=self.device)
            else:
                masks = paste_masks(mask_logits[:entering], boxes[:entering], size, test.mask_threshold)
        with stopwatch(times, "merge"):
            return panoptic_merge(
                masks,
                scores[:entering],
                labels[:entering],
                boxes[:entering] if test.box_fill else None,
                stuff,
                num_stuff,
                ignored_stuff=self.ignored_stuff,
                score_threshold=test.instance_score_threshold,
                overlap_threshold=test.instance_overlap_threshold,
                stuff_area_limit=test.stuff_area_threshold,
                box_threshold=test.box_overlap_threshold,
            )

    def _leading(self, wanted: Tensor) -> int:
        """How many leading rows hold all that is wanted, (..., D) bool: where counts are not read, all D."""
        return int(wanted.sum(-1).max()) if self.reads_counts else wanted.shape[-1]


@contextmanager
def stopwatch(times: dict[str, float], stage: str):
    """Adds the seconds of the block to `times[stage]`; on a GPU until the work is queued, without waiting for it."""
    start = time.perf_counter()
    yield
    times[stage] += time.perf_counter() - start
