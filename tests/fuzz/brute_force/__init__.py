# SPDX-License-Identifier: Apache-2.0
"""Every operator of `spatialflow.ops` in plain NumPy loops and float64, written from the docstrings alone.

Each function has the name and the signature of its operator. It takes tensors of any dtype and layout. It returns NumPy
arrays in the operator's order of fields: float64 (scores of segments: float32), int64 or bool. It shares no code with
the kernels or with `spatialflow.ops.reference`, and it is for tiny cases only. Shapes and options are not checked. A
weight must be a tensor, not packed. `algorithm` is accepted and ignored.

Results are not rounded to 16 bits. Decisions that operators are documented to make in float32 (float64 for float64
tensors) have the same dtype here: sampling grids and levels of RoIAlign, sampling points of deformable convolution, and
overlaps of NMS. The arithmetic of `preprocess_images` is in float32 as well. Where rounding may change a decision,
`mask_probabilities`, `upsampled_logits` and `perturbed_boxes` give the values from which a test tells how close the
decision was.
"""

from fuzz.brute_force.convolution import deform_conv2d, flow_conv2d, fused_subnets
from fuzz.brute_force.detection import batched_nms, multiclass_nms, nms, select_candidates
from fuzz.brute_force.differences import numeric_gradient, perturbed_boxes
from fuzz.brute_force.image import preprocess_images
from fuzz.brute_force.layers import group_norm_relu, sigmoid_focal_loss
from fuzz.brute_force.pooling import multilevel_roi_align, roi_align
from fuzz.brute_force.segmentation import (
    mask_probabilities,
    panoptic_merge,
    panoptic_quality_counts,
    paste_masks,
    stuff_labels,
    upsampled_logits,
)

__all__ = [
    "batched_nms",
    "deform_conv2d",
    "flow_conv2d",
    "fused_subnets",
    "group_norm_relu",
    "mask_probabilities",
    "multiclass_nms",
    "multilevel_roi_align",
    "nms",
    "numeric_gradient",
    "panoptic_merge",
    "panoptic_quality_counts",
    "paste_masks",
    "perturbed_boxes",
    "preprocess_images",
    "roi_align",
    "select_candidates",
    "sigmoid_focal_loss",
    "stuff_labels",
    "upsampled_logits",
]
