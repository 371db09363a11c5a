# SPDX-License-Identifier: Apache-2.0
"""The names of categories in two files: contradictions of one id, and the ids of equal names."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from spatialflow.panoptic.rules import PanopticFormatError


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


def check_names(truth: Any, truth_name: str, prediction: Any, prediction_name: str) -> None:
    """Check that the categories of a prediction have the names that they have in the ground truth.

    Args:
        truth: list of categories of the ground truth.
        truth_name: what messages call it.
        prediction: list of categories of the prediction; anything else has no names.
        prediction_name: what messages call it.

    Raises:
        PanopticFormatError: one id has two names.
    """
    names, other_names = names_by_id(truth), names_by_id(prediction)
    for number in different_names(names, other_names):
        raise PanopticFormatError(
            f"{prediction_name}: category {number} is {other_names[number]!r:.60}, in the ground truth {truth_name} it "
            f"is {names[number]!r:.60}; the prediction is of a model with other classes; predict with a model of the "
            f'ground truth\'s classes, or remove "categories" from the prediction if both names mean one class'
        )


def different_names(first: Mapping[int, str], second: Mapping[int, str]) -> list[int]:
    """List the ids with different names, in the order of `second`; case, blanks, "_" and "-" do not count."""
    return [number for number in second if number in first and _key(first[number]) != _key(second[number])]


def moved_names(first: Mapping[int, str], second: Mapping[int, str]) -> list[int]:
    """List the ids of `second` that `first` lacks although it has their names, under other ids."""
    known = {_key(name) for name in first.values()}
    return [number for number, name in second.items() if number not in first and _key(name) in known]


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
