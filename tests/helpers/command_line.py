# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of the command line."""

from pathlib import Path

FAST = ["--config", "tiny", "--size", "64", "96", "--set", "stuff_area_threshold=20"]
"""Options that make `predict` fast, and that let small images keep their stuff segments."""


def train_arguments(data: Path, output: Path, *settings: str, workers: int = 0) -> list[str]:
    """Return the command line that trains `tiny` on a data set from `helpers.scenes.write_coco`."""
    files = ["--images", str(data / "images"), "--annotations", str(data / "panoptic.json"), "--output", str(output)]
    return ["train", "tiny", *settings, *files, "--workers", str(workers)]


def error_messages(capsys) -> list[str]:
    """Return the messages on standard error, one per line; the progress bar is off without a terminal."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert all(line.startswith("spatialflow: ") for line in lines), lines
    return [line.removeprefix("spatialflow: ") for line in lines]
