# SPDX-License-Identifier: Apache-2.0
"""torchvision's module of RoIAlign over a feature pyramid, computed by `multilevel_roi_align`."""

# No `from __future__ import annotations`: torch.jit.script reads the type of `scales` from its annotation.

import math
from collections.abc import Sequence
from typing import Optional

from torch import Tensor, nn

from spatialflow.ops.checking import integer, items, number, pair
from spatialflow.ops.multilevel_roi_align import multilevel_roi_align


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign over named maps of a pyramid, with the arguments and results of torchvision's `MultiScaleRoIAlign`.

    The first call infers `scales`, the cells per pixel of each map, as powers of two from the heights of the maps and
    of the largest image. Later calls keep them; assign None to `scales` to infer them again. `MultilevelRoIAlign` takes
    strides instead, which is simpler.

    Args:
        featmap_names: names of the maps to pool from; all other maps are ignored.
        output_size: bins per axis (PH, PW), or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: ceil(RoI size / bins), by axis and RoI.
        canonical_scale: side in pixels of a RoI that is pooled from `canonical_level`.
        canonical_level: level of such a RoI; the map of level k has a stride of 2 ** k.

    Raises:
        ValueError: an argument of a wrong kind, naming it.
    """

    scales: Optional[list[float]]  # noqa: UP045  # torch.jit.script of torch 2.11 needs this form

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        op = "MultiScaleRoIAlign"
        if isinstance(featmap_names, str):
            raise ValueError(f"{op}: featmap_names must be a list of names, got {featmap_names!r}")
        self.featmap_names = items(op, "featmap_names", featmap_names)
        height, width = pair(op, "output_size", output_size)
        self.output_size = (int(height), int(width))
        self.sampling_ratio = int(integer(op, "sampling_ratio", sampling_ratio))
        self.canonical_scale = number(op, "canonical_scale", canonical_scale)
        self.canonical_level = int(integer(op, "canonical_level", canonical_level))
        self.scales = None

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool the boxes of all images.

        Args:
            x: maps (N, C, H_l, W_l) by name, finest first.
            boxes: N tensors (K_i, 4) of (x1, y1, x2, y2), in pixels of the image.
            image_shapes: (height, width) of every image; read only while `scales` is None.

        Returns:
            (K, C, PH, PW) in the order of the boxes, with K the sum of all K_i.

        Raises:
            RuntimeError: a shape, dtype or device that does not fit, naming the argument of `multilevel_roi_align`.
            ValueError: no map of `featmap_names`, maps that are not ordered finest first, no images, or boxes that are
                not one tensor per image.
        """
        features: list[Tensor] = []
        for name, feature in x.items():
            if name in self.featmap_names:
                features.append(feature)
        if len(features) == 0:
            raise ValueError(
                f"MultiScaleRoIAlign: x must hold a map of featmap_names, {self.featmap_names}, got {list(x.keys())}"
            )
        scales = self.scales
        if scales is None:
            scales = _inferred_scales(features, image_shapes)
            self.scales = scales
        strides = [1 / scale for scale in scales]
        first, last = _rounded_log2(strides[0]), _rounded_log2(strides[-1])
        if last < first:
            raise ValueError(f"MultiScaleRoIAlign: the maps of x must be ordered finest first, got strides {strides}")
        # torchvision counts levels from that of the first map to that of the last one. If the maps skip a stride,
        # there are more levels than maps; RoIs of the levels beyond give zeros, as from a map without cells.
        for _ in range(len(features), last - first + 1):
            features.append(features[0].new_empty((features[0].shape[0], features[0].shape[1], 0, 0)))
            strides.append(1.0)
        levels = last - first + 1
        # torchvision adds its 1e-6 to the logarithm.
        finest_scale = self.canonical_scale * 2.0 ** (first - self.canonical_level - 1e-6)
        return multilevel_roi_align(
            features[:levels], boxes, self.output_size, strides[:levels], self.sampling_ratio, False, finest_scale
        )

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio})"
        )


def _inferred_scales(features: list[Tensor], image_shapes: list[tuple[int, int]]) -> list[float]:
    """Return the nearest power of two to the height of each map over that of the largest image."""
    if len(image_shapes) == 0:
        raise ValueError("MultiScaleRoIAlign: image_shapes must have the size of every image, got none")
    height = 0
    for shape in image_shapes:
        height = max(height, shape[0])
    scales: list[float] = []
    for feature in features:
        scales.append(2.0 ** _rounded_log2(float(feature.shape[2]) / float(height)))
    return scales


def _rounded_log2(value: float) -> int:
    """Return the nearest integer to the binary logarithm, in TorchScript too."""
    return int(round(math.log(value) / math.log(2.0)))  # noqa: RUF046  # TorchScript: no log2, and round gives a float
