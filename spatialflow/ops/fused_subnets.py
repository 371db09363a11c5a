# SPDX-License-Identifier: Apache-2.0
"""Fused sub-networks of SpatialFlow, with their flows, over a whole pyramid in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.conv_algorithm import algorithm_code, check_packed_layout, pack_conv3x3_weight
from spatialflow.ops.differentiable import autocast, needs_gradient, without_gradient
from spatialflow.ops.fake import register_fake
from spatialflow.ops.flow_conv2d import PackedConv, flow_conv2d, pack_conv3x3
from spatialflow.ops.layout import empty_levels
from spatialflow.ops.subnet_schedule import run_subnets

Conv = tuple[Tensor, Tensor | None] | PackedConv
"""A convolution: (weight (C_out, C_in, 3, 3), bias (C_out,) or None), or the same packed."""


class SubnetParameters(NamedTuple):
    """Convolutions of the sub-networks, one per stage; an empty tuple is an absent sub-network or flow.

    `None` among the flows is a stage without a flow. The output of a sub-network without stages is its input plus the
    first flow into it; for thing, plus the first of `flow_thing` and the first of `semantic_flow`.
    """

    cls: tuple[Conv, ...] = ()
    reg: tuple[Conv, ...] = ()
    stuff: tuple[Conv, ...] = ()
    thing: tuple[Conv, ...] = ()
    flow_cls: tuple[Conv | None, ...] = ()  # from the source into cls, or into reg where cls is the source
    flow_stuff: tuple[Conv | None, ...] = ()
    flow_thing: tuple[Conv | None, ...] = ()
    semantic_flow: tuple[Conv | None, ...] = ()  # from the final stuff feature into the stages of thing
    flow_source: str | None = "reg"
    segmentation_levels: int = 3


class SubnetOutput(NamedTuple):
    """Final features of the sub-networks; for one without stages and flows, the input levels."""

    cls: list[Tensor]
    reg: list[Tensor]
    stuff: list[Tensor]
    thing: list[Tensor]


_LISTS = SubnetParameters._fields[:8]  # in the order of the raw operator


def fused_subnets(levels: Sequence[Tensor], parameters: SubnetParameters, algorithm: str = "auto") -> SubnetOutput:
    """Run the classification, regression, stuff and thing sub-networks with their flows over all levels of a pyramid.

    In each stage the source (reg) is computed first: reg = relu(conv(reg)). This reg then flows into
    cls = relu(conv(cls + flow(reg))) and stuff = relu(conv(stuff + flow(reg))). The stages of thing run after all of
    these: thing = relu(conv(thing + semantic_flow(stuff) + flow(reg))), with the final features of stuff and reg.

    If the source has fewer stages than another sub-network, later stages use the final feature of the source. A flow
    beyond the last stage of its sub-network is not used.

    Args:
        levels: the pyramid, (N, C, H, W) each, finest first; float32, float64, float16 or bfloat16, any strides.
        parameters: the convolutions, 3x3 with stride 1 and padding 1, and the source of the flows. Convolutions as
            (weight, bias) are packed in every call; `pack_subnets` packs them once.
        algorithm: of the convolutions that are not packed, as in `flow_conv2d`; packed ones keep theirs. "auto" on CUDA
            is resolved in every call.

    Returns:
        `SubnetOutput(cls, reg, stuff, thing)`: lists of maps (N, C', H, W), cls and reg for all levels, stuff and
        thing for the first `parameters.segmentation_levels`; each channels-last if that level is. For a
        sub-network without stages and flows, the input levels themselves.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the list and the stage.
        ValueError: an unknown algorithm or flow source, flows without a source, no levels, `segmentation_levels` above
            the number of levels, None in place of a stage, a weight without elements, or a bias of a wrong shape.
        TypeError: a weight or bias that is not a tensor.

    Note:
        Results are those of `flow_conv2d` stage by stage, including NaN and empty levels; in 16 bits, sums with flows
        may be rounded differently. If a derivative may be requested, the sub-networks are composed of calls of
        `flow_conv2d`, which define gradients, forward mode and `torch.func`. Otherwise one operator runs all of them.

        Complexity: the sum of its convolutions (see `flow_conv2d`). Without gradients, the memory of an intermediate
        map is freed or reused after its last use.

        Difference from torchvision, mmcv and detectron2: they have no such operator.

    Examples:
        >>> conv = (torch.rand(16, 16, 3, 3), torch.rand(16))
        >>> parameters = pack_subnets(SubnetParameters(cls=(conv,), reg=(conv,), flow_cls=(conv,)))
        >>> pyramid = [torch.rand(1, 16, 40, 60), torch.rand(1, 16, 20, 30), torch.rand(1, 16, 10, 15)]
        >>> [tuple(level.shape) for level in fused_subnets(pyramid, parameters).cls]
        [(1, 16, 40, 60), (1, 16, 20, 30), (1, 16, 10, 15)]

    Source: SpatialFlow (Chen et al.), equations 1 to 3.
    """
    if not are_tensors(*levels):
        return with_arrays(fused_subnets, locals())
    algorithm_code("fused_subnets", algorithm)
    levels = [autocast(level) for level in levels]
    _check(levels, parameters)
    tensors = [t for name in _LISTS for conv in getattr(parameters, name) if conv is not None for t in _pair(conv)]
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if needs_gradient([*levels, *tensors]) or is_traced:  # TorchScript fails in a traced list of weights
        return _compose(levels, parameters, algorithm)
    packed, biases, codes = [], [], []
    for name in _LISTS:
        for conv in getattr(parameters, name):
            conv_algorithm = conv.algorithm if isinstance(conv, PackedConv) else algorithm
            codes.append(algorithm_code("fused_subnets", conv_algorithm, levels[0]))
            weight, bias = _packed(conv, codes[-1], levels[0])
            packed.append(weight)
            biases.append(bias)
    counts = [len(getattr(parameters, name)) for name in _LISTS]
    source_is_cls = parameters.flow_source == "cls"
    maps = list(_fused_subnets(levels, packed, biases, codes, counts, source_is_cls, parameters.segmentation_levels))
    segmentation = levels[: parameters.segmentation_levels]
    results = []
    computed_tasks = _computed(counts, packed, source_is_cls)
    for inputs, computed in zip((levels, levels, segmentation, segmentation), computed_tasks, strict=True):
        results.append([maps.pop(0) for _ in inputs] if computed else list(inputs))
    return SubnetOutput(*results)


def pack_subnets(parameters: SubnetParameters, algorithm: str = "auto") -> SubnetParameters:
    """Pack every convolution of the sub-networks by `pack_conv3x3`, for many calls of `fused_subnets`.

    Args:
        parameters: convolutions as (weight, bias).
        algorithm: as in `flow_conv2d`.

    Returns:
        `SubnetParameters` of `PackedConv`; convolutions already packed stay as they are.

    Raises:
        RuntimeError: a weight or bias of a wrong shape, dtype or device.
        ValueError: an unknown algorithm.
    """
    algorithm_code("pack_subnets", algorithm)

    def pack(conv: Conv | None) -> PackedConv | None:
        return conv if conv is None or isinstance(conv, PackedConv) else pack_conv3x3(*conv, algorithm)

    packed: dict[str, Any] = {name: tuple(map(pack, getattr(parameters, name))) for name in _LISTS}
    return parameters._replace(**packed)


def _pair(conv: Conv) -> tuple[Tensor, Tensor | None]:
    return (conv.weight, conv.bias) if isinstance(conv, PackedConv) else conv


def _packed(conv: Conv | None, code: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed weights and bias of a convolution; vectors without elements for None."""
    if conv is None:
        return like.new_empty(0), like.new_empty(0)
    weight, bias = _pair(conv)
    if isinstance(conv, PackedConv):
        packed, bias = conv.packed, conv.packed_bias
    else:
        packed = pack_conv3x3_weight(autocast(weight), code)
    return packed, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _check(levels: list[Tensor], parameters: SubnetParameters) -> None:
    if not levels:
        raise ValueError("fused_subnets: levels must not be empty")
    source = parameters.flow_source
    if source not in ("reg", "cls", None):
        raise ValueError(f"fused_subnets: flow_source must be 'reg', 'cls' or None, got {source!r}")
    if not 0 <= parameters.segmentation_levels <= len(levels):
        raise ValueError(
            f"fused_subnets: segmentation_levels must be from 0 to the number of levels, {len(levels)}, "
            f"got {parameters.segmentation_levels}"
        )
    for name in _LISTS:
        for index, conv in enumerate(getattr(parameters, name)):
            if conv is None:
                if name in ("cls", "reg", "stuff", "thing"):
                    raise ValueError(f"fused_subnets: {name}[{index}] must be a convolution; only flows may be None")
                continue
            location = f"{name}[{index}]"
            if source is None and name in ("flow_cls", "flow_stuff", "flow_thing"):
                raise ValueError(f"fused_subnets: {location} must be None, as flow_source is None")
            weight, bias = _pair(conv)
            for field, tensor in (("weight", weight), ("bias", bias)):
                if not are_tensors(tensor) and not (tensor is None and field == "bias"):
                    raise TypeError(
                        f"fused_subnets: the {field} of {location} must be a tensor, got {type(tensor).__name__}"
                    )
            if weight.numel() == 0:
                raise ValueError(f"fused_subnets: {location} must have channels, got {tuple(weight.shape)}")
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"fused_subnets: the bias of {location} must have shape ({weight.shape[0]},), "
                    f"got {tuple(bias.shape)}"
                )


def _compose(levels: list[Tensor], parameters: SubnetParameters, algorithm: str) -> SubnetOutput:
    """Compose the sub-networks of calls of `flow_conv2d`."""

    def convolve(x: list[Tensor], flow: list[Tensor] | None, conv: Conv, relu: bool) -> list[Tensor]:
        if isinstance(conv, PackedConv):
            return flow_conv2d(x, flow, conv, None, relu)
        return flow_conv2d(x, flow, *conv, relu, algorithm)

    def run_flow(conv: Conv, x: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        return convolve(x[: len(like)], None, conv, False)

    def run_stage(
        stage: Conv, flow: Conv | None, x: list[Tensor], source: list[Tensor], semantic: list[Tensor] | None
    ) -> list[Tensor]:
        x = x if semantic is None else add(x, semantic)
        return convolve(x, None if flow is None else run_flow(flow, source, x), stage, True)

    def add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [x + y for x, y in zip(a, b, strict=True)]

    source = parameters.flow_source or "reg"
    segmentation = levels[: parameters.segmentation_levels]
    inputs = {"cls": levels, "reg": levels, "stuff": segmentation, "thing": segmentation}
    stages = {name: getattr(parameters, name) for name in inputs}
    flows = {
        "cls" if source == "reg" else "reg": parameters.flow_cls,
        "stuff": parameters.flow_stuff,
        "thing": parameters.flow_thing,
        "semantic": parameters.semantic_flow,
    }
    features = run_subnets(inputs, stages, flows, source, run_stage, run_flow, add)
    return SubnetOutput(**{name: list(feature) for name, feature in features.items()})


def _computed(counts: list[int], packed: list[Tensor], source_is_cls: bool) -> tuple[bool, bool, bool, bool]:
    """Return which of cls, reg, stuff, thing the raw operator returns: those that differ from the input levels."""
    starts = [sum(counts[:index]) for index in range(8)]

    def first_present(index: int) -> bool:
        return counts[index] > 0 and packed[starts[index]].shape[0] > 0

    cls, reg, stuff, thing = (counts[index] > 0 for index in range(4))
    follower_flow = first_present(4)
    cls = cls or (not source_is_cls and follower_flow)
    reg = reg or (source_is_cls and follower_flow)
    return cls, reg, stuff or first_present(5), thing or first_present(6) or first_present(7)


_fused_subnets = without_gradient("fused_subnets")


@register_fake("fused_subnets")
def _(
    levels: list[Tensor],
    packed: list[Tensor],
    biases: list[Tensor],
    algorithms: list[int],
    counts: list[int],
    source_is_cls: bool,
    segmentation_levels: int,
) -> list[Tensor]:
    for weight in packed:
        if weight.shape[0]:  # the vector of an absent flow is empty
            check_packed_layout("fused_subnets", weight)
    starts = [sum(counts[:index]) for index in range(8)]
    segmentation = levels[:segmentation_levels]
    computed = _computed(counts, packed, source_is_cls)
    outputs = []
    for index, inputs in enumerate((levels, levels, segmentation, segmentation)):
        if not computed[index]:
            continue
        # The last stage determines the channels; without stages flows are added to the levels.
        last = biases[starts[index] + counts[index] - 1].shape[0] if counts[index] else None
        outputs += empty_levels(inputs, last)
    return outputs
