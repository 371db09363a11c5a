# SPDX-License-Identifier: Apache-2.0
"""Weights of networks: loading of whole networks, of backbones and for fine-tuning; saving; conversion."""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from spatialflow.engine.checkpoint_reader import CheckpointError as CheckpointError
from spatialflow.engine.checkpoint_reader import name_from_released as name_from_released
from spatialflow.engine.checkpoint_reader import read_state as read_state
from spatialflow.files import atomic_write
from spatialflow.models.build import build_model
from spatialflow.models.spatialflow import SpatialFlow

Module = TypeVar("Module", bound=nn.Module)

WEIGHTS_FOLDER = Path(__file__).resolve().parents[1] / "weights"


def _read_network(path: str | Path, ema: bool) -> dict[str, Tensor]:
    state = read_state(path, ema)
    if "layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{path}: holds a backbone alone; load it with load_backbone (train --backbone)")
    return state


def load_checkpoint(model: Module, path: str | Path, ema: bool = False) -> Module:
    """Load the weights of a file into a model; nothing changes unless everything fits.

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
    _fill(model, _read_network(path, ema), str(path))
    return model


def load_matching(model: nn.Module, path: str | Path, may_differ: Sequence[str], ema: bool = False) -> list[str]:
    """Load a checkpoint for fine-tuning.

    Layers of `may_differ` keep their values if the file lacks them or has them in another shape.

    Args:
        model: from `build_model`.
        path: a whole network's weights.
        may_differ: names of layers that the file may lack or have in another shape.
        ema: read the moving average of the weights.

    Returns:
        The layers of `may_differ` that keep their values.

    Raises:
        CheckpointError: as `load_checkpoint`, for all other layers.
    """
    model_state = model.state_dict()
    state = {
        name: value
        for name, value in _read_network(path, ema).items()
        if not (name.startswith(tuple(may_differ)) and name in model_state and model_state[name].shape != value.shape)
    }
    _fill(model, state, str(path), optional="^(" + "|".join(re.escape(name) for name in may_differ) + ")\\.")
    unfilled = [name for name in model_state if name not in state]
    return [layer for layer in may_differ if any(name.startswith(f"{layer}.") for name in unfilled)]


def packaged_weights(config: str) -> Path | None:
    """Return the path of the packaged weights of a configuration; None if there are none."""
    path = WEIGHTS_FOLDER / f"{config}.safetensors"
    return path if os.path.isfile(path) else None


def pretrained_model(config: str = "demo") -> SpatialFlow:
    """Build the network of a configuration with its packaged weights, in evaluation mode.

    Args:
        config: name of a configuration of the package.

    Raises:
        CheckpointError: the package has no weights for it; the message names the configurations with weights.
    """
    path = packaged_weights(config)
    if path is None:
        names = ", ".join(sorted(file.stem for file in WEIGHTS_FOLDER.glob("*.safetensors"))) or "no configuration"
        raise CheckpointError(f"config: the package has weights for {names}, got '{config}'")
    return load_checkpoint(build_model(config), path).eval()


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
        raise CheckpointError(f"{path}: holds a whole network; load it with load_checkpoint (train --checkpoint)")
    _fill(cast("nn.Module", model.backbone), state, str(path), optional=r"\.conv_offset\.")
    return model


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str, optional: str | None = None) -> None:
    """Copy a state dict into a module if everything fits; names that match the pattern `optional` may be missing."""
    counter = "num_batches_tracked"  # BatchNorm's counter does not affect the outputs; some files lack it
    target = {name: value for name, value in module.state_dict().items() if not name.endswith(counter)}
    values = {name: value for name, value in state.items() if not name.endswith(counter)}
    missing = [name for name in target if name not in values and not (optional and re.search(optional, name))]
    unexpected = [name for name in values if name not in target]
    wrong_shape = [
        (name, tuple(values[name].shape), tuple(target[name].shape))
        for name in target
        if name in values and values[name].shape != target[name].shape
    ]
    if missing or unexpected or wrong_shape:
        shapes = [f"{name} {in_file} instead of {in_model}" for name, in_file, in_model in wrong_shape]
        lists = [
            (f"{len(names)} {kind}", names)
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", shapes))
            if names
        ]
        report = "; ".join(f"{title}: {shorten(names)}" for title, names in lists)
        raise CheckpointError(f"{source}: does not fit the model: {report}", missing, unexpected, wrong_shape)
    broken = not_finite({name: values[name] for name in target if name in values})
    if broken:
        raise CheckpointError(f"{source}: holds values that are not finite: {shorten(broken)}")
    with torch.no_grad():
        for name, tensor in target.items():
            if name in values:
                tensor.copy_(values[name])


def largest_value(tensors: Iterable[Tensor]) -> float:
    """Compute the largest magnitude in the floating point tensors, in one pass; NaN if a value is NaN."""
    filled = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    filled = [tensor.float() if tensor.element_size() == 1 else tensor for tensor in filled]  # float8 has no norm
    return float(nn.utils.get_total_norm(filled, math.inf))


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """List the names of the tensors with NaN or infinite values."""
    if math.isfinite(largest_value(state.values())):
        return []
    return [name for name, value in state.items() if not torch.isfinite(value).all()]


def shorten(names: Sequence[str], limit: int = 12) -> str:
    """Join the first `limit` names, each truncated to 120 characters, and add the number of the others."""
    cut = [name if len(name) <= 120 else f"{name[:120]}..." for name in names[:limit]]
    return ", ".join(cut) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def save_checkpoint(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write weights to a temporary file and rename it, so that `path` never holds an incomplete file.

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
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path: must end in .safetensors, .pt or .pth, got '{path}'")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    broken = not_finite(state)
    if broken:
        raise CheckpointError(f"{path}: not written, as values are not finite: {shorten(broken)}")
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(save(state, metadata={"format": "pt"}))
        else:
            torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # before the rename, so that the file survives a power failure
    return path


def convert(source: str | Path, destination: str | Path, dtype: torch.dtype | None = None, ema: bool = False) -> int:
    """Convert a checkpoint, released or of this package, to the names of this package.

    Args:
        source: as for `load_checkpoint`.
        destination: path of the new file, .safetensors or .pt / .pth.
        dtype: floating point dtype of the stored tensors; BatchNorm's counters, which do not affect the outputs,
            are then omitted. None keeps all tensors as they are.
        ema: read the moving average of the weights.

    Returns:
        Number of tensors written.

    Raises:
        CheckpointError: `source` cannot be read, or is not a network of this package or of the released code. Or a
            value is not finite or exceeds the range of `dtype`.
        ValueError: `destination` has another suffix.
        OSError: `destination` cannot be written.
    """
    state = read_state(source, ema)
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
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items() if value.is_floating_point()}
        broken = not_finite(state)
        if broken:
            raise CheckpointError(f"{source}: holds values too large for {dtype}: {shorten(broken)}")
    save_checkpoint(state, destination)
    return len(state)


def weights_digest(model: nn.Module) -> str:
    """Compute a hash of the weights, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
