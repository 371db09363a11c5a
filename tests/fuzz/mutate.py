# SPDX-License-Identifier: Apache-2.0
"""Edits of bytes, of PNG chunks, of JPEG segments, and of trees such as JSON.

An edit is [kind, place, value]. `place` is the index of a part, modulo the number of parts, or a position in units of
1 / 65536 of the file. `value` determines the details of the edit, such as a special value or the number of bytes.
"""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Iterator
from typing import Any

BYTE_EDITS = ("set", "flip", "cut", "drop", "repeat", "insert", "number")
CHUNK_EDITS = ("field", "field", "delete", "double", "swap", "length", "checksum", "content", "pixels", "tail")
TREE_EDITS = ("replace", "replace", "replace", "delete", "double", "rename", "move", "letter")
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
LARGE_NUMBERS = (1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def deep(depth: int) -> list:
    """Return an empty list inside `depth` nested lists."""
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    return nested


SPECIAL = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    255,
    256,
    1 << 24,
    (1 << 24) - 1,
    1 << 31,
    1 << 53,
    1 << 63,
    -(1 << 63),
    1 << 64,
    10**30,
    10**400,
    -0.0,
    0.5,
    1e-310,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "a",
    "0",
    "1",
    "-1",
    "nan",
    "1e5",
    "000000000001",
    "a" * 3000,
    "\0",
    "..",
    ".",
    "/",
    "a/b",
    "\ud800",
    "é",
    "\n",
    "%s {0}",
    "1.png",
    [],
    {},
    [[]],
    [None],
    [0],
    [1, 2],
    [0, 0, 0, 0],
    [-5, -5, 3, 3],
    [1e308] * 4,
    ["a", "b", "c", "d"],
    {"id": 1},
    {"counts": "", "size": [0, 0]},
    {"counts": "a" * 50, "size": [48, 64]},
    {"size": [-1, 1 << 40], "counts": "0"},
    lambda: deep(50),
    lambda: deep(500),
)


def mutate_bytes(data: bytes, changes: list) -> bytes:
    """Apply all edits of BYTE_EDITS to bytes; ignore edits of other kinds."""
    content = bytearray(data)
    for kind, place, value in changes:
        at = place * len(content) >> 16
        length = value % 97 + 1
        if kind == "set" and content:
            content[min(at, len(content) - 1)] = value & 0xFF
        elif kind == "flip" and content:
            content[min(at, len(content) - 1)] ^= 1 << value % 8
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = content[at : at + length] * (value % 5 + 1)
        elif kind == "insert":
            content[at:at] = bytes((value * i * 37 + i) & 0xFF for i in range(length))
        elif kind == "number":
            content[at : at + 8 if value & 1 else at + 4] = _number(value)
    return bytes(content)


def _number(value: int) -> bytes:
    """Return a special number as 4 or 8 bytes, big- or little-endian."""
    order = ">" if value & 2 else "<"
    if value & 1:
        return struct.pack(order + "Q", (NUMBERS + LARGE_NUMBERS)[value // 4 % (len(NUMBERS) + len(LARGE_NUMBERS))])
    return struct.pack(order + "I", NUMBERS[value // 4 % len(NUMBERS)])


# ---------------------------------------------------------------------------------------------- PNG and JPEG pictures


def mutate_picture(data: bytes, changes: list) -> bytes:
    """Apply edits of CHUNK_EDITS to chunks of a PNG or segments of a JPEG, then edits of BYTE_EDITS to the bytes.

    In other files, edits of CHUNK_EDITS are ignored.
    """
    split, join = (_png_chunks, _png) if data[:8] == b"\x89PNG\r\n\x1a\n" else (_jpeg_segments, _jpeg)
    structural = [change for change in changes if change[0] in CHUNK_EDITS]
    if structural and (join is _png or data[:2] == b"\xff\xd8"):
        parts = split(data)
        for change in structural:
            _edit_parts(parts, *change)
        data = join(parts)
    return mutate_bytes(data, [change for change in changes if change[0] not in CHUNK_EDITS])


def _edit_parts(parts: list[list], kind: str, place: int, value: int) -> None:
    """Apply one edit in place to a list of parts [name, content, extra].

    `extra` contains wrong values for "length" or "checksum" and, in a JPEG, the "scan" (see `_jpeg_segments`).
    """
    if not parts:
        return
    at = place % len(parts)
    name, content, extra = parts[at]
    if kind == "field" and content:  # a byte or a number of the header or of a table, with correct checksums
        offset = value % min(len(content), 40)
        size = (1, 2, 4)[value // 64 % 3]
        edited = content[:offset] + _number(value & ~1)[-size:] + content[offset + size :]
        parts[at] = [name, edited[: len(content)], extra]
    elif kind == "content":
        parts[at] = [name, mutate_bytes(content, [[BYTE_EDITS[value % len(BYTE_EDITS)], value, place]]), extra]
    elif kind == "pixels":  # other pixels, with correct compression and checksums
        try:
            raw = zlib.decompress(content)
        except zlib.error:
            return
        raw = mutate_bytes(raw, [[BYTE_EDITS[value % len(BYTE_EDITS)], value, place]])
        parts[at] = [name, zlib.compress(raw), extra]
    elif kind == "delete":
        del parts[at]
    elif kind == "double":
        parts.insert(at, list(parts[at]))
    elif kind == "swap":
        target = value % len(parts)
        parts[at], parts[target] = parts[target], parts[at]
    elif kind in ("length", "checksum"):
        parts[at] = [name, content, extra | {kind: NUMBERS[value % len(NUMBERS)]}]
    elif kind == "tail":
        parts.append(["tail", _number(value) * (value % 50), extra])


def _png_chunks(data: bytes) -> list[list]:
    parts, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        parts.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length], {}])
        at += 12 + length
    return parts


def _png(parts: list[list]) -> bytes:
    written = b"\x89PNG\r\n\x1a\n"
    for name, content, extra in parts:
        if name == "tail":
            written += content
            continue
        length = extra.get("length", len(content))
        checksum = extra.get("checksum", zlib.crc32(name + content))
        written += struct.pack(">I", length) + name + content + struct.pack(">I", checksum)
    return written


def _jpeg_segments(data: bytes) -> list[list]:
    """Return the segments as [marker, content, {"scan": compressed data}]; only a start of scan has such data.

    The last part, ["tail", content, {}], is the rest of the file.
    """
    parts, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        scan = end
        while marker[1] == 0xDA and scan + 1 < len(data):
            if data[scan] == 0xFF and data[scan + 1] != 0 and not 0xD0 <= data[scan + 1] <= 0xD7:
                break
            scan += 1
        parts.append([marker, data[at + 4 : end], {"scan": data[end:scan]}])
        at = scan
    return [*parts, ["tail", data[at:], {}]]


def _jpeg(parts: list[list]) -> bytes:
    written = b"\xff\xd8"
    for name, content, extra in parts:
        if name != "tail":
            content = content[: 0xFFFF - 2]
            length = extra.get("length", len(content) + 2) & 0xFFFF
            content = name + struct.pack(">H", length) + content + extra.get("scan", b"")
        written += content
    return written


# ------------------------------------------------------------------------------------------------------------- trees


def mutate_tree(tree: Any, changes: list, special: tuple = SPECIAL) -> Any:
    """Copy mappings, lists and values, and apply all edits of TREE_EDITS to the copy."""
    box = [copy.deepcopy(tree)]
    for kind, place, value in changes:
        if kind not in TREE_EDITS:
            continue
        places = list(_places(box))
        holder, key = places[place % len(places)]
        source, name = places[value % len(places)]
        chosen = special[value % len(special)]
        chosen = chosen() if callable(chosen) else copy.deepcopy(chosen)
        try:
            if kind == "replace":
                holder[key] = chosen
            elif kind == "delete" and holder is not box:
                del holder[key]
            elif kind == "double" and isinstance(holder, list) and holder is not box:
                holder.insert(key, copy.deepcopy(holder[key]))
            elif kind == "rename" and isinstance(holder, dict):
                holder[chosen if isinstance(chosen, str) else str(value % 7)] = holder.pop(key)
            elif kind == "letter" and isinstance(holder[key], str) and holder[key]:
                at = value % len(holder[key])
                holder[key] = holder[key][:at] + chr(33 + value // 7 % 94) + holder[key][at + 1 :]
            elif kind == "move":
                holder[key] = copy.deepcopy(source[name])
        except RecursionError:  # an earlier edit nested the value too deep to copy
            continue
    return box[0]


def _places(holder: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield every (mapping or list, key or index) of a tree, each before its contents, down to a maximum depth."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list) and depth < 60:
            yield from _places(holder[key], depth + 1)
