# SPDX-License-Identifier: Apache-2.0
"""Layouts of pictures: panels side by side with titles, contact sheets, and an HTML page."""

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

import numpy as np

_PAPER, _INK, _GAP = (250, 250, 250), (30, 30, 30), 6


def fit(shape: Sequence[int], side: int, enlarge: bool = False) -> tuple[int, int]:
    """Return (height, width) of a picture of shape (H, W, ...) that is scaled so that its longer side is `side`.

    Without `enlarge`, smaller pictures keep their size.
    """
    height, width = shape[:2]
    scale = side / max(height, width)
    scale = scale if enlarge else min(scale, 1.0)
    return max(1, round(height * scale)), max(1, round(width * scale))


def side_by_side(panels: Mapping[str, np.ndarray], heading: str = "", panel_width: int = 480) -> np.ndarray:
    """Place pictures of one size in a row, each below its title.

    Args:
        panels: title -> (H, W, 3) uint8 BGR, all of one size.
        heading: a line above all of them.
        panel_width: width of every panel, in pixels. A panel that would be higher than three times this width is
            scaled to that height instead.

    Returns:
        (H', W', 3) uint8 BGR.

    Raises:
        ValueError: no panels, or they differ in size.
    """
    import cv2

    shapes = {panel.shape for panel in panels.values()}
    if len(shapes) != 1:
        raise ValueError(f"panels must be one or more pictures of one size, got sizes {sorted(shapes)}")
    ((height, width, _),) = shapes
    scale = min(panel_width / width, 3 * panel_width / height)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    shrinks = scale < 1
    columns = []
    for title, panel in panels.items():
        picture = cv2.resize(panel, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        picture = np.hstack([picture, _blank(size[1], panel_width - size[0])])
        columns += [np.vstack([_line(title, panel_width), picture]), _blank(size[1] + _LINE_HEIGHT, _GAP)]
    row = np.hstack(columns[:-1])
    return np.vstack([_line(heading, row.shape[1]), row]) if heading else row


def with_equal_heights(panels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pad pictures (H, W, 3) uint8 at the bottom to the height of the highest one, such as one with a legend."""
    height = max(panel.shape[0] for panel in panels.values())
    return {
        title: np.vstack([panel, _blank(height - panel.shape[0], panel.shape[1])]) for title, panel in panels.items()
    }


def contact_sheet(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Stack one or more pictures (H, W, 3) uint8 vertically, padded at the right to the widest."""
    width = max(picture.shape[1] for picture in pictures)
    rows = []
    for picture in pictures:
        rows += [np.hstack([picture, _blank(picture.shape[0], width - picture.shape[1])]), _blank(3 * _GAP, width)]
    return np.vstack(rows[:-1])


def thumbnails(pictures: Iterable[tuple[str, np.ndarray]], columns: int, cell: int = 320) -> np.ndarray:
    """Arrange pictures in lines of cells of one width, each below its title.

    Args:
        pictures: one or more pairs of a title, which may be empty, and (H, W, 3) uint8 BGR, of any sizes. They are
            read one by one and scaled to fit a square cell.
        columns: pictures in a line.
        cell: width of a cell in pixels.

    Returns:
        (H', columns * cell + gaps, 3) uint8 BGR.

    Raises:
        ValueError: no pictures.
    """
    import cv2

    cells = []
    for title, picture in pictures:
        height, width = fit(picture.shape, cell, enlarge=True)
        shrinks = max(picture.shape[:2]) > cell
        small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        line = np.hstack([small, _blank(height, cell - width)])
        cells.append(np.vstack([_line(title, cell), line]) if title else line)
    if not cells:
        raise ValueError("pictures must be one or more, got none")
    rows = []
    for begin in range(0, len(cells), columns):
        row = cells[begin : begin + columns]
        row += [_blank(row[0].shape[0], cell)] * (min(columns, len(cells)) - len(row))
        height = max(part.shape[0] for part in row)
        parts = [np.vstack([part, _blank(height - part.shape[0], cell)]) for part in row]
        rows.append(np.hstack([piece for part in parts for piece in (part, _blank(height, _GAP))][:-1]))
    return contact_sheet(rows)


def html_page(title: str, pictures: Iterable[tuple[str, str]]) -> str:
    """Make an HTML page of pictures, each given as (caption, path relative to the page)."""
    figures = "\n".join(
        f'<figure><img src="{quote(os.fsencode(path))}" alt="{_text(caption)}" loading="lazy">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
        for caption, path in pictures
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
        "body{font-family:sans-serif;margin:2em;background:#fafafa;color:#1e1e1e}figure{margin:0 0 2em}"
        f"img{{max-width:100%}}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{figures}\n</body></html>\n"
    )


def _text(text: str) -> str:
    """Escape a text for HTML; file names may have bytes that are not valid text."""
    return html.escape(text).encode("utf-8", "backslashreplace").decode()


_LINE_HEIGHT = 26


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _line(text: str, width: int) -> np.ndarray:
    """Draw a line of text, (_LINE_HEIGHT, width, 3), truncated at the right where it is too long."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.fromarray(_blank(_LINE_HEIGHT, width))
    ImageDraw.Draw(canvas).text((4, 4), text, font=ImageFont.load_default(15), fill=_INK)
    return np.asarray(canvas)[..., ::-1]
