# SPDX-License-Identifier: Apache-2.0
"""Image formats: suffixes of files, recognition by content, and the libraries that decode them.

This module imports neither OpenCV nor Pillow, so that listing a folder is fast.
"""

import re
from importlib.util import find_spec
from typing import NamedTuple


class FormatLibrary(NamedTuple):
    """An optional library that lets Pillow decode one more format."""

    title: str  # of the format
    suffixes: tuple[str, ...]
    module: str
    package: str  # argument of `pip install`

    @property
    def advice(self) -> str:
        """A phrase that says what to install."""
        return f"{self.title} needs {self.package}: pip install {self.package}"


FORMAT_LIBRARIES = {
    "HEIF": FormatLibrary("HEIC", (".heic", ".heif", ".hif"), "pillow_heif", "pillow-heif"),
    "JXL": FormatLibrary("JPEG XL", (".jxl",), "pillow_jxl", "pillow-jxl-plugin"),
}
"""Optional libraries by Pillow's name of the format."""

RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
"""Suffixes of cameras' raw files. Decoders of TIFF would read their thumbnails."""

RAW_ADVICE = "a camera's raw file must be converted to JPEG, PNG or TIFF first"

_ALWAYS_READ = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".gif"),
    *(".jp2", ".j2k", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm"),
)

UNREADABLE_SUFFIXES: dict[str, str] = dict.fromkeys(RAW_SUFFIXES, RAW_ADVICE) | {
    suffix: library.advice
    for library in FORMAT_LIBRARIES.values()
    if find_spec(library.module) is None
    for suffix in library.suffixes
}
"""Lower-case suffixes of photographs that this installation does not read, each with the remedy."""

IMAGE_SUFFIXES: tuple[str, ...] = (
    *_ALWAYS_READ,
    *(
        suffix
        for library in FORMAT_LIBRARIES.values()
        for suffix in library.suffixes
        if suffix not in UNREADABLE_SUFFIXES
    ),
)
"""Lower-case suffixes of the image files that this installation reads. The content decides about the format."""

_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_MAGIC = {
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",  # the bare codestream
    b"\0\0\0\x0cJXL \r\n\x87\n": "JXL",
    b"\xff\x0a": "JXL",
}

_SUFFIX_BY_FORMAT = {"GIF": ".gif", "JPEG2000": ".jp2", "JXL": ".jxl", "AVIF": ".avif", "HEIF": ".heic"}
_SUFFIX_BY_BEGINNING = (
    (rb"\xff\xd8\xff", ".jpg"),
    (rb"\x89PNG\r\n\x1a\n", ".png"),
    (rb"BM.{4}\0{4}", ".bmp"),
    (rb"II\*\0|MM\0\*", ".tif"),
    (rb"RIFF.{4}WEBP", ".webp"),
    (rb"P[25]\s", ".pgm"),
    (rb"P[36]\s", ".ppm"),
)


def image_suffix(content: bytes) -> str | None:
    """Find the usual suffix of an image file by its first 512 bytes; None for anything else."""
    kind = pillow_format(content)
    if kind is not None:
        return _SUFFIX_BY_FORMAT[kind]
    found = (suffix for pattern, suffix in _SUFFIX_BY_BEGINNING if re.match(pattern, content, re.DOTALL))
    return next(found, None)


def pillow_format(content: bytes) -> str | None:
    """Recognize a file that Pillow is to decode.

    Args:
        content: the whole file, or its first 512 bytes.

    Returns:
        Pillow's name of the format: "GIF", "JPEG2000", "AVIF", "HEIF" or "JXL"; None for other content.
    """
    for magic, name in _MAGIC.items():
        if content.startswith(magic):
            return name
    if content[4:8] != b"ftyp":
        return None
    box = content[8 : int.from_bytes(content[:4], "big")]  # major brand, version, compatible brands
    brands = {box[start : start + 4] for start in range(0, len(box), 4) if start != 4}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None
