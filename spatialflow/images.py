# SPDX-License-Identifier: Apache-2.0
"""Reading of image files, without torch."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spatialflow.errors import DataWarning
from spatialflow.image_formats import FORMAT_LIBRARIES, RAW_ADVICE, RAW_SUFFIXES, pillow_format
from spatialflow.requirements import require_packages

require_packages("cv2", "PIL")
import cv2  # noqa: E402  # after the check

if TYPE_CHECKING:
    import PIL.Image


class ImageError(ValueError):
    """An image that cannot be used; the message names the file (or argument) and the reason."""


class ImageWarning(DataWarning):
    """A defect of an image file that did not prevent reading it; the message names the file and the defect."""


class ChannelOrderWarning(UserWarning):
    """An array whose channels are probably in another order than the one it is read in; the message has the remedy."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 BGR.

    The content decides about the format, whatever the suffix. Grayscale is copied to all channels, transparency is
    dropped, 16-bit values lose their low byte, and EXIF orientation is applied. The first of several images in one file
    is read, such as the first frame of an animated GIF. Data after the end of the image are ignored. A JPEG in which
    only the end marker is missing is read, with an `ImageWarning`.

    `spatialflow.image_formats.IMAGE_SUFFIXES` lists the usual suffixes. HEIC needs the package pillow-heif.

    Raises:
        ImageError: the file is absent, is not an image, is truncated or damaged, or needs a library that is missing.
    """
    path = os.fsdecode(path)
    try:
        content = Path(path).read_bytes()
    except IsADirectoryError as error:
        example = f"sorted(Path({path!r}).glob('*.jpg'))"
        raise ImageError(f"{path}: cannot be read: {error.strerror}; give its files, such as {example}") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # the name contains a zero byte
        raise ImageError(f"{path!r}: is not a file name: {error}") from None
    if not content:
        raise ImageError(f"{path}: is empty")
    if Path(path).suffix.lower() in RAW_SUFFIXES:
        raise ImageError(f"{path}: {RAW_ADVICE}")
    kind = pillow_format(content)
    if kind is not None:
        return _read_with_pillow(path, content, kind)
    image = decode_image(path, content)
    if image is None and _lacks_only_the_end_marker(content):
        warnings.warn(f"{path}: has no end marker, but all pixels", ImageWarning, stacklevel=2)
        image = decode_image(path, content.rstrip(b"\xff") + _JPEG_END)
    if image is not None:
        return image
    kind = _format_by_header(content)
    if kind is None:
        raise ImageError(f"{path}: is not an image of a known format, or is damaged")
    if kind in _OPENCV_FORMATS:
        raise ImageError(f"{path}: is truncated or damaged")
    raise ImageError(f"{path}: is a file of the format {kind}, which is not read; convert it to PNG")


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read (height, width) of an image as `read_image` gives it, from the header of its file.

    Raises:
        ImageError: the file cannot be read, is not an image, or needs a library that is missing.
    """
    from PIL import Image

    path = os.fsdecode(path)
    try:
        with open(path, "rb") as file:
            _prepare_pillow(path, pillow_format(file.read(512)))
        with Image.open(path) as image:
            (width, height), turn = image.size, _orientation(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "is no image that can be read"
        raise ImageError(f"{path}: {reason}") from None
    transpositions = Image.Transpose
    turned = (transpositions.TRANSPOSE, transpositions.ROTATE_270, transpositions.TRANSVERSE, transpositions.ROTATE_90)
    return (width, height) if turn in turned else (height, width)


def convert_pillow_image(image: PIL.Image.Image, name: str) -> np.ndarray:
    """Convert an image of Pillow to (H, W, 3) uint8 BGR, by the rules of `read_image`.

    Args:
        image: of any mode that Pillow converts to RGB; the current frame is read. It is loaded if it was not, and not
            changed otherwise.
        name: of the image, for errors.

    Raises:
        ImageError: the image cannot be decoded, has no pixels, or has pixels of 32 bits, whose range is unknown.
    """
    from PIL import Image

    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise ImageError(f"{name}: is truncated or damaged: {error}") from None
    if 0 in image.size:
        raise ImageError(f"{name}: has no pixels, got size {image.size}")
    if image.mode in ("I", "F"):
        fix = "scale the values to 0..255 and convert it to mode 'L'"
        raise ImageError(f"{name}: must have 8 or 16 bits per channel, got Pillow's mode {image.mode!r}; {fix}")
    turn = _orientation(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "La":  # premultiplied, which Pillow converts to one mode only
        image = image.convert("LA")
    elif image.mode == "P" and "transparency" in image.info:  # Pillow warns of a direct conversion
        image = image.convert("RGBA")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb = rgb if turn is None else rgb.transpose(turn)
    return cv2.cvtColor(np.asarray(rgb), cv2.COLOR_RGB2BGR)


def _orientation(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """Return the transposition that EXIF asks for; None for none, and for EXIF data that are damaged."""
    from PIL import ExifTags, Image

    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return None
    turns = Image.Transpose
    return {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(value)


def _read_with_pillow(path: str, content: bytes, kind: str) -> np.ndarray:
    """Decode a file of a format that `pillow_format` names, to (H, W, 3) uint8 BGR.

    OpenCV does not apply the orientation of AVIF, and cannot decode HEIC. For AVIF and JPEG 2000 it is used where
    Pillow was built without them.
    """
    from PIL import Image, features

    _prepare_pillow(path, kind)
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)
    if feature is not None and feature not in features.get_supported():
        decoded = decode_image(path, content)
        if decoded is None:
            reason = f"is damaged, or Pillow and OpenCV here cannot decode {kind}"
            raise ImageError(f"{path}: {reason}: pip install --upgrade pillow")
        return decoded
    try:
        with Image.open(io.BytesIO(content), formats=[kind]) as image:
            return convert_pillow_image(image, str(path))
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: cannot be decoded: {error}") from None
    except Exception:
        raise ImageError(f"{path}: is truncated or damaged") from None


def _prepare_pillow(path: str, kind: str | None) -> None:
    """Import the library with which Pillow decodes a format; raise ImageError if it is missing."""
    from PIL import Image

    if kind not in FORMAT_LIBRARIES:
        return
    try:
        plugin = importlib.import_module(FORMAT_LIBRARIES[kind].module)
    except ImportError:
        raise ImageError(f"{path}: {FORMAT_LIBRARIES[kind].advice}") from None
    if kind == "HEIF" and kind not in Image.OPEN:  # the other library registers itself
        plugin.register_heif_opener()


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


def decode_image(path: str | os.PathLike[str], content: bytes, flags: int = cv2.IMREAD_COLOR) -> np.ndarray | None:
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


_OPENCV_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "PPM", "SUN")
"""Formats that OpenCV decodes, by Pillow's names."""

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


def _format_by_header(content: bytes) -> str | None:
    """Return Pillow's name of the format; None for an unknown one."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format
    except Exception:
        return None
