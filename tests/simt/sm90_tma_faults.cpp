// SPDX-License-Identifier: Apache-2.0
//
// Kernels for compute capability 9.0 with one planted fault each: TMA (tests/test_simt.py).
// A report names the line with the comment "line: <case>".
#include "sm90_cases.h"

using namespace spatialflow;

namespace {

__global__ void short_expect_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
        tma_load_3d(b, &map, 0, 0, 0, barrier);  // line: short expect, late
    }
    mbarrier_wait(barrier, 0);
    const uint16_t first = memory.at(a)[thread];
    const uint16_t second = memory.at(b)[thread];  // line: short expect, early
    out[thread] = first + second;
}

__global__ void long_expect_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128 + 16);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);  // line: long expect
}

__global__ void invisible_to_TMA_kernel(const __grid_constant__ TensorMap map) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const unsigned barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(shared_address(dynamic), &map, 0, 0, 0, barrier);  // line: invisible to TMA
    }
}

__global__ void read_before_TMA_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    __syncthreads();
    const uint16_t value = memory.at(a)[thread];  // line: read before TMA
    out[thread] = value;
}

__global__ void write_before_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    __syncthreads();
    memory.at(a)[thread] = uint16_t{1};  // line: write before TMA
}

__global__ void TMA_over_a_store_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    memory.at(a)[thread] = uint16_t{1};
    __syncthreads();
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: TMA over a store
    }
}

__global__ void TMA_over_readers_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_OPERANDS(1);
    const uint16_t value = memory.at(a)[thread];
    out[thread] = value;
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: TMA over readers
    }
}

__global__ void two_copies_in_one_place_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 2 * 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
        tma_load_3d(a + 1024, &map, 0, 0, 0, barrier);  // line: two copies in one place
    }
    mbarrier_wait(barrier, 0);
}

__global__ void misaligned_target_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a + 64, &map, 0, 0, 0, barrier);  // line: misaligned target
    }
}

__global__ void target_out_of_bounds_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a + kSharedBytes - 2048, &map, 0, 0, 0, barrier);  // line: target out of bounds
    }
}

__global__ void wrong_dimensions_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        tma_load_4d(a, &map, 0, 0, 0, 0, barrier);  // line: wrong dimensions
    }
}

__global__ void copy_at_exit_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_wait(barrier, 1);
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: copy at exit
    }
}

__global__ void unexpected_copy_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(2);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier + 8);
    }
    mbarrier_wait(barrier, 0);  // line: unexpected copy
}

__global__ void mbarrier_of_another_stage_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(2);
    if (thread == 0) {
        for (unsigned i = 0; i < 2; ++i) {
            mbarrier_expect(barrier + 8 * i, 64 * 128);
            tma_load_3d(a + i * 64 * 128, &map, 0, 0, 0, barrier + 8 * i);
        }
    }
    mbarrier_wait(barrier + 8, 0);
    const uint16_t value = memory.at(a)[thread];  // line: mbarrier of another stage
    out[thread] = value;
}

// Thread 31 releases a stage that the other lanes of its warp also read.
__global__ void no_syncwarp_before_release_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(2);
    if (thread < 32) {
        mbarrier_wait(barrier, 0);
        const uint16_t value = memory.at(a)[thread];
        out[thread] = value;
        if (thread == 31) {
            mbarrier_arrive(barrier + 8);
        }
    } else if (thread == 32) {
        for (unsigned round = 0; round < 2; ++round) {
            if (round > 0) {
                mbarrier_wait(barrier + 8, 0);
            }
            mbarrier_expect(barrier, 64 * 128);
            tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: no syncwarp before release
        }
    }
}

__global__ void second_producer_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread % 64 == 0) {
        mbarrier_expect(barrier, 64 * 128);  // line: second producer
        tma_load_3d(a + thread / 64 * 64 * 128, &map, 0, 0, 0, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
}

__global__ void atomic_beside_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    if (thread == 64) {
        atomicAdd(pointer_cast<int>(memory.at(a)), 1);  // line: atomic beside TMA
    }
    mbarrier_wait(barrier, 0);
}

__global__ void TMA_over_atomics_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    atomicAdd(pointer_cast<int>(memory.at(a)), 1);
    __syncthreads();
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: TMA over atomics
    }
}

__global__ void TMA_over_an_mbarrier_kernel(const __grid_constant__ TensorMap map) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    const Memory memory(dynamic);
    if (threadIdx.x == 0) {
        const unsigned barrier = memory.address + 4096;
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(memory.address, &map, 0, 0, 0, barrier);  // line: TMA over an mbarrier
    }
}

void encode(const int64_t (&sizes)[3], const int (&box)[3], Swizzle swizzle, simt::SourceLocation location) {
    std::vector<bfloat16> tensor(1024 * 16);
    TensorMap map;
    encode_map<bfloat16, 3>(map, constant(tensor), sizes, {1024, 1024 * 16}, box, swizzle, location);
}

const Cases kFaults = {
    {"TMA over a store", of_tensor<TMA_over_a_store_kernel>},
    {"TMA over an mbarrier", of_tensor<TMA_over_an_mbarrier_kernel>},
    {"TMA over atomics", of_tensor<TMA_over_atomics_kernel>},
    {"TMA over readers", of_tensor_into_buffer<TMA_over_readers_kernel>},
    {"atomic beside TMA", of_tensor<atomic_beside_TMA_kernel>},
    {"copy at exit", of_tensor<copy_at_exit_kernel>},
    {"invisible to TMA", of_tensor<invisible_to_TMA_kernel>},
    {"long expect", of_tensor<long_expect_kernel>},
    {"mbarrier of another stage", of_tensor_into_buffer<mbarrier_of_another_stage_kernel>},
    {"misaligned target", of_tensor<misaligned_target_kernel>},
    {"no syncwarp before release", of_tensor_into_buffer<no_syncwarp_before_release_kernel>},
    {"read before TMA", of_tensor_into_buffer<read_before_TMA_kernel>},
    {"row beyond the swizzle",
     [] {
         encode(
             {64, 16, 1}, {64, 8, 1}, Swizzle::k64, simt::SourceLocation::current());  // line: row beyond the swizzle
     }},
    {"row not in 16 bytes",
     [] {
         encode({64, 16, 1}, {12, 8, 1}, Swizzle::k64, simt::SourceLocation::current());  // line: row not in 16 bytes
     }},
    {"row within the swizzle",
     [] {
         encode(
             {64, 16, 1}, {32, 8, 1}, Swizzle::k128, simt::SourceLocation::current());  // line: row within the swizzle
     }},
    {"second producer", of_tensor<second_producer_kernel>},
    {"short expect", of_tensor_into_buffer<short_expect_kernel>},
    {"target out of bounds", of_tensor<target_out_of_bounds_kernel>},
    {"tensor too small",
     [] {
         encode({1024, 17, 1}, {64, 8, 1}, Swizzle::k128, simt::SourceLocation::current());  // line: tensor too small
     }},
    {"two copies in one place", of_tensor<two_copies_in_one_place_kernel>},
    {"unexpected copy", of_tensor<unexpected_copy_kernel>},
    {"wide box",
     [] {
         encode({1024, 16, 1}, {64, 257, 1}, Swizzle::k128, simt::SourceLocation::current());  // line: wide box
     }},
    {"write before TMA", of_tensor<write_before_TMA_kernel>},
    {"wrong dimensions", of_tensor<wrong_dimensions_kernel>},
};

}  // namespace

int main(int count, char** arguments) { return run_case({}, kFaults, count, arguments); }
