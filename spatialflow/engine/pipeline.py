# SPDX-License-Identifier: Apache-2.0
"""From a batch of decoded images to panoptic maps on one device, in results of fixed shape.

On a GPU nothing here reads a value back: every shape follows from the sizes of the images, so the host queues all work
at once, and a CUDA graph can hold it. On the CPU, where reading costs nothing, rows that are only padding are left out
early.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from spatialflow.data.transforms import Fitted, fit_image
from spatialflow.models import inference
from spatialflow.models.anchors import STRIDES
from spatialflow.models.config import Config
from spatialflow.models.spatialflow import NetworkOutput, SpatialFlow
from spatialflow.ops import (
    Candidates,
    PanopticMergeOutput,
    panoptic_merge,
    paste_masks,
    preprocess_images,
    select_candidates,
    stuff_labels,
)


class View(NamedTuple):
    """One of the forms in which a batch goes through the networks, on the device before the work starts."""

    mirrored: bool
    fitted: tuple[Fitted, ...]
    valid_sizes: Tensor  # (B, 2) int64, H and W
    scales: Tensor  # (B, 2) float32, x and y
    widths: Tensor  # (B,) float32, of the original images


class FixedResult(NamedTuple):
    """What was found in one image; rows of detections from `count` on are padding."""

    boxes: Tensor  # (D, 4) float32, original scale
    scores: Tensor  # (D,) float32, descending
    labels: Tensor  # (D,) int64, -1 = padding
    count: Tensor  # () int64
    mask_logits: Optional[Tensor]  # (D, 28, 28) float32; None without a thing head, or where they were not asked for
    merged: PanopticMergeOutput


class Pipeline:
    """The way from images to panoptic maps, through one network and view, or several.

    Of several views (sizes, mirrored or not) and networks (an ensemble) the boxes compete in one NMS, mask
    probabilities are averaged, and stuff logits too: between networks at stride 4, between views at the size of the
    original image.

    Args:
        networks: in evaluation mode, on `device`, with the same classes.
        config: thresholds, sizes of the views, and the classes.
        ignored_stuff: stuff labels that stay void.
        device: where the networks are.
        dtype: of their weights.
        detection_masks: whether the results have the mask of every detection. Without, the CPU computes only those
            that the map may need; a GPU computes all, as it reads no count.
    """

    def __init__(
        self,
        networks: Sequence[SpatialFlow],
        config: Config,
        ignored_stuff: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        detection_masks: bool,
    ):
        self.networks, self.config, self.ignored_stuff = list(networks), config, ignored_stuff
        self.device, self.dtype, self.detection_masks = device, dtype, detection_masks
        self.reads_counts = device.type == "cpu"
        self._base_anchors = [inference.pyramid_base_anchors(network.config.model, device) for network in networks]

    def fit(self, size: tuple[int, int]) -> tuple[Fitted, ...]:
        """How an image of `size` (H, W) enters the networks, for every short edge of the configuration."""
        divisor = self.config.data.size_divisor
        return tuple(fit_image(size, short, long, divisor) for short, long in self.config.test.test_edges)

    def plan(self, fitted: Sequence[tuple[Fitted, ...]]) -> list[View]:
        """What to call the pipeline with for images of these sizes, see `fit`, of one padded size per short edge."""
        return [
            self._view(of_edge, mirrored)
            for of_edge in zip(*fitted)
            for mirrored in ((False, True) if self.config.test.test_flip else (False,))
        ]

    def _view(self, fitted: tuple[Fitted, ...], mirrored: bool) -> View:
        def upload(values: list) -> Tensor:
            return torch.tensor(values).to(self.device, non_blocking=True)

        return View(
            mirrored,
            fitted,
            upload([one.valid_size for one in fitted]),
            upload([one.scale for one in fitted]),
            upload([float(one.original_size[1]) for one in fitted]),
        )

    @torch.inference_mode()
    def __call__(self, pixels: list[Tensor], plan: list[View], times: dict[str, float]) -> list[FixedResult]:
        """Runs a batch.

        Args:
            pixels: B images (H, W, 3) uint8 in BGR order, on the device.
            plan: from `plan`, for the same sizes.
            times: the seconds of each stage are added here, see `stopwatch`.

        Returns:
            One result per image, on the device. On the CPU D is the largest count of the batch, elsewhere
            `max_detections`.
        """
        passes = [(view, *self._dense(pixels, view, times)) for view in plan]
        with stopwatch(times, "detect"):
            candidates = [
                self._candidates(view, network, output)
                for view, outputs, _ in passes
                for network, output in enumerate(outputs)
            ]
            joined = candidates[0] if len(candidates) == 1 else Candidates(*map(_join, zip(*candidates)))
            found = inference.detect(joined, self.config.test)
            rows = self._leading(found.labels >= 0)
            boxes, scores, labels = found.boxes[:, :rows], found.scores[:, :rows], found.labels[:, :rows]
        logits = None
        if passes[0][1][0].thing_features is not None:
            with stopwatch(times, "masks"):
                masked = rows if self.detection_masks else self._leading(self._enters(scores, labels))
                parts = [
                    self._mask_logits(view, network, output.thing_features, boxes[:, :masked], labels[:, :masked])
                    for view, outputs, _ in passes
                    for network, output in zip(self.networks, outputs)
                ]
                logits = parts[0] if len(parts) == 1 else inference.mean_mask_logits(parts)
        results = []
        for i in range(len(pixels)):
            with stopwatch(times, "stuff"):
                stuff = self._stuff_labels(i, passes)
            own = None if logits is None else logits[i]
            merged = self._merge(boxes[i], scores[i], labels[i], own, stuff, times)
            own = own if self.detection_masks else None
            results.append(FixedResult(boxes[i], scores[i], labels[i], found.count[i], own, merged))
        return results

    def _dense(
        self, pixels: list[Tensor], view: View, times: dict[str, float]
    ) -> tuple[list[NetworkOutput], Optional[Tensor]]:
        """What each network says of a view, and the mean of their stuff logits at stride 4."""
        data = self.config.data
        with stopwatch(times, "preprocess"):
            valid = [one.valid_size for one in view.fitted]
            pixels = [image.flip(1) for image in pixels] if view.mirrored else pixels
            images = preprocess_images(pixels, valid, data.image_mean, data.image_std, data.size_divisor, self.dtype)
        with stopwatch(times, "network"):
            outputs, quarter_logits = zip(*(network.dense(images) for network in self.networks))
            if quarter_logits[0] is None or len(quarter_logits) == 1:
                return list(outputs), quarter_logits[0]
            return list(outputs), torch.stack(quarter_logits).float().mean(dim=0)

    def _candidates(self, view: View, network: int, output: NetworkOutput) -> Candidates:
        found = select_candidates(
            output.class_logits,
            output.box_deltas,
            self._base_anchors[network],
            STRIDES,
            view.valid_sizes,
            view.scales,
            self.config.test.candidates_per_level,
        )
        return found._replace(boxes=inference.mirror_boxes(found.boxes, view.widths)) if view.mirrored else found

    def _mask_logits(
        self, view: View, network: SpatialFlow, features: list[Tensor], boxes: Tensor, labels: Tensor
    ) -> Tensor:
        """(B, D, 28, 28) for boxes (B, D, 4) at original scale, not mirrored."""
        boxes = inference.mirror_boxes(boxes, view.widths) if view.mirrored else boxes
        rois = inference.make_rois(boxes, view.scales)
        logits = inference.mask_logits(network, features, rois, labels.clamp(min=0).flatten()).unflatten(
            0, labels.shape
        )
        return logits.flip(-1) if view.mirrored else logits

    def _stuff_labels(self, image: int, passes: list[tuple]) -> Tensor:
        """(H, W) labels of one image; without a stuff head zeros, which with no label to be counted are void."""
        (view, _, quarter_logits), *others = passes
        fitted = view.fitted[image]
        if quarter_logits is None:
            return torch.zeros(fitted.original_size, dtype=torch.uint8, device=self.device)
        if not others:
            return stuff_labels(quarter_logits[image], fitted.valid_size, fitted.original_size)
        total = torch.zeros((quarter_logits.shape[1], *fitted.original_size), device=self.device)
        for view, _, quarter_logits in passes:
            valid_size = view.fitted[image].valid_size
            total += inference.resized_stuff_logits(
                quarter_logits[image], valid_size, fitted.original_size, view.mirrored
            )
        return total.argmax(dim=0)

    def _merge(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        mask_logits: Optional[Tensor],
        stuff: Tensor,
        times: dict[str, float],
    ) -> PanopticMergeOutput:
        """Masks and stuff labels of one image at original size, merged."""
        test, model, size = self.config.test, self.config.model, tuple(stuff.shape)
        with stopwatch(times, "masks"):
            entering = self._leading(self._enters(scores, labels))
            if mask_logits is None:
                entering = 0
                masks = torch.zeros((0, *size), dtype=torch.bool, device=self.device)
            else:
                masks = paste_masks(mask_logits[:entering], boxes[:entering], size, test.mask_threshold)
        with stopwatch(times, "merge"):
            return panoptic_merge(
                masks,
                torch.where(labels >= 0, scores, -1.0)[:entering],  # padding enters at no threshold
                labels[:entering],
                boxes[:entering] if test.box_fill else None,
                stuff,
                model.num_stuff if model.stuff_head else 0,
                ignored_stuff=self.ignored_stuff,
                score_threshold=test.instance_score_threshold,
                overlap_threshold=test.instance_overlap_threshold,
                stuff_area_limit=test.stuff_area_threshold,
                box_threshold=test.box_overlap_threshold,
            )

    def _enters(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(..., D) bool: detections that enter the merge; padding does not."""
        return (labels >= 0) & (scores >= self.config.test.instance_score_threshold)

    def _leading(self, wanted: Tensor) -> int:
        """How many leading rows hold all that is wanted, (..., D) bool: where counts are not read, all D."""
        return int(wanted.sum(-1).max()) if self.reads_counts else wanted.shape[-1]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """(B, N_i, ...) of all passes -> (B, sum N_i, ...)."""
    return torch.cat(list(parts), dim=1)


@contextmanager
def stopwatch(times: dict[str, float], stage: str):
    """Adds the seconds of the block to `times[stage]`; on a GPU until the work is queued, without waiting for it."""
    start = time.perf_counter()
    yield
    times[stage] += time.perf_counter() - start
