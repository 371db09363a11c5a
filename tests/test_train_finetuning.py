# SPDX-License-Identifier: Apache-2.0
"""Initial weights from a network with other classes: rows of equal names are taken, and the rest is named."""

import re

import pytest
import torch
from helpers.scenes import write_coco
from helpers.training import small

import spatialflow
from spatialflow.cli.main import main
from spatialflow.data.categories import Categories
from spatialflow.engine.checkpoints import CheckpointError, save_checkpoint
from spatialflow.engine.finetuning import CLASS_LAYERS, load_for_finetuning
from spatialflow.models.build import build_model


def table(*rows):
    return Categories([{"id": i, "name": name, "isthing": isthing} for i, name, isthing in rows], has_other=True)


OLD = table((1, "cat", 1), (2, "dog", 1), (3, "sky", 0), (4, "lake", 0))
NEW = table((10, "dog", 1), (20, "sky", 1), (30, "fish", 1), (40, "lake", 0))
"""The dog keeps its rows; the sky does not, as it was stuff; "other" and the lake keep theirs."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A network of `OLD`, its file, and a network of `NEW`."""
    path = tmp_path_factory.mktemp("weights") / "old.safetensors"
    old = build_model(small(num_things=2, num_stuff=3, categories=None))
    save_checkpoint(old, path)
    return old, path, build_model(small(num_things=3, num_stuff=2, categories=None))


def test_classes_of_the_same_name_keep_their_rows(networks):
    old, path, new = networks
    initial = {name: value.clone() for name, value in new.state_dict().items()}
    taken = load_for_finetuning(new, path, old=OLD, new=NEW)
    for kind in ("weight", "bias"):
        before, after = (
            {layer: state[f"{layer}.{kind}"] for layer in CLASS_LAYERS}
            for state in (old.state_dict(), new.state_dict())
        )
        start = {layer: initial[f"{layer}.{kind}"] for layer in CLASS_LAYERS}
        for anchor in range(9):
            assert torch.equal(after[CLASS_LAYERS[0]][3 * anchor], before[CLASS_LAYERS[0]][2 * anchor + 1])
            rest = slice(3 * anchor + 1, 3 * anchor + 3)
            assert torch.equal(after[CLASS_LAYERS[0]][rest], start[CLASS_LAYERS[0]][rest])
        assert torch.equal(after[CLASS_LAYERS[1]][0], before[CLASS_LAYERS[1]][1])
        assert torch.equal(after[CLASS_LAYERS[1]][1:], start[CLASS_LAYERS[1]][1:])
        assert torch.equal(after[CLASS_LAYERS[2]], before[CLASS_LAYERS[2]][1:])  # lake, other
    others = [name for name in old.state_dict() if not name.startswith(CLASS_LAYERS) and "num_batches" not in name]
    assert all(torch.equal(old.state_dict()[name], new.state_dict()[name]) for name in others)
    assert taken.kept_classes == ["dog", "lake"] and taken.random_layers == list(CLASS_LAYERS[:2])
    channels = new.config.model.head_channels
    assert taken.total - taken.taken == 2 * (9 * (9 * channels + 1) + new.thing_head.logits.in_channels + 1)
    assert taken.describe("old").endswith(
        " weights are taken; box_head.class_logits, thing_head.logits start from random weights for the classes other "
        "than dog, lake"
    )


def test_without_names_layers_of_another_shape_are_random(networks):
    _, path, new = networks
    taken = load_for_finetuning(new, path)
    assert taken.random_layers == list(CLASS_LAYERS) and taken.kept_classes == []
    assert taken.describe("old").endswith(f"; {', '.join(CLASS_LAYERS)} start from random weights")


def test_same_classes_are_taken_whole(networks):
    old, path, _ = networks
    network = build_model(old.config)
    taken = load_for_finetuning(network, path, old=OLD, new=OLD)
    assert taken.random_layers == [] and taken.taken == taken.total
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in old.state_dict().items())


def test_a_run_begins_with_the_network_of_another(tmp_path, caplog):
    """A run folder is enough: configuration and classes come from it."""
    data = write_coco(tmp_path / "data", 2, (64, 96))
    files = dict(images=data / "images", annotations=data / "panoptic.json", workers=0, progress=False, epochs=1)
    spatialflow.train(**files, output=tmp_path / "first", config="tiny", norm_groups=4, fpn_channels=16)
    text = (data / "panoptic.json").read_text()
    files["annotations"] = tmp_path / "renamed.json"
    files["annotations"].write_text(text.replace('"sky"', '"heaven"'))
    caplog.set_level("INFO", "spatialflow")
    second = spatialflow.train(
        **files, output=tmp_path / "second", model=tmp_path / "first", panoptic=data / "panoptic"
    )
    assert second.network.config.model.fpn_channels == 16
    assert "stuff_head.logits start from random weights for the classes other than person, car" in caplog.text
    assert "box_head" not in caplog.text


@pytest.mark.parametrize("file", ["", "model.safetensors", "checkpoint.pt"])
@pytest.mark.parametrize("option", ["--model", "--checkpoint"])
def test_the_command_takes_a_run_or_its_file(run, tmp_path, capsys, option, file):
    """Nothing else is needed: the fields of the network come from the file."""
    data, first = run
    files = ["--images", data / "images", "--annotations", data / "panoptic.json", "--output", tmp_path, option]
    assert main(["train", *map(str, files), str(first / file), "epochs=1", "--workers", "0"]) == 0
    taken = first / (file or "model.safetensors")
    assert re.search(rf"{taken}: ([\d,]+) of \1 weights are taken\n", capsys.readouterr().out)
    assert spatialflow.load_model(tmp_path).config.model.fpn_channels == 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A data set, and the folder of a run on it."""
    folder = tmp_path_factory.mktemp("run")
    data = write_coco(folder / "data", 2, (64, 96))
    files = dict(images=data / "images", annotations=data / "panoptic.json", workers=0, progress=False, epochs=1)
    spatialflow.train(**files, output=folder / "first", config="tiny", norm_groups=4, fpn_channels=16)
    return data, folder / "first"


def test_a_model_that_is_not_there_or_unknown_is_named(tmp_path):
    data = write_coco(tmp_path / "data", 2, (64, 96))
    files = dict(images=data / "images", annotations=data / "panoptic.json", output=tmp_path / "run")
    with pytest.raises(CheckpointError, match="absent: there is no such file"):
        spatialflow.train(**files, model=tmp_path / "absent")
    save_checkpoint(build_model(small()).state_dict(), tmp_path / "w.safetensors")  # without the configuration
    with pytest.raises(CheckpointError, match="w.safetensors: holds no configuration"):
        spatialflow.train(**files, model=tmp_path / "w.safetensors")
