# SPDX-License-Identifier: Apache-2.0
"""Training loop: SGD with warm-up and step decay, mixed precision, several processes, and exact resumption."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spatialflow.config import Config, TrainingConfig
from spatialflow.data.categories import Categories, categories_of
from spatialflow.data.loader import Batch, DataSet, Schedule, make_loader
from spatialflow.data.synthetic import DRAWN_SCENES, is_drawn
from spatialflow.engine.checkpoint_store import CheckpointStore, TrainingError, run_identity
from spatialflow.engine.checkpoints import largest_value, load_backbone, shorten
from spatialflow.engine.distributed import ProcessGroup, synchronize_norms
from spatialflow.engine.evaluate import ScoredData, evaluate_network
from spatialflow.engine.finetuning import CLASS_LAYERS, TakenWeights, load_for_finetuning
from spatialflow.engine.interrupts import delayed_interrupts
from spatialflow.engine.log import TrainingLog
from spatialflow.engine.predict import Predictor
from spatialflow.engine.progress import Progress
from spatialflow.engine.run_monitor import REMEDIES, DivergenceMonitor, ProblemReporter
from spatialflow.models.build import build_model
from spatialflow.models.criterion import Losses
from spatialflow.models.optimized.training import optimize_for_training
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.training_step import TrainingStep
from spatialflow.panoptic.rules import Problem

LOG_INTERVAL = 10
"""Maximum number of steps between downloads of the losses, each with a check of the weights and optimizer state."""

MIN_LOSS_SCALE = 2.0**-24
"""fp16: training stops below this loss scale. GradScaler starts at 2**16, and each overflow of gradients halves it."""

CHECKPOINT_INTERVAL_S = 5.0
"""Minimum seconds from the last checkpoint to one at the end of an epoch. Without a minimum, a run with short epochs
would spend most of its time on checkpoints."""

PLOT_INTERVAL_S = 60.0
"""Minimum seconds between plots of the curves. Without a minimum, a run with short epochs would spend most of its time
on plots."""


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Files of the initial weights; at most one of `checkpoint` and `backbone`.

    Attributes:
        checkpoint: a whole network. Layers whose shape depends on the classes may differ, and are then initialized
            at random.
        backbone: ImageNet weights of the backbone.
        ema: take the moving average of the weights of `checkpoint`.
        categories: of `checkpoint`. If they are known, classes of the same name keep their weights.
    """

    checkpoint: Path | None = None
    backbone: Path | None = None
    ema: bool = False
    categories: Categories | None = None


def learning_rate(step: int, steps_per_epoch: int, training: TrainingConfig) -> float:
    """Compute the learning rate of a step: linear warm-up, and division by 10 after each of `learning_rate_epochs`.

    Args:
        step: 0-based.
        steps_per_epoch: steps of an epoch.
        training: its `finetune_learning_rate` replaces `learning_rate` in the first phase of finetuning.
    """
    epoch = step // steps_per_epoch
    base = training.finetune_learning_rate if epoch < training.finetune_class_layers_epochs else training.learning_rate
    rate = base * 0.1 ** sum(epoch >= limit for limit in training.learning_rate_epochs)
    if step < training.warmup_iterations:
        rate *= training.warmup_factor + (1 - training.warmup_factor) * step / training.warmup_iterations
    return rate


class _PendingLosses(NamedTuple):
    """Losses of a step that are still on the device."""

    step: int  # steps done, this one included
    learning_rate: float
    losses: Tensor  # (5,) float32: total, cls, box, thing, stuff


class Trainer:
    """A training run in a folder.

    The folder contains `checkpoint.pt`, the full state of the run, from which weights can be loaded too. The weights
    alone, `model.safetensors`, are written with each checkpoint at the end of an epoch. Such a checkpoint is left out
    if the previous one is at most `CHECKPOINT_INTERVAL_S` old, but not after the last epoch. Further files are
    `log.jsonl`, `curves.png`, `tensorboard/` and `evaluation/`.

    Args:
        config: the network and the settings of training.
        data: training images.
        folder: folder of the run.
        process_group: rank and device of this process, and the number of processes.
        validation: images to evaluate on; None for no evaluation.
        initial_weights: files of the initial weights.
        workers: number of processes that load data.
        strict: stop at a broken image or annotation.
        progress: show a bar on a terminal, and print lines elsewhere.
        resume: continue from the folder's checkpoint. None: if there is one; True: it must exist; False: start over.

    Attributes:
        step: steps done.
        is_complete: whether `run` has nothing to do, and changes no file.
        taken_weights: the part of the initial weights that `initial_weights.checkpoint` has; None without that file.

    Raises:
        TrainingError: the processes cannot share the batch; a data set is empty; the folder's checkpoint was written
            by a run with other settings or images, or is missing although `resume` is True; or the processes would
            resume at different steps.
        CheckpointError: weights cannot be read or do not fit.
    """

    def __init__(
        self,
        config: Config,
        data: DataSet,
        folder: Path,
        process_group: ProcessGroup,
        *,
        validation: ScoredData | None = None,
        initial_weights: InitialWeights = InitialWeights(),
        workers: int = 0,
        strict: bool = False,
        progress: bool = False,
        resume: bool | None = None,
    ) -> None:
        training = config.training
        _check_sizes(training, process_group, data, validation)
        self.config, self.data, self.folder, self.process_group = config, data, Path(folder), process_group
        self.validation, self.workers, self.strict = validation, workers, strict
        self.progress = progress and process_group.is_first
        self.schedule = Schedule(data.sizes, training.images_per_step, training.seed)
        self.total_steps = training.epochs * self.schedule.steps_per_epoch
        torch.manual_seed(training.seed)
        self.network, self.taken_weights = _initial_network(config, initial_weights)
        self.network.categories = data.categories
        json_path = getattr(data, "json_path", None)  # of data in the COCO panoptic format
        if json_path is not None and is_drawn(json_path):
            self.network.trained_on = DRAWN_SCENES
        if process_group.size > 1 and config.model.backbone_norm_trains:
            synchronize_norms(self.network.backbone)
        self.network.to(process_group.device).train()
        initial_largest_weight = largest_value(self.network.parameters())
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self._trained = frozenset(trained)
        self.optimizer = torch.optim.SGD(
            list(trained.values()), training.learning_rate, training.momentum, weight_decay=training.weight_decay
        )
        self.scaler = torch.amp.GradScaler(process_group.device.type, enabled=training.mixed_precision == "fp16")
        self.store = CheckpointStore(self.folder, self.network, self.optimizer, self.scaler, run_identity(config, data))
        self.step = self.store.restore() if resume is not False and self.store.has_checkpoint() else 0
        if resume and not self.step:
            raise TrainingError(f"{self.store.path}: no such checkpoint, so there is no run to resume")
        steps = process_group.gather(self.step)
        if len(set(steps)) > 1:
            raise TrainingError(
                f"{self.store.path}: the processes resume at different steps {steps}; all must use the same folder"
            )
        self.log = TrainingLog(self.folder, self.step) if process_group.is_first else None
        self.reporter = ProblemReporter(self.log)
        self.monitor = DivergenceMonitor(self.log, self.store, self.network, initial_largest_weight, LOG_INTERVAL)
        self.unreported_problems: list[str | Problem] = []  # of this process, not yet reported to the first one
        self._last_plot_time = -math.inf
        self.is_complete = self._has_nothing_to_do()
        self._progress: Progress | None = None

    def run(self) -> SpatialFlow:
        """Train to the end; a complete run stays as it is.

        Returns:
            The trained network.

        Raises:
            TrainingError: a loss, a weight, a statistic of BatchNorm or the optimizer's state is not finite, or the
                loss scale is below `MIN_LOSS_SCALE`. The files keep the last finite state. All processes raise the
                error after the same step.
            SampleError: a broken image in a strict run, or no image that can be used.
            OSError: a file cannot be written; the last complete checkpoint stays.
        """
        if self.is_complete:
            return self.network
        if self.log is not None:
            self.log.open()
        self._progress = Progress(
            self.step,
            self.total_steps,
            self.schedule.steps_per_epoch,
            self.config.training.images_per_step,
            self.progress,
        )
        try:
            self._run(self._progress)
        finally:
            self._progress.close()
            if self.log is not None:
                self.log.close()
        return self.network

    def _run(self, progress: Progress) -> None:
        training, per_epoch = self.config.training, self.schedule.steps_per_epoch
        batches = self._batches()
        pending: list[_PendingLosses] = []
        module, phase, first_step = None, None, self.step
        if self.step == 0 and self.process_group.is_first:
            self.store.discard()  # the checkpoint of an earlier run in this folder, which no later call may resume
        if self.step and self.step % per_epoch == 0:  # the end of the epoch may have been interrupted
            self._end_epoch(self.step // per_epoch, save_weights=True)
        while self.step < self.total_steps:
            if module is None or phase != self._trains_class_layers_only():
                phase = self._trains_class_layers_only()
                module = self._prepare_phase(phase)
            rate = learning_rate(self.step, per_epoch, training)
            with self._saves_when_interrupted(pending, progress):
                losses = self._advance(module, batches, rate)
                self.step += 1
                if self.step == first_step + 1:
                    progress.begin(self.step)
                pending.append(_PendingLosses(self.step, rate, losses))
                epoch_ends = self.step % per_epoch == 0
                save_due = self.step == self.total_steps or self.step % training.checkpoint_every_steps == 0
                is_due = self.process_group.size == 1 and progress.is_due  # clocks of several processes differ
                if save_due or epoch_ends or len(pending) == LOG_INTERVAL or is_due:
                    self._log_losses(pending, progress)
                    pending.clear()
                elapsed = time.monotonic() - self.store.last_save_time
                save = save_due or (epoch_ends and elapsed > CHECKPOINT_INTERVAL_S)
                if save:
                    self.save_checkpoint()
            if epoch_ends:
                try:
                    self._end_epoch(self.step // per_epoch, save_weights=save)
                except KeyboardInterrupt:
                    if self.process_group.size == 1:
                        self._save_unsaved()
                    raise

    def _saves_when_interrupted(
        self, pending: Sequence[_PendingLosses], progress: Progress
    ) -> contextlib.AbstractContextManager[None]:
        """Delay interrupts during a step; not with several processes, which would receive them in different steps."""

        def save() -> None:
            if pending:
                self._log_losses(pending, progress)
            self._save_unsaved()

        if self.process_group.size > 1:
            return contextlib.nullcontext()
        text = "ends after this step; a second Ctrl-C ends at once, without the step"
        return delayed_interrupts(text, save)

    def _batches(self) -> Iterator[Batch]:
        """Load the batches of this process from the current step to the last one."""
        group = self.process_group
        requests = self.schedule.batches(
            self.step, self.total_steps, group.rank, group.size, self.config.training.accumulation_steps
        )
        on_gpu = group.device.type == "cuda"
        return make_loader(self.data, self.config.data, requests, self.workers, self.strict, on_gpu)

    def _trains_class_layers_only(self) -> bool:
        return self.step < self.config.training.finetune_class_layers_epochs * self.schedule.steps_per_epoch

    def _prepare_phase(self, class_layers_only: bool) -> nn.Module:
        """Freeze or unfreeze parameters, and wrap the network for this process group."""
        for name, parameter in self.network.named_parameters():
            is_active = not class_layers_only or name.startswith(CLASS_LAYERS)
            parameter.requires_grad_(name in self._trained and is_active)
        group = self.process_group
        on_cpu, mixed = group.device.type == "cpu", self.config.training.mixed_precision is not None
        network = self.network if on_cpu and mixed else optimize_for_training(self.network)
        module = TrainingStep(network, self.config, group.average if group.size > 1 else None)
        if group.size == 1:
            return module
        return DistributedDataParallel(module, device_ids=[group.device] if group.device.type == "cuda" else None)

    def _advance(self, module: nn.Module, batches: Iterator[Batch], rate: float) -> Tensor:
        """Run one step of the optimizer.

        Returns:
            (5,) losses on the device: total, cls, box, thing, stuff; 0 for an absent task.
        """
        training, parts = self.config.training, self.config.training.accumulation_steps
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        summed = torch.zeros(5, device=self.process_group.device)
        for part in range(parts):
            batch = next(batches)
            self.unreported_problems += [*batch.problems, *batch.notes]
            batch = batch.to(self.process_group.device)
            reduces_gradients = part == parts - 1
            with (
                contextlib.nullcontext()
                if reduces_gradients or self.process_group.size == 1
                else cast("DistributedDataParallel", module).no_sync()
            ):
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

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self.config.training.mixed_precision
        if precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.process_group.device.type, torch.float16 if precision == "fp16" else torch.bfloat16)

    def _log_losses(self, pending: Sequence[_PendingLosses], progress: Progress) -> None:
        """Download and log the losses and problems of the last steps.

        Raises:
            TrainingError: a loss or a value of the checkpoint is not finite, or the gradients overflow float16.
        """
        for problems in self.process_group.gather(self.unreported_problems):
            self.reporter.report(problems, self.step)
        self.unreported_problems = []
        names_by_process = self.process_group.gather(tuple(self.store.not_finite()))
        broken = list(dict.fromkeys(name for names in names_by_process for name in names))
        broken_values = f"not finite after step {self.step}: {shorten(broken, 3)}" if broken else ""
        values = self.process_group.average(torch.stack([row.losses for row in pending])).tolist()
        for (step, rate, _), row in zip(pending, values, strict=True):
            losses = self._loss_by_name(row)
            if not all(math.isfinite(value) for value in row):
                listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
                reasons = (f"the loss is not finite ({listed})", broken_values)
                raise self._divergence_error(step, "; ".join(filter(None, reasons)))
            if self.log is not None:
                self.log.add("step", step, learning_rate=rate, **losses)
        if broken:
            raise self._divergence_error(self.step, broken_values)
        if self.scaler.is_enabled() and self.scaler.get_scale() < MIN_LOSS_SCALE:
            scale = self.scaler.get_scale()
            raise self._divergence_error(self.step, f"gradients overflow float16 at a loss scale of {scale:g}")
        self.monitor.check([row[0] for row in values], self.step)
        if self.log is not None:
            self.log.flush()  # for `tail -f`
        progress.show(self.step, values[-1][0], pending[-1].learning_rate)

    def _loss_by_name(self, row: Sequence[float]) -> dict[str, float]:
        """Map names to the total loss and the terms of a step; tasks without a head are left out."""
        has_term = (True, True, True, self.network.thing_head is not None, self.network.stuff_head is not None)
        names = ("total", *Losses._fields)
        return {name: value for name, value, present in zip(names, row, has_term, strict=True) if present}

    def _divergence_error(self, step: int, reason: str) -> TrainingError:
        path = self.store.path
        resumption = f"; {path} is from an earlier step: the same command with changed settings resumes from it"
        return TrainingError(
            f"step {step}: {reason}; {REMEDIES} may help{resumption if self.store.has_checkpoint() else ''}"
        )

    def _save_unsaved(self) -> None:
        if self.store.saved_step != self.step:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write the checkpoint, in the first process."""
        if self.log is not None:
            self.log.flush()
            self.store.save(self.step)

    def _end_epoch(self, epoch: int, save_weights: bool) -> None:
        """Save the weights, evaluate and plot the curves, each if due.

        The weights are saved first, as the evaluation may fail.

        Args:
            epoch: epochs done.
            save_weights: whether weights are due.
        """
        if self.log is not None and save_weights:
            self.store.save_weights()
        interval = self.config.training.evaluate_every_epochs
        is_last = self.step == self.total_steps
        is_due = is_last or (interval > 0 and (epoch % interval == 0 or epoch == 1))  # early, to show what is broken
        if self.validation is not None and is_due and not self._is_evaluated():
            self._evaluate(self.validation, epoch)
        if self.log is not None:
            self.log.flush()
            if is_last or time.monotonic() - self._last_plot_time > PLOT_INTERVAL_S:
                self.log.plot()
                self._last_plot_time = time.monotonic()

    def _evaluate(self, data: ScoredData, epoch: int) -> None:
        """Evaluate the network on a data set, and log the scores."""
        self.network.eval()
        short, long = self.config.test.test_edges[0]
        single_view: dict[str, Any] = {"test_short_edges": (short,), "test_long_edge": round(long), "test_flip": False}
        # Test-time augmentation would multiply the time of an evaluation. CUDA graphs would need memory that training
        # holds.
        predictor = Predictor(self.network, cuda_graph=False, **single_view)
        folder = self.folder / "evaluation"
        start = time.monotonic()
        show_bar = self.progress and sys.stderr.isatty()
        scores = evaluate_network(predictor, data, folder, self.process_group, show_bar)
        self.network.train()
        self.reporter.report(scores["problems"], self.step)
        if self._progress is not None:
            self._progress.evaluated(self.step, scores["All"]["pq"], time.monotonic() - start)
        if self.log is not None:
            detection = {f"{kind}_ap": row["ap"] for kind, row in scores["detection"].items()}
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

    def _has_nothing_to_do(self) -> bool:
        """Return, in every process, whether all steps are done, the last weights saved, and these evaluated."""
        if self.step != self.total_steps:
            return self.step > self.total_steps
        is_saved = all(self.process_group.gather(self.log is None or self.store.has_new_weights()))
        return is_saved and (self.validation is None or self._is_evaluated())

    def _is_evaluated(self) -> bool:
        """Return, in every process, whether the log has an evaluation of the current step."""
        rows = () if self.log is None else self.log.rows
        in_log = any(row["kind"] == "evaluation" and row["step"] == self.step for row in rows)
        return any(self.process_group.gather(in_log))


def _check_sizes(
    training: TrainingConfig, process_group: ProcessGroup, data: DataSet, validation: ScoredData | None
) -> None:
    """Raise TrainingError unless the processes can share a step's images, and no data set is empty."""
    if training.images_per_step % (process_group.size * training.accumulation_steps):
        raise TrainingError(
            f"images_per_step ({training.images_per_step}) must be a multiple of processes x accumulation_steps "
            f"({process_group.size} x {training.accumulation_steps})"
        )
    for name, images in (("data", data), ("validation data", validation)):
        if images is not None and len(images) == 0:
            raise TrainingError(f"the {name} set has no images")


def _initial_network(config: Config, weights: InitialWeights) -> tuple[SpatialFlow, TakenWeights | None]:
    """Build a network with its initial weights."""
    network = build_model(config)
    if weights.checkpoint is not None:
        new = categories_of(config) if weights.categories is not None else None
        return network, load_for_finetuning(network, weights.checkpoint, weights.ema, weights.categories, new)
    if weights.backbone is not None:
        load_backbone(network, weights.backbone)
    return network, None
