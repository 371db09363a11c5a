# SPDX-License-Identifier: Apache-2.0
"""Category tables, and the numbering of their classes in a network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from spatialflow.config import Config
from spatialflow.panoptic.rules import is_color
from spatialflow.structures import UNLABELED

TABLES = Path(__file__).resolve().parent / "tables"
COCO_OTHER_ID = 183
"""Id of COCO's category "other", which stands for all thing pixels in semantic maps. No segment has this category."""


class CategoryError(ValueError):
    """A category table that cannot be read, or does not fit the network; the message names the table and the rule."""


class Category(NamedTuple):
    """One row of a COCO category table."""

    id: int  # as in the annotations
    name: str
    isthing: bool
    color: tuple[int, int, int]  # red, green, blue


class Categories:
    """A category table with the numbering of the network's outputs.

    Things are numbered in the order of the table. Stuff classes are numbered in the order of category ids. Where the
    network has one stuff class more than the table, that class is "other": all pixels of things. COCO places it by its
    id 183 among the stuff ids (index 36), other tables after their last stuff class.

    Args:
        rows: COCO category rows: mappings with `id`, `isthing` (0 or 1) and, where given, `name` and `color`.
        has_other: whether the stuff classes include "other".
        other_id: id that decides the index of "other"; None: after the last stuff class.
        source: name of the table for error messages.

    Attributes:
        rows: the rows in the order of the table.
        things, stuff: the rows by label; `stuff` has None at the index of "other".
        other_id: the argument.
        other_index: semantic index of "other", None without it.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        has_other: bool,
        other_id: int | None = None,
        source: str = "categories",
    ) -> None:
        self.rows = tuple(_make_row(row, f"{source}: row {i}") for i, row in enumerate(rows))
        ids = [row.id for row in self.rows]
        if len(set(ids)) != len(ids):
            raise CategoryError(
                f"{source}: category ids must be unique, got {sorted(i for i in set(ids) if ids.count(i) > 1)} twice"
            )
        self.other_id = other_id
        self.things: tuple[Category, ...] = tuple(row for row in self.rows if row.isthing)
        plain_stuff = sorted((row for row in self.rows if not row.isthing), key=lambda row: row.id)
        stuff: list[Category | None] = [*plain_stuff]
        self.other_index: int | None = None
        if has_other:
            before = [i for i, row in enumerate(plain_stuff) if other_id is not None and row.id > other_id]
            self.other_index = before[0] if before else len(stuff)
            stuff.insert(self.other_index, None)
        self.stuff = tuple(stuff)
        if len(self.stuff) >= UNLABELED:
            raise CategoryError(
                f"{source}: at most {UNLABELED - 1} stuff classes fit a semantic map, got {len(self.stuff)}"
            )
        self.thing_label = {row.id: i for i, row in enumerate(self.things)}
        self.stuff_index = {row.id: i for i, row in enumerate(self.stuff) if row is not None}

    @property
    def thing_ids(self) -> np.ndarray:
        """(num_things,) int64: category id by thing label."""
        return np.array([row.id for row in self.things], dtype=np.int64)

    @property
    def stuff_ids(self) -> np.ndarray:
        """(num_stuff,) int64: category id by semantic index, 0 for "other"."""
        return np.array([0 if row is None else row.id for row in self.stuff], dtype=np.int64)

    def semantic_index(self, category_id: int) -> int:
        """Return the semantic index of a category; that of "other" for a thing, 255 for a category without one."""
        if category_id in self.stuff_index:
            return self.stuff_index[category_id]
        if category_id in self.thing_label and self.other_index is not None:
            return self.other_index
        return UNLABELED

    def as_coco(self) -> list[dict[str, Any]]:
        """Return the rows in the format of a COCO panoptic JSON."""
        return [
            {"id": row.id, "name": row.name, "isthing": int(row.isthing), "color": list(row.color)} for row in self.rows
        ]

    def same_classes(self, other: Categories) -> bool:
        """Return whether two tables have the same ids, names, kinds and numbering; colors may differ."""
        first, second = ([row._replace(color=(0, 0, 0)) for row in table.rows] for table in (self, other))
        return first == second and self.other_index == other.other_index

    def __str__(self) -> str:
        """The classes in short, for messages: "3 classes (1 person, 2 rock, ...)"."""
        names = ", ".join(f"{row.id} {row.name:.40}" for row in self.rows[:4])
        return f"{len(self.rows)} classes ({names}{', ...' * (len(self.rows) > 4)})"

    def as_table(self) -> dict[str, Any]:
        """Return all that determines the numbering, as plain values for JSON; `from_table` is the inverse."""
        return {"categories": self.as_coco(), "has_other": self.other_index is not None, "other_id": self.other_id}

    @classmethod
    def from_table(cls, table: Mapping[str, Any], source: str) -> Categories:
        """Make the categories of a mapping from `as_table`; `source` is its name for error messages.

        Raises:
            CategoryError: the mapping has another form.
        """
        rows, has_other, other_id = (table.get(name) for name in ("categories", "has_other", "other_id"))
        if not isinstance(rows, list) or type(has_other) is not bool or type(other_id) not in (int, type(None)):
            raise CategoryError(f"{source}: holds no list of categories with their numbering")
        return cls(rows, has_other, other_id, source)


class Network(Protocol):
    """The attributes of a network that decide its categories."""

    config: Config
    categories: Categories | None


def network_categories(network: Network) -> Categories:
    """Return the categories of a network: those that it was trained or loaded with, else those of its configuration.

    Raises:
        CategoryError: the configuration's categories cannot be read, or do not fit the network.
    """
    if network.categories is not None:
        return network.categories
    return categories_of(network.config)


def categories_of(config: Config) -> Categories:
    """Load the categories of a configuration; errors as for `load_categories`."""
    model = config.model
    return load_categories(config.data.categories, model.num_things, model.num_stuff, model.stuff_head)


def table_path(table: str | Path) -> Path:
    """Return the path of a category table: of the package, if it has one of that name, else `table` itself."""
    packaged = TABLES / f"{table}.json"
    return packaged if os.path.isfile(packaged) else Path(table)


def load_categories(
    table: str | Path | None, num_things: int, num_stuff: int, has_stuff_head: bool = True
) -> Categories:
    """Load the categories of a network.

    Args:
        table: "coco", "cityscapes", "synthetic" or a JSON file (a COCO category list, or a COCO or panoptic file with
            `categories`). None: classes numbered from id 1, first things and then stuff, without "other".
        num_things: thing classes of the network; 1 for a table without things, whose network detects nothing.
        num_stuff: stuff classes of the network; one more than in the table adds the class "other".
        has_stuff_head: False: `num_stuff` need not fit the table.

    Raises:
        CategoryError: the file is absent or holds no category list, or the numbers of classes do not fit.
    """
    if table is None:
        rows = [{"id": i + 1, "name": f"thing {i + 1}", "isthing": 1} for i in range(num_things)]
        rows += [{"id": num_things + i + 1, "name": f"stuff {i + 1}", "isthing": 0} for i in range(num_stuff)]
        return Categories(rows, has_other=False)
    rows = read_rows(table_path(table))
    things, stuff = sum(bool(row["isthing"]) for row in rows), sum(not row["isthing"] for row in rows)
    if max(things, 1) != num_things or (has_stuff_head and num_stuff not in (stuff, stuff + 1)):
        raise CategoryError(
            f"{table}: has {things} things and {stuff} stuff classes; the network has num_things = {num_things} and "
            f'num_stuff = {num_stuff} (as many as the table, or one more for "other")'
        )
    return Categories(
        rows,
        has_other=num_stuff == stuff + 1,
        other_id=COCO_OTHER_ID if str(table) == "coco" else None,
        source=str(table),
    )


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the category rows of a JSON file: a list of them, or a mapping with the list under `categories`.

    Raises:
        CategoryError: the file cannot be read or holds no such rows.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CategoryError(
            f"categories: must be coco, cityscapes, synthetic or a JSON file; {path} cannot be read: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CategoryError(f"{path}: not a JSON file: {error}") from None
    rows = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise CategoryError(f"{path}: holds no list of categories")
    for i, row in enumerate(rows):
        _make_row(row, f"{path}: categories[{i}]")
    return rows


def _make_row(row: Any, location: str) -> Category:
    """Make a category from a row of a table; raise CategoryError, which begins with `location`, for an invalid row."""
    if not isinstance(row, Mapping) or type(row.get("id")) is not int or row.get("isthing") not in (0, 1):
        raise CategoryError(f'{location} must be a mapping with an integer "id" and "isthing" 0 or 1, got {row!r:.80}')
    if not -(2**63) <= row["id"] < 2**63:
        raise CategoryError(f"{location}: id must fit 64 bits, got {row['id']!r:.80}")
    color = row.get("color") or _default_color(row["id"])
    if not is_color(color):
        raise CategoryError(f'{location}: "color" must be three numbers from 0 to 255, got {color!r:.80}')
    red, green, blue = (int(c) for c in color)
    name = str(row.get("name", f"category {row['id']}"))
    return Category(row["id"], name, bool(row["isthing"]), (red, green, blue))


def _default_color(category_id: int) -> tuple[int, int, int]:
    """Derive a color from the id, for tables without colors."""
    red, green, blue = np.random.RandomState(category_id % 2**32).randint(40, 220, 3).tolist()
    return red, green, blue
