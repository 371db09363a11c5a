# SPDX-License-Identifier: Apache-2.0
"""Stuff labels: a label map of the original image from the logits of the stuff head."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.checking import height_and_width, is_checking, require_finite
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def stuff_labels(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Return the best class of every pixel: the argmax of logits that are upsampled 4x, cropped and resized.

    The logits are upsampled bilinearly with aligned corners and cropped to the part without padding. Their labels are
    resized to the size of the original image by nearest neighbor. Only the pixels of the result are computed.

    Args:
        logits: (C, h, w) of one image, at a quarter of the network's input; float32, float64, float16 or bfloat16, any
            strides, read without a copy.
        valid_size: (H, W) of the image in the network's input, without padding: up to (4h, 4w).
        original_size: (H, W) of the result.

    Returns:
        A label map of size `original_size`, uint8; int64 if there are more than 256 classes.

    Raises:
        RuntimeError: a shape, dtype or size that does not fit, or no class at all, naming the argument.
        ValueError: a size that is not a pair of integers; within `spatialflow.ops.checked()`, a logit that is not
            finite.

    Note:
        Ties go to the lower class. A class whose interpolated value is NaN is never the best; if all are NaN, the label
        is 0. A NaN logit makes every value interpolated from it NaN, even with a weight of 0. For cell c of an axis,
        those values are at coordinates in [c - 1, c + 1). An infinite logit makes them infinite or NaN.

        Arithmetic is in float32 (float64 for float64), along y first, with the same roundings on every device. The
        result is integer and has no gradient.

        Complexity: time is linear in C times the pixels of the result. The upsampled logits, C * 16 * h * w numbers,
        are never stored.

        Difference from a composition of torch operators (`interpolate`, argmax, resize): one pass, and NaN is never the
        best class. torchvision, mmcv and detectron2 have no such operator.

    Examples:
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
def _(logits: Tensor, valid_height: int, valid_width: int, height: int, width: int) -> Tensor:
    torch._check(logits.dim() == 3, lambda: f"stuff_labels: logits must be (C, h, w), got {tuple(logits.shape)}")
    return logits.new_empty((height, width), dtype=torch.uint8 if logits.shape[0] <= 256 else torch.int64)
