# SPDX-License-Identifier: Apache-2.0
#
# Operators with a CUDA kernel. The SIMT interpreter runs these and takes the CPU kernels of the others.
set(cuda_ops
    deform_conv2d
    deform_conv2d_backward
    flow_conv2d
    flow_conv2d_backward
    flow_tower
    multiclass_nms
    multilevel_roi_align
    nms
    panoptic_merge
    panoptic_quality_counts
    paste_masks
    preprocess_images
    roi_align
    sigmoid_focal_loss
    stuff_labels)

# CUDA sources that several operators share.
set(cuda_shared conv3x3)

# Sources whose decisions at a threshold, resized pixels or labels need the CPU's roundings: no fused multiply-add.
set(cuda_unfused paste_masks preprocess_images stuff_labels)
