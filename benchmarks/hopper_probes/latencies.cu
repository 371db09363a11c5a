// SPDX-License-Identifier: Apache-2.0
// Probes of the device's properties, of latencies (barriers, loads from L2 and wgmma, in cycles), and of launches in
// streams and CUDA graphs.
#include "probes.h"

namespace {

constexpr int STEPS = 1000;

__global__ void syncthreads_kernel(uint64_t* result) {
    __syncthreads();
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        result[blockIdx.x] = uint64_t(clock64() - begin);
    }
}

// Named barrier of a warpgroup; each of the two warpgroups of the block has a separate barrier.
__global__ void named_barrier_kernel(uint64_t* result) {
    __syncthreads();
    const int id = 1 + threadIdx.x / 128;
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
    }
    if (threadIdx.x == 0) {
        result[blockIdx.x] = uint64_t(clock64() - begin);
    }
}

__global__ void cluster_barrier_kernel(uint64_t* result) {
    __syncthreads();
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    }
    if (threadIdx.x == 0) {
        result[blockIdx.x] = uint64_t(clock64() - begin);
    }
}

// One thread arrives, and waits for the phase that it has completed.
__global__ void mbarrier_alone_kernel(uint64_t* result) {
    __shared__ alignas(8) uint64_t storage;
    const unsigned barrier = shared_address(&storage);
    mbarrier_init(barrier, 1);
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        mbarrier_arrive(barrier);
        mbarrier_wait(barrier, i & 1, 20);
    }
    result[blockIdx.x] = uint64_t(clock64() - begin);
}

// Round trip between a producer warp and a consumer warp, with a full and an empty mbarrier for one stage.
__global__ void mbarrier_pair_kernel(uint64_t* result) {
    __shared__ alignas(8) uint64_t storage[2];
    const unsigned full = shared_address(storage), empty = full + 8;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1), mbarrier_init(empty, 1);
    }
    __syncthreads();
    const long long begin = clock64();
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < STEPS; ++i) {
            mbarrier_arrive(full);
            mbarrier_wait(empty, i & 1, 21);
        }
        result[blockIdx.x] = uint64_t(clock64() - begin);
    } else if (threadIdx.x == 32) {
#pragma unroll 1
        for (int i = 0; i < STEPS; ++i) {
            mbarrier_wait(full, i & 1, 22);
            mbarrier_arrive(empty);
        }
    }
}

// Wait for a phase that is already complete.
__global__ void mbarrier_passed_kernel(uint64_t* result) {
    __shared__ alignas(8) uint64_t storage;
    const unsigned barrier = shared_address(&storage);
    mbarrier_init(barrier, 1);
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        mbarrier_wait(barrier, 1, 23);
    }
    result[blockIdx.x] = uint64_t(clock64() - begin);
}

// Follow STEPS links of a chain by loads that bypass L1.
__device__ __forceinline__ unsigned follow_chain(const unsigned* next, unsigned index) {
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        asm volatile("ld.global.cg.u32 %0, [%1];"
                     : "=r"(index)
                     : "l"(__cvta_generic_to_global(next + index))
                     : "memory");
    }
    return index;
}

__global__ void chain_kernel(const unsigned* next, uint64_t* result, unsigned* last) {
    const unsigned first = follow_chain(next, 0);  // not timed
    const long long begin = clock64();
    *last = follow_chain(next, first);
    result[0] = uint64_t(clock64() - begin);
}

__global__ void wgmma_latency_kernel(uint64_t* result, float* sums) {
    __shared__ alignas(1024) bf16 operands[8192];
    for (int i = threadIdx.x; i < 8192; i += 128) {
        operands[i] = __float2bfloat16(1);
    }
    fence_async_proxy();
    __syncthreads();
    const uint64_t matrix = matrix_descriptor(shared_address(operands), 16, 1024, SWIZZLE_128);
    float d[64];
    for (float& sum : d) {
        sum = 0;
    }
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < STEPS; ++i) {
        pin(d);
        wgmma_fence();
        Wgmma<128>::ss(d, matrix, matrix, 1);
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
    }
    if (threadIdx.x == 0) {
        result[0] = uint64_t(clock64() - begin);
    }
    float sum = 0;
    for (const float x : d) {
        sum += x;
    }
    sums[threadIdx.x] = sum;
}

template <typename Launch>
void report(const char* what, int threads, int blocks, Launch launch) {
    Buffer<uint64_t> result(blocks);
    launch(result.data);
    finish(what);
    launch(result.data);
    finish(what);
    uint64_t sum = 0;
    for (const uint64_t cycles : result.host()) {
        sum += cycles;
    }
    finding("\"latency\": \"%s\", \"threads\": %d, \"cycles\": %.1f", what, threads, double(sum) / blocks / STEPS);
}

__global__ void empty_kernel() {}

// Minimal kernel of a sequence with programmatic dependent launch.
__global__ void dependent_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Kernel number `step` of a sequence: busy for `cycles` after its wait. Each kernel then sets `count` to step + 1. A
// count other than `step` after the wait shows that kernels ran out of order.
__global__ void chained_kernel(int* count, int step, int cycles, int* out_of_order) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x == 0 && blockIdx.x == 0 && *reinterpret_cast<volatile int*>(count) != step) {
        atomicAdd(out_of_order, 1);
    }
    const long long begin = clock64();
    while (clock64() - begin < cycles) {
    }
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        *reinterpret_cast<volatile int*>(count) = step + 1;
    }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_chained(
    cudaStream_t stream, bool programmatic, int blocks, int threads, int memory, void (*kernel)(Parameters...),
    Arguments... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.stream = stream;
    config.dynamicSmemBytes = memory;
    config.attrs = &attribute, config.numAttrs = programmatic;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Return the microseconds per kernel of `count` kernels in sequence, launched by `launch(stream, step)`; the least of
// four repeats.
template <typename Launch>
float chain_microseconds(bool graph, int count, const char* what, Launch launch) {
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    cudaGraphExec_t executable = nullptr;
    if (graph) {
        cudaGraph_t recorded;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < count; ++i) {
            CHECK(launch(stream, i));
        }
        CHECK(cudaStreamEndCapture(stream, &recorded));
        CHECK(cudaGraphInstantiate(&executable, recorded, 0));
        CHECK(cudaGraphDestroy(recorded));
    }
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    float best = 1e9f;
    for (int repeat = 0; repeat < 5; ++repeat) {
        CHECK(cudaEventRecord(begin, stream));
        if (graph) {
            CHECK(cudaGraphLaunch(executable, stream));
        } else {
            for (int i = 0; i < count; ++i) {
                CHECK(launch(stream, i));
            }
        }
        CHECK(cudaEventRecord(end, stream));
        finish(what);
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (repeat) {
            best = std::min(best, ms);
        }
    }
    if (executable) {
        CHECK(cudaGraphExecDestroy(executable));
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(stream));
    return best * 1e3f / float(count);
}

}  // namespace

void probe_device() {
    prepare_device();
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    int driver = 0, megahertz = 0, memory_megahertz = 0;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaDeviceGetAttribute(&megahertz, cudaDevAttrClockRate, 0));
    CHECK(cudaDeviceGetAttribute(&memory_megahertz, cudaDevAttrMemoryClockRate, 0));
    finding(
        "\"name\": \"%s\", \"multiprocessors\": %d, \"driver\": %d, \"l2_bytes\": %d, \"persisting_l2_bytes\": %d, "
        "\"shared_memory_per_block\": %zu, \"mhz\": %d, \"memory_mhz\": %d",
        device.name, device.multiProcessorCount, driver, device.l2CacheSize, device.persistingL2CacheMaxSize,
        device.sharedMemPerBlockOptin, megahertz / 1000, memory_megahertz / 1000);
}

void probe_latency() {
    prepare_device();
    for (const int threads : {32, 128, 256, 384, 512, 1024}) {
        report("__syncthreads", threads, 1, [=](uint64_t* result) { syncthreads_kernel<<<1, threads>>>(result); });
    }
    report("bar.sync of one of two warpgroups", 256, 1, [](uint64_t* result) {
        named_barrier_kernel<<<1, 256>>>(result);
    });
    for (const int size : {2, 4, 8}) {
        char name[40];
        snprintf(name, sizeof(name), "barrier.cluster, %d blocks", size);
        report(name, 256, size, [=](uint64_t* result) {
            cudaLaunchAttribute attribute{};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = size, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = dim3(size), config.blockDim = dim3(256), config.attrs = &attribute, config.numAttrs = 1;
            CHECK(cudaLaunchKernelEx(&config, cluster_barrier_kernel, result));
        });
    }
    report("mbarrier, arrive and wait of one thread", 1, 1, [](uint64_t* result) {
        mbarrier_alone_kernel<<<1, 1>>>(result);
    });
    report(
        "mbarrier, round trip of two warps", 64, 1, [](uint64_t* result) { mbarrier_pair_kernel<<<1, 64>>>(result); });
    report("mbarrier, wait for a complete phase", 1, 1, [](uint64_t* result) {
        mbarrier_passed_kernel<<<1, 1>>>(result);
    });

    // A cyclic chain through 8 MB with steps of about 2 MB, so every load is from L2.
    const unsigned count = 1 << 21, step = 524309;
    std::vector<unsigned> next(count);
    for (unsigned i = 0; i < count; ++i) {
        next[i] = (i + step) % count;
    }
    Buffer<unsigned> chain(next), last(1);
    report(
        "ld.global.cg from L2", 1, 1, [&](uint64_t* result) { chain_kernel<<<1, 1>>>(chain.data, result, last.data); });
    Buffer<float> sums(128);
    report("one wgmma m64n128k16, commit, wait", 128, 1, [&](uint64_t* result) {
        wgmma_latency_kernel<<<1, 128>>>(result, sums.data);
    });
}

void probe_launch() {
    prepare_device();
    constexpr int COUNT = 200, MEMORY = 214 * 1024;
    allow_shared_memory(empty_kernel, MEMORY);
    allow_shared_memory(dependent_kernel, MEMORY);
    const int sms = multiprocessors();
    for (const bool graph : {false, true}) {
        for (const int memory : {0, MEMORY}) {
            const float plain = chain_microseconds(graph, COUNT, "empty kernels", [=](cudaStream_t stream, int) {
                return launch_chained(stream, false, sms, 384, memory, empty_kernel);
            });
            const float programmatic =
                chain_microseconds(graph, COUNT, "dependent kernels", [=](cudaStream_t stream, int) {
                    return launch_chained(stream, true, sms, 384, memory, dependent_kernel);
                });
            finding(
                "\"launch\": \"%s\", \"blocks\": %d, \"threads\": 384, \"shared_memory\": %d, \"us_per_kernel\": %.3f, "
                "\"us_per_kernel_with_programmatic_launch\": %.3f",
                graph ? "graph" : "stream", sms, memory, plain, programmatic);
        }
    }
    // Kernels with 10,000 cycles of work; the order is checked.
    Buffer<int> state(2);
    for (const bool graph : {false, true}) {
        float times[2];
        int wrong[2];
        for (const bool programmatic : {false, true}) {
            state.zero();
            int* data = state.data;
            const float us = chain_microseconds(graph, COUNT, "chained kernels", [=](cudaStream_t stream, int i) {
                return launch_chained(stream, programmatic, sms, 384, 0, chained_kernel, data, i, 10000, data + 1);
            });
            times[programmatic] = us;
            wrong[programmatic] = state.host()[1];
        }
        // Every repeat but the first begins with the count of the previous repeat, so its first kernel counts as out of
        // order.
        finding(
            "\"launch\": \"%s, 10,000 cycles of work each\", \"us_per_kernel\": %.3f, "
            "\"us_per_kernel_with_programmatic_launch\": %.3f, \"out_of_order\": [%d, %d], \"expected_out_of_order\": "
            "4",
            graph ? "graph" : "stream", times[0], times[1], wrong[0], wrong[1]);
    }
}
