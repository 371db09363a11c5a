# SPDX-License-Identifier: Apache-2.0
"""Exact resumption of training, and checkpoints that cannot be resumed."""

import random
import subprocess

import pytest
import torch
from helpers.scenes import scene_categories, write_coco
from helpers.training import SINGLE_PROCESS, small, steps_of
from kill_and_resume import command, digest, environment, kill_and_resume

from spatialflow.data.coco import CocoPanoptic
from spatialflow.engine import trainer as trainer_module
from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.log import read_log
from spatialflow.engine.trainer import Trainer, TrainingError
from spatialflow.models.build import build_model

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`


def test_resume_is_exact(data, tmp_path):
    """A run in two halves has the weights and the log of an uninterrupted run."""
    uninterrupted = Trainer(small(epochs=2), data, tmp_path / "whole", SINGLE_PROCESS).run()
    Trainer(small(epochs=1), data, tmp_path / "halves", SINGLE_PROCESS).run()
    resumed = Trainer(small(epochs=2), data, tmp_path / "halves", SINGLE_PROCESS)
    assert resumed.step == 2
    halves = resumed.run()
    assert all(torch.equal(value, halves.state_dict()[key]) for key, value in uninterrupted.state_dict().items())
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "halves")


@pytest.mark.parametrize("field, value", [("score_threshold", 0.1), ("max_detections", 7)])
def test_resume_only_with_the_same_proposals(data, tmp_path, field, value):
    """Of the test section, only the settings that determine training's proposals must be equal."""
    Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
    assert Trainer(small(stuff_area_threshold=77), data, tmp_path, SINGLE_PROCESS).step == 2
    with pytest.raises(TrainingError, match=f"{field} .* -> {value}"):
        Trainer(small(**{field: value}), data, tmp_path, SINGLE_PROCESS)


def test_resume_only_of_the_same_run(data, tmp_path, scenes):
    Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
    with pytest.raises(TrainingError, match="momentum 0.9 -> 0.5"):
        Trainer(small(momentum=0.5), data, tmp_path, SINGLE_PROCESS)
    assert Trainer(small(momentum=0.5), data, tmp_path, SINGLE_PROCESS, resume=False).step == 0
    reordered = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())
    reordered.names = reordered.names[::-1]
    with pytest.raises(TrainingError, match="other images"):
        Trainer(small(), reordered, tmp_path, SINGLE_PROCESS)
    damaged = ((b"", "is damaged"), (b"damaged", "is damaged"), ([1], "not a complete checkpoint of a training run"))
    for content, message in damaged:
        with open(tmp_path / "checkpoint.pt", "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(CheckpointError, match=f"checkpoint.pt: .*{message}"):
            Trainer(small(), data, tmp_path, SINGLE_PROCESS)


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
def test_resume_from_a_damaged_checkpoint_is_an_error(data, tmp_path, where, value):
    Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
    content = {"": torch.load(tmp_path / "checkpoint.pt")}
    holder = content
    for key in ("", *where)[:-1]:
        holder = holder[key]
    holder[("", *where)[-1]] = value
    torch.save(content[""], tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="checkpoint.pt: is not a complete checkpoint of a training run"):
        Trainer(small(), data, tmp_path, SINGLE_PROCESS)


def test_settings_of_the_optimizer_are_those_of_the_configuration(data, tmp_path):
    """Settings in the checkpoint's optimizer state are ignored."""
    Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
    content = torch.load(tmp_path / "checkpoint.pt")
    content["optimizer"]["param_groups"][0]["momentum"] = "a"
    torch.save(content, tmp_path / "checkpoint.pt")
    assert Trainer(small(), data, tmp_path, SINGLE_PROCESS).optimizer.param_groups[0]["momentum"] == 0.9


def test_interrupted_evaluation_is_repeated(data, tmp_path, monkeypatch):
    """If the last evaluation was interrupted, the next run evaluates; a further run does not."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "evaluate_network", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Trainer(small(), data, tmp_path, SINGLE_PROCESS, validation=data).run()
    for _ in range(2):
        network = Trainer(small(), data, tmp_path, SINGLE_PROCESS, validation=data).run()
        kinds = [row["kind"] for row in read_log(tmp_path / "log.jsonl")]
        assert kinds == ["step", "step", "evaluation"]
    loaded = load_checkpoint(build_model(small()), tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items() if "num_b" not in key)


def test_a_restarted_run_discards_the_old_checkpoint(data, tmp_path, monkeypatch):
    """If a restarted run is interrupted before its first checkpoint, the earlier run is not resumed."""
    Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
    restarted = Trainer(small(), data, tmp_path, SINGLE_PROCESS, resume=False)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(restarted, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restarted.run()
    assert Trainer(small(), data, tmp_path, SINGLE_PROCESS).step == 0


def test_processes_must_see_one_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ProcessGroup, "gather", lambda self, item: [item, 8])
    with pytest.raises(TrainingError, match=r"resume at different steps \[0, 8\]"):
        Trainer(small(), data, tmp_path, ProcessGroup(0, 2, torch.device("cpu")))


def test_log_of_a_killed_run_is_cut_back(data, tmp_path):
    Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 3, "total": 1}\n{"kind": "st')
    Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS).run()
    assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n[3]\n')  # not a log
    Trainer(small(epochs=3), data, tmp_path, SINGLE_PROCESS).run()
    assert [row["step"] for row in steps_of(tmp_path)] == [5, 6]


def test_killed_and_resumed(tmp_path):
    """A run that is killed at a random moment and resumed ends with equal weights; see kill_and_resume.py."""
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
