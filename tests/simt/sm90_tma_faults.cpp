// SPDX-License-Identifier: Apache-2.0
//
// Kernels for compute capability 9.0 with one planted fault each in the use of TMA (tests/test_simt.py).
// A report names the line with the comment "line: <case>". "late" and "early" are values of SPATIALFLOW_SIMT_SM90.
#include "sm90_cases.h"

using namespace spatialflow;

namespace {

__global__ void short_expect_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(1);
    if (thread == 0) {
        load_box(map, a, barrier);
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
        load_box(map, shared_address(dynamic), barrier);  // line: invisible to TMA
    }
}

__global__ void read_before_TMA_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(1);
    if (thread == 0) {
        load_box(map, a, barrier);
    }
    __syncthreads();
    const uint16_t value = memory.at(a)[thread];  // line: read before TMA
    out[thread] = value;
}

__global__ void write_before_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        load_box(map, a, barrier);
    }
    __syncthreads();
    memory.at(a)[thread] = uint16_t{1};  // line: write before TMA
}

__global__ void TMA_over_a_store_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    memory.at(a)[thread] = uint16_t{1};
    __syncthreads();
    if (thread == 0) {
        load_box(map, a, barrier);  // line: TMA over a store
    }
}

__global__ void TMA_over_readers_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_OPERANDS(1);
    const uint16_t value = memory.at(a)[thread];
    out[thread] = value;
    if (thread == 0) {
        load_box(map, a, barrier);  // line: TMA over readers
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
        load_box(map, a + 64, barrier);  // line: misaligned target
    }
}

__global__ void target_out_of_bounds_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        load_box(map, a + kSharedBytes - 2048, barrier);  // line: target out of bounds
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
        load_box(map, a, barrier);  // line: copy at exit
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
            load_box(map, a, barrier);  // line: no syncwarp before release
        }
    }
}

__global__ void second_producer_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread % 64 == 0) {
        load_box(map, a + thread / 64 * 64 * 128, barrier);  // line: second producer
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
}

__global__ void atomic_beside_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        load_box(map, a, barrier);
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
        load_box(map, a, barrier);  // line: TMA over atomics
    }
}

__global__ void TMA_over_an_mbarrier_kernel(const __grid_constant__ TensorMap map) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    const Memory memory(dynamic);
    if (threadIdx.x == 0) {
        const unsigned barrier = memory.address + 4096;
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        load_box(map, memory.address, barrier);  // line: TMA over an mbarrier
    }
}

void encode(const int64_t (&sizes)[3], const int (&box)[3], Swizzle swizzle, simt::SourceLocation location) {
    std::vector<bfloat16> tensor(1024 * 16);
    TensorMap map;
    encode_map<bfloat16, 3>(map, constant(tensor), sizes, {1024, 1024 * 16}, box, swizzle, location);
}

const Cases kFaults = {
    {"TMA over a store", run_with_map<TMA_over_a_store_kernel>},
    {"TMA over an mbarrier", run_with_map<TMA_over_an_mbarrier_kernel>},
    {"TMA over atomics", run_with_map<TMA_over_atomics_kernel>},
    {"TMA over readers", run_with_map_and_buffer<TMA_over_readers_kernel>},
    {"atomic beside TMA", run_with_map<atomic_beside_TMA_kernel>},
    {"copy at exit", run_with_map<copy_at_exit_kernel>},
    {"invisible to TMA", run_with_map<invisible_to_TMA_kernel>},
    {"long expect", run_with_map<long_expect_kernel>},
    {"mbarrier of another stage", run_with_map_and_buffer<mbarrier_of_another_stage_kernel>},
    {"misaligned target", run_with_map<misaligned_target_kernel>},
    {"no syncwarp before release", run_with_map_and_buffer<no_syncwarp_before_release_kernel>},
    {"read before TMA", run_with_map_and_buffer<read_before_TMA_kernel>},
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
    {"second producer", run_with_map<second_producer_kernel>},
    {"short expect", run_with_map_and_buffer<short_expect_kernel>},
    {"target out of bounds", run_with_map<target_out_of_bounds_kernel>},
    {"tensor too small",
     [] {
         encode({1024, 17, 1}, {64, 8, 1}, Swizzle::k128, simt::SourceLocation::current());  // line: tensor too small
     }},
    {"two copies in one place", run_with_map<two_copies_in_one_place_kernel>},
    {"unexpected copy", run_with_map<unexpected_copy_kernel>},
    {"wide box",
     [] {
         encode({1024, 16, 1}, {64, 257, 1}, Swizzle::k128, simt::SourceLocation::current());  // line: wide box
     }},
    {"write before TMA", run_with_map<write_before_TMA_kernel>},
    {"wrong dimensions", run_with_map<wrong_dimensions_kernel>},
};

}  // namespace

int main(int count, char** arguments) { return run_case({}, kFaults, count, arguments); }
