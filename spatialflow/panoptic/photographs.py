# SPDX-License-Identifier: Apache-2.0
"""The photographs of annotations: names, files, and the join of predictions with a ground truth by image."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from spatialflow.panoptic.rules import PanopticFormatError, id_of

_CITYSCAPES = "_leftImg8bit"
# Cityscapes names the files of one image <city>_<sequence>_<frame>_<kind>. The official script for panoptic JSON,
# createPanopticImgs.py, derives the photograph's name from the label file's, and leaves "_gtFine" in it.
_CITYSCAPES_ENDINGS = ("_gtFine_leftImg8bit", "_gtFine_panoptic", "_gtFine_instanceIds", "_leftImg8bit")


def photograph_key(file_name: str) -> str:
    """Return the common key of a photograph and files derived from it: the stem without Cityscapes' suffixes."""
    stem = PurePosixPath(file_name).stem
    for ending in _CITYSCAPES_ENDINGS:
        if stem.endswith(ending):
            return stem.removesuffix(ending)
    return stem


def image_id_of(file_name: str) -> int | str:
    """Derive the image id from a file name: the stem without Cityscapes' "_leftImg8bit", as an integer if possible."""
    stem = PurePosixPath(file_name).stem.removesuffix(_CITYSCAPES)
    return int(stem) if stem.isascii() and stem.isdigit() else stem


def photograph_names(content: Mapping[str, Any]) -> list[str]:
    """List the photograph's file name of every annotation; the name of the PNG if `images` does not list it."""
    listed = _listed_names(content)
    return [listed.get(annotation["image_id"], annotation["file_name"]) for annotation in content["annotations"]]


def _listed_names(content: Mapping[str, Any]) -> dict[int | str, str]:
    """Map image ids to the file names in `images`; the first entry of an id is used."""
    rows = content.get("images")
    listed: dict[int | str, str] = {}
    for row in rows if isinstance(rows, list) else ():
        if id_of(row, "id") is not None and isinstance(row.get("file_name"), str):
            listed.setdefault(row["id"], row["file_name"])
    return listed


def find_photograph(folder: str | os.PathLike[str], file_name: str) -> Path:
    """Find the path of a photograph that a panoptic JSON names.

    For a Cityscapes name, the photograph's original name is searched too: in `folder`, `folder/<city>` and
    `folder/*/<city>`. If no file exists, the path is `folder / file_name`.
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


def list_path(json_path: Path) -> Path:
    """Return the path of the list of photographs that `dataset convert --split` writes beside a panoptic JSON."""
    return json_path.with_suffix(".txt")


def read_list(json_path: Path) -> list[str]:
    """Read the paths in the list of photographs beside a panoptic JSON, as they stand there.

    They end in zero bytes if the file does, otherwise in line breaks of any system.

    Raises:
        OSError: the list cannot be read.
    """
    text = os.fsdecode(list_path(json_path).read_bytes()).removeprefix("\ufeff")
    lines = text.split("\0") if text.endswith("\0") else text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def join_images(truth: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[int | str, int | str]:
    """Match each image of the ground truth with its prediction.

    Ids are compared first. They are ignored if an id in `images` of the prediction has the name of another image of the
    ground truth. They are also ignored if both files list different names for one id. If ids are ignored or do not
    match, names are compared: those of `images`, or else those of the PNGs. Whole names are compared first, then names
    without suffixes, then those without folders. Last, ids that are strings are compared as names. A prediction is used
    for at most one image.

    Args:
        truth: content of the ground truth's JSON.
        prediction: content of the predictions' JSON, which may have further images.

    Returns:
        image_id of the ground truth -> image_id of the prediction, for every image of the ground truth.

    Raises:
        PanopticFormatError: an image has no prediction, or several have its name; the message has examples of both
            files.
    """
    truth_names, prediction_names = _names_by_id(truth), _names_by_id(prediction)
    joined, wrong_id = _join(truth, prediction, truth_names, prediction_names)
    for image in truth_names:
        if image not in joined:
            reason = f", neither of that id nor of the name {truth_names[image]!r:.80}"
            if wrong_id is not None:
                reason = (
                    f": none has its name {truth_names[image]!r:.80}, and ids are ignored, because id "
                    f"{wrong_id!r:.60} is {truth_names[wrong_id]!r:.80} in the ground truth and "
                    f"{prediction_names[wrong_id]!r:.80} in the predictions"
                )
            raise PanopticFormatError(
                f"no prediction for the image with id {image!r:.60}{reason}; the ground truth has "
                f"{_examples(truth_names)}; the predictions have {_examples(prediction_names)}"
            )
    return {image: joined[image] for image in truth_names}


def match_images(truth: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[int | str, int | str]:
    """Match images as `join_images` does; images of the ground truth without a prediction are left out."""
    joined, _ = _join(truth, prediction, _names_by_id(truth), _names_by_id(prediction))
    return joined


def _join(
    truth: Mapping[str, Any],
    prediction: Mapping[str, Any],
    truth_names: Mapping[int | str, str],
    prediction_names: Mapping[int | str, str],
) -> tuple[dict[int | str, int | str], int | str | None]:
    """Return the images that match, and the id for which ids are ignored (`_contradicted_id`)."""
    wrong_id = _contradicted_id(truth_names, prediction_names, _listed_names(truth), _listed_names(prediction))
    joined = {image: image for image in truth_names if wrong_id is None and image in prediction_names}
    if len(joined) == len(truth_names):
        return joined, wrong_id
    keys = ([list(names.items()), *_keys(names)] for names in (truth_names, prediction_names))  # whole names first
    for truth_keys, prediction_keys in zip(*keys, strict=True):
        image_by_key, predicted_by_key = _unique(truth_keys), _unique(prediction_keys)
        taken = set(joined.values())
        for key in image_by_key.keys() & predicted_by_key.keys():
            if predicted_by_key[key] not in taken:
                joined.setdefault(image_by_key[key], predicted_by_key[key])
    return joined, wrong_id


def _names_by_id(content: Mapping[str, Any]) -> dict[int | str, str]:
    names = photograph_names(content)
    return {row["image_id"]: name for row, name in zip(content["annotations"], names, strict=True)}


def _contradicted_id(
    truth_names: Mapping[Any, str],
    prediction_names: Mapping[Any, str],
    listed_truth: Mapping[Any, str],
    listed_prediction: Mapping[Any, str],
) -> int | str | None:
    """Find an id of both files whose names are of different images; None if no id has such names.

    Args:
        truth_names: name by image id in the ground truth.
        prediction_names: name by image id in the prediction.
        listed_truth: name by image id as `images` of the ground truth lists it.
        listed_prediction: name by image id as `images` of the prediction lists it.
    """
    # If each file numbers its own images, one id may stand for different images. Their names show this.
    doubtful = [
        i
        for i in truth_names
        if i in prediction_names and i in listed_prediction and truth_names[i] != listed_prediction[i]
    ]
    if not doubtful:
        return None
    truth_keys, prediction_keys = (
        [_unique(keys) for keys in _keys(names)[:2]] for names in (truth_names, prediction_names)
    )
    for image in doubtful:
        images = {
            _image_of(listed_prediction[image], truth_keys),
            _image_of(listed_truth.get(image), prediction_keys),
        } - {None}
        if images - {image} or (
            not images and image in listed_truth and not _is_tail(listed_truth[image], listed_prediction[image])
        ):
            return image
    return None


def _image_of(name: str | None, keys: Sequence[Mapping[str, Any]]) -> int | str | None:
    """Find the image of a name, compared first with its folder, then without; None if no image or several match."""
    if name is None:
        return None
    ((_, path),), ((_, stem),) = _keys({0: name})[:2]
    image: int | str | None = keys[0].get(path, keys[1].get(stem))
    return image


def _is_tail(first: str, second: str) -> bool:
    """Return whether one name with its folders is the end of the other."""
    parts = [(*PurePosixPath(name).parent.parts, photograph_key(name)) for name in (first, second)]
    count = min(map(len, parts))
    return parts[0][-count:] == parts[1][-count:]


def _keys(names: Mapping[Any, str]) -> list[list[tuple[Any, str]]]:
    """Return a list of (image id, key) for each of three keys.

    The keys are the name with its folder; the name alone; and the id if it is a string, else the name.
    """
    stems = {image: photograph_key(name) for image, name in names.items()}
    folders = {image: str(PurePosixPath(name).parent) for image, name in names.items()}
    return [
        [(image, f"{folders[image]}/{stem}") for image, stem in stems.items()],
        list(stems.items()),
        [(image, image if isinstance(image, str) else stem) for image, stem in stems.items()],
    ]


def _unique(keys: list[tuple[Any, str]]) -> dict[str, Any]:
    """Map keys of exactly one image to its id."""
    counts = Counter(key for _, key in keys)
    return {key: image for image, key in keys if counts[key] == 1}


def _examples(images: Mapping[Any, str]) -> str:
    shown = [f"id {image!r:.60} ({name!r:.60})" for image, name in list(images.items())[:2]]
    return ", ".join(shown + ["..."] * (len(images) > 2)) or "no image"
