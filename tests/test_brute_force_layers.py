# SPDX-License-Identifier: Apache-2.0
"""Convolutions, normalization and loss against `tests/fuzz/brute_force`: small cases, bad values and gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.brute_force_checks import DTYPES, INF, NAN, compare, compare_gradients, random, rows
from helpers.tensors import map_tensors
from torch import Tensor

from spatialflow import ops


class TestDeformConv2d:
    @DTYPES
    def test_bad_offsets_and_masks(self, dtype: torch.dtype) -> None:
        """Cover two groups, three offset groups, and parameters that differ along y and x."""
        offset, mask = random(2, 36, 2, 3) * 2, torch.rand(2, 18, 2, 3, dtype=torch.float64)
        offset[0, ::5, 0, 0] = rows(NAN, INF, -INF, 1e300, -1e30, 3e38, 0.0, -1.0)
        mask[0, 1::3, 1, 2] = rows(NAN, INF, -INF, 1e300, 0.0, -2.0)
        compare(
            "deform_conv2d",
            random(2, 6, 5, 6).to(dtype),
            offset,
            random(4, 3, 3, 2).to(dtype),
            random(4).to(dtype),
            stride=(2, 3),
            padding=(1, 2),
            dilation=(2, 1),
            mask=mask,
            dtype=dtype,
        )

    def test_border(self) -> None:
        """A sample fades to zero within one cell beyond the centers of the outermost cells."""
        places = rows(-1.25, -1, -0.75, 0, 0.25, 1, 1.25, 1.75, 2, 2.25)
        offset = torch.zeros(1, 2, 10, 1, dtype=torch.float64)
        offset[0, 0, :, 0] = places - torch.arange(-4, 6)
        features = rows(2, 4).reshape(1, 1, 2, 1)
        result = compare("deform_conv2d", features, offset, rows(1).reshape(1, 1, 1, 1), padding=(4, 0))[0]
        assert result.ravel().tolist() == [0, 0, 0.5, 2, 2.5, 4, 3, 1, 0, 0]

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_features_that_are_not_finite(self, bad: float) -> None:
        """A non-finite cell makes a sample NaN even if its bilinear weight is 0."""
        features = random(1, 1, 3, 3)
        features[0, 0, 1, 1] = bad
        result = compare("deform_conv2d", features, torch.zeros(1, 2, 3, 3), random(1, 1, 1, 1), dtype=torch.float64)
        assert np.isfinite(result[0][0, 0]).tolist() == [[False, False, True], [False, False, True], [True] * 3]

    def test_no_images(self) -> None:
        compare("deform_conv2d", random(0, 2, 3, 3), random(0, 2, 3, 3), random(4, 2, 1, 1), dtype=torch.float64)

    def test_gradients(self) -> None:
        """Gradients of all five tensors are right, also where an offset or a mask is not finite."""
        offset, mask = random(2, 16, 2, 2), torch.rand(2, 8, 2, 2, dtype=torch.float64)
        offset = offset.floor() + offset.frac().abs() * 0.9 + 0.05  # avoids kinks at whole coordinates
        offset[0, :3, 0, 0] = rows(NAN, INF, 1e300)
        mask[1, :2, 1, 1] = rows(NAN, INF)
        compare_gradients(
            "deform_conv2d",
            random(2, 4, 3, 4),
            offset,
            random(2, 2, 2, 2),
            random(2),
            (1, 2),
            (0, 0),
            (1, 1),
            mask,
            differentiable=(0, 1, 2, 3, 7),
        )


class TestFlowConv2d:
    @DTYPES
    @pytest.mark.parametrize("algorithm", ["direct", "winograd"])
    def test_levels(self, dtype: torch.dtype, algorithm: str) -> None:
        levels = [random(2, 3, 5, 6).to(dtype), random(1, 3, 1, 2).to(dtype), random(1, 3, 0, 4).to(dtype)]
        flows = [random(*level.shape).to(dtype) for level in levels]
        weight, bias = random(4, 3, 3, 3).to(dtype), random(4).to(dtype)
        compare("flow_conv2d", levels, flows, weight, bias, True, algorithm, dtype=dtype)
        compare("flow_conv2d", levels[0], None, weight, None, False, algorithm, dtype=dtype)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_pixel_that_is_not_finite(self, bad: float) -> None:
        x = random(1, 2, 5, 5)
        x[0, 1, 2, 3] = bad
        compare("flow_conv2d", x, None, random(3, 2, 3, 3), None, True, "direct", dtype=torch.float64)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_pixel_that_is_not_finite_in_winograd(self, bad: float) -> None:
        """A non-finite pixel reaches its neighborhood, and no further than the 4x4 tiles that read it."""
        x, weight = random(1, 2, 12, 12).float(), random(3, 2, 3, 3).float()
        x[0, 1, 4, 6] = bad
        reached = ~torch.isfinite(ops.flow_conv2d(x, None, weight, None, False, "winograd"))[0].cpu()
        assert reached[:, 3:6, 5:8].all()
        assert not reached[:, 8:].any() and not reached[:, :, :4].any() and not reached[:, :, 8:].any()

    def test_no_levels(self) -> None:
        assert compare("flow_conv2d", [], None, random(1, 1, 3, 3)) == []

    def test_gradients(self) -> None:
        levels, flows = [random(2, 2, 3, 4), random(1, 2, 1, 2)], [random(2, 2, 3, 4), random(1, 2, 1, 2)]
        compare_gradients("flow_conv2d", levels, flows, random(3, 2, 3, 3), random(3), differentiable=(0, 1, 2, 3))


def conv() -> tuple[Tensor, Tensor]:
    return random(2, 2, 3, 3) / 4, random(2)


WIRINGS: dict[str, Callable[[], ops.SubnetParameters]] = {
    "nothing": lambda: ops.SubnetParameters(segmentation_levels=1),
    "paper": lambda: ops.SubnetParameters(
        (conv(), conv()),
        (conv(), conv()),
        (conv(), conv()),
        (conv(),),
        (conv(), conv()),
        (conv(), conv()),
        (conv(),),
        (conv(),),
        "reg",
        2,
    ),
    "cls is the source": lambda: ops.SubnetParameters(
        (conv(), conv()),
        (conv(), conv()),
        (conv(),),
        (conv(), conv()),
        (conv(), None),
        (None, conv()),
        (conv(), conv()),
        (None, conv()),
        "cls",
        1,
    ),
    "no source": lambda: ops.SubnetParameters(
        (conv(),), (conv(),), (conv(),), (conv(),), semantic_flow=(conv(),), flow_source=None, segmentation_levels=2
    ),
    "flows alone": lambda: ops.SubnetParameters(
        (), (conv(),), (), (), (conv(),), (conv(),), (conv(),), (conv(),), "reg", 2
    ),
    "the source ends first": lambda: ops.SubnetParameters(
        (conv(), conv(), conv()),
        (conv(),),
        (conv(), conv()),
        (),
        (conv(), conv(), conv()),
        (conv(), conv()),
        (),
        (),
        "reg",
        0,
    ),
}


class TestFusedSubnets:
    @pytest.mark.parametrize("make_parameters", WIRINGS.values(), ids=WIRINGS)
    def test_wiring(self, make_parameters: Callable[[], ops.SubnetParameters]) -> None:
        levels, parameters = [random(1, 2, 3, 4), random(2, 2, 2, 2)], make_parameters()
        compare("fused_subnets", levels, parameters, dtype=torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            compare("fused_subnets", *converted_call((levels, parameters), dtype), dtype=dtype)

    def test_gradients(self) -> None:
        convs = ((conv(),) for _ in range(8))
        parameters = ops.SubnetParameters(*convs, segmentation_levels=1)
        compare_gradients("fused_subnets", [random(1, 2, 2, 3), random(1, 2, 1, 1)], parameters, differentiable=(0, 1))


def converted_call(call: tuple[list[Tensor], ops.SubnetParameters], dtype: torch.dtype) -> tuple[Any, Any]:
    levels, parameters = call
    converted = [
        map_tensors(lambda tensor: tensor.to(dtype), value) if isinstance(value, tuple) else value
        for value in parameters
    ]
    return map_tensors(lambda tensor: tensor.to(dtype), levels), ops.SubnetParameters(*converted)


class TestGroupNormRelu:
    @DTYPES
    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize("shape", [(2, 6, 4, 5), (1, 6, 1, 3), (1, 6, 3, 1), (1, 6, 1, 1)], ids=str)
    def test_shapes(self, dtype: torch.dtype, upsample: bool, shape: tuple[int, ...]) -> None:
        input, weight, bias = (random(*size).to(dtype) * 3 for size in (shape, (6,), (6,)))
        for groups in (1, 2, 6):
            compare("group_norm_relu", input, groups, weight, bias, 1e-3, upsample, dtype=dtype)
        compare("group_norm_relu", input, 3, upsample=upsample, dtype=dtype)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_values_that_are_not_finite(self, bad: float) -> None:
        input = random(1, 4, 3, 3)
        input[0, 2, 1, 2] = bad
        for upsample in (False, True):
            result = compare("group_norm_relu", input, 2, upsample=upsample, dtype=torch.float64)
            assert np.isnan(result[0]).any(axis=(0, 2, 3)).tolist() == [False, False, True, True]

    @pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        for upsample in (False, True):
            compare("group_norm_relu", random(*shape), 2, upsample=upsample, dtype=torch.float64)

    @pytest.mark.parametrize("upsample", [False, True])
    def test_gradients(self, upsample: bool) -> None:
        args = (random(2, 4, 3, 2), 2, random(4), random(4), 0.1, upsample)
        compare_gradients("group_norm_relu", *args, differentiable=(0, 2, 3))


class TestSigmoidFocalLoss:
    logits = rows([0, 3, -4], [NAN, INF, -INF], [40, -40, 200], [0.5, 1e4, -1e4], [NAN, NAN, NAN])
    labels = torch.tensor([2, 3, 0, 1, -1])

    @DTYPES
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0])
    def test_values(self, dtype: torch.dtype, gamma: float, alpha: float) -> None:
        compare("sigmoid_focal_loss", self.logits.to(dtype), self.labels, gamma, alpha, dtype=dtype)
        finite = self.logits[[0, 2, 4]].to(dtype)
        for reduction in ("sum", "mean"):
            loss_dtype = dtype if dtype == torch.float64 else torch.float32
            compare("sigmoid_focal_loss", finite, self.labels[[0, 2, 4]], gamma, alpha, reduction, dtype=loss_dtype)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_empty(self, reduction: str) -> None:
        for shape in ((0, 3), (2, 0)):
            labels = torch.zeros(shape[0], dtype=torch.int32)
            compare("sigmoid_focal_loss", random(*shape), labels, 2.0, 0.25, reduction, dtype=torch.float64)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_gradient(self, reduction: str) -> None:
        labels = torch.tensor([[0, 1, 2], [3, -1, 2]])
        compare_gradients("sigmoid_focal_loss", random(2, 3, 3) * 3, labels, 1.5, 0.3, reduction, differentiable=(0,))
