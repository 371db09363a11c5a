# SPDX-License-Identifier: Apache-2.0
"""Delay of signals that end the process, until a training step is complete and saved."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def delayed_interrupts(what: str, finish: Callable[[], None]) -> Iterator[None]:
    """Within the block, delay SIGINT (Ctrl-C) and SIGTERM until its end; a second signal acts at once.

    If a signal waits, an error of the block is replaced by it: the signal may have caused the error, in another process
    of the group. Signals that the process ignores stay ignored. In another thread than the main one, nothing is
    delayed.

    Args:
        what: printed when a signal arrives; says what the process does before it ends.
        finish: called after the block if a signal waits, before the signal acts; not after an error.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None is a handler in C, which Python cannot set again.
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

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

    for number in handlers:
        signal.signal(number, delay)
    try:
        yield
    except Exception:
        restore()
        if received:
            signal.raise_signal(received[0])
        raise
    finally:
        restore()  # before the check, so that no signal is forgotten
    if received:
        finish()
        signal.raise_signal(received[0])
