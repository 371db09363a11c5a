# SPDX-License-Identifier: Apache-2.0
"""Mask pasting: resize the mask logits of each instance to its box in a mask of the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import height_and_width, is_checking, number, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def paste_masks(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Resize the mask of each instance to its box and return the pixels of the image that are inside.

    Probabilities (sigmoid of the logits) are interpolated bilinearly at the centers of the pixels, with zeros around
    the mask. A pixel is inside if its probability reaches the threshold.

    Args:
        mask_logits: (K, MH, MW), often square; float32, float64, float16 or bfloat16, any strides.
        boxes: (K, 4) x1, y1, x2, y2 in pixels of the image; any floating dtype, used in float64. They are neither
            rounded nor enlarged, and may reach beyond the image.
        size: (H, W) of the image.
        threshold: probability in (0, 1].

    Returns:
        (K, H, W) bool.

    Raises:
        RuntimeError: a shape, dtype, device, size or threshold that does not fit, naming the argument.
        ValueError: `size` that is not a pair of integers, or `threshold` that is not a number; within
            `spatialflow.ops.checked()`, a box that is not finite.

    Note:
        With a threshold of 0.5 or more, only pixels whose center is in the box can be inside. A box without extent,
        reversed, or with a coordinate that is not finite has no pixels. A pixel interpolated from a NaN logit, even
        with a weight of 0, is outside. A pixel between cells that all reach the threshold is inside whatever the
        rounding. The result is bool and has no gradient.

        Complexity: K * H * W bytes are written. Interpolation is done only for pixels in a box or within half a
        cell of it. No floating-point mask of the size of the image is stored.

        Difference from torchvision and detectron2 (`paste_masks_in_image`): logits instead of probabilities. The
        sampling rule is that of detectron2; torchvision enlarges and truncates the boxes and returns floats.

    Examples:
        >>> logits = torch.full((1, 28, 28), 5.0)
        >>> masks = paste_masks(logits, torch.tensor([[10.0, 20.0, 30.0, 60.0]]), (100, 80))
        >>> masks.shape, masks.sum()
        (torch.Size([1, 100, 80]), tensor(800))

    Source: He et al., Mask R-CNN (2017), section 3; sampling rule of mmdetection and detectron2
    (`grid_sample(align_corners=False)`).
    """
    if not are_tensors(mask_logits, boxes):
        return with_arrays(paste_masks, locals())
    height, width = height_and_width("paste_masks", "size", size)
    if is_checking():
        require_finite("paste_masks", "boxes", boxes)
    return _paste_masks(mask_logits, boxes, height, width, number("paste_masks", "threshold", threshold))


_paste_masks = without_gradient("paste_masks")


@register_fake("paste_masks")
def _(mask_logits: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    torch._check(
        mask_logits.dim() == 3, lambda: f"paste_masks: mask_logits must be (K, MH, MW), got {tuple(mask_logits.shape)}"
    )
    return mask_logits.new_empty((mask_logits.shape[0], height, width), dtype=torch.bool)
