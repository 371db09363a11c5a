# SPDX-License-Identifier: Apache-2.0
"""The networks that a command line names: configurations, weights, ensembles."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import CommandError, print_error

if TYPE_CHECKING:
    from spatialflow.models.spatialflow import SpatialFlow


def configs_paragraph() -> str:
    """List the configurations of the package, except those of the paper's ablations and of tests, as a paragraph."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
    listed = [name for name in names if not name.startswith("tiny")]
    return textwrap.fill(f"Configurations of the package: {', '.join(listed)}.", 116)


def add_ema_option(parser: argparse.ArgumentParser, file: str = "--checkpoint") -> None:
    """Add the option `--ema`, which applies to the checkpoint of the argument `file`."""
    parser.add_argument("--ema", action="store_true", help=f"use the moving average (EMA) of the weights in {file}")


def check_ema(ema: bool, has_checkpoint: bool) -> None:
    """Raise CommandError if `--ema` is given without a checkpoint."""
    if ema and not has_checkpoint:
        raise CommandError("--ema needs --checkpoint")


def load_model(config: str, checkpoint: Path | None, overrides: Mapping[str, Any], ema: bool = False) -> SpatialFlow:
    """Build the network of `--config` with the weights of `--checkpoint`.

    Without a checkpoint the network has the weights that come with the package, or random weights if there are none.
    """
    import torch

    from spatialflow.config import ConfigError
    from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint, packaged_weights
    from spatialflow.models.build import build_model

    torch.manual_seed(0)
    try:
        model = build_model(config, **overrides).eval()
        checkpoint = checkpoint or packaged_weights(config)
        if checkpoint is None:
            print_error("no --checkpoint: the weights are random, and so are the results")
            return model
        load_checkpoint(model, checkpoint, ema)
        return model
    except (ConfigError, CheckpointError) as error:
        raise CommandError(str(error)) from None


def load_models(
    configs: Sequence[str], checkpoints: Sequence[Path], overrides: Mapping[str, Any], ema: bool = False
) -> list[SpatialFlow]:
    """Build the networks of an ensemble; `configs` has one configuration for all checkpoints, or one for each."""
    check_ema(ema, bool(checkpoints))
    count = max(len(configs), len(checkpoints))
    config_per_model = list(configs) * count if len(configs) == 1 else configs
    files: Sequence[Path | None] = checkpoints or [None] * count
    if len(config_per_model) != len(files):
        raise CommandError(
            f"give one --config for all of the {len(files)} --checkpoint, or one for each, got {len(configs)}"
        )
    return [load_model(config, file, overrides, ema) for config, file in zip(config_per_model, files, strict=True)]
