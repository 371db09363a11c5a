// SPDX-License-Identifier: Apache-2.0
//
// Implementation of platform.h for nvcc: types of the toolkit under the names that kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/accum_type.h"

namespace spatialflow {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ double load(double value) { return value; }
__device__ __forceinline__ float load(float16 value) { return __half2float(value); }
__device__ __forceinline__ float load(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void store(float& target, float value) { target = value; }
__device__ __forceinline__ void store(double& target, double value) { target = value; }
__device__ __forceinline__ void store(float16& target, float value) { target = __float2half_rn(value); }
__device__ __forceinline__ void store(bfloat16& target, float value) { target = __float2bfloat16_rn(value); }

template <typename T>
using Global = T* __restrict__;
template <typename T>
using Shared = T*;

// Aligned for the widest access; otherwise a float array has the alignment of a float, 4 bytes.
#define SPATIALFLOW_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SPATIALFLOW_DYNAMIC_SHARED(type, name)                                         \
    extern __shared__ __align__(128) unsigned char spatialflow_dynamic_shared_bytes[]; \
    type* name = reinterpret_cast<type*>(spatialflow_dynamic_shared_bytes)

// Pointer to the same memory with another element type.
template <typename To, typename From>
__host__ __device__ __forceinline__ To* pointer_cast(From* pointer) {
    return reinterpret_cast<To*>(pointer);
}

// Vector of kWidth elements, loaded or stored by one access if its size is 2, 4, 8 or 16 bytes.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vec {
    T values[kWidth];
    __host__ __device__ __forceinline__ T& operator[](int i) { return values[i]; }
    __host__ __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <int kWidth, typename T>
__device__ __forceinline__ Vec<std::remove_const_t<T>, kWidth> load_vector(T* source) {
    return *reinterpret_cast<const Vec<std::remove_const_t<T>, kWidth>*>(source);
}

// 16 bytes are stored as one number, since the compiler may split the store of a Vec or a uint4 into elements.
template <int kWidth, typename T>
__device__ __forceinline__ void store_vector(T* target, const Vec<T, kWidth>& value) {
    if constexpr (sizeof(value) == 16) {
        uint4 words;
        memcpy(&words, &value, sizeof(value));
        const unsigned long long low = static_cast<unsigned long long>(words.y) << 32 | words.x;
        const unsigned long long high = static_cast<unsigned long long>(words.w) << 32 | words.z;
        *reinterpret_cast<unsigned __int128*>(target) = static_cast<unsigned __int128>(high) << 64 | low;
    } else {
        *reinterpret_cast<Vec<T, kWidth>*>(target) = value;
    }
}

// Add values[i] to target[i] in global memory, atomically by element. Four floats are one 16-byte reduction from
// compute capability 9.0 on. `target` is aligned to kWidth elements.
template <typename real_t, int kWidth>
__device__ __forceinline__ void reduce_add(real_t* target, const Vec<real_t, kWidth>& values) {
#if __CUDA_ARCH__ >= 900
    constexpr int kGroup = std::is_same_v<real_t, float> && kWidth % 4 == 0 ? 4 : 1;
#else
    constexpr int kGroup = 1;
#endif
#pragma unroll
    for (int i = 0; i < kWidth; i += kGroup) {
        if constexpr (kGroup == 4) {
            asm volatile(
                "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target + i)),
                "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3])
                : "memory");
        } else {
            atomicAdd(target + i, values[i]);
        }
    }
}

// Stream with the index of its device, so that launches do not query the runtime for the current device.
struct Stream {
    cudaStream_t handle;
    int device;
};

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

// Copy one value from device memory to the host, which waits for all work on `stream`.
template <typename T>
inline std::remove_const_t<T> read_back(T* source, Stream stream) {
    std::remove_const_t<T> value;
    check_cuda(
        cudaMemcpyAsync(&value, source, sizeof(value), cudaMemcpyDeviceToHost, stream.handle), "reading a result back");
    check_cuda(cudaStreamSynchronize(stream.handle), "reading a result back");
    return value;
}

// Cache of an integer per device, initially zero, for results of runtime queries.
class DeviceNumbers {
public:
    int at(Stream stream) const { return numbers_[stream.device].load(std::memory_order_relaxed); }
    void set(Stream stream, int number) { numbers_[stream.device].store(number, std::memory_order_relaxed); }

private:
    std::atomic<int> numbers_[128] = {};  // torch's device index is a signed 8-bit integer
};

// Attribute of the stream's device, cached; the attribute must not be zero.
template <cudaDeviceAttr kAttribute>
inline int device_attribute(Stream stream, const char* what) {
    static DeviceNumbers known;
    int value = known.at(stream);
    if (value == 0) {
        check_cuda(cudaDeviceGetAttribute(&value, kAttribute, stream.device), what);
        known.set(stream, value);
    }
    return value;
}

inline int multiprocessors(Stream stream) {
    return device_attribute<cudaDevAttrMultiProcessorCount>(stream, "multiprocessors");
}

// Maximum bytes of shared memory that a block can request, static memory included.
inline int largest_shared_bytes(Stream stream) {
    return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(stream, "shared memory");
}

// Allow kKernel `shared_bytes` of dynamic shared memory; CUDA requires this above 48 KiB.
template <auto kKernel>
inline void allow_shared_bytes(size_t shared_bytes, Stream stream) {
    static DeviceNumbers allowed;
    const int bytes = static_cast<int>(shared_bytes);
    if (bytes <= 48 * 1024 || bytes <= allowed.at(stream)) {
        return;
    }
    static std::mutex raising;  // otherwise a concurrent call could set a smaller limit last
    const std::lock_guard<std::mutex> lock(raising);
    if (bytes > allowed.at(stream)) {
        check_cuda(
            cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "dynamic shared memory of a kernel");
        allowed.set(stream, bytes);
    }
}

// Number of blocks of kKernel that the stream's device runs at one time: the grid of a persistent kernel. It is queried
// once per device, so all calls must pass the same threads and shared bytes.
template <auto kKernel>
inline int resident_blocks(int threads, size_t shared_bytes, Stream stream) {
    static DeviceNumbers known;
    int resident = known.at(stream);
    if (resident == 0) {
        int blocks = 0;
        allow_shared_bytes<kKernel>(shared_bytes, stream);
        check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, shared_bytes), "occupancy");
        resident = multiprocessors(stream) * (blocks > 0 ? blocks : 1);
        known.set(stream, resident);
    }
    return resident;
}

template <typename Kernel>
struct KernelArguments;
template <typename... Parameters>
struct KernelArguments<void (*)(Parameters...)> {
    template <void (*kKernel)(Parameters...)>
    static void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Parameters... arguments) {
        allow_shared_bytes<kKernel>(shared_bytes, stream);
        kKernel<<<grid, block, shared_bytes, stream.handle>>>(arguments...);
        check_cuda(cudaGetLastError(), "kernel launch");
    }
};

// Launch kKernel on `stream` and check for errors; an empty grid launches nothing.
template <auto kKernel, typename... Arguments>
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return;
    }
    KernelArguments<decltype(kKernel)>::template launch<kKernel>(grid, block, shared_bytes, stream, arguments...);
}

}  // namespace spatialflow
