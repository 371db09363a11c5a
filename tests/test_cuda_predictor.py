# SPDX-License-Identifier: Apache-2.0
"""Predictor on a GPU: maps equal those of the CPU, replays equal eager runs, and only the last copy synchronizes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.small_models import random_model
from helpers.tensors import DEVICE

import spatialflow

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU and SPATIALFLOW_BACKEND=cuda")

OPTIONS = dict(test_short_edges=[96], test_long_edge=160, stuff_area_threshold=40, instance_score_threshold=0.3)


@pytest.fixture(autouse=True)
def tensors_on_the_cpu():
    """Set the default device to the CPU, so that only the predictor moves tensors to the GPU."""
    with torch.device("cpu"):
        yield


@pytest.fixture(autouse=True)
def deterministic_convolutions(monkeypatch):
    """Select deterministic cuDNN algorithms; those with atomic additions differ between runs in the last bits."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(params=["tiny", "tiny_dcn"])
def model(request):
    return random_model(request.param)


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((90, 130), (130, 90), (90, 130), (45, 65))]


def assert_same(first, second, share=1.0):
    assert first.id_map.shape == second.id_map.shape and (first.id_map == second.id_map).mean() >= share
    if share == 1.0:
        assert first.segments == second.segments
        for name in ("boxes", "scores", "labels", "mask_logits"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_maps_are_those_of_the_cpu(model):
    on_cpu, on_gpu = (spatialflow.Predictor(model, device, **OPTIONS) for device in ("cpu", "cuda"))
    for first, second in zip(on_gpu(pictures()), on_cpu(pictures())):
        assert_same(first, second, share=0.98)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_graphs_replay_what_runs_eagerly(model, dtype):
    """Results are equal for alternating sizes, whose graphs share memory, and for new images of a captured size."""
    eager = spatialflow.Predictor(model, "cuda", dtype, cuda_graph=False, **OPTIONS)
    graphed = spatialflow.Predictor(model, "cuda", dtype, **OPTIONS)
    assert eager.pipeline.graphs is None and graphed.pipeline.graphs is not None
    for _ in range(3):
        for first, second in zip(graphed(pictures()), eager(pictures())):
            assert_same(first, second)


@pytest.mark.parametrize(
    "models, options",
    [
        (["tiny"], dict(optimize=False)),
        (["tiny", "tiny_dcn"], {}),
        (["tiny"], dict(test_flip=True, test_short_edges=[96, 64])),
    ],
    ids=["plain modules", "ensemble", "augmentation"],
)
def test_graphs_of_other_forms(models, options):
    models = [random_model(name) for name in models]
    eager, graphed = (spatialflow.Predictor(models, "cuda", cuda_graph=g, **OPTIONS | options) for g in (False, None))
    for _ in range(2):
        for first, second in zip(graphed(pictures()), eager(pictures())):
            assert_same(first, second)


def test_threads_share_a_predictor(model):
    """Every prediction runs in its own stream, and graphs are captured while another thread predicts."""
    eager, graphed = (spatialflow.Predictor(model, "cuda", cuda_graph=g, **OPTIONS) for g in (False, None))
    images = many_pictures(24)
    expected = eager(images)

    def predict(image):
        with torch.cuda.stream(torch.cuda.Stream()):
            return graphed(image)

    with ThreadPoolExecutor(4) as pool:
        for first, second in zip(pool.map(predict, images), expected, strict=True):
            assert_same(first, second)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_nothing_waits(model, cuda_graph):
    """A prediction passes torch's sync debug mode, which raises at operations that synchronize."""
    predictor = spatialflow.Predictor(model, "cuda", torch.bfloat16, cuda_graph=cuda_graph, **OPTIONS)
    expected = predictor(pictures())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
        results = predictor(pictures())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(results, expected):
        assert_same(first, second)


def many_pictures(count):
    """Generate images of three padded sizes."""
    rng, shapes = np.random.default_rng(1), ((90, 130), (130, 90), (80, 80))
    sizes = [(shapes[i % 3][0] + i // 3, shapes[i % 3][1] + i // 3) for i in range(count)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_streams_give_what_single_images_give(model, cuda_graph, batch_size):
    """Results are right if batches overlap, uploads use a separate stream, and pinned memory is reused.

    Graphs are captured while other threads allocate pinned memory.
    """
    eager = spatialflow.Predictor(model, "cuda", cuda_graph=False, batch_size=batch_size, **OPTIONS)
    predictor = spatialflow.Predictor(model, "cuda", cuda_graph=cuda_graph, batch_size=batch_size, **OPTIONS)
    images = many_pictures(30)
    results = list(predictor.stream(image for image in images))
    for first, second in zip(results, eager(images), strict=True):
        assert_same(first, second)
    for result, image in zip(results, images):
        assert_same(result, eager(image), share=1.0 if batch_size == 1 else 0.98)
    if cuda_graph:
        assert len(predictor.pipeline.graphs) == (3 if batch_size == 1 else 6)  # a size's last batch has one image


def test_results_are_in_memory_that_is_not_pinned(model):
    """A caller may keep thousands of results, so they must not be in pinned memory."""
    for result in spatialflow.Predictor(model, "cuda", **OPTIONS).stream(pictures()):
        for array in (result.id_map, result.boxes, result.scores, result.mask_logits):
            assert not torch.from_numpy(array).is_pinned()


def test_streams_in_a_stream_of_the_caller(model):
    predictor = spatialflow.Predictor(model, "cuda", **OPTIONS)
    expected = predictor(pictures())
    with torch.cuda.stream(torch.cuda.Stream()):
        results = list(predictor.stream(pictures()))
    for first, second in zip(results, expected, strict=True):
        assert_same(first, second)
