# SPDX-License-Identifier: Apache-2.0
"""The host reads nothing back between uploading images and the fixed-size result; tested without a GPU.

The pipeline runs on meta tensors. They stand for a device whose tensors have shapes and dtypes but no values, so
reading a value is an error. A dispatch mode also forbids two things that meta tensors allow: uploads and mixed devices.
"""

import numpy as np
import pytest
import torch
from helpers.small_models import random_model
from torch.utils._python_dispatch import TorchDispatchMode

from spatialflow.config import load_config
from spatialflow.data.transforms import compute_resize
from spatialflow.engine.pipeline import Pipeline
from spatialflow.models import postprocess
from spatialflow.models.optimized import layers
from spatialflow.models.optimized.inference import optimize_for_inference

DEVICE = torch.device("meta")
GEOMETRIES = tuple((compute_resize(size, 96, 128),) for size in ((193, 250), (200, 240)))
"""Two images of the same padded size, without test-time augmentation."""


@pytest.fixture(autouse=True)
def tensors_on_the_cpu():
    """Create tensors on the CPU, also on a machine with a GPU: all but those on `DEVICE` are on the host."""
    with torch.device("cpu"):
        yield


class HostRead(AssertionError):
    """The host read a tensor, or a tensor moved between host and device."""


class ForbidHostReads(TorchDispatchMode):
    """Fail on operators whose result needs a value on the host, and on copies between devices."""

    names = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "spatialflow::nms", "spatialflow::batched_nms")
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    indexing = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name in self.indexing:  # only boolean masks give a data-dependent shape
            forbidden = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        else:
            forbidden = name in self.names or any(tag in func.tags for tag in self.tags)
        result = None if forbidden else func(*args, **(kwargs or {}))
        devices = {
            t.device for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor) and t.dim()
        }
        if forbidden or len(devices) > 1:
            raise HostRead(f"{func} on {', '.join(map(str, devices))}")
        return result


def pictures():
    return [torch.randint(256, (*geometry.original_size, 3), dtype=torch.uint8) for (geometry,) in GEOMETRIES]


def run_on_meta(*networks, dtype=torch.bfloat16, **overrides):
    """Run the pipeline on meta tensors; only the steps before the pipeline may upload."""
    pipeline = Pipeline(networks, load_config(networks[0].config, **overrides), (2,), DEVICE, dtype, True)
    geometries = (
        [pipeline.geometries(geometry.original_size) for (geometry,) in GEOMETRIES] if overrides else GEOMETRIES
    )
    plan, pixels = pipeline.plan(geometries), [picture.to(DEVICE) for picture in pictures()]
    with ForbidHostReads():
        return pipeline(pixels, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("tiny", {}),
        ("tiny_dcn", {}),
        ("retinanet_r50_coco", {}),
        ("tiny", dict(stuff_head=False, stuff_stages=0, flow_to_stuff=False, flow_stuff_to_thing=False)),
        ("tiny", dict(box_fill=False, candidates_per_level=0)),
    ],
)
def test_nothing_is_read(name, overrides, dtype):
    """Every result is on the device, and its shape depends only on the settings and the sizes of the images."""
    model = random_model(name, **overrides)
    results = run_on_meta(optimize_for_inference(model, DEVICE, dtype), dtype=dtype)
    most = model.config.test.max_detections
    for result, (geometry,) in zip(results, GEOMETRIES):
        assert result.boxes.shape == (most, 4) and result.scores.shape == result.labels.shape == (most,)
        assert result.mask_logits is None or result.mask_logits.shape == (most, 28, 28)
        assert result.merged.id_map.shape == geometry.original_size and result.merged.id_map.dtype == torch.int32
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]
        assert all(t.device == DEVICE for t in leaves)


def test_plain_modules_read_nothing_either():
    assert len(run_on_meta(random_model("tiny_dcn").to(DEVICE, torch.bfloat16))) == len(GEOMETRIES)


def test_augmented_ensembles_read_nothing():
    networks = [optimize_for_inference(random_model("tiny"), DEVICE, torch.bfloat16) for _ in range(2)]
    results = run_on_meta(*networks, test_short_edges=(96, 64), test_long_edge=128, test_flip=True)
    assert [result.merged.id_map.shape for result in results] == [geometry.original_size for (geometry,) in GEOMETRIES]


PLANTED = {
    "item": lambda detections: detections.count.sum().item(),
    "int": lambda detections: detections.boxes[:, : int(detections.count.max())],
    "bool": lambda detections: bool(detections.scores.any()),
    "tolist": lambda detections: detections.count.tolist(),
    "numpy": lambda detections: detections.count.numpy(),
    "cpu": lambda detections: detections.scores.cpu(),
    "to": lambda detections: detections.scores.to("cpu", non_blocking=True),
    "upload": lambda detections: detections.scores + torch.ones(detections.scores.shape).to(detections.scores.device),
    "copy": lambda detections: torch.empty(detections.scores.shape).copy_(detections.scores),
    "nonzero": lambda detections: (detections.scores > 0.5).nonzero(),
    "boolean index": lambda detections: detections.boxes[detections.scores > 0.5],
    "masked_select": lambda detections: detections.scores.masked_select(detections.scores > 0.5),
    "unique": lambda detections: detections.labels.unique(),
    "repeat_interleave": lambda detections: detections.labels[0].repeat_interleave(detections.labels[0].clamp(min=0)),
    "equal": lambda detections: torch.equal(detections.scores, detections.scores),
    "mixed devices": lambda detections: detections.scores + torch.ones(detections.scores.shape),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_planted_reads_are_found(monkeypatch, plant):
    """Each way to read a value, inserted after the detections, is reported."""
    plain = postprocess.detect

    def detect(candidates, test):
        detections = plain(candidates, test)
        plant(detections)
        return detections

    monkeypatch.setattr(postprocess, "detect", detect)
    with pytest.raises(Exception) as caught:
        run_on_meta(optimize_for_inference(random_model("tiny"), DEVICE, torch.bfloat16))
    assert isinstance(caught.value, HostRead) or "meta" in str(caught.value), caught.value


@pytest.mark.parametrize("masks", [True, False])
def test_fixed_shapes_change_no_result(monkeypatch, masks):
    """Results with padding rows equal those without, and a CPU pipeline with `reads_counts = False` reads no value.

    Some rows are padding, and some detections do not enter the map. The convolutions of the mask head compute only the
    rows whose masks are used.
    """
    flags, convolve = [], layers.flow_conv2d

    def noted(*args, active=None, **options):
        flags.append(active)
        return convolve(*args, active=active, **options)

    monkeypatch.setattr(layers, "flow_conv2d", noted)
    model = random_model("tiny", stuff_area_threshold=20)
    with torch.no_grad():
        model.box_head.class_logits.weight.mul_(0.01)  # scores below 1
    network, pixels = optimize_for_inference(model), pictures()

    def pipeline_of(**overrides):
        config = load_config(model.config, **overrides)
        return Pipeline([network], config, (), torch.device("cpu"), torch.float32, masks)

    pipeline = pipeline_of()
    plan = pipeline.plan(GEOMETRIES)
    scores = torch.cat([result.scores for result in pipeline(pixels, plan)])
    score_threshold, instance_threshold = scores.quantile(torch.tensor([0.2, 0.6])).tolist()
    pipeline = pipeline_of(score_threshold=score_threshold, instance_score_threshold=instance_threshold)
    short = pipeline(pixels, plan)
    assert flags and all(active is None for active in flags)
    flags.clear()
    pipeline.reads_counts = False
    with ForbidHostReads():
        fixed = pipeline(pixels, plan)
    labels, scores = torch.cat([result.labels for result in fixed]), torch.cat([result.scores for result in fixed])
    wanted = labels >= 0
    detections, in_map = int(wanted.sum()), int((wanted & (scores >= instance_threshold)).sum())
    assert 0 < in_map < detections < len(wanted)
    if not masks:
        wanted &= scores >= instance_threshold
    row_flags, convs = [active for active in flags if active is not None], len(network.thing_head.convs)
    for index in range(convs):  # a convolution runs once for each chunk of RoIs
        assert torch.equal(torch.cat(row_flags[index::convs]), wanted)
    for expected, result in zip(short, fixed):
        count = int(expected.count)
        assert 0 < count == int(result.count) and len(result.scores) == network.config.test.max_detections
        assert (expected.mask_logits is not None) == (result.mask_logits is not None) == masks
        for name in ("boxes", "scores", "labels", *(("mask_logits",) if masks else ())):
            torch.testing.assert_close(getattr(result, name)[:count], getattr(expected, name)[:count])
        assert (result.labels[count:] == -1).all()
        used = int(expected.merged.count)
        assert used > 0 and used == int(result.merged.count)
        np.testing.assert_array_equal(result.merged.id_map, expected.merged.id_map)
        for name in ("labels", "is_thing", "areas", "boxes", "scores"):
            torch.testing.assert_close(getattr(result.merged, name)[:used], getattr(expected.merged, name)[:used])
