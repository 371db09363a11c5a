// SPDX-License-Identifier: Apache-2.0
// PTX wrappers, bounded waits, tensor maps and JSON output shared by the probes.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/sm90_instructions.cuh"
#include "wgmma.cuh"

using bf16 = __nv_bfloat16;

// Instructions that the kernels of the package use.
using spatialflow::fence_async_proxy;
using spatialflow::mbarrier_arrive;
using spatialflow::mbarrier_expect;
using spatialflow::mbarrier_init;
using spatialflow::mbarrier_init_fence;
using spatialflow::shared_address;
using spatialflow::tma_load_3d;
using spatialflow::tma_load_4d;
using spatialflow::wgmma_commit;
using spatialflow::wgmma_fence;
using spatialflow::wgmma_wait;

// ---------------------------------------------------------------- host

inline const char* probe_name = "";

// Print {"probe": name, <fields>} on one line. `fields` is JSON text in printf form.
__attribute__((format(printf, 1, 2))) inline void finding(const char* fields, ...) {
    printf("{\"probe\": \"%s\", ", probe_name);
    va_list arguments;
    va_start(arguments, fields);
    vprintf(fields, arguments);
    va_end(arguments);
    printf("}\n");
    fflush(stdout);
}

// What `fail` writes before it traps. It is in mapped host memory, which is readable after the context is lost.
struct Fault {
    int code, block, thread, value;
};
inline Fault* fault_on_host = nullptr;
static __constant__ volatile Fault* fault_on_device;

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) {
        return;
    }
    finding(
        "\"error\": \"%s\", \"call\": \"%s\", \"fault_code\": %d, \"block\": %d, \"thread\": %d, \"value\": %d",
        cudaGetErrorString(error), what, fault_on_host ? fault_on_host->code : 0,
        fault_on_host ? fault_on_host->block : 0, fault_on_host ? fault_on_host->thread : 0,
        fault_on_host ? fault_on_host->value : 0);
    exit(1);
}
#define CHECK(call) check((call), #call)

inline int multiprocessors() {
    int count = 0;
    CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
    return count;
}

// Prepare the device; each probe calls it first, as every source file has a separate fault_on_device.
static inline void prepare_device() {
    CHECK(cudaSetDevice(0));
    CHECK(cudaHostAlloc(&fault_on_host, sizeof(Fault), cudaHostAllocMapped));
    memset(fault_on_host, 0, sizeof(Fault));
    volatile Fault* device_pointer = nullptr;
    CHECK(cudaHostGetDevicePointer((void**)&device_pointer, fault_on_host, 0));
    CHECK(cudaMemcpyToSymbol(fault_on_device, &device_pointer, sizeof(device_pointer)));
}

// Wait for the kernels launched before, and report a fault with `what`.
inline void finish(const char* what) {
    check(cudaGetLastError(), what);
    check(cudaDeviceSynchronize(), what);
}

template <typename T>
struct Buffer {
    T* data = nullptr;
    size_t size = 0;
    explicit Buffer(size_t count) : size(count) { CHECK(cudaMalloc(&data, count * sizeof(T))); }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
        CHECK(cudaMemcpy(data, values.data(), size * sizeof(T), cudaMemcpyHostToDevice));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(data); }
    void zero() { CHECK(cudaMemset(data, 0, size * sizeof(T))); }
    std::vector<T> host() const {
        std::vector<T> values(size);
        CHECK(cudaMemcpy(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
};

struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 2654435761u + 88172645463325252ull) {}
    uint32_t next() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return uint32_t(state >> 32);
    }
    int integer(int low, int high) { return low + int(next() % uint32_t(high - low + 1)); }
    float uniform() { return float(next() >> 8) / float(1 << 23) - 1; }
};

inline std::vector<bf16> random_integers(size_t count, int magnitude, uint64_t seed) {
    Random random(seed);
    std::vector<bf16> values(count);
    for (bf16& value : values) {
        value = __float2bfloat16(float(random.integer(-magnitude, magnitude)));
    }
    return values;
}

inline std::vector<bf16> random_values(size_t count, uint64_t seed, float scale = 1) {
    Random random(seed);
    std::vector<bf16> values(count);
    for (bf16& value : values) {
        value = __float2bfloat16(scale * random.uniform());
    }
    return values;
}

// Return the milliseconds of `repeats` calls of `launch` together, after one call that is not timed.
template <typename Launch>
float milliseconds(int repeats, Launch launch, const char* what) {
    launch();
    finish(what);
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventRecord(begin));
    for (int i = 0; i < repeats; ++i) {
        launch();
    }
    CHECK(cudaEventRecord(end));
    finish(what);
    float elapsed = 0;
    CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return elapsed;
}

// Encode a tiled bf16 tensor map; return the driver's result, which a probe may report. Sizes, strides (in bytes,
// without the innermost) and box begin with the innermost dimension.
inline CUresult encode_map(
    CUtensorMap* map, const void* address, const std::vector<cuuint64_t>& sizes, const std::vector<cuuint64_t>& strides,
    const std::vector<cuuint32_t>& box, CUtensorMapSwizzle swizzle) {
    static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult result;
        CHECK(cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &result));
        if (!encode || result != cudaDriverEntryPointSuccess) {
            finding("\"error\": \"cuTensorMapEncodeTiled not found\"");
            exit(1);
        }
    }
    const std::vector<cuuint32_t> steps(sizes.size(), 1);
    return encode(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(sizes.size()), const_cast<void*>(address), sizes.data(),
        strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Encode an NHWC tensor as planes of 8 channels, {8, W, H, C/8, N}. The box {8, box_x, box_y, 8, 1} is stored as
// [plane][y][x][8].
inline CUresult encode_planes(
    CUtensorMap* map, const void* x, cuuint64_t n, cuuint64_t h, cuuint64_t w, cuuint64_t c, cuuint32_t box_x = 10,
    cuuint32_t box_y = 10) {
    return encode_map(
        map, x, {8, w, h, c / 8, n}, {c * 2, w * c * 2, 16, h * w * c * 2}, {8, box_x, box_y, 8, 1},
        CU_TENSOR_MAP_SWIZZLE_NONE);
}

// Encode an NHWC tensor as rows of 64 channels, {C, W, H, N}. The box {64, box_x, box_y, 1} is stored as [y][x][64]
// with 128-byte swizzle.
inline CUresult encode_rows(
    CUtensorMap* map, const void* x, cuuint64_t n, cuuint64_t h, cuuint64_t w, cuuint64_t c, cuuint32_t box_x = 10,
    cuuint32_t box_y = 10) {
    return encode_map(
        map, x, {c, w, h, n}, {c * 2, w * c * 2, h * w * c * 2}, {64, box_x, box_y, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Encode weights [taps][outputs][C] as {C, outputs, taps}, in boxes {64, box_outputs, 1} with 128-byte swizzle.
inline CUresult encode_weights(
    CUtensorMap* map, const void* w, cuuint64_t taps, cuuint64_t outputs, cuuint64_t c, cuuint32_t box_outputs) {
    return encode_map(
        map, w, {c, outputs, taps}, {c * 2, outputs * c * 2}, {64, box_outputs, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

template <typename Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// ---------------------------------------------------------------- device

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
}

// Record the thread, a code and a value, then end the kernel with an error.
static __device__ __noinline__ void fail(int code, int value) {
    volatile Fault* fault = fault_on_device;
    fault->block = int(blockIdx.x), fault->thread = int(threadIdx.x), fault->value = value, fault->code = code;
    __threadfence_system();
    __trap();
}

// Arrive at the mbarrier at the same address in block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(unsigned barrier, unsigned rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void cluster_synchronize() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// Wait until the phase of this parity is complete, for half a second at most. `code` identifies the wait in a fault.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity, int code) {
    if (mbarrier_try_wait(barrier, parity)) {
        return;
    }
    const uint64_t begin = nanoseconds();
    while (!mbarrier_try_wait(barrier, parity)) {
        if (nanoseconds() - begin > 500000000ull) {
            fail(code, int(parity));
        }
    }
}

// Copy a box to the same shared address in every block of the cluster whose bit is set in `blocks`. The mbarrier of
// each of these blocks counts the bytes.
__device__ __forceinline__ void tma_load_3d_multicast(
    unsigned target, const CUtensorMap* map, int c0, int c1, int c2, unsigned barrier, unsigned short blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ void tma_load_5d(
    unsigned target, const CUtensorMap* map, int c0, int c1, int c2, int c3, int c4, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void bulk_load(unsigned target, const void* source, unsigned bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
        : "memory");
}

// Keep the compiler from moving a use of the accumulators across the wgmma instructions before or after.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

enum Swizzle : uint64_t { SWIZZLE_NONE = 0, SWIZZLE_128 = 1 };

// Encode the descriptor of a matrix in shared memory for wgmma. lbo and sbo are in bytes, base_offset in 128 bytes.
__host__ __device__ __forceinline__ uint64_t
matrix_descriptor(unsigned start, unsigned lbo, unsigned sbo, Swizzle swizzle, unsigned base_offset = 0) {
    return uint64_t((start & 0x3ffff) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 |
           uint64_t(base_offset & 7) << 49 | uint64_t(swizzle) << 62;
}
