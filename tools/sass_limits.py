# SPDX-License-Identifier: Apache-2.0
"""What the SASS of each kernel may be on sm_90a; tools/check_sass.py compares the library with it (docs/sass.md).

The first row whose pattern matches `kernel<template arguments>` counts. A row is changed like code: with the kernel
that needs it, and with its reason. For all rows: no local memory, so no spills, and no indirect branches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    kernel: str
    why: str
    registers: int = 255  # at most
    load: int = 0  # bytes of the widest global load, at least; the data loads are those at least as wide
    narrow: int | None = None  # narrower loads in the main loop, at most
    store: int = 0  # bytes of the widest global store, at least
    distance: int = 1  # from each data load to its first reader, at least; the next instruction is 1
    matrix: int = 0  # matrix instructions between each data load and its first reader, at least
    in_flight: int = 0  # data loads on the way at once, at least
    per_matrix: float | None = None  # instructions of a main loop for each matrix instruction, at most


LIMITS = (
    # Goal: matrix=64 and per_matrix=6, the loads of one tap behind the products of the last.
    Limit("conv3x3_tensor_core_kernel<*, 8>", "two blocks of 128 threads: 255; 16-byte inputs and outputs",
          registers=252, load=16, narrow=0, store=16, per_matrix=8.5),
    Limit("conv3x3_tensor_core_kernel<*, 1>", "channels not a multiple of 8: element loads",
          registers=252, distance=8, in_flight=8, per_matrix=9.0),
    # A matrix instruction is 64 pixels by 128 or 64 outputs by 16 channels of a warpgroup: 64 or 32 cycles.
    Limit("conv3x3_sm90_kernel<*>", "inputs and weights by TMA; 384 threads share the registers: 168 before they trade",
          registers=168, load=16, store=16, per_matrix=18.0),
    # Goal: matrix=32 and per_matrix=6.
    Limit("conv3x3_weight_gradient_tensor_core_kernel<*, 8>", "9 warps in one block: up to 224 registers",
          registers=168, load=16, narrow=0, per_matrix=7.5),
    Limit("conv3x3_weight_gradient_tensor_core_kernel<*, 1>", "channels not a multiple of 8: element loads",
          registers=168, distance=8, in_flight=8, per_matrix=8.5),
    # Goal: distance=20; one load of this kernel is read by the next instruction.
    Limit("conv3x3_kernel<float, 4>", "16-byte loads", registers=88, load=16, narrow=0),
    Limit("conv3x3_weight_gradient_kernel<float, 4>", "16-byte loads", registers=80, load=16, narrow=0),

    Limit("deform_conv2d_kernel<*, 256, 8>", "four corners on the way during the products; two blocks: 128 registers",
          registers=128, load=16, narrow=0, distance=60, matrix=32, in_flight=4, per_matrix=8.9),
    Limit("deform_conv2d_kernel<*, 128, 8>", "four corners on the way during the products; two blocks: 128 registers",
          registers=128, load=16, narrow=0, distance=36, matrix=16, in_flight=4, per_matrix=15.2),
    Limit("deform_conv2d_kernel<*, 64, 8>", "four corners on the way during the products; two blocks: 128 registers",
          registers=128, load=16, narrow=0, distance=28, matrix=8, in_flight=4, per_matrix=27.7),
    Limit("deform_conv2d_kernel<float, *, 4>", "four corners on the way during the products",
          registers=128, load=16, narrow=5, store=16, distance=60, in_flight=4),
    Limit("deform_conv2d_backward_weight_kernel<*, 256, 8>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=0, distance=60, matrix=32, in_flight=4, per_matrix=9.0),
    Limit("deform_conv2d_backward_weight_kernel<*, 128, 8>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=0, distance=32, matrix=16, in_flight=4, per_matrix=15.0),
    Limit("deform_conv2d_backward_weight_kernel<*, 64, 8>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=0, distance=24, matrix=8, in_flight=4, per_matrix=29.0),
    Limit("deform_conv2d_backward_weight_kernel<float, *, 4>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=5, store=16, distance=60, in_flight=4),
    # Goal: distance=20 and in_flight=4, the four corners loaded before the first is used.
    Limit("deform_conv2d_backward_data_kernel<*, 8>", "16-byte reductions; operands of the products by LDGSTS",
          registers=106, load=16, narrow=0, store=16, per_matrix=5.0),
    Limit("deform_conv2d_backward_data_kernel<float, *, 4>", "16-byte reductions",
          registers=128, load=16, store=16),
    # Goal: distance=20 and in_flight=4; each reader's row is used as soon as it is loaded.
    Limit("deform_conv2d_input_gradient_kernel<*, 256, 8>", "lists of readers: 34 loads of list entries and factors",
          registers=128, load=16, narrow=34, per_matrix=32.1),
    Limit("deform_conv2d_input_gradient_kernel<*, 8>", "lists of readers: 34 loads of list entries and factors",
          registers=128, load=16, narrow=34),

    # Goal: distance=4 and in_flight=4 in all three, the cells of a row loaded before the first is used.
    Limit("roi_align_kernel<*, 8, 1>", "16-byte cells and bins", registers=80, load=16, narrow=0, store=16),
    Limit("roi_align_kernel<*, 8, 2>", "16-byte cells and bins",
          registers=108, load=16, narrow=0, store=16, distance=3, in_flight=4),
    Limit("roi_align_kernel<*, 8, 4>", "16-byte cells and bins",
          registers=122, load=16, narrow=0, store=16, distance=5, in_flight=4),
    Limit("roi_align_kernel<float, 4, *>", "16-byte cells and bins", registers=107, load=16, narrow=0, store=16),
    # Goal: in_flight=2.
    Limit("roi_align_gather_kernel<*, 8>", "16-byte gradients", registers=80, load=16, narrow=0, store=16),
    Limit("roi_align_gather_kernel<float, 4>", "16-byte gradients", registers=72, load=16, narrow=0, store=16),
    Limit("roi_align_scatter_kernel<*, 8>", "16-byte gradients and reductions",
          registers=91, load=16, narrow=0, store=16, distance=12),
    Limit("roi_align_scatter_kernel<float, 4>", "16-byte gradients and reductions",
          registers=72, load=16, narrow=0, store=16, distance=40),

    # Labels are int64: a load of 8 bytes for each class target beside the 16 bytes of logits.
    Limit("focal_sum_kernel<*, 8>", "streams logits", registers=38, load=16, narrow=15, distance=4),
    Limit("focal_sum_kernel<float, 4>", "streams logits", registers=38, load=16, narrow=7, distance=2),
    Limit("focal_elementwise_kernel<*, 8>", "streams logits", registers=32, load=16, store=16),
    Limit("focal_elementwise_kernel<*, float, 4>", "streams logits", registers=32, load=16, store=16),

    Limit("panoptic_quality_counts_kernel<true>", "streams two maps", registers=32, load=16, in_flight=2),
    Limit("paste_masks_kernel<*>", "streams out masks of bytes", registers=62, store=16, in_flight=4),
    Limit("preprocess_images_kernel<*>", "reads bytes of pixels, writes 16 bytes", registers=56, store=16, in_flight=8),
    Limit("stuff_labels_kernel<*>", "a class of four corners at a time", registers=48, in_flight=2),

    Limit("*", "bound by launches and latency, or for shapes that no vector fits"),
)  # fmt: skip
