# SPDX-License-Identifier: Apache-2.0
"""From the uploaded images to the fixed-size result the host reads nothing back, shown on a machine without a GPU.

The pipeline runs on meta tensors: they stand for a device that has shapes and dtypes but no values, so that whoever
asks for a value gets an error. A dispatch mode beside it forbids what meta tensors would let pass: uploads, and mixed
devices.
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
"""Two images of one padded size, in one view."""


@pytest.fixture(autouse=True)
def tensors_on_the_cpu():
    """On a machine with a GPU too: what is not on `DEVICE` is on the host."""
    with torch.device("cpu"):
        yield


class HostRead(AssertionError):
    """A tensor was read by the host, or crossed between host and device."""


class ForbidHostReads(TorchDispatchMode):
    """Fails on operators whose result needs a value on the host, and on copies between devices."""

    names = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "spatialflow::nms", "spatialflow::batched_nms")
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    indexing = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name in self.indexing:  # their tag is about masks alone
            forbidden = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        else:
            forbidden = name in self.names or any(tag in func.tags for tag in self.tags)
        result = None if forbidden else func(*args, **(kwargs or {}))
        places = {
            t.device for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor) and t.dim()
        }
        if forbidden or len(places) > 1:
            raise HostRead(f"{func} on {', '.join(map(str, places))}")
        return result


def pictures():
    return [torch.randint(256, (*one.original_size, 3), dtype=torch.uint8) for (one,) in GEOMETRIES]


def run_on_meta(*networks, dtype=torch.bfloat16, **overrides):
    """Results of the pipeline for images that are nowhere; everything before it is at liberty to upload."""
    pipeline = Pipeline(networks, load_config(networks[0].config, **overrides), (2,), DEVICE, dtype, True)
    geometries = [pipeline.geometries(one.original_size) for (one,) in GEOMETRIES] if overrides else GEOMETRIES
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
    """Every result is on the device and its shape follows from the settings."""
    model = random_model(name, **overrides)
    results = run_on_meta(optimize_for_inference(model, DEVICE, dtype), dtype=dtype)
    most = model.config.test.max_detections
    for result, (fitted,) in zip(results, GEOMETRIES):
        assert result.boxes.shape == (most, 4) and result.scores.shape == result.labels.shape == (most,)
        assert result.mask_logits is None or result.mask_logits.shape == (most, 28, 28)
        assert result.merged.id_map.shape == fitted.original_size and result.merged.id_map.dtype == torch.int32
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]
        assert all(t.device == DEVICE for t in leaves)


def test_plain_modules_read_nothing_either():
    assert len(run_on_meta(random_model("tiny_dcn").to(DEVICE, torch.bfloat16))) == len(GEOMETRIES)


def test_augmented_ensembles_read_nothing():
    networks = [optimize_for_inference(random_model("tiny"), DEVICE, torch.bfloat16) for _ in range(2)]
    results = run_on_meta(*networks, test_short_edges=(96, 64), test_long_edge=128, test_flip=True)
    assert [result.merged.id_map.shape for result in results] == [one.original_size for (one,) in GEOMETRIES]


PLANTED = {
    "item": lambda found: found.count.sum().item(),
    "int": lambda found: found.boxes[:, : int(found.count.max())],
    "bool": lambda found: bool(found.scores.any()),
    "tolist": lambda found: found.count.tolist(),
    "numpy": lambda found: found.count.numpy(),
    "cpu": lambda found: found.scores.cpu(),
    "to": lambda found: found.scores.to("cpu", non_blocking=True),
    "upload": lambda found: found.scores + torch.ones(found.scores.shape).to(found.scores.device),
    "copy": lambda found: torch.empty(found.scores.shape).copy_(found.scores),
    "nonzero": lambda found: (found.scores > 0.5).nonzero(),
    "boolean index": lambda found: found.boxes[found.scores > 0.5],
    "masked_select": lambda found: found.scores.masked_select(found.scores > 0.5),
    "unique": lambda found: found.labels.unique(),
    "repeat_interleave": lambda found: found.labels[0].repeat_interleave(found.labels[0].clamp(min=0)),
    "equal": lambda found: torch.equal(found.scores, found.scores),
    "mixed devices": lambda found: found.scores + torch.ones(found.scores.shape),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_planted_reads_are_found(monkeypatch, plant):
    """The test of the test: each way to read a value back, planted behind the detections, is reported."""
    plain = postprocess.detect

    def detect(candidates, test):
        found = plain(candidates, test)
        plant(found)
        return found

    monkeypatch.setattr(postprocess, "detect", detect)
    with pytest.raises(Exception) as caught:
        run_on_meta(optimize_for_inference(random_model("tiny"), DEVICE, torch.bfloat16))
    assert isinstance(caught.value, HostRead) or "meta" in str(caught.value), caught.value


@pytest.mark.parametrize("masks", [True, False])
def test_fixed_shapes_change_no_result(monkeypatch, masks):
    """Padding rows through the whole path give what the CPU's shorter way gives, and read nothing on real tensors.

    Some rows are padding, and some detections do not enter the map. The convolutions of the mask head compute the rows
    whose masks are used.
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
    scores = torch.cat([one.scores for one in pipeline(pixels, plan)])
    least, enough = scores.quantile(torch.tensor([0.2, 0.6])).tolist()
    pipeline = pipeline_of(score_threshold=least, instance_score_threshold=enough)
    short = pipeline(pixels, plan)
    assert flags and all(active is None for active in flags)
    flags.clear()
    pipeline.reads_counts = False
    with ForbidHostReads():
        fixed = pipeline(pixels, plan)
    labels, scores = torch.cat([one.labels for one in fixed]), torch.cat([one.scores for one in fixed])
    wanted = labels >= 0
    detections, entering = int(wanted.sum()), int((wanted & (scores >= enough)).sum())
    assert 0 < entering < detections < len(wanted)
    if not masks:
        wanted &= scores >= enough
    given, convs = [active for active in flags if active is not None], len(network.thing_head.convs)
    for index in range(convs):  # of each piece of the detections
        assert torch.equal(torch.cat(given[index::convs]), wanted)
    for one, other in zip(short, fixed):
        count = int(one.count)
        assert 0 < count == int(other.count) and len(other.scores) == network.config.test.max_detections
        assert (one.mask_logits is not None) == (other.mask_logits is not None) == masks
        for name in ("boxes", "scores", "labels", *(("mask_logits",) if masks else ())):
            torch.testing.assert_close(getattr(other, name)[:count], getattr(one, name)[:count])
        assert (other.labels[count:] == -1).all()
        used = int(one.merged.count)
        assert used > 0 and used == int(other.merged.count)
        np.testing.assert_array_equal(other.merged.id_map, one.merged.id_map)
        for name in ("labels", "is_thing", "areas", "boxes", "scores"):
            torch.testing.assert_close(getattr(other.merged, name)[:used], getattr(one.merged, name)[:used])
