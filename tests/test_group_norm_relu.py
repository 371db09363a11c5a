# SPDX-License-Identifier: Apache-2.0
"""group_norm_relu: `OpMatrix`, torch's own operators, large means, non-finite values, threads, errors."""

import math

import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import DEVICE, THIN_SHAPES, assert_near
from test_threads import Called
from torch.nn import functional as F

from spatialflow import ops
from spatialflow.ops import reference

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def in_torch(input, num_groups, weight=None, bias=None, eps=1e-5, upsample=False):
    """Compute group_norm_relu by torch's own operators."""
    result = F.group_norm(input, num_groups, weight, bias, eps).relu()
    return F.interpolate(result, scale_factor=2, mode="bilinear", align_corners=True) if upsample else result


def sample(shape: tuple[int, int, int, int], num_groups: int, affine: str = "weight bias", **options):
    def tensors(size: int = 0) -> list:
        batch, channels, height, width = shape
        values = [torch.randn(batch, channels, height + size, width + 2 * size, dtype=torch.float64) * 2 + 1]
        values += [torch.randn(channels, dtype=torch.float64) for name in ("weight", "bias") if name in affine]
        return values

    names = affine.split()

    def op(function):
        def call(input, *by_channel, **options):
            return function(input, num_groups, **dict(zip(names, by_channel, strict=False)), **options)

        return call

    def raw(input, *by_channel, eps=1e-5, upsample=False):
        parameters = dict(zip(names, by_channel, strict=False))
        arguments = (input, parameters.get("weight"), parameters.get("bias"), num_groups, eps, upsample)
        return torch.ops.spatialflow.group_norm_relu, arguments

    def build() -> OpSample:
        every = tuple(range(1 + len(names)))
        # With one value per group, the gradient of the input is rounding error: see TestStatistics.
        has_single_values = math.prod(shape[1:]) == num_groups
        return OpSample(
            op=op(ops.group_norm_relu),
            reference=op(reference.group_norm_relu),
            tensors=tensors(),
            options=options,
            differentiable=every[1:] if has_single_values else every,
            converted=every,
            raw=raw,
            resized=tensors,
        )

    return build


class TestGroupNormRelu(OpMatrix):
    has_gradient = True
    samples = {
        "groups of 2": sample((2, 8, 5, 6), 4),
        "upsampled": sample((2, 8, 5, 6), 4, upsample=True),
        "odd channels, upsampled": sample((1, 21, 4, 3), 3, eps=1e-3, upsample=True),
        "one group, no weight": sample((2, 5, 3, 7), 1, "bias"),
        "groups of 1, no bias": sample((1, 19, 6, 3), 19, "weight"),
        "nothing by channel, upsampled": sample((2, 6, 3, 4), 2, "", eps=0.1, upsample=True),
    }
    linear_samples = ()
    # A large eps: with a small one, gradients of a group of two values cancel out, and only rounding error is left.
    thin_samples = {
        f"{name}{', upsampled' if upsample else ''}": sample(
            shape, min(max(shape[1], 1), 4), upsample=upsample, eps=0.1
        )
        for name, shape in THIN_SHAPES.items()
        for upsample in (False, True)
    }

    def test_second_derivatives(self, make_sample):
        """The operator is not linear, and has second derivatives."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
        weights = torch.randn_like(function(*inputs))
        products = [
            torch.func.jvp(
                torch.func.grad(lambda x, call=call: (call(x, *sample.tensors[1:], **sample.options) * weights).sum()),
                (sample.tensors[0],),
                (torch.ones_like(sample.tensors[0]).cumsum(-1),),
            )[1]
            for call in (sample.op, sample.reference)
        ]
        assert_near(*products, torch.float64, factor=10)

    def test_backward_opcheck(self, make_sample):
        """Check the raw backward operator: schema, fake kernel, layouts."""
        sample = make_sample()
        op, (input, weight, bias, num_groups, eps, upsample) = sample.raw(*sample.tensors, **sample.options)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = input.contiguous(memory_format=layout)
            output, statistics = op(x, weight, bias, num_groups, eps, upsample)
            torch.library.opcheck(
                torch.ops.spatialflow._group_norm_relu_backward,
                (torch.randn_like(output), x, statistics, weight, bias, num_groups, upsample),
                test_utils=("test_schema", "test_faketensor"),
            )

    def test_gradient_without_a_graph_is_one_operator(self, make_sample):
        """A backward pass without create_graph calls the backward kernel; one with it calls torch's operators."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        for create_graph in (False, True):
            with Called() as called:
                torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=create_graph)
            assert ("_group_norm_relu_backward" in called.names) != create_graph

    def test_batched_gradients(self, make_sample):
        """Batched gradients equal those of single rows, and the Jacobians of reverse and forward mode are equal."""
        sample = make_sample()
        function, inputs = self._bound(sample, sample.tensors)
        inputs = [t.detach().requires_grad_() for t in inputs]
        result = function(*inputs)
        rows = torch.randn(3, *result.shape, dtype=torch.float64)
        together = torch.autograd.grad(result, inputs, rows, is_grads_batched=True, retain_graph=True)
        alone = zip(*(torch.autograd.grad(result, inputs, row, retain_graph=True) for row in rows), strict=False)
        assert_near(list(together), [torch.stack(grads) for grads in alone], torch.float64)
        by_reverse, by_forward = (
            transform(function)(*(t.detach() for t in inputs)) for transform in (torch.func.jacrev, torch.func.jacfwd)
        )
        assert_near(by_reverse, by_forward, torch.float64, factor=10)


class TestAgainstTorch:
    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize(
        "shape, num_groups",
        [
            ((2, 128, 9, 11), 32),
            ((1, 256, 40, 33), 32),
            ((1, 64, 1, 700), 8),
            ((3, 130, 70, 2), 13),
            ((1, 48, 25, 42), 2),
            ((1, 3, 300, 7), 1),
        ],
    )
    def test_channels_last(self, shape, num_groups, upsample):
        """Several blocks of pixels and slices of channels, with remainders; forward and backward in float32."""
        input = torch.randn(shape).to(memory_format=torch.channels_last) * 3 - 1
        weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
        ours = [t.clone().requires_grad_() for t in (input, weight, bias)]
        theirs = [t.double().requires_grad_() for t in (input, weight, bias)]
        result = ops.group_norm_relu(ours[0], num_groups, *ours[1:], upsample=upsample)
        expected = in_torch(theirs[0], num_groups, *theirs[1:], upsample=upsample)
        assert_near(result, expected, torch.float32)
        assert result.is_contiguous(memory_format=torch.channels_last)
        incoming = torch.randn(result.shape)
        grads = torch.autograd.grad(result, ours, incoming)
        assert grads[0].is_contiguous(memory_format=torch.channels_last)
        expected_grads = torch.autograd.grad(expected, theirs, incoming.double())
        assert_near(list(grads), list(expected_grads), torch.float32, factor=4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_channels_last_in_16_bits(self, dtype):
        """Weights may have another dtype than the features; sums do not saturate in 16 bits."""
        input = (torch.randn(2, 128, 40, 50) + 30).to(dtype, memory_format=torch.channels_last).requires_grad_()
        weight, bias = torch.randn(128, requires_grad=True), torch.randn(128, dtype=dtype, requires_grad=True)
        for upsample in (False, True):
            result = ops.group_norm_relu(input, 32, weight, bias, upsample=upsample)
            doubles = [t.detach().double().requires_grad_() for t in (input, weight, bias)]
            expected = in_torch(doubles[0], 32, *doubles[1:], upsample=upsample)
            assert_near(result, expected, dtype)
            incoming = torch.randn(result.shape).to(dtype)
            grads = torch.autograd.grad(result, (input, weight, bias), incoming)
            assert [g.dtype for g in grads] == [dtype, torch.float32, dtype]
            assert_near(list(grads), list(torch.autograd.grad(expected, doubles, incoming.double())), dtype)

    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_values_that_are_not_finite(self, bad, dtype, upsample):
        """A non-finite value makes its group NaN and no other, in the result and in the gradient."""
        input = torch.randn(2, 8, 5, 70, dtype=dtype).to(memory_format=torch.channels_last)
        for place in ((0, 2, 0, 0), (1, 5, 3, 66)):
            damaged = input.clone()
            damaged[place] = bad
            tracked = damaged.requires_grad_()
            result = ops.group_norm_relu(tracked, 4, upsample=upsample)
            group = slice(place[1] // 2 * 2, place[1] // 2 * 2 + 2)
            assert result[place[0], group].isnan().all()
            assert result.isnan().sum() == result[0, :2].numel()
            grad = torch.autograd.grad(result, tracked, torch.ones_like(result))[0]
            assert grad[place[0], group].isnan().all() and grad.isnan().sum() == grad[0, :2].numel()

    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize("which", [2, 3])
    def test_parameter_that_is_not_finite(self, which, upsample):
        """A non-finite parameter changes its own channel only; NaN makes the whole channel NaN."""
        arguments = [torch.randn(1, 4, 3, 3), 2, torch.ones(4), torch.zeros(4)]
        plain = ops.group_norm_relu(*arguments, upsample=upsample)
        for bad in (NAN, INF, -INF):
            arguments[which][2] = bad
            result = ops.group_norm_relu(*arguments, upsample=upsample)
            other_channels = [0, 1, 3]
            assert torch.equal(result[:, other_channels], plain[:, other_channels])
            assert bad == bad or result[:, 2].isnan().all()

    def test_no_gradient_at_zero(self):
        """A constant group gives max(bias, 0); biases of 0 and below get no gradient, as with ReLU."""
        input = torch.ones(1, 3, 2, 2, requires_grad=True)
        bias = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
        result = ops.group_norm_relu(input, 3, None, bias)
        assert result.flatten(2).amax(2).tolist() == [[0, 1, 0]]
        assert torch.autograd.grad(result.sum(), bias)[0].tolist() == [0, 4, 0]


class TestStatistics:
    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize("mean, deviation", [(1e4, 1.0), (1e4, 0.05), (-3e6, 10.0), (0.0, 1e-4)])
    def test_large_mean(self, mean, deviation, upsample):
        """The result is as precise as with a mean of zero, although E[x^2] - mean^2 would lose all digits."""
        input = (torch.randn(1, 64, 30, 41, dtype=torch.float64) * deviation + mean).float()
        input = input.to(memory_format=torch.channels_last)
        tracked, double = input.clone().requires_grad_(), input.double().requires_grad_()
        result = ops.group_norm_relu(tracked, 16, upsample=upsample)
        expected = reference.group_norm_relu(double, 16, upsample=upsample)
        assert_near(result, expected, torch.float32)
        incoming = torch.randn_like(result)
        (grad,) = torch.autograd.grad(result, tracked, incoming)
        (expected_grad,) = torch.autograd.grad(expected, double, incoming.double())
        assert_near(grad, expected_grad, torch.float32, factor=4)

    def test_first_value_far_away(self):
        """The kernels sum differences from a value of the group; results are precise even if it is an outlier."""
        input = torch.randn(1, 16, 50, 60)
        input[:, :, 0, 0] = 1e4
        result = ops.group_norm_relu(input, 4)
        assert_near(result, reference.group_norm_relu(input.double(), 4), torch.float32)
        input[:, :, 0, 0] = 0
        assert_near(
            ops.group_norm_relu(input + 1e4, 4),
            reference.group_norm_relu((input + 1e4).double(), 4),
            torch.float32,
        )

    def test_statistics(self):
        input = torch.randn(2, 12, 7, 9, dtype=torch.float64) + 5
        _, statistics = torch.ops.spatialflow.group_norm_relu(input, None, None, 3, 0.25, False)
        groups = input.reshape(2, 3, -1)
        torch.testing.assert_close(statistics[..., 0], groups.mean(-1))
        torch.testing.assert_close(statistics[..., 1], (groups.var(-1, correction=0) + 0.25).rsqrt())

    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_lone_value_has_no_gradient(self, dtype, upsample):
        """The only value of a group is its mean: two terms of the gradient, of size weight / sqrt(eps), cancel out."""
        input = torch.randn(64, 4, 1, 1, dtype=dtype, requires_grad=True)
        weight, bias, eps = torch.rand(4, dtype=dtype) + 0.5, torch.ones(4, dtype=dtype), 1e-4
        result = ops.group_norm_relu(input, 4, weight, bias, eps, upsample)
        (gradient,) = torch.autograd.grad(result, input, torch.rand_like(result) + 1)
        largest = 1.5 / eps**0.5 * 2 * result[0, 0].numel()
        assert gradient.abs().max() <= 2 * torch.finfo(dtype).eps * largest

    @pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 8, 3, 5)])
    def test_constant_groups_give_the_bias(self, shape):
        bias = torch.tensor([0.5, -1.0] * 4)
        for upsample in (False, True):
            result = ops.group_norm_relu(torch.full(shape, 1e6), 8, None, bias, upsample=upsample)
            torch.testing.assert_close(result, bias.relu()[None, :, None, None].expand_as(result))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("upsample", [False, True])
    def test_threads(self, upsample, dtype):
        """Results and gradients are bitwise equal for any number of threads."""
        input = torch.randn(2, 40, 61, 50, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (torch.randn(40, dtype=dtype, requires_grad=True) for _ in range(2))
        threads, runs = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                result = ops.group_norm_relu(input, 8, weight, bias, upsample=upsample)
                runs.append([result, *torch.autograd.grad(result, (input, weight, bias), result.detach().cos())])
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=False))

    @pytest.mark.parametrize("upsample", [False, True])
    def test_channels_last_is_read_in_place(self, upsample):
        """Channels-last features, slices of them, and channels-last incoming gradients are not copied."""
        whole = torch.randn(1, 32, 12, 20).to(memory_format=torch.channels_last)
        for input in (whole, whole[:, :, 2:9, 3:15], whole[:, 8:24]):
            tracked = input.detach().requires_grad_()
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
                result = ops.group_norm_relu(tracked, 4, upsample=upsample)
                (grad,) = torch.autograd.grad(result, tracked, result)
            copies = [event for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
            assert not [
                event for event in copies if len(event.input_shapes[0]) == 4
            ]  # gradients of weights may be copied
            double = input.double().requires_grad_()
            expected = reference.group_norm_relu(double, 4, upsample=upsample)
            assert_near(result, expected, torch.float32)
            assert_near(grad, torch.autograd.grad(expected, double, expected)[0], torch.float32, factor=4)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((torch.zeros(4, 5, 6), 2), r"input must be \(N, C, H, W\), got shape \(4, 5, 6\)"),
            ((torch.zeros(1, 4, 2, 2).int(), 2), "input must be float32.*got int32"),
            ((torch.zeros(1, 4, 2, 2), 3), "num_groups must be positive and divide the 4 channels of input, got 3"),
            ((torch.zeros(1, 4, 2, 2), 0), "num_groups must be positive .*, got 0"),
            ((torch.zeros(1, 4, 2, 2), -2), "num_groups must be positive .*, got -2"),
            ((torch.zeros(1, 4, 2, 2), 2, torch.zeros(3)), r"weight must have shape \(4\).*got shape \(3\)"),
            ((torch.zeros(1, 4, 2, 2), 2, torch.zeros(4, 1)), r"weight must have shape \(4\).*got shape \(4, 1\)"),
            ((torch.zeros(1, 4, 2, 2), 2, torch.zeros(4).int()), "weight must be float32.*got int32"),
            ((torch.zeros(1, 4, 2, 2), 2, None, torch.zeros(5)), r"bias must have shape \(4\).*got shape \(5\)"),
            ((torch.zeros(1, 4, 2, 2), 2, None, None, -1e-5), "eps must be a finite number >= 0, got -1e-05"),
            ((torch.zeros(1, 4, 2, 2), 2, None, None, INF), "eps must be a finite number >= 0, got inf"),
            ((torch.zeros(1, 4, 2, 2), 2, None, None, NAN), "eps must be a finite number >= 0, got nan"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, arguments, message):
        with pytest.raises(RuntimeError, match=message):
            ops.group_norm_relu(*arguments)

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({0: torch.zeros(1, 4, 3, 3)}, r"grad_output must have shape \(1, 4, 6, 6\), got \(1, 4, 3, 3\)"),
            ({2: torch.zeros(1, 2, 2)}, "statistics must be float64, got float32"),
            ({2: torch.zeros(1, 3, 2).double()}, r"statistics must have shape \(1, 2, 2\), got \(1, 3, 2\)"),
            ({6: False}, r"grad_output must have shape \(1, 4, 3, 3\), got \(1, 4, 6, 6\)"),
        ],
    )
    def test_backward(self, changed, message):
        arguments = [
            torch.zeros(1, 4, 6, 6),
            torch.zeros(1, 4, 3, 3),
            torch.zeros(1, 2, 2).double(),
            None,
            None,
            2,
            True,
        ]
        torch.ops.spatialflow._group_norm_relu_backward(*arguments)
        for index, value in changed.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.spatialflow._group_norm_relu_backward(*arguments)

    def test_result_too_large(self):
        input = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**22, 2**22)
        with pytest.raises(RuntimeError, match=r"out of memory.*shape \(1, 1, 8388608, 8388608\) and dtype"):
            ops.group_norm_relu(input, 1, upsample=True)


def test_autocast_keeps_parameters():
    """Autocast casts the features only; weight and bias keep their dtype."""
    input, weight, bias = torch.randn(1, 8, 6, 7), torch.randn(8), torch.randn(8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = ops.group_norm_relu(input, 2, weight, bias)
    assert torch.equal(result, ops.group_norm_relu(input.bfloat16(), 2, weight, bias))
