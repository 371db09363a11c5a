// SPDX-License-Identifier: Apache-2.0
// Probes of rates: TMA boxes from L2, reductions to global memory, mma.sync and wgmma, reads of L2, copies in HBM.
#include "probes.h"

namespace {

struct Cycles {
    uint64_t sum, longest, nanoseconds;
};

// Summarize the {cycles, nanoseconds} of all blocks: the sum of the cycles, and both numbers of the longest block.
Cycles summarize(const Buffer<uint64_t>& buffer) {
    Cycles result{};
    const std::vector<uint64_t> values = buffer.host();
    for (size_t i = 0; i + 1 < values.size(); i += 2) {
        result.sum += values[i];
        if (values[i] > result.longest) {
            result.longest = values[i], result.nanoseconds = values[i + 1];
        }
    }
    return result;
}

double megahertz(const Cycles& cycles) { return 1e3 * double(cycles.longest) / double(cycles.nanoseconds + 1); }

struct Stopwatch {
    uint64_t cycles, time;
};

__device__ Stopwatch start_stopwatch() { return {uint64_t(clock64()), nanoseconds()}; }

__device__ void store_stopwatch(const Stopwatch& start, uint64_t* result) {
    result[2 * blockIdx.x] = uint64_t(clock64()) - start.cycles;
    result[2 * blockIdx.x + 1] = nanoseconds() - start.time;
}

// ------------------------------------------------------------------------------------------------ tma, l2

constexpr int H = 100, W = 168, C = 256, HALO_BYTES = 12800, WEIGHT_BYTES = 16384, LINEAR_BYTES = 16384;
enum Kind { PLANES, ROWS, WEIGHTS, LINEAR };

// Copy boxes to shared memory by one thread, `stages` boxes in flight; no thread reads them.
template <Kind KIND>
__global__ void __launch_bounds__(32) tma_rate_kernel(
    const __grid_constant__ CUtensorMap map, const char* linear, int linear_boxes, int loops, int stages,
    uint64_t* result) {
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) uint64_t barriers[16];
    if (threadIdx.x) {
        return;
    }
    constexpr unsigned BYTES = KIND == LINEAR ? LINEAR_BYTES : KIND == WEIGHTS ? WEIGHT_BYTES : HALO_BYTES;
    constexpr unsigned STAGE_BYTES = (BYTES + 1023) / 1024 * 1024;
    const unsigned base = (shared_address(memory) + 1023) / 1024 * 1024, barrier = shared_address(barriers);
    for (int i = 0; i < stages; ++i) {
        mbarrier_init(barrier + 8 * i, 1);
    }
    mbarrier_init_fence();
    const Stopwatch stopwatch = start_stopwatch();
    int stage = 0, parity = 0;
    for (int i = 0; i < loops + stages; ++i) {
        if (i >= stages) {
            mbarrier_wait(barrier + 8 * stage, parity, 10 + KIND);
        }
        if (i < loops) {
            const unsigned target = base + stage * STAGE_BYTES, full = barrier + 8 * stage;
            const unsigned tile = blockIdx.x + unsigned(i) * gridDim.x;
            mbarrier_expect(full, BYTES);
            if (KIND == LINEAR) {
                bulk_load(target, linear + size_t(tile % linear_boxes) * BYTES, BYTES, full);
            } else if (KIND == WEIGHTS) {
                tma_load_3d(target, &map, tile % 4 * 64, tile / 4 % 2 * 128, tile / 8 % 9, full);
            } else {
                const int x0 = tile / 4 % 21 * 8 - 1, y0 = tile / 84 % 12 * 8 - 1, chunk = tile % 4;
                if (KIND == PLANES) {
                    tma_load_5d(target, &map, 0, x0, y0, chunk * 8, 0, full);
                } else {
                    tma_load_4d(target, &map, chunk * 64, x0, y0, 0, full);
                }
            }
        }
        if (++stage == stages) {
            stage = 0;
            if (i >= stages) {
                parity ^= 1;
            }
        }
    }
    store_stopwatch(stopwatch, result);
}

template <Kind KIND>
void tma_rate(const char* name, const CUtensorMap& map, const char* linear, int linear_boxes) {
    constexpr int BYTES = KIND == LINEAR ? LINEAR_BYTES : KIND == WEIGHTS ? WEIGHT_BYTES : HALO_BYTES;
    constexpr int MEMORY = 13 * 1024 * 16 + 1024;
    allow_shared_memory(tma_rate_kernel<KIND>, MEMORY);
    for (const int blocks : {1, multiprocessors()}) {
        for (const int stages : {1, 2, 4, 8, 12}) {
            Buffer<uint64_t> result(2 * blocks);
            const int loops = 1000;
            const float ms = milliseconds(
                1,
                [&] {
                    tma_rate_kernel<KIND>
                        <<<blocks, 32, MEMORY>>>(map, linear, linear_boxes, loops, stages, result.data);
                },
                name);
            const Cycles cycles = summarize(result);
            finding(
                "\"box\": \"%s\", \"box_bytes\": %d, \"blocks\": %d, \"boxes_in_flight\": %d, "
                "\"bytes_per_clk_per_sm\": "
                "%.2f, "
                "\"cycles_per_box\": %.0f, \"gb_per_s\": %.0f, \"mhz\": %.0f",
                name, BYTES, blocks, stages, double(BYTES) * loops / (double(cycles.sum) / blocks),
                double(cycles.sum) / blocks / loops, double(BYTES) * loops * blocks / ms * 1e-6, megahertz(cycles));
        }
    }
}

// ------------------------------------------------------------------------------------------------ red

constexpr int ROW_FLOATS = 256, RED_ROWS = 8192;  // 8 MB
enum Reduction { FULL_SECTORS, HALF_SECTORS, SCALAR, PAIRS };

__device__ __forceinline__ void red4(float* target) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(__cvta_generic_to_global(target)),
                 "f"(1.0f)
                 : "memory");
}
__device__ __forceinline__ void red2(float* target) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %1};" ::"l"(__cvta_generic_to_global(target)), "f"(1.0f)
                 : "memory");
}
__device__ __forceinline__ void red1(float* target) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(target)), "f"(1.0f)
                 : "memory");
}

// Add one to all 256 numbers of random rows, a row per warp at a time.
template <Reduction KIND>
__global__ void __launch_bounds__(256) red_kernel(float* sums, int loops) {
    const int lane = threadIdx.x % 32;
    unsigned state = (blockIdx.x * 8 + threadIdx.x / 32) * 2654435761u + 12345;
    for (int i = 0; i < loops; ++i) {
        state = state * 1664525u + 1013904223u;
        float* row = sums + size_t((state >> 8) % RED_ROWS) * ROW_FLOATS;
        if (KIND == FULL_SECTORS) {
            for (int half = 0; half < 2; ++half) {
                red4(row + half * 128 + lane * 4);
            }
        } else if (KIND == HALF_SECTORS) {
            for (int half = 0; half < 2; ++half) {
                red4(row + lane * 8 + half * 4);
            }
        } else if (KIND == PAIRS) {
            for (int part = 0; part < 4; ++part) {
                red2(row + part * 64 + lane * 2);
            }
        } else {
            for (int part = 0; part < 8; ++part) {
                red1(row + part * 32 + lane);
            }
        }
    }
}

template <Reduction KIND>
void red_rate(const char* name) {
    const int blocks = 8 * multiprocessors(), loops = 200;
    Buffer<float> sums(size_t(RED_ROWS) * ROW_FLOATS);
    sums.zero();
    const float ms = milliseconds(3, [&] { red_kernel<KIND><<<blocks, 256>>>(sums.data, loops); }, name) / 3;
    double total = 0;
    for (const float sum : sums.host()) {
        total += sum;
    }
    const double rows = double(blocks) * 8 * loops;
    finding(
        "\"red\": \"%s\", \"gb_per_s\": %.0f, \"ns_per_row_of_1_kb\": %.4f, \"sums_right\": %s", name,
        rows * ROW_FLOATS * 4 / ms * 1e-6, ms * 1e6 / rows, total == 4 * rows * ROW_FLOATS ? "true" : "false");
}

// ------------------------------------------------------------------------------------------------ mma, wgmma

__device__ __forceinline__ unsigned random_pair(unsigned seed) {
    // Two bf16 of either sign with exponent 0 or -1 and random mantissas.
    seed = (seed ^ 61) ^ (seed >> 16), seed *= 9, seed ^= seed >> 4, seed *= 0x27d4eb2d, seed ^= seed >> 15;
    return (seed & 0x80ff80ff) | 0x3f003f00;
}

template <int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 1) mma_kernel(int loops, float* sums, uint64_t* result) {
    unsigned a[4][4], b[4][2];
    float d[4][4][4] = {};
    const unsigned seed = (blockIdx.x * WARPS * 32 + threadIdx.x) * 32;
    for (int i = 0; i < 16; ++i) {
        a[i / 4][i % 4] = random_pair(seed + i);
    }
    for (int i = 0; i < 8; ++i) {
        b[i / 2][i % 2] = random_pair(seed + 16 + i);
    }
    __syncthreads();
    const Stopwatch stopwatch = start_stopwatch();
#pragma unroll 2
    for (int loop = 0; loop < loops; ++loop) {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                asm volatile(
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%0, %1, %2, %3};"
                    : "+f"(d[m][n][0]), "+f"(d[m][n][1]), "+f"(d[m][n][2]), "+f"(d[m][n][3])
                    : "r"(a[m][0]), "r"(a[m][1]), "r"(a[m][2]), "r"(a[m][3]), "r"(b[n][0]), "r"(b[n][1]));
            }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        store_stopwatch(stopwatch, result);
    }
    float sum = 0;
    for (int i = 0; i < 64; ++i) {
        sum += d[i / 16][i / 4 % 4][i % 4];
    }
    sums[blockIdx.x * WARPS * 32 + threadIdx.x] = sum;
}

bool all_finite(const std::vector<float>& values) {
    for (const float x : values) {
        if (!(x - x == 0)) {
            return false;
        }
    }
    return true;
}

template <int WARPS>
void mma_rate() {
    const int blocks = multiprocessors();
    Buffer<uint64_t> result(2 * blocks);
    Buffer<float> sums(size_t(blocks) * WARPS * 32);
    for (const int loops : {40000 / WARPS, 1600000 / WARPS}) {
        const float ms = milliseconds(
            1, [&] { mma_kernel<WARPS><<<blocks, WARPS * 32>>>(loops, sums.data, result.data); }, "mma_kernel");
        const Cycles cycles = summarize(result);
        const double flop = double(loops) * 16 * WARPS * 4096;
        finding(
            "\"mma\": \"mma.sync m16n8k16\", \"warps_per_sm\": %d, \"ms\": %.2f, \"tflops\": %.1f, "
            "\"flop_per_clk_per_sm\": %.0f, \"mhz\": %.0f, \"finite\": %s",
            WARPS, ms, flop * blocks / ms * 1e-9, flop / (double(cycles.sum) / blocks), megahertz(cycles),
            all_finite(sums.host()) ? "true" : "false");
    }
}

enum Operand { SWIZZLED, SWIZZLED_SHIFTED, FLAT_PLANES, FLAT_PLANES_SHIFTED, REGISTERS };
constexpr int A_BYTES = 4 * 14336, B_BYTES = 32768, WGMMA_MEMORY = A_BYTES + 2 * B_BYTES + 1024;

// Descriptor of A for k-step `s` of a tap. The shifted operands begin `shift` pixels after `start`, the others at
// `start`.
template <Operand A>
__device__ __forceinline__ uint64_t operand_descriptor(unsigned start, int shift, int s) {
    if constexpr (A == SWIZZLED) {
        return matrix_descriptor(start + s * 32, 16, 1024, SWIZZLE_128);
    } else if constexpr (A == SWIZZLED_SHIFTED) {
        return matrix_descriptor(start + shift * 128 + s * 32, 16, 1280, SWIZZLE_128);
    } else {
        return matrix_descriptor(start + (A == FLAT_PLANES ? 0 : shift * 16) + s * 3200, 1600, 160, SWIZZLE_NONE);
    }
}

template <int N, int TILES, Operand A>
__device__ __forceinline__ void multiply_tap(
    unsigned a_base, unsigned b_start, int shift, const uint32_t (&fragment)[4], float (&d)[TILES][N / 2]) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const uint64_t b = matrix_descriptor(b_start + s * 32, 16, 1024, SWIZZLE_128);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if constexpr (A == REGISTERS) {
                Wgmma<N>::rs(d[tile], fragment, b, 1);
            } else {
                Wgmma<N>::ss(d[tile], operand_descriptor<A>(a_base + tile * 14336, shift, s), b, 1);
            }
        }
    }
}

// Multiply in two warpgroups, each with TILES accumulators of 64 x N, over nine taps of four k-steps, `loops` times.
template <int N, int TILES, Operand A>
__global__ void __launch_bounds__(256, 1) wgmma_kernel(int loops, float* sums, uint64_t* result) {
    extern __shared__ unsigned char memory[];
    unsigned char* aligned = memory + (1024 - shared_address(memory) % 1024) % 1024;
    for (int i = threadIdx.x; i < (A_BYTES + 2 * B_BYTES) / 4; i += 256) {
        reinterpret_cast<unsigned*>(aligned)[i] = random_pair(blockIdx.x * 65536 + i);
    }
    fence_async_proxy();
    __syncthreads();
    const unsigned a_base = shared_address(aligned) + threadIdx.x / 128 * TILES * 14336;
    const unsigned b_base = shared_address(aligned) + A_BYTES;
    float d[TILES][N / 2];
    for (int tile = 0; tile < TILES; ++tile) {
        for (float& sum : d[tile]) {
            sum = 0;
        }
    }
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) {
        fragment[i] = random_pair(threadIdx.x * 4 + i);
    }
    const Stopwatch stopwatch = start_stopwatch();
#pragma unroll 1
    for (int loop = 0; loop < loops; ++loop) {
#pragma unroll 1
        for (int tap = 0; tap < 9; ++tap) {
            for (int tile = 0; tile < TILES; ++tile) {
                pin(d[tile]);
            }
            wgmma_fence();
            multiply_tap<N, TILES, A>(a_base, b_base + tap % 2 * B_BYTES, tap / 3 * 10 + tap % 3, fragment, d);
            wgmma_commit();
            wgmma_wait<1>();
            for (int tile = 0; tile < TILES; ++tile) {
                pin(d[tile]);
            }
        }
    }
    wgmma_wait<0>();
    for (int tile = 0; tile < TILES; ++tile) {
        pin(d[tile]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        store_stopwatch(stopwatch, result);
    }
    float sum = 0;
    for (int tile = 0; tile < TILES; ++tile) {
        for (const float x : d[tile]) {
            sum += x;
        }
    }
    sums[blockIdx.x * 256 + threadIdx.x] = sum;
}

template <int N, int TILES, Operand A>
void wgmma_rate(const char* name) {
    const int blocks = multiprocessors();
    allow_shared_memory(wgmma_kernel<N, TILES, A>, WGMMA_MEMORY);
    Buffer<uint64_t> result(2 * blocks);
    Buffer<float> sums(size_t(blocks) * 256);
    for (const int loops : {50, 8000}) {
        const float ms = milliseconds(
            1, [&] { wgmma_kernel<N, TILES, A><<<blocks, 256, WGMMA_MEMORY>>>(loops, sums.data, result.data); }, name);
        const Cycles cycles = summarize(result);
        const double instructions = double(loops) * 36 * TILES * 2, flop = instructions * 64 * N * 16 * 2;
        finding(
            "\"mma\": \"wgmma m64n%dk16\", \"a\": \"%s\", \"accumulators_per_warpgroup\": %d, \"ms\": %.2f, "
            "\"tflops\": %.1f, \"flop_per_clk_per_sm\": %.0f, \"clk_per_wgmma\": %.1f, \"mhz\": %.0f, \"finite\": %s",
            N, name, TILES, ms, flop * blocks / ms * 1e-9, flop / (double(cycles.sum) / blocks),
            double(cycles.sum) / blocks / instructions, megahertz(cycles), all_finite(sums.host()) ? "true" : "false");
    }
}

// ------------------------------------------------------------------------------------------------ l2, hbm

__device__ __forceinline__ uint4 load_from_l2(const uint4* source) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(__cvta_generic_to_global(source)));
    return x;
}

__global__ void __launch_bounds__(512) load_kernel(const uint4* source, unsigned count, int loops, unsigned* sums) {
    unsigned sum = 0;
    const unsigned step = gridDim.x * 512 * 8;
    for (int loop = 0; loop < loops; ++loop) {
        for (unsigned i = blockIdx.x * 512 * 8 + threadIdx.x; i + 512 * 7 < count; i += step) {
            uint4 x[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[j] = load_from_l2(source + i + j * 512);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
            }
        }
    }
    sums[blockIdx.x * 512 + threadIdx.x] = sum;
}

// Read by cp.async of 16 bytes, three groups of eight in flight per thread.
__global__ void __launch_bounds__(512) cp_async_kernel(const uint4* source, unsigned count, int loops) {
    extern __shared__ unsigned char memory[];
    const unsigned base = shared_address(memory) + threadIdx.x * 16;
    const unsigned step = gridDim.x * 512 * 8;
    int stage = 0;
    for (int loop = 0; loop < loops; ++loop) {
        for (unsigned i = blockIdx.x * 512 * 8 + threadIdx.x; i + 512 * 7 < count; i += step) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(base + (stage * 8 + j) * 8192),
                             "l"(__cvta_generic_to_global(source + i + j * 512))
                             : "memory");
            }
            asm volatile("cp.async.commit_group;\ncp.async.wait_group 2;" ::: "memory");
            stage = stage == 2 ? 0 : stage + 1;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__global__ void __launch_bounds__(512) copy_kernel(const uint4* source, uint4* target, size_t count) {
    for (size_t i = size_t(blockIdx.x) * 2048 + threadIdx.x; i + 1536 < count; i += size_t(gridDim.x) * 2048) {
        uint4 x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[j] = __ldcs(source + i + j * 512);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            __stcs(target + i + j * 512, x[j]);
        }
    }
}

}  // namespace

void probe_tma() {
    prepare_device();
    Buffer<bf16> x(random_values(size_t(H) * W * C, 5)), weights(random_values(9 * 256 * C, 6));
    CUtensorMap planes{}, rows{}, weight_map{};
    const CUresult verdicts[3] = {
        encode_planes(&planes, x.data, 1, H, W, C), encode_rows(&rows, x.data, 1, H, W, C),
        encode_weights(&weight_map, weights.data, 9, 256, C, 128)};
    for (const CUresult verdict : verdicts) {
        if (verdict != CUDA_SUCCESS) {
            finding("\"error\": \"map refused\", \"code\": %d", int(verdict));
        }
    }
    if (verdicts[1] == CUDA_SUCCESS) {
        tma_rate<ROWS>("{64,10,10,1} 128-byte swizzle", rows, nullptr, 0);
    }
    if (verdicts[2] == CUDA_SUCCESS) {
        tma_rate<WEIGHTS>("{64,128,1} 128-byte swizzle", weight_map, nullptr, 0);
    }
    tma_rate<LINEAR>("bulk 16 KB", rows, reinterpret_cast<const char*>(x.data), int(x.size * 2 / LINEAR_BYTES));
    if (verdicts[0] == CUDA_SUCCESS) {
        tma_rate<PLANES>("{8,10,10,8,1}", planes, nullptr, 0);
    }
}

void probe_red() {
    prepare_device();
    red_rate<FULL_SECTORS>("v4, adjacent lanes 16 bytes apart");
    red_rate<HALF_SECTORS>("v4, adjacent lanes 32 bytes apart");
    red_rate<PAIRS>("v2, adjacent lanes 8 bytes apart");
    red_rate<SCALAR>("scalar, adjacent lanes 4 bytes apart");
}

void probe_mma() {
    prepare_device();
    mma_rate<4>();
    mma_rate<8>();
    mma_rate<16>();
}

void probe_wgmma() {
    prepare_device();
    wgmma_rate<256, 1, SWIZZLED>("128-byte swizzle");
    wgmma_rate<256, 1, REGISTERS>("registers");
    wgmma_rate<128, 2, SWIZZLED>("128-byte swizzle");
    wgmma_rate<128, 2, FLAT_PLANES>("planes, tap 0");
    wgmma_rate<128, 2, FLAT_PLANES_SHIFTED>("planes, nine taps");
    wgmma_rate<128, 2, SWIZZLED_SHIFTED>("128-byte swizzle, SBO 1280, nine taps");
    wgmma_rate<128, 2, REGISTERS>("registers");
    wgmma_rate<128, 1, SWIZZLED>("128-byte swizzle");
    wgmma_rate<64, 2, SWIZZLED>("128-byte swizzle");
}

void probe_l2() {
    prepare_device();
    const int sms = multiprocessors(), loops = 100;
    for (const unsigned megabytes : {8u, 20u, 40u}) {
        const unsigned count = megabytes * 65536;
        Buffer<uint4> source(count);
        source.zero();
        Buffer<unsigned> sums(size_t(sms) * 4 * 512);
        const unsigned bytes_read = count / 4096 * 4096 * 16;
        for (const int per_sm : {2, 4}) {
            const float ms = milliseconds(
                1, [&] { load_kernel<<<sms * per_sm, 512>>>(source.data, count, loops, sums.data); }, "load_kernel");
            finding(
                "\"read\": \"ld.global.cg 16\", \"megabytes\": %u, \"blocks_of_512_per_sm\": %d, \"gb_per_s\": %.0f",
                megabytes, per_sm, double(bytes_read) * loops / ms * 1e-6);
        }
        allow_shared_memory(cp_async_kernel, 24 * 8192);
        const float ms = milliseconds(
            1, [&] { cp_async_kernel<<<sms, 512, 24 * 8192>>>(source.data, count, loops); }, "cp_async_kernel");
        finding(
            "\"read\": \"cp.async.cg 16\", \"megabytes\": %u, \"gb_per_s\": %.0f", megabytes,
            double(bytes_read) * loops / ms * 1e-6);
        Buffer<uint64_t> result(2 * sms);
        constexpr int MEMORY = 13 * 1024 * 16 + 1024;
        allow_shared_memory(tma_rate_kernel<LINEAR>, MEMORY);
        const int boxes = int(count / 1024), tma_loops = boxes * loops / sms;
        const CUtensorMap unused{};
        const float tma_ms = milliseconds(
            1,
            [&] {
                tma_rate_kernel<LINEAR><<<sms, 32, MEMORY>>>(
                    unused, reinterpret_cast<const char*>(source.data), boxes, tma_loops, 12, result.data);
            },
            "tma_rate_kernel");
        finding(
            "\"read\": \"cp.async.bulk 16 KB\", \"megabytes\": %u, \"gb_per_s\": %.0f", megabytes,
            double(LINEAR_BYTES) * tma_loops * sms / tma_ms * 1e-6);
    }
}

void probe_hbm() {
    prepare_device();
    const size_t bytes = size_t(1) << 30, count = bytes / 16;
    Buffer<uint4> source(count), target(count);
    source.zero();
    const int sms = multiprocessors();
    float ms = milliseconds(5, [&] { copy_kernel<<<sms * 4, 512>>>(source.data, target.data, count); }, "copy_kernel");
    finding("\"copy\": \"kernel, 1 GiB\", \"read_and_written_gb_per_s\": %.0f", 2.0 * bytes * 5 / ms * 1e-6);
    ms = milliseconds(
        5, [&] { CHECK(cudaMemcpyAsync(target.data, source.data, bytes, cudaMemcpyDeviceToDevice)); },
        "cudaMemcpyAsync");
    finding("\"copy\": \"cudaMemcpyAsync, 1 GiB\", \"read_and_written_gb_per_s\": %.0f", 2.0 * bytes * 5 / ms * 1e-6);
    Buffer<unsigned> sums(size_t(sms) * 4 * 512);
    ms = milliseconds(
        5, [&] { load_kernel<<<sms * 4, 512>>>(source.data, unsigned(count), 1, sums.data); }, "load_kernel");
    finding("\"read\": \"1 GiB\", \"gb_per_s\": %.0f", double(bytes) * 5 / ms * 1e-6);
    ms = milliseconds(5, [&] { CHECK(cudaMemsetAsync(target.data, 0, bytes)); }, "cudaMemsetAsync");
    finding("\"write\": \"cudaMemsetAsync, 1 GiB\", \"gb_per_s\": %.0f", double(bytes) * 5 / ms * 1e-6);
}
