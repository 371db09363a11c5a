# SPDX-License-Identifier: Apache-2.0
"""deform_conv2d with a packed weight, and with sigmoid of the mask and ReLU as options of the call."""

import copy
import pickle

import pytest
import torch
from helpers.tensors import channels_last

from spatialflow import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    # channels, outputs, groups, offset groups, kernel, size, stride, padding, dilation
    (16, 24, 1, 1, (3, 3), (11, 13), 1, 1, 1),
    (64, 72, 1, 1, (3, 3), (9, 7), 2, 1, 1),
    (128, 136, 1, 2, (3, 3), (12, 11), 1, 1, 2),
    (32, 16, 4, 1, (3, 3), (6, 9), (1, 2), (0, 1), 1),
    (24, 12, 2, 3, (2, 1), (7, 5), 1, 0, (1, 3)),
    (3, 5, 1, 1, (4, 4), (8, 8), 1, 2, 1),
    (6, 4, 2, 2, (1, 1), (3, 3), 1, 0, 1),
]


def case(shape, dtype=torch.float32, batch=2):
    """Return arguments of a call with an unpacked weight and its bias."""
    channels, outputs, groups, offset_groups, kernel, size, stride, padding, dilation = shape
    generator = torch.Generator("cpu").manual_seed(sum(size))

    def random(*sizes):
        return torch.randn(sizes, generator=generator, device="cpu").to(torch.get_default_device())

    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    out = [
        (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for side, taps, stride, padding, dilation in zip(size, kernel, *pairs)
    ]
    taps = kernel[0] * kernel[1]
    weight = random(outputs, channels // groups, *kernel) / (channels // groups * taps) ** 0.5
    x, bias = random(batch, channels, *size), random(outputs)
    offset, mask = random(batch, 2 * offset_groups * taps, *out), random(batch, offset_groups * taps, *out)
    tensors = [t.to(dtype) for t in (x, offset, weight, bias, mask)]
    return tensors, (stride, padding, dilation), (groups, offset_groups)


def bound(dtype):
    return {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous], ids=["channels-last", "channels-first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype, layout):
    """Results agree with float64 on the same rounded inputs, with and without bias, mask, sigmoid and ReLU."""
    (x, offset, weight, bias, mask), geometry, groups = case(shape, dtype)
    x = layout(x)
    for call_bias, call_mask, sigmoid, relu in (
        (bias, mask, True, True),
        (None, mask, True, False),
        (bias, mask, False, False),
        (None, None, False, True),
    ):
        conv = ops.pack_deform_conv2d(weight, call_bias, *groups)
        result = ops.deform_conv2d(x, offset, conv, None, *geometry, call_mask, mask_sigmoid=sigmoid, relu=relu)
        tensors64 = [None if t is None else t.double() for t in (x, offset, weight, call_bias, call_mask)]
        factor = tensors64[4].sigmoid() if sigmoid else tensors64[4]
        expected = ops.deform_conv2d(*tensors64[:4], *geometry, factor)
        expected = expected.relu() if relu else expected
        assert result.dtype == dtype and result.shape == expected.shape
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error <= bound(dtype)
        assert result.is_contiguous() or layout is channels_last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_call_with_the_plain_weight(shape, dtype):
    """Without fused operations the results are bitwise equal."""
    (x, offset, weight, bias, mask), geometry, groups = case(shape, dtype)
    conv = ops.pack_deform_conv2d(weight, bias, *groups)
    result = ops.deform_conv2d(x, offset, conv, None, *geometry, mask)
    assert torch.equal(result, ops.deform_conv2d(x, offset, weight, bias, *geometry, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offsets_in_16_bits_are_the_same_in_32(dtype):
    """Forward and gradient kernels give equal results for both dtypes, also if only offset or mask is in 16 bits."""
    for shape in SHAPES[:4]:
        (x, offset, weight, bias, mask), geometry, groups = case(shape, dtype)
        conv, results, fused = ops.pack_deform_conv2d(weight, bias, *groups), [], []
        for is_offset_float32, is_mask_float32 in ((False, False), (True, True), (True, False), (False, True)):
            inputs = [
                x,
                offset.float() if is_offset_float32 else offset,
                weight,
                bias,
                mask.float() if is_mask_float32 else mask,
            ]
            inputs = [t.clone().requires_grad_() for t in inputs]
            y = ops.deform_conv2d(*inputs[:4], *geometry, inputs[4])
            with torch.no_grad():
                assert torch.equal(ops.deform_conv2d(x, inputs[1], conv, None, *geometry, inputs[4]), y)
                fused.append(ops.deform_conv2d(x, inputs[1], conv, None, *geometry, inputs[4], mask_sigmoid=True))
            results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        assert all(torch.equal(fused[0], result) for result in fused)
        for result in results[1:]:
            for index, (first, tensor) in enumerate(zip(results[0], result, strict=True)):
                tensor = tensor.to(first.dtype)  # the first call has 16-bit gradients of offset and mask
                if index == 1:  # the input's gradient is summed in any order on CUDA
                    torch.testing.assert_close(first, tensor, rtol=bound(dtype), atol=bound(dtype))
                else:
                    assert torch.equal(first, tensor)


def test_values_that_are_not_finite():
    """NaN logits give zero samples, infinite logits a factor of 0 or 1, and ReLU keeps NaN as in torch."""
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[0])
    mask[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    offset[0, 3, 1, :2] = torch.tensor([torch.nan, torch.inf])
    x[1, 2, 5, 5] = torch.nan
    conv = ops.pack_deform_conv2d(weight, bias, *groups)
    result = ops.deform_conv2d(x, offset, conv, None, *geometry, mask, mask_sigmoid=True, relu=True)
    expected = ops.deform_conv2d(x, offset, weight, bias, *geometry, mask.sigmoid()).relu()
    assert result.isnan().any() and not result[0].isnan().any()
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_misaligned_and_strided_inputs():
    """Misaligned or strided inputs, strided offsets and masks, and a misaligned packed weight do not change results."""
    shape = (128, 72, 1, 1, (3, 3), (9, 7), 1, 1, 1)
    (x, offset, weight, bias, mask), geometry, groups = case(shape, torch.bfloat16)
    conv = ops.pack_deform_conv2d(weight, bias, *groups)
    expected = ops.deform_conv2d(x, offset, conv, None, *geometry, mask)
    base = torch.zeros(x.numel() + 1, dtype=x.dtype)
    odd = base[1:].view(2, 9, 7, 128).permute(0, 3, 1, 2).copy_(x)
    slices = torch.cat([x, x], dim=1)[:, 128:], channels_last(torch.cat([x, x], dim=1))[:, :128]
    joined = torch.cat([offset, mask], dim=1)
    packed = torch.zeros(conv.packed.numel() + 1, dtype=conv.packed.dtype)[1:].copy_(conv.packed)
    assert torch.equal(ops.deform_conv2d(x, offset, conv._replace(packed=packed), None, *geometry, mask), expected)
    for same in (odd, *slices):
        result = ops.deform_conv2d(same, joined[:, :18], conv, None, *geometry, joined[:, 18:])
        assert torch.equal(result, expected)


def test_empty():
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[0])
    conv = ops.pack_deform_conv2d(weight, bias, *groups)
    assert ops.deform_conv2d(x[:0], offset[:0], conv, None, *geometry, mask[:0], relu=True).shape == (0, 24, 11, 13)
    nothing = ops.pack_deform_conv2d(weight[:0], None)
    assert ops.deform_conv2d(x, offset, nothing, None, *geometry).shape == (2, 0, 11, 13)
    biased = ops.pack_deform_conv2d(weight[:, :0], bias)
    result = ops.deform_conv2d(x[:, :0], offset, biased, None, *geometry)
    assert torch.equal(result, bias[:, None, None].expand_as(result))


def test_a_16_bit_mask_is_converted_before_the_sigmoid():
    """The sigmoid is not rounded to the dtype of the mask, with gradients or without."""
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[0])
    conv, mask = ops.pack_deform_conv2d(weight, bias, *groups), mask.bfloat16()
    expected = ops.deform_conv2d(x, offset, weight, bias, *geometry, mask.float().sigmoid())
    for operand in (conv, weight):
        call_bias = bias if operand is weight else None
        for needs_gradient in (False, True):
            x.requires_grad_(needs_gradient)
            result = ops.deform_conv2d(x, offset, operand, call_bias, *geometry, mask, mask_sigmoid=True)
            torch.testing.assert_close(result.detach(), expected)


def test_sizes_that_overflow():
    """The raw operator, which takes the sizes of the weight, refuses sizes that overflow."""
    packed = torch.ops.spatialflow._deform_conv2d_packed
    empty = ops.pack_deform_conv2d(torch.zeros(0, 0, 1, 1)).packed
    for channels, side, outputs in ((2**17, 2**12, 2**23), (2**10, 2**10, 2**34), (2**20, 2**10, 2**24), (1, 1, 2**62)):
        x = torch.zeros(1).expand(1, channels, 2, 2)
        offset = torch.zeros(1).expand(1, 2 * side**2, 1 if side > 1 else 2, 1 if side > 1 else 2)
        geometry = (1, 1, max(side // 2 - 1, 0), max(side // 2 - 1, 0), 1, 1, 0)
        for batch in (1, 0):
            with pytest.raises(RuntimeError, match="fewer than 2\\^|the packed weight was made for other channels"):
                call = (x[:batch], offset[:batch], empty, None, None, *geometry, outputs, 1, 1, side, side)
                packed(*call, False, False)


def test_weights_without_values():
    """Calls with a weight without elements return at once or are refused, without a loop over taps."""
    x, offset = torch.zeros(1, 0, 1, 1), torch.zeros(1).expand(1, 2**41, 1, 1)
    weight, bias = torch.zeros(2, 0, 2**20, 2**20), torch.ones(2)
    for call, size in (
        (lambda: ops.pack_deform_conv2d(torch.empty(4, 0, 2**29, 2**29)).packed, None),
        (lambda: ops.pack_deform_conv2d(torch.empty(2**40, 0, 1, 1), None, 2**40).packed, None),
        (lambda: ops.pack_deform_conv2d(torch.empty(2**62, 0, 3, 3), None, 2**62).packed, None),
        (lambda: ops.deform_conv2d(x, offset, weight, bias, 2, 2**19), (1, 2, 1, 1)),
        (lambda: ops.deform_conv2d(x, offset, ops.pack_deform_conv2d(weight, bias), None, 2, 2**19), (1, 2, 1, 1)),
    ):
        try:
            result = call()
        except RuntimeError as refused:
            assert "deform_conv2d: weight must have fewer than 2^" in str(refused)
        else:
            assert result.numel() < 256 if size is None else torch.equal(result, torch.ones(size))


def test_gradients_and_autocast():
    """Gradients and autocast use the unpacked weight."""
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[0])
    inputs = [t.requires_grad_() for t in (x, offset, weight, bias, mask)]
    conv = ops.pack_deform_conv2d(weight, bias, *groups)
    y = ops.deform_conv2d(x, offset, conv, None, *geometry, mask, mask_sigmoid=True, relu=True)
    expected = ops.deform_conv2d(x, offset, weight, bias, *geometry, mask.sigmoid()).relu()
    for first, second in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(first, second)  # the input's gradient is summed in any order on CUDA
    kind = x.device.type
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
        assert ops.deform_conv2d(x, offset, conv, None, *geometry, mask).dtype == torch.bfloat16


def test_derivatives_of_the_fused_call():
    (x, offset, weight, bias, mask), geometry, groups = case((3, 4, 1, 1, (3, 3), (4, 5), 1, 1, 1), torch.float64, 1)
    offset = offset.floor() + 0.3 + 0.4 * torch.rand_like(offset)  # avoids kinks at whole coordinates
    inputs = [t.requires_grad_() for t in (x, offset, weight, bias, mask)]

    def call(x, offset, weight, bias, mask):
        conv = ops.pack_deform_conv2d(weight, bias, *groups)
        return ops.deform_conv2d(x, offset, conv, None, *geometry, mask, mask_sigmoid=True)

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)


def test_pickles_and_copies_pack_again():
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[2])
    conv = ops.pack_deform_conv2d(weight, bias, *groups, algorithm="direct")
    expected = ops.deform_conv2d(x, offset, conv, None, *geometry, mask)
    assert len(pickle.dumps(conv)) < weight.numel() * 4 + 4096, "packed weights must not be stored"
    for copied in (pickle.loads(pickle.dumps(conv)), copy.deepcopy(conv)):
        assert copied[3:] == conv[3:]
        assert torch.equal(ops.deform_conv2d(x, offset, copied, None, *geometry, mask), expected)


def test_opcheck_and_compile():
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[2])
    conv = ops.pack_deform_conv2d(weight, bias, *groups)
    torch.library.opcheck(torch.ops.spatialflow._pack_deform_conv2d, (weight, *groups, conv.resolved))
    raw = (x, offset, conv.packed, bias, mask, 1, 1, 1, 1, 2, 2, conv.resolved, 136, *groups, 3, 3, True, True)
    torch.library.opcheck(torch.ops.spatialflow._deform_conv2d_packed, raw)

    def call(x, offset, mask):
        return ops.deform_conv2d(x, offset, conv, None, *geometry, mask, mask_sigmoid=True, relu=True)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True)(x, offset, mask), call(x, offset, mask))


def test_packing_errors():
    weight = torch.randn(6, 4, 3, 3)
    for options, message in (
        ({"groups": 0}, "groups must divide the output channels of weight, 6, got 0"),
        ({"groups": 4}, "groups must divide the output channels of weight, 6, got 4"),
        ({"groups": 2**62}, "groups must divide the output channels of weight, 6, got 4611686018427387904"),
        ({"offset_groups": 3}, "offset_groups must divide the 4 input channels, got 3"),
        ({"offset_groups": 0}, "offset_groups must divide the 4 input channels, got 0"),
        ({"weight": weight[0]}, r"weight must be \(C_out, C / groups, kernel height, kernel width\), got shape"),
        ({"weight": weight.int()}, "weight must be float32, .*got int32"),
        ({"weight": weight[..., :0]}, r"weight must have a kernel of at least one tap, .*got \(3, 0\)"),
    ):
        with pytest.raises(RuntimeError, match=f"^pack_deform_conv2d: {message}"):
            ops.pack_deform_conv2d(**{"weight": weight} | options)
    with pytest.raises(ValueError, match="pack_deform_conv2d: algorithm must be one of .*, got 'winograd'"):
        ops.pack_deform_conv2d(weight, algorithm="winograd")
    with pytest.raises(TypeError, match="pack_deform_conv2d: weight must be a tensor, got NoneType"):
        ops.pack_deform_conv2d(None)
    for bias, message in (
        (torch.randn(5), r"bias must have shape \(6,\), got \(5,\)"),
        (torch.randn(6).double(), "bias must be float32, got float64"),
        (torch.randn(6).int(), "bias must be of a floating dtype, got int32"),
        (torch.randn(6, device="meta"), "bias must be on the device of weight, .*, got meta"),
    ):
        with pytest.raises(RuntimeError, match=f"^pack_deform_conv2d: {message}"):
            ops.pack_deform_conv2d(weight, bias)


def test_errors():
    (x, offset, weight, bias, mask), geometry, groups = case(SHAPES[2])
    conv = ops.pack_deform_conv2d(weight, bias, *groups)

    def call(x=x, offset=offset, conv=conv, bias=None, mask=mask, **options):
        return ops.deform_conv2d(x, offset, conv, bias, *geometry, mask, **options)

    with pytest.raises(ValueError, match="deform_conv2d: bias must be None when weight is a PackedDeformConv"):
        call(bias=bias)
    with pytest.raises(ValueError, match="deform_conv2d: algorithm must be one of .*, got 'bogus'"):
        call(algorithm="bogus")
    with pytest.raises(RuntimeError, match="mask must be float32, .*got int32"):
        call(conv=weight, mask=mask.int(), mask_sigmoid=True)
    with pytest.raises(TypeError, match=r"^deform_conv2d: weight must be Tensor \| PackedDeformConv, got PackedConv$"):
        call(conv=ops.pack_conv3x3(torch.randn(4, 4, 3, 3)))
    with pytest.raises(TypeError, match=r"^flow_conv2d: weight must be .*PackedConv.*, got PackedDeformConv$"):
        ops.flow_conv2d(x, None, conv)
    with pytest.raises(ValueError, match="deform_conv2d: mask_sigmoid must be False without a mask"):
        call(mask=None, mask_sigmoid=True)
    with pytest.raises(
        RuntimeError,
        match=r"offset must be of 2 offset groups, for which the weight was packed, got 1 \(offset has 18 channels\)",
    ):
        call(offset=offset[:, :18], mask=None)
    with pytest.raises(RuntimeError, match="the packed weight was made for other channels, .*pack the weight again"):
        call(x=x[:, :64])
    with pytest.raises(RuntimeError, match="the packed weight was made for other channels, .*pack the weight again"):
        call(conv=conv._replace(packed=conv.packed[:-1]))
    with pytest.raises(RuntimeError, match="the packed weight was made for other channels, .*pack the weight again"):
        call(conv=conv._replace(packed=conv.packed.half()))
    on_meta = [t.to("meta") for t in (x, offset, mask)]
    for wrong in (conv.packed[:-1], conv.packed.half()):
        with pytest.raises(RuntimeError, match="the packed weight was made for other channels"):
            call(
                *on_meta[:2],
                conv._replace(packed=wrong.to("meta"), weight=weight.to("meta"), bias=None),
                None,
                on_meta[2],
            )
    with pytest.raises(RuntimeError, match="groups must divide 128 input and 136 output channels, got 3"):
        call(conv=conv._replace(groups=3))
    with pytest.raises(RuntimeError, match=r"weight must be float64, got float32"):
        call(x=x.double())
    with pytest.raises(TypeError, match=r"deform_conv2d: weight\.packed must be a tensor, got NoneType"):
        call(conv=conv._replace(packed=None))
