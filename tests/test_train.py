# SPDX-License-Identifier: Apache-2.0
"""Training: the schedule, what a run leaves behind, exact resume, several processes, mixed precision, finetuning,
broken data.
"""

import json
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.multiprocessing
from helpers.scenes import scene_categories, write_cityscapes, write_coco
from helpers.small_models import SMALL, channels
from kill_and_resume import command, digest, environment, kill_and_resume
from safetensors.torch import load_file

from spatialflow.cli.main import main
from spatialflow.data.categories import load_categories
from spatialflow.data.cityscapes import Cityscapes
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.samples import SampleError
from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint
from spatialflow.engine.distributed import ProcessGroup, end, leave, synchronize_norms
from spatialflow.engine.log import TrainingLog, read_log
from spatialflow.engine.trainer import InitialWeights, Trainer, TrainingError, learning_rate
from spatialflow.models.build import build_model, load_config
from spatialflow.panoptic.formats import PanopticFormatError

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
SMALL_RUN = SMALL | dict(
    num_things=6,
    num_stuff=6,
    categories="synthetic",
    backbone_norm_trains=True,
    backbone_frozen_stages=-1,
    train_short_edges=[64],
    train_long_edge=96,
    test_short_edges=[64],
    test_long_edge=96,
    stuff_area_threshold=20,
    images_per_step=2,
    warmup_iterations=3,
    candidates_per_level=50,
    epochs=1,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 4, (64, 96))


@pytest.fixture
def data(scenes):
    return CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())


def small(**overrides):
    return load_config("tiny", **(SMALL_RUN | overrides))


def steps_of(folder):
    return [row for row in read_log(folder / "log.jsonl") if row["kind"] == "step"]


def test_learning_rate():
    """Warm-up over 500 steps from a thousandth, a tenth after epochs 16 and 19: the paper's schedule."""
    training = load_config("spatialflow_r50_coco").training
    rates = [learning_rate(step, 1000, training) for step in (0, 250, 499, 500, 15999, 16000, 18999, 19000)]
    expected = [5e-6, 0.0025025, 0.00499001, 0.005, 0.005, 5e-4, 5e-4, 5e-5]
    assert rates == pytest.approx(expected, rel=1e-6)
    finetune = load_config(
        "tiny", finetune_class_layers_epochs=2, finetune_learning_rate=0.02, warmup_iterations=0
    ).training
    assert [learning_rate(step, 10, finetune) for step in (0, 19, 20)] == [0.02, 0.02, 0.005]


class TestRun:
    def test_leaves_everything(self, data, tmp_path):
        """Weights, checkpoint, log and curves; evaluation with PQ and AP; a second call finds the run complete."""
        config = small(epochs=2)
        trainer = Trainer(config, data, tmp_path, ALONE, validation=data)
        network = trainer.run()
        rows = read_log(tmp_path / "log.jsonl")
        assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4]
        evaluations = [row for row in rows if row["kind"] == "evaluation"]
        assert [row["epoch"] for row in evaluations] == [1, 2] and {
            "pq",
            "pq_things",
            "pq_stuff",
            "box_ap",
        } <= evaluations[0].keys()
        scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
        assert (
            scores["All"]["pq"] == evaluations[-1]["pq"]
            and len(json.loads((tmp_path / "evaluation/panoptic.json").read_text())["images"]) == 4
        )
        assert cv2.imread(str(tmp_path / "curves.png")).shape[1] > 500
        for name in ("model.safetensors", "checkpoint.pt"):
            loaded = load_checkpoint(build_model(config), tmp_path / name).state_dict()
            assert all(
                torch.equal(value, loaded[key])
                for key, value in network.state_dict().items()
                if "num_batches" not in key
            ), name
        assert Trainer(config, data, tmp_path, ALONE).step == 4

    def test_learns(self, data, tmp_path):
        """Sixty steps on two scenes: each loss falls, and nothing is reported."""
        for name in ("annotations", "names", "sizes", "image_ids"):
            setattr(data, name, getattr(data, name)[:2] * 60)
        config = small(
            flip_probability=0.0,
            learning_rate=0.02,
            warmup_iterations=10,
            gradient_clip_norm=10.0,
            stuff_loss_weight=1.0,
            **channels(8, 16),
        )
        Trainer(config, data, tmp_path, ALONE).run()
        first, last = (
            {name: np.mean([row[name] for row in rows]) for name in ("cls", "box", "thing", "stuff")}
            for rows in (steps_of(tmp_path)[:3], steps_of(tmp_path)[-3:])
        )
        for name, share in (("cls", 0.95), ("box", 0.9), ("thing", 0.98), ("stuff", 0.6)):
            assert last[name] < share * first[name], (name, first, last)
        assert not any(row["kind"] == "warning" for row in read_log(tmp_path / "log.jsonl"))

    def test_resume_is_exact(self, data, tmp_path):
        """A run in two halves has the weights, the optimizer state and the log of one in a single piece."""
        whole = Trainer(small(epochs=2), data, tmp_path / "whole", ALONE).run()
        Trainer(small(epochs=1), data, tmp_path / "halves", ALONE).run()
        resumed = Trainer(small(epochs=2), data, tmp_path / "halves", ALONE)
        assert resumed.step == 2
        halves = resumed.run()
        assert all(torch.equal(value, halves.state_dict()[key]) for key, value in whole.state_dict().items())
        assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "halves")

    @pytest.mark.parametrize("field, value", [("score_threshold", 0.1), ("max_detections", 7)])
    def test_resume_only_with_the_same_proposals(self, data, tmp_path, field, value):
        """Settings of the test section matter where they choose the proposals of training."""
        Trainer(small(), data, tmp_path, ALONE).run()
        assert Trainer(small(stuff_area_threshold=77), data, tmp_path, ALONE).step == 2
        with pytest.raises(TrainingError, match=f"{field} .* -> {value}"):
            Trainer(small(**{field: value}), data, tmp_path, ALONE)

    def test_resume_only_of_the_same_run(self, data, tmp_path, scenes):
        Trainer(small(), data, tmp_path, ALONE).run()
        with pytest.raises(TrainingError, match="momentum 0.9 -> 0.5"):
            Trainer(small(momentum=0.5), data, tmp_path, ALONE)
        assert Trainer(small(momentum=0.5), data, tmp_path, ALONE, resume=False).step == 0
        other = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())
        other.names = other.names[::-1]
        with pytest.raises(TrainingError, match="other images"):
            Trainer(small(), other, tmp_path, ALONE)
        damaged = ((b"", "is damaged"), (b"damaged", "is damaged"), ([1], "no complete checkpoint of a training run"))
        for content, message in damaged:
            with open(tmp_path / "checkpoint.pt", "wb") as file:
                file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            with pytest.raises(CheckpointError, match=f"checkpoint.pt: .*{message}"):
                Trainer(small(), data, tmp_path, ALONE)

    @pytest.mark.parametrize(
        "where, value",
        [
            ((), torch.zeros(3)),
            (("identity",), "[]"),
            (("step",), -1),
            (("step",), "a"),
            (("model",), {}),
            (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(2)),
            (("random",), torch.zeros(3)),
        ],
    )
    def test_resume_from_a_damaged_checkpoint_is_an_error(self, data, tmp_path, where, value):
        Trainer(small(), data, tmp_path, ALONE).run()
        content = {"": torch.load(tmp_path / "checkpoint.pt")}
        holder = content
        for key in ("", *where)[:-1]:
            holder = holder[key]
        holder[("", *where)[-1]] = value
        torch.save(content[""], tmp_path / "checkpoint.pt")
        with pytest.raises(CheckpointError, match="checkpoint.pt: is no complete checkpoint of a training run"):
            Trainer(small(), data, tmp_path, ALONE)

    def test_settings_of_the_optimizer_are_those_of_the_configuration(self, data, tmp_path):
        """Those in the checkpoint are not read: the identity of the run has made sure that they are the same."""
        Trainer(small(), data, tmp_path, ALONE).run()
        content = torch.load(tmp_path / "checkpoint.pt")
        content["optimizer"]["param_groups"][0]["momentum"] = "a"
        torch.save(content, tmp_path / "checkpoint.pt")
        assert Trainer(small(), data, tmp_path, ALONE).optimizer.param_groups[0]["momentum"] == 0.9

    def test_interrupted_evaluation_is_made_up_for(self, data, tmp_path, monkeypatch):
        """The run ends in its last evaluation: the same command evaluates and leaves the weights, once."""
        from spatialflow.engine import trainer as trainer_module

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "evaluate_network", interrupted)
            with pytest.raises(KeyboardInterrupt):
                Trainer(small(), data, tmp_path, ALONE, validation=data).run()
        for _ in range(2):
            network = Trainer(small(), data, tmp_path, ALONE, validation=data).run()
            kinds = [row["kind"] for row in read_log(tmp_path / "log.jsonl")]
            assert kinds == ["step", "step", "evaluation"]
        loaded = load_checkpoint(build_model(small()), tmp_path / "model.safetensors").state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items() if "num_b" not in key)

    def test_evaluation_captures_no_graphs(self, data, tmp_path, monkeypatch):
        """They would take memory beside that of training, and each evaluation would capture its own."""
        from spatialflow.engine import trainer as trainer_module

        given, make = [], trainer_module.Predictor
        monkeypatch.setattr(
            trainer_module, "Predictor", lambda *args, **kwargs: given.append(kwargs) or make(*args, **kwargs)
        )
        Trainer(small(), data, tmp_path, ALONE, validation=data).run()
        assert [options["cuda_graph"] for options in given] == [False]

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_an_evaluation_that_fails_leaves_the_weights(self, data, tmp_path, monkeypatch, epochs):
        """Of the epoch before it, also where the run was to go on."""
        from spatialflow.engine import trainer as trainer_module

        def failing(*_):
            raise RuntimeError("cannot be scored")

        monkeypatch.setattr(trainer_module, "evaluate_network", failing)
        trainer = Trainer(small(epochs=epochs), data, tmp_path, ALONE, validation=data)
        with pytest.raises(RuntimeError, match="cannot be scored"):
            trainer.run()
        assert trainer.step == 2 and len(steps_of(tmp_path)) == 2
        for name in ("model.safetensors", "checkpoint.pt"):
            loaded = load_checkpoint(build_model(small()), tmp_path / name).state_dict()
            assert all(
                torch.equal(value, loaded[key])
                for key, value in trainer.network.state_dict().items()
                if "num_batches" not in key
            ), name

    def test_a_restarted_run_forgets_the_old_one(self, data, tmp_path, monkeypatch):
        """Interrupted before its first checkpoint, it is not the old run that goes on."""
        Trainer(small(), data, tmp_path, ALONE).run()
        restarted = Trainer(small(), data, tmp_path, ALONE, resume=False)

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(restarted, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            restarted.run()
        assert Trainer(small(), data, tmp_path, ALONE).step == 0

    def test_processes_must_see_one_folder(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(ProcessGroup, "gather", lambda self, item: [item, 8])
        with pytest.raises(TrainingError, match=r"resume at different steps \[0, 8\]"):
            Trainer(small(), data, tmp_path, ProcessGroup(0, 2, torch.device("cpu")))

    def test_log_of_a_killed_run_is_cut_back(self, data, tmp_path):
        Trainer(small(), data, tmp_path, ALONE).run()
        with open(tmp_path / "log.jsonl", "a") as file:
            file.write('{"kind": "step", "step": 3, "total": 1}\n{"kind": "st')
        Trainer(small(epochs=2), data, tmp_path, ALONE).run()
        assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3, 4]
        (tmp_path / "log.jsonl").write_text('{"a": 1}\n[3]\n')  # of something else
        Trainer(small(epochs=3), data, tmp_path, ALONE).run()
        assert [row["step"] for row in steps_of(tmp_path)] == [5, 6]

    def test_accumulation(self, data, tmp_path):
        """A step in two parts is the mean of the two parts."""
        config = small(images_per_step=4, accumulation_steps=2, warmup_iterations=0, gradient_clip_norm=None)
        trainer = Trainer(config, data, tmp_path, ALONE)
        from spatialflow.data.loader import make_loader
        from spatialflow.models.training_step import TrainingStep

        parts = [
            TrainingStep(build_like(trainer), config)(batch.images, batch.truth()).total().item()
            for batch in make_loader(data, config.data, trainer.schedule.batches(0, 1, 0, 1, 2))
        ]
        trainer.run()
        assert len(parts) == 2 and steps_of(tmp_path)[0]["total"] == pytest.approx(np.mean(parts), rel=1e-5)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_mixed_precision(self, data, tmp_path, precision):
        """Losses are near those of float32, weights stay float32."""
        trainer = Trainer(small(mixed_precision=precision), data, tmp_path / precision, ALONE)
        network = trainer.run()
        Trainer(small(), data, tmp_path / "full", ALONE).run()
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in network.parameters())
        assert trainer.scaler.is_enabled() == (precision == "fp16")
        assert steps_of(tmp_path / precision)[0]["total"] == pytest.approx(
            steps_of(tmp_path / "full")[0]["total"], rel=0.03
        )

    def test_divergence_is_an_error(self, data, tmp_path):
        with pytest.raises(TrainingError, match="the loss is not finite"):
            Trainer(small(epochs=8, learning_rate=1e9, warmup_iterations=0), data, tmp_path, ALONE).run()

    def test_batch_must_be_shared(self, data, tmp_path):
        with pytest.raises(TrainingError, match="multiple of processes"):
            Trainer(small(images_per_step=3), data, tmp_path, ProcessGroup(0, 2, torch.device("cpu")))


def poison(trainer, what):
    """Makes one value infinite, as an update that overflows would."""
    model = trainer.network
    tensor = {
        "fpn.p6.weight": model.fpn.p6.weight.data,
        "backbone.bn1.running_var": model.backbone.bn1.running_var,
        "momentum of fpn.p6.weight": trainer.optimizer.state[model.fpn.p6.weight]["momentum_buffer"],
    }[what]
    tensor.view(-1)[-1] = float("inf")


def after_steps(trainer, monkeypatch, change, first=1):
    """Calls `change(losses)`, which may return others, after every step from `first` on."""
    advance = trainer._advance

    def changed(*arguments):
        losses = advance(*arguments)
        other = change(losses) if trainer.step + 1 >= first else None
        return losses if other is None else other

    monkeypatch.setattr(trainer, "_advance", changed)


class TestDivergence:
    @pytest.mark.parametrize("what", ["fpn.p6.weight", "backbone.bn1.running_var", "momentum of fpn.p6.weight"])
    def test_last_good_files_stay(self, data, tmp_path, monkeypatch, what):
        """The loss is finite, what comes after it is not: nothing is written, and a lower rate goes on."""
        Trainer(small(), data, tmp_path, ALONE).run()
        files = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "model.safetensors")}
        trainer = Trainer(small(epochs=2), data, tmp_path, ALONE)
        after_steps(trainer, monkeypatch, lambda losses: poison(trainer, what), first=4)
        with pytest.raises(TrainingError) as error:
            trainer.run()
        for words in (
            f"step 4: not finite after step 4: {what}",
            "; a lower learning_rate, a longer warm-up (warmup_iterations) or gradient_clip_norm may help; ",
            "checkpoint.pt is of an earlier step, and the same command with such settings goes on from it",
        ):
            assert words in str(error.value)
        assert files == {name: (tmp_path / name).read_bytes() for name in files}
        calmer = Trainer(small(epochs=2, learning_rate=0.0005, gradient_clip_norm=5.0), data, tmp_path, ALONE)
        assert calmer.step == 2
        assert calmer.store.changed_settings == ["learning_rate 0.005 -> 0.0005", "gradient_clip_norm None -> 5.0"]
        calmer.run()
        assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3, 4]

    def test_loss_and_weights_are_named_together(self, data, tmp_path, monkeypatch):
        """The loss of the step after shows it first; the message has the weights too."""
        trainer = Trainer(small(epochs=2), data, tmp_path, ALONE)
        after_steps(trainer, monkeypatch, lambda losses: poison(trainer, "fpn.p6.weight"))
        message = r"step 2: the loss is not finite \(total .*\); not finite after step 2: "
        with pytest.raises(TrainingError, match=message):
            trainer.run()
        assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "model.safetensors").exists()

    def test_one_process_stops_all(self, data, tmp_path, monkeypatch):
        """Statistics that are not finite in another process alone."""
        trainer = Trainer(small(), data, tmp_path, ALONE)
        broken = ("backbone.bn1.running_mean",)
        monkeypatch.setattr(
            ProcessGroup, "gather", lambda self, item: [item, broken if isinstance(item, tuple) else item]
        )
        with pytest.raises(TrainingError, match="step 2: not finite after step 2: backbone.bn1.running_mean; "):
            trainer.run()
        assert not (tmp_path / "checkpoint.pt").exists()

    def test_poisoned_checkpoint_is_refused(self, data, tmp_path):
        """As versions wrote them that did not look."""
        Trainer(small(), data, tmp_path, ALONE).run()
        good = (tmp_path / "checkpoint.pt").read_bytes()

        def break_weight(state):
            state["model"]["fpn.p6.bias"][0] = float("nan")

        def break_momentum(state):
            state["optimizer"]["state"][0]["momentum_buffer"].view(-1)[0] = float("inf")

        for change, message in (
            (break_weight, "holds values that are not finite: fpn.p6.bias; start"),
            (break_momentum, "holds values that are not finite: momentum of backbone.conv1.weight; start"),
            (lambda state: state.pop("scaler"), "is no complete checkpoint of a training run"),
            (lambda state: state["model"].pop("fpn.p6.bias"), "is no complete checkpoint of a training run"),
            (lambda state: state.update(identity="[]"), "is no complete checkpoint of a training run"),
            (lambda state: state.update(identity='{"config": {"model": 3}}'), "is no complete checkpoint"),
        ):
            (tmp_path / "checkpoint.pt").write_bytes(good)
            state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            change(state)
            torch.save(state, tmp_path / "checkpoint.pt")
            with pytest.raises(CheckpointError, match=f"checkpoint.pt: {message}"):
                Trainer(small(), data, tmp_path, ALONE)

    def test_fp16_skips_steps(self, data, tmp_path):
        """Gradients that overflow float16 are no divergence, until no loss scale helps."""
        config = small(mixed_precision="fp16")
        for scale, ends in ((2.0**100, True), (2.0**-30, False)):
            trainer = Trainer(config, data, tmp_path / f"{ends}", ALONE)
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
        """Finite and useless: the run goes on, and says so in the log and on standard error. What was good is kept."""
        Trainer(small(), data, tmp_path, ALONE).run()
        good = (tmp_path / "checkpoint.pt").read_bytes()
        trainer = Trainer(small(epochs=4), data, tmp_path, ALONE)

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
        Trainer(small(epochs=4), data, tmp_path, ALONE).monitor.check([1e9], 8)
        assert "diverges" not in capsys.readouterr().err

    @pytest.mark.parametrize("broken", [15, 30])
    def test_losses_at_the_beginning_are_those_of_ten_steps(self, data, tmp_path, monkeypatch, capsys, broken):
        """Also where the log begins with more broken images than that."""
        for name in ("annotations", "names", "sizes", "image_ids"):
            setattr(data, name, getattr(data, name)[:] * 10)
        trainer = Trainer(small(warmup_iterations=20), data, tmp_path, ALONE)
        trainer.unreported_problems = [f"{i}.jpg: is truncated" for i in range(broken)]
        losses_of = {10: 0.5, 20: 60.0}  # of single steps; 1 for the others
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
        """A rate whose first update overflows: code 2, one sentence, no weights."""
        settings = [f"{name}={value}" for name, value in (SMALL_RUN | {"learning_rate": 3e36}).items()]
        paths = ["--images", str(scenes / "images"), "--annotations", str(scenes / "panoptic.json"), "--workers", "0"]
        command = ["train", "tiny", *settings, "warmup_iterations=0", "checkpoint_every_steps=1", *paths]
        assert main([*command, "--output", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "spatialflow: step 1: not finite after step 1: " in said and "a lower learning_rate" in said
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {"log.jsonl", "tensorboard"}

    def test_all_processes_end(self, tmp_path):
        """Two processes: the update overflows, both end with an error, none waits for the other."""
        write_coco(tmp_path, 4, (64, 96))
        settings = ("learning_rate=3e36", "warmup_iterations=0", "images_per_step=2", "checkpoint_every_steps=1")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29618"]
        rest = command(tmp_path, tmp_path / "run", *settings)[3:]
        done = subprocess.run(
            [*launcher, "-m", "spatialflow.cli", *rest], env=environment(), timeout=240, capture_output=True, text=True
        )
        assert done.returncode != 0 and "not finite after step" in done.stderr
        assert "the run diverges" in done.stderr


def build_like(trainer):
    network = build_model(trainer.config)
    network.load_state_dict(trainer.network.state_dict())
    return network.train()


class TestFinetuning:
    def test_class_layers_first_then_all(self, data, tmp_path):
        """From other classes: everything else is taken over; in the first part only layers that depend on the
        classes move.
        """
        donor = build_model(small(num_things=9, num_stuff=4, categories=None))
        from spatialflow.engine.checkpoints import save_checkpoint

        save_checkpoint(donor, tmp_path / "donor.safetensors")
        config = small(epochs=1, finetune_class_layers_epochs=1, backbone_norm_trains=False)
        first = Trainer(
            config,
            data,
            tmp_path / "run",
            ALONE,
            initial_weights=InitialWeights(checkpoint=tmp_path / "donor.safetensors"),
        ).run()
        changed = {
            name
            for name, value in first.state_dict().items()
            if value.shape != donor.state_dict()[name].shape or not torch.equal(value, donor.state_dict()[name])
        }
        assert changed == {
            f"{layer}.{kind}"
            for layer in ("box_head.class_logits", "thing_head.logits", "stuff_head.logits")
            for kind in ("weight", "bias")
        }
        config = small(epochs=2, finetune_class_layers_epochs=1, backbone_norm_trains=False)
        second = Trainer(config, data, tmp_path / "run", ALONE).run()
        moved = [
            name
            for name, p in second.named_parameters()
            if not torch.equal(p, donor.state_dict()[name]) or name in changed
        ]
        assert "backbone.layer4.0.conv1.weight" in moved and "subnets.reg.0.weight" in moved

    def test_layers_that_start_from_random_weights_are_named(self, scenes, tmp_path, capsys):
        """The file has as many stuff classes as the network, and other things."""
        from spatialflow.engine.checkpoints import save_checkpoint

        save_checkpoint(build_model(small(num_things=9, categories=None)), tmp_path / "donor.safetensors")
        files = {"--images": scenes / "images", "--annotations": scenes / "panoptic.json", "--output": tmp_path / "run"}
        files |= {"--checkpoint": tmp_path / "donor.safetensors", "--workers": 0}
        settings = [f"{name}={value}" for name, value in SMALL_RUN.items()]
        assert main(["train", "tiny", *settings, *(str(part) for pair in files.items() for part in pair)]) == 0
        said = capsys.readouterr().err
        layers = "box_head.class_logits, thing_head.logits"
        assert f"donor.safetensors: of other classes; {layers} start from random weights" in said

    def test_other_layers_must_fit(self, data, tmp_path):
        from spatialflow.engine.checkpoints import save_checkpoint

        save_checkpoint(build_model(small(fpn_channels=16)), tmp_path / "donor.pt")
        with pytest.raises(CheckpointError, match="fpn"):
            Trainer(
                small(), data, tmp_path / "run", ALONE, initial_weights=InitialWeights(checkpoint=tmp_path / "donor.pt")
            )
        with pytest.raises(CheckpointError, match="donor.pt: holds a whole network"):
            Trainer(
                small(), data, tmp_path / "run", ALONE, initial_weights=InitialWeights(backbone=tmp_path / "donor.pt")
            )
        save_checkpoint(build_model(small()).backbone, tmp_path / "backbone.pt")
        with pytest.raises(CheckpointError, match="backbone.pt: holds a backbone alone"):
            Trainer(
                small(),
                data,
                tmp_path / "run",
                ALONE,
                initial_weights=InitialWeights(checkpoint=tmp_path / "backbone.pt"),
            )

    def test_frozen_stages_do_not_move(self, data, tmp_path):
        trainer = Trainer(small(backbone_frozen_stages=1, backbone_norm_trains=False), data, tmp_path, ALONE)
        before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        after = trainer.run().state_dict()
        frozen = [name for name in before if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))]
        assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
        assert not torch.equal(before["backbone.layer2.0.conv1.weight"], after["backbone.layer2.0.conv1.weight"])


class TestBrokenData:
    def test_named_counted_and_survived(self, tmp_path, capsys):
        write_coco(tmp_path, 4, (64, 96))
        (tmp_path / "images/000003.jpg").unlink()
        data = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        trainer = Trainer(small(epochs=2), data, tmp_path / "run", ALONE, validation=data)
        trainer.run()
        problems = [row for row in read_log(tmp_path / "run/log.jsonl") if row["kind"] == "problem"]
        assert len(problems) == 1 and "000003.jpg: cannot be read" in problems[0]["message"]
        assert capsys.readouterr().out.count("000003.jpg") == 1
        assert json.loads((tmp_path / "run/evaluation/scores.json").read_text())["problems"][0].endswith(
            "No such file or directory"
        )
        with pytest.raises(SampleError, match="000003.jpg"):
            Trainer(small(), data, tmp_path / "strict", ALONE, strict=True).run()

    def test_problems_of_other_processes_are_counted(self, data, tmp_path, monkeypatch, capsys):
        """The first process names and logs what any of them has met, once."""
        elsewhere = ["b.jpg: is truncated"]
        monkeypatch.setattr(
            ProcessGroup, "gather", lambda self, item: [item, elsewhere] if isinstance(item, list) else [item]
        )
        trainer = Trainer(small(epochs=2), data, tmp_path, ALONE)
        trainer.run()
        assert [row["message"] for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "problem"] == elsewhere
        assert capsys.readouterr().out.count("b.jpg") == 1 and len(trainer.reporter.problems) == 1

    def test_validation_without_a_usable_image_is_an_error(self, data, tmp_path):
        absent = CocoPanoptic(data.json_path, tmp_path / "nowhere", data.panoptic_folder, scene_categories())
        with pytest.raises(PanopticFormatError, match="none of 4 images to evaluate on can be used; .*nowhere"):
            Trainer(small(), data, tmp_path / "run", ALONE, validation=absent).run()
        assert (tmp_path / "run/checkpoint.pt").is_file() and (tmp_path / "run/model.safetensors").is_file()

    def test_validation_that_cannot_be_scored_is_refused_before_training(self, scenes, data, tmp_path, capsys):
        """No image, no categories or no folder: said at the start, not at the first evaluation."""
        content = json.loads((scenes / "panoptic.json").read_text())
        settings = [f"{name}={value}" for name, value in SMALL_RUN.items()]
        files = {"--images": scenes / "images", "--annotations": scenes / "panoptic.json", "--output": tmp_path / "run"}
        files |= {"--validation-images": scenes / "images", "--validation-annotations": tmp_path / "val.json"}
        unlisted = {key: value for key, value in content.items() if key != "categories"}
        for given, folder, message in (
            (unlisted, scenes / "panoptic", 'needs a list "categories"'),
            (content | {"annotations": []}, scenes / "panoptic", "the validation data set has no images"),
            (content, tmp_path / "nowhere", "nowhere: no such folder"),
        ):
            (tmp_path / "val.json").write_text(json.dumps(given))
            files["--validation-panoptic"] = folder
            arguments = [str(part) for pair in files.items() for part in pair]
            assert main(["train", "tiny", *settings, "--workers", "0", *arguments]) == 2
            assert message in capsys.readouterr().err and not (tmp_path / "run" / "log.jsonl").exists()

    def test_annotations_of_another_size_do_not_end_an_evaluation(self, tmp_path):
        write_coco(tmp_path, 2, (64, 96))
        image = tmp_path / "images/000002.jpg"
        cv2.imwrite(str(image), cv2.imread(str(image))[:50])
        data = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        Trainer(small(), data, tmp_path / "run", ALONE, validation=data).run()
        (problem,) = json.loads((tmp_path / "run/evaluation/scores.json").read_text())["problems"]
        assert problem == "image 2: the ground truth is 96x64 pixels, the prediction 96x50"

    def test_problems_of_the_validation_data_are_shown(self, data, tmp_path, capsys):
        write_coco(tmp_path, 2, (64, 96))
        (tmp_path / "panoptic/000002.png").write_bytes(b"")
        validation = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        Trainer(small(), data, tmp_path / "run", ALONE, validation=validation).run()
        assert "skipped: " in capsys.readouterr().out
        (row,) = [row for row in read_log(tmp_path / "run/log.jsonl") if row["kind"] == "problem"]
        assert "000002.png: not a PNG" in row["message"]


def test_cityscapes_tree_trains_predicts_and_is_scored(tmp_path, capsys):
    """Crops of random scale, crowds, ground truth made on the way; a damaged label file of the validation split is
    left out.
    """
    write_cityscapes(tmp_path, 2, (64, 128))
    write_cityscapes(tmp_path, 3, (64, 128), split="val", seed=1)
    next((tmp_path / "gtFine/val").rglob("*.png")).write_bytes(b"")
    settings = [f"{k}={v}" for k, v in SMALL_RUN.items() if k not in ("num_things", "num_stuff", "categories")]
    settings.append("train_crop=[64, 64]")
    data = ["--cityscapes", str(tmp_path), "--workers", "0"]
    assert main(["train", "spatialflow_r50_cityscapes", *settings, *data, "--output", str(tmp_path / "run")]) == 0
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert len(scores["problems"]) == 1 and scores["All"]["n"] > 3
    assert len(json.loads((tmp_path / "run/evaluation/panoptic.json").read_text())["annotations"]) == 2
    assert len(Cityscapes(tmp_path, "val", load_categories("cityscapes", 8, 11))) == 3
    # The weights that are left, through the other commands: the same scores, and a picture for every image.
    images, output = str(tmp_path / "leftImg8bit" / "val"), str(tmp_path / "out")
    weights = ["--config", "spatialflow_r50_cityscapes", "--checkpoint", str(tmp_path / "run/model.safetensors")]
    assert main(["predict", images, *weights, "--output", output, "--no-overlay", "--set", *settings]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path), output, "--output", str(tmp_path / "numbers.json")]) == 1
    assert capsys.readouterr().err.count("has no ground truth that can be read") == 1
    assert json.loads((tmp_path / "numbers.json").read_text())["All"] == scores["All"]
    truth = str(tmp_path / "out" / "cityscapes_val.json")
    assert main(["visualize", images, "--ground-truth", truth, "--prediction", output, "--output", output]) == 1
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2


class TestCommand:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--annotations", "x.json"], "need each other"),
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
        assert ("no --backbone or --checkpoint" in capsys.readouterr().err) == warned

    def test_what_will_not_happen_is_said_before_the_first_step(self, scenes, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        arguments = ["train", "tiny", *(f"{k}={v}" for k, v in SMALL_RUN.items()), "--workers", "0"]
        for kind in ("", "validation-"):
            arguments += [f"--{kind}images", str(scenes / "images"), f"--{kind}annotations", scenes / "panoptic.json"]
        assert main([*map(str, arguments), "--output", str(tmp_path)]) == 0
        said = capsys.readouterr().err
        assert "learning_rate_epochs [16, 19]: the run ends with epoch 1" in said
        assert "warmup_iterations 3: the run ends after 2 steps" in said
        assert "pycocotools is missing, so that evaluations have no average precision" in said


class TestProcesses:
    @pytest.mark.parametrize("norm_trains, epochs", [(False, 4), (True, 1)])
    def test_two_processes_equal_one(self, tmp_path, norm_trains, epochs):
        """Half the batch each over Gloo: losses, weights and BatchNorm's statistics of one process with the whole.

        With BatchNorm the first steps alone: from the seventh on, another rounding in one process shows as much.
        """
        write_coco(tmp_path, 8, (64, 96))
        settings = (
            f"epochs={epochs}",
            "images_per_step=2",
            "learning_rate=0.002",
            f"backbone_norm_trains={norm_trains}",
        )
        whole = command(tmp_path, tmp_path / "one", *settings)
        subprocess.run(whole, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=240)
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29617",
            "-m",
            "spatialflow.cli",
        ]
        pair = command(tmp_path, tmp_path / "two", *settings)
        subprocess.run(launcher + pair[3:], env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=240)
        one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
        assert len(one) == len(two) == 4 * epochs
        for a, b in zip(one, two):
            for name in ("total", "cls", "box", "thing", "stuff"):
                assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
        one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")

    def test_killed_and_resumed(self, tmp_path):
        """SIGKILL at a random moment, then the same command: bit-equal weights. The script kill_and_resume.py
        repeats it.
        """
        write_coco(tmp_path / "data", 4, (64, 96))
        settings = ("epochs=4", "checkpoint_every_steps=1")
        subprocess.run(
            command(tmp_path / "data", tmp_path / "whole", *settings),
            env=environment(),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        assert kill_and_resume(
            tmp_path / "data", digest(tmp_path / "whole"), tmp_path / "killed", settings, random.Random(1), kills=1
        )


def _normalize_a_part(rank, folder):
    """One of two processes: its part of the batch through synchronized BatchNorm, forward and backward."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batch, norm = torch.load(folder / "batch.pt"), torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double()
    torch.nn.init.normal_(norm[0].weight, generator=torch.Generator().manual_seed(1))
    synchronize_norms(norm)
    part = batch[:1] if rank == 0 else batch[1:, ..., :4, :]
    part.requires_grad_()
    out = norm(part)
    out.sin().sum().backward()
    results = (out.detach(), part.grad, norm[0].weight.grad, norm[0].running_mean, norm[0].running_var)
    torch.save(results, folder / f"{rank}.pt")
    leave()
    end(
        ProcessGroup(rank, 2, torch.device("cpu"))
    )  # as training ends: the interpreter's own ending can abort with Gloo


def test_synchronized_norm_equals_one_over_the_whole_batch(tmp_path):
    """Float64, processes with batches of different shape: outputs, all gradients, running statistics."""
    with torch.device("cpu"):  # as in the processes
        batch = torch.randn(3, 3, 6, 5, dtype=torch.float64) * 2 + 100
        norm = torch.nn.BatchNorm2d(3).double()
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(_normalize_a_part, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    values = torch.cat([batch[:1].movedim(1, 0).flatten(1), batch[1:, ..., :4, :].movedim(1, 0).flatten(1)], dim=1)
    values = values.t()[..., None, None].requires_grad_()  # (pixels of both, 3, 1, 1)
    out = norm(values)
    out.sin().sum().backward()

    def joined(index):
        return torch.cat([part[index].movedim(1, 0).flatten(1) for part in parts], dim=1).t()[..., None, None]

    torch.testing.assert_close(joined(0), out.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joined(1), values.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts[0][2] + parts[1][2], norm.weight.grad, rtol=1e-9, atol=1e-9)
    for part in parts:
        torch.testing.assert_close(part[3], norm.running_mean)
        torch.testing.assert_close(part[4], norm.running_var)
