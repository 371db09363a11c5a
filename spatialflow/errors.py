# SPDX-License-Identifier: Apache-2.0
"""Parts of messages: the warning category of defects in input files, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable


class DataWarning(UserWarning):
    """A defect of an input file that does not prevent its use."""


def did_you_mean(word: str, names: Iterable[str], count: int = 1) -> str:
    """Return "; did you mean NAME?" for at most `count` names that are similar to a word, "" if there are none."""
    similar = difflib.get_close_matches(word, list(dict.fromkeys(names)), n=count)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""
