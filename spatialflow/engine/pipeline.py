# SPDX-License-Identifier: Apache-2.0
"""Inference pipeline: decoded images to panoptic maps on one device.

The pipeline has three parts: preprocessing, recognition, and stuff labels with the merge. In the first and the last
part, shapes depend on the original sizes of the images. In recognition they depend on the padded size alone, and the
other sizes are values of tensors. So one CUDA graph serves all batches of the same padded size and number of images.

On a GPU no value is read back, so the host queues all work at once, and results have a fixed shape. Kernels skip rows
whose results are not used. On the CPU, where reading a value costs nothing, such rows are removed early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spatialflow.config import Config
from spatialflow.data.transforms import ResizeGeometry, compute_resize
from spatialflow.engine.cuda_graphs import GraphCache
from spatialflow.engine.stage_times import record_stages, stage
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


class TestTimeView(NamedTuple):
    """A view of a batch of B images for test-time augmentation: resized to one short edge, mirrored or not."""

    mirrored: bool
    geometries: tuple[ResizeGeometry, ...]  # one per image
    valid_sizes: Tensor  # (B, 2) int64, H and W
    scales: Tensor  # (B, 2) float32, x and y
    widths: Tensor  # (B,) float32, of the original images

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors in which images of one padded size differ."""
        return tuple(getattr(self, name) for name in VIEW_TENSORS)


VIEW_TENSORS = ("valid_sizes", "scales", "widths")
"""Fields of `TestTimeView` that its property `tensors` returns."""


class Recognized(NamedTuple):
    """Detections, masks and stuff logits of a batch. Padding rows have label -1.

    Shapes do not depend on the original sizes of the images.
    """

    boxes: Tensor  # (B, D, 4) float32, original scale
    scores: Tensor  # (B, D) float32, descending
    labels: Tensor  # (B, D) int64
    counts: Tensor  # (B,) int64
    merge_boxes: Tensor  # (B, D, 4) boxes of the candidates of the merge; NaN in other rows, whose masks stay empty
    # (B, D, 2R, 2R) float32 with R = `roi_size`, unspecified where not needed; None without a thing head. On the CPU
    # without `detection_masks`, the trailing rows that no merge needs are left out.
    mask_logits: Tensor | None
    stuff_logits: list[Tensor | None]  # per view (B, num_stuff, H/4, W/4); None without a stuff head


class FixedResult(NamedTuple):
    """Result of one image; rows of detections from `count` on are padding."""

    boxes: Tensor  # (D, 4) float32, original scale
    scores: Tensor  # (D,) float32, descending
    labels: Tensor  # (D,) int64, -1 = padding
    count: Tensor  # type: ignore[assignment]  # () int64; hides tuple.count
    mask_logits: Tensor | None  # (D, 2R, 2R) float32, R = `roi_size`; None without a thing head or `detection_masks`
    merged: PanopticMergeOutput


class Pipeline:
    """Inference on batches of images, with one or several networks and views.

    The boxes of all views (sizes, mirrored or not) and networks (an ensemble) go through one NMS. Mask probabilities
    are averaged. Stuff logits are averaged over networks at stride 4, and summed over views at the size of the original
    image.

    Args:
        networks: in evaluation mode, on `device`, with the same classes.
        config: thresholds, sizes of the views, and the classes.
        ignored_stuff: stuff labels whose pixels are void in the panoptic map.
        device: of the networks.
        dtype: of their weights.
        detection_masks: return the mask of every detection. If False, only the masks that the merge may need are
            computed, and none is returned.
        graphs: cache of CUDA graphs of the recognition; None to queue its kernels one by one.
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
    ) -> None:
        self.networks, self.config, self.ignored_stuff, self.graphs = list(networks), config, ignored_stuff, graphs
        self.device, self.dtype, self.detection_masks = device, dtype, detection_masks
        self.reads_counts = device.type == "cpu"
        self._base_anchors = [postprocess.pyramid_base_anchors(network.config.model, device) for network in networks]

    def geometries(self, size: tuple[int, int]) -> tuple[ResizeGeometry, ...]:
        """Compute the resize geometry of an image of `size` (H, W) for every short edge of the configuration."""
        divisor = self.config.data.size_divisor
        return tuple(compute_resize(size, short, long, divisor) for short, long in self.config.test.test_edges)

    def plan(self, geometries: Sequence[tuple[ResizeGeometry, ...]]) -> list[TestTimeView]:
        """Make the views of a batch, an argument of `__call__`.

        Args:
            geometries: of each image, from the method `geometries`. For each short edge, all images of the batch must
                have the same padded size.
        """
        return [
            self._view(geometries_of_edge, mirrored)
            for geometries_of_edge in zip(*geometries, strict=True)
            for mirrored in ((False, True) if self.config.test.test_flip else (False,))
        ]

    def _view(self, geometries: tuple[ResizeGeometry, ...], mirrored: bool) -> TestTimeView:
        def upload(values: list[Any]) -> Tensor:
            on_gpu = self.device.type == "cuda"
            return torch.tensor(values, device="cpu", pin_memory=on_gpu).to(self.device, non_blocking=True)

        return TestTimeView(
            mirrored,
            geometries,
            upload([geometry.valid_size for geometry in geometries]),
            upload([geometry.scale for geometry in geometries]),
            upload([float(geometry.original_size[1]) for geometry in geometries]),
        )

    @torch.inference_mode()
    def __call__(self, pixels: list[Tensor], plan: list[TestTimeView]) -> list[FixedResult]:
        """Run a batch; each part is timed as a `stage` of `stage_times`.

        Args:
            pixels: B images (H, W, 3) uint8 in BGR order, on the device.
            plan: from `plan`, for the same sizes.

        Returns:
            One result per image, on the device. On the CPU D is the largest count of the batch, elsewhere
            `max_detections`.
        """
        with stage("preprocess"):
            images = [self._network_input(pixels, view) for view in plan]
        # No graph is used with autocast, whose state is fixed at the capture, or with checks, which read values back.
        if self.graphs is None or torch.is_autocast_enabled(self.device.type) or is_checking():
            batch = self._recognize(images, plan)
        else:
            with stage("network"):
                batch = self._replay(self.graphs, images, plan)
        results = []
        for i in range(len(pixels)):
            with stage("stuff"):
                stuff = self._stuff_labels(i, plan, batch.stuff_logits)
            mask_logits = None if batch.mask_logits is None else batch.mask_logits[i]
            boxes, scores, labels = batch.boxes[i], batch.scores[i], batch.labels[i]
            merged = self._merge(batch.merge_boxes[i], scores, labels, mask_logits, stuff)
            mask_logits = mask_logits if self.detection_masks else None
            results.append(FixedResult(boxes, scores, labels, batch.counts[i], mask_logits, merged))
        return results

    def _network_input(self, pixels: list[Tensor], view: TestTimeView) -> Tensor:
        """Preprocess the images to the network's input (B, 3, H, W), of the padded size."""
        data, valid = self.config.data, [geometry.valid_size for geometry in view.geometries]
        pixels = [image.flip(1) for image in pixels] if view.mirrored else pixels
        return preprocess_images(pixels, valid, data.image_mean, data.image_std, data.size_divisor, self.dtype)

    def _replay(self, graphs: GraphCache, images: list[Tensor], plan: list[TestTimeView]) -> Recognized:
        """Run `_recognize` from the CUDA graph of these input shapes. The result is valid until the next replay."""
        tensors = [tensor for image, view in zip(images, plan, strict=True) for tensor in (image, *view.tensors)]

        def make() -> Callable[[list[Tensor]], Recognized]:
            def function(inputs: list[Tensor]) -> Recognized:
                step = 1 + len(VIEW_TENSORS)
                parts = [inputs[i : i + step] for i in range(0, len(inputs), step)]
                views = [
                    view._replace(**cast("dict[str, Any]", dict(zip(VIEW_TENSORS, part[1:], strict=True))))
                    for view, part in zip(plan, parts, strict=True)
                ]
                with record_stages(None):  # the graph counts as one stage
                    return self._recognize([part[0] for part in parts], views)

            return function

        key = tuple((view.mirrored, image.shape) for image, view in zip(images, plan, strict=True))
        return graphs(key, make, tensors)

    def _recognize(self, images: list[Tensor], plan: list[TestTimeView]) -> Recognized:
        """Compute detections, masks and stuff logits of a batch.

        Args:
            images: the networks' input (B, 3, H, W) of each view.
            plan: the views, of which only `mirrored` and the tensors are read.
        """
        with stage("network"):
            outputs = [[network(view_images) for network in self.networks] for view_images in images]
            stuff_logits = [_mean_stuff_logits(view_outputs) for view_outputs in outputs]
        with stage("detect"):
            candidates = [
                self._candidates(view, base_anchors, output)
                for view, view_outputs in zip(plan, outputs, strict=True)
                for base_anchors, output in zip(self._base_anchors, view_outputs, strict=True)
            ]
            detections = postprocess.detect(_concatenate(candidates), self.config.test)
            rows = self._leading(detections.labels >= 0)
            boxes, scores = detections.boxes[:, :rows], detections.scores[:, :rows]
            labels = detections.labels[:, :rows]
            is_merged = self._is_merged(scores, labels)
            merge_boxes = torch.where(is_merged.unsqueeze(-1), boxes, float("nan"))
        mask_logits = None
        if outputs[0][0].thing_features is not None:
            with stage("masks"):
                mask_boxes = boxes if self.detection_masks else self._without_trailing_nan(merge_boxes)
                needed = None  # all rows: where counts are read, unneeded trailing rows are already removed
                if not self.reads_counts:
                    needed = labels >= 0 if self.detection_masks else is_merged
                mask_logits = self._mean_mask_logits(
                    plan, outputs, mask_boxes, labels[:, : mask_boxes.shape[1]], needed
                )
        return Recognized(boxes, scores, labels, detections.count, merge_boxes, mask_logits, stuff_logits)

    def _candidates(self, view: TestTimeView, base_anchors: Tensor, output: NetworkOutput) -> Candidates:
        """Select the best boxes of one network in one view; they are at original scale, not mirrored."""
        candidates = select_candidates(
            output.class_logits,
            output.box_deltas,
            base_anchors,
            STRIDES,
            view.valid_sizes,
            view.scales,
            self.config.test.candidates_per_level,
        )
        if not view.mirrored:
            return candidates
        return candidates._replace(boxes=postprocess.mirror_boxes(candidates.boxes, view.widths))

    def _mean_mask_logits(
        self,
        plan: list[TestTimeView],
        outputs: list[list[NetworkOutput]],
        boxes: Tensor,
        labels: Tensor,
        needed: Tensor | None,
    ) -> Tensor:
        """Compute the logits (B, D, 2R, 2R) of the mean mask probability over views and networks, by `_mask_logits`."""
        parts = [
            self._mask_logits(view, network, cast("list[Tensor]", output.thing_features), boxes, labels, needed)
            for view, view_outputs in zip(plan, outputs, strict=True)
            for network, output in zip(self.networks, view_outputs, strict=True)
        ]
        return parts[0] if len(parts) == 1 else postprocess.mean_mask_logits(parts)

    def _mask_logits(
        self,
        view: TestTimeView,
        network: SpatialFlow,
        features: list[Tensor],
        boxes: Tensor,
        labels: Tensor,
        needed: Tensor | None,
    ) -> Tensor:
        """Compute the mask logits of one network in one view.

        Args:
            view: the view of `features`.
            network: with the thing head.
            features: of the thing sub-network.
            boxes: (B, D, 4) at original scale, not mirrored.
            labels: (B, D) thing labels, -1 for padding.
            needed: (B, D) bool; None for all.

        Returns:
            (B, D, 2R, 2R) with R = `roi_size`, unspecified where not needed.
        """
        boxes = postprocess.mirror_boxes(boxes, view.widths) if view.mirrored else boxes
        rois = postprocess.make_rois(boxes, view.scales)
        active = None if needed is None else needed.flatten()
        logits = postprocess.mask_logits(network, features, rois, labels.clamp(min=0).flatten(), active)
        logits = logits.unflatten(0, labels.shape)
        return logits.flip(-1) if view.mirrored else logits

    def _stuff_labels(self, image: int, plan: list[TestTimeView], stuff_logits: list[Tensor | None]) -> Tensor:
        """Compute the stuff labels (H, W) of one image; without a stuff head zeros, which the merge treats as void.

        Args:
            image: index within the batch.
            plan: the views.
            stuff_logits: (B, num_stuff, H/4, W/4) of each view.
        """
        geometry = plan[0].geometries[image]
        if stuff_logits[0] is None:
            return torch.zeros(geometry.original_size, dtype=torch.uint8, device=self.device)
        if len(plan) == 1:
            return stuff_labels(stuff_logits[0][image], geometry.valid_size, geometry.original_size)
        total = torch.zeros((stuff_logits[0].shape[1], *geometry.original_size), device=self.device)
        for view, logits in zip(plan, stuff_logits, strict=True):
            valid_size = view.geometries[image].valid_size
            total += postprocess.resized_stuff_logits(
                cast("Tensor", logits)[image], valid_size, geometry.original_size, view.mirrored
            )
        return total.argmax(dim=0)

    def _merge(
        self, merge_boxes: Tensor, scores: Tensor, labels: Tensor, mask_logits: Tensor | None, stuff: Tensor
    ) -> PanopticMergeOutput:
        """Paste the masks of one image at original size, and merge them with its stuff labels."""
        test, model, size = self.config.test, self.config.model, cast("tuple[int, int]", tuple(stuff.shape))
        with stage("masks"):
            boxes = self._without_trailing_nan(merge_boxes) if mask_logits is not None else merge_boxes[:0]
            count = len(boxes)
            if mask_logits is None:
                masks = torch.zeros((0, *size), dtype=torch.bool, device=self.device)
            else:
                masks = paste_masks(mask_logits[:count], boxes, size, test.mask_threshold)
        with stage("merge"):
            return panoptic_merge(
                masks,
                torch.where(labels >= 0, scores, -1.0)[:count],  # padding is below every threshold
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

    def _is_merged(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mark detections that are candidates of the merge, (..., D) bool; padding is not marked."""
        return (labels >= 0) & (scores >= self.config.test.instance_score_threshold)

    def _without_trailing_nan(self, boxes: Tensor) -> Tensor:
        """Remove the trailing rows of boxes (..., D, 4) that are NaN in every image, if counts are read."""
        return boxes[..., : self._leading(~boxes[..., 0].isnan()), :] if self.reads_counts else boxes

    def _leading(self, needed: Tensor) -> int:
        """Return the largest number of leading True in a row of `needed` (..., D); D where counts are not read."""
        return int(needed.sum(-1).max()) if self.reads_counts else needed.shape[-1]


def _mean_stuff_logits(outputs: Sequence[NetworkOutput]) -> Tensor | None:
    """Average the stuff logits of several networks, at stride 4."""
    if outputs[0].stuff_logits is None or len(outputs) == 1:
        return outputs[0].stuff_logits
    return torch.stack([cast("Tensor", output.stuff_logits) for output in outputs]).float().mean(dim=0)


def _concatenate(candidates: Sequence[Candidates]) -> Candidates:
    """Join candidates (B, N_i, ...) of several views and networks to (B, sum N_i, ...)."""
    if len(candidates) == 1:
        return candidates[0]
    return Candidates(*(torch.cat(columns, dim=1) for columns in zip(*candidates, strict=True)))
