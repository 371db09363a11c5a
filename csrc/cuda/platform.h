// SPDX-License-Identifier: Apache-2.0
//
// The only door to CUDA. Kernels are written against this header and mean the same compiled by nvcc for a GPU and by a
// C++ compiler for the SIMT interpreter (csrc/simt), which runs them on a CPU and watches what they touch.
//
// What a kernel writes differently from plain CUDA, so that accesses can be watched (docs/simt.md):
//
//   Global<const float> input      pointer to device memory; index it, add to it, pass it on
//   SPATIALFLOW_SHARED(float, tile, 256)        static shared array of 256 elements
//   SPATIALFLOW_DYNAMIC_SHARED(float, tile)     the dynamic shared memory of the launch
//   load_vector<8>(input + i), store_vector(output + i, v)     one access of up to 16 bytes, aligned to its size
//   launch<my_kernel<float>>(grid, block, shared_bytes, stream, arguments...)
//   resident_blocks<my_kernel<float>>(threads, shared_bytes, stream)   grid of a kernel whose blocks loop over the work
//
// A Stream comes from DeviceScope (launch.h) and says on which device a kernel runs.
//
// Everything else (threadIdx, __syncthreads, __shfl_sync, atomicAdd, ...) is CUDA's own name.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include "cuda/platform_nvcc.cuh"
#else
#include "simt/simt.h"
#endif

namespace spatialflow {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// Elements of a 16-byte access.
template <typename scalar_t>
constexpr int kWideElements = static_cast<int>(16 / sizeof(scalar_t));

}  // namespace spatialflow
