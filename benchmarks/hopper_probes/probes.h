// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common.cuh"

void probe_device();
void probe_planes();
void probe_rows();
void probe_fragments();
void probe_tma();
void probe_red();
void probe_mma();
void probe_wgmma();
void probe_l2();
void probe_hbm();
void probe_latency();
void probe_launch();
void probe_convolution_planes();
void probe_convolution_rows();
void probe_convolution_planes_cluster();
void probe_convolution_rows_cluster();
