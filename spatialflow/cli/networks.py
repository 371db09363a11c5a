# SPDX-License-Identifier: Apache-2.0
"""The networks that a command line names: configurations, weights, ensembles."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialflow.cli.arguments import add_completed
from spatialflow.cli.common import CommandError, nonempty, print_error
from spatialflow.packaged import packaged_names, packaged_weights

if TYPE_CHECKING:
    from spatialflow.models.spatialflow import SpatialFlow


def configs_paragraph() -> str:
    """List the configurations of the package, except those of the paper's ablations and of tests, as a paragraph."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
    listed = [name for name in names if not name.startswith("tiny")]
    return textwrap.fill(f"Configurations of the package: {', '.join(listed)}.", 116)


def complete_configs(prefix: str, **_: Any) -> list[str]:
    """List the configurations of the package, and YAML files."""
    from argcomplete.completers import FilesCompleter

    from spatialflow.config import list_configs

    return [*list_configs(), *FilesCompleter(("yaml", "yml"))(prefix)]


def complete_models(prefix: str, **_: Any) -> list[str]:
    """List the weights of the package, and files and folders."""
    from argcomplete.completers import FilesCompleter

    return [*packaged_names(), *FilesCompleter()(prefix)]


def add_model_option(parser: argparse.ArgumentParser, use: str, **options: Any) -> None:
    """Add the option `--model`; `--checkpoint`, its name in earlier versions, is accepted too."""
    names = ", ".join(packaged_names())
    text = f"{use}: the folder of a training run, a weights file, or weights of the package ({names})"
    options |= {"type": nonempty, "metavar": "MODEL", "help": text}
    add_completed(parser, "--model", "--checkpoint", completer=complete_models, **options)


def add_config_option(parser: argparse.ArgumentParser, use: str, **options: Any) -> None:
    """Add the option `--config`."""
    text = f"{use}: configuration of the package, or YAML file; only for weights without one, such as released ones"
    add_completed(parser, "--config", completer=complete_configs, metavar="NAME", help=text, **options)


def add_ema_option(parser: argparse.ArgumentParser, file: str = "--model") -> None:
    """Add the option `--ema`, which applies to the weights of the argument `file`."""
    parser.add_argument("--ema", action="store_true", help=f"use the moving average (EMA) of the weights in {file}")


def check_ema(ema: bool, has_model: bool) -> None:
    """Raise CommandError if `--ema` is given without weights."""
    if ema and not has_model:
        raise CommandError("--ema needs --model")


def load_model(config: str | None, model: str | None, overrides: Mapping[str, Any], ema: bool = False) -> SpatialFlow:
    """Load the network of `--model`, with the configuration `--config` if its file has none.

    Without `--model` the network of `--config` has its packaged weights, or random weights if there are none.
    """
    from spatialflow.config import ConfigError
    from spatialflow.data.categories import CategoryError
    from spatialflow.engine import model_files
    from spatialflow.engine.checkpoints import CheckpointError

    try:
        if model is not None:
            return model_files.load_model(model, config=config, ema=ema, **overrides)
        if config is None:
            raise CommandError(
                f"which network? give --model: the folder of a training run, a weights file, or weights of the package "
                f"({', '.join(packaged_names())})"
            )
        packaged = packaged_weights(config)
        if packaged is not None:
            return model_files.load_model(packaged, **overrides)
        return _random_network(config, overrides)
    except (ConfigError, CheckpointError, CategoryError) as error:
        raise CommandError(str(error)) from None


def _random_network(config: str, overrides: Mapping[str, Any]) -> SpatialFlow:
    import torch

    from spatialflow.models.build import build_model

    torch.manual_seed(0)
    network = build_model(config, **overrides).eval()
    print_error("no --model: the weights are random, and so are the results")
    return network


def load_models(
    configs: Sequence[str], models: Sequence[str], overrides: Mapping[str, Any], ema: bool = False
) -> list[SpatialFlow]:
    """Load the networks of an ensemble; `configs` has no configuration, one for all models, or one for each."""
    check_ema(ema, bool(models))
    count = max(len(configs), len(models), 1)
    config_per_model: list[str | None] = list(configs) if len(configs) > 1 else [*configs, None][:1] * count
    sources: list[str | None] = [*models] or [None] * count
    if len(config_per_model) != len(sources):
        raise CommandError(
            f"give one --config for all of the {len(sources)} --model, or one for each, got {len(configs)}"
        )
    return [
        load_model(config, source, overrides, ema) for config, source in zip(config_per_model, sources, strict=True)
    ]


def note_drawn_scenes(networks: Iterable[SpatialFlow], images: Iterable[Path]) -> None:
    """Print a message if networks that know only drawn scenes are to predict images that `synthesize` did not draw.

    Args:
        networks: the networks.
        images: paths of images; none, as for a camera, are photographs.
    """
    known = next((network.trained_on for network in networks if network.trained_on is not None), None)
    if known is None:
        return
    from spatialflow.data.synthetic import is_drawn

    paths = list(images)
    folders = {path.parent for path in paths if os.path.exists(path)}  # others are reported when they are read
    if not paths or not all(is_drawn(folder.parent / "panoptic.json") for folder in folders):
        print_error(
            f"these weights know only {known}: their maps of photographs are meaningless. For photographs, train on "
            f"your own (`spatialflow train`) or give other weights with --model (docs/weights.md)"
        )
