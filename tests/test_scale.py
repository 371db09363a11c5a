# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements, and a hundred runs with bitwise equal results.

Both need a GPU (SPATIALFLOW_BACKEND=cuda). On other back ends the same code is tested with tensors of about 2^18
elements or fewer, and three runs.
"""

import pytest
import torch
from helpers.tensors import DEVICE

from spatialflow import ops

ON_GPU = DEVICE == "cuda"
BEYOND = 2**31 + 2**20 if ON_GPU else 2**18
"""Minimum number of elements of a large tensor."""

RUNS = 100 if ON_GPU else 3


@pytest.fixture(autouse=True)
def release():
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def rows_of(elements_per_row: int) -> int:
    return -(-BEYOND // elements_per_row)


def features(channels: int, width: int = 64) -> torch.Tensor:
    """Return (1, channels, H, width) bfloat16 features, channels-last, with at least BEYOND elements."""
    height = rows_of(channels * width)
    storage = torch.randn(1, height, width, channels, dtype=torch.bfloat16)
    return storage.permute(0, 3, 1, 2)


class TestBeyond31Bits:
    """Results for elements beyond index 2^31 equal those for a small tensor, or are known."""

    def test_roi_align(self):
        image = features(16)
        height = image.shape[2]
        # Samples have a distance of one cell, so that they are exact in float32.
        far = torch.tensor([[0.0, 4, height - 30, 32, height - 2]])
        near = far - torch.tensor([0, 0, height - 40, 0, height - 40])
        result = ops.roi_align(image, far, 7, aligned=True)
        torch.testing.assert_close(result, ops.roi_align(image[:, :, -40:], near, 7, aligned=True), rtol=0, atol=0)

    def test_deform_conv2d(self):
        image = features(32)
        height, width = image.shape[2:]
        # Multiples of 1/8: the spacing of float32 beyond 2^20 rows.
        offset = torch.randint(-16, 17, (1, 18, height, width), dtype=torch.int8).bfloat16() / 8
        weight = torch.randn(16, 32, 3, 3, dtype=torch.bfloat16) / 17
        result = ops.deform_conv2d(image, offset, weight, padding=1)[:, :, -8:]
        expected = ops.deform_conv2d(image[:, :, -40:], offset[:, :, -40:], weight, padding=1)[:, :, -8:]
        torch.testing.assert_close(result, expected)

    def test_flow_conv2d(self):
        image = features(64)
        weight = torch.randn(32, 64, 3, 3, dtype=torch.bfloat16) / 24
        result = ops.flow_conv2d(image, None, weight, algorithm="direct")[:, :, -8:]
        expected = ops.flow_conv2d(image[:, :, -40:], None, weight, algorithm="direct")[:, :, -8:]
        torch.testing.assert_close(result, expected)

    def test_sigmoid_focal_loss(self):
        logits = torch.randn(rows_of(80), 80, dtype=torch.bfloat16)
        labels = torch.randint(-1, 81, (len(logits),))
        result = ops.sigmoid_focal_loss(logits, labels, 2.0, 0.25, reduction="none")[-64:]
        torch.testing.assert_close(
            result, ops.sigmoid_focal_loss(logits[-64:], labels[-64:], 2.0, 0.25, reduction="none")
        )

    def test_multiclass_nms(self):
        scores = torch.zeros(1, rows_of(80), 80, dtype=torch.bfloat16)
        boxes = torch.tensor([10.0, 10, 20, 20]).expand(1, scores.shape[1], 4)
        scores[0, -5, 7], scores[0, -3, 79], scores[0, 2, 7] = 0.5, 0.75, 0.25
        result = ops.multiclass_nms(boxes, scores, 0.05, 0.5, 4)
        last = scores.shape[1]
        assert result.indices[0].tolist() == [last - 3, last - 5, -1, -1] and result.labels[0].tolist() == [
            79,
            7,
            -1,
            -1,
        ]

    def test_select_candidates(self):
        logits = features(16)
        height = logits.shape[2]
        deltas = torch.zeros(1, 4, height, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        logits[0, 7, -2, 5], logits[0, 15, -1, 63] = 30, 40
        base, valid = torch.tensor([[[0.0, 0, 1, 1]]]), torch.tensor([[height, 64]])
        result = ops.select_candidates([logits], [deltas], base, [1], valid, torch.ones(1, 2), 2)
        rows = torch.tensor([[63.0, height - 1, 64, height], [5, height - 2, 6, height - 1]])
        assert torch.equal(result.boxes[0], rows) and result.scores[0].argmax(1).tolist() == [15, 7]

    def test_paste_masks_and_panoptic_merge(self):
        side = 4096 if ON_GPU else 32
        count = rows_of(side * side)
        logits, boxes = torch.randn(count, 14, 14), torch.rand(count, 4) * side / 2
        boxes[:, 2:] += side / 2
        masks = ops.paste_masks(logits, boxes, (side, side))
        assert torch.equal(masks[-1:], ops.paste_masks(logits[-1:], boxes[-1:], (side, side)))
        scores = torch.zeros(count)
        scores[-1] = 0.9
        stuff = torch.full((side, side), 255, dtype=torch.uint8)
        merged = ops.panoptic_merge(masks, scores, torch.arange(count), None, stuff, 0)
        assert int(merged.count) == 1 and int(merged.instances[0]) == count - 1
        assert torch.equal(merged.id_map.bool(), masks[-1])

    def test_preprocess_images(self):
        height = rows_of(3 * 4096) if ON_GPU else 64
        image = torch.randint(0, 256, (height, 4096 if ON_GPU else 48, 3), dtype=torch.uint8)
        size = image.shape[:2]
        result = ops.preprocess_images(image, size, (0, 0, 0), (1, 1, 1), dtype=torch.float16)[
            0, :, : size[0], : size[1]
        ]
        assert torch.equal(result[:, -32:], image[-32:].flip(2).permute(2, 0, 1).half())

    @pytest.mark.parametrize("classes_last", [False, True])
    def test_stuff_labels(self, classes_last):
        shape = (64, 64, rows_of(64 * 64)) if classes_last else (rows_of(64 * 64), 64, 64)
        logits = torch.zeros(shape, dtype=torch.bfloat16)
        logits = logits.permute(2, 0, 1) if classes_last else logits
        logits[-1, 32:] = 1
        labels = ops.stuff_labels(logits, (256, 256), (16, 16))
        assert (labels[:8] == 0).all() and (labels[8:] == len(logits) - 1).all()


def pyramid(channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.randn(1, channels, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for size in ((40, 56), (20, 28), (10, 14))
    ]


def boxes_within(height: int, width: int, count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.7
    return torch.cat([corner, corner + 4 + torch.rand(count, 2) * torch.tensor([width, height]) * 0.3], dim=1)


def with_index(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)


def repeated_cases(dtype: torch.dtype) -> dict:
    """Return, by name, a function and its tensors that need a gradient."""
    feature, offset = pyramid(32, dtype)[1], torch.randn(1, 18, 20, 28)
    weight, bias = torch.randn(32, 32, 3, 3, dtype=dtype) / 17, torch.randn(32, dtype=dtype)
    levels, rois = pyramid(32, dtype), with_index(boxes_within(320, 448, 64))
    boxes, scores = boxes_within(320, 448, 600), torch.rand(600, 8)
    logits, labels = torch.randn(500, 80, dtype=dtype), torch.randint(-1, 81, (500,))
    mask_logits, stuff = torch.randn(20, 28, 28, dtype=dtype), torch.randint(0, 9, (320, 448))
    stuff_logits = torch.randn(9, 80, 112, dtype=dtype)
    base = torch.tensor([-16.0, -16, 16, 16]).expand(3, 4, 4)
    valid, scale = torch.tensor([[313, 442]]), torch.ones(1, 2)
    class_logits, deltas = [level[:, :20] for level in levels], [level[:, :16] for level in levels]

    def candidates():
        return list(ops.select_candidates(class_logits, deltas, base, (8, 16, 32), valid, scale, 300))

    def merge():
        masks = ops.paste_masks(mask_logits, boxes[:20], (320, 448))
        instances = masks, scores[:20, 0], labels[:20], boxes[:20]
        return list(ops.panoptic_merge(*instances, stuff, 9, stuff_area_threshold=50))

    return {
        "roi_align": (lambda f: ops.roi_align(f, rois, 7, 1 / 16), [feature]),
        "multilevel_roi_align": (lambda *f: ops.multilevel_roi_align(f, rois, 7, (8, 16, 32)), levels),
        "nms": (lambda: ops.nms(boxes, scores[:, 0], 0.5), []),
        "multiclass_nms": (lambda: list(ops.multiclass_nms(boxes, scores, 0.05, 0.5, 100)), []),
        "select_candidates": (candidates, []),
        "deform_conv2d": (lambda *t: ops.deform_conv2d(*t, padding=1), [feature, offset, weight, bias]),
        "flow_conv2d": (lambda x, flow, *w: ops.flow_conv2d(x, flow, *w), [feature, feature * 0.5, weight, bias]),
        "group_norm_relu": (lambda x, *b: ops.group_norm_relu(x, 8, None, *b, upsample=True), [feature, bias]),
        "sigmoid_focal_loss": (lambda x: ops.sigmoid_focal_loss(x, labels, 2.0, 0.25, reduction="sum"), [logits]),
        "paste_masks and panoptic_merge": (merge, []),
        "stuff_labels": (lambda: ops.stuff_labels(stuff_logits, (313, 442), (320, 448)), []),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", repeated_cases(torch.float32))
def test_runs_agree_to_the_last_bit(name, dtype):
    """Results are bitwise equal, and so are gradients under use_deterministic_algorithms."""
    function, tensors = repeated_cases(dtype)[name]
    inputs = [t.detach().requires_grad_() for t in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        first = None
        for run in range(RUNS):
            result = function(*inputs)
            outputs = list(result) if isinstance(result, (list, tuple)) else [result]
            if inputs:
                grads = [torch.ones_like(output) for output in outputs]
                outputs = outputs + list(torch.autograd.grad(outputs, inputs, grads))
            first = first or outputs
            assert all(torch.equal(a, b) for a, b in zip(outputs, first, strict=False)), f"run {run} differs from run 0"
    finally:
        torch.use_deterministic_algorithms(False)
