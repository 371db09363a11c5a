// SPDX-License-Identifier: Apache-2.0
//
// Kernels for compute capability 9.0 with one planted fault each in the use of wgmma (tests/test_simt.py).
// A report names the line with the comment "line: <case>".
#include "sm90_cases.h"

using namespace spatialflow;

namespace {

__global__ void no_proxy_fence_kernel() {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    const Memory memory(dynamic);
    memory.clear(memory.address, 2 * 64 * 128, threadIdx.x, 128);
    __syncthreads();
    WgmmaSums<32> sums = {};
    const uint64_t left = a_at(memory.address), right = b_at(memory.address + 64 * 128);
    multiply(sums, left, right);  // line: no proxy fence
}

__global__ void late_proxy_fence_kernel() {
    SM90_OPERANDS(1);
    if (thread >= 128) {
        if (thread == 128) {
            memory.at(a)[5] = uint16_t{1};
            mbarrier_arrive(barrier);
            fence_async_proxy();
        }
        return;
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: late proxy fence
}

__global__ void fence_of_one_thread_kernel() {
    SM90_OPERANDS(1);
    memory.at(a)[thread] = uint16_t{1};
    if (thread == 0) {
        fence_async_proxy();
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: fence of one thread
}

__global__ void store_after_fence_kernel() {
    SM90_OPERANDS(1);
    if (thread == 77) {
        memory.at(a)[5] = uint16_t{1};
        fence_async_proxy();
        memory.at(b)[9] = uint16_t{1};
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: store after fence
}

__global__ void swizzle_of_one_side_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        load_box(map, b, barrier);
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<16> sums = {};
    wgmma_fence();
    const uint64_t right = descriptor(b, 64 * 64, 512, Swizzle::k64);
    Wgmma<32>::multiply(sums, a_at(a), right, 0, bfloat16{});  // line: swizzle of one side
}

__global__ void exchanged_offsets_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 2 * 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);
        tma_load_3d(b + 64 * 128, &map, 64, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<64> sums = {};
    wgmma_fence();
    const uint64_t right = matrix_descriptor(b, 1024, 64 * 128);
    Wgmma<128>::multiply(sums, a_at(a), right, 0, bfloat16{});  // line: exchanged offsets
}

__global__ void exchanged_offsets_of_a_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, matrix_descriptor(a, 1024, 16), b_at(b));  // line: exchanged offsets of a
}

__global__ void rows_without_swizzle_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        load_box(map, a, barrier);
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<32> sums = {};
    const uint64_t left = descriptor(a, 16, 1024, Swizzle::kNone);
    multiply(sums, left, b_at(b));  // line: rows without swizzle
}

__global__ void overwritten_by_copy_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread < 128) {
        WgmmaSums<32> sums = {};
        multiply(sums, a_at(a), b_at(b));
        wgmma_commit();
        named_barrier<1, 160>();
        wgmma_wait<0>();
        return;
    }
    named_barrier<1, 160>();
    if (thread == 128) {
        load_box(map, b, barrier);  // line: overwritten by copy
    }
}

__global__ void overwritten_by_store_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));
    wgmma_commit();
    __syncthreads();
    memory.at(b)[thread] = uint16_t{1};  // line: overwritten by store
    wgmma_wait<0>();
}

__global__ void released_too_early_kernel() {
    SM90_OPERANDS(1);
    if (thread < 128) {
        WgmmaSums<32> sums = {};
        for (int round = 0; round < 2; ++round) {
            multiply(sums, a_at(a + static_cast<unsigned>(round) * 32), b_at(b));
            wgmma_commit();
        }
        wgmma_wait<1>();
        if (thread == 0) {
            mbarrier_arrive(barrier);
        }
        wgmma_wait<0>();
        return;
    }
    mbarrier_wait(barrier, 0);
    memory.at(a)[8 * (thread - 128)] = uint16_t{1};  // line: released too early
}

__global__ void one_warp_releases_kernel() {
    SM90_OPERANDS(1);
    if (thread < 128) {
        WgmmaSums<32> sums = {};
        multiply(sums, a_at(a), b_at(b));
        wgmma_commit();
        wgmma_wait<0>();
        if (thread == 0) {
            mbarrier_arrive(barrier);
        }
        return;
    }
    mbarrier_wait(barrier, 0);
    memory.at(b)[thread] = uint16_t{1};  // line: one warp releases
}

__global__ void sums_before_wait_kernel(Global<float> out) {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));
    wgmma_commit();
    wgmma_wait<1>();
    out[thread] = sums[0];  // line: sums before wait
}

__global__ void no_commit_kernel(Global<float> out) {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));
    wgmma_wait<0>();
    out[thread] = sums[0];  // line: no commit
}

__global__ void sums_end_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: sums end
    wgmma_commit();
}

__global__ void outside_sums_kernel(Global<float> out) {
    const WgmmaSums<32> sums = {};
    out[threadIdx.x] = sums[32];  // line: outside sums
}

__global__ void no_wgmma_fence_kernel(Global<float> out) {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    for (int round = 0; round < 2; ++round) {
        if (round == 0) {
            wgmma_fence();
        }
        Wgmma<64>::multiply(sums, a_at(a), b_at(b), round, bfloat16{});  // line: no wgmma fence
        wgmma_commit();
        wgmma_wait<0>();
        out[thread] = sums[0];
    }
}

__global__ void start_not_shifted_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    const uint64_t raw = (a_at(0) | a) + 40 * 1024;
    multiply(sums, raw, b_at(b));  // line: start not shifted
}

__global__ void start_of_the_low_kilobytes_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(0) | a, b_at(b));  // line: start of the low kilobytes
}

__global__ void base_offset_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a + 128) | uint64_t{1} << 49, b_at(b));  // line: base offset
}

__global__ void operand_out_of_bounds_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(a + kSharedBytes));  // line: operand out of bounds
}

__global__ void wrong_first_warp_kernel() {
    SM90_OPERANDS(1);
    if (thread < 32 || thread >= 160) {
        return;
    }
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: wrong first warp
}

__global__ void different_descriptors_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    const uint64_t left = a_at(a + thread / 64 * 32);
    multiply(sums, left, b_at(b));  // line: different descriptors
}

__global__ void elected_lane_waits_kernel(const __grid_constant__ TensorMap map, unsigned elected) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        load_box(map, b, barrier);
    }
    if (thread % 32 == elected) {
        mbarrier_wait(barrier, 0);
    }
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: elected lane waits
}

// The storing thread has waited only for the products of its warp.
__global__ void store_after_own_wait_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));
    wgmma_commit();
    wgmma_wait<0>();
    if (thread == 0) {
        memory.at(b)[0] = uint16_t{1};  // line: store after own wait
    }
}

// Two warpgroups multiply, but only one arrives after its products.
__global__ void one_warpgroup_releases_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(2);
    if (thread < 256) {
        mbarrier_wait(barrier, 0);
        WgmmaSums<32> sums = {};
        multiply(sums, a_at(a), b_at(b));
        wgmma_commit();
        wgmma_wait<0>();
        if (thread < 128) {
            named_barrier<1, 128>();
            if (thread == 0) {
                mbarrier_arrive(barrier + 8);
            }
        }
    } else if (thread == 256) {
        for (unsigned round = 0; round < 2; ++round) {
            if (round > 0) {
                mbarrier_wait(barrier + 8, 0);
            }
            load_box(map, b, barrier);  // line: one warpgroup releases
        }
    }
}

__global__ void two_bytes_after_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        load_box(map, b, barrier);
    }
    mbarrier_wait(barrier, 0);
    if (thread == 3) {
        memory.at(b)[7] = uint16_t{1};
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: two bytes after TMA
}

__global__ void cp_async_without_proxy_fence_kernel(Global<int> values) {
    SM90_OPERANDS(1);
    if (thread < 32) {
        cp_async_16(memory.at(a) + thread * 8, pointer_cast<const uint16_t>(values) + thread * 8, true);
        cp_async_commit();
        cp_async_wait<0>();
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: cp.async without proxy fence
}

__global__ void elected_lane_fences_kernel() {
    SM90_BLOCK(1);
    memory.clear(a, 2 * 64 * 128, thread, 128);
    __syncthreads();
    if (thread % 32 == 0) {
        fence_async_proxy();
    }
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: elected lane fences
}

__global__ void lanes_at_two_lines_kernel() {
    SM90_OPERANDS(1);
    if (thread % 32 < 31) {
        wgmma_fence();  // line: lanes at two lines
    } else {
        wgmma_fence();
    }
}

__global__ void operands_of_the_first_block_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (blockIdx.x == 0) {
        memory.clear(a, 64 * 128, thread, 128);
        fence_async_proxy();
        if (thread == 0) {
            load_box(map, b, barrier);
        }
        mbarrier_wait(barrier, 0);
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));  // line: operands of the first block
    wgmma_commit();
    wgmma_wait<0>();
}

template <unsigned kLane>
void elected_lane_waits() {
    std::vector<bfloat16> tensor(64 * 128);
    launch<elected_lane_waits_kernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map_of(tensor, 128, 64), kLane);
}

const Cases kFaults = {
    {"base offset", run<base_offset_kernel>},
    {"cp.async without proxy fence", run_with_buffer<cp_async_without_proxy_fence_kernel>},
    {"different descriptors", run<different_descriptors_kernel>},
    {"elected lane fences", run<elected_lane_fences_kernel>},
    {"elected lane waits", elected_lane_waits<0>},
    {"elected lane waits, the last", elected_lane_waits<31>},
    {"exchanged offsets", run_with_map<exchanged_offsets_kernel>},
    {"exchanged offsets of a", run<exchanged_offsets_of_a_kernel>},
    {"fence of one thread", run<fence_of_one_thread_kernel>},
    {"lanes at two lines", run<lanes_at_two_lines_kernel>},
    {"late proxy fence", run<late_proxy_fence_kernel, 256>},
    {"no commit", run_with_buffer<no_commit_kernel, float>},
    {"no proxy fence", run<no_proxy_fence_kernel>},
    {"no wgmma fence", run_with_buffer<no_wgmma_fence_kernel, float>},
    {"one warp releases", run<one_warp_releases_kernel, 160>},
    {"one warpgroup releases", run_with_map<one_warpgroup_releases_kernel, 288>},
    {"operand out of bounds", run<operand_out_of_bounds_kernel>},
    {"operands of the first block", run_with_map<operands_of_the_first_block_kernel, 128, 2>},
    {"outside sums", run_with_buffer<outside_sums_kernel, float>},
    {"overwritten by copy", run_with_map<overwritten_by_copy_kernel, 160>},
    {"overwritten by store", run<overwritten_by_store_kernel>},
    {"released too early", run<released_too_early_kernel, 160>},
    {"rows without swizzle",
     [] {
         std::vector<bfloat16> tensor(64 * 64);
         TensorMap map;
         encode_map<bfloat16, 3>(map, constant(tensor), {64, 64, 1}, {64, 64 * 64}, {64, 64, 1}, Swizzle::kNone);
         launch<rows_without_swizzle_kernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map);
     }},
    {"start not shifted", run<start_not_shifted_kernel>},
    {"start of the low kilobytes", run<start_of_the_low_kilobytes_kernel>},
    {"store after fence", run<store_after_fence_kernel>},
    {"store after own wait", run<store_after_own_wait_kernel>},
    {"sums before wait", run_with_buffer<sums_before_wait_kernel, float>},
    {"sums end", run<sums_end_kernel>},
    {"swizzle of one side", run_with_map<swizzle_of_one_side_kernel>},
    {"two bytes after TMA", run_with_map<two_bytes_after_TMA_kernel>},
    {"wrong first warp", run<wrong_first_warp_kernel, 256>},
};

}  // namespace

int main(int count, char** arguments) { return run_case({}, kFaults, count, arguments); }
