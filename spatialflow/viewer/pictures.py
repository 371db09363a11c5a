# SPDX-License-Identifier: Apache-2.0
"""Pictures of the page: photographs, thumbnails, and maps of segments that a browser decodes exactly."""

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import cv2
import deflate
import numpy as np

from spatialflow.files import encode_jpeg
from spatialflow.images import ImageError, read_image
from spatialflow.panoptic.extents import number_ids
from spatialflow.panoptic.pages import fit
from spatialflow.panoptic.rules import PanopticFormatError
from spatialflow.threads import available_cores
from spatialflow.viewer.catalog import Catalog, ViewError

THUMBNAIL_SIDE = 320
"""Longer side of a thumbnail in pixels."""

PHOTOGRAPH = "photo"
"""Name of the picture without segments, beside the keys of the sides."""

_OPACITY = 0.55
_LARGEST_SLOT = 0xFFFF


class ByteCache:
    """Results of calls by key; the ones used last are kept, up to a number of bytes.

    Args:
        limit: largest sum of the lengths, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._items: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """Return the bytes of a key; `make` is called if they are not in the cache."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        content = make()
        with self._lock:
            if key not in self._items and len(content) <= self._limit:
                self._items[key] = content
                self._size += len(content)
                while self._size > self._limit:
                    _, dropped = self._items.popitem(last=False)
                    self._size -= len(dropped)
        return content


class Pictures:
    """Makes the pictures of a catalog on demand, and caches them.

    Args:
        catalog: the images.
        side: longer side of photographs and maps in pixels; larger ones are made smaller.
    """

    def __init__(self, catalog: Catalog, side: int) -> None:
        self._catalog, self._side = catalog, side
        self._sizes: dict[int, tuple[int, int]] = {}
        self._small, self._large = ByteCache(48 << 20), ByteCache(48 << 20)
        self._decoding = threading.Semaphore(available_cores())  # bounds the memory of decoded images

    def photograph(self, index: int) -> bytes:
        """Return the photograph as JPEG, upright and in colors, whatever the file's format.

        Raises:
            ViewError: the photograph is not found.
            ImageError: it cannot be decoded.
        """
        return self._large.get((index, PHOTOGRAPH), lambda: self._photograph(index))

    def photograph_size(self, index: int) -> tuple[int, int]:
        """Return the width and height of the file of a photograph, with the errors of `photograph`."""
        if index not in self._sizes:
            self.photograph(index)
        return self._sizes[index]

    def shown_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height in which an image of a size is shown."""
        shown_height, shown_width = fit((height, width), self._side)
        return shown_width, shown_height

    def _photograph(self, index: int) -> bytes:
        with self._decoding:
            pixels = read_image(self._catalog.photograph(self._catalog.images[index]))
            self._sizes[index] = pixels.shape[1], pixels.shape[0]
            return encode_jpeg(_resize(pixels, *fit(pixels.shape, self._side)), 88)

    def thumbnail(self, index: int, key: str) -> bytes:
        """Return a small JPEG: the photograph, or the segments of a side over it or, without it, over gray.

        Raises:
            ViewError: the photograph is not found.
            ImageError: the photograph cannot be decoded.
            PanopticFormatError: the id map cannot be read.
        """
        return self._small.get((index, key), lambda: self._thumbnail(index, key))

    def _thumbnail(self, index: int, key: str) -> bytes:
        image = self._catalog.images[index]
        annotation = None if key == PHOTOGRAPH else self._catalog.annotation(image, key)
        with self._decoding:
            photograph = None
            try:
                photograph = read_image(self._catalog.photograph(image))
            except (ViewError, ImageError):
                if annotation is None:
                    raise
            if annotation is None:
                assert photograph is not None
                return encode_jpeg(_resize(photograph, *fit(photograph.shape, THUMBNAIL_SIDE)), 82)
            id_map = self._catalog.read_map(index, key)
            height, width = fit(id_map.shape, THUMBNAIL_SIDE)
            ids, slots = number_ids(_sample(id_map, height, width))
            color_of = self._catalog.colors(annotation["segments_info"])
            is_segment = np.array([number in color_of for number in ids.tolist()])
            palette = np.array([color_of.get(number, (0, 0, 0))[::-1] for number in ids.tolist()], np.uint8)
            background = (
                np.full((height, width, 3), 128, np.uint8) if photograph is None else _resize(photograph, height, width)
            )
            mixed = cv2.addWeighted(background, 1 - _OPACITY, palette[slots], _OPACITY, 0)
            return encode_jpeg(np.where(is_segment[slots][..., None], mixed, background), 82)

    def slots(self, index: int, key: str) -> bytes:
        """Return the map of a side as a browser decodes it: see `encode_slots`.

        Raises:
            ViewError: the map has too many segments, or lies outside its folder.
            PanopticFormatError: the id map cannot be read.
        """
        return self._large.get((index, key), lambda: self._slots(index, key))

    def _slots(self, index: int, key: str) -> bytes:
        with self._decoding:
            id_map = self._catalog.read_map(index, key)
            return encode_slots(_sample(id_map, *fit(id_map.shape, self._side)))


def encode_slots(id_map: np.ndarray) -> bytes:
    """Encode a map of ids without loss: zlib data of numbers in little-endian order.

    The numbers are width, height and the number of ids (uint32 each), the ids in ascending order (uint32 each), and the
    index of every pixel's id in that list (uint16 each).

    Args:
        id_map: (H, W) integer ids, 0 or more.

    Raises:
        ViewError: the map has more than 65,536 ids.
    """
    ids, indices = number_ids(id_map)
    if len(ids) > _LARGEST_SLOT + 1:
        raise ViewError(f"the map has {len(ids)} ids; the page shows at most {_LARGEST_SLOT + 1}")
    height, width = id_map.shape
    head = struct.pack("<III", width, height, len(ids))
    content = head + ids.astype("<u4").tobytes() + indices.astype("<u2").tobytes()
    return bytes(deflate.zlib_compress(content, 6))


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _sample(id_map: np.ndarray, height: int, width: int) -> np.ndarray:
    """Take the nearest pixel for each pixel of a smaller map."""
    if id_map.shape == (height, width):
        return id_map
    rows, columns = (
        ((np.arange(count) + 0.5) * size / count).astype(int)
        for count, size in zip((height, width), id_map.shape, strict=True)
    )
    return id_map[rows[:, None], columns]


PICTURE_ERRORS = (ViewError, ImageError, PanopticFormatError)
"""What the functions of this module raise for files that cannot be shown."""
