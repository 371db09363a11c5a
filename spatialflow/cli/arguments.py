# SPDX-License-Identifier: Apache-2.0
"""The parser of a command: settings and images anywhere, and suggestions for misspelled names.

An option takes as many words as it declares, whatever follows, so that no option takes an image that follows it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import spatialflow
from spatialflow.cli.common import print_error
from spatialflow.errors import did_you_mean

SETTING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?=")
"""Beginning of a word FIELD=VALUE; the field may have its section, as in test.score_threshold=0.1."""

Completer = Callable[..., Iterable[str]]
"""A function that argcomplete calls with `prefix`, the word typed so far, and further keywords."""


def numbers(text: str) -> list[int]:
    """Convert the value of an option, such as "256x384" or "600,800", to integers."""
    try:
        return [int(part) for part in re.split("[x,]", text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, such as 256x384 or 600,800, got {text!r:.80}") from None


def add_settings_option(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the option `--set`; `CommandParser` reads every word FIELD=VALUE as a value of it."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help=f"value of a field of the configuration, e.g. {example}; the word --set may be left out",
    )


def is_field(word: str) -> bool:
    """Tell whether a word is the name of a field of a configuration, with or without its section."""
    from spatialflow.config import SECTIONS

    section, _, field = word.rpartition(".")
    return any(field in kind.__annotations__ for name, kind in SECTIONS.items() if section in ("", name))


def add_completed(parser: Any, *names: str, completer: Completer, **options: Any) -> None:
    """Add an argument whose values the shell completes."""
    parser.add_argument(*names, **options).completer = completer


class Parser(argparse.ArgumentParser):
    """A parser with the option `--version`, and errors of one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--version", action="version", version=f"spatialflow {spatialflow.__version__}")

    def error(self, message: str) -> NoReturn:
        """Print the error without the whole usage, or the help if the command is missing, and exit with code 2."""
        if self._subparsers is not None and message.startswith("the following arguments are required"):
            self.print_help(sys.stderr)
            self.exit(2)
        for kind, rule in (("int", "an integer"), ("float", "a number")):
            message = message.replace(f"invalid {kind} value:", f"must be {rule}, got")
        print_error(f"{message} (see `{self.prog} --help`)")
        self.exit(2)


class CommandParser(Parser):
    """A parser whose positional arguments and settings may stand anywhere between the options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Put the words in order, and parse them as argparse does."""
        is_completion = "_ARGCOMPLETE" in os.environ  # the shell asks for what comes after the last word
        has_actions = self._subparsers is not None  # the words after an action are for the parser of the action
        if args is not None and not is_completion and not has_actions:
            args = self._in_order(list(args))
        return super().parse_known_args(args, namespace)

    def _in_order(self, words: list[str]) -> list[str]:
        """Put options with their values first, then the positional arguments; settings become values of `--set`."""
        options: list[str] = []
        positionals: list[str] = []
        lacks_value = False
        takes_settings = "--set" in self._option_string_actions
        while words:
            word = words.pop(0)
            if word == "--":
                positionals += words
                break
            if _is_option(word):
                options.append(word)
                action = self._action(word)
                if action is not None and "=" not in word:
                    values = _take_values(action, words)
                    options += values
                    lacks_value = lacks_value or (not values and action.nargs not in (0, "?", "*"))
            elif takes_settings and SETTING.match(word) and not os.path.exists(word):
                options.append(f"--set={word}")
            else:
                positionals.append(word)
        # Without "--" an option at the end that lacks its value would take the first positional argument.
        separator = ["--"] if lacks_value or any(_is_option(word) for word in positionals) else []
        return options + separator + positionals

    def _takes_settings(self) -> bool:
        return any("FIELD=VALUE" in str(action.metavar) for action in self._actions)

    def _action(self, word: str) -> argparse.Action | None:
        """Find the option of a word, which may be shortened; None if several options begin with it."""
        name = word.partition("=")[0]
        actions = self._option_string_actions
        if name in actions:
            return actions[name]
        matching = [option for option in actions if option.startswith(name) and name.startswith("--")]
        if not matching:
            field = name.strip("-").replace("-", "_")
            if self._takes_settings() and is_field(field):
                self.error(f"no such option: {name}; {field} is a setting: {field}=VALUE")
            self.error(f"no such option: {name:.80}{did_you_mean(name, actions)}")
        return actions[matching[0]] if len(matching) == 1 else None


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not re.fullmatch(r"-\d+(\.\d+)?", word)


def _take_values(action: argparse.Action, words: list[str]) -> list[str]:
    """Remove the values of an option from the front of the words that follow it.

    Numbers may be given as several words, as in --size 256 384, except a number that is the name of a file.
    """
    if isinstance(action.nargs, int):
        limit = action.nargs
    else:
        limit = len(words) if action.nargs in ("*", "+") else 1
    values: list[str] = []
    while words and len(values) < limit and not _is_option(words[0]):
        values.append(words.pop(0))
    if action.type is numbers and values:
        while words and re.fullmatch(r"\d+", words[0]) and not os.path.exists(words[0]):
            values.append(words.pop(0))
        return [",".join(values)]
    return values
