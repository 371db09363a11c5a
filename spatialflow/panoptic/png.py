# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of COCO panoptic PNGs, several times as fast as a general PNG library.

libdeflate compresses and decompresses. The code that removes the filters is optimized for maps in which most
neighboring pixels are of the same segment (`csrc/evaluation/png_filters.h`). This module parses and writes the chunks.
"""

import struct
import zlib

import deflate
import numpy as np

from spatialflow import _evaluation

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33  # signature, and IHDR with its length, type and checksum
_RGB, _RGBA = 2, 6
_UP = 2  # the filter that subtracts the line above
_LEVEL = 6  # of compression; higher levels take a multiple of the time to save two percent of the size
_COLOR_TYPES = {0: "gray", _RGB: "RGB", 3: "palette", 4: "gray with alpha", _RGBA: "RGB with alpha"}


class PngKindError(ValueError):
    """A valid PNG of a kind that panoptic PNGs do not have."""


def decode_png(data: bytes) -> np.ndarray:
    """Decode a panoptic PNG to segment ids: red + 256 * green + 65536 * blue.

    Args:
        data: content of an 8-bit RGB or RGBA file that is not interlaced; alpha is dropped.

    Returns:
        (H, W) int32.

    Raises:
        PngKindError: data is a PNG of another kind.
        ValueError: data is something else, truncated or damaged. The checksums of the header and of the chunks IDAT and
            IEND are verified.
    """
    width, height, channels = _read_header(data)
    size = height * (1 + width * channels)
    # DEFLATE compresses by a factor of at most 1032. No memory is allocated if the header gives a larger image.
    if size > 1032 * (len(data) + 1):
        raise ValueError("damaged PNG: the file is too short for its image")
    try:
        lines = deflate.zlib_decompress(_compressed_pixels(data), size)
    except deflate.DeflateError:
        raise ValueError(f"damaged PNG: the compressed data do not fit {width}x{height} pixels") from None
    if len(lines) < size:
        raise ValueError("damaged PNG: the compressed data end before the last pixel")
    try:
        return _evaluation.unfilter_png(lines, height, width, channels)
    except ValueError as error:
        raise ValueError(f"damaged PNG: {error}") from None


def encode_png(colors: np.ndarray) -> bytes:
    """Encode an 8-bit RGB PNG.

    Args:
        colors: (H, W, 3) uint8 in the order red, green, blue; H and W are at least 1.

    Returns:
        The content of the file. Every line has the filter "up", which suits maps of segments.

    Raises:
        ValueError: colors has another shape or dtype.
    """
    if colors.ndim != 3 or colors.shape[2] != 3 or colors.size == 0 or colors.dtype != np.uint8:
        rule = "colors must be (H, W, 3) uint8 with at least one pixel"
        raise ValueError(f"{rule}, got {colors.shape} {colors.dtype}")
    height, width, channels = colors.shape
    rows = colors.reshape(height, -1)
    lines = np.empty((height, 1 + width * channels), np.uint8)
    lines[:, 0] = _UP
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, _RGB, 0, 0, 0)  # not interlaced
    parts = ((b"IHDR", header), (b"IDAT", deflate.zlib_compress(lines, _LEVEL)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes | bytearray) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)))


def _read_header(data: bytes) -> tuple[int, int, int]:
    """Read width, height and bytes per pixel."""
    if len(data) < _HEADER_END or data[:8] != _SIGNATURE:
        raise ValueError("not a PNG file")
    if data[12:16] != b"IHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise ValueError("damaged PNG: bad header")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    depth, color_type, interlaced = data[24], data[25], data[28]
    if depth != 8 or color_type not in (_RGB, _RGBA):
        kind = _COLOR_TYPES.get(color_type, f"of color type {color_type}")
        raise PngKindError(f"a panoptic PNG is 8-bit RGB, this one is {depth}-bit {kind}")
    if interlaced:
        raise PngKindError("interlaced PNG; a panoptic PNG must not be interlaced")
    if width == 0 or height == 0:
        raise ValueError("damaged PNG: the image has no pixels")
    return width, height, 3 if color_type == _RGB else 4


def _compressed_pixels(data: bytes) -> bytes:
    """Join the content of all IDAT chunks."""
    view = memoryview(data)
    parts: list[memoryview] = []
    position = _HEADER_END
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        if end + 4 > len(data):
            raise ValueError("damaged PNG: a chunk is longer than the file")
        kind = data[position + 4 : position + 8]
        if kind in (b"IDAT", b"IEND"):
            if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
                raise ValueError("damaged PNG: a checksum does not match")
            if kind == b"IEND":
                return b"".join(parts)
            parts.append(view[position + 8 : end])
        position = end + 4
    raise ValueError("truncated PNG: the file ends before its last chunk")
