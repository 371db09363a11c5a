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

#include "wgmma.cuh"

using bf16 = __nv_bfloat16;

// ---------------------------------------------------------------- host

inline const char* probe_name = "";

/// Prints {"probe": name, <fields>} on one line. The fields are given as JSON text in printf form.
__attribute__((format(printf, 1, 2))) inline void finding(const char* fields, ...) {
    printf("{\"probe\": \"%s\", ", probe_name);
    va_list arguments;
    va_start(arguments, fields);
    vprintf(fields, arguments);
    va_end(arguments);
    printf("}\n");
    fflush(stdout);
}

/// Record that a device function writes before it traps. Mapped host memory: readable after the context is lost.
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

/// Every source file has its own fault_on_device: each probe calls this first.
static inline void prepare_device() {
    CHECK(cudaSetDevice(0));
    CHECK(cudaHostAlloc(&fault_on_host, sizeof(Fault), cudaHostAllocMapped));
    memset(fault_on_host, 0, sizeof(Fault));
    volatile Fault* device_pointer = nullptr;
    CHECK(cudaHostGetDevicePointer((void**)&device_pointer, fault_on_host, 0));
    CHECK(cudaMemcpyToSymbol(fault_on_device, &device_pointer, sizeof(device_pointer)));
}

/// Waits for the kernels before it and reports a fault by name.
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

/// Milliseconds of `repeats` calls of `launch` together, after one call that is not timed.
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

/// Encode a tiled bf16 tensor map; return the driver's result, which a probe may report.
/// Sizes, strides (bytes, without the innermost) and the box start at the innermost dimension.
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

/// NHWC as planes of 8 channels: {8, W, H, C/8, N}, box {8, box_x, box_y, 8, 1}, which lands as [chunk][y][x][8].
inline CUresult encode_planes(
    CUtensorMap* map, const void* x, cuuint64_t n, cuuint64_t h, cuuint64_t w, cuuint64_t c, cuuint32_t box_x = 10,
    cuuint32_t box_y = 10) {
    return encode_map(
        map, x, {8, w, h, c / 8, n}, {c * 2, w * c * 2, 16, h * w * c * 2}, {8, box_x, box_y, 8, 1},
        CU_TENSOR_MAP_SWIZZLE_NONE);
}

/// NHWC as rows of 64 channels: {C, W, H, N}, box {64, box_x, box_y, 1}, which lands as [y][x][64], 128-byte swizzle.
inline CUresult encode_rows(
    CUtensorMap* map, const void* x, cuuint64_t n, cuuint64_t h, cuuint64_t w, cuuint64_t c, cuuint32_t box_x = 10,
    cuuint32_t box_y = 10) {
    return encode_map(
        map, x, {c, w, h, n}, {c * 2, w * c * 2, h * w * c * 2}, {64, box_x, box_y, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

/// Weights [taps][outputs][C]: {C, outputs, taps}, box {64, box_outputs, 1}, 128-byte swizzle.
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

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return unsigned(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
}

/// Records where and why, then ends the kernel with an error.
static __device__ __noinline__ void fail(int code, int value) {
    volatile Fault* fault = fault_on_device;
    fault->block = int(blockIdx.x), fault->thread = int(threadIdx.x), fault->value = value, fault->code = code;
    __threadfence_system();
    __trap();
}

__device__ __forceinline__ void mbarrier_init(unsigned barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/// Makes mbarrier_init visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives at the barrier at the same place in block `rank` of the cluster.
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

/// Waits until the phase of this parity is complete, for half a second at most; `code` names the place.
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

__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void tma_load_3d(
    unsigned target, const CUtensorMap* map, int c0, int c1, int c2, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
        : "memory");
}

/// The same to this address of every block of the cluster in `blocks`; each one's barrier gets its bytes.
__device__ __forceinline__ void tma_load_3d_multicast(
    unsigned target, const CUtensorMap* map, int c0, int c1, int c2, unsigned barrier, unsigned short blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"(blocks)
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

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Keeps the compiler from moving a use of the accumulators across the wgmma instruction before or after.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

enum Swizzle : uint64_t { SWIZZLE_NONE = 0, SWIZZLE_128 = 1 };

/// Shared memory matrix descriptor of wgmma; offsets in bytes.
__host__ __device__ __forceinline__ uint64_t
matrix_descriptor(unsigned start, unsigned lbo, unsigned sbo, Swizzle swizzle, unsigned base_offset = 0) {
    return uint64_t((start & 0x3ffff) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 |
           uint64_t(base_offset & 7) << 49 | uint64_t(swizzle) << 62;
}
