# SPDX-License-Identifier: Apache-2.0
"""Construction of a network from a configuration."""

from pathlib import Path
from typing import Any

from spatialflow.config import Config, ModelConfig, load_config
from spatialflow.models.fpn import FPN
from spatialflow.models.heads import BoxHead, StuffHead, ThingHead
from spatialflow.models.resnet import ResNet
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.models.subnets import Subnets


def build_model(config_name_or_path: str | Path | Config, **overrides: Any) -> SpatialFlow:
    """Builds a network with random weights, in training mode.

    Args:
        config_name_or_path: a configuration of the package ("spatialflow_r50_coco"), path of a YAML file, or a Config.
        overrides: fields to replace, for instance `backbone_base_channels=16, fpn_channels=32, num_things=20`. A
        section may be
            named: `model={"fpn_channels": 32}` or `**{"model.fpn_channels": 32}`.

    Returns:
        SpatialFlow; `model.config` is the configuration it was built from.

    Raises:
        ConfigError: no such configuration, or a value that breaks a rule (field, rule and value are named).
    """
    config = load_config(config_name_or_path, **overrides)
    m = config.model
    backbone = ResNet(
        m.backbone_depth,
        m.backbone_base_channels,
        m.backbone_groups,
        m.backbone_group_width,
        m.backbone_deformable_stages,
        m.backbone_frozen_stages,
        m.backbone_norm_trains,
    )
    fpn = FPN(backbone.out_channels, m.fpn_channels)
    segmentation = tuple(name for name, present in (("stuff", m.stuff_head), ("thing", m.thing_head)) if present)
    subnets = Subnets(
        m.fpn_channels,
        m.head_channels,
        m.detection_stages,
        m.stuff_stages,
        m.thing_stages,
        m.flow_source,
        m.flow_to_detection,
        m.flow_to_stuff,
        m.flow_to_thing,
        m.flow_stuff_to_thing,
        segmentation,
        {
            "cls": m.deformable_cls_stages,
            "reg": m.deformable_reg_stages,
            "stuff": m.deformable_stuff_stages,
            "thing": m.deformable_thing_stages,
        },
        m.subnet_init_std,
    )
    box_head = BoxHead(m.head_channels, m.num_things, m.num_anchors)
    thing_head = stuff_head = None
    if m.thing_head:
        thing_head = ThingHead(
            _task_channels(m, m.thing_stages), m.thing_head_channels, m.num_things, m.thing_head_convs
        )
    if m.stuff_head:
        stuff_head = StuffHead(_task_channels(m, m.stuff_stages), m.stuff_head_channels, m.num_stuff, m.norm_groups)
    return SpatialFlow(backbone, fpn, subnets, box_head, thing_head, stuff_head, config)


def _task_channels(model: ModelConfig, stages: int) -> int:
    return model.head_channels if stages > 0 else model.fpn_channels
