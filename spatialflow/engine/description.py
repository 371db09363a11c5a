# SPDX-License-Identifier: Apache-2.0
"""What a file of weights knows about its network: configuration, categories, training images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from spatialflow.config import Config, make_config
from spatialflow.config.sections import SECTIONS
from spatialflow.data.categories import Categories, CategoryError, network_categories
from spatialflow.models.spatialflow import SpatialFlow

CONFIG, CATEGORIES, TRAINED_ON = "spatialflow.config", "spatialflow.categories", "spatialflow.trained_on"
"""Keys in the metadata of a safetensors file and in the dictionary of a torch file; their values are text."""


class Description(NamedTuple):
    """The parts of a network that are not tensors; None where a file lacks them."""

    config: Config | None = None
    categories: Categories | None = None
    trained_on: str | None = None  # the only images that the weights know, if they are special

    def entries(self) -> dict[str, str]:
        """Convert to the entries of a file; configuration and categories become JSON."""
        entries = {}
        if self.config is not None:
            sections = {section: vars(getattr(self.config, section)) for section in SECTIONS}
            entries[CONFIG] = json.dumps({"name": self.config.name, **sections})
        if self.categories is not None:
            entries[CATEGORIES] = json.dumps(self.categories.as_table())
        if self.trained_on is not None:
            entries[TRAINED_ON] = self.trained_on
        return entries


def describe(network: SpatialFlow) -> Description:
    """Collect the description of a network; without categories if those of its configuration cannot be read."""
    try:
        categories = network_categories(network)
    except CategoryError:
        categories = None
    return Description(network.config, categories, network.trained_on)


def read_description(entries: Mapping[str, str]) -> Description:
    """Read the entries of a file.

    Raises:
        ValueError: an entry is damaged, or its values break a rule of the configuration or of category tables.
    """
    config = categories = None
    if CONFIG in entries:
        settings = _mapping(entries, CONFIG)
        config = make_config(str(settings.pop("name", "")), settings)
    if CATEGORIES in entries:
        categories = Categories.from_table(_mapping(entries, CATEGORIES), CATEGORIES)
    if config is not None and categories is not None:
        _check_counts(config, categories)
    trained_on = entries.get(TRAINED_ON)
    if trained_on is not None and not (trained_on.isprintable() and len(trained_on) <= 200):
        raise ValueError(f"{TRAINED_ON} must be one line of at most 200 printable characters")
    return Description(config, categories, trained_on)


def _check_counts(config: Config, categories: Categories) -> None:
    """Raise ValueError if the network has not one output for each class."""
    model, things, stuff = config.model, len(categories.things), len(categories.stuff)
    if max(things, 1) != model.num_things or (model.stuff_head and stuff != model.num_stuff):
        raise ValueError(
            f"{CATEGORIES} has {things} things and {stuff} stuff classes, and the network of {CONFIG} has num_things = "
            f"{model.num_things} and num_stuff = {model.num_stuff}"
        )


def _mapping(entries: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        content = json.loads(entries[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a mapping, got {type(content).__name__}")
    return content
