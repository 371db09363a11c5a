# SPDX-License-Identifier: Apache-2.0
"""Writing results of many images in the COCO panoptic format."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow.files import atomic_write
from spatialflow.panoptic.formats import VOID, PanopticFormatError, write_id_map


class PanopticWriter:
    """Collect results of many images into a folder of PNGs and one panoptic JSON.

    Args:
        folder: where the PNGs go; created on the first result.
        json_path: the JSON file; by default the folder's name with ".json" appended, as panopticapi expects.
        categories: copied into the JSON, if given.

    Use it as a context manager: the JSON is written when the block ends, also when it ends by an exception, so that
    the images already done stay usable. Segments may carry any JSON-able field beside id and category_id.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        json_path: str | os.PathLike | None = None,
        categories: Iterable[Mapping[str, Any]] | None = None,
    ):
        self.folder = Path(folder)
        self.json_path = Path(json_path) if json_path is not None else self.folder.with_name(f"{self.folder.name}.json")
        self._content: dict[str, Any] = {"images": [], "annotations": []}
        self._taken: dict[tuple[str, int | str], str] = {}  # ids and PNGs -> image they belong to
        if categories is not None:
            self._content["categories"] = [dict(category) for category in categories]

    def add(
        self, image_id: int | str, image_name: str, id_map: np.ndarray, segments: Iterable[Mapping[str, Any]]
    ) -> Path:
        """Write one image's PNG and remember its segments.

        Args:
            image_id: the image's id in the data set.
            image_name: file name of the photograph; the PNG takes its stem.
            id_map: (H, W) integer segment ids, 0 for void.
            segments: mappings with at least `id` and `category_id`; every id of the map once, and no other.

        Returns:
            Path of the PNG.

        Raises:
            PanopticFormatError: segments and map disagree, or another image has that id or that name of the PNG.
        """
        segments = [dict(segment) for segment in segments]
        listed = [segment["id"] for segment in segments]
        present = set(np.unique(id_map).tolist()) - {VOID}
        if len(set(listed)) != len(listed) or set(listed) != present:
            raise PanopticFormatError(
                f"image {image_id}: segments must list every id of the map once: map {sorted(present)}, listed {listed}"
            )
        path = self.folder / f"{Path(image_name).stem}.png"
        taken = {("id", image_id): image_name, ("PNG", path.name): image_name}
        self._check_free(taken)
        write_id_map(path, id_map)
        self._taken |= taken
        height, width = np.shape(id_map)
        self._content["images"].append(
            {"id": image_id, "file_name": image_name, "height": int(height), "width": int(width)}
        )
        self._content["annotations"].append({"image_id": image_id, "file_name": path.name, "segments_info": segments})
        return path

    def _check_free(self, taken: Mapping[tuple[str, int | str], str]) -> None:
        for (kind, name), image_name in taken.items():
            if (kind, name) in self._taken:
                raise PanopticFormatError(
                    f"{image_name}: would get the {kind} {name}, which {self._taken[kind, name]} has already"
                )

    def extend(self, other: "PanopticWriter") -> None:
        """Take over the images that another writer, for instance another process's, has added to the same folder.

        Raises:
            PanopticFormatError: an image of the same id, or whose PNG has the same name, is there.
        """
        self._check_free(other._taken)
        self._taken |= other._taken
        for key in ("images", "annotations"):
            self._content[key] += other._content[key]

    def write_json(self) -> Path:
        """Write the JSON of all images added so far and return its path."""
        text = json.dumps(self._content, default=_plain)
        with atomic_write(self.json_path, "w") as stream:
            stream.write(text)
        return self.json_path

    def __enter__(self) -> "PanopticWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.write_json()


def _plain(value: Any) -> Any:
    """numpy numbers and arrays as JSON has them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
