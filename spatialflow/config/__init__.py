# SPDX-License-Identifier: Apache-2.0
"""Every setting of a model, of its inference, its data and its training, as frozen dataclasses.

A configuration is four sections: `model` (what is built), `test` (what happens to the raw outputs), `data` (images in)
and `training`. Field names are unique over the sections, so that an override needs no section: `build_model(name,
fpn_channels=64)`.
"""

import dataclasses
import difflib
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80
_brief.maxlevel = 3


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, the rule and the value."""


@dataclass(frozen=True)
class ModelConfig:
    """What is built: widths, stages, flows. The defaults are SpatialFlow R50 on COCO.

    The numbers of a head that is absent are not read.
    """

    backbone_depth: int = 50  # 50 or 101 layers
    backbone_base_channels: int = 64  # channels after the stem; the four stages end with 4, 8, 16, 32 times as many
    backbone_groups: int = 1  # groups of the 3x3 convolutions: 1 = ResNet, 32 or 64 = ResNeXt
    backbone_group_width: int = 64  # channels per group in the first stage; read where backbone_groups > 1
    backbone_deformable_stages: tuple[int, ...] = ()  # stages (2..4) whose 3x3 convolutions are deformable
    backbone_norm_trains: bool = False  # BatchNorm uses and updates batch statistics: training from scratch
    backbone_frozen_stages: int = (
        1  # stem and this many stages keep their weights in training; 0 = stem alone, -1 = none
    )
    fpn_channels: int = 256  # channels of P3..P7
    head_channels: int = 256  # channels inside the four sub-networks
    thing_head_channels: int = 256  # channels inside the mask head
    stuff_head_channels: int = 128  # channels inside the stuff head
    norm_groups: int = 32  # groups of the stuff head's GroupNorm
    num_things: int = 80  # thing classes: box classifier and mask head
    num_stuff: int = 54  # stuff classes, the class "other" for all things included where the data set has one
    thing_head: bool = True  # False: no thing segmentation
    stuff_head: bool = True  # False: no stuff segmentation; both False: RetinaNet
    thing_head_convs: int = 4  # 3x3 convolutions in the mask head
    roi_size: int = 14  # RoIAlign output; masks have twice this size
    finest_scale: int = 56  # an RoI of less than twice this size (pixels) is taken from P3
    subnet_init_std: float = 0.01  # of the sub-networks' initial weights
    detection_stages: int = 4  # stages of the cls and of the reg sub-network
    stuff_stages: int = 4  # stages of the stuff sub-network; 0 = the stuff head sees the FPN
    thing_stages: int = 1  # stages of the thing sub-network; 0 = the thing head sees the FPN
    flow_source: str | None = (
        "reg"  # sub-network whose features flow to the others: "reg" or "cls"; null where none of flow_to_* is true
    )
    flow_to_detection: bool = True  # source -> the other detection sub-network (reg -> cls in the paper)
    flow_to_stuff: bool = True  # source -> stuff
    flow_to_thing: bool = True  # source -> thing
    flow_stuff_to_thing: bool = True  # the semantic flow, stuff -> thing; independent of flow_source
    deformable_cls_stages: tuple[int, ...] = ()  # stages (from 0) with deformable convolutions, paper equation 4
    deformable_reg_stages: tuple[int, ...] = ()  # likewise; offsets come from the feature itself
    deformable_stuff_stages: tuple[int, ...] = ()  # likewise
    deformable_thing_stages: tuple[int, ...] = ()  # likewise
    anchor_octave_scale: float = 4.0  # smallest anchor of a level, in strides
    anchor_scales_per_octave: int = 3  # anchor sizes per level, a factor 2 ** (1 / this) apart
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width

    @property
    def num_anchors(self) -> int:
        """Anchors per cell."""
        return self.anchor_scales_per_octave * len(self.anchor_ratios)

    def __post_init__(self):
        _check_positive(
            self,
            "backbone_base_channels",
            "backbone_groups",
            "backbone_group_width",
            "fpn_channels",
            "head_channels",
            "thing_head_channels",
            "stuff_head_channels",
            "norm_groups",
            "num_things",
            "num_stuff",
            "roi_size",
            "finest_scale",
            "subnet_init_std",
            "detection_stages",
            "anchor_octave_scale",
            "anchor_scales_per_octave",
        )
        _require(self.backbone_depth in (50, 101), "backbone_depth", "must be 50 or 101", self.backbone_depth)
        _require(
            -1 <= self.backbone_frozen_stages <= 4,
            "backbone_frozen_stages",
            "must lie in -1..4",
            self.backbone_frozen_stages,
        )
        _require(
            all(s in (2, 3, 4) for s in self.backbone_deformable_stages),
            "backbone_deformable_stages",
            "may name the stages 2, 3 and 4",
            self.backbone_deformable_stages,
        )
        _require(
            self.stuff_head_channels % self.norm_groups == 0,
            "norm_groups",
            f"must divide stuff_head_channels ({self.stuff_head_channels})",
            self.norm_groups,
        )
        _require(self.thing_head_convs >= 0, "thing_head_convs", "must not be negative", self.thing_head_convs)
        _require(
            0 <= self.stuff_stages <= self.detection_stages,
            "stuff_stages",
            f"must lie in 0..detection_stages ({self.detection_stages})",
            self.stuff_stages,
        )
        _require(0 <= self.thing_stages <= 4, "thing_stages", "must lie in 0..4", self.thing_stages)
        _require(
            self.flow_source in ("reg", "cls", None), "flow_source", "must be 'reg', 'cls' or null", self.flow_source
        )
        _require(
            len(self.anchor_ratios) > 0 and all(r > 0 for r in self.anchor_ratios),
            "anchor_ratios",
            "must be one or more positive numbers",
            self.anchor_ratios,
        )
        for name, stages in (
            ("cls", self.detection_stages),
            ("reg", self.detection_stages),
            ("stuff", self.stuff_stages),
            ("thing", self.thing_stages),
        ):
            value = getattr(self, f"deformable_{name}_stages")
            _require(
                all(0 <= s < stages for s in value),
                f"deformable_{name}_stages",
                f"may name the stages 0..{stages - 1} of the {name} sub-network",
                value,
            )
        for name in ("stuff", "thing"):
            _require(
                getattr(self, f"{name}_head") or getattr(self, f"{name}_stages") == 0,
                f"{name}_stages",
                f"must be 0 without a {name} head ({name}_head: false)",
                getattr(self, f"{name}_stages"),
            )
        for head, flags in (
            ("stuff", ("flow_to_stuff", "flow_stuff_to_thing")),
            ("thing", ("flow_to_thing", "flow_stuff_to_thing")),
        ):
            for name in flags:
                _require(
                    getattr(self, f"{head}_head") or not getattr(self, name),
                    name,
                    f"must be false without a {head} head ({head}_head: false)",
                    getattr(self, name),
                )
        flows = [name for name in ("flow_to_detection", "flow_to_stuff", "flow_to_thing") if getattr(self, name)]
        if flows:
            rule = f"must be 'reg' or 'cls', as {' and '.join(flows)} {'is' if len(flows) == 1 else 'are'} true"
        else:
            rule = "must be null, as none of flow_to_detection, flow_to_stuff and flow_to_thing is true"
        _require((self.flow_source is not None) == bool(flows), "flow_source", rule, self.flow_source)
        _require(
            self.backbone_frozen_stages < 4 or not self.backbone_norm_trains,
            "backbone_norm_trains",
            "must be false where no stage trains (backbone_frozen_stages: 4)",
            self.backbone_norm_trains,
        )
        deformable = any(getattr(self, f"deformable_{n}_stages") for n in ("cls", "reg", "stuff", "thing"))
        _require(
            not deformable or self.fpn_channels == self.head_channels,
            "head_channels",
            f"must equal fpn_channels ({self.fpn_channels}) where a sub-network is deformable",
            self.head_channels,
        )


@dataclass(frozen=True)
class InferenceConfig:
    """From raw outputs to detections, masks and the panoptic map (paper, IV-B2)."""

    candidates_per_level: int = 1000  # best anchors of a level that are decoded; 0 = all
    score_threshold: float = 0.05  # box and class pairs at or below it are dropped
    nms_threshold: float = 0.4  # class-wise NMS suppresses above this IoU
    max_detections: int = 100  # detections per image over all classes
    mask_threshold: float = 0.5  # mask probability from which a pixel belongs to the instance
    instance_score_threshold: float = 0.37  # instances and boxes below it do not enter the panoptic map
    instance_overlap_threshold: float = 0.37  # an instance is dropped if more than this share is already taken
    stuff_area_threshold: int = 4900  # stuff segments with fewer pixels are dropped
    box_overlap_threshold: float = 0.5  # a box fills its void pixels if at least this share of it is void
    box_fill: bool = True  # False: void pixels inside boxes stay void
    test_short_edges: tuple[int, ...] = (800,)  # short edges of the network's input; several: test-time augmentation
    test_long_edge: int = 1333  # limit of the long edge at the largest short edge; at smaller ones in proportion
    test_flip: bool = False  # mirrored images too: test-time augmentation

    @property
    def test_edges(self) -> tuple[tuple[int, float], ...]:
        """Short edge and limit of the long edge of every size that an image goes through the network in."""
        largest = max(self.test_short_edges)
        return tuple((short, self.test_long_edge * short / largest) for short in self.test_short_edges)

    def __post_init__(self):
        _check_share(
            self,
            "score_threshold",
            "nms_threshold",
            "mask_threshold",
            "instance_score_threshold",
            "instance_overlap_threshold",
            "box_overlap_threshold",
        )
        _check_positive(self, "max_detections", "test_long_edge", "mask_threshold")
        for name in ("candidates_per_level", "stuff_area_threshold"):
            _require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        _require(
            len(self.test_short_edges) > 0 and all(edge > 0 for edge in self.test_short_edges),
            "test_short_edges",
            "must be one or more positive sizes",
            self.test_short_edges,
        )


MAX_SIZE_DIVISOR = 2**24
"""What `preprocess_images` takes at most."""


@dataclass(frozen=True)
class DataConfig:
    """Images and categories."""

    categories: str | None = (
        "coco"  # "coco", "cityscapes", a JSON file with a COCO category list, or null: numbered classes
    )
    image_mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # RGB, subtracted
    image_std: tuple[float, ...] = (58.395, 57.12, 57.375)  # RGB, divided by
    size_divisor: int = 32  # images are padded with zeros at the right and bottom to a multiple of this
    train_short_edges: tuple[int, ...] = (800,)  # one value, or two: range of the short edge in multi-scale training
    train_long_edge: int = 1333  # limit of the long edge in training
    train_crop: tuple[int, ...] | None = None  # (height, width) of random crops; null = whole images
    train_scale_range: tuple[float, ...] = (1.0, 1.0)  # random factor before the crop; [1, 1] without train_crop
    flip_probability: float = 0.5  # horizontal flip in training

    def __post_init__(self):
        _check_share(self, "flip_probability")
        _check_positive(self, "size_divisor", "train_long_edge")
        in_range = self.size_divisor % 32 == 0 and self.size_divisor <= MAX_SIZE_DIVISOR
        _require(in_range, "size_divisor", f"must be a multiple of 32 up to {MAX_SIZE_DIVISOR}", self.size_divisor)
        for name in ("image_mean", "image_std"):
            _require(len(getattr(self, name)) == 3, name, "must be three numbers (RGB)", getattr(self, name))
        _require(all(s > 0 for s in self.image_std), "image_std", "must be positive", self.image_std)
        _require(
            1 <= len(self.train_short_edges) <= 2 and all(e > 0 for e in self.train_short_edges),
            "train_short_edges",
            "must be one positive size or a range of two",
            self.train_short_edges,
        )
        _require(
            self.train_crop is None or (len(self.train_crop) == 2 and all(c > 0 for c in self.train_crop)),
            "train_crop",
            "must be (height, width) or null",
            self.train_crop,
        )
        _require(
            len(self.train_scale_range) == 2 and 0 < self.train_scale_range[0] <= self.train_scale_range[1],
            "train_scale_range",
            "must be two positive factors in order",
            self.train_scale_range,
        )
        _require(
            self.train_crop is not None or self.train_scale_range == (1.0, 1.0),
            "train_scale_range",
            "must be [1, 1] without train_crop",
            self.train_scale_range,
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Targets, losses and the optimizer's schedule (paper, IV-B1)."""

    epochs: int = 20  # passes over the training images
    images_per_step: int = 8  # over all processes and accumulation steps
    accumulation_steps: int = 1  # parts of a step that run one after the other, each with its own loss counts
    seed: int = 0  # of the initial weights, the order of the images and their augmentation
    learning_rate: float = 0.005  # for images_per_step images
    learning_rate_epochs: tuple[int, ...] = (16, 19)  # after each of these, if not the last, the rate falls to a tenth
    warmup_iterations: int = 500  # linear warm-up
    warmup_factor: float = 0.001  # share of the rate at the first iteration
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0001  # on every trained parameter
    gradient_clip_norm: float | None = None  # longer gradients, all parameters together, are shortened to it
    mixed_precision: str | None = None  # "fp16", "bf16" or null
    positive_iou: float = 0.5  # anchors at or above it are positive; proposals of the thing head likewise
    negative_iou: float = 0.4  # anchors below it are background; those between are ignored
    focal_gamma: float = 2.0  # focal loss exponent
    focal_alpha: float = 0.25  # focal loss weight of positives
    stuff_loss_weight: float = 0.25  # lambda of equation 6; the released runs behave like 0.5 (see docs)
    proposal_nms_threshold: float = 0.4  # NMS of the detections that become training proposals
    finetune_class_layers_epochs: int = (
        0  # first this many epochs train only the layers whose shape depends on the classes
    )
    finetune_learning_rate: float = 0.005  # rate in those epochs
    evaluate_every_epochs: int = 1  # epochs between evaluations; 0 = after the last alone
    checkpoint_every_steps: int = 1000  # steps between checkpoints; one is also written after every epoch

    def __post_init__(self):
        _check_positive(
            self,
            "epochs",
            "images_per_step",
            "accumulation_steps",
            "learning_rate",
            "finetune_learning_rate",
            "checkpoint_every_steps",
        )
        _require(
            all(epoch > 0 for epoch in self.learning_rate_epochs),
            "learning_rate_epochs",
            "must be positive",
            self.learning_rate_epochs,
        )
        _check_share(
            self, "warmup_factor", "momentum", "positive_iou", "negative_iou", "focal_alpha", "proposal_nms_threshold"
        )
        for name in (
            "weight_decay",
            "stuff_loss_weight",
            "focal_gamma",
            "warmup_iterations",
            "finetune_class_layers_epochs",
            "seed",
            "evaluate_every_epochs",
        ):
            _require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        _require(
            self.negative_iou <= self.positive_iou,
            "negative_iou",
            f"must not exceed positive_iou ({self.positive_iou})",
            self.negative_iou,
        )
        _require(
            self.mixed_precision in ("fp16", "bf16", None),
            "mixed_precision",
            "must be 'fp16', 'bf16' or null",
            self.mixed_precision,
        )
        _require(
            self.images_per_step % self.accumulation_steps == 0,
            "accumulation_steps",
            f"must divide images_per_step ({self.images_per_step})",
            self.accumulation_steps,
        )
        _require(
            self.gradient_clip_norm is None or self.gradient_clip_norm > 0,
            "gradient_clip_norm",
            "must be positive or null",
            self.gradient_clip_norm,
        )


@dataclass(frozen=True)
class Config:
    """A whole configuration; `name` is where it came from."""

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


def make_config(name: str, settings: Mapping[str, Mapping[str, Any]]) -> Config:
    """Checks plain settings (as read from YAML), section by section, and freezes them.

    Raises:
        ConfigError: unknown section or field, wrong type, or a value that breaks a rule.
    """
    sections = {}
    for section, values in settings.items():
        if section not in SECTIONS:
            raise ConfigError(f"{name}: unknown section {shown(section)}; sections are {', '.join(SECTIONS)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: section '{section}' must hold 'field: value' lines, got {shown(values)}")
        try:
            sections[section] = _make_section(SECTIONS[section], values)
        except ConfigError as error:
            raise ConfigError(f"{name}: {section}.{error}") from None
    return Config(name=name, **sections)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Overrides from a command line's "FIELD=VALUE" strings, values in YAML.

    Raises:
        ConfigError: a string without "=", or a value that is no YAML.
    """
    overrides = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"settings have the form FIELD=VALUE, got {shown(setting)}")
        try:
            overrides[name] = read_yaml(text)
        except ConfigError:
            raise ConfigError(f"{name:.80}: {shown(text)} is no YAML value") from None
    return overrides


def read_yaml(text: str) -> Any:
    """Content of a YAML text; ConfigError, "is not YAML: ...", otherwise."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets anything out of values that it takes for numbers, dates and so on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"is not YAML: {reason:.200}") from None


def shown(value: Any) -> str:
    """`repr`, shortened; aliases in YAML make values whose whole text would fill the memory."""
    try:
        text = _brief.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def place_overrides(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts overrides into sections; a field may be given bare, as "section.field", or within `section={...}`.

    Raises:
        ConfigError: no section has the field; close names are suggested.
    """
    placed: dict[str, dict[str, Any]] = {}
    owners = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    for key, value in overrides.items():
        if key in SECTIONS and isinstance(value, Mapping):
            placed.setdefault(key, {}).update(value)
            continue
        section, dot, name = key.partition(".")
        if not dot:
            section, name = owners.get(key, ""), key
        if owners.get(name) != section:
            near = difflib.get_close_matches(name, owners, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"override {shown(key)} names no setting{hint}")
        placed.setdefault(section, {})[name] = value
    return placed


def _make_section(cls: type, values: Mapping[str, Any]):
    types_of = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    converted = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{shown(name)}: no such field{hint} (value {shown(value)})")
        converted[name] = _convert(name, types_of[name], value)
    return cls(**converted)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`; lists become tuples, whole numbers become floats, nothing else is bent."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return _convert(name, inner[0], value)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        _require(isinstance(value, (list, tuple)), name, f"must be a list of {item.__name__}", value)
        return tuple(_convert(name, item, v) for v in value)
    if kind is float:
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
            value = float(value)  # YAML takes 1e-3 for a text, as it has no point
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "must be a number", value)
        _require(abs(value) <= sys.float_info.max, name, "must be finite", value)  # false for NaN
        return float(value)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    _require(right, name, f"must be of type {kind.__name__}", value)
    if kind is int:
        _require(-(1 << 63) < value < 1 << 63, name, "must lie between -2 ** 63 and 2 ** 63", value)
    return value


def _require(holds: bool, name: str, rule: str, value: Any):
    if not holds:
        raise ConfigError(f"{name}: {rule}, got {shown(value)}")


def _check_positive(section: Any, *names: str):
    for name in names:
        _require(getattr(section, name) > 0, name, "must be positive", getattr(section, name))


def _check_share(section: Any, *names: str):
    for name in names:
        _require(0 <= getattr(section, name) <= 1, name, "must lie in 0..1", getattr(section, name))
