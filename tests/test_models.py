# SPDX-License-Identifier: Apache-2.0
"""The modules of the network: sizes, options, freezing, initial values."""

import pytest
import torch
from helpers.small_models import SMALL
from torch import nn

from spatialflow.models.build import build_model
from spatialflow.models.fpn import FPN
from spatialflow.models.heads import BoxHead, StuffHead, ThingHead, upsample_stuff_logits
from spatialflow.models.resnet import ResNet
from spatialflow.models.subnets import Subnets


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(depth=50), 25_557_032 - 2_049_000),
        (dict(depth=101), 44_549_160 - 2_049_000),
        (dict(depth=101, groups=64, group_width=4), 83_455_272 - 2_049_000),
        (dict(depth=101, groups=32, group_width=4), 44_177_704 - 2_049_000),
    ],
)
def test_backbone_sizes(options, expected):
    """Parameter counts are those published for ImageNet classifiers, minus the classifier."""
    with torch.device("meta"):
        assert count(ResNet(**options)) == expected


def test_whole_network_has_the_released_number_of_parameters():
    with torch.device("meta"):
        model = build_model("spatialflow_r50_coco")
    assert len(model.state_dict()) == 416 and count(model) == 50_798_778


def test_batch_norm_stays_in_evaluation_and_frozen_stages_take_no_gradient():
    model = build_model("tiny", **SMALL).train()
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in trained)
    assert "layer2.0.bn1.weight" in trained and "layer4.2.conv3.weight" in trained
    before = model.backbone.layer2[0].bn1.running_mean.clone()
    output = model(torch.randn(1, 3, 64, 64))
    sum(f.sum() for f in output.class_logits).backward()
    assert torch.equal(model.backbone.layer2[0].bn1.running_mean, before)
    assert model.backbone.layer1[0].conv1.weight.grad is None and model.backbone.layer2[0].conv1.weight.grad is not None


@pytest.mark.parametrize(
    "stages, first_trained", [(-1, "conv1.weight"), (0, "layer1.0.conv1.weight"), (2, "layer3.0.conv1.weight")]
)
def test_frozen_stages(stages, first_trained):
    backbone = ResNet(50, 4, frozen_stages=stages)
    assert next(name for name, p in backbone.named_parameters() if p.requires_grad) == first_trained


def test_deformable_stages_start_as_ordinary_convolutions():
    """Offsets of 0 and a mask of 0.5 give half the ordinary convolution, also with stride and groups."""
    backbone = ResNet(50, 4, groups=2, group_width=4, deformable_stages=(2,), frozen_stages=-1)
    conv = backbone.layer2[0].conv2
    x = torch.randn(2, conv.in_channels, 9, 7)
    plain = nn.functional.conv2d(x, conv.weight, None, stride=2, padding=1, groups=2)
    torch.testing.assert_close(conv(x), plain / 2, rtol=1e-5, atol=1e-6)
    assert not hasattr(backbone.layer1[0].conv2, "conv_offset") and not hasattr(backbone.layer3[0].conv2, "conv_offset")


def test_pyramid_of_odd_sizes():
    """Top-down upsampling produces the exact size of the lower level."""
    sizes = [(13, 21), (7, 11), (4, 6)]
    levels = FPN((2, 3, 4), 5)([torch.randn(1, c, *size) for c, size in zip((2, 3, 4), sizes)])
    assert [level.shape[1:] for level in levels] == [(5, *s) for s in [*sizes, (2, 3), (1, 2)]]


@pytest.mark.parametrize("source", ["reg", "cls"])
def test_each_flow_connects_what_it_names(source):
    """The gradient of a task reaches the source sub-network exactly if the flow to the task is enabled."""
    follower = "cls" if source == "reg" else "reg"
    levels = [torch.randn(1, 4, 8, 8) for _ in range(5)]
    tasks = {follower: "flow_to_detection", "stuff": "flow_to_stuff", "thing": "flow_to_thing"}
    for stages in ((4, 1), (2, 3), (0, 0)):
        for task, switch in tasks.items():
            flows = dict.fromkeys(tasks.values(), False) | {switch: True}
            net = Subnets(
                4,
                4,
                stuff_stages=stages[0],
                thing_stages=stages[1],
                flow_source=source,
                flow_stuff_to_thing=False,
                **flows,
            )
            nn.init.normal_(net.get_submodule(source)[0].weight)
            for target in tasks:
                net.zero_grad()
                feature = getattr(net(levels), target)[0]
                if feature.requires_grad:
                    feature.square().sum().backward()
                reached = net.get_submodule(source)[0].weight.grad is not None
                assert reached == (target == task), (stages, task, target)


def test_semantic_flow_and_absent_flows():
    levels = [torch.randn(1, 4, 8, 8) for _ in range(5)]
    net = Subnets(4, 4, flow_to_detection=False, flow_to_stuff=False, flow_to_thing=False)
    net(levels).thing[0].sum().backward()
    assert net.stuff[3].weight.grad is not None and net.reg[0].weight.grad is None
    alone = Subnets(4, 4, flow_source=None)
    assert {name.split(".")[0] for name, _ in alone.named_parameters() if "flow" in name} == {"semantic_flow"}
    none = Subnets(4, 4, flow_source=None, flow_stuff_to_thing=False)
    assert not any("flow" in name for name, _ in none.named_parameters())
    detection = Subnets(4, 4, stuff_stages=0, thing_stages=0, segmentation=())
    assert {name.split(".")[0] for name, _ in detection.named_parameters()} == {"cls", "reg", "flow_cls"}


def test_equations_one_to_three():
    """Two stages that are written out by hand give the outputs of `Subnets`."""
    torch.manual_seed(1)
    net = Subnets(3, 3, detection_stages=2, stuff_stages=2, thing_stages=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    p = torch.randn(1, 3, 6, 5)
    reg = net.reg[0](p).relu()
    cls = net.cls[0](p + net.flow_cls[0](reg)).relu()
    stuff = net.stuff[0](p + net.flow_stuff[0](reg)).relu()
    reg = net.reg[1](reg).relu()
    cls = net.cls[1](cls + net.flow_cls[1](reg)).relu()
    stuff = net.stuff[1](stuff + net.flow_stuff[1](reg)).relu()
    thing = net.thing[0](p + net.semantic_flow[0](stuff) + net.flow_thing[0](reg)).relu()
    for outputs, expected in zip(net([p] * 5), (cls, reg, stuff, thing)):
        assert len(outputs) in (3, 5)
        torch.testing.assert_close(outputs[-1], expected)


def test_deformable_without_flow_predicts_its_own_offsets():
    net = Subnets(4, 4, flow_to_stuff=False, deformable={"stuff": (1,), "reg": (0,)})
    assert net.stuff[1].conv_offset.out_channels == 27 and net.reg[0].conv_offset.out_channels == 27
    assert net.flow_cls[0].out_channels == 4 and len(net.flow_stuff) == 0
    net([torch.randn(1, 4, 8, 8) for _ in range(5)])


def test_class_prior_and_head_shapes():
    head = BoxHead(8, 5, 9)
    assert torch.allclose(head.class_logits.bias.sigmoid(), torch.tensor(0.01))
    thing = ThingHead(8, 6, 5)
    rois, labels = torch.randn(3, 8, 14, 14), torch.tensor([4, 0, 2])
    whole = thing(rois)
    assert whole.shape == (3, 5, 28, 28)
    torch.testing.assert_close(thing(rois, labels), whole[torch.arange(3), labels])
    assert thing(rois[:0], labels[:0]).shape == (0, 28, 28)
    stuff = StuffHead(8, 8, 7, 4)
    logits = stuff([torch.randn(2, 8, 16, 8), torch.randn(2, 8, 8, 4), torch.randn(2, 8, 4, 2)])
    assert logits.shape == (2, 7, 32, 16) and upsample_stuff_logits(logits).shape == (2, 7, 128, 64)


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(3, 64, 64), r"shape \(N, 3, H, W\), got \(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating point"),
        (torch.zeros(1, 3, 60, 64), "multiples of 32"),
        (torch.zeros(0, 3, 64, 64), "at least 1"),
    ],
)
def test_wrong_images_are_refused(images, words):
    with pytest.raises(ValueError, match=f"images: .*{words}"):
        build_model("tiny", **SMALL)(images)


def test_batch_of_two_equals_two_singles():
    model = build_model("tiny", **SMALL).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        both, singles = model(images), [model(image[None]) for image in images]
    for name in both._fields:
        value = getattr(both, name)
        for i in range(2):
            single = getattr(singles[i], name)
            pairs = zip(value, single) if isinstance(value, list) else [(value, single)]
            for a, b in pairs:
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-5, atol=1e-5)
