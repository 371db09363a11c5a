# SPDX-License-Identifier: Apache-2.0
"""Weights of networks: loading into a network, of backbones and for fine-tuning; saving; conversion."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from spatialflow.engine.checkpoint_reader import CheckpointError as CheckpointError
from spatialflow.engine.checkpoint_reader import name_from_released as name_from_released
from spatialflow.engine.checkpoint_reader import read_state as read_state
from spatialflow.engine.description import Description, describe
from spatialflow.engine.model_files import convert as convert
from spatialflow.engine.model_files import load_model as load_model
from spatialflow.engine.model_files import locate_weights as locate_weights
from spatialflow.engine.model_files import packaged_weights as packaged_weights
from spatialflow.engine.model_files import pretrained_model as pretrained_model
from spatialflow.engine.weights import check_network, fill, write_weights
from spatialflow.engine.weights import largest_value as largest_value
from spatialflow.engine.weights import not_finite as not_finite
from spatialflow.engine.weights import shorten as shorten
from spatialflow.models.spatialflow import SpatialFlow

Module = TypeVar("Module", bound=nn.Module)


def _read_network(path: str | Path, ema: bool) -> dict[str, Tensor]:
    state = read_state(path, ema)
    check_network(state, path)
    return state


def load_checkpoint(model: Module, path: str | Path, ema: bool = False) -> Module:
    """Load the weights of a file into a model; nothing changes unless everything fits.

    Only the tensors of the file are used. `load_model` also takes its configuration and categories.

    Args:
        model: from `build_model`.
        path: a file of this package (safetensors or torch) or a released mmdetection checkpoint, recognized by content.
            Additions of trainers and wrappers are removed, see `read_state`.
        ema: read the moving average of the weights.

    Returns:
        `model`.

    Raises:
        CheckpointError: the file cannot be read, its weights are ambiguous or not finite, or keys are missing,
            unexpected or of the wrong shape. The message lists them.
    """
    fill(model, _read_network(path, ema), str(path))
    return model


def load_matching(model: nn.Module, path: str | Path, may_differ: Sequence[str], ema: bool = False) -> list[str]:
    """Load a checkpoint for fine-tuning.

    Layers of `may_differ` keep their values if the file lacks them or has them in another shape.

    Args:
        model: from `build_model`.
        path: a whole network's weights: a file, the folder of a run, or packaged weights.
        may_differ: names of layers that the file may lack or have in another shape.
        ema: read the moving average of the weights.

    Returns:
        The layers of `may_differ` that keep their values.

    Raises:
        CheckpointError: as `load_checkpoint`, for all other layers.
    """
    path = locate_weights(path)
    model_state = model.state_dict()
    state = {
        name: value
        for name, value in _read_network(path, ema).items()
        if not (name.startswith(tuple(may_differ)) and name in model_state and model_state[name].shape != value.shape)
    }
    fill(model, state, str(path), optional="^(" + "|".join(re.escape(name) for name in may_differ) + ")\\.")
    unfilled = [name for name in model_state if name not in state]
    return [layer for layer in may_differ if any(name.startswith(f"{layer}.") for name in unfilled)]


def load_backbone(model: nn.Module, path: str | Path) -> nn.Module:
    """Load ImageNet weights with torchvision's names into the backbone, without the classifier `fc`.

    Args:
        model: from `build_model`. Offsets of deformable convolutions, which such files lack, keep their values.
        path: a safetensors or torch file.

    Returns:
        `model`.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    state = {name: value for name, value in read_state(path).items() if not name.startswith("fc.")}
    if "backbone.layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{path}: holds a whole network; load it with load_checkpoint (train --model)")
    fill(cast("nn.Module", model.backbone), state, str(path), optional=r"\.conv_offset\.")
    return model


def save_checkpoint(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write weights to a temporary file and rename it, so that `path` never holds an incomplete file.

    The file of a SpatialFlow network also holds its configuration and its categories, so that `load_model` needs
    nothing else. They are JSON texts: metadata of a safetensors file, or entries beside `state_dict` of a torch file.

    Args:
        model: a module, or names with tensors.
        path: ends in .safetensors, or in .pt or .pth for a torch file.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written (disk full, no permission, ...).
        CheckpointError: a value is not finite; a file at `path` stays as it was.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return write_weights(state, path, describe(model) if isinstance(model, SpatialFlow) else Description())


def weights_digest(model: nn.Module) -> str:
    """Compute a hash of the weights, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
