# SPDX-License-Identifier: Apache-2.0
"""Warnings before a training run: settings and data that will not give what the user expects."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from spatialflow.config import Config, TrainingConfig
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.loader import DataSet
from spatialflow.engine.checkpoints import shorten

FEW_IMAGES = 20
"""Fewer training images than this are reported."""

LARGE_RATIO = 3.0
"""Images whose short edge is more than this many times the network's are reported."""


def advice(config: Config, data: DataSet, total_steps: int, has_validation: bool, is_pretrained: bool) -> list[str]:
    """List warnings about a run, each with its remedy.

    Args:
        config: of the run.
        data: training images.
        total_steps: of the run.
        has_validation: whether there are images to evaluate on.
        is_pretrained: whether the backbone has trained weights.
    """
    messages = [
        *_random_statistics(config, is_pretrained),
        *settings_without_effect(config.training, total_steps),
        *_statistics_of_one_image(config),
        *_large_images(config, data.sizes),
    ]
    if len(data) < FEW_IMAGES:
        messages.append(
            f"only {len(data)} training images: the network will fit these alone; for results on other photographs, "
            f"annotate more"
        )
    if isinstance(data, CocoPanoptic):
        messages += _classes_without_examples(data)
    if not has_validation:
        messages.append(
            "no validation images, so that the run has no score; give --validation-images and "
            "--validation-annotations, or --validation-share 0.1"
        )
    return messages


def missing_photographs(data: DataSet) -> list[str]:
    """List a message if some of the photographs of a COCO data set do not exist; without them it is trained on."""
    if not isinstance(data, CocoPanoptic):
        return []
    missing = [data.names[index] for index in range(len(data)) if not os.path.isfile(data.image_path(index))]
    if not missing:
        return []
    return [
        f"{data.image_folder}: lacks {len(missing)} of the {len(data)} photographs to train on, such as {missing[0]}; "
        f"they are skipped"
    ]


def epochs_phrase(epochs: Sequence[int]) -> str:
    """Name epochs: "epoch 3" or "epochs 3 and 9"."""
    return f"epoch{'s' * (len(epochs) > 1)} {' and '.join(map(str, epochs))}"


def spinning_threads(device: torch.device, workers: int) -> list[str]:
    """List a message if torch's threads on the CPU spin, and take the cores from the processes that load data.

    Args:
        device: of the training.
        workers: number of processes that load data.
    """
    threads = torch.get_num_threads()
    is_passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if device.type != "cpu" or threads < 2 or workers == 0 or is_passive:
        return []
    return [
        f"OMP_WAIT_POLICY is not passive: torch's {threads} threads keep their cores busy while they wait, which slows "
        f'the processes that load data and the run; set os.environ["OMP_WAIT_POLICY"] = "passive" before torch is '
        f"imported"
    ]


def settings_without_effect(training: TrainingConfig, total_steps: int) -> list[str]:
    """List messages about settings of the learning rate that do not fit a run of `total_steps`.

    These are decays that the run does not reach, and a warm-up that it does not complete.
    """
    messages = []
    late = [limit for limit in training.learning_rate_epochs if limit >= training.epochs]
    if late:
        messages.append(
            f"learning_rate_epochs {list(training.learning_rate_epochs)}: the run ends with epoch {training.epochs}, "
            f"so the learning rate does not fall after {epochs_phrase(late)}"
        )
    if training.warmup_iterations >= total_steps:
        messages.append(
            f"warmup_iterations {training.warmup_iterations}: the run ends after {total_steps} steps, before the end "
            f"of the warm-up; set warmup_iterations={total_steps // 10}"
        )
    return messages


def _random_statistics(config: Config, is_pretrained: bool) -> list[str]:
    model = config.model
    if is_pretrained or (model.backbone_frozen_stages < 0 and model.backbone_norm_trains):
        return []
    return [
        "no --backbone or --model: frozen stages and BatchNorm's statistics keep their random initial values; "
        "from scratch, set backbone_norm_trains=true backbone_frozen_stages=-1"
    ]


def _statistics_of_one_image(config: Config) -> list[str]:
    training = config.training
    if not config.model.backbone_norm_trains or training.images_per_step > training.accumulation_steps:
        return []
    parts = "" if training.accumulation_steps == 1 else f" in {training.accumulation_steps} parts"
    return [
        f"images_per_step {training.images_per_step}{parts}: with backbone_norm_trains, BatchNorm takes its statistics "
        f"from a single image; set images_per_step={2 * training.accumulation_steps} or more"
    ]


def _large_images(config: Config, sizes: Sequence[tuple[int, int]]) -> list[str]:
    if config.data.train_crop is not None:
        return []
    height, width = np.median(np.array(sizes, float), axis=0)
    scale = max(
        min(height, width) / max(config.data.train_short_edges), max(height, width) / config.data.train_long_edge
    )
    if scale <= LARGE_RATIO:
        return []
    short, long = (2 * max(config.data.train_short_edges), 2 * config.data.train_long_edge)
    return [
        f"images of {width:.0f} x {height:.0f} pixels (width x height) are reduced by a factor of {scale:.1f}, so that "
        f"objects below {16 * scale:.0f} pixels can hardly be found; if you need those, set "
        f"train_short_edges=[{short}] train_long_edge={long} test_short_edges=[{short}] test_long_edge={long}"
    ]


def _classes_without_examples(data: CocoPanoptic) -> list[str]:
    counts = count_segments(data)
    absent = [row.name for row in data.categories.rows if not counts.get(row.id)]
    if not absent:
        return []
    return [
        f"no training image has a segment of {shorten(absent, 6)}, so that the network cannot learn "
        f"{'this class' if len(absent) == 1 else 'these classes'}; annotate examples, or remove the class from "
        f'"categories"'
    ]


def count_segments(data: CocoPanoptic) -> Mapping[int, int]:
    """Count the segments of every category id in the annotations, crowds excluded."""
    counts: dict[int, int] = {}
    for annotation in data.annotations:
        for segment in annotation["segments_info"]:
            if not segment.get("iscrowd"):
                counts[segment["category_id"]] = counts.get(segment["category_id"], 0) + 1
    return counts
