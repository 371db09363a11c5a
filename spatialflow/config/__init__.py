# SPDX-License-Identifier: Apache-2.0
"""Settings of a model, of inference, data and training, as frozen dataclasses.

A configuration has four sections: `model` (the architecture), `test` (inference), `data` and `training`. Field names
are unique over the sections, so that an override needs no section: `build_model(name, fpn_channels=64)`. `describe`
lists all fields with their types, defaults, rules and documentation.
"""

from spatialflow.config.load import list_configs, load_config, own_settings
from spatialflow.config.parse import given_fields, make_config, parse_settings, place_overrides
from spatialflow.config.rules import ConfigError
from spatialflow.config.sections import (
    MAX_SIZE_DIVISOR,
    SECTIONS,
    Config,
    DataConfig,
    FieldDescription,
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
    describe,
)

__all__ = [
    "MAX_SIZE_DIVISOR",
    "SECTIONS",
    "Config",
    "ConfigError",
    "DataConfig",
    "FieldDescription",
    "InferenceConfig",
    "ModelConfig",
    "TrainingConfig",
    "describe",
    "given_fields",
    "list_configs",
    "load_config",
    "make_config",
    "own_settings",
    "parse_settings",
    "place_overrides",
]
