# SPDX-License-Identifier: Apache-2.0
"""Settings of a training run that follow from its data: classes, sizes of the images, and schedule."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spatialflow.config import Config, ConfigError, load_config
from spatialflow.data.categories import TABLES, read_rows, table_path
from spatialflow.engine.run_advice import epochs_phrase

DEFAULT_MODEL = "demo"
"""Network that a run without configuration, backbone and model begins with."""

IMAGES_ON_CPU, IMAGES_ON_GPU = 1200, 12_000
"""Images of a whole run, counted in every epoch, where the schedule is chosen: some minutes of computing time."""

MIN_EPOCHS = 4
"""Least number of epochs where the schedule is chosen."""

EVALUATIONS = 8
"""About this many evaluations of a run, where the schedule is chosen."""

MAX_ASPECT = 3.0
"""Largest limit of the long edge, in short edges."""

STUFF_AREA_SHARE = 0.001
"""Share of an image below which a stuff segment is dropped. COCO's share is 0.016, too large for poles and signs."""

CLASS_FIELDS = ("categories", "num_things", "num_stuff")

_STUFF_ONLY = {"num_things": 1, "score_threshold": 1.0}
"""A network needs a thing class, and scores do not exceed 1, so that no detection of it remains."""


class ClassTable(NamedTuple):
    """The classes of an annotation file."""

    path: Path
    rows: list[dict[str, Any]]

    @property
    def things(self) -> int:
        """Number of thing classes."""
        return sum(bool(row["isthing"]) for row in self.rows)

    @property
    def stuff(self) -> int:
        """Number of stuff classes."""
        return len(self.rows) - self.things


def read_classes(annotations: str | Path) -> ClassTable:
    """Read the classes of an annotation file.

    Raises:
        CategoryError: the file cannot be read or has no `categories`.
    """
    path = Path(annotations)
    return ClassTable(path, read_rows(path))


def with_classes(config: Config, classes: ClassTable, given: Mapping[str, Any]) -> Config:
    """Give a configuration the classes of an annotation file.

    A category table of the package stays if it has the same ids and kinds: it may number "other" in its own way.

    Args:
        config: the configuration, `given` included.
        classes: of the annotation file.
        given: `CLASS_FIELDS` that the user has set. They stay, but must not contradict the file.

    Raises:
        ConfigError: a given number contradicts the file; the message has both values.
    """
    if "categories" in given:
        if given["categories"] is None:
            return config  # numbered classes
        classes = read_classes(table_path(given["categories"]))
    allowed = {
        "num_things": [max(classes.things, 1)],
        "num_stuff": [classes.stuff + 1] if classes.stuff == 0 else [classes.stuff, classes.stuff + 1],
    }
    for name, kind in (("num_things", "things"), ("num_stuff", "stuff classes")):
        if name in given and given[name] not in allowed[name]:
            raise ConfigError(
                f"{name} is set to {given[name]}, but {classes.path} has {getattr(classes, name[4:])} {kind}; "
                f"leave {name} out to take it from the file"
            )
    settings: dict[str, Any] = {}
    if "categories" not in given and not _has_classes(config.data.categories, classes):
        is_packaged = classes.path.parent == TABLES
        settings["categories"] = classes.path.stem if is_packaged else str(classes.path.resolve())
    if "num_things" not in given:
        settings["num_things"] = allowed["num_things"][0]
    if "num_stuff" not in given:
        settings["num_stuff"] = allowed["num_stuff"][-1] if classes.things else classes.stuff
    if not classes.things:
        settings |= _STUFF_ONLY
    return load_config(config, **settings)


def _has_classes(table: str | None, classes: ClassTable) -> bool:
    """Return whether a table of the package has the same classes as a file."""
    if table is None or table_path(table).parent != TABLES:
        return False
    of_table, of_file = (
        {(row["id"], bool(row["isthing"])) for row in rows} for rows in (read_rows(table_path(table)), classes.rows)
    )
    return of_table == of_file


def with_sizes_and_schedule(
    config: Config,
    sizes: Sequence[tuple[int, int]],
    given: Mapping[str, Any],
    rate_per_image: float,
    on_gpu: bool,
    processes: int,
) -> Config:
    """Choose the sizes of the images and the schedule of a run.

    Images are reduced to the short edge of `config`, and smaller ones keep their size. The length of the run is chosen
    for some minutes of computing time; warm-up, decays and evaluations follow from it.

    Args:
        config: the network and the largest sizes; with `given`.
        sizes: (height, width) of the training images; at least one.
        given: fields that the user has set, which stay.
        rate_per_image: learning rate for a step of one image; in proportion for more.
        on_gpu: whether the run uses GPUs.
        processes: number of processes.
    """
    settings = _sizes(config, sizes) | _schedule(len(sizes), given, rate_per_image, on_gpu, processes)
    return load_config(config, **{name: value for name, value in settings.items() if name not in given})


def chosen_edges(config: Config, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the short and the long edge of the images; the arguments are those of `with_sizes_and_schedule`."""
    array = np.array(sizes, float)
    short = max(round(min(config.test.test_edges[0][0], float(np.median(array.min(axis=1))))), 32)
    aspect = min(float(np.percentile(array.max(axis=1) / array.min(axis=1), 95)), MAX_ASPECT)
    return short, max(round(short * aspect), short)


def _sizes(config: Config, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    short, long = chosen_edges(config, sizes)
    return {
        "train_short_edges": [short],
        "train_long_edge": long,
        "test_short_edges": [short],
        "test_long_edge": long,
        "stuff_area_threshold": round(STUFF_AREA_SHARE * float(np.median(np.array(sizes, float).prod(axis=1)))),
    }


def _schedule(
    count: int, given: Mapping[str, Any], rate_per_image: float, on_gpu: bool, processes: int
) -> dict[str, Any]:
    batch = given.get("images_per_step", (4 if on_gpu else 2) * processes)
    images = IMAGES_ON_GPU * processes if on_gpu else IMAGES_ON_CPU
    epochs = given.get("epochs", max(-(-images // count), MIN_EPOCHS))
    steps = epochs * -(-count // batch)
    decays = sorted({max(round(0.7 * epochs), 1), max(round(0.9 * epochs), 1)} - {epochs})
    return {
        "images_per_step": batch,
        "epochs": epochs,
        "learning_rate": float(f"{rate_per_image * batch:.3g}"),
        "learning_rate_epochs": decays,
        "warmup_iterations": min(steps // 10, 500),
        "evaluate_every_epochs": max(round(epochs / EVALUATIONS), 1),
    }


def describe_settings(config: Config, classes: Sequence[str], count: int, held_out: int) -> list[str]:
    """Describe the chosen settings, with the names of their fields, in three lines."""
    model, data, training = config.model, config.data, config.training
    stuff = len(classes) - model.num_things
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    epochs = training.learning_rate_epochs
    decays = f", a tenth of it after {epochs_phrase(epochs)}" if epochs else ""
    return [
        f"network: {config.name}; {model.num_things} thing and {stuff} stuff classes: {shown}",
        f"images: {count} to train on, {held_out} to evaluate on; train_short_edges={list(data.train_short_edges)} "
        f"train_long_edge={data.train_long_edge}",
        f"schedule: epochs={training.epochs} images_per_step={training.images_per_step} "
        f"learning_rate={training.learning_rate:g}{decays}; "
        f"warmup_iterations={training.warmup_iterations} evaluate_every_epochs={training.evaluate_every_epochs}",
    ]
