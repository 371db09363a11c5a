# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from spatialflow.cli.common import check_count, complain, package_configs, to_path, with_examples
from spatialflow.errors import CommandError


def add_train(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    train = commands.add_parser(
        "train",
        help="train a network; with torchrun on several GPUs or machines",
        description="Trains on COCO panoptic data (--images, --annotations) or Cityscapes (--cityscapes). The same "
        "command, given again,\ngoes on from an interrupted run's last checkpoint. docs/training.md tells "
        "of data, configurations and resuming.\n\n" + package_configs(),
        **with_examples(
            "synthesize scenes --count 20 --size 256 384",
            "train demo epochs=5 --images scenes/images --annotations scenes/panoptic.json --output run",
            "train spatialflow_r50_cityscapes --cityscapes cityscapes --backbone r50.pth --device cuda --output run",
        ),
    )
    train.set_defaults(run=run_train)
    train.add_argument("config", metavar="CONFIG", help="configuration of the package or YAML file")
    train.add_argument(
        "settings", nargs="*", metavar="FIELD=VALUE", help="other values for the configuration, e.g. epochs=5"
    )
    train.add_argument(
        "--output",
        required=True,
        type=to_path,
        metavar="FOLDER",
        help="receives checkpoint.pt, model.safetensors, log.jsonl, curves.png, ...",
    )
    train.add_argument("--images", type=to_path, metavar="FOLDER", help="photographs")
    train.add_argument("--annotations", type=to_path, metavar="JSON", help="COCO panoptic JSON")
    train.add_argument(
        "--panoptic", type=to_path, metavar="FOLDER", help="its PNGs (default: beside the JSON, named like it)"
    )
    train.add_argument("--validation-images", type=to_path, metavar="FOLDER", help="as --images, to evaluate on")
    train.add_argument("--validation-annotations", type=to_path, metavar="JSON", help="as --annotations")
    train.add_argument("--validation-panoptic", type=to_path, metavar="FOLDER", help="as --panoptic")
    train.add_argument(
        "--cityscapes",
        type=to_path,
        metavar="FOLDER",
        help="tree with leftImg8bit and gtFine: train on its split train, evaluate on val where there is one",
    )
    train.add_argument(
        "--checkpoint",
        type=to_path,
        metavar="FILE",
        help="finetune these weights; layers that depend "
        "on the classes start from random weights where they do not fit",
    )
    train.add_argument("--ema", action="store_true", help="use the moving average (EMA) of --checkpoint's weights")
    train.add_argument("--backbone", type=to_path, metavar="FILE", help="ImageNet weights with torchvision's names")
    train.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    train.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    train.add_argument("--workers", type=int, default=2, metavar="N", help="reading processes (default: %(default)s)")
    train.add_argument(
        "--strict", action="store_true", help="stop at a broken image or annotation instead of skipping it"
    )
    train.add_argument("--restart", action="store_true", help="start over, over what the folder holds")


def run_train(options: argparse.Namespace) -> int:
    """Carries the command out; returns the exit code."""
    import sys

    import torch

    from spatialflow.data.samples import SampleError
    from spatialflow.engine import distributed
    from spatialflow.engine.checkpoints import CheckpointError
    from spatialflow.engine.train import Source, Trainer, TrainingError, idle_settings
    from spatialflow.panoptic import PanopticFormatError

    check_count("--workers", options.workers, least=0)
    check_count("--threads", options.threads)
    if options.checkpoint is not None and options.backbone is not None:
        raise CommandError(
            "--checkpoint and --backbone exclude each other: a whole network's weights include the backbone's"
        )
    if options.ema and options.checkpoint is None:
        raise CommandError("--ema needs --checkpoint")
    if options.device not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got '{options.device}'")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = _config(options)
    data, validation = _data(options, config)
    world = distributed.join(options.device)
    try:
        trainer = Trainer(
            config,
            data,
            options.output,
            world,
            validation=validation,
            source=Source(options.checkpoint, options.backbone, options.ema),
            workers=options.workers,
            strict=options.strict,
            progress=sys.stderr.isatty(),
            resume=not options.restart,
        )
        if world.is_first:
            print(
                f"{len(data)} images, {trainer.schedule.steps_per_epoch} steps per epoch, step {trainer.step} of "
                f"{trainer.total_steps}: {options.output}",
                flush=True,
            )
            _warn_of_random_statistics(options, config.model)
            for text in [*idle_settings(config.training, trainer.total_steps), *_without_pycocotools(validation)]:
                complain(text)
            if trainer.changed_settings:
                complain(f"{options.output}: goes on with other settings: {', '.join(trainer.changed_settings)}")
            if trainer.random_layers and trainer.step == 0:
                layers = ", ".join(trainer.random_layers)
                complain(f"{options.checkpoint}: of other classes; {layers} start from random weights")
        try:
            trainer.run()
        except KeyboardInterrupt as stop:
            if os.path.isfile(trainer.checkpoint_path):
                stop.args = (f"the same command goes on from {trainer.checkpoint_path}",)
            raise
    except (TrainingError, CheckpointError, SampleError, PanopticFormatError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(
            f"{error.filename or options.output}: cannot be written: {error.strerror or error}"
        ) from None
    finally:
        distributed.leave()
    if world.is_first:
        print(_summary(trainer))
    distributed.end(world)
    return 0


def _warn_of_random_statistics(options: argparse.Namespace, model: Any) -> None:
    fixed = model.backbone_frozen_stages >= 0 or not model.backbone_norm_trains
    if fixed and options.checkpoint is None and options.backbone is None:
        complain(
            "no --backbone or --checkpoint: frozen stages and BatchNorm's statistics keep their random initial "
            "values; from scratch, set backbone_norm_trains=true backbone_frozen_stages=-1"
        )


def _without_pycocotools(validation: Any) -> list[str]:
    from spatialflow.panoptic.detection import has_pycocotools

    if validation is None or has_pycocotools():
        return []
    return ["the package pycocotools is missing, so that evaluations have no average precision"]


def _config(options: argparse.Namespace) -> Any:
    from spatialflow.config import ConfigError, load_config, parse_settings

    try:
        return load_config(options.config, **parse_settings(options.settings))
    except ConfigError as error:
        raise CommandError(str(error)) from None


def _data(options: argparse.Namespace, config: Any) -> tuple[Any, Any]:
    """Training data, and validation data or None."""
    from spatialflow.data.categories import CategoryError, load_categories
    from spatialflow.data.cityscapes import Cityscapes, CityscapesError
    from spatialflow.panoptic import PanopticFormatError

    for first, second in (("images", "annotations"), ("validation_images", "validation_annotations")):
        if (getattr(options, first) is None) != (getattr(options, second) is None):
            raise CommandError(f"--{first} and --{second} need each other".replace("_", "-"))
    if (options.cityscapes is None) == (options.images is None):
        raise CommandError("the data: give either --images and --annotations, or --cityscapes")
    if options.cityscapes is not None and options.validation_images is not None:
        raise CommandError("--cityscapes brings its own validation images; --validation-images cannot be added")
    for folder, images in (("panoptic", "images"), ("validation_panoptic", "validation_images")):
        if getattr(options, folder) is not None and getattr(options, images) is None:
            raise CommandError(f"--{folder} needs --{images}".replace("_", "-"))
    model = config.model
    try:
        categories = load_categories(config.data.categories, model.num_things, model.num_stuff, model.stuff_head)
        if options.cityscapes is not None:
            has_validation = os.path.isdir(options.cityscapes / "leftImg8bit" / "val")
            return (
                Cityscapes(options.cityscapes, "train", categories),
                Cityscapes(options.cityscapes, "val", categories) if has_validation else None,
            )
        data = _coco(options.annotations, options.images, options.panoptic, categories, False)
        if options.validation_images is None:
            return data, None
        paths = (options.validation_annotations, options.validation_images, options.validation_panoptic)
        return data, _coco(*paths, categories, True)
    except (CategoryError, CityscapesError, PanopticFormatError) as error:
        raise CommandError(str(error)) from None


def _coco(annotations: Path, images: Path, panoptic: Path | None, categories: Any, scored: bool) -> Any:
    from spatialflow.data.coco import CocoPanoptic

    data = CocoPanoptic(annotations, images, panoptic, categories, scored)
    for folder in (data.image_folder, data.panoptic_folder):
        if not os.path.isdir(folder):
            raise CommandError(f"{folder}: no such folder")
    return data


def _summary(trainer: Any) -> str:
    rows = trainer.log.rows
    parts = [f"{trainer.step} steps: {trainer.folder / 'model.safetensors'}"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if evaluations:
        last = evaluations[-1]
        parts.append(
            f"PQ {100 * last['pq']:.2f} (things {100 * last['pq_things']:.2f}, stuff {100 * last['pq_stuff']:.2f})"
        )
        precision = ((kind, last.get(f"{kind}_ap", -1)) for kind in ("box", "mask"))
        parts += [f"{kind} AP {100 * value:.2f}" for kind, value in precision if value >= 0]  # -1: nothing annotated
    if trainer.problems:
        parts.append(f"{len(trainer.problems)} images or annotations could not be used")
    if trainer.notes:
        counts = ", ".join(f"{len(seen)} x {rule}" for rule, seen in trainer.notes.items())
        parts.append(f"annotations that contradict themselves: {counts} (`spatialflow validate` lists all)")
    return "; ".join(parts)
