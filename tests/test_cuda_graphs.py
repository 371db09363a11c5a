# SPDX-License-Identifier: Apache-2.0
"""Which graphs are captured, replayed and dropped. Recorded on the CPU: a graph that runs its function again stands in
for CUDA's, and like it writes into the outputs of the capture."""

import contextlib
import copy

import pytest
import torch

from spatialflow.engine import cuda_graphs
from spatialflow.engine.cuda_graphs import WARM_UPS, GraphCache


class Recorder:
    """Stands in for torch.cuda: no streams, and graphs that replay by running again."""

    class CUDAGraph:
        def replay(self):
            self.output.copy_(self.function(self.inputs))

    class Stream:
        def wait_stream(self, other):
            pass

    device = stream = staticmethod(lambda _: contextlib.nullcontext())
    graph = staticmethod(lambda graph, pool, stream: contextlib.nullcontext())
    graph_pool_handle = staticmethod(object)

    def current_stream(self):
        return self.Stream()


@pytest.fixture
def cache(monkeypatch):
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

    return Cache(torch.device("cpu"), limit=2)


def test_replays_read_new_values(cache):
    made = []

    def make():
        made.append(0)

        def function(inputs):
            made[-1] += 1
            return inputs[0] * inputs[1]

        return function

    first = cache("a", make, [torch.tensor([1.0]), torch.tensor([2.0])])
    assert first.item() == 2 and made == [WARM_UPS + 2]  # warm-ups, the capture, the replay
    assert cache("a", make, [torch.tensor([5.0]), torch.tensor([2.0])]) is first and first.item() == 10
    assert made == [WARM_UPS + 3]


def test_inputs_are_not_shared(cache):
    """The graph reads a buffer of its own, so a value on the device may be changed or freed by its owner."""
    value = torch.tensor([1.0])
    result = cache("a", lambda: lambda inputs: -inputs[0], [value])
    value.fill_(7.0)
    assert result.item() == -1


def test_the_oldest_is_dropped(cache):
    made = []
    for key in "aababcac":
        cache(key, lambda: made.append(key) or (lambda inputs: -inputs[0]), [torch.zeros(1)])
        assert len(cache) <= 2
    assert "".join(made) == "abca"


def test_copies_capture_their_own(cache):
    """Graphs belong to a process: a copy or a pickle of a Predictor leaves them out."""
    cache("a", lambda: lambda inputs: -inputs[0], [torch.ones(1)])
    other = copy.deepcopy(cache)
    assert len(cache) == 1 and len(other) == 0 and other._pool is None
    assert other("a", lambda: lambda inputs: 2 * inputs[0], [torch.ones(1)]).item() == 2
    assert cache("a", None, [torch.ones(1)]).item() == -1
