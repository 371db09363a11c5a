# SPDX-License-Identifier: Apache-2.0
#
# Operators: each has a schema in csrc/ops, a CPU kernel and a CUDA kernel. The Makefile and tools/ read these lists
# too.
set(ops
    conv1x1
    deform_conv2d
    deform_conv2d_backward
    flow_conv2d
    flow_conv2d_backward
    fused_subnets
    group_norm_relu
    group_norm_relu_backward
    multiclass_nms
    multilevel_roi_align
    nms
    panoptic_merge
    panoptic_quality_counts
    paste_masks
    preprocess_images
    roi_align
    select_candidates
    sigmoid_focal_loss
    stuff_labels)

# Sources of both back ends that several operators share.
set(shared_sources conv3x3)

# Sources that only the CUDA library has: a separate backward pass, operands of kernels, kernels for one compute
# capability.
set(cuda_only_sources deform_conv2d_operands roi_align_backward sm90_conv1x1 sm90_conv3x3 sm90_deform_conv2d)

# Sources compiled without fused multiply-adds. Decisions of NMS, resized pixels and labels are then equal on all
# instruction-set levels and back ends, and boxes of candidates on all levels. The CUDA kernels of NMS use intrinsics
# instead. Those of `paste_masks` round each product of the interpolation before the sum.
set(cpu_unfused multiclass_nms nms preprocess_images select_candidates stuff_labels)
set(cuda_unfused paste_masks preprocess_images stuff_labels)
