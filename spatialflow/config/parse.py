# SPDX-License-Identifier: Apache-2.0
"""Conversion of plain settings (from YAML, the command line or Python) to a `Config`."""

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from spatialflow.config.rules import ConfigError, require_value, short_repr
from spatialflow.config.sections import SECTIONS, Config
from spatialflow.errors import did_you_mean
from spatialflow.requirements import require_packages


def make_config(name: str, settings: Mapping[str, Mapping[str, Any]]) -> Config:
    """Check plain settings, section by section, and build a Config from them.

    Raises:
        ConfigError: unknown section or field, wrong type, or a value that breaks a rule.
    """
    sections = {}
    for section, values in settings.items():
        if section not in SECTIONS:
            raise ConfigError(f"{name}: unknown section {short_repr(section)}; sections are {', '.join(SECTIONS)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: section '{section}' must hold 'field: value' lines, got {short_repr(values)}")
        try:
            sections[section] = _make_section(SECTIONS[section], values)
        except ConfigError as error:
            raise ConfigError(f"{name}: {section}.{error}") from None
    return Config(name=name, **sections)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Parse "FIELD=VALUE" strings, whose values are in YAML, to overrides.

    Raises:
        ConfigError: a string without "=", or a value that is not YAML.
    """
    overrides = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"settings have the form FIELD=VALUE, got {short_repr(setting)}")
        try:
            overrides[name] = read_yaml(text)
        except ConfigError:
            raise ConfigError(f"{name:.80}: {short_repr(text)} is not a YAML value") from None
    return overrides


def read_yaml(text: str) -> Any:
    """Parse a YAML text; raise ConfigError ("is not YAML: ...") if that fails."""
    require_packages("yaml")
    import yaml

    try:
        return yaml.safe_load(text)
    except Exception as error:  # conversion of numbers, dates and the like raises other exceptions than YAMLError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"is not YAML: {reason:.200}") from None


def place_overrides(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group overrides by section.

    A key is a field's name, "section.field", or a section with a mapping of fields as its value.

    Raises:
        ConfigError: no section has the field; similar names are suggested.
    """
    placed: dict[str, dict[str, Any]] = {}
    section_by_field = {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    for key, value in overrides.items():
        if key in SECTIONS and isinstance(value, Mapping):
            placed.setdefault(key, {}).update(value)
            continue
        section, dot, name = key.partition(".")
        if not dot:
            section, name = section_by_field.get(key, ""), key
        if section_by_field.get(name) != section:
            hint = did_you_mean(name, section_by_field, count=3)
            raise ConfigError(f"no such field: {short_repr(key)}{hint or '; docs/configuration.md lists all'}")
        placed.setdefault(section, {})[name] = value
    return placed


def given_fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Map the names of the fields that overrides set to their values, whatever form the overrides have."""
    return {name: value for section in place_overrides(overrides).values() for name, value in section.items()}


def _make_section(section: type, values: Mapping[str, Any]) -> Any:
    type_by_field = typing.get_type_hints(section)
    converted = {}
    for name, value in values.items():
        if name not in type_by_field:
            hint = did_you_mean(str(name), type_by_field)
            raise ConfigError(f"{short_repr(name)}: no such field{hint} (value {short_repr(value)})")
        converted[name] = _convert(name, type_by_field[name], value)
    return section(**converted)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """Convert `value` to the type `kind`: lists become tuples, integers become floats where a float is expected."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return _convert(name, inner[0], value)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        require_value(isinstance(value, (list, tuple)), name, f"must be a list of {item.__name__}", value)
        return tuple(_convert(name, item, v) for v in value)
    if kind is float:
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
            value = float(value)  # YAML 1.1 reads 1e-3, which has no decimal point, as a string
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require_value(is_number, name, "must be a number", value)
        require_value(abs(value) <= sys.float_info.max, name, "must be finite", value)  # false for NaN
        return float(value)
    has_type = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require_value(has_type, name, f"must be of type {kind.__name__}", value)
    if kind is int:
        require_value(-(1 << 63) < value < 1 << 63, name, "must lie between -2 ** 63 and 2 ** 63", value)
    return value
