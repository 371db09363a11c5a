# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of decoded images for the network: resize, normalize and pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, as_list, with_arrays
from spatialflow.ops.checking import height_and_width, integer, items, numbers
from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


def preprocess_images(
    images: Tensor | Sequence[Tensor],
    sizes: tuple[int, int] | Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    divisor: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Resize, normalize and pad images in one pass: BGR bytes in, a channels-last batch of RGB numbers out.

    Args:
        images: (H, W, 3) uint8 in BGR order, or a list of such images of any sizes; any strides.
        sizes: (H, W) to resize to; a list of them for a list of images.
        mean: mean of the red, green and blue channel, in units of the pixels (0 .. 255).
        std: standard deviation of these channels, in the same units.
        divisor: height and width of the batch are the smallest multiples of it that hold every resized image.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        (N, 3, H, W) `dtype` in channels-last layout, N = 1 for a single image. Zeros right of and below each image.

    Raises:
        RuntimeError: a shape, dtype, size or number that does not fit, naming the argument.
        ValueError: `sizes`, `mean` or `std` that is not a sequence of numbers, or a size or `divisor` that is not an
            integer, naming it.

    Note:
        Equal to OpenCV to the last bit in float32: `resize` with INTER_LINEAR, `subtract` in float32 and `multiply` by
        1 / std in float64. There is no antialiasing, but an image resized to exactly half its size is averaged over
        2 x 2 pixels, as in OpenCV. The result has no gradient.

        Complexity: time and memory are linear in the pixels of the result. No resized or normalized image is stored in
        between.

        Difference from torchvision and mmcv: resize, conversion to RGB, normalization and padding are one operator.

    Examples:
        >>> image = torch.zeros(480, 640, 3, dtype=torch.uint8)  # as cv2.imread gives it, through torch.from_numpy
        >>> preprocess_images(image, (800, 1067), mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4)).shape
        torch.Size([1, 3, 800, 1088])

    Source: OpenCV, `imgproc/src/resize.cpp` (fixed-point arithmetic for 8-bit images).
    """
    if not are_tensors(*as_list(images)):
        return with_arrays(preprocess_images, locals())
    if not isinstance(images, (list, tuple)):
        images, sizes = [cast("Tensor", images)], [cast("tuple[int, int]", sizes)]
    if len(images) == 0:
        raise RuntimeError("preprocess_images: images must hold at least one image")
    sizes = items("preprocess_images", "sizes", sizes)
    sizes = [height_and_width("preprocess_images", f"sizes[{index}]", size) for index, size in enumerate(sizes)]
    heights, widths = [height for height, _ in sizes], [width for _, width in sizes]
    mean, std = numbers("preprocess_images", "mean", mean), numbers("preprocess_images", "std", std)
    divisor = integer("preprocess_images", "divisor", divisor)
    return _preprocess_images(list(images), heights, widths, mean, std, divisor, dtype)


_preprocess_images = without_gradient("preprocess_images")


@register_fake("preprocess_images")
def _(
    images: list[Tensor],
    heights: list[int],
    widths: list[int],
    mean: list[float],
    std: list[float],
    divisor: int,
    dtype: torch.dtype,
) -> Tensor:
    height, width = ((max(sides) + divisor - 1) // divisor * divisor for sides in (heights, widths))
    return torch.empty(
        (len(images), 3, height, width), dtype=dtype, device=images[0].device, memory_format=torch.channels_last
    )
