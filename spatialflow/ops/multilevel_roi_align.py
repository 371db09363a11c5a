# SPDX-License-Identifier: Apache-2.0
"""RoIAlign over a feature pyramid: pool each region from the level that fits its size, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatialflow.ops.arrays import are_tensors, as_list, with_arrays
from spatialflow.ops.checking import (
    flag,
    integer,
    is_checking,
    number,
    numbers,
    pair,
    require_batch_indices,
    require_finite,
)
from spatialflow.ops.differentiable import DifferentiableOp, autocast
from spatialflow.ops.fake import register_fake
from spatialflow.ops.layout import is_channels_last, memory_format_of
from spatialflow.ops.roi_align import as_rows


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56,
) -> Tensor:
    """Pool regions of interest from a feature pyramid (RoIAlign), each from the level that fits its size.

    Args:
        features: L levels (N, C, H_l, W_l), finest first; all of one dtype (float32, float64, float16 or bfloat16), any
            strides.
        boxes: (K, 5) rows of (batch index, x1, y1, x2, y2), or a list of N tensors (K_i, 4) of (x1, y1, x2, y2), one
            per image. Pixels of the image; any floating dtype, used in float32 (float64 for float64 features).
        output_size: bins per axis (PH, PW), or one number for both.
        strides: pixels per cell of each level, e.g. (8, 16, 32). They are not inferred from the sizes of the maps.
        sampling_ratio: samples per bin and axis, at most 65536; 0 or less: ceil(RoI size / bins), by axis and RoI.
        aligned: shift boxes by half a cell (see `roi_align`).
        finest_scale: RoIs whose sqrt(area) is less than twice this number of pixels use the first level.

    Returns:
        (K, C, PH, PW) in the order of `boxes`; the dtype of the features, channels-last if `features[0]` is.

    Raises:
        RuntimeError: a shape, dtype, device or size that does not fit, naming the argument.
        ValueError: `features`, `output_size`, `strides`, `sampling_ratio`, `finest_scale` or `boxes` of a wrong kind;
            within `spatialflow.ops.checked()` also a box that is not finite or a batch index outside the batch.

    Note:
        Level of a RoI: clamp(floor(log2(sqrt(area) / finest_scale + 1e-6)), 0, L - 1), with the area in square pixels.
        A RoI of negative area (reversed along one axis) has level 0. Everything else is as in `roi_align`. A RoI with a
        coordinate that is not finite, or with a batch index outside [0, N), gives zeros and no gradient. So does a RoI
        whose level has no cells. Without RoIs or channels the result is empty.

        Gradients flow to every level (boxes get none), in reverse and forward mode and to any order. The CPU backward
        is deterministic. The CUDA backward is deterministic in float64, and under
        `torch.use_deterministic_algorithms(True)` in every dtype.

        Complexity: as for `roi_align`. On CUDA all levels share one launch, and the host does not wait for the device.

        Difference from torchvision's `MultiScaleRoIAlign`: features are a list and strides are arguments. `aligned` is
        True by default. This package has that class too. `finest_scale` is
        `canonical_scale / 2 ** (canonical_level - log2(strides[0]))`, also for detectron2's `ROIPooler`. mmdetection's
        `SingleRoIExtractor` has the same levels.

    Examples:
        >>> features = [torch.rand(1, 256, 100, 168), torch.rand(1, 256, 50, 84), torch.rand(1, 256, 25, 42)]
        >>> boxes = [torch.tensor([[10.0, 20.0, 60.0, 90.0], [100.0, 50.0, 700.0, 600.0]])]  # of the only image
        >>> multilevel_roi_align(features, boxes, output_size=14, strides=(8, 16, 32)).shape
        torch.Size([2, 256, 14, 14])

    Source: Lin et al., Feature Pyramid Networks (2017), equation 1; level rule and pooling of mmdetection's
    SingleRoIExtractor. torchvision's MultiScaleRoIAlign adds its 1e-6 after the logarithm, and keeps the scales that it
    inferred from the first batch.
    """
    if not are_tensors(*as_list(features), *as_list(boxes)):
        return with_arrays(multilevel_roi_align, locals())
    if isinstance(features, Tensor) or len(features) == 0:
        got = f"a tensor of shape {tuple(features.shape)}" if isinstance(features, Tensor) else "none"
        raise ValueError(f"multilevel_roi_align: features must be a sequence of at least one level, got {got}")
    height, width = pair("multilevel_roi_align", "output_size", output_size)
    boxes = as_rows("multilevel_roi_align", boxes, features[0])
    strides = numbers("multilevel_roi_align", "strides", strides)
    if type(sampling_ratio) is not int:
        sampling_ratio = integer("multilevel_roi_align", "sampling_ratio", sampling_ratio)
    pooled = _multilevel_roi_align(
        [autocast(feature) for feature in features],
        boxes,
        height,
        width,
        strides,
        sampling_ratio,
        flag("multilevel_roi_align", "aligned", aligned),
        number("multilevel_roi_align", "finest_scale", finest_scale),
    )
    if is_checking():  # values; the operator has checked the shapes
        require_finite("multilevel_roi_align", "boxes", boxes)
        require_batch_indices("multilevel_roi_align", "boxes", boxes[:, 0], features[0].shape[0])
    return pooled


class MultilevelRoIAlign(nn.Module):
    """Module of `multilevel_roi_align`: `forward(features, boxes)` calls it with the settings given here.

    Args:
        output_size: as for `multilevel_roi_align`.
        strides: as for `multilevel_roi_align`.
        sampling_ratio: as for `multilevel_roi_align`.
        aligned: as for `multilevel_roi_align`.
        finest_scale: as for `multilevel_roi_align`.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        strides: Sequence[float],
        sampling_ratio: int = 0,
        aligned: bool = True,
        finest_scale: float = 56,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(numbers("MultilevelRoIAlign", "strides", strides))
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.finest_scale = number("MultilevelRoIAlign", "finest_scale", finest_scale)

    def forward(self, features: list[Tensor], boxes: Tensor | list[Tensor]) -> Tensor:
        """Call `multilevel_roi_align` with the module's settings."""
        return multilevel_roi_align(
            features, boxes, self.output_size, self.strides, self.sampling_ratio, self.aligned, self.finest_scale
        )

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return (
            f"output_size={self.output_size}, strides={self.strides}, sampling_ratio={self.sampling_ratio}, "
            f"aligned={self.aligned}, finest_scale={self.finest_scale}"
        )


@register_fake("multilevel_roi_align")
def _(
    features: list[Tensor],
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    strides: list[float],
    sampling_ratio: int,
    aligned: bool,
    finest_scale: float,
) -> Tensor:
    first = features[0]
    torch._check(
        first.dim() == 4, lambda: f"multilevel_roi_align: features[0] must be (N, C, H, W), got {tuple(first.shape)}"
    )
    torch._check(
        boxes.dim() == 2, lambda: f"multilevel_roi_align: boxes must have shape (K, 5), got {tuple(boxes.shape)}"
    )
    size = (boxes.shape[0], first.shape[1], pooled_height, pooled_width)
    memory_format = memory_format_of(first)
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=memory_format)


@register_fake("_multilevel_roi_align_backward")
def _(
    grad_output: Tensor,
    boxes: Tensor,
    *settings: Any,
) -> list[Tensor]:
    *_, batch, channels, heights, widths, channels_last, _deterministic = settings
    options: dict[str, Any] = {"dtype": grad_output.dtype, "device": grad_output.device}
    options["memory_format"] = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty((batch, channels, height, width), **options) for height, width in zip(heights, widths, strict=True)
    ]


# The operator is linear in its features. It is therefore also applied to their tangents, and to the cotangents of their
# gradients.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, *ctx.settings = inputs
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)
    ctx.shape = features[0].shape[:2]
    ctx.heights = [feature.shape[2] for feature in features]
    ctx.widths = [feature.shape[3] for feature in features]
    ctx.channels_last = is_channels_last(features[0])


def _backward(ctx: Any, needs: Any, grad_output: Tensor) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    needed = needs[0] if isinstance(needs[0], (list, tuple)) else [needs[0]] * len(ctx.heights)
    grads = None
    if any(needed):
        grads = _multilevel_roi_align_backward(
            grad_output,
            boxes,
            *ctx.settings,
            *ctx.shape,
            ctx.heights,
            ctx.widths,
            ctx.channels_last,
            torch.are_deterministic_algorithms_enabled(),
        )
    return grads, None, None, None, None, None, None, None


def _jvp(ctx: Any, features: list[Tensor | None], *_: Any) -> Tensor | None:
    (boxes,) = ctx.saved_tensors
    present = next((tangent for tangent in features if tangent is not None), None)
    if present is None:
        return None
    tangents = [
        present.new_zeros((*ctx.shape, height, width)) if tangent is None else tangent
        for tangent, height, width in zip(features, ctx.heights, ctx.widths, strict=True)
    ]
    return _multilevel_roi_align(tangents, boxes, *ctx.settings)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, boxes, *settings = inputs
    ctx.settings, ctx.sizes = settings[:6], settings[6:]
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)


def _backward_backward(ctx: Any, needs: Any, *grad_outputs: Any) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    grads = grad_outputs[0] if isinstance(grad_outputs[0], (list, tuple)) else grad_outputs
    grad = _multilevel_roi_align(list(grads), boxes, *ctx.settings) if needs[0] else None
    return (grad,) + (None,) * 13


def _backward_jvp(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
    (boxes,) = ctx.saved_tensors
    if grad_output is None:
        return None
    return tuple(_multilevel_roi_align_backward(grad_output, boxes, *ctx.settings, *ctx.sizes))


_multilevel_roi_align = DifferentiableOp(
    "multilevel_roi_align", setup_context=_setup_context, backward=_backward, jvp=_jvp
)
_multilevel_roi_align_backward = DifferentiableOp(
    "_multilevel_roi_align_backward",
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    jvp=_backward_jvp,
)
