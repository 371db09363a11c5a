# SPDX-License-Identifier: Apache-2.0
"""Time measurement of the stages of prediction."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

STAGES = ("decode", "preprocess", "network", "detect", "masks", "stuff", "merge")
"""Keys of `PanopticResult.times`, in order. On a GPU each value except "decode" is the time to queue the work, and
"merge" includes the wait for the results. A CUDA graph is queued as a whole, under "network"."""

_recorded_times: ContextVar[dict[str, float] | None] = ContextVar("recorded_times", default=None)


def zero_times() -> dict[str, float]:
    """Zero seconds for every stage."""
    return dict.fromkeys(STAGES, 0.0)


@contextmanager
def record_stages(times: dict[str, float] | None) -> Iterator[None]:
    """Add the seconds of each `stage` inside the block, in this thread, to `times`; None records nothing."""
    token = _recorded_times.set(times)
    try:
        yield
    finally:
        _recorded_times.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure a block as one stage; on a GPU until the work is queued, without a wait for its end."""
    start = time.perf_counter()
    yield
    times = _recorded_times.get()
    if times is not None:
        times[name] += time.perf_counter() - start
