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
