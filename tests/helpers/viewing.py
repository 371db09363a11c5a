# SPDX-License-Identifier: Apache-2.0
"""A viewer in the process of the test, and data sets for it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from spatialflow.viewer.catalog import OTHER_SIDE, PREDICTION_SIDE, TRUTH_SIDE, Catalog, read_side
from spatialflow.viewer.scan import Scan
from spatialflow.viewer.server import Server, Site

TITLES = {TRUTH_SIDE: "Ground truth", PREDICTION_SIDE: "Prediction", OTHER_SIDE: "Compared"}

HOSTILE = [
    "<script>window.hacked=1</script>.jpg",
    "\"'><img src=x onerror=window.hacked=1>.jpg",
    "\u202egpj.\u2028 é 图.jpg",
]
"""Names of photographs that a page must escape."""


class Viewing(NamedTuple):
    """A viewer that listens."""

    url: str
    port: int
    catalog: Catalog
    scan: Scan


def make_catalog(
    truth: Path | None = None, prediction: Path | None = None, other: Path | None = None, images=None
) -> Catalog:
    """Read the folders of `write_coco` or `write_imperfect`."""
    folders = {TRUTH_SIDE: truth, PREDICTION_SIDE: prediction, OTHER_SIDE: other}
    sides = [read_side(key, TITLES[key], path / "panoptic.json") for key, path in folders.items() if path is not None]
    return Catalog(sides, images)


@contextlib.contextmanager
def serving(catalog: Catalog, is_scanned: bool = True) -> Iterator[Viewing]:
    """Serve a catalog at a free port."""
    scan = Scan(catalog)
    if is_scanned:
        scan.run(threads=1)
    with Server(Site(catalog, scan), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Viewing(server.url, server.server_port, catalog, scan)
        finally:
            server.shutdown()
            thread.join()
            scan.stop()


def edit_json(folder: Path, edit) -> None:
    """Change the content of a folder's panoptic.json."""
    path = folder / "panoptic.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
