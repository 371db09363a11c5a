# SPDX-License-Identifier: Apache-2.0
"""Overrides that make the network of any configuration small enough for tests."""

from torch import nn

from spatialflow.models.build import build_model


def channels(backbone: int, rest: int) -> dict:
    """Return overrides for the base channels of the backbone, and for the channels of the rest of the network."""
    return dict(
        backbone_base_channels=backbone,
        fpn_channels=rest,
        head_channels=rest,
        thing_head_channels=rest,
        stuff_head_channels=rest,
    )


SMALL = channels(4, 8) | dict(norm_groups=4, num_things=3, num_stuff=4, categories=None)

SYNTHETIC = SMALL | dict(
    num_things=6,
    num_stuff=6,
    categories="synthetic",
    test_short_edges=[64],
    test_long_edge=96,
    candidates_per_level=50,
    stuff_area_threshold=20,
    epochs=1,
)
"""Overrides of `tiny` for one epoch on synthetic scenes."""

VARIANTS = [
    ("tiny", {}),
    ("tiny_dcn", {}),
    ("retinanet_r50_coco", {}),
    ("retinanet_r50_flows_coco", {}),
    ("ablation_naive_coco", {}),
    ("ablation_flows_coco", {}),
    ("ablation_flow_source_cls_coco", {}),
    ("ablation_flow_cls_stuff_coco", {}),
    ("tiny", dict(thing_stages=3, stuff_stages=2)),
    ("tiny", dict(backbone_groups=4, backbone_group_width=4)),
    ("tiny", dict(deformable_reg_stages=[1], deformable_stuff_stages=[0], flow_to_stuff=False)),
    ("tiny", dict(head_channels=24, flow_to_thing=False)),
    ("ablation_naive_coco", dict(flow_stuff_to_thing=True, stuff_stages=2, thing_stages=2)),
    ("tiny", dict(stuff_head=False, stuff_stages=0, flow_to_stuff=False, flow_stuff_to_thing=False)),
]
"""Configurations and overrides that cover every kind of network."""


def random_model(name, **overrides):
    """Build a narrow model with random parameters and statistics, so that each of them affects the outputs."""
    model = build_model(name, **(SMALL | channels(8, 16) | overrides)).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.dim() == 4:
            nn.init.normal_(value, std=(1.5 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            nn.init.normal_(value, std=0.1)
    return model
