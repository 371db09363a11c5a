# SPDX-License-Identifier: Apache-2.0
"""Where files of weights are: those of a training run, and those that come with the package."""

from pathlib import Path

RUN_FILES = ("model.safetensors", "checkpoint.pt")
"""Files of a run folder that hold its weights, the better first."""

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")
"""Suffixes of files of weights."""

_FOLDER = Path(__file__).resolve().parent / "weights"


def packaged_names() -> list[str]:
    """List the names of the weights that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def packaged_weights(name: str) -> Path | None:
    """Return the path of packaged weights; None if there are none of that name."""
    return _FOLDER / f"{name}.safetensors" if name in packaged_names() else None
