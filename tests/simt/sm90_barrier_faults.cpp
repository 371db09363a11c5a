// SPDX-License-Identifier: Apache-2.0
//
// Kernels for compute capability 9.0 with one planted fault each: mbarriers, named barriers and registers
// (tests/test_simt.py). A report names the line with the comment "line: <case>".
#include "sm90_cases.h"

using namespace spatialflow;

namespace {

__global__ void seen_parity_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_arrive(barrier);
    }
    for (int round = 0; round < 2; ++round) {
        mbarrier_wait(barrier, 0);  // line: seen parity
    }
}

__global__ void early_parity_kernel(Global<int> out) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        memory.at(a)[0] = uint16_t{1};  // line: early parity
        mbarrier_arrive(barrier);
    } else if (thread == 127) {
        mbarrier_wait(barrier, 1);
        const uint16_t value = memory.at(a)[0];
        out[thread] = value;
    }
}

// Lane 7 arrives before it reads, the others after.
__global__ void arrival_before_read_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, value, 1);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const unsigned barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
        value[0] = 0;
        mbarrier_init(barrier, 32);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        if (threadIdx.x == 7) {
            mbarrier_arrive(barrier);
        }
        const int read = value[0];
        out[threadIdx.x] = read;
        if (threadIdx.x != 7) {
            mbarrier_arrive(barrier);
        }
    } else if (threadIdx.x == 32) {
        mbarrier_wait(barrier, 0);
        value[0] = 1;  // line: arrival before read
    }
}

// Thread 64 waits for thread 32, which arrives before it has waited for the store of thread 0.
__global__ void broken_chain_kernel(Global<int> out) {
    SM90_BLOCK(2);
    if (thread == 0) {
        memory.at(a)[0] = uint16_t{1};
        mbarrier_arrive(barrier);
    } else if (thread == 32) {
        mbarrier_arrive(barrier + 8);
        mbarrier_wait(barrier, 0);
    } else if (thread == 64) {
        mbarrier_wait(barrier + 8, 0);
        const uint16_t value = memory.at(a)[0];  // line: broken chain
        out[0] = value;
    }
}

__global__ void endless_wait_kernel() {
    SM90_BLOCK(2);
    if (thread == 0) {
        mbarrier_arrive(barrier);
    }
    mbarrier_wait(barrier + 8, 0);  // line: endless wait
}

__global__ void parity_of_two_kernel() {
    SM90_BLOCK(1);
    mbarrier_wait(barrier, 2);  // line: parity of two
}

__global__ void invisible_mbarrier_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(barriers), 1);
        mbarrier_init_fence();
    }
    if (threadIdx.x == 33) {
        mbarrier_arrive(shared_address(barriers));  // line: invisible mbarrier
    }
}

__global__ void no_mbarrier_kernel() {
    SM90_BLOCK(1);
    mbarrier_wait(barrier + 8, 0);  // line: no mbarrier
}

__global__ void live_mbarrier_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_arrive(barrier);
        mbarrier_init(barrier, 1);  // line: live mbarrier
    }
}

__global__ void misaligned_mbarrier_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 2);
    mbarrier_init(shared_address(barriers) + 4, 1);  // line: misaligned mbarrier
}

__global__ void too_many_arrivals_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
    }
    __syncthreads();
    if (thread == 32) {
        mbarrier_arrive(barrier);  // line: too many arrivals
    }
}

__global__ void too_many_registers_kernel() {
    if (threadIdx.x < 128) {
        decrease_registers<56>();
    } else {
        increase_registers<232>();  // line: too many registers
    }
}

__global__ void registers_of_some_kernel() {
    if (threadIdx.x < 96) {
        decrease_registers<56>();  // line: registers of some
    }
}

__global__ void odd_registers_kernel() {
    decrease_registers<60>();  // line: odd registers
}

__global__ void two_counts_kernel() {
    if (threadIdx.x < 32) {
        named_barrier<1, 64>();
    } else {
        named_barrier<1, 96>();  // line: two counts
    }
}

__global__ void named_barrier_skipped_kernel() {
    if (threadIdx.x < 32) {
        named_barrier<3, 64>();  // line: named barrier skipped
    }
}

__global__ void mbarrier_read_kernel(Global<int> out) {
    SM90_BLOCK(1);
    const uint64_t state = barriers[0];  // line: mbarrier read
    out[thread] = static_cast<int>(state);
}

__global__ void mbarrier_written_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        barriers[0] = uint64_t{0};  // line: mbarrier written
    }
}

__global__ void phase_not_waited_for_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        for (int round = 0; round < 2; ++round) {
            mbarrier_arrive(barrier);  // line: phase not waited for
        }
    }
}

__global__ void mbarrier_of_the_first_block_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        mbarrier_init(shared_address(barriers), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive(shared_address(barriers));  // line: mbarrier of the first block
    }
}

__global__ void many_mbarriers_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 65);
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < 65; ++i) {
            mbarrier_init(shared_address(barriers) + 8 * i, 1);  // line: many mbarriers
        }
    }
}

__global__ void more_registers_by_dec_kernel() {
    decrease_registers<176>();  // line: more registers by dec
}

__global__ void fewer_registers_by_inc_kernel() {
    increase_registers<160>();  // line: fewer registers by inc
}

__global__ void halves_of_warps_kernel() {
    if (threadIdx.x % 32 < 16) {
        named_barrier<1, 64>();  // line: halves of warps
    }
}

const Cases kFaults = {
    {"arrival before read", run_with_buffer<arrival_before_read_kernel>},
    {"broken chain", run_with_buffer<broken_chain_kernel>},
    {"early parity", run_with_buffer<early_parity_kernel>},
    {"endless wait", run<endless_wait_kernel>},
    {"fewer registers by inc", run<fewer_registers_by_inc_kernel, 384>},
    {"halves of warps", run<halves_of_warps_kernel>},
    {"invisible mbarrier", run<invisible_mbarrier_kernel>},
    {"live mbarrier", run<live_mbarrier_kernel>},
    {"many mbarriers", run<many_mbarriers_kernel>},
    {"mbarrier of the first block", run<mbarrier_of_the_first_block_kernel, 128, 2>},
    {"mbarrier read", run_with_buffer<mbarrier_read_kernel>},
    {"mbarrier written", run<mbarrier_written_kernel>},
    {"misaligned mbarrier", run<misaligned_mbarrier_kernel>},
    {"more registers by dec", run<more_registers_by_dec_kernel, 384>},
    {"named barrier skipped", run<named_barrier_skipped_kernel>},
    {"no mbarrier", run<no_mbarrier_kernel>},
    {"odd registers", run<odd_registers_kernel>},
    {"parity of two", run<parity_of_two_kernel>},
    {"phase not waited for", run<phase_not_waited_for_kernel>},
    {"registers of some", run<registers_of_some_kernel>},
    {"seen parity", run<seen_parity_kernel>},
    {"too many arrivals", run<too_many_arrivals_kernel>},
    {"too many registers", run<too_many_registers_kernel, 384>},
    {"two counts", run<two_counts_kernel>},
};

}  // namespace

int main(int count, char** arguments) { return run_case({}, kFaults, count, arguments); }
