# SPDX-License-Identifier: Apache-2.0
"""Reference implementations of every public operator in plain PyTorch: kernels are tested and timed against them."""

from spatialflow.ops.reference.deform_conv2d import deform_conv2d
from spatialflow.ops.reference.flow_conv2d import flow_conv2d
from spatialflow.ops.reference.fused_subnets import fused_subnets
from spatialflow.ops.reference.group_norm_relu import group_norm_relu
from spatialflow.ops.reference.multiclass_nms import multiclass_nms
from spatialflow.ops.reference.multilevel_roi_align import multilevel_roi_align
from spatialflow.ops.reference.nms import batched_nms, nms
from spatialflow.ops.reference.panoptic_merge import panoptic_merge
from spatialflow.ops.reference.panoptic_quality_counts import panoptic_quality_counts
from spatialflow.ops.reference.paste_masks import paste_masks
from spatialflow.ops.reference.preprocess_images import preprocess_images
from spatialflow.ops.reference.roi_align import roi_align
from spatialflow.ops.reference.select_candidates import select_candidates
from spatialflow.ops.reference.sigmoid_focal_loss import sigmoid_focal_loss
from spatialflow.ops.reference.stuff_labels import stuff_labels

__all__ = [
    "batched_nms",
    "deform_conv2d",
    "flow_conv2d",
    "fused_subnets",
    "group_norm_relu",
    "multiclass_nms",
    "multilevel_roi_align",
    "nms",
    "panoptic_merge",
    "panoptic_quality_counts",
    "paste_masks",
    "preprocess_images",
    "roi_align",
    "select_candidates",
    "sigmoid_focal_loss",
    "stuff_labels",
]
