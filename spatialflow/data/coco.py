# SPDX-License-Identifier: Apache-2.0
"""COCO panoptic data as downloaded: a JSON of segments, a folder of PNGs, a folder of photographs."""

import os
from pathlib import Path

from spatialflow.data.categories import Categories
from spatialflow.data.samples import Sample, SampleError, make_sample
from spatialflow.data.transforms import ImageError, read_image
from spatialflow.panoptic.formats import PanopticFormatError, read_id_map, read_panoptic_json


class CocoPanoptic:
    """A data set in the COCO panoptic format.

    Args:
        json_path: panoptic JSON with `images`, `annotations` and `categories`.
        panoptic_folder: PNGs named by the annotations; None: the JSON's path without its suffix.
        image_folder: photographs named by `images`.
        categories: numbering of the classes.

    Attributes:
        names: file name of every photograph, in the order of the annotations.
        image_ids: their ids.
        sizes: their (height, width) as listed, for grouping by shape without reading them.

    Raises:
        PanopticFormatError: the JSON is absent or breaks the format.
    """

    def __init__(
        self,
        json_path: str | os.PathLike,
        image_folder: str | os.PathLike,
        panoptic_folder: str | os.PathLike | None,
        categories: Categories,
    ):
        self.json_path = Path(json_path)
        self.image_folder = Path(image_folder)
        self.panoptic_folder = Path(panoptic_folder) if panoptic_folder is not None else self.json_path.with_suffix("")
        self.categories = categories
        content = read_panoptic_json(self.json_path)
        images = content.get("images")
        if not isinstance(images, list) or not images:
            raise PanopticFormatError(f'{self.json_path}: a data set needs a non-empty list "images"')
        for i, image in enumerate(images):
            if not isinstance(image, dict) or not {"id", "file_name", "height", "width"} <= image.keys():
                raise PanopticFormatError(
                    f'{self.json_path}: images[{i}] must be a mapping with "id", "file_name", "height", "width"'
                )
        by_id = {image["id"]: image for image in images}
        self.annotations = content["annotations"]
        strangers = [a["image_id"] for a in self.annotations if a["image_id"] not in by_id]
        if strangers:
            raise PanopticFormatError(f"{self.json_path}: annotations of images that are not listed: {strangers[:5]}")
        self.image_ids = [annotation["image_id"] for annotation in self.annotations]
        self.names = [str(by_id[i]["file_name"]) for i in self.image_ids]
        self.sizes = [(int(by_id[i]["height"]), int(by_id[i]["width"])) for i in self.image_ids]

    def __len__(self) -> int:
        return len(self.annotations)

    def image_path(self, index: int) -> Path:
        """Path of the photograph."""
        return self.image_folder / self.names[index]

    def __getitem__(self, index: int) -> Sample:
        """Reads one image with its ground truth.

        Raises:
            SampleError: a file is absent or damaged, or image and annotation do not fit; the file is named.
        """
        annotation = self.annotations[index]
        try:
            image = read_image(self.image_path(index))
            id_map = read_id_map(self.panoptic_folder / annotation["file_name"])
        except (ImageError, PanopticFormatError) as error:
            raise SampleError(str(error)) from None
        return make_sample(str(self.image_path(index)), image, id_map, annotation["segments_info"], self.categories)

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]:
        """JSON and PNG folder of the ground truth for scoring; `folder` (for data sets that must make them) stays
        unused.
        """
        return self.json_path, self.panoptic_folder
