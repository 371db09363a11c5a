# SPDX-License-Identifier: Apache-2.0
"""Networks from files that hold all of them: runs, weights files and packaged weights; conversion to such files."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spatialflow.config import Config, given_fields, load_config
from spatialflow.config.rules import short_repr
from spatialflow.data.categories import CategoryError, categories_of, network_categories
from spatialflow.engine.checkpoint_reader import CheckpointError, Weights, read_weights
from spatialflow.engine.description import Description, read_description
from spatialflow.engine.weights import check_network, fill, not_finite, shorten, write_weights
from spatialflow.errors import did_you_mean
from spatialflow.models.build import build_model
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.packaged import RUN_FILES, WEIGHT_SUFFIXES, packaged_names
from spatialflow.packaged import packaged_weights as packaged_weights  # also exported by this module

logger = logging.getLogger("spatialflow.engine.checkpoints")  # the documented name

INPUT_FIELDS = ("image_mean", "image_std")
"""Fields of the section `data` that belong to the weights, as all of the section `model` do."""


def locate_weights(source: str | Path) -> Path:
    """Find the file of weights that `source` names.

    Args:
        source: a file; the folder of a training run, whose `model.safetensors` or else `checkpoint.pt` is taken; or the
            name of packaged weights ("demo"). A file or run of that name in the current folder is preferred.

    Raises:
        CheckpointError: there is no such file, run or name; similar ones are suggested.
    """
    path, text = Path(source), str(source)
    packaged = packaged_weights(text)
    is_folder = os.path.isdir(path)
    files = [path / name for name in RUN_FILES] if is_folder else [path]
    found = next((file for file in files if os.path.exists(file) and not os.path.isdir(file)), None)
    if found is not None:
        if packaged is not None:
            logger.info("%s: takes %s, not the packaged weights of that name", text, found)
        return found
    if packaged is not None:
        return packaged
    if is_folder:
        raise CheckpointError(f"{text}: holds neither {' nor '.join(RUN_FILES)}, the weights of a training run")
    names = packaged_names()
    hint = did_you_mean(text, names + _neighbors(path), count=2)
    raise CheckpointError(
        f"{text:.200}: there is no such file, folder of a run or packaged weights ({', '.join(names)}){hint}"
    )


def _neighbors(path: Path) -> list[str]:
    """List the files of weights and the training runs in the folder in which `path` should be."""
    try:
        neighbors = [path.with_name(name) for name in os.listdir(path.parent)]
    except (OSError, ValueError):
        return []
    return [
        str(entry)
        for entry in neighbors
        if entry.suffix in WEIGHT_SUFFIXES or any(os.path.isfile(entry / name) for name in RUN_FILES)
    ]


class ModelFile(NamedTuple):
    """A file of weights that was read."""

    path: Path
    weights: Weights
    description: Description


def read_model_file(source: str | Path, ema: bool = False) -> ModelFile:
    """Read the weights that `source` names, see `locate_weights`, and the description of their network.

    Raises:
        CheckpointError: they cannot be found or read, or the description is damaged.
    """
    path = locate_weights(source)
    weights = read_weights(path, ema)
    try:
        return ModelFile(path, weights, read_description(weights.entries))
    except ValueError as error:
        raise CheckpointError(f"{path}: its description of the network cannot be used: {error}") from None


def load_model(
    source: str | Path, *, config: str | Path | Config | None = None, ema: bool = False, **overrides: Any
) -> SpatialFlow:
    """Load a trained network, in evaluation mode.

    Files of this package hold their configuration and categories, so that `source` is all that is needed.

    Args:
        source: the folder of a training run ("runs/mine"), a weights file, or packaged weights ("demo").
        config: configuration of a file that holds none, such as a released checkpoint. It must not contradict a file
            that holds one.
        ema: load the moving average (EMA) of the weights.
        overrides: fields of the section `test` or `data`, for instance `score_threshold=0.1`.

    Returns:
        SpatialFlow. `network.config` is the configuration, `network.categories` are the classes.

    Raises:
        CheckpointError: there is no such file, it is damaged, does not fit the configuration, has none and `config` is
            None, or contradicts `config` or `overrides`. The message names the field and both values.
        ConfigError: no such configuration or field, or a value that breaks a rule.
        CategoryError: the file has no categories, and those of `config` cannot be read or do not fit.
    """
    file = read_model_file(source, ema)
    network = build_network(file, config, overrides)
    if file.description.config is None:
        logger.info("%s: holds no configuration; %s writes a file that holds it", file.path, _conversion(file.path))
    return network


def pretrained_model(config: str = "demo") -> SpatialFlow:
    """Build the network of a configuration with its packaged weights, in evaluation mode.

    Args:
        config: name of a configuration of the package.

    Raises:
        CheckpointError: the package has no weights for it; the message names the configurations with weights.
    """
    path = packaged_weights(config)
    if path is None:
        names = ", ".join(packaged_names()) or "no configuration"
        raise CheckpointError(f"config: the package has weights for {names}, got '{config}'")
    return load_model(path)


def build_network(file: ModelFile, config: str | Path | Config | None, overrides: Mapping[str, Any]) -> SpatialFlow:
    """Build the network of a file that was read; arguments and errors as `load_model`."""
    path, (state, _), description = file
    check_network(state, path)
    base = description.config if config is None else config
    if base is None:
        raise CheckpointError(
            f"{path}: holds no configuration; give its name once, to write it into the file ({_conversion(path)}), or "
            f"with every use (--config NAME, in Python config=NAME)"
        )
    settings = load_config(base, **overrides)
    has_config = config is not None or "categories" in given_fields(overrides)
    check_agreement(description, settings, path, has_config)
    network = build_model(settings)
    fill(network, state, str(path))
    network.categories, network.trained_on = description.categories, description.trained_on
    network.categories = network_categories(network)
    return network.eval()


def _conversion(path: Path) -> str:
    return f"`spatialflow convert {path} NEW.safetensors --config NAME`"


def check_agreement(description: Description, config: Config, path: Path, has_config: bool) -> None:
    """Check that a configuration does not contradict a file.

    Args:
        description: of the file.
        config: the configuration to be used.
        path: the file, for messages.
        has_config: whether `config` names its own categories; False: it is that of the file.

    Raises:
        CheckpointError: a field of the network or the classes differ; the message has both values.
    """
    known = description.config
    if known is not None:
        fields = [("model", name) for name in vars(known.model)] + [("data", name) for name in INPUT_FIELDS]
        for section, name in fields:
            own, given = (getattr(getattr(source, section), name) for source in (known, config))
            if own != given:
                raise CheckpointError(
                    f"{name}: the weights of {path} have {short_repr(own)}, and {short_repr(given)} was given; "
                    f"leave out the configuration or field, as the file has its own"
                )
    if description.categories is None or not has_config:
        return
    is_own_table = known is not None and config.data.categories == known.data.categories
    try:
        given = categories_of(config)
    except CategoryError as error:
        if is_own_table:  # for example a JSON that was there in training alone
            return
        raise CheckpointError(
            f"categories: the weights of {path} have {description.categories}, and {config.data.categories!r} was "
            f"given: {error}"
        ) from None
    if not given.same_classes(description.categories):
        raise CheckpointError(
            f"categories: the weights of {path} have {description.categories}, and {config.data.categories!r} with "
            f"{given} was given; leave out the configuration or field, as the file has its own"
        )


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    config: str | Path | Config | None = None,
) -> int:
    """Convert a checkpoint, released or of this package, to a file of this package.

    Args:
        source: as for `load_model`.
        destination: path of the new file, .safetensors or .pt / .pth.
        dtype: floating point dtype of the stored tensors; BatchNorm's counters, which do not affect the outputs,
            are then omitted. None keeps all tensors as they are.
        ema: read the moving average of the weights.
        config: configuration of the network; it is written to the file with its categories, so that `load_model` needs
            only the file. None: those of the source, if it has them.

    Returns:
        Number of tensors written.

    Raises:
        CheckpointError: `source` cannot be read, or is not a network of this package or of the released code; it
            contradicts `config`; or a value is not finite or exceeds the range of `dtype`.
        ConfigError: no such configuration.
        CategoryError: the configuration's categories cannot be read or do not fit.
        ValueError: `destination` has another suffix.
        OSError: `destination` cannot be written.
    """
    file = read_model_file(source, ema)
    state, description = file.weights.state, file.description
    unknown = [
        name
        for name in state
        if name.split(".")[0] not in ("backbone", "fpn", "subnets", "box_head", "thing_head", "stuff_head")
    ]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} entries are not part of the model: {shorten(unknown)}",
            unexpected=unknown,
        )
    broken = not_finite(state)
    if broken:
        raise CheckpointError(f"{source}: holds values that are not finite: {shorten(broken)}")
    if config is not None:
        network = build_network(file, config, {})
        description = Description(network.config, network_categories(network), network.trained_on)
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items() if value.is_floating_point()}
        broken = not_finite(state)
        if broken:
            raise CheckpointError(f"{source}: holds values too large for {dtype}: {shorten(broken)}")
    write_weights(state, destination, description)
    return len(state)
