# SPDX-License-Identifier: Apache-2.0
"""Reading of weights from files of this package, of mmdetection and of common trainers, under this package's names."""

import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("spatialflow.engine.checkpoints")  # the documented name

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
"""Prefix of a released name (regular expression) -> prefix in this package. Names in the backbone are equal;
`name_from_released` converts those of the stuff head's blocks."""


CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights", "params")
"""Keys under which trainers store the weights."""

EMA_CONTAINERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema")
"""Keys under which trainers store the exponential moving average (EMA) of the weights."""

SWAP_NOTE = (
    "note that mmdetection and mmengine swap average and weights at the end of an epoch, before they save: the "
    "average is then under the plain names"
)

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, DistributedDataParallel, FSDP and activation checkpointing add."""

EMA_NAMES = ("ema_model", "ema")
"""Attributes under which trainers store the average: the first part of every name, if present."""

OUTER_NAMES = ("model", "network", "net", *EMA_NAMES)
"""Attributes under which trainers store the network or its average."""

COUNTERS = ("n_averaged", "steps")
"""Counters that averaging wrappers (torch's and mmengine's `AveragedModel`) store beside the network, `self.module`."""


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


class Weights(NamedTuple):
    """Content of a file of weights."""

    state: dict[str, Tensor]  # under the names of this package, on the CPU
    entries: dict[str, str]  # the texts beside the tensors, such as the configuration of this package's files


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
    """Return whether the names are those of the released implementation (`neck.`, `bbox_head.`, `mask_head.`)."""
    return any(name.startswith(("neck.", "bbox_head.", "mask_head.")) for name in state)


def read_state(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file, under the names of this package; see `read_weights`.

    Returns:
        name -> tensor, on the CPU.

    Raises:
        CheckpointError: as `read_weights`.
    """
    return read_weights(path, ema).state


def read_weights(path: str | Path, ema: bool = False) -> Weights:
    """Read a safetensors or torch file of weights.

    The format is recognized by content. What trainers and wrappers add is removed: keys that hold the weights
    (`CONTAINERS`, `EMA_CONTAINERS`), parts of names (`WRAPPERS`, `OUTER_NAMES`), averages `ema_*` beside the weights.
    The logger `spatialflow.engine.checkpoints` reports what was removed.

    Args:
        path: a safetensors file, or a torch file with a state dict, either at the top level or under such keys.
        ema: read the moving average of the weights. False reads an average only where the file has no other
            weights.

    Returns:
        Weights.

    Raises:
        CheckpointError: the file is absent or damaged; it holds objects other than tensors and plain values; or it
            holds no weights, several sets of weights, or no average although `ema` is set.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        content, entries = _read_safetensors(path)  # first, as the length of its header may begin like a torch file
    elif head[:2] == b"PK" or head[:1] == b"\x80":
        content = read_torch(path)
        entries = _texts(content)
    elif head[8:9] == b"{":
        raise CheckpointError(f"{path}: is damaged: it ends within the header")
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
    if notes and not entries:  # a file of this package needs no note
        logger.info("%s: %s", path, "; ".join(notes))
    if is_released(state):
        state = {name_from_released(name): value for name, value in state.items()}
    return Weights(state, entries)


def _texts(content: Any) -> dict[str, str]:
    """Return the entries that this package writes beside the weights, `spatialflow.*`."""
    items = content.items() if isinstance(content, dict) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and name.startswith("spatialflow.") and isinstance(value, str)
    }


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) for name in content)
        and all(isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta for v in content.values())
    )


def _may_hold_weights(value: Any) -> bool:
    """Return whether a value is a dict that contains a tensor or a key of trainers, unlike a configuration."""
    return isinstance(value, dict) and any(
        isinstance(inner, Tensor) or name in CONTAINERS or name in EMA_CONTAINERS for name, inner in value.items()
    )


def _are_equal(first: Any, second: Any) -> bool:
    """Return whether two values are the same object, or state dicts with equal tensors."""
    if first is second:
        return True
    return (
        _is_state(first)
        and _is_state(second)
        and first.keys() == second.keys()
        and all(torch.equal(value, second[name]) for name, value in first.items())
    )


def _without_containers(path: Path, content: Any, ema: bool, notes: list[str]) -> tuple[Any, bool]:
    """Unwrap up to 8 nested keys under which trainers store weights; also return whether the weights are an average."""
    is_average = False
    for _ in range(8):  # a limit, as a pickled dict can contain itself
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
            notes.append(SWAP_NOTE)
        content = content[keys[0]]
    return content, is_average


def _without_wrappers(path: Path, state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], bool]:
    """Remove the parts of names and the counters of wrappers; also return whether the tensors are an average."""
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
    """Return whether all other names are in `module` beside the counter, as in an averaging wrapper."""
    module = counter[: counter.rfind(".") + 1] + "module."
    return all(name.startswith(module) for name in names if name != counter)


def _select_average(state: dict[str, Tensor], ema: bool, notes: list[str]) -> tuple[dict[str, Tensor], bool]:
    """Select the weights, or if `ema` the averages that mmdetection's EMAHook stores beside them.

    Also return whether the file has such averages.
    """
    average_of = {name: f"ema_{name.replace('.', '_')}" for name in state}
    beside = [average for average in average_of.values() if average in state]
    if not beside:
        return state, False
    notes.append(f"{'took' if ema else 'left out'} {len(beside)} averages beside the weights (ema_*)")
    if ema:
        notes.append(SWAP_NOTE)
    weights = {name: value for name, value in state.items() if name not in set(beside)}
    if ema:
        weights = {name: state.get(average_of[name], value) for name, value in weights.items()}
    return weights, True


class _Placeholder:
    """Placeholder for a numpy value in a torch file, so that numpy need not construct it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_NUMPY_PLACEHOLDERS: list[Any] = [  # Any, as torch's annotation allows only functions in such pairs
    (_Placeholder, f"numpy.{core}.multiarray.{name}")
    for core in ("core", "_core")
    for name in ("scalar", "_reconstruct")
] + [(_Placeholder, "numpy.dtype"), (_Placeholder, "numpy.ndarray")]


def read_torch(path: Path) -> Any:
    """Read a torch file of tensors and plain values; raise CheckpointError for any other content.

    numpy scalars and arrays become empty placeholders. No code in the file is run.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_PLACEHOLDERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))  # the type's name in torch's long message
        reason = f"holds Python objects beside tensors: {match[1]}" if match else "is damaged"
        raise CheckpointError(f"{path}: {reason}") from None
    except Exception as error:  # unpickling damaged bytes may raise any exception
        raise CheckpointError(f"{path}: is damaged: {_first_line(error)}") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, _texts(file.metadata())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
