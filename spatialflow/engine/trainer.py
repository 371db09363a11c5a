# SPDX-License-Identifier: Apache-2.0
"""Training: SGD with warm-up and steps, mixed precision, several processes, checkpoints from which a run goes on bit
by bit.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from spatialflow.config import Config, TrainingConfig
from spatialflow.data.loader import Batch, DataSet, Schedule, make_loader
from spatialflow.engine.checkpoints import (
    CheckpointError,
    largest_value,
    load_backbone,
    load_matching,
    not_finite,
    read_torch,
    save_checkpoint,
    shorten,
)
from spatialflow.engine.distributed import World, synchronize_norms
from spatialflow.engine.evaluate import evaluate_network
from spatialflow.engine.log import TrainingLog
from spatialflow.engine.predict import Predictor
from spatialflow.files import atomic_write
from spatialflow.models.build import build_model
from spatialflow.models.criterion import Losses
from spatialflow.models.optimized.training import optimize_for_training
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.training_step import TrainingStep
from spatialflow.panoptic.rules import Problem

CLASS_LAYERS = ("box_head.class_logits", "thing_head.logits", "stuff_head.logits")
"""Layers whose shape depends on the classes; finetuning starts with them."""

MAY_CHANGE = ("epochs", "evaluate_every_epochs", "checkpoint_every_steps")
"""Fields of the configuration in which a resumed run may differ from its beginning."""

REMEDY_FIELDS = (
    "learning_rate",
    "learning_rate_epochs",
    "warmup_iterations",
    "warmup_factor",
    "gradient_clip_norm",
    "finetune_learning_rate",
)
"""More such fields: what helps a run that diverged. The changes are reported."""

PROPOSAL_FIELDS = ("candidates_per_level", "score_threshold", "max_detections")
"""Fields of the test section that training depends on: they choose its proposals too."""

READ_EVERY = 10
"""Steps between readings of the losses from the device, and checks of weights and optimizer state."""

DIVERGED = 100.0
"""A run is reported above this many times the least loss of its first steps, or the largest initial weight."""

LEAST_SCALE = 2.0**-24
"""fp16: below this loss scale the gradients of some forty steps in a row have overflowed."""

KEEP_EVERY = 5.0
"""Least seconds between two savings at ends of epochs; epochs of a few steps would otherwise do little else."""

DRAW_EVERY = 60.0
"""Least seconds between two drawings of the curves; short epochs would otherwise do little else."""


REMEDIES = "a lower learning_rate, a longer warm-up (warmup_iterations) or gradient_clip_norm"


class TrainingError(RuntimeError):
    """A run that cannot start, go on or be resumed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the initial weights come from; at most one of the two."""

    checkpoint: Path | None = (
        None  # a whole network; layers whose shape depends on the classes may differ and start from random weights
    )
    backbone: Path | None = None  # ImageNet weights of the backbone
    ema: bool = False  # of `checkpoint`: the averaged weights


def learning_rate(step: int, steps_per_epoch: int, training: TrainingConfig) -> float:
    """Rate of a step (0-based): linear warm-up, a tenth after each of `learning_rate_epochs`, another in
    finetuning's first part.
    """
    epoch = step // steps_per_epoch
    base = training.finetune_learning_rate if epoch < training.finetune_class_layers_epochs else training.learning_rate
    rate = base * 0.1 ** sum(epoch >= limit for limit in training.learning_rate_epochs)
    if step < training.warmup_iterations:
        rate *= training.warmup_factor + (1 - training.warmup_factor) * step / training.warmup_iterations
    return rate


def idle_settings(training: TrainingConfig, total_steps: int) -> list[str]:
    """Sentences about settings of the schedule that a run of `total_steps` ends too early for."""
    found = []
    late = [limit for limit in training.learning_rate_epochs if limit >= training.epochs]
    if late:
        found.append(
            f"learning_rate_epochs {list(training.learning_rate_epochs)}: the run ends with epoch {training.epochs}, "
            f"so the learning rate does not fall after epoch {' and '.join(map(str, late))}"
        )
    if training.warmup_iterations >= total_steps:
        found.append(
            f"warmup_iterations {training.warmup_iterations}: the run ends after {total_steps} steps, before the "
            f"warm-up"
        )
    return found


class Trainer:
    """A training run in a folder.

    The folder gets `checkpoint.pt` (everything needed to go on; also loadable as weights), `model.safetensors` (the
    weights, after each epoch that takes more than a few seconds), `log.jsonl`, `curves.png`, `tensorboard/` and
    `evaluation/`.

    Args:
        config: what to train and how.
        data: training images.
        folder: of the run.
        world: this process among all.
        validation: images to evaluate on; None for no evaluation.
        source: initial weights.
        workers: reading processes.
        strict: stop at a broken image or annotation.
        progress: show a bar.
        resume: go on from the folder's checkpoint, if there is one.

    Raises:
        TrainingError: the processes cannot share the batch, the folder's checkpoint belongs to another run, or not all
            processes see it.
        CheckpointError: weights cannot be read or do not fit.
    """

    def __init__(
        self,
        config: Config,
        data: DataSet,
        folder: Path,
        world: World,
        *,
        validation: Any = None,
        source: Source = Source(),
        workers: int = 0,
        strict: bool = False,
        progress: bool = False,
        resume: bool = True,
    ):
        training = config.training
        if training.images_per_step % (world.size * training.accumulation_steps):
            raise TrainingError(
                f"images_per_step ({training.images_per_step}) must be a multiple of processes x accumulation_steps "
                f"({world.size} x {training.accumulation_steps})"
            )
        for name, images in (("data", data), ("validation data", validation)):
            if images is not None and len(images) == 0:
                raise TrainingError(f"the {name} set has no images")
        self.config, self.data, self.folder, self.world = config, data, Path(folder), world
        self.validation, self.workers, self.strict, self.progress = (
            validation,
            workers,
            strict,
            progress and world.is_first,
        )
        self.schedule = Schedule(data.sizes, training.images_per_step, training.seed)
        self.total_steps = training.epochs * self.schedule.steps_per_epoch
        self.step = 0  # steps done
        torch.manual_seed(training.seed)
        self.network = build_model(config)
        self.random_layers: list[str] = []  # layers that the initial weights do not fill, as they are of other classes
        if source.checkpoint is not None:
            self.random_layers = load_matching(self.network, source.checkpoint, CLASS_LAYERS, source.ema)
        elif source.backbone is not None:
            load_backbone(self.network, source.backbone)
        if world.size > 1 and config.model.backbone_norm_trains:
            synchronize_norms(self.network.backbone)
        self.network.to(world.device).train()
        self.largest_at_start = largest_value(self.network.parameters())
        self.trained = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        parameters = dict(self.network.named_parameters())
        self.optimizer = torch.optim.SGD(
            [parameters[name] for name in self.trained],
            training.learning_rate,
            training.momentum,
            weight_decay=training.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=training.mixed_precision == "fp16")
        self.changed_settings: list[str] = []  # `REMEDY_FIELDS` in which a resumed run differs from its beginning
        self.identity = {"config": _plain_config(config), "data": _fingerprint(data)}
        if resume and os.path.isfile(self.checkpoint_path):
            self._restore()
        steps = world.gather(self.step)
        if len(set(steps)) > 1:
            raise TrainingError(
                f"{self.checkpoint_path}: the processes resume at different steps {steps}; all need to see one folder"
            )
        self.log = TrainingLog(self.folder, self.step) if world.is_first else None
        self.warned = self.log is not None and any(row["kind"] == "warning" for row in self.log.rows)
        self.problems: set[str] = set()
        self.notes: dict[str, set[int]] = {}  # rule -> hashes of contradictions in annotations that were used
        self.met: list[str | Problem] = []  # problems and notes of this process that the first one has not heard of
        self.kept = self.drawn = -math.inf  # when the checkpoint was written, the curves drawn

    @property
    def checkpoint_path(self) -> Path:
        """The file a run goes on from."""
        return self.folder / "checkpoint.pt"

    def run(self) -> SpatialFlow:
        """Trains to the end.

        Returns:
            The trained network.

        Raises:
            TrainingError: a loss, a weight, a statistic of BatchNorm or the optimizer's state is not finite. Files keep
                the last finite state. All processes raise it after the same step.
            SampleError: a broken image in a strict run, or no image that can be used.
            OSError: a file cannot be written; the last complete checkpoint stays.
        """
        training, per_epoch = self.config.training, self.schedule.steps_per_epoch
        draws = self.schedule.draws(
            self.step, self.total_steps, self.world.rank, self.world.size, training.accumulation_steps
        )
        batches = make_loader(
            self.data, self.config.data, draws, self.workers, self.strict, self.world.device.type == "cuda"
        )
        bar = self._bar()
        unread: list[tuple[int, float, Tensor]] = []
        step_module, phase = None, None
        try:
            if self.step == 0 and self.world.is_first:
                self.checkpoint_path.unlink(missing_ok=True)  # of a run that this one replaces, and must not go on as
            if self.step and self.step % per_epoch == 0:  # the end of an epoch may be what was interrupted
                self._end_epoch(self.step // per_epoch, keep=True)
            while self.step < self.total_steps:
                if phase != self._class_layers_alone():
                    phase = self._class_layers_alone()
                    step_module = self._prepare_phase(phase)
                rate = learning_rate(self.step, per_epoch, training)
                losses = self._advance(step_module, batches, rate)
                self.step += 1
                unread.append((self.step, rate, losses))
                epoch_ends = self.step % per_epoch == 0
                due = self.step == self.total_steps or self.step % training.checkpoint_every_steps == 0
                if due or epoch_ends or len(unread) == READ_EVERY:
                    self._read(unread, bar)
                keep = due or (epoch_ends and time.monotonic() - self.kept > KEEP_EVERY)
                if keep:
                    self._keep()
                if epoch_ends:
                    self._end_epoch(self.step // per_epoch, keep)
        finally:
            if bar is not None:
                bar.close()
            if self.log is not None:
                self.log.close()
        return self.network

    def _class_layers_alone(self) -> bool:
        return self.step < self.config.training.finetune_class_layers_epochs * self.schedule.steps_per_epoch

    def _prepare_phase(self, class_layers_alone: bool) -> nn.Module:
        """Freezes or frees parameters and wraps the network for this process group."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in self.trained and (not class_layers_alone or name.startswith(CLASS_LAYERS)))
        on_cpu, mixed = self.world.device.type == "cpu", self.config.training.mixed_precision is not None
        network = self.network if on_cpu and mixed else optimize_for_training(self.network)
        module = TrainingStep(network, self.config, self.world.average if self.world.size > 1 else None)
        if self.world.size == 1:
            return module
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)

    def _advance(self, module: nn.Module, batches: Iterator[Batch], rate: float) -> Tensor:
        """One step of the optimizer; returns the losses (5,): total, cls, box, thing, stuff, still on the device."""
        training, parts = self.config.training, self.config.training.accumulation_steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        summed = torch.zeros(5, device=self.world.device)
        for part in range(parts):
            batch = next(batches)
            self.met += batch.problems + batch.notes
            batch = batch.to(self.world.device)
            last = part == parts - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else module.no_sync():
                with self._autocast():
                    losses = module(batch.images.contiguous(memory_format=torch.channels_last), batch.truth())
                    total = losses.total() / parts
                self.scaler.scale(total).backward()
            terms = [torch.zeros((), device=summed.device) if term is None else term.detach() for term in losses]
            summed += torch.stack([losses.total().detach(), *terms]) / parts
        if training.gradient_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), training.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return summed

    def _autocast(self):
        precision = self.config.training.mixed_precision
        if precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, torch.float16 if precision == "fp16" else torch.bfloat16)

    def _read(self, unread: list[tuple[int, float, Tensor]], bar: Any) -> None:
        """Fetches the losses and problems of the last steps, logs them and stops where a loss or what a checkpoint
        would hold is not finite.
        """
        for problems in self.world.gather(self.met):
            self._report(problems)
        self.met = []
        told = self.world.gather(tuple(not_finite(self._floats())))
        broken = list(dict.fromkeys(name for names in told for name in names))
        values_after = f"not finite after step {self.step}: {shorten(broken, 3)}" if broken else ""
        values = self.world.average(torch.stack([losses for _, _, losses in unread])).tolist()
        present = (True, True, True, self.network.thing_head is not None, self.network.stuff_head is not None)
        for (step, rate, _), row in zip(unread, values):
            named = {name: value for name, value, there in zip(("total", *Losses._fields), row, present) if there}
            if not all(math.isfinite(value) for value in row):
                found = ", ".join(f"{name} {value:g}" for name, value in named.items())
                raise self._diverged(step, "; ".join(filter(None, (f"the loss is not finite ({found})", values_after))))
            if self.log is not None:
                self.log.add("step", step, learning_rate=rate, **named)
        if broken:
            raise self._diverged(self.step, values_after)
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            scale = self.scaler.get_scale()
            raise self._diverged(self.step, f"gradients overflow float16 at a loss scale of {scale:g}")
        self._watch([row[0] for row in values])
        if bar is not None:
            bar.update(unread[-1][0] - bar.n)
            bar.set_postfix(loss=f"{values[-1][0]:.4f}", refresh=False)
        unread.clear()

    def _floats(self) -> dict[str, Tensor]:
        """What a checkpoint holds of weights, statistics and optimizer state, by name."""
        momenta = {
            f"momentum of {name}": self.optimizer.state[parameter].get("momentum_buffer")
            for name, parameter in zip(self.trained, self.optimizer.param_groups[0]["params"])
            if parameter in self.optimizer.state
        }
        return self.network.state_dict() | {name: value for name, value in momenta.items() if value is not None}

    def _diverged(self, step: int, what: str) -> TrainingError:
        path = self.checkpoint_path
        goes_on = f"; {path} is of an earlier step, and the same command with such settings goes on from it"
        return TrainingError(f"step {step}: {what}; {REMEDIES} may help{goes_on if os.path.isfile(path) else ''}")

    def _watch(self, losses: list[float]) -> None:
        """Reports, once in a run, that it diverges: a loss or a weight has grown by orders of magnitude. A checkpoint
        from before is kept under another name, as all numbers are finite and the run goes on.
        """
        if self.log is None or self.warned:
            return
        totals = (row["total"] for row in self.log.rows if row["kind"] == "step")
        grown = {
            "the loss": (max(losses), min(itertools.islice(totals, READ_EVERY))),
            "the largest weight": (largest_value(self.network.parameters()), self.largest_at_start),
        }
        for name, (value, usual) in grown.items():
            if value > DIVERGED * usual > 0:
                message = f"the run diverges: {name} is {value:g}, at the beginning {usual:g}; {REMEDIES} may help"
                if os.path.isfile(self.checkpoint_path):
                    kept = self.checkpoint_path.with_name("checkpoint_before_divergence.pt")
                    with open(self.checkpoint_path, "rb") as good, atomic_write(kept) as file:
                        shutil.copyfileobj(good, file)
                    message += f"; {kept} is from before, to go on from in place of {self.checkpoint_path.name}"
                tqdm.write(f"warning: step {self.step}: {message}", file=sys.stderr)
                self.log.add("warning", self.step, message=message)
                self.warned = True
                return

    def _report(self, problems: list[str | Problem]) -> None:
        """Names each broken file once and the first annotation that breaks a rule, in the first process, and keeps
        count.
        """
        for problem in problems if self.log is not None else ():
            if isinstance(problem, Problem):
                self._note(problem)
            elif problem not in self.problems:
                self.problems.add(problem)
                tqdm.write(f"skipped: {problem} ({len(self.problems)} so far)")  # above the progress bar
                self.log.add("problem", self.step, message=problem)

    def _note(self, problem: Problem) -> None:
        seen = self.notes.setdefault(problem.rule, set())
        if not seen:
            tqdm.write(f"{problem.text}; training uses the PNG, and only counts further breaches of {problem.rule}")
            self.log.add("note", self.step, rule=problem.rule, message=problem.text)
        seen.add(hash(problem.text))  # every epoch meets it again; keeping the texts would take much memory

    def _end_epoch(self, epoch: int, keep: bool) -> None:
        """Where they are due: weights, an evaluation, picture. Weights come first, as an evaluation may fail."""
        if self.log is not None and keep:
            save_checkpoint(self.network, self.folder / "model.safetensors")
        every = self.config.training.evaluate_every_epochs
        last = self.step == self.total_steps
        due = self.validation is not None and (last or (every > 0 and epoch % every == 0))
        if due and not self._is_evaluated():
            self.network.eval()
            short, long = self.config.test.test_edges[0]
            one_view = {"test_short_edges": (short,), "test_long_edge": round(long), "test_flip": False}
            # Augmentation would take several times as long, and graphs memory beside that of training.
            predictor = Predictor(self.network, cuda_graph=False, **one_view)
            scores = evaluate_network(predictor, self.validation, self.folder / "evaluation", self.world, self.progress)
            self.network.train()
            self._report(scores["problems"])
            if self.log is not None:
                detection = {f"{kind}_ap": row["ap"] for kind, row in (scores["detection"] or {}).items()}
                self.log.add(
                    "evaluation",
                    self.step,
                    epoch=epoch,
                    pq=scores["All"]["pq"],
                    pq_things=scores["Things"]["pq"],
                    pq_stuff=scores["Stuff"]["pq"],
                    **detection,
                    unreadable=len(scores["problems"]),
                )
        if self.log is not None:
            self.log.flush()
            if last or time.monotonic() - self.drawn > DRAW_EVERY:
                self.log.draw()
                self.drawn = time.monotonic()

    def _is_evaluated(self) -> bool:
        """True, in every process, if the log has an evaluation of the present step."""
        rows = () if self.log is None else self.log.rows
        return any(self.world.gather(any(row["kind"] == "evaluation" and row["step"] == self.step for row in rows)))

    def _keep(self) -> None:
        """Writes the checkpoint: under a temporary name, to the disk, then renamed over the old one."""
        if self.log is None:
            return
        self.log.flush()
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "random": torch.get_rng_state(),
            "identity": json.dumps(self.identity),
        }
        with atomic_write(self.checkpoint_path) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self.kept = time.monotonic()

    def _restore(self) -> None:
        path = self.checkpoint_path
        content = read_torch(path)
        try:
            self._take(content, path)
        except (CheckpointError, TrainingError):
            raise
        except Exception:  # content of any form
            raise CheckpointError(f"{path}: is no complete checkpoint of a training run") from None

    def _take(self, state: Any, path: Path) -> None:
        """Goes on from the content of a checkpoint; any exception if it is something else."""
        identity = json.loads(state["identity"])
        differences = _differences(identity["config"], self.identity["config"])
        changed = [text for field, text in differences.items() if field not in REMEDY_FIELDS]
        self.changed_settings = [text for field, text in differences.items() if field in REMEDY_FIELDS]
        if changed:
            raise TrainingError(
                f"{path}: belongs to a run with other settings: {', '.join(changed)}; use another folder, or start over"
            )
        if identity["data"] != self.identity["data"]:
            raise TrainingError(f"{path}: belongs to a run on other images; use another folder, or start over")
        self.network.load_state_dict(state["model"])
        own = self.optimizer.state_dict()["param_groups"]  # the settings of this run
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        for parameter, kept in self.optimizer.state.items():
            if kept["momentum_buffer"] is not None and kept["momentum_buffer"].shape != parameter.shape:
                raise ValueError("momentum of another shape")
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError("no number of steps")
        self.step = state["step"]
        broken = not_finite(self._floats())
        if broken:
            raise CheckpointError(f"{path}: holds values that are not finite: {shorten(broken, 3)}; start over")

    def _bar(self):
        if not self.progress:
            return None
        return tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step")


def _plain_config(config: Config) -> dict[str, Any]:
    """The configuration as JSON holds it, without its name."""
    sections = {section: vars(getattr(config, section)) for section in ("model", "test", "data", "training")}
    return json.loads(json.dumps(sections))


def _fingerprint(data: DataSet) -> str:
    """Depends on names, order and sizes of the images."""
    return hashlib.sha256(json.dumps([list(data.names), list(data.sizes)]).encode()).hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Fields that decide the course of training and differ, with "field old -> new"."""
    return {
        field: f"{field} {old[section].get(field)} -> {value}"
        for section in new
        for field, value in new[section].items()
        if field not in MAY_CHANGE
        and (section != "test" or field in PROPOSAL_FIELDS)
        and old[section].get(field) != value
    }
