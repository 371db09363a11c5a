# SPDX-License-Identifier: Apache-2.0
"""Operators within `torch.jit.script`, which cannot compile their Python functions.

The TorchScript compiler asks a function for its `__prepare_scriptable__` and compiles what that returns. For most
operators this is the function of the same name here, which calls the raw operator. It takes tensors only: no arrays and
no packed weights. It checks no values and ignores autocast. The other operators raise an error that says what to use
instead.
"""

# ruff: noqa: D103  # the docstrings are those of the operators
# No `from __future__ import annotations`: TorchScript reads these annotations.

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from spatialflow.ops.multiclass_nms import Detections


def _pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list):
        return value[0], value[1]
    return value


def _as_rows(boxes: Tensor | list[Tensor], batch: int) -> Tensor:
    if isinstance(boxes, Tensor):
        return boxes
    if len(boxes) != batch:
        raise ValueError(f"boxes as a list must hold one tensor per image, got {len(boxes)} for a batch of {batch}")
    rows: list[Tensor] = []
    for index, image_boxes in enumerate(boxes):
        if image_boxes.dim() != 2 or image_boxes.shape[1] != 4:
            raise ValueError(f"boxes[{index}] must have shape (K, 4), got {image_boxes.shape}")
        if image_boxes.dtype == torch.float16 or image_boxes.dtype == torch.bfloat16:
            image_boxes = image_boxes.float()
        rows.append(torch.cat((torch.full_like(image_boxes[:, :1], float(index)), image_boxes), dim=1))
    return torch.cat(rows)


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int] | list[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    rows, (height, width) = _as_rows(boxes, input.shape[0]), _pair(output_size)
    result: Tensor = torch.ops.spatialflow.roi_align(input, rows, height, width, spatial_scale, sampling_ratio, aligned)
    return result


def multilevel_roi_align(
    features: list[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int] | list[int],
    strides: list[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56.0,
) -> Tensor:
    rows, (height, width) = _as_rows(boxes, features[0].shape[0]), _pair(output_size)
    result: Tensor = torch.ops.spatialflow.multilevel_roi_align(
        features, rows, height, width, strides, sampling_ratio, aligned, finest_scale
    )
    return result


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    rows: Tensor = torch.ops.spatialflow.nms(boxes, scores, iou_threshold)
    return rows


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if idxs.is_floating_point():
        idxs = torch.unique(idxs, return_inverse=True)[1]
    rows: Tensor = torch.ops.spatialflow.batched_nms(boxes, scores, idxs.to(torch.int64), iou_threshold)
    return rows


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> Detections:
    single = boxes.dim() == 2
    if single:
        boxes, scores = boxes.unsqueeze(0), scores.unsqueeze(0)
    kept, best, labels, count, indices = torch.ops.spatialflow.multiclass_nms(
        boxes, scores, score_threshold, iou_threshold, max_detections
    )
    if single:
        kept, best, labels, count, indices = kept[0], best[0], labels[0], count[0], indices[0]
    return Detections(kept, best, labels, count, indices)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] | list[int] = (1, 1),
    padding: int | tuple[int, int] | list[int] = (0, 0),
    dilation: int | tuple[int, int] | list[int] = (1, 1),
    mask: Tensor | None = None,
    algorithm: str = "auto",
    mask_sigmoid: bool = False,
    relu: bool = False,
) -> Tensor:
    codes = {"auto": 0, "direct": 2, "tf32": 3, "tf32x3": 4}
    if algorithm not in codes:
        raise ValueError(f"deform_conv2d: algorithm must be one of {list(codes.keys())}, got '{algorithm}'")
    if mask_sigmoid:
        if mask is None:
            raise ValueError("deform_conv2d: mask_sigmoid must be False without a mask")
        mask = mask.to(torch.float64 if input.dtype == torch.float64 else torch.float32).sigmoid()
    stride_h, stride_w = _pair(stride)
    padding_h, padding_w = _pair(padding)
    dilation_h, dilation_w = _pair(dilation)
    result: Tensor = torch.ops.spatialflow.deform_conv2d(
        input,
        offset,
        weight,
        bias,
        mask,
        None,
        stride_h,
        stride_w,
        padding_h,
        padding_w,
        dilation_h,
        dilation_w,
        codes[algorithm],
    )
    return result.relu() if relu else result


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25, reduction: str = "none"
) -> Tensor:
    if labels.dim() == logits.dim():
        raise ValueError("sigmoid_focal_loss: labels must be class indices within torch.jit.script, got targets")
    if reduction == "none":
        loss: Tensor = torch.ops.spatialflow.sigmoid_focal_loss(logits, labels, gamma, alpha)
        return loss
    total: Tensor = torch.ops.spatialflow._sigmoid_focal_loss_sum(logits, labels, gamma, alpha)
    if reduction == "mean":
        return total / logits.numel()
    if reduction != "sum":
        raise ValueError(f"sigmoid_focal_loss: reduction must be 'none', 'sum' or 'mean', got '{reduction}'")
    return total


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    upsample: bool = False,
) -> Tensor:
    result: Tensor = torch.ops.spatialflow.group_norm_relu(input, weight, bias, num_groups, eps, upsample)[0]
    return result


def paste_masks(mask_logits: Tensor, boxes: Tensor, size: list[int], threshold: float = 0.5) -> Tensor:
    masks: Tensor = torch.ops.spatialflow.paste_masks(mask_logits, boxes, size[0], size[1], threshold)
    return masks


def stuff_labels(logits: Tensor, valid_size: list[int], original_size: list[int]) -> Tensor:
    labels: Tensor = torch.ops.spatialflow.stuff_labels(
        logits, valid_size[0], valid_size[1], original_size[0], original_size[1]
    )
    return labels


def panoptic_quality_counts(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> Tensor:
    counts: Tensor = torch.ops.spatialflow.panoptic_quality_counts(gt_map, pred_map, gt_segments, pred_segments)
    return counts


def make_scriptable(functions: dict[str, Callable[..., Any]]) -> None:
    """Tell the TorchScript compiler what to compile for each of the public functions, given by name."""
    for name, function in functions.items():
        function.__dict__["__prepare_scriptable__"] = _replacement(name)


def _replacement(name: str) -> Callable[[], Callable[..., Any]]:
    replacement = globals().get(name)
    if replacement is not None:
        return lambda: replacement

    def refuse() -> NoReturn:
        raise RuntimeError(
            f"{name}: torch.jit.script cannot compile it; use torch.jit.trace, torch.export or torch.compile"
        )

    return refuse
