# SPDX-License-Identifier: Apache-2.0
"""Files of weights that hold configuration and categories: `load_model`, contradictions, older files, `convert`."""

import json
import shutil

import pytest
import torch
from helpers.command_line import train_arguments
from helpers.scenes import write_coco
from helpers.small_models import SMALL, SYNTHETIC
from safetensors import safe_open
from safetensors.torch import save

import spatialflow
from spatialflow.cli.main import main
from spatialflow.data.categories import CategoryError, load_categories
from spatialflow.data.synthetic import DRAWN_SCENES
from spatialflow.engine.checkpoint_reader import read_weights
from spatialflow.engine.description import CATEGORIES, CONFIG, describe
from spatialflow.engine.model_files import convert, packaged_weights
from spatialflow.panoptic import read_panoptic_json

ROWS = [
    {"id": 90, "name": "bus", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 33, "name": "tram", "isthing": 1, "color": [1, 2, 3]},
    *({"id": i, "name": f"ground {i}", "isthing": 0} for i in (5, 200, 201)),
]


@pytest.fixture
def table(tmp_path):
    """A category list in a file; its classes fit `SMALL` with "other"."""
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def network(table):
    return spatialflow.build_model("tiny", **(SMALL | {"categories": str(table), "score_threshold": 0.125})).eval()


def without_description(network, path):
    """Write the tensors of a network alone, as earlier versions did."""
    path.write_bytes(save(network.state_dict(), metadata={"format": "pt"}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_file_is_all_that_is_needed(network, table, tmp_path, suffix):
    path = spatialflow.save_checkpoint(network, tmp_path / f"weights{suffix}")
    table.unlink()
    loaded = spatialflow.load_model(path)
    assert loaded.config == network.config and not loaded.training
    assert [(row.id, row.name) for row in loaded.categories.things] == [(90, "bus"), (7, "dog"), (33, "tram")]
    assert loaded.categories.things[2].color == (1, 2, 3) and loaded.categories.other_index == 3
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert spatialflow.Predictor(loaded).categories is loaded.categories
    assert spatialflow.optimize_for_inference(loaded).categories.same_classes(loaded.categories)
    spatialflow.load_checkpoint(spatialflow.build_model("tiny", **SMALL), path)  # the tensors alone


def test_the_numbering_of_coco_survives(tmp_path):
    """COCO has "other" among its stuff classes, not after them."""
    model = spatialflow.build_model("tiny", **(SMALL | {"num_things": 80, "num_stuff": 54, "categories": "coco"}))
    loaded = spatialflow.load_model(spatialflow.save_checkpoint(model, tmp_path / "weights.safetensors"))
    expected = load_categories("coco", 80, 54)
    assert loaded.categories.same_classes(expected) and loaded.categories.other_index == expected.other_index == 36
    assert (loaded.categories.stuff_ids == expected.stuff_ids).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose YAML file, category list and data are gone; the photographs are kept."""
    folder = tmp_path_factory.mktemp("run")
    scenes = write_coco(folder / "scenes", 4, (64, 96))
    rows = json.loads((scenes / "panoptic.json").read_text())["categories"]
    (folder / "classes.json").write_text(json.dumps(rows[::-1]))
    fields = SYNTHETIC | {"num_stuff": 7, "categories": str(folder / "classes.json"), "backbone_norm_trains": True}
    lines = [f"{name}: {json.dumps(value)}" for name, value in (fields | {"backbone_frozen_stages": -1}).items()]
    settings = [line.replace(": ", "=", 1) for line in lines]
    (folder / "mine.yaml").write_text("base: tiny\n")
    arguments = train_arguments(scenes, folder / "run", *settings)
    assert main(["train", str(folder / "mine.yaml"), *arguments[2:]]) == 0
    (folder / "classes.json").unlink()
    (folder / "mine.yaml").unlink()
    shutil.copytree(scenes / "images", folder / "photographs")
    shutil.rmtree(scenes)
    return folder


@pytest.mark.parametrize("file", ["", "model.safetensors", "checkpoint.pt"])
def test_a_run_knows_itself(run, tmp_path, file):
    source, output = run / "run" / file, tmp_path / "out"
    loaded = spatialflow.load_model(source)
    assert [row.id for row in loaded.categories.things] == [6, 5, 4, 3, 2, 1]
    assert loaded.trained_on == DRAWN_SCENES
    arguments = [str(run / "photographs"), "--output", str(output), "instance_score_threshold=0"]
    assert main(["predict", "--model", str(source), *arguments]) == 0
    content = read_panoptic_json(output / "panoptic.json")
    assert [row["name"] for row in content["categories"]] == [row.name for row in loaded.categories.rows]
    result = spatialflow.Predictor(loaded, instance_score_threshold=0)(run / "photographs" / "000001.jpg")
    assert [segment["category_id"] for segment in content["annotations"][0]["segments_info"]] == [
        segment["category_id"] for segment in result.segments
    ]


def test_a_run_without_its_better_file(run, tmp_path):
    """`checkpoint.pt` serves where `model.safetensors` was not written yet; a folder without both is named."""
    (tmp_path / "checkpoint.pt").write_bytes((run / "run" / "checkpoint.pt").read_bytes())
    assert spatialflow.load_model(tmp_path).config.name == "mine"
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(spatialflow.CheckpointError, match="holds neither model.safetensors nor checkpoint.pt"):
        spatialflow.load_model(tmp_path)


def test_packaged_weights_have_a_name(tmp_path, monkeypatch, caplog):
    demo = spatialflow.load_model("demo")
    assert demo.config.name == "demo" and demo.trained_on == DRAWN_SCENES and len(demo.categories.rows) == 12
    assert packaged_weights("tiny") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # as `make demo` leaves it; the suggestion names "demo" once
    with pytest.raises(spatialflow.CheckpointError, match=r"packaged weights \(demo\); did you mean demo\?$"):
        spatialflow.load_model("dmo")
    spatialflow.save_checkpoint(demo, "mine.safetensors")
    with pytest.raises(spatialflow.CheckpointError, match=r"did you mean mine.safetensors\?$"):
        spatialflow.load_model("mien.safetensors")
    assert spatialflow.load_model("demo").config.name == "demo"  # the folder holds no weights
    (tmp_path / "mine.safetensors").rename("demo/model.safetensors")
    with caplog.at_level("INFO"):
        spatialflow.load_model("demo")
    assert "demo: takes demo/model.safetensors, not the packaged weights of that name" in caplog.text


class TestFilesWithoutDescription:
    def test_they_need_a_configuration(self, network, tmp_path, caplog):
        path = without_description(network, tmp_path / "old.safetensors")
        with pytest.raises(spatialflow.CheckpointError, match=r"holds no configuration; .*`spatialflow convert .*old"):
            spatialflow.load_model(path)
        with caplog.at_level("INFO"):
            loaded = spatialflow.load_model(path, config=network.config)
        assert "old.safetensors: holds no configuration; `spatialflow convert" in caplog.text
        assert loaded.categories.same_classes(load_categories(network.config.data.categories, 3, 4))
        assert spatialflow.load_model(path, config=network.config, nms_threshold=0.5).config.test.nms_threshold == 0.5

    def test_convert_adds_it(self, network, table, tmp_path):
        """The configuration may be a file; tensors stay as they are, and further conversions keep everything."""
        path, new = without_description(network, tmp_path / "old.safetensors"), tmp_path / "new.safetensors"
        convert(path, new, config=network.config)
        table.unlink()
        assert spatialflow.load_model(new).categories.things[0].id == 90
        assert read_weights(new).state.keys() == read_weights(path).state.keys()
        convert(new, tmp_path / "half.pt", torch.float16)
        half = spatialflow.load_model(tmp_path / "half.pt")
        assert half.config == network.config and half.categories.things[0].id == 90

    def test_the_command(self, tmp_path, capsys):
        path = without_description(spatialflow.build_model("tiny_dcn"), tmp_path / "old.safetensors")
        arguments = [str(path), str(tmp_path / "new.safetensors")]
        assert main(["convert", *arguments, "--config", "tiny"]) == 2
        assert "does not fit the model" in capsys.readouterr().err and not (tmp_path / "new.safetensors").exists()
        assert main(["convert", *arguments, "--config", "tiny_dcn"]) == 0
        assert spatialflow.load_model(tmp_path / "new.safetensors").config.name == "tiny_dcn"

    def test_categories_that_cannot_be_read(self, network, table, tmp_path):
        path = without_description(network, tmp_path / "old.safetensors")
        table.unlink()
        with pytest.raises(CategoryError, match="classes.json cannot be read"):
            spatialflow.load_model(path, config=network.config)


class TestContradictions:
    @pytest.fixture
    def path(self, network, tmp_path):
        return spatialflow.save_checkpoint(network, tmp_path / "weights.safetensors")

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"num_things": 9}, "num_things: the weights of .*weights.safetensors have 3, and 9 was given"),
            ({"model": {"flow_source": "cls"}}, "flow_source: the weights of .* have 'reg', and 'cls' was given"),
            ({"image_mean": [1, 2, 3]}, r"image_mean: the weights of .*123.675.* and \(1.0, 2.0, 3.0\) was given"),
            ({"categories": None}, r"categories: the weights of .* have 6 classes \(90 bus, .* None with 7 classes"),
            ({"categories": "coco"}, r"categories: the weights of .* and 'coco' was given: coco: has 80 things"),
        ],
    )
    def test_they_are_refused(self, path, overrides, message):
        with pytest.raises(spatialflow.CheckpointError, match=message):
            spatialflow.load_model(path, **overrides)

    def test_other_fields_may_change(self, path, network):
        loaded = spatialflow.load_model(path, config=network.config, test_flip=True, size_divisor=64)
        assert loaded.config.test.test_flip and loaded.config.data.size_divisor == 64
        with pytest.raises(spatialflow.ConfigError, match="did you mean"):
            spatialflow.load_model(path, tst_flip=True)

    def test_a_configuration_with_other_classes(self, path, network, tmp_path, capsys):
        (tmp_path / "other.json").write_text(json.dumps([{**row, "id": row["id"] + 1} for row in ROWS]))
        config = spatialflow.load_config(network.config, categories=str(tmp_path / "other.json"))
        with pytest.raises(spatialflow.CheckpointError, match=r"categories: .*\(90 bus, .*\(91 bus, "):
            spatialflow.load_model(path, config=config)
        arguments = ["photo.jpg", "--output", str(tmp_path / "out"), "--model", str(path)]
        assert main(["predict", *arguments, "--config", "tiny"]) == 2
        assert "backbone_base_channels: the weights of" in capsys.readouterr().err

    def test_an_ensemble_of_other_classes(self, network, path, tmp_path):
        (tmp_path / "other.json").write_text(json.dumps([{**row, "id": row["id"] + 1} for row in ROWS]))
        other = spatialflow.build_model(network.config, categories=str(tmp_path / "other.json")).eval()
        with pytest.raises(ValueError, match=r"must agree in categories, got .*90 bus.* and .*91 bus"):
            spatialflow.Predictor([spatialflow.load_model(path), other])


class TestDamage:
    @pytest.mark.parametrize(
        "text, reason",
        [
            ("{", "spatialflow.config is not JSON"),
            ("[]", "must be a mapping, got list"),
            ('{"model": {"fpn_chanels": 3}}', "did you mean fpn_channels"),
            ('{"model": {"fpn_channels": 0}}', "fpn_channels: must be positive, got 0"),
            ("[" * 100000, "is not JSON"),
        ],
    )
    def test_a_description_that_breaks_a_rule(self, network, tmp_path, text, reason):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(save(network.state_dict(), metadata={CONFIG: text}))
        with pytest.raises(spatialflow.CheckpointError, match=f"weights.safetensors: its description .*{reason}"):
            spatialflow.load_model(path)

    def test_damaged_categories(self, network, tmp_path):
        path = tmp_path / "weights.safetensors"
        for text, reason in (('{"categories": 3}', "holds no list"), ('{"has_other": 1}', "holds no list")):
            path.write_bytes(save(network.state_dict(), metadata={"spatialflow.categories": text}))
            with pytest.raises(spatialflow.CheckpointError, match=reason):
                spatialflow.load_model(path, config=network.config)

    @pytest.mark.parametrize("change", ["less", "more", "kind", "other"])
    def test_categories_of_another_network(self, network, tmp_path, change):
        """They would name the wrong classes in silence, or fail at the first prediction."""
        description = describe(network).entries()
        table = json.loads(description[CATEGORIES])
        if change == "less":
            table["categories"].pop()
        elif change == "more":
            table["categories"].append({"id": 99, "isthing": 1})
        elif change == "kind":
            table["categories"][0]["isthing"] = 1 - table["categories"][0]["isthing"]
        else:
            table["has_other"] = not table["has_other"]
        path = tmp_path / "weights.safetensors"
        path.write_bytes(save(network.state_dict(), metadata=description | {CATEGORIES: json.dumps(table)}))
        with pytest.raises(spatialflow.CheckpointError, match="categories has .* network .* has num_things = "):
            spatialflow.load_model(path)

    def test_text_that_would_control_a_terminal(self, network, tmp_path):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(save(network.state_dict(), metadata={"spatialflow.trained_on": "\x1b[2J"}))
        with pytest.raises(spatialflow.CheckpointError, match="must be one line of at most 200 printable characters"):
            spatialflow.load_model(path, config=network.config)


def test_a_header_of_any_length_is_recognized(tmp_path):
    """The length of a safetensors header may begin with the byte of a pickle, 0x80."""
    path, firsts = tmp_path / "weights.safetensors", set()
    for length in range(0, 256, 8):
        path.write_bytes(save({"a": torch.ones(2)}, metadata={"spatialflow.x": "y" * length}))
        firsts.add(path.read_bytes()[0])
        assert read_weights(path).entries == {"spatialflow.x": "y" * length}
    assert 0x80 in firsts


def test_the_metadata_is_plain_text_for_other_programs(network, tmp_path):
    path = spatialflow.save_checkpoint(network, tmp_path / "weights.safetensors")
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata[CONFIG])["test"]["score_threshold"] == 0.125
    assert [row["id"] for row in json.loads(metadata["spatialflow.categories"])["categories"]] == [
        row["id"] for row in ROWS
    ]


def test_equal_networks_give_equal_files(network, tmp_path):
    """The library writes metadata in random order, which would make a repeated run look like another one."""
    files = [
        spatialflow.save_checkpoint(network, tmp_path / f"{number}.safetensors").read_bytes() for number in range(6)
    ]
    assert len(set(files)) == 1
