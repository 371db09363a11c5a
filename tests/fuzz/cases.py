# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies, one per operator, that generate cases as plain data.

A case is a dictionary:

    op         name in OPERATORS
    arguments  by name: numbers, strings, lists, None, and tensors as `fuzz.tensors` describes them. A tensor with
               "grad": true requires a gradient.
    gradient   values and layout of the incoming gradients, and of tangents
    jvp        whether forward mode is tested as well
    fake       whether the fake kernel is tested; for a refused call it always is
    valid      False: one argument was changed so that the call may be invalid; the operator may refuse it

This module does not import torch: strategies run in the supervisor, and the worker builds the tensors they describe.
Hypothesis shrinks toward smaller numbers and earlier elements of `sampled_from`, so these are the simpler ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
SPECIAL = ("-0", "nan", "inf", "-inf", "max", "-max", "huge", "tiny", "denormal")
HUGE_STRIDE = 1 << 40  # for a dimension of size 1, where torch allows any stride

Draw = Callable[[st.SearchStrategy], Any]


class Limits(NamedTuple):
    """Largest sizes of tensors.

    They are smaller for the SIMT interpreter (docs/simt.md), which is a hundred times slower than the CPU back end.
    """

    side: int = 18
    channels: int = 40
    rows: int = 24


CPU = Limits()
SIMT = Limits(side=7, channels=34, rows=9)


@functools.lru_cache(None, typed=True)
def one_of(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


@functools.lru_cache(None)
def sizes(maximum: int, minimum: int = 1) -> st.SearchStrategy:
    """Sizes around those at which kernels change their tiling; often 1."""
    around = (1, 2, 3, 1, 4, 5, 7, 8, 1, 9, 12, 15, 16, 17, 31, 32, 33, 40, 64, 65, 130)
    return st.sampled_from([size for size in around if minimum <= size <= maximum] or [minimum])


# Enough seeds that two tensors of a case rarely have the same values.
seeds = st.integers(0, 1 << 20)
# True in one of four draws; Hypothesis shrinks to False.
rarely = st.sampled_from([False, False, False, True])
invalid_calls = st.sampled_from([False] * 9 + [True])
very_rarely = st.sampled_from([False] * 15 + [True])


@functools.lru_cache(None)
def layouts(dims: int) -> st.SearchStrategy:
    """Layouts of a tensor of `dims` dimensions; None is contiguous."""
    identity = list(range(dims))
    orders = [identity]
    if dims == 4:
        orders += [[0, 2, 3, 1], [0, 2, 3, 1], [0, 1, 3, 2]]
    one_stride = st.sampled_from([None, 0, 1, 2, 3, 7, 64, HUGE_STRIDE])
    layout = st.fixed_dictionaries(
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
    return st.one_of(st.none(), layout)


@functools.lru_cache(None)
def features(scale: float = 1.0, specials: tuple[str, ...] = SPECIAL) -> st.SearchStrategy:
    """Values of floating-point tensors, sometimes with special ones among them."""
    kinds = st.sampled_from(["normal", "grid", "normal", "few"])
    nothing, numbers = st.just([]), st.lists(st.sampled_from(specials), min_size=1, max_size=3)
    special = st.one_of(nothing, nothing, nothing, numbers)
    return st.fixed_dictionaries({"kind": kinds, "seed": seeds, "scale": st.just(scale), "special": special})


def weights(draw: Draw, scale: float = 1.0) -> st.SearchStrategy:
    """Values of weights and biases; huge and non-finite ones are rare, because they leave few results to compare."""
    return features(scale, SPECIAL if draw(very_rarely) else ("-0", "tiny", "denormal"))


@functools.lru_cache(None)
def integers(low: int, high: int, kind: str = "integers", outliers: bool = False) -> st.SearchStrategy:
    special = st.lists(st.sampled_from(["max", "-max"]), max_size=2) if outliers else st.just([])
    return st.fixed_dictionaries(
        {"kind": st.just(kind), "seed": seeds, "low": st.just(low), "high": st.just(high), "special": special}
    )


def tensor(
    draw: Draw, shape: list[int], dtype: str, values: st.SearchStrategy, grad: bool = False, layout: bool = True
) -> dict:
    """Description of a tensor; one that may require a gradient does so in half of the cases."""
    described = {"tensor": list(shape), "dtype": dtype, "values": draw(values)}
    if layout and (chosen := draw(layouts(len(shape)))):
        described["layout"] = chosen
    if grad and draw(st.booleans()):
        described["grad"] = True
    return described


def boxes(
    draw: Draw,
    lead: list[int],
    columns: int,
    dtype: str,
    extent: tuple[float, float],
    batch: int = 1,
    far: bool = False,
) -> dict:
    """Boxes in images of (width, height) `extent`; with `far`, some coordinates are so large that areas overflow."""
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
    stride, padding, dilation = (
        [draw(one_of(*choices)) for _ in "hw"] for choices in ((1, 2, 3), (0, 1, 2), (1, 2, 3))
    )
    size, out = [], []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        minimum = max(reach - 2 * padding[axis], 1)
        size.append(minimum + draw(one_of(0, 1, 2, 0, 3, 5, 6, 9)))
        out.append((size[axis] + 2 * padding[axis] - reach) // stride[axis] + 1)
    samples = offset_groups * kernel[0] * kernel[1]
    sampling_dtype = draw(one_of(dtype, dtype, *FLOATS))
    floats, mask = features(), None
    if draw(st.booleans()):
        mask = tensor(draw, [batch, samples, *out], sampling_dtype, floats, grad=True)
    return {
        "input": tensor(draw, [batch, channels, *size], dtype, floats, grad=True),
        "offset": tensor(draw, [batch, 2 * samples, *out], sampling_dtype, features(draw(one_of(1.0, 3.0))), grad=True),
        "weight": tensor(draw, [outputs, channels // groups, *kernel], dtype, weights(draw), grad=True),
        "bias": tensor(draw, [outputs], dtype, weights(draw), grad=True) if draw(st.booleans()) else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "mask": mask,
        "algorithm": draw(one_of("auto", "direct", "tf32x3")),
        "mask_sigmoid": mask is not None and draw(st.booleans()),
        "relu": draw(st.booleans()),
    }


def pyramid(draw: Draw, limits: Limits, levels: int, channels: int, dtype: str) -> list[dict]:
    shapes = []
    for _ in range(levels):
        empty = draw(very_rarely)
        batch = draw(one_of(1, 2)) if not empty else draw(one_of(1, 0))
        height = draw(sizes(limits.side)) if not empty else draw(one_of(1, 0))
        shapes.append([batch, channels, height, draw(sizes(limits.side))])
    return [tensor(draw, shape, dtype, features(), grad=True) for shape in shapes]


def _flow_conv2d(draw: Draw, limits: Limits) -> dict:
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
        "weight": tensor(draw, [outputs, channels, 3, 3], dtype, weights(draw), grad=True),
        "bias": tensor(draw, [outputs], dtype, weights(draw), grad=True) if draw(st.booleans()) else None,
        "relu": draw(st.booleans()),
        "algorithm": draw(one_of("auto", "direct", "winograd", "tf32x3")),
    }


def _flow_conv2d_packed(draw: Draw, limits: Limits) -> dict:
    case = _flow_conv2d(draw, limits)
    levels = case["x"] if isinstance(case["x"], list) else [case["x"]]
    batches = {level["tensor"][0] for level in levels}
    has_flags = len(batches) == 1 and draw(st.booleans())
    return case | {"active": tensor(draw, [*batches], "bool", integers(0, 1)) if has_flags else None}


def _fused_subnets(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    channels = draw(sizes(min(limits.channels, 33)))
    levels = pyramid(draw, limits._replace(side=min(limits.side, 9)), draw(one_of(1, 2, 3)), channels, dtype)
    counts = {name: draw(one_of(1, 0, 2)) for name in ("cls", "reg", "stuff", "thing")}
    source = draw(one_of("reg", "cls", None))

    def conv(inputs: int, outputs: int) -> list:
        weight = tensor(draw, [outputs, inputs, 3, 3], dtype, weights(draw, 0.3), grad=True)
        return [weight, tensor(draw, [outputs], dtype, weights(draw), grad=True) if draw(st.booleans()) else None]

    def flows(inputs: int, count: int) -> list:
        return [conv(inputs, channels) if draw(st.booleans()) else None for _ in range(draw(one_of(0, max(count, 1))))]

    parameters = {name: [conv(channels, channels) for _ in range(count)] for name, count in counts.items()}
    if source is not None:
        follower = "cls" if source == "reg" else "reg"
        for name, receiver in (("flow_cls", follower), ("flow_stuff", "stuff"), ("flow_thing", "thing")):
            parameters[name] = flows(channels, counts[receiver])
    parameters["semantic_flow"] = flows(channels, counts["thing"])
    parameters["flow_source"] = source
    parameters["segmentation_levels"] = draw(st.integers(0, len(levels)))
    algorithm = draw(one_of("auto", "direct", "winograd", "tf32x3"))
    return {"levels": levels, "parameters": parameters, "algorithm": algorithm}


def group_norm_relu(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    empty = draw(very_rarely)
    batch = draw(one_of(1, 2, 3, 0)) if empty else draw(one_of(1, 2))
    groups = draw(one_of(1, 2, 3, 5, 8))
    channels = groups * draw(sizes(max(limits.channels // groups, 1))) if not empty else draw(one_of(0, groups))
    height = draw(one_of(0, 1)) if empty else draw(sizes(limits.side))
    shape = [batch, channels, height, draw(sizes(limits.side))]
    # Parameters have the dtype of the sums or a narrower one.
    parameters = FLOATS if dtype == "float64" else ("float32", "float16", "bfloat16")
    by_channel = [
        tensor(draw, [channels], draw(one_of(dtype, *parameters)), weights(draw), grad=True)
        if draw(st.booleans())
        else None
        for _ in range(2)
    ]
    return {
        "input": tensor(draw, shape, dtype, features(draw(one_of(1.0, 30.0))), grad=True),
        "num_groups": groups,
        "weight": by_channel[0],
        "bias": by_channel[1],
        "eps": draw(one_of(1e-5, 1e-3, 0.5)),
        "upsample": draw(st.booleans()),
    }


def multilevel_roi_align(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    batch, channels = draw(one_of(1, 2)), draw(sizes(limits.channels))
    strides = [4, 8, 16][: draw(one_of(1, 2, 3))]
    height, width = draw(sizes(limits.side)), draw(sizes(limits.side))
    sides = [[-(-side * 4 // stride) for side in (height, width)] for stride in strides]
    if draw(very_rarely):
        sides[draw(st.integers(0, len(sides) - 1))][0] = 0
    count = draw(st.integers(0, limits.rows // 3))
    return {
        "features": [tensor(draw, [batch, channels, *side], dtype, features(), grad=True) for side in sides],
        "boxes": boxes(draw, [count], 5, draw(one_of(*FLOATS)), (4 * width, 4 * height), batch),
        "output_size": pair_or_number(draw, sizes(5)),
        "strides": strides,
        "sampling_ratio": draw(one_of(0, 1, 2, -1)),
        "aligned": draw(st.booleans()),
        "finest_scale": draw(one_of(8, 4, 16, 56, 10.5)),
    }


THRESHOLDS = (0.5, 0.0, 1.0, 0.3, 0.7, 0.25)


def _scores(draw: Draw, shape: list[int]) -> dict:
    return tensor(draw, shape, draw(one_of(*FLOATS)), features(0.5))


def nms(draw: Draw, limits: Limits) -> dict:
    count = draw(st.integers(0, limits.rows)) if draw(st.booleans()) else draw(sizes(5 * limits.rows))
    return {
        "boxes": boxes(draw, [count], 4, draw(one_of(*FLOATS)), (12, 8), far=True),
        "scores": _scores(draw, [count]),
        "iou_threshold": draw(one_of(*THRESHOLDS, 2.0, 1e-9)),
    }


def batched_nms(draw: Draw, limits: Limits) -> dict:
    arguments = nms(draw, limits)
    idxs = tensor(draw, arguments["scores"]["tensor"], "int64", integers(-1, draw(one_of(0, 1, 3)), outliers=True))
    return {
        "boxes": arguments["boxes"],
        "scores": arguments["scores"],
        "idxs": idxs,
        "iou_threshold": arguments["iou_threshold"],
    }


def multiclass_nms(draw: Draw, limits: Limits) -> dict:
    lead = draw(st.sampled_from([[], [1], [2], [0]]))
    count, classes = draw(st.integers(0, limits.rows)), draw(st.sampled_from([1, 2, 3, 5, 0, 17]))
    return {
        "boxes": boxes(draw, [*lead, count], 4, draw(one_of(*FLOATS)), (12, 8), far=True),
        "scores": _scores(draw, [*lead, count, classes]),
        "score_threshold": draw(one_of(0.0, 0.5, 0.05, -1.0, 1.0, float("-inf"), float("inf"))),
        "iou_threshold": draw(one_of(*THRESHOLDS)),
        "max_detections": draw(one_of(1, 0, 3, 10, 100)),
    }


def panoptic_merge(draw: Draw, limits: Limits) -> dict:
    count = draw(one_of(0, 1, 2, 3, 5, 9))
    size = [draw(sizes(3 * limits.side)), draw(sizes(3 * limits.side))] if not draw(very_rarely) else [0, 3]
    stuff = draw(one_of(0, 1, 2, 5))
    return {
        "masks": tensor(draw, [count, *size], draw(one_of("bool", "uint8")), integers(0, 1, "blocks")),
        "scores": _scores(draw, [count]),
        "labels": tensor(draw, [count], draw(one_of(*INTEGERS)), integers(0, 5, outliers=True)),
        "boxes": boxes(draw, [count], 4, draw(one_of(*FLOATS)), (size[1] + 1, size[0] + 1), far=True)
        if draw(st.booleans())
        else None,
        "stuff": tensor(draw, size, draw(one_of(*INTEGERS)), integers(-1, stuff, "blocks", outliers=True)),
        "stuff_labels": stuff,
        "ignored_stuff": draw(st.lists(st.integers(-1, 5), max_size=2)),
        "score_threshold": draw(one_of(0.0, 0.37, 0.5, 1.0, float("-inf"))),
        "overlap_threshold": draw(one_of(*THRESHOLDS)),
        "stuff_area_threshold": draw(one_of(0, 1, 5, 30, 4900)),
        "box_overlap_threshold": draw(one_of(*THRESHOLDS)),
    }


def panoptic_quality_counts(draw: Draw, limits: Limits) -> dict:
    size = [draw(sizes(3 * limits.side)), draw(sizes(8 * limits.side))] if not draw(very_rarely) else [0, 3]
    counts = [draw(one_of(0, 1, 2, 7, 300)) for _ in range(2)]
    kind = draw(one_of("blocks", "integers"))
    maps = [tensor(draw, size, "int32", integers(-1, count + 1, kind, outliers=True)) for count in counts]
    return {"gt_map": maps[0], "pred_map": maps[1], "gt_segments": counts[0], "pred_segments": counts[1]}


def paste_masks(draw: Draw, limits: Limits) -> dict:
    count = draw(one_of(1, 0, 2, 3))
    size = [draw(sizes(3 * limits.side)), draw(sizes(3 * limits.side))] if not draw(very_rarely) else [0, 3]
    mask = [draw(sizes(14)), draw(sizes(14))] if not draw(very_rarely) else [0, 2]
    return {
        "mask_logits": tensor(draw, [count, *mask], draw(one_of(*FLOATS)), features(2.0)),
        "boxes": boxes(draw, [count], 4, draw(one_of(*FLOATS)), (size[1] + 1, size[0] + 1), far=True),
        "size": size,
        "threshold": draw(one_of(0.5, 1.0, 0.3, 0.75, 1e-6)),
    }


def preprocess_images(draw: Draw, limits: Limits) -> dict:
    count = draw(one_of(1, 2, 3))
    images, targets = [], []
    for _ in range(count):
        size = [draw(sizes(limits.side)), draw(sizes(2 * limits.side))]
        images.append(tensor(draw, [*size, 3], "uint8", integers(0, 255)))
        halved = [side // 2 for side in size]
        half = all(halved) and draw(rarely)
        targets.append(halved if half else [draw(sizes(2 * limits.side)), draw(sizes(2 * limits.side))])
    single = count == 1 and draw(st.booleans())
    return {
        "images": images[0] if single else images,
        "sizes": targets[0] if single else targets,
        "mean": draw(st.sampled_from([[0.0, 0.0, 0.0], [123.675, 116.28, 103.53], [-1e6, 1.5, 1e30]])),
        "std": draw(st.sampled_from([[1.0, 1.0, 1.0], [58.395, 57.12, 57.375], [1e-30, 255.0, 1e30]])),
        "divisor": draw(one_of(1, 2, 32, 7)),
        "dtype": {"dtype": draw(one_of("float32", "float16", "bfloat16"))},
    }


def sigmoid_focal_loss(draw: Draw, limits: Limits) -> dict:
    lead = draw(st.sampled_from([[5], [], [1], [0], [2, 3], [17], [130]]))
    classes = draw(st.sampled_from([1, 2, 3, 8, 0, 17, 80]))
    labels = tensor(draw, lead, draw(one_of("int64", "int32")), integers(-1, classes + 1, outliers=True))
    return {
        "logits": tensor(draw, [*lead, classes], draw(one_of(*FLOATS)), features(draw(one_of(1.0, 20.0))), grad=True),
        "labels": labels,
        "gamma": draw(one_of(2.0, 0.0, 1.0, 0.5, 1.5, 5.0)),
        "alpha": draw(one_of(0.25, -1.0, 0.0, 1.0)),
        "reduction": draw(one_of("none", "sum", "mean")),
    }


def stuff_labels(draw: Draw, limits: Limits) -> dict:
    classes = draw(st.sampled_from([1, 2, 3, 5, 17, 54, 256, 257]))
    cells = [draw(sizes(limits.side)), draw(sizes(limits.side))]
    return {
        "logits": tensor(draw, [classes, *cells], draw(one_of(*FLOATS)), features()),
        "valid_size": [draw(st.integers(1, 4 * side)) for side in cells],
        "original_size": [draw(sizes(3 * limits.side)), draw(sizes(3 * limits.side))],
    }


def select_candidates(draw: Draw, limits: Limits) -> dict:
    dtype = draw(one_of(*FLOATS))
    batch = draw(one_of(1, 2, 0)) if draw(very_rarely) else draw(one_of(1, 2))
    anchors, classes = draw(one_of(1, 2, 3)), draw(st.sampled_from([1, 2, 3, 8, 0, 17]))
    cells = [[draw(sizes(min(limits.side, 9))), draw(sizes(min(limits.side, 9)))] for _ in range(draw(one_of(1, 2, 3)))]
    if draw(very_rarely):
        cells[-1][0] = 0
    strides = [draw(one_of(1, 2, 4, 8, 1000)) for _ in cells]

    def levels(channels: int) -> list[dict]:
        return [tensor(draw, [batch, channels, *size], dtype, features()) for size in cells]

    return {
        "class_logits": levels(anchors * classes),
        "box_deltas": levels(anchors * 4),
        "base_anchors": boxes(draw, [len(cells), anchors], 4, "float32", (12, 8)),
        "strides": strides,
        "valid_sizes": tensor(draw, [batch, 2], "int64", integers(0, 40, outliers=True)),
        "scale_factors": tensor(draw, [batch, 2], "float32", integers(1, 4)),
        "per_level": draw(one_of(2, 0, 1, 5, 30, 1000, (1 << 31) - 1)),
    }


# Strategies of every public operator; calls with packed weights are listed as separate operators.
OPERATORS: dict[str, Callable[[Draw, Limits], dict]] = {
    "batched_nms": batched_nms,
    "deform_conv2d": deform_conv2d,
    "flow_conv2d": _flow_conv2d,
    "fused_subnets": _fused_subnets,
    "group_norm_relu": group_norm_relu,
    "multiclass_nms": multiclass_nms,
    "multilevel_roi_align": multilevel_roi_align,
    "nms": nms,
    "pack_conv3x3": _flow_conv2d_packed,
    "pack_deform_conv2d": deform_conv2d,
    "pack_subnets": _fused_subnets,
    "panoptic_merge": panoptic_merge,
    "panoptic_quality_counts": panoptic_quality_counts,
    "paste_masks": paste_masks,
    "preprocess_images": preprocess_images,
    "roi_align": roi_align,
    "select_candidates": select_candidates,
    "sigmoid_focal_loss": sigmoid_focal_loss,
    "stuff_labels": stuff_labels,
}


# --- invalid calls -----------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[dict]:
    if isinstance(value, dict) and "tensor" in value:
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list) else []


def _make_invalid(draw: Draw, arguments: dict) -> None:
    """Change one thing, such as the size or the dtype of a tensor, so that the call may be invalid."""
    tensors = _tensors(arguments)
    how = draw(one_of("dtype", "size", "dimension", "number"))
    if how == "number" or not tensors:
        names = [name for name, value in arguments.items() if type(value) in (int, float)]
        if names:
            arguments[draw(st.sampled_from(names))] = draw(one_of(-1, 0, 1 << 40, 2, 1))
        return
    chosen = draw(st.sampled_from(tensors))
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
    is_wrong = draw(invalid_calls)
    if is_wrong:
        _make_invalid(draw, arguments)
    case = {"op": operator, "arguments": arguments, "valid": not is_wrong, "fake": draw(rarely)}
    if any(description.get("grad") for description in _tensors(arguments)):
        case["gradient"] = {"values": draw(features()), "layout": draw(layouts(4))}
        case["jvp"] = draw(rarely)
    return case
