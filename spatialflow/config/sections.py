# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration as frozen dataclasses, and the description of their fields."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spatialflow.config.rules import (
    ALL_POSITIVE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_NULL,
    RGB,
    Rule,
    check_rules,
    multiple_of,
    one_of,
    one_or_more_positive,
    require,
    setting,
    within,
)

MAX_SIZE_DIVISOR = 2**24
"""Largest `size_divisor` that the operator `preprocess_images` accepts."""

_SHARE = within(0, 1)
_FLOWS_FROM_SOURCE = ("flow_to_detection", "flow_to_stuff", "flow_to_thing")
_BACKBONE_STAGES = Rule("must be among the stages 2, 3 and 4", lambda stages: set(stages) <= {2, 3, 4})
_SHORT_EDGES = Rule(
    "must be one positive size or a range of two", lambda edges: len(edges) in (1, 2) and min(edges) > 0
)
_CROP = Rule("must be (height, width) or null", lambda crop: crop is None or (len(crop) == 2 and min(crop) > 0))
_FACTORS = Rule(
    "must be two positive factors in order", lambda factors: len(factors) == 2 and 0 < factors[0] <= factors[1]
)


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`: the architecture of the network. The defaults are SpatialFlow R50 on COCO.

    If `stuff_head` or `thing_head` is false, the sub-network of that task must have 0 stages, no deformable stages and
    no flows. The other fields of the absent head have no effect.
    """

    backbone_depth: int = setting(50, "number of layers of the ResNet", one_of(50, 101))
    backbone_base_channels: int = setting(
        64, "channels after the stem; the four stages end with 4, 8, 16 and 32 times as many", POSITIVE
    )
    backbone_groups: int = setting(1, "groups of the 3x3 convolutions: 1 = ResNet, 32 or 64 = ResNeXt", POSITIVE)
    backbone_group_width: int = setting(
        64, "channels per group in the first stage; used only if backbone_groups > 1", POSITIVE
    )
    backbone_deformable_stages: tuple[int, ...] = setting(
        (), "stages (2, 3, 4) whose 3x3 convolutions are deformable", _BACKBONE_STAGES
    )
    backbone_norm_trains: bool = setting(
        False, "BatchNorm uses and updates batch statistics; for training from scratch"
    )
    backbone_frozen_stages: int = setting(
        1, "the stem and this many stages keep their weights in training; 0 = only the stem, -1 = none", within(-1, 4)
    )
    fpn_channels: int = setting(256, "channels of P3 to P7", POSITIVE)
    head_channels: int = setting(256, "channels inside the four sub-networks", POSITIVE)
    thing_head_channels: int = setting(256, "channels inside the mask head", POSITIVE)
    stuff_head_channels: int = setting(128, "channels inside the stuff head", POSITIVE)
    norm_groups: int = setting(32, "groups of the stuff head's GroupNorm; divides stuff_head_channels", POSITIVE)
    num_things: int = setting(80, "thing classes: outputs of the box classifier and the mask head", POSITIVE)
    num_stuff: int = setting(
        54, 'stuff classes, including the class "other" for all things if the data set has it', POSITIVE
    )
    thing_head: bool = setting(True, "false: no segmentation of things")
    stuff_head: bool = setting(True, "false: no segmentation of stuff; without both heads the network is RetinaNet")
    thing_head_convs: int = setting(4, "3x3 convolutions in the mask head", NOT_NEGATIVE)
    roi_size: int = setting(14, "height and width of RoIAlign's output; masks have twice this size", POSITIVE)
    finest_scale: int = setting(
        56, "RoIs whose side (square root of the area, pixels) is below twice this value are pooled from P3", POSITIVE
    )
    subnet_init_std: float = setting(
        0.01, "standard deviation of the initial weights of the sub-networks' convolutions", POSITIVE
    )
    detection_stages: int = setting(4, "stages of the cls and of the reg sub-network", POSITIVE)
    stuff_stages: int = setting(
        4, "stages of the stuff sub-network, at most detection_stages; 0 = the stuff head reads the FPN"
    )
    thing_stages: int = setting(1, "stages of the thing sub-network; 0 = the thing head reads the FPN", within(0, 4))
    flow_source: str | None = setting(
        "reg",
        'sub-network whose features flow to the others, "reg" or "cls"; null if no flow_to_* field is true',
        one_of("reg", "cls", None),
    )
    flow_to_detection: bool = setting(
        True, "flow from the source to the other detection sub-network (reg to cls in the paper)"
    )
    flow_to_stuff: bool = setting(True, "flow from the source to the stuff sub-network")
    flow_to_thing: bool = setting(True, "flow from the source to the thing sub-network")
    flow_stuff_to_thing: bool = setting(
        True, "semantic flow from the stuff to the thing sub-network; independent of flow_source"
    )
    deformable_cls_stages: tuple[int, ...] = setting(
        (), "stages (from 0) of the cls sub-network with deformable convolutions (paper, equation 4)"
    )
    deformable_reg_stages: tuple[int, ...] = setting((), "as deformable_cls_stages, for the reg sub-network")
    deformable_stuff_stages: tuple[int, ...] = setting((), "as deformable_cls_stages, for the stuff sub-network")
    deformable_thing_stages: tuple[int, ...] = setting((), "as deformable_cls_stages, for the thing sub-network")
    anchor_octave_scale: float = setting(4.0, "size of the smallest anchor of a level, in strides", POSITIVE)
    anchor_scales_per_octave: int = setting(
        3, "anchor sizes per level; each is 2 ** (1 / anchor_scales_per_octave) times the one before", POSITIVE
    )
    anchor_ratios: tuple[float, ...] = setting(
        (0.5, 1.0, 2.0), "height / width of the anchors", one_or_more_positive("numbers")
    )

    @property
    def num_anchors(self) -> int:
        """Anchors per cell."""
        return self.anchor_scales_per_octave * len(self.anchor_ratios)

    def __post_init__(self) -> None:
        check_rules(self)
        groups_fit = self.stuff_head_channels % self.norm_groups == 0
        require(self, "norm_groups", groups_fit, f"must divide stuff_head_channels ({self.stuff_head_channels})")
        stages_fit = 0 <= self.stuff_stages <= self.detection_stages
        require(self, "stuff_stages", stages_fit, f"must lie in 0..detection_stages ({self.detection_stages})")
        self._check_deformable_stages()
        self._check_absent_heads()
        self._check_flow_source()
        some_stage_trains = self.backbone_frozen_stages < 4 or not self.backbone_norm_trains
        rule = "must be false where no stage trains (backbone_frozen_stages: 4)"
        require(self, "backbone_norm_trains", some_stage_trains, rule)

    def _check_deformable_stages(self) -> None:
        stages_by_subnet = {
            "cls": self.detection_stages,
            "reg": self.detection_stages,
            "stuff": self.stuff_stages,
            "thing": self.thing_stages,
        }
        is_deformable = False
        for subnet, count in stages_by_subnet.items():
            name = f"deformable_{subnet}_stages"
            stages = getattr(self, name)
            exist = all(0 <= stage < count for stage in stages)
            require(self, name, exist, f"must be among the stages 0..{count - 1} of the {subnet} sub-network")
            is_deformable |= bool(stages)
        channels_fit = not is_deformable or self.fpn_channels == self.head_channels
        rule = f"must equal fpn_channels ({self.fpn_channels}) where a sub-network is deformable"
        require(self, "head_channels", channels_fit, rule)

    def _check_absent_heads(self) -> None:
        for head in ("stuff", "thing"):
            if not getattr(self, f"{head}_head"):
                condition = f"without a {head} head ({head}_head: false)"
                stages = f"{head}_stages"
                require(self, stages, getattr(self, stages) == 0, f"must be 0 {condition}")
                for flow in (f"flow_to_{head}", "flow_stuff_to_thing"):
                    require(self, flow, not getattr(self, flow), f"must be false {condition}")

    def _check_flow_source(self) -> None:
        flows = [name for name in _FLOWS_FROM_SOURCE if getattr(self, name)]
        if flows:
            rule = f"must be 'reg' or 'cls', as {' and '.join(flows)} {'is' if len(flows) == 1 else 'are'} true"
        else:
            rule = "must be null, as none of flow_to_detection, flow_to_stuff and flow_to_thing is true"
        require(self, "flow_source", (self.flow_source is not None) == bool(flows), rule)


@dataclass(frozen=True)
class InferenceConfig:
    """Section `test`: input sizes, and postprocessing to detections, masks and the panoptic map (paper, IV-B2)."""

    candidates_per_level: int = setting(
        1000, "highest-scoring anchors of each level that are decoded; 0 = all", NOT_NEGATIVE
    )
    score_threshold: float = setting(0.05, "pairs of box and class with at most this score are discarded", _SHARE)
    nms_threshold: float = setting(0.4, "IoU above which class-wise NMS suppresses a box", _SHARE)
    max_detections: int = setting(100, "detections per image over all classes", POSITIVE)
    mask_threshold: float = setting(
        0.5, "least mask probability with which a pixel belongs to the instance", _SHARE, POSITIVE
    )
    instance_score_threshold: float = setting(
        0.37, "instances and boxes with a lower score do not enter the panoptic map", _SHARE
    )
    instance_overlap_threshold: float = setting(
        0.37, "an instance is discarded if a larger share of it is already covered", _SHARE
    )
    stuff_area_threshold: int = setting(4900, "stuff segments with fewer pixels are discarded", NOT_NEGATIVE)
    box_overlap_threshold: float = setting(
        0.5, "a box fills the void pixels inside it if at least this share of it is void", _SHARE
    )
    box_fill: bool = setting(True, "false: void pixels inside boxes stay void")
    test_short_edges: tuple[int, ...] = setting(
        (800,),
        "short edges of the network's input in pixels; several: test-time augmentation",
        one_or_more_positive("sizes"),
    )
    test_long_edge: int = setting(
        1333, "limit of the long edge at the largest short edge, in pixels; in proportion at smaller ones", POSITIVE
    )
    test_flip: bool = setting(False, "process mirrored images too: test-time augmentation")

    @property
    def test_edges(self) -> tuple[tuple[int, float], ...]:
        """(short edge, limit of the long edge) of every size at which the network processes an image."""
        largest = max(self.test_short_edges)
        return tuple((short, self.test_long_edge * short / largest) for short in self.test_short_edges)

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class DataConfig:
    """Section `data`: categories, and how images are prepared."""

    categories: str | None = setting(
        "coco", '"coco", "cityscapes", a JSON file with a COCO category list, or null: numbered classes'
    )
    image_mean: tuple[float, ...] = setting((123.675, 116.28, 103.53), "RGB values that are subtracted", RGB)
    image_std: tuple[float, ...] = setting(
        (58.395, 57.12, 57.375), "RGB values that pixels are divided by", RGB, ALL_POSITIVE
    )
    size_divisor: int = setting(
        32,
        "images are padded with zeros at the right and the bottom to a multiple of this",
        POSITIVE,
        multiple_of(32, MAX_SIZE_DIVISOR),
    )
    train_short_edges: tuple[int, ...] = setting(
        (800,), "short edge in training, or the two ends of its range in multi-scale training", _SHORT_EDGES
    )
    train_long_edge: int = setting(1333, "limit of the long edge in training", POSITIVE)
    train_crop: tuple[int, ...] | None = setting(None, "(height, width) of random crops; null = whole images", _CROP)
    train_scale_range: tuple[float, ...] = setting(
        (1.0, 1.0), "range of the random scale factor before the crop; [1, 1] without train_crop", _FACTORS
    )
    flip_probability: float = setting(0.5, "probability of a horizontal flip in training", _SHARE)

    def __post_init__(self) -> None:
        check_rules(self)
        has_effect = self.train_crop is not None or self.train_scale_range == (1.0, 1.0)
        require(self, "train_scale_range", has_effect, "must be [1, 1] without train_crop")


@dataclass(frozen=True)
class TrainingConfig:
    """Section `training`: targets, losses and the schedule of the optimizer (paper, IV-B1)."""

    epochs: int = setting(20, "passes over the training images", POSITIVE)
    images_per_step: int = setting(
        8, "images of one optimizer step, over all processes and accumulation steps", POSITIVE
    )
    accumulation_steps: int = setting(
        1,
        "parts of a step that run one after the other, each with its own loss normalizers; divides images_per_step",
        POSITIVE,
    )
    seed: int = setting(0, "seed of the initial weights, the order of the images and their augmentation", NOT_NEGATIVE)
    learning_rate: float = setting(0.005, "learning rate for images_per_step images", POSITIVE)
    learning_rate_epochs: tuple[int, ...] = setting(
        (16, 19),
        "the learning rate is divided by ten after each of these epochs",
        ALL_POSITIVE,
    )
    warmup_iterations: int = setting(500, "steps of the linear warm-up", NOT_NEGATIVE)
    warmup_factor: float = setting(0.001, "share of the learning rate at the first step", _SHARE)
    momentum: float = setting(0.9, "momentum of SGD", _SHARE)
    weight_decay: float = setting(0.0001, "weight decay of every trained parameter", NOT_NEGATIVE)
    gradient_clip_norm: float | None = setting(
        None, "largest norm of the gradients of all parameters together; null = no clipping", POSITIVE_OR_NULL
    )
    mixed_precision: str | None = setting(None, '"fp16", "bf16" or null', one_of("fp16", "bf16", None))
    positive_iou: float = setting(
        0.5, "anchors with at least this IoU are positive, and so are proposals of the thing head", _SHARE
    )
    negative_iou: float = setting(
        0.4, "anchors with a lower IoU are background; those up to positive_iou are ignored", _SHARE
    )
    focal_gamma: float = setting(2.0, "exponent of the focal loss", NOT_NEGATIVE)
    focal_alpha: float = setting(0.25, "weight of positives in the focal loss", _SHARE)
    stuff_loss_weight: float = setting(
        0.25, "lambda of equation 6; the released runs behave like 0.5 (docs/training.md)", NOT_NEGATIVE
    )
    proposal_nms_threshold: float = setting(
        0.4, "IoU threshold of the NMS of detections that become training proposals", _SHARE
    )
    finetune_class_layers_epochs: int = setting(
        0, "this many epochs at the start train only the layers whose shape depends on the classes", NOT_NEGATIVE
    )
    finetune_learning_rate: float = setting(
        0.005, "learning rate in the epochs of finetune_class_layers_epochs", POSITIVE
    )
    evaluate_every_epochs: int = setting(
        1, "epochs between evaluations, besides one after the first epoch; 0 = only after the last epoch", NOT_NEGATIVE
    )
    checkpoint_every_steps: int = setting(
        1000,
        "steps between checkpoints; one is also written after an epoch, if the previous one is over 5 s old",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        check_rules(self)
        in_order = self.negative_iou <= self.positive_iou
        require(self, "negative_iou", in_order, f"must not exceed positive_iou ({self.positive_iou})")
        divides = self.images_per_step % self.accumulation_steps == 0
        require(self, "accumulation_steps", divides, f"must divide images_per_step ({self.images_per_step})")


@dataclass(frozen=True)
class Config:
    """A complete configuration; `name` is the name of the configuration or the stem of the file that was read."""

    name: str = "spatialflow_r50_coco"
    model: ModelConfig = field(default_factory=ModelConfig)
    test: InferenceConfig = field(default_factory=InferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "test": InferenceConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}
"""Dataclass of each section."""


class FieldDescription(NamedTuple):
    """Documentation of one field."""

    section: str
    field: str
    type: str  # as in Python, for example "tuple[int, ...]"
    default: Any
    rule: str  # rules of this field alone, joined by "; "; may be empty
    help: str


def describe() -> list[FieldDescription]:
    """List all fields of all sections in order, for generated documentation."""
    return [
        FieldDescription(
            section,
            field.name,
            field.type if isinstance(field.type, str) else _type_text(field.type),
            field.default,
            "; ".join(rule.text for rule in field.metadata["rules"]),
            field.metadata["help"],
        )
        for section, dataclass in SECTIONS.items()
        for field in dataclasses.fields(dataclass)
    ]


def _type_text(kind: Any) -> str:
    return str(kind) if typing.get_origin(kind) is not None else kind.__name__
