# SPDX-License-Identifier: Apache-2.0
"""Training with non-finite values, and with losses or weights that grow by orders of magnitude."""

import subprocess
import sys

import pytest
import torch
from helpers.scenes import write_coco
from helpers.training import SINGLE_PROCESS, SMALL_RUN, small, steps_of
from kill_and_resume import command, environment

from spatialflow.cli.main import main
from spatialflow.engine.checkpoints import CheckpointError, read_state
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.log import TrainingLog, read_log
from spatialflow.engine.trainer import Trainer, TrainingError

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`


def make_infinite(trainer, what):
    """Make one value infinite, as an overflowing update does."""
    model = trainer.network
    tensor = {
        "fpn.p6.weight": model.fpn.p6.weight.data,
        "backbone.bn1.running_var": model.backbone.bn1.running_var,
        "momentum of fpn.p6.weight": trainer.optimizer.state[model.fpn.p6.weight]["momentum_buffer"],
    }[what]
    tensor.view(-1)[-1] = float("inf")


def after_steps(trainer, monkeypatch, change, first=1):
    """Call `change(losses)` after every step from `first` on; a result other than None replaces the losses."""
    advance = trainer._advance

    def changed(*arguments):
        losses = advance(*arguments)
        replaced = change(losses) if trainer.step + 1 >= first else None
        return losses if replaced is None else replaced

    monkeypatch.setattr(trainer, "_advance", changed)


class TestDivergence:
    @pytest.mark.parametrize("what", ["fpn.p6.weight", "backbone.bn1.running_var", "momentum of fpn.p6.weight"])
    def test_last_good_files_stay(self, data, tmp_path, monkeypatch, what):
        """After a finite loss and a non-finite update, no file is written, and a run with a lower rate resumes."""
        Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
        checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
        weights = read_state(tmp_path / "model.safetensors")
        trainer = Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS)
        after_steps(trainer, monkeypatch, lambda losses: make_infinite(trainer, what), first=4)
        with pytest.raises(TrainingError) as error:
            trainer.run()
        for words in (
            f"step 4: not finite after step 4: {what}",
            "; a lower learning_rate, a longer warm-up (warmup_iterations) or gradient_clip_norm may help; ",
            "checkpoint.pt is from an earlier step: the same command with changed settings resumes from it",
        ):
            assert words in str(error.value)
        assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint
        kept = read_state(tmp_path / "model.safetensors")  # of the same epoch, with the new configuration
        assert all(torch.equal(kept[name], value) for name, value in weights.items()) and kept.keys() == weights.keys()
        resumed = Trainer(small(epochs=2, learning_rate=0.0005, gradient_clip_norm=5.0), data, tmp_path, SINGLE_PROCESS)
        assert resumed.step == 2
        assert resumed.store.changed_settings == ["learning_rate 0.005 -> 0.0005", "gradient_clip_norm None -> 5.0"]
        resumed.run()
        assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3, 4]

    def test_loss_and_weights_are_named_together(self, data, tmp_path, monkeypatch):
        """If a non-finite loss is the first sign, the message also names the weights."""
        trainer = Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS)
        after_steps(trainer, monkeypatch, lambda losses: make_infinite(trainer, "fpn.p6.weight"))
        message = r"step 2: the loss is not finite \(total .*\); not finite after step 2: "
        with pytest.raises(TrainingError, match=message):
            trainer.run()
        assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "model.safetensors").exists()

    def test_one_process_stops_all(self, data, tmp_path, monkeypatch):
        """Non-finite statistics in another process stop this one."""
        trainer = Trainer(small(), data, tmp_path, SINGLE_PROCESS)
        broken = ("backbone.bn1.running_mean",)
        monkeypatch.setattr(
            ProcessGroup, "gather", lambda self, item: [item, broken if isinstance(item, tuple) else item]
        )
        with pytest.raises(TrainingError, match="step 2: not finite after step 2: backbone.bn1.running_mean; "):
            trainer.run()
        assert not (tmp_path / "checkpoint.pt").exists()

    def test_poisoned_checkpoint_is_refused(self, data, tmp_path):
        """Non-finite checkpoints, as earlier versions could write them, are refused."""
        Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
        good = (tmp_path / "checkpoint.pt").read_bytes()

        def break_weight(state):
            state["model"]["fpn.p6.bias"][0] = float("nan")

        def break_momentum(state):
            state["optimizer"]["state"][0]["momentum_buffer"].view(-1)[0] = float("inf")

        for change, message in (
            (break_weight, "holds values that are not finite: fpn.p6.bias; start"),
            (break_momentum, "holds values that are not finite: momentum of backbone.conv1.weight; start"),
            (lambda state: state.pop("scaler"), "is not a complete checkpoint of a training run"),
            (lambda state: state["model"].pop("fpn.p6.bias"), "is not a complete checkpoint of a training run"),
            (lambda state: state.update(identity="[]"), "is not a complete checkpoint of a training run"),
            (lambda state: state.update(identity='{"config": {"model": 3}}'), "is not a complete checkpoint"),
        ):
            (tmp_path / "checkpoint.pt").write_bytes(good)
            state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            change(state)
            torch.save(state, tmp_path / "checkpoint.pt")
            with pytest.raises(CheckpointError, match=f"checkpoint.pt: {message}"):
                Trainer(small(), data, tmp_path, SINGLE_PROCESS)

    def test_fp16_skips_steps(self, data, tmp_path):
        """An overflow of float16 gradients skips the step; a loss scale below `MIN_LOSS_SCALE` is an error."""
        config = small(mixed_precision="fp16")
        for scale, ends in ((2.0**100, True), (2.0**-30, False)):
            trainer = Trainer(config, data, tmp_path / f"{ends}", SINGLE_PROCESS)
            trainer.scaler = trainer.store.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            before = trainer.network.fpn.p6.weight.clone()
            if ends:
                trainer.run()
                assert torch.equal(trainer.network.fpn.p6.weight, before) and trainer.scaler.get_scale() == 2.0**98
            else:
                with pytest.raises(TrainingError, match="step 2: gradients overflow float16 at a loss scale of 9.3"):
                    trainer.run()

    @pytest.mark.parametrize("what", ["the loss", "the largest weight"])
    def test_finite_divergence_is_reported_once(self, data, tmp_path, monkeypatch, capsys, what):
        """The run continues with a warning in the log and on standard error, and the checkpoint is copied."""
        Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
        good = (tmp_path / "checkpoint.pt").read_bytes()
        trainer = Trainer(small(epochs=4), data, tmp_path, SINGLE_PROCESS)

        def diverge(losses):
            if what == "the loss":
                return losses * 1e3
            trainer.network.stuff_head.logits.weight.data[0, 0] = 1e4
            return torch.ones(5)

        after_steps(trainer, monkeypatch, diverge, first=3)
        trainer.run()
        (warning,) = [row for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "warning"]
        assert warning["step"] == 4 and warning["message"].startswith(f"the run diverges: {what} is ")
        assert capsys.readouterr().err.count("warning: step 4: the run diverges") == 1
        assert (tmp_path / "checkpoint_before_divergence.pt").read_bytes() == good
        Trainer(small(epochs=4), data, tmp_path, SINGLE_PROCESS).monitor.check([1e9], 8)
        assert "diverges" not in capsys.readouterr().err

    @pytest.mark.parametrize("broken", [15, 30])
    def test_losses_at_the_beginning_are_those_of_ten_steps(self, data, tmp_path, monkeypatch, capsys, broken):
        """The initial loss is the minimum of the first ten steps. Log rows about broken images are not steps."""
        for name in ("annotations", "names", "sizes", "image_ids"):
            setattr(data, name, getattr(data, name)[:] * 10)
        trainer = Trainer(small(warmup_iterations=20), data, tmp_path, SINGLE_PROCESS)
        trainer.unreported_problems = [f"{i}.jpg: is truncated" for i in range(broken)]
        losses_of = {10: 0.5, 20: 60.0}  # by step; 1 for all other steps
        after_steps(trainer, monkeypatch, lambda _: torch.full((5,), losses_of.get(trainer.step + 1, 1.0)))
        trainer.run()
        rows = read_log(tmp_path / "log.jsonl")
        assert [row["kind"] for row in rows[: broken + 1]] == ["problem"] * broken + ["step"]
        (warning,) = [row["message"] for row in rows if row["kind"] == "warning"]
        assert warning.startswith("the run diverges: the loss is 60, at the beginning 0.5; ")

    def test_log_stays_json(self, tmp_path):
        log = TrainingLog(tmp_path)
        log.add("step", 1, total=1.0)
        with pytest.raises(ValueError, match="JSON"):
            log.add("step", 2, total=float("nan"))
        log.close()
        assert (tmp_path / "log.jsonl").read_text().count("\n") == 1 and len(log.rows) == 1

    def test_command(self, scenes, tmp_path, capsys):
        """A learning rate whose first update overflows: exit code 2, one message, no weights."""
        settings = [f"{name}={value}" for name, value in (SMALL_RUN | {"learning_rate": 3e36}).items()]
        paths = ["--images", str(scenes / "images"), "--annotations", str(scenes / "panoptic.json"), "--workers", "0"]
        command = ["train", "tiny", *settings, "warmup_iterations=0", "checkpoint_every_steps=1", *paths]
        assert main([*command, "--output", str(tmp_path / "run")]) == 2
        message = capsys.readouterr().err
        assert "spatialflow: step 1: not finite after step 1: " in message and "a lower learning_rate" in message
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.yaml", "log.jsonl", "tensorboard"}

    def test_all_processes_end(self, tmp_path):
        """If an update overflows, both processes end with an error, and none waits for the other."""
        write_coco(tmp_path, 4, (64, 96))
        settings = ("learning_rate=3e36", "warmup_iterations=0", "images_per_step=2", "checkpoint_every_steps=1")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        rest = command(tmp_path, tmp_path / "run", *settings)[3:]
        done = subprocess.run(
            [*launcher, "-m", "spatialflow.cli", *rest], env=environment(), timeout=240, capture_output=True, text=True
        )
        assert done.returncode != 0 and "not finite after step" in done.stderr
        assert "the run diverges" in done.stderr
