# SPDX-License-Identifier: Apache-2.0
"""The SpatialFlow network, assembled from backbone, FPN, sub-networks and heads."""

from typing import TYPE_CHECKING, NamedTuple, Optional, cast

from torch import Tensor, nn

from spatialflow.config import Config
from spatialflow.models.anchors import STRIDES
from spatialflow.models.subnets import SEGMENTATION_LEVELS, SubnetFeatures
from spatialflow.ops import multilevel_roi_align

if TYPE_CHECKING:
    from spatialflow.data.categories import Categories


class NetworkOutput(NamedTuple):
    """Raw outputs for a batch of N images, (N, 3, H, W)."""

    features: list[Tensor]  # P3..P7, (N, fpn_channels, H / stride, W / stride), rounded up
    class_logits: list[Tensor]  # P3..P7, (N, A * num_things, ...), anchor-major
    box_deltas: list[Tensor]  # P3..P7, (N, A * 4, ...)
    stuff_features: list[Tensor] | None  # P3..P5, (N, C, ...); None without a stuff head
    thing_features: list[Tensor] | None  # P3..P5, (N, C, ...), inputs of RoIAlign; None without a thing head
    stuff_logits: Tensor | None  # (N, num_stuff, H / 4, W / 4); None without a stuff head


class SpatialFlow(nn.Module):
    """A panoptic network, or RetinaNet where both segmentation heads are None: (N, 3, H, W) -> `NetworkOutput`.

    Args:
        backbone: images -> [C3, C4, C5].
        fpn: [C3, C4, C5] -> [P3, ..., P7].
        subnets: [P3, ..., P7] -> SubnetFeatures.
        box_head: cls and reg features -> class logits and box deltas.
        thing_head: RoI features -> mask logits, or None.
        stuff_head: stuff features -> stuff logits, or None.
        config: the configuration that the parts were built from, for inference and checkpoints.

    Attributes:
        categories: the classes that the network was trained or loaded with, for inference and checkpoints; None: those
            that `config` names.
        trained_on: the only images that the weights know, in words; None: not known, or photographs.
    """

    categories: Optional["Categories"] = None
    trained_on: str | None = None

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        subnets: nn.Module,
        box_head: nn.Module,
        thing_head: nn.Module | None,
        stuff_head: nn.Module | None,
        config: Config,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.subnets = subnets
        self.box_head = box_head
        self.thing_head = thing_head
        self.stuff_head = stuff_head
        self.config = config

    def forward(self, images: Tensor) -> NetworkOutput:
        """Compute the raw outputs of all dense heads.

        Args:
            images: (N, 3, H, W) floating point, normalized RGB; H and W multiples of 32.

        Returns:
            NetworkOutput. Mask logits need boxes, see `thing_logits`; `heads.upsample_stuff_logits` brings stuff
            logits to the size of the images.

        Raises:
            ValueError: `images` has another shape or type.
        """
        _check_images(images)
        pyramid = self.fpn(self.backbone(images))
        tasks: SubnetFeatures = self.subnets(pyramid)
        class_logits, box_deltas = self.box_head(tasks.cls, tasks.reg)
        return NetworkOutput(
            features=pyramid,
            class_logits=class_logits,
            box_deltas=box_deltas,
            stuff_features=None if self.stuff_head is None else tasks.stuff,
            thing_features=None if self.thing_head is None else tasks.thing,
            stuff_logits=None if self.stuff_head is None else self.stuff_head(tasks.stuff),
        )

    def thing_logits(
        self,
        thing_features: list[Tensor],
        rois: Tensor,
        labels: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Compute mask logits for boxes.

        Args:
            thing_features: P3..P5 thing features.
            rois: (K, 5): image index in the batch, x1, y1, x2, y2 in pixels of the network's input.
            labels: (K,) int64 classes; None: all classes.
            active: (K,) bool, boxes whose logits are computed; None: all. The logits of other boxes are unspecified.

        Returns:
            (K, 2S, 2S), or (K, num_things, 2S, 2S) without labels, where S is `roi_size` of the configuration.
        """
        return cast("nn.Module", self.thing_head)(self.roi_features(thing_features, rois), labels, active)

    def roi_features(self, thing_features: list[Tensor], rois: Tensor) -> Tensor:
        """Pool RoI features (K, C, S, S): RoIAlign over P3..P5, aligned, adaptive sampling."""
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


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: must have shape (N, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images: must be floating point (normalized), got {images.dtype}")
    count, _, height, width = images.shape
    if count == 0 or height == 0 or width == 0 or height % 32 or width % 32:
        raise ValueError(f"images: N must be at least 1, H and W positive multiples of 32, got {tuple(images.shape)}")
