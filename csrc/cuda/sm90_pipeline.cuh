// SPDX-License-Identifier: Apache-2.0
//
// Code shared by the kernels for compute capability 9.0: the position in a ring of stages, and groups of wgmma
// products.
#pragma once

#include "cuda/sm90_instructions.cuh"

namespace spatialflow {

// Position in a ring of kStages stages in shared memory, and the parity to pass to mbarrier_wait for the stage.
// Consumers start with parity 0, producers with parity 1: a new mbarrier has completed the phase of parity 1.
template <int kStages>
struct PipelineState {
    int stage = 0;
    unsigned parity;

    __device__ __forceinline__ explicit PipelineState(unsigned parity) : parity(parity) {}
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int kCount, int kArrays>
__device__ __forceinline__ void pin_all(WgmmaSums<kCount> (&sums)[kArrays]) {
#pragma unroll
    for (int i = 0; i < kArrays; ++i) {
        pin(sums[i]);
    }
}

// Run the wgmma products that multiply() issues as one group, and wait for the groups before it.
template <int kCount, int kArrays, typename Multiply>
__device__ __forceinline__ void run_product_group(WgmmaSums<kCount> (&sums)[kArrays], const Multiply& multiply) {
    pin_all(sums);
    wgmma_fence();
    multiply();
    wgmma_commit();
    wgmma_wait<1>();
    pin_all(sums);
}

// Wait for all groups of products.
template <int kCount, int kArrays>
__device__ __forceinline__ void finish_products(WgmmaSums<kCount> (&sums)[kArrays]) {
    wgmma_wait<0>();
    pin_all(sums);
}

}  // namespace spatialflow
