# SPDX-License-Identifier: Apache-2.0
"""stuff_labels: `OpMatrix`, the steps of torch and OpenCV, ties, degenerate sizes and bad values."""

import cv2
import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample, assert_unchanged_by_autocast, to_dtype

from spatialflow import ops
from spatialflow.ops import reference
from spatialflow.ops.reference.stuff_labels import enlarged_logits, taps

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

LAYOUTS = {
    "classes last": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "columns first": lambda t: t.mT.contiguous().mT,
    "every second class": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "every second cell": lambda t: torch.stack([t, t], -1)[..., 0],
    "part of more classes, last": lambda t: torch.stack([*t, t[0]], -1).permute(2, 0, 1)[: len(t)],
    "one image of a batch": lambda t: torch.stack([t, t]).contiguous(memory_format=torch.channels_last)[1],
}


def sample(shape: tuple[int, int, int], valid_size: tuple[int, int], original_size: tuple[int, int]):
    classes, height, width = shape

    def tensors(extra: int = 0) -> list:
        return [torch.randn(classes + extra, height + extra, width + 2 * extra, dtype=torch.float64)]

    def raw(logits, valid_size, original_size):
        return torch.ops.spatialflow.stuff_labels, (logits, *valid_size, *original_size)

    def build() -> OpSample:
        return OpSample(
            op=ops.stuff_labels,
            reference=reference.stuff_labels,
            tensors=tensors(),
            options={"valid_size": valid_size, "original_size": original_size},
            differentiable=(),
            images=(),
            raw=raw,
            resized=tensors,
        )

    return build


class TestStuffLabels(OpMatrix):
    has_gradient = False
    samples = {
        "smaller": sample((54, 12, 17), (45, 66), (29, 40)),
        "larger, odd classes": sample((7, 9, 8), (36, 32), (50, 141)),
        "much smaller": sample((12, 20, 90), (77, 360), (9, 11)),
        "labels of more than a byte": sample((300, 4, 5), (15, 18), (16, 20)),
    }
    thin_samples = {
        f"{classes} x {height} x {width}": sample((classes, height, width), (4 * height, 4 * width), (20, 30))
        for classes, height, width in ((1, 5, 6), (8, 1, 6), (8, 5, 1), (8, 1, 1), (1, 1, 1))
    } | {"one row": sample((8, 5, 6), (20, 24), (1, 30)), "one column": sample((8, 5, 6), (20, 24), (30, 1))}

    def test_reference(self, make_sample, dtype):
        """Labels equal those in float64; where they differ, both classes have equal logits up to rounding."""
        sample = make_sample()
        (logits,) = to_dtype(sample, dtype)
        labels, upsampled = sample.op(logits, **sample.options), enlarged_logits(logits.double(), **sample.options)
        expected = upsampled.argmax(dim=0)
        assert labels.dtype == (torch.uint8 if len(logits) <= 256 else torch.int64)
        chosen = upsampled.gather(0, labels.long()[None])[0]
        assert (labels != expected).float().mean() < 1e-2
        assert (chosen >= upsampled.amax(dim=0) - 4e-6).all()

    def test_autocast(self, make_sample):
        """Autocast changes nothing."""
        assert_unchanged_by_autocast(make_sample())

    def test_layouts(self, make_sample, dtype):
        sample = make_sample()
        (logits,) = to_dtype(sample, dtype)
        plain = sample.op(logits, **sample.options)
        assert plain.is_contiguous() and plain.shape == sample.options["original_size"]
        for name, layout in LAYOUTS.items():
            strided = layout(logits)
            assert not strided.is_contiguous(), name
            assert torch.equal(sample.op(strided, **sample.options), plain), name

    def test_every_rounding_is_that_of_the_reference(self, make_sample):
        """With few distinct values, ties and near ties occur at every pixel, so rounding must be equal."""
        sample = make_sample()
        for dtype in (torch.float32, torch.float64):
            logits = torch.randint(-3, 4, sample.tensors[0].shape).to(dtype) / 3
            labels = sample.op(logits, **sample.options)
            assert torch.equal(labels, sample.reference(logits, **sample.options))


def chain(logits: torch.Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Compute labels as the released code: upsample all logits, argmax, crop, OpenCV's nearest-neighbor resizing."""
    enlarged = torch.nn.functional.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=True)
    labels = enlarged[0].argmax(dim=0)[: valid_size[0], : valid_size[1]].cpu().numpy().astype(np.uint8)
    return cv2.resize(labels, original_size[::-1], interpolation=cv2.INTER_NEAREST)


def test_equal_to_the_released_steps():
    """Random logits at random sizes: enlarged, unchanged and reduced."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        classes, h, w = (int(n) for n in rng.integers(1, 30, 3))
        valid = int(rng.integers(1, 4 * h + 1)), int(rng.integers(1, 4 * w + 1))
        original = tuple(int(n) for n in rng.integers(1, 150, 2))
        logits = torch.randn(classes, h, w, dtype=torch.float64)
        np.testing.assert_array_equal(
            ops.stuff_labels(logits, valid, original).cpu().numpy(),
            chain(logits, valid, original),
            err_msg=f"{classes} x {h} x {w}, {valid} to {original}",
        )


class TestHandMade:
    def test_regions(self):
        """Four quadrants of one class each; their borders are where two logits are equal."""
        logits = torch.full((5, 4, 4), -1.0)
        for c, (rows, columns) in enumerate(
            [
                (slice(0, 2), slice(0, 2)),
                (slice(0, 2), slice(2, 4)),
                (slice(2, 4), slice(0, 2)),
                (slice(2, 4), slice(2, 4)),
            ]
        ):
            logits[c + 1, rows, columns] = 1.0
        labels = ops.stuff_labels(logits, (16, 16), (16, 16))
        upper, lower = torch.tensor([1] * 8 + [2] * 8), torch.tensor([3] * 8 + [4] * 8)
        assert torch.equal(labels.long(), torch.stack([upper] * 8 + [lower] * 8))
        assert torch.equal(ops.stuff_labels(logits, (8, 8), (3, 2)).long(), torch.ones(3, 2).long())

    def test_ties_go_to_the_lower_class(self):
        logits = torch.zeros(9, 3, 3)
        assert not ops.stuff_labels(logits, (12, 12), (30, 30)).any()
        logits[4:7] = 2.5
        assert (ops.stuff_labels(logits, (12, 12), (30, 30)) == 4).all()

    @pytest.mark.parametrize("classes", [256, 257])
    def test_last_class(self, classes):
        """255, the largest label in uint8, and 256, which needs int64."""
        logits = torch.zeros(classes, 2, 3)
        logits[-1] = 1.0
        labels = ops.stuff_labels(logits, (8, 12), (5, 5))
        assert labels.dtype == (torch.uint8 if classes == 256 else torch.int64) and (labels == classes - 1).all()

    def test_cells_beyond_the_valid_part_do_not_matter(self):
        """A pixel depends only on the cells around it, so padding has no effect."""
        logits = torch.randn(6, 10, 10)
        expected = ops.stuff_labels(logits, (20, 22), (40, 33))
        logits[:, 6:], logits[:, :, 6:] = float("nan"), float("nan")
        assert torch.equal(ops.stuff_labels(logits, (20, 22), (40, 33)), expected)

    @pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 7), (3, 7, 1), (1, 5, 5)])
    def test_single_cells_and_classes(self, shape):
        logits = torch.randn(shape, dtype=torch.float64)
        for size in ((1, 1), (4 * shape[1], 4 * shape[2]), (37, 5)):
            valid = (min(3, 4 * shape[1]), 4 * shape[2])
            labels = ops.stuff_labels(logits, valid, size).cpu().numpy()
            np.testing.assert_array_equal(labels, chain(logits, valid, size))

    def test_few_pixels_of_many_cells(self):
        """The pixels are so far from each other that hardly any two share cells."""
        logits = torch.randn(5, 3, 1500)
        for width in (1, 2, 7, 33):
            labels = ops.stuff_labels(logits, (12, 6000), (4, width))
            assert torch.equal(labels, reference.stuff_labels(logits, (12, 6000), (4, width)))

    def test_many_pixels(self):
        """A row of several blocks on a GPU."""
        logits = torch.randn(3, 2, 5)
        labels = ops.stuff_labels(logits, (7, 20), (2, 1001))
        assert torch.equal(labels, reference.stuff_labels(logits, (7, 20), (2, 1001)))

    def test_threads_do_not_matter(self):
        logits, before = torch.randn(20, 30, 31), torch.get_num_threads()
        expected = reference.stuff_labels(logits, (118, 120), (97, 101))
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                assert torch.equal(ops.stuff_labels(logits, (118, 120), (97, 101)), expected)
        finally:
            torch.set_num_threads(before)


class TestBadValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
    def test_bad_logit_loses_around_its_cell(self, dtype, bad):
        logits = torch.zeros(3, 6, 6, dtype=dtype)
        logits[2] = 1.0
        logits[2, 3, 3] = bad
        labels = ops.stuff_labels(logits, (24, 24), (24, 24))
        first = [tap.tolist() for tap in taps(6, 24, 24, logits)[:2]]
        touched = torch.tensor([3 in pair for pair in zip(*first, strict=False)])
        expected = torch.where(touched[:, None] & touched, 0, 2)
        assert touched.any() and not touched.all() and torch.equal(labels.long(), expected)
        with ops.checked(), pytest.raises(ValueError, match=r"stuff_labels: logits must be finite.*\(2, 3, 3\)"):
            ops.stuff_labels(logits, (24, 24), (24, 24))

    def test_infinite_logit(self):
        """A cell of plus infinity wins between it and the cells before; behind it, the interpolation gives NaN."""
        logits = torch.zeros(2, 4, 4)
        logits[0, 1, 1] = float("inf")
        logits[1] = 1.0
        expected = torch.ones(16, 16, dtype=torch.uint8)
        expected[1:5, 1:5] = 0
        assert torch.equal(ops.stuff_labels(logits, (16, 16), (16, 16)), expected)
        assert torch.equal(reference.stuff_labels(logits, (16, 16), (16, 16)).to(torch.uint8), expected)

    @pytest.mark.parametrize("bad", [float("nan"), -float("inf"), float("inf")])
    def test_no_class_left(self, bad):
        assert not ops.stuff_labels(torch.full((4, 3, 3), bad), (12, 12), (7, 50)).any()


class TestShapes:
    @pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
    @pytest.mark.parametrize("classes", [1, 300])
    def test_empties(self, size, classes):
        labels = ops.stuff_labels(torch.zeros(classes, 2, 2), (8, 8), size)
        assert labels.shape == size and labels.dtype == (torch.uint8 if classes == 1 else torch.int64)
        assert reference.stuff_labels(torch.zeros(classes, 2, 2), (8, 8), size).shape == size

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.zeros(1, 2, 2, 2), (2, 2), (2, 2)), r"logits must be \(C, h, w\), got shape \(1, 2, 2, 2\)"),
            ((torch.zeros(2, 2, 2).int(), (2, 2), (2, 2)), "logits must be float32.*got int32"),
            ((torch.zeros(0, 2, 2), (2, 2), (2, 2)), r"logits must have from 1 to .* classes, got .*\(0, 2, 2\)"),
            ((torch.zeros(1, 1, 1).expand(2**31, 1, 1), (2, 2), (2, 2)), "logits must have from 1 to 2147483647 "),
            ((torch.zeros(1, 1, 1).expand(1, 1, 2**22 + 1), (2, 2), (2, 2)), "logits must have sides up to 4194304"),
            ((torch.zeros(1, 2, 3), (9, 2), (2, 2)), r"valid_size must lie between .* \(8, 12\), got \(9, 2\)"),
            ((torch.zeros(1, 2, 3), (2, 13), (2, 2)), r"valid_size must lie between .* \(8, 12\), got \(2, 13\)"),
            ((torch.zeros(1, 2, 3), (0, 2), (2, 2)), r"valid_size must lie between \(1, 1\) .*, got \(0, 2\)"),
            ((torch.zeros(1, 0, 3), (1, 1), (2, 2)), r"valid_size must lie between .* \(0, 12\), got \(1, 1\)"),
            ((torch.zeros(1, 2, 3), (2, -(2**62)), (2, 2)), "valid_size must lie between"),
            ((torch.zeros(1, 2, 3), (2, 2), (2, -1)), r"original_size must not be negative, got \(2, -1\)"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, arguments, message):
        with pytest.raises(RuntimeError, match="stuff_labels: " + message):
            ops.stuff_labels(*arguments)
