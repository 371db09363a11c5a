# SPDX-License-Identifier: Apache-2.0
"""Warnings of a training run: unusable images, annotations that break a rule, and divergence."""

import itertools
import sys
from collections.abc import Sequence

from torch import nn
from tqdm import tqdm

from spatialflow.engine.checkpoint_store import CheckpointStore
from spatialflow.engine.checkpoints import largest_value
from spatialflow.engine.log import TrainingLog
from spatialflow.panoptic.rules import Problem

DIVERGENCE_FACTOR = 100.0
"""Growth at which a run is reported as diverging. The loss is compared with its minimum in the first steps, the largest
weight with its value before the first step."""

REMEDIES = "a lower learning_rate, a longer warm-up (warmup_iterations) or gradient_clip_norm"


class ProblemReporter:
    """Prints and logs each unusable image once, and the first breach of each rule of annotations.

    Args:
        log: of the run; None in all processes but the first, which alone reports.

    Attributes:
        problems: messages about unusable images so far.
    """

    def __init__(self, log: TrainingLog | None) -> None:
        self.problems: set[str] = set()
        self._log = log
        self._hashes_by_rule: dict[str, set[int]] = {}  # hashes of messages, as the messages would take much memory

    @property
    def count_by_rule(self) -> dict[str, int]:
        """Number of annotations that break each rule and were used."""
        return {rule: len(hashes) for rule, hashes in self._hashes_by_rule.items()}

    def report(self, problems: Sequence[str | Problem], step: int) -> None:
        """Report messages about unusable images, and annotations that were used although they break a rule.

        Args:
            problems: a text for an unusable image, a `Problem` for an annotation.
            step: steps done.
        """
        if self._log is None:
            return
        for problem in problems:
            if isinstance(problem, Problem):
                self._report_annotation(self._log, problem, step)
            elif problem not in self.problems:
                self.problems.add(problem)
                tqdm.write(f"skipped: {problem} ({len(self.problems)} so far)")  # above the progress bar
                self._log.add("problem", step, message=problem)

    def _report_annotation(self, log: TrainingLog, problem: Problem, step: int) -> None:
        hashes = self._hashes_by_rule.setdefault(problem.rule, set())
        if not hashes:
            tqdm.write(f"{problem.text}; training uses the PNG, and only counts further breaches of {problem.rule}")
            log.add("note", step, rule=problem.rule, message=problem.text)
        hashes.add(hash(problem.text))  # every epoch finds the same annotations again


class DivergenceMonitor:
    """Warns once per run when the loss or the largest weight has grown by `DIVERGENCE_FACTOR`.

    All numbers are still finite then, so the run continues. The last checkpoint is copied to another name.

    Args:
        log: of the run; None in all processes but the first, which alone warns.
        store: with the checkpoint to copy.
        network: the network in training.
        initial_largest_weight: the largest magnitude of a weight before the first step.
        first_steps: number of steps whose minimum loss is the reference.
    """

    def __init__(
        self,
        log: TrainingLog | None,
        store: CheckpointStore,
        network: nn.Module,
        initial_largest_weight: float,
        first_steps: int,
    ) -> None:
        self._log, self._store, self._network = log, store, network
        self._initial_largest_weight, self._first_steps = initial_largest_weight, first_steps
        self._has_warned = log is not None and any(row["kind"] == "warning" for row in log.rows)

    def check(self, losses: Sequence[float], step: int) -> None:
        """Warn on standard error and in the log if the run diverges.

        Args:
            losses: total losses of the last steps, which the log has already.
            step: steps done.
        """
        if self._log is None or self._has_warned:
            return
        totals = (row["total"] for row in self._log.rows if row["kind"] == "step")
        quantities = {
            "the loss": (max(losses), min(itertools.islice(totals, self._first_steps))),
            "the largest weight": (largest_value(self._network.parameters()), self._initial_largest_weight),
        }
        for name, (value, initial) in quantities.items():
            if value > DIVERGENCE_FACTOR * initial > 0:
                self._warn(
                    self._log,
                    f"the run diverges: {name} is {value:g}, at the beginning {initial:g}; {REMEDIES} may help",
                    step,
                )
                return

    def _warn(self, log: TrainingLog, message: str, step: int) -> None:
        copy = self._store.copy_before_divergence()
        if copy is not None:
            message += f"; {copy} is an earlier checkpoint, which may replace {self._store.path.name}"
        tqdm.write(f"warning: step {step}: {message}", file=sys.stderr)
        log.add("warning", step, message=message)
        self._has_warned = True
