# SPDX-License-Identifier: Apache-2.0
"""RoIAlign: the mean of bilinear samples in every bin of every region of interest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spatialflow.ops.arrays import are_tensors, as_list, with_arrays
from spatialflow.ops.checking import flag, integer, is_checking, number, pair, require_batch_indices, require_finite
from spatialflow.ops.differentiable import DifferentiableOp, autocast
from spatialflow.ops.fake import register_fake
from spatialflow.ops.layout import is_channels_last, memory_format_of


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool the features of regions of interest to a fixed size by the mean of bilinear samples (RoIAlign).

    Args:
        input: features (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        boxes: (K, 5) rows of (batch index, x1, y1, x2, y2), or a list of N tensors (K_i, 4) of (x1, y1, x2, y2), one
            per image. Pixels of the image; any floating dtype, used in float32 (float64 for float64 features).
        output_size: bins per axis (PH, PW), or one number for both.
        spatial_scale: feature cells per pixel of the boxes, e.g. 1 / 8 for a stride of 8.
        sampling_ratio: samples per bin and axis, at most 65536; 0 or less: ceil(RoI size / bins), by axis and RoI.
        aligned: shift boxes by half a cell, so that cell centers are at half-integer coordinates (detectron2's rule).
            False: the original rule, which also widens RoIs to at least one cell.

    Returns:
        (K, C, PH, PW), the dtype of `input`; channels-last if `input` is.

    Raises:
        RuntimeError: a shape, dtype, device or size that does not fit, naming the argument.
        ValueError: `output_size`, `spatial_scale`, `sampling_ratio`, `aligned` or `boxes` of a wrong kind; within
            `spatialflow.ops.checked()` also a box that is not finite or a batch index outside the batch.

    Note:
        Samples more than one cell outside the map count as zero. A RoI with a batch index outside [0, N) gives zeros
        and no gradient. So does a RoI with a coordinate that is not finite in the type it is used in. Batch indices are
        truncated to integers.

        Without `aligned`, a RoI without extent or reversed (x2 < x1) becomes one cell wide. With `aligned`, a positive
        `sampling_ratio` makes the samples of such a RoI coincide or run backwards; otherwise it has no samples and
        gives zeros. A feature that is not finite reaches only bins that give it a weight other than 0. A map without
        cells gives zeros. Without RoIs or channels the result is empty.

        Gradients flow to `input` only (boxes get none), in reverse and forward mode and to any order. The CPU
        backward is deterministic. The CUDA backward is deterministic in float64, and under
        `torch.use_deterministic_algorithms(True)` in every dtype.

        Complexity: time is proportional to K * C times the cells that the bins of a RoI read; samples of a bin that
        share cells are merged. Features whose channels are not adjacent in memory are first copied to channels-last.

        Difference from torchvision: boxes are used in float32 also for 16-bit features, and a RoI that is not finite or
        not of the batch gives zeros. mmcv and detectron2 have `aligned=True` by default.

    Examples:
        >>> features = torch.rand(2, 256, 50, 84)  # of two images, stride 8
        >>> boxes = torch.tensor([[0, 10.0, 20.0, 200.0, 120.0], [1, 0.0, 0.0, 64.0, 64.0]])  # image, x1, y1, x2, y2
        >>> roi_align(features, boxes, output_size=7, spatial_scale=1 / 8, aligned=True).shape
        torch.Size([2, 256, 7, 7])

    Source: He et al., Mask R-CNN (2017), section 3; signature and result of torchvision.ops.roi_align.
    """
    if not are_tensors(input, *as_list(boxes)):
        return with_arrays(roi_align, locals())
    height, width = pair("roi_align", "output_size", output_size)
    boxes = as_rows("roi_align", boxes, input)
    spatial_scale = number("roi_align", "spatial_scale", spatial_scale)
    if type(sampling_ratio) is not int:
        sampling_ratio = integer("roi_align", "sampling_ratio", sampling_ratio)
    aligned = flag("roi_align", "aligned", aligned)
    pooled = _roi_align(autocast(input), boxes, height, width, spatial_scale, sampling_ratio, aligned)
    if is_checking():  # values; the operator has checked the shapes
        require_finite("roi_align", "boxes", boxes)
        require_batch_indices("roi_align", "boxes", boxes[:, 0], input.shape[0])
    return pooled


class RoIAlign(nn.Module):
    """Module of `roi_align`: `forward(input, boxes)` calls it with the settings given here.

    Args:
        output_size: as for `roi_align`.
        spatial_scale: as for `roi_align`.
        sampling_ratio: as for `roi_align`.
        aligned: as for `roi_align`.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        """Call `roi_align` with the module's settings."""
        return roi_align(input, boxes, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


def as_rows(op: str, boxes: Tensor | list[Tensor], input: Tensor) -> Tensor:
    """Return boxes as (K, 5) rows of (batch index, x1, y1, x2, y2)."""
    if isinstance(boxes, Tensor):
        return boxes
    if len(boxes) != input.shape[0]:
        raise ValueError(
            f"{op}: boxes as a list must hold one tensor per image, got {len(boxes)} for a batch of {input.shape[0]}"
        )
    rows = []
    for index, image_boxes in enumerate(boxes):
        if image_boxes.dim() != 2 or image_boxes.shape[1] != 4:
            raise ValueError(f"{op}: boxes[{index}] must have shape (K, 4), got {tuple(image_boxes.shape)}")
        if image_boxes.dtype in (torch.float16, torch.bfloat16):
            image_boxes = image_boxes.float()  # bfloat16 cannot represent 257, which may be an index of an image
        rows.append(torch.cat((image_boxes.new_full((image_boxes.shape[0], 1), index), image_boxes), dim=1))
    return torch.cat(rows) if rows else input.new_zeros((0, 5))


@register_fake("roi_align")
def _(
    input: Tensor,
    boxes: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    torch._check(input.dim() == 4, lambda: f"roi_align: input must be (N, C, H, W), got {tuple(input.shape)}")
    torch._check(boxes.dim() == 2, lambda: f"roi_align: boxes must have shape (K, 5), got {tuple(boxes.shape)}")
    size = (boxes.shape[0], input.shape[1], pooled_height, pooled_width)
    memory_format = memory_format_of(input)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


@register_fake("_roi_align_backward")
def _(
    grad_output: Tensor,
    boxes: Tensor,
    *settings: Any,
) -> Tensor:
    *size, channels_last, _deterministic = settings[5:]  # size: (N, C, H, W)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format)


# The operator is linear in its features. It is therefore also applied to their tangents, and to the cotangents of their
# gradients.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, boxes, *ctx.settings = inputs
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)
    ctx.shape = input.shape
    ctx.channels_last = is_channels_last(input)


def _backward(ctx: Any, needs: Any, grad_output: Tensor) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    if not needs[0]:
        return (None,) * 7
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad = _roi_align_backward(grad_output, boxes, *ctx.settings, *ctx.shape, ctx.channels_last, deterministic)
    return grad, None, None, None, None, None, None


def _jvp(ctx: Any, input: Tensor | None, *_: Any) -> Tensor | None:
    (boxes,) = ctx.saved_tensors
    return None if input is None else _roi_align(input, boxes, *ctx.settings)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad_output, boxes, *ctx.settings = inputs
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)


def _backward_backward(ctx: Any, needs: Any, grad_grad_input: Tensor) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    grad = _roi_align(grad_grad_input, boxes, *ctx.settings[:5]) if needs[0] else None
    return (grad,) + (None,) * 12


def _backward_jvp(ctx: Any, grad_output: Tensor | None, *_: Any) -> Tensor | None:
    (boxes,) = ctx.saved_tensors
    return None if grad_output is None else _roi_align_backward(grad_output, boxes, *ctx.settings)


_roi_align = DifferentiableOp("roi_align", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_roi_align_backward = DifferentiableOp(
    "_roi_align_backward", setup_context=_backward_setup_context, backward=_backward_backward, jvp=_backward_jvp
)
