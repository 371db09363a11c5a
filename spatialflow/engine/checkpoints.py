# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of weights: this package's files, released mmdetection checkpoints, ImageNet backbones."""

import hashlib
import logging
import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spatialflow.files import atomic_write
from spatialflow.models.build import build_model
from spatialflow.models.spatialflow import SpatialFlow

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

WEIGHTS_FOLDER = Path(__file__).resolve().parents[1] / "weights"

RELEASED_NAMES = (
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"fpn.lateral.\1."),
    (r"neck\.fpn_convs\.([012])\.conv\.", r"fpn.output.\1."),
    (r"neck\.fpn_convs\.3\.conv\.", r"fpn.p6."),
    (r"neck\.fpn_convs\.4\.conv\.", r"fpn.p7."),
    (r"bbox_head\.(cls|reg|stuff)_convs\.(\d+)\.conv\.", r"subnets.\1.\2."),
    (r"bbox_head\.mask_convs\.(\d+)\.conv\.", r"subnets.thing.\1."),
    (r"bbox_head\.(cls|reg|stuff)_spatial_flow_convs\.(\d+)\.conv\.", r"subnets.flow_\1.\2."),
    (r"bbox_head\.mask_spatial_flow_convs\.(\d+)\.conv\.", r"subnets.flow_thing.\1."),
    (r"bbox_head\.stuff_mask_flow_convs\.(\d+)\.conv\.", r"subnets.semantic_flow.\1."),
    (r"bbox_head\.retina_cls\.", r"box_head.class_logits."),
    (r"bbox_head\.retina_reg\.", r"box_head.box_deltas."),
    (r"mask_head\.convs\.(\d+)\.conv\.", r"thing_head.convs.\1."),
    (r"mask_head\.upsample\.", r"thing_head.upsample."),
    (r"mask_head\.conv_logits\.", r"thing_head.logits."),
    (r"stuff_head\.conv\.", r"stuff_head.logits."),
)
"""Prefix of a released name -> prefix here. The backbone keeps its names; `name_from_released` adds the stuff head."""


CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights", "params")
"""Keys under which trainers store the weights."""

EMA_CONTAINERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema")
"""Keys under which trainers store the exponential moving average (EMA) of the weights."""

SWAPPED = (
    "note that mmdetection and mmengine swap average and weights at the end of an epoch, before they save: the "
    "average is then under the plain names"
)

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names added by torch.compile, DistributedDataParallel, FSDP and activation checkpoints."""

EMA_NAMES = ("ema_model", "ema")
"""Attributes under which trainers store the average: the first part of every name, if present."""

OUTER_NAMES = ("model", "network", "net", *EMA_NAMES)
"""Attributes under which trainers store the network or its average."""

COUNTERS = ("n_averaged", "steps")
"""Counters that averaging wrappers (torch's and mmengine's `AveragedModel`) store beside the network, `module`."""


class CheckpointError(RuntimeError):
    """Weights that cannot be read, or do not fit the model.

    Attributes:
        missing: names of the model that are not in the file.
        unexpected: names of the file that are not in the model.
        wrong_shape: (name, shape in the file, shape in the model).
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong_shape: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.wrong_shape = list(missing), list(unexpected), list(wrong_shape)


def name_from_released(name: str) -> str:
    """Convert the name of a released state-dict entry; a name without a counterpart is returned unchanged."""
    block = re.fullmatch(r"stuff_head\.lateral_convs\.(\d+)\.(\d+)\.(conv|gn)\.(\w+)", name)
    if block:  # released blocks are at even positions, upsampling at odd ones
        level, position, part, leaf = block.groups()
        return f"stuff_head.blocks.{level}.{int(position) // 2}.{'norm' if part == 'gn' else 'conv'}.{leaf}"
    for pattern, replacement in RELEASED_NAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def is_released(state: Mapping[str, Tensor]) -> bool:
    """True for names of the released implementation (`neck`, `bbox_head`, ...), False for names of this package."""
    return any(name.startswith(("neck.", "bbox_head.", "mask_head.")) for name in state)


def read_state(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file, under the names of this package.

    The format is recognized by content. Additions of trainers and wrappers are removed: keys that hold the weights
    (`CONTAINERS`, `EMA_CONTAINERS`), parts of names (`WRAPPERS`, `OUTER_NAMES`), averages `ema_*` beside the weights.
    The logger `spatialflow.engine.checkpoints` reports them.

    Args:
        path: a safetensors file, or a torch file with a state dict, bare or under such keys.
        ema: read the moving average of the weights. False reads an average only where the file has no other
            weights.

    Returns:
        name -> tensor, on the CPU.

    Raises:
        CheckpointError: the file is absent or damaged; it holds objects other than tensors and plain values, no
            weights, several sets of weights, or no average where `ema` is set.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if head[:2] == b"PK" or head[:1] == b"\x80":
        content = read_torch(path)
    elif head[8:9] == b"{":
        content = _read_safetensors(path)
    else:
        raise CheckpointError(f"{path}: is neither a safetensors nor a torch file")
    notes: list[str] = []
    content, is_average = _without_containers(path, content, ema, notes)
    if not _is_state(content):
        raise CheckpointError(f"{path}: holds no state dict (names with tensors)")
    state, named_average = _without_wrappers(path, content, notes)
    is_average = is_average or named_average
    state, has_average = _select_average(state, ema and not is_average, notes)
    if not state:
        raise CheckpointError(f"{path}: holds no weights")
    if ema and not (is_average or has_average):
        raise CheckpointError(f"{path}: holds no moving average (EMA) of the weights")
    if notes:
        logger.info("%s: %s", path, "; ".join(notes))
    return {name_from_released(name): value for name, value in state.items()} if is_released(state) else state


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) for name in content)
        and all(isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta for v in content.values())
    )


def _may_hold_weights(value: Any) -> bool:
    """True for a dict with tensors or with a key of trainers; False for a configuration under such a key."""
    return isinstance(value, dict) and any(
        isinstance(inner, Tensor) or name in CONTAINERS or name in EMA_CONTAINERS for name, inner in value.items()
    )


def _are_equal(first: Any, second: Any) -> bool:
    """True for the same object twice, or for two state dicts with equal tensors."""
    if first is second:
        return True
    return (
        _is_state(first)
        and _is_state(second)
        and first.keys() == second.keys()
        and all(torch.equal(value, second[name]) for name, value in first.items())
    )


def _without_containers(path: Path, content: Any, ema: bool, notes: list[str]) -> tuple[Any, bool]:
    """The content of the keys of trainers, at any depth, and whether it is an average."""
    is_average = False
    for _ in range(8):  # a pickle can hold itself
        if not isinstance(content, dict):
            break
        plain = [key for key in CONTAINERS if _may_hold_weights(content.get(key))]
        averages = [key for key in EMA_CONTAINERS if _may_hold_weights(content.get(key))]
        if is_average:
            plain, averages = plain + averages, []
        keys = averages if averages and (ema or not plain) else plain
        if not keys:
            break
        if not all(_are_equal(content[keys[0]], content[key]) for key in keys[1:]):
            raise CheckpointError(
                f"{path}: holds several sets of weights: {', '.join(map(repr, keys))}; store the intended "
                f"one alone, with torch.save"
            )
        is_average = is_average or keys is averages
        notes.append(f"took the {'moving average' if is_average else 'weights'} under {keys[0]!r}")
        if averages and keys is not averages:
            notes.append(f"left out the moving average under {averages[0]!r}")
        if ema and keys[0] == "ema_state_dict":
            notes.append(SWAPPED)
        content = content[keys[0]]
    return content, is_average


def _without_wrappers(path: Path, state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], bool]:
    """The tensors without the parts of names and the counters of wrappers, and whether they are an average."""
    names = {name: name.split(".") for name in state}
    removed = []
    for part in WRAPPERS:
        if any(part in parts[:-1] for parts in names.values()):
            names = {
                name: [outer for outer in parts[:-1] if outer != part] + parts[-1:] for name, parts in names.items()
            }
            removed.append(part)
    counters = [name for name, parts in names.items() if parts[-1] in COUNTERS and set(parts[:-1]) <= {*OUTER_NAMES}]
    names = {name: parts for name, parts in names.items() if name not in counters}
    while names and len({parts[0] for parts in names.values()}) == 1:
        first = next(iter(names.values()))[0]
        if first not in OUTER_NAMES or any(len(parts) == 1 for parts in names.values()):
            break
        names = {name: parts[1:] for name, parts in names.items()}
        removed.append(first)
    if removed:
        notes.append(f"removed {', '.join(repr(part + '.') for part in removed)} from the names")
    if counters:
        notes.append(f"left out {', '.join(counters)}")
    result: dict[str, Tensor] = {}
    for name, parts in names.items():
        short = ".".join(parts)
        if short in result:
            raise CheckpointError(f"{path}: {short} occurs twice, under names of several wrappers")
        result[short] = state[name]
    is_average = any(part in EMA_NAMES for part in removed) or any(
        _is_averaging_counter(name, state) for name in counters
    )
    return result, is_average


def _is_averaging_counter(counter: str, names: Iterable[str]) -> bool:
    """True if all other names are in `module` beside the counter, as in an averaging wrapper."""
    module = counter[: counter.rfind(".") + 1] + "module."
    return all(name.startswith(module) for name in names if name != counter)


def _select_average(state: dict[str, Tensor], ema: bool, notes: list[str]) -> tuple[dict[str, Tensor], bool]:
    """The weights, or the averages that mmdetection's EMAHook stores beside them, and whether there are any."""
    average_of = {name: f"ema_{name.replace('.', '_')}" for name in state}
    beside = [average for average in average_of.values() if average in state]
    if not beside:
        return state, False
    notes.append(f"{'took' if ema else 'left out'} {len(beside)} averages beside the weights (ema_*)")
    if ema:
        notes.append(SWAPPED)
    weights = {name: value for name, value in state.items() if name not in set(beside)}
    if ema:
        weights = {name: state.get(average_of[name], value) for name, value in weights.items()}
    return weights, True


class _Ignored:
    """Placeholder for a numpy value in a torch file, so that numpy need not construct it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_IGNORED: list[Any] = [  # torch annotates pairs with functions alone
    (_Ignored, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")
] + [(_Ignored, "numpy.dtype"), (_Ignored, "numpy.ndarray")]


def read_torch(path: Path) -> Any:
    """Read a torch file of tensors and plain values; CheckpointError for any other content.

    numpy scalars and arrays become empty placeholders. No code in the file is run.
    """
    try:
        with torch.serialization.safe_globals(_IGNORED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))  # within torch's advice to trust the file
        reason = f"holds Python objects beside tensors: {match[1]}" if match else "is damaged"
        raise CheckpointError(f"{path}: {reason}") from None
    except Exception as error:  # unpickling damaged bytes may raise any exception
        raise CheckpointError(f"{path}: is damaged: {_first_line(error)}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
    """Load a checkpoint for finetuning: some layers keep their values where those of the file do not fit.

    Args:
        model: from `build_model`.
        path: a whole network's weights.
        may_differ: names of layers that may have another shape.
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
    _fill(model, state, str(path), may_miss="^(" + "|".join(re.escape(name) for name in may_differ) + ")\\.")
    unfilled = [name for name in model_state if name not in state]
    return [layer for layer in may_differ if any(name.startswith(f"{layer}.") for name in unfilled)]


def packaged_weights(config: str) -> Path | None:
    """Path of the packaged weights of a configuration; None where there are none."""
    path = WEIGHTS_FOLDER / f"{config}.safetensors"
    return path if os.path.isfile(path) else None


def pretrained_model(config: str = "demo") -> SpatialFlow:
    """The network of a configuration with its packaged weights, in evaluation mode.

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
    _fill(cast("nn.Module", model.backbone), state, str(path), may_miss=r"\.conv_offset\.")
    return model


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str, may_miss: str | None = None) -> None:
    """Copy a state dict into a module if everything fits; parameters that match `may_miss` need not be in it."""
    counter = "num_batches_tracked"  # BatchNorm's counter has no influence; some files lack it
    target = {name: value for name, value in module.state_dict().items() if not name.endswith(counter)}
    values = {name: value for name, value in state.items() if not name.endswith(counter)}
    missing = [name for name in target if name not in values and not (may_miss and re.search(may_miss, name))]
    unexpected = [name for name in values if name not in target]
    wrong_shape = [
        (name, tuple(values[name].shape), tuple(target[name].shape))
        for name in target
        if name in values and values[name].shape != target[name].shape
    ]
    if missing or unexpected or wrong_shape:
        shapes = [f"{name} {in_file} instead of {in_model}" for name, in_file, in_model in wrong_shape]
        lists = [
            (f"{len(names)} {what}", names)
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", shapes))
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
    """The largest magnitude in the floating point tensors, in one pass; NaN if a value is NaN."""
    filled = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    filled = [tensor.float() if tensor.element_size() == 1 else tensor for tensor in filled]  # float8 has no norm
    return float(nn.utils.get_total_norm(filled, math.inf))


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinite values."""
    if math.isfinite(largest_value(state.values())):
        return []
    return [name for name, value in state.items() if not torch.isfinite(value).all()]


def shorten(names: Sequence[str], limit: int = 12) -> str:
    """The first names, long ones truncated, and the number of the others."""
    cut = [name if len(name) <= 120 else f"{name[:120]}..." for name in names[:limit]]
    return ", ".join(cut) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def save_checkpoint(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> Path:
    """Write weights to a temporary file and rename it, so that an interrupted write leaves no file.

    Args:
        model: a module, or names with tensors.
        path: ends in .safetensors, or in .pt or .pth for a torch file.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written (no such folder, disk full, ...).
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
        dtype: floating point dtype of the stored tensors; BatchNorm's counters, which have no influence, are then left
            out. None changes nothing.
        ema: read the moving average of the weights.

    Returns:
        Number of tensors written.

    Raises:
        CheckpointError: `source` cannot be read, is not a detector, released or of this package, or holds values that
            are not finite or exceed the range of `dtype`.
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
    """A hash of the weights in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
