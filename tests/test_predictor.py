# SPDX-License-Identifier: Apache-2.0
"""Predictor: images of every kind become panoptic results; bad images are named in errors."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from helpers.golden_models import golden_model
from helpers.small_models import random_model

import spatialflow
from spatialflow.models import postprocess
from spatialflow.panoptic import read_id_map, read_panoptic_json

SHORT = dict(test_short_edges=[96], test_long_edge=160)


@pytest.fixture(scope="module")
def model(goldens):
    return golden_model(goldens, "tiny", "tiny")


@pytest.fixture(scope="module")
def predictor(model):
    return spatialflow.Predictor(model, stuff_area_threshold=40, **SHORT)


def picture(height, width, seed=0):
    return cv2.resize(
        np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )


def assert_consistent(result, size):
    """Check that map and segments agree, and that all values have the documented type and range."""
    assert result.id_map.shape == size and result.id_map.dtype == np.int32
    ids, areas = np.unique(result.id_map, return_counts=True)
    area_of = {int(i): int(a) for i, a in zip(ids, areas, strict=False) if i != 0}
    assert {segment["id"]: segment["area"] for segment in result.segments} == area_of
    known = {row.id: row.isthing for row in result.categories.rows}
    for segment in result.segments:
        assert known[segment["category_id"]] == bool(segment["isthing"])
        assert (segment["score"] is None) == (not segment["isthing"])
        rows, columns = np.nonzero(result.id_map == segment["id"])
        assert segment["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    k = len(result.scores)
    assert result.boxes.shape == (k, 4) and result.labels.shape == (k,) and (np.diff(result.scores) <= 0).all()
    assert result.masks.shape == (k, *size) and result.masks.dtype == bool
    assert (
        (result.boxes >= 0).all()
        and (result.boxes[:, [0, 2]] <= size[1] + 0.01).all()
        and (result.boxes[:, [1, 3]] <= size[0] + 0.01).all()
    )
    json.dumps(result.segments)


def test_whatever_the_default_device():
    """Results do not depend on torch's default device, at construction or call."""
    model = random_model("tiny")
    (expected,) = spatialflow.Predictor(model, "cpu", **SHORT)([picture(90, 130)])
    with torch.device("meta"):
        (actual,) = spatialflow.Predictor(model, "cpu", **SHORT)([picture(90, 130)])
    assert_consistent(actual, (90, 130))
    for name in ("id_map", "boxes", "scores"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("size", [(90, 130), (1, 1), (1, 5000), (700, 3)])
def test_images_of_any_size(predictor, size):
    assert_consistent(predictor(picture(*size)), size)


def assert_same(a, b, exact=True):
    assert a.id_map.shape == b.id_map.shape
    assert (a.id_map == b.id_map).mean() >= (1 if exact else 0.999)
    assert [s["category_id"] for s in a.segments] == [s["category_id"] for s in b.segments]
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=0.05)


def test_results_do_not_depend_on_the_batch(model, predictor):
    """Images of different sizes in a batch have the same results as alone, in the order of the input."""
    images = [picture(90, 130, 1), picture(130, 90, 2), picture(45, 65, 3), picture(91, 131, 4), picture(50, 50, 5)]
    together = spatialflow.Predictor(model, stuff_area_threshold=40, batch_size=3, **SHORT)(images)
    assert [r.id_map.shape for r in together] == [image.shape[:2] for image in images]
    for image, result in zip(images, together, strict=False):
        assert_same(result, predictor(image), exact=False)


def test_plain_and_optimized_network_agree(model, predictor):
    plain = spatialflow.Predictor(model, optimize=False, stuff_area_threshold=40, **SHORT)
    assert_same(plain(picture(90, 130)), predictor(picture(90, 130)), exact=False)


@pytest.mark.parametrize("threshold, flip", [(0.0, False), (0.3, True), (1.0, False)])
def test_masks_of_the_map_alone_give_the_same_map(model, threshold, flip, monkeypatch):
    """Without the masks of detections that do not enter the map, the map and the boxes are unchanged."""
    computed, plain = [], postprocess.mask_logits
    monkeypatch.setattr(postprocess, "mask_logits", lambda *args: (computed.append(len(args[2])), plain(*args))[1])
    settings = dict(SHORT, stuff_area_threshold=40, instance_score_threshold=threshold, test_flip=flip, batch_size=2)
    images = [picture(90, 130, 1), picture(90, 130, 2)]
    every = spatialflow.Predictor(model, **settings)(images)
    for result, expected in zip(
        spatialflow.Predictor(model, detection_masks=False, **settings)(images), every, strict=False
    ):
        assert_same(result, expected)
        np.testing.assert_array_equal(result.labels, expected.labels)
        assert len(result.scores) and result.mask_logits is None and result.masks is None
    entering = max(int((result.scores >= threshold).sum()) for result in every)
    assert set(computed[1 + flip :]) == {len(images) * entering}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(model, predictor, dtype):
    """With 16-bit weights and features, void area and best score are close to those of float32; types are equal."""
    low = spatialflow.Predictor(model, dtype=dtype, stuff_area_threshold=40, **SHORT)
    assert next(low.pipeline.networks[0].buffers()).dtype == dtype
    result, expected = low(picture(90, 130)), predictor(picture(90, 130))
    assert_consistent(result, (90, 130))
    assert result.scores.dtype == result.boxes.dtype == result.mask_logits.dtype == np.float32
    assert (result.id_map != 0).mean() == pytest.approx((expected.id_map != 0).mean(), abs=0.1)
    assert result.scores[0] == pytest.approx(expected.scores[0], abs=0.05)


def test_weights_are_copied(model):
    """No predictor changes the model, and later changes of the model do not affect the predictor."""
    image = picture(45, 65)
    for optimize in (True, False):
        copied = copy.deepcopy(model).train()
        predictor = spatialflow.Predictor(copied, dtype=torch.bfloat16, optimize=optimize, **SHORT)
        before = predictor(image)
        assert copied.training and {value.dtype for value in copied.parameters()} == {torch.float32}
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1.0)
        assert_same(predictor(image), before)


def test_paths_arrays_and_iterables(tmp_path, predictor):
    image = picture(60, 80)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    cv2.imwrite(str(tmp_path / "gray.png"), image[..., 0])
    single = predictor(str(tmp_path / "a.png"))
    assert_same(single, predictor(image))
    many = predictor(path for path in (tmp_path / "a.png", tmp_path / "gray.png"))
    assert isinstance(many, list) and [r.image_name for r in many] == ["a.png", "gray.png"]
    assert_same(many[1], predictor(image[..., :1].repeat(3, axis=2)))
    assert predictor([]) == []


def test_views_and_arrays_that_cannot_be_written(predictor):
    image = picture(60, 80)
    expected = predictor(image)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    mirrored.flags.writeable = False
    assert_same(predictor(mirrored[:, ::-1]), expected)


def test_bad_images_are_named(tmp_path, predictor):
    (tmp_path / "text.jpg").write_text("no picture")
    good = picture(60, 80)
    cut = cv2.imencode(".jpg", good)[1].tobytes()[:-300]
    (tmp_path / "cut.jpg").write_bytes(cut)
    for image, words in (
        (tmp_path / "text.jpg", "text.jpg: is not an image"),
        (tmp_path / "cut.jpg", "cut.jpg: is truncated"),
        (tmp_path / "absent.jpg", "absent.jpg: cannot be read: No such file"),
        (tmp_path, "Is a directory"),
        (good[..., :2], r"image 1: must be .* got shape \(60, 80, 2\)"),
        (good.astype(float), "image 1: .*float64"),
        (7, "image 1: must be a path, a PIL image, an array or a tensor, got int"),
    ):
        with pytest.raises(spatialflow.ImageError, match=words):
            predictor([good, image])


def test_times_cover_every_stage(predictor):
    times = predictor(picture(60, 80)).times
    assert list(times) == ["decode", "preprocess", "network", "detect", "masks", "stuff", "merge"]
    assert all(seconds > 0 for seconds in times.values())


def test_saved_files_are_coco_panoptic(tmp_path, predictor):
    cv2.imwrite(str(tmp_path / "000000000042.png"), picture(60, 80))
    result = predictor(tmp_path / "000000000042.png")
    png = result.save(tmp_path / "out")
    assert png == tmp_path / "out" / "panoptic" / "000000000042.png"
    assert np.array_equal(read_id_map(png) > 0, result.id_map > 0)
    content = read_panoptic_json(tmp_path / "out" / "panoptic.json", with_categories=True)
    assert content["annotations"][0]["image_id"] == 42 and len(content["categories"]) == 32
    assert np.array_equal(result.image, picture(60, 80))
    drawn = result.overlay()
    assert (
        drawn.shape == (60, 80, 3)
        and drawn.dtype == np.uint8
        and (drawn != picture(60, 80)).any() == bool(result.segments)
    )


def test_detector_without_segmentation(goldens):
    small = dict(backbone_base_channels=8, fpn_channels=16, head_channels=16, num_things=3, categories=None)
    result = spatialflow.Predictor(
        spatialflow.build_model("retinanet_r50_coco", **small), score_threshold=0.0, **SHORT
    )(picture(60, 80))
    assert result.masks is None and len(result.scores) == 100 and not result.id_map.any() and result.segments == []


def test_an_input_of_the_network_that_is_too_large_is_named(model):
    predictor = spatialflow.Predictor(model, test_short_edges=[2**24 + 1], test_long_edge=2**40)
    rule = "image 0: the sides of the network's input must be at most 16777216 pixels long"
    with pytest.raises(spatialflow.ImageError, match=rule):
        predictor(picture(60, 80))


def test_wrong_settings(model):
    with pytest.raises(spatialflow.ConfigError, match="only fields of the test section"):
        spatialflow.Predictor(model, fpn_channels=3)
    with pytest.raises(spatialflow.ConfigError, match="test.score_threshold: must lie in 0..1, got 2"):
        spatialflow.Predictor(model, score_threshold=2)
    for batch_size in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=f"batch_size: must be an integer of at least 1, got {batch_size!r}"):
            spatialflow.Predictor(model, batch_size=batch_size)
    for wrong, words in (("demo", "got 'demo'"), (None, "got None"), ([model, "demo"], "got a str in the sequence")):
        with pytest.raises(TypeError, match=f"model: must be a SpatialFlow network or a sequence of them, {words}"):
            spatialflow.Predictor(wrong)
    for options, words in (
        (dict(device="cuda:99"), "device cuda:99: torch .* sees . CUDA devices here"),
        (dict(device="tpu"), "device must be cpu, cuda or cuda:<number>, got 'tpu'"),
        (dict(device="meta"), "device must be cpu, cuda or cuda:<number>, got 'meta'"),
        (dict(dtype=torch.int8), "dtype must be one of torch.float32, .*, got torch.int8"),
        (dict(dtype="half"), "dtype must be one of .*, got 'half'"),
        (dict(cuda_graph=True), "cuda_graph needs a CUDA device, got device cpu"),
        (dict(channel_order="RGB"), "channel_order: must be 'bgr' or 'rgb', got 'RGB'"),
    ):
        with pytest.raises(ValueError, match=words):
            spatialflow.Predictor(model, **options)
