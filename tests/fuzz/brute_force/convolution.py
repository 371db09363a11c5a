# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution, flow convolution and the sub-networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fuzz.brute_force.common import bilinear, comparison_dtype, to_array, to_pair, without_warnings


@without_warnings
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    algorithm: str = "auto",
    mask_sigmoid: bool = False,
    relu: bool = False,
) -> np.ndarray:
    real = comparison_dtype(input)
    features, kernel = to_array(input), to_array(weight)
    moves = to_array(offset).astype(real)
    factors = None if mask is None else to_array(mask).astype(real)
    if mask_sigmoid:
        factors = (1 / (1 + np.exp(-factors.astype(np.float64)))).astype(real)
    (stride_y, stride_x), (pad_y, pad_x), (step_y, step_x) = to_pair(stride), to_pair(padding), to_pair(dilation)
    batch, channels, height, width = features.shape
    out_channels, group_channels, kernel_h, kernel_w = kernel.shape
    taps = kernel_h * kernel_w
    groups, offset_groups = channels // max(group_channels, 1) or 1, moves.shape[1] // (2 * taps)
    part, out_part = channels // offset_groups, out_channels // groups
    out_height = (height + 2 * pad_y - step_y * (kernel_h - 1) - 1) // stride_y + 1
    out_width = (width + 2 * pad_x - step_x * (kernel_w - 1) - 1) // stride_x + 1
    result = np.zeros((batch, out_channels, out_height, out_width))
    for n, i, j in np.ndindex(batch, out_height, out_width):
        samples = np.zeros((channels, kernel_h, kernel_w))
        for g, tap in np.ndindex(offset_groups, taps):
            tap_y, tap_x = divmod(tap, kernel_w)
            move_y, move_x = moves[n, 2 * (g * taps + tap) : 2 * (g * taps + tap) + 2, i, j]
            factor = real(1) if factors is None else factors[n, g * taps + tap, i, j]
            if not (np.isfinite(move_y) and np.isfinite(move_x) and np.isfinite(factor)):
                continue
            y = real(i * stride_y - pad_y + tap_y * step_y) + move_y
            x = real(j * stride_x - pad_x + tap_x * step_x) + move_x
            sample = bilinear(features[n, g * part : (g + 1) * part], float(y), float(x))
            samples[g * part : (g + 1) * part, tap_y, tap_x] = float(factor) * sample
        for o in range(out_channels):
            first = o // out_part * group_channels
            result[n, o, i, j] = (kernel[o] * samples[first : first + group_channels]).sum()
    if bias is not None:
        result += to_array(bias)[:, None, None]
    return _rectify(result) if relu else result


def _convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Convolve (N, C, H, W) by a 3x3 kernel with stride 1 and padding 1."""
    batch, _, height, width = x.shape
    result = np.zeros((batch, kernel.shape[0], height, width))
    for n, i, j in np.ndindex(batch, height, width):
        for di, dj in np.ndindex(3, 3):
            row, column = i + di - 1, j + dj - 1
            if 0 <= row < height and 0 <= column < width:
                result[n, :, i, j] += (kernel[:, :, di, dj] * x[n, :, row, column]).sum(axis=1)
    return result if bias is None else result + bias[:, None, None]


def _rectify(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, 0.0, x)


@without_warnings
def flow_conv2d(
    x: Tensor | Sequence[Tensor],
    flow: Tensor | Sequence[Tensor] | None,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: Tensor | None = None,
) -> np.ndarray | list[np.ndarray]:
    if isinstance(x, Tensor):
        return flow_conv2d([x], None if flow is None else [flow], weight, bias, relu, algorithm, active)[0]
    results = []
    for index, level in enumerate(x):
        total = to_array(level) if flow is None else to_array(level) + to_array(flow[index])
        result = _convolve(total, to_array(weight), None if bias is None else to_array(bias))
        result = _rectify(result) if relu else result
        if active is not None:
            result[~active.numpy()] = 0.0
        results.append(result)
    return results


@without_warnings
def fused_subnets(levels: Sequence[Tensor], parameters: Any, algorithm: str = "auto") -> tuple[list[np.ndarray], ...]:
    def apply(conv: tuple[Tensor, Tensor | None], x: np.ndarray) -> np.ndarray:
        return _convolve(x, to_array(conv[0]), None if conv[1] is None else to_array(conv[1]))

    def flow(convs: Sequence, stage: int, source: np.ndarray) -> np.ndarray | float:
        return apply(convs[stage], source) if stage < len(convs) and convs[stage] is not None else 0.0

    cls, reg, stuff, thing = [], [], [], []
    for index, level in enumerate(to_array(level) for level in levels):
        source_convs, follower_convs = parameters.reg, parameters.cls
        if parameters.flow_source == "cls":
            source_convs, follower_convs = parameters.cls, parameters.reg
        source, follower, of_stuff, of_thing = level, level, level, level
        for stage in range(max(len(source_convs), len(follower_convs), len(parameters.stuff))):
            if stage < len(source_convs):
                source = _rectify(apply(source_convs[stage], source))
            if stage < len(follower_convs):
                follower = follower + flow(parameters.flow_cls, stage, source)
                follower = _rectify(apply(follower_convs[stage], follower))
            if stage < len(parameters.stuff) and index < parameters.segmentation_levels:
                of_stuff = of_stuff + flow(parameters.flow_stuff, stage, source)
                of_stuff = _rectify(apply(parameters.stuff[stage], of_stuff))
        if not follower_convs:
            follower = follower + flow(parameters.flow_cls, 0, source)
        cls.append(source if parameters.flow_source == "cls" else follower)
        reg.append(follower if parameters.flow_source == "cls" else source)
        if index >= parameters.segmentation_levels:
            continue
        if not parameters.stuff:
            of_stuff = of_stuff + flow(parameters.flow_stuff, 0, source)
        stuff.append(of_stuff)
        for stage in range(max(len(parameters.thing), 1)):
            of_thing = of_thing + flow(parameters.semantic_flow, stage, of_stuff)
            of_thing = of_thing + flow(parameters.flow_thing, stage, source)
            if parameters.thing:
                of_thing = _rectify(apply(parameters.thing[stage], of_thing))
        thing.append(of_thing)
    return cls, reg, stuff, thing
