# SPDX-License-Identifier: Apache-2.0
"""Capture, replay and removal of CUDA graphs.

On the CPU a mock graph runs its function again and, like a CUDA graph, writes to the outputs of the capture.
"""

import contextlib
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.small_models import random_model

import spatialflow
from spatialflow.engine import cuda_graphs
from spatialflow.engine.cuda_graphs import WARM_UPS, GraphCache
from spatialflow.engine.predict import graph_cache
from spatialflow.engine.transfers import Download, Transfers, _map


def overwrite(target, source):
    """Copy tensors within nested lists and tuples from `source` to `target`."""
    if isinstance(target, torch.Tensor):
        target.copy_(source)
    elif target is not None:
        for old, new in zip(target, source, strict=True):
            overwrite(old, new)


class Recorder:
    """Mock of torch.cuda: streams record their waits, and graphs replay by running the function again."""

    def __init__(self):
        self.current, self.captures = self.Stream(), []

    class CUDAGraph:
        def replay(self):
            overwrite(self.output, self.function(self.inputs))

    class Stream:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, other):
            self.waited_for.append(other)

    class Event:
        def synchronize(self):
            pass

    device = stream = staticmethod(lambda _: contextlib.nullcontext())

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "other threads may use the device during a capture"
        self.captures.append((pool, stream))
        yield

    graph_pool_handle = staticmethod(object)

    def current_stream(self, device=None):
        return self.current


@pytest.fixture
def mocked_cache(monkeypatch):
    """Return a class of graph caches that use the mock of torch.cuda."""
    monkeypatch.setattr(cuda_graphs.torch, "cuda", Recorder())

    class Cache(GraphCache):
        def _capture(self, function, inputs):
            captured = super()._capture(function, inputs)
            captured.graph.function, captured.graph.inputs, captured.graph.output = (
                function,
                captured.inputs,
                captured.output,
            )
            return captured

    return Cache


@pytest.fixture
def cache(mocked_cache):
    return mocked_cache(torch.device("cpu"), limit=2)


def test_replays_read_new_values(cache):
    calls = []

    def make():
        calls.append(0)

        def function(inputs):
            calls[-1] += 1
            return inputs[0] * inputs[1]

        return function

    first = cache("a", make, [torch.tensor([1.0]), torch.tensor([2.0])])
    assert first.item() == 2 and calls == [WARM_UPS + 2]  # calls of the function: warm-ups, capture and replay
    assert cache("a", make, [torch.tensor([5.0]), torch.tensor([2.0])]) is first and first.item() == 10
    assert calls == [WARM_UPS + 3]


def test_inputs_are_not_shared(cache):
    """The graph reads a copy of its input, so the caller may change or free the tensor."""
    value = torch.tensor([1.0])
    result = cache("a", lambda: lambda inputs: -inputs[0], [value])
    value.fill_(7.0)
    assert result.item() == -1


def test_the_oldest_is_dropped(cache):
    captured = []
    for key in "aababcac":
        cache(key, lambda key=key: captured.append(key) or (lambda inputs: -inputs[0]), [torch.zeros(1)])
        assert len(cache) <= 2
    assert "".join(captured) == "abca"


def test_copies_capture_their_own(cache):
    """Graphs are valid only in their process, so copies and pickles of a Predictor omit them."""
    cache("a", lambda: lambda inputs: -inputs[0], [torch.ones(1)])
    copied = copy.deepcopy(cache)
    assert len(cache) == 1 and len(copied) == 0 and copied._pool is None
    assert copied("a", lambda: lambda inputs: 2 * inputs[0], [torch.ones(1)]).item() == 2
    assert cache("a", None, [torch.ones(1)]).item() == -1


def test_captures_share_their_memory(cache):
    """Graphs of a pool are captured on one stream, because torch reuses memory of a pool only on the same stream."""
    for key in "abcd":
        cache(key, lambda: lambda inputs: -inputs[0], [torch.ones(1)])
    captures = cuda_graphs.torch.cuda.captures
    assert len(captures) == 4
    assert len({id(pool) for pool, _ in captures}) == 1 and len({id(stream) for _, stream in captures}) == 1


def test_another_stream_waits_for_the_last_call(cache):
    """Without the wait, a replay would overwrite tensors that the first stream still reads."""
    device, first, second = cuda_graphs.torch.cuda, Recorder.Stream(), Recorder.Stream()
    for stream in (first, first, second):
        device.current = stream
        cache("a", lambda: lambda inputs: -inputs[0], [torch.ones(1)])
    assert first not in first.waited_for and second.waited_for == [first]


def out_of_memory(where):
    raise torch.OutOfMemoryError(f"out of memory in {where}")


def test_other_graphs_are_freed_when_memory_runs_out(mocked_cache):
    """If memory runs out during a capture, all other graphs are freed and the capture is repeated."""
    cache = mocked_cache(torch.device("cpu"))
    for key in "ab":
        cache(key, lambda: lambda inputs: -inputs[0], [torch.ones(1)])

    def make():
        return lambda inputs: out_of_memory("c") if len(cache) == 2 else 2 * inputs[0]

    result = cache("c", make, [torch.ones(1)])
    assert result.item() == 2 and len(cache) == 1
    captures = cuda_graphs.torch.cuda.captures
    assert captures[0][0] is captures[1][0] is not captures[2][0], "torch refuses a pool that no graph uses"


def test_a_capture_that_fails_leaves_the_next_a_new_pool(cache):
    def make():
        captures = len(cuda_graphs.torch.cuda.captures)
        return lambda inputs: out_of_memory("a") if len(cuda_graphs.torch.cuda.captures) > captures else inputs[0]

    with pytest.raises(torch.OutOfMemoryError, match="in a"):
        cache("a", make, [torch.ones(1)])
    assert len(cache) == 0
    cache("a", lambda: lambda inputs: -inputs[0], [torch.ones(1)])
    (failed, _), (pool, _) = cuda_graphs.torch.cuda.captures
    assert pool is not failed


def test_one_capture_at_a_time(mocked_cache):
    """Only one capture runs at a time over all threads and caches, because each empties the allocator's cache."""
    capture_lock, errors = threading.Lock(), []

    def make():
        def function(inputs):
            if not capture_lock.acquire(blocking=False):
                errors.append("two at once")
                return inputs[0]
            time.sleep(0.05)
            capture_lock.release()
            return -inputs[0]

        return function

    def capture(cache):
        cache._capture(make(), [torch.ones(1)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(capture, [mocked_cache(torch.device("cpu")) for _ in range(2)]))
    assert errors == []


SIZES = [
    *((40 + i, 60 + i) for i in range(34)),
    *((60 + i, 40 + i) for i in range(33)),
    *((50 + i, 50 + i) for i in range(33)),
]
SETTINGS = dict(test_short_edges=[64], test_long_edge=96, stuff_area_threshold=20, instance_score_threshold=0.0)


@pytest.fixture(scope="module")
def model():
    return random_model("tiny")


class CopyingTransfers(Transfers):
    """Mock of GPU transfers: results are copied in stream order, and the host waits for them later."""

    max_queued = 1

    def download(self, value):
        return Download(_map(torch.clone, value), Recorder.Event())


def predictors(model, mocked_cache, **options):
    """Return a predictor without graphs and one with graphs, both with the fixed shapes used on a GPU."""
    pair = [spatialflow.Predictor(model, **SETTINGS | options) for _ in range(2)]
    for predictor in pair:
        predictor.pipeline.reads_counts = False
        predictor._transfers = CopyingTransfers(predictor.device)
    pair[1].pipeline.graphs = mocked_cache(torch.device("cpu"))
    return pair


def pictures(sizes):
    return [np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def assert_same(first, second):
    np.testing.assert_array_equal(first.id_map, second.id_map)
    assert first.segments == second.segments and len(first.segments) > 0
    for name in ("boxes", "scores", "labels", "mask_logits"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_one_graph_serves_all_images_of_a_padded_size(model, mocked_cache):
    """A hundred original sizes with three padded sizes give the results of a predictor without graphs."""
    eager, graphed = predictors(model, mocked_cache)
    padded = {tuple(geometry.padded_size for geometry in eager.pipeline.geometries(size)) for size in SIZES}
    assert len(set(SIZES)) == 100 and len(padded) == 3
    images = pictures(SIZES)
    for first, second in zip(graphed.stream(images), eager.stream(images), strict=True):
        assert_same(first, second)
    assert len(graphed.pipeline.graphs) == 3


@pytest.mark.parametrize(
    "options, graphs",
    [
        (dict(test_flip=True, test_short_edges=[64, 32]), 2),
        (dict(batch_size=3), 3),
        (dict(batch_size=2, test_flip=True), 2),
    ],
    ids=str,
)
def test_graphs_of_views_and_batches(model, mocked_cache, options, graphs):
    """Four images have one padded size and six another; full and partial batches have separate graphs."""
    eager, graphed = predictors(model, mocked_cache, **options)
    images = pictures(SIZES[30:40])
    for first, second in zip(graphed(images), eager(images), strict=True):
        assert_same(first, second)
    assert len(graphed.pipeline.graphs) == graphs


def test_graphs_of_ensembles(model, mocked_cache):
    eager, graphed = predictors([model, random_model("tiny_dcn")], mocked_cache)
    for image in pictures(SIZES[:3]):
        assert_same(graphed(image), eager(image))
    assert len(graphed.pipeline.graphs) == 1


def test_threads_share_a_predictor(model, mocked_cache):
    """The replay in one thread waits until the results of the other thread are copied."""
    eager, graphed = predictors(model, mocked_cache)
    images = pictures([(40, 60), (41, 61)])
    expected = eager(images)
    graphed(images[0])
    begun = threading.Event()

    class Slow(CopyingTransfers):
        def download(self, value):
            if not begun.is_set():
                begun.set()
                time.sleep(0.5)  # time for the other thread to replay
            return super().download(value)

    graphed._transfers = Slow(graphed.device)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(graphed, images[0])
        assert begun.wait(30)
        second = pool.submit(graphed, images[1])
        assert_same(first.result(), expected[0])
        assert_same(second.result(), expected[1])


def test_autocast_is_not_captured(model, mocked_cache):
    """A graph would replay the dtypes of its capture, regardless of later autocast settings."""
    eager, graphed = predictors(model, mocked_cache)
    image = pictures([(40, 60)])[0]
    expected = eager(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(graphed(image), eager(image))
    assert len(graphed.pipeline.graphs) == 0
    assert_same(graphed(image), expected)
    assert len(graphed.pipeline.graphs) == 1


def test_checked_calls_are_not_captured(model, mocked_cache):
    """Checks read values on the host, which a capture forbids and a replay would not repeat."""
    eager, graphed = predictors(model, mocked_cache)
    image = pictures([(40, 60)])[0]
    with spatialflow.ops.checked():
        assert_same(graphed(image), eager(image))
    assert len(graphed.pipeline.graphs) == 0


SETTINGS_OF_TORCH = [
    (torch.backends.cudnn, "enabled", False),
    (torch.backends.cudnn, "benchmark", True),
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    (torch, "are_deterministic_algorithms_enabled", lambda: True),
]


@pytest.mark.parametrize("owner, name, value", SETTINGS_OF_TORCH, ids=[row[1] for row in SETTINGS_OF_TORCH])
def test_settings_of_torch_have_separate_graphs(cache, owner, name, value):
    """Settings that select kernels have separate graphs, because a replay uses the settings of its capture."""
    first, before = cache("a", lambda: lambda inputs: -inputs[0], [torch.ones(1)]), getattr(owner, name)
    assert before != value
    setattr(owner, name, value)
    try:
        assert cache("a", lambda: lambda inputs: 2 * inputs[0], [torch.ones(1)]).item() == 2
    finally:
        setattr(owner, name, before)
    assert cache("a", None, [torch.ones(1)]) is first


def test_an_upload_is_waited_for_in_its_own_stream(monkeypatch):
    """The current stream waits for the stream of this upload, even if another thread replaces `_uploads` meanwhile."""
    recorder, used, other_stream = Recorder(), [], Recorder.Stream()
    recorder.Stream = lambda device: Recorder.Stream()

    def stream(used_stream):
        used.append(used_stream)
        transfers._uploads = other_stream
        return contextlib.nullcontext()

    recorder.stream = stream
    monkeypatch.setattr(cuda_graphs.torch, "cuda", recorder)
    transfers = Transfers(torch.device("cpu"))
    transfers._is_gpu = True
    transfers.upload([torch.zeros(1)])
    assert recorder.current.waited_for == used


@pytest.mark.parametrize(
    "device, wanted, kept",
    [
        ("cuda", None, True),
        ("cuda", True, True),
        ("cuda", False, False),
        ("cpu", None, False),
        ("cpu", False, False),
    ],
)
def test_graphs_are_the_default_on_a_gpu(device, wanted, kept):
    assert (graph_cache(torch.device(device), wanted) is not None) == kept
