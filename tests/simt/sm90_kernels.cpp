// SPDX-License-Identifier: Apache-2.0
//
// Small kernels of compute capability 9.0 for the interpreter's own tests (tests/test_simt.py): clean ones whose
// results are checked here, and ones with a planted fault each. A report names the line that carries the comment
// "line: <name>". Numbers are small integers, so that products are exact in every order.
#include "cases.h"
#include "cuda/sm90_instructions.h"
#include "cuda/sm90_tensor_map.h"

using namespace spatialflow;
using simt::Swizzle;

namespace {

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

// matrix_descriptor with another swizzle.
uint64_t descriptor(unsigned start, unsigned leading, unsigned stride, Swizzle swizzle) {
    return (matrix_descriptor(start, leading, stride) & ~(uint64_t{3} << 62)) | static_cast<uint64_t>(swizzle) << 62;
}

// Bytes of a row of a swizzled layout; 16 without swizzle.
constexpr unsigned row_bytes(Swizzle swizzle) {
    return swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : swizzle == Swizzle::k32 ? 32 : 16;
}

// Where TMA and wgmma find what a layout without swizzle has at `address`: 16 bytes change places within a row.
unsigned place_of(unsigned address, Swizzle swizzle) {
    const unsigned chunks = row_bytes(swizzle) / 16, chunk = address / 16;
    return address - chunk % chunks * 16 + (chunk % chunks ^ address / 128 % chunks) * 16;
}

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

// The dynamic shared memory from the first address that is a multiple of 1024.
struct Memory {
    Shared<uint16_t> first;
    unsigned address;

    explicit Memory(const Shared<uint16_t>& memory)
        : first(memory + (1024 - shared_address(memory) % 1024) % 1024 / 2), address(shared_address(first)) {}

    // The element at an address.
    Shared<uint16_t> at(unsigned where) const {
        return first + (static_cast<int>(where) - static_cast<int>(address)) / 2;
    }

    // Zeros, by `threads` threads of which the running one is number `thread`.
    void clear(unsigned begin, unsigned bytes, unsigned thread, unsigned threads) const {
        for (unsigned i = thread * 16; i < bytes; i += threads * 16) {
            store_vector(at(begin + i), Vec<uint16_t, 8>{});
        }
    }
};
constexpr unsigned kSharedBytes = 80 * 1024;  // of most launches here

// ---- clean kernels ----

// One box, copied as it lies in shared memory.
struct Corner {
    int at[4];
};
__global__ void box_kernel(
    const __grid_constant__ TensorMap map, Corner corner, int elements, Global<uint16_t> out,
    Global<unsigned> address) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned barrier = shared_address(barriers), target = memory.address + 128;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier, static_cast<unsigned>(elements) * 2);
        const int* at = corner.at;
        if (map.dimensions == 3) {
            tma_load_3d(target, &map, at[0], at[1], at[2], barrier);
        } else {
            tma_load_4d(target, &map, at[0], at[1], at[2], at[3], barrier);
        }
        address[0] = target;
    }
    __syncwarp();
    mbarrier_wait(barrier, 0);
    for (int i = static_cast<int>(threadIdx.x); i < elements; i += 32) {
        const uint16_t value = memory.at(target)[i];
        out[i] = value;
    }
}

template <int kDimensions>
void check_box(
    const TensorMap& map, const std::vector<bfloat16>& tensor, const int64_t (&sizes)[kDimensions],
    const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions], Swizzle swizzle,
    const int (&at)[kDimensions]) {
    int elements = 1;
    Corner corner{};
    for (int d = 0; d < kDimensions; ++d) {
        elements *= box[d];
        corner.at[d] = at[d];
    }
    std::vector<uint16_t> out(static_cast<size_t>(elements));
    std::vector<unsigned> address(1);
    launch<box_kernel>(dim3(1), dim3(32), kSharedBytes, Stream{}, map, corner, elements, buffer(out), buffer(address));
    for (int i = 0; i < elements; ++i) {
        int64_t source = 0, rest = i;
        bool inside = true;
        for (int d = 0; d < kDimensions; ++d) {
            const int64_t coordinate = at[d] + rest % box[d];
            rest /= box[d];
            inside = inside && coordinate >= 0 && coordinate < sizes[d];
            source += coordinate * (d == 0 ? 1 : strides[d - 1]);
        }
        const uint16_t expected = inside ? tensor[static_cast<size_t>(source)].bits : uint16_t{0};
        const unsigned place = place_of(address[0] + static_cast<unsigned>(i) * 2, swizzle) - address[0];
        expect(out[place / 2] == expected, "box of TMA");
    }
}

void boxes() {
    std::vector<bfloat16> tensor(80 * 9 * 6 * 3);
    for (size_t i = 0; i < tensor.size(); ++i) {
        tensor[i].bits = static_cast<uint16_t>(i + 1);
    }
    // Planes of eight channels, which lie side by side in a pixel: strides do not rise.
    const int64_t sizes_of_planes[] = {8, 9, 6, 10}, strides_of_planes[] = {80, 80 * 9, 8};
    TensorMap planes;
    expect(
        encode_map<bfloat16, 4>(
            planes, constant(tensor), sizes_of_planes, strides_of_planes, {8, 4, 3, 4}, Swizzle::kNone),
        "a tensor map of planes");
    check_box<4>(planes, tensor, sizes_of_planes, strides_of_planes, {8, 4, 3, 4}, Swizzle::kNone, {0, -1, 4, 5});
    for (const Swizzle swizzle : kSwizzles) {
        const int row = swizzle == Swizzle::kNone ? 40 : static_cast<int>(row_bytes(swizzle) / 2);
        const int64_t sizes[] = {72, 9, 6, 3}, strides[] = {80, 80 * 9, 80 * 9 * 6};
        const int box[] = {row, 4, 3, 2};
        const int corners[][4] = {{8, 2, 1, 0},  {-3, -2, -1, -1}, {70, 7, 4, 2},   {1000, 0, 0, 0},
                                  {0, -4, 0, 0}, {0, 0, 6, 0},     {-row, 0, 0, 0}, {5, 3, 2, -40000}};
        const int64_t sizes_3d[] = {80, 9, 18}, strides_3d[] = {80, 80 * 9};
        const int box_3d[] = {row, 3, 8};
        TensorMap map, map_3d;
        expect(encode_map<bfloat16, 4>(map, constant(tensor), sizes, strides, box, swizzle), "a tensor map");
        expect(encode_map<bfloat16, 3>(map_3d, constant(tensor), sizes_3d, strides_3d, box_3d, swizzle), "a map");
        for (const auto& at : corners) {
            check_box<4>(map, tensor, sizes, strides, box, swizzle, at);
            check_box<3>(map_3d, tensor, sizes_3d, strides_3d, box_3d, swizzle, {at[0], at[1], at[2] * 3});
        }
    }
}

// d = a (64 x 64, K-major) * b (64 x outputs, outputs adjacent) in four products, each 16 of k, in three groups.
constexpr unsigned kRows = 64, kDepth = 64, kBytesA = kRows * kDepth * 2;

template <typename T, int kOutputs>
__global__ void products_kernel(
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, Global<const T> a,
    Global<const T> b, Global<float> d, Swizzle swizzle_a, Swizzle swizzle_b, bool by_tma) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned barrier = shared_address(barriers), thread = threadIdx.x;
    const unsigned start_a = memory.address, start_b = start_a + kBytesA;
    const unsigned row_a = row_bytes(swizzle_a), row_b = row_bytes(swizzle_b);
    // Columns of 64 rows stand beside each other, of k in a and of outputs in b.
    const unsigned columns_b = (kOutputs * 2 + row_b - 1) / row_b;
    if (thread == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (by_tma) {
        if (thread == 0) {
            mbarrier_expect(barrier, kBytesA + columns_b * kDepth * row_b);
            for (unsigned i = 0; i < kDepth * 2 / row_a; ++i) {
                tma_load_3d(start_a + i * kRows * row_a, &map_a, static_cast<int>(i * row_a / 2), 0, 0, barrier);
            }
            for (unsigned i = 0; i < columns_b; ++i) {
                tma_load_3d(start_b + i * kDepth * row_b, &map_b, static_cast<int>(i * row_b / 2), 0, 0, barrier);
            }
        }
        mbarrier_wait(barrier, 0);
    } else {
        for (unsigned i = thread; i < kRows * kDepth; i += 128) {
            const unsigned row = i / kDepth, byte = i % kDepth * 2;
            const unsigned address = start_a + byte / row_a * kRows * row_a + row * row_a + byte % row_a;
            memory.at(place_of(address, swizzle_a))[0] = a[i].bits;
        }
        for (unsigned i = thread; i < kDepth * kOutputs; i += 128) {
            const unsigned row = i / kOutputs, byte = i % kOutputs * 2;
            const unsigned address = start_b + byte / row_b * kDepth * row_b + row * row_b + byte % row_b;
            memory.at(place_of(address, swizzle_b))[0] = b[i].bits;
        }
        fence_async_proxy();
        __syncthreads();
    }
    WgmmaSums<kOutputs / 2> sums = {};
    wgmma_fence();
    for (unsigned step = 0; step < kDepth / 16; ++step) {
        const unsigned first = start_a + step * 32 / row_a * kRows * row_a + step * 32 % row_a;
        const uint64_t left = descriptor(first, kRows * row_a, 8 * row_a, swizzle_a);
        const unsigned next_k = 8 * row_b, next_outputs = kDepth * row_b;
        const bool none = swizzle_b == Swizzle::kNone;
        const uint64_t right = descriptor(
            start_b + step * 16 * row_b, none ? next_k : next_outputs, none ? next_outputs : next_k, swizzle_b);
        Wgmma<kOutputs>::multiply(sums, left, right, step != 0, T{});
        if (step != 1) {
            wgmma_commit();
        }
    }
    wgmma_wait<1>();
    wgmma_wait<0>();
    pin(sums);
    const unsigned lane = thread % 32;
    for (unsigned i = 0; i < kOutputs / 2; ++i) {
        const unsigned row = thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8, column = lane % 4 * 2 + i / 4 * 8 + i % 2;
        d[row * kOutputs + column] = sums[i];
    }
}

template <typename T>
float exact(const std::vector<T>& a, const std::vector<T>& b, size_t row, size_t column, size_t depth, size_t outputs) {
    float sum = 0.0f;
    for (size_t k = 0; k < depth; ++k) {
        sum += load(a[row * depth + k]) * load(b[k * outputs + column]);
    }
    return sum;
}

template <typename T, int kOutputs>
void check_products() {
    std::vector<T> a = small_numbers<T>(kRows * kDepth, 5), b = small_numbers<T>(kDepth * kOutputs, 7);
    for (const Swizzle swizzle_a : kSwizzles) {
        for (const Swizzle swizzle_b : kSwizzles) {
            TensorMap map_a, map_b;
            encode_map<T, 3>(
                map_a, constant(a), {kDepth, kRows, 1}, {kDepth, kDepth * kRows},
                {static_cast<int>(row_bytes(swizzle_a) / 2), kRows, 1}, swizzle_a);
            encode_map<T, 3>(
                map_b, constant(b), {kOutputs, kDepth, 1}, {kOutputs, kOutputs * kDepth},
                {static_cast<int>(row_bytes(swizzle_b) / 2), kDepth, 1}, swizzle_b);
            for (const bool by_tma : {false, true}) {
                std::vector<float> d(kRows * kOutputs, -1.0f);
                launch<products_kernel<T, kOutputs>>(
                    dim3(1), dim3(128), kSharedBytes, Stream{}, map_a, map_b, constant(a), constant(b), buffer(d),
                    swizzle_a, swizzle_b, by_tma);
                for (size_t i = 0; i < d.size(); ++i) {
                    expect(d[i] == exact(a, b, i / kOutputs, i % kOutputs, kDepth, kOutputs), "product");
                }
            }
        }
    }
}

template <typename T>
void products() {
    check_products<T, 8>();
    check_products<T, 24>();
    check_products<T, 64>();
    check_products<T, 128>();
    check_products<T, 256>();
}

// Maps of boxes of 64 x 64 with 128-byte swizzle: a row-major with `depth` columns, b with `outputs` columns.
template <typename T>
TensorMap map_of(std::vector<T>& values, int64_t columns, int64_t rows, int box_rows = 64) {
    TensorMap map;
    expect(
        encode_map<T, 3>(map, constant(values), {columns, rows, 1}, {columns, columns * rows}, {64, box_rows, 1}),
        "a tensor map");
    return map;
}

uint64_t a_at(unsigned address) { return matrix_descriptor(address, 16, 1024); }
uint64_t b_at(unsigned address) { return matrix_descriptor(address, 64 * 128, 1024); }

// d (128 x 64) = a (128 x depth) * b (depth x 64): TMA by one lane, two warpgroups multiply, three stages.
constexpr int kPipelineSteps = 8;

template <typename T>
__global__ void pipeline_kernel(
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, Global<float> d) {
    constexpr unsigned kStages = 3, kStageA = 128 * 128, kStage = kStageA + 64 * 128;
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 2 * kStages);
    const Memory memory(dynamic);
    const unsigned full = shared_address(barriers), empty = full + 8 * kStages;
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, 8);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            for (int step = 0; step < kPipelineSteps; ++step) {
                const unsigned stage = static_cast<unsigned>(step) % kStages;
                mbarrier_wait(empty + 8 * stage, static_cast<unsigned>(step) / kStages % 2 ^ 1);
                mbarrier_expect(full + 8 * stage, kStage);
                const unsigned target = memory.address + stage * kStage;
                tma_load_3d(target, &map_a, step * 64, 0, 0, full + 8 * stage);
                tma_load_3d(target + kStageA, &map_b, 0, step * 64, 0, full + 8 * stage);
            }
        }
        return;
    }
    take_registers<232>();
    const unsigned consumer = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    WgmmaSums<32> sums = {};
    for (int step = 0; step < kPipelineSteps; ++step) {
        const unsigned stage = static_cast<unsigned>(step) % kStages, start = memory.address + stage * kStage;
        mbarrier_wait(full + 8 * stage, static_cast<unsigned>(step) / kStages % 2);
        wgmma_fence();
        for (unsigned k = 0; k < 4; ++k) {
            Wgmma<64>::multiply(
                sums, a_at(start + consumer * 64 * 128 + k * 32), b_at(start + kStageA + k * 16 * 128),
                step != 0 || k != 0, T{});
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (lane == 0 && step > 0) {
            mbarrier_arrive(empty + 8 * (static_cast<unsigned>(step - 1) % kStages));
        }
    }
    wgmma_wait<0>();
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned row = threadIdx.x / 32 * 16 - 64 + lane / 4 + i % 4 / 2 * 8;
        d[row * 64 + lane % 4 * 2 + i / 4 * 8 + i % 2] = sums[i];
    }
}

void pipeline() {
    constexpr size_t kAll = kPipelineSteps * 64;
    std::vector<bfloat16> a = small_numbers<bfloat16>(128 * kAll, 5), b = small_numbers<bfloat16>(kAll * 64, 7);
    std::vector<float> d(128 * 64, -1.0f);
    launch<pipeline_kernel<bfloat16>>(
        dim3(1), dim3(384), kSharedBytes, Stream{}, map_of(a, kAll, 128, 128), map_of(b, 64, kAll), buffer(d));
    for (size_t i = 0; i < d.size(); ++i) {
        expect(d[i] == exact(a, b, i / 64, i % 64, kAll, 64), "pipeline of TMA");
    }
}

// The same by two warps that write a, with all of their lanes arriving, and TMA for b; one warpgroup multiplies.
template <typename T>
__global__ void written_pipeline_kernel(Global<const T> a, const __grid_constant__ TensorMap map_b, Global<float> d) {
    constexpr unsigned kStages = 2, kStage = 2 * 64 * 128;
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 2 * kStages);
    const Memory memory(dynamic);
    const unsigned full = shared_address(barriers), empty = full + 8 * kStages, thread = threadIdx.x;
    if (thread == 0) {
        for (unsigned i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 65);
            mbarrier_init(empty + 8 * i, 128);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (thread >= 128) {
        for (unsigned step = 0; step < kPipelineSteps; ++step) {
            const unsigned stage = step % kStages, start = memory.address + stage * kStage;
            mbarrier_wait(empty + 8 * stage, step / kStages % 2 ^ 1);
            if (thread == 128) {
                tma_load_3d(start + 64 * 128, &map_b, 0, static_cast<int>(step) * 64, 0, full + 8 * stage);
                mbarrier_expect(full + 8 * stage, 64 * 128);
            }
            for (unsigned i = thread - 128; i < 64 * 8; i += 64) {
                const unsigned target = place_of(start + i * 16, Swizzle::k128);
                const Vec<T, 8> values = load_vector<8>(a + (i / 8 * kPipelineSteps * 64 + step * 64 + i % 8 * 8));
                store_vector(pointer_cast<T>(memory.at(target)), values);
            }
            fence_async_proxy();
            mbarrier_arrive(full + 8 * stage);
        }
        return;
    }
    WgmmaSums<32> sums = {};
    for (unsigned step = 0; step < kPipelineSteps; ++step) {
        const unsigned stage = step % kStages, start = memory.address + stage * kStage;
        mbarrier_wait(full + 8 * stage, step / kStages % 2);
        wgmma_fence();
        for (unsigned k = 0; k < 4; ++k) {
            Wgmma<64>::multiply(
                sums, a_at(start + k * 32), b_at(start + 64 * 128 + k * 16 * 128), step != 0 || k != 0, T{});
        }
        wgmma_commit();
        wgmma_wait<0>();
        mbarrier_arrive(empty + 8 * stage);
    }
    const unsigned lane = thread % 32;
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned row = thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
        d[row * 64 + lane % 4 * 2 + i / 4 * 8 + i % 2] = sums[i];
    }
}

void written_pipeline() {
    constexpr size_t kAll = kPipelineSteps * 64;
    std::vector<float16> a = small_numbers<float16>(64 * kAll, 5), b = small_numbers<float16>(kAll * 64, 7);
    std::vector<float> d(64 * 64, -1.0f);
    launch<written_pipeline_kernel<float16>>(
        dim3(1), dim3(192), kSharedBytes, Stream{}, constant(a), map_of(b, 64, kAll), buffer(d));
    for (size_t i = 0; i < d.size(); ++i) {
        expect(d[i] == exact(a, b, i / 64, i % 64, kAll, 64), "pipeline of stores");
    }
}

// Warps 0 and 1 hand values to each other while warp 2 is elsewhere. The values were read by all warps before.
__global__ void named_barriers_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, tile, 64);
    if (threadIdx.x < 64) {
        tile[threadIdx.x] = 0;
    }
    __syncthreads();
    int sum = tile[threadIdx.x % 64];
    if (threadIdx.x == 63) {
        fence_async_proxy();  // after the reads: from here on clocks tell warps apart
    }
    __syncthreads();
    if (threadIdx.x < 64) {
        for (int round = 1; round <= 3; ++round) {
            tile[threadIdx.x] = round;
            named_barrier<1, 64>();
            const int other = tile[63 - threadIdx.x];
            sum += other;
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

// A value goes from warp to warp round a ring of three, through an mbarrier between each two; half of it comes by TMA.
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
                mbarrier_expect(copied, 64 * 128);
                tma_load_3d(memory.address, &map, 0, 0, 0, copied);
                mbarrier_wait(copied, round % 2);
            }
            const uint16_t number = memory.at(memory.address)[0];  // warp 0 has waited for all
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

// All lanes read one value and arrive by themselves; lane 0 has arrived elsewhere more often than the others.
__global__ void lanes_arrive_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, value, 1);
    SPATIALFLOW_SHARED(uint64_t, barriers, 3);
    const unsigned full = shared_address(barriers), empty = full + 8, other = full + 16;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 32);
        mbarrier_init(empty, 32);
        mbarrier_init(other, 12);  // more than there are
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
                mbarrier_arrive(other);
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

// Two copies complete one phase, one of them started before its bytes are expected; then single elements are replaced.
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

// A producer exits while its copies are under way; one lane waits for them, and its warp learns of it by __syncwarp.
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
            mbarrier_expect(barrier, 64 * 128);
            tma_load_3d(memory.address, &map, 0, 0, 0, barrier);
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

// d = a * b where a is a tap of a map with a halo: its 64 rows are pixels (y, x) of 8 x 8, and a row of the map has 10.
constexpr int kHalo = 10;
__global__ void halo_kernel(
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, int tap, Global<float> d) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned a = memory.address, b = a + 13 * 1024, barrier = shared_address(barriers), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier, kHalo * kHalo * 128 + 64 * 128);
        tma_load_3d(a, &map_a, 0, 0, 0, barrier);
        tma_load_3d(b, &map_b, 0, 0, 0, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
    const unsigned start = a + static_cast<unsigned>(tap / 3 * kHalo + tap % 3) * 128;
    WgmmaSums<32> sums = {};
    wgmma_fence();
    for (unsigned k = 0; k < 4; ++k) {
        const uint64_t left = matrix_descriptor(start + k * 32, 16, kHalo * 128);
        Wgmma<64>::multiply(sums, left, b_at(b + k * 16 * 128), k != 0, bfloat16{});
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned row = threadIdx.x / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
        d[row * 64 + lane % 4 * 2 + i / 4 * 8 + i % 2] = sums[i];
    }
}

void halo() {
    std::vector<bfloat16> image = small_numbers<bfloat16>(kHalo * kHalo * 64, 5);
    std::vector<bfloat16> b = small_numbers<bfloat16>(64 * 64, 7);
    TensorMap map;
    encode_map<bfloat16, 3>(map, constant(image), {64, kHalo, kHalo}, {64, 64 * kHalo}, {64, kHalo, kHalo});
    for (int tap = 0; tap < 9; ++tap) {
        std::vector<float> d(64 * 64, -1.0f);
        launch<halo_kernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map, map_of(b, 64, 64), tap, buffer(d));
        for (size_t i = 0; i < d.size(); ++i) {
            const size_t y = i / 64 / 8 + static_cast<size_t>(tap / 3), x = i / 64 % 8 + static_cast<size_t>(tap % 3);
            expect(d[i] == exact(image, b, y * kHalo + x, i % 64, 64, 64), "product of a tap");
        }
    }
}

// Thread 0 waits for all; one store of two bytes into what TMA has brought; fences of the readers, not of the writers;
// then each warp stores into its own rows of a, which no other warp's products read.
__global__ void orders_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned a = memory.address, b = a + 64 * 128, barrier = shared_address(barriers), thread = threadIdx.x;
    memory.clear(a, 64 * 128, thread, 128);
    if (thread == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);
        mbarrier_wait(barrier, 0);
    }
    __syncthreads();
    const uint16_t value = memory.at(b)[thread];
    out[thread] = value;
    if (thread == 64) {
        memory.at(b)[200] = uint16_t{1};
    }
    __syncthreads();
    fence_async_proxy();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
    wgmma_commit();
    wgmma_wait<0>();
    memory.at(a + thread / 32 * 16 * 128)[thread % 32] = uint16_t{1};
}

void orders() {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(128);
    launch<orders_kernel>(dim3(2), dim3(128), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
    expect(out[0] == 3 && out[127] == 3, "orders that need no more fences");
}

// Fewer than it has, as many, more; a block begins with all again.
__global__ void registers_kernel() {
    give_registers<240>();
    give_registers<64>();
    give_registers<64>();
    take_registers<64>();
    take_registers<232>();
}

void registers() { launch<registers_kernel>(dim3(2), dim3(128), 0, Stream{}); }

// Copies and products are under way where a block stops.
__global__ void stopped_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 3);
    const Memory memory(dynamic);
    const unsigned a = memory.address, b = a + 64 * 128, c = b + 64 * 128;
    memory.clear(a, 2 * 64 * 128, threadIdx.x, 128);
    fence_async_proxy();
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < 3; ++i) {
            const unsigned barrier = shared_address(barriers) + 8 * i;
            mbarrier_init(barrier, 1);
            mbarrier_init_fence();
            mbarrier_expect(barrier, 64 * 128);
            tma_load_3d(c + i * 64 * 128, &map, 0, 0, 0, barrier);
        }
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
    wgmma_commit();
    const uint16_t value = memory.at(c)[threadIdx.x];
    out[threadIdx.x] = value;
}

// Half of those that a named barrier waits for.
__global__ void waiting_kernel() {
    if (threadIdx.x < 32) {
        named_barrier<1, 64>();
    }
}

void after_faults() {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(128);
    const auto stops = [&](auto run) {
        bool stopped = false;
        try {
            run();
        } catch (const std::runtime_error&) {
            stopped = true;
        }
        expect(stopped, "a fault");
    };
    for (const unsigned blocks : {1u, 16u}) {
        stops([&] {
            launch<stopped_kernel>(
                dim3(blocks), dim3(128), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
        });
        orders();
        pipeline();
        stops([&] { launch<waiting_kernel>(dim3(blocks), dim3(96), 0, Stream{}); });
        named_barriers();
        ring();
    }
}

// All warps read 16 bytes at once, eight times; the next block begins with two bytes of the last ones.
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

// ---- planted faults ----

// What most of them begin with: a (64 x 64) at `a`, b (64 x 64) at `b`, an mbarrier or more for one arrival each.
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
// The same with zeros in a and b, ready for wgmma.
#define SM90_OPERANDS(count)                           \
    SM90_BLOCK(count);                                 \
    memory.clear(a, 2 * 64 * 128, thread, blockDim.x); \
    fence_async_proxy();                               \
    __syncthreads()

__global__ void no_proxy_fence_kernel() {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    const Memory memory(dynamic);
    memory.clear(memory.address, 2 * 64 * 128, threadIdx.x, 128);
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    const uint64_t left = a_at(memory.address), right = b_at(memory.address + 64 * 128);
    Wgmma<64>::multiply(sums, left, right, 0, bfloat16{});  // line: no proxy fence
}

__global__ void late_proxy_fence_kernel() {
    SM90_OPERANDS(1);
    if (thread >= 128) {
        if (thread == 128) {
            memory.at(a)[5] = uint16_t{1};
            mbarrier_arrive(barrier);
            fence_async_proxy();
        }
        return;
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: late proxy fence
}

__global__ void fence_of_one_thread_kernel() {
    SM90_OPERANDS(1);
    memory.at(a)[thread] = uint16_t{1};
    if (thread == 0) {
        fence_async_proxy();
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: fence of one thread
}

__global__ void store_after_fence_kernel() {
    SM90_OPERANDS(1);
    if (thread == 77) {
        memory.at(a)[5] = uint16_t{1};
        fence_async_proxy();
        memory.at(b)[9] = uint16_t{1};
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: store after fence
}

__global__ void swizzle_of_one_side_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<16> sums = {};
    wgmma_fence();
    const uint64_t right = descriptor(b, 64 * 64, 512, Swizzle::k64);
    Wgmma<32>::multiply(sums, a_at(a), right, 0, bfloat16{});  // line: swizzle of one side
}

__global__ void exchanged_offsets_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 2 * 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);
        tma_load_3d(b + 64 * 128, &map, 64, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<64> sums = {};
    wgmma_fence();
    const uint64_t right = matrix_descriptor(b, 1024, 64 * 128);
    Wgmma<128>::multiply(sums, a_at(a), right, 0, bfloat16{});  // line: exchanged offsets
}

__global__ void exchanged_offsets_of_a_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, matrix_descriptor(a, 1024, 16), b_at(b), 0, bfloat16{});  // line: exchanged offsets of a
}

__global__ void rows_without_swizzle_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    const uint64_t left = descriptor(a, 16, 1024, Swizzle::kNone);
    Wgmma<64>::multiply(sums, left, b_at(b), 0, bfloat16{});  // line: rows without swizzle
}

__global__ void short_expect_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
        tma_load_3d(b, &map, 0, 0, 0, barrier);  // line: short expect, late
    }
    mbarrier_wait(barrier, 0);
    const uint16_t first = memory.at(a)[thread];
    const uint16_t second = memory.at(b)[thread];  // line: short expect, early
    out[thread] = first + second;
}

__global__ void long_expect_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128 + 16);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);  // line: long expect
}

__global__ void seen_parity_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_arrive(barrier);
    }
    for (int round = 0; round < 2; ++round) {
        mbarrier_wait(barrier, 0);  // line: seen parity
    }
}

__global__ void early_parity_kernel(Global<int> out) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        memory.at(a)[0] = uint16_t{1};  // line: early parity
        mbarrier_arrive(barrier);
    } else if (thread == 127) {
        mbarrier_wait(barrier, 1);
        const uint16_t value = memory.at(a)[0];
        out[thread] = value;
    }
}

// Lane 7 arrives before it reads, the others after.
__global__ void arrival_before_read_kernel(Global<int> out) {
    SPATIALFLOW_SHARED(int, value, 1);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const unsigned barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
        value[0] = 0;
        mbarrier_init(barrier, 32);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        if (threadIdx.x == 7) {
            mbarrier_arrive(barrier);
        }
        const int read = value[0];
        out[threadIdx.x] = read;
        if (threadIdx.x != 7) {
            mbarrier_arrive(barrier);
        }
    } else if (threadIdx.x == 32) {
        mbarrier_wait(barrier, 0);
        value[0] = 1;  // line: arrival before read
    }
}

// Thread 32 tells thread 64 of a store of thread 0 that it has not waited for itself.
__global__ void broken_chain_kernel(Global<int> out) {
    SM90_BLOCK(2);
    if (thread == 0) {
        memory.at(a)[0] = uint16_t{1};
        mbarrier_arrive(barrier);
    } else if (thread == 32) {
        mbarrier_arrive(barrier + 8);
        mbarrier_wait(barrier, 0);
    } else if (thread == 64) {
        mbarrier_wait(barrier + 8, 0);
        const uint16_t value = memory.at(a)[0];  // line: broken chain
        out[0] = value;
    }
}

__global__ void endless_wait_kernel() {
    SM90_BLOCK(2);
    if (thread == 0) {
        mbarrier_arrive(barrier);
    }
    mbarrier_wait(barrier + 8, 0);  // line: endless wait
}

__global__ void parity_of_two_kernel() {
    SM90_BLOCK(1);
    mbarrier_wait(barrier, 2);  // line: parity of two
}

__global__ void overwritten_by_copy_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread < 128) {
        WgmmaSums<32> sums = {};
        wgmma_fence();
        Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
        wgmma_commit();
        named_barrier<1, 160>();
        wgmma_wait<0>();
        return;
    }
    named_barrier<1, 160>();
    if (thread == 128) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);  // line: overwritten by copy
    }
}

__global__ void overwritten_by_store_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
    wgmma_commit();
    __syncthreads();
    memory.at(b)[thread] = uint16_t{1};  // line: overwritten by store
    wgmma_wait<0>();
}

__global__ void released_too_early_kernel() {
    SM90_OPERANDS(1);
    if (thread < 128) {
        WgmmaSums<32> sums = {};
        for (int round = 0; round < 2; ++round) {
            wgmma_fence();
            Wgmma<64>::multiply(sums, a_at(a + static_cast<unsigned>(round) * 32), b_at(b), 0, bfloat16{});
            wgmma_commit();
        }
        wgmma_wait<1>();
        if (thread == 0) {
            mbarrier_arrive(barrier);
        }
        wgmma_wait<0>();
        return;
    }
    mbarrier_wait(barrier, 0);
    memory.at(a)[8 * (thread - 128)] = uint16_t{1};  // line: released too early
}

__global__ void one_warp_releases_kernel() {
    SM90_OPERANDS(1);
    if (thread < 128) {
        WgmmaSums<32> sums = {};
        wgmma_fence();
        Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
        wgmma_commit();
        wgmma_wait<0>();
        if (thread == 0) {
            mbarrier_arrive(barrier);
        }
        return;
    }
    mbarrier_wait(barrier, 0);
    memory.at(b)[thread] = uint16_t{1};  // line: one warp releases
}

__global__ void sums_before_wait_kernel(Global<float> out) {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
    wgmma_commit();
    wgmma_wait<1>();
    out[thread] = sums[0];  // line: sums before wait
}

__global__ void no_commit_kernel(Global<float> out) {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
    wgmma_wait<0>();
    out[thread] = sums[0];  // line: no commit
}

__global__ void sums_end_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: sums end
    wgmma_commit();
}

__global__ void outside_sums_kernel(Global<float> out) {
    const WgmmaSums<32> sums = {};
    out[threadIdx.x] = sums[32];  // line: outside sums
}

__global__ void no_wgmma_fence_kernel(Global<float> out) {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    for (int round = 0; round < 2; ++round) {
        if (round == 0) {
            wgmma_fence();
        }
        Wgmma<64>::multiply(sums, a_at(a), b_at(b), round, bfloat16{});  // line: no wgmma fence
        wgmma_commit();
        wgmma_wait<0>();
        out[thread] = sums[0];
    }
}

__global__ void start_not_shifted_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    const uint64_t raw = (a_at(0) | a) + 40 * 1024;
    Wgmma<64>::multiply(sums, raw, b_at(b), 0, bfloat16{});  // line: start not shifted
}

__global__ void start_of_the_low_kilobytes_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(0) | a, b_at(b), 0, bfloat16{});  // line: start of the low kilobytes
}

__global__ void base_offset_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a + 128) | uint64_t{1} << 49, b_at(b), 0, bfloat16{});  // line: base offset
}

__global__ void operand_out_of_bounds_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(a + kSharedBytes), 0, bfloat16{});  // line: operand out of bounds
}

__global__ void wrong_first_warp_kernel() {
    SM90_OPERANDS(1);
    if (thread < 32 || thread >= 160) {
        return;
    }
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: wrong first warp
}

__global__ void different_descriptors_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    const uint64_t left = a_at(a + thread / 64 * 32);
    Wgmma<64>::multiply(sums, left, b_at(b), 0, bfloat16{});  // line: different descriptors
}

__global__ void invisible_mbarrier_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(barriers), 1);
        mbarrier_init_fence();
    }
    if (threadIdx.x == 33) {
        mbarrier_arrive(shared_address(barriers));  // line: invisible mbarrier
    }
}

__global__ void no_mbarrier_kernel() {
    SM90_BLOCK(1);
    mbarrier_wait(barrier + 8, 0);  // line: no mbarrier
}

__global__ void invisible_to_TMA_kernel(const __grid_constant__ TensorMap map) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const unsigned barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(shared_address(dynamic), &map, 0, 0, 0, barrier);  // line: invisible to TMA
    }
}

__global__ void live_mbarrier_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_arrive(barrier);
        mbarrier_init(barrier, 1);  // line: live mbarrier
    }
}

__global__ void misaligned_mbarrier_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 2);
    mbarrier_init(shared_address(barriers) + 4, 1);  // line: misaligned mbarrier
}

__global__ void too_many_arrivals_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
    }
    __syncthreads();
    if (thread == 32) {
        mbarrier_arrive(barrier);  // line: too many arrivals
    }
}

__global__ void read_before_TMA_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    __syncthreads();
    const uint16_t value = memory.at(a)[thread];  // line: read before TMA
    out[thread] = value;
}

__global__ void write_before_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    __syncthreads();
    memory.at(a)[thread] = uint16_t{1};  // line: write before TMA
}

__global__ void TMA_over_a_store_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    memory.at(a)[thread] = uint16_t{1};
    __syncthreads();
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: TMA over a store
    }
}

__global__ void TMA_over_readers_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_OPERANDS(1);
    const uint16_t value = memory.at(a)[thread];
    out[thread] = value;
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: TMA over readers
    }
}

__global__ void two_copies_in_one_place_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 2 * 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
        tma_load_3d(a + 1024, &map, 0, 0, 0, barrier);  // line: two copies in one place
    }
    mbarrier_wait(barrier, 0);
}

__global__ void elected_lane_waits_kernel(const __grid_constant__ TensorMap map, unsigned elected) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);
    }
    if (thread % 32 == elected) {
        mbarrier_wait(barrier, 0);
    }
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: elected lane waits
}

__global__ void misaligned_target_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a + 64, &map, 0, 0, 0, barrier);  // line: misaligned target
    }
}

__global__ void target_out_of_bounds_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a + kSharedBytes - 2048, &map, 0, 0, 0, barrier);  // line: target out of bounds
    }
}

__global__ void wrong_dimensions_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        tma_load_4d(a, &map, 0, 0, 0, 0, barrier);  // line: wrong dimensions
    }
}

__global__ void copy_at_exit_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_wait(barrier, 1);
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: copy at exit
    }
}

__global__ void unexpected_copy_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(2);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier + 8);
    }
    mbarrier_wait(barrier, 0);  // line: unexpected copy
}

__global__ void too_many_registers_kernel() {
    if (threadIdx.x < 128) {
        give_registers<56>();
    } else {
        take_registers<232>();  // line: too many registers
    }
}

__global__ void registers_of_some_kernel() {
    if (threadIdx.x < 96) {
        give_registers<56>();  // line: registers of some
    }
}

__global__ void odd_registers_kernel() {
    give_registers<60>();  // line: odd registers
}

__global__ void two_counts_kernel() {
    if (threadIdx.x < 32) {
        named_barrier<1, 64>();
    } else {
        named_barrier<1, 96>();  // line: two counts
    }
}

__global__ void named_barrier_skipped_kernel() {
    if (threadIdx.x < 32) {
        named_barrier<3, 64>();  // line: named barrier skipped
    }
}

__global__ void mbarrier_read_kernel(Global<int> out) {
    SM90_BLOCK(1);
    const uint64_t state = barriers[0];  // line: mbarrier read
    out[thread] = static_cast<int>(state);
}

__global__ void mbarrier_written_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        barriers[0] = uint64_t{0};  // line: mbarrier written
    }
}

__global__ void mbarrier_of_another_stage_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(2);
    if (thread == 0) {
        for (unsigned i = 0; i < 2; ++i) {
            mbarrier_expect(barrier + 8 * i, 64 * 128);
            tma_load_3d(a + i * 64 * 128, &map, 0, 0, 0, barrier + 8 * i);
        }
    }
    mbarrier_wait(barrier + 8, 0);
    const uint16_t value = memory.at(a)[thread];  // line: mbarrier of another stage
    out[thread] = value;
}

// Its own warp has waited for the products, the others have not.
__global__ void store_after_own_wait_kernel() {
    SM90_OPERANDS(1);
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
    wgmma_commit();
    wgmma_wait<0>();
    if (thread == 0) {
        memory.at(b)[0] = uint16_t{1};  // line: store after own wait
    }
}

// Two warpgroups multiply, one tells that it has done so.
__global__ void one_warpgroup_releases_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(2);
    if (thread < 256) {
        mbarrier_wait(barrier, 0);
        WgmmaSums<32> sums = {};
        wgmma_fence();
        Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});
        wgmma_commit();
        wgmma_wait<0>();
        if (thread < 128) {
            named_barrier<1, 128>();
            if (thread == 0) {
                mbarrier_arrive(barrier + 8);
            }
        }
    } else if (thread == 256) {
        for (unsigned round = 0; round < 2; ++round) {
            if (round > 0) {
                mbarrier_wait(barrier + 8, 0);
            }
            mbarrier_expect(barrier, 64 * 128);
            tma_load_3d(b, &map, 0, 0, 0, barrier);  // line: one warpgroup releases
        }
    }
}

// Thread 31 releases what the other lanes of its warp read too.
__global__ void no_syncwarp_before_release_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SM90_BLOCK(2);
    if (thread < 32) {
        mbarrier_wait(barrier, 0);
        const uint16_t value = memory.at(a)[thread];
        out[thread] = value;
        if (thread == 31) {
            mbarrier_arrive(barrier + 8);
        }
    } else if (thread == 32) {
        for (unsigned round = 0; round < 2; ++round) {
            if (round > 0) {
                mbarrier_wait(barrier + 8, 0);
            }
            mbarrier_expect(barrier, 64 * 128);
            tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: no syncwarp before release
        }
    }
}

__global__ void second_producer_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread % 64 == 0) {
        mbarrier_expect(barrier, 64 * 128);  // line: second producer
        tma_load_3d(a + thread / 64 * 64 * 128, &map, 0, 0, 0, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
}

__global__ void phase_not_waited_for_kernel() {
    SM90_BLOCK(1);
    if (thread == 0) {
        for (int round = 0; round < 2; ++round) {
            mbarrier_arrive(barrier);  // line: phase not waited for
        }
    }
}

__global__ void atomic_beside_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);
    }
    if (thread == 64) {
        atomicAdd(pointer_cast<int>(memory.at(a)), 1);  // line: atomic beside TMA
    }
    mbarrier_wait(barrier, 0);
}

__global__ void TMA_over_atomics_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    atomicAdd(pointer_cast<int>(memory.at(a)), 1);
    __syncthreads();
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(a, &map, 0, 0, 0, barrier);  // line: TMA over atomics
    }
}

__global__ void TMA_over_an_mbarrier_kernel(const __grid_constant__ TensorMap map) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    const Memory memory(dynamic);
    if (threadIdx.x == 0) {
        const unsigned barrier = memory.address + 4096;
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(memory.address, &map, 0, 0, 0, barrier);  // line: TMA over an mbarrier
    }
}

__global__ void two_bytes_after_TMA_kernel(const __grid_constant__ TensorMap map) {
    SM90_OPERANDS(1);
    if (thread == 0) {
        mbarrier_expect(barrier, 64 * 128);
        tma_load_3d(b, &map, 0, 0, 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    if (thread == 3) {
        memory.at(b)[7] = uint16_t{1};
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: two bytes after TMA
}

__global__ void cp_async_without_proxy_fence_kernel(Global<int> values) {
    SM90_OPERANDS(1);
    if (thread < 32) {
        cp_async_16(memory.at(a) + thread * 8, pointer_cast<const uint16_t>(values) + thread * 8, true);
        cp_async_commit();
        cp_async_wait<0>();
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: cp.async without proxy fence
}

__global__ void elected_lane_fences_kernel() {
    SM90_BLOCK(1);
    memory.clear(a, 2 * 64 * 128, thread, 128);
    __syncthreads();
    if (thread % 32 == 0) {
        fence_async_proxy();
    }
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: elected lane fences
}

__global__ void lanes_apart_kernel() {
    SM90_OPERANDS(1);
    if (thread % 32 < 31) {
        wgmma_fence();  // line: lanes apart
    } else {
        wgmma_fence();
    }
}

__global__ void mbarrier_of_the_first_block_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        mbarrier_init(shared_address(barriers), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive(shared_address(barriers));  // line: mbarrier of the first block
    }
}

__global__ void operands_of_the_first_block_kernel(const __grid_constant__ TensorMap map) {
    SM90_BLOCK(1);
    if (blockIdx.x == 0) {
        memory.clear(a, 64 * 128, thread, 128);
        fence_async_proxy();
        if (thread == 0) {
            mbarrier_expect(barrier, 64 * 128);
            tma_load_3d(b, &map, 0, 0, 0, barrier);
        }
        mbarrier_wait(barrier, 0);
    }
    __syncthreads();
    WgmmaSums<32> sums = {};
    wgmma_fence();
    Wgmma<64>::multiply(sums, a_at(a), b_at(b), 0, bfloat16{});  // line: operands of the first block
    wgmma_commit();
    wgmma_wait<0>();
}

__global__ void many_mbarriers_kernel() {
    SPATIALFLOW_SHARED(uint64_t, barriers, 65);
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < 65; ++i) {
            mbarrier_init(shared_address(barriers) + 8 * i, 1);  // line: many mbarriers
        }
    }
}

__global__ void more_registers_by_dec_kernel() {
    give_registers<176>();  // line: more registers by dec
}

__global__ void fewer_registers_by_inc_kernel() {
    take_registers<160>();  // line: fewer registers by inc
}

__global__ void halves_of_warps_kernel() {
    if (threadIdx.x % 32 < 16) {
        named_barrier<1, 64>();  // line: halves of warps
    }
}

template <auto kKernel, unsigned kThreads = 128, unsigned kBlocks = 1>
void alone() {
    launch<kKernel>(dim3(kBlocks), dim3(kThreads), kSharedBytes, Stream{});
}
template <auto kKernel, typename T = int>
void into_buffer() {
    std::vector<T> out(128);
    launch<kKernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, buffer(out));
}
template <auto kKernel, unsigned kThreads = 128, unsigned kBlocks = 1>
void of_tensor() {
    std::vector<bfloat16> tensor(64 * 128);
    launch<kKernel>(dim3(kBlocks), dim3(kThreads), kSharedBytes, Stream{}, map_of(tensor, 128, 64));
}
template <auto kKernel>
void of_tensor_into_buffer() {
    std::vector<bfloat16> tensor(64 * 128);
    std::vector<int> out(128);
    launch<kKernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map_of(tensor, 128, 64), buffer(out));
}
template <unsigned kLane>
void elected_lane_waits() {
    std::vector<bfloat16> tensor(64 * 128);
    launch<elected_lane_waits_kernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map_of(tensor, 128, 64), kLane);
}

void encode(const int64_t (&sizes)[3], const int (&box)[3], Swizzle swizzle, simt::Site site) {
    std::vector<bfloat16> tensor(1024 * 16);
    TensorMap map;
    encode_map<bfloat16, 3>(map, constant(tensor), sizes, {1024, 1024 * 16}, box, swizzle, site);
}

const Cases kClean = {
    {"after_faults", after_faults},
    {"boxes", boxes},
    {"exited_producer", exited_producer},
    {"halo", halo},
    {"lanes_arrive", lanes_arrive},
    {"named_barriers", named_barriers},
    {"orders", orders},
    {"pipeline", pipeline},
    {"products_bfloat16", products<bfloat16>},
    {"products_float16", products<float16>},
    {"registers", registers},
    {"reused", reused},
    {"ring", ring},
    {"two_copies", two_copies},
    {"written_pipeline", written_pipeline},
};

const Cases kFaults = {
    {"TMA over a store", of_tensor<TMA_over_a_store_kernel>},
    {"TMA over an mbarrier", of_tensor<TMA_over_an_mbarrier_kernel>},
    {"TMA over atomics", of_tensor<TMA_over_atomics_kernel>},
    {"TMA over readers", of_tensor_into_buffer<TMA_over_readers_kernel>},
    {"arrival before read", into_buffer<arrival_before_read_kernel>},
    {"atomic beside TMA", of_tensor<atomic_beside_TMA_kernel>},
    {"base offset", alone<base_offset_kernel>},
    {"broken chain", into_buffer<broken_chain_kernel>},
    {"copy at exit", of_tensor<copy_at_exit_kernel>},
    {"cp.async without proxy fence", into_buffer<cp_async_without_proxy_fence_kernel>},
    {"different descriptors", alone<different_descriptors_kernel>},
    {"early parity", into_buffer<early_parity_kernel>},
    {"elected lane fences", alone<elected_lane_fences_kernel>},
    {"elected lane waits", elected_lane_waits<0>},
    {"elected lane waits, the last", elected_lane_waits<31>},
    {"endless wait", alone<endless_wait_kernel>},
    {"exchanged offsets", of_tensor<exchanged_offsets_kernel>},
    {"exchanged offsets of a", alone<exchanged_offsets_of_a_kernel>},
    {"fence of one thread", alone<fence_of_one_thread_kernel>},
    {"fewer registers by inc", alone<fewer_registers_by_inc_kernel, 384>},
    {"halves of warps", alone<halves_of_warps_kernel>},
    {"invisible mbarrier", alone<invisible_mbarrier_kernel>},
    {"invisible to TMA", of_tensor<invisible_to_TMA_kernel>},
    {"lanes apart", alone<lanes_apart_kernel>},
    {"late proxy fence", alone<late_proxy_fence_kernel, 256>},
    {"live mbarrier", alone<live_mbarrier_kernel>},
    {"long expect", of_tensor<long_expect_kernel>},
    {"many mbarriers", alone<many_mbarriers_kernel>},
    {"mbarrier of another stage", of_tensor_into_buffer<mbarrier_of_another_stage_kernel>},
    {"mbarrier of the first block", alone<mbarrier_of_the_first_block_kernel, 128, 2>},
    {"mbarrier read", into_buffer<mbarrier_read_kernel>},
    {"mbarrier written", alone<mbarrier_written_kernel>},
    {"misaligned mbarrier", alone<misaligned_mbarrier_kernel>},
    {"misaligned target", of_tensor<misaligned_target_kernel>},
    {"more registers by dec", alone<more_registers_by_dec_kernel, 384>},
    {"named barrier skipped", alone<named_barrier_skipped_kernel>},
    {"no commit", into_buffer<no_commit_kernel, float>},
    {"no mbarrier", alone<no_mbarrier_kernel>},
    {"no proxy fence", alone<no_proxy_fence_kernel>},
    {"no syncwarp before release", of_tensor_into_buffer<no_syncwarp_before_release_kernel>},
    {"no wgmma fence", into_buffer<no_wgmma_fence_kernel, float>},
    {"odd registers", alone<odd_registers_kernel>},
    {"one warp releases", alone<one_warp_releases_kernel, 160>},
    {"one warpgroup releases", of_tensor<one_warpgroup_releases_kernel, 288>},
    {"operand out of bounds", alone<operand_out_of_bounds_kernel>},
    {"operands of the first block", of_tensor<operands_of_the_first_block_kernel, 128, 2>},
    {"outside sums", into_buffer<outside_sums_kernel, float>},
    {"overwritten by copy", of_tensor<overwritten_by_copy_kernel, 160>},
    {"overwritten by store", alone<overwritten_by_store_kernel>},
    {"parity of two", alone<parity_of_two_kernel>},
    {"phase not waited for", alone<phase_not_waited_for_kernel>},
    {"read before TMA", of_tensor_into_buffer<read_before_TMA_kernel>},
    {"registers of some", alone<registers_of_some_kernel>},
    {"released too early", alone<released_too_early_kernel, 160>},
    {"row beyond the swizzle",
     [] {
         encode({64, 16, 1}, {64, 8, 1}, Swizzle::k64, simt::Site::here());  // line: row beyond the swizzle
     }},
    {"row not in 16 bytes",
     [] {
         encode({64, 16, 1}, {12, 8, 1}, Swizzle::k64, simt::Site::here());  // line: row not in 16 bytes
     }},
    {"row within the swizzle",
     [] {
         encode({64, 16, 1}, {32, 8, 1}, Swizzle::k128, simt::Site::here());  // line: row within the swizzle
     }},
    {"rows without swizzle",
     [] {
         std::vector<bfloat16> tensor(64 * 64);
         TensorMap map;
         encode_map<bfloat16, 3>(map, constant(tensor), {64, 64, 1}, {64, 64 * 64}, {64, 64, 1}, Swizzle::kNone);
         launch<rows_without_swizzle_kernel>(dim3(1), dim3(128), kSharedBytes, Stream{}, map);
     }},
    {"second producer", of_tensor<second_producer_kernel>},
    {"seen parity", alone<seen_parity_kernel>},
    {"short expect", of_tensor_into_buffer<short_expect_kernel>},
    {"start not shifted", alone<start_not_shifted_kernel>},
    {"start of the low kilobytes", alone<start_of_the_low_kilobytes_kernel>},
    {"store after fence", alone<store_after_fence_kernel>},
    {"store after own wait", alone<store_after_own_wait_kernel>},
    {"sums before wait", into_buffer<sums_before_wait_kernel, float>},
    {"sums end", alone<sums_end_kernel>},
    {"swizzle of one side", of_tensor<swizzle_of_one_side_kernel>},
    {"target out of bounds", of_tensor<target_out_of_bounds_kernel>},
    {"tensor too small",
     [] {
         encode({1024, 17, 1}, {64, 8, 1}, Swizzle::k128, simt::Site::here());  // line: tensor too small
     }},
    {"too many arrivals", alone<too_many_arrivals_kernel>},
    {"too many registers", alone<too_many_registers_kernel, 384>},
    {"two bytes after TMA", of_tensor<two_bytes_after_TMA_kernel>},
    {"two copies in one place", of_tensor<two_copies_in_one_place_kernel>},
    {"two counts", alone<two_counts_kernel>},
    {"unexpected copy", of_tensor<unexpected_copy_kernel>},
    {"wide box",
     [] {
         encode({1024, 16, 1}, {64, 257, 1}, Swizzle::k128, simt::Site::here());  // line: wide box
     }},
    {"write before TMA", of_tensor<write_before_TMA_kernel>},
    {"wrong dimensions", of_tensor<wrong_dimensions_kernel>},
    {"wrong first warp", alone<wrong_first_warp_kernel, 256>},
};

}  // namespace

int main(int count, char** arguments) { return run_case(kClean, kFaults, count, arguments); }
