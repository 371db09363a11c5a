# SPDX-License-Identifier: Apache-2.0
"""Tests of deform_conv2d: `OpMatrix`, the goldens, and values that break other implementations."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import THIN_SHAPES, assert_near
from torch.nn import functional as F

from spatialflow import ops
from spatialflow.ops import reference


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def take_by_position(function):
    """Wrap `function` to take (input, offset, weight, bias, mask) first; bias and mask may be None."""

    def call(input, offset, weight, bias, mask, **options):
        return function(input, offset, weight, bias, mask=mask, **options)

    return call


def off_grid(tensor: torch.Tensor) -> torch.Tensor:
    """Move fractions into [0.15, 0.85], so that finite differences do not cross whole coordinates."""
    return tensor.floor() + 0.15 + 0.7 * (tensor - tensor.floor())


def sample(
    channels: int,
    outputs: int,
    kernel=3,
    groups: int = 1,
    offset_groups: int = 1,
    masked: bool = True,
    bias: bool = True,
    batch: int = 2,
    size=(6, 7),
    **options,
):
    kernel = pair(kernel)
    stride = pair(options.get("stride", 1))
    padding = pair(options.get("padding", 0))
    dilation = pair(options.get("dilation", 1))

    def tensors(height: int = size[0], width: int = size[1]) -> list:
        size = (height, width)
        out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
        samples = offset_groups * kernel[0] * kernel[1]
        double = torch.float64
        return [
            torch.randn(batch, channels, *size, dtype=double),
            off_grid(1.5 * torch.randn(batch, 2 * samples, *out, dtype=double)),
            torch.randn(outputs, channels // groups, *kernel, dtype=double),
            torch.randn(outputs, dtype=double) if bias else None,
            torch.rand(batch, samples, *out, dtype=double) if masked else None,
        ]

    def raw(input, offset, weight, bias, mask, **_):
        arguments = (input, offset, weight, bias, mask, None, *stride, *padding, *dilation, 0)
        return torch.ops.spatialflow.deform_conv2d, arguments

    def build() -> OpSample:
        present = tuple(index for index, tensor in enumerate(tensors()) if tensor is not None)
        return OpSample(
            op=take_by_position(ops.deform_conv2d),
            reference=take_by_position(reference.deform_conv2d),
            tensors=tensors(),
            options=options,
            differentiable=present,
            converted=(0, 2, 3),
            raw=raw,
            images=(0, 1, 2, 4),
            # Sizes differ from the numbers of channels and taps, because torch.compile gives equal sizes one symbol.
            resized=lambda extra: tensors(19 + extra, 29 + 2 * extra),
        )

    return build


class TestDeformConv2d(OpMatrix):
    has_gradient = True
    samples = {
        "v2": sample(5, 3, padding=1),
        "v1 without bias": sample(4, 3, kernel=(2, 3), masked=False, bias=False),
        "groups": sample(6, 4, groups=2, offset_groups=3, padding=1, stride=2),
        "wide": sample(35, 37, kernel=1, stride=(1, 2)),
        "dilated 1 x 3": sample(4, 4, kernel=(1, 3), groups=4, offset_groups=2, padding=(0, 2), dilation=(1, 2)),
    }
    linear_samples = tuple(samples)
    # Inputs without rows or columns have an output because of padding; the last two have one output row or column.
    thin_samples = {
        name: sample(channels, 5, batch=batch, size=(height, width), padding=1 if height and width else 2)
        for name, (batch, channels, height, width) in THIN_SHAPES.items()
    } | {
        "one output channel": sample(8, 1, kernel=1),
        "no output channels": sample(8, 0, kernel=1),
        "one output row": sample(8, 8, kernel=(5, 1), size=(5, 6)),
        "one output column": sample(16, 16, kernel=(1, 5), size=(6, 5), groups=2, offset_groups=2),
    }


def inputs(dtype=torch.float32, masked=True, requires_grad=False):
    """Return input, offset, weight, bias and mask of a 3 x 3 convolution of a 4-channel 6 x 7 image, padding 1."""
    tensors = [
        torch.randn(1, 4, 6, 7, dtype=dtype),
        torch.randn(1, 18, 6, 7, dtype=dtype),
        torch.randn(3, 4, 3, 3, dtype=dtype),
        torch.randn(3, dtype=dtype),
        torch.rand(1, 9, 6, 7, dtype=dtype) if masked else None,
    ]
    if requires_grad:
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_()
    return tensors


def convolve(input, offset, weight, bias, mask, op=ops.deform_conv2d):
    return op(input, offset, weight, bias, padding=1, mask=mask)


class TestValues:
    """Samples with a huge offset, or a non-finite offset or mask, are zero and have no gradient.

    Under `checked`, non-finite offsets and masks raise an error.
    """

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which, masked", [("offset", True), ("offset", False), ("mask", True)])
    def test_not_finite_samples_nothing(self, which, value, masked):
        tensors = inputs(masked=masked)
        altered = [None if t is None else t.clone() for t in tensors]
        # Tap 4 of output cell (2, 3) is changed by a coordinate of its offset or by its mask.
        altered[1 if which == "offset" else 4][0, 9 if which == "offset" else 4, 2, 3] = value
        # The result must equal that of a tap far outside the map, whose mask has no gradient either.
        outside = [None if t is None else t.clone() for t in tensors]
        outside[1][0, 8, 2, 3] = 1e6
        results = []
        for case in (altered, outside):
            leaves = [None if t is None else t.requires_grad_() for t in case]
            out = convolve(*leaves)
            present = [t for t in leaves if t is not None]
            with deterministic():
                results.append([out, *torch.autograd.grad(out, present, torch.ones_like(out))])
        for first, second in zip(*results, strict=False):
            assert torch.isfinite(first).all()
            assert torch.equal(first, second)
        out, _grad_input, grad_offset, *_ = results[0]
        assert not grad_offset[0, 8:10, 2, 3].any()
        if masked:
            assert results[0][-1][0, 4, 2, 3] == 0
        assert not torch.equal(out, convolve(*tensors)), "the altered tap contributed before"

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])  # 1e300 is infinite in float32
    def test_tangent_of_a_mask_that_is_not_finite(self, value):
        """Forward mode and second derivatives ignore a non-finite mask too."""
        tensors = [t.float() for t in inputs()]
        mask = tensors[4].double()
        mask[0, 4, 2, 3] = value

        def loss(input, weight, mask):
            return convolve(input, tensors[1], weight, tensors[3], mask).square().sum()

        functions = {
            "result": lambda mask: convolve(*tensors[:4], mask),
            "gradient of the input": lambda mask: torch.func.grad(loss)(tensors[0], tensors[2], mask),
            "gradient of the weight": lambda mask: torch.func.grad(loss, 1)(tensors[0], tensors[2], mask),
        }
        finite_tangent = torch.randn_like(mask)
        without = finite_tangent.clone()
        without[0, 4, 2, 3] = 0
        for name, function in functions.items():
            with_tap, without_tap = (
                torch.func.jvp(function, (mask,), (tangent,))[1] for tangent in (finite_tangent, without)
            )
            assert_near([with_tap], [without_tap], torch.float32, what=name)
        _, pullback = torch.func.vjp(lambda weight: torch.func.grad(loss, 2)(tensors[0], weight, mask), tensors[2])
        assert_near(list(pullback(finite_tangent)), list(pullback(without)), torch.float32)

    def test_tangent_where_mask_and_feature_are_not_finite(self):
        """A sample with a non-finite mask is zero, so its tangent is zero as well, not 0 * NaN."""
        altered, ones = torch.full((1, 1, 2, 2), float("nan")), torch.ones(1, 1, 2, 2)
        offset, weight = torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 1, 1)
        out, tangent = torch.func.jvp(lambda m: ops.deform_conv2d(altered, offset, weight, mask=m), (altered,), (ones,))
        assert not out.any() and not tangent.any()

    @pytest.mark.parametrize("value", [1e3, 1e9, 3e38, -3e38])
    def test_huge_offset_reads_nothing(self, value):
        input, offset, weight, bias, mask = inputs(requires_grad=True)
        out = convolve(input, torch.full_like(offset, value).requires_grad_(), weight, bias, mask)
        assert torch.equal(out, bias[:, None, None].expand_as(out))
        grads = torch.autograd.grad(out.sum(), (input, weight, mask))
        assert not any(grad.any() for grad in grads)

    def test_borders_fade(self):
        """A sample fades to zero over one cell beyond the border, at -1 and at the size of the map."""
        input, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
        offset = torch.zeros(1, 2, 4, 4)
        offset[0, 0, 0] = torch.tensor([-1.0, -0.75, -0.25, 0.0])
        offset[0, 0, 3] = torch.tensor([1.0, 0.75, 0.25, 0.0])
        out = ops.deform_conv2d(input, offset, weight)
        faded = torch.tensor([0.0, 0.25, 0.75, 1.0])
        assert torch.equal(out[0, 0, 0], faded) and torch.equal(out[0, 0, 3], faded)

    def test_gradient_at_kink_is_from_above(self):
        """At whole coordinates the gradient w.r.t. the offset is the one-sided difference to the next cell."""
        input = torch.arange(16.0).view(1, 1, 4, 4) ** 2
        offset = torch.zeros(1, 2, 4, 4, requires_grad=True)
        out = ops.deform_conv2d(input, offset, torch.ones(1, 1, 1, 1))
        (grad,) = torch.autograd.grad(out.sum(), offset)
        padded = F.pad(input, (0, 1, 0, 1))[0, 0]
        assert torch.equal(grad[0, 0], padded[1:, :4] - padded[:4, :4])
        assert torch.equal(grad[0, 1], padded[:4, 1:] - padded[:4, :4])

    @pytest.mark.parametrize("name", ["offset", "mask"])
    def test_checked(self, name):
        tensors = inputs()
        tensors[1 if name == "offset" else 4][0, 2, 3, 1] = float("nan")
        with ops.checked(), pytest.raises(ValueError, match=f"deform_conv2d: {name} must be finite, got nan at index"):
            convolve(*tensors)
        with ops.checked():
            convolve(*inputs())

    def test_without_offset_it_is_a_convolution(self):
        input, offset, weight, bias, mask = inputs(torch.float64)
        out = convolve(input, torch.zeros_like(offset), weight, bias, torch.ones_like(mask))
        assert_near(out, F.conv2d(input, weight, bias, padding=1), torch.float64)

    def test_half_features_keep_offset_precision(self):
        """Sampling positions are not rounded to float16, which cannot represent positions beyond 2048 exactly."""
        input = torch.arange(4096.0).remainder(64).view(1, 1, 1, 4096)
        offset = torch.full((1, 2, 1, 4096), 0.25)
        offset[:, 0] = 0
        weight = torch.ones(1, 1, 1, 1)
        expected = ops.deform_conv2d(input, offset, weight)
        half = ops.deform_conv2d(input.half(), offset, weight.half())
        assert half.dtype == torch.float16
        assert_near(half, expected, torch.float16)

    def test_gradients_keep_their_dtypes(self):
        input, offset, weight, bias, mask = inputs(requires_grad=True)
        half = [t.detach().bfloat16().requires_grad_() for t in (input, weight, bias)]
        out = convolve(half[0], offset, half[1], half[2], mask)
        grads = torch.autograd.grad(out.sum(), (half[0], offset, half[1], half[2], mask))
        assert [g.dtype for g in grads] == [
            torch.bfloat16,
            torch.float32,
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
        ]


def gradients(out, leaves, grad_output):
    """Return gradients of all leaves, then that of the input by the deterministic kernel."""
    grads = torch.autograd.grad(out, leaves, grad_output, retain_graph=True)
    with deterministic():
        return [*grads, *torch.autograd.grad(out, leaves[0], grad_output)]


class TestSizes:
    """Sizes that leave partial blocks, slices and vectors in the kernels."""

    @pytest.mark.parametrize(
        "channels, outputs, groups, offset_groups",
        [(64, 64, 1, 1), (96, 40, 1, 2), (80, 48, 2, 5), (130, 33, 1, 1), (300, 7, 1, 3), (64, 64, 16, 1)],
    )
    def test_many_channels(self, channels, outputs, groups, offset_groups):
        tensors = [
            torch.randn(2, channels, 13, 17),
            off_grid(2 * torch.randn(2, 18 * offset_groups, 13, 17, dtype=torch.float64)).float(),
            torch.randn(outputs, channels // groups, 3, 3),
            torch.randn(outputs),
            torch.rand(2, 9 * offset_groups, 13, 17),
        ]
        outs, grads = [], []
        for op, dtype in ((ops.deform_conv2d, torch.float32), (reference.deform_conv2d, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            outs.append(convolve(*leaves, op=op))
            grads.append(gradients(outs[-1], leaves, outs[-1].detach()))
        assert_near(outs[0], outs[1], torch.float32)
        assert_near(grads[0], grads[1], torch.float32, factor=4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        "channels, outputs, groups, offset_groups",
        [
            (48, 40, 1, 1),
            (64, 96, 1, 4),
            (40, 264, 1, 1),
            (176, 160, 2, 1),
            (128, 136, 1, 1),
            (328, 24, 1, 1),
            (64, 72, 1, 1),
            (128, 264, 1, 2),
        ],
    )
    def test_many_half_channels(self, dtype, channels, outputs, groups, offset_groups):
        """Cover full vectors of 16-bit types and tiles of every width."""
        tensors = [
            torch.randn(2, channels, 5, 7, dtype=dtype),
            off_grid(torch.randn(2, 18 * offset_groups, 5, 7)),
            torch.randn(outputs, channels // groups, 3, 3, dtype=dtype),
            torch.randn(outputs, dtype=dtype),
            torch.rand(2, 9 * offset_groups, 5, 7),
        ]
        outs, grads = [], []
        for op, convert in ((ops.deform_conv2d, lambda t: t), (reference.deform_conv2d, torch.Tensor.double)):
            leaves = [convert(t).requires_grad_() for t in tensors]
            outs.append(convolve(*leaves, op=op))
            grads.append(gradients(outs[-1], leaves, convert(outs[0].detach())))
        assert_near(outs[0], outs[1], dtype)
        assert_near(grads[0], grads[1], dtype, factor=4)

    @pytest.mark.parametrize("channels, outputs, kernel", [(72, 136, 1), (64, 104, 1), (128, 136, 2)])
    def test_many_pixels(self, channels, outputs, kernel):
        """Cover the largest tiles, and strips of rows of which the last is partial."""
        taps = kernel * kernel
        tensors = [
            torch.randn(2, channels, 77 + kernel, 82 + kernel, dtype=torch.float16),
            off_grid(2 * torch.randn(2, 2 * taps, 78, 83)),
            torch.randn(outputs, channels, kernel, kernel, dtype=torch.float16),
            torch.randn(outputs, dtype=torch.float16),
            torch.rand(2, taps, 78, 83),
        ]
        input, offset, weight, bias, mask = tensors
        out = ops.deform_conv2d(input, offset, weight, bias, mask=mask)
        expected = reference.deform_conv2d(*(t.double() for t in tensors[:4]), mask=mask.double())
        assert_near(out, expected, torch.float16)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_sums_are_kept_in_float32(self, dtype):
        """Sums of 4608 ones over channels and taps, pixels, or outputs are right; 16 bits would stop at 2048 or 256."""

        def ones(*size):
            return torch.ones(size, dtype=dtype, requires_grad=True)

        out = ops.deform_conv2d(ones(1, 512, 3, 3), torch.zeros(1, 18, 1, 1), ones(8, 512, 3, 3))
        assert torch.equal(out, torch.full_like(out, 4608))
        weight = ones(8, 8, 1, 1)
        out = ops.deform_conv2d(ones(1, 8, 48, 96), torch.zeros(1, 2, 48, 96), weight)
        (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
        assert torch.equal(grad, torch.full_like(grad, 4608))
        input, offset = ones(1, 8, 1, 1), torch.zeros(1, 2, 1, 1, requires_grad=True)
        out = ops.deform_conv2d(input, offset, ones(4608, 8, 1, 1))
        grad_input, grad_offset = torch.autograd.grad(out, (input, offset), torch.ones_like(out))
        assert torch.equal(grad_input, torch.full_like(grad_input, 4608))
        assert torch.equal(grad_offset, torch.full_like(grad_offset, -8 * 4608))

    def test_readers_of_a_cell_are_added_in_order(self):
        """With deterministic algorithms the gradients of a cell that every pixel reads are added in a fixed order."""
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
        input = torch.randn(1, 1, 16, 20, requires_grad=True)
        places = torch.stack([3 - rows, 4 - columns])[None]
        out = ops.deform_conv2d(input, places, torch.ones(1, 1, 1, 1), algorithm="direct")
        grad_output = torch.randn_like(out)
        with deterministic():
            (grad,) = torch.autograd.grad(out, input, grad_output)
        expected = torch.zeros_like(input)
        expected[0, 0, 3, 4] = float(np.cumsum(grad_output.cpu().numpy().ravel())[-1])
        assert torch.equal(grad, expected)

    def test_threads_do_not_change_the_result(self):
        tensors = inputs()
        thread_count = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(convolve(*tensors))
        finally:
            torch.set_num_threads(thread_count)
        assert torch.equal(*results)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_empties(self, layout):
        input, offset, weight, bias, mask = inputs(requires_grad=True)
        no_images = input.detach()[:0].contiguous(memory_format=layout).requires_grad_()
        out = convolve(no_images, offset[:0], weight, bias, mask[:0])
        assert out.shape == (0, 3, 6, 7)
        grads = torch.autograd.grad(out.sum(), (no_images, weight, bias))
        assert grads[0].shape == no_images.shape and not any(grad.any() for grad in grads)
        no_channels = convolve(input.detach()[:, :0], offset, weight[:, :0], bias, mask)
        assert torch.equal(no_channels, bias[:, None, None].expand(1, 3, 6, 7))
        assert not any(grad.any() for grad in torch.autograd.grad(no_channels.sum(), (offset, mask)))
        assert convolve(input, offset, weight[:0], bias[:0], mask).shape == (1, 0, 6, 7)
        flat = ops.deform_conv2d(input.detach()[:, :, :0], offset[:, :, :2], weight, bias, padding=(2, 1))
        assert torch.equal(flat, bias[:, None, None].expand(1, 3, 2, 7))

    def test_module(self):
        input, offset, weight, bias, mask = inputs()
        module = ops.DeformConv2d(4, 3, 3, padding=1)
        assert module.weight.shape == (3, 4, 3, 3) and module.bias.shape == (3,)
        module.load_state_dict({"weight": weight, "bias": bias})
        assert torch.equal(module(input, offset, mask), convolve(input, offset, weight, bias, mask))
        assert "padding=(1, 1)" in repr(module)
        assert ops.DeformConv2d(4, 4, (1, 3), groups=2, bias=False).weight.shape == (4, 2, 1, 3)
        with pytest.raises(ValueError, match="in_channels must be divisible by groups, got 5 for 2 groups"):
            ops.DeformConv2d(5, 4, 3, groups=2)
        with pytest.raises(ValueError, match="groups must be positive, got 0"):
            ops.DeformConv2d(4, 4, 3, groups=0)


class TestRawOperators:
    """Schemas and fake kernels of all three operators agree with the kernels, including strides."""

    layouts = {
        "contiguous": lambda t: t.contiguous(),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "channels-last slice": lambda t: torch.cat([t, t], 3).contiguous(memory_format=torch.channels_last)[
            ..., : t.shape[3]
        ],
    }
    checks = ("test_schema", "test_faketensor")

    @pytest.mark.parametrize("layout", list(layouts.values()), ids=list(layouts))
    @pytest.mark.parametrize("masked", [True, False])
    def test_opcheck(self, layout, masked):
        input, offset, weight, bias, mask = inputs(masked=masked)
        input, offset = layout(input), layout(offset)
        mask = None if mask is None else layout(mask)
        settings = (1, 1, 1, 1, 1, 1, 0)
        grad_output = torch.randn(1, 3, 6, 7)
        raw = torch.ops.spatialflow
        for tangent in (None, torch.randn_like(offset)):
            arguments = (input, offset, weight, bias, mask, tangent, *settings)
            torch.library.opcheck(raw.deform_conv2d.default, arguments, test_utils=self.checks)
            for flags in ((True, True), (True, False), (False, True)):
                arguments = (grad_output, input, offset, weight, mask, tangent, *settings, *flags, False)
                torch.library.opcheck(raw._deform_conv2d_backward_data.default, arguments, test_utils=self.checks)
            arguments = (grad_output, input, offset, mask, tangent, *settings, 4, 3, 3)
            torch.library.opcheck(raw._deform_conv2d_backward_weight.default, arguments, test_utils=self.checks)

    @pytest.mark.parametrize("stride", [0, 1, 5, 2**40])
    @pytest.mark.parametrize("size", [(6, 1), (1, 7), (1, 1)])
    def test_stride_of_a_single_row_or_column_says_nothing(self, size, stride):
        """The stride of a dimension of size 1 is ignored, because torch allows any value.

        The weight gradient on the CPU derives the distance between pixels from the other strides.
        """
        input, offset = torch.randn(2, 4, *size), torch.randn(2, 18, *size)
        weight = torch.randn(3, 4, 3, 3, requires_grad=True)
        output = ops.deform_conv2d(input, offset, weight, padding=1)
        tokens = torch.randn(2, size[0] * size[1], 3)  # (batch, pixels, channels)
        gradient = tokens.transpose(1, 2).reshape(output.shape).contiguous()
        (expected,) = torch.autograd.grad(output, weight, gradient, retain_graph=True)
        strides = [stride if side == 1 else 3 for side in size]
        channels_last = tokens.as_strided(output.shape, (tokens.stride(0), 1, *strides))
        strides = [stride if side == 1 else 1 for side in size]
        plain = gradient.as_strided(output.shape, (*gradient.stride()[:2], *strides))
        for arbitrary in (channels_last, plain):
            assert torch.equal(arbitrary, gradient)
            assert_near(torch.autograd.grad(output, weight, arbitrary, retain_graph=True), [expected], torch.float32)


class TestErrors:
    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"input": torch.zeros(4, 6, 7)}, r"input must be \(N, C, H, W\), got shape \(4, 6, 7\)"),
            ({"input": torch.zeros(1, 4, 6, 7).int()}, "input must be float32.*got int32"),
            ({"offset": torch.zeros(18, 6, 7)}, r"offset must be .*got shape \(18, 6, 7\)"),
            ({"offset": torch.zeros(1, 9, 6, 7)}, "offset must have a multiple of .* = 18 channels, got 9"),
            ({"offset": torch.zeros(1, 54, 6, 7)}, "offset groups must divide .* got 3 groups .* for 4 channels"),
            ({"offset": torch.zeros(1, 18, 6, 8)}, r"offset must have shape \(1, 18, 6, 7\), got \(1, 18, 6, 8\)"),
            ({"offset": torch.zeros(2, 18, 6, 7)}, r"offset must have shape \(1, 18, 6, 7\), got \(2, 18, 6, 7\)"),
            ({"offset": torch.zeros(1, 18, 6, 7).int()}, "offset must be float32.*got int32"),
            ({"weight": torch.zeros(3, 4, 9)}, r"weight must be .*got shape \(3, 4, 9\)"),
            ({"weight": torch.zeros(3, 3, 3, 3)}, "weight must have .* a divisor of 4 as its second size, got 3"),
            ({"weight": torch.zeros(3, 2, 3, 3)}, "weight must have a multiple of groups = 2 output channels, got 3"),
            ({"weight": torch.zeros(3, 4, 0, 3)}, r"weight must have a kernel of at least one tap.* got \(0, 3\)"),
            ({"weight": torch.zeros(3, 4, 3, 3).half()}, "weight must be float32, got float16"),
            ({"weight": torch.zeros(3, 4, 9, 9)}, "input of 6 x 7 is too small for the kernel"),
            ({"bias": torch.zeros(4)}, r"bias must have shape \(3\), got \(4\)"),
            ({"bias": torch.zeros(3).double()}, "bias must be float32, got float64"),
            ({"mask": torch.zeros(1, 18, 6, 7)}, r"mask must have shape \(1, 9, 6, 7\), got \(1, 18, 6, 7\)"),
            ({"mask": torch.zeros(1, 9, 6, 7).bool()}, "mask must be float32.*got bool"),
            ({"stride": 0}, r"stride must be positive, got \(0, 0\)"),
            ({"padding": (1, -1)}, r"padding must not be negative, got \(1, -1\)"),
            ({"dilation": (0, 1)}, r"dilation must be positive, got \(0, 1\)"),
            (
                {"dilation": 2**62},
                r"stride, padding and dilation must be at most 2\^29, got 1, 1 and 4611686018427387904",
            ),
            ({"stride": (1, 1, 1)}, r"stride must be one integer or a pair, got \(1, 1, 1\)"),
            ({"algorithm": "fast"}, "algorithm must be one of 'auto', 'direct', 'tf32', 'tf32x3', got 'fast'$"),
            ({"algorithm": "winograd"}, "algorithm must be one of .*, which only flow_conv2d and fused_subnets have$"),
            ({"algorithm": 2}, "algorithm must be one of .*, got 2$"),
        ],
    )
    def test_errors_name_argument_rule_and_value(self, changed, message):
        arguments = dict(zip(("input", "offset", "weight", "bias", "mask"), inputs(), strict=False), padding=1)
        with pytest.raises((RuntimeError, ValueError), match=f"deform_conv2d: {message}"):
            ops.deform_conv2d(**{**arguments, **changed})

    def test_kernel_of_more_taps_than_there_are_numbers(self):
        """A kernel of 2^32 x 2^31 taps without channels is refused; twice the number of taps wraps to 0 in 64 bits."""
        with pytest.raises(RuntimeError, match=r"sides up to 2\^29, got \(4294967296, 2147483648\)"):
            ops.deform_conv2d(
                torch.zeros(0, 0, 1, 1).expand(0, 0, 2**33, 2**33),
                torch.zeros(0, 2, 1, 1),
                torch.zeros(0, 0, 1, 1).expand(0, 0, 2**32, 2**31),
            )

    def test_third_derivative_through_the_offset(self):
        """The third derivative with respect to the offset raises an error; the first two exist."""
        input, offset, weight, bias, mask = inputs(torch.float64)

        def second(offset):
            direction = torch.ones_like(offset)

            def first(o):
                return torch.func.jvp(lambda q: convolve(input, q, weight, bias, mask), (o,), (direction,))[1]

            return torch.func.jvp(first, (offset,), (direction,))[1]

        with pytest.raises(NotImplementedError, match="third derivatives through the offset"):
            torch.func.jvp(second, (offset,), (torch.ones_like(offset),))


class TestGoldens:
    """Results and gradients of modulated deformable convolution in mmcv, with strides 1 and 2."""

    @pytest.mark.parametrize("stride", [1, 2])
    def test_forward_and_backward(self, goldens, stride):
        arrays = np.load(goldens / "ops" / "mdconv.npz")
        array = {
            name.removeprefix(f"s{stride}_"): torch.as_tensor(arrays[name])
            for name in arrays.files
            if name.startswith(f"s{stride}_")
        }
        leaves = [array[name].requires_grad_() for name in ("x", "offset", "weight", "bias", "mask")]
        input, offset, weight, bias, mask = leaves
        out = ops.deform_conv2d(input, offset, weight, bias, stride, 1, 1, mask)
        assert_near(out, array["out"], torch.float32)
        grads = torch.autograd.grad(out, leaves, array["grad_out"])
        expected = [array[name] for name in ("gx", "goffset", "gweight", "gbias", "gmask")]
        assert_near(list(grads), expected, torch.float32, factor=4)
