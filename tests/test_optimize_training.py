# SPDX-License-Identifier: Apache-2.0
"""The network optimized for training has the outputs of the plain modules and trains their parameters."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from helpers.golden_models import assert_close
from helpers.small_models import VARIANTS, random_model
from torch.nn.parallel import DistributedDataParallel

from spatialflow.engine.distributed import ProcessGroup, end, leave
from spatialflow.models.heads import BoxHead
from spatialflow.models.optimized.training import (
    TrainingBoxHead,
    TrainingStuffHead,
    is_faster_on_cuda,
    optimize_for_training,
)

FROM_SCRATCH = dict(backbone_norm_trains=True, backbone_frozen_stages=-1)


def outputs_and_gradients(model, network, images):
    output = network(images)
    results = [*output.features, *output.class_logits, *output.box_deltas]
    if output.stuff_logits is not None:
        results.append(output.stuff_logits)
    if output.thing_features is not None:
        rois = torch.tensor([[0, 3.0, 5, 40, 60], [0, 0, 0, 60, 20]]).to(images)
        results.append(network.thing_logits(output.thing_features, rois, torch.tensor([0, 2])))
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights = [torch.randn(r.shape, generator=generator, dtype=r.dtype, device="cpu").to(r) for r in results]
    sum((r * weight).sum() for r, weight in zip(results, weights)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return [r.detach() for r in results], gradients


def assert_all_close(actual, expected, tolerance):
    for i, (output, expected_output) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"output {i}", output, expected_output.numpy(), tolerance)


def assert_gradients_close(actual, expected, tolerance):
    """Assert that the gradients are close, and that the same parameters have no gradient."""
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            assert_close(name, actual[name], gradient.numpy(), tolerance)


@pytest.mark.parametrize("name, overrides", [*VARIANTS, ("tiny", FROM_SCRATCH), ("tiny_dcn", FROM_SCRATCH)])
def test_equals_the_plain_modules(name, overrides):
    """Outputs and gradients are equal in float64; frozen layers get no gradient.

    `test_training_targets.py` compares with the goldens in float32.
    """
    model = random_model(name, **overrides).double().train()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected, wanted = outputs_and_gradients(model, model, images)
    actual, gradients = outputs_and_gradients(model, optimize_for_training(model), images)
    assert_all_close(actual, expected, 1e-8)
    assert_gradients_close(gradients, wanted, 1e-7)


def test_leaves_the_model_as_it_is():
    """Modules and parameters stay the same, and the optimized network trains the parameters of the model."""
    model = random_model("tiny").train()
    before, modules = {name: id(value) for name, value in model.named_parameters()}, list(model.modules())
    network = optimize_for_training(model)
    assert before == {name: id(value) for name, value in model.named_parameters()} and modules == list(model.modules())
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ["tiny", "tiny_dcn"])
def test_moved_to_another_dtype(name):
    """A move of the network moves the model, statistics of BatchNorm included."""
    model = random_model(name).train()
    network = optimize_for_training(model).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for logits, expected in zip(network(images).class_logits, model(images).class_logits, strict=True):
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, expected)


def test_box_head_on_a_gpu():
    """Only the predictor with few output channels is fused; results equal those of the plain module."""
    head = BoxHead(256, 80, 9).double()
    assert head.class_logits.out_channels == 720 and head.box_deltas.out_channels == 36
    levels = [torch.randn(1, 256, side, side, dtype=torch.float64, requires_grad=True) for side in (4, 2)]
    arranged = TrainingBoxHead(head, on_cuda=True)
    assert arranged.is_fused == [False, True]
    for outputs, expected in zip(arranged(levels, levels), head(levels, levels)):
        inputs = [*levels, *head.parameters()]
        wanted = torch.autograd.grad(sum(level.sum() for level in expected), inputs, allow_unused=True)
        gradients = torch.autograd.grad(sum(level.sum() for level in outputs), inputs, allow_unused=True)
        for a, b in zip((*outputs, *gradients), (*expected, *wanted)):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def part_of_box_head(rank, classes):
    """Return the head, equal in all processes, and a process's part of the batch: levels for both predictors."""
    torch.manual_seed(0)
    head = BoxHead(256, classes, 9).double()
    torch.manual_seed(1 + rank)
    return head, [[torch.randn(1 + rank, 256, side, side, dtype=torch.float64) for side in (4, 2)] for _ in range(2)]


def losses_of_steps(head, levels):
    """Yield the losses of two steps; the second has no class loss."""
    for uses_classes in (True, False):
        classes, deltas = head(*levels)
        loss = sum(level.square().mean() for level in deltas)
        yield loss + sum(level.sin().mean() for level in classes) * float(uses_classes)


def train_box_head(rank, folder, classes):
    """Train in one of two processes under DistributedDataParallel, and save the gradients of each step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    head, levels = part_of_box_head(rank, classes)
    network, gradients = DistributedDataParallel(TrainingBoxHead(head, on_cuda=True)), []
    for loss in losses_of_steps(network, levels):
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in head.named_parameters()})
        network.zero_grad()
    torch.save(gradients, folder / f"{rank}.pt")
    leave()
    end(ProcessGroup(rank, 2, torch.device("cpu")))


@pytest.mark.parametrize("classes", [3, 80])  # 3: all predictors by flow_conv2d; 80: the class predictor level by level
def test_box_head_on_a_gpu_in_two_processes(tmp_path, classes):
    """Both processes get the mean of the plain head's gradients for the two parts of the batch."""
    torch.multiprocessing.spawn(train_box_head, (tmp_path, classes), nprocs=2)
    expected = []
    for rank in range(2):
        head, levels = part_of_box_head(rank, classes)
        steps = [torch.autograd.grad(loss, list(head.parameters())) for loss in losses_of_steps(head, levels)]
        expected.append([dict(zip(dict(head.named_parameters()), step)) for step in steps])
    for gradients in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        for step, (first, second) in enumerate(zip(*expected, strict=True)):
            for name in first:
                wanted = (first[name] + second[name]) / 2
                torch.testing.assert_close(gradients[step][name], wanted, msg=lambda text: f"{step} {name}: {text}")


@pytest.mark.parametrize("name, overrides", [("tiny", {}), ("tiny_dcn", {}), ("ablation_flow_source_cls_coco", {})])
def test_compiled(name, overrides):
    """One graph each for forward and backward, with the outputs and gradients of the eager network."""
    model = random_model(name, **overrides).double().train()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    network = optimize_for_training(model)
    network.box_head = TrainingBoxHead(model.box_head, on_cuda=True)
    network.stuff_head = TrainingStuffHead(model.stuff_head, on_cuda=True)
    expected, wanted = outputs_and_gradients(model, network, images)
    torch.compiler.reset()
    network.forward = torch.compile(network.forward, backend="aot_eager", fullgraph=True)
    actual, gradients = outputs_and_gradients(model, network, images)
    assert_all_close(actual, expected, 1e-9)
    assert_gradients_close(gradients, wanted, 1e-8)


def test_what_changes_on_another_device():
    model = random_model("tiny").train().to("meta")
    parameters = list(map(id, model.parameters()))
    network = optimize_for_training(model)
    changed = [name for name, part in network.named_children() if part is not model.get_submodule(name)]
    assert changed == ["box_head", "stuff_head"] and isinstance(network.box_head, TrainingBoxHead)
    assert {id(p) for p in network.parameters()} == set(parameters) == {id(p) for p in model.parameters()}
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert network.stuff_head.blocks is model.stuff_head.blocks, "its convolutions are those of torch"


RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="not in a source tree")
def test_choice_on_a_gpu_is_the_measured_one():
    """The choice follows the stored GPU times of forward and backward over P3 to P7 in bfloat16."""
    measured = {}
    for path in RESULTS.glob("nvidia-*/flow_conv2d.json"):
        for row in json.loads(path.read_text())["rows"]:
            if row["mode"] == "forward+backward" and row["dtype"] == "bfloat16" and row["case"].startswith("P3..P7"):
                outputs = int(row["case"].split(" to ")[1].split(",")[0])
                measured.setdefault(outputs, {}).setdefault(row["provider"], row["kernel_ms"])
    assert set(measured) >= {36, 256, 720}
    for outputs, times in measured.items():
        ratio = times["reference"] / times["spatialflow"]
        assert is_faster_on_cuda(outputs) == (ratio > 1.1), (outputs, times)  # cuDNN for ties
