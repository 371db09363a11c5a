# SPDX-License-Identifier: Apache-2.0
"""Reading, resizing, normalizing and padding of images, with the released arithmetic; numpy in, numpy out.

Training uses the steps one by one, between its other transforms; at inference `spatialflow.ops.preprocess_images` does
them in one pass, with equal results.
"""

import io
import warnings
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence, Union

import cv2
import numpy as np


class ImageError(ValueError):
    """An image that cannot be used; the message names the file (or argument) and the reason."""


class ImageWarning(UserWarning):
    """An image that was read although its file has a defect; the message names both."""


class Fitted(NamedTuple):
    """How an image becomes a network input, and what is needed to go back."""

    valid_size: tuple[int, int]  # (H, W) of the resized image
    padded_size: tuple[int, int]  # (H, W) with the padding at the right and bottom
    original_size: tuple[int, int]  # (H, W) of the image as read
    scale: tuple[float, float]  # x and y factor original -> valid, rounded to float32


def read_image(path: Union[str, Path]) -> np.ndarray:
    """Decodes an image file to (H, W, 3) uint8 BGR.

    Grayscale is spread over the channels, transparency is dropped, 16-bit values lose their low byte, EXIF orientation
    is applied. Of several pictures in one file the first is read. Data behind the end of a picture are passed over. A
    JPEG that lacks nothing but its end marker is read, with an `ImageWarning`.

    Raises:
        ImageError: the file is absent, no image, truncated or damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    if not content:
        raise ImageError(f"{path}: is empty")
    image = decode_image(path, content)
    if image is None and _lacks_only_the_end_marker(content):
        warnings.warn(f"{path}: has no end marker; all its pixels are there", ImageWarning, stacklevel=2)
        image = decode_image(path, content.rstrip(b"\xff") + _JPEG_END)
    if image is None and _has_known_header(content):
        raise ImageError(f"{path}: is truncated or damaged")
    if image is None:
        raise ImageError(f"{path}: is not an image of a known format, or is damaged")
    return image


def _promises_more_than_it_holds(content: bytes) -> bool:
    """True for a PNG or JPEG that is much too short for its pixels; decoders take the memory before they notice."""
    if content.startswith(_PNG_BEGIN):
        at = len(_PNG_BEGIN)
        while at + 8 <= len(content):
            length = int.from_bytes(content[at : at + 4], "big")
            if length > len(content):
                return True
            if content[at + 4 : at + 8] == b"IEND":  # what follows is not read
                break
            at += 12 + length
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        depth, color = (int.from_bytes(content[at : at + 1], "big") for at in (24, 25))
        line = width * {2: 3, 4: 2, 6: 4}.get(color, 1) * depth // 8
        return height * line > 1032 * len(content)  # the most that DEFLATE gains
    if content.startswith(_JPEG_BEGIN):
        at = len(_JPEG_BEGIN)
        while at + 9 <= len(content) and content[at] == 0xFF:
            if content[at + 1] in (0xC0, 0xC1, 0xC2):  # frames in Huffman code: at least a bit for each 8x8 block
                height, width = (int.from_bytes(content[start : start + 2], "big") for start in (at + 5, at + 7))
                return height * width > 8 * 64 * len(content)
            at += 1 if content[at + 1] == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


def decode_image(
    path: Union[str, Path], content: bytes, flags: int = cv2.IMREAD_COLOR
) -> Union[np.ndarray, None]:
    """OpenCV's result, which is None for a truncated file (from OpenCV 4.12 on; before, a gray rest).

    Raises:
        ImageError: the file, named `path`, would take much more memory than it has pixels for, or has too many.
    """
    if _promises_more_than_it_holds(content):
        raise ImageError(f"{path}: is truncated or damaged: too short for the image that its header describes")
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded: {error.err}") from None


_PNG_BEGIN, _JPEG_BEGIN, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"


def _lacks_only_the_end_marker(content: bytes) -> bool:
    """True if no pixel of a JPEG depends on what could have followed its last byte.

    Decoders fill what is missing from a cut picture with what comes next, and skip what comes behind a whole one. So
    data of several kinds are appended, restart markers among them; Pillow decodes, as OpenCV would print warnings. A
    progressive picture that ends exactly between two scans passes: it has all its pixels, in lower quality.
    """
    if not content.startswith(_JPEG_BEGIN):
        return False
    content = content.rstrip(b"\xff")  # the first half of the end marker, or filling
    first = _decode_with_pillow(content + _JPEG_END)
    return first is not None and all(
        np.array_equal(first, _decode_with_pillow(content + tail + _JPEG_END)) for tail in _continuations()
    )


def _continuations() -> Iterator[bytes]:
    """Entropy-coded data that differ in every bit position, with the restart markers 0..7 in every rotation."""
    for number in range(17):
        data = bytes([15 * number]) * 64
        yield data + b"".join(bytes([0xFF, 0xD0 + (number + marker) % 8]) + data for marker in range(8))


def _decode_with_pillow(content: bytes) -> Union[np.ndarray, None]:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(content)))
    except Exception:  # of whatever kind, as Pillow's decoders raise many
        return None


def _has_known_header(content: bytes) -> bool:
    from PIL import Image

    try:
        Image.open(io.BytesIO(content)).close()
    except Exception:
        return False
    return True


def check_image(image: np.ndarray, name: str = "image") -> np.ndarray:
    """`image` if it is (H, W, 3) uint8 with at least one pixel; ImageError otherwise."""
    if not isinstance(image, np.ndarray):
        raise ImageError(f"{name}: must be a path or an (H, W, 3) uint8 array, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(f"{name}: must be (H, W, 3) uint8 in BGR order, got {image.shape} {image.dtype}")
    if image.size == 0:
        raise ImageError(f"{name}: has no pixels, got shape {image.shape}")
    return image


def fit_size(size: tuple[int, int], short_edge: int, long_edge: float) -> tuple[int, int]:
    """(H, W) scaled until it fits `short_edge` and `long_edge`; each side is int(x * factor + 0.5) and at least 1."""
    h, w = size
    factor = min(long_edge / max(h, w), short_edge / min(h, w))
    return max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize to (H, W), half-pixel centers, no antialias: OpenCV's."""
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resize of a label map to (H, W): source index floor(i * source / target), as OpenCV's INTER_NEAREST."""
    rows, columns = (
        np.minimum((np.arange(target) * (1.0 / (target / source))).astype(np.int64), source - 1)
        for source, target in zip(labels.shape, size)
    )
    return labels[rows][:, columns]


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(H, W, 3) uint8 BGR -> (3, H, W) float32 RGB, (x - mean) * (1 / std) in the released order of roundings."""
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)
    cv2.subtract(rgb, (*np.float64(mean), 0.0), rgb)
    cv2.multiply(rgb, (*(1.0 / np.float64(std)), 0.0), rgb)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def pad(image: np.ndarray, divisor: int) -> np.ndarray:
    """(C, H, W) with zeros at the right and bottom up to multiples of `divisor`."""
    _, h, w = image.shape
    return np.pad(image, ((0, 0), (0, -h % divisor), (0, -w % divisor)))


def fit_image(size: tuple[int, int], short_edge: int, long_edge: float, divisor: int = 32) -> Fitted:
    """What `spatialflow.ops.preprocess_images` makes of an image of `size` (H, W) for the network."""
    valid = fit_size(size, short_edge, long_edge)
    padded = tuple(side + -side % divisor for side in valid)
    scale = tuple(float(np.float32(new / old)) for new, old in zip(reversed(valid), reversed(size)))
    return Fitted(valid, padded, tuple(size), scale)
