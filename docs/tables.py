# SPDX-License-Identifier: Apache-2.0
"""Write the tables of configuration.md and models.md from the package: `python docs/tables.py`.

A table stands between a comment that names it and `<!-- end -->`: `<!-- fields: model -->` is the table of a section's
fields, and `<!-- configurations -->` and `<!-- ablations -->` are tables of the package's YAML files.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import tokenize
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this tree; its configuration needs neither torch nor a build

from spatialflow.config import SECTIONS  # noqa: E402  (after the change of sys.path)

PAGES = tuple(ROOT / "docs" / name for name in ("configuration.md", "models.md"))


def with_tables(page: str) -> str:
    """Return the text of a page with its tables made again."""

    def table(match: re.Match[str]) -> str:
        kind, _, section = match[1].partition(": ")
        if kind == "fields":
            rows = fields_table(section)
        else:
            rows = configurations_table(*(("*", "ablation_*") if kind == "configurations" else ("ablation_*",)))
        return f"<!-- {match[1]} -->\n\n{rows}\n\n<!-- end -->"

    return re.sub(r"<!-- (fields: \w+|configurations|ablations) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def fields_table(section: str) -> str:
    """Return the fields of a section of the configuration as a Markdown table."""
    comments = _comments(SECTIONS[section])
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(SECTIONS[section]):
        meaning = field.metadata.get("help") or comments.get(field.name, "")
        cells = (f"`{field.name}`", f"`{_type_name(field.type)}`", f"`{_yaml(field.default)}`", meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def configurations_table(pattern: str, excluded: str = "") -> str:
    """Return the configurations with matching names, their bases and changes, as a Markdown table."""
    import yaml

    rows = ["| configuration | based on | fields that differ |", "|---|---|---|"]
    for path in sorted((ROOT / "spatialflow" / "configs").rglob("*.yaml")):
        if not fnmatch(path.stem, pattern) or fnmatch(path.stem, excluded):
            continue
        content = yaml.safe_load(path.read_text()) or {}
        base = content.pop("base", None)
        changes = [f"{name}: {_yaml(value)}" for fields in content.values() for name, value in fields.items()]
        listed = ", ".join(f"`{change}`" for change in changes) or "none"
        rows.append(f"| `{path.stem}` | {f'`{base}`' if base else 'the defaults'} | {listed} |")
    return "\n".join(rows)


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)


def _yaml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comments(section: type) -> dict[str, str]:
    """Return the comments of the fields in the source, by field name."""
    source = inspect.getsource(section)
    comment_by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: " ".join(
            comment_by_line[line] for line in range(node.lineno, node.end_lineno + 1) if line in comment_by_line
        )
        for node in fields
    }


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
