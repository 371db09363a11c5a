# SPDX-License-Identifier: Apache-2.0
"""Warnings before a training run: each names what is wrong and its remedy, and appears only then."""

import json
import re

import pytest
import torch
from helpers.scenes import scene_categories, write_coco
from helpers.training import SMALL_RUN, small

import spatialflow
from spatialflow.cli.main import main
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.subset import hold_out
from spatialflow.engine.run_advice import advice, missing_photographs, spinning_threads

GOOD = dict(learning_rate_epochs=[1], epochs=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 20, (64, 96))


def warnings(scenes, steps=20, has_validation=True, is_pretrained=False, **fields):
    data = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())
    return advice(small(**(GOOD | fields)), data, steps, has_validation, is_pretrained)


def test_a_sound_run_has_none(scenes):
    assert warnings(scenes) == []


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(warmup_iterations=20), "warmup_iterations 20: the run ends after 20 steps, .* set warmup_iterations=2$"),
        (dict(learning_rate_epochs=[1, 9]), "learning_rate_epochs .*: the run ends with epoch 2"),
        (dict(images_per_step=1), "images_per_step 1: .* a single image; set images_per_step=2 or more$"),
        (
            dict(images_per_step=4, accumulation_steps=4),
            "images_per_step 4 in 4 parts: .* set images_per_step=8 or more$",
        ),
        (
            dict(train_short_edges=[16], train_long_edge=24),
            r"images of 96 x 64 pixels \(width x height\) are reduced by a factor of 4\.0, .* set "
            r"train_short_edges=\[32\] train_long_edge=48 test_short_edges=\[32\] test_long_edge=48$",
        ),
        (dict(backbone_norm_trains=False), "no --backbone or --model: .* set backbone_norm_trains=true"),
    ],
)
def test_settings(scenes, fields, message):
    (text,) = warnings(scenes, **fields)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "fields",
    [
        dict(images_per_step=1, backbone_norm_trains=False, is_pretrained=True),
        dict(train_short_edges=[16], train_long_edge=24, train_crop=[16, 16]),
    ],
)
def test_settings_that_are_right_in_their_context(scenes, fields):
    assert warnings(scenes, **fields) == []


def test_classes_without_examples(scenes, tmp_path):
    content = json.loads((scenes / "panoptic.json").read_text())
    for annotation in content["annotations"]:
        segments = annotation["segments_info"]
        annotation["segments_info"] = [row for row in segments if row["category_id"] not in (2, 14)]
        for row in annotation["segments_info"]:
            row["iscrowd"] = int(row["category_id"] == 1)
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    data = CocoPanoptic(path, scenes / "images", scenes / "panoptic", scene_categories())
    (text,) = advice(small(**GOOD), data, 20, True, False)
    names = {row.id: row.name for row in scene_categories().rows}
    assert text == (
        f"no training image has a segment of {names[1]}, {names[2]}, {names[14]}, so that the network cannot learn "
        f'these classes; annotate examples, or remove the class from "categories"'
    )


def test_no_validation_images(scenes):
    (text,) = warnings(scenes, has_validation=False)
    assert text.startswith("no validation images, so that the run has no score; give --validation-images")


def test_few_images_and_the_command(tmp_path, capsys):
    scenes = write_coco(tmp_path / "scenes", 2, (64, 96))
    files = ["--images", str(scenes / "images"), "--annotations", str(scenes / "panoptic.json")]
    settings = [f"{name}={value}" for name, value in SMALL_RUN.items() if name not in ("num_stuff", "categories")]
    assert main(["train", "tiny", *settings, *files, "--workers", "0", "--output", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("spatialflow: only 2 training images: the network will fit these") for line in lines)
    assert any(line.startswith("spatialflow: no validation images") for line in lines)


class TestSpinningThreads:
    """On a busy machine they made a run in Python four times as slow as the command, which sets the variable."""

    def warned(self, monkeypatch, policy, threads=2, device="cpu", workers=2):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        if policy is None:
            monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        else:
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        return spinning_threads(torch.device(device), workers)

    @pytest.mark.parametrize("policy", [None, "active"])
    def test_the_remedy_is_named(self, monkeypatch, policy):
        (text,) = self.warned(monkeypatch, policy)
        assert text.startswith("OMP_WAIT_POLICY is not passive: torch's 2 threads keep their cores busy")
        assert text.endswith('set os.environ["OMP_WAIT_POLICY"] = "passive" before torch is imported')

    @pytest.mark.parametrize("policy", ["passive", "PASSIVE"])
    def test_not_where_threads_sleep(self, monkeypatch, policy):
        assert self.warned(monkeypatch, policy) == []

    @pytest.mark.parametrize("options", [{"threads": 1}, {"device": "cuda"}, {"workers": 0}])
    def test_not_where_they_disturb_nothing(self, monkeypatch, options):
        assert self.warned(monkeypatch, None, **options) == []

    def test_a_run_says_it_before_its_first_step(self, monkeypatch, tmp_path, caplog):
        scenes = write_coco(tmp_path / "scenes", 2, (64, 96))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        settings = {k: v for k, v in SMALL_RUN.items() if k not in ("num_things", "num_stuff", "categories")}
        output = tmp_path / "run"
        spatialflow.train(scenes / "images", scenes / "panoptic.json", config="tiny", output=output, **settings)
        assert any(text.startswith("OMP_WAIT_POLICY is not passive") for text in caplog.messages)


def test_photographs_that_the_folder_lacks(tmp_path):
    """The run began without a word, and named images to evaluate on that the user had not given."""
    folder = write_coco(tmp_path, 4)
    data = CocoPanoptic(folder / "panoptic.json", folder / "images", None, scene_categories())
    assert missing_photographs(data) == []
    for name in ("000002.jpg", "000004.jpg"):
        (folder / "images" / name).unlink()
    assert missing_photographs(data) == [
        f"{folder / 'images'}: lacks 2 of the 4 photographs to train on, such as 000002.jpg; they are skipped"
    ]
    assert " of the 3 photographs to train on" in missing_photographs(hold_out(data, 0.25)[0])[0]
