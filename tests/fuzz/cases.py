# SPDX-License-Identifier: Apache-2.0
"""What is tried: one strategy per operator, giving cases as plain data.

A case is a dictionary:

    op         name in OPERATORS
    arguments  by name: numbers, strings, lists, None, and tensors as `fuzz.tensors` describes them. A tensor with
               "grad": true requires a gradient.
    gradient   values and layout of the gradients that come in, and of tangents
    jvp        whether forward mode is tried as well
    valid      False: something was spoiled; the operator may refuse the call

Nothing here imports torch: strategies run in the supervisor, what they describe is made in the worker. The smaller a
drawn number, and the earlier an element of `sampled_from`, the simpler: Hypothesis shrinks towards them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

FLOATS = ("float32", "float64", "float16", "bfloat16")
SPECIAL = ("-0", "nan", "inf", "-inf", "max", "-max", "huge", "tiny", "denormal")
HUGE_STRIDE = 1 << 40  # of a dimension of size 1, where torch allows any

Draw = Callable[[st.SearchStrategy], Any]


class Limits(NamedTuple):
    """How large tensors become: the interpreter is a hundred times slower than the CPU back end."""

    side: int = 18
    channels: int = 40
    rows: int = 24


CPU = Limits()
SIMT = Limits(side=7, channels=34, rows=9)


@functools.lru_cache(None)
def one_of(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


@functools.lru_cache(None)
def sizes(most: int, least: int = 1) -> st.SearchStrategy:
    """Sizes around those where kernels change their ways; often 1."""
    around = (1, 2, 3, 1, 4, 5, 7, 8, 1, 9, 12, 15, 16, 17, 31, 32, 33, 40, 64, 65, 130)
    return st.sampled_from([size for size in around if least <= size <= most] or [least])


# Few bits, so that they are never drawn twice as "duplicates" but cost one draw.
seeds = st.integers(0, 1 << 20)
# True once in four times; False is simpler.
rarely = st.sampled_from([False, False, False, True])
very_rarely = st.sampled_from([False] * 15 + [True])


@functools.lru_cache(None)
def layouts(dims: int) -> st.SearchStrategy:
    """Layouts of a tensor of `dims` dimensions; None is contiguous."""
    identity = list(range(dims))
    orders = [identity]
    if dims == 4:
        orders += [[0, 2, 3, 1], [0, 2, 3, 1], [0, 1, 3, 2]]
    one_stride = st.sampled_from([None, 0, 1, 2, 3, 7, 64, HUGE_STRIDE])
    some = st.fixed_dictionaries(
        {},
        optional={
            "order": st.one_of(st.sampled_from(orders), st.permutations(identity)),
            "ones": st.lists(one_stride, min_size=dims, max_size=dims),
            "offset": st.integers(1, 5),
            "pads": st.lists(st.sampled_from([0, 0, 1, 3]), min_size=dims, max_size=dims),
            "steps": st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=dims, max_size=dims),
            "tail": st.integers(1, 3),
            "expand": st.lists(st.integers(0, max(dims - 1, 0)), min_size=1, max_size=2, unique=True)
            if dims
            else st.just([]),
        },
    )
    return st.one_of(st.none(), some)


@functools.lru_cache(None)
def features(scale: float = 1.0) -> st.SearchStrategy:
    """Values of floating-point tensors, special ones among them now and then."""
    kinds = st.sampled_from(["normal", "grid", "normal", "few"])
    special = st.one_of(st.just([]), st.just([]), st.just([]), st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=3))
    return st.fixed_dictionaries({"kind": kinds, "seed": seeds, "scale": st.just(scale), "special": special})


@functools.lru_cache(None)
def integers(low: int, high: int, kind: str = "integers", outliers: bool = False) -> st.SearchStrategy:
    special = st.lists(st.sampled_from(["max", "-max"]), max_size=2) if outliers else st.just([])
    return st.fixed_dictionaries(
        {"kind": st.just(kind), "seed": seeds, "low": st.just(low), "high": st.just(high), "special": special}
    )


def tensor(
    draw: Draw, shape: list[int], dtype: str, values: st.SearchStrategy, grad: bool = False, layout: bool = True
) -> dict:
    """A tensor's description; one that may have a gradient has one half of the time."""
    described = {"tensor": list(shape), "dtype": dtype, "values": draw(values)}
    if layout and (chosen := draw(layouts(len(shape)))):
        described["layout"] = chosen
    if grad and draw(st.booleans()):
        described["grad"] = True
    return described


def boxes(
    draw: Draw, lead: list[int], columns: int, dtype: str, extent: tuple[float, float], batch: int = 1, far: bool = False
) -> dict:
    values = st.fixed_dictionaries(
        {
            "kind": st.just("boxes"),
            "seed": seeds,
            "extent": st.just(list(extent)),
            "step": st.sampled_from([1, 0.25, 0]),
            "batch": st.just(batch),
            "hostile": st.booleans(),
            "far": st.just(far),
        }
    )
    return tensor(draw, [*lead, columns], dtype, values)


def pair_or_number(draw: Draw, numbers: st.SearchStrategy) -> Any:
    return draw(st.one_of(numbers, st.lists(numbers, min_size=2, max_size=2)))


# --- operators ---------------------------------------------------------------------------------------------------


def roi_align(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    empty = draw(very_rarely)
    batch = draw(one_of(1, 2, 3, 0)) if empty else draw(one_of(1, 2))
    channels = draw(one_of(0, 1)) if empty else draw(sizes(limits.channels))
    height, width = draw(sizes(limits.side)), draw(sizes(limits.side))
    scale = draw(one_of(1.0, 0.5, 0.25, 2.0, 0.3))
    extent = (width / scale, height / scale)
    count = draw(st.integers(0, limits.rows // 3))
    return {
        "input": tensor(draw, [batch, channels, height, width], dtype, features(), grad=True),
        "boxes": boxes(draw, [count], 5, draw(one_of(*FLOATS)), extent, batch),
        "output_size": pair_or_number(draw, sizes(7)),
        "spatial_scale": scale,
        "sampling_ratio": draw(one_of(0, 1, 2, 3, -1, 7)),
        "aligned": draw(st.booleans()),
    }


def deform_conv2d(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    batch = draw(one_of(1, 2, 3)) if not draw(very_rarely) else 0
    groups, offset_groups = draw(one_of(1, 1, 2, 3)), draw(one_of(1, 1, 2, 3))
    unit = groups * offset_groups if groups != offset_groups else groups
    channels = unit * draw(sizes(max(limits.channels // unit, 1)))
    if draw(very_rarely):
        channels, groups = 0, 1
    outputs = groups * draw(sizes(max(limits.channels // groups, 1)))
    kernel = [draw(one_of(1, 2, 3)), draw(one_of(1, 2, 3))]
    stride, padding, dilation = ([draw(one_of(*some)) for _ in "hw"] for some in ((1, 2, 3), (0, 1, 2), (1, 2, 3)))
    size, out = [], []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        least = max(reach - 2 * padding[axis], 1)
        size.append(least + draw(one_of(0, 1, 2, 0, 3, 5, 6, 9)))
        out.append((size[axis] + 2 * padding[axis] - reach) // stride[axis] + 1)
    samples = offset_groups * kernel[0] * kernel[1]
    sampling_dtype = draw(one_of(dtype, dtype, *FLOATS))
    floats = features()
    return {
        "input": tensor(draw, [batch, channels, *size], dtype, floats, grad=True),
        "offset": tensor(draw, [batch, 2 * samples, *out], sampling_dtype, features(draw(one_of(1.0, 3.0))), grad=True),
        "weight": tensor(draw, [outputs, channels // groups, *kernel], dtype, floats, grad=True),
        "bias": tensor(draw, [outputs], dtype, floats, grad=True) if draw(st.booleans()) else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "mask": tensor(draw, [batch, samples, *out], sampling_dtype, floats, grad=True) if draw(st.booleans()) else None,
    }


def pyramid(draw: Draw, limits: Limits, levels: int, channels: int, dtype: str) -> list[dict]:
    shapes = []
    for _ in range(levels):
        empty = draw(very_rarely)
        batch = draw(one_of(1, 2)) if not empty else draw(one_of(1, 0))
        height = draw(sizes(limits.side)) if not empty else draw(one_of(1, 0))
        shapes.append([batch, channels, height, draw(sizes(limits.side))])
    return [tensor(draw, shape, dtype, features(), grad=True) for shape in shapes]


def _flow_conv(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    channels, outputs = draw(sizes(limits.channels)), draw(sizes(limits.channels))
    levels = draw(one_of(1, 1, 2, 3, 0))
    x = pyramid(draw, limits, levels, channels, dtype)
    flow = None
    if draw(st.booleans()) and levels:
        flow = [tensor(draw, level["tensor"], dtype, features(), grad=True) for level in x]
    single = levels == 1 and draw(st.booleans())
    return {
        "x": x[0] if single else x,
        "flow": flow[0] if single and flow else flow,
        "weight": tensor(draw, [outputs, channels, 3, 3], dtype, features(), grad=True),
        "bias": tensor(draw, [outputs], dtype, features(), grad=True) if draw(st.booleans()) else None,
        "relu": draw(st.booleans()),
        "algorithm": draw(one_of("auto", "direct", "winograd")),
    }


OPERATORS: dict[str, Callable[[Draw, Limits], dict]] = {
    "roi_align": roi_align,
    "deform_conv2d": deform_conv2d,
    "flow_conv2d": _flow_conv,
    "pack_conv3x3": _flow_conv,
}


# --- spoiled calls -----------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[dict]:
    if isinstance(value, dict) and "tensor" in value:
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in _tensors(item)] if isinstance(value, list) else []


def _spoil(draw: Draw, arguments: dict) -> None:
    """Changes one thing, such as the size or the dtype of a tensor, so that the call may be wrong."""
    found = _tensors(arguments)
    how = draw(one_of("dtype", "size", "dimension", "number"))
    if how == "number" or not found:
        names = [name for name, value in arguments.items() if type(value) in (int, float)]
        if names:
            arguments[draw(st.sampled_from(names))] = draw(one_of(-1, 0, 1 << 40, 2, 1))
        return
    chosen = draw(st.sampled_from(found))
    shape = chosen["tensor"]
    if how == "dtype":
        chosen["dtype"] = draw(one_of(*FLOATS, "int64", "int32", "uint8", "bool"))
        if not chosen["dtype"].startswith(("float", "bfloat")):
            chosen.pop("grad", None)
            chosen["values"] = {"kind": "integers", "seed": 0, "low": 0, "high": 1}
    elif how == "size" and shape:
        place = draw(st.integers(0, len(shape) - 1))
        shape[place] = max(shape[place] + draw(one_of(1, -1, 2)), 0)
    elif shape and draw(st.booleans()):
        shape.pop()
    else:
        shape.append(1)
    if chosen["values"]["kind"] in ("boxes", "blocks"):
        chosen["values"] = {"kind": "integers", "seed": 0, "low": 0, "high": 4}


@st.composite
def cases(draw: Draw, operator: str, limits: Limits = CPU) -> dict:
    arguments = OPERATORS[operator](draw, limits)
    spoiled = draw(very_rarely)
    if spoiled:
        _spoil(draw, arguments)
    case = {"op": operator, "arguments": arguments, "valid": not spoiled}
    if any(found.get("grad") for found in _tensors(arguments)):
        case["gradient"] = {"values": draw(features()), "layout": draw(layouts(4))}
        case["jvp"] = draw(rarely)
    return case
