# SPDX-License-Identifier: Apache-2.0
"""The assembly of the network: backbone, FPN, sub-networks, heads."""

from typing import NamedTuple

from torch import Tensor, nn

from spatialflow.config import Config
from spatialflow.models.anchors import STRIDES
from spatialflow.models.subnets import SEGMENTATION_LEVELS, SubnetFeatures
from spatialflow.ops import multilevel_roi_align


class NetworkOutput(NamedTuple):
    """Raw outputs for a batch of N images, (N, 3, H, W)."""

    features: list[Tensor]  # P3..P7, (N, fpn_channels, H / stride, W / stride)
    class_logits: list[Tensor]  # P3..P7, (N, A * num_things, ...), anchor-major
    box_deltas: list[Tensor]  # P3..P7, (N, A * 4, ...)
    stuff_features: list[Tensor] | None  # P3..P5, (N, C, ...); None without a stuff head
    thing_features: list[Tensor] | None  # P3..P5, (N, C, ...), what RoIs are taken from; None without a thing head
    stuff_logits: Tensor | None  # (N, num_stuff, H, W); None without a stuff head


class SpatialFlow(nn.Module):
    """A panoptic network (or RetinaNet, where both segmentation heads are None).

    Args:
        backbone: images -> [C3, C4, C5].
        fpn: [C3, C4, C5] -> [P3, ..., P7].
        subnets: [P3, ..., P7] -> SubnetFeatures.
        box_head: cls and reg features -> class logits and box deltas.
        thing_head: RoI features -> mask logits, or None.
        stuff_head: stuff features -> stuff logits, or None.
        config: the configuration the parts were built from, kept for inference and checkpoints.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        subnets: nn.Module,
        box_head: nn.Module,
        thing_head: nn.Module | None,
        stuff_head: nn.Module | None,
        config: Config,
    ):
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.subnets = subnets
        self.box_head = box_head
        self.thing_head = thing_head
        self.stuff_head = stuff_head
        self.config = config

    def forward(self, images: Tensor) -> NetworkOutput:
        """Raw outputs of all dense heads.

        Args:
            images: (N, 3, H, W) floating point, normalized RGB; H and W multiples of 32.

        Returns:
            NetworkOutput. Masks need boxes first: see `thing_logits`.

        Raises:
            ValueError: `images` has another shape or type.
        """
        output, stuff_logits = self.dense(images)
        if stuff_logits is None:
            return output
        return output._replace(stuff_logits=self.stuff_head.enlarge(stuff_logits))

    def dense(self, images: Tensor) -> tuple[NetworkOutput, Tensor | None]:
        """As `forward`, but the stuff logits come apart and at stride 4, before their last upsampling."""
        _check_images(images)
        pyramid = self.fpn(self.backbone(images))
        tasks: SubnetFeatures = self.subnets(pyramid)
        class_logits, box_deltas = self.box_head(tasks.cls, tasks.reg)
        stuff_logits = None if self.stuff_head is None else self.stuff_head(tasks.stuff)
        output = NetworkOutput(
            pyramid,
            class_logits,
            box_deltas,
            None if self.stuff_head is None else tasks.stuff,
            None if self.thing_head is None else tasks.thing,
            None,
        )
        return output, stuff_logits

    def thing_logits(
        self,
        thing_features: list[Tensor],
        rois: Tensor,
        labels: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Mask logits for boxes.

        Args:
            thing_features: P3..P5 thing features.
            rois: (K, 5): image index in the batch, x1, y1, x2, y2 in pixels of the network's input.
            labels: (K,) int64 classes; None: all classes.
            active: (K,) bool, boxes whose logits are wanted; None: all. Those of the others are unspecified.

        Returns:
            (K, 28, 28), or (K, num_things, 28, 28) without labels; for roi_size 14.
        """
        return self.thing_head(self.roi_features(thing_features, rois), labels, active)

    def roi_features(self, thing_features: list[Tensor], rois: Tensor) -> Tensor:
        """(K, C, 14, 14): RoIAlign over P3..P5, aligned, adaptive sampling."""
        model = self.config.model
        return multilevel_roi_align(
            thing_features,
            rois,
            model.roi_size,
            STRIDES[:SEGMENTATION_LEVELS],
            sampling_ratio=0,
            aligned=True,
            finest_scale=model.finest_scale,
        )


def _check_images(images: Tensor):
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: must have shape (N, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images: must be floating point (normalized), got {images.dtype}")
    if (
        images.shape[0] == 0
        or images.shape[2] == 0
        or images.shape[3] == 0
        or images.shape[2] % 32
        or images.shape[3] % 32
    ):
        raise ValueError(f"images: N must be at least 1, H and W positive multiples of 32, got {tuple(images.shape)}")
