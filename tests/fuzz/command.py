# SPDX-License-Identifier: Apache-2.0
"""Command line of the fuzzer: fuzz the operators or the readers of files for some time, or replay a case.

    python tests/fuzz --seconds 120 [--seed 0] [--ops nms roi_align] [--backend simt]
    python tests/fuzz --seconds 120 --ops files
    python tests/fuzz --replay '{"op": "nms", ...}'

The operators are fuzzed round-robin, one round of cases at a time. The seed, the operator and the number of the round
determine the cases, so a longer run begins with the cases of a shorter one. Exit codes: 0 no failure, 1 a case
failed, 2 invalid arguments.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.cases import CPU, OPERATORS, SIMT, Limits, cases
from fuzz.files import FILES, file_cases
from fuzz.supervisor import Outcome, Supervisor

EXECUTE = "fuzz.execute:execute"
ROUND = 100  # cases of an operator in a round
FILE_ROUND = 20  # cases of a kind of file in a round; they take longer
SHRINK_SECONDS = 60.0
# Threads would make the order of sums depend on the machine, and cases this small do not use them well.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "SPATIALFLOW_SIMT_THREADS": "1"}


class OutOfTime(BaseException):
    """Stop a round before its end. Hypothesis catches every Exception, so this is a BaseException."""


class Failed(Exception):
    """Failure of a case, which Hypothesis then shrinks."""


class Fuzzer:
    """Run cases in a worker until the time is over, and count their outcomes."""

    def __init__(self, supervisor: Supervisor, limits: Limits, seconds: float) -> None:
        self.supervisor = supervisor
        self.limits = limits
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds
        self.tried = 0  # cases of the current operator so far
        self.failure_time = ""
        self.counts: Counter = Counter()
        self.seconds: Counter = Counter()

    def try_round(self, operator: str, start: int) -> tuple[dict, str] | None:
        """Run a round of cases of one operator; return the smallest failing case and its description, or None."""
        smallest: tuple[dict, str] | None = None
        end = self.deadline

        def test(case: dict) -> None:
            nonlocal smallest, end
            if time.monotonic() > end:
                raise OutOfTime
            description = self._try(case)
            if description is None:
                return
            if smallest is None:
                self.failure_time = f"found after {time.monotonic() - self.begin:.0f} s, in case {self.tried}"
                end = time.monotonic() + SHRINK_SECONDS
            if smallest is None or len(json.dumps(case)) <= len(json.dumps(smallest[0])):
                smallest = case, description
            raise Failed

        configured = settings(
            max_examples=FILE_ROUND if operator in FILES else ROUND,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        try:
            strategy = file_cases(operator) if operator in FILES else cases(operator, self.limits)
            configured(seed(start)(given(strategy)(test)))()
        except (OutOfTime, Failed):
            pass
        return smallest

    def _try(self, case: dict) -> str | None:
        begin = time.monotonic()
        outcome = self.supervisor.run(case)
        operator = case["op"]
        self.counts[operator, "cases"] += 1
        self.tried = self.counts[operator, "cases"]
        self.seconds[operator] += time.monotonic() - begin
        if outcome.kind == "done":
            self.counts[operator, "refused"] += outcome.value["status"] == "refused"
            for name in ("compared", "excluded"):
                self.counts[operator, name] += outcome.value[name]
            self.counts[operator, "skipped"] += bool(outcome.value["skipped"])
        return describe_outcome(outcome)


def describe_outcome(outcome: Outcome) -> str | None:
    """Return the error of a case, or None if it passed."""
    if outcome.kind == "done":
        return "\n".join(outcome.value["differences"]) or None
    reason = {"died": "the process ended", "hung": "the call did not return", "raised": "the call raised an exception"}
    return f"{reason[outcome.kind]}: {outcome.message}"


def describe_case(case: dict) -> str:
    """Describe the call of a case in a few lines."""
    lines = [f"operator {case['op']}" + ("" if case["valid"] else ", may be refused")]
    lines += [f"  {name} = {_describe(value)}" for name, value in case["arguments"].items()]
    if "gradient" in case:
        tangents = ", with tangents" if case["jvp"] else ""
        lines.append(f"  incoming gradients {json.dumps(case['gradient'])}{tangents}")
    return "\n".join(lines)


def _describe(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return f"[{', '.join(map(_describe, value))}]"
    if not isinstance(value, dict):
        return repr(value)
    if "tensor" not in value:
        return f"{{{', '.join(f'{name}: {_describe(item)}' for name, item in value.items())}}}"
    text = f"{value['dtype']}{tuple(value['tensor'])} {json.dumps(value['values'])}"
    text += f" layout {json.dumps(value['layout'])}" if "layout" in value else ""
    return text + (" requires grad" if value.get("grad") else "")


def replay_command(case: dict, backend: str) -> str:
    return f"python tests/fuzz --backend {backend} --replay {shlex.quote(json.dumps(case))}"


def _read_case(text: str) -> dict:
    """Parse a case from a report; raise ValueError for input that is recognizably not a case."""
    try:
        case = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(case, dict):
        raise ValueError(f"not a case of a report: must be an object, got {type(case).__name__}")
    try:
        if case["op"] not in [*OPERATORS, *FILES]:
            raise ValueError(f"no target {case['op']!r}; there are {', '.join([*OPERATORS, *FILES])}")
        describe_case(case)
        if case["op"] in FILES:
            case["arguments"]["base"], case["arguments"]["edits"]
    except KeyError as error:
        raise ValueError(f"not a case of a report: {error} is missing") from None
    except (TypeError, AttributeError):
        raise ValueError("not a case of a report: a value has another type") from None
    return case


def _rounds(operators: list[str], first: int) -> Iterator[tuple[str, int]]:
    """Yield (operator, seed of its round) round-robin; operators removed from the list are not yielded again."""
    number = 0
    while operators:
        for operator in list(operators):
            yield operator, zlib.crc32(f"{first} {operator} {number}".encode())
        number += 1


def supervisor_for(backend: str) -> Supervisor:
    slow = backend != "cpu"
    return Supervisor(EXECUTE, seconds=60 if slow else 20, environment=ENVIRONMENT | {"SPATIALFLOW_BACKEND": backend})


def fuzz(operators: list[str], backend: str, seconds: float, first: int) -> list[tuple[dict, str]]:
    """Fuzz until the time is over or every operator failed, print a table, and return the failures.

    A failure is the failing case and its description.
    """
    limits = CPU if backend.startswith("cpu") else SIMT
    failures = []
    with supervisor_for(backend) as supervisor:
        fuzzer = Fuzzer(supervisor, limits, seconds)
        for operator, start in _rounds(operators, first):
            if time.monotonic() > fuzzer.deadline:
                break
            failure = fuzzer.try_round(operator, start)
            if failure:
                failures.append(failure)
                operators.remove(operator)  # one failure per operator is enough
                report(*failure, fuzzer.failure_time, backend)
    _print_table(fuzzer, time.monotonic() - fuzzer.begin)
    return failures


def report(case: dict, description: str, summary: str, backend: str) -> None:
    print(f"FAILED: {describe_case(case)}\n{summary}\n{description}")
    print(f"Replay:\n  {replay_command(case, backend)}\n", flush=True)


def _print_table(fuzzer: Fuzzer, seconds: float) -> None:
    columns = ("cases", "refused", "skipped", "compared", "excluded")
    print(f"{'operator':<24}" + "".join(f"{name:>12}" for name in columns) + f"{'cases/s':>10}")
    names = sorted({name for name, _ in fuzzer.counts})
    for name in names:
        row = "".join(f"{fuzzer.counts[name, column]:>12}" for column in columns)
        print(f"{name:<24}{row}{fuzzer.counts[name, 'cases'] / max(fuzzer.seconds[name], 1e-9):>10.0f}")
    total = sum(fuzzer.counts[name, "cases"] for name in names)
    print(
        f"{total} cases in {seconds:.0f} s, {total / max(seconds, 1e-9):.0f} per second; "
        f"{fuzzer.supervisor.starts} worker{'s' if fuzzer.supervisor.starts > 1 else ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="decides the cases (default: 0)")
    parser.add_argument(
        "--ops",
        nargs="*",
        metavar="NAME",
        default=[],
        help='operators, kinds of files, or "operators" and "files" for all of them (default: both on the back end '
        "cpu, operators on the others)",
    )
    parser.add_argument("--backend", choices=("cpu", "cpu_sanitized", "simt", "simt_sanitized"), default="cpu")
    parser.add_argument("--replay", metavar="CASE", help="a case of a report to execute; - reads it from stdin")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < float("inf"):  # the comparison is False for NaN too
        parser.error(f"--seconds must be positive and finite, got {options.seconds:g}")
    if options.replay is not None:
        try:
            case = _read_case(sys.stdin.read() if options.replay == "-" else options.replay)
        except ValueError as error:
            parser.error(f"--replay: {error}")
        with supervisor_for(options.backend) as supervisor:
            outcome = supervisor.run(case)
        description = describe_outcome(outcome)
        print(f"{describe_case(case)}\n{description or outcome.value}")
        return 1 if description else 0
    groups = {"operators": list(OPERATORS), "files": list(FILES)}
    usual = groups if options.backend == "cpu" else ["operators"]
    targets = [name for operator in options.ops or usual for name in groups.get(operator, [operator])]
    if unknown := [name for name in targets if name not in OPERATORS and name not in FILES]:
        parser.error(f"--ops: no target {unknown[0]!r}; there are {', '.join([*groups, *OPERATORS, *FILES])}")
    return 1 if fuzz(targets, options.backend, options.seconds, options.seed) else 0
