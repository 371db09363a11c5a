# SPDX-License-Identifier: Apache-2.0
"""`spatialflow visualize`: ground truth, prediction and class-activation maps beside the photograph."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from spatialflow.cli.common import (
    InputImage,
    complain,
    list_images,
    load_model,
    named,
    panoptic_json,
    png_folder,
    sentence,
    to_path,
    with_examples,
    without_suffix,
)
from spatialflow.errors import CommandError

PICTURES, SHEETS = "pictures", ("worst", "best")
"""Names in the output folder: the pictures' folder, and the sheets, which are JPEG files."""


class Maps(NamedTuple):
    """A panoptic data set or a folder of predictions."""

    path: Path  # the JSON
    folder: Path  # its PNGs
    use: str  # `rules.TRUTH` or `rules.PREDICTION`
    annotations: dict[str, dict[str, Any]]  # name of the photograph without suffix -> annotation
    of_key: dict[str, list[dict[str, Any]]]  # `photograph_key` of that name -> annotations
    categories: list[dict[str, Any]]
    problems: list[Any]  # `rules.Problem`s met so far that are reported

    def find(self, name: str) -> dict[str, Any] | None:
        """The annotation of the photograph of that name; of its `photograph_key`, where only one has it."""
        from spatialflow.panoptic.photographs import photograph_key

        found = self.annotations.get(without_suffix(name))
        with_key = self.of_key.get(photograph_key(name), [])
        return with_key[0] if found is None and len(with_key) == 1 else found


class Row(NamedTuple):
    """One picture that was written."""

    name: str
    path: Path
    quality: float | None  # PQ of the image; None where ground truth or prediction is absent


def add_visualize(commands: Any) -> None:
    """Adds the command to the subparsers of `spatialflow`."""
    visualize = commands.add_parser(
        "visualize",
        help="pictures of ground truth, prediction, activations side by side",
        **with_examples("visualize photos --ground-truth truth.json --prediction out --config demo --output pictures"),
    )
    visualize.set_defaults(run=run_visualize)
    visualize.add_argument("images", nargs="+", type=to_path, metavar="IMAGE", help="photographs, or folders of them")
    visualize.add_argument(
        "--output",
        required=True,
        type=to_path,
        metavar="FOLDER",
        help="receives pictures/*.jpg and index.html; with ground truth and prediction the pictures "
        "are sorted by panoptic quality, and there are worst.jpg and best.jpg",
    )
    for name, what in (("ground-truth", "ground truth"), ("prediction", "predictions")):
        visualize.add_argument(
            f"--{name}",
            type=to_path,
            metavar="JSON",
            help=f"{what}: the panoptic JSON, PNGs beside it, or what `predict` wrote",
        )
    visualize.add_argument(
        "--sheet",
        type=int,
        default=5,
        metavar="N",
        help="pictures in each of worst.jpg and best.jpg (default: %(default)s)",
    )
    visualize.add_argument("--recursive", action="store_true", help="photographs in sub-folders too")
    visualize.add_argument(
        "--config",
        metavar="NAME",
        help="network whose class-activation maps are shown, of the cls sub-network and the stuff head",
    )
    visualize.add_argument("--checkpoint", type=to_path, metavar="FILE", help="its weights, as for predict")
    visualize.add_argument("--ema", action="store_true", help="use the moving average (EMA) of --checkpoint's weights")


def run_visualize(options: argparse.Namespace) -> int:
    """Carries the command out; returns the exit code."""
    from tqdm import tqdm

    from spatialflow.data.categories import CategoryError
    from spatialflow.images import ImageError
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.rules import PREDICTION, TRUTH, summary

    if options.checkpoint is not None and options.config is None:
        raise CommandError("--checkpoint needs --config, the network that it fills")
    if options.ground_truth is None and options.prediction is None and options.config is None:
        raise CommandError("nothing to show: give --ground-truth, --prediction or --config")
    if options.sheet < 1:
        raise CommandError(f"--sheet must be at least 1, got {options.sheet}")
    results = [options.output / name for name in (PICTURES, *(f"{sheet}.jpg" for sheet in SHEETS))]
    images, failed = list_images(options.images, options.recursive, results)
    maps: dict[str, Maps] = {}
    if options.ground_truth is not None:
        maps["ground truth"] = _read_maps(options.ground_truth, TRUTH, None)
    if options.prediction is not None:
        maps["prediction"] = _read_maps(options.prediction, PREDICTION, maps.get("ground truth"))
    if options.ema and options.checkpoint is None:
        raise CommandError("--ema needs --checkpoint")
    model = None if options.config is None else load_model(options.config, options.checkpoint, {}, options.ema)
    rows: list[Row] = []
    try:
        with tqdm(images, desc="visualize", unit="image", disable=None) as bar:
            for image in bar:
                try:
                    rows.append(_draw(image, maps, model, options.output))
                except (ImageError, PanopticFormatError, OSError) as error:
                    failed.append(sentence(error))
                    complain(failed[-1])
                except CategoryError as error:  # of the configuration, the same for every picture
                    raise CommandError(str(error)) from None
    except KeyboardInterrupt as stop:
        stop.args = (f"{len(rows)} of {len(images)} pictures are done",)
        raise
    finally:
        if rows:  # an interrupt leaves the page of the pictures before it
            try:
                _write_pages(rows, options.output, options.sheet)
            except OSError as error:
                raise CommandError(sentence(error)) from None
    for shown in maps.values():
        if shown.problems:
            complain(summary(shown.problems, str(shown.path)))
    if not rows:
        complain("no picture could be drawn")
        return 1
    print(f"{len(rows)} of {len(rows) + len(failed)} pictures done: {options.output / 'index.html'}")
    return 1 if failed else 0


def _read_maps(path: Path, use: str, truth: Maps | None) -> Maps:
    """Reads a JSON for `use`. Categories are those of `truth`, else its own; a prediction may have none."""
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.formats import check_panoptic, load_json
    from spatialflow.panoptic.photographs import photograph_key, photograph_names
    from spatialflow.panoptic.rules import TRUTH, is_color

    path = panoptic_json(path)
    try:
        content = load_json(path)
        own = use == TRUTH or (truth is None and isinstance(content, dict) and "categories" in content)
        known = None if truth is None else {row["id"] for row in truth.categories}
        problems = check_panoptic(content, str(path), with_categories=own, use=use, categories=known)
    except PanopticFormatError as error:
        raise CommandError(str(error)) from None
    categories = content.get("categories", []) if truth is None else truth.categories
    for index, row in enumerate(categories):
        if row.get("color") is not None and not is_color(row["color"]):
            rule = f"color must be three numbers from 0 to 255, got {row['color']!r:.80}"
            raise CommandError(f"{path}: categories[{index}]: {rule}")
    folder = png_folder(path)
    annotations: dict[str, dict[str, Any]] = {}
    of_key: dict[str, list[dict[str, Any]]] = {}
    for name, annotation in zip(photograph_names(content), content["annotations"]):
        annotations[without_suffix(name)] = annotation
        of_key.setdefault(photograph_key(name), []).append(annotation)
    return Maps(path, folder, use, annotations, of_key, categories, problems)


def _draw(image: InputImage, maps: dict[str, Maps], model: Any, output: Path) -> Row:
    """Writes the picture of one photograph."""
    from spatialflow.images import read_image
    from spatialflow.panoptic import PanopticFormatError, overlay, read_id_map
    from spatialflow.panoptic.extents import extents
    from spatialflow.panoptic.pages import side_by_side
    from spatialflow.panoptic.rules import pixel_problems, raise_first

    path = image.path
    pixels = read_image(path)
    panels, found = {"photograph": pixels}, []
    for title, shown in maps.items():
        annotation = shown.find(image.name)
        if annotation is None:
            raise PanopticFormatError(f"{path}: the {title} in {shown.folder} has no image of that name")
        ids = read_id_map(shown.folder / annotation["file_name"])
        if ids.shape != pixels.shape[:2]:
            raise PanopticFormatError(
                f"{shown.folder / annotation['file_name']}: is {ids.shape[1]}x{ids.shape[0]} pixels, "
                f"{path.name} is {pixels.shape[1]}x{pixels.shape[0]}"
            )
        segments = annotation["segments_info"]
        shown.problems.extend(
            raise_first(pixel_problems(segments, annotation["image_id"], extents(ids)), shown.use, str(shown.path))
        )
        found.append((ids, segments))
        panels[title] = overlay(pixels, ids, segments, shown.categories)
    if model is not None:
        from spatialflow.engine.activations import class_activation_maps, heat_picture

        activations = class_activation_maps(model, pixels)
        panels["cls sub-network: things"] = heat_picture(pixels, activations.things)
        if activations.stuff is not None:
            name = "other (all things)" if activations.stuff_class is None else activations.stuff_class.name
            panels[f"stuff head: {name}"] = heat_picture(pixels, activations.stuff)
    quality = _quality(path, maps["ground truth"].categories, *found) if len(found) == 2 else None
    heading = image.name if quality is None else f"{image.name}: PQ {100 * quality:.1f}"
    picture = output / PICTURES / f"{without_suffix(image.name)}.jpg"
    _write_jpeg(picture, side_by_side(panels, heading))
    return Row(heading, picture, quality)


def _quality(path: Path, categories: list[dict[str, Any]], truth: tuple, prediction: tuple) -> float:
    """PQ over the classes that occur in one image, whose contradictions `_draw` has noted."""
    from spatialflow.panoptic import PanopticQuality

    quality = PanopticQuality(categories)
    counts, _ = quality.count(*truth, *prediction, image_id=path.name)
    quality.add(counts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no segment of any category")
        return quality.compute()["All"]["pq"]


def _write_pages(rows: list[Row], output: Path, sheet: int) -> None:
    import cv2

    from spatialflow.files import atomic_write
    from spatialflow.panoptic.pages import contact_sheet, html_page

    scored = [row for row in rows if row.quality is not None]
    if scored:
        rows = sorted(scored, key=lambda row: row.quality)
        for name, chosen in zip(SHEETS, (rows[:sheet], rows[::-1][:sheet])):
            _write_jpeg(output / f"{name}.jpg", contact_sheet([cv2.imread(str(row.path)) for row in chosen]))
    title = f"{len(rows)} pictures, worst first" if scored else f"{len(rows)} pictures"
    with atomic_write(output / "index.html", "w") as file:
        file.write(html_page(title, [(row.name, row.path.relative_to(output).as_posix()) for row in rows]))


def _write_jpeg(path: Path, picture: Any) -> None:
    import cv2

    from spatialflow.files import atomic_write

    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    with named(path), atomic_write(path) as file:
        file.write(data.tobytes())
