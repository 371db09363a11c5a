# SPDX-License-Identifier: Apache-2.0
"""Outputs and gradients of the four sub-networks, plain and deformable, equal those of the released implementation."""

import json

import numpy as np
import pytest
import torch
from helpers.golden_models import assert_close, fill_function
from torch import nn

from spatialflow.engine.checkpoints import name_from_released
from spatialflow.models import deform as deform_module
from spatialflow.models.heads import BoxHead
from spatialflow.models.subnets import Subnets


class Head(nn.Module):
    """The part of the network that the released `bbox_head` covers, with this package's names."""

    def __init__(self, channels, num_classes, deformable):
        super().__init__()
        self.subnets = Subnets(channels, channels, deformable=deformable)
        self.box_head = BoxHead(channels, num_classes, 9)


@pytest.fixture(params=["head_none", "head_config"])
def case(request, large_goldens):
    arrays = np.load(large_goldens / "dcn" / f"{request.param}.npz")
    about = json.loads((large_goldens / "dcn" / f"{request.param}.json").read_text())
    stages = {
        ours: about["idx"][f"dcn_{theirs}_convs_idx"] or ()
        for ours, theirs in (("cls", "cls"), ("reg", "reg"), ("stuff", "stuff"), ("thing", "mask"))
    }
    head = Head(about["in_channels"], about["num_classes"], stages)
    fill = fill_function(large_goldens)
    released = {name_from_released(name): name for name in about["grad_norms"]}
    assert set(released) == set(head.state_dict())
    head.load_state_dict(
        {
            name: torch.from_numpy(fill(released[name], value.shape, about["weights_variant"]))
            for name, value in head.state_dict().items()
        }
    )
    levels = [torch.from_numpy(arrays[f"feat{i}"]).requires_grad_() for i in range(5)]
    return head, levels, arrays, about, released


def run(head, levels):
    tasks = head.subnets(levels)
    cls, reg = head.box_head(tasks.cls, tasks.reg)
    return {"cls": cls, "reg": reg, "stuff": tasks.stuff, "mask": tasks.thing}


def test_outputs(case):
    head, levels, arrays, _, _ = case
    with torch.no_grad():
        outputs = run(head, levels)
    for kind, name in (
        ("cls", "cls_score_l"),
        ("reg", "bbox_pred_l"),
        ("stuff", "stuff_feat_l"),
        ("mask", "mask_feat_l"),
    ):
        for i, output in enumerate(outputs[kind]):
            assert_close(f"{kind}{i}", output, arrays[f"{name}{i}"])


def test_gradients(case):
    """Gradients of sum(output * fixed weights) with respect to the features and to every parameter."""
    head, levels, arrays, about, released = case
    outputs = run(head, levels)
    loss = sum(
        (output * torch.from_numpy(arrays[f"gw_{kind}{i}"])).sum()
        for kind in outputs
        for i, output in enumerate(outputs[kind])
    )
    assert abs(loss.item() - about["loss"]) <= 1e-4 * abs(about["loss"])
    loss.backward()
    for i, level in enumerate(levels):
        assert_close(f"gradient of P{i + 3}", level.grad, arrays[f"grad_feat{i}"])
    for name, parameter in head.named_parameters():
        expected = about["grad_norms"][released[name]]
        assert abs(float(parameter.grad.norm()) - expected) <= 1e-4 * expected, name


def test_first_deformable_calls(large_goldens, case, monkeypatch):
    """The first deformable convolutions get the recorded features, interleaved offsets and sigmoid masks."""
    head, levels, arrays, about, _ = case
    calls, original = [], deform_module.deform_conv2d

    def record(x, offset, weight, bias, *geometry, mask):
        out = original(x, offset, weight, bias, *geometry, mask=mask)
        calls.append((x, offset, mask, out.relu()))  # the recorded output includes an in-place ReLU
        return out

    monkeypatch.setattr(deform_module, "deform_conv2d", record)
    with torch.no_grad():
        head.subnets(levels)
    assert len(calls) == about["num_deform_calls"]
    for i, call in enumerate(calls[:2]):
        for value, name in zip(call, ("x", "offset", "mask", "out")):
            if f"call{i}_{name}" in arrays:
                assert_close(f"call {i} {name}", value, arrays[f"call{i}_{name}"])
