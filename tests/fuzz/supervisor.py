# SPDX-License-Identifier: Apache-2.0
"""Execution of cases in a worker process that may crash, hang or run out of memory.

A case is any value that JSON can hold. The function that executes a case is named as "module:function". Only the worker
imports this function, so that its imports cannot affect the supervisor:

    with Supervisor("fuzz.execute:execute") as supervisor:
        outcome = supervisor.run(case)  # as in fuzz.cases

Requests and answers are JSON lines over two pipes. Standard output and error of the worker go to a file, whose end is
part of the message if the worker ends or hangs.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1]
LOG_TAIL = 4000  # bytes of the worker's output in a report


class Outcome(NamedTuple):
    """Outcome of a case.

    kind: "done": `value` is the returned value. "raised": the function raised an exception, and `message` is its
    traceback. "died": the process ended, and `message` names the signal or exit code. "hung": the process was killed
    after the time limit.
    """

    kind: str
    value: Any = None
    message: str = ""


class Supervisor:
    """Owner of a worker process, which is started at the first case and restarted after it ended.

    Args:
        function: "module:function"; it takes the case and returns a value that JSON can hold.
        seconds: time limit of a case; the first one of a worker has `start_seconds` more for imports.
        gigabytes: limit of the address space beyond the size after the imports; larger allocations fail.
        environment: variables added to those of this process.
    """

    def __init__(
        self,
        function: str,
        seconds: float = 10.0,
        gigabytes: float = 4.0,
        environment: Mapping[str, str] | None = None,
        start_seconds: float = 120.0,
    ) -> None:
        self.function = function
        self.seconds = seconds
        self.gigabytes = gigabytes
        self.environment = dict(environment or {})
        self.start_seconds = start_seconds
        self.starts = 0
        self._process: subprocess.Popen | None = None
        self._answers = b""

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, case: Any) -> Outcome:
        """Execute one case and return its outcome, even if the worker crashes or hangs."""
        limit = self.seconds
        if self._process is None:
            self._start()
            limit += self.start_seconds
        try:
            self._process.stdin.write(json.dumps(case).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(limit)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            message = f"no answer within {limit:g} s\n{self._kill()}"
            return Outcome("hung", message=message)
        if not line:
            return Outcome("died", message=self._describe_end())
        kind, value = json.loads(line)
        return Outcome("done", value) if kind == "done" else Outcome("raised", message=value)

    def close(self) -> None:
        if self._process is not None:
            self._kill()

    def _start(self) -> None:
        # python -X faulthandler prints the line of a crash.
        read, write = os.pipe()
        self._log = tempfile.TemporaryFile()
        environment = {**os.environ, **self.environment}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [environment.get("PYTHONPATH")])])
        command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.supervisor", self.function, str(write)]
        self._process = subprocess.Popen(
            [*command, str(self.gigabytes)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[write],
            env=environment,
        )
        os.close(write)
        self._read, self._answers = read, b""
        self.starts += 1

    def _read_line(self, seconds: float) -> bytes:
        """Return the next line of the worker, or b"" if it ended; raise TimeoutError after `seconds`."""
        end = time.monotonic() + seconds
        while b"\n" not in self._answers:
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            got = os.read(self._read, 1 << 16)
            if not got:
                return b""
            self._answers += got
        line, self._answers = self._answers.split(b"\n", 1)
        return line

    def _describe_end(self) -> str:
        """Describe the signal or exit code of a worker that closed its pipe, and the end of its output."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # the pipe is closed, but the process is running
            code = None
        output = self._kill()
        if code is None:
            return f"the worker closed its pipe\n{output}"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}\n{output}"

    def _kill(self) -> str:
        """Kill the worker and return the end of its output."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        os.close(self._read)
        self._process = None
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - LOG_TAIL, 0))
        output = self._log.read().decode(errors="replace")
        self._log.close()
        return output


def _limit_memory(gigabytes: float) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _work(function: Callable[[Any], Any], pipe: int) -> None:
    for line in sys.stdin.buffer:
        try:
            outcome = ["done", function(json.loads(line))]
            text = json.dumps(outcome)
        except Exception:
            text = json.dumps(["raised", traceback.format_exc()])
        os.write(pipe, text.encode() + b"\n")


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    _limit_memory(float(sys.argv[3]))
    _work(function, int(sys.argv[2]))


if __name__ == "__main__":
    _main()
