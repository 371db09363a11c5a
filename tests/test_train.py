# SPDX-License-Identifier: Apache-2.0
"""Training: learning rate schedule, files of a run, accumulation, mixed precision, finetuning."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from helpers.small_models import channels
from helpers.training import SINGLE_PROCESS, SMALL_RUN, small, steps_of

from spatialflow.cli.main import main
from spatialflow.config import load_config
from spatialflow.data.loader import make_loader
from spatialflow.engine import trainer as trainer_module
from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.log import read_log
from spatialflow.engine.trainer import InitialWeights, Trainer, TrainingError, learning_rate
from spatialflow.models.build import build_model
from spatialflow.models.training_step import TrainingStep

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`


def test_learning_rate():
    """The paper's schedule: warm-up over 500 steps from 1/1000 of the rate; a factor 1/10 after epochs 16 and 19."""
    training = load_config("spatialflow_r50_coco").training
    rates = [learning_rate(step, 1000, training) for step in (0, 250, 499, 500, 15999, 16000, 18999, 19000)]
    expected = [5e-6, 0.0025025, 0.00499001, 0.005, 0.005, 5e-4, 5e-4, 5e-5]
    assert rates == pytest.approx(expected, rel=1e-6)
    finetune = load_config(
        "tiny", finetune_class_layers_epochs=2, finetune_learning_rate=0.02, warmup_iterations=0
    ).training
    assert [learning_rate(step, 10, finetune) for step in (0, 19, 20)] == [0.02, 0.02, 0.005]


class TestRun:
    def test_writes_all_files(self, data, tmp_path):
        """Weights, checkpoint, log and curves exist; evaluation has PQ and AP; a second call has nothing to do."""
        config = small(epochs=2)
        trainer = Trainer(config, data, tmp_path, SINGLE_PROCESS, validation=data)
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
        assert Trainer(config, data, tmp_path, SINGLE_PROCESS).step == 4

    def test_learns(self, data, tmp_path):
        """In sixty steps on two scenes each loss falls, and no warning is logged."""
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
        Trainer(config, data, tmp_path, SINGLE_PROCESS).run()
        first, last = (
            {name: np.mean([row[name] for row in rows]) for name in ("cls", "box", "thing", "stuff")}
            for rows in (steps_of(tmp_path)[:3], steps_of(tmp_path)[-3:])
        )
        for name, share in (("cls", 0.95), ("box", 0.9), ("thing", 0.98), ("stuff", 0.6)):
            assert last[name] < share * first[name], (name, first, last)
        assert not any(row["kind"] == "warning" for row in read_log(tmp_path / "log.jsonl"))

    def test_evaluation_captures_no_graphs(self, data, tmp_path, monkeypatch):
        """CUDA graphs would need memory besides training's, and each evaluation would capture new ones."""
        created, make = [], trainer_module.Predictor
        monkeypatch.setattr(
            trainer_module, "Predictor", lambda *args, **kwargs: created.append(kwargs) or make(*args, **kwargs)
        )
        Trainer(small(), data, tmp_path, SINGLE_PROCESS, validation=data).run()
        assert [options["cuda_graph"] for options in created] == [False]

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_an_evaluation_that_fails_leaves_the_weights(self, data, tmp_path, monkeypatch, epochs):
        """The weights of the last step are saved, even if further epochs follow."""

        def failing(*_):
            raise RuntimeError("cannot be scored")

        monkeypatch.setattr(trainer_module, "evaluate_network", failing)
        trainer = Trainer(small(epochs=epochs), data, tmp_path, SINGLE_PROCESS, validation=data)
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

    def test_accumulation(self, data, tmp_path):
        """The loss of a step with two parts is the mean of the parts' losses."""
        config = small(images_per_step=4, accumulation_steps=2, warmup_iterations=0, gradient_clip_norm=None)
        trainer = Trainer(config, data, tmp_path, SINGLE_PROCESS)
        parts = [
            TrainingStep(build_like(trainer), config)(batch.images, batch.truth()).total().item()
            for batch in make_loader(data, config.data, trainer.schedule.batches(0, 1, 0, 1, 2))
        ]
        trainer.run()
        assert len(parts) == 2 and steps_of(tmp_path)[0]["total"] == pytest.approx(np.mean(parts), rel=1e-5)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_mixed_precision(self, data, tmp_path, precision):
        """Losses are close to those of float32; weights stay float32."""
        trainer = Trainer(small(mixed_precision=precision), data, tmp_path / precision, SINGLE_PROCESS)
        network = trainer.run()
        Trainer(small(), data, tmp_path / "full", SINGLE_PROCESS).run()
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in network.parameters())
        assert trainer.scaler.is_enabled() == (precision == "fp16")
        assert steps_of(tmp_path / precision)[0]["total"] == pytest.approx(
            steps_of(tmp_path / "full")[0]["total"], rel=0.03
        )

    def test_divergence_is_an_error(self, data, tmp_path):
        with pytest.raises(TrainingError, match="the loss is not finite"):
            Trainer(small(epochs=8, learning_rate=1e9, warmup_iterations=0), data, tmp_path, SINGLE_PROCESS).run()

    def test_batch_must_be_shared(self, data, tmp_path):
        with pytest.raises(TrainingError, match="multiple of processes"):
            Trainer(small(images_per_step=3), data, tmp_path, ProcessGroup(0, 2, torch.device("cpu")))


def build_like(trainer):
    network = build_model(trainer.config)
    network.load_state_dict(trainer.network.state_dict())
    return network.train()


class TestFinetuning:
    def test_class_layers_first_then_all(self, data, tmp_path):
        """Weights for other classes: all layers but the class layers are loaded; first only class layers train."""
        donor = build_model(small(num_things=9, num_stuff=4, categories=None))

        save_checkpoint(donor, tmp_path / "donor.safetensors")
        config = small(epochs=1, finetune_class_layers_epochs=1, backbone_norm_trains=False)
        first = Trainer(
            config,
            data,
            tmp_path / "run",
            SINGLE_PROCESS,
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
        second = Trainer(config, data, tmp_path / "run", SINGLE_PROCESS).run()
        moved = [
            name
            for name, p in second.named_parameters()
            if not torch.equal(p, donor.state_dict()[name]) or name in changed
        ]
        assert "backbone.layer4.0.conv1.weight" in moved and "subnets.reg.0.weight" in moved

    def test_layers_that_start_from_random_weights_are_named(self, scenes, tmp_path, capsys):
        """The file has the network's number of stuff classes, but another number of thing classes."""
        save_checkpoint(build_model(small(num_things=9, categories=None)), tmp_path / "donor.safetensors")
        files = {"--images": scenes / "images", "--annotations": scenes / "panoptic.json", "--output": tmp_path / "run"}
        files |= {"--checkpoint": tmp_path / "donor.safetensors", "--workers": 0}
        settings = [f"{name}={value}" for name, value in SMALL_RUN.items()]
        assert main(["train", "tiny", *settings, *(str(part) for pair in files.items() for part in pair)]) == 0
        message = capsys.readouterr().out
        layers = "box_head.class_logits, thing_head.logits"
        assert re.search(rf"donor.safetensors: [\d,]+ of [\d,]+ weights are taken; {layers} start from random", message)

    def test_other_layers_must_fit(self, data, tmp_path):

        save_checkpoint(build_model(small(fpn_channels=16)), tmp_path / "donor.pt")
        with pytest.raises(CheckpointError, match="fpn"):
            Trainer(
                small(),
                data,
                tmp_path / "run",
                SINGLE_PROCESS,
                initial_weights=InitialWeights(checkpoint=tmp_path / "donor.pt"),
            )
        with pytest.raises(CheckpointError, match="donor.pt: holds a whole network"):
            Trainer(
                small(),
                data,
                tmp_path / "run",
                SINGLE_PROCESS,
                initial_weights=InitialWeights(backbone=tmp_path / "donor.pt"),
            )
        save_checkpoint(build_model(small()).backbone, tmp_path / "backbone.pt")
        with pytest.raises(CheckpointError, match="backbone.pt: holds a backbone alone"):
            Trainer(
                small(),
                data,
                tmp_path / "run",
                SINGLE_PROCESS,
                initial_weights=InitialWeights(checkpoint=tmp_path / "backbone.pt"),
            )

    def test_frozen_stages_do_not_move(self, data, tmp_path):
        trainer = Trainer(small(backbone_frozen_stages=1, backbone_norm_trains=False), data, tmp_path, SINGLE_PROCESS)
        before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        after = trainer.run().state_dict()
        frozen = [name for name in before if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))]
        assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
        assert not torch.equal(before["backbone.layer2.0.conv1.weight"], after["backbone.layer2.0.conv1.weight"])
