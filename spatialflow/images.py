# SPDX-License-Identifier: Apache-2.0
"""Reading of image files, without torch."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spatialflow.errors import DataWarning
from spatialflow.requirements import require_packages

require_packages("cv2", "PIL")
import cv2  # noqa: E402  # after the check


class ImageError(ValueError):
    """An image that cannot be used; the message names the file (or argument) and the reason."""


class ImageWarning(DataWarning):
    """A defect of an image file that did not prevent reading it; the message names the file and the defect."""


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 BGR.

    Grayscale is copied to all channels, transparency is dropped, 16-bit values lose their low byte, and EXIF
    orientation is applied. The first of several images in one file is read. Data after the end of the image are
    ignored. A JPEG in which only the end marker is missing is read, with an `ImageWarning`.

    Raises:
        ImageError: the file is absent, is not an image, or is truncated or damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # the name contains a zero byte
        raise ImageError(f"{str(path)!r}: is not a file name: {error}") from None
    if not content:
        raise ImageError(f"{path}: is empty")
    image = decode_image(path, content)
    if image is None and _lacks_only_the_end_marker(content):
        warnings.warn(f"{path}: has no end marker, but all pixels", ImageWarning, stacklevel=2)
        image = decode_image(path, content.rstrip(b"\xff") + _JPEG_END)
    if image is None and _has_known_header(content):
        raise ImageError(f"{path}: is truncated or damaged")
    if image is None:
        raise ImageError(f"{path}: is not an image of a known format, or is damaged")
    return image


def _is_too_short_for_its_header(content: bytes) -> bool:
    """Tell whether a PNG or JPEG has far too few bytes for the size in its header, the size that decoders allocate."""
    if content.startswith(_PNG_BEGIN):
        position = len(_PNG_BEGIN)
        while position + 8 <= len(content):
            length = int.from_bytes(content[position : position + 4], "big")
            if length > len(content):
                return True
            if content[position + 4 : position + 8] == b"IEND":  # decoders stop here
                break
            position += 12 + length
        width, height = (int.from_bytes(content[position : position + 4], "big") for position in (16, 20))
        depth, color = (int.from_bytes(content[position : position + 1], "big") for position in (24, 25))
        line = width * {2: 3, 4: 2, 6: 4}.get(color, 1) * depth // 8
        return height * line > 1032 * len(content)  # largest compression ratio of DEFLATE
    if content.startswith(_JPEG_BEGIN):
        position = len(_JPEG_BEGIN)
        while position + 9 <= len(content) and content[position] == 0xFF:
            if content[position + 1] in (0xC0, 0xC1, 0xC2):  # Huffman-coded frames: at least one bit per 8x8 block
                height, width = (
                    int.from_bytes(content[start : start + 2], "big") for start in (position + 5, position + 7)
                )
                return height * width > 8 * 64 * len(content)
            position += (
                1 if content[position + 1] == 0xFF else 2 + int.from_bytes(content[position + 2 : position + 4], "big")
            )
    return False


def decode_image(path: str | Path, content: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray | None:
    """Decode an image with OpenCV; None for a file that is truncated or damaged.

    OpenCV before 4.12 fills the missing part of a truncated JPEG with gray.

    Raises:
        ImageError: the file `path` is much too short for the size in its header, or has too many pixels.
    """
    if _is_too_short_for_its_header(content):
        raise ImageError(f"{path}: is truncated or damaged: too short for the image that its header describes")
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded: {error.err}") from None


_PNG_BEGIN, _JPEG_BEGIN, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"


def _lacks_only_the_end_marker(content: bytes) -> bool:
    """Tell whether no pixel of a JPEG depends on data after its last byte.

    Decoders read the missing part of a truncated image from the data that follow, and skip data after a complete image.
    So the image is decoded with several different continuations, including restart markers. Pillow decodes, because
    OpenCV would print warnings. A progressive image that ends exactly between two scans passes: it has all pixels, in
    lower quality.
    """
    if not content.startswith(_JPEG_BEGIN):
        return False
    content = content.rstrip(b"\xff")  # first byte of the end marker, or fill bytes
    pixels = _decode_with_pillow(content + _JPEG_END)
    if pixels is None:
        return False
    continued = (_decode_with_pillow(content + tail + _JPEG_END) for tail in _continuations())
    return all(image is not None and np.array_equal(pixels, image) for image in continued)


def _continuations() -> Iterator[bytes]:
    """Generate entropy-coded data that differ in every bit position, with restart markers 0..7 in every rotation."""
    for number in range(17):
        data = bytes([15 * number]) * 64
        yield data + b"".join(bytes([0xFF, 0xD0 + (number + marker) % 8]) + data for marker in range(8))


def _decode_with_pillow(content: bytes) -> np.ndarray | None:
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(content)))
    except Exception:  # Pillow's decoders raise exceptions of many types
        return None


def _has_known_header(content: bytes) -> bool:
    from PIL import Image

    try:
        Image.open(io.BytesIO(content)).close()
    except Exception:
        return False
    return True
