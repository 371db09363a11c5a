# SPDX-License-Identifier: Apache-2.0
"""Configurations of the package are valid; errors name the bad setting."""

import dataclasses

import pytest
import torch
from helpers.small_models import SMALL

from spatialflow.config import (
    SECTIONS,
    Config,
    ConfigError,
    describe,
    list_configs,
    load_config,
    parse_settings,
    place_overrides,
)
from spatialflow.models.build import build_model


@pytest.mark.parametrize("name", list_configs())
def test_every_config_builds_and_runs(name):
    """Each file passes the checks, and its network, made narrow, has the outputs of its heads."""
    model = build_model(name, **SMALL, backbone_groups=1).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 64, 96))
    assert [f.shape[-2:] for f in output.features] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert output.class_logits[0].shape == (1, 27, 8, 12) and output.box_deltas[0].shape == (1, 36, 8, 12)
    if model.config.model.stuff_head:
        assert output.stuff_logits.shape == (1, 4, 16, 24) and len(output.stuff_features) == 3
    else:
        assert output.stuff_logits is None and output.stuff_features is None and output.thing_features is None


def test_published_settings_are_there():
    """The documented configuration names exist."""
    expected = {
        "spatialflow_r50_coco",
        "spatialflow_r101_coco",
        "spatialflow_r101_dcn_coco",
        "spatialflow_x101_dcn_coco",
        "spatialflow_r50_cityscapes",
        "spatialflow_r101_cityscapes",
        "retinanet_r50_coco",
        "retinanet_r50_flows_coco",
    }
    assert expected <= set(list_configs())


def test_base_is_inherited_and_replaced_field_by_field():
    config = load_config("ablation_stuff_loss_05_coco")
    assert (
        config.training.stuff_loss_weight == 0.5
        and config.model.flow_source is None
        and config.test.test_short_edges == (600,)
    )
    assert config.training.learning_rate == 0.005 and config.model.num_stuff == 54


def test_field_names_are_unique_over_sections():
    """`build_model(name, field=value)` needs no section."""
    names = [f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


def test_overrides_in_every_spelling():
    for overrides in ({"fpn_channels": 64}, {"model.fpn_channels": 64}, {"model": {"fpn_channels": 64}}):
        assert load_config("spatialflow_r50_coco", **overrides).model.fpn_channels == 64
    config = load_config("tiny")
    assert load_config(config, num_things=7).model == dataclasses.replace(config.model, num_things=7)


def test_powers_of_ten_without_a_point_are_numbers():
    """1e-3 is a number, although YAML 1.1 parses it as a string."""
    assert load_config("tiny", **parse_settings(["learning_rate=1e-3"])).training.learning_rate == 0.001
    with pytest.raises(ConfigError, match="learning_rate: must be a number, got '1e'"):
        load_config("tiny", learning_rate="1e")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config("tiny").model.fpn_channels = 3


@pytest.mark.parametrize(
    "override, words",
    [
        (dict(fpn_chanels=64), "did you mean fpn_channels"),
        (dict(fpn_channels=0), "model.fpn_channels: must be positive, got 0"),
        (dict(fpn_channels="wide"), "model.fpn_channels: must be of type int, got 'wide'"),
        (dict(fpn_channels=True), "model.fpn_channels: must be of type int, got True"),
        (dict(norm_groups=7), "model.norm_groups: must divide stuff_head_channels (128), got 7"),
        (dict(stuff_stages=5), "model.stuff_stages: must lie in 0..detection_stages (4), got 5"),
        (dict(thing_stages=-1), "model.thing_stages: must lie in 0..4, got -1"),
        (dict(flow_source="thing"), "model.flow_source: must be 'reg', 'cls' or null, got 'thing'"),
        (dict(backbone_depth=34), "model.backbone_depth: must be 50 or 101, got 34"),
        (dict(deformable_thing_stages=[1]), "model.deformable_thing_stages: must be among the stages 0..0"),
        (dict(deformable_cls_stages=[0], head_channels=64), "model.head_channels: must equal fpn_channels (256)"),
        (dict(thing_head=False), "model.thing_stages: must be 0 without a thing head"),
        (dict(score_threshold=1.5), "test.score_threshold: must lie in 0..1, got 1.5"),
        (dict(score_threshold=float("nan")), "test.score_threshold: must be finite"),
        (dict(size_divisor=48), "data.size_divisor: must be a multiple of 32 up to 16777216, got 48"),
        (dict(size_divisor=2**25), "data.size_divisor: must be a multiple of 32 up to 16777216, got 33554432"),
        (dict(mixed_precision="fp8"), "training.mixed_precision: must be 'fp16', 'bf16' or null, got 'fp8'"),
        ({"data.fpn_channels": 3}, "no such field: 'data.fpn_channels'"),
        (dict(stuff_area_threshold=10**30), "test.stuff_area_threshold: must lie between -2 ** 63 and 2 ** 63"),
        ({"seed": 1 << 64}, "seed: must lie between -2 ** 63 and 2 ** 63, got 18446744073709551616"),
    ],
)
def test_bad_settings_name_field_rule_and_value(override, words):
    with pytest.raises(ConfigError) as error:
        load_config("spatialflow_r50_coco", **override)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("model: [1]", "section 'model' must hold"),
        ("modle: {fpn_channels: 3}", "unknown section 'modle'"),
        ("model: {fpn_chanels: 3}", "did you mean fpn_channels"),
        ("- a", "must hold sections"),
        ("model: {a: [", "is not YAML"),
        ("[" * 10_000, "is not YAML"),
        ("base: nowhere", "must be a path ending in .yaml or one of"),
        ("base: own.yaml", "refers back to itself"),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


@pytest.mark.parametrize(
    "setting, words",
    [
        ("epochs=" + "9" * 5000, "epochs: '9999.*' is not a YAML value"),
        ("epochs=!!int ''", "is not a YAML value"),
        ("epochs=2020-13-45", "is not a YAML value"),
        ("epochs=" + "[" * 3000, "is not a YAML value"),
        ("learning_rate=" + "9" * 400, "learning_rate: must be finite"),
        ("a" * 5000, "form FIELD=VALUE"),
    ],
)
def test_hostile_settings_end_in_a_sentence(setting, words):
    """Integers with too many digits for Python, invalid dates, and nesting deeper than the stack give a message."""
    with pytest.raises(ConfigError, match=words) as error:
        load_config("tiny", **parse_settings([setting]))
    assert len(str(error.value)) < 500


def test_aliases_that_unfold_to_gigabytes_end_in_a_sentence(tmp_path):
    """Nine nested lists of nine aliases each would expand to 400 million items."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    (tmp_path / "own.yaml").write_text("model:\n  " + "\n  ".join([*lines, "num_things: *a9"]))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "own.yaml")
    assert len(str(error.value)) < 1000


def test_file_with_base_and_missing_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: tiny\nmodel: {num_things: 5}\n")
    config = load_config(str(path))
    assert (config.name, config.model.num_things, config.model.fpn_channels) == ("mine", 5, 32)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="one of .*spatialflow_r50_coco"):
        load_config("spatialflow_r34_coco")


def test_place_overrides_separates_sections():
    placed = place_overrides({"epochs": 3, "model": {"fpn_channels": 8}, "num_things": 2})
    assert placed == {"training": {"epochs": 3}, "model": {"fpn_channels": 8, "num_things": 2}}


def test_defaults_are_the_papers_main_model():
    assert load_config("spatialflow_r50_coco") == Config()


def test_every_field_is_described():
    """The reference of the configuration is generated from this list."""
    rows = describe()
    assert {(row.section, row.field) for row in rows} == {
        (section, field.name) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)
    }
    assert all(len(row.help) > 10 and not row.help.endswith(".") for row in rows)
    by_field = {row.field: row for row in rows}
    assert by_field["backbone_depth"][2:5] == ("int", 50, "must be 50 or 101")
    assert by_field["size_divisor"].rule == "must be positive; must be a multiple of 32 up to 16777216"
    assert by_field["train_crop"].type == "tuple[int, ...] | None"


def test_configurations_in_folders_have_names_without_the_folder():
    assert "ablation_naive_coco" in list_configs()
    assert len(set(list_configs())) == len(list_configs())
