# SPDX-License-Identifier: Apache-2.0
"""Progress of a training run: a bar on a terminal, lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

FIRST_LINE_S = 10.0
"""Seconds until the first line, which shows soon that the run works and how long it takes."""

LINE_INTERVAL_S = 30.0
"""Seconds between later lines."""


def format_duration(seconds: float) -> str:
    """Format a duration, as "45 s", "12 min" or "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Shows the steps of a run: a bar on standard error if that is a terminal, else a line on standard output.

    Args:
        step: steps done when the run starts or resumes.
        total_steps: steps of the whole run.
        steps_per_epoch: steps of an epoch.
        images_per_step: images of a step.
        shown: False: nothing is shown.
    """

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int, images_per_step: int, shown: bool) -> None:
        self.total_steps, self.steps_per_epoch, self.images_per_step = total_steps, steps_per_epoch, images_per_step
        on_terminal = shown and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        if on_terminal:
            self._bar = tqdm(total=total_steps, initial=step, desc="train", unit="step")
        self._prints_lines = shown and not on_terminal
        self._quality = ""
        self._mark = (step, time.monotonic())  # step and time of the last line
        self._first = step
        self._start = self._mark[1]
        self._evaluating = 0.0  # seconds of evaluations since the start
        self._interval = FIRST_LINE_S

    def begin(self, step: int) -> None:
        """Measure from now on: the first step takes longer, as it waits for the processes that load data.

        Args:
            step: steps done, the first one of this process included.
        """
        self._first, self._start = step, time.monotonic()
        self._mark = (step, self._start)

    @property
    def is_due(self) -> bool:
        """Whether `show` would print a line."""
        return self._prints_lines and time.monotonic() - self._mark[1] >= self._interval

    def show(self, step: int, loss: float, rate: float) -> None:
        """Move the bar, or print a line if the last one is old enough.

        Args:
            step: steps done.
            loss: total loss of the last step.
            rate: learning rate of the last step.
        """
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss={loss:.4f}{self._quality}", refresh=False)
        elif step > self._mark[0] and (self.is_due or (self._prints_lines and step == self.total_steps)):
            now = time.monotonic()
            last_step, last_time = self._mark
            speed = (step - last_step) * self.images_per_step / max(now - last_time, 1e-9)
            left = (now - self._start - self._evaluating) / (step - self._first) * (self.total_steps - step)
            epoch = (step - 1) // self.steps_per_epoch + 1
            print(
                f"step {step} of {self.total_steps} (epoch {epoch})  loss {loss:.3f}  rate {rate:.2g}  "
                f"{speed:.2g} images/s  {format_duration(left)} left{self._quality}",
                flush=True,
            )
            self._mark, self._interval = (step, now), LINE_INTERVAL_S

    def evaluated(self, step: int, pq: float, seconds: float) -> None:
        """Show the panoptic quality of an evaluation.

        Args:
            step: steps done.
            pq: from 0 to 1.
            seconds: duration of the evaluation, which does not count for the remaining time.
        """
        self._quality = f"  PQ {100 * pq:.1f}"
        self._evaluating += seconds
        self._mark = (self._mark[0], self._mark[1] + seconds)
        if self._prints_lines:
            print(f"step {step} of {self.total_steps}: PQ {100 * pq:.2f} on the validation images", flush=True)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
