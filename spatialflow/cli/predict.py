# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow predict`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import spatialflow
from spatialflow.cli.arguments import add_settings_option, numbers
from spatialflow.cli.common import CommandError, add_path, as_command_errors, format_error, print_error, set_threads
from spatialflow.cli.drawing_options import (
    CONTACT_SHEET,
    DEFAULT_STYLE,
    add_drawing_options,
    drawing_style,
    write_contact_sheet,
)
from spatialflow.cli.input_images import InputImage, resolve_images
from spatialflow.cli.networks import (
    add_config_option,
    add_ema_option,
    add_model_option,
    configs_paragraph,
    load_models,
    note_drawn_scenes,
)
from spatialflow.cli.prediction_folder import RESULTS, PredictionFolder, writers

if TYPE_CHECKING:
    from spatialflow.engine.predict import Predictor
    from spatialflow.models.spatialflow import SpatialFlow

SUMMARY = "write panoptic maps and overlay pictures of images"
DESCRIPTION = (
    "Write a panoptic map and an overlay picture for every image. Files that are not images are reported and skipped.\n"
    "The same command, given again, resumes an interrupted run. Threads decode the next images and write the previous\n"
    "ones while the network runs.\n\n" + configs_paragraph()
)
EXAMPLES = (
    "synthesize scenes --count 20 --size 256x384",
    "predict scenes/images --model demo --output out",
    "predict photos --model runs/mine --output out",
    "predict photos --recursive --model runs/mine --output out",
    "predict photos --model weights.pth --config spatialflow_r50_coco --output out",
    "predict a.jpg b.jpg --model runs/mine --size 512x768 --flip score_threshold=0.1 --output out",
    "predict photos --model runs/mine --output out --opacity 0.3 --legend --contact-sheet 16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    _add_input_options(parser)
    _add_device_options(parser)
    _add_inference_options(parser)
    add_drawing_options(parser)


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_path(parser, "images", "IMAGE", "image files, or folders of images", nargs="+")
    files = "panoptic.json, panoptic/*.png (COCO panoptic format) and overlays/*.jpg"
    add_path(parser, "--output", "FOLDER", f"folder for {files}", required=True)
    add_model_option(parser, "network, repeated for an ensemble", action="append")
    add_config_option(parser, "configuration of all models, or repeated one for each", action="append")
    add_ema_option(parser)
    add("--detections", action="store_true", help="also write detections.json (COCO results)")
    add("--no-overlay", action="store_true", help="do not write overlay pictures")
    add("--recursive", action="store_true", help="include images in sub-folders; the output has the same sub-folders")
    add("--restart", action="store_true", help="start from the beginning instead of resuming an interrupted run")


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="data type of the network's weights and features (default: %(default)s)",
    )
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="replay a CUDA graph for each padded size of the network's input; the first image of a size takes "
        "longer (default: on a GPU)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the network, in addition to those that decode and write (default: torch's)",
    )


def _add_inference_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--size",
        type=numbers,
        metavar="SHORTxLONG",
        help="resize images so that the short edge has SHORT pixels, or the long edge LONG pixels if that is "
        "smaller; without LONG, it is SHORT * 1333 / 800 (default of the option: sizes of the configuration)",
    )
    add(
        "--short-edges",
        type=numbers,
        metavar="SHORT,SHORT",
        help="test-time augmentation: process every image with each of these short edges (pixels) and combine the "
        "results; with a long edge of at most 1333 / 800 of the largest (default: the configuration's)",
    )
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="test-time augmentation: process mirrored images too (default: the configuration's)",
    )
    add(
        "--score",
        type=float,
        metavar="S",
        help="minimum score of an instance in the panoptic map, 0 to 1 (default: the configuration's)",
    )
    add_settings_option(parser, "stuff_area_threshold=2000")


def run(options: argparse.Namespace) -> int:
    """Predict and write all images; return the exit code. Decoding, prediction and writing of several images overlap.

    An image that cannot be read or written is reported and skipped.
    """
    from spatialflow.panoptic.detection import has_pycocotools

    style = _drawing_style(options)
    results = [options.output / name for name in (*RESULTS, CONTACT_SHEET)]
    images, failed = resolve_images(options.images, options.recursive, results)
    if not images:
        print_error("no image to predict")
        return 1
    if options.detections and not has_pycocotools():
        print_error("--detections: the package pycocotools is missing, so detections.json has boxes without masks")
    predictor, settings = _make_predictor(options, images)
    output = PredictionFolder(
        options.output,
        images,
        predictor.categories.as_coco(),
        settings,
        overlays=not options.no_overlay,
        style=style,
        detections=options.detections,
        resume=not options.restart,
    )
    done_before = set(output.done)
    if output.replaces_results:
        print_error(f"{options.output}: holds the results of an earlier run, which this one replaces")
    if done_before:
        print_error(
            f"{options.output}: {len(done_before)} of {len(images)} images were done by an interrupted run, "
            f"which this run continues"
        )
    begin = time.perf_counter()
    try:
        times = _predict_images(predictor, output, images, done_before, failed)
    except KeyboardInterrupt as stop:
        stop.args = (f"{len(output.done)} of {len(images)} images are done; run the same command again for the others",)
        raise
    _report(options, output, len(output.done) - len(done_before), failed, times, time.perf_counter() - begin)
    return 1 if failed else 0


def _predict_images(
    predictor: Predictor, output: PredictionFolder, images: Sequence[InputImage], done: set[str], failed: list[str]
) -> dict[str, float]:
    """Predict and write the images that are not `done`; return the total seconds by stage.

    Messages about images that cannot be read or written are printed and added to `failed`.
    """
    from tqdm import tqdm

    from spatialflow.images import ImageError
    from spatialflow.panoptic import PanopticFormatError

    remaining = [image for image in images if image.name not in done]
    times: dict[str, float] = {}
    with (
        output,
        contextlib.closing(predictor.outcomes([image.path for image in remaining])) as outcomes,
        tqdm(desc="predict", unit="image", total=len(images), initial=len(done), disable=None) as bar,
        contextlib.closing(output.add_all(remaining, outcomes, writers(predictor.device.type))) as files,
    ):
        for written in files:
            try:
                for stage, seconds in written.result().items():
                    times[stage] = times.get(stage, 0.0) + seconds
            except (ImageError, PanopticFormatError, OSError) as error:
                failed.append(format_error(error))
                with bar.external_write_mode(file=sys.stderr):
                    print_error(failed[-1])
            bar.update()
    return times


def _report(
    options: argparse.Namespace,
    output: PredictionFolder,
    new: int,
    failed: Sequence[str],
    times: dict[str, float],
    elapsed: float,
) -> None:
    """Print times and counts of a run with `new` images that took `elapsed` seconds, and write the contact sheet."""
    from spatialflow.images import ImageError

    if new:
        stages = ", ".join(f"{stage} {seconds / new * 1e3:.1f} ms" for stage, seconds in times.items())
        print(
            f"mean time per image: {stages}, together {sum(times.values()) / new * 1e3:.1f} ms; "
            f"overlapped {elapsed / new * 1e3:.1f} ms"
        )
    done = len(output.done)
    if done and options.contact_sheet is not None:
        with as_command_errors(ImageError):
            write_contact_sheet(options.output, output.overlays_done(), options.contact_sheet)
    if done:
        print(
            f"{done} of {done + len(failed)} images done: {options.output / 'panoptic.json'}, {output.folder}/"
            + ("" if options.no_overlay else f", {output.overlay_folder}/")
        )
    else:
        print_error("no image could be predicted")
    if output.left_out:
        print_error(
            f"{options.output}: {output.left_out} more images were done by the interrupted run; "
            f"panoptic.json does not list them, and the journal keeps them"
        )


def _drawing_style(options: argparse.Namespace) -> dict[str, Any]:
    """Return the style of overlays; raise CommandError for an option that needs them if there are none."""
    style = drawing_style(options)
    if options.no_overlay and (options.contact_sheet is not None or style != DEFAULT_STYLE):
        names = "--opacity, --no-labels, --no-outlines, --legend and --contact-sheet"
        raise CommandError(f"{names} are for overlay pictures, which --no-overlay excludes")
    return style


def _make_predictor(options: argparse.Namespace, images: Sequence[InputImage]) -> tuple[Predictor, dict[str, Any]]:
    """Build the predictor; also return the settings that determine its results."""
    import torch

    from spatialflow.engine.predict import Predictor, usable_device

    set_threads(options.threads)
    try:
        device = usable_device(options.device)
    except ValueError as error:
        raise CommandError(f"--{error}") from None
    if options.cuda_graph and device.type != "cuda":
        raise CommandError(f"--cuda-graph needs a CUDA device, got --device {device}")
    try:
        models = load_models(options.config or [], options.model or [], _overrides(options), options.ema)
        dtype = getattr(torch, options.dtype)
        predictor = Predictor(models, device, dtype, options.cuda_graph, detection_masks=options.detections)
    except ValueError as error:  # settings, categories, or networks that do not form an ensemble
        raise CommandError(str(error)) from None
    note_drawn_scenes(models, [image.path for image in images])
    return predictor, _settings(options, models)


def _settings(options: argparse.Namespace, models: Sequence[SpatialFlow]) -> dict[str, Any]:
    """Collect the settings that determine the results; only a run with the same settings may be resumed.

    The device is not among them, as devices differ only in rounding.
    """
    from spatialflow.engine.checkpoints import weights_digest

    settings = {
        "version": spatialflow.__version__,
        "dtype": options.dtype,
        "detections": options.detections,
        "overlays": not options.no_overlay,
        "models": len(models),
    }
    settings |= {f"overlay {field}": value for field, value in _drawing_style(options).items()}
    for number, model in enumerate(models, 1):
        prefix = f"model {number}: " if len(models) > 1 else ""
        for section in (model.config.model, model.config.test, model.config.data):
            settings |= {f"{prefix}{field}": value for field, value in vars(section).items()}
        settings[f"{prefix}weights"] = weights_digest(model)
    return settings


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    from spatialflow.config import parse_settings

    overrides = parse_settings(options.settings)
    overrides |= _sizes(options)
    if options.flip is not None:
        overrides["test_flip"] = options.flip
    if options.score is not None:
        overrides["instance_score_threshold"] = options.score
    return overrides


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    if options.size is not None and options.short_edges is not None:
        raise CommandError("--size and --short-edges exclude each other")
    if options.size is not None and len(options.size) > 2:
        raise CommandError(f"--size takes the short edge and the long one, got {len(options.size)} numbers")
    name, edges = ("--size", options.size) if options.short_edges is None else ("--short-edges", options.short_edges)
    if edges is None:
        return {}
    if min(edges) < 1:
        raise CommandError(f"{name} must be positive, got {min(edges)}")
    if name == "--size" and len(edges) == 2:
        return {"test_short_edges": edges[:1], "test_long_edge": edges[1]}
    return {"test_short_edges": edges, "test_long_edge": max(round(max(edges) * 1333 / 800), max(edges))}
