# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow train`: arguments, settings and warnings."""

import pytest
import torch
from helpers.command_line import error_messages
from helpers.training import SMALL_RUN

from spatialflow.cli.main import main

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`


class TestCommand:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--annotations", "x.json"], "--images and --annotations must be given together"),
            ([], "give either --images and --annotations, or --cityscapes"),
            (["--images", "x", "--annotations", "absent.json"], "absent.json: no such file"),
            (
                ["--cityscapes", "absent"],
                "absent/leftImg8bit/train: no such folder; a Cityscapes tree has leftImg8bit/train and gtFine/train",
            ),
            (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
            (["--workers", "-1"], "--workers must be from 0 to 1024, got -1"),
            (
                ["--checkpoint", "a", "--backbone", "b"],
                "--model and --backbone exclude each other: a whole network's weights include the backbone's",
            ),
            (["--ema"], "--ema needs --model"),
            (["overfit"], "give at most one CONFIG, and settings as FIELD=VALUE, got tiny, overfit"),
            (["--cityscapes", "absent", "--panoptic", "x"], "--panoptic needs --images"),
            (
                ["--cityscapes", "absent", "--validation-panoptic", "x"],
                "--validation-panoptic needs --validation-images",
            ),
            (
                ["--cityscapes", "absent", "--validation-images", "x", "--validation-annotations", "y"],
                "--cityscapes and --validation-images exclude each other: the tree has a split val",
            ),
            (
                ["--images", "x", "--annotations", "y", "--validation-share", "1.5"],
                "--validation-share must be from 0 up to, but not including, 1, got 1.5",
            ),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["train", "tiny", "num_things=6", "--output", "run", *arguments]) == 2
        assert error_messages(capsys) == [message] and not (tmp_path / "run").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_missing_gpu_is_named(self, tmp_path, capsys):
        assert main(["train", "--device", "cuda", "--cityscapes", "x", "--output", str(tmp_path / "run")]) == 2
        assert error_messages(capsys) == [f"--device cuda: torch {torch.__version__} sees no CUDA device here"]

    @pytest.mark.parametrize(
        "setting, message",
        [
            ("epochs", "give at most one CONFIG, and settings as FIELD=VALUE, got tiny, epochs"),
            ("epochs=0", "tiny: training.epochs: must be positive, got 0"),
            ("epocs=1", "no such field: 'epocs'; did you mean epochs?"),
            ("epochs=[", "epochs: '[' is not a YAML value"),
        ],
    )
    def test_bad_settings_are_named(self, setting, message, tmp_path, capsys):
        assert main(["train", "tiny", setting, "--output", str(tmp_path)]) == 2
        assert error_messages(capsys) == [message]

    @pytest.mark.parametrize(
        "settings, warned", [((), True), (("backbone_norm_trains=true", "backbone_frozen_stages=-1"), False)]
    )
    def test_frozen_random_weights_are_said_plainly(self, settings, warned, scenes, tmp_path, capsys):
        fields = {k: v for k, v in SMALL_RUN.items() if not k.startswith(("backbone_norm", "backbone_frozen"))}
        arguments = ["train", "tiny", *(f"{k}={v}" for k, v in fields.items()), *settings, "--workers", "0"]
        paths = ["--images", str(scenes / "images"), "--annotations", str(scenes / "panoptic.json")]
        assert main([*arguments, *paths, "--output", str(tmp_path)]) == 0
        assert ("no --backbone or --model" in capsys.readouterr().err) == warned

    def test_what_will_not_happen_is_said_before_the_first_step(self, scenes, tmp_path, capsys):
        arguments = ["train", "tiny", *(f"{k}={v}" for k, v in SMALL_RUN.items()), "--workers", "0"]
        for kind in ("", "validation-"):
            arguments += [f"--{kind}images", str(scenes / "images"), f"--{kind}annotations", scenes / "panoptic.json"]
        assert main([*map(str, arguments), "--output", str(tmp_path)]) == 0
        message = capsys.readouterr().err
        assert "learning_rate_epochs [16, 19]: the run ends with epoch 1" in message
        assert "warmup_iterations 3: the run ends after 2 steps" in message
