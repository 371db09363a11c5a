# SPDX-License-Identifier: Apache-2.0
"""The network arranged for training has the outputs of the plain modules, and gradients arrive at their parameters."""

import pytest
import torch
from golden_models import assert_close
from small_models import VARIANTS, random_model

from spatialflow.models.optimize_training import optimize_for_training

FROM_SCRATCH = dict(backbone_norm_trains=True, backbone_frozen_stages=-1)


def outputs_and_gradients(model, network, images):
    output, quarter = network.dense(images)
    results = [*output.features, *output.class_logits, *output.box_deltas]
    if quarter is not None:
        results.append(quarter)
    if output.thing_features is not None:
        rois = torch.tensor([[0, 3.0, 5, 40, 60], [0, 0, 0, 60, 20]]).to(images)
        results.append(network.thing_logits(output.thing_features, rois, torch.tensor([0, 2])))
    generator = torch.Generator().manual_seed(0)
    sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return [r.detach() for r in results], gradients


@pytest.mark.parametrize("name, overrides", [*VARIANTS, ("tiny", FROM_SCRATCH), ("tiny_dcn", FROM_SCRATCH)])
def test_equals_the_plain_modules(name, overrides):
    """In float64; `test_training_targets.py` compares in float32 with the goldens. Frozen layers get no gradient."""
    model = random_model(name, **overrides).double().train()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected, wanted = outputs_and_gradients(model, model, images)
    actual, found = outputs_and_gradients(model, optimize_for_training(model), images)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"output {i}", one, other.numpy(), 1e-8)
    for key, gradient in wanted.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None:
            assert_close(key, found[key], gradient.numpy(), 1e-7)


def test_leaves_the_model_as_it_is():
    """Same modules, same state dict; what the arranged network trains is the model itself."""
    model = random_model("tiny").train()
    before, modules = {name: id(value) for name, value in model.named_parameters()}, list(model.modules())
    network = optimize_for_training(model)
    assert before == {name: id(value) for name, value in model.named_parameters()} and modules == list(model.modules())
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
