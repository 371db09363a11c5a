# SPDX-License-Identifier: Apache-2.0
"""From a batch of decoded images to panoptic maps on one device, in results of fixed shape.

The way has three parts. Preprocessing and the last one, stuff labels and merging, have shapes that follow from the
original sizes of the images. Recognition, in between, has shapes that follow from the padded size alone and takes the
rest as tensors, so that one CUDA graph of it serves all images of a padded size.

On a GPU nothing here reads a value back, so the host queues all work at once. Kernels leave out rows whose results
are not used. On the CPU, where reading costs nothing, such rows are cut off early.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from spatialflow.config import Config
from spatialflow.data.transforms import Fitted, fit_image
from spatialflow.engine.cuda_graphs import GraphCache
from spatialflow.models import postprocess
from spatialflow.models.anchors import STRIDES
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
from spatialflow.ops.checking import is_checking

STAGES = ("decode", "preprocess", "network", "detect", "masks", "stuff", "merge")
"""What `PanopticResult.times` measures, in order. On a GPU each is the time to queue the work, and "merge" holds
the wait for its end. A CUDA graph is queued as a whole, under "network"."""


class View(NamedTuple):
    """One of the forms in which a batch goes through the networks, on the device before the work starts."""

    mirrored: bool
    fitted: tuple[Fitted, ...]
    valid_sizes: Tensor  # (B, 2) int64, H and W
    scales: Tensor  # (B, 2) float32, x and y
    widths: Tensor  # (B,) float32, of the original images

    @property
    def geometry(self) -> tuple[Tensor, ...]:
        """The tensors by which images of one padded size differ."""
        return tuple(getattr(self, name) for name in GEOMETRY)


GEOMETRY = ("valid_sizes", "scales", "widths")
"""Fields of `View.geometry`."""


class Recognized(NamedTuple):
    """What was found in a batch, in shapes that no original size decides. Rows that are only padding have label -1."""

    boxes: Tensor  # (B, D, 4) float32, original scale
    scores: Tensor  # (B, D) float32, descending
    labels: Tensor  # (B, D) int64
    counts: Tensor  # (B,) int64
    entering: Tensor  # (B, D, 4), the boxes; NaN for those that cannot enter the map: nothing is pasted there
    mask_logits: Tensor | None  # (B, D, 28, 28) float32, unspecified where not wanted; None without a thing head
    stuff_logits: list[Tensor | None]  # per view (B, num_stuff, H/4, W/4); None without a stuff head


class FixedResult(NamedTuple):
    """What was found in one image; rows of detections from `count` on are padding."""

    boxes: Tensor  # (D, 4) float32, original scale
    scores: Tensor  # (D,) float32, descending
    labels: Tensor  # (D,) int64, -1 = padding
    count: Tensor  # () int64
    mask_logits: Tensor | None  # (D, 28, 28) float32; None without a thing head, or where they were not asked for
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
        detection_masks: whether the results have the mask of every detection. Without, only those that the map may
            need are computed.
        graphs: where CUDA graphs of the recognition are kept; None to queue its kernels one by one.
    """

    def __init__(
        self,
        networks: Sequence[SpatialFlow],
        config: Config,
        ignored_stuff: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        detection_masks: bool,
        graphs: GraphCache | None = None,
    ):
        self.networks, self.config, self.ignored_stuff, self.graphs = list(networks), config, ignored_stuff, graphs
        self.device, self.dtype, self.detection_masks = device, dtype, detection_masks
        self.reads_counts = device.type == "cpu"
        self._base_anchors = [postprocess.pyramid_base_anchors(network.config.model, device) for network in networks]

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
            on_gpu = self.device.type == "cuda"
            return torch.tensor(values, device="cpu", pin_memory=on_gpu).to(self.device, non_blocking=True)

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
        with stopwatch(times, "preprocess"):
            images = [self._network_input(pixels, view) for view in plan]
        # A graph keeps autocast as it was, and checks of values read them on the host.
        if self.graphs is None or torch.is_autocast_enabled(self.device.type) or is_checking():
            found = self._recognize(images, plan, times)
        else:
            with stopwatch(times, "network"):
                found = self._replay(self.graphs, images, plan)
        results = []
        for i in range(len(pixels)):
            with stopwatch(times, "stuff"):
                stuff = self._stuff_labels(i, plan, found.stuff_logits)
            own = None if found.mask_logits is None else found.mask_logits[i]
            boxes, scores, labels = found.boxes[i], found.scores[i], found.labels[i]
            merged = self._merge(found.entering[i], scores, labels, own, stuff, times)
            own = own if self.detection_masks else None
            results.append(FixedResult(boxes, scores, labels, found.counts[i], own, merged))
        return results

    def _network_input(self, pixels: list[Tensor], view: View) -> Tensor:
        """(B, 3, H, W), of the padded size."""
        data, valid = self.config.data, [one.valid_size for one in view.fitted]
        pixels = [image.flip(1) for image in pixels] if view.mirrored else pixels
        return preprocess_images(pixels, valid, data.image_mean, data.image_std, data.size_divisor, self.dtype)

    def _replay(self, graphs: GraphCache, images: list[Tensor], plan: list[View]) -> Recognized:
        """`_recognize` from the CUDA graph of these padded sizes. The result is valid until the next replay."""
        tensors = [tensor for image, view in zip(images, plan) for tensor in (image, *view.geometry)]

        def make() -> Callable[[list[Tensor]], Recognized]:
            def function(inputs: list[Tensor]) -> Recognized:
                step = 1 + len(GEOMETRY)
                parts = [inputs[i : i + step] for i in range(0, len(inputs), step)]
                views = [view._replace(**dict(zip(GEOMETRY, part[1:]))) for view, part in zip(plan, parts)]
                return self._recognize([part[0] for part in parts], views, dict.fromkeys(STAGES, 0.0))

            return function

        return graphs(tuple((view.mirrored, image.shape) for image, view in zip(images, plan)), make, tensors)

    def _recognize(self, images: list[Tensor], plan: list[View], times: dict[str, float]) -> Recognized:
        """Detections, masks and stuff logits of a batch. Of a view it reads `mirrored` and the tensors alone.

        Args:
            images: the network's input (B, 3, H, W) of each view.
            plan: the views.
            times: as for a call.
        """
        with stopwatch(times, "network"):
            passes = [self._dense(view_images) for view_images in images]
        with stopwatch(times, "detect"):
            candidates = [
                self._candidates(view, network, output)
                for view, (outputs, _) in zip(plan, passes)
                for network, output in enumerate(outputs)
            ]
            joined = candidates[0] if len(candidates) == 1 else Candidates(*map(_join, zip(*candidates)))
            found = postprocess.detect(joined, self.config.test)
            rows = self._leading(found.labels >= 0)
            boxes, scores, labels = found.boxes[:, :rows], found.scores[:, :rows], found.labels[:, :rows]
            enters = self._enters(scores, labels)
            entering = torch.where(enters.unsqueeze(-1), boxes, float("nan"))
        logits = None
        if passes[0][0][0].thing_features is not None:
            with stopwatch(times, "masks"):
                masked = boxes if self.detection_masks else self._that_enter(entering)
                if self.reads_counts:
                    wanted = None  # other rows were cut off
                else:
                    wanted = labels >= 0 if self.detection_masks else enters
                classes = labels[:, : masked.shape[1]]
                parts = [
                    self._mask_logits(view, network, output.thing_features, masked, classes, wanted)
                    for view, (outputs, _) in zip(plan, passes)
                    for network, output in zip(self.networks, outputs)
                ]
                logits = parts[0] if len(parts) == 1 else postprocess.mean_mask_logits(parts)
        return Recognized(boxes, scores, labels, found.count, entering, logits, [stuff for _, stuff in passes])

    def _dense(self, images: Tensor) -> tuple[list[NetworkOutput], Tensor | None]:
        """What each network says of a view, and the mean of their stuff logits at stride 4."""
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
        return found._replace(boxes=postprocess.mirror_boxes(found.boxes, view.widths)) if view.mirrored else found

    def _mask_logits(
        self,
        view: View,
        network: SpatialFlow,
        features: list[Tensor],
        boxes: Tensor,
        labels: Tensor,
        wanted: Tensor | None,
    ) -> Tensor:
        """(B, D, 28, 28) for boxes (B, D, 4) at original scale, not mirrored; unspecified but for the wanted ones."""
        boxes = postprocess.mirror_boxes(boxes, view.widths) if view.mirrored else boxes
        rois = postprocess.make_rois(boxes, view.scales)
        active = None if wanted is None else wanted.flatten()
        logits = postprocess.mask_logits(network, features, rois, labels.clamp(min=0).flatten(), active)
        logits = logits.unflatten(0, labels.shape)
        return logits.flip(-1) if view.mirrored else logits

    def _stuff_labels(self, image: int, plan: list[View], quarter_logits: list[Tensor | None]) -> Tensor:
        """(H, W) labels of one image; without a stuff head zeros, which with no label to be counted are void."""
        fitted = plan[0].fitted[image]
        if quarter_logits[0] is None:
            return torch.zeros(fitted.original_size, dtype=torch.uint8, device=self.device)
        if len(plan) == 1:
            return stuff_labels(quarter_logits[0][image], fitted.valid_size, fitted.original_size)
        total = torch.zeros((quarter_logits[0].shape[1], *fitted.original_size), device=self.device)
        for view, logits in zip(plan, quarter_logits):
            valid_size = view.fitted[image].valid_size
            total += postprocess.resized_stuff_logits(logits[image], valid_size, fitted.original_size, view.mirrored)
        return total.argmax(dim=0)

    def _merge(
        self,
        entering: Tensor,
        scores: Tensor,
        labels: Tensor,
        mask_logits: Tensor | None,
        stuff: Tensor,
        times: dict[str, float],
    ) -> PanopticMergeOutput:
        """Masks and stuff labels of one image at original size, merged."""
        test, model, size = self.config.test, self.config.model, tuple(stuff.shape)
        with stopwatch(times, "masks"):
            boxes = self._that_enter(entering) if mask_logits is not None else entering[:0]
            count = len(boxes)
            if mask_logits is None:
                masks = torch.zeros((0, *size), dtype=torch.bool, device=self.device)
            else:
                masks = paste_masks(mask_logits[:count], boxes, size, test.mask_threshold)
        with stopwatch(times, "merge"):
            return panoptic_merge(
                masks,
                torch.where(labels >= 0, scores, -1.0)[:count],  # padding enters at no threshold
                labels[:count],
                boxes if test.box_fill else None,
                stuff,
                model.num_stuff if model.stuff_head else 0,
                ignored_stuff=self.ignored_stuff,
                score_threshold=test.instance_score_threshold,
                overlap_threshold=test.instance_overlap_threshold,
                stuff_area_threshold=test.stuff_area_threshold,
                box_overlap_threshold=test.box_overlap_threshold,
            )

    def _enters(self, scores: Tensor, labels: Tensor) -> Tensor:
        """(..., D) bool: detections that enter the merge; padding does not."""
        return (labels >= 0) & (scores >= self.config.test.instance_score_threshold)

    def _that_enter(self, entering: Tensor) -> Tensor:
        """Of boxes (..., D, 4), best first, the leading rows without NaN; where counts are not read, all D."""
        return entering[..., : self._leading(~entering[..., 0].isnan()), :] if self.reads_counts else entering

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
