# SPDX-License-Identifier: Apache-2.0
"""The reduced model `tiny`, the anchors and the box coder give the recorded results of the released implementation."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.golden_models import assert_close, assert_same_detections, golden_model

from spatialflow.config import InferenceConfig as InferenceSettings
from spatialflow.config import ModelConfig
from spatialflow.data.transforms import resize_labels
from spatialflow.models import postprocess
from spatialflow.models.anchors import STRIDES, base_anchors, encode_boxes, valid_flags
from spatialflow.models.heads import upsample_stuff_logits
from spatialflow.ops import paste_masks, select_candidates, stuff_labels
from spatialflow.ops.reference.select_candidates import decode_boxes, grid_anchors


@pytest.fixture(scope="module")
def tiny(large_goldens):
    """The recording `forward/tiny_b2` and the model's results: (arrays, JSON content, model, output)."""
    arrays = np.load(large_goldens / "forward" / "tiny_b2.npz")
    about = json.loads((large_goldens / "forward" / "tiny_b2.json").read_text())
    model = golden_model(large_goldens, "tiny", "tiny")
    with torch.no_grad():
        output = model(torch.from_numpy(arrays["img"]))
    return arrays, about, model, output


def sizes_of(metas):
    valid = torch.tensor([meta["img_shape"][:2] for meta in metas])
    return valid, torch.tensor([meta["scale_factor"][:2] for meta in metas])


def anchors_of(model, levels):
    base = postprocess.pyramid_base_anchors(model, levels[0].device)
    return postprocess.pyramid_anchors(base, [level.shape[-2:] for level in levels])


def candidates_of(model, logits, deltas, valid, factors, per_level=1000):
    base = postprocess.pyramid_base_anchors(model, logits[0].device)
    return select_candidates(logits, deltas, base, STRIDES, valid, factors, per_level)


def test_backbone(tiny):
    arrays, _, model, _ = tiny
    with torch.no_grad():
        for i, feature in enumerate(model.backbone(torch.from_numpy(arrays["img"]))):
            assert_close(f"C{i + 3}", feature, arrays[f"C{i}"])


def test_pyramid_and_head_outputs(tiny):
    arrays, _, _, output = tiny
    for i in range(5):
        assert_close(f"P{i + 3}", output.features[i], arrays[f"P{i}"])
        assert_close(f"class_logits[{i}]", output.class_logits[i], arrays[f"cls_score_l{i}"])
        assert_close(f"box_deltas[{i}]", output.box_deltas[i], arrays[f"bbox_pred_l{i}"])
    for i in range(3):
        assert_close(f"stuff_features[{i}]", output.stuff_features[i], arrays[f"stuff_feat_l{i}"])
        assert_close(f"thing_features[{i}]", output.thing_features[i], arrays[f"mask_feat_l{i}"])


def test_stuff_logits_and_labels(tiny):
    """Logits and labels equal the recorded ones, at the size of the network's input and at the original size.

    `stuff_logits_sub4` has every fourth row and column of the released logits at the size of the network's input.
    """
    arrays, about, _, output = tiny
    logits, quarter = upsample_stuff_logits(output.stuff_logits), output.stuff_logits
    assert_close("stuff_logits", logits[:, :, ::4, ::4], arrays["stuff_logits_sub4"])
    assert np.array_equal(logits.argmax(1).numpy(), arrays["stuff_argmax"])
    for i, meta in enumerate(about["metas"]):
        size = logits.shape[-2:]
        assert np.array_equal(stuff_labels(quarter[i], size, size).numpy(), arrays["stuff_argmax"][i])
        valid, original = meta["img_shape"][:2], tuple(meta["ori_shape"][:2])
        released = resize_labels(arrays["stuff_argmax"][i][: valid[0], : valid[1]], original)
        assert np.array_equal(stuff_labels(quarter[i], valid, original).numpy(), released)


def test_anchors_of_every_level(tiny):
    arrays, _, model, output = tiny
    for level, anchors in enumerate(anchors_of(model.config.model, output.features)):
        assert_close(f"anchors[{level}]", anchors, arrays[f"anchors_l{level}"])


def test_candidates_before_nms(tiny):
    arrays, about, model, output = tiny
    valid, _ = sizes_of(about["metas"])
    candidates = candidates_of(
        model.config.model, output.class_logits, output.box_deltas, valid, torch.ones_like(valid, dtype=torch.float32)
    )
    assert candidates.boxes.shape[1] == sum(about["levels_before_nms"])
    for i in range(2):  # anchors with equal scores have no fixed order in the released code: compare sorted columns
        ours, expected = candidates.boxes[i].numpy(), arrays[f"prenms_all_boxes_img{i}"]
        assert np.abs(np.sort(ours, axis=0) - np.sort(expected, axis=0)).max() < 0.03
        index = torch.from_numpy(arrays[f"prenms_index_img{i}"]).long()
        partner = (
            (candidates.boxes[i][None] - torch.from_numpy(arrays[f"prenms_boxes_img{i}"])[:, None])
            .abs()
            .amax(-1)
            .argmin(1)
        )
        assert (partner == index).float().mean() > 0.95  # nearly all anchors have the recorded order as well
        assert_close(
            "scores",
            candidates.scores[i][index][partner == index],
            arrays[f"prenms_scores_img{i}"][(partner == index).numpy()],
        )


def detected(logits, deltas, valid, factors, model, settings, per_level=1000):
    """Convert head outputs to detections; `factors` (B, 2), for x and y, divide the boxes."""
    return postprocess.detect(candidates_of(model, logits, deltas, valid, factors, per_level), settings)


def assert_detections(detections, arrays, boxes_key, labels_key):
    """Compare the detections of both images with the recorded ones; the keys are formatted with the image's index."""
    for i in range(2):
        n = int(detections.count[i])
        assert_same_detections(
            detections.boxes[i, :n],
            detections.scores[i, :n],
            detections.labels[i, :n],
            arrays[boxes_key.format(i)],
            arrays[labels_key.format(i)],
        )


@pytest.mark.parametrize("kind, rescale", [("", True), ("_netscale", False)])
def test_detections(tiny, kind, rescale):
    arrays, about, model, output = tiny
    valid, scale = sizes_of(about["metas"])
    factors = scale if rescale else torch.ones_like(scale)
    detections = detected(output.class_logits, output.box_deltas, valid, factors, model.config.model, model.config.test)
    assert_detections(detections, arrays, f"dets{kind}_img{{}}", f"labels{kind}_img{{}}")


@pytest.mark.parametrize("variant", ["a", "b", "c"])
def test_detections_with_other_settings(tiny, variant):
    arrays, about, model, output = tiny
    wanted = about[f"variant_{variant}"]
    settings = dataclasses.replace(
        model.config.test,
        score_threshold=wanted["score_thr"],
        nms_threshold=wanted["iou"],
        max_detections=wanted["max_per_img"] if wanted["max_per_img"] > 0 else 1000,
    )
    valid, scale = sizes_of(about["metas"])
    ones, per_level = torch.ones_like(scale), max(wanted["nms_pre"], 0)
    detections = detected(output.class_logits, output.box_deltas, valid, ones, model.config.model, settings, per_level)
    assert_detections(detections, arrays, f"variant_{variant}_dets_img{{}}", f"variant_{variant}_labels_img{{}}")


def test_masks(tiny):
    """RoIs, RoI features, mask logits and pasted masks of the recorded detections match the recorded ones.

    The recording has the features of some of the RoIs, and the mask logits of all classes of three RoIs.
    """
    arrays, about, model, output = tiny
    _, scale = sizes_of(about["metas"])
    boxes = [torch.from_numpy(arrays[f"dets_img{i}"][:, :4]) for i in range(2)]
    labels = torch.from_numpy(np.concatenate([arrays["labels_img0"], arrays["labels_img1"]])).long()
    rois = postprocess.make_rois(boxes, scale)
    assert_close("rois", rois, arrays["mask_rois"])
    kept = torch.from_numpy(arrays["mask_roi_kept"]).long()
    with torch.no_grad():
        features = model.roi_features(output.thing_features, rois[kept])
        assert_close("roi_features", features, arrays["mask_roi_feats_kept"])
        assert_close(
            "mask logits of all classes", model.thing_head(features[:3]), arrays["mask_logits_kept3_allclasses"]
        )
        logits = postprocess.mask_logits(model, output.thing_features, rois, labels)
    assert_close("mask_logits", logits, arrays["mask_logits_detclass"])
    for i, meta in enumerate(about["metas"]):
        h, w = meta["ori_shape"][:2]
        masks = paste_masks(logits[100 * i : 100 * (i + 1)], boxes[i], (h, w)).numpy()
        expected = np.unpackbits(arrays[f"final_masks_packed_img{i}"], axis=1)[:, : h * w].reshape(-1, h, w)
        assert np.array_equal(expected.sum((1, 2)), arrays[f"final_masks_area_img{i}"])
        # For a box without area, `paste_masks` gives no pixels and the released code gives a band of pixels.
        proper = ((boxes[i][:, 2:] > boxes[i][:, :2]).all(1)).numpy()
        assert (masks != expected)[proper].sum() <= 2  # rounding decides pixels with a probability of 0.5
        assert masks[~proper].sum() <= expected[~proper].sum()


def test_anchors_whatever_the_default_device():
    padded = torch.tensor([[16, 16], [8, 24]], device="cpu")
    with torch.device("meta"):
        anchors, flags = base_anchors(8, 4, 3, (0.5, 1.0, 2.0)), valid_flags((2, 3), 8, padded, 1)
    assert anchors.shape == (9, 4) and anchors.isfinite().all()
    assert flags.tolist() == [[True, True, False] * 2, [True] * 3 + [False] * 3]


def test_anchor_grid_and_valid_flags(goldens):
    arrays, about = np.load(goldens / "ops" / "anchors.npz"), json.loads((goldens / "ops" / "anchors.json").read_text())
    for level, (size, stride) in enumerate(zip(about["featmap_sizes"], STRIDES)):
        base = base_anchors(stride)
        assert_close("base anchors", base, arrays[f"base_anchors_l{level}"], 1e-6)
        assert_close("grid", grid_anchors(size, stride, base), arrays[f"grid_l{level}"], 1e-6)
        flags = valid_flags(size, stride, torch.tensor([about["pad_shape"][:2]]), len(base))
        assert np.array_equal(flags[0].numpy(), arrays[f"valid_l{level}"])


def test_box_coder(goldens):
    arrays = {name: torch.from_numpy(value) for name, value in np.load(goldens / "ops" / "coder.npz").items()}
    boxes, deltas = arrays["boxes"], arrays["deltas"]
    assert_close("decoded", decode_boxes(boxes, deltas), arrays["decoded"].numpy(), 1e-6)
    assert_close("clipped", decode_boxes(boxes, deltas, (150, 200)), arrays["decoded_clipped_150x200"].numpy(), 1e-6)
    assert_close("encoded", encode_boxes(boxes, arrays["gt"]), arrays["encoded"].numpy(), 1e-6)


def test_get_boxes(large_goldens):
    """Recorded head outputs give the recorded boxes of three kinds.

    The kinds are detections at original scale, detections at network scale ("train"), and candidates before NMS.
    """
    arrays, about = (
        np.load(large_goldens / "ops" / "get_bboxes.npz"),
        json.loads((large_goldens / "ops" / "get_bboxes.json").read_text()),
    )
    model = ModelConfig(num_things=about["num_classes"])
    logits = [torch.from_numpy(arrays[f"cls_score_l{i}"]) for i in range(5)]
    deltas = [torch.from_numpy(arrays[f"bbox_pred_l{i}"]) for i in range(5)]
    valid, scale = sizes_of(about["metas"])
    for kind, factors in (("test", scale), ("train", torch.ones_like(scale))):
        detections = detected(logits, deltas, valid, factors, model, InferenceSettings())
        assert_detections(detections, arrays, kind + "_img{}_0", kind + "_img{}_1")
    candidates = candidates_of(model, logits, deltas, valid, torch.ones_like(scale))
    # The recorded boxes are at network scale. The last column of the recorded scores is background: zeros.
    for i in range(2):
        ours = torch.cat([candidates.boxes[i], candidates.scores[i]], dim=1).double().numpy()
        expected = np.concatenate([arrays[f"aug_img{i}_0"], arrays[f"aug_img{i}_1"][:, :-1]], axis=1)
        assert len(ours) == len(expected)
        assert np.abs(np.sort(ours, axis=0) - np.sort(expected, axis=0)).max() < 0.03
