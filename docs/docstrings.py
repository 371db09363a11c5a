# SPDX-License-Identifier: Apache-2.0
"""Griffe extension: sections of docstrings that Griffe does not read by itself."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Render `Example` as `Examples`, and the fields of a NamedTuple as `Attributes`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Edit the docstring of an object; Griffe calls this once for each."""
        if obj.docstring is None:
            return
        obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
        if isinstance(obj, griffe.Class) and any(str(base) == "NamedTuple" for base in obj.bases):
            obj.docstring.value += _attributes(obj.source)


def _attributes(source: str) -> str:
    """Return the section `Attributes` from fields in the form `name: type = default  # comment`."""
    fields = re.findall(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+?)?(?:  # type: ignore\S*)?(?:  # (.+))?$", source, re.M)
    lines = [f"    {name} ({kind}): {comment.removesuffix('; hides tuple.count')}" for name, kind, comment in fields]
    return "\n\nAttributes:\n" + "\n".join(lines)
