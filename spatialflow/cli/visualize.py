# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow visualize`: pictures of ground truth, prediction and class-activation maps."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from spatialflow.cli.arguments import add_settings_option
from spatialflow.cli.common import (
    CommandError,
    add_path,
    as_command_errors,
    counted,
    format_error,
    panoptic_json,
    path_in_oserror,
    png_folder,
    print_error,
)
from spatialflow.cli.drawing_options import CONTACT_SHEET, add_drawing_options, drawing_style, write_contact_sheet
from spatialflow.cli.input_images import InputImage, Inputs, add_images, resolve_images, without_suffix
from spatialflow.cli.networks import (
    add_config_option,
    add_ema_option,
    add_model_option,
    check_ema,
    load_model,
    note_drawn_scenes,
)

if TYPE_CHECKING:
    import numpy as np

    from spatialflow.models.spatialflow import SpatialFlow
    from spatialflow.panoptic.rules import Problem

Map: TypeAlias = "tuple[np.ndarray, list[dict[str, Any]]]"
"""Id map and segments of one image."""

PICTURES, SHEETS = "pictures", ("worst", "best")
"""Names in the output folder: the folder of the pictures, and the contact sheets, which are JPEG files."""

JPEG_QUALITY = 90


class PanopticFolder(NamedTuple):
    """A panoptic data set or a folder of predictions."""

    path: Path  # the JSON
    folder: Path  # its PNGs
    use: str  # `rules.TRUTH` or `rules.PREDICTION`
    annotation_by_name: dict[str, dict[str, Any]]  # by the photograph's name without suffix
    annotations_by_key: dict[str, list[dict[str, Any]]]  # by the `photograph_key` of that name
    annotation_of: dict[str, dict[str, Any]]  # by `InputImage.name`, for the photographs that are drawn
    categories: list[dict[str, Any]]
    problems: list[Problem]  # problems found so far that are to be reported

    def match(self, images: Sequence[InputImage]) -> dict[str, dict[str, Any]]:
        """Find the annotations of photographs by name; photographs without one are left out.

        Where no annotation has the name, the one with its `photograph_key` is taken, if only one annotation and only
        one photograph have that key. So it is not that of a photograph in another folder.
        """
        from spatialflow.panoptic.photographs import photograph_key

        count = Counter(photograph_key(image.name) for image in images)
        found: dict[str, dict[str, Any]] = {}
        for image in images:
            key = photograph_key(image.name)
            with_key = self.annotations_by_key.get(key, [])
            if (annotation := self.annotation_by_name.get(without_suffix(image.name))) is not None:
                found[image.name] = annotation
            elif len(with_key) == count[key] == 1:
                found[image.name] = with_key[0]
        return found


class Picture(NamedTuple):
    """A picture that was written."""

    name: str
    path: Path
    quality: float | None  # PQ of the image; None without ground truth or prediction


SUMMARY = "draw ground truth, prediction and activations side by side"
DESCRIPTION = "Draw the ground truth, the prediction and class-activation maps of photographs side by side."
EXAMPLES = ("visualize photos --ground-truth truth.json --prediction out --model runs/mine --output pictures",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add_images(parser, "photographs, or folders of photographs")
    add_path(
        parser,
        "--output",
        "FOLDER",
        "folder for pictures/*.jpg and index.html; with ground truth and prediction, the pictures are sorted by "
        "panoptic quality, and worst.jpg and best.jpg are written",
        required=True,
    )
    source = "the panoptic JSON with PNGs beside it, or a folder that holds one, such as a training run"
    add_path(parser, "--ground-truth", "JSON", f"ground truth: {source}")
    add_path(parser, "--prediction", "JSON", f"predictions: {source}")
    add(
        "--sheet",
        type=int,
        default=5,
        metavar="N",
        help="number of pictures in each of worst.jpg and best.jpg (default: %(default)s)",
    )
    add("--recursive", action="store_true", help="include photographs in sub-folders")
    add_model_option(parser, "also draw class-activation maps of this network, of its cls sub-network and stuff head")
    add_config_option(parser, "configuration of the network")
    add_settings_option(parser, "test_short_edges=[256]")
    add_ema_option(parser)
    add_drawing_options(parser)


def run(options: argparse.Namespace) -> int:
    """Draw the pictures and the pages that show them; return the exit code."""
    _check_options(options)
    drawing_style(options)
    results = [options.output / name for name in (PICTURES, CONTACT_SHEET, *(f"{sheet}.jpg" for sheet in SHEETS))]
    with resolve_images(options.images, options.recursive, results) as inputs:
        if inputs.videos:
            raise CommandError(f"{inputs.videos[0].path}: is a video; `visualize` shows images")
        return _run(options, inputs)


def _run(options: argparse.Namespace, inputs: Inputs) -> int:
    from spatialflow.images import ImageError
    from spatialflow.panoptic.rules import PREDICTION, TRUTH, summary

    style = drawing_style(options)
    images, failed = inputs.images, inputs.failed
    folders: dict[str, PanopticFolder] = {}
    if options.ground_truth is not None:
        folders["ground truth"] = _read_folder(options.ground_truth, TRUTH, None)
    if options.prediction is not None:
        folders["prediction"] = _read_folder(options.prediction, PREDICTION, folders.get("ground truth"))
    model = _load_model(options)
    images = _annotated(images, folders, failed)
    if model is not None and images:
        note_drawn_scenes([model], [image.path for image in images])
    pictures: list[Picture] = []
    try:
        _draw_all(images, folders, model, options.output, style, pictures, failed)
    except KeyboardInterrupt as stop:
        stop.args = (f"{len(pictures)} of {counted(len(images), 'picture')} done",)
        raise
    finally:
        if pictures:  # after an interrupt, the page shows the pictures drawn before it
            with as_command_errors(ImageError):
                if options.contact_sheet is not None:
                    shown = [("", picture.path) for picture in pictures]  # a picture has its name in it
                    write_contact_sheet(options.output, shown, options.contact_sheet, cell=960)
                _write_pages(pictures, options.output, options.sheet)
    for folder in folders.values():
        if folder.problems:
            print_error(summary(folder.problems, str(folder.path)))
    if not pictures:
        print_error("no picture could be drawn")
        return 1
    print(f"{len(pictures)} of {counted(len(pictures) + len(failed), 'picture')} done: {options.output / 'index.html'}")
    return 1 if failed else 0


def _load_model(options: argparse.Namespace) -> SpatialFlow | None:
    """Load the network whose activations are drawn; None without one."""
    from spatialflow.config import ConfigError, parse_settings

    check_ema(options.ema, options.model is not None)
    if options.model is None and options.config is None:
        return None
    try:
        overrides = parse_settings(options.settings)
    except ConfigError as error:
        raise CommandError(str(error)) from None
    return load_model(options.config, options.model, overrides, options.ema)


def _check_options(options: argparse.Namespace) -> None:
    """Raise CommandError for options that do not fit together."""
    has_network = options.model is not None or options.config is not None
    if options.settings and not has_network:
        raise CommandError(f"{options.settings[0]}: settings need --model, the network that they apply to")
    if options.ground_truth is None and options.prediction is None and not has_network:
        raise CommandError("nothing to show: give --ground-truth, --prediction or --model")
    if options.sheet < 1:
        raise CommandError(f"--sheet must be at least 1, got {options.sheet}")


def _draw_all(
    images: list[InputImage],
    folders: dict[str, PanopticFolder],
    model: SpatialFlow | None,
    output: Path,
    style: dict[str, Any],
    pictures: list[Picture],
    failed: list[str],
) -> None:
    """Draw all pictures and add them to `pictures`.

    Messages about images that fail are printed and added to `failed`.
    """
    from tqdm import tqdm

    from spatialflow.data.categories import CategoryError
    from spatialflow.images import ImageError
    from spatialflow.panoptic import PanopticFormatError

    with tqdm(images, desc="visualize", unit="image", disable=None) as bar:
        for image in bar:
            try:
                pictures.append(_draw(image, folders, model, output, style))
            except (ImageError, PanopticFormatError, OSError) as error:
                failed.append(image.named(format_error(error)))
                print_error(failed[-1])
            except CategoryError as error:  # of the configuration; the same for every picture
                raise CommandError(str(error)) from None


def _read_folder(path: Path, use: str, truth: PanopticFolder | None) -> PanopticFolder:
    """Read a panoptic JSON.

    Args:
        path: the JSON, or a folder as for `panoptic_json`.
        use: `rules.TRUTH` or `rules.PREDICTION`. A prediction need not have categories.
        truth: the ground truth, whose categories then apply; None: the categories of the JSON.
    """
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.category_names import check_names
    from spatialflow.panoptic.formats import check_panoptic, load_json
    from spatialflow.panoptic.photographs import photograph_key, photograph_names
    from spatialflow.panoptic.rules import TRUTH, is_color

    path = panoptic_json(path)
    try:
        content = load_json(path)
        with_categories = use == TRUTH or (truth is None and isinstance(content, dict) and "categories" in content)
        category_ids = None if truth is None else {row["id"] for row in truth.categories}
        problems = check_panoptic(content, str(path), with_categories=with_categories, use=use, categories=category_ids)
        if truth is not None:
            check_names(truth.categories, str(truth.path), content.get("categories"), str(path))
    except PanopticFormatError as error:
        raise CommandError(str(error)) from None
    categories = content.get("categories", []) if truth is None else truth.categories
    for index, row in enumerate(categories):
        if row.get("color") is not None and not is_color(row["color"]):
            rule = f"color must be three numbers from 0 to 255, got {row['color']!r:.80}"
            raise CommandError(f"{path}: categories[{index}]: {rule}")
    folder = png_folder(path)
    annotation_by_name: dict[str, dict[str, Any]] = {}
    annotations_by_key: dict[str, list[dict[str, Any]]] = {}
    for name, annotation in zip(photograph_names(content), content["annotations"], strict=True):
        annotation_by_name[without_suffix(name)] = annotation
        annotations_by_key.setdefault(photograph_key(name), []).append(annotation)
    return PanopticFolder(path, folder, use, annotation_by_name, annotations_by_key, {}, categories, problems)


def _annotated(inputs: list[InputImage], folders: dict[str, PanopticFolder], failed: list[str]) -> list[InputImage]:
    """Leave out the photographs that a folder does not have, as those of the other set of a split, and print how many.

    If no photograph is left, the message is also added to `failed`.
    """
    images = list(inputs)
    for title, folder in folders.items():
        folder.annotation_of.update(folder.match(inputs))
        found = [image for image in images if image.name in folder.annotation_of]
        if images and not found:
            subject = f"{images[0].path}: has no" if len(images) == 1 else f"none of {len(images)} photographs has a"
            failed.append(f"{subject} {title} in {folder.path}")
            print_error(failed[-1])
        elif count := len(images) - len(found):
            verbs = ("has", "is") if count == 1 else ("have", "are")
            counts = f"{count} of {counted(len(images), 'photograph')}"
            print_error(f"{counts} {verbs[0]} no {title} in {folder.path} and {verbs[1]} left out")
        images = found
    return images


def _draw(
    image: InputImage,
    folders: dict[str, PanopticFolder],
    model: SpatialFlow | None,
    output: Path,
    style: dict[str, Any],
) -> Picture:
    """Write the picture of one photograph; `style` has keyword arguments of `overlay`."""
    from spatialflow.files import write_jpeg
    from spatialflow.images import read_image
    from spatialflow.panoptic import overlay
    from spatialflow.panoptic.pages import side_by_side, with_equal_heights

    pixels = read_image(image.path)
    panels, maps = {"photograph": pixels}, []
    for title, folder in folders.items():
        ids, segments = _read_map(image, pixels, folder)
        maps.append((ids, segments))
        panels[title] = overlay(pixels, ids, segments, folder.categories, **style)
    if model is not None:
        from spatialflow.engine.activations import class_activation_maps, heat_picture

        activations = class_activation_maps(model, pixels)
        panels["cls sub-network: things"] = heat_picture(pixels, activations.things)
        if activations.stuff is not None:
            name = "other (all things)" if activations.stuff_class is None else activations.stuff_class.name
            panels[f"stuff head: {name}"] = heat_picture(pixels, activations.stuff)
    if style["legend"]:
        panels = with_equal_heights(panels)
    quality = _quality(image.path, folders["ground truth"].categories, *maps) if len(maps) == 2 else None
    heading = image.name if quality is None else f"{image.name}: PQ {100 * quality:.1f}"
    path = output / PICTURES / f"{image.stem}.jpg"
    with path_in_oserror(path):
        write_jpeg(path, side_by_side(panels, heading), JPEG_QUALITY)
    return Picture(heading, path, quality)


def _read_map(image: InputImage, pixels: np.ndarray, folder: PanopticFolder) -> Map:
    """Read the id map and the segments of one photograph, and append their problems to `folder.problems`."""
    from spatialflow.panoptic import PanopticFormatError, read_id_map
    from spatialflow.panoptic.extents import extents
    from spatialflow.panoptic.rules import pixel_problems, raise_first

    annotation = folder.annotation_of[image.name]
    path = folder.folder / annotation["file_name"]
    ids = read_id_map(path)
    if ids.shape != pixels.shape[:2]:
        raise PanopticFormatError(
            f"{path}: is {ids.shape[1]}x{ids.shape[0]} pixels, {image.path.name} is {pixels.shape[1]}x{pixels.shape[0]}"
        )
    segments = annotation["segments_info"]
    problems = pixel_problems(segments, annotation["image_id"], extents(ids))
    folder.problems.extend(raise_first(problems, folder.use, str(folder.path)))
    return ids, segments


def _quality(path: Path, categories: list[dict[str, Any]], truth: Map, prediction: Map) -> float:
    """Compute PQ over the classes that occur in one image; `_read_map` has collected the problems of both maps."""
    from spatialflow.panoptic.quality import PanopticQuality, image_quality

    counts, _ = PanopticQuality(categories).count(*truth, *prediction, image_id=path.name)
    return image_quality(counts) or 0.0


def _write_pages(pictures: list[Picture], output: Path, sheet: int) -> None:
    """Write index.html, and the contact sheets of the `sheet` worst and best pictures if they have a quality."""
    from spatialflow.files import atomic_write, write_jpeg
    from spatialflow.images import read_image
    from spatialflow.panoptic.pages import contact_sheet, html_page

    scored = [(picture.quality, picture) for picture in pictures if picture.quality is not None]
    if scored:
        pictures = [picture for _, picture in sorted(scored, key=lambda pair: pair[0])]
        for name, chosen in zip(SHEETS, (pictures[:sheet], pictures[::-1][:sheet]), strict=True):
            path = output / f"{name}.jpg"
            with path_in_oserror(path):
                write_jpeg(path, contact_sheet([read_image(picture.path) for picture in chosen]), JPEG_QUALITY)
    title = f"{len(pictures)} pictures, worst first" if scored else f"{len(pictures)} pictures"
    rows = [(picture.name, picture.path.relative_to(output).as_posix()) for picture in pictures]
    with atomic_write(output / "index.html", "w") as file:
        file.write(html_page(title, rows))
