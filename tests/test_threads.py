# SPDX-License-Identifier: Apache-2.0
"""Operators and their gradients in eight Python threads, and scoring in eight workers, give the results of one.

`make sanitize-threads` runs this file with libraries compiled with ThreadSanitizer, which ends the process at a data
race of two threads (docs/sanitizers.md).
"""

import importlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample, to_dtype
from helpers.scenes import write_coco
from helpers.tensors import leaves, map_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spatialflow import ops
from spatialflow.panoptic import evaluate, read_id_map, write_id_map

THREADS = 8
TESTS = Path(__file__).resolve().parent


class Call:
    """The sample of an operator in one dtype: `call(call.tensors)` returns results and gradients."""

    def __init__(self, name: str, sample: OpSample, dtype: torch.dtype) -> None:
        self.name = name
        self._sample = sample
        self.tensors = to_dtype(sample, dtype)

    def __call__(self, tensors: list) -> list[Tensor]:
        tracked = [
            map_tensors(lambda t: t.detach().requires_grad_(), value) if index in self._sample.differentiable else value
            for index, value in enumerate(tensors)
        ]
        outputs = leaves(self._sample.op(*tracked, **self._sample.options))
        inputs = [leaf for index in self._sample.differentiable for leaf in leaves(tracked[index])]
        if not inputs:
            return outputs
        return outputs + list(torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs]))


def packed_subnets() -> OpSample:
    """Return sub-networks whose weights are packed once, as in a `Predictor`, without gradients."""
    conv = (torch.randn(32, 32, 3, 3) * 0.1, torch.randn(32))
    parameters = ops.SubnetParameters(cls=(conv, conv), reg=(conv,), flow_cls=(conv,), segmentation_levels=1)
    parameters = ops.pack_subnets(parameters)

    def run(*levels: Tensor) -> list[Tensor]:
        return leaves(ops.fused_subnets(levels, parameters)) + leaves(ops.flow_conv2d(levels, None, parameters.cls[0]))

    return OpSample(run, run, [torch.randn(2, 32, size, size + 3) for size in (33, 17)], differentiable=())


def large_batched_nms() -> OpSample:
    corner = torch.rand(33000, 2) * 2000
    tensors = [torch.cat([corner, corner + 9], 1), torch.rand(33000), torch.randint(9, (33000,))]
    return OpSample(ops.batched_nms, ops.batched_nms, tensors, {"iou_threshold": 0.5}, (), ())


def large_multiclass_nms() -> OpSample:
    corner = torch.rand(6600, 2) * 500
    tensors = [torch.cat([corner, corner + 9], 1), torch.rand(6600, 80)]
    options = {"score_threshold": 0.999, "iou_threshold": 0.5, "max_detections": 50}
    return OpSample(ops.multiclass_nms, ops.multiclass_nms, tensors, options, (), ())


def large_candidates() -> OpSample:
    def run(logits: Tensor, deltas: Tensor) -> list[Tensor]:
        base, valid = torch.tensor([-4.0, -4, 4, 4]).expand(1, 3, 4), torch.tensor([[300, 400]])
        return list(ops.select_candidates([logits], [deltas], base, [8], valid, torch.ones(1, 2), 1000))

    channels_last = [torch.randn(1, 40, 50, c).permute(0, 3, 1, 2) for c in (3 * 80, 3 * 4)]
    return OpSample(run, run, channels_last, {}, (), (0, 1))


def large_focal_loss() -> OpSample:
    def run(logits: Tensor, labels: Tensor) -> list[Tensor]:
        return [ops.sigmoid_focal_loss(logits, labels, 2.0, 0.25, reduction=how) for how in ("none", "sum")]

    return OpSample(run, run, [torch.randn(1300, 40), torch.randint(41, (1300,))])


def large_norm(upsample: bool) -> Callable[[], OpSample]:
    def make() -> OpSample:
        def run(input: Tensor, *by_channel: Tensor) -> Tensor:
            return ops.group_norm_relu(input, 4, *by_channel, upsample=upsample)

        input = torch.randn(2, 32, 41, 42).to(memory_format=torch.channels_last)
        return OpSample(run, run, [input, torch.randn(32), torch.randn(32)], {}, (0, 1, 2), (0, 1, 2))

    return make


def large_images() -> OpSample:
    def run(*images: Tensor) -> Tensor:
        return ops.preprocess_images(images, [(301, 402)] * 2, (1, 2, 3), (4, 5, 6), 32)

    return OpSample(run, run, list(torch.randint(256, (2, 200, 267, 3), dtype=torch.uint8)), {}, (), ())


def large_convolution(channels: int) -> Callable[[], OpSample]:
    def make() -> OpSample:
        tensors = [torch.randn(2, channels, 41, 42), torch.randn(2, channels, 41, 42)]
        tensors += [torch.randn(channels, channels, 3, 3), torch.randn(channels)]
        return OpSample(ops.flow_conv2d, ops.flow_conv2d, tensors, {}, (0, 1, 2, 3), (0, 1, 2, 3))

    return make


def large_group() -> OpSample:
    def run(*maps: Tensor) -> list[Tensor]:
        weights = [ops.pack_conv3x3(torch.ones(outputs, 32, 3, 3), torch.ones(outputs)) for outputs in (32, 9)]
        return ops.flow_conv2d(list(maps), None, weights)

    return OpSample(run, run, [torch.randn(2, 32, 41, 42), torch.randn(1, 32, 20, 21)], {}, (), (0, 1))


def packed_deformable() -> OpSample:
    def run(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        conv = ops.pack_deform_conv2d(torch.ones(24, 32, 3, 3), torch.ones(24))
        return ops.deform_conv2d(x, offset, conv, padding=1, mask=mask, mask_sigmoid=True, relu=True)

    tensors = [torch.randn(2, channels, 21, 22) for channels in (32, 18, 9)]
    return OpSample(run, run, tensors, {}, (), (0, 1, 2))


# Unlike the samples of the operators' tests, these are so large that an operator splits one call over threads.
LARGE = {
    "packed sub-networks": packed_subnets,
    "batched_nms": large_batched_nms,
    "multiclass_nms": large_multiclass_nms,
    "select_candidates": large_candidates,
    "group_norm_relu": large_norm(False),
    "group_norm_relu, upsampled": large_norm(True),
    "sigmoid_focal_loss": large_focal_loss,
    "preprocess_images": large_images,
    "direct convolution": large_convolution(16),
    "Winograd convolution": large_convolution(32),
    "several convolutions": large_group,
    "packed deformable convolution": packed_deformable,
}


def matrices() -> Iterator[tuple[str, type[OpMatrix]]]:
    """Yield every `OpMatrix` of the test files, with the name of the file."""
    for path in sorted(TESTS.glob("test_*.py")):
        if re.search(r"^class \w+\(OpMatrix\)", path.read_text(), re.MULTILINE):
            for value in vars(importlib.import_module(path.stem)).values():
                if isinstance(value, type) and issubclass(value, OpMatrix) and value is not OpMatrix:
                    yield path.stem, value


def calls() -> Iterator[Call]:
    """Yield calls of every sample of the operators' tests, in two dtypes, and the large calls."""
    for file, matrix in matrices():
        for (name, sample), dtype in itertools.product(matrix.samples.items(), (torch.float32, torch.bfloat16)):
            yield Call(f"{file}, {name}, {dtype}", sample(), dtype)
    for name, sample in LARGE.items():
        yield Call(f"large, {name}", sample(), torch.float32)


class Called(TorchDispatchMode):
    """Names of this package's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "spatialflow":
            self.names.add(function._schema.name.removeprefix("spatialflow::"))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def expected() -> list[tuple[Call, list[Tensor]]]:
    """Return all calls with their results in a single thread."""
    torch.manual_seed(0)
    with Called() as called:
        results = [(call, call(call.tensors)) for call in calls()]
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("spatialflow::").split(".")[0] for name in registered if name.startswith("spatialflow::")}
    assert called.names == ours
    return results


def in_threads(work: Callable[[int], None]) -> None:
    """Run work(0) ... work(7) at once; raise an error of any of them."""
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, thread) for thread in range(THREADS)]:
            done.result()


def assert_same(call: Call, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for index, (value, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert torch.allclose(value, wanted, rtol=0, atol=0, equal_nan=True), f"{call.name}: result {index} differs"


def test_one_operator_on_shared_tensors(expected):
    """All threads call the same operator on the same tensors at the same time."""
    barrier = threading.Barrier(THREADS, timeout=600)

    def work(_: int) -> None:
        try:
            for call, single_thread in expected:
                barrier.wait()
                assert_same(call, call(call.tensors), single_thread)
        except BaseException:
            barrier.abort()  # otherwise the other threads wait for this thread
            raise

    in_threads(work)


def test_different_operators_on_their_own_tensors(expected):
    """Every thread starts with a different operator and uses copies of the tensors."""
    barrier = threading.Barrier(THREADS, timeout=600)
    copies = [[map_tensors(torch.clone, call.tensors) for call, _ in expected] for _ in range(THREADS)]

    def work(thread: int) -> None:
        barrier.wait()
        for index in range(len(expected)):
            index = (index + thread * len(expected) // THREADS) % len(expected)
            call, single_thread = expected[index]
            assert_same(call, call(copies[thread][index]), single_thread)

    in_threads(work)


def test_scoring_with_eight_workers(tmp_path):
    """Two simultaneous evaluations with eight workers each equal an evaluation with one worker."""
    folder = write_coco(tmp_path, count=12)
    truth = json.loads((folder / "panoptic.json").read_text())
    prediction = {"annotations": []}
    (tmp_path / "prediction").mkdir()
    for annotation in truth["annotations"]:
        ids = read_id_map(folder / "panoptic" / annotation["file_name"])
        ids[: len(ids) // 3] = ids[0, 0]  # make the prediction imperfect
        write_id_map(tmp_path / "prediction" / annotation["file_name"], ids)
        visible = [s for s in annotation["segments_info"] if (ids == s["id"]).any()]
        segments = [{"id": s["id"], "category_id": s["category_id"]} for s in visible]
        prediction["annotations"].append(annotation | {"segments_info": segments})

    def score(workers: int) -> dict:
        return evaluate(truth, folder / "panoptic", prediction, tmp_path / "prediction", workers=workers)

    single_worker = score(1)
    assert 0 < single_worker["All"]["pq"] < 1
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(score, (THREADS, THREADS))) == [single_worker, single_worker]
