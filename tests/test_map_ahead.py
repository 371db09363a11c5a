# SPDX-License-Identifier: Apache-2.0
"""map_ahead: the order, number and errors of calls in worker threads, and the end of the threads."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from contextlib import closing

import pytest

from spatialflow.threads import map_ahead


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def slow_for_even(number):
    time.sleep(0.01 * (number % 2 == 0))
    return number, threading.current_thread()


@pytest.mark.parametrize("threads, ahead", [(1, 1), (1, 3), (3, 2), (3, 8)])
def test_results_are_in_order(threads, ahead):
    results = [future.result() for future in map_ahead(slow_for_even, range(20), threads, ahead)]
    assert [number for number, _ in results] == list(range(20))
    used = {thread for _, thread in results}
    assert len(used) <= threads and threading.main_thread() not in used


def test_no_items():
    assert list(map_ahead(slow_for_even, (), 2, 4)) == []


def test_items_are_taken_in_the_callers_thread_and_not_too_early():
    taken, received = [], 0

    def endless():
        while True:
            taken.append(threading.current_thread())
            yield len(taken)

    with closing(map_ahead(slow_for_even, endless(), 2, 3)) as futures:
        for future in futures:
            received += 1
            assert received <= len(taken) <= received + 2
            if future.result()[0] == 10:
                break
    assert set(taken) == {threading.current_thread()}


def test_calls_run_beside_the_caller():
    """The caller and a call wait for each other, which would deadlock in a single thread."""
    begun, used = threading.Event(), threading.Event()

    def call(number):
        begun.set()
        if number:
            assert used.wait(30)
        return number

    futures = map_ahead(call, range(2), 1, 2)
    assert next(futures).result() == 0 and begun.wait(30)
    used.set()
    assert next(futures).result() == 1 and next(futures, None) is None


def fail(number):
    if number == 2:
        raise KeyError("the second")
    return number


def test_an_error_of_a_call_belongs_to_its_item():
    """The error has the thread's traceback, and the other items are processed."""
    futures = list(map_ahead(fail, range(4), 2, 2))
    assert [future.result() for future in futures[:2] + futures[3:]] == [0, 1, 3]
    with pytest.raises(KeyError, match="the second") as caught:
        futures[2].result()
    assert "in fail" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, StopIteration])
def test_an_error_of_the_items_comes_after_the_results_before_it(kind):
    class Items:
        remaining = [1, 2]

        def __iter__(self):
            return self

        def __next__(self):
            if self.remaining:
                return self.remaining.pop(0)
            raise kind("no more")

    results = []
    try:
        for future in map_ahead(slow_for_even, Items(), 1, 5):
            results.append(future.result()[0])
    except kind as error:
        assert str(error) == "no more" and "__next__" in "".join(traceback.format_exception(error))
    else:
        assert kind is StopIteration
    assert results == [1, 2]


@pytest.mark.parametrize("leave", ["break", "exception", "collection", "cycle"])
def test_leaving_early_ends_the_threads(leave):
    """Queued calls are canceled and running calls are finished; the fixture checks that no thread is left."""
    begun, ended, release = [], [], threading.Event()

    def call(number):
        begun.append(number)
        if number:
            assert release.wait(30)
        ended.append(number)
        return number

    def loop():
        futures = map_ahead(call, range(100), 1, 10)
        if leave == "cycle":
            cycle = [futures]
            cycle.append(cycle)
        for future in futures:
            assert future.result() == 0
            while begun != [0, 1]:
                time.sleep(0.001)
            threading.Timer(0.05, release.set).start()
            if leave == "exception":
                raise KeyError("of the caller")
            if leave == "collection":
                del future
                return next(futures) and None
            break

    if leave == "exception":
        with pytest.raises(KeyError, match="of the caller"):
            loop()
    else:
        loop()
    gc.collect()
    assert begun == ended
    assert begun == [0, 1] or leave == "cycle"  # the garbage collector may free the cycle later


def test_one_of_its_threads_may_close_it():
    """The garbage collector may run in any thread, and close the iterator there."""
    errors = []

    def call(number):
        if number:
            assert suspended.wait(30)
            try:
                futures.close()
            except BaseException as error:
                errors.append(error)
        return number

    threads = threading.active_count()
    suspended = threading.Event()
    futures = map_ahead(call, range(10), 1, 3)
    next(futures)
    last = next(futures)
    suspended.set()
    assert last.result(30) == 1 and not errors and next(futures, None) is None
    deadline = time.monotonic() + 30
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_thread_keeps_no_item():
    class Item:
        pass

    items = [Item() for _ in range(3)]
    references = [weakref.ref(item) for item in items]
    futures = map_ahead(lambda item: None, items, 1, 2)
    next(futures).result()
    items.clear()
    next(futures).result()
    deadline = time.monotonic() + 30
    while references[0]() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert references[0]() is None
    futures.close()


def test_an_iterator_that_is_open_at_the_end_of_the_process():
    """A process that ends with an open iterator in a global variable has exit code 0 and no error message."""
    code = "import time; from spatialflow.threads import map_ahead as f; it = f(time.sleep, [0.01] * 9, 2, 4); next(it)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "setting, loaded, expected", [(None, "", "passive"), ("active", "", "active"), (None, "import torch", None)]
)
def test_waiting_threads_sleep(setting, loaded, expected):
    """The variable is set only if torch is not loaded yet; a user's value is kept."""
    code = f"import os; {loaded or 'pass'}; from spatialflow.threads import leave_cores_to_others as f; f(); "
    code += "print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if setting is None else {"OMP_WAIT_POLICY": setting}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    assert printed.strip() == str(expected)


def test_predict_decides_before_torch_is_loaded():
    code = (
        "import sys, os; from spatialflow.cli import main, predict; "
        "predict.resolve_images = lambda *_: sys.exit(os.environ['OMP_WAIT_POLICY'] + str('torch' in sys.modules)); "
        "main.main(['predict', 'a.jpg', '--output', 'out'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "passiveFalse"


def test_an_interrupt_while_the_caller_waits():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def call(number):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            return number

        with pytest.raises(KeyboardInterrupt):
            with closing(map_ahead(call, range(5), 1, 3)) as futures:
                for future in futures:
                    future.result()
                    time.sleep(30)
    finally:
        signal.signal(signal.SIGINT, before)
