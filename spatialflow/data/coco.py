# SPDX-License-Identifier: Apache-2.0
"""Data sets in the COCO panoptic format: a JSON of segments, a folder of PNGs, a folder of photographs."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatialflow.data.categories import Categories
from spatialflow.data.samples import Sample, SampleError, make_sample
from spatialflow.images import ImageError, read_image
from spatialflow.panoptic.formats import check_panoptic, read_id_map, read_panoptic_json
from spatialflow.panoptic.photographs import find_photograph
from spatialflow.panoptic.quality import default_folder
from spatialflow.panoptic.rules import TRAINING, TRUTH, PanopticFormatError


class _JsonList(Sequence[dict[str, Any]]):
    """Mappings stored as JSON texts, which are parsed on access.

    Every worker process has a copy of the data set. As Python objects, COCO's annotations take four times the memory.
    """

    def __init__(self, items: Iterable[Mapping[str, Any]]) -> None:
        self._texts = [json.dumps(item).encode() for item in items]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [json.loads(text) for text in self._texts[index]]
        return json.loads(self._texts[index])


class CocoPanoptic:
    """A data set in the COCO panoptic format.

    Args:
        json_path: panoptic JSON with `images`, `annotations` and `categories`.
        image_folder: photographs named by `images`.
        panoptic_folder: PNGs named by the annotations; None: the JSON's path without its suffix.
        categories: numbering of the classes.
        scored: whether results are scored against the file. The file must then have `categories` and satisfy the rules
            of scoring.

    Attributes:
        names: file name of every photograph, in the order of the annotations.
        image_ids: id of every photograph.
        sizes: (height, width) of every photograph, from the JSON, for grouping by shape without reading photographs.

    Raises:
        PanopticFormatError: the JSON is absent; it breaks a rule at which training stops (docs/annotations.md); or its
            `categories` contradict the network's table. They do so if the table has none of their ids, or another kind
            (thing or stuff) for one of them.
    """

    def __init__(
        self,
        json_path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str],
        panoptic_folder: str | os.PathLike[str] | None,
        categories: Categories,
        scored: bool = False,
    ) -> None:
        self.json_path = Path(json_path)
        self.image_folder = Path(image_folder)
        self.panoptic_folder = Path(panoptic_folder) if panoptic_folder is not None else default_folder(json_path)
        self.categories = categories
        content = read_panoptic_json(self.json_path, with_categories=scored, use=TRAINING)
        if scored:
            check_panoptic(content, str(self.json_path), with_categories=True, use=TRUTH)
        if "categories" in content:
            self._check_categories(content["categories"])
        by_id = {image["id"]: image for image in content["images"]}
        self.image_ids = [annotation["image_id"] for annotation in content["annotations"]]
        self.annotations: Sequence[dict[str, Any]] = _JsonList(content["annotations"])
        self.names = [by_id[i]["file_name"] for i in self.image_ids]
        self.sizes = [(by_id[i]["height"], by_id[i]["width"]) for i in self.image_ids]

    def _check_categories(self, listed: Sequence[Mapping[str, Any]]) -> None:
        """Raise PanopticFormatError if the file's categories contradict the network's table."""
        isthing = {row.id: row.isthing for row in self.categories.rows}
        rows = [row for row in listed if row["id"] in isthing]
        if listed and not rows:
            problem = f"none of its {len(listed)} categories is in the network's table"
        else:
            differing = [row for row in rows if bool(row["isthing"]) != isthing[row["id"]]]
            if not differing:
                return
            kinds = ("stuff", "a thing") if isthing[differing[0]["id"]] else ("a thing", "stuff")
            problem = f"category {differing[0]['id']} is {kinds[0]} here and {kinds[1]} in the network's table"
        raise PanopticFormatError(f"{self.json_path}: {problem}; the configuration's `categories` may name this file")

    def __len__(self) -> int:
        return len(self.annotations)

    def image_path(self, index: int) -> Path:
        """Return the path of the photograph."""
        return find_photograph(self.image_folder, self.names[index])

    def __getitem__(self, index: int) -> Sample:
        """Read one image with its ground truth.

        Raises:
            SampleError: a file is absent or damaged, or image and annotation do not match; the message names the file.
        """
        annotation, path = self.annotations[index], self.image_path(index)
        try:
            image = read_image(path)
            id_map = read_id_map(self.panoptic_folder / annotation["file_name"])
        except (ImageError, PanopticFormatError) as error:
            raise SampleError(str(error)) from None
        return make_sample(str(path), image, id_map, annotation["segments_info"], self.categories)

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]:
        """Return the JSON and the PNG folder of the ground truth, for scoring.

        Args:
            folder: unused; other data sets write these files there.
        """
        return self.json_path, self.panoptic_folder
