# SPDX-License-Identifier: Apache-2.0
"""Delay of signals that end the process, until a training step is complete and saved."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def delayed_interrupts(what: str) -> Iterator[list[int]]:
    """Within the block, delay SIGINT (Ctrl-C) and SIGTERM until its end; a second signal acts at once.

    An error of the block is replaced by the signal that waits: a signal to the whole process group ends the processes
    that load data, and the block fails for want of them. Signals that the process ignores stay ignored. In another
    thread than the main one, nothing is delayed.

    Args:
        what: printed when a signal arrives; says what the process does before it ends.

    Yields:
        The numbers of the signals that wait.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def delay(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _logger.warning(what)
        else:
            restore()
            signal.raise_signal(number)

    for number, handler in handlers.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, delay)
    try:
        yield received
    except Exception:
        restore()
        if received:
            signal.raise_signal(received[0])
        raise
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])
