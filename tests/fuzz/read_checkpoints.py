# SPDX-License-Identifier: Apache-2.0
"""Readers of model files and of training checkpoints."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.scenes import scene_categories
from helpers.small_models import channels
from safetensors.torch import save

from fuzz.mutate import SPECIAL, mutate_bytes, mutate_tree
from fuzz.workspace import WrongResult, canary, input_folder, json_bytes, scenes
from spatialflow.config import load_config
from spatialflow.data.coco import CocoPanoptic
from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.trainer import Trainer, TrainingError
from spatialflow.models.build import build_model

SMALL = channels(4, 4) | dict(
    norm_groups=2,
    num_things=6,
    num_stuff=6,
    categories="synthetic",
    images_per_step=1,
)


@functools.cache
def _model() -> torch.nn.Module:
    """Return a part of a network with few tensors, so that each of them is edited often."""
    torch.manual_seed(0)
    network = build_model("tiny", **SMALL)
    return torch.nn.ModuleDict({"fpn": network.fpn, "stuff_head": network.stuff_head})


def _torch_bytes(content: Any, legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


class _CallOnLoad:
    """Object whose unpickling makes a call, here one that creates the file `canary()`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call

    def __deepcopy__(self, _: dict) -> _CallOnLoad:
        return self  # a copy by `__reduce__` would make the call


def _checkpoint(base: int) -> Any:
    """Return the content of a valid or hostile checkpoint, and whether it is saved in the legacy format."""
    state = dict(_model().state_dict())
    writes = f"open({str(canary())!r}, 'w')"
    hostile = {"w": torch.zeros(2), "x": _CallOnLoad(open, str(canary()), "w"), "y": _CallOnLoad(exec, writes)}
    return (
        (state, False),
        (state, True),
        ({"state_dict": state, "meta": {"epoch": 3, "lr": 0.1}}, False),
        ({"module." + name: value for name, value in state.items()}, False),
        (hostile, False),
        (hostile, True),
        ({"state_dict": state | hostile}, False),
        ({"model": {}}, False),
        ({name: value.half() for name, value in state.items()}, False),
        ([1, "a", {"b": None}], False),
    )[base]


TENSORS = (
    lambda: torch.zeros(0),
    lambda: torch.full((3,), float("nan")),
    lambda: torch.zeros(4, 4, dtype=torch.int64),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
    lambda: torch.zeros(3, 3).t(),
    lambda: torch.zeros(2, dtype=torch.complex64),
    lambda: torch.empty(2, 3, device="meta"),
    lambda: torch.zeros(()),
    lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    lambda: np.float64(3),
    lambda: b"abc",
)


def _with_edited_pickle(data: bytes, changes: list) -> bytes:
    """Edit the pickle within the archive of a torch file; edit a file without archive as bytes."""
    inner = [[("set", "flip", "drop", "repeat", "number")[value % 5], place, value] for _, place, value in changes]
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(data, inner)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, mutate_bytes(content, inner) if entry.filename.endswith(".pkl") else content)
    return stream.getvalue()


def _edited_torch_file(tree: Any, legacy: bool, changes: list) -> bytes:
    savable = SPECIAL[:-2]  # without the deeply nested values, which torch cannot save
    tree = mutate_tree(tree, changes, savable + TENSORS)
    data = _torch_bytes(tree, legacy)
    if any(kind == "inner" for kind, _, _ in changes):
        return _with_edited_pickle(data, changes)
    return mutate_bytes(data, changes)


def read_checkpoint(folder: Path, base: int, changes: list) -> int:
    path = folder / "weights.pth"
    path.write_bytes(_edited_torch_file(*_checkpoint(base), changes))
    return _load_all_or_nothing(path)


def _load_all_or_nothing(path: Path) -> int:
    """Load a file into a network; check that a refused file changes no value, and restore the network."""
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_checkpoint(model, path)
    except CheckpointError:
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                raise WrongResult(f"{name} changed though the file was refused") from None
        raise
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(before[name])
    return len(before)


def read_safetensors(folder: Path, base: int, changes: list) -> int:
    state = {name: value.contiguous() for name, value in _model().state_dict().items()}
    data = save(state if base == 0 else {name: value.half() for name, value in state.items()})
    length = int.from_bytes(data[:8], "little")
    header = mutate_tree(json.loads(data[8 : 8 + length]), changes)
    written = json_bytes(header)
    path = folder / "weights.safetensors"
    path.write_bytes(mutate_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :], changes))
    return _load_all_or_nothing(path)


@functools.cache
def _run_of_one_step() -> tuple[Any, Any]:
    """Return a trainer after one step, and the content of its checkpoint."""
    config = load_config("tiny", **SMALL, epochs=2)
    data = CocoPanoptic(scenes() / "panoptic.json", scenes() / "images", None, scene_categories())
    folder = input_folder() / "run"
    trainer = Trainer(config, data, folder, ProcessGroup(0, 1, torch.device("cpu")))
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.step = 1
    trainer.save_checkpoint()
    trainer.log.close()
    return trainer, torch.load(trainer.store.path, weights_only=True)


def read_training_checkpoint(folder: Path, base: int, changes: list) -> int:
    trainer, content = _run_of_one_step()
    trainer.store.folder = folder
    trainer.store.path.write_bytes(_edited_torch_file(content, base == 1, changes))
    try:
        # A resumed run reads the file by this call. A new trainer for each case would take ten times as long.
        trainer.step = trainer.store.restore()
    except TrainingError as error:
        raise CheckpointError(str(error)) from None
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    if type(trainer.step) is not int or trainer.step < 0:
        raise WrongResult(f"the run resumes from step {trainer.step!r} of {trainer.total_steps}")
    return 1
