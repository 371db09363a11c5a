// SPDX-License-Identifier: Apache-2.0
//
// Small test kernels for the interpreter (tests/test_simt.py): clean ones, whose results are checked here, and ones
// with one planted fault each. A report must name the line with the comment "line: <name>".
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cases.h"

using namespace spatialflow;

namespace {

// ---- clean kernels ----

__global__ void reverse_kernel(Global<int> values) {
    SPATIALFLOW_SHARED(int, tile, 96);
    tile[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = tile[95 - threadIdx.x];
}

void reverse() {
    std::vector<int> values(96);
    std::iota(values.begin(), values.end(), 0);
    launch<reverse_kernel>(dim3(1), dim3(96), 0, Stream{}, buffer(values));
    for (int i = 0; i < 96; ++i) {
        expect(values[static_cast<size_t>(i)] == 95 - i, "reverse");
    }
}

// Sum the lanes of each warp by shuffles, the warps of each block through shared memory, and the blocks by an atomic.
__global__ void __launch_bounds__(256) sum_kernel(Global<const float> values, Global<float> total, int count) {
    SPATIALFLOW_SHARED(float, of_warps, 8);
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    float sum = i < count ? values[i] : 0.0f;
    for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    if (threadIdx.x % 32 == 0) {
        of_warps[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = 0.0f;
        for (int warp = 0; warp < 8; ++warp) {
            all += of_warps[warp];
        }
        atomicAdd(total + 0, all);
    }
}

void sum() {
    std::vector<float> values(1000, 1.0f), total(1, 0.0f);
    launch<sum_kernel>(dim3(4), dim3(256), 0, Stream{}, Global<const float>(buffer(values)), buffer(total), 1000);
    expect(total[0] == 1000.0f, "sum of a thousand ones");
}

__global__ void histogram_kernel(Global<unsigned> counts) {
    SPATIALFLOW_SHARED(unsigned, bins, 10);
    if (threadIdx.x < 10) {
        bins[threadIdx.x] = 0;
    }
    __syncthreads();
    atomicAdd(bins + threadIdx.x % 10, 1u);
    __syncthreads();
    if (threadIdx.x < 10) {
        counts[threadIdx.x] = bins[threadIdx.x];
    }
}

void histogram() {
    std::vector<unsigned> counts(10);
    launch<histogram_kernel>(dim3(1), dim3(200), 0, Stream{}, buffer(counts));
    for (const unsigned count : counts) {
        expect(count == 20, "shared atomics");
    }
}

// Exchange values between the lanes of a warp through shared memory, with __syncwarp only, in two halves with different
// masks. From the second round on, a lane reads and writes its element after the adjacent lane has read it.
__global__ void warp_exchange_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 64);
    const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    tile[threadIdx.x] = static_cast<int>(threadIdx.x) - 1;
    for (int round = 0; round < 3; ++round) {
        tile[threadIdx.x] += 1;
        __syncwarp(half);
        const int neighbor = tile[threadIdx.x ^ 1];
        __syncwarp(half);
        out[threadIdx.x] = neighbor;
    }
}

void warp_exchange() {
    std::vector<int> out(64);
    launch<warp_exchange_kernel>(dim3(1), dim3(64), 0, Stream{}, buffer(out));
    expect(out[0] == 3 && out[63] == 64, "exchange in a warp");
}

__global__ void collectives_kernel(Global<unsigned> out) {
    const int lane = static_cast<int>(threadIdx.x);
    const unsigned odd = __ballot_sync(kAllLanes, lane & 1);
    unsigned failures = odd != 0xaaaaaaaau;
    failures += __any_sync(kAllLanes, lane == 7) != 1;
    failures += __all_sync(kAllLanes, lane != 7) != 0;
    failures += __reduce_add_sync(kAllLanes, 2u) != 64;
    failures += __reduce_max_sync(kAllLanes, static_cast<unsigned>(lane)) != 31;
    failures += __match_any_sync(kAllLanes, lane / 8) != 0xffu << (lane / 8 * 8);
    failures += __shfl_sync(kAllLanes, lane, 3, 8) != lane / 8 * 8 + 3;
    failures += __shfl_up_sync(kAllLanes, lane, 1) != (lane ? lane - 1 : 0);
    failures += __shfl_down_sync(kAllLanes, lane, 2, 16) != (lane % 16 < 14 ? lane + 2 : lane);
    failures += __shfl_xor_sync(kAllLanes, 1.5 * lane, 5) != 1.5 * (lane ^ 5);
    if (lane & 1) {
        failures += __shfl_sync(0xaaaaaaaau, lane, 1) != 1;
    }
    failures += __syncthreads_count(lane < 5) != 5;
    failures += __syncthreads_or(lane == 31) != 1;
    failures += __syncthreads_and(lane < 32) != 1;
    out[lane] = failures;
}

void collectives() {
    std::vector<unsigned> out(32, 99);
    launch<collectives_kernel>(dim3(1), dim3(32), 0, Stream{}, buffer(out));
    for (const unsigned failures : out) {
        expect(failures == 0, "warp collectives");
    }
}

// d = a (16x16) * b (16x8): a row-major, b as 8 columns of 16, both through cp.async and ldmatrix.
template <typename scalar_t>
__global__ void product_kernel(Global<const scalar_t> a, Global<const scalar_t> b, Global<float> d) {
    SPATIALFLOW_SHARED(scalar_t, left, 16 * 16);
    SPATIALFLOW_SHARED(scalar_t, right, 16 * 16);
    const int lane = static_cast<int>(threadIdx.x);
    cp_async_16(left + lane * 8, a + lane * 8, true);
    cp_async_commit();
    cp_async_16(right + lane * 8, b + (lane < 16 ? lane * 8 : 0), lane < 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    unsigned fragment_a[4], fragment_b[4];
    ldmatrix_x4(fragment_a, left + (lane % 16 * 16 + lane / 16 * 8));
    ldmatrix_x4(fragment_b, right + ((lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
    float sums[4] = {};
    const unsigned columns[2] = {fragment_b[0], fragment_b[1]};
    mma_16816(sums, fragment_a, columns, scalar_t{});
    for (int i = 0; i < 4; ++i) {
        d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
    }
}

template <typename scalar_t>
void product() {
    std::vector<scalar_t> a(256), b(128);
    std::vector<float> d(128, -1.0f);
    for (size_t i = 0; i < 256; ++i) {
        store(a[i], static_cast<float>(i % 7) - 3.0f);
    }
    for (size_t i = 0; i < 128; ++i) {
        store(b[i], static_cast<float>(i % 5) * 0.5f);
    }
    launch<product_kernel<scalar_t>>(
        dim3(1), dim3(32), 0, Stream{}, Global<const scalar_t>(buffer(a)), Global<const scalar_t>(buffer(b)),
        buffer(d));
    for (size_t row = 0; row < 16; ++row) {
        for (size_t column = 0; column < 8; ++column) {
            float sum = 0.0f;
            for (size_t k = 0; k < 16; ++k) {
                sum += load(a[row * 16 + k]) * load(b[column * 16 + k]);
            }
            expect(d[row * 8 + column] == sum, "matrix product");
        }
    }
}

// d = 1 + a (16x8) * b (8x8) in TF32: a row-major, through ldmatrix; b row-major, element by element. `swapped`
// exchanges registers 1 and 2 of a, which is a wrong layout.
__global__ void product_tf32_kernel(Global<const float> a, Global<const float> b, Global<float> d, bool swapped) {
    SPATIALFLOW_SHARED(float, left, 16 * 8);
    const int lane = static_cast<int>(threadIdx.x);
    store_vector(left + lane * 4, load_vector<4>(a + lane * 4));
    __syncwarp();
    unsigned left_words[4];
    ldmatrix_x4(left_words, left + (lane % 16 * 8 + lane / 16 * 4));
    for (unsigned& number : left_words) {
        number = to_tf32(__uint_as_float(number));
    }
    const unsigned fragment_a[4] = {
        left_words[0], left_words[swapped ? 2 : 1], left_words[swapped ? 1 : 2], left_words[3]};
    const unsigned fragment_b[2] = {to_tf32(b[lane % 4 * 8 + lane / 4]), to_tf32(b[(lane % 4 + 4) * 8 + lane / 4])};
    float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_1688(sums, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) {
        d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
    }
}

void product_tf32() {
    std::vector<float> a(128), b(64);
    for (size_t i = 0; i < 128; ++i) {
        a[i] = static_cast<float>(i * i % 37) - 18.0f + 0x1p-20f;  // rounds to an integer
    }
    for (size_t i = 0; i < 64; ++i) {
        b[i] = static_cast<float>(i * i % 23) * 0.5f;
    }
    const auto wrong = [&](bool swapped) {
        std::vector<float> d(128, -1.0f);
        launch<product_tf32_kernel>(
            dim3(1), dim3(32), 0, Stream{}, Global<const float>(buffer(a)), Global<const float>(buffer(b)), buffer(d),
            swapped);
        int count = 0;
        for (size_t row = 0; row < 16; ++row) {
            for (size_t column = 0; column < 8; ++column) {
                float sum = 1.0f;
                for (size_t k = 0; k < 8; ++k) {
                    sum += std::nearbyint(a[row * 8 + k]) * b[k * 8 + column];
                }
                count += d[row * 8 + column] != sum;
            }
        }
        return count;
    };
    expect(wrong(false) == 0, "matrix product in TF32");
    expect(wrong(true) > 64, "a wrong layout must change most results");
}

// Check to_tf32 for ties, both signs, and the ends of the range.
void round_tf32() {
    const auto rounded = [](float value) { return __uint_as_float(to_tf32(value)); };
    expect(rounded(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f && rounded(-1.0f - 0x1p-11f) == -1.0f - 0x1p-10f, "ties");
    expect(rounded(1.0f + 0x1p-11f - 0x1p-23f) == 1.0f && rounded(1.0f + 0x1p-10f) == 1.0f + 0x1p-10f, "nearest");
    const float infinity = std::numeric_limits<float>::infinity();
    expect(rounded(std::numeric_limits<float>::max()) == infinity && rounded(-infinity) == -infinity, "infinity");
    expect(to_tf32(__uint_as_float(0xffffffffu)) == 0x7fffffffu, "NaN");
}

// Tensor cores truncate sums: 1 + 1.5 * 2^-24 gives 1, and 1 - 2^-30 gives 1 - 2^-24.
__global__ void truncation_kernel(Global<float> out) {
    const float first = threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
    const unsigned ones[4] = {to_tf32(first), to_tf32(first), 0, 0};
    const auto add = [&](float& sum, float term) {
        float sums[4] = {sum, sum, sum, sum};
        const unsigned terms[2] = {to_tf32(term), 0};
        mma_1688(sums, ones, terms);
        sum = sums[0];
    };
    float up = 1.0f, down = 1.0f;
    add(up, 0x1.8p-24f);
    add(down, -0x1p-30f);
    out[2 * threadIdx.x] = up;
    out[2 * threadIdx.x + 1] = down;
}

void truncation() {
    std::vector<float> out(64);
    launch<truncation_kernel>(dim3(1), dim3(32), 0, Stream{}, buffer(out));
    expect(out[0] == 1.0f && out[1] == 1.0f - 0x1p-24f, "sums are rounded toward zero");
}

__global__ void transpose_kernel(Global<const bfloat16> in, Global<unsigned> out) {
    SPATIALFLOW_SHARED(bfloat16, tile, 4 * 64);
    const int lane = static_cast<int>(threadIdx.x);
    store_vector(tile + lane * 8, load_vector<8>(in + lane * 8));
    __syncwarp();
    unsigned registers[4];
    ldmatrix_x4_trans(registers, tile + lane * 8);
    for (int i = 0; i < 4; ++i) {
        out[lane * 4 + i] = registers[i];
    }
}

void transpose() {
    std::vector<bfloat16> in(256);
    for (size_t i = 0; i < 256; ++i) {
        in[i].bits = static_cast<uint16_t>(i);
    }
    std::vector<unsigned> out(128);
    launch<transpose_kernel>(dim3(1), dim3(32), 0, Stream{}, Global<const bfloat16>(buffer(in)), buffer(out));
    for (unsigned lane = 0; lane < 32; ++lane) {
        for (unsigned m = 0; m < 4; ++m) {
            const unsigned low = m * 64 + (lane % 4 * 2) * 8 + lane / 4;
            expect(out[lane * 4 + m] == (low | (low + 8) << 16), "transposed ldmatrix");
        }
    }
}

__global__ void dynamic_kernel(Global<float> out) {
    SPATIALFLOW_DYNAMIC_SHARED(float, values);
    const auto counters = pointer_cast<int>(values + blockDim.x);
    values[threadIdx.x] = 1.0f;
    counters[threadIdx.x] = 2;
    __syncthreads();
    const float next_value = values[(threadIdx.x + 1) % blockDim.x];
    const int count = counters[(threadIdx.x + 2) % blockDim.x];
    out[threadIdx.x] = next_value + static_cast<float>(count);
}

void dynamic_shared() {
    std::vector<float> out(64);
    launch<dynamic_kernel>(dim3(1), dim3(64), 64 * 8, Stream{}, buffer(out));
    expect(out[10] == 3.0f, "dynamic shared memory");
}

__global__ void indices_kernel(Global<int> out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(out + (block * 24 + thread), 1);
}

void indices() {
    std::vector<int> out(30 * 24);
    launch<indices_kernel>(dim3(2, 3, 5), dim3(4, 3, 2), 0, Stream{}, buffer(out));
    for (const int count : out) {
        expect(count == 1, "every thread of every block runs once");
    }
}

// ---- planted faults ----

__global__ void divergent_barrier_kernel() {
    if (threadIdx.x < 40) {
        __syncthreads();  // line: divergent barrier
    } else {
        __syncthreads();
    }
}

__global__ void skipped_barrier_kernel() {
    if (threadIdx.x != 5) {
        __syncthreads();  // line: skipped barrier
    }
}

__global__ void exited_lane_kernel(Global<int> out) {
    if (threadIdx.x == 9) {
        return;
    }
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);  // line: exited lane
}

__global__ void absent_lane_kernel(Global<int> out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);  // line: absent lane
    } else {
        __syncthreads();
    }
}

__global__ void missing_lanes_kernel(Global<int> out) {
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);  // line: missing lanes
}

__global__ void not_in_mask_kernel(Global<int> out) {
    out[threadIdx.x] = __shfl_sync(0xfffffffeu, 1, 1);  // line: not in mask
}

__global__ void outside_source_kernel(Global<int> out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);  // line: outside source
    }
}

__global__ void mixed_collectives_kernel(Global<unsigned> out) {
    if (threadIdx.x % 2) {
        out[threadIdx.x] = __ballot_sync(kAllLanes, 1);
    } else {
        out[threadIdx.x] = __shfl_sync(kAllLanes, 1u, 0);  // line: mixed collectives
    }
}

__global__ void write_read_race_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 64);
    tile[threadIdx.x] = 1;
    __syncthreads();
    tile[threadIdx.x] = 2;
    out[threadIdx.x] = tile[threadIdx.x ^ 1];  // line: write-read race
}

__global__ void read_write_race_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 64);
    tile[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + 33) % 64];
    tile[threadIdx.x] = 3;  // line: read-write race
}

__global__ void write_write_race_kernel() {
    SPATIALFLOW_SHARED(int, tile, 64);
    tile[threadIdx.x / 2] = 1;  // line: write-write race
}

__global__ void shuffle_is_not_a_fence_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 32);
    tile[threadIdx.x] = 1;
    __shfl_sync(kAllLanes, 0, 0);
    out[threadIdx.x] = tile[31 - threadIdx.x];  // line: shuffle is not a fence
}

__global__ void wrong_half_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 32);
    tile[threadIdx.x] = 0;
    __syncthreads();
    tile[threadIdx.x] = 1;
    __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
    out[threadIdx.x] = tile[31 - threadIdx.x];  // line: wrong half
}

__global__ void reader_forgotten_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 32);
    tile[threadIdx.x] = 0;
    __syncwarp();
    if (threadIdx.x % 2 == 0) {
        out[threadIdx.x] = tile[threadIdx.x + 1];
    } else {
        tile[threadIdx.x] += 1;  // line: reader forgotten
    }
}

__global__ void atomic_and_plain_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, counter, 1);
    if (threadIdx.x == 0) {
        counter[0] = 0;
    }
    __syncthreads();
    atomicAdd(counter + 0, 1);
    out[threadIdx.x] = counter[0];  // line: atomic and plain
}

__global__ void uninitialized_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 64);
    if (threadIdx.x != 20) {
        tile[threadIdx.x] = 1;
    }
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];  // line: uninitialized
}

__global__ void uninitialized_dynamic_kernel(Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(int, tile);
    out[threadIdx.x] = tile[threadIdx.x];  // line: uninitialized dynamic
}

__global__ void shared_bounds_kernel() {
    SPATIALFLOW_SHARED(float, first, 32);
    SPATIALFLOW_SHARED(float, second, 32);
    second[threadIdx.x] = 0.0f;
    first[threadIdx.x + 1] = 0.0f;  // line: shared bounds
}

__global__ void dynamic_bounds_kernel() {
    SPATIALFLOW_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = 0.0f;  // line: dynamic bounds
}

__global__ void global_read_kernel(Global<const float> in, Global<float> out) {
    out[threadIdx.x] = in[threadIdx.x + 1];  // line: global read
}

__global__ void global_write_kernel(Global<float> out) {
    out[static_cast<int>(threadIdx.x) - 1] = 0.0f;  // line: global write
}

__global__ void global_vector_kernel(Global<float> out) {
    store_vector(out + threadIdx.x * 4, Vec<float, 4>{});  // line: global vector
}

__global__ void misaligned_kernel(Global<float> out) {
    store_vector(out + 2, Vec<float, 4>{});  // line: misaligned
}

__global__ void early_copy_kernel(Global<const float> in, Global<float> out) {
    SPATIALFLOW_SHARED(float, tile, 32 * 4);
    cp_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4, true);
    cp_async_commit();
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x * 4];  // line: early copy
}

__global__ void copy_over_readers_kernel(Global<const float> in, Global<float> out) {
    SPATIALFLOW_SHARED(float, tile, 32 * 4);
    for (int round = 0; round < 2; ++round) {
        cp_async_16(tile + threadIdx.x * 4, in + threadIdx.x * 4, true);  // line: copy over readers
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        out[threadIdx.x] = tile[(threadIdx.x + 1) % 32 * 4];
    }
}

template <auto kKernel>
void run_with_buffer() {
    std::vector<int> out(64);
    launch<kKernel>(dim3(1), dim3(64), 0, Stream{}, buffer(out));
}
template <auto kKernel>
void run_one_warp() {
    std::vector<int> out(32);
    launch<kKernel>(dim3(1), dim3(32), 0, Stream{}, buffer(out));
}
template <auto kKernel, unsigned kThreads = 64>
void run_blocks() {
    launch<kKernel>(dim3(3), dim3(kThreads), 0, Stream{});
}
template <auto kKernel>
void run_with_input() {
    std::vector<float> in(128), out(32);
    launch<kKernel>(dim3(1), dim3(32), 0, Stream{}, Global<const float>(buffer(in)), buffer(out));
}
__global__ void not_rounded_kernel() {
    const float third = 1.0f / 3.0f;
    const unsigned a[4] = {to_tf32(third), to_tf32(third), to_tf32(third), to_tf32(third)};
    const unsigned b[2] = {to_tf32(third), threadIdx.x == 6 ? __float_as_uint(third) : 0u};
    float sums[4] = {};
    mma_1688(sums, a, b);  // line: not rounded
}

template <auto kKernel>
void run_with_floats() {
    std::vector<float> out(65);  // 17 vectors of 4 floats need 68
    launch<kKernel>(dim3(1), dim3(17), 0, Stream{}, buffer(out));
}

const Cases kClean = {
    {"reverse", reverse},
    {"sum", sum},
    {"histogram", histogram},
    {"warp_exchange", warp_exchange},
    {"collectives", collectives},
    {"product_float16", product<float16>},
    {"product_bfloat16", product<bfloat16>},
    {"product_tf32", product_tf32},
    {"round_tf32", round_tf32},
    {"truncation", truncation},
    {"transpose", transpose},
    {"dynamic_shared", dynamic_shared},
    {"indices", indices},
};

const Cases kFaults = {
    {"divergent barrier", run_blocks<divergent_barrier_kernel>},
    {"skipped barrier", run_blocks<skipped_barrier_kernel>},
    {"exited lane", run_one_warp<exited_lane_kernel>},
    {"absent lane", run_one_warp<absent_lane_kernel>},
    {"missing lanes",
     [] {
         std::vector<int> out(48);
         launch<missing_lanes_kernel>(dim3(1), dim3(48), 0, Stream{}, buffer(out));
     }},
    {"not in mask", run_one_warp<not_in_mask_kernel>},
    {"outside source", run_one_warp<outside_source_kernel>},
    {"mixed collectives",
     [] {
         std::vector<unsigned> out(32);
         launch<mixed_collectives_kernel>(dim3(1), dim3(32), 0, Stream{}, buffer(out));
     }},
    {"write-read race", run_with_buffer<write_read_race_kernel>},
    {"reader forgotten", run_one_warp<reader_forgotten_kernel>},
    {"read-write race", run_with_buffer<read_write_race_kernel>},
    {"write-write race", run_blocks<write_write_race_kernel>},
    {"shuffle is not a fence", run_one_warp<shuffle_is_not_a_fence_kernel>},
    {"wrong half", run_one_warp<wrong_half_kernel>},
    {"atomic and plain", run_one_warp<atomic_and_plain_kernel>},
    {"uninitialized", run_with_buffer<uninitialized_kernel>},
    {"uninitialized dynamic",
     [] {
         std::vector<int> out(32);
         launch<uninitialized_dynamic_kernel>(dim3(1), dim3(32), 128, Stream{}, buffer(out));
     }},
    {"shared bounds", run_blocks<shared_bounds_kernel, 32>},
    {"dynamic bounds", [] { launch<dynamic_bounds_kernel>(dim3(1), dim3(33), 128, Stream{}); }},
    {"global read",
     [] {
         std::vector<float> in(32), out(32);
         launch<global_read_kernel>(dim3(1), dim3(32), 0, Stream{}, Global<const float>(buffer(in)), buffer(out));
     }},
    {"global write", run_with_floats<global_write_kernel>},
    {"global vector", run_with_floats<global_vector_kernel>},
    {"misaligned", run_with_floats<misaligned_kernel>},
    {"not rounded", run_blocks<not_rounded_kernel, 32>},
    {"early copy", run_with_input<early_copy_kernel>},
    {"copy over readers", run_with_input<copy_over_readers_kernel>},
};

}  // namespace

int main(int count, char** arguments) { return run_case(kClean, kFaults, count, arguments); }
