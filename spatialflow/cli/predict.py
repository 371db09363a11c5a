# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow predict`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spatialflow
from spatialflow.cli.arguments import add_settings_option, numbers
from spatialflow.cli.common import CommandError, add_path, counted, print_error, quoted, set_threads
from spatialflow.cli.drawing_options import CONTACT_SHEET, DEFAULT_STYLE, add_drawing_options, drawing_style
from spatialflow.cli.input_images import InputImage, Inputs, add_images, resolve_images
from spatialflow.cli.label_folders import RESULT_FILES, RESULTS
from spatialflow.cli.networks import (
    add_config_option,
    add_ema_option,
    add_model_option,
    configs_paragraph,
    load_models,
    note_drawn_scenes,
)
from spatialflow.cli.prediction_folder import PredictionFolder
from spatialflow.cli.prediction_run import PredictionRun

if TYPE_CHECKING:
    from spatialflow.engine.predict import Predictor
    from spatialflow.models.spatialflow import SpatialFlow

SUMMARY = "write panoptic maps and overlay pictures of images and videos"
DESCRIPTION = (
    "Write a panoptic map and an overlay picture for every image and every frame of a video; for a video also an\n"
    "overlay video. Files that are not images are reported and skipped.\n"
    "The same command, given again, resumes an interrupted run. After a completed run it replaces all results of that\n"
    "run; --skip-existing keeps them and adds the others. Threads decode the next images and write the previous ones\n"
    "while the network runs.\n\n" + configs_paragraph()
)
EXAMPLES = (
    "synthesize scenes --count 20 --size 256x384",
    "predict scenes/images --model demo --output out",
    "predict photos --model runs/mine --output out",
    "predict photos --recursive --model runs/mine --output out",
    "predict photos --model weights.pth --config spatialflow_r50_coco --output out",
    "predict a.jpg b.jpg --model runs/mine --size 512x768 --flip score_threshold=0.1 --output out",
    "predict 'photos/**/*.jpg' --model runs/mine --output out --skip-existing",
    "predict clip.mp4 --every 5 --model runs/mine --output out",
    "predict --camera 0 --frames 100 --model runs/mine --output out",
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
    add_images(parser, "images, folders of images, and videos", nargs="*")
    files = "panoptic.json, panoptic/*.png (COCO panoptic format) and overlays/*.jpg"
    add_path(parser, "--output", "FOLDER", f"folder for {files}", required=True)
    add_model_option(parser, "network, repeated for an ensemble", action="append")
    add_config_option(parser, "configuration of all models, or repeated one for each", action="append")
    add_ema_option(parser)
    add("--detections", action="store_true", help="also write detections.json (COCO results)")
    add("--no-overlay", action="store_true", help="do not write overlay pictures")
    add("--recursive", action="store_true", help="include images in sub-folders; the output has the same sub-folders")
    add("--restart", action="store_true", help="start from the beginning instead of resuming an interrupted run")
    add(
        "--skip-existing",
        action="store_true",
        help="keep the results that earlier runs with the same settings left in the folder, and predict only images "
        "without one (default: they are replaced)",
    )
    add("--camera", type=int, metavar="N", help="predict the frames of camera N, 0 for the first one, until Ctrl-C")
    add("--every", type=int, default=1, metavar="N", help="predict every N-th frame of a video (default: %(default)s)")
    add("--frames", type=int, metavar="N", help="predict at most N frames of each video (default: all)")


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
        "smaller; without LONG, it is SHORT * 1333 / 800 (default: the sizes of the configuration)",
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
    _check_input_options(options)
    results = [options.output / name for name in (*RESULTS, *RESULT_FILES, CONTACT_SHEET)]
    with resolve_images(options.images, options.recursive, results) as inputs:
        return _run(options, inputs)


def _check_input_options(options: argparse.Namespace) -> None:
    """Raise CommandError for input options that do not fit together."""
    if not options.images and options.camera is None:
        raise CommandError("no input: give images, folders or videos, or --camera 0")
    if options.camera is not None and options.images:
        raise CommandError(f"--camera takes no other input, got {options.images[0]}")
    for name, value, least in (
        ("--camera", options.camera, 0),
        ("--every", options.every, 1),
        ("--frames", options.frames, 1),
    ):
        if value is not None and value < least:
            raise CommandError(f"{name} must be at least {least}, got {value}")
    if options.skip_existing and (options.restart or options.camera is not None):
        raise CommandError(f"--skip-existing and {'--restart' if options.restart else '--camera'} exclude each other")


def _run(options: argparse.Namespace, inputs: Inputs) -> int:
    style = _drawing_style(options)
    has_camera = options.camera is not None
    videos: list[tuple[InputImage, int | None]] = [(video, None) for video in inputs.videos]
    if has_camera:
        name = f"camera{options.camera}"
        videos.append((InputImage(Path(), name, output=name, source=f"camera {options.camera}"), options.camera))
    if not inputs.images and not videos:
        print_error("no image to predict")
        return 1
    if videos and options.legend:
        raise CommandError("--legend is for images: the pictures of a video must have one size")
    if not videos and (options.every != 1 or options.frames is not None):
        raise CommandError(f"{'--every' if options.every != 1 else '--frames'} is for videos, and there is none")
    predictor, settings = _make_predictor(options, [*inputs.images, *(video for video, _ in videos)])
    output = PredictionFolder(
        options.output,
        inputs.images,
        predictor.categories.as_coco(),
        settings,
        overlays=not options.no_overlay,
        style=style,
        contact_sheet=options.contact_sheet,
        detections=options.detections,
        resume=not options.restart and not has_camera,
        keep=options.skip_existing,
        videos=[video for video, _ in videos],
        is_live=has_camera,
    )
    process = PredictionRun(predictor, output, inputs.failed, options.every, options.frames)
    begin = time.perf_counter()
    try:
        with output:
            _print_earlier_results(options, output)
            process.predict_images()
            for video, camera in videos:
                process.predict_video(video, camera)
    except KeyboardInterrupt as stop:
        done = counted(len(output.done), "image")
        count = done if videos else f"{len(output.done)} of {counted(len(output.images), 'image')}"
        advice = "" if has_camera else "; run the same command again for the others"
        stop.args = (f"{count} done{advice}",)
        raise
    _report(options, output, process, time.perf_counter() - begin)
    return 1 if process.failed else 0


def _print_earlier_results(options: argparse.Namespace, output: PredictionFolder) -> None:
    """Print what happens to the results that are in the output folder."""
    folder, others = options.output, output.other_images()
    has_images = output.images or not output.frames_done
    counts = [f"{len(output.done)} of {counted(len(output.images), 'image')}"] if has_images else []
    counts += [counted(output.frames_done, "frame")] if output.frames_done else []
    done = " and ".join(counts)
    if options.skip_existing:
        if output.earlier:
            rest = f", and of {counted(len(others), 'other image')}" if others else ""
            print_error(f"{folder}: keeps the results of {done}{rest}")
        if output.changed:
            changed = counted(output.changed, "image")
            print_error(f"{folder}: predicts {changed} again, as the photograph has changed or a file is missing")
    elif output.done or output.frames_done:
        print_error(f"{folder}: continues an interrupted run, which did {done}")
    elif output.replaces_results or output.earlier:
        listed = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        images = counted(len(others), "image")
        rest = f"; the results of {images} not among the inputs now are removed: {listed}" if others else ""
        print_error(f"{folder}: holds the results of an earlier run, which this one replaces{rest}")
    if not options.detections and output.has_other_detections():
        print_error(f"{folder}/detections.json: is not a result of this run, and stays")


def _report(options: argparse.Namespace, output: PredictionFolder, process: PredictionRun, elapsed: float) -> None:
    """Print times and counts of a run that took `elapsed` seconds."""
    if new := process.count:
        stages = ", ".join(f"{stage} {seconds / new * 1e3:.1f} ms" for stage, seconds in process.times.items())
        print(
            f"mean time per image: {stages}, together {sum(process.times.values()) / new * 1e3:.1f} ms; "
            f"overlapped {elapsed / new * 1e3:.1f} ms"
        )
    if output.left_out:
        print_error(
            f"{options.output}: the interrupted run did {counted(output.left_out, 'more image')}; "
            f"the journal keeps the results, and panoptic.json does not list them"
        )
    done = len(output.done)
    if done:
        files = [str(options.output / "panoptic.json"), f"{output.folder}/"]
        files += [] if options.no_overlay else [f"{output.overlay_folder}/"]
        files += [str(options.output / name) for name in output.overlay_videos]
        files += [str(options.output / "detections.json")] if options.detections else []
        files += [str(options.output / CONTACT_SHEET)] if options.contact_sheet is not None else []
        print(f"{done} of {counted(done + len(process.failed), 'image')} done: {', '.join(files)}")
        folder = quoted(options.output)
        print(f"next: spatialflow view {folder}\nwith ground truth: spatialflow evaluate TRUTH {folder}")
    else:
        print_error("no image could be predicted")


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
        "every": options.every,
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
        raise CommandError(f"--size takes the short edge and the long one, got {'x'.join(map(str, options.size))}")
    name, edges = ("--size", options.size) if options.short_edges is None else ("--short-edges", options.short_edges)
    if edges is None:
        return {}
    if min(edges) < 1:
        raise CommandError(f"{name} must be positive, got {min(edges)}")
    if name == "--size" and len(edges) == 2:
        return {"test_short_edges": edges[:1], "test_long_edge": edges[1]}
    return {"test_short_edges": edges, "test_long_edge": max(round(max(edges) * 1333 / 800), max(edges))}
