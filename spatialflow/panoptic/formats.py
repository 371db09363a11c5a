# SPDX-License-Identifier: Apache-2.0
"""The COCO panoptic format: a JSON of segments, and for every image a PNG whose colours are segment ids."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialflow import _evaluation
from spatialflow.files import atomic_write
from spatialflow.panoptic import rules
from spatialflow.panoptic.png import PngKindError, decode_png
from spatialflow.panoptic.rules import VOID, PanopticFormatError


def decode_ids(image: np.ndarray, bgr: bool = False) -> np.ndarray:
    """Turn the colours of a panoptic PNG into segment ids: red + 256 * green + 65536 * blue.

    Args:
        image: (H, W, 3) uint8.
        bgr: channels are in OpenCV's order.

    Returns:
        (H, W) int32.

    Raises:
        ValueError: image has another shape or dtype.
    """
    return _evaluation.decode_ids(np.asarray(image), bgr=bgr)


def encode_ids(ids: np.ndarray, bgr: bool = False) -> np.ndarray:
    """Turn segment ids into the colours of a panoptic PNG, the inverse of `decode_ids`.

    Args:
        ids: (H, W) of any integer dtype, values in [0, 2^24).
        bgr: write channels in OpenCV's order.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: ids has another shape or kind, or an id does not fit three bytes.
    """
    return _evaluation.encode_ids(as_id_map(ids, "ids"), bgr=bgr)


def as_id_map(ids: np.ndarray, name: str) -> np.ndarray:
    """`ids` as a contiguous (H, W) int32 array; the error names the argument `name`.

    Values are checked only where the dtype could hold one that int32 cannot.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be an (H, W) integer array, got {ids.shape} {ids.dtype}")
    if not np.can_cast(ids.dtype, np.int32) and ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f"{name} must lie in [0, 16777215], got values from {ids.min()} to {ids.max()}")
    return np.ascontiguousarray(ids, dtype=np.int32)


def read_id_map(path: str | os.PathLike) -> np.ndarray:
    """Read a panoptic PNG as an (H, W) int32 map of segment ids, 0 where there is none.

    Raises:
        PanopticFormatError: the file is absent, damaged, or not an 8-bit RGB or RGBA PNG.
    """
    try:
        with open(path, "rb", buffering=0) as stream:  # read whole: a buffer would only be copied
            return decode_png(stream.read())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}", "png") from None
    except PngKindError as error:
        raise PanopticFormatError(f"{path}: {error}", "png-kind") from None
    except ValueError as error:
        raise PanopticFormatError(f"{path}: {error}", "png") from None


def write_id_map(path: str | os.PathLike, ids: np.ndarray) -> None:
    """Write a map of segment ids as a panoptic PNG; an existing file is replaced in one step.

    Args:
        path: the PNG to write.
        ids: (H, W) of any integer dtype, values in [0, 2^24).

    Raises:
        ValueError: ids has another shape or kind, is empty, or an id does not fit three bytes.
        OSError: the file cannot be written; nothing is left behind.
    """
    import cv2

    colours = encode_ids(ids, bgr=True)
    if colours.size == 0:
        raise ValueError(f"ids must have at least one pixel to be written as a PNG, got shape {colours.shape[:2]}")
    # OpenCV's own choice is made for photographs and triples the size of an id map.
    _, data = cv2.imencode(".png", colours, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    with atomic_write(path) as stream:
        stream.write(data.tobytes())


def read_panoptic_json(
    path: str | os.PathLike, with_categories: bool = False, use: str = rules.PREDICTION
) -> dict[str, Any]:
    """Read a COCO panoptic JSON and check what everything else relies on.

    Args:
        path: the JSON file.
        with_categories: also require `categories` with `id` and `isthing`, as a ground truth has.
        use: what for, "truth", "prediction" or "training"; decides which rules must hold (`rules.RULES`).

    Returns:
        The file's content: a mapping with `annotations`, a list of {image_id, file_name, segments_info}.

    Raises:
        PanopticFormatError: the file is absent, is no JSON, or breaks a rule that this use needs; the message says
            which.
    """
    content = load_json(path)
    check_panoptic(content, str(path), with_categories, use)
    return content


def load_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file, not checked.

    Raises:
        PanopticFormatError: the file is absent or is no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PanopticFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PanopticFormatError(f"{path}: not a JSON file: {error}") from None


def check_panoptic(
    content: Any,
    source: str,
    with_categories: bool = False,
    use: str = rules.PREDICTION,
    categories: Collection[int] | None = None,
) -> list[rules.Problem]:
    """Raise `PanopticFormatError`, naming `source`, unless `content` is a COCO panoptic mapping fit for `use`.

    Args:
        content: of the file.
        source: named in the error.
        with_categories, use: as for `read_panoptic_json`.
        categories: ids that segments may have; None: those that the content lists, if it lists any.

    Returns:
        Problems that do not stop this use and are to be reported.
    """
    also = rules.CATEGORY_RULES if with_categories else ()
    return rules.raise_first(rules.json_problems(content, categories), use, source, also)


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
