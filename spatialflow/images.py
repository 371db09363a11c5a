# SPDX-License-Identifier: Apache-2.0
"""Reads image files as training and prediction do; no torch."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from spatialflow.errors import DataWarning


class ImageError(ValueError):
    """An image that cannot be used; the message names the file (or argument) and the reason."""


class ImageWarning(DataWarning):
    """An image that was read although its file has a defect; the message names both."""


def read_image(path: str | Path) -> np.ndarray:
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
    except ValueError as error:  # a zero byte
        raise ImageError(f"{str(path)!r}: is no file name: {error}") from None
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


def decode_image(path: str | Path, content: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray | None:
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


def _decode_with_pillow(content: bytes) -> np.ndarray | None:
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
