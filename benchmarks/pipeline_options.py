# SPDX-License-Identifier: Apache-2.0
"""Options, images and weights of the benchmarks that run the whole pipeline on image files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness import image_paths
from untrained import untrained_model

from spatialflow import build_model, load_checkpoint
from spatialflow.data.synthetic import synthesize
from spatialflow.engine.checkpoints import packaged_weights
from spatialflow.models.spatialflow import SpatialFlow


def add_pipeline_options(parser: argparse.ArgumentParser, files: str) -> None:
    """Add the options of weights, images, device, dtype, threads and output; `files` are the names that are written."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights (default: those that come with the package, else untrained ones with about as many detections)",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures (default: synthetic scenes)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of spatialflow's network (default: float32)",
    )
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="let spatialflow replay CUDA graphs (default: on a GPU)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="FOLDER",
        help=f"folder of <device>/{files} (default: benchmarks/results)",
    )


def find_images(options: argparse.Namespace, folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Return the first `options.count` of `options.images`, or else of `count` synthetic scenes written to `folder`."""
    images = options.images
    if images is None:
        list(synthesize(folder / "scenes", count, size, seed=0))
        images = folder / "scenes" / "images"
    return image_paths(images, options.count)


def find_weights(options: argparse.Namespace) -> Path | None:
    return options.checkpoint or packaged_weights(options.config)


def load_model(options: argparse.Namespace, image: Path, overrides: dict[str, Any]) -> SpatialFlow:
    """Build the network of `options.config` with its weights; without weights, adjust it to `image`."""
    weights = find_weights(options)
    if weights is None:
        return untrained_model(options.config, image, overrides)
    return load_checkpoint(build_model(options.config, **overrides), weights)
