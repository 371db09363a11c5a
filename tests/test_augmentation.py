# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation and ensembles: symmetries, joined views, batches and commands."""

import json

import cv2
import numpy as np
import pytest
import torch
from helpers.golden_models import golden_model
from torch.nn import functional as F

import spatialflow
from spatialflow.cli.main import main
from spatialflow.config import load_config
from spatialflow.models import postprocess
from spatialflow.panoptic import color_ids, read_id_map

PLAIN = dict(test_short_edges=[96], test_long_edge=160, stuff_area_threshold=40)


@pytest.fixture(scope="module")
def model(goldens):
    """Build a model with the weights of the goldens, and small box deltas so that boxes are near their anchors.

    An empty box would not overlap the same box of the other network in an ensemble.
    """
    network = golden_model(goldens, "tiny", "tiny")
    with torch.no_grad():
        network.box_head.box_deltas.weight.mul_(0.1)
        network.box_head.box_deltas.bias.zero_()
    return network


@pytest.fixture(scope="module")
def image():
    """Return an image of a size that needs no padding, because cells of the padding give empty boxes."""
    coarse = np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return cv2.resize(coarse, (128, 96), interpolation=cv2.INTER_CUBIC)


def assert_same(a, b, pixels=1.0):
    assert (a.id_map == b.id_map).mean() >= pixels
    assert [s["category_id"] for s in a.segments] == [s["category_id"] for s in b.segments]
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)


def test_an_ensemble_of_one_model_twice_is_the_model(model, image):
    single, twice = (spatialflow.Predictor(models, **PLAIN)(image) for models in (model, [model, model]))
    assert len(single.segments) > 3
    assert_same(twice, single)
    np.testing.assert_allclose(twice.mask_logits, single.mask_logits, rtol=1e-4, atol=1e-4)


def test_the_mirrored_picture_gives_the_mirrored_result(model, image):
    """With flipping, an image and its mirror image have the same two views in a different order.

    The box fill truncates boxes to whole pixels, which is not symmetric, so a few pixels may differ.
    """
    predictor = spatialflow.Predictor(model, test_flip=True, **PLAIN)
    result, mirrored = predictor(image), predictor(np.ascontiguousarray(image[:, ::-1]))
    plain = spatialflow.Predictor(model, **PLAIN)(image)
    assert not np.array_equal(result.scores, plain.scores), "the mirrored view has no effect"
    np.testing.assert_allclose(mirrored.scores, result.scores, atol=1e-4)
    restored = postprocess.mirror_boxes(torch.from_numpy(mirrored.boxes)[None], torch.tensor([128.0]))[0]
    np.testing.assert_allclose(restored, result.boxes, atol=0.05)
    np.testing.assert_allclose(mirrored.mask_logits[..., ::-1], result.mask_logits, atol=2e-2)
    assert [s["category_id"] for s in mirrored.segments] == [s["category_id"] for s in result.segments]
    assert (mirrored.id_map[:, ::-1] == result.id_map).mean() > 0.98


def test_views_are_joined(model, image):
    """NMS joins the boxes of two image sizes, and the best score is the larger of the two best scores."""
    sizes = [spatialflow.Predictor(model, **{**PLAIN, "test_short_edges": [edge]})(image) for edge in (96, 64)]
    both = spatialflow.Predictor(model, **{**PLAIN, "test_short_edges": [96, 64]})(image)
    assert both.scores[0] == pytest.approx(max(result.scores[0] for result in sizes), abs=1e-5)
    offered = np.concatenate([np.c_[result.boxes, result.scores] for result in sizes])
    nearest = np.abs(np.c_[both.boxes, both.scores][:, None] - offered).max(axis=2).min(axis=1)
    assert (nearest < 1e-2).mean() > 0.8, "boxes come from the views"
    assert all(sum(segment["area"] for segment in result.segments) > 0 for result in (*sizes, both))


def test_batches_of_augmented_images(model, image):
    """A batch gives the results of its images alone, also for views of different padded sizes."""
    images = [image, image[:, :120], np.ascontiguousarray(image.transpose(1, 0, 2)), image[::-1].copy()]
    settings = {**PLAIN, "test_short_edges": [64, 96], "test_flip": True}
    together = spatialflow.Predictor(model, batch_size=2, **settings)(images)
    predictor = spatialflow.Predictor(model, **settings)
    for single, result in zip(images, together, strict=False):
        assert_same(result, predictor(single), pixels=0.999)


def test_sizes_of_the_released_augmentation(goldens, model):
    """The long edge is limited in proportion to the short one: 1500, 1800 and 2100 pixels at 1000, 1200 and 1400."""
    test = load_config("spatialflow_r101_dcn_coco").test
    edges = dict(test_short_edges=test.test_short_edges, test_long_edge=test.test_long_edge)
    pipeline = spatialflow.Predictor(model, **edges).pipeline
    released = json.loads((goldens / "ops" / "resize.json").read_text())["rescale_size"]
    for w, h in ((640, 480), (480, 640), (640, 427), (1000, 300), (612, 612)):
        expected = [released[f"{w}x{h}->{limits}"]["new_wh"] for limits in ("1500x1000", "1800x1200", "2100x1400")]
        assert [list(geometry.valid_size[::-1]) for geometry in pipeline.geometries((h, w))] == expected


def test_stuff_logits_at_original_size():
    """`resized_stuff_logits` equals upsampling, crop and resize in sequence, with and without mirroring."""
    logits, valid, original = torch.randn(5, 8, 12), (27, 41), (33, 29)
    upsampled = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=True)[..., :27, :41]
    for mirrored in (False, True):
        view = upsampled.flip(-1) if mirrored else upsampled
        expected = F.interpolate(view, size=original, mode="bilinear", align_corners=True)[0]
        actual = postprocess.resized_stuff_logits(logits, valid, original, mirrored)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_mean_of_masks():
    """The sigmoid of the result is the mean of the probabilities, also for logits whose sigmoid rounds to 0 or 1."""
    logits = torch.tensor([[-200.0, -3.0, 0.0, 2.0, 150.0], [-200.0, 1.0, 0.0, 4.0, 150.0]])
    mean = postprocess.mean_mask_logits(logits)
    torch.testing.assert_close(mean.sigmoid(), logits.sigmoid().mean(dim=0))
    torch.testing.assert_close(mean[[0, 2, 4]], logits[0, [0, 2, 4]])


def test_ensembles_that_do_not_fit(model):
    smaller_model = spatialflow.build_model("tiny", num_things=3, categories=None)
    with pytest.raises(ValueError, match="must agree in num_things, got 20 and 3"):
        spatialflow.Predictor([model, smaller_model])
    with pytest.raises(ValueError, match="at least one model, got none"):
        spatialflow.Predictor([])


def test_commands(model, image, tmp_path, capsys):
    """The command with an ensemble and flipping gives the map of the Python API."""
    cv2.imwrite(str(tmp_path / "a.png"), image)
    weights = str(spatialflow.save_checkpoint(model, tmp_path / "tiny.safetensors"))
    settings = ["--config", "tiny", "--no-overlay", "--set", "stuff_area_threshold=40"]
    predict = ["predict", str(tmp_path / "a.png"), *settings]
    ensemble = ["--checkpoint", weights, "--checkpoint", weights, "--output", str(tmp_path / "out")]
    assert main([*predict, *ensemble, "--short-edges", "96", "64", "--flip"]) == 0
    expected = spatialflow.Predictor(
        [model, model], test_short_edges=[96, 64], test_long_edge=160, test_flip=True, stuff_area_threshold=40
    )(image)
    id_map, _ = color_ids(expected.id_map, expected.segments, expected.categories.as_coco())
    assert np.array_equal(read_id_map(tmp_path / "out" / "panoptic" / "a.png"), id_map)
    capsys.readouterr()
    for change, message in (
        (["--short-edges", "64", "--size", "64"], "--size and --short-edges exclude each other"),
        (["--short-edges", "64", "0"], "--short-edges must be positive, got 0"),
        (["--config", "tiny", "--config", "tiny"], "one --config for all of the 2 --model, or"),
        (["--config", "spatialflow_r50_coco"], "backbone_base_channels: the weights of"),
    ):
        assert main([*predict, *ensemble, *change]) == 2
        assert message in capsys.readouterr().err
