# SPDX-License-Identifier: Apache-2.0
"""Operators with CPU and CUDA kernels. `spatialflow.ops.reference` has reference implementations in plain PyTorch.

The docstring of each operator describes its arguments and result and has an example. All tensors of a call may instead
be arrays of one other library (CuPy, NumPy, JAX). The results are then arrays of that library, on the same memory
(docs/arrays.md). Any other object in the place of a tensor, or a mix of arrays and tensors, raises TypeError.

Boxes are corners (x1, y1, x2, y2), except in the result of `panoptic_merge`: (x, y, width, height). A box with corners
in the wrong order, such as (x, y, width, height), does not raise: detectors produce reversed boxes too.

Importing this module registers the raw operators, `torch.ops.spatialflow.*`. Code that uses them by name, such as a
loaded `torch.export` archive, must import it first; `import spatialflow` alone does not.

If a process has run operators on several threads, `torch.set_num_threads(1)` is called in each child that it forks, as
in the workers of a `DataLoader`. Without that call, torch would hang in the child. Start children that need more
threads by `spawn`.
"""

from typing import Any

from spatialflow.deprecated import warn_renamed
from spatialflow.ops.checking import checked
from spatialflow.ops.conv1x1 import conv1x1 as conv1x1  # private to the package
from spatialflow.ops.deform_conv2d import (
    DeformConv2d,
    PackedDeformConv,
    deform_conv2d,
    pack_deform_conv2d,
)
from spatialflow.ops.flow_conv2d import PackedConv, flow_conv2d, pack_conv3x3
from spatialflow.ops.fused_subnets import (
    SubnetOutput,
    SubnetParameters,
    fused_subnets,
    pack_subnets,
)
from spatialflow.ops.group_norm_relu import group_norm_relu
from spatialflow.ops.multiclass_nms import Detections, multiclass_nms
from spatialflow.ops.multilevel_roi_align import MultilevelRoIAlign, multilevel_roi_align
from spatialflow.ops.nms import batched_nms, nms
from spatialflow.ops.panoptic_merge import PanopticMergeOutput, panoptic_merge
from spatialflow.ops.panoptic_quality_counts import panoptic_quality_counts
from spatialflow.ops.paste_masks import paste_masks
from spatialflow.ops.preprocess_images import preprocess_images
from spatialflow.ops.roi_align import RoIAlign, roi_align
from spatialflow.ops.select_candidates import Candidates, select_candidates
from spatialflow.ops.sigmoid_focal_loss import sigmoid_focal_loss
from spatialflow.ops.stuff_labels import stuff_labels

__all__ = [
    "Candidates",
    "DeformConv2d",
    "Detections",
    "MultilevelRoIAlign",
    "PackedConv",
    "PackedDeformConv",
    "PanopticMergeOutput",
    "RoIAlign",
    "SubnetOutput",
    "SubnetParameters",
    "batched_nms",
    "checked",
    "deform_conv2d",
    "flow_conv2d",
    "fused_subnets",
    "group_norm_relu",
    "multiclass_nms",
    "multilevel_roi_align",
    "nms",
    "pack_conv3x3",
    "pack_deform_conv2d",
    "pack_subnets",
    "panoptic_merge",
    "panoptic_quality_counts",
    "paste_masks",
    "preprocess_images",
    "roi_align",
    "select_candidates",
    "sigmoid_focal_loss",
    "stuff_labels",
]

_RENAMED = {
    "FlowTowerOutput": "SubnetOutput",
    "FlowTowerParameters": "SubnetParameters",
    "flow_tower": "fused_subnets",
    "pack_flow_tower": "pack_subnets",
}


def __getattr__(name: str) -> Any:
    """Return the object that had the name in version 0.1, with a DeprecationWarning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"spatialflow.ops.{name}", f"spatialflow.ops.{_RENAMED[name]}")
    return globals()[_RENAMED[name]]
