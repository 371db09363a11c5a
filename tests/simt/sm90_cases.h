// SPDX-License-Identifier: Apache-2.0
//
// Helpers of the test kernels for compute capability 9.0: operands in shared memory, their descriptors, and launches.
// Values are small integers, so products are exact in every order.
#pragma once

#include "cases.h"
#include "cuda/sm90_instructions.cuh"
#include "cuda/sm90_tensor_map.h"

namespace spatialflow {

using simt::Swizzle;

template <typename T>
std::vector<T> small_numbers(size_t count, unsigned factor) {
    std::vector<T> values(count);
    for (size_t i = 0; i < count; ++i) {
        store(values[i], static_cast<float>((i * factor + i / 7) % 9) - 4.0f);
    }
    return values;
}

template <typename T>
Global<const T> constant(std::vector<T>& values) {
    return Global<const T>(buffer(values));
}

// Same as matrix_descriptor, with another swizzle.
inline uint64_t descriptor(unsigned start, unsigned leading, unsigned stride, Swizzle swizzle) {
    return (matrix_descriptor(start, leading, stride) & ~(uint64_t{3} << 62)) | static_cast<uint64_t>(swizzle) << 62;
}

// Bytes of a row of a swizzled layout; 16 without swizzle.
constexpr unsigned row_bytes(Swizzle swizzle) {
    return swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : swizzle == Swizzle::k32 ? 32 : 16;
}

// Swizzled address of the byte that is at `address` without swizzle. The swizzle moves chunks of 16 bytes.
inline unsigned swizzled_address(unsigned address, Swizzle swizzle) {
    const unsigned chunks = row_bytes(swizzle) / 16, chunk = address / 16;
    return address - chunk % chunks * 16 + (chunk % chunks ^ address / 128 % chunks) * 16;
}

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

// Dynamic shared memory from the first address that is a multiple of 1024.
struct Memory {
    Shared<uint16_t> first;
    unsigned address;

    explicit Memory(const Shared<uint16_t>& memory)
        : first(memory + (1024 - shared_address(memory) % 1024) % 1024 / 2), address(shared_address(first)) {}

    // Pointer to the element at an address.
    Shared<uint16_t> at(unsigned element) const {
        return first + (static_cast<int>(element) - static_cast<int>(address)) / 2;
    }

    // Fill with zeros by `threads` threads; the running thread has number `thread`.
    void clear(unsigned begin, unsigned bytes, unsigned thread, unsigned threads) const {
        for (unsigned i = thread * 16; i < bytes; i += threads * 16) {
            store_vector(at(begin + i), Vec<uint16_t, 8>{});
        }
    }
};
constexpr unsigned kSharedBytes = 80 * 1024;  // dynamic shared memory of most launches

// Tensor map of a row-major matrix of `rows` x `columns`, in boxes of `box_rows` x 64 with 128-byte swizzle.
template <typename T>
TensorMap map_of(std::vector<T>& values, int64_t columns, int64_t rows, int box_rows = 64) {
    TensorMap map;
    expect(
        encode_map<T, 3>(map, constant(values), {columns, rows, 1}, {columns, columns * rows}, {64, box_rows, 1}),
        "a tensor map");
    return map;
}

inline uint64_t a_at(unsigned address) { return matrix_descriptor(address, 16, 1024); }
inline uint64_t b_at(unsigned address) { return matrix_descriptor(address, 64 * 128, 1024); }

// Start sums = a (64 x 16) * b (16 x 64) for descriptors of a and b. A report names the line of the caller.
inline void multiply(
    WgmmaSums<32>& sums, uint64_t a, uint64_t b, simt::SourceLocation location = simt::SourceLocation::current()) {
    wgmma_fence(location);
    Wgmma<64>::multiply(sums, a, b, 0, bfloat16{}, location);
}

// Start the copy of the first box of a map, 64 x 64 elements, to shared memory. One thread calls it. A report names the
// line of the caller.
inline void load_box(
    const TensorMap& map, unsigned target, unsigned barrier,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    mbarrier_expect(barrier, 64 * 128, location);
    tma_load_3d(target, &map, 0, 0, 0, barrier, location);
}

// Common start of most kernels: addresses `a` and `b` of two matrices (64 x 64), and `count` mbarriers for one arrival
// each.
#define SM90_BLOCK(count)                                                                    \
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);                                           \
    SPATIALFLOW_SHARED(uint64_t, barriers, count);                                           \
    const Memory memory(dynamic);                                                            \
    const unsigned a = memory.address, b = a + 64 * 128, barrier = shared_address(barriers); \
    const unsigned thread = threadIdx.x;                                                     \
    if (thread == 0) {                                                                       \
        for (unsigned i = 0; i < (count); ++i) {                                             \
            mbarrier_init(barrier + 8 * i, 1);                                               \
        }                                                                                    \
        mbarrier_init_fence();                                                               \
    }                                                                                        \
    __syncthreads();                                                                         \
    (void)a, (void)b
// SM90_BLOCK with zeros in a and b, ready for wgmma.
#define SM90_OPERANDS(count)                           \
    SM90_BLOCK(count);                                 \
    memory.clear(a, 2 * 64 * 128, thread, blockDim.x); \
    fence_async_proxy();                               \
    __syncthreads()

// Launches of a kernel: without arguments, with a buffer, with a tensor map, with both.
template <auto kKernel, unsigned kThreads = 128, unsigned kBlocks = 1>
void run() {
    launch<kKernel>(dim3(kBlocks), dim3(kThreads), kSharedBytes, Stream{});
}
template <auto kKernel, typename T = int>
void run_with_buffer() {
    std::vector<T> out(128);
    launch<kKernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, buffer(out));
}
template <auto kKernel, unsigned kThreads = 128, unsigned kBlocks = 1>
void run_with_map() {
    std::vector<bfloat16> tensor(64 * 128);
    launch<kKernel>(dim3(kBlocks), dim3(kThreads), kSharedBytes, Stream{}, map_of(tensor, 128, 64));
}
template <auto kKernel>
void run_with_map_and_buffer() {
    std::vector<bfloat16> tensor(64 * 128);
    std::vector<int> out(128);
    launch<kKernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map_of(tensor, 128, 64), buffer(out));
}

// Return whether a launch is stopped by a fault.
template <typename Launch>
bool is_stopped(Launch launch) {
    try {
        launch();
    } catch (const std::runtime_error&) {
        return true;
    }
    return false;
}

// Read the target of a copy without waiting for it. This fault stops the block while copies and products are in flight.
__global__ void stopped_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_OPERANDS(3);
    const unsigned c = b + 64 * 128;
    if (thread == 0) {
        for (unsigned i = 0; i < 3; ++i) {
            load_box(map, c + i * 64 * 128, barrier + 8 * i);
        }
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    multiply(sums, a_at(a), b_at(b));
    wgmma_commit();
    const uint16_t value = memory.at(c)[thread];
    out[thread] = value;
}

// Reach a named barrier with half of the threads that it waits for.
__global__ void waiting_kernel() {
    if (threadIdx.x < 32) {
        named_barrier<1, 64>();
    }
}

// Run clean cases after faults have stopped blocks, whose stacks and shared memory the next launches reuse.
template <typename Run>
void run_after_faults(Run run_clean_cases) {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(128);
    for (const unsigned blocks : {1u, 16u}) {
        const bool stopped = is_stopped([&] {
            launch<stopped_kernel>(
                dim3(blocks), dim3(128), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
        });
        expect(stopped, "a fault of copies and products");
        run_clean_cases();
        expect(
            is_stopped([&] { launch<waiting_kernel>(dim3(blocks), dim3(96), 0, Stream{}); }), "a fault of a barrier");
        run_clean_cases();
    }
}

}  // namespace spatialflow
