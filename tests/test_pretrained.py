# SPDX-License-Identifier: Apache-2.0
"""The weights in the package: a small file, found by the configuration's name, with good results for new scenes."""

import numpy as np
import pytest

import spatialflow
from spatialflow.cli.main import main
from spatialflow.data.synthetic import CATEGORIES, make_scene
from spatialflow.engine.checkpoints import packaged_weights
from spatialflow.panoptic import PanopticQuality


def test_weights_are_small():
    assert packaged_weights("demo").stat().st_size < 8e6
    assert packaged_weights("tiny") is None


def test_unseen_scenes():
    """Ten of the 50 scenes of `make demo`; the bound has a margin for the smaller number."""
    predictor = spatialflow.Predictor(spatialflow.pretrained_model())
    quality = PanopticQuality(CATEGORIES)
    for index in range(10):
        scene = make_scene((256, 384), 2, index)
        result = predictor(scene.image)
        quality.update(scene.id_map, scene.segments, result.id_map, result.segments)
    assert quality.compute()["All"]["pq"] > 0.65


def test_command_finds_them(tmp_path, capsys):
    import cv2

    cv2.imwrite(str(tmp_path / "scene.png"), np.asarray(make_scene((256, 384), 2, 0).image))
    assert main(["predict", str(tmp_path / "scene.png"), "--config", "demo", "--output", str(tmp_path / "out")]) == 0
    assert "random" not in capsys.readouterr().err


def test_configurations_without_weights_are_named():
    with pytest.raises(spatialflow.CheckpointError, match="has weights for demo, got 'spatialflow_r50_coco'"):
        spatialflow.pretrained_model("spatialflow_r50_coco")
