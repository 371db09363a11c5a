# SPDX-License-Identifier: Apache-2.0
"""Streams of images through a Predictor: overlap of the stages, order of results, errors, end of the threads."""

import contextlib
import copy
import gc
import itertools
import os
import threading
import time
import traceback
import weakref
from concurrent.futures import Future

import cv2
import numpy as np
import pytest
import torch
from helpers.small_models import random_model

import spatialflow
from spatialflow.engine import inputs, predict, transfers
from spatialflow.engine.predict import DECODERS, PATIENCE, Outcome, Predictor
from spatialflow.engine.transfers import Download, Transfers

SETTINGS = dict(test_short_edges=[32], test_long_edge=48, stuff_area_threshold=20, instance_score_threshold=0.0)


@pytest.fixture(scope="module")
def model():
    return random_model("tiny")


@pytest.fixture
def predictor(model):
    return Predictor(model, **SETTINGS)


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(count):
    sizes = [(32, 48), (48, 32), (40, 41), (33, 47)]
    return [picture(*sizes[seed % 4], seed) for seed in range(count)]


@pytest.fixture
def files(tmp_path):
    """Paths of the pictures, saved losslessly."""
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, image in zip(paths, pictures(6), strict=False):
        cv2.imwrite(str(path), image)
    return paths


def assert_same(actual, expected, exact=True):
    assert actual.id_map.shape == expected.id_map.shape and (actual.id_map == expected.id_map).mean() >= (
        1 if exact else 0.99
    )
    np.testing.assert_allclose(actual.scores, expected.scores, atol=0 if exact else 1e-4)
    if exact:
        assert actual.segments == expected.segments
        np.testing.assert_array_equal(actual.mask_logits, expected.mask_logits)


class Later(Transfers):
    """Simulated transfers of a GPU: the host may queue a batch before it waits for the previous one."""

    max_queued = 1

    def __init__(self, log):
        super().__init__(torch.device("cpu"))
        self.log, self.batches = log, itertools.count()

    def upload(self, staged):
        self.log.append(("queue", next(self.batches)))
        return super().upload(staged)

    def download(self, value):
        number = self.log[-1][1]
        event = type("Event", (), {"synchronize": lambda _: self.log.append(("wait", number))})()
        return Download(value, event)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["list", "iterator", "paths"])
def test_results_are_those_of_single_images(model, files, batch_size, kind):
    predictor = Predictor(model, batch_size=batch_size, **SETTINGS)
    images = {"list": pictures(6), "iterator": iter(pictures(6)), "paths": files}[kind]
    results = list(predictor.stream(images))
    names = [path.name if kind == "paths" else f"image {number}" for number, path in enumerate(files)]
    assert [result.image_name for result in results] == names
    for result, image in zip(results, pictures(6), strict=True):
        assert_same(result, predictor(image), exact=batch_size == 1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_are_taken_a_few_ahead(model, batch_size):
    """An endless iterable gives results, with a bounded number of images in memory."""
    most = 2 * DECODERS["cpu"] + (PATIENCE + 3) * batch_size
    taken = received = 0

    def endless():
        nonlocal taken
        for taken in itertools.count(1):
            assert taken - received <= most
            yield picture(32, 40 if taken == 3 else 48, taken)  # a size of one image only, which fills no batch

    with contextlib.closing(Predictor(model, batch_size=batch_size, **SETTINGS).stream(endless())) as stream:
        for _ in itertools.islice(stream, 30):
            received += 1


def test_an_iterator_may_reuse_its_array(predictor):
    """An iterator may return the same array for every image, as a reader of video frames does."""

    def frames():
        buffer = np.empty((32, 48, 3), np.uint8)
        for seed in range(5):
            buffer[:] = picture(32, 48, seed)
            yield buffer

    for seed, result in enumerate(predictor.stream(frames())):
        assert_same(result, predictor(picture(32, 48, seed)))


def batches_of(predictor, images):
    """Predict images; return the sizes of the images of each batch, in order."""
    batches, run = [], predictor.pipeline.__class__.__call__

    def recording(pipeline, pixels, *args):
        batches.append([tuple(image.shape[:2]) for image in pixels])
        return run(pipeline, pixels, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(predictor.pipeline), "__call__", recording)
        assert len(predictor(images)) == len(images)
    return batches


def test_batches_do_not_depend_on_timing(model, files, monkeypatch):
    """Batches have the same images for fast and for slow decoding."""
    predictor = Predictor(model, batch_size=2, **SETTINGS)
    early = batches_of(predictor, files)
    read = predict.read_image
    monkeypatch.setattr(predict, "read_image", lambda path: (time.sleep(0.02), read(path))[1])
    assert batches_of(predictor, files) == early


def test_a_rare_size_does_not_wait_for_its_like(model):
    """The batch of an image runs, even if incomplete, after `PATIENCE * batch_size` later images."""
    predictor = Predictor(model, batch_size=2, **SETTINGS)
    images = [picture(48, 32)] + [picture(32, 48, seed) for seed in range(20)]
    batches = batches_of(predictor, images)
    assert batches.index([(48, 32)]) == PATIENCE and [len(batch) for batch in batches] == [2] * 4 + [1] + [2] * 6


def test_decoding_runs_beside_the_network(predictor, files, monkeypatch):
    """The network waits, for each image, until the next image is decoded."""
    decoded = [threading.Event() for _ in files]
    read, run, number = predict.read_image, type(predictor.pipeline).__call__, itertools.count(1)

    def reading(path):
        pixels = read(path)
        decoded[files.index(path)].set()
        return pixels

    def waiting(*args):
        assert decoded[min(next(number), len(files) - 1)].wait(30)
        return run(*args)

    monkeypatch.setattr(predict, "read_image", reading)
    monkeypatch.setattr(type(predictor.pipeline), "__call__", waiting)
    assert len(predictor(files)) == len(files)


def test_a_batch_is_queued_before_the_host_waits_for_the_one_before(predictor, monkeypatch):
    log = []
    predictor._transfers = Later(log)
    images = pictures(4)
    monkeypatch.setattr(predict, "map_ahead", lambda function, items, *_: (done(function(item)) for item in items))
    results = list(predictor.stream(images))
    assert log == [
        ("queue", 0),
        ("queue", 1),
        ("wait", 0),
        ("queue", 2),
        ("wait", 1),
        ("queue", 3),
        ("wait", 2),
        ("wait", 3),
    ]
    assert [result.id_map.shape for result in results] == [image.shape[:2] for image in images]


def done(value):
    future = Future()
    future.set_result(value)
    return future


def test_a_result_does_not_wait_for_the_next_image(predictor, files, monkeypatch):
    """The host waits for the running batch, not for a file; here decoding waits for the result."""
    predictor._transfers = Later([])
    result_is_there = threading.Event()
    read = predict.read_image

    def reading(path):
        if path == files[1]:
            assert result_is_there.wait(30)
        return read(path)

    monkeypatch.setattr(predict, "read_image", reading)
    for _ in predictor.stream(files):
        result_is_there.set()


def test_one_image_is_no_iterable_of_images(predictor, files):
    for path in (files[0], str(files[0])):
        with pytest.raises(TypeError, match="images: must be an iterable of images, got one path, .*0.png"):
            next(predictor.stream(path))
    with pytest.raises(TypeError, match=r"images: must be an iterable of images, got one array of shape \(4, 5, 3\)"):
        next(predictor.outcomes(np.zeros((4, 5, 3), np.uint8)))
    for images in (None, 3):
        with pytest.raises(TypeError, match=f"images: must be an iterable of images, got {images}"):
            predictor(images)
    assert list(predictor.stream([])) == list(predictor.outcomes(())) == []


@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_images(model, files, batch_size):
    """`stream` raises the error in the order of the images; `outcomes` yields the error and continues."""
    predictor = Predictor(model, batch_size=batch_size, **SETTINGS)
    files[2].write_bytes(b"no image")
    files[4].unlink()
    stream, results = predictor.stream(files), []
    with pytest.raises(spatialflow.ImageError, match="2.png: is not an image"):
        results.extend(stream)
    assert [result.image_name for result in results] == ["0.png", "1.png"]
    outcomes = list(predictor.outcomes([*files, np.zeros((3, 3))]))
    assert [outcome.error is None for outcome in outcomes] == [True, True, False, True, False, True, False]
    assert "4.png: cannot be read" in str(outcomes[4].error) and "image 6: must be a uint8" in str(outcomes[6].error)
    for outcome, path in zip(outcomes, files, strict=False):
        if outcome.error is None:
            assert outcome.result.image_name == path.name
            np.testing.assert_array_equal(outcome.pixels, cv2.imread(str(path)))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_error_of_a_thread_has_its_traceback(model, files, monkeypatch, batch_size):
    """The error is raised in the order of the images; it is not an ImageError, which callers may skip."""
    predictor = Predictor(model, batch_size=batch_size, **SETTINGS)

    def broken_decoder(path):
        if path == files[3]:
            raise MemoryError("too large")
        return read(path)

    read, received = predict.read_image, []
    monkeypatch.setattr(predict, "read_image", broken_decoder)
    with pytest.raises(MemoryError, match="too large") as caught:
        received.extend(predictor.outcomes(files))
    assert len(received) == 3 and "in broken_decoder" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_error_of_the_iterable_comes_after_the_results_before_it(model, batch_size):
    predictor = Predictor(model, batch_size=batch_size, **SETTINGS)
    predictor._transfers = Later([])

    def images():
        yield from pictures(3)
        raise KeyError("no more frames")

    received = []
    with pytest.raises(KeyError, match="no more frames"):
        received.extend(predictor.stream(images()))
    assert len(received) == 3


@pytest.mark.parametrize("leave", ["break", "exception", "collection", "error of the network"])
def test_leaving_early_ends_the_threads(predictor, files, monkeypatch, leave):
    """The fixture checks that no thread is left."""
    if leave == "error of the network":
        monkeypatch.setattr(type(predictor.pipeline), "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(predictor.stream(files * 10))
    elif leave == "collection":
        threads = threading.active_count()
        stream = predictor.stream(files * 10)
        next(stream)
        assert threading.active_count() > threads
        del stream
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError) if leave == "exception" else contextlib.nullcontext():
            for _ in predictor.stream(files * 10):
                if leave == "break":
                    break
                raise ZeroDivisionError


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("place", ["iterable", "decoder", "image", "network"])
def test_an_error_keeps_no_image(model, monkeypatch, place, batch_size):
    """Once the caller drops the error, reference counting alone frees all images."""
    predictor, references = Predictor(model, batch_size=batch_size, **SETTINGS), []
    predictor._transfers = Later([])
    kinds = {"iterable": KeyError, "decoder": MemoryError, "image": spatialflow.ImageError, "network": ValueError}

    convert = inputs.pixels_of

    def broken(*_):
        raise kinds[place]("here")

    def images():
        for number, image in enumerate(pictures(12)):
            references.append(weakref.ref(image))
            yield image
            if place == "iterable" and number == 6:
                broken()

    if place in ("decoder", "image"):
        monkeypatch.setattr(inputs, "pixels_of", lambda source: broken() if source.position == 4 else convert(source))
    if place == "network":
        monkeypatch.setattr(type(predictor.pipeline), "__call__", broken)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(kinds[place]):
            for _ in predictor.stream(images()):
                pass
        assert len(references) > 1 and not any(reference() is not None for reference in references)
    finally:
        gc.enable()


def test_times_are_those_of_the_image(predictor, files, monkeypatch):
    read = predict.read_image
    slow = files[3]
    monkeypatch.setattr(predict, "read_image", lambda path: (path == slow and time.sleep(1.0), read(path))[1])
    times = [result.times for result in predictor.stream(files)]
    assert [list(row) for row in times] == [list(predict.STAGES)] * len(files)
    assert all(seconds > 0 for row in times for seconds in row.values())
    assert [number for number, row in enumerate(times) if row["decode"] >= 1] == [3]


def test_copies_and_forked_processes(predictor, files):
    """A copy and a forked process start their own threads."""
    expected = predictor(files)
    copied = copy.deepcopy(predictor)
    for result, wanted in zip(copied(files), expected, strict=False):
        assert_same(result, wanted)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            code = (
                0 if all((a.id_map == b.id_map).all() for a, b in zip(predictor(files), expected, strict=False)) else 2
            )
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and os.waitstatus_to_exitcode(status) == 0


class FakeCuda:
    """A replacement of torch.cuda that logs the order of the actions of streams, events and the host."""

    def __init__(self):
        self.log, self.current = [], "work"
        self.Stream = lambda device: FakeStream(self, "uploads")
        self.Event = lambda: FakeEvent(self)

    def current_stream(self, device):
        return FakeStream(self, self.current)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        self.cuda.log.append(f"event of {stream.name}")

    def synchronize(self):
        self.cuda.log.append("host waits for event")


def test_copies_of_a_gpu(monkeypatch):
    """Transfers use pinned memory, a stream for uploads and an event for downloads; results are not pinned."""
    cuda, pinned = FakeCuda(), []
    to, empty = torch.Tensor.to, torch.empty

    def logged_to(tensor, device, **options):
        assert options == {"non_blocking": True}
        cuda.log.append(f"copy on {cuda.current}")
        return to(tensor, device, copy=True)

    def logged_empty(*args, pin_memory=False, **options):
        assert pin_memory
        pinned.append(empty(*args, **options))
        return pinned[-1]

    monkeypatch.setattr(transfers.torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "to", logged_to)
    monkeypatch.setattr(torch, "empty", logged_empty)
    link = Transfers(torch.device("cpu"))
    link._is_gpu = True
    assert link.max_queued == 1
    image = picture(7, 9)[:, ::-1]
    staged = link.stage(image)
    assert staged is pinned[0]
    monkeypatch.setattr(torch, "empty", empty)
    (uploaded,) = link.upload([staged])
    np.testing.assert_array_equal(uploaded, image)
    assert cuda.log == ["copy on uploads", "work waits for uploads"]
    del cuda.log[:]
    download = link.download([uploaded, None, Outcome(uploaded, uploaded, None)])
    assert cuda.log == ["copy on work"] * 3 + ["event of work"]
    first, nothing, pair = download.wait()
    assert cuda.log[-1] == "host waits for event" and nothing is None
    assert first.data_ptr() != download.value[0].data_ptr()
    np.testing.assert_array_equal(first, image)
    np.testing.assert_array_equal(pair.pixels, image)
    assert copy.deepcopy(link)._uploads is None
