# SPDX-License-Identifier: Apache-2.0
"""Operators with hand-written CPU and CUDA kernels; `spatialflow.ops.reference` holds their plain-PyTorch references.

`help(spatialflow.ops.nms)` and so on say what each takes and gives, with an example. Where they say tensor, all tensors
of a call may be arrays of one other library (CuPy, NumPy, JAX), and the results then are such arrays, on the same
memory (docs/arrays.md). Anything else in the place of a tensor, and arrays beside tensors, are a TypeError. Boxes are
corners (x1, y1, x2, y2) everywhere. A box with corners in the wrong order, such as (x, y, width, height), is no error:
detectors' data have such boxes.

Importing this module registers the raw operators, `torch.ops.spatialflow.*`. Code that uses those by name, a loaded
`torch.export` archive for example, must import it first; `import spatialflow` alone does not.

If a process has run operators on several threads, each child that it forks is set to one thread, by
`torch.set_num_threads(1)`, as the workers of a `DataLoader` are. Torch would hang there otherwise. Use `spawn` for
children that need more threads.
"""

from spatialflow import _library

_library.load()

from spatialflow.ops.checking import checked
from spatialflow.ops.conv1x1 import conv1x1
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
    "SubnetOutput",
    "SubnetParameters",
    "MultilevelRoIAlign",
    "PackedConv",
    "PackedDeformConv",
    "PanopticMergeOutput",
    "RoIAlign",
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
