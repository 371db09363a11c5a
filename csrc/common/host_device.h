// SPDX-License-Identifier: Apache-2.0
//
// Attributes of the functions in csrc/common that both host and device code call.
#pragma once

#if defined(__CUDACC__)
#define SPATIALFLOW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPATIALFLOW_HOST_DEVICE inline
#endif
