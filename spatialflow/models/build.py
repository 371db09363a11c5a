# SPDX-License-Identifier: Apache-2.0
"""Construction of configurations from files, and of networks from configurations."""

import os
from pathlib import Path
from typing import Any

from spatialflow.config import (
    Config,
    ConfigError,
    ModelConfig,
    make_config,
    place_overrides,
    read_yaml,
    shown,
)
from spatialflow.models.fpn import FPN
from spatialflow.models.heads import BoxHead, StuffHead, ThingHead
from spatialflow.models.resnet import ResNet
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.subnets import Subnets

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"


def list_configs() -> list[str]:
    """List the names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def load_config(config: str | Path | Config, **overrides: Any) -> Config:
    """Read a configuration.

    Args:
        config: name of a configuration of the package, path of a YAML file, or a Config.
        overrides: fields to replace, as in `build_model`.

    Returns:
        The checked, frozen Config.

    Raises:
        ConfigError: unknown name, unreadable file, or a setting that breaks a rule.
    """
    if isinstance(config, Config):
        settings = {s: dict(vars(getattr(config, s))) for s in ("model", "test", "data", "training")}
        name = config.name
    else:
        settings = _read(config, ())
        name = Path(config).stem if str(config).endswith((".yaml", ".yml")) else str(config)
    for section, values in place_overrides(overrides).items():
        settings.setdefault(section, {}).update(values)
    return make_config(name, settings)


def _read(config: str | Path, chain: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """Read the settings of one file, on top of those of its `base`."""
    path = _locate(config, chain[-1].parent if chain else None)
    if path in chain:
        raise ConfigError(f"{path}: base: leads back to itself ({' -> '.join(p.name for p in (*chain, path))})")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections (model, test, data, training), got {type(content).__name__}")
    base = content.pop("base", None)
    settings = {} if base is None else _read(base, (*chain, path))
    for section, values in content.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: section {shown(section)} must hold 'field: value' lines, got {shown(values)}")
        settings.setdefault(section, {}).update(values)
    return settings


def _locate(config: str | Path, folder: Path | None) -> Path:
    """Find the file of a configuration, first relative to `folder`."""
    text = str(config)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        candidates = [path] if folder is None else [folder / path, path]
        for candidate in candidates:
            if os.path.isfile(candidate):
                return candidate.resolve()
        raise ConfigError(f"config: no such file: {text:.200}")
    path = CONFIG_FOLDER / f"{text}.yaml"
    if "/" in text or not os.path.isfile(path):
        names = [name for name in list_configs() if not name.startswith("ablation_")]
        raise ConfigError(
            f"config: must be a path ending in .yaml or one of {', '.join(names)}, ablation_...; got {shown(text)}"
        )
    return path


def build_model(config_name_or_path: str | Path | Config, **overrides: Any) -> SpatialFlow:
    """Build a network with random weights, in training mode.

    Args:
        config_name_or_path: a configuration of the package ("spatialflow_r50_coco"), path of a YAML file, or a Config.
        overrides: fields to replace, for instance `backbone_base_channels=16, fpn_channels=32, num_things=20`. A
            section may be named: `model={"fpn_channels": 32}` or `**{"model.fpn_channels": 32}`.

    Returns:
        SpatialFlow; `model.config` is the configuration it was built from.

    Raises:
        ConfigError: no such configuration, or a value that breaks a rule (field, rule and value are named).
    """
    config = load_config(config_name_or_path, **overrides)
    m = config.model
    backbone = ResNet(
        depth=m.backbone_depth,
        base_channels=m.backbone_base_channels,
        groups=m.backbone_groups,
        group_width=m.backbone_group_width,
        deformable_stages=m.backbone_deformable_stages,
        frozen_stages=m.backbone_frozen_stages,
        norm_trains=m.backbone_norm_trains,
    )
    fpn = FPN(backbone.out_channels, channels=m.fpn_channels)
    segmentation = tuple(name for name, present in (("stuff", m.stuff_head), ("thing", m.thing_head)) if present)
    subnets = Subnets(
        in_channels=m.fpn_channels,
        channels=m.head_channels,
        detection_stages=m.detection_stages,
        stuff_stages=m.stuff_stages,
        thing_stages=m.thing_stages,
        flow_source=m.flow_source,
        flow_to_detection=m.flow_to_detection,
        flow_to_stuff=m.flow_to_stuff,
        flow_to_thing=m.flow_to_thing,
        flow_stuff_to_thing=m.flow_stuff_to_thing,
        segmentation=segmentation,
        deformable={
            "cls": m.deformable_cls_stages,
            "reg": m.deformable_reg_stages,
            "stuff": m.deformable_stuff_stages,
            "thing": m.deformable_thing_stages,
        },
        init_std=m.subnet_init_std,
    )
    box_head = BoxHead(m.head_channels, num_classes=m.num_things, num_anchors=m.num_anchors)
    thing_head = stuff_head = None
    if m.thing_head:
        thing_head = ThingHead(
            _task_channels(m, m.thing_stages),
            channels=m.thing_head_channels,
            num_classes=m.num_things,
            num_convs=m.thing_head_convs,
        )
    if m.stuff_head:
        stuff_head = StuffHead(
            _task_channels(m, m.stuff_stages),
            channels=m.stuff_head_channels,
            num_classes=m.num_stuff,
            groups=m.norm_groups,
        )
    return SpatialFlow(backbone, fpn, subnets, box_head, thing_head, stuff_head, config)


def _task_channels(model: ModelConfig, stages: int) -> int:
    """Return the channels of a task's features."""
    return model.head_channels if stages > 0 else model.fpn_channels
