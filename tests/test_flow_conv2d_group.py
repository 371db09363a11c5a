# SPDX-License-Identifier: Apache-2.0
"""flow_conv2d with several packed weights in one call."""

import pytest
import torch
from helpers.flow_conv2d_cases import CODES, tensors_of
from helpers.tensors import channels_last, leaves, map_tensors

from spatialflow import ops


class TestGroup:
    """Several convolutions in one call, each with separate inputs."""

    SIZES = [(20, 21), (5, 3)]

    def members(self, dtype=torch.float32):
        """Return inputs of different structure and weights of different channels; the last is "direct" without bias."""
        pyramid, _, weight, bias = tensors_of(40, 45, self.SIZES, False, True, 1)()
        single, _, other_weight, _ = tensors_of(33, 34, [(9, 7)], False, False, 2)()
        x = map_tensors(lambda t: t.to(dtype), [pyramid, single[0], pyramid])
        weights = [(weight, bias, "auto"), (other_weight, None, "auto"), (weight[:7], None, "direct")]
        return x, [ops.pack_conv3x3(w.to(dtype), b if b is None else b.to(dtype), a) for w, b, a in weights]

    @pytest.mark.parametrize("relu", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
    def test_equals_calls_one_by_one(self, dtype, relu):
        for layout in (channels_last, torch.Tensor.contiguous):
            x, weights = self.members(dtype)
            x = map_tensors(layout, x)
            actual = ops.flow_conv2d(x, None, weights, relu=relu)
            expected = [ops.flow_conv2d(entry, None, conv, relu=relu) for entry, conv in zip(x, weights)]
            assert [type(entry) for entry in actual] == [list, torch.Tensor, list]
            for first, second in zip(leaves(actual), leaves(expected), strict=True):
                assert torch.equal(first, second) and first.stride() == second.stride()

    def test_bias_is_kept_in_the_dtype_of_sums(self):
        _, weights = self.members(torch.float16)
        assert weights[0].packed_bias.dtype == torch.float32 and weights[0].bias.dtype == torch.float16

    def test_gradients(self):
        x, weights = self.members()
        leaves_of_x = [t.requires_grad_() for t in leaves(x)]
        y = leaves(ops.flow_conv2d(x, None, weights))
        together = torch.autograd.grad([t.sum() for t in y], leaves_of_x)
        y = leaves([ops.flow_conv2d(entry, None, conv) for entry, conv in zip(x, weights)])
        assert all(map(torch.equal, together, torch.autograd.grad([t.sum() for t in y], leaves_of_x)))

    def test_empty(self):
        x, weights = self.members()
        assert ops.flow_conv2d([], None, []) == []
        assert ops.flow_conv2d([[], x[1], x[2]], None, weights)[0] == []
        nothing = torch.zeros(0, 40, 5, 5)
        assert ops.flow_conv2d([nothing, x[1], x[2]], None, weights)[0].shape == (0, 45, 5, 5)

    def test_opcheck_and_compile(self):
        x, weights = self.members()
        biases = [w.packed.new_empty(0) if w.packed_bias is None else w.packed_bias for w in weights]
        algorithms = [CODES[w.algorithm] for w in weights]
        raw_call = (leaves(x), [2, 1, 2], [w.packed for w in weights], biases, [45, 34, 7], True, algorithms)
        torch.library.opcheck(torch.ops.spatialflow._flow_conv2d_group, raw_call)
        compiled = torch.compile(lambda *t: ops.flow_conv2d(list(t), None, weights[:2]), fullgraph=True)
        arguments = x[0][0], x[1]
        expected = ops.flow_conv2d(list(arguments), None, weights[:2])
        assert all(map(torch.equal, compiled(*arguments), expected))

    def test_errors(self):
        x, weights = self.members()
        for arguments, message in (
            ((x[:2], None, weights), "x must be a list with an entry for each of 3 weights, got 2 entries"),
            ((x[1], None, weights), "x must be a list with an entry for each of 3 weights, got Tensor"),
            ((x, x, weights), "flow and bias must be None when weight is a list"),
            ((x, x, tuple(weights)), "flow and bias must be None when weight is a list"),
            ((x, None, weights, None, True, "fast"), "algorithm must be one of .*, got 'fast'"),
            ((x, None, weights, None, True, ["tf32"]), r"algorithm must be one of .*, got \['tf32'\]"),
            ((x, None, [weights[0], weights[1].weight, weights[2]]), r"weight\[1\] must be a PackedConv, got Tensor"),
        ):
            with pytest.raises(ValueError, match="flow_conv2d: " + message):
                ops.flow_conv2d(*arguments)
        with pytest.raises(TypeError, match=r"flow_conv2d: x\[1\] must be a tensor, got float"):
            ops.flow_conv2d([x[0], 1.0, x[2]], None, weights)
        with pytest.raises(TypeError, match="flow_conv2d: lists must hold tensors, and be nested no deeper"):
            ops.flow_conv2d([[x[1]]], None, weights[1])
        with pytest.raises(RuntimeError, match="the packed weight was made for other channels"):
            ops.flow_conv2d([x[0], x[0], x[2]], None, weights)
        with pytest.raises(RuntimeError, match=r"x\[1\] must be float32, got float64"):
            ops.flow_conv2d([x[0], x[1].double(), x[2]], None, weights)
        with pytest.raises(
            RuntimeError, match="^flow_conv2d: every tensor of x must be on the device of the first one, cpu, got meta$"
        ):
            ops.flow_conv2d([x[0], x[1].to("meta"), x[2]], None, weights)
        call = torch.ops.spatialflow._flow_conv2d_group
        rest = ([w.packed for w in weights], [t.packed.new_empty(0) for t in weights], [45, 34, 7], True, [0, 0, 2])
        for counts in ([2, 1, 1], [2, 1, 3], [2, -1, 4], [2**62, 2**62, 1]):
            with pytest.raises(RuntimeError, match="flow_conv2d: counts must be at least 1|counts must add up"):
                call(leaves(x), counts, *rest)
