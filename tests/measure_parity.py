# SPDX-License-Identifier: Apache-2.0
"""Print the differences between the losses and gradients of one training step and the released ones.

`python tests/measure_parity.py` measures the plain network and the network optimized for training. Both use the targets
of the plain network, as in `test_training_targets.py`. The tolerances there are 1e-5 for losses and 1e-3 for gradients.
"""

import torch
from conftest import GOLDENS
from helpers.golden_models import golden_model, relative_error
from test_training_targets import golden_batch, released_step

from spatialflow.engine.checkpoints import name_from_released
from spatialflow.models.optimized.training import optimize_for_training


def measure(optimized: bool) -> tuple[float, float, float]:
    """Return the largest relative error of the losses, of the gradient norms, and of the gradients.

    The error of a gradient is relative to its largest value.
    """
    arrays, about, images, truth = golden_batch(GOLDENS)
    model = golden_model(GOLDENS, "tiny", "tiny").train()
    step = released_step(optimize_for_training(model) if optimized else model, truth)
    with torch.no_grad():
        things = step.assigner.thing_targets(model(images), truth)
    step.assigner.thing_targets = lambda output, truth: things
    losses = step(images, truth)
    losses.total().backward()
    parameters = dict(model.named_parameters())
    values = zip(("loss_cls", "loss_bbox", "loss_mask", "loss_stuff", "loss"), (*losses, losses.total()))
    of_losses = [abs(value.item() / about["log_vars"][name] - 1) for name, value in values]
    of_norms = [
        abs(parameters[name_from_released(name)].grad.double().norm().item() / norm - 1)
        for name, norm in about["grad_norms"].items()
        if norm
    ]
    of_gradients = [
        relative_error(parameters[name_from_released(key[6:])].grad, arrays[key])
        for key in arrays
        if key.startswith("grad__")
    ]
    return max(of_losses), max(of_norms), max(of_gradients)


if __name__ == "__main__":
    for optimized in (False, True):
        loss, norm, gradient = measure(optimized)
        name = "optimized for training" if optimized else "plain modules"
        print(f"{name}: losses {loss:.1e}, gradient norms {norm:.1e}, whole gradients {gradient:.1e}")
