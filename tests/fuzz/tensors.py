# SPDX-License-Identifier: Apache-2.0
"""Construction of tensors from plain data: values and memory layout.

A tensor is described by a dictionary, so that a case can be printed and replayed exactly:

    {"tensor": [2, 3, 4, 5], "dtype": "float32", "values": {"kind": "normal", "seed": 7}, "layout": {"order": ...}}

Its storage ends, or for every fourth tensor begins, at a page without access. An access to this page ends the process.
A read outside the tensor but within the storage returns NaN, the largest integer or True. `Memory.changed` tells
whether anything was written.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOTS = 64
SLOT_BYTES = 1 << 18


class Memory:
    """Slots of memory between pages without access, one for each tensor of a case."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page = mmap.PAGESIZE
        step = SLOT_BYTES + page
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, page + SLOTS * step, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
        for index in range(SLOTS + 1):
            if libc.mprotect(base + index * step, page, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        starts = [base + page + index * step for index in range(SLOTS)]
        buffers = [(ctypes.c_char * SLOT_BYTES).from_address(start) for start in starts]
        self._slots = [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in buffers]
        self._used = 0
        self._slots_in_use: list[Tensor] = []
        self._copies: list[Tensor] = []

    def begin(self) -> None:
        """Mark all slots as free."""
        self._used = 0
        self._slots_in_use, self._copies = [], []

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return `count` elements that end, or in every fourth slot begin, at a page without access.

        Without a free slot that is large enough, the elements are in ordinary memory.
        """
        size = count * dtype.itemsize
        if size > SLOT_BYTES or self._used == SLOTS:
            memory = torch.empty(count, dtype=dtype)
            self._slots_in_use.append(memory.view(torch.uint8))
        else:
            slot = self._slots[self._used]
            memory = slot[SLOT_BYTES - size :] if self._used % 4 != 3 else slot[:size]
            self._used += 1
            self._slots_in_use.append(memory)
            memory = memory.view(dtype)
        if dtype.is_floating_point:
            memory.fill_(float("nan"))
        elif dtype == torch.bool:
            memory.fill_(True)
        else:
            memory.fill_(torch.iinfo(dtype).max)
        return memory

    def remember(self) -> None:
        """Copy the bytes of all tensors, for comparison by `changed`."""
        self._copies = [memory.clone() for memory in self._slots_in_use]

    def changed(self) -> bool:
        return not all(map(torch.equal, self._slots_in_use, self._copies))


def build_tensor(description: dict, memory: Memory) -> Tensor:
    """Build the described tensor, except for its requires_grad."""
    shape, dtype = description["tensor"], getattr(torch, description["dtype"])
    layout = description.get("layout") or {}
    expanded = {d for d in layout.get("expand", ()) if d < len(shape)}
    stored_shape = [1 if d in expanded and size > 0 else size for d, size in enumerate(shape)]
    strides = strides_of(stored_shape, layout)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(stored_shape, strides)) if all(stored_shape) else 0
    start = layout.get("offset", 0)
    flat = memory.take(start + extent + layout.get("tail", 0), dtype)
    values = make_values(description["values"], shape, dtype)
    for d in expanded:
        values = values.narrow(d, 0, stored_shape[d])
    start += flat.storage_offset()
    flat.as_strided(stored_shape, strides, start).copy_(values)
    ones = layout.get("ones", ())
    final = []
    for d, (size, stride) in enumerate(zip(shape, strides)):
        if d in expanded:
            stride = 0
        elif size == 1 and d < len(ones) and ones[d] is not None:
            stride = ones[d]
        final.append(stride)
    return flat.as_strided(shape, final, start)


def strides_of(shape: list[int], layout: dict) -> list[int]:
    """Return strides for dimensions in `layout["order"]`, outermost first, with the gaps of the layout."""
    order = [d for d in layout.get("order", range(len(shape))) if d < len(shape)]
    pads, steps = layout.get("pads", ()), layout.get("steps", ())
    strides, running = [0] * len(shape), 1
    for d in reversed(order):
        step = steps[d] if d < len(steps) else 1
        strides[d] = running * step
        running *= (max(shape[d], 1) + (pads[d] if d < len(pads) else 0)) * step
    return strides


def make_values(values: dict, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Generate values of a kind in KINDS; write the numbers listed in "special" to random positions."""
    rng = np.random.default_rng(values["seed"])
    numbers = KINDS[values["kind"]](rng, shape, values, dtype)
    numbers = np.asarray(numbers, dtype=np.float64 if dtype.is_floating_point else None)
    special = values.get("special", ())
    if special and numbers.size:
        flat = numbers.reshape(-1)
        places = rng.integers(0, flat.size, size=len(special))
        flat[places] = [special_number(name, dtype) for name in special]
        numbers = flat.reshape(shape)
    return torch.from_numpy(np.ascontiguousarray(numbers)).reshape(shape).to(dtype)


def special_number(name: str, dtype: torch.dtype) -> float:
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return {"max": limits.max, "-max": limits.min}.get(name, 0)
    limits = torch.finfo(dtype)
    named = {
        "-0": -0.0,
        "max": limits.max,
        "-max": limits.min,
        "tiny": limits.tiny,
        "denormal": limits.smallest_normal / 8,
        "huge": limits.max / 1000,
    }
    return named[name] if name in named else float(name)


def _normal(rng: Any, shape: list[int], values: dict, _: Any) -> np.ndarray:
    return rng.standard_normal(shape) * values.get("scale", 1.0)


def _grid(rng: Any, shape: list[int], values: dict, _: Any) -> np.ndarray:
    """Generate multiples of a quarter, whose short sums and products are exact in every dtype."""
    return rng.integers(-8, 9, size=shape) / 4 * values.get("scale", 1.0)


def _few(rng: Any, shape: list[int], values: dict, _: Any) -> np.ndarray:
    """Generate few distinct values, so that many are equal."""
    return rng.integers(0, 3, size=shape) / 2 * values.get("scale", 1.0)


def _integers(rng: Any, shape: list[int], values: dict, dtype: torch.dtype) -> np.ndarray:
    """Generate integers from "low" to "high", clipped to the range of the dtype."""
    limits = torch.iinfo(dtype) if not (dtype.is_floating_point or dtype == torch.bool) else None
    low, high = values.get("low", 0), values.get("high", 1)
    if limits is not None:
        low, high = max(low, limits.min), min(high, limits.max)
    return rng.integers(low, max(low, high) + 1, size=shape)


def _blocks(rng: Any, shape: list[int], values: dict, dtype: torch.dtype) -> np.ndarray:
    """Generate integers that are constant in blocks of 3 x 3 pixels, like masks and label maps."""
    small = [*shape[:-2], *[-(-side // 3) for side in shape[-2:]]]
    numbers = _integers(rng, small, values, dtype)
    return numbers.repeat(3, axis=-2).repeat(3, axis=-1)[..., : shape[-2], : shape[-1]].copy()


def _boxes(rng: Any, shape: list[int], values: dict, _: Any) -> np.ndarray:
    """Generate rows of x1, y1, x2, y2, with the image index in front if there are five columns.

    "extent" is the width and height of the image. Coordinates are multiples of "step" (0: any). "batch" is the number
    of images. With "hostile", some rows are reversed, empty, as large as the image, far outside or not finite, or have
    an invalid image index. With "far" as well, some have a coordinate with an absolute value from 65504 to 3e38.
    """
    *lead, count, columns = shape
    width, height = values["extent"]
    rows = int(np.prod([*lead, count], dtype=np.int64))
    size = np.array([width, height])
    corner = (rng.random((rows, 2)) * 1.3 - 0.15) * size
    far_corner = corner + rng.random((rows, 2)) ** 2 * size
    if rng.random() < 0.5:  # repeat some boxes
        chosen = rng.integers(0, max(rows, 1), rows) // 2
        corner, far_corner = corner[chosen], far_corner[chosen]
    boxes = np.concatenate([corner, far_corner], axis=1)
    step = values.get("step", 0)
    if step:
        boxes = np.round(boxes / step) * step
    index = rng.integers(0, max(values.get("batch", 1), 1), size=(rows, 1)).astype(float)
    if values.get("hostile"):
        for row in range(rows):
            _alter(rng, boxes, index, row, width, height, values)
    boxes = np.concatenate([index, boxes], axis=1) if columns == 5 else boxes
    return boxes.reshape(shape)


def _alter(rng: Any, boxes: np.ndarray, index: np.ndarray, row: int, width: float, height: float, values: dict) -> None:
    kind = rng.integers(0, 14)
    if kind == 0:
        boxes[row] = boxes[row, [2, 3, 0, 1]]
    elif kind == 1:
        boxes[row, 2:] = boxes[row, :2]
    elif kind == 2:
        boxes[row] = [0, 0, width, height]
    elif kind == 3:
        boxes[row, rng.integers(0, 4)] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == 4:
        boxes[row] += rng.choice([-1, 1]) * 2 * max(width, height)
    elif kind == 5:
        index[row] = rng.choice([-1, values.get("batch", 1), np.nan, 1e9, -0.5, 0.5])
    elif kind == 6:
        boxes[row] = boxes[row, [2, 1, 0, 3]]
    elif kind == 7 and values.get("far"):
        boxes[row, rng.integers(0, 4)] = rng.choice([1e30, -1e30, 3e38, -3e38, 65504, 1e9])


KINDS = {"normal": _normal, "grid": _grid, "few": _few, "integers": _integers, "blocks": _blocks, "boxes": _boxes}
