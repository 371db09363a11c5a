# SPDX-License-Identifier: Apache-2.0
"""Kernels launched for one image: few, and none to convert layouts or weights; counted on meta tensors."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from spatialflow import ops

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ON_INTERPRETER = os.environ.get("SPATIALFLOW_BACKEND") == "simt"

pytest.importorskip("matplotlib", reason="the benchmark harness needs matplotlib")
if not FOLDER.is_dir():
    pytest.skip("not in a source tree", allow_module_level=True)


@pytest.fixture
def kernel_count(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    with torch.device("cpu"):  # also on a machine with a GPU
        yield importlib.import_module("kernel_count")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_r50(kernel_count, dtype):
    """The network of the paper at 800x1333."""
    counts = kernel_count.count("spatialflow_r50_coco", (800, 1333), dtype)
    assert sum(counts.layouts.values()) == 0, counts.layouts
    assert sum(counts.casts.values()) == 0, counts.casts
    assert sum(counts.kernels.values()) <= 200, counts.kernels


def test_a_batch_costs_few_kernels_more(kernel_count):
    """The network runs once per batch; only planning, masks, stuff labels and merging depend on the batch size."""
    single, batched = (kernel_count.count("tiny", (128, 160), torch.bfloat16, batch).kernels for batch in (1, 8))
    assert {stage for stage in single if single[stage] != batched[stage]} <= {"plan", "masks", "stuff", "merge"}


@pytest.mark.parametrize("config", ["tiny", "tiny_dcn", "retinanet_r50_coco"])
def test_other_networks_convert_nothing(kernel_count, config):
    counts = kernel_count.count(config, (128, 160), torch.bfloat16)
    assert sum(counts.layouts.values()) == 0, counts.layouts
    assert sum(counts.casts.values()) == 0, counts.casts


class TestCounting:
    def counted(self, kernel_count, call, *tensors, parameters=()):
        counter = kernel_count.CountKernels(parameters)
        with counter, torch.inference_mode():
            call(*tensors)
        return tuple(sum(part.values()) for part in (counter.kernels, counter.layouts, counter.casts))

    @pytest.fixture
    def maps(self):
        return torch.empty(1, 8, 6, 6, device="meta").contiguous(memory_format=torch.channels_last)

    def test_views_are_free_and_copies_are_not(self, kernel_count, maps):
        for call, kernels in (
            (lambda t: t.permute(0, 2, 3, 1).reshape(1, 36, 8), 0),
            (lambda t: t.flatten(1), 1),
            (lambda t: t.to(torch.bfloat16), 1),
            (lambda t: t.to(torch.float32), 0),
            (lambda t: t + 1, 1),
            (lambda t: torch.empty_like(t), 0),
        ):
            assert self.counted(kernel_count, call, maps)[0] == kernels

    def test_layout_conversions_are_found(self, kernel_count, maps):
        norm = torch.nn.GroupNorm(2, 8, device="meta")
        conv = ops.pack_conv3x3(torch.empty(8, 8, 3, 3, device="meta"))
        for call, kernels, conversions in (
            (lambda t: t.contiguous(), 1, 1),
            (norm, 4, 1),  # torch's GroupNorm copies channels-last maps on CUDA
            (lambda t: ops.flow_conv2d(t, None, conv), 1, 0),
            (
                lambda t: ops.flow_conv2d(norm(t), None, conv),
                7,
                3,
            ),  # two more conversions, before and after the convolution
        ):
            assert self.counted(kernel_count, call, maps)[:2] == (kernels, conversions)

    def test_casts_of_weights_are_found(self, kernel_count, maps):
        weight, bias = torch.empty(8, 8, 3, 3, device="meta"), torch.empty(8, device="meta", dtype=torch.bfloat16)
        halves = maps.to(torch.bfloat16)
        conv = ops.pack_conv3x3(weight.to(torch.bfloat16), bias)
        assert self.counted(kernel_count, lambda t: ops.flow_conv2d(t, None, conv), halves)[2] == 0
        cast = conv._replace(packed_bias=bias)
        assert self.counted(kernel_count, lambda t: ops.flow_conv2d(t, None, cast), halves) == (2, 0, 1)
        assert self.counted(kernel_count, lambda t: weight.to(t.dtype), halves, parameters=[weight]) == (1, 0, 1)

    def test_casts_of_offsets_are_found(self, kernel_count, maps):
        """Offsets and mask are cast to float32 by two kernels, or by one launch with a packed weight."""
        halves, weight = maps.to(torch.bfloat16), torch.empty(8, 8, 3, 3, device="meta", dtype=torch.bfloat16)
        offset, mask = (
            torch.empty(1, channels, 6, 6, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            for channels in (18, 9)
        )
        for conv_weight, kernels, kernels_in_float32 in ((weight, 4, 2), (ops.pack_deform_conv2d(weight), 2, 1)):
            for operands, expected in (((offset, mask), kernels), ((offset.float(), mask.float()), kernels_in_float32)):

                def call(t, operands=operands, conv_weight=conv_weight):
                    return ops.deform_conv2d(t, operands[0], conv_weight, padding=1, mask=operands[1])

                assert self.counted(kernel_count, call, halves, parameters=[weight])[0] == expected


@pytest.mark.skipif(not ON_INTERPRETER, reason="counts launches of the SIMT interpreter: SPATIALFLOW_BACKEND=simt")
class TestLaunches:
    """`LAUNCHES` has the true number of kernel launches of each operator."""

    def launched(self, monkeypatch, capfd, call):
        capfd.readouterr()
        monkeypatch.setenv("SPATIALFLOW_SIMT_TRACE", "1")
        call()
        monkeypatch.delenv("SPATIALFLOW_SIMT_TRACE")
        return capfd.readouterr().err.count("launch: ")

    def calls(self):
        def maps(channels, *sizes):
            return [torch.randn(1, channels, *size).bfloat16().to(memory_format=torch.channels_last) for size in sizes]

        pyramid = maps(32, (8, 12), (4, 6), (2, 3))
        conv = ops.pack_conv3x3(torch.randn(32, 32, 3, 3).bfloat16(), torch.zeros(32).bfloat16())
        deform = ops.pack_deform_conv2d(torch.randn(32, 32, 3, 3).bfloat16())
        subnets = ops.SubnetParameters(
            cls=(conv,) * 4,
            reg=(conv,) * 4,
            stuff=(conv,) * 4,
            thing=(conv,),
            flow_cls=(conv,) * 4,
            flow_stuff=(conv,) * 4,
            flow_thing=(conv,),
            semantic_flow=(conv,),
            flow_source="reg",
        )
        boxes = torch.tensor([[0.0, 0, 30, 20], [5, 5, 60, 50], [8, 2, 20, 40]])
        masks = torch.rand(3, 64, 96) > 0.5
        logits, deltas = maps(2 * 4, (8, 12), (4, 6)), maps(2 * 4, (8, 12), (4, 6))
        anchors = torch.tensor([[[-4.0, -4, 4, 4], [-8, -8, 8, 8]]] * 2)
        return {
            "_flow_conv2d_packed": lambda: ops.flow_conv2d(pyramid, pyramid, conv),
            "_flow_conv2d_group": lambda: ops.flow_conv2d([pyramid, pyramid], None, [conv, conv]),
            "fused_subnets": lambda: ops.fused_subnets(pyramid, subnets),
            "preprocess_images": lambda: ops.preprocess_images(
                [torch.zeros(30, 40, 3, dtype=torch.uint8)], [(60, 80)], (0, 0, 0), (1, 1, 1), 32, torch.bfloat16
            ),
            "multilevel_roi_align": lambda: ops.multilevel_roi_align(
                pyramid, torch.cat([torch.zeros(3, 1), boxes], 1), 7, [8, 16, 32], 0, True
            ),
            "group_norm_relu": lambda: ops.group_norm_relu(
                pyramid[0], 4, torch.ones(32).bfloat16(), torch.zeros(32).bfloat16(), upsample=True
            ),
            "select_candidates": lambda: ops.select_candidates(
                logits, deltas, anchors, [8, 16], torch.tensor([[64, 96]]), torch.ones(1, 2), 20
            ),
            "multiclass_nms": lambda: ops.multiclass_nms(boxes[None], torch.rand(1, 3, 4), 0.1, 0.5, 10),
            "deform_conv2d": lambda: ops.deform_conv2d(
                pyramid[0], *maps(18, (8, 12)), torch.randn(32, 32, 3, 3).bfloat16(), None, (1, 1), (1, 1)
            ),
            "_deform_conv2d_packed": lambda: ops.deform_conv2d(
                pyramid[0], *maps(18, (8, 12)), deform, None, (1, 1), (1, 1), 1, *maps(9, (8, 12)), mask_sigmoid=True
            ),
            "paste_masks": lambda: ops.paste_masks(torch.randn(3, 28, 28), boxes, (64, 96), 0.5),
            "stuff_labels": lambda: ops.stuff_labels(maps(6, (16, 24))[0][0], (64, 90), (50, 70)),
            "panoptic_merge": lambda: ops.panoptic_merge(
                masks,
                torch.tensor([0.9, 0.8, 0.7]),
                torch.tensor([0, 1, 0]),
                boxes,
                torch.zeros(64, 96, dtype=torch.uint8),
                2,
                score_threshold=0.5,
                stuff_area_threshold=10,
            ),
        }

    def test_launches(self, kernel_count, monkeypatch, capfd):
        wrong, calls = {}, self.calls()
        assert set(calls) == set(kernel_count.LAUNCHES)
        for name, call in calls.items():
            counter = kernel_count.CountKernels(())
            with counter, torch.inference_mode():
                call()
            counted, launched = counter.operators["other", name], self.launched(monkeypatch, capfd, call)
            if launched != counted:
                wrong[name] = f"{launched} launches, {counted} counted"
        assert wrong == {}
