// SPDX-License-Identifier: Apache-2.0
//
// Thin wrappers of the instructions of compute capability 9.0a (semantics of the PTX manual). Addresses of shared
// memory are those of shared_address; offsets of descriptors are in bytes.
//
//   mbarrier_*                 barriers in shared memory that count arrivals and bytes
//   tma_load_3d / _4d          a box of a tensor map to shared memory; zeros outside the tensor
//   matrix_descriptor          a matrix in shared memory with 128-byte swizzle
//   Wgmma<outputs>::multiply   d (+)= a (64x16, K-major) * b (16 x outputs, outputs adjacent), both in shared memory
//
// Host code may include this header for every architecture; only 9.0a can run what is in it. The SIMT interpreter does
// not know it: sources with it are built for CUDA alone (cmake/ops.cmake).
#pragma once

#include <cuda.h>

#include "cuda/tensor_core.h"

namespace spatialflow {

__device__ __forceinline__ void mbarrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialized barriers visible to the asynchronous proxy.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}
// Arrives, and lets the phase wait for so many bytes.
__device__ __forceinline__ void mbarrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is complete. A new barrier has completed the phase of parity 1.
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

// What this thread has written to shared memory becomes visible to TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tma_load_3d(
    unsigned target, const CUtensorMap* map, int c0, int c1, int c2, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void tma_load_4d(
    unsigned target, const CUtensorMap* map, int c0, int c1, int c2, int c3, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
        : "memory");
}

// Registers of each thread of the warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The offset between groups of eight rows is `stride`. With outputs adjacent, rows are channels, and groups of 64
// outputs are `leading` apart.
__device__ __forceinline__ uint64_t matrix_descriptor(unsigned start, unsigned leading, unsigned stride) {
    constexpr uint64_t kSwizzle128 = 1;
    return static_cast<uint64_t>((start & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps every other use of the sums on this side of the wgmma instructions; without it ptxas runs them one by one.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

#define SPATIALFLOW_SUMS_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define SPATIALFLOW_SUMS_32(i) \
    SPATIALFLOW_SUMS_8(i), SPATIALFLOW_SUMS_8(i + 8), SPATIALFLOW_SUMS_8(i + 16), SPATIALFLOW_SUMS_8(i + 24)
#define SPATIALFLOW_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SPATIALFLOW_NAMES_64 \
    SPATIALFLOW_NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPATIALFLOW_NAMES_128 \
    SPATIALFLOW_NAMES_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
    "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"
// Operands: sums, descriptors of a and b, whether to add; the last two numbers say that b alone is transposed.
#define SPATIALFLOW_WGMMA(outputs, type, names, a, b, add)                                                    \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\n"                                                          \
    "wgmma.mma_async.sync.aligned.m64n" outputs "k16.f32." type "." type " {" names "}, " a ", " b ", p, 1, 1, " \
    "0, 1;\n}\n"

template <int kOutputs>
struct Wgmma;
template <>
struct Wgmma<64> {
    static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int add, bfloat16) {
        asm volatile(SPATIALFLOW_WGMMA("64", "bf16", SPATIALFLOW_NAMES_32, "%32", "%33", "%34")
                     : SPATIALFLOW_SUMS_32(0)
                     : "l"(a), "l"(b), "r"(add));
    }
    static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int add, float16) {
        asm volatile(SPATIALFLOW_WGMMA("64", "f16", SPATIALFLOW_NAMES_32, "%32", "%33", "%34")
                     : SPATIALFLOW_SUMS_32(0)
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <>
struct Wgmma<128> {
    static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add, bfloat16) {
        asm volatile(SPATIALFLOW_WGMMA("128", "bf16", SPATIALFLOW_NAMES_64, "%64", "%65", "%66")
                     : SPATIALFLOW_SUMS_32(0), SPATIALFLOW_SUMS_32(32)
                     : "l"(a), "l"(b), "r"(add));
    }
    static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add, float16) {
        asm volatile(SPATIALFLOW_WGMMA("128", "f16", SPATIALFLOW_NAMES_64, "%64", "%65", "%66")
                     : SPATIALFLOW_SUMS_32(0), SPATIALFLOW_SUMS_32(32)
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <>
struct Wgmma<256> {
    static __device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int add, bfloat16) {
        asm volatile(SPATIALFLOW_WGMMA("256", "bf16", SPATIALFLOW_NAMES_128, "%128", "%129", "%130")
                     : SPATIALFLOW_SUMS_32(0), SPATIALFLOW_SUMS_32(32), SPATIALFLOW_SUMS_32(64), SPATIALFLOW_SUMS_32(96)
                     : "l"(a), "l"(b), "r"(add));
    }
    static __device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int add, float16) {
        asm volatile(SPATIALFLOW_WGMMA("256", "f16", SPATIALFLOW_NAMES_128, "%128", "%129", "%130")
                     : SPATIALFLOW_SUMS_32(0), SPATIALFLOW_SUMS_32(32), SPATIALFLOW_SUMS_32(64), SPATIALFLOW_SUMS_32(96)
                     : "l"(a), "l"(b), "r"(add));
    }
};

#undef SPATIALFLOW_SUMS_8
#undef SPATIALFLOW_SUMS_32
#undef SPATIALFLOW_NAMES_32
#undef SPATIALFLOW_NAMES_64
#undef SPATIALFLOW_NAMES_128
#undef SPATIALFLOW_WGMMA

}  // namespace spatialflow
