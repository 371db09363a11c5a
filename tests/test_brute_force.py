# SPDX-License-Identifier: Apache-2.0
"""Operators and reference implementations against `tests/fuzz/brute_force.py`: small cases, bad values and ties."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import brute_force
from helpers.op_matrix import TOLERANCE, leaves, map_tensors
from torch import Tensor

from spatialflow import ops
from spatialflow.ops import reference

NAN, INF = math.nan, math.inf
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))


def arrays(value: Any) -> list[np.ndarray]:
    """Return the arrays within nested lists and tuples of arrays and tensors."""
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in arrays(item)]
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    return [np.asarray(value)]


def compare(name: str, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[np.ndarray]:
    """Assert that the operator and its reference equal the brute force; return the results of the brute force."""
    expected = arrays(getattr(brute_force, name)(*args, **options))
    for implementation in (ops, reference):
        actual = arrays(getattr(implementation, name)(*args, **options))
        assert len(actual) == len(expected)
        for array, wanted in zip(actual, expected):
            assert_same(array, wanted, TOLERANCE[dtype], implementation.__name__)
    return expected


def assert_same(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Assert equal integers, NaN and infinities, and numbers within `tolerance` relative to the largest."""
    assert actual.shape == expected.shape, what
    if expected.dtype.kind != "f":
        assert np.array_equal(actual, expected), f"{what}: {actual} instead of {expected}"
        return
    finite = np.isfinite(expected)
    others = np.array_equal(actual[~finite], expected[~finite], equal_nan=True)
    assert others and np.isfinite(actual[finite]).all(), f"{what}: {actual} instead of {expected}"
    scale = max(np.abs(expected[finite]).max(initial=0), 1e-3)
    assert np.abs(actual[finite] - expected[finite]).max(initial=0) <= tolerance * scale, what


def compare_gradients(name: str, *args: Any, differentiable: tuple[int, ...], **options: Any) -> None:
    """Assert that float64 gradients of the operator equal central differences of the brute force."""

    def total(*call: Any) -> float:
        return sum(float((array * weight).sum()) for array, weight in zip(run(*call), weights))

    def run(*call: Any) -> list[np.ndarray]:
        return arrays(getattr(brute_force, name)(*call, **options))

    weights = [np.random.standard_normal(array.shape) for array in run(*args)]
    inputs = [leaf for index in differentiable for leaf in leaves(args[index])]
    tracked = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    outputs = leaves(getattr(ops, name)(*replace(args, inputs, tracked), **options))
    cotangents = [torch.as_tensor(weight, dtype=o.dtype, device=o.device) for o, weight in zip(outputs, weights)]
    gradients = torch.autograd.grad(outputs, tracked, cotangents)
    for place, gradient in enumerate(gradients):

        def moved(tensor: Tensor) -> float:
            return total(*replace(args, [inputs[place]], [tensor]))

        expected = brute_force.numeric_gradient(moved, inputs[place])
        assert np.abs(expected).max() > 0.01, "the case has a gradient to compare"
        np.testing.assert_allclose(gradient.cpu().numpy(), expected, atol=1e-7, rtol=1e-6)


def replace(args: Any, old: list[Tensor], new: list[Tensor]) -> Any:
    """Replace tensors within nested `args`."""
    if isinstance(args, Tensor):
        return next((new_tensor for old_tensor, new_tensor in zip(old, new) if old_tensor is args), args)
    if isinstance(args, (list, tuple)):
        parts = [replace(item, old, new) for item in args]
        return type(args)(*parts) if hasattr(args, "_fields") else type(args)(parts)
    return args


def rows(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# A valid RoI, then RoIs with one unusual or invalid value each.
ROIS = rows(
    [0, 1.3, 2.1, 9.7, 8.2],
    [1, -3.0, -2.0, 30.0, 25.0],  # reaches beyond the map
    [0, 9.7, 8.2, 1.3, 2.1],  # reversed
    [0, 9.7, 2.1, 1.3, 8.2],  # reversed along x: a negative area
    [0, 4.0, 4.0, 4.0, 4.0],  # empty
    [0, 40.0, 40.0, 50.0, 50.0],  # outside
    [2, 1.3, 2.1, 9.7, 8.2],  # no such image
    [-1, 1.3, 2.1, 9.7, 8.2],
    [-0.5, 1.3, 2.1, 9.7, 8.2],
    [1.5, 1.3, 2.1, 9.7, 8.2],  # the index is truncated: image 1
    [NAN, 1.3, 2.1, 9.7, 8.2],
    [0, NAN, 2.1, 9.7, 8.2],
    [0, 1.3, 2.1, INF, 8.2],
    [0, 1.3, 2.1, 1e300, 8.2],  # infinite in float32
    [0, 1.3, 2.1, 3e38, 8.2],  # so large that the mean is 0
)


class TestRoiAlign:
    @DTYPES
    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    def test_boxes(self, dtype: torch.dtype, aligned: bool, sampling_ratio: int) -> None:
        features = random(2, 3, 6, 7).to(dtype)
        compare("roi_align", features, ROIS, (2, 3), 0.5, sampling_ratio, aligned, dtype=dtype)

    def test_list_of_boxes_and_no_boxes(self) -> None:
        features, boxes = random(2, 3, 6, 7), [ROIS[:2, 1:], ROIS[2:3, 1:]]
        of_list = ops.roi_align(features, boxes, 2).cpu().numpy()
        assert_same(of_list, brute_force.roi_align(features, boxes, 2), 1e-12, "boxes per image")
        compare("roi_align", random(2, 3, 6, 7), ROIS[:0], 2, dtype=torch.float64)

    @pytest.mark.parametrize("shape", [(2, 3, 0, 7), (0, 3, 6, 7), (2, 0, 6, 7)])
    def test_empty_map(self, shape: tuple[int, ...]) -> None:
        compare("roi_align", random(*shape), ROIS, 2, 0.5, 2, dtype=torch.float64)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_features_that_are_not_finite(self, bad: float) -> None:
        """A non-finite cell reaches only bins in which its weight is nonzero, not those of samples on the next cell."""
        features = random(1, 1, 5, 5)
        features[0, 0, 2, 2] = bad
        places = [(y, x) for y in (0.5, 1.0, 1.5, 2.5, 3.5) for x in (1.5, 2.0, 2.5, 3.4)]
        boxes = rows(*([0, x, y, x, y] for y, x in places))
        pooled = compare("roi_align", features, boxes, 1, 1.0, 1, True, dtype=torch.float64)[0]
        assert 0 < np.isfinite(pooled).sum() < pooled.size

    def test_sample_at_the_border(self) -> None:
        """If rounding decides whether a sample is on the map, the result is that of one of the perturbed boxes."""
        features = random(1, 2, 3, 5).float()
        boxes = rows([0, -1.75, 3.5, -0.75, 12.25]).float()  # the first sample is at x = -1 up to rounding
        args = (2, 0.3, 3, True)
        actual = ops.roi_align(features, boxes, *args).cpu().numpy()
        sides = [brute_force.roi_align(features, moved, *args) for moved in brute_force.perturbed_boxes(boxes)]
        assert max(np.abs(side - sides[0]).max() for side in sides) > 0.1
        assert np.all(np.min([np.abs(side - actual) for side in sides], axis=0) < 1e-5)

    def test_gradient(self) -> None:
        features = random(2, 2, 4, 5)
        compare_gradients("roi_align", features, ROIS[[0, 1, 2, 6, 11]], (2, 3), 0.5, 0, True, differentiable=(0,))


class TestMultilevelRoiAlign:
    @DTYPES
    @pytest.mark.parametrize("aligned", [False, True])
    def test_boxes(self, dtype: torch.dtype, aligned: bool) -> None:
        levels = [random(2, 3, 9, 8).to(dtype), random(2, 3, 5, 4).to(dtype), random(2, 3, 3, 2).to(dtype)]
        compare("multilevel_roi_align", levels, ROIS, (2, 3), (2, 4, 8), 0, aligned, 4, dtype=dtype)

    def test_level_by_size(self) -> None:
        """A RoI of twice the finest scale is assigned to the second level, a smaller one to the first."""
        levels = [torch.full((1, 1, 40, 40), float(level)) for level in range(3)]
        sides = (0.0, 5.0, 9.99, 10.0, 19.99, 20.0, 39.0, 1e3, 1e19, 3e38)
        boxes = rows(*([0, 0, 0, side, side] for side in sides)).float()
        pooled = compare("multilevel_roi_align", levels, boxes, 1, (1, 1, 1), 1, False, 5.0)[0]
        assert pooled[:7].ravel().tolist() == [0, 0, 0, 1, 1, 2, 2]

    def test_level_without_cells(self) -> None:
        levels = [random(2, 3, 0, 8), random(2, 3, 5, 4)]
        compare("multilevel_roi_align", levels, ROIS, 2, (2, 4), 2, False, 4, dtype=torch.float64)

    def test_gradient(self) -> None:
        levels = [random(2, 2, 4, 4), random(2, 2, 2, 2)]
        compare_gradients("multilevel_roi_align", levels, ROIS, 2, (2, 4), 0, True, 4, differentiable=(0,))


# Copies of a box, each with one coordinate or more changed.
NMS_BOXES = rows(
    [0, 0, 10, 10],
    [0, 0, 10, 5],  # intersection over union 0.5 with the first
    [0, 0, 10, 10],
    [20, 20, 30, 30],
    [10, 10, 0, 0],  # reversed
    [0, 0, 0, 10],  # empty
    [0, NAN, 10, 10],
    [0, 0, INF, 10],
    [-INF, -INF, INF, INF],
    [0, 0, 3e38, 3e38],  # finite, but its area overflows in float32
    [0, 0, 1e300, 1e300],
    [0, 0, 1e-30, 1e-30],  # its area is 0 in float32
    [0, 0, 10, 10],
)
NMS_SCORES = rows(0.5, 0.75, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, NAN)


class TestNms:
    @DTYPES
    @pytest.mark.parametrize("threshold", [0, 0.25, 0.5, 1 / 3, 1])
    def test_boxes(self, dtype: torch.dtype, threshold: float) -> None:
        boxes = NMS_BOXES.clamp(-6e4, 6e4) if dtype == torch.float16 else NMS_BOXES
        compare("nms", boxes.to(dtype), NMS_SCORES.to(dtype), threshold)

    def test_overlap_at_the_threshold(self) -> None:
        """A box whose overlap equals the threshold is kept; one float64 tensor makes the comparison float64."""
        boxes = rows([0, 0, 10, 10], [0, 0, 10, 7])
        for scores_dtype in (torch.float32, torch.float64):
            for threshold in (0.7, 0.7 - 1e-9, 0.7 + 1e-9):
                compare("nms", boxes.float(), rows(0.9, 0.8).to(scores_dtype), threshold)

    def test_scores(self) -> None:
        """Infinite scores are first and last, equal scores are ordered by row, and -0 equals 0."""
        boxes = rows(*([20 * k, 0, 20 * k + 10, 10] for k in range(7)))
        kept = compare("nms", boxes, rows(-0.0, 0.0, INF, -INF, 0.0, NAN, -0.0), 0.5)[0]
        assert kept.tolist() == [2, 0, 1, 4, 6, 3]

    def test_no_boxes(self) -> None:
        compare("nms", rows().reshape(0, 4), rows(), 0.5)

    def test_classes(self) -> None:
        idxs = torch.tensor([0, 2**62, -(2**63), 0, 1, 1, 0, 1, 1, 1, 1, 0, 0])
        compare("batched_nms", NMS_BOXES, NMS_SCORES, idxs, 0.3)


class TestMulticlassNms:
    @pytest.mark.parametrize("most", [0, 3, 50])
    def test_batch(self, most: int) -> None:
        boxes = torch.stack([NMS_BOXES, NMS_BOXES.flip(0)])
        scores = torch.stack([NMS_SCORES, NMS_SCORES * 0.5, torch.full_like(NMS_SCORES, 0.5)], dim=1).expand(2, -1, -1)
        for dtype in (torch.float64, torch.float32):
            compare("multiclass_nms", boxes.to(dtype), scores.to(dtype), 0.25, 0.3, most)

    def test_score_at_the_threshold(self) -> None:
        """A score must be strictly larger; for float32 scores the threshold is rounded to float32."""
        boxes = rows([0, 0, 10, 10], [20, 0, 30, 10]).float()
        for dtype in TOLERANCE:
            compare("multiclass_nms", boxes, rows([0.3, 0.25], [0.3000001, 0.5]).to(dtype), 0.3, 0.5, 4)

    def test_one_image_and_nothing(self) -> None:
        compare("multiclass_nms", NMS_BOXES, NMS_SCORES[:, None], 0.6, 0.5, 4)
        compare("multiclass_nms", NMS_BOXES, rows().reshape(13, 0), 0.6, 0.5, 4)
        compare("multiclass_nms", rows().reshape(0, 4), rows().reshape(0, 2), 0.6, 0.5, 4)


class TestSelectCandidates:
    @DTYPES
    @pytest.mark.parametrize("per_level", [0, 7, 100])
    def test_bad_values(self, dtype: torch.dtype, per_level: int) -> None:
        """Logits are tied or not finite, deltas not finite or huge, anchors reversed, empty or not finite."""
        logits = [(random(2, 6, 4, 5) * 2).round() / 2, random(2, 6, 2, 3)]
        deltas = [random(2, 8, 4, 5), random(2, 8, 2, 3)]
        logits[0][0, :, 1, 2], logits[0][1, :3, 0, 0] = rows(NAN, INF, -INF, NAN, NAN, NAN), -INF
        logits[1][1, 4] = NAN
        deltas[0][0, :, :2] = rows(NAN, INF, -INF, 3e38, 0, 0, NAN, -INF)[:, None, None]
        deltas[1][1, :4, 1, 1] = rows(-1e30, 1e30, 100, -100)
        base = rows([[-4, -6, 4, 6], [5, 5, -5, -5]], [[3, 3, 3, 3], [NAN, -4, INF, 4]]).float()
        levels = [[level.to(dtype) for level in tensors] for tensors in (logits, deltas)]
        valid, scale = torch.tensor([[30, 37], [-3, 1 << 62]]), rows([1, 1.5], [0.25, 2]).float()
        box_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        compare("select_candidates", *levels, base, (8, 16), valid, scale, per_level, dtype=box_dtype)

    def test_nothing(self) -> None:
        scale = torch.ones(0, 2)
        compare(
            "select_candidates",
            [random(0, 6, 2, 3)],
            [random(0, 8, 2, 3)],
            rows([[0, 0, 1, 1]] * 2).float(),
            (8,),
            torch.zeros(0, 2, dtype=torch.int64),
            scale,
            5,
        )


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
            compare("fused_subnets", *map_tensors_of((levels, parameters), dtype), dtype=dtype)

    def test_gradients(self) -> None:
        convs = ((conv(),) for _ in range(8))
        parameters = ops.SubnetParameters(*convs, segmentation_levels=1)
        compare_gradients("fused_subnets", [random(1, 2, 2, 3), random(1, 2, 1, 1)], parameters, differentiable=(0, 1))


def map_tensors_of(call: tuple[list[Tensor], ops.SubnetParameters], dtype: torch.dtype) -> tuple[Any, Any]:
    levels, parameters = call
    converted = [
        map_tensors(lambda tensor: tensor.to(dtype), value) if isinstance(value, tuple) else value
        for value in parameters
    ]
    return map_tensors(lambda tensor: tensor.to(dtype), levels), ops.SubnetParameters(*converted)


def squares(height: int, width: int, *corners: tuple[int, int, int, int]) -> Tensor:
    masks = torch.zeros(len(corners), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners):
        mask[y1:y2, x1:x2] = True
    return masks


class TestPanopticMerge:
    masks = squares(6, 8, (0, 0, 4, 4), (0, 0, 4, 5), (2, 2, 8, 6), (0, 0, 0, 0), (1, 1, 3, 3), (6, 0, 8, 2))
    labels = torch.tensor([3, 5, -7, 2**40, 1, 0])
    stuff = (torch.arange(48).reshape(6, 8) // 7 - 1).to(torch.int32)  # includes -1 and labels that are too large
    boxes = rows([0, 0, 4, 4], [-5, -5, 9, 9], [2.9, 2.9, 8.9, 6.9], [NAN, 0, 8, 8], [3, 3, 1, 1], [6.5, -0.5, INF, 2])

    @pytest.mark.parametrize("box_overlap_threshold", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("overlap_threshold", [0.0, 0.25, 0.5, 1.0])
    def test_thresholds(self, overlap_threshold: float, box_overlap_threshold: float) -> None:
        for scores in ((0.9, 0.8, 0.7, 0.6, 0.5, 0.4), (0.5,) * 6, (NAN, INF, 0.2, 1, -INF, 1e300)):
            for boxes, area in ((None, 0), (self.boxes, 0), (self.boxes.float(), 3)):
                compare(
                    "panoptic_merge",
                    self.masks,
                    rows(*scores),
                    self.labels,
                    boxes,
                    self.stuff,
                    5,
                    ignored_stuff=(1,),
                    overlap_threshold=overlap_threshold,
                    box_overlap_threshold=box_overlap_threshold,
                    stuff_area_threshold=area,
                )

    def test_score_at_the_threshold(self) -> None:
        """The comparison is in float64: 0.7 in float32 is 0.69999999, which is below a threshold of 0.7."""
        for dtype in TOLERANCE:
            scores = torch.full((6,), 0.7, dtype=dtype)
            compare("panoptic_merge", self.masks, scores, self.labels, None, self.stuff, 2, score_threshold=0.7)

    def test_shares_at_the_threshold(self) -> None:
        """Equality is accepted for the overlap of a mask, the free share of a box and the area of stuff."""
        masks = squares(2, 6, (0, 0, 2, 2), (1, 0, 3, 2), (0, 0, 0, 0))
        boxes = rows([0, 0, 1, 1], [0, 0, 1, 1], [2, 0, 4, 2])
        stuff = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
        merged = compare(
            "panoptic_merge",
            masks,
            rows(0.9, 0.8, 0.7),
            torch.tensor([7, 8, 9]),
            boxes,
            stuff,
            1,
            overlap_threshold=0.5,
            box_overlap_threshold=0.5,
            stuff_area_threshold=4,
        )
        assert merged[0][0].tolist() == [1, 1, 2, 4, 3, 3]

    def test_nothing(self) -> None:
        none = (torch.zeros(0, 3, 4, dtype=torch.uint8), rows(), torch.zeros(0, dtype=torch.int64))
        compare("panoptic_merge", *none, rows().reshape(0, 4), torch.zeros(3, 4, dtype=torch.uint8), 1)
        compare("panoptic_merge", self.masks[:, :0], rows(*[1] * 6), self.labels, self.boxes, self.stuff[:0], 2)


def test_panoptic_quality_counts() -> None:
    truth, prediction = torch.randint(-2, 6, (2, 9, 11)).int()
    compare("panoptic_quality_counts", truth, prediction, 3, 2)
    compare("panoptic_quality_counts", truth[:0], prediction[:0], 0, 1)


class TestPasteMasks:
    @DTYPES
    @pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
    def test_boxes(self, dtype: torch.dtype, threshold: float) -> None:
        boxes = rows(
            [1.2, 0.7, 8.1, 6.6],
            [-3, -4, 20, 15],
            [2, 2, 6, 5],
            [3, 3, 3, 6],
            [6, 5, 2, 2],
            [NAN, 0, 5, 5],
            [0, 0, INF, 5],
            [-1e30, -1e30, 1e30, 1e30],
            [0, 0, 1e-300, 5],
        )
        compare("paste_masks", (random(9, 3, 4) * 4).to(dtype), boxes, (7, 9), threshold)

    def test_logits(self) -> None:
        """A logit of 0 is exactly 0.5, infinite logits are 0 and 1, and pixels that interpolate NaN are not set."""
        logits = rows([[0, 0, INF, INF], [0, 0, -INF, NAN], [-1, -INF, 40, 40]])
        for dtype in (torch.float64, torch.float16):
            compare("paste_masks", logits.to(dtype), rows([0, 0, 8, 8]), (9, 9), 0.5)


class TestPreprocessImages:
    @pytest.mark.parametrize("size", [(5, 7), (10, 14), (2, 3), (9, 4), (1, 1), (3, 20)])
    def test_sizes(self, size: tuple[int, int]) -> None:
        """Cover the original size, twice and exactly half of it (the mean of four pixels), and odd ratios."""
        image = torch.randint(0, 256, (5, 7, 3)).to(torch.uint8)
        halved = torch.randint(0, 256, (2 * size[0], 2 * size[1], 3)).to(torch.uint8)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            settings = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 4, dtype)
            compare("preprocess_images", [image, halved], [size, size], *settings, dtype=dtype)
            compare("preprocess_images", image, size, *settings, dtype=dtype)
        exact = ops.preprocess_images([image, halved], [size, size], *settings[:3]).cpu().numpy()
        assert np.array_equal(exact, brute_force.preprocess_images([image, halved], [size, size], *settings[:3]))


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


class TestStuffLabels:
    @DTYPES
    @pytest.mark.parametrize("sizes", [((12, 16), (12, 16)), ((10, 13), (7, 20)), ((1, 1), (3, 2))], ids=str)
    def test_sizes(self, dtype: torch.dtype, sizes: tuple) -> None:
        compare("stuff_labels", random(5, 3, 4).to(dtype), *sizes)

    def test_ties(self) -> None:
        compare("stuff_labels", torch.randint(0, 2, (1, 3, 4)).float().expand(3, 3, 4), (12, 16), (12, 16))

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_logits_that_are_not_finite(self, bad: float) -> None:
        """A non-finite value cannot be the argmax, in its cell or in pixels that interpolate it."""
        logits = random(3, 4, 4)
        logits[0] += 3
        logits[0, 1, 2] = bad
        labels = compare("stuff_labels", logits, (16, 16), (16, 16))[0]
        assert 0 < (labels != 0).sum() < labels.size
        compare("stuff_labels", torch.full((3, 2, 2), bad), (8, 8), (8, 8))
