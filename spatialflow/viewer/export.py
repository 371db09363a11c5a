# SPDX-License-Identifier: Apache-2.0
"""One page with everything in it, which a browser opens from a file."""

import base64
import hashlib
import os
from typing import Any

from spatialflow.files import atomic_write
from spatialflow.viewer.catalog import Catalog
from spatialflow.viewer.payload import image_payload, index_payload, scores_payload
from spatialflow.viewer.pictures import PHOTOGRAPH, PICTURE_ERRORS, Pictures
from spatialflow.viewer.scan import Scan
from spatialflow.viewer.server import PAGE, SCRIPTS, STYLE, as_json, static_file

MAX_IMAGES = 200
"""Largest number of images in an exported page."""

PICTURE_SIDE = 960
"""Longer side of photographs and maps in an exported page, in pixels."""


def export_page(path: str | os.PathLike[str], catalog: Catalog, scan: Scan, limit: int) -> int:
    """Write a page with all scores, and with the pictures and segments of at most `limit` images.

    Args:
        path: the HTML file.
        catalog: the images.
        scan: their scores; `Scan.run` has ended.
        limit: largest number of images. Those of lowest PQ are taken; without a ground truth, the first ones.

    Returns:
        The number of images in the page.

    Raises:
        OSError: the file cannot be written.
    """
    indices = _choose(catalog, scan, limit)
    pictures = Pictures(catalog, PICTURE_SIDE)
    scripts = "".join(static_file(name).decode() for name in SCRIPTS)
    style = static_file(STYLE).decode()
    policy = (
        f"default-src 'none'; script-src {_hash_source(scripts)}; style-src {_hash_source(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    head, end = _split_page(style, policy)
    with atomic_write(path, "w") as file:
        file.write(head)
        file.write(_data("index", index_payload(catalog, indices)))
        file.write(_data("scores", scores_payload(catalog, scan, 0, indices)))
        file.write(_data("classes", scan.classes()))
        for position, index in enumerate(indices):
            file.write(_data(f"image-{position}", _image(catalog, scan, pictures, index)))
        file.write(f"<script>{scripts}</script>\n{end}")
    return len(indices)


def _choose(catalog: Catalog, scan: Scan, limit: int) -> list[int]:
    """Return the indices of the images of the page, ascending."""
    count = len(catalog.images)
    if count <= limit:
        return list(range(count))
    quality = {score.index: score.pq.get(catalog.main.key) for score in scan.since(0)}

    def rank(index: int) -> tuple[bool, float, int]:
        value = quality.get(index)
        return value is None, value or 0.0, index

    return sorted(sorted(range(count), key=rank)[:limit])


def _split_page(style: str, policy: str) -> tuple[str, str]:
    """Return the page before and after its scripts, with the style and the policy in it."""
    page = static_file(PAGE).decode()
    link = f'<link rel="stylesheet" href="static/{STYLE}">'
    tags = "".join(f'<script src="static/{name}" defer></script>\n' for name in SCRIPTS)
    assert link in page and tags in page, "the page must have the links that an export replaces"
    page = page.replace(tags, "")
    page = page.replace(link, f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>')
    head, end = page.split("</body>")
    return head, f"</body>{end}"


def _hash_source(text: str) -> str:
    """Return the source of a content security policy that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(name: str, content: Any) -> str:
    return f'<script type="application/json" id="data-{name}">{as_json(content).decode()}</script>\n'


def _image(catalog: Catalog, scan: Scan, pictures: Pictures, index: int) -> dict[str, Any]:
    """Return the data of one image; a picture that cannot be made is None."""

    def encoded(make: Any, *arguments: Any) -> str | None:
        try:
            return base64.b64encode(make(index, *arguments)).decode()
        except PICTURE_ERRORS:
            return None

    image = catalog.images[index]
    shown = [key for key in catalog.sides if key in image.ids]
    return {
        "payload": image_payload(catalog, scan, pictures, index),
        "photo": encoded(pictures.photograph),
        "thumbs": {key: encoded(pictures.thumbnail, key) for key in (PHOTOGRAPH, *shown)},
        "maps": {key: encoded(pictures.slots, key) for key in shown},
    }
