// SPDX-License-Identifier: Apache-2.0
//
// Clean kernels for compute capability 9.0, for the tests of the interpreter (tests/test_simt.py): mbarriers, named
// barriers, registers, and the order of accesses. Each case checks its results.
#include "sm90_cases.h"

using namespace spatialflow;

namespace {

// Exchange values between warps 0 and 1 while warp 2 does not take part. Before that, all warps read the values.
__global__ void named_barriers_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 64);
    if (threadIdx.x < 64) {
        tile[threadIdx.x] = 0;
    }
    __syncthreads();
    int sum = tile[threadIdx.x % 64];
    if (threadIdx.x == 63) {
        fence_async_proxy();  // from here on the interpreter's vector clocks track all warps, see clocks.h
    }
    __syncthreads();
    if (threadIdx.x < 64) {
        for (int round = 1; round <= 3; ++round) {
            tile[threadIdx.x] = round;
            named_barrier<1, 64>();
            const int exchanged = tile[63 - threadIdx.x];
            sum += exchanged;
            named_barrier<2, 64>();
        }
    }
    out[threadIdx.x] = sum;
}

void named_barriers() {
    std::vector<int> out(96);
    launch<named_barriers_kernel>(dim3(2), dim3(96), 0, Stream{}, buffer(out));
    expect(out[0] == 6 && out[63] == 6 && out[64] == 0, "named barriers");
}

// Pass a sum along a ring of three warps, with an mbarrier between each two. Every warp adds a number loaded by TMA.
__global__ void ring_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(int, value, 1);
    SPATIALFLOW_SHARED(uint64_t, barriers, 4);
    const Memory memory(dynamic);
    const unsigned arrived = shared_address(barriers), copied = arrived + 24, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < 3; ++i) {
            mbarrier_init(arrived + 8 * i, 1);
        }
        mbarrier_init(copied, 1);
        mbarrier_init_fence();
        value[0] = 0;
    }
    __syncthreads();
    for (unsigned round = 0; round < 4; ++round) {
        if (warp != 0 || round != 0) {
            mbarrier_wait(arrived + 8 * warp, (warp == 0 ? round - 1 : round) % 2);
        }
        if (threadIdx.x % 32 == 0) {
            if (warp == 0) {
                load_box(map, memory.address, copied);
                mbarrier_wait(copied, round % 2);
            }
            const uint16_t number = memory.at(memory.address)[0];  // warp 0 has waited for the copy
            value[0] += number;
            mbarrier_arrive(arrived + 8 * ((warp + 1) % 3));
        }
        __syncwarp();
    }
    if (threadIdx.x == 64) {
        const int sum = value[0];
        out[0] = sum;
    }
}

void ring() {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(1);
    launch<ring_kernel>(dim3(1), dim3(96), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
    expect(out[0] == 36, "a ring of mbarriers");
}

// All lanes read one value and arrive separately. Some lanes arrive at another mbarrier too, in different rounds.
__global__ void lanes_arrive_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, value, 1);
    SPATIALFLOW_SHARED(uint64_t, barriers, 3);
    const unsigned full = shared_address(barriers), empty = full + 8, incomplete = full + 16;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 32);
        mbarrier_init(empty, 32);
        mbarrier_init(incomplete, 12);  // only 11 lanes arrive
    }
    __syncthreads();
    int sum = 0;
    for (int round = 0; round < 4; ++round) {
        if (threadIdx.x >= 32) {
            mbarrier_wait(empty, round % 2 ^ 1);
            if (threadIdx.x == 32) {
                value[0] = round;
            }
            mbarrier_arrive(full);
        } else {
            mbarrier_wait(full, round % 2);
            if (threadIdx.x % 3 == 0 && threadIdx.x % 4 == static_cast<unsigned>(round)) {
                mbarrier_arrive(incomplete);
            }
            const int read = value[0];
            sum += read;
            mbarrier_arrive(empty);
        }
    }
    out[threadIdx.x] = sum;
}

void lanes_arrive() {
    std::vector<int> out(64);
    launch<lanes_arrive_kernel>(dim3(2), dim3(64), 0, Stream{}, buffer(out));
    expect(out[0] == 6 && out[31] == 6, "arrivals of lanes");
}

// Complete each phase by two copies that start before their bytes are expected; then replace single elements.
__global__ void two_copies_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned barrier = shared_address(barriers), thread = threadIdx.x;
    if (thread == 0) {
        mbarrier_init(barrier, 2);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (unsigned round = 0; round < 3; ++round) {
        if (thread % 32 == 0) {
            tma_load_3d(memory.address + thread / 32 * 64 * 128, &map, 0, 0, 0, barrier);
            mbarrier_expect(barrier, 64 * 128);
        }
        mbarrier_wait(barrier, round % 2);
        memory.at(memory.address)[thread] = static_cast<uint16_t>(thread + round);
        __syncwarp();
        const uint16_t next = memory.at(memory.address)[thread ^ 1], far = memory.at(memory.address)[thread + 64];
        out[thread] = next * 100 + far;
        fence_async_proxy();
        __syncthreads();
    }
}

void two_copies() {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(64);
    launch<two_copies_kernel>(dim3(1), dim3(64), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
    expect(out[0] == 303 && out[63] == 6403, "two copies of a phase");
}

// A producer exits while its copy is in flight. One lane of another warp waits for the copy, and the other lanes
// synchronize with this lane by __syncwarp.
__global__ void exited_producer_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            load_box(map, memory.address, barrier);
        }
        return;
    }
    if (threadIdx.x == 63) {
        mbarrier_wait(barrier, 0);
    }
    __syncwarp();
    const uint16_t number = memory.at(memory.address)[threadIdx.x];
    out[threadIdx.x] = number;
}

void exited_producer() {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(64);
    launch<exited_producer_kernel>(dim3(2), dim3(64), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
    expect(out[32] == 3 && out[63] == 3, "copies of a thread that has exited");
}

// Set fewer registers than before, as many, and more. The next block begins with all registers again.
__global__ void registers_kernel() {
    decrease_registers<240>();
    decrease_registers<64>();
    decrease_registers<64>();
    increase_registers<64>();
    increase_registers<232>();
}

void registers() { launch<registers_kernel>(dim3(2), dim3(128), 0, Stream{}); }

// All warps read the same eight vectors of 16 bytes. Each block first writes two bytes of the last vector separately.
// The second block runs in the memory of the first.
__global__ void reused_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(uint16_t, tile, 64);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(barriers), 1);
        tile[56] = uint16_t{1};
    }
    __syncthreads();
    if (threadIdx.x < 8) {
        store_vector(tile + threadIdx.x * 8, Vec<uint16_t, 8>{{2, 3, 4, 5, 6, 7, 8, 9}});
    }
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < 64; i += 8) {
        sum += load_vector<8>(tile + i)[7];
    }
    out[threadIdx.x] = sum;
}

void reused() {
    std::vector<int> out(128);
    launch<reused_kernel>(dim3(2), dim3(128), 0, Stream{}, buffer(out));
    expect(out[0] == 72 && out[127] == 72, "shared memory of a second block");
}

void after_faults() {
    run_after_faults([] {
        named_barriers();
        ring();
    });
}

const Cases kClean = {
    {"after_faults", after_faults},
    {"exited_producer", exited_producer},
    {"lanes_arrive", lanes_arrive},
    {"named_barriers", named_barriers},
    {"registers", registers},
    {"reused", reused},
    {"ring", ring},
    {"two_copies", two_copies},
};

}  // namespace

int main(int count, char** arguments) { return run_case(kClean, {}, count, arguments); }
