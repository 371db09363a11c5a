// SPDX-License-Identifier: Apache-2.0
//
// Entry point to CUDA: kernels include this header instead of those of the toolkit. Only the sm90_* headers also
// include <cuda.h>. nvcc compiles kernels for a GPU. Other C++ compilers build them for the SIMT interpreter
// (csrc/simt), which runs them on a CPU and checks their memory accesses (docs/simt.md).
//
// Differences from plain CUDA:
//
//   Global<const float> input      pointer to device memory, with indexing and addition
//   SPATIALFLOW_SHARED(float, tile, 256)        static shared array of 256 elements
//   SPATIALFLOW_DYNAMIC_SHARED(float, tile)     the dynamic shared memory of the launch
//   load_vector<8>(input + i), store_vector(output + i, v)     one access of up to 16 bytes, aligned to its size
//   launch<my_kernel<float>>(grid, block, shared_bytes, stream, arguments...)
//   resident_blocks<my_kernel<float>>(threads, shared_bytes, stream)   grid of a kernel whose blocks loop over the work
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
constexpr int kVectorElements = static_cast<int>(16 / sizeof(scalar_t));

}  // namespace spatialflow
