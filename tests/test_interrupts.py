# SPDX-License-Identifier: Apache-2.0
"""Delay of signals during a block."""

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from spatialflow.engine.interrupts import delayed_interrupts


@pytest.fixture(autouse=True)
def interrupts():
    """Let SIGINT arrive: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def nothing():
    """What is done before the signal acts."""


def test_the_block_ends_before_the_interrupt(caplog):
    done = []
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(KeyboardInterrupt),
        delayed_interrupts("waits", lambda: done.append(signal.getsignal(signal.SIGINT))),
    ):
        os.kill(os.getpid(), signal.SIGINT)
        done.append("block")
    assert done == ["block", signal.default_int_handler]  # a further signal acts at once from here on
    assert caplog.messages == ["waits"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_acts_at_once():
    finished = []
    with pytest.raises(KeyboardInterrupt), delayed_interrupts("waits", lambda: finished.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the block went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and finished == []


def test_a_signal_replaces_an_error_of_the_block():
    """A signal to the process group also ends the processes that the block needs."""
    finished = []
    with pytest.raises(KeyboardInterrupt), delayed_interrupts("waits", lambda: finished.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("worker is gone")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and finished == []


def test_an_error_without_a_signal_stays():
    with pytest.raises(RuntimeError, match="mine"), delayed_interrupts("waits", nothing):
        raise RuntimeError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_signal_nothing_happens(caplog):
    before, finished = signal.getsignal(signal.SIGTERM), []
    with delayed_interrupts("waits", lambda: finished.append(1)):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert finished == [] and caplog.messages == [] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, None], ids=["ignored", "in C"])
def test_handlers_that_stay(handler, monkeypatch):
    """Python cannot set a handler again that a library in C has set."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    get = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: handler if number == signal.SIGINT else get(number))
    finished = []
    with delayed_interrupts("waits", lambda: finished.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
    assert finished == [] and get(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_delays_nothing():
    seen = []

    def work():
        with delayed_interrupts("waits", nothing):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_signal_that_ends_the_process_still_does():
    """Python has no handler for SIGTERM outside the commands."""
    code = (
        "import os, signal\n"
        "from spatialflow.engine.interrupts import delayed_interrupts\n"
        "with delayed_interrupts('waits', lambda: print('is finished', flush=True)):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('the block ends', flush=True)\n"
        "print('goes on', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGTERM
    assert result.stdout == "the block ends\nis finished\n"
