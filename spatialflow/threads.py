# SPDX-License-Identifier: Apache-2.0
"""Work in the background of other work: calls in worker threads, results in order, bounded memory."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_cores_to_others() -> None:
    """Lets torch's threads sleep while they wait for each other, where the user has not decided that they spin.

    On a CPU they are as many as there are cores. While threads beside them decode and write, one of torch's waits for
    a core, and the others would spin on theirs until it gets one: everything then takes several times as long. The
    setting has an effect only before torch is loaded, so it is left alone after that.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def map_ahead(function: Callable[[Item], Any], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Future]:
    """Calls a function for every item in worker threads, and yields the futures in the order of the items.

    Items are taken in the caller's thread. Before each yield, they are taken until `ahead` calls have begun or wait, so
    that the threads have work while the caller uses a result.

    Args:
        function: called once per item. What it raises, the future raises too, with the traceback of the thread.
        items: may be endless. What it raises comes after the results of the items before.
        threads: number of worker threads.
        ahead: calls that may wait, run, or have results that were not yielded; at least 1.

    Yields:
        A future per item, which may not be done yet.

    Remarks:
        When the iterator ends or is closed, it waits for the calls that have begun, and no thread stays behind. Closing
        cancels calls that were not yielded and have not begun. An iterator without references is closed;
        `contextlib.closing` does so at a known place.
    """
    source, waiting, error = iter(items), deque[Future](), None
    executor = ThreadPoolExecutor(threads, "map_ahead")
    try:
        while True:
            while error is None and len(waiting) < ahead:
                try:
                    waiting.append(executor.submit(function, next(source)))
                except BaseException as caught:  # an interrupt too: results that are there are not lost
                    error = caught
            if not waiting:
                break
            yield waiting.popleft()
        if not isinstance(error, StopIteration):
            raise error
    finally:
        error = None  # its traceback refers to this frame
        for future in waiting:
            future.cancel()
        with contextlib.suppress(RuntimeError):  # in one of the threads, which cannot wait for itself
            executor.shutdown()
