# SPDX-License-Identifier: Apache-2.0
"""The end of the stuff head: logits at a quarter of the network's input become a label map of the photograph."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import height_and_width, is_checking, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def stuff_labels(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """The best class of every pixel of the photograph: argmax of logits that are enlarged four times, cropped, resized.

    The logits are enlarged bilinearly with aligned corners, cut to the part that is no padding, and their labels are
    resized to the photograph's size by nearest neighbor. Only the pixels of the result are ever computed.

    Args:
        logits: (C, h, w) of one image, at a quarter of the network's input; float32, float64, float16 or bfloat16, any
            strides without a copy.
        valid_size: (H, W) of the image in the network's input, without padding: up to (4h, 4w).
        original_size: (H, W) of the result.

    Returns:
        original_size, uint8; int64 where there are more than 256 classes.

    Raises:
        RuntimeError: a shape, dtype or size that does not fit, or no class at all, naming the argument.
        ValueError: within `spatialflow.ops.checked()`, a logit that is not finite.

    Remarks:
        Ties go to the lower class. A class whose interpolated value is NaN is never the best; where that leaves none,
        the label is 0. A logit that is not finite, plus infinity included, makes NaN of every value that interpolates
        it, if only with a weight of 0: at coordinates in [c - 1, c + 1) for cell c, along either axis. Arithmetic is in
        float32 (float64 for float64), along y first, with the same roundings on every device. No gradients: the result
        is integer.

    Example:
        >>> logits = torch.rand(54, 50, 68)  # of a network's input of 200x272, of which the image covers 200x267
        >>> stuff_labels(logits, (200, 267), (480, 640)).shape
        torch.Size([480, 640])

    Source: SpatialFlow's released code (`interpolate(align_corners=True)`, argmax, OpenCV's INTER_NEAREST).
    """
    if not are_tensors(logits):
        return with_arrays(stuff_labels, locals())
    valid_size = height_and_width("stuff_labels", "valid_size", valid_size)
    original_size = height_and_width("stuff_labels", "original_size", original_size)
    if is_checking():
        require_finite("stuff_labels", "logits", logits)
    return _stuff_labels(logits, *valid_size, *original_size)


_stuff_labels = without_gradient("stuff_labels")


@register_fake("stuff_labels")
def _(logits, valid_height, valid_width, height, width):
    torch._check(logits.dim() == 3, lambda: f"stuff_labels: logits must be (C, h, w), got {tuple(logits.shape)}")
    return logits.new_empty((height, width), dtype=torch.uint8 if logits.shape[0] <= 256 else torch.int64)
