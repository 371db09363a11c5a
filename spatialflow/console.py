# SPDX-License-Identifier: Apache-2.0
"""What the commands share: complaints, and the files that arguments stand for."""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatialflow.errors import CommandError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def package_configs() -> str:
    """A paragraph that names the configurations of the package, but for those of the paper's ablations and of tests."""
    names = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.yaml"))
    shown = [name for name in names if not name.startswith(("ablation_", "tiny"))]
    return textwrap.fill(f"Configurations of the package: {', '.join(shown)}.", 116)


def with_examples(*lines: str) -> dict[str, Any]:
    """Arguments of `add_parser` by which the help of a command ends with examples."""
    return {
        "epilog": "\n".join(("examples:", *(f"  spatialflow {line}" for line in lines))),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def complain(text: str) -> None:
    """A sentence on standard error, with the program's name before it."""
    print(f"spatialflow: {text}", file=sys.stderr)


class _Complaints(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def show_log() -> None:
    """Shows what the package logs, for instance what it took off the weights of a trainer, as complaints."""
    logger = logging.getLogger("spatialflow")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_Complaints())


def list_images(given: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files to read, and complaints about what is no file; names must differ, as outputs are named after them.

    A folder stands for the images in it, or if there are none for those in its folders (Cityscapes' cities).
    """
    failed: list[str] = []
    of_stem: dict[str, Path] = {}
    for path in given:
        found = [path]
        if path.is_dir():
            found = _images_in(path.iterdir()) or _images_in(path.rglob("*"))
            if not found:
                failed.append(f"{path}: holds no image file")
        for file in found:
            if of_stem.setdefault(file.stem, file) != file:
                failed.append(f"{file}: is named like {of_stem[file.stem]}, and outputs take the name")
    for text in failed:
        complain(text)
    return list(of_stem.values()), failed


def _images_in(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def panoptic_json(path: Path) -> Path:
    """The JSON that `path` stands for: itself, that inside the output of `predict`, or that beside a folder of PNGs."""
    candidates = [path / "panoptic.json", path.with_name(f"{path.name}.json")] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CommandError(f"{' and '.join(map(str, candidates))}: no such file")


def ground_truth_json(path: Path, folder: Path) -> tuple[Path, list[str]]:
    """As `panoptic_json`; of a Cityscapes tree the split val, whose JSON and PNGs are written into `folder`, without
    the images whose labels cannot be read. Complaints about those come second.
    """
    if not (path / "gtFine").is_dir():
        return panoptic_json(path), []
    from spatialflow.data.categories import load_categories
    from spatialflow.data.cityscapes import Cityscapes, CityscapesError
    from spatialflow.panoptic import read_panoptic_json

    try:
        data = Cityscapes(path, "val", load_categories("cityscapes", 8, 11))
        truth, _ = data.panoptic_truth(folder)
    except CityscapesError as error:
        raise CommandError(str(error)) from None
    usable = {annotation["image_id"] for annotation in read_panoptic_json(truth)["annotations"]}
    failed = [
        f"{name}: has no ground truth that can be read"
        for name, image_id in zip(data.names, data.image_ids)
        if image_id not in usable
    ]
    for text in failed:
        complain(text)
    return truth, failed


class named:
    """An OSError inside the block names `path`, not the temporary file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def sentence(error: Exception) -> str:
    """What an error says to somebody who has given the file it is about."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be written: {error.strerror}"
    return str(error)


def load_model(config: str, checkpoint: Path | None, overrides: Mapping[str, Any], ema: bool = False) -> Any:
    """The network of `--config` with the weights of `--checkpoint`, else those of the package, else random ones."""
    import torch

    from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint, packaged_weights
    from spatialflow.models.build import build_model
    from spatialflow.models.config import ConfigError

    torch.manual_seed(0)
    try:
        model = build_model(config, **overrides).eval()
        checkpoint = checkpoint or packaged_weights(config)
        if checkpoint is None:
            complain("no --checkpoint: the weights are random, so the maps mean nothing")
            return model
        return load_checkpoint(model, checkpoint, ema)
    except (ConfigError, CheckpointError) as error:
        raise CommandError(str(error)) from None


def load_models(
    configs: Sequence[str], checkpoints: Sequence[Path], overrides: Mapping[str, Any], ema: bool = False
) -> list[Any]:
    """The networks of an ensemble: one configuration for all checkpoints, or one for each."""
    if ema and not checkpoints:
        raise CommandError("--ema needs --checkpoint")
    count = max(len(configs), len(checkpoints))
    of_each = list(configs) * count if len(configs) == 1 else configs
    files = checkpoints or [None] * count
    if len(of_each) != len(files):
        raise CommandError(
            f"give one --config for all of the {len(files)} --checkpoint, or one for each, got {len(configs)}"
        )
    return [load_model(config, file, overrides, ema) for config, file in zip(of_each, files)]
