// SPDX-License-Identifier: Apache-2.0
//
// Clean kernels for compute capability 9.0, for the tests of the interpreter (tests/test_simt.py): boxes of TMA and
// products of wgmma. Each case checks its results.
#include "sm90_cases.h"

using namespace spatialflow;

namespace {

// Coordinates of a box for box_kernel, which copies the box unchanged from shared memory to `out`.
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
        const unsigned place = swizzled_address(address[0] + static_cast<unsigned>(i) * 2, swizzle) - address[0];
        expect(out[place / 2] == expected, "box of TMA");
    }
}

void boxes() {
    std::vector<bfloat16> tensor(80 * 9 * 6 * 3);
    for (size_t i = 0; i < tensor.size(); ++i) {
        tensor[i].bits = static_cast<uint16_t>(i + 1);
    }
    // Planes of eight channels, which are adjacent in a pixel, so strides are not ascending.
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

// Store the sums of a thread to the row-major matrix d. The 64 rows of its warpgroup begin at `first_row`.
template <int kOutputs>
void store_sums(const WgmmaSums<kOutputs / 2>& sums, unsigned first_row, const Global<float>& d) {
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < kOutputs / 2; ++i) {
        const unsigned row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
        d[row * kOutputs + lane % 4 * 2 + i / 4 * 8 + i % 2] = sums[i];
    }
}

// d = a (64 x 64, K-major) * b (64 x outputs, outputs adjacent) in four products of depth 16, which form three groups.
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
    // Both matrices are stored as blocks of columns, one after another; a block has all 64 rows. Columns are k in a and
    // outputs in b.
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
            memory.at(swizzled_address(address, swizzle_a))[0] = a[i].bits;
        }
        for (unsigned i = thread; i < kDepth * kOutputs; i += 128) {
            const unsigned row = i / kOutputs, byte = i % kOutputs * 2;
            const unsigned address = start_b + byte / row_b * kDepth * row_b + row * row_b + byte % row_b;
            memory.at(swizzled_address(address, swizzle_b))[0] = b[i].bits;
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
    store_sums<kOutputs>(sums, 0, d);
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
        decrease_registers<40>();
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
    increase_registers<232>();
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
    store_sums<64>(sums, consumer * 64, d);
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

// d (64 x 64) = a (64 x depth) * b (depth x 64) in two stages. Two warps write a, and all their lanes arrive; TMA loads
// b; one warpgroup multiplies.
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
                const unsigned target = swizzled_address(start + i * 16, Swizzle::k128);
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
    store_sums<64>(sums, 0, d);
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

// Compute d = a * b where a is a tap of a map with a halo. The 64 rows of a are 8 x 8 pixels (y, x); the map has
// 10 x 10 pixels.
constexpr int kHalo = 10;
__global__ void halo_kernel(
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, int tap, Global<float> d) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned a = memory.address, b = a + 13 * 1024, barrier = shared_address(barriers);
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
    store_sums<64>(sums, 0, d);
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

// Accesses that need no further fences. Thread 0 waits for TMA and a barrier follows; then thread 64 stores two bytes
// into the copied data. All threads execute the proxy fence after the second barrier, not before it. At the end each
// warp stores to the rows of a that only its products read.
__global__ void orders_kernel(const __grid_constant__ TensorMap map, Global<int> out) {
    SPATIALFLOW_DYNAMIC_SHARED(uint16_t, dynamic);
    SPATIALFLOW_SHARED(uint64_t, barriers, 1);
    const Memory memory(dynamic);
    const unsigned a = memory.address, b = a + 64 * 128, barrier = shared_address(barriers), thread = threadIdx.x;
    memory.clear(a, 64 * 128, thread, 128);
    if (thread == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        load_box(map, b, barrier);
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
    multiply(sums, a_at(a), b_at(b));
    wgmma_commit();
    wgmma_wait<0>();
    memory.at(a + thread / 32 * 16 * 128)[thread % 32] = uint16_t{1};
}

void orders() {
    std::vector<bfloat16> numbers(64 * 64, bfloat16{3});
    std::vector<int> out(128);
    launch<orders_kernel>(dim3(2), dim3(128), kSharedBytes, Stream{}, map_of(numbers, 64, 64), buffer(out));
    expect(out[0] == 3 && out[127] == 3, "accesses that need no further fences");
}

void after_faults() {
    run_after_faults([] {
        orders();
        pipeline();
    });
}

const Cases kClean = {
    {"after_faults", after_faults},
    {"boxes", boxes},
    {"halo", halo},
    {"orders", orders},
    {"pipeline", pipeline},
    {"products_bfloat16", products<bfloat16>},
    {"products_float16", products<float16>},
    {"written_pipeline", written_pipeline},
};

}  // namespace

int main(int count, char** arguments) { return run_case(kClean, {}, count, arguments); }
