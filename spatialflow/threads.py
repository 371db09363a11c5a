# SPDX-License-Identifier: Apache-2.0
"""Calls in worker threads, with results in order and bounded memory; the CPU cores of the process."""

import contextlib
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Count the processor cores that this process may use: its affinity mask, and the CPU limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _container_limit())


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Read the CPU limit of the control group, rounded up; `sys.maxsize` without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # versions 2 and 1
        try:
            quota, period = (float(word) for name in names for word in (root / name).read_text().split())
        except (OSError, ValueError):  # "max": no limit
            continue
        if quota > 0 and period > 0:
            return max(1, math.ceil(quota / period))
    return sys.maxsize


def leave_cores_to_others() -> None:
    """Let torch's OpenMP threads sleep while they wait for each other, unless OMP_WAIT_POLICY is set.

    On a CPU, torch uses one thread per core. While other threads decode and write, one of torch's threads waits for a
    core. By default torch's other threads would spin until that thread runs, which makes everything several times as
    slow. The setting has an effect only before torch is imported; after that the function does nothing.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Future[Result], None, None]:
    """Call a function for every item in worker threads, and yield the futures in the order of the items.

    Items are taken from the iterable in the caller's thread. Before each yield, items are taken until `ahead`
    futures wait to be yielded. So the threads have work while the caller uses a result.

    Args:
        function: called once per item. Its exception is the future's, with the traceback of the thread.
        items: may be endless. An exception of the iterable is raised after the results of the items before it.
        threads: number of worker threads.
        ahead: largest number of futures that wait to be yielded; at least 1. A future that is yielded before its call
            is done no longer counts.

    Yields:
        A future per item, which may not be done yet.

    Note:
        When the iterator ends or is closed, it waits for the calls that are running, and its threads end. Closing
        cancels queued calls whose futures were not yielded. An iterator without references is closed;
        `contextlib.closing` closes one at a defined place.
    """
    source, waiting = iter(items), deque[Future[Result]]()
    error: BaseException | None = None
    executor = ThreadPoolExecutor(threads, "map_ahead")
    try:
        while True:
            while error is None and len(waiting) < ahead:
                try:
                    waiting.append(executor.submit(function, next(source)))
                except BaseException as caught:  # includes interrupts: the futures of earlier items are yielded first
                    error = caught
            if not waiting:
                break
            yield waiting.popleft()
        if error is not None and not isinstance(error, StopIteration):
            raise error
    finally:
        error = None  # avoids a reference cycle, as the traceback refers to this frame
        for future in waiting:
            future.cancel()
        with contextlib.suppress(RuntimeError):  # raised in a worker thread, which cannot join itself
            executor.shutdown()
