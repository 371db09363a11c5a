# SPDX-License-Identifier: Apache-2.0
"""A part of a data set, and the choice of images to hold out for validation."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from spatialflow.data.coco import CocoPanoptic
from spatialflow.files import write_json


class CocoSubset(CocoPanoptic):
    """Some images of a data set in the COCO panoptic format.

    Args:
        data: the whole data set.
        indices: of the images, in the order of the subset.
    """

    def __init__(self, data: CocoPanoptic, indices: Sequence[int]) -> None:
        self.__dict__.update(copy.copy(data).__dict__)
        self.annotations = [data.annotations[index] for index in indices]
        self.image_ids = [data.image_ids[index] for index in indices]
        self.names = [data.names[index] for index in indices]
        self.sizes = [data.sizes[index] for index in indices]

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]:
        """Write the subset's JSON, `truth.json`, to `folder`; return its path and the folder of PNGs, for scoring.

        The PNGs are those of the whole data set.
        """
        path, content = folder / "truth.json", self._content()
        if not _holds(path, content):
            write_json(path, content)
        return path, self.panoptic_folder

    def _content(self) -> dict[str, object]:
        rows = zip(self.image_ids, self.names, self.sizes, strict=True)
        images = [{"id": i, "file_name": name, "height": size[0], "width": size[1]} for i, name, size in rows]
        categories = self.categories.as_coco()
        return {"images": images, "annotations": list(self.annotations), "categories": categories}


def _holds(path: Path, content: dict[str, object]) -> bool:
    """Tell whether a JSON file has this content; not if it is absent or damaged."""
    try:
        return bool(json.loads(path.read_bytes()) == content)
    except (OSError, ValueError):
        return False


def hold_out(data: CocoPanoptic, share: float) -> tuple[CocoSubset, CocoSubset]:
    """Divide a data set into images to train on and images to evaluate on.

    The choice depends on the file names alone. So it is the same in every run, and stays almost the same when images
    are added.

    Args:
        data: at least 2 images.
        share: share of the images to evaluate on, between 0 and 1; at least one image stays in each part.

    Returns:
        The images to train on, and those to evaluate on; both in the order of `data`.
    """
    count = min(max(round(share * len(data)), 1), len(data) - 1)
    hashes = [hashlib.sha256(name.encode(errors="surrogatepass")).digest() for name in data.names]
    by_hash = sorted(range(len(data)), key=hashes.__getitem__)
    held = set(by_hash[:count])
    return (
        CocoSubset(data, [index for index in range(len(data)) if index not in held]),
        CocoSubset(data, sorted(held)),
    )
