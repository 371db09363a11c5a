# SPDX-License-Identifier: Apache-2.0
"""Reading and writing weights: this package's files, released mmdetection checkpoints, ImageNet backbones."""

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from spatialflow.files import atomic_write
from spatialflow.models.build import build_model
from spatialflow.models.spatialflow import SpatialFlow

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
"""Released name -> name here, by prefix; the backbone's names stay. `name_from_released` adds the stuff head."""


class CheckpointError(RuntimeError):
    """Weights that cannot be read, or do not fit the model.

    Attributes:
        missing: names the model has and the file has not.
        unexpected: names the file has and the model has not.
        wrong_shape: (name, shape in the file, shape in the model).
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong_shape: Sequence[tuple[str, tuple, tuple]] = (),
    ):
        super().__init__(message)
        self.missing, self.unexpected, self.wrong_shape = list(missing), list(unexpected), list(wrong_shape)


def name_from_released(name: str) -> str:
    """The name here of a released state-dict entry; a name without a counterpart is returned unchanged."""
    block = re.fullmatch(r"stuff_head\.lateral_convs\.(\d+)\.(\d+)\.(conv|gn)\.(\w+)", name)
    if block:  # released blocks sit at the even positions, the upsampling at the odd ones
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


def read_state(path: Union[str, Path]) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file (told apart by content), under the names of this package.

    Args:
        path: a safetensors file, or a torch file with a state dict, bare or under the key "state_dict" or "model".

    Returns:
        name -> tensor, on the CPU.

    Raises:
        CheckpointError: the file is absent, damaged, holds anything but tensors and plain values, or no weights.
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
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (names with tensors)")
    state = {(name[len("module.") :] if name.startswith("module.") else name): value for name, value in content.items()}
    return {name_from_released(name): value for name, value in state.items()} if is_released(state) else state


def read_torch(path: Path) -> Any:
    """Content of a torch file that holds nothing but tensors and plain values; CheckpointError otherwise."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        stranger = re.search(r"GLOBAL (\S+)", str(error))  # in the middle of torch's advice to trust the file
        what = f"holds Python objects beside tensors: {stranger[1]}" if stranger else "is damaged"
        raise CheckpointError(f"{path}: {what}") from None
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(f"{path}: is damaged: {_first_line(error)}") from None


def _read_safetensors(path: Path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _read_network(path: Union[str, Path]) -> dict[str, Tensor]:
    state = read_state(path)
    if "layer1.0.conv1.weight" in state:
        raise CheckpointError(f"{path}: holds a backbone alone; load_backbone (train --backbone) takes it")
    return state


def load_checkpoint(model: nn.Module, path: Union[str, Path]) -> nn.Module:
    """Fills a model with the weights of a file; nothing is changed unless everything fits.

    Args:
        model: from `build_model`.
        path: a file of this package (safetensors or torch) or a released mmdetection checkpoint, told apart by content.

    Returns:
        `model`.

    Raises:
        CheckpointError: the file cannot be read, or keys are missing, unexpected or of the wrong shape; all are listed.
    """
    _fill(model, _read_network(path), str(path))
    return model


def load_matching(model: nn.Module, path: Union[str, Path], may_differ: Sequence[str]) -> list[str]:
    """As `load_checkpoint`, for finetuning: layers whose shape depends on the classes keep their values where the
    file's do not fit.

    Args:
        model: from `build_model`.
        path: a whole network's weights.
        may_differ: names of layers that may have another shape.

    Returns:
        Those of `may_differ` that keep their values.

    Raises:
        CheckpointError: as `load_checkpoint`, for all other layers.
    """
    own = model.state_dict()
    state = {
        name: value
        for name, value in _read_network(path).items()
        if not (name.startswith(tuple(may_differ)) and name in own and own[name].shape != value.shape)
    }
    _fill(model, state, str(path), may_miss="^(" + "|".join(re.escape(name) for name in may_differ) + ")\\.")
    left = [name for name in own if name not in state]
    return [layer for layer in may_differ if any(name.startswith(f"{layer}.") for name in left)]


def packaged_weights(config: str) -> Optional[Path]:
    """The weights that come with the package for one of its configurations; None where there are none."""
    path = WEIGHTS_FOLDER / f"{config}.safetensors"
    return path if path.is_file() else None


def pretrained_model(config: str = "demo") -> SpatialFlow:
    """The network of a configuration with the weights that come with the package, in evaluation mode.

    Args:
        config: name of a configuration of the package.

    Raises:
        CheckpointError: the package has no weights for it; the message says for which it has.
    """
    path = packaged_weights(config)
    if path is None:
        names = ", ".join(sorted(file.stem for file in WEIGHTS_FOLDER.glob("*.safetensors"))) or "no configuration"
        raise CheckpointError(f"config: the package has weights for {names}, got '{config}'")
    return load_checkpoint(build_model(config), path).eval()


def load_backbone(model: nn.Module, path: Union[str, Path]) -> nn.Module:
    """Fills the backbone with ImageNet weights in torchvision's names; the classifier `fc` is left out.

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
        raise CheckpointError(f"{path}: holds a whole network; load_checkpoint (train --checkpoint) takes it")
    _fill(model.backbone, state, str(path), may_miss=r"\.conv_offset\.")
    return model


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str, may_miss: Optional[str] = None):
    counter = "num_batches_tracked"  # BatchNorm's counter has no influence; some files lack it
    own = {name: value for name, value in module.state_dict().items() if not name.endswith(counter)}
    given = {name: value for name, value in state.items() if not name.endswith(counter)}
    missing = [name for name in own if name not in given and not (may_miss and re.search(may_miss, name))]
    unexpected = [name for name in given if name not in own]
    wrong_shape = [
        (name, tuple(given[name].shape), tuple(own[name].shape))
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if missing or unexpected or wrong_shape:
        shapes = [f"{name} {in_file} instead of {in_model}" for name, in_file, in_model in wrong_shape]
        lists = [
            (f"{len(names)} {what}", names)
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", shapes))
            if names
        ]
        report = "; ".join(f"{title}: {_shorten(names)}" for title, names in lists)
        raise CheckpointError(f"{source}: does not fit the model: {report}", missing, unexpected, wrong_shape)
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])


def _shorten(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def save_checkpoint(model: Union[nn.Module, Mapping[str, Tensor]], path: Union[str, Path]) -> Path:
    """Writes weights under a temporary name and renames the finished file: an interrupted write leaves nothing behind.

    Args:
        model: a module, or names with tensors.
        path: ends in .safetensors, or in .pt or .pth for a torch file.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written (no such folder, disk full, ...).
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"path: must end in .safetensors, .pt or .pth, got '{path}'")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(save(state, metadata={"format": "pt"}))
        else:
            torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that was renamed into place survives a power cut
    return path


def convert(source: Union[str, Path], destination: Union[str, Path], dtype: Optional[torch.dtype] = None) -> int:
    """Rewrites a checkpoint (released or ours) with the names of this package.

    Args:
        source: as for `load_checkpoint`.
        destination: path of the new file, .safetensors or .pt / .pth.
        dtype: floating point type of the stored tensors, without BatchNorm's counters, which have no influence; None
            keeps everything as it is.

    Returns:
        Number of tensors written.

    Raises:
        CheckpointError: `source` cannot be read, or is no detector of the released kind or ours.
        OSError: `destination` cannot be written.
    """
    state = read_state(source)
    strangers = [
        name
        for name in state
        if name.split(".")[0] not in ("backbone", "fpn", "subnets", "box_head", "thing_head", "stuff_head")
    ]
    if strangers:
        raise CheckpointError(
            f"{source}: {len(strangers)} entries belong to no part of the model: {_shorten(strangers)}",
            unexpected=strangers,
        )
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items() if value.is_floating_point()}
    save_checkpoint(state, destination)
    return len(state)


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that differ, in all likelihood, for other weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
