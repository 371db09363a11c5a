# SPDX-License-Identifier: Apache-2.0
"""Training runs of a narrow network, of about a hundred thousand parameters, on four synthetic scenes."""

import signal
import subprocess
import sys

import pytest
import torch

from helpers.scenes import scene_categories, write_coco
from helpers.small_models import SYNTHETIC
from spatialflow.config import load_config
from spatialflow.data.coco import CocoPanoptic
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.log import read_log

SINGLE_PROCESS = ProcessGroup(0, 1, torch.device("cpu"))
SMALL_RUN = SYNTHETIC | dict(
    backbone_norm_trains=True,
    backbone_frozen_stages=-1,
    train_short_edges=[64],
    train_long_edge=96,
    images_per_step=2,
    warmup_iterations=3,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 4, (64, 96))


@pytest.fixture
def data(scenes):
    return CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())


def small(**overrides):
    """Return the configuration of the runs."""
    return load_config("tiny", **(SMALL_RUN | overrides))


def steps_of(folder):
    """Return the rows of kind "step" in the log of a run."""
    return [row for row in read_log(folder / "log.jsonl") if row["kind"] == "step"]


def start_in_group(command):
    """Start a command in a process group of its own that receives SIGINT, which background jobs ignore."""
    return subprocess.Popen(
        [sys.executable, "-m", "spatialflow.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
