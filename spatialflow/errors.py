# SPDX-License-Identifier: Apache-2.0
"""Parts of messages: the warning category of defects in input files, suggestions for misspelled names, escapes."""

import difflib
import re
from collections.abc import Iterable


class DataWarning(UserWarning):
    """A defect of an input file that does not prevent its use."""


def did_you_mean(word: str, names: Iterable[str], count: int = 1) -> str:
    """Return "; did you mean NAME?" for at most `count` names that are similar to a word, "" if there are none."""
    similar = difflib.get_close_matches(word, list(dict.fromkeys(names)), n=count)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def printable(text: str) -> str:
    """Escape control characters, such as line breaks in names of files, and bytes of names that are not text."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: repr(match[0])[1:-1], text)
