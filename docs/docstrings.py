# SPDX-License-Identifier: Apache-2.0
"""Griffe extension: render the section `Example` of a docstring as Python code, as Griffe does for `Examples`."""

from __future__ import annotations

from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Rename the section in the docstring of each object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section; called once for each module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
