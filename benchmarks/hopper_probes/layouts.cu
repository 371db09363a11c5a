// SPDX-License-Identifier: Apache-2.0
// Probes of operand layouts: shifted planes, shifted rows with 128-byte swizzle, and layouts of fragments.
// All data are small integers, so products are exact, and a different element shows a wrong layout.
#include <utility>

#include "probes.h"

namespace {

constexpr int HALO = 10, CHANNELS = 64, OUTPUTS = 64, TAPS = 9;
constexpr int TILE_BYTES = HALO * HALO * CHANNELS * 2;  // 12,800
constexpr int IMAGE_H = 12, IMAGE_W = 13, IMAGE_C = 128, IMAGES = 2;
constexpr int PRODUCT = 64 * OUTPUTS;

float value(bf16 x) { return __bfloat162float(x); }

// Return the box that TMA is expected to load: channels [64, 128) of the second image from pixel (y0 - 1, x0 - 1) on,
// with zeros outside the image.
std::vector<bf16> halo_tile(const std::vector<bf16>& image, int y0, int x0) {
    std::vector<bf16> tile(HALO * HALO * CHANNELS, __float2bfloat16(0));
    for (int y = 0; y < HALO; ++y) {
        for (int x = 0; x < HALO; ++x) {
            const int row = y0 - 1 + y, column = x0 - 1 + x;
            if (row < 0 || row >= IMAGE_H || column < 0 || column >= IMAGE_W) {
                continue;
            }
            for (int c = 0; c < CHANNELS; ++c) {
                tile[(y * HALO + x) * CHANNELS + c] =
                    image[((size_t(IMAGE_H) + row) * IMAGE_W + column) * IMAGE_C + 64 + c];
            }
        }
    }
    return tile;
}

// Store D of m64n64 of a warpgroup by the documented fragment layout.
__device__ void store_product(const float (&d)[OUTPUTS / 2], float* product) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < OUTPUTS / 2; ++i) {
        const int row = warp * 16 + lane / 4 + (i / 2 % 2) * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        product[row * OUTPUTS + column] = d[i];
    }
}

// ------------------------------------------------------------------------------------------------ planes

struct PlanesShared {
    alignas(128) bf16 tile[TILE_BYTES / 2];
    alignas(128) bf16 weights[8][OUTPUTS][8];
    alignas(8) uint64_t barrier;
};

__global__ void __launch_bounds__(128) shifted_planes_kernel(
    const __grid_constant__ CUtensorMap map, const bf16* tile, const bf16* weights, float* products, bool tma,
    bool swapped, int y0, int x0) {
    __shared__ PlanesShared shared;
    const unsigned barrier = shared_address(&shared.barrier), base = shared_address(shared.tile);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (tma) {
        if (threadIdx.x == 0) {
            mbarrier_expect(barrier, TILE_BYTES);
            tma_load_5d(base, &map, 0, x0 - 1, y0 - 1, 8, 1, barrier);
        }
        mbarrier_wait(barrier, 0, 1);
    } else {
        for (int i = threadIdx.x; i < HALO * HALO * CHANNELS; i += 128) {
            shared.tile[(i % CHANNELS / 8 * HALO * HALO + i / CHANNELS) * 8 + i % 8] = tile[i];
        }
    }
    for (int tap = 0; tap < TAPS; ++tap) {
        for (int i = threadIdx.x; i < OUTPUTS * CHANNELS; i += 128) {
            shared.weights[i % CHANNELS / 8][i / CHANNELS][i % 8] = weights[tap * OUTPUTS * CHANNELS + i];
        }
        fence_async_proxy();
        __syncthreads();
        float d[OUTPUTS / 2] = {};
        pin(d);
        wgmma_fence();
        for (int s = 0; s < CHANNELS / 16; ++s) {
            const unsigned a = base + 2 * s * HALO * HALO * 16 + (tap / 3 * HALO + tap % 3) * 16;
            const unsigned b = shared_address(shared.weights) + 2 * s * OUTPUTS * 16;
            Wgmma<OUTPUTS>::ss(
                d,
                matrix_descriptor(
                    a, swapped ? HALO * 16 : HALO * HALO * 16, swapped ? HALO * HALO * 16 : HALO * 16, SWIZZLE_NONE),
                matrix_descriptor(b, swapped ? 128 : OUTPUTS * 16, swapped ? OUTPUTS * 16 : 128, SWIZZLE_NONE), 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
        store_product(d, products + tap * PRODUCT);
        __syncthreads();
    }
}

// ------------------------------------------------------------------------------------------------ rows

struct Start {
    int row;          // row of the tile (one pixel, 128 bytes) at which A starts
    int sbo;          // bytes
    int base_offset;  // 1: (start >> 7) & 7, 0: zero
};

constexpr int ROWS_SHARED = 1024 + 2048 + TILE_BYTES + 8192;

__global__ void __launch_bounds__(128) shifted_rows_kernel(
    const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap weights_map, const Start* starts,
    int count, unsigned target_offset, uint4* image, float* products, int y0, int x0) {
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) uint64_t barrier_storage;
    const unsigned barrier = shared_address(&barrier_storage);
    unsigned char* aligned = memory + (1024 - shared_address(memory) % 1024) % 1024;
    unsigned char* tile = aligned + 8192 + target_offset;
    const unsigned weights = shared_address(aligned), base = shared_address(tile);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_expect(barrier, TILE_BYTES + 8192);
        tma_load_4d(base, &map, 64, x0 - 1, y0 - 1, 1, barrier);
        tma_load_3d(weights, &weights_map, 0, 0, 4, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0, 2);
    for (int i = threadIdx.x; i < TILE_BYTES / 16; i += 128) {
        image[i] = reinterpret_cast<const uint4*>(tile)[i];
    }
    for (int index = 0; index < count; ++index) {
        const Start start = starts[index];
        const unsigned first = base + start.row * 128;
        const unsigned base_offset = start.base_offset ? (first >> 7) & 7 : 0;
        float d[OUTPUTS / 2] = {};
        pin(d);
        wgmma_fence();
        for (int s = 0; s < CHANNELS / 16; ++s) {
            Wgmma<OUTPUTS>::ss(
                d, matrix_descriptor(first + 32 * s, 16, start.sbo, SWIZZLE_128, base_offset),
                matrix_descriptor(weights + 32 * s, 16, 1024, SWIZZLE_128), 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
        store_product(d, products + index * PRODUCT);
    }
}

// ------------------------------------------------------------------------------------------------ fragments

template <int N, bool REGISTERS>
__global__ void __launch_bounds__(128) fragment_kernel(const bf16* a, const bf16* b, float* sums) {
    __shared__ alignas(128) bf16 a_shared[2][64][8];
    __shared__ alignas(128) bf16 b_shared[2][N][8];
    for (int i = threadIdx.x; i < 64 * 16; i += 128) {
        a_shared[i % 16 / 8][i / 16][i % 8] = a[i];
    }
    for (int i = threadIdx.x; i < N * 16; i += 128) {
        b_shared[i % 16 / 8][i / 16][i % 8] = b[i];
    }
    fence_async_proxy();
    __syncthreads();
    const uint64_t b_matrix = matrix_descriptor(shared_address(b_shared), N * 16, 128, SWIZZLE_NONE);
    float d[N / 2];
    for (float& sum : d) {
        sum = 0;
    }
    if constexpr (REGISTERS) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
        uint32_t fragment[4];
        for (int i = 0; i < 4; ++i) {
            fragment[i] = *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * 16 + column + i / 2 * 8);
        }
        pin(d);
        wgmma_fence();
        Wgmma<N>::rs(d, fragment, b_matrix, 1);
    } else {
        pin(d);
        wgmma_fence();
        Wgmma<N>::ss(d, matrix_descriptor(shared_address(a_shared), 1024, 128, SWIZZLE_NONE), b_matrix, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    for (int i = 0; i < N / 2; ++i) {
        sums[threadIdx.x * (N / 2) + i] = d[i];
    }
}

struct FragmentCounts {
    int sizes = 0, right[2] = {}, first_wrong_n[2] = {};
};

// Return the number of elements that are not where the documented layout has them.
template <int N, bool REGISTERS>
int misplaced(const std::vector<bf16>& a, const std::vector<bf16>& b) {
    Buffer<bf16> a_device(a), b_device(b);
    Buffer<float> sums(64 * N);
    CHECK(cudaMemset(sums.data, 0xff, sums.size * sizeof(float)));
    fragment_kernel<N, REGISTERS><<<1, 128>>>(a_device.data, b_device.data, sums.data);
    finish("fragment_kernel");
    const std::vector<float> result = sums.host();
    int wrong = 0;
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < N / 2; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8,
                      column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float expected = 0;
            for (int k = 0; k < 16; ++k) {
                expected += value(a[row * 16 + k]) * value(b[column * 16 + k]);
            }
            const float actual = result[thread * (N / 2) + i];
            if (!(actual == expected) && wrong++ == 0) {
                finding(
                    "\"n\": %d, \"a_in_registers\": %s, \"thread\": %d, \"register\": %d, \"expected\": %.0f, \"got\": "
                    "%.9g",
                    N, REGISTERS ? "true" : "false", thread, i, expected, actual);
            }
        }
    }
    return wrong;
}

template <int N>
void fragments_of(FragmentCounts& counts) {
    // Numbered: D = 256 * row + column, so a misplaced element shows its position. Random: all 16 k contribute.
    std::vector<bf16> a(64 * 16, __float2bfloat16(0)), b(N * 16, __float2bfloat16(0));
    for (int row = 0; row < 64; ++row) {
        a[row * 16] = __float2bfloat16(float(row)), a[row * 16 + 1] = __float2bfloat16(1);
    }
    for (int column = 0; column < N; ++column) {
        b[column * 16] = __float2bfloat16(256), b[column * 16 + 1] = __float2bfloat16(float(column));
    }
    const std::vector<bf16> random_a = random_integers(64 * 16, 8, N), random_b = random_integers(N * 16, 8, N + 1000);
    const int wrong[2] = {
        misplaced<N, false>(a, b) + misplaced<N, false>(random_a, random_b),
        misplaced<N, true>(a, b) + misplaced<N, true>(random_a, random_b)};
    ++counts.sizes;
    for (int form = 0; form < 2; ++form) {
        counts.right[form] += wrong[form] == 0;
        if (wrong[form] && !counts.first_wrong_n[form]) {
            counts.first_wrong_n[form] = N;
        }
    }
}

template <int... Index>
void all_fragments(FragmentCounts& counts, std::integer_sequence<int, Index...>) {
    (fragments_of<8 * (Index + 1)>(counts), ...);
}

}  // namespace

namespace {

// Element of a product that differs from the expected one, as JSON.
struct FirstWrong {
    char text[160] = "null";

    void set(int tap, int row, int column, float expected, float actual) {
        snprintf(
            text, sizeof(text), "{\"tap\": %d, \"row\": %d, \"column\": %d, \"expected\": %.0f, \"got\": %.9g}", tap,
            row, column, expected, actual);
    }
};

// Return the number of wrong elements in the product of a tap of `tile`. If `is_first`, `first` receives the first of
// them.
int wrong_elements_of_tap(
    const std::vector<float>& products, const std::vector<bf16>& tile, const std::vector<bf16>& weights, int tap,
    bool is_first, FirstWrong& first) {
    int wrong = 0;
    for (int i = 0; i < PRODUCT; ++i) {
        const int m = i / OUTPUTS, o = i % OUTPUTS;
        const bf16* pixel = &tile[((m / 8 + tap / 3) * HALO + m % 8 + tap % 3) * CHANNELS];
        float expected = 0;
        for (int c = 0; c < CHANNELS; ++c) {
            expected += value(pixel[c]) * value(weights[(tap * OUTPUTS + o) * CHANNELS + c]);
        }
        const float actual = products[tap * PRODUCT + i];
        if (!(actual == expected) && wrong++ == 0 && is_first) {
            first.set(tap, m, o, expected, actual);
        }
    }
    return wrong;
}

// Rules for where in its 128-byte row wgmma reads a 16-byte chunk of A. Each number below is taken modulo 8.
// 0: the chunk of the wanted pixel, wherever TMA has stored it.
// 1: exclusive or of the chunk and the address in units of 128 bytes.
// 2: exclusive or of the chunk and the row of the matrix.
// 3: exclusive or of the chunk and the difference of that address and the base offset field.
constexpr int RULES = 4;

// Return whether a product fits a rule. `shared` is the tile as TMA has stored it.
bool fits_rule(
    int rule, const float* product, const Start& start, unsigned offset, const std::vector<bf16>& tile,
    const bf16* shared, const bf16* weights) {
    const int first_row = start.row + int(offset) / 128, field = start.base_offset ? first_row & 7 : 0;
    for (int i = 0; i < PRODUCT; ++i) {
        const int m = i / OUTPUTS, o = i % OUTPUTS;
        const int row = start.row + m / 8 * (start.sbo / 128) + m % 8, absolute = row + int(offset) / 128;
        const int phases[RULES] = {absolute & 7, absolute & 7, m & 7, (absolute - field) & 7};
        float expected = 0;
        for (int c = 0; c < CHANNELS; ++c) {
            const bf16 x =
                rule == 0 ? tile[row * CHANNELS + c] : shared[row * CHANNELS + (c / 8 ^ phases[rule]) * 8 + c % 8];
            expected += value(x) * value(weights[o * CHANNELS + c]);
        }
        if (!(product[i] == expected)) {
            return false;
        }
    }
    return true;
}

// Report which rules fit the products of the starts with this SBO and base offset.
void report_rules(
    const std::vector<Start>& starts, const std::vector<float>& products, int sbo, int base_offset, unsigned offset,
    const std::vector<bf16>& tile, const bf16* shared, const bf16* weights) {
    int count = 0, fits[RULES] = {};
    char rows[200] = "";
    for (size_t index = 0; index < starts.size(); ++index) {
        const Start& start = starts[index];
        if (start.sbo != sbo || start.base_offset != base_offset) {
            continue;
        }
        ++count;
        for (int rule = 0; rule < RULES; ++rule) {
            const bool fit = fits_rule(rule, &products[index * PRODUCT], start, offset, tile, shared, weights);
            fits[rule] += fit;
            if (fit && rule == 0) {
                const size_t used = strlen(rows);
                snprintf(rows + used, sizeof(rows) - used, "%s%d", used ? ", " : "", start.row);
            }
        }
    }
    finding(
        "\"question\": \"A with 128-byte swizzle at shifted starts\", \"target_offset\": %u, \"sbo\": %d, "
        "\"base_offset_field\": \"%s\", \"starts\": %d, \"right\": %d, \"right_rows\": [%s], "
        "\"fit_xor_by_address\": %d, \"fit_xor_by_row_of_matrix\": %d, \"fit_address_minus_base_offset\": %d",
        offset, sbo, base_offset ? "(start >> 7) & 7" : "0", count, fits[0], rows, fits[1], fits[2], fits[3]);
}

}  // namespace

void probe_planes() {
    prepare_device();
    const std::vector<bf16> image = random_integers(size_t(IMAGES) * IMAGE_H * IMAGE_W * IMAGE_C, 4, 1);
    const std::vector<bf16> weights = random_integers(TAPS * OUTPUTS * CHANNELS, 3, 2);
    Buffer<bf16> image_device(image), weights_device(weights);
    Buffer<float> products(TAPS * PRODUCT);
    CUtensorMap map{};
    const CUresult verdict = encode_planes(&map, image_device.data, IMAGES, IMAGE_H, IMAGE_W, IMAGE_C);
    finding("\"question\": \"is the 5-D map with strides that do not rise accepted\", \"code\": %d", int(verdict));
    const struct {
        bool swapped, tma;
        int y0, x0;
    } cases[] = {
        {false, false, 1, 1}, {false, true, 1, 1}, {false, true, 0, 0}, {false, true, 8, 8}, {true, false, 1, 1}};
    for (const auto& item : cases) {
        if (item.tma && verdict != CUDA_SUCCESS) {
            continue;
        }
        const std::vector<bf16> tile = halo_tile(image, item.y0, item.x0);
        Buffer<bf16> tile_device(tile);
        CHECK(cudaMemset(products.data, 0xff, products.size * sizeof(float)));
        shifted_planes_kernel<<<1, 128>>>(
            map, tile_device.data, weights_device.data, products.data, item.tma, item.swapped, item.y0, item.x0);
        finish("shifted_planes_kernel");
        const std::vector<float> result = products.host();
        int right = 0, wrong_elements = 0;
        FirstWrong first;
        for (int tap = 0; tap < TAPS; ++tap) {
            const int wrong = wrong_elements_of_tap(result, tile, weights, tap, wrong_elements == 0, first);
            right += wrong == 0;
            wrong_elements += wrong;
        }
        finding(
            "\"question\": \"A from planes at shifted starts\", \"fill\": \"%s\", \"leading_offset_is\": \"%s\", "
            "\"corner\": [%d, %d], \"taps_right\": %d, \"of\": %d, \"wrong_elements\": %d, \"first_wrong\": %s",
            item.tma ? "tma" : "st.shared", item.swapped ? "next 8 rows" : "next 8 k", item.y0, item.x0, right, TAPS,
            wrong_elements, first.text);
    }
}

void probe_rows() {
    prepare_device();
    const std::vector<bf16> image = random_integers(size_t(IMAGES) * IMAGE_H * IMAGE_W * IMAGE_C, 4, 3);
    const std::vector<bf16> weights = random_integers(TAPS * OUTPUTS * CHANNELS, 3, 4);
    const bf16* tap_weights = &weights[4 * OUTPUTS * CHANNELS];
    Buffer<bf16> image_device(image), weights_device(weights);
    CUtensorMap map{}, weights_map{};
    const CUresult verdict = encode_rows(&map, image_device.data, IMAGES, IMAGE_H, IMAGE_W, IMAGE_C);
    const CUresult weights_verdict =
        encode_weights(&weights_map, weights_device.data, TAPS, OUTPUTS, CHANNELS, OUTPUTS);
    if (verdict != CUDA_SUCCESS || weights_verdict != CUDA_SUCCESS) {
        finding("\"error\": \"maps refused\", \"code\": %d, \"weights_code\": %d", int(verdict), int(weights_verdict));
        return;
    }
    std::vector<Start> starts;
    for (int base_offset = 0; base_offset < 2; ++base_offset) {
        for (int tap = 0; tap < TAPS; ++tap) {
            starts.push_back({tap / 3 * HALO + tap % 3, HALO * 128, base_offset});
        }
        for (int row = 0; row < 8; ++row) {
            starts.push_back({row, 1024, base_offset});
        }
    }
    Buffer<Start> starts_device(starts);
    Buffer<float> products(starts.size() * PRODUCT);
    Buffer<uint4> dump(TILE_BYTES / 16);
    allow_shared_memory(shifted_rows_kernel, ROWS_SHARED);
    const std::vector<bf16> tile = halo_tile(image, 0, 0);
    for (const unsigned offset : {0u, 512u, 128u}) {
        CHECK(cudaMemset(products.data, 0xff, products.size * sizeof(float)));
        shifted_rows_kernel<<<1, 128, ROWS_SHARED>>>(
            map, weights_map, starts_device.data, int(starts.size()), offset, dump.data, products.data, 0, 0);
        finish("shifted_rows_kernel");
        const std::vector<uint4> shared_image = dump.host();
        const bf16* shared = reinterpret_cast<const bf16*>(shared_image.data());

        // Count the 16-byte chunks that fit each of two rules. A chunk's position in its row is the exclusive or of
        // its number with the address in units of 128 bytes, or with the row of the box.
        int by_address = 0, by_row = 0;
        for (int i = 0; i < HALO * HALO * 8; ++i) {
            const int row = i / 8, chunk = i % 8;
            const bf16* wanted = &tile[row * CHANNELS + chunk * 8];
            const int address_chunk = chunk ^ ((row + offset / 128) & 7), row_chunk = chunk ^ (row & 7);
            by_address += memcmp(wanted, shared + row * CHANNELS + address_chunk * 8, 16) == 0;
            by_row += memcmp(wanted, shared + row * CHANNELS + row_chunk * 8, 16) == 0;
        }
        finding(
            "\"question\": \"swizzle of TMA\", \"target_offset\": %u, \"pieces\": %d, \"fit_xor_by_address\": %d, "
            "\"fit_xor_by_row_of_box\": %d",
            offset, HALO * HALO * 8, by_address, by_row);

        const std::vector<float> result = products.host();
        for (const int sbo : {HALO * 128, 1024}) {
            for (int base_offset = 0; base_offset < 2; ++base_offset) {
                report_rules(starts, result, sbo, base_offset, offset, tile, shared, tap_weights);
            }
        }
    }
}

void probe_fragments() {
    prepare_device();
    FragmentCounts counts;
    all_fragments(counts, std::make_integer_sequence<int, 32>());
    for (int form = 0; form < 2; ++form) {
        finding(
            "\"question\": \"fragment maps of m64nNk16, N = 8..256\", \"a\": \"%s\", \"sizes_right\": %d, \"of\": %d, "
            "\"first_wrong_n\": %d",
            form ? "registers" : "shared memory", counts.right[form], counts.sizes, counts.first_wrong_n[form]);
    }
}
