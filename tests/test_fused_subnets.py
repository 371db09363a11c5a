# SPDX-License-Identifier: Apache-2.0
"""fused_subnets: `OpMatrix`, the fused and the composed path, every configuration, goldens, errors."""

import importlib.util

import numpy as np
import pytest
import torch
from helpers.fused_subnets_cases import (
    SIZES,
    WIRINGS,
    by_reference,
    conv,
    parameters_of,
    pyramid,
    run_fused_subnets,
    wiring,
)
from helpers.op_matrix import OpMatrix, OpSample
from helpers.tensors import THIN_SHAPES, assert_near, map_tensors

from spatialflow import ops


def raw(levels, convs, flow_source="reg", segmentation_levels=3, algorithm="auto"):
    packed, biases = [], []
    for convolutions in convs:
        for pair in convolutions:
            weight = None if pair is None else pair[0]
            packed.append(torch.empty(0, dtype=torch.float64) if pair is None else ops.pack_conv3x3(weight).packed)
            biases.append(torch.zeros(0 if pair is None else weight.shape[0], dtype=torch.float64))
    counts = [len(convolutions) for convolutions in convs]
    detached = [level.detach().clone() for level in levels]  # the raw operator is for calls without gradients
    return torch.ops.spatialflow.fused_subnets, (
        detached,
        packed,
        biases,
        [0] * len(packed),
        counts,
        flow_source == "cls",
        segmentation_levels,
    )


# Inputs of ReLU are far from zero. Near zero, finite differences are wrong, and rounding to 16 bits changes ReLU masks.
def sample(channels=5, flow_source="reg", segmentation_levels=1, sizes=((7, 9), (4, 6)), batch=2, **options):
    def tensors(grow: int = 0) -> list:
        levels = pyramid(channels, [(h + grow, w + grow) for h, w in sizes], batch=batch)
        return [levels, wiring(channels=channels, source=flow_source, clear=True, **options)]

    def build() -> OpSample:
        return OpSample(
            op=run_fused_subnets,
            reference=by_reference,
            tensors=tensors(),
            options={"flow_source": flow_source, "segmentation_levels": segmentation_levels},
            differentiable=(0, 1),
            converted=(0, 1),
            raw=raw,
            resized=tensors,
            # The fake kernel does not check the channels between convolutions.
            unpredicted_errors="was packed for other channels|channels of the feature it is added to",
        )

    return build


class TestFusedSubnets(OpMatrix):
    test_slow_gradcheck = None  # gradients are those of flow_conv2d, which has this test
    has_gradient = True
    samples = {
        "one stage": sample(stages=(1, 1, 1, 1)),
        "two stages, source cls": sample(
            stages=(2, 2, 0, 0), inner=8, flows=(True, False, False, False), flow_source="cls"
        ),
        "flows alone": sample(stages=(0, 0, 0, 0), segmentation_levels=2),
    }
    linear_samples = ("flows alone",)
    thin_samples = {
        name: sample(channels, sizes=((height, width), (3, 4)), batch=batch, stages=(1, 1, 1, 1))
        for name, (batch, channels, height, width) in THIN_SHAPES.items()
        if channels  # fused_subnets requires channels
    }


class TestWirings:
    """The operator, calls of `flow_conv2d`, and the reference agree for every ablation of the paper."""

    @pytest.mark.parametrize("channels", [6, 33])
    @pytest.mark.parametrize("case", list(WIRINGS.values()), ids=list(WIRINGS))
    def test_against_reference_in_float32(self, case, channels):
        levels, convs = pyramid(channels, batch=2), wiring(channels=channels, **case)
        source = {"flow_source": case.get("source", "reg")}
        expected = by_reference(levels, convs, **source)
        single = map_tensors(torch.Tensor.float, [levels, convs])
        actual = run_fused_subnets(*single, **source)
        assert_near(actual, expected, torch.float32, factor=4)
        tracked = map_tensors(lambda t: t.clone().requires_grad_(), single)
        composed = run_fused_subnets(*tracked, **source)
        # Both paths add in the same order, so float32 results are equal. In 16 bits, they may round sums with
        # flows differently.
        for first, second in zip(actual, composed):
            assert all(torch.equal(a, b) for a, b in zip(first, second))
        packed = ops.pack_subnets(parameters_of(single[1], **source))
        for first, second in zip(actual, ops.fused_subnets(single[0], packed)):
            assert all(torch.equal(a, b) for a, b in zip(first, second))

    @pytest.mark.parametrize("algorithm", ["winograd", "direct"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_algorithms(self, algorithm, dtype):
        levels, convs = map_tensors(lambda t: t.to(dtype), [pyramid(16), wiring(channels=16, stages=(2, 2, 2, 1))])
        expected = by_reference(*map_tensors(torch.Tensor.double, [levels, convs]))
        assert_near(run_fused_subnets(levels, convs, algorithm=algorithm), expected, dtype, factor=4)

    @pytest.mark.parametrize("sizes", [SIZES[1:], [(3, 2)] * 9], ids=["pyramid", "many levels"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bit_steps_of_64_channels(self, dtype, sizes):
        """Convolutions of 64 and 128 channels share launches, with and without flows and residuals."""
        convs = wiring(channels=64, inner=128, stages=(2, 2, 1, 1))
        levels, convs = map_tensors(lambda t: t.to(dtype), [pyramid(64, sizes, batch=2), convs])
        expected = by_reference(*map_tensors(torch.Tensor.double, [levels, convs]))
        assert_near(run_fused_subnets(levels, convs), expected, dtype, factor=4)

    def test_mixed_algorithms(self):
        """A stage may contain convolutions packed for "winograd" and for "direct"."""
        levels, convs = map_tensors(torch.Tensor.float, [pyramid(8), wiring(channels=8, stages=(2, 2, 2, 1))])
        parameters = parameters_of(convs)
        mixed = ops.pack_subnets(parameters, "direct")._replace(
            flow_stuff=ops.pack_subnets(parameters, "winograd").flow_stuff,
            cls=ops.pack_subnets(parameters, "winograd").cls,
        )
        expected = by_reference(*map_tensors(torch.Tensor.double, [levels, convs]))
        assert_near(list(ops.fused_subnets(levels, mixed)), expected, torch.float32, factor=4)

    def test_inputs_are_kept(self):
        levels, convs = map_tensors(torch.Tensor.float, [pyramid(8), wiring(channels=8, stages=(2, 2, 2, 1))])
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        before = [level.clone() for level in levels]
        results = run_fused_subnets(levels, convs)
        assert all(torch.equal(first, second) for first, second in zip(levels, before))
        storages = [level.data_ptr() for maps in [levels, *results] for level in maps]
        assert len(set(storages)) == len(storages)
        assert all(level.is_contiguous(memory_format=torch.channels_last) for maps in results for level in maps)

    @pytest.mark.parametrize("segmentation_levels", [0, 1, 5])
    def test_segmentation_levels(self, segmentation_levels):
        levels, convs = pyramid(6), wiring(stages=(2, 2, 2, 1))
        wired = {"segmentation_levels": segmentation_levels}
        actual = run_fused_subnets(levels, convs, **wired)
        assert [len(maps) for maps in actual] == [5, 5, segmentation_levels, segmentation_levels]
        assert_near(actual, by_reference(levels, convs, **wired), torch.float64)

    def test_compiled_inference(self):
        levels, convs = map_tensors(torch.Tensor.float, [pyramid(8), wiring(channels=8, stages=(2, 2, 2, 1))])
        packed = ops.pack_subnets(parameters_of(convs))
        torch._dynamo.reset()
        call = torch.compile(lambda x: ops.fused_subnets(x, packed), backend="aot_eager", fullgraph=True)
        assert_near(list(call(levels)), list(ops.fused_subnets(levels, packed)), torch.float32)

    def test_empty_levels(self):
        convs = map_tensors(torch.Tensor.float, wiring(stages=(2, 2, 2, 1)))
        levels = [torch.randn(1, 6, 4, 4), torch.randn(1, 6, 0, 2), torch.randn(0, 6, 3, 3)]
        results = run_fused_subnets(levels, convs)
        assert [[tuple(m.shape) for m in maps] for maps in results] == [[tuple(x.shape) for x in levels]] * 4
        assert_near(results[3][0], by_reference(levels[:1], convs)[3][0], torch.float32)


class TestErrors:
    def test_values(self):
        levels, convs = pyramid(6), wiring()
        for wired, message in (
            ({"flow_source": "stuff"}, "flow_source must be 'reg', 'cls' or None, got 'stuff'"),
            ({"flow_source": None}, r"flow_cls\[0\] must be None, as flow_source is None"),
            ({"segmentation_levels": 6}, "segmentation_levels must be from 0 to the number of levels, 5, got 6"),
            ({"algorithm": "fft"}, "algorithm must be one of"),
        ):
            with pytest.raises(ValueError, match="fused_subnets: " + message):
                run_fused_subnets(levels, convs, **wired)
        with pytest.raises(ValueError, match="fused_subnets: levels must not be empty"):
            run_fused_subnets([], convs)
        with pytest.raises(TypeError, match=r"fused_subnets: the weight of cls\[0\] must be a tensor, got ndarray"):
            ops.fused_subnets(levels, ops.SubnetParameters(cls=((np.zeros((6, 6, 3, 3)), None),)))
        with pytest.raises(ValueError, match=r"fused_subnets: cls\[0\] must be a convolution"):
            run_fused_subnets(levels, [[None], *convs[1:]])
        with pytest.raises(ValueError, match=r"fused_subnets: reg\[0\] must have channels"):
            run_fused_subnets(levels, [convs[0], [conv(6, 0)], *convs[2:]])
        with pytest.raises(ValueError, match=r"fused_subnets: the bias of reg\[0\] must have shape \(6,\), got \(7,\)"):
            run_fused_subnets(levels, [convs[0], [[conv(6, 6)[0], conv(6, 7)[1]]], *convs[2:]])

    def test_shapes(self):
        levels = pyramid(6)
        convs = wiring()
        convs[0] = [conv(7, 6), conv(6, 6)]
        with pytest.raises(RuntimeError, match=r"fused_subnets: cls\[0\] was packed for other channels than the 6"):
            run_fused_subnets(levels, convs)
        convs = wiring()
        convs[5] = [conv(6, 6), conv(6, 7)]
        with pytest.raises(
            RuntimeError, match=r"fused_subnets: flow_stuff\[1\] must have the 6 channels of the feature"
        ):
            run_fused_subnets(levels, convs)
        with pytest.raises(RuntimeError, match=r"fused_subnets: levels\[1\] must have the dtype of levels\[0\]"):
            run_fused_subnets([levels[0], levels[1].float()], wiring(), segmentation_levels=1)
        with pytest.raises(RuntimeError, match=r"fused_subnets: packed\[0\] must be float32 for these levels"):
            run_fused_subnets(map_tensors(torch.Tensor.float, levels), wiring())


class TestGolden:
    """The released sub-networks without deformable stages: 16 channels, five levels, batch size 2."""

    names = {
        "cls": "cls_convs",
        "reg": "reg_convs",
        "stuff": "stuff_convs",
        "thing": "mask_convs",
        "flow_cls": "cls_spatial_flow_convs",
        "flow_stuff": "stuff_spatial_flow_convs",
        "flow_thing": "mask_spatial_flow_convs",
        "semantic_flow": "stuff_mask_flow_convs",
    }

    @staticmethod
    def filled(goldens, name: str, out_channels: int) -> tuple:
        spec = importlib.util.spec_from_file_location("golden_weights", goldens / "weights.py")
        weights = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(weights)
        shapes = [(f"bbox_head.{name}.weight", (out_channels, 16, 3, 3)), (f"bbox_head.{name}.bias", (out_channels,))]
        state = weights.fill_state_dict(shapes, variant="tiny")
        return tuple(torch.as_tensor(state[key]) for key, _ in shapes)

    @pytest.mark.parametrize("algorithm", ["winograd", "direct"])
    @pytest.mark.parametrize("tracked", [False, True], ids=["operator", "composed"])
    def test_outputs_and_gradients(self, large_goldens, algorithm, tracked):
        expected = np.load(large_goldens / "dcn" / "head_none.npz")
        levels = [torch.as_tensor(expected[f"feat{i}"]).requires_grad_(tracked) for i in range(5)]
        lists = {
            field: tuple(
                self.filled(large_goldens, f"{name}.{s}.conv", 16)
                for s in range(1 if field in ("thing", "flow_thing", "semantic_flow") else 4)
            )
            for field, name in self.names.items()
        }
        features = ops.fused_subnets(levels, ops.SubnetParameters(**lists), algorithm)
        results = {"cls": features.cls, "reg": features.reg, "stuff": features.stuff, "mask": features.thing}
        for task, name in (("cls", "retina_cls"), ("reg", "retina_reg")):
            conv = self.filled(large_goldens, name, 36)
            results[task] = ops.flow_conv2d(results[task], None, *conv, False, algorithm)
        loss = torch.zeros(())
        for task, key in (("cls", "cls_score"), ("reg", "bbox_pred"), ("stuff", "stuff_feat"), ("mask", "mask_feat")):
            for i, result in enumerate(results[task]):
                assert_near(result, torch.as_tensor(expected[f"{key}_l{i}"]), torch.float32, factor=5, what=key)
                loss = loss + (result * torch.as_tensor(expected[f"gw_{task}{i}"])).sum()
        if tracked:
            for i, gradient in enumerate(torch.autograd.grad(loss, levels)):
                assert_near(gradient, torch.as_tensor(expected[f"grad_feat{i}"]), torch.float32, factor=5)
