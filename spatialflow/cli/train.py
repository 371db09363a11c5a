# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow train`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import CommandError, add_path, check_count, printable, quoted, set_threads
from spatialflow.cli.networks import add_ema_option, add_model_option, check_ema, configs_paragraph

if TYPE_CHECKING:
    from spatialflow.engine.train import TrainingResult

SUMMARY = "train a network on your photographs; with torchrun on several GPUs or machines"
DESCRIPTION = (
    "Train on photographs with COCO panoptic annotations (--images, --annotations) or on Cityscapes (--cityscapes).\n"
    "The classes are those of the annotation file. Without CONFIG, the command chooses network, sizes and schedule,\n"
    "and prints them; FIELD=VALUE replaces any of them. The same command, given again, resumes an interrupted run.\n\n"
    + configs_paragraph()
)
EXAMPLES = (
    "synthesize scenes --count 20 --size 256x384",
    "train --images scenes/images --annotations scenes/panoptic.json --output run",
    "train demo epochs=5 --images scenes/images --annotations scenes/panoptic.json --output run",
    "train spatialflow_r50_cityscapes --cityscapes cityscapes --backbone r50.pth --device cuda --output run",
)

_DATA_OPTIONS = (
    ("images", "FOLDER", "photographs"),
    ("annotations", "JSON", "COCO panoptic JSON"),
    ("panoptic", "FOLDER", "PNGs of --annotations (default: the folder beside the JSON with the same name)"),
    ("validation_images", "FOLDER", "like --images, for evaluation"),
    ("validation_annotations", "JSON", "like --annotations, for evaluation"),
    ("validation_panoptic", "FOLDER", "like --panoptic, for evaluation"),
    ("cityscapes", "FOLDER", "tree with leftImg8bit and gtFine: train on its split train, evaluate on its split val"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add(
        "settings",
        nargs="*",
        metavar="CONFIG | FIELD=VALUE",
        help="configuration of the package, or YAML file (default: chosen); values of its fields, e.g. epochs=5",
    )
    files = "checkpoint.pt, model.safetensors, config.yaml, log.jsonl, curves.png, ..."
    add_path(parser, "--output", "FOLDER", f"folder for {files}", required=True)
    for name, metavar, text in _DATA_OPTIONS:
        add_path(parser, f"--{name.replace('_', '-')}", metavar, text)
    add(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="evaluate on this share of the images instead of training on them (default: 0.1 if there are at least 20 "
        "images, no CONFIG and no other images to evaluate on; else 0)",
    )
    add_model_option(parser, "network to begin with, whose classes may differ")
    add_ema_option(parser)
    add_path(parser, "--backbone", "FILE", "ImageNet weights with torchvision's names")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--workers", type=int, default=2, metavar="N", help="data loading processes (default: %(default)s)")
    add("--strict", action="store_true", help="stop at an invalid image or annotation instead of skipping it")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --output; an error if there is none")
    start.add_argument(
        "--restart", action="store_true", help="start from the beginning and replace what the output folder has"
    )


def run(options: argparse.Namespace) -> int:
    """Train, or resume a run; return the exit code."""
    config, overrides = _settings(options.settings)
    _check_options(options)
    from spatialflow.config import ConfigError
    from spatialflow.data.categories import CategoryError
    from spatialflow.data.cityscapes import CityscapesError
    from spatialflow.data.samples import SampleError
    from spatialflow.engine import distributed
    from spatialflow.engine.checkpoint_store import TrainingError
    from spatialflow.engine.checkpoints import CheckpointError
    from spatialflow.engine.train import train
    from spatialflow.panoptic import PanopticFormatError

    data = _data_options(options)
    world = distributed.join(options.device)
    try:
        result = train(
            **data,
            output=options.output,
            config=config,
            model=options.model,
            backbone=options.backbone,
            ema=options.ema,
            device=options.device,
            workers=options.workers,
            strict=options.strict,
            resume=True if options.resume else False if options.restart else None,
            **overrides,
        )
    except (TrainingError, CheckpointError, SampleError) as error:
        raise CommandError(str(error)) from None
    except (PanopticFormatError, ConfigError, CategoryError, CityscapesError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(
            f"{error.filename or options.output}: cannot be written: {error.strerror or error}"
        ) from None
    finally:
        distributed.leave()
    if world.is_first:
        print(f"{result}\n{_next_steps(result)}")
    distributed.end(world)
    return 0


def _settings(words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Separate the configuration from the values of fields."""
    from spatialflow.config import ConfigError, load_config, parse_settings

    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise CommandError(f"give at most one CONFIG, and settings as FIELD=VALUE, got {', '.join(configs)}")
    try:
        overrides = parse_settings(word for word in words if "=" in word)
        load_config(configs[0] if configs else "demo", **overrides)  # errors in them come before those of the data
    except ConfigError as error:
        raise CommandError(str(error)) from None
    return (configs[0] if configs else None), overrides


def _check_options(options: argparse.Namespace) -> None:
    """Raise CommandError for options that exclude each other or do not fit this machine; set the CPU threads."""
    import torch

    check_count("--workers", options.workers, minimum=0)
    if options.model is not None and options.backbone is not None:
        raise CommandError(
            "--model and --backbone exclude each other: a whole network's weights include the backbone's"
        )
    check_ema(options.ema, options.model is not None)
    if options.device not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got '{options.device}'")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    set_threads(options.threads)


def _data_options(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the options of the data; raise CommandError for those that exclude or require each other."""
    from spatialflow.engine.checkpoint_store import TrainingError
    from spatialflow.engine.train import TrainingData

    names = [*(name for name, _, _ in _DATA_OPTIONS), "validation_share"]
    values = {name: getattr(options, name) for name in names}
    try:
        TrainingData(**values)
    except TrainingError as error:
        pattern = rf"\b(validation_share|{'|'.join(sorted(names, reverse=True))})\b(?! set)"
        raise CommandError(re.sub(pattern, lambda m: f"--{m[0].replace('_', '-')}", str(error))) from None
    return values


def _next_steps(result: TrainingResult) -> str:
    """Name the files of a run and the next command."""
    return (
        f"log and other files: {printable(str(result.folder))}\n"
        f"next: spatialflow predict PHOTOGRAPHS --model {quoted(result.folder)} --output predicted"
    )
