// SPDX-License-Identifier: Apache-2.0
//
// Wrappers of the instructions of compute capability 9.0a (semantics of the PTX manual). Addresses of shared memory are
// results of shared_address. The arguments of matrix_descriptor are in bytes.
//
//   mbarrier_*                 barriers in shared memory that count arrivals and bytes
//   named_barrier<id, count>   __syncthreads of some warps of the block
//   tma_load_3d, tma_load_4d   copy of a box of a tensor map to shared memory, with zeros outside the tensor
//   matrix_descriptor          descriptor of a matrix in shared memory with 128-byte swizzle
//   Wgmma<outputs, adjacent>   d (+)= a (64x16, K-major) * b (16 x outputs, outputs adjacent or K-major)
//   WgmmaSums<count>           values of d in a thread; readable once wgmma_wait has waited for the products
//
// Code for architectures other than 9.0a may include this header; kernels have a body only if SPATIALFLOW_HAS_SM90.
#pragma once

#include "cuda/tensor_core.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define SPATIALFLOW_HAS_SM90 1
#else
#define SPATIALFLOW_HAS_SM90 0
#endif

namespace spatialflow {

// Encode the descriptor of a matrix. `stride` is the offset between groups of eight rows. With outputs adjacent, rows
// are channels, and `leading` is the offset between groups of 64 outputs. If K-major, rows are pixels or outputs, and
// `leading` is not read.
__device__ __forceinline__ uint64_t matrix_descriptor(unsigned start, unsigned leading, unsigned stride) {
    constexpr uint64_t kSwizzle128 = 1;
    return static_cast<uint64_t>((start & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace spatialflow

#if defined(__CUDACC__)

#include <cuda.h>

namespace spatialflow {

using TensorMap = CUtensorMap;

__device__ __forceinline__ void mbarrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Make initialized barriers visible to the asynchronous proxy.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}
// Arrive, and add `bytes` to the bytes that the phase waits for.
__device__ __forceinline__ void mbarrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Wait until the phase of this parity is complete. A new barrier has completed the phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
    unsigned done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// Wait for kThreads threads, a multiple of 32, at barrier kId; 0 is the barrier of __syncthreads.
template <int kId, int kThreads>
__device__ __forceinline__ void named_barrier() {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Make writes of this thread to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tma_load_3d(
    unsigned target, const TensorMap* map, int c0, int c1, int c2, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void tma_load_4d(
    unsigned target, const TensorMap* map, int c0, int c1, int c2, int c3, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
        : "memory");
}

// Set the number of registers of each thread of the warpgroup.
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
template <int kCount>
struct WgmmaSums {
    float values[kCount];
    __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};
// Keep other uses of the sums from moving across the wgmma instructions; otherwise ptxas serializes the instructions.
template <int kCount>
__device__ __forceinline__ void pin(WgmmaSums<kCount>& d) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+f"(d.values[i])::"memory");
    }
}

#define SPATIALFLOW_SUM(i) "+f"(d.values[i])
#define SPATIALFLOW_SUMS_8(i)                                                                   \
    SPATIALFLOW_SUM(i), SPATIALFLOW_SUM(i + 1), SPATIALFLOW_SUM(i + 2), SPATIALFLOW_SUM(i + 3), \
        SPATIALFLOW_SUM(i + 4), SPATIALFLOW_SUM(i + 5), SPATIALFLOW_SUM(i + 6), SPATIALFLOW_SUM(i + 7)
#define SPATIALFLOW_SUMS_32(i) \
    SPATIALFLOW_SUMS_8(i), SPATIALFLOW_SUMS_8(i + 8), SPATIALFLOW_SUMS_8(i + 16), SPATIALFLOW_SUMS_8(i + 24)
#define SPATIALFLOW_NAMES_32                                                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SPATIALFLOW_NAMES_64                                                                                           \
    SPATIALFLOW_NAMES_32                                                                                               \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Operands: sums, descriptors of a and b, whether to add to the sums, and whether b is transposed (not K-major). a is
// never transposed.
#define SPATIALFLOW_WGMMA(outputs, type, names, a, b, add, transposed)                             \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add                                                        \
    ", 0;\n"                                                                                       \
    "wgmma.mma_async.sync.aligned.m64n" outputs "k16.f32." type "." type " {" names "}, " a ", " b \
    ", p, 1, 1"                                                                                    \
    ", 0, " transposed ";\n}\n"

template <int kOutputs, bool kOutputsAdjacent = true>
struct Wgmma;
template <bool kOutputsAdjacent>
struct Wgmma<64, kOutputsAdjacent> {
    static __device__ __forceinline__ void multiply(WgmmaSums<32>& d, uint64_t a, uint64_t b, int add, bfloat16) {
        asm volatile(SPATIALFLOW_WGMMA("64", "bf16", SPATIALFLOW_NAMES_32, "%32", "%33", "%34", "%35")
                     : SPATIALFLOW_SUMS_32(0)
                     : "l"(a), "l"(b), "r"(add), "n"(kOutputsAdjacent ? 1 : 0));
    }
    static __device__ __forceinline__ void multiply(WgmmaSums<32>& d, uint64_t a, uint64_t b, int add, float16) {
        asm volatile(SPATIALFLOW_WGMMA("64", "f16", SPATIALFLOW_NAMES_32, "%32", "%33", "%34", "%35")
                     : SPATIALFLOW_SUMS_32(0)
                     : "l"(a), "l"(b), "r"(add), "n"(kOutputsAdjacent ? 1 : 0));
    }
};
template <bool kOutputsAdjacent>
struct Wgmma<128, kOutputsAdjacent> {
    static __device__ __forceinline__ void multiply(WgmmaSums<64>& d, uint64_t a, uint64_t b, int add, bfloat16) {
        asm volatile(SPATIALFLOW_WGMMA("128", "bf16", SPATIALFLOW_NAMES_64, "%64", "%65", "%66", "%67")
                     : SPATIALFLOW_SUMS_32(0), SPATIALFLOW_SUMS_32(32)
                     : "l"(a), "l"(b), "r"(add), "n"(kOutputsAdjacent ? 1 : 0));
    }
    static __device__ __forceinline__ void multiply(WgmmaSums<64>& d, uint64_t a, uint64_t b, int add, float16) {
        asm volatile(SPATIALFLOW_WGMMA("128", "f16", SPATIALFLOW_NAMES_64, "%64", "%65", "%66", "%67")
                     : SPATIALFLOW_SUMS_32(0), SPATIALFLOW_SUMS_32(32)
                     : "l"(a), "l"(b), "r"(add), "n"(kOutputsAdjacent ? 1 : 0));
    }
};

#undef SPATIALFLOW_SUM
#undef SPATIALFLOW_SUMS_8
#undef SPATIALFLOW_SUMS_32
#undef SPATIALFLOW_NAMES_32
#undef SPATIALFLOW_NAMES_64
#undef SPATIALFLOW_WGMMA

}  // namespace spatialflow

#endif
