# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow train`: arguments, settings and warnings."""

import pytest
from helpers.training import SMALL_RUN

from spatialflow.cli.main import main

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`


class TestCommand:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--annotations", "x.json"], "must be given together"),
            ([], "give either"),
            (["--images", "x", "--annotations", "absent.json"], "absent.json"),
            (["--cityscapes", "absent"], "no such folder"),
            (["--device", "tpu"], "--device"),
            (["--workers", "-1"], "--workers"),
            (["--checkpoint", "a", "--backbone", "b"], "exclude each other"),
            (["--cityscapes", "absent", "--panoptic", "x"], "--panoptic needs --images"),
            (["--cityscapes", "absent", "--validation-panoptic", "x"], "--validation-panoptic needs --validation-im"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message, tmp_path, capsys):
        assert main(["train", "tiny", "num_things=6", "--output", str(tmp_path / "run"), *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "setting, message",
        [("epochs", "FIELD=VALUE"), ("epochs=0", "epochs"), ("epocs=1", "epochs"), ("epochs=[", "YAML")],
    )
    def test_bad_settings_are_named(self, setting, message, tmp_path, capsys):
        assert main(["train", "tiny", setting, "--output", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err

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
