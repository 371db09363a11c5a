# SPDX-License-Identifier: Apache-2.0
"""Log of a training run: JSON lines, TensorBoard where it is installed, and a plot of the curves."""

import json
import os
from pathlib import Path
from typing import IO, Any

from spatialflow.files import atomic_write


class TrainingLog:
    """Writer of `log.jsonl`, whose rows have a "step" (number of steps done) and a "kind".

    The kinds are "step", "evaluation", "problem" (an image that could not be used), "note" and "warning" (divergence).
    A "note" reports an annotation that breaks a rule but is used anyway, once per rule. All numbers are finite, as JSON
    has no others. No file is changed before the first `open` or `add`.

    Args:
        folder: of the run.
        steps_done: number of steps done. Rows of later steps, left by an interrupted run, are removed; 0 removes all
            rows.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        self.path = folder / "log.jsonl"
        self.rows = [row for row in read_log(self.path) if row["step"] <= steps_done] if steps_done else []
        self._steps_done = steps_done
        self._file: IO[str] | None = None
        self._board: Any = None

    def open(self) -> IO[str]:
        """Open the files, without the rows of later steps; return the opened log."""
        if self._file is None:
            with atomic_write(self.path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
            self._file = open(self.path, "a", encoding="utf-8")
            self._board = _tensorboard(self.path.with_name("tensorboard"), self._steps_done)
        return self._file

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Add a row, and its numbers to TensorBoard.

        Args:
            kind: see the class.
            step: steps done.
            values: further fields of the row.

        Raises:
            ValueError: a number is not finite.
        """
        row = {"kind": kind, "step": step, **values}
        line = json.dumps(row, allow_nan=False)
        file = self.open()
        self.rows.append(row)
        file.write(line + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Flush the buffers of the files."""
        if self._file is not None:
            self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def plot(self) -> bool:
        """Write `curves.png`: losses, learning rate and panoptic quality over steps.

        Returns:
            Whether the file was written; False if matplotlib is missing or there are no steps.
        """
        return plot_curves(self.rows, self.path.with_name("curves.png"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log up to its first incomplete line, which a killed process may leave."""
    if not os.path.isfile(path):
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            row["kind"], row["step"]
        except (ValueError, TypeError, KeyError):
            break
        rows.append(row)
    return rows


def _tensorboard(folder: Path, steps_done: int) -> Any:
    """Make a TensorBoard writer; None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=steps_done + 1)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> bool:
    """Plot the rows of a log.

    Returns:
        Whether the file was written; False if matplotlib is missing or there are no steps.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not steps:
        return False
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [row["step"] for row in steps]
    width = max(len(steps) // 100, 1)
    for name in ("total", "cls", "box", "thing", "stuff"):
        if steps[0].get(name) is not None:
            left.plot(x, _smooth([row[name] for row in steps], width), label=name, linewidth=1.2)
    left.set(xlabel="step", ylabel=f"loss (mean of {width} steps)" if width > 1 else "loss", yscale="log")
    left.legend()
    right.plot(x, [row["learning_rate"] for row in steps], color="gray", linewidth=1)
    right.set(xlabel="step", ylabel="learning rate")
    if evaluations:
        quality = right.twinx()
        for name in ("pq", "pq_things", "pq_stuff"):
            quality.plot(
                [row["step"] for row in evaluations], [row[name] * 100 for row in evaluations], marker=".", label=name
            )
        quality.set(ylabel="panoptic quality, %", ylim=(0, 100))
        quality.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)  # above the curves, which it would cover
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return True


def _smooth(values: list[float], width: int) -> list[float]:
    """Compute the running mean over the last `width` values."""
    total, result = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        result.append(total / min(i + 1, width))
    return result
