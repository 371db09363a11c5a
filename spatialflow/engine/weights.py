# SPDX-License-Identifier: Apache-2.0
"""Tensors of weights: copying into a network, checks of their values, and writing to a file."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spatialflow.engine.checkpoint_reader import CheckpointError
from spatialflow.engine.description import Description
from spatialflow.files import atomic_write
from spatialflow.packaged import WEIGHT_SUFFIXES


def check_network(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError if the weights are those of a backbone alone."""
    if "layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{path}: holds a backbone alone; load it with load_backbone (train --backbone)")


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str, optional: str | None = None) -> None:
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


def write_weights(state: Mapping[str, Tensor], path: str | Path, description: Description) -> Path:
    """Write tensors and the description of their network, as `save_checkpoint`."""
    path = Path(path)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"path: must end in .safetensors, .pt or .pth, got '{path}'")
    broken = not_finite(state)
    if broken:
        raise CheckpointError(f"{path}: not written, as values are not finite: {shorten(broken)}")
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    entries = description.entries()
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.writelines(_with_ordered_metadata(save(state, metadata={"format": "pt", **entries})))
        else:
            torch.save({"state_dict": state, **entries} if entries else state, file)
        file.flush()
        os.fsync(file.fileno())  # before the rename, so that the file survives a power failure
    return path


def _with_ordered_metadata(content: bytes) -> tuple[bytes, memoryview]:
    """Put the metadata of a safetensors file in order, so that equal networks give equal files.

    The library writes them in random order.

    Returns:
        The header with its length, and the data.
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned to eight bytes
    return len(text).to_bytes(8, "little") + text, memoryview(content)[begin:]
