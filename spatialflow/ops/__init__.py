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

The names of `torchvision.ops` that have no kernel here, such as `box_iou` and `FrozenBatchNorm2d`, are torchvision's:
it is imported when one of them is used. The same holds for the modules of `torchvision.ops`, such as `boxes` and
`misc`. docs/migration.md lists them.
"""

import sys
from typing import TYPE_CHECKING, Any

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
from spatialflow.ops.multiscale_roi_align import MultiScaleRoIAlign
from spatialflow.ops.nms import batched_nms, nms
from spatialflow.ops.panoptic_merge import PanopticMergeOutput, panoptic_merge
from spatialflow.ops.panoptic_quality_counts import panoptic_quality_counts
from spatialflow.ops.paste_masks import paste_masks
from spatialflow.ops.preprocess_images import preprocess_images
from spatialflow.ops.roi_align import RoIAlign, roi_align
from spatialflow.ops.scripting import make_scriptable
from spatialflow.ops.select_candidates import Candidates, select_candidates
from spatialflow.ops.sigmoid_focal_loss import sigmoid_focal_loss
from spatialflow.ops.stuff_labels import stuff_labels
from spatialflow.ops.torchvision_names import MODULES, NAMES, add_modules, is_installed, torchvision_object

if TYPE_CHECKING:  # the names that `__getattr__` resolves, for type checkers and editors
    from torchvision.ops import MLP as MLP
    from torchvision.ops import Conv2dNormActivation as Conv2dNormActivation
    from torchvision.ops import Conv3dNormActivation as Conv3dNormActivation
    from torchvision.ops import DropBlock2d as DropBlock2d
    from torchvision.ops import DropBlock3d as DropBlock3d
    from torchvision.ops import FeaturePyramidNetwork as FeaturePyramidNetwork
    from torchvision.ops import FrozenBatchNorm2d as FrozenBatchNorm2d
    from torchvision.ops import Permute as Permute
    from torchvision.ops import PSRoIAlign as PSRoIAlign
    from torchvision.ops import PSRoIPool as PSRoIPool
    from torchvision.ops import RoIPool as RoIPool
    from torchvision.ops import SqueezeExcitation as SqueezeExcitation
    from torchvision.ops import StochasticDepth as StochasticDepth
    from torchvision.ops import box_area as box_area
    from torchvision.ops import box_convert as box_convert
    from torchvision.ops import box_iou as box_iou
    from torchvision.ops import boxes as boxes
    from torchvision.ops import ciou_loss as ciou_loss
    from torchvision.ops import clip_boxes_to_image as clip_boxes_to_image
    from torchvision.ops import complete_box_iou as complete_box_iou
    from torchvision.ops import complete_box_iou_loss as complete_box_iou_loss
    from torchvision.ops import deform_conv as deform_conv
    from torchvision.ops import diou_loss as diou_loss
    from torchvision.ops import distance_box_iou as distance_box_iou
    from torchvision.ops import distance_box_iou_loss as distance_box_iou_loss
    from torchvision.ops import drop_block as drop_block
    from torchvision.ops import drop_block2d as drop_block2d
    from torchvision.ops import drop_block3d as drop_block3d
    from torchvision.ops import feature_pyramid_network as feature_pyramid_network
    from torchvision.ops import focal_loss as focal_loss
    from torchvision.ops import generalized_box_iou as generalized_box_iou
    from torchvision.ops import generalized_box_iou_loss as generalized_box_iou_loss
    from torchvision.ops import giou_loss as giou_loss
    from torchvision.ops import masks_to_boxes as masks_to_boxes
    from torchvision.ops import misc as misc
    from torchvision.ops import poolers as poolers
    from torchvision.ops import ps_roi_align as ps_roi_align
    from torchvision.ops import ps_roi_pool as ps_roi_pool
    from torchvision.ops import remove_small_boxes as remove_small_boxes
    from torchvision.ops import roi_pool as roi_pool
    from torchvision.ops import stochastic_depth as stochastic_depth

__all__ = [
    "Candidates",
    "DeformConv2d",
    "Detections",
    "MultiScaleRoIAlign",
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


make_scriptable({name: globals()[name] for name in __all__ if name[0].islower()})
add_modules(globals())


def __getattr__(name: str) -> Any:
    """Return a name of torchvision, or, with a DeprecationWarning, the object that had the name in version 0.1."""
    if name in NAMES:
        globals()[name] = value = torchvision_object(name)
        return value
    if name in MODULES:
        return sys.modules[f"{__name__}.{name}"]
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"spatialflow.ops.{name}", f"spatialflow.ops.{_RENAMED[name]}")
    return globals()[_RENAMED[name]]


def __dir__() -> list[str]:
    names = {*globals(), *MODULES}
    return sorted(names.union(NAMES) if is_installed() else names.difference(NAMES))
