# SPDX-License-Identifier: Apache-2.0
"""Statements of docs/migration.md about torchvision hold for the installed torchvision."""

import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from spatialflow import ops
from spatialflow.ops.torchvision_names import MODULES, NAMES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit

vision = pytest.importorskip("torchvision", reason="`make test-migration` installs the torchvision for this torch").ops


def boxes_in(count: int, side: float) -> torch.Tensor:
    corners = torch.rand(count, 2) * side * 0.7
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * side * 0.3], dim=1)


@pytest.mark.parametrize("name", ["roi_align", "nms", "batched_nms", "deform_conv2d"])
def test_same_arguments_in_the_same_order(name):
    """Calls of torchvision's function work unchanged; options that only this package has come last."""
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(getattr(home, name)).parameters.values()]
        for home in (ops, vision)
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", ["RoIAlign", "DeformConv2d"])
def test_same_modules(name):
    ours, theirs = (inspect.signature(getattr(home, name).__init__).parameters for home in (ops, vision))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align(aligned):
    features, boxes = torch.rand(2, 3, 20, 30), [boxes_in(4, 150), boxes_in(3, 150)]
    settings = (7, 1 / 8, -1, aligned)
    torch.testing.assert_close(ops.roi_align(features, boxes, *settings), vision.roi_align(features, boxes, *settings))


def test_deform_conv2d():
    features, weight, bias = torch.rand(2, 4, 9, 11), torch.rand(6, 4, 3, 3), torch.rand(6)
    offset, mask = torch.randn(2, 18, 9, 11), torch.rand(2, 9, 9, 11)
    ours, theirs = (f(features, offset, weight, bias, 1, 1, 1, mask) for f in (ops.deform_conv2d, vision.deform_conv2d))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert {k: v.shape for k, v in ops.DeformConv2d(4, 6, 3).state_dict().items()} == {
        k: v.shape for k, v in vision.DeformConv2d(4, 6, 3).state_dict().items()
    }


class TestNms:
    def test_same_rows(self):
        boxes, scores, classes = boxes_in(300, 100), torch.rand(300), torch.randint(0, 5, (300,))
        assert torch.equal(ops.nms(boxes, scores, 0.4), vision.nms(boxes, scores, 0.4))
        args = (boxes, scores, classes, 0.4)
        assert torch.equal(ops.batched_nms(*args), vision.batched_nms(*args))

    def test_negative_coordinates(self):
        """Torchvision's shift by class assumes coordinates >= 0; these boxes of two classes coincide after it."""
        boxes = torch.tensor([[0.0, 0, 10, 10], [-11, -11, -1, -1]])
        args = (boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.4)
        assert ops.batched_nms(*args).tolist() == [0, 1] and vision.batched_nms(*args).tolist() == [0]

    def test_nan_scores(self):
        boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]), torch.tensor([float("nan"), 0.5])
        assert ops.nms(boxes, scores, 0.4).tolist() == [1] and vision.nms(boxes, scores, 0.4).tolist() == [0]


class TestSigmoidFocalLoss:
    LOGITS, LABELS = torch.randn(6, 4), torch.tensor([0, 3, 4, 2, 4, 1])
    TARGETS = one_hot(LABELS, 5)[:, :4].float()

    def test_classes(self):
        """With class indices (C is background) instead of one-hot rows, gamma comes before alpha."""
        ours = ops.sigmoid_focal_loss(self.LOGITS, self.LABELS, 1.5, 0.3)
        torch.testing.assert_close(ours, vision.sigmoid_focal_loss(self.LOGITS, self.TARGETS, 0.3, 1.5))

    @pytest.mark.parametrize(
        "options, named",
        [
            ((), {}),
            ((0.3,), {}),
            ((0.3, 1.5), {}),
            ((0.3, 1.5, "sum"), {}),
            ((0.3,), {"gamma": 1, "reduction": "mean"}),
            ((), {"gamma": 1.5, "alpha": -1}),
        ],
    )
    @pytest.mark.parametrize("targets", [TARGETS, torch.rand(6, 4), torch.ones(6, 4)], ids=["one-hot", "soft", "ones"])
    def test_the_same_call(self, targets, options, named):
        results = []
        for home in (ops, vision):
            logits = self.LOGITS.clone().requires_grad_()
            loss = home.sigmoid_focal_loss(logits, targets, *options, **named)
            results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
        torch.testing.assert_close(*results)


class TestMultiScaleRoIAlign:
    @staticmethod
    def arguments(strides, side=256):
        maps = {str(stride): torch.rand(2, 3, side // stride, side // stride) for stride in strides}
        boxes = [torch.cat([boxes_in(8, extent) for extent in (20, 60, 150, 256, 600)]), boxes_in(4, 200)]
        return maps, boxes, [(side, side), (side - 40, side)]

    @pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32, 64), (8,), (8, 32), (4, 16), (2, 4)])
    @pytest.mark.parametrize("named", [{}, {"canonical_scale": 100, "canonical_level": 3}], ids=["default", "other"])
    def test_same_results(self, strides, named):
        """Eager and scripted, also if maps are missing between two others."""
        arguments, settings = self.arguments(strides), ([str(stride) for stride in strides[-3:]], 7, 2)
        ours, theirs = (home.MultiScaleRoIAlign(*settings, **named) for home in (ops, vision))
        expected = theirs(*arguments)
        torch.testing.assert_close(ours(*arguments), expected)
        assert ours.scales == theirs.scales and repr(ours) == repr(theirs)
        scripted = torch.jit.script(ops.MultiScaleRoIAlign(*settings, **named))
        assert scripted.state_dict() == theirs.state_dict() == {}
        for _ in range(3):
            torch.testing.assert_close(scripted(*arguments), expected)
        assert scripted.scales == theirs.scales

    def test_the_same_constructor_and_call(self):
        for method in ("__init__", "forward"):
            ours, theirs = (
                [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
                for function in (getattr(home.MultiScaleRoIAlign, method) for home in (ops, vision))
            )
            assert ours == theirs

    def test_limits_of_levels(self):
        """Limits are the same but for RoIs that are less than two millionths below one."""
        levels = vision.poolers.LevelMapper(2, 6)
        sides = [112.0 * 2**k * factor for k in range(4) for factor in (1 - 2e-6, 1, 1 + 1e-6, 1.4)]
        sides += [(112**2 * 4**k - 0.25) ** 0.5 for k in range(3)]
        boxes = torch.tensor([[0, 0, side, side] for side in sides])
        maps = {str(k): torch.full((1, 1, 2**10 >> k, 2**10 >> k), float(k - 2)) for k in range(2, 7)}
        module = ops.MultiScaleRoIAlign(list(maps), 1, 1)
        assert module(maps, [boxes], [(1024, 1024)]).flatten().round().tolist() == levels([boxes]).tolist()

    def test_in_a_detector(self):
        """The module replaces torchvision's in a network, which can then be scripted."""
        from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as detector

        network = detector(weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0).eval()
        images = [torch.rand(3, 80, 100), torch.rand(3, 90, 70)]
        with torch.no_grad():
            expected = network(images)
            pool = network.roi_heads.box_roi_pool
            assert len(expected[0]["boxes"]) > 0
            settings = (pool.featmap_names, pool.output_size, pool.sampling_ratio)
            network.roi_heads.box_roi_pool = ops.MultiScaleRoIAlign(*settings)
            for result in (network(images), torch.jit.script(network)(images)[1]):
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("first", [2, 3])
    def test_multilevel_roi_align(self, first):
        """`finest_scale` is torchvision's canonical_scale / 2 ** (canonical_level - log2(strides[0]))."""
        strides = [2**level for level in range(first, first + 3)]
        features = [torch.rand(1, 2, 256 // stride, 256 // stride) for stride in strides]
        boxes = [torch.cat([boxes_in(8, side) for side in (30, 120, 250)])]
        names = [str(stride) for stride in strides]
        theirs = vision.MultiScaleRoIAlign(names, 7, 2)(dict(zip(names, features)), boxes, [(256, 256)])
        scale = 224 / 2 ** (4 - first)
        ours = ops.multilevel_roi_align(features, boxes, 7, strides, 2, aligned=False, finest_scale=scale)
        torch.testing.assert_close(ours, theirs)


FEATURES, WEIGHT = torch.rand(2, 4, 20, 20), torch.rand(6, 4, 3, 3)
OFFSET, BOXES, SCORES = torch.rand(2, 18, 20, 20), boxes_in(40, 150), torch.rand(40)
ROIS = torch.cat([torch.randint(2, (40, 1)), BOXES], dim=1)
CLASSES = torch.randint(3, (40,))

FORMS = {
    "size list": lambda home: home.roi_align(FEATURES, ROIS, [7, 5], 0.125, 2),
    "size array": lambda home: home.roi_align(FEATURES, ROIS, np.array([7, 5]), 0.125, 2),
    "size numpy": lambda home: home.roi_align(FEATURES, ROIS, np.int64(7), 0.125, 2),
    "size torch.Size": lambda home: home.roi_align(FEATURES, ROIS, torch.Size([7, 5]), 0.125, 2),
    "size bool": lambda home: home.roi_align(FEATURES, ROIS, True, 0.125, 2),
    "scale integer": lambda home: home.roi_align(FEATURES, ROIS / 8, 7, 1, 2),
    "scale numpy": lambda home: home.roi_align(FEATURES, ROIS, 7, np.float32(0.125), 2),
    "scale tensor": lambda home: home.roi_align(FEATURES, ROIS, 7, torch.tensor(0.125), 2),
    "ratio numpy": lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, np.int32(2)),
    "ratio bool": lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, True),
    "ratio zero": lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, 0),
    "aligned integer": lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, 2, 1),
    "aligned numpy": lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, 2, np.bool_(True)),
    "by name": lambda home: home.roi_align(
        input=FEATURES, boxes=ROIS, output_size=7, spatial_scale=0.125, sampling_ratio=2, aligned=True
    ),
    "boxes list": lambda home: home.roi_align(FEATURES, [BOXES, BOXES[:3]], 7, 0.125, 2),
    "boxes tuple": lambda home: home.roi_align(FEATURES, (BOXES, BOXES[:3]), 7, 0.125, 2),
    "boxes of one image": lambda home: home.roi_align(FEATURES, [BOXES, BOXES[:0]], 7, 0.125, 2),
    "boxes of no image": lambda home: home.roi_align(FEATURES, [BOXES[:0]] * 2, 7, 0.125, 2),
    "float64": lambda home: home.roi_align(FEATURES.double(), ROIS.double(), 7, 0.125, 2),
    "threshold numpy": lambda home: home.nms(BOXES, SCORES, np.float32(0.5)),
    "threshold tensor": lambda home: home.nms(BOXES, SCORES, torch.tensor(0.5)),
    "threshold integer": lambda home: home.nms(BOXES, SCORES, 1),
    "no boxes": lambda home: home.nms(BOXES[:0], SCORES[:0], 0.5),
    "classes int32": lambda home: home.batched_nms(BOXES, SCORES, CLASSES.int(), 0.5),
    "classes uint8": lambda home: home.batched_nms(BOXES, SCORES, CLASSES.byte(), 0.5),
    "classes float32": lambda home: home.batched_nms(BOXES, SCORES, CLASSES.float(), 0.5),
    "classes bool": lambda home: home.batched_nms(BOXES, SCORES, CLASSES.bool(), 0.5),
    "padding list": lambda home: home.deform_conv2d(FEATURES, OFFSET, WEIGHT, padding=[1, 1]),
    "padding numpy": lambda home: home.deform_conv2d(FEATURES, OFFSET, WEIGHT, padding=np.int64(1)),
    "padding array": lambda home: home.deform_conv2d(FEATURES, OFFSET, WEIGHT, padding=np.array([1, 1])),
    "channels numpy": lambda home: home.DeformConv2d(np.int64(4), 6, [3, 3], groups=np.int64(2)).weight * 0,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_arguments(form):
    ours, theirs = FORMS[form](ops), FORMS[form](vision)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


REFUSED = [
    ("output_size", lambda home: home.roi_align(FEATURES, ROIS, 7.0, 0.125, 2)),
    ("output_size", lambda home: home.roi_align(FEATURES, ROIS, (7, 7.5), 0.125, 2)),
    ("output_size", lambda home: home.roi_align(FEATURES, ROIS, (7,), 0.125, 2)),
    ("sampling_ratio", lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, 2.0)),
    ("sampling_ratio", lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, None)),
    ("spatial_scale", lambda home: home.roi_align(FEATURES, ROIS, 7, "1/8", 2)),
    ("aligned", lambda home: home.roi_align(FEATURES, ROIS, 7, 0.125, 2, "no")),
    ("boxes", lambda home: home.roi_align(FEATURES, BOXES, 7, 0.125, 2)),
    ("boxes", lambda home: home.roi_align(FEATURES, ROIS.long(), 7, 0.125, 2)),
    ("boxes[1]", lambda home: home.roi_align(FEATURES, [BOXES, torch.tensor([])], 7, 0.125, 2)),
    ("input", lambda home: home.roi_align(FEATURES > 0.5, ROIS, 7, 0.125, 2)),
    ("boxes", lambda home: home.nms(BOXES.int(), SCORES, 0.5)),
    ("scores", lambda home: home.nms(BOXES, SCORES > 0.5, 0.5)),
    ("scores", lambda home: home.nms(BOXES, SCORES[:, None], 0.5)),
    ("idxs", lambda home: home.batched_nms(BOXES, SCORES, CLASSES.tolist(), 0.5)),
    ("idxs", lambda home: home.batched_nms(BOXES, SCORES, CLASSES[:, None], 0.5)),
    ("padding", lambda home: home.deform_conv2d(FEATURES, OFFSET, WEIGHT, padding=1.0)),
    ("padding", lambda home: home.deform_conv2d(FEATURES, OFFSET, WEIGHT, padding="full")),
    ("mask", lambda home: home.deform_conv2d(FEATURES, OFFSET, WEIGHT, padding=1, mask=OFFSET[:, :9] > 0.5)),
]
"""Calls that both refuse, with the argument."""


@pytest.mark.parametrize("argument, call", REFUSED)
def test_what_torchvision_refuses_is_named_here(argument, call):
    with pytest.raises((IndexError, TypeError, ValueError, RuntimeError, AssertionError, AttributeError)):
        call(vision)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^\w+: {re.escape(argument)} must "):
        call(ops)


class CallsBoth(torch.nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = boxes[ops.nms(boxes, scores, 0.5)]
        return ops.box_iou(kept, kept)


class TestNamespace:
    def test_every_name_and_module_is_here(self):
        folder = Path(vision.__file__).parent
        assert {path.stem for path in folder.glob("[a-z]*.py")} == {*MODULES, "roi_align"}
        assert {*vision.__all__} - {*ops.__all__} == {*NAMES}
        assert {*vision.__all__} <= {*dir(ops)}

    @pytest.mark.parametrize("name", vision.__all__)
    def test_import_swap(self, name):
        namespace = {}
        exec(f"from spatialflow.ops import {name}", namespace)
        assert (namespace[name] is getattr(vision, name)) == (name in NAMES)

    @pytest.mark.parametrize("name", MODULES)
    def test_import_swap_of_modules(self, name):
        """All names that a module of torchvision defines and does not mark as private."""
        theirs, ours = (importlib.import_module(f"{home}.ops.{name}") for home in ("torchvision", "spatialflow"))
        for key, value in vars(theirs).items():
            if not key.startswith("_") and getattr(value, "__module__", None) == theirs.__name__:
                assert getattr(ours, key) is (getattr(ops, key) if key in MODULES[name] else value)
        assert all(hasattr(theirs, key) for key in MODULES[name])

    def test_both_work_together(self):
        boxes = ops.clip_boxes_to_image(BOXES, (140, 150))
        boxes = boxes[ops.remove_small_boxes(boxes, 1)]
        kept = ops.boxes.nms(boxes, SCORES[: len(boxes)], 0.5)
        assert ops.box_iou(boxes[kept], boxes[kept]).fill_diagonal_(0).max() <= 0.5
        torch.testing.assert_close(torch.jit.script(CallsBoth())(BOXES, SCORES), CallsBoth()(BOXES, SCORES))


def test_paste_masks():
    """The IoU of the two results is above 0.8, but they are not equal.

    The operator takes logits, not probabilities. It does not enlarge and truncate the boxes, as torchvision does.
    """
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    logits, boxes = torch.randn(3, 28, 28).add_(3), boxes_in(3, 100) * torch.tensor([1.0, 1, 1.3, 1.3])
    ours = ops.paste_masks(logits, boxes, (140, 150))
    theirs = paste_masks_in_image(logits.sigmoid()[:, None], boxes, (140, 150))[:, 0] >= 0.5
    assert ours.shape == theirs.shape and ours.dtype == torch.bool
    assert (ours & theirs).sum() > 0.8 * (ours | theirs).sum() and not torch.equal(ours, theirs)
