# SPDX-License-Identifier: Apache-2.0
"""Every field of a configuration has an effect: another value changes an observed result or is refused.

A new field needs a row in `ROWS`.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.scenes import scene_categories, write_coco
from helpers.small_models import SYNTHETIC, random_model

from spatialflow.config import SECTIONS, Config, ConfigError, load_config
from spatialflow.data.augment import augment
from spatialflow.data.categories import load_categories
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.loader import Schedule, make_loader
from spatialflow.data.samples import make_sample
from spatialflow.data.synthetic import make_scene
from spatialflow.engine import trainer as trainer_module
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.predict import Predictor
from spatialflow.engine.run_advice import settings_without_effect
from spatialflow.models.build import build_model
from spatialflow.models.postprocess import pyramid_anchors, pyramid_base_anchors
from spatialflow.models.training_step import TrainingStep

BASE = SYNTHETIC | dict(
    train_short_edges=[32],
    train_long_edge=48,
    flip_probability=0.0,
    images_per_step=1,
    warmup_iterations=1,
)
"""Overrides of `tiny` that all rows share."""

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
NO_FLOWS = dict(flow_source=None, flow_to_detection=False, flow_to_stuff=False, flow_to_thing=False)
FROM_SCRATCH = dict(backbone_norm_trains=True, backbone_frozen_stages=-1)

# ------------------------------------------------------------------------------- observers of a configuration


def structure(config: Config, data: CocoPanoptic) -> Any:
    """Return names and shapes of the parameters, and which parameters and statistics train."""
    model = build_model(config)
    parameters = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    return parameters, [(name, part.training) for name, part in model.backbone.named_modules() if "bn" in name]


def weights(config: Config, data: CocoPanoptic) -> Any:
    """Return the initial weights for a fixed seed."""
    torch.manual_seed(0)
    return list(build_model(config).parameters())


def output(config: Config, data: CocoPanoptic) -> Any:
    """Return outputs of a network with fixed weights for an image, and for a large and a small RoI."""
    torch.manual_seed(1)
    model = build_model(config).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 64, 96))
        rois = torch.tensor([[0.0, 4, 4, 90, 60], [0, 5, 5, 20, 20]])
        return [*out.class_logits, out.stuff_logits, model.thing_logits(out.thing_features, rois)]


def anchors(config: Config, data: CocoPanoptic) -> Any:
    base = pyramid_base_anchors(config.model, torch.device("cpu"))
    return pyramid_anchors(base, [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)])


@functools.cache
def _predicting_model() -> Any:
    """Build a model with random weights that predicts stuff everywhere and things of all sizes and scores."""
    torch.manual_seed(0)
    model = random_model("tiny", **BASE)
    with torch.no_grad():
        scene = torch.from_numpy(make_scene((64, 96), 0, 0).image).permute(2, 0, 1)[None] / 64 - 2
        out = model(scene)
        for part, maps, size in (("class_logits", out.class_logits, 1.0), ("box_deltas", out.box_deltas, 0.2)):
            conv = model.box_head.get_submodule(part)
            spread = torch.cat([level.flatten() for level in maps]).std()
            conv.weight.mul_(size / spread)
            conv.bias.mul_(size / spread)
    return model


def prediction(config: Config, data: CocoPanoptic) -> Any:
    """Return detections, masks and map of one scene."""
    model = copy.copy(_predicting_model())
    model.config = config
    result = Predictor(model, optimize=False)(make_scene((64, 96), 0, 0).image)
    return result.id_map, result.segments, result.boxes, result.scores, result.labels, result.masks


def names(config: Config, data: CocoPanoptic) -> Any:
    return load_categories(config.data.categories, config.model.num_things, config.model.num_stuff).as_coco()


def augmented(config: Config, data: CocoPanoptic) -> Any:
    """Return several random augmentations of one training image."""
    scene = make_scene((80, 120), 0, 0)
    sample = make_sample("scene", scene.image, scene.id_map, scene.segments, scene_categories())
    return [augment(sample, config.data, np.random.default_rng(seed)) for seed in range(3)]


def losses(config: Config, data: CocoPanoptic) -> Any:
    """Return the losses of one image for fixed weights."""
    torch.manual_seed(0)
    network = copy.deepcopy(_predicting_model()).train()
    requests = Schedule(data.sizes, 1, 0).batches(0, 1, 0, 1, 1)
    batch = next(make_loader(data, config.data, requests))
    return list(TrainingStep(network, config)(batch.images, batch.truth()))


def rates(config: Config, data: CocoPanoptic) -> Any:
    """Return the learning rate of every step."""
    return [trainer_module.learning_rate(step, 2, config.training) for step in range(2 * config.training.epochs)]


def plan(config: Config, data: CocoPanoptic, folder: Path) -> Any:
    """Return the requested images of every step, the optimizer's settings and the autocast dtype of a training run."""
    trainer = trainer_module.Trainer(config, data, folder, ALONE)
    parts = config.training.accumulation_steps
    requests = list(trainer.schedule.batches(0, trainer.total_steps, 0, 1, parts))
    settings = {key: value for key, value in trainer.optimizer.param_groups[0].items() if key != "params"}
    with trainer._autocast():
        dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    return requests, settings, dtype


def run(config: Config, data: CocoPanoptic, folder: Path) -> Any:
    """Return the final weights of a training run, and how often it evaluates and saves."""
    scores = {"problems": [], "detection": {}} | {key: {"pq": 0.0} for key in ("All", "Things", "Stuff")}
    with patch.object(trainer_module, "evaluate_network", return_value=scores) as evaluate:
        trainer = trainer_module.Trainer(config, data, folder, ALONE, validation=data)
        trainer.log.plot = lambda: None
        with patch.object(trainer, "save_checkpoint", wraps=trainer.save_checkpoint) as save:
            network = trainer.run()
    return list(network.state_dict().values()), evaluate.call_count, save.call_count


class Row(NamedTuple):
    """A field, another value, and the observer whose result differs."""

    field: str
    value: Any
    observer: Callable
    base: dict = {}


ROWS = [
    Row("backbone_depth", 101, structure),
    Row("backbone_base_channels", 8, structure),
    Row("backbone_groups", 4, structure, dict(backbone_group_width=4)),
    Row("backbone_group_width", 8, structure, dict(backbone_groups=4)),
    Row("backbone_deformable_stages", [3], structure),
    Row("backbone_norm_trains", True, structure),
    Row("backbone_frozen_stages", 2, structure),
    Row("fpn_channels", 16, structure),
    Row("head_channels", 16, structure),
    Row("thing_head_channels", 16, structure),
    Row("stuff_head_channels", 16, structure),
    Row("norm_groups", 2, output),
    Row("num_things", 7, structure),
    Row("num_stuff", 7, structure),
    Row("thing_head", False, structure, dict(thing_stages=0, flow_to_thing=False, flow_stuff_to_thing=False)),
    Row("stuff_head", False, structure, dict(stuff_stages=0, flow_to_stuff=False, flow_stuff_to_thing=False)),
    Row("thing_head_convs", 2, structure),
    Row("roi_size", 7, output),
    Row("finest_scale", 8, output),
    Row("subnet_init_std", 0.04, weights),
    Row("detection_stages", 5, structure),
    Row("stuff_stages", 2, structure),
    Row("thing_stages", 2, structure),
    Row("flow_source", "cls", structure),
    Row("flow_to_detection", False, structure),
    Row("flow_to_stuff", False, structure),
    Row("flow_to_thing", False, structure),
    Row("flow_stuff_to_thing", False, structure),
    Row("deformable_cls_stages", [0], structure),
    Row("deformable_reg_stages", [0], structure),
    Row("deformable_stuff_stages", [0], structure),
    Row("deformable_thing_stages", [0], structure),
    Row("anchor_octave_scale", 2.0, anchors),
    Row("anchor_scales_per_octave", 2, structure),
    Row("anchor_ratios", [0.5, 2.0], structure),
    Row("candidates_per_level", 5, prediction),
    Row("score_threshold", 0.6, prediction),
    Row("nms_threshold", 0.8, prediction),
    Row("max_detections", 10, prediction),
    Row("mask_threshold", 0.7, prediction),
    Row("instance_score_threshold", 0.9, prediction),
    Row("instance_overlap_threshold", 0.9, prediction),
    Row("stuff_area_threshold", 1000, prediction),
    Row("box_overlap_threshold", 0.0, prediction, dict(stuff_area_threshold=10**6, mask_threshold=0.7)),
    Row("box_fill", False, prediction, dict(box_overlap_threshold=0.0, stuff_area_threshold=10**6, mask_threshold=0.7)),
    Row("test_short_edges", [48], prediction),
    Row("test_long_edge", 80, prediction),
    Row("test_flip", True, prediction),
    Row("categories", None, names),
    Row("image_mean", [0.0, 0.0, 0.0], augmented),
    Row("image_std", [1.0, 1.0, 1.0], augmented),
    Row("size_divisor", 64, augmented),
    Row("train_short_edges", [32, 64], augmented, dict(train_long_edge=96)),
    Row("train_long_edge", 40, augmented),
    Row("train_crop", [24, 24], augmented),
    Row("train_scale_range", [0.5, 2.0], augmented, dict(train_crop=[24, 24])),
    Row("flip_probability", 1.0, augmented),
    Row("epochs", 2, plan),
    Row("images_per_step", 2, plan),
    Row("accumulation_steps", 2, plan, dict(images_per_step=2)),
    Row("seed", 1, plan),
    Row("learning_rate", 0.01, rates),
    Row("learning_rate_epochs", [1], rates, dict(epochs=2)),
    Row("warmup_iterations", 2, rates),
    Row("warmup_factor", 0.5, rates),
    Row("momentum", 0.0, plan),
    Row("weight_decay", 0.1, plan),
    Row("gradient_clip_norm", 0.1, run),
    Row("mixed_precision", "bf16", plan),
    Row("positive_iou", 0.9, losses, dict(anchor_octave_scale=1.0)),
    Row("negative_iou", 0.1, losses, dict(anchor_octave_scale=1.0)),
    Row("focal_gamma", 1.0, losses),
    Row("focal_alpha", 0.5, losses),
    Row("stuff_loss_weight", 1.0, losses),
    Row("proposal_nms_threshold", 0.9, losses, dict(positive_iou=0.1, negative_iou=0.1)),
    Row("finetune_class_layers_epochs", 1, rates, dict(finetune_learning_rate=0.1)),
    Row("finetune_learning_rate", 0.1, rates, dict(finetune_class_layers_epochs=1)),
    Row("evaluate_every_epochs", 3, run, dict(epochs=3)),
    Row("checkpoint_every_steps", 1, run),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_coco(tmp_path_factory.mktemp("scenes"), 2, (32, 48))
    return CocoPanoptic(folder / "panoptic.json", folder / "images", None, scene_categories())


@pytest.fixture(scope="module")
def observe(data, tmp_path_factory):
    """Return a cached function: the result of an observer for overrides of `tiny`."""
    cached = {}

    def observe_overrides(observer: Callable, overrides: dict) -> Any:
        key = observer, repr(sorted(overrides.items()))
        if key not in cached:
            config = load_config("tiny", **overrides)
            extra = (tmp_path_factory.mktemp("run"),) if observer in (plan, run) else ()
            cached[key] = _plain(observer(config, data, *extra))
        return cached[key]

    return observe_overrides


def _plain(value: Any) -> Any:
    """Convert tensors and arrays to shape and bytes, so that == compares all values."""
    if isinstance(value, torch.Tensor):
        return _plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def test_every_field_has_a_row():
    fields = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert sorted(row.field for row in ROWS) == sorted(fields)


@pytest.mark.parametrize("row", ROWS, ids=[row.field for row in ROWS])
def test_another_value_changes_something(row, observe):
    base = BASE | row.base
    assert observe(row.observer, base | {row.field: row.value}) != observe(row.observer, base)


def test_no_two_accepted_networks_with_other_flags_are_the_same():
    """For every combination of heads, source and flows, a flag without effect is refused."""
    flags_by_network, refused = {}, 0
    flags = ("thing_head", "stuff_head", "flow_to_detection", "flow_to_stuff", "flow_to_thing", "flow_stuff_to_thing")
    for source, *values in itertools.product((None, "reg", "cls"), *[(False, True)] * len(flags)):
        overrides = dict(zip(flags, values, strict=True)) | dict(flow_source=source, detection_stages=1)
        overrides |= dict(stuff_stages=int(overrides["stuff_head"]), thing_stages=int(overrides["thing_head"]))
        try:
            config = load_config("tiny", **(BASE | overrides))
        except ConfigError as error:
            assert any(flag in str(error) for flag in (*flags, "flow_source"))
            refused += 1
            continue
        with patch("spatialflow.models.build.ResNet", return_value=torch.nn.Module()) as backbone:
            backbone.return_value.out_channels = (4, 4, 4)
            model = build_model(config)
        network = source, repr([(name, p.shape) for name, p in model.named_parameters()])
        assert network not in flags_by_network, (overrides, flags_by_network[network])
        flags_by_network[network] = overrides
    assert len(flags_by_network) == 3 + 7 + 7 + 30 and refused  # without heads, with either head, with both heads


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(flow_source=None), "flow_source: must be 'reg' or 'cls', as flow_to_detection and flow_to_stuff and"),
        (NO_FLOWS | dict(flow_source="cls"), "flow_source: must be null, as none of flow_to_detection"),
        (dict(thing_head=False, thing_stages=0), "flow_to_thing: must be false without a thing head"),
        (dict(stuff_head=False, stuff_stages=0, flow_to_stuff=False), "flow_stuff_to_thing: must be false without a"),
        (FROM_SCRATCH | dict(backbone_frozen_stages=4), "backbone_norm_trains: must be false where no stage trains"),
        (dict(train_scale_range=[0.5, 2.0]), "train_scale_range: must be [1, 1] without train_crop"),
        (dict(learning_rate_epochs=[0]), "learning_rate_epochs: must be positive"),
    ],
)
def test_a_setting_without_effect_is_refused(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config("tiny", **(BASE | overrides))
    assert words in str(error.value)


def test_a_schedule_that_the_run_is_too_short_for_is_named():
    short = load_config("tiny", epochs=3, learning_rate_epochs=[2, 3, 9], warmup_iterations=6).training
    decay, warmup = settings_without_effect(short, total_steps=6)
    assert "learning_rate_epochs [2, 3, 9]" in decay and "does not fall after epochs 3 and 9" in decay
    assert "warmup_iterations 6: the run ends after 6 steps" in warmup
    assert settings_without_effect(load_config("demo").training, total_steps=3000) == []
