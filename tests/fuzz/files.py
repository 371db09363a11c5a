# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for readers of files: a valid file and a few edits of its structure, as plain data.

A case is a dictionary:

    op         name in FILES
    arguments  "base": index of an unedited file; "edits": list of [kind, place, value], a name and two integers
               (see `fuzz.mutate`)
    valid      False: the reader may refuse the file

This module does not import the readers.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from fuzz import mutate

PLACE = st.integers(0, 1 << 16)  # position in units of 1 / 65536 of the file size, or index of a part
VALUE = st.integers(0, 1 << 16)


def edits(kinds: tuple[str, ...], most: int = 3) -> st.SearchStrategy:
    """Up to `most` edits of these kinds; Hypothesis shrinks to an unchanged file."""
    edit = st.tuples(st.sampled_from(kinds), PLACE, VALUE).map(list)
    return st.lists(edit, max_size=most)


BYTES, CHUNKS, TREES = mutate.BYTE_EDITS, mutate.CHUNK_EDITS, mutate.TREE_EDITS
ANY_BYTES = edits(BYTES)
TREE_OR_BYTES = st.one_of(edits(TREES), edits(TREES), edits(TREES), ANY_BYTES)

FILES: dict[str, tuple[int, st.SearchStrategy]] = {
    "png_id_map": (4, st.one_of(edits(CHUNKS), edits(CHUNKS), ANY_BYTES)),
    "photograph": (8, st.one_of(edits(CHUNKS), ANY_BYTES)),
    "panoptic_json": (5, TREE_OR_BYTES),
    "detections_json": (2, st.one_of(TREE_OR_BYTES, edits(("counts",)))),
    "categories_json": (2, TREE_OR_BYTES),
    "cityscapes": (3, st.one_of(edits(CHUNKS), edits(TREES), ANY_BYTES)),
    "checkpoint": (10, st.one_of(edits(TREES), edits(TREES), ANY_BYTES, edits(("inner",)))),
    "safetensors": (2, TREE_OR_BYTES),
    "run_checkpoint": (2, st.one_of(edits(TREES), edits(TREES), ANY_BYTES, edits(("inner",)))),
    "configuration": (4, TREE_OR_BYTES),
    "setting": (1 << 16, edits(("text",), 2)),
}
"""Number of unedited files, and strategy of their edits, by kind of file."""


@st.composite
def file_cases(draw: Any, kind: str) -> dict:
    """Cases of one kind of file."""
    bases, changes = FILES[kind]
    arguments = {"base": draw(st.integers(0, bases - 1)), "edits": draw(changes)}
    return {"op": kind, "arguments": arguments, "valid": not arguments["edits"]}
