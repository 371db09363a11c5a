# SPDX-License-Identifier: Apache-2.0
"""Steps of `gpu_check.py`, and their execution: commands in process groups, within a limit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_PARALLEL = 14
"""Largest number of commands of a step that run at once. Each runs a file of tests, which mostly uses the host."""


def last_line(output: str) -> str:
    return output.strip().rsplit("\n", 1)[-1][:200]


@dataclass
class Outcome:
    """Result of a step."""

    name: str
    status: str  # "passed", "failed", "timed out", "skipped"
    seconds: float
    detail: str  # one line: counts, or the reason
    log: str | None = None  # file name


@dataclass(frozen=True)
class Step:
    """Command of the check, with its time and the summary of its output; or the reason to skip it.

    Args:
        name: title in the report.
        command: program and arguments.
        each: further arguments; the command runs once for each of them, `MAX_PARALLEL` at a time.
        reserved: seconds that earlier steps leave for this step.
        limit: seconds after which the commands are ended.
        detail: function that returns a summary of the output in one line.
        skip_reason: reason not to run the step; empty to run it.
        expected_code: exit code of success.
        group: consecutive steps with the same word here run at the same time.
        backend: back end, if it is not that of the run.
        required_text: text that the output must contain; otherwise the step has failed.
    """

    name: str
    command: list[str] = field(default_factory=list)
    each: list[str] = field(default_factory=list)
    reserved: float = 0.0
    limit: float = 60.0
    detail: Callable[[str], str] = last_line
    skip_reason: str = ""
    expected_code: int = 0
    group: str = ""
    backend: str = ""
    required_text: str = ""


def run_step(step: Step, folder: Path, environment: dict[str, str], remaining: float) -> Outcome:
    """Run a step within its limit and the remaining time; write its output to `folder`."""
    if step.skip_reason:
        return Outcome(step.name, "skipped", 0.0, step.skip_reason)
    limit, begin = min(step.limit, remaining), time.monotonic()
    if limit <= 1:
        return Outcome(step.name, "timed out", 0.0, "no time was left")
    log = folder / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower()).strip('-')}.log"
    environment = {**environment, "SPATIALFLOW_BACKEND": step.backend} if step.backend else environment
    commands = [[*step.command, argument] for argument in step.each] or [step.command]
    with ThreadPoolExecutor(MAX_PARALLEL) as pool:
        results = list(pool.map(lambda command: run_command(command, environment, begin + limit), commands))
    output = "\n".join(text for _, text in results)
    codes = {code for code, _ in results}
    status = "timed out" if None in codes else "passed" if codes == {step.expected_code} else "failed"
    if status == "passed" and step.required_text not in output:
        status = "failed"
    detail = step.detail(output)
    if status == "timed out":
        detail = f"more than {limit:.0f} s; {detail}"
    log.write_text(output)
    return Outcome(step.name, status, round(time.monotonic() - begin, 1), detail, log.name)


def group_steps(steps: list[Step]) -> list[list[Step]]:
    """Group consecutive steps that run at the same time."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.group and groups[-1][0].group == step.group:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def reserved_seconds(groups: list[list[Step]]) -> float:
    """Return the seconds that are reserved for these groups."""
    return sum(max(0.0 if step.skip_reason else step.reserved for step in group) for group in groups)


def run_command(command: list[str], environment: dict[str, str], deadline: float) -> tuple[int | None, str]:
    """Run a command; return exit code and output. The code is None if `deadline` (monotonic clock) has passed."""
    if time.monotonic() >= deadline:
        return None, ""
    process = start_command(command, environment)
    try:
        output, _ = process.communicate(timeout=deadline - time.monotonic())
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, end_process_group(process)
    finally:
        _running.discard(process.pid)


def start_command(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command in its own process group, which `end_commands` ends."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process.pid)
    return process


def end_process_group(process: subprocess.Popen) -> str:
    """End a command and its children; return its output.

    SIGTERM comes first: the workers of torchrun have their own sessions, and torchrun ends them. SIGKILL follows after
    three seconds. Three seconds later, a child that still keeps the output open is left to itself.
    """
    output = ""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=3)[0]
        except subprocess.TimeoutExpired as still_open:
            output = still_open.output or output
    return output.decode(errors="replace") if isinstance(output, bytes) else output


_running: set[int] = set()
"""Process ids of running commands."""


def end_commands(*_: object) -> None:
    """Handle SIGTERM and SIGINT: end the running commands with this process."""
    for pid in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(130)
