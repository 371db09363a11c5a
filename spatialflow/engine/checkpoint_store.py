# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a training run: the full state, for resumption with equal results (bit-identical on the CPU)."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatialflow.config import Config
from spatialflow.data.loader import DataSet
from spatialflow.engine.checkpoint_reader import CheckpointError, read_torch
from spatialflow.engine.checkpoints import not_finite, save_checkpoint, shorten
from spatialflow.engine.description import describe
from spatialflow.files import atomic_write
from spatialflow.models.spatialflow import SpatialFlow

RESUMABLE_FIELDS = ("epochs", "evaluate_every_epochs", "checkpoint_every_steps", "categories")
"""Fields of the configuration that may change between the start of a run and its resumption. Those of the section
`test` may change too, except `PROPOSAL_FIELDS`. `categories` is a path: its content is compared by itself."""

REMEDY_FIELDS = (
    "learning_rate",
    "learning_rate_epochs",
    "warmup_iterations",
    "warmup_factor",
    "gradient_clip_norm",
    "finetune_learning_rate",
)
"""Further fields that may change, as a change can help a run that diverged. Such changes are reported."""

PROPOSAL_FIELDS = ("candidates_per_level", "score_threshold", "max_detections")
"""Fields of the test section that also affect training, as they select its proposals."""


class TrainingError(RuntimeError):
    """A run that cannot start, continue or be resumed; the message has the reason."""


class CheckpointStore:
    """Saves and restores the state of a training run in its folder.

    Args:
        folder: folder of the run, which holds `checkpoint.pt` and `model.safetensors`.
        network: the network in training.
        optimizer: with one parameter group.
        scaler: the loss scaler.
        identity: identity of the run, from `run_identity`.

    Attributes:
        changed_settings: "field old -> new" for each of `REMEDY_FIELDS` that `restore` found changed.
        last_save_time: `time.monotonic()` at the end of the last `save`; -inf before the first one.
        saved_step: steps done in the checkpoint that `save` or `restore` used last; None without one.
    """

    def __init__(
        self,
        folder: Path,
        network: SpatialFlow,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: Mapping[str, Any],
    ) -> None:
        self.folder, self.identity = Path(folder), identity
        self.network, self.optimizer, self.scaler = network, optimizer, scaler
        self.changed_settings: list[str] = []
        self.last_save_time = -math.inf
        self.saved_step: int | None = None

    @property
    def path(self) -> Path:
        """The checkpoint file."""
        return self.folder / "checkpoint.pt"

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint file."""
        return os.path.isfile(self.path)

    def discard(self) -> None:
        """Delete the checkpoint file, if there is one."""
        self.path.unlink(missing_ok=True)

    def save(self, step: int) -> None:
        """Write the checkpoint under a temporary name, sync the file to disk, and rename it over the previous one.

        Args:
            step: steps done.

        Raises:
            OSError: the file cannot be written; the previous checkpoint stays.
        """
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": step,
            "random": torch.get_rng_state(),
            "identity": json.dumps(self.identity),
            **describe(self.network).entries(),
        }
        with atomic_write(self.path) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self.last_save_time, self.saved_step = time.monotonic(), step

    def save_weights(self) -> None:
        """Write the weights alone to `model.safetensors`."""
        save_checkpoint(self.network, self.folder / "model.safetensors")

    def has_new_weights(self) -> bool:
        """Return whether `model.safetensors` was written after the checkpoint."""
        weights = self.folder / "model.safetensors"
        return os.path.isfile(weights) and os.stat(weights).st_mtime_ns >= os.stat(self.path).st_mtime_ns

    def copy_before_divergence(self) -> Path | None:
        """Copy the checkpoint to `checkpoint_before_divergence.pt` and return that path; None without a checkpoint."""
        if not self.has_checkpoint():
            return None
        copy = self.path.with_name("checkpoint_before_divergence.pt")
        with open(self.path, "rb") as checkpoint, atomic_write(copy) as file:
            shutil.copyfileobj(checkpoint, file)
        return copy

    def restore(self) -> int:
        """Load the checkpoint into the network, the optimizer, the scaler and torch's random number generator.

        Returns:
            Steps done.

        Raises:
            TrainingError: the checkpoint was written by a run with other settings or images.
            CheckpointError: the file is damaged or incomplete, or holds values that are not finite.
        """
        content = read_torch(self.path)
        try:
            self.saved_step = self._load(content)
            return self.saved_step
        except (CheckpointError, TrainingError):
            raise
        except Exception:  # the content may have any form
            raise CheckpointError(f"{self.path}: is not a complete checkpoint of a training run") from None

    def _load(self, state: Any) -> int:
        """Load the content of a checkpoint file; content of another form may raise any exception."""
        self._check_identity(json.loads(state["identity"]))
        self.network.load_state_dict(state["model"])
        settings = self.optimizer.state_dict()["param_groups"]  # of the configuration, not of the file
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        for parameter, row in self.optimizer.state.items():
            if row["momentum_buffer"] is not None and row["momentum_buffer"].shape != parameter.shape:
                raise ValueError("momentum of another shape")
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError("no number of steps")
        broken = self.not_finite()
        if broken:
            raise CheckpointError(f"{self.path}: holds values that are not finite: {shorten(broken, 3)}; start over")
        return state["step"]

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        differences = _differences(identity["config"], self.identity["config"])
        remedy = "use another folder, or start over (--restart)"
        changed = [text for field, text in differences.items() if field not in REMEDY_FIELDS]
        self.changed_settings = [text for field, text in differences.items() if field in REMEDY_FIELDS]
        if changed:
            raise TrainingError(f"{self.path}: belongs to a run with other settings: {', '.join(changed)}; {remedy}")
        if identity["data"] != self.identity["data"]:
            raise TrainingError(f"{self.path}: belongs to a run on other images; {remedy}")
        if identity.get("classes", self.identity["classes"]) != self.identity["classes"]:  # older files have none
            raise TrainingError(f"{self.path}: belongs to a run with other classes; {remedy}")

    def not_finite(self) -> list[str]:
        """List the names of the weights, statistics and momenta that hold NaN or infinity."""
        return not_finite(self.network.state_dict() | self._momenta())

    def _momenta(self) -> dict[str, Tensor]:
        name_by_parameter = {parameter: name for name, parameter in self.network.named_parameters()}
        momenta = {
            f"momentum of {name_by_parameter[parameter]}": self.optimizer.state[parameter].get("momentum_buffer")
            for parameter in self.optimizer.param_groups[0]["params"]
            if parameter in self.optimizer.state
        }
        return {name: value for name, value in momenta.items() if value is not None}


def run_identity(config: Config, data: DataSet) -> dict[str, Any]:
    """Return the settings of a run and a hash of its images, for comparison with those in a checkpoint.

    Args:
        config: configuration of the run; its name is not part of the identity.
        data: training images; the hash covers their names, order and sizes.
    """
    sections = {section: vars(getattr(config, section)) for section in ("model", "test", "data", "training")}
    images = json.dumps([list(data.names), list(data.sizes)]).encode()
    return {
        "config": json.loads(json.dumps(sections)),
        "data": hashlib.sha256(images).hexdigest(),
        "classes": [[row.id, row.name, row.isthing] for row in data.categories.rows],
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Map each field that differs and influences training to "field old -> new"."""
    return {
        field: f"{field} {old[section].get(field)} -> {value}"
        for section in new
        for field, value in new[section].items()
        if field not in RESUMABLE_FIELDS
        and (section != "test" or field in PROPOSAL_FIELDS)
        and old[section].get(field) != value
    }
