# SPDX-License-Identifier: Apache-2.0
"""Kinds of images that a Predictor takes, and their conversion to (H, W, 3) uint8 BGR."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeGuard

import cv2
import numpy as np
import torch
from torch import Tensor

from spatialflow.engine.stage_times import record_stages, stage, zero_times
from spatialflow.images import ChannelOrderWarning, ImageError, convert_pillow_image

if TYPE_CHECKING:
    import PIL.Image

Image: TypeAlias = "str | os.PathLike[str] | np.ndarray | Tensor | PIL.Image.Image"
"""One image. An (N, H, W, 3) array and an (N, C, H, W) tensor are iterables of N images."""

ChannelOrder: TypeAlias = Literal["bgr", "rgb"]
"""Order of the channels of NumPy arrays."""

_PACKAGE = os.path.join(Path(__file__).parents[1], "")
_COUNTS = (1, 3, 4)  # gray, color, color with transparency
_NUMPY_DTYPES = (torch.uint8, torch.float32, torch.float64)


class Source(NamedTuple):
    """An image of an iterable, before it is decoded."""

    position: int
    name: str
    image: Image | None  # None with a problem
    order: ChannelOrder  # of an array
    times: dict[str, float]  # by stage
    problem: str | None = None  # message of the ImageError of an image that the caller's thread could not convert


def check_order(order: ChannelOrder | None) -> ChannelOrder | None:
    """Return `order`; raise ValueError unless it is "bgr", "rgb" or None."""
    if order not in ("bgr", "rgb", None):
        raise ValueError(f"channel_order: must be 'bgr' or 'rgb', got {order!r}")
    return order


def is_path(image: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Tell whether an image is the path of a file."""
    return isinstance(image, (str, os.PathLike))


def is_one_image(images: Any) -> bool:
    """Tell whether `images` is one image, and not an iterable of images."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # of paths or images, such as a column of a table
        return False
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != 4
    return is_path(images) or _is_pillow_image(images)


def check_images(images: Iterable[Image]) -> None:
    """Raise TypeError unless `images` is an iterable of images."""
    rule = "images: must be an iterable of images"
    if is_path(images):
        raise TypeError(f"{rule}, got one path, {str(images)!r}; call the Predictor")
    if _is_pillow_image(images):
        raise TypeError(f"{rule}, got one PIL image; call the Predictor")
    if isinstance(images, (np.ndarray, Tensor)) and is_one_image(images):
        kind = "tensor" if isinstance(images, Tensor) else "array"
        raise TypeError(f"{rule}, got one {kind} of shape {tuple(images.shape)}; call the Predictor")
    if isinstance(images, (bytes, bytearray, memoryview)):
        raise TypeError(f"{rule}, got {type(images).__name__}; decode them: PIL.Image.open(io.BytesIO(data))")
    if isinstance(images, Mapping):
        raise TypeError(f"{rule}, got a {type(images).__name__}; pass its values()")
    try:
        iter(images)
    except TypeError:
        raise TypeError(f"{rule}, got {images!r:.80}") from None


def make_sources(images: Iterable[Image], order: ChannelOrder | None) -> Iterator[Source]:
    """Number and name images, in the caller's thread.

    Images that may change in the next step of an iterator are converted here, so that it may reuse their memory. So are
    those that need this thread. Others are converted where they are used, by `pixels_of`.

    Args:
        images: paths, images of Pillow, arrays and tensors.
        order: of the channels of arrays. None: BGR, with a ChannelOrderWarning for the first array that is probably
            RGB.
    """
    stays = isinstance(images, (Sequence, np.ndarray, Tensor))
    may_warn = order is None
    for position, image in enumerate(images):
        source = Source(position, _name_of(image, position), image, order or "bgr", zero_times())
        sign = _sign_of_rgb(image) if may_warn else None
        if sign is not None:
            may_warn = False
            _warn_of_order(source.name, sign)
        yield source if is_path(image) or (stays and _suits_any_thread(image)) else _convert(source)


def pixels_of(source: Source) -> np.ndarray:
    """Convert an image that is no path to (H, W, 3) uint8 BGR; an array of that kind is not copied.

    Raises:
        ImageError: the image has a wrong type, shape, dtype or range; the message names it, the rule and the value.
    """
    image, name = source.image, source.name
    if source.problem is not None:
        raise ImageError(source.problem)
    if isinstance(image, Tensor):
        return _pixels_of_tensor(image, name)
    if isinstance(image, np.ndarray):
        return _pixels_of_array(image, name, source.order)
    if _is_pillow_image(image):
        return convert_pillow_image(image, name)
    raise ImageError(f"{name}: must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")


def _convert(source: Source) -> Source:
    """Replace an image in memory by BGR pixels that share no memory with it, or note the problem."""
    with record_stages(source.times), stage("decode"):
        try:
            pixels = pixels_of(source)
        except ImageError as error:  # kept as text, as its traceback refers to the image
            return source._replace(image=None, problem=str(error))
        if isinstance(source.image, np.ndarray) and np.may_share_memory(pixels, source.image):
            pixels = pixels.copy()
    return source._replace(image=pixels, order="bgr")


def _suits_any_thread(image: Image) -> bool:
    """Tell whether `pixels_of` may be called in any thread.

    Several threads must not load one image of Pillow. The values of a tensor on a GPU belong to the caller's stream.
    Torch converts 16-bit tensors, with a team of OpenMP threads per thread that calls it.
    """
    if isinstance(image, Tensor):
        return image.device.type == "cpu" and image.dtype in _NUMPY_DTYPES
    return not _is_pillow_image(image)


def _is_pillow_image(image: Any) -> TypeGuard[PIL.Image.Image]:
    module = sys.modules.get("PIL.Image")  # who has an image of Pillow has imported it
    kind = getattr(module, "Image", None)  # None while another thread imports the module
    return kind is not None and isinstance(image, kind)


def _name_of(image: Image, position: int) -> str:
    """Name an image by its file, or else by its position."""
    path: Any = image
    if _is_pillow_image(image):
        path = getattr(image, "filename", "")  # "" of an image that no file has
        path = os.fsdecode(path) if isinstance(path, bytes) else path
    return Path(path).name if is_path(path) and path else f"image {position}"


def _pixels_of_array(image: np.ndarray, name: str, order: ChannelOrder) -> np.ndarray:
    shape, rule = image.shape, "must be an (H, W, 3), (H, W, 4) or (H, W) array"
    if image.ndim not in (2, 3) or (image.ndim == 3 and shape[2] not in _COUNTS):
        fix = ""
        if image.ndim == 3 and shape[0] in _COUNTS:
            fix = "; its channels are first: array.transpose(1, 2, 0)"
        raise ImageError(f"{name}: {rule}, got shape {shape}{fix or _batch_fix(image.ndim)}")
    if image.dtype != np.uint8:
        raise ImageError(f"{name}: must be a uint8 array, got {image.dtype}{_dtype_fix(image)}")
    if image.size == 0:
        raise ImageError(f"{name}: has no pixels, got shape {shape}")
    image = np.asarray(image)  # of a subclass of arrays
    if image.ndim == 2 or shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if shape[2] == 4:
        return cv2.cvtColor(image, cv2.COLOR_RGBA2BGR if order == "rgb" else cv2.COLOR_BGRA2BGR)
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if order == "rgb" else image


def _dtype_fix(image: np.ndarray) -> str:
    """Return the conversion of an array of a common other dtype to uint8, with the values it is for."""
    if image.dtype == bool:
        return "; use array.astype(numpy.uint8) * 255"
    if image.dtype == np.uint16:
        return "; for values of 16 bits, use (array >> 8).astype(numpy.uint8)"
    if image.dtype.kind not in "iuf" or image.size == 0:
        return ""
    low, high = image.min(), image.max()
    values = f" with values {low:g} .. {high:g}"
    if not np.isfinite(low + high):
        return " with values that are not finite"
    if low < 0 or high > 255:
        return f"{values}; scale them to 0..255"
    if image.dtype.kind == "f" and high <= 1:
        return f"{values}; use (array * 255).round().astype(numpy.uint8)"
    return f"{values}; use array.round().astype(numpy.uint8)"


def _pixels_of_tensor(image: Tensor, name: str) -> np.ndarray:
    shape, rule = tuple(image.shape), "must be a (3, H, W), (4, H, W), (1, H, W) or (H, W) tensor"
    if image.ndim not in (2, 3) or (image.ndim == 3 and shape[0] not in _COUNTS):
        fix = ""
        if image.ndim == 3 and shape[2] in _COUNTS:
            fix = "; its channels are last: tensor.permute(2, 0, 1), in RGB order"
        raise ImageError(f"{name}: {rule}, got shape {shape}{fix or _batch_fix(image.ndim)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ImageError(f"{name}: must be a uint8 tensor, or a floating-point one in 0..1, got {image.dtype}")
    if image.numel() == 0:
        raise ImageError(f"{name}: has no pixels, got shape {shape}")
    if image.layout != torch.strided or image.device.type == "meta":
        raise ImageError(f"{name}: must be a dense tensor with values, got {image.layout} on {image.device}")
    if image.dtype not in _NUMPY_DTYPES:
        image = image.float()
    pixels = image.numpy(force=True)
    if pixels.dtype != np.uint8:
        _check_range(pixels, name)
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.ndim == 2 or len(pixels) == 1:
        return cv2.cvtColor(pixels.reshape(shape[-2:]), cv2.COLOR_GRAY2BGR)
    interleaved = pixels[:3].transpose(1, 2, 0)
    if interleaved.flags.c_contiguous:  # the tensor is a view of such an array
        return cv2.cvtColor(interleaved, cv2.COLOR_RGB2BGR)
    return cv2.merge([np.ascontiguousarray(pixels[channel]) for channel in (2, 1, 0)])


def _check_range(values: np.ndarray, name: str) -> None:
    """Raise ImageError unless the values of a floating-point tensor lie in 0..1."""
    low, high = values.min(), values.max()  # NaN if any value is
    if low >= 0 and high <= 1:
        return
    rule = f"{name}: a floating-point tensor must have values in 0..1"
    if np.isnan(low):
        raise ImageError(f"{rule}, got NaN")
    fix = "pass the image before its normalization, as the Predictor normalizes"
    if low >= 0 and high <= 255:
        fix = "use tensor / 255, or a uint8 tensor"
    raise ImageError(f"{rule}, got {low:g} .. {high:g}; {fix}")


def _batch_fix(ndim: int) -> str:
    """Return what to pass instead of an iterable of batches."""
    if ndim != 4:
        return ""
    return "; it is a batch: pass it alone, or chain batches by itertools.chain.from_iterable(batches)"


def _sign_of_rgb(image: Any) -> str | None:
    """Return why an array is probably RGB; None without a reliable sign. Colors are no sign."""
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] not in (3, 4):
        return None
    is_reversed = image.strides[2] < 0
    reader = _reader_of(image)
    if reader is not None:  # its channels are RGB, and a reversed view of it is BGR
        return None if is_reversed else reader
    return "its channels are a reversed view, as by array[..., ::-1]" if is_reversed else None


def _reader_of(image: np.ndarray) -> str | None:
    """Tell which library that reads RGB made an array or the array that it is a view of, if that is evident."""
    while True:
        if type(image).__module__.startswith("imageio."):
            return "imageio read it"
        if not isinstance(image.base, np.ndarray):
            break
        image = image.base
    # NumPy takes the memory of a PIL image as bytes. `numpy.frombuffer` gives one dimension, which a view may reshape.
    if isinstance(image.base, bytes) and image.ndim == 3:
        return "NumPy made it of a PIL image"
    return None


def _warn_of_order(name: str, sign: str) -> None:
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):  # to the caller's line
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{name}: this array is probably RGB, because {sign}, but arrays are read as BGR. "
        f"Pass channel_order='rgb' for RGB, or channel_order='bgr' to keep BGR without this warning.",
        ChannelOrderWarning,
        stacklevel=level,
    )
