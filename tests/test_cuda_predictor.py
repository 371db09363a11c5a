# SPDX-License-Identifier: Apache-2.0
"""The predictor on a GPU: the CPU's maps, replays equal to eager runs, and no wait but the last."""

import numpy as np
import pytest
import torch
from op_matrix import DEVICE
from test_optimize import random_model

import spatialflow

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="asks for a GPU: SPATIALFLOW_BACKEND=cuda")

OPTIONS = dict(test_short_edges=[96], test_long_edge=160, stuff_area_threshold=40, instance_score_threshold=0.3)


@pytest.fixture(autouse=True)
def tensors_on_the_cpu():
    """As for a user: nothing is on the GPU but what the predictor puts there."""
    with torch.device("cpu"):
        yield


@pytest.fixture(autouse=True)
def deterministic_convolutions(monkeypatch):
    """cuDNN's algorithms that add by atomics would make two runs differ in their last bits."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(params=["tiny", "tiny_dcn"])
def model(request):
    return random_model(request.param)


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((90, 130), (130, 90), (90, 130), (45, 65))]


def assert_same(one, other, share=1.0):
    assert one.id_map.shape == other.id_map.shape and (one.id_map == other.id_map).mean() >= share
    if share == 1.0:
        assert one.segments == other.segments
        for name in ("boxes", "scores", "labels", "mask_logits"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_maps_are_those_of_the_cpu(model):
    on_cpu, on_gpu = (spatialflow.Predictor(model, device, **OPTIONS) for device in ("cpu", "cuda"))
    for one, other in zip(on_gpu(pictures()), on_cpu(pictures())):
        assert_same(one, other, share=0.98)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_graphs_replay_what_runs_eagerly(model, dtype):
    """Also when sizes alternate, so that the graphs share their memory, and for new pixels of a captured size."""
    eager = spatialflow.Predictor(model, "cuda", dtype, **OPTIONS)
    graphed = spatialflow.Predictor(model, "cuda", dtype, cuda_graph=True, **OPTIONS)
    for _ in range(3):
        for one, other in zip(graphed(pictures()), eager(pictures())):
            assert_same(one, other)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_nothing_waits(model, cuda_graph):
    """Under torch's sync debug mode, which raises where an operation would wait for the device."""
    predictor = spatialflow.Predictor(model, "cuda", torch.bfloat16, cuda_graph=cuda_graph, **OPTIONS)
    expected = predictor(pictures())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
        results = predictor(pictures())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(results, expected):
        assert_same(one, other)
