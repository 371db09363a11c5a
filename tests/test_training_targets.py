# SPDX-License-Identifier: Apache-2.0
"""Targets and losses equal the released ones (goldens), and are finite for batches without objects."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from helpers.golden_models import golden_model
from helpers.small_models import SMALL
from torch.nn import functional as F

from spatialflow.engine.checkpoints import name_from_released
from spatialflow.models import assigner as assigner_module
from spatialflow.models.assigner import TargetAssigner
from spatialflow.models.build import build_model
from spatialflow.models.criterion import focal_loss_sum, l1_loss_sum, mask_loss_sum, stuff_loss_sum
from spatialflow.models.heads import upsample_stuff_logits
from spatialflow.models.optimized.training import optimize_for_training
from spatialflow.models.targets import anchor_targets, assign, box_iou, mask_targets, thing_targets
from spatialflow.models.training_step import TrainingStep
from spatialflow.structures import GroundTruth


@pytest.fixture(scope="module")
def ops():
    return lambda name: dict(np.load(GOLDENS / "ops" / f"{name}.npz"))


def released(assigned):
    """Convert to the released numbering: 1 + index of the ground truth, 0 for background, -1 for ignored."""
    return (assigned + 1).numpy()


class TestAssign:
    def test_anchors(self, ops):
        z = ops("assign")
        boxes, truth = torch.from_numpy(z["anchor_boxes"]), torch.from_numpy(z["gts"])
        assigned = assign(boxes, truth, 0.5, 0.4, claim_iou=0.0)
        np.testing.assert_array_equal(released(assigned), z["anchor_full_gt_inds"])
        np.testing.assert_allclose(box_iou(truth, boxes).amax(0), z["anchor_full_max_overlaps"], atol=1e-6)
        np.testing.assert_array_equal(released(assign(boxes, truth[:0], 0.5, 0.4, 0.0)), z["anchor_empty_gt_inds"])

    def test_proposals(self, ops):
        z = ops("assign")
        boxes, truth = torch.from_numpy(z["mask_boxes"]), torch.from_numpy(z["gts"])
        np.testing.assert_array_equal(released(assign(boxes, truth, 0.5, 0.5, claim_iou=0.5)), z["mask_full_gt_inds"])
        single_image = GroundTruth(
            [truth], [torch.from_numpy(z["gt_labels"])], [torch.ones(6, 48, 64, dtype=torch.uint8)], None, None, None
        )
        things = thing_targets([boxes], single_image, 28)
        np.testing.assert_array_equal(things.rois[:, 1:], z["sampler_full_pos_bboxes"])
        np.testing.assert_array_equal(things.labels, z["sampler_full_pos_labels"])
        np.testing.assert_array_equal(things.assigned, z["sampler_full_pos_assigned_gt"])
        empty = GroundTruth(
            [truth[:0]], [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 48, 64)], None, None, None
        )
        assert thing_targets([boxes], empty, 28).masks.shape == (0, 28, 28)

    def test_later_truth_wins_ties_and_low_overlaps_are_claimed(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
        twice = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
        assert assign(boxes, twice, 0.5, 0.4, claim_iou=0.0).tolist() == [1, -1]
        assert assign(boxes, twice, 0.5, 0.4, claim_iou=1.1).tolist() == [0, -1]
        low = torch.tensor([[109.0, 109, 119, 119]])
        assert assign(boxes, low, 0.5, 0.4, claim_iou=0.0).tolist() == [-1, 0]

    def test_between_the_thresholds_is_ignored(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.5], [0, 0, 10, 3.9], [0, 0, 10, 5]])
        assert assign(boxes, boxes[:1], 0.5, 0.4, claim_iou=0.0).tolist() == [0, -2, -1, 0]


class TestLossTerms:
    def test_focal(self, ops, goldens):
        """All rows equal the released formula; without rows 0 and 1, also the released value and gradient."""
        z, expected = ops("losses"), json.loads((goldens / "ops" / "losses.json").read_text())
        x = torch.from_numpy(z["focal_x"]).requires_grad_()
        labels = torch.from_numpy(z["focal_target"]).long()
        labels = torch.where(torch.from_numpy(z["focal_w"]) > 0, labels, -1)
        value = focal_loss_sum(x, labels) / expected["focal"]["avg_factor"]
        assert value.item() == pytest.approx(expected["focal"]["py_sigmoid_focal_loss_same_inputs"], rel=1e-5)
        value.backward()
        np.testing.assert_allclose(x.grad[2:], z["focal_grad"][2:], atol=1e-6)
        rest = focal_loss_sum(x[2:], labels[2:]) / expected["focal"]["avg_factor"]
        assert rest.item() == pytest.approx(expected["focal_without_rows_0_1"]["value"], rel=1e-5)
        huge = torch.tensor([[500.0, -500.0]], requires_grad=True)
        focal_loss_sum(huge, torch.tensor([1])).backward()
        assert torch.isfinite(huge.grad).all() and huge.grad.abs().max() > 0

    def test_l1(self, ops, goldens):
        z, expected = ops("losses"), json.loads((goldens / "ops" / "losses.json").read_text())["l1"]
        weight = torch.from_numpy(z["l1_w"])
        rows = weight[:, 0] > 0
        value = l1_loss_sum(torch.from_numpy(z["l1_pred"])[rows], torch.from_numpy(z["l1_target"])[rows])
        assert (value / expected["avg_factor"]).item() == pytest.approx(expected["value"], rel=1e-5)

    def test_mask(self, ops, goldens):
        z, expected = ops("losses"), json.loads((goldens / "ops" / "losses.json").read_text())["mask_bce"]
        labels = torch.from_numpy(z["mask_labels"]).long()
        logits = torch.from_numpy(z["mask_pred"])[torch.arange(5), labels]
        assert (mask_loss_sum(logits, torch.from_numpy(z["mask_target"])) / 5).item() == pytest.approx(
            expected, rel=1e-5
        )

    @pytest.mark.parametrize("images", [1, 2, 3])
    def test_stuff(self, ops, goldens, images):
        """The sum over pixels is the released one; the divisor, labeled pixels of all images, differs on purpose."""
        z = ops("losses")
        expected = json.loads((goldens / "ops" / "losses.json").read_text())[f"stuff_N{images}"]
        logits, semantic = (
            torch.from_numpy(z[f"stuff_N{images}_logits"]),
            torch.from_numpy(z[f"stuff_N{images}_gt"])[:, 0],
        )
        h, w, _ = expected["img_shapes"][0]
        total = stuff_loss_sum(logits[:, :, :h, :w], semantic[:, :h, :w])
        assert (0.25 * total / (h * w)).item() == pytest.approx(expected["value"], rel=1e-5)

    @pytest.mark.parametrize("size, factor", [((12, 20), 4), ((1, 9), 4), ((5, 1), 8), ((7, 6), 1), ((30, 3), 2)])
    def test_stuff_of_enlarged_logits(self, size, factor):
        """Value and gradient are those of interpolate and cross_entropy, also where two bands of rows meet."""
        logits = torch.randn(2, 5, *size, dtype=torch.float32, requires_grad=True)
        semantic = torch.randint(6, (2, size[0] * factor, size[1] * factor), dtype=torch.uint8)
        semantic[semantic == 5] = 255
        enlarged = F.interpolate(logits.double(), scale_factor=factor, mode="bilinear", align_corners=True)
        expected = F.cross_entropy(enlarged, semantic.long(), ignore_index=255, reduction="sum")
        (wanted,) = torch.autograd.grad(3 * expected, logits)
        value = stuff_loss_sum(logits, semantic)
        (gradient,) = torch.autograd.grad(3 * value, logits)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * wanted.abs().max())

    def test_mask_targets(self, ops):
        z = ops("mask_target")
        arguments = [torch.from_numpy(z[name]) for name in ("gt_masks", "proposals", "assigned")]
        for at_once in (1, 2, 16):
            np.testing.assert_array_equal(mask_targets(*arguments, 28, at_once), z["targets28"])

    def test_mask_targets_of_boxes_that_leave_the_image(self):
        """A box is clipped to the mask, as in the released code; otherwise most of this target would be zeros."""
        mask, index = torch.ones(1, 20, 30, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        assert mask_targets(mask, torch.tensor([[20.0, -10, 40, 10]]), index, 28).all()


def golden_batch(goldens):
    z, info = (
        dict(np.load(goldens / "train" / "tiny_b2.npz")),
        json.loads((goldens / "train" / "tiny_b2.json").read_text()),
    )
    masks = []
    for i in range(2):
        shape = z[f"gt_masks_shape_img{i}"]
        bits = np.unpackbits(z[f"gt_masks_packed_img{i}"], axis=1)[:, : shape[1] * shape[2]]
        masks.append(torch.from_numpy(bits.reshape(shape)))
    semantic = torch.from_numpy(z["gt_semantic_seg"])[:, 0].clone()
    valid = torch.tensor([meta["img_shape"][:2] for meta in info["metas"]])
    padded = torch.tensor([meta["pad_shape"][:2] for meta in info["metas"]])
    truth = GroundTruth(
        [torch.from_numpy(z[f"gt_bboxes_img{i}"]) for i in range(2)],
        [torch.from_numpy(z[f"gt_labels_img{i}"]).long() for i in range(2)],
        masks,
        semantic,
        valid,
        padded,
    )
    return z, info, torch.from_numpy(z["img"]), truth


def released_step(network, truth):
    """Create a training step with the released stuff loss.

    The released loss sums over the window of image 0 in all images and divides by the pixels of that one window.
    The factor (semantic != 255).sum() cancels the divisor of `Criterion`.
    """

    def stuff_loss(logits, semantic):
        h, w = truth.valid_sizes[0].tolist()
        window = torch.full_like(semantic, 255)
        window[:, :h, :w] = semantic[:, :h, :w]
        return stuff_loss_sum(logits, window) / (h * w) * (semantic != 255).sum()

    return TrainingStep(network, network.config, stuff_loss=stuff_loss)


class TestReleasedStep:
    """One training step of the reduced model: all targets, losses and gradients."""

    @pytest.fixture(scope="class", params=["plain modules", "arranged for training"])
    @staticmethod
    def step(request):
        z, info, images, truth = golden_batch(GOLDENS)
        model = golden_model(GOLDENS, "tiny", "tiny").train()
        arranged = request.param == "arranged for training"
        step = released_step(optimize_for_training(model) if arranged else model, truth)
        if arranged:
            # Rounding may decide a column of a mask target, so both networks use the targets of the plain one.
            with torch.no_grad():
                things = step.assigner.thing_targets(model(images), truth)
            step.assigner.thing_targets = lambda output, truth: things
        losses = step(images, truth)
        losses.total().backward()
        with torch.no_grad():
            output = step.network(images)
        return z, info, images, truth, model, step.assigner, losses, output

    def test_anchor_targets(self, step):
        z, info, _, truth, _, assigner, _, output = step
        targets = assigner.anchor_targets(output, truth)
        assert targets.counts.clamp(min=1).sum() == info["num_total_pos"]
        levels = [z[f"target_labels_l{i}"] for i in range(5)]
        weights = np.concatenate([z[f"target_label_weights_l{i}"] for i in range(5)], axis=1)
        labels = np.where(weights > 0, np.concatenate(levels, axis=1).astype(np.int64), -1)
        np.testing.assert_array_equal(targets.labels, labels)
        starts = np.cumsum([0] + [level.shape[1] for level in levels])
        index = np.concatenate([z[f"target_pos_index_l{i}"] + [0, start] for i, start in zip(range(5), starts)])
        deltas = np.concatenate([z[f"target_pos_deltas_l{i}"] for i in range(5)])
        order = np.lexsort((index[:, 1], index[:, 0]))
        np.testing.assert_array_equal(targets.positive, index[order])
        np.testing.assert_allclose(targets.deltas, deltas[order], atol=1e-5)

    def test_thing_targets(self, step):
        z, _, _, truth, model, assigner, _, output = step
        things = TargetAssigner(model.config).thing_targets(output, truth)
        np.testing.assert_array_equal(things.labels, z["mask_pos_labels"])
        np.testing.assert_array_equal(things.assigned, z["mask_pos_assigned_gt"])
        np.testing.assert_allclose(things.rois, z["mask_pos_rois"], atol=1e-3)
        masks = np.unpackbits(z["mask_targets_packed"], axis=1)[:, : 28 * 28].reshape(-1, 28, 28)
        arranged = "thing_targets" in vars(assigner)
        assert np.mean(things.masks.numpy() != masks) <= (1e-3 if arranged else 0)

    def test_losses(self, step):
        expected, losses = step[1]["log_vars"], step[6]
        for name, value in (
            ("loss_cls", losses.cls),
            ("loss_bbox", losses.box),
            ("loss_mask", losses.thing),
            ("loss_stuff", losses.stuff),
            ("loss", losses.total()),
        ):
            assert value.item() == pytest.approx(expected[name], rel=1e-5), name

    def test_gradients(self, step):
        z, info, _, _, model = step[:5]
        parameters = dict(model.named_parameters())
        expected = {name_from_released(name): value for name, value in info["grad_norms"].items()}
        assert parameters.keys() == expected.keys()
        for name, norm in expected.items():
            if norm is None:
                assert parameters[name].grad is None, f"{name} is frozen"
            else:
                assert parameters[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-3), name
        for key in (key for key in z if key.startswith("grad__")):
            actual, whole = parameters[name_from_released(key[6:])].grad.numpy(), z[key]
            assert np.abs(actual - whole).max() <= 1e-3 * np.abs(whole).max(), key

    def test_own_stuff_loss_is_the_mean_over_labeled_pixels(self, step):
        """Only the window of each image counts, not padding or another image's window."""
        _, _, images, truth, model, _, _, _ = step
        with torch.no_grad():
            semantic = truth.semantic.clone()
            for i, (h, w) in enumerate(truth.valid_sizes.tolist()):
                semantic[i, h:], semantic[i, :, w:] = 255, 255
            losses = TrainingStep(model, model.config)(images, truth._replace(semantic=semantic))
            logits = upsample_stuff_logits(model(images).stuff_logits)
        pixels = [
            (logits[i, :, :h, :w], semantic[i, :h, :w].long()) for i, (h, w) in enumerate(truth.valid_sizes.tolist())
        ]
        total = sum(F.cross_entropy(map_[None], s[None], ignore_index=255, reduction="sum") for map_, s in pixels)
        assert losses.stuff.item() == pytest.approx(
            0.25 * (total / sum((s != 255).sum() for _, s in pixels)).item(), rel=1e-5
        )


class TestEmptyBatches:
    def truth(self, boxes):
        k = len(boxes)
        return GroundTruth(
            [torch.tensor(boxes).reshape(-1, 4)],
            [torch.zeros(k, dtype=torch.int64)],
            [torch.ones(k, 64, 96)],
            torch.full((1, 64, 96), 255, dtype=torch.uint8),
            torch.tensor([[64, 96]]),
            torch.tensor([[64, 96]]),
        )

    @pytest.mark.parametrize("name", ["tiny", "retinanet_r50_coco"])
    def test_nothing_to_learn_from_trains(self, name):
        """Without boxes and labeled pixels, losses are finite, and so are all gradients, which DDP needs."""
        model = build_model(name, **SMALL).train()
        losses = TrainingStep(model, model.config)(torch.randn(1, 3, 64, 96), self.truth([]))
        losses.total().backward()
        assert losses.box.item() == 0 and (losses.thing is None or losses.thing.item() == 0)
        for parameter_name, parameter in model.named_parameters():
            assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), parameter_name

    def test_counts_are_averaged_over_processes(self):
        """Twice the average count (another process has three times as much) halves every loss."""
        model = build_model("tiny", num_things=3, num_stuff=4).train()
        truth = self.truth([[10.0, 10, 50, 50]])
        truth = truth._replace(semantic=torch.ones_like(truth.semantic))
        images = torch.randn(1, 3, 64, 96)
        single = TrainingStep(model, model.config)(images, truth)
        shared = TrainingStep(model, model.config, average=lambda counts: counts * 2)(images, truth)
        for loss, half in zip(single, shared):
            assert half.item() == pytest.approx(loss.item() / 2, rel=1e-6)

    def test_images_of_different_padding(self):
        """Anchors of cells beyond an image's own padding are ignored."""
        model = build_model("tiny", num_things=3, num_stuff=4)
        truth = replace_sizes(self.truth([[10.0, 10, 50, 50]]), (32, 64))
        with torch.no_grad():
            output = model(torch.randn(1, 3, 64, 96))
        labels = TargetAssigner(model.config).anchor_targets(output, truth).labels[0, : 8 * 12 * 9].reshape(8, 12, 9)
        assert (labels[4:] == -1).all() and (labels[:, 8:] == -1).all() and (labels[:4, :8] >= 0).any()


def replace_sizes(truth, size):
    return truth._replace(valid_sizes=torch.tensor([size]), padded_sizes=torch.tensor([size]))


def test_targets_of_an_image_without_boxes():
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]])
    targets = anchor_targets(
        anchors, torch.tensor([[True, False]]), [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], 5
    )
    assert targets.labels.tolist() == [[5, -1]] and targets.positive.shape == (0, 2) and targets.counts.tolist() == [0]


def test_anchors_outside_claim_no_box():
    """The best anchor of a box is outside; the box gets the best anchor inside, for any overlap."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [30, 30, 40, 40], [40, 40, 48, 48]])
    box, inside = torch.tensor([[39.0, 39, 48, 48]]), torch.tensor([[True, True, False]])
    targets = anchor_targets(anchors, inside, [box], [torch.tensor([2])], 5)
    assert targets.labels.tolist() == [[5, 2, -1]] and targets.positive.tolist() == [[0, 1]]


def test_base_anchors_are_made_once_per_device(monkeypatch):
    """Base anchors are computed again only when the device changes."""
    calls, make = [], assigner_module.pyramid_base_anchors
    monkeypatch.setattr(assigner_module, "pyramid_base_anchors", lambda *args: calls.append(args) or make(*args))
    assigner = TargetAssigner(build_model("tiny").config)
    for device in ("cpu", "cpu", "meta", "cpu"):
        assert assigner._base_anchors(torch.device(device)).device.type == device
    assert len(calls) == 3
