# SPDX-License-Identifier: Apache-2.0
"""sigmoid_focal_loss: `OpMatrix`, known answers, large logits, labels of every kind, values of the released code."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample, to_dtype
from helpers.tensors import DEVICE, assert_near

from spatialflow import ops
from spatialflow.ops import reference

NAN, INF = float("nan"), float("inf")


def sample(shape: tuple[int, ...], **options):
    """Return a function that builds a sample; labels are random classes, background (C) and ignored rows (-1)."""
    reduced = options.get("reduction", "none") != "none"

    def tensors(size: int = 0) -> list:
        rows = (shape[0] + size, *shape[1:-1])
        return [3 * torch.randn(*rows, shape[-1], dtype=torch.float64), torch.randint(-1, shape[-1] + 1, rows)]

    def op(logits, labels, **options):
        loss = ops.sigmoid_focal_loss(logits, labels, **options)
        return loss.to(logits.dtype) if reduced else loss  # OpMatrix expects the dtype of the logits; see TestReduction

    def raw(logits, labels, gamma=2.0, alpha=0.25, reduction="none"):
        name = "_sigmoid_focal_loss_sum" if reduced else "sigmoid_focal_loss"
        return getattr(torch.ops.spatialflow, name), (logits, labels, gamma, alpha)

    def build() -> OpSample:
        return OpSample(
            op=op,
            reference=reference.sigmoid_focal_loss,
            tensors=tensors(),
            options=options,
            raw=raw,
            images=(),
            resized=tensors,
        )

    return build


class TestSigmoidFocalLoss(OpMatrix):
    has_gradient = True
    samples = {
        "elements": sample((13, 5)),
        "elements, gamma 1.5": sample((4, 3, 21), gamma=1.5, alpha=0.6),
        "elements, gamma 0, no alpha": sample((9, 4), gamma=0.0, alpha=-1.0),
        "sum": sample((13, 37), reduction="sum"),
        "mean": sample((3, 5, 6), gamma=0.5, reduction="mean"),
    }
    linear_samples = ()
    thin_samples = {
        f"{rows} rows, {classes} classes, {reduction}": sample((rows, classes), reduction=reduction)
        for rows, classes in ((1, 8), (8, 1), (1, 1), (0, 8), (8, 0))
        for reduction in ("none", "sum")
    } | {"one row of each image": sample((3, 1, 8)), "one image": sample((1, 3, 8)), "no images": sample((0, 3, 8))}

    def test_second_derivative(self, make_sample):
        """Second derivatives are correct by reverse over reverse and by forward over reverse mode.

        OpMatrix tests them for linear operators only.
        """
        sample = make_sample()
        logits, labels = sample.tensors
        logits = logits.detach().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x: sample.op(x, labels, **sample.options), logits)
        hessians = [
            torch.func.hessian(lambda x: op(x, labels, **sample.options).sum())(logits.detach())
            for op in (sample.op, sample.reference)
        ]
        assert_near(*hessians, torch.float64, factor=4)

    def test_derivative_opcheck(self, make_sample):
        sample = make_sample()
        logits, labels = sample.tensors
        reduced = sample.options.get("reduction", "none") != "none"
        factor = torch.randn(() if reduced else logits.shape, dtype=torch.float64, requires_grad=True)
        arguments = (factor, logits.detach().requires_grad_(), labels, 2.0, 0.25, 1)
        torch.library.opcheck(torch.ops.spatialflow._sigmoid_focal_loss_derivative, arguments)

    def test_layouts(self, make_sample):
        """Logits, labels and incoming gradients may have any strides."""
        sample = make_sample()
        logits, labels = sample.tensors
        plain = sample.op(logits, labels, **sample.options)
        weights = torch.randn_like(plain)
        layouts = {
            "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
            "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
            "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        }
        tracked = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(sample.op(tracked, labels, **sample.options), tracked, weights)
        for name, layout in layouts.items():
            tracked = layout(logits).requires_grad_()
            loss = sample.op(tracked, layout(labels), **sample.options)
            assert torch.equal(loss, plain), name
            (grad,) = torch.autograd.grad(loss, tracked, layout(weights) if weights.dim() else weights)
            assert torch.equal(grad, expected), name
        tracked = logits.clone().requires_grad_()
        loss = sample.op(tracked, labels, **sample.options)
        dense = torch.autograd.grad(loss, tracked, torch.ones_like(loss), retain_graph=True)
        expanded = torch.autograd.grad(loss, tracked, torch.ones((), dtype=loss.dtype).expand(loss.shape))
        assert torch.equal(dense[0], expanded[0])

    def test_autocast(self, make_sample):
        """Autocast to bfloat16 changes neither the values nor the dtype of a loss of float32 logits."""
        sample = make_sample()
        tensors = to_dtype(sample, torch.float32)
        expected = sample.op(*tensors, **sample.options)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            result = sample.op(*tensors, **sample.options)
        assert torch.equal(result, expected) and result.dtype == torch.float32


class TestValues:
    def test_known_answers(self):
        """At logit 0 every probability is one half; the loss is w * 0.25 * log 2, where w is alpha or 1 - alpha."""
        labels = torch.tensor([1, 2, -1, 5, -100])  # class 1, background, ignored, ignored, ignored
        loss = ops.sigmoid_focal_loss(torch.zeros(5, 2), labels)
        quarter = 0.25 * np.log(2)
        expected = torch.tensor([[0.75, 0.25], [0.75, 0.75], [0, 0], [0, 0], [0, 0]]) * quarter
        torch.testing.assert_close(loss, expected)
        unweighted = ops.sigmoid_focal_loss(torch.zeros(5, 2), labels, alpha=-1)
        torch.testing.assert_close(unweighted, (expected > 0) * torch.tensor(quarter).float())

    def test_gamma_zero_is_cross_entropy(self):
        logits, labels = torch.randn(50, 7) * 4, torch.randint(0, 8, (50,))
        target = (labels[:, None] == torch.arange(7)).float()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        torch.testing.assert_close(ops.sigmoid_focal_loss(logits, labels, 0.0, -1.0), expected)

    def test_large_gamma(self):
        """(1 - p) ** gamma is precise even where the target's probability p is so small that 1 - p rounds to 1."""
        logits, gamma = torch.tensor([[30.0], [46.0]], dtype=torch.float64), 1e12
        expected = [math.exp(-gamma * math.log1p(math.exp(-x))) * x for x in (30.0, 46.0)]
        for implementation in (ops, reference):
            loss = implementation.sigmoid_focal_loss(logits, torch.ones(2).long(), gamma, alpha=-1.0)
            torch.testing.assert_close(loss.view(-1).tolist(), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.7])
    def test_every_magnitude(self, gamma):
        """For logits from -80 to 80, loss and gradient are close to those in float64, relative to each value."""
        logits = torch.linspace(-80, 80, 20001).view(-1, 1)
        for label in (0, 1):
            labels = torch.full((len(logits),), label)
            tracked, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
            loss = ops.sigmoid_focal_loss(tracked, labels, gamma)
            expected = ops.sigmoid_focal_loss(double, labels, gamma)
            (grad,) = torch.autograd.grad(loss.sum(), tracked)
            (expected_grad,) = torch.autograd.grad(expected.sum(), double)
            torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-37)
            torch.testing.assert_close(grad.double(), expected_grad, rtol=3e-5, atol=1e-37)
            by_reference = reference.sigmoid_focal_loss(double, labels, gamma)
            torch.testing.assert_close(expected, by_reference, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sum_that_overflows_is_infinite(self, dtype):
        logits = torch.full((2, 1), torch.finfo(dtype).max, dtype=dtype)
        background = torch.full((2,), 1)
        assert ops.sigmoid_focal_loss(logits, background, alpha=-1.0, reduction="sum") == float("inf")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_infinite_logits(self, dtype):
        logits = torch.tensor([[INF, -INF], [-INF, INF], [1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
        labels = torch.zeros(4).long()
        loss = ops.sigmoid_focal_loss(logits, labels)
        big = float(torch.tensor(1e4, dtype=dtype))
        expected = torch.tensor([[0, 0], [INF, INF], [0, 0], [0.25 * big, 0.75 * big]], dtype=dtype)
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        expected_grad = [[0, 0], [-0.25, 0.75], [0, 0], [-0.25, 0.75]]
        torch.testing.assert_close(grad, torch.tensor(expected_grad, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_nan_is_seen_unless_ignored(self, dtype):
        logits = torch.zeros(3, 20, dtype=dtype)
        logits[0, 3] = logits[1, 4] = logits[2, :] = NAN
        logits.requires_grad_()
        labels = torch.tensor([3, 20, -1])
        loss = ops.sigmoid_focal_loss(logits, labels)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        for result in (loss, grad):
            assert result.isnan().nonzero().tolist() == [[0, 3], [1, 4]]
            assert not result[2].any()
        assert ops.sigmoid_focal_loss(logits, labels, reduction="sum").isnan()
        assert ops.sigmoid_focal_loss(logits[2:], labels[2:], reduction="sum") == 0

    def test_checked(self):
        logits, labels = torch.zeros(3, 4), torch.tensor([-1, 4, 0])
        with ops.checked():
            ops.sigmoid_focal_loss(logits, labels)
            with pytest.raises(ValueError, match=r"labels must be in \[-1, 4\], got 5 at index \(1,\)"):
                ops.sigmoid_focal_loss(logits, torch.tensor([0, 5, 0]))
            logits[2, 1] = INF
            with pytest.raises(ValueError, match=r"logits must be finite, got inf at index \(2, 1\)"):
                ops.sigmoid_focal_loss(logits, labels)


class TestReduction:
    @pytest.mark.parametrize("shape", [(700, 80), (5000, 1), (3, 5000), (2, 9, 40, 3)])
    def test_sum_and_mean_of_elements(self, shape):
        """The shapes need several blocks, with several rows per block or several blocks per row, and remainders."""
        logits, labels = torch.randn(shape), torch.randint(-1, shape[-1] + 1, shape[:-1])
        elements = ops.sigmoid_focal_loss(logits, labels)
        assert_near(elements, reference.sigmoid_focal_loss(logits.double(), labels), torch.float32)
        total = ops.sigmoid_focal_loss(logits, labels, reduction="sum")
        torch.testing.assert_close(total.double(), elements.double().sum(), rtol=1e-5, atol=0)
        mean = ops.sigmoid_focal_loss(logits, labels, reduction="mean")
        torch.testing.assert_close(mean.double(), elements.double().mean(), rtol=1e-5, atol=0)

    def test_sum_does_not_depend_on_threads(self):
        logits, labels = torch.randn(20000, 20), torch.randint(0, 21, (20000,))
        threads = torch.get_num_threads()
        try:
            sums = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                sums.append(ops.sigmoid_focal_loss(logits, labels, reduction="sum"))
        finally:
            torch.set_num_threads(threads)
        assert sums[0] == sums[1] == sums[2]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sum_of_halves_does_not_overflow(self, dtype):
        logits = torch.full((4000, 10), 20.0, dtype=dtype, requires_grad=True)
        total = ops.sigmoid_focal_loss(logits, torch.full((4000,), 10), reduction="sum")
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, torch.tensor(0.75 * 20 * 40000.0), rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(total / 4, logits)
        assert grad.dtype == dtype and torch.allclose(grad, torch.tensor(0.1875, dtype=dtype), rtol=1e-2)

    def test_empties(self):
        for shape in ((0, 5), (4, 0), (0, 0)):
            logits = torch.zeros(shape, requires_grad=True)
            labels = torch.zeros(shape[:1]).long()
            assert ops.sigmoid_focal_loss(logits, labels).shape == shape
            total = ops.sigmoid_focal_loss(logits, labels, reduction="sum")
            assert total == 0 and torch.autograd.grad(total, logits)[0].shape == shape
            assert ops.sigmoid_focal_loss(logits, labels, reduction="mean").isnan()

    def test_one_row_without_a_batch(self):
        loss = ops.sigmoid_focal_loss(torch.zeros(3), torch.tensor(1, dtype=torch.int32), 0.0, -1.0)
        torch.testing.assert_close(loss, torch.full((3,), np.log(2)).float())


class TestErrors:
    @pytest.mark.parametrize(
        "logits, labels, options, message",
        [
            (
                torch.zeros(3, 4),
                torch.zeros(4).long(),
                {},
                r"labels must have the shape of logits without.*shape \(4\) for.*\(3, 4\)",
            ),
            (
                torch.zeros(3, 4),
                torch.zeros(3, 4).long(),
                {},
                r"targets must be floating-point, got int64; use labels.to\(l",
            ),
            (torch.zeros(()), torch.zeros(()).long(), {}, r"logits must have shape \(..., C\), got shape \(\)"),
            (torch.zeros(3, 4).int(), torch.zeros(3).long(), {}, "logits must be float32.*got int32"),
            (torch.zeros(3, 4), torch.zeros(3), {}, "labels must be int64 or int32, got float32"),
            (torch.zeros(3, 4), torch.zeros(3).long(), {"gamma": -1.0}, "gamma must be a finite number >= 0, got -1"),
            (torch.zeros(3, 4), torch.zeros(3).long(), {"gamma": INF}, "gamma must be a finite number >= 0, got inf"),
            (torch.zeros(3, 4), torch.zeros(3).long(), {"alpha": 1.5}, "alpha must be a number <= 1.*got 1.5"),
            (torch.zeros(3, 4), torch.zeros(3).long(), {"alpha": NAN}, "alpha must be a number <= 1.*got nan"),
            (torch.zeros(3, 4), torch.zeros(3).long(), {"reduction": "max"}, "reduction must be .* got 'max'"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, logits, labels, options, message):
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.sigmoid_focal_loss(logits, labels, **options)

    def test_third_derivative_is_refused(self):
        logits = torch.randn(3, 4, requires_grad=True)
        loss = ops.sigmoid_focal_loss(logits, torch.zeros(3).long(), reduction="sum")
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="derivatives beyond the second are not supported, got order 3"):
            torch.autograd.grad(second.sum(), logits)


class TestGoldens:
    """Values of the released code (background label C, weight 0 = ignored), except for rows with logits beyond 17."""

    def test_released(self, goldens):
        arrays = {name: torch.as_tensor(a) for name, a in np.load(goldens / "ops" / "losses.npz").items()}
        facts = json.loads((goldens / "ops" / "losses.json").read_text())["focal_without_rows_0_1"]
        logits = arrays["focal_x"][2:].requires_grad_()
        labels, weights = arrays["focal_target"][2:], arrays["focal_w"][2:]
        assert set(weights.tolist()) == {0.0, 1.0}
        assert_near(ops.sigmoid_focal_loss(logits, labels), arrays["focal_elementwise"][2:], torch.float32)
        labels = torch.where(weights > 0, labels, -1)
        loss = ops.sigmoid_focal_loss(logits, labels, reduction="sum") / facts["avg_factor"]
        assert_near(loss, torch.tensor(facts["value"]), torch.float32)
        (grad,) = torch.autograd.grad(loss, logits)
        assert_near(grad, arrays["focal_grad"][2:], torch.float32)
