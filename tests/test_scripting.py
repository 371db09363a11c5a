# SPDX-License-Identifier: Apache-2.0
"""Operators and modules within torch.jit.script: the results of eager mode, or an error that says what to use."""

import inspect
import io

import pytest
import torch
from torch import Tensor, nn

from spatialflow import ops
from spatialflow.ops import scripting

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit

FEATURES, COARSE = torch.rand(2, 4, 20, 24), torch.rand(2, 4, 10, 12)
ROIS = torch.tensor([[0, 1.0, 2, 30, 40], [1, 5, 2, 90, 70], [1, 0, 0, 20, 20]])
BOXES = [ROIS[:1, 1:], ROIS[1:, 1:]]
SCORES, CLASSES = torch.tensor([0.3, 0.9, 0.5]), torch.tensor([1, 0, 1])
WEIGHT, BIAS = torch.rand(6, 4, 3, 3), torch.rand(6)
OFFSET, MASK = torch.randn(2, 18, 20, 24), torch.randn(2, 9, 20, 24)
LOGITS, LABELS = torch.randn(6, 4), torch.tensor([0, 3, 4, 2, -1, 1])

CALLS = {
    "roi_align": [
        (FEATURES, ROIS, 7, 0.25),
        (FEATURES, BOXES, (3, 2), 0.25, 2, True),
        (FEATURES, [ROIS[:0, 1:]] * 2, 2),
    ],
    "multilevel_roi_align": [
        ([FEATURES, COARSE], ROIS, 3, [4.0, 8.0]),
        ([FEATURES, COARSE], BOXES, [3, 2], [4.0, 8.0], 2, False, 9.0),
    ],
    "nms": [(ROIS[:, 1:], SCORES, 0.1)],
    "batched_nms": [(ROIS[:, 1:], SCORES, classes, 0.1) for classes in (CLASSES, CLASSES.int(), CLASSES + 0.5)],
    "multiclass_nms": [
        (ROIS[:, 1:], SCORES[:, None].expand(3, 2), 0.4, 0.1, 4),
        (ROIS[None, :, 1:], SCORES[None, :, None], 0.4, 0.1, 4),
    ],
    "deform_conv2d": [
        (FEATURES, OFFSET[:, :, 2:, 2:], WEIGHT),
        (FEATURES, OFFSET, WEIGHT, BIAS, 1, 1, 1, MASK, "direct", True, True),
        (FEATURES, OFFSET[:, :, :6, :8], WEIGHT, BIAS, (3, 3), (0, 0), [2, 1]),
    ],
    "sigmoid_focal_loss": [(LOGITS, LABELS), (LOGITS, LABELS, 1.5, 0.3, "mean"), (LOGITS, LABELS, 1.5, 0.3, "sum")],
    "group_norm_relu": [(FEATURES, 2), (FEATURES, 2, BIAS[:4], BIAS[:4], 1e-3, True)],
    "paste_masks": [(torch.randn(3, 8, 8), ROIS[:, 1:], (30, 40)), (torch.randn(3, 8, 8), ROIS[:, 1:], [30, 40], 0.7)],
    "stuff_labels": [(FEATURES[0], (40, 48), (30, 40))],
    "panoptic_quality_counts": [(torch.ones(4, 4).int(), torch.eye(4).int(), 2, 1)],
}
"""Operators that TorchScript compiles, by name: arguments of calls."""

OPERATORS = sorted(name for name in ops.__all__ if name[0].islower())


@pytest.mark.parametrize("name, call", [(name, index) for name, calls in CALLS.items() for index in range(len(calls))])
def test_scripted_calls_return_what_eager_calls_return(name, call):
    operator, arguments = getattr(ops, name), CALLS[name][call]
    torch.testing.assert_close(torch.jit.script(operator)(*arguments), operator(*arguments))


@pytest.mark.parametrize("name", CALLS)
def test_scripted_functions_have_the_arguments_of_the_operators(name):
    ours, scripted = (inspect.signature(getattr(home, name)).parameters for home in (ops, scripting))
    assert list(scripted) == [key for key in ours if key != "options"]
    for key, parameter in scripted.items():
        default = ours[key].default
        assert parameter.default == default, key


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - set(CALLS)))
def test_other_operators_say_what_to_use(name):
    operator = getattr(ops, name)
    message = f"^{name}: torch.jit.script cannot compile it; use torch.jit.trace, torch.export or torch.compile$"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(operator)

    class Caller(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operator(x, x, x)

    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(Caller())


class Head(nn.Module):
    """Calls operators as a detector does: in functions, modules and with lists of boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ops.RoIAlign(4, 0.25, 2, aligned=True)
        self.levels = ops.MultilevelRoIAlign((4, 4), (4, 8))
        self.named = ops.MultiScaleRoIAlign(["0", "1"], 4, 2)
        self.conv = ops.DeformConv2d(4, 4, 3, padding="same")

    def forward(self, x: Tensor, coarse: Tensor, offset: Tensor, boxes: list[Tensor], scores: Tensor) -> Tensor:
        x = self.conv(x, offset)
        pooled = self.pool(x, boxes) + self.levels([x, coarse], boxes)
        pooled = pooled + self.named({"0": x, "1": coarse}, boxes, [(80, 96), (80, 90)])
        return pooled[ops.nms(torch.cat(boxes), scores, 0.1)]


def test_modules_can_be_scripted_saved_and_trained():
    head = Head()
    arguments = (FEATURES, COARSE, OFFSET, BOXES, SCORES)
    expected = head(*arguments)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(head), saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    assert loaded.state_dict().keys() == head.state_dict().keys()
    for _ in range(3):  # TorchScript optimizes between the first calls
        loaded.zero_grad()
        result = loaded(*arguments)
        torch.testing.assert_close(result, expected)
        result.square().sum().backward()
        for name, parameter in loaded.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize(
    "operator, arguments, message",
    [
        (ops.roi_align, (FEATURES, [ROIS[:, 1:]], 2), "must hold one tensor per image, got 1 for a batch of 2"),
        (ops.roi_align, (FEATURES, [ROIS, ROIS], 2), r"boxes\[0\] must have shape \(K, 4\), got \[3, 5\]"),
        (ops.sigmoid_focal_loss, (LOGITS, LOGITS), "labels must be class indices within torch.jit.script, got targets"),
        (ops.sigmoid_focal_loss, (LOGITS, LABELS, 2.0, 0.2, "avg"), "must be 'none', 'sum' or 'mean', got 'avg'"),
        (ops.deform_conv2d, (FEATURES, OFFSET, WEIGHT, None, 1, 1, 1, None, "winograd"), "got 'winograd'"),
        (ops.nms, (ROIS, SCORES, 0.5), r"nms: boxes must have shape \(N, 4\)"),
    ],
)
def test_errors_of_scripted_calls(operator, arguments, message):
    with pytest.raises((torch.jit.Error, RuntimeError), match=message):
        torch.jit.script(operator)(*arguments)
