# SPDX-License-Identifier: Apache-2.0
"""Rules for the values of settings, declared beside each field of a configuration section."""

import dataclasses
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Value = TypeVar("Value")

_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = _short_repr.maxlong = 80
_short_repr.maxlevel = 3


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, the rule and the value."""


class Rule(NamedTuple):
    """A condition on the value of one field."""

    text: str  # follows the field's name in an error message, for example "must be positive"
    holds: Callable[[Any], bool]


POSITIVE = Rule("must be positive", lambda value: value > 0)
NOT_NEGATIVE = Rule("must not be negative", lambda value: value >= 0)
POSITIVE_OR_NULL = Rule("must be positive or null", lambda value: value is None or value > 0)
ALL_POSITIVE = Rule("must be positive", lambda values: all(value > 0 for value in values))
RGB = Rule("must be three numbers (RGB)", lambda values: len(values) == 3)


def within(low: int, high: int) -> Rule:
    """Require a number from `low` to `high`, both included."""
    return Rule(f"must lie in {low}..{high}", lambda value: low <= value <= high)


def one_of(*choices: Any) -> Rule:
    """Require one of two or more values."""
    texts = ["null" if choice is None else repr(choice) for choice in choices]
    return Rule(f"must be {', '.join(texts[:-1])} or {texts[-1]}", lambda value: value in choices)


def one_or_more_positive(noun: str) -> Rule:
    """Require a list that is not empty, of positive values; `noun` names the values in the error message."""
    return Rule(f"must be one or more positive {noun}", lambda values: bool(values) and all(v > 0 for v in values))


def multiple_of(divisor: int, limit: int) -> Rule:
    """Require a multiple of `divisor` that is at most `limit`."""
    text = f"must be a multiple of {divisor} up to {limit}"
    return Rule(text, lambda value: value % divisor == 0 and value <= limit)


def setting(default: Value, help: str, *rules: Rule) -> Value:
    """Declare a field of a section: its default value, its documentation, and the rules that its value must obey.

    The annotated return type is that of the field, as type checkers read `name: type = setting(...)`.
    """
    field: Any = dataclasses.field(default=default, metadata={"help": help, "rules": rules})
    return field


def check_rules(section: Any) -> None:
    """Raise ConfigError unless the value of every field of a section obeys the rules of that field."""
    for field in dataclasses.fields(section):
        for rule in field.metadata["rules"]:
            require(section, field.name, rule.holds(getattr(section, field.name)), rule.text)


def require(section: Any, name: str, holds: bool, rule: str) -> None:
    """Apply `require_value` to the value of a field of a section."""
    require_value(holds, name, rule, getattr(section, name))


def require_value(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raise ConfigError with the name of a field, a rule and a value unless the rule `holds`."""
    if not holds:
        raise ConfigError(f"{name}: {rule}, got {short_repr(value)}")


def short_repr(value: Any) -> str:
    """Return `repr(value)`, shortened to about 200 characters.

    YAML aliases can build values whose whole text would fill the memory.
    """
    try:
        text = _short_repr.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
