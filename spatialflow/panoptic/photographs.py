# SPDX-License-Identifier: Apache-2.0
"""Which photograph an annotation is about: names, files, and the join of predictions with a ground truth."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from spatialflow.panoptic.rules import PanopticFormatError, id_of

_CITYSCAPES = "_leftImg8bit"
# Cityscapes names the files of one image <city>_<sequence>_<frame>_<kind>. The official script for panoptic JSON,
# createPanopticImgs.py, makes the photograph's name out of the label file's, and keeps a part that it does not have.
_CITYSCAPES_ENDINGS = ("_gtFine_leftImg8bit", "_gtFine_panoptic", "_gtFine_instanceIds", "_leftImg8bit")


def photograph_key(file_name: str) -> str:
    """What a photograph and the files made of it have in common: the name without ending and Cityscapes' suffixes."""
    stem = PurePosixPath(file_name).stem
    for ending in _CITYSCAPES_ENDINGS:
        if stem.endswith(ending):
            return stem.removesuffix(ending)
    return stem


def photograph_names(content: Mapping[str, Any]) -> list[str]:
    """The photograph's file name for every annotation of a panoptic JSON; the PNG's where `images` does not list it."""
    listed = _listed_names(content)
    return [listed.get(annotation["image_id"], annotation["file_name"]) for annotation in content["annotations"]]


def _listed_names(content: Mapping[str, Any]) -> dict[int | str, str]:
    """image_id -> file name, as `images` has them; the first entry of an id counts."""
    rows = content.get("images")
    listed: dict[int | str, str] = {}
    for row in rows if isinstance(rows, list) else ():
        if id_of(row, "id") is not None and isinstance(row.get("file_name"), str):
            listed.setdefault(row["id"], row["file_name"])
    return listed


def find_photograph(folder: str | os.PathLike, file_name: str) -> Path:
    """Path of a photograph that a panoptic JSON names.

    A name of Cityscapes is looked for under the photograph's own name too, in `folder` and its sub-folders of cities.
    Where no such file is there, the path is `folder / file_name`.
    """
    folder = Path(folder)
    path = folder / file_name
    if PurePosixPath(file_name).stem.endswith(_CITYSCAPES) and not os.path.isfile(path):
        key = photograph_key(file_name)
        name, city = f"{key}{_CITYSCAPES}{path.suffix}", key.split("_")[0]
        for candidate in (folder / name, folder / city / name, *folder.glob(f"*/{city}/{name}")):
            if os.path.isfile(candidate):
                return candidate
    return path


def join_images(truth: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[int | str, int | str]:
    """Which prediction belongs to which image of the ground truth.

    Ids are compared first. They do not count where `images` of the prediction gives one to another image of the ground
    truth, or where both files list names for one that differ. Where ids do not count or do not match, the names decide:
    those of `images`, else those of the PNGs, without their endings. Names are compared with their folders, then
    without. A prediction serves one image.

    Args:
        truth: content of the ground truth's JSON.
        prediction: content of the predictions' JSON; it may have more images.

    Returns:
        image_id of the ground truth -> image_id of the prediction, for every image of the ground truth.

    Raises:
        PanopticFormatError: an image has no prediction, or several have its name; the message has examples of both
            sides.
    """
    wanted = {a["image_id"]: name for a, name in zip(truth["annotations"], photograph_names(truth))}
    offered = {a["image_id"]: name for a, name in zip(prediction["annotations"], photograph_names(prediction))}
    other = _contradicted_id(wanted, offered, _listed_names(truth), _listed_names(prediction))
    joined = {image: image for image in wanted if other is None and image in offered}
    if len(joined) == len(wanted):
        return joined
    for mine, theirs in zip(_keys(wanted), _keys(offered), strict=True):
        mine, theirs = _unique(mine), _unique(theirs)
        taken = set(joined.values())
        for key in mine.keys() & theirs.keys():
            if theirs[key] not in taken:
                joined.setdefault(mine[key], theirs[key])
    for image in wanted:
        if image not in joined:
            reason = f", neither of that id nor of the name {wanted[image]!r:.80}"
            if other is not None:
                reason = (
                    f": none has its name {wanted[image]!r:.80}, and ids do not count, because id {other!r:.60} is "
                    f"{wanted[other]!r:.80} in the ground truth and {offered[other]!r:.80} in the predictions"
                )
            raise PanopticFormatError(
                f"no prediction for the image with id {image!r:.60}{reason}; the ground truth has "
                f"{_examples(wanted)}; the predictions have {_examples(offered)}"
            )
    return {image: joined[image] for image in wanted}


def _contradicted_id(
    wanted: Mapping[Any, str], offered: Mapping[Any, str], mine: Mapping[Any, str], theirs: Mapping[Any, str]
) -> int | str | None:
    """An id that both files have and that names say is of different images; None where there is none.

    Args:
        wanted, offered: image id -> name, in the ground truth and in the prediction.
        mine, theirs: image id -> name, as `images` of the two files lists it.
    """
    # Running ids of two files can be equal and mean different images; a name then says so.
    doubtful = [i for i in wanted if i in offered and i in theirs and wanted[i] != theirs[i]]
    if not doubtful:
        return None
    of_truth, of_prediction = ([_unique(keys) for keys in _keys(names)[:2]] for names in (wanted, offered))
    for image in doubtful:
        meant = {_image_of(theirs[image], of_truth), _image_of(mine.get(image), of_prediction)} - {None}
        if meant - {image} or (not meant and image in mine and not _is_tail(mine[image], theirs[image])):
            return image
    return None


def _image_of(name: str | None, keys: Sequence[Mapping[str, Any]]) -> int | str | None:
    """The image of that name with its folder, else without; None where no image or several have it."""
    if name is None:
        return None
    ((_, path),), ((_, stem),) = _keys({0: name})[:2]
    return keys[0].get(path, keys[1].get(stem))


def _is_tail(first: str, second: str) -> bool:
    """True where one name with its folders is the end of the other."""
    parts = [(*PurePosixPath(name).parent.parts, photograph_key(name)) for name in (first, second)]
    count = min(map(len, parts))
    return parts[0][-count:] == parts[1][-count:]


def _keys(names: Mapping[Any, str]) -> list[list[tuple[Any, str]]]:
    """(image id, key) by what names may have in common: folder and name, the name alone, an id that is the name."""
    stems = {image: photograph_key(name) for image, name in names.items()}
    folders = {image: str(PurePosixPath(name).parent) for image, name in names.items()}
    return [
        [(image, f"{folders[image]}/{stem}") for image, stem in stems.items()],
        list(stems.items()),
        [(image, image if isinstance(image, str) else stem) for image, stem in stems.items()],
    ]


def _unique(keys: list[tuple[Any, str]]) -> dict[str, Any]:
    """Key -> image id, of the keys that one image alone has."""
    counts = Counter(key for _, key in keys)
    return {key: image for image, key in keys if counts[key] == 1}


def _examples(images: Mapping[Any, str]) -> str:
    shown = [f"id {image!r:.60} ({name!r:.60})" for image, name in list(images.items())[:2]]
    return ", ".join(shown + ["..."] * (len(images) > 2)) or "no image"
