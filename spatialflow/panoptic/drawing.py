# SPDX-License-Identifier: Apache-2.0
"""Pictures of panoptic results: colored segments with outlines, labels and scores over the photograph."""

import functools
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatialflow.panoptic.colors import segment_colors
from spatialflow.panoptic.extents import extents, number_ids
from spatialflow.panoptic.formats import as_id_map


def overlay(
    image: Any,
    id_map: np.ndarray,
    segments: Iterable[Mapping[str, Any]],
    categories: Iterable[Mapping[str, Any]] | None = None,
    *,
    opacity: float = 0.5,
    labels: bool = True,
    legend: bool = False,
    outlines: bool = True,
) -> np.ndarray:
    """Draw a panoptic result over its photograph.

    Args:
        image: (H, W, 3) uint8, BGR as OpenCV reads it; or a PIL image, whose EXIF orientation is applied.
        id_map: (H, W) integer segment ids. Pixels whose id is not in `segments`, such as void, keep the photograph,
            except under a label.
        segments: mappings with `id`, `category_id` and optionally `isthing` and `score`. A `score` that `float()` does
            not accept is ignored.
        categories: mappings with `id` and optionally `name`, `color` (red, green, blue) and `isthing`, which is used
            for segments without `isthing`. By default, the name is the id and the color is computed from the id.
        opacity: weight of the segment colors, 0 to 1; the photograph has the weight 1 - opacity.
        labels: write the category name, and the score if the segment has one, where labels do not cover each other.
            Segments that are too small have no label.
        legend: add lines below the picture with the colors and the names of the categories in it, the category of
            the largest area first. The number of instances follows the name where it is above one.
        outlines: draw a light and a dark line at the border of each segment.

    Returns:
        (H, W, 3) uint8, BGR; with a legend more than H lines. The same arguments give the same picture.

    Raises:
        ValueError: image or id_map has another shape or dtype, opacity is not a number in [0, 1], or a color is not
            three numbers from 0 to 255. Also if a uint32, int64 or uint64 id_map has an id outside [0, 2^24).
    """
    image = _as_bgr(image)
    id_map = as_id_map(id_map, "id_map")
    if image.shape[:2] != id_map.shape:
        raise ValueError(f"id_map must have the image's size {image.shape[:2]}, got {id_map.shape}")
    if not isinstance(opacity, numbers.Real) or not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity!r}")
    opacity = float(opacity)  # OpenCV refuses some real numbers, such as Fraction
    if id_map.size == 0:
        return image.copy()

    name_by_id = {category["id"]: category.get("name", category["id"]) for category in categories or ()}
    ids, slots = number_ids(id_map)
    slot_by_id = {int(segment_id): slot for slot, segment_id in enumerate(ids)}
    drawn = [segment for segment in segments if int(segment["id"]) in slot_by_id]
    palette = np.zeros((len(ids), 3), np.float32)
    listed = np.zeros(len(ids), bool)
    names: list[tuple[int, str]] = []
    texts: list[tuple[int, str]] = []
    for segment, color in zip(drawn, segment_colors(drawn, categories), strict=True):
        slot = slot_by_id[int(segment["id"])]
        palette[slot], listed[slot] = color[::-1], True
        category_id = int(segment["category_id"])
        names.append((slot, str(name_by_id.get(category_id, category_id))))
        texts.append((slot, names[-1][1] + _score_text(segment.get("score"))))

    import cv2

    colors = cv2.cvtColor(_look_up(palette.astype(np.uint8), slots), cv2.COLOR_BGRA2BGR)
    picture = cv2.addWeighted(image, 1 - opacity, colors, opacity, 0)
    if not listed.all():
        cv2.copyTo(image, (~listed).view(np.uint8).take(slots), picture)
    if outlines:
        _draw_outlines(picture, slots, palette, listed)
    if labels:
        _draw_labels(picture, slots, texts, palette)
    return np.vstack([picture, _legend(slots, names, palette)]) if legend and names else picture


def _as_bgr(image: Any) -> np.ndarray:
    """Convert a PIL image to a BGR array, upright by its EXIF orientation, and check an array."""
    from PIL import Image

    if isinstance(image, Image.Image):
        from spatialflow.images import convert_pillow_image

        return convert_pillow_image(image, "image")
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    return image


def _score_text(score: Any) -> str:
    """Return the score as text after a space, or an empty text if `float()` does not accept the score."""
    try:
        return f" {float(score):.2f}"
    except (TypeError, ValueError, OverflowError):
        return ""


def _look_up(palette: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Look up (N, 3) uint8 colors by (H, W) indices; return (H, W, 4) uint8 with zeros in the last channel.

    For speed, each color is padded to four bytes and copied as one 32-bit number.
    """
    words = np.pad(palette, ((0, 0), (0, 1))).view(np.uint32)[:, 0]
    return words.take(slots)[..., None].view(np.uint8)


def _text_size(shape: Sequence[int]) -> int:
    """Return the height of letters in pixels for a picture of shape (H, W, ...)."""
    return max(10, round(min(shape[:2]) / 34))


def _line_width(shape: Sequence[int]) -> int:
    return max(1, round(min(shape[:2]) / 400))


def _draw_outlines(picture: np.ndarray, slots: np.ndarray, palette: np.ndarray, listed: np.ndarray) -> None:
    """Draw a light line inside the border of each segment and a dark line at the border, in tints of its color."""
    import cv2

    def interior(width: int) -> np.ndarray:
        kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
        return (cv2.erode(values, kernel) == values) & (cv2.dilate(values, kernel) == values)

    dtype = np.uint16 if len(palette) < 2**16 else np.float32  # cv2.erode supports both
    values: np.ndarray = slots.astype(dtype)
    width = _line_width(slots.shape)
    shown = listed.take(slots)
    pixels, numbers = picture.reshape(-1, 3), slots.ravel()
    pixel_items = pixels.view("V3")[:, 0]  # a pixel as one item, which numpy copies five times as fast as three
    for distance, keep, tint in ((2 * width, 0.25, 0.45 * palette + 0.55 * 255), (width, 0.3, 0.35 * palette)):
        line = np.flatnonzero(shown & ~interior(distance))
        mixed = np.rint(keep * pixels.take(line, axis=0) + ((1 - keep) * tint).take(numbers.take(line), axis=0))
        pixel_items[line] = mixed.astype(np.uint8).view("V3")[:, 0]


class _Label(NamedTuple):
    """White text on a dark box, as three (h, w, 1) float32 arrays.

    Drawing the label sets each pixel under it to `keep * pixel + shade * color of the box + light`.
    """

    keep: np.ndarray
    shade: np.ndarray
    light: np.ndarray


@functools.lru_cache(maxsize=4096)  # names and scores recur from image to image
def _label(text: str, size: int, width: int, height: int) -> _Label | None:
    """Render a label in letters of `size` pixels; None if it is larger than a picture of `width` x `height`."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    x0, y0, x1, y1 = map(round, ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font))
    padding = max(2, size // 5)
    shape = (x1 - x0 + 2 * padding, y1 - y0 + 2 * padding)
    if shape[0] > width or shape[1] > height:
        return None
    box, letters = Image.new("L", shape), Image.new("L", shape)
    ImageDraw.Draw(box).rounded_rectangle((0, 0, shape[0] - 1, shape[1] - 1), radius=padding, fill=205)
    ImageDraw.Draw(letters).text((padding - x0, padding - y0), text, font=font, fill=255)
    opaque, white = (np.asarray(image, np.float32)[..., None] / 255 for image in (box, letters))
    return _Label((1 - opaque) * (1 - white), opaque * (1 - white), 255 * white)


def _draw_labels(picture: np.ndarray, slots: np.ndarray, texts: Sequence[tuple[int, str]], palette: np.ndarray) -> None:
    """Write a label at each segment, the largest segment first.

    Segments of fewer than `size * size` pixels have no label. Five positions are tried for a label. It is left out if
    it would cover an earlier label at all of them, or if it is larger than the picture.
    """
    import cv2

    height, width = slots.shape
    size = _text_size(slots.shape)
    extent_by_slot = extents(slots)
    taken: list[tuple[int, int, int, int]] = []
    for slot, text in sorted(texts, key=lambda item: -extent_by_slot[item[0]].pixels):
        if extent_by_slot[slot].pixels < size * size:
            continue
        label = _label(text, size, width, height)
        if label is None:
            continue
        label_h, label_w = label.light.shape[:2]
        left, top, box_w, box_h = extent_by_slot[slot].box
        # (x, y): the point of the segment that is farthest from the borders of the segment and the picture.
        mask = np.zeros((box_h + 2, box_w + 2), np.uint8)
        np.equal(slots[top : top + box_h, left : left + box_w], slot, out=mask[1:-1, 1:-1].view(bool))
        _, _, _, (x, y) = cv2.minMaxLoc(cv2.distanceTransform(mask, cv2.DIST_L2, 3))
        x1 = min(max(left + x - 1 - label_w // 2, 0), width - label_w)
        first = min(max(top + y - 1 - label_h // 2, 0), height - label_h)
        for shift in (0, -1, 1, -2, 2):  # move up or down if another label is in the way
            y1 = min(max(first + shift * (label_h + 1), 0), height - label_h)
            x2, y2 = x1 + label_w, y1 + label_h
            if not any(x1 < right and left < x2 and y1 < bottom and top < y2 for left, top, right, bottom in taken):
                break
        else:
            continue
        taken.append((x1, y1, x2, y2))
        pixels = picture[y1:y2, x1:x2]
        pixels[...] = np.rint(label.keep * pixels + label.shade * (palette[slot] // 4) + label.light)


_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_LONGEST_NAME = 60  # letters of a name in a legend
_STRIPES = 4  # colors of instances that a legend shows per category


def _legend(slots: np.ndarray, names: Sequence[tuple[int, str]], palette: np.ndarray) -> np.ndarray:
    """Draw the legend of a picture, (H', W, 3) uint8 BGR: an entry per name, as many in a line as fit.

    Args:
        slots: (H, W) indices into `palette`.
        names: index and name of every segment.
        palette: (N, 3) BGR colors.
    """
    from PIL import Image, ImageDraw, ImageFont

    width = slots.shape[1]
    size = _text_size(slots.shape)
    font, swatch, gap = ImageFont.load_default(size), round(1.6 * size), max(3, size // 3)
    pixels = np.bincount(slots.ravel(), minlength=len(palette))
    area: Counter[str] = Counter()
    slots_by_name: dict[str, list[int]] = {}
    for slot, name in names:
        area[name] += int(pixels[slot])
        slots_by_name.setdefault(name, []).append(slot)

    entries: list[tuple[int, int, str, list[int]]] = []  # left, line, text, slots
    x, line = gap, 0
    for name, _ in area.most_common():
        short = " ".join(name.split())
        text = short if len(short) <= _LONGEST_NAME else f"{short[: _LONGEST_NAME - 3]}..."
        if len(slots_by_name[name]) > 1:
            text += f" ({len(slots_by_name[name])})"
        length = swatch + gap + round(font.getlength(text)) + 2 * gap
        if x > gap and x + length > width:
            x, line = gap, line + 1
        entries.append((x, line, text, slots_by_name[name][:_STRIPES]))
        x += length
    step = size + 2 * gap
    canvas = Image.new("RGB", (width, (line + 1) * step + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, line, text, shown in entries:
        top = gap + line * step
        edges = [x + round(swatch * index / len(shown)) for index in range(len(shown) + 1)]
        for slot, left, right in zip(shown, edges, edges[1:], strict=False):
            draw.rectangle((left, top, right - 1, top + size), fill=tuple(map(round, palette[slot][::-1].tolist())))
        draw.text((x + swatch + gap, top + size // 2), text, font=font, fill=_INK, anchor="lm")
    return np.asarray(canvas)[..., ::-1]
