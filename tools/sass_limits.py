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
    Limit("conv3x3_tensor_core_kernel<Tf32, 4, 128>", "as in 16 bits; two instructions round a weight",
          registers=222, load=16, narrow=0, store=8, distance=220, matrix=96, in_flight=2, per_matrix=3.3),
    Limit("conv3x3_tensor_core_kernel<Tf32, 4, 64>", "three blocks of 128 threads: 168; half the products",
          registers=148, load=16, narrow=0, store=8, distance=115, matrix=48, in_flight=2, per_matrix=4.0),
    Limit("conv3x3_tensor_core_kernel<Tf32, 1, *>", "channels not a multiple of 4: element loads",
          registers=222, store=8, distance=110, matrix=48, in_flight=8, per_matrix=4.4),
    # The main loop is a tap, without loads. Around it are those of the next inputs, in flight during the products, and
    # residuals, a pixel at a time.
    Limit("conv3x3_tensor_core_kernel<Tf32x3, *>", "two blocks: 255; for three products two instructions take a number "
          "apart, four add", registers=216, store=8, in_flight=2, per_matrix=3.9),
    Limit("conv3x3_tensor_core_kernel<*, 8, 128>", "two blocks of 128 threads: 255; loads fly during a column of taps",
          registers=240, load=16, narrow=0, store=16, distance=110, matrix=96, in_flight=2, per_matrix=2.0),
    Limit("conv3x3_tensor_core_kernel<*, 8, 64>", "three blocks of 128 threads: 168; half the products",
          registers=160, load=16, narrow=0, store=16, distance=60, matrix=48, in_flight=2, per_matrix=2.6),
    Limit("conv3x3_tensor_core_kernel<*, 1, *>", "channels not a multiple of 8: element loads",
          registers=244, distance=4, in_flight=7, per_matrix=3.7),
    Limit("conv3x3_sm90_kernel<*>", "inputs and weights by TMA; 384 threads share the registers: 168 before they trade",
          registers=168, load=16, store=16, per_matrix=18.0),
    Limit("conv1x1_sm90_kernel<*>", "operands by TMA; the residual is on its way during the products; 384 threads "
          "share the registers", registers=168, load=16, narrow=0, store=16, distance=60, matrix=4, in_flight=6,
          per_matrix=15.0),
    Limit("conv3x3_weight_gradient_tensor_core_kernel<Tf32, 4>", "one block of 8 warps: 255; operands by 4 and 8 "
          "bytes, rows of inputs moved on", registers=255, load=16, narrow=0, store=8, distance=90, matrix=36,
          in_flight=2, per_matrix=4.2),
    Limit("conv3x3_weight_gradient_tensor_core_kernel<Tf32x3, 4>", "half the channels, by registers",
          registers=216, load=16, narrow=0, store=8, distance=190, matrix=54, in_flight=2, per_matrix=4.5),
    Limit("conv3x3_weight_gradient_tensor_core_kernel<Tf32*, 1>", "channels not a multiple of 4: element loads",
          registers=255, distance=90, matrix=36, in_flight=8, per_matrix=5.0),
    Limit("conv3x3_weight_gradient_tensor_core_kernel<*, 8>", "one block of 8 warps: 255; loads fly during a step",
          registers=255, load=16, narrow=0, distance=55, matrix=36, in_flight=2, per_matrix=2.7),
    Limit("conv3x3_weight_gradient_tensor_core_kernel<*, 1>", "channels not a multiple of 8: element loads",
          registers=255, distance=5, in_flight=6, per_matrix=4.2),
    # Goal: distance=20; one load of this kernel is read by the next instruction.
    Limit("conv3x3_kernel<float, 4>", "16-byte loads", registers=88, load=16, narrow=0),
    Limit("conv3x3_weight_gradient_kernel<float, 4>", "16-byte loads", registers=80, load=16, narrow=0),

    # A matrix instruction is 64 pixels by 128 outputs by 16 channels of a warpgroup: 64 cycles. Other warps gather.
    Limit("deform_conv2d_sm90_kernel<*>", "the corners of a step on the way during the blends of the last; 384 or 512 "
          "threads share the registers", registers=168, load=16, store=8, in_flight=8, per_matrix=14.0),
    Limit("deform_conv2d_kernel<Tf32, *, 256, 4>", "as in 16 bits",
          registers=128, load=16, narrow=0, store=16, distance=100, matrix=32, in_flight=4, per_matrix=7.5),
    Limit("deform_conv2d_kernel<Tf32, *, 128, 4>", "as in 16 bits",
          registers=128, load=16, narrow=0, store=16, distance=70, matrix=16, in_flight=4, per_matrix=12.5),
    Limit("deform_conv2d_kernel<Tf32, *, 64, 4>", "as in 16 bits",
          registers=128, load=16, narrow=0, store=16, distance=42, matrix=8, in_flight=4, per_matrix=20.0),
    # The main loop is one product of depth, without loads; the corners are on the way around it.
    Limit("deform_conv2d_kernel<Tf32x3, *, 4>", "for three products two instructions take a number apart, four add",
          registers=128, load=16, store=16, in_flight=4, per_matrix=7.0),
    Limit("deform_conv2d_kernel<*, 256, 8>", "four corners on the way during the products; two blocks: 128 registers",
          registers=128, load=16, narrow=0, distance=60, matrix=32, in_flight=4, per_matrix=7.8),
    Limit("deform_conv2d_kernel<*, 128, 8>", "four corners on the way during the products; two blocks: 128 registers",
          registers=128, load=16, narrow=0, distance=28, matrix=16, in_flight=4, per_matrix=13.0),
    Limit("deform_conv2d_kernel<*, 64, 8>", "four corners on the way during the products; two blocks: 128 registers",
          registers=128, load=16, narrow=0, distance=18, matrix=8, in_flight=4, per_matrix=24.0),
    Limit("deform_conv2d_kernel<float, *, 4>", "four corners on the way during the products",
          registers=128, load=16, narrow=11, store=16, distance=12, in_flight=4),
    Limit("deform_conv2d_backward_weight_kernel<Tf32, 128, 4>", "as deform_conv2d_kernel; rounds gradients in place",
          registers=128, load=16, narrow=0, store=16, distance=62, matrix=16, in_flight=4, per_matrix=12.6),
    Limit("deform_conv2d_backward_weight_kernel<Tf32, 64, 4>", "as deform_conv2d_kernel; rounds gradients in place",
          registers=128, load=16, narrow=0, store=16, distance=38, matrix=8, in_flight=4, per_matrix=19.5),
    Limit("deform_conv2d_backward_weight_kernel<Tf32x3, *, 4>", "tiles of 64 outputs, by registers",
          registers=112, load=16, store=16, in_flight=4, per_matrix=7.1),
    Limit("deform_conv2d_backward_weight_kernel<*, 256, 8>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=0, distance=58, matrix=32, in_flight=4, per_matrix=7.1),
    Limit("deform_conv2d_backward_weight_kernel<*, 128, 8>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=0, distance=32, matrix=16, in_flight=4, per_matrix=11.8),
    Limit("deform_conv2d_backward_weight_kernel<*, 64, 8>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=0, distance=16, matrix=8, in_flight=4, per_matrix=22.0),
    Limit("deform_conv2d_backward_weight_kernel<float, *, 4>", "as deform_conv2d_kernel",
          registers=128, load=16, narrow=5, store=16, distance=60, in_flight=4),
    Limit("deform_conv2d_backward_data_kernel<Tf32*, *, 4>", "four corners on the way at once; operands by LDGSTS",
          registers=128, load=16, store=16, in_flight=8, per_matrix=10.7),
    Limit("deform_conv2d_backward_data_kernel<*, 8>", "cells loaded two pixels ahead; product operands by LDGSTS",
          registers=128, load=16, store=16, in_flight=16, per_matrix=5.0),
    Limit("deform_conv2d_backward_data_kernel<float, *, 4>", "four corners on the way at once",
          registers=128, load=16, store=16, distance=30, in_flight=4),
    # Goal: distance=20 and in_flight=4; each reader's row is used as soon as it is loaded.
    Limit("deform_conv2d_input_gradient_kernel<Tf32, *, 4>", "lists of readers, as in 16 bits",
          registers=128, load=16, per_matrix=90.0),
    Limit("deform_conv2d_input_gradient_kernel<Tf32x3, *, 4>", "lists of readers around the products",
          registers=128, load=16, per_matrix=5.5),
    Limit("deform_conv2d_input_gradient_kernel<*, 256, 8>", "lists of readers: 34 loads of list entries and factors",
          registers=128, load=16, narrow=34, per_matrix=32.1),
    Limit("deform_conv2d_input_gradient_kernel<*, 8>", "lists of readers: 34 loads of list entries and factors",
          registers=128, load=16, narrow=34),

    Limit("roi_align_kernel<*, 8>", "a column of cells ahead of its use; 16 warps on a multiprocessor: 128 registers",
          registers=128, load=16, narrow=0, store=16, distance=8, in_flight=4),
    Limit("roi_align_kernel<float, 4>", "a column of cells ahead of its use",
          registers=128, load=16, narrow=0, store=16, distance=8, in_flight=4),
    Limit("roi_align_gather_kernel<*, 8>", "four bins on the way at once", registers=128, load=16, narrow=0, store=16,
          distance=7, in_flight=4),
    Limit("roi_align_gather_kernel<float, 4>", "four bins on the way at once",
          registers=96, load=16, narrow=0, store=16, distance=8, in_flight=4),
    # The gradient is loaded one bin ahead; a lane has four channels, so that a reduction fills whole sectors.
    Limit("roi_align_scatter_kernel<float, 4>", "16-byte gradients and reductions",
          registers=82, load=16, narrow=0, store=16, distance=30),
    Limit("roi_align_scatter_kernel<*, 4>", "8-byte gradients, 16-byte reductions",
          registers=84, load=8, narrow=0, store=16, distance=40),

    # Labels are int64: a load of 8 bytes beside the 16 bytes of logits of a vector, which lies in one row.
    Limit("focal_sum_kernel<*, 8>", "streams logits", registers=64, load=16, narrow=2, distance=8, in_flight=2),
    Limit("focal_sum_kernel<float, 4>", "streams logits", registers=56, load=16, narrow=4, distance=20, in_flight=4),

    Limit("group_norm_sums_kernel<*, 8>", "four pixels on the way at once", registers=80, load=16, in_flight=4),
    Limit("group_norm_relu_kernel<*, 8>", "four pixels on the way at once",
          registers=80, load=16, store=16, in_flight=4),
    Limit("group_norm_relu_upsample_kernel<*, 8>", "two cells of the next row at once",
          registers=72, load=16, store=16, in_flight=2),
    Limit("group_norm_relu_gradient_sums_kernel<*, true, 8>", "five pixels of a row at once; sums of eight channels",
          registers=168, load=16, store=16, in_flight=5),
    Limit("group_norm_relu_gradient_sums_kernel<*, false, 8>", "four pixels of two maps at once; two blocks",
          registers=128, load=16, store=16, in_flight=8),

    Limit("panoptic_quality_counts_kernel<true>", "streams two maps", registers=32, load=16, in_flight=2),
    Limit("paste_masks_kernel<*>", "streams out masks of bytes", registers=62, store=16, in_flight=4),
    Limit("preprocess_images_kernel<*>", "reads bytes of pixels, writes 16 bytes", registers=56, store=16, in_flight=8),
    Limit("candidate_best_kernel<*, 8>", "five vectors of an anchor's logits on the way at once; four blocks: 64",
          registers=64, load=16, narrow=0, distance=30, in_flight=5),
    Limit("candidate_best_kernel<float, 4>", "five vectors of an anchor's logits on the way at once; four blocks: 64",
          registers=64, load=16, narrow=0, distance=16, in_flight=5),
    Limit("stuff_labels_kernel<*>", "a class of four corners at a time", registers=48, in_flight=2),

    Limit("*", "bound by launches and latency, or for shapes that no vector fits"),
)  # fmt: skip
