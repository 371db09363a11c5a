# SPDX-License-Identifier: Apache-2.0
"""The names of categories in two files: contradictions of one id, and the ids of equal names."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def names_by_id(rows: Any) -> dict[int, str]:
    """Map the ids of a list of categories to their names.

    Entries without an integer id or without a name are left out. So are names that only repeat the id, as networks
    without a category table have ("thing 1"). The first entry of an id counts.
    """
    names: dict[int, str] = {}
    for row in rows if isinstance(rows, list) else ():
        number, name = (row.get("id"), row.get("name")) if isinstance(row, Mapping) else (None, None)
        if type(number) is not int or name is None:
            continue
        if not re.fullmatch(rf"((thing|stuff|category) )?{number}", str(name)):
            names.setdefault(number, str(name))
    return names


def different_names(first: Mapping[int, str], second: Mapping[int, str]) -> list[int]:
    """List the ids with different names, in the order of `second`; case, blanks, "_" and "-" do not count."""
    return [number for number in second if number in first and _key(first[number]) != _key(second[number])]


def ids_by_name(names: Mapping[int, str], known: Mapping[int, str]) -> dict[int, int] | None:
    """Map every id of `names` to the id that has its name in `known`; None unless each name is in both exactly once."""
    keys, known_keys = ({number: _key(name) for number, name in table.items()} for table in (names, known))
    counts, known_counts = Counter(keys.values()), Counter(known_keys.values())
    if any(counts[key] != 1 or known_counts[key] != 1 for key in counts):
        return None
    id_of = {key: number for number, key in known_keys.items()}
    return {number: id_of[key] for number, key in keys.items()}


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
