// SPDX-License-Identifier: Apache-2.0
//
// Matrix product C (m x n) = A (m x k) * B (k x n) on one thread, for kernels that compute A (convolutions).
//
//   packed = gemm_pack(B)          once; its length is gemm_packed_size
//   gemm(m, n, k, A, packed, C)    A and C row-major with any row stride; kTransposed: A stored (k x m)
//
// B is packed into panels of kColumns adjacent columns, so that each step over k reads whole vectors in order. A tile
// of kRows x kColumns of C stays in registers during the loop over k. Each value of A is broadcast; each vector of B is
// used kRows times. A tile has at most kGemmRows rows, which fill the registers of AVX2 and AVX-512. The rows of C are
// split into tiles of nearly equal size (for_row_blocks). Kernels with another epilogue or with A in parts (one per tap
// of a convolution) use `multiply_tile`. Sums in `real_t` (float or double) run over k in ascending order, in blocks of
// kGemmDepth whose sums are added to C. Results do not depend on the number of threads or on m and n.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace spatialflow {

// Registers of a tile: kGemmRows * kGemmVectors sums, kGemmVectors vectors of B, and a broadcast value of A unless it
// is a memory operand.
#if defined(__AVX512F__)
constexpr int kGemmRows = 14;
#elif defined(__AVX2__)
constexpr int kGemmRows = 6;
#else
constexpr int kGemmRows = 4;
#endif
constexpr int kGemmVectors = 2;
template <typename real_t>
constexpr int kGemmColumns = kGemmVectors * kLanes<real_t>;

// Multiple to which the columns of packed matrices are padded, on every instruction set and for every type. So the
// length of a packed matrix depends only on its shape.
constexpr int64_t kGemmColumnPadding = 32;

// Number of steps over k before the tile is stored to C. A panel of this depth (at most 32 KiB) stays in the L1 cache
// for all rows.
constexpr int64_t kGemmDepth = 256;

inline int64_t gemm_padded_columns(int64_t n) {
    return (n + kGemmColumnPadding - 1) / kGemmColumnPadding * kGemmColumnPadding;
}

inline int64_t gemm_packed_size(int64_t k, int64_t n) { return k * gemm_padded_columns(n); }

// Pack B as packed[panel][i][kColumns], where panel p starts at column p * kColumns. Element (i, j) is read at
// b[i * row_stride + j * column_stride] and converted; padding becomes zero.
template <typename real_t, typename source_t>
void gemm_pack(
    const source_t* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n,
    real_t* packed) {  // gemm_packed_size(k, n)
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    for (int64_t first = 0; first < gemm_padded_columns(n); first += kColumns) {
        const int64_t valid = std::max<int64_t>(0, std::min(kColumns, n - first));
        for (int64_t i = 0; i < k; ++i, packed += kColumns) {
            const source_t* row = b + i * row_stride + first * column_stride;
            for (int64_t j = 0; j < valid; ++j) {
                packed[j] = static_cast<real_t>(load(row[j * column_stride]));
            }
            std::fill(packed + valid, packed + kColumns, real_t(0));
        }
    }
}

template <int kRows, typename real_t>
using GemmTile = Vector<real_t>[kRows][kGemmVectors];

// tile[kFirst + r][:] += sum over i < k of A(r, i) * panel[i][:] for r < kCount. A(r, i) is a[r * stride + i], or
// a[i * stride + r] if kTransposed.
template <int kRows, bool kTransposed, int kFirst = 0, int kCount = kRows - kFirst, typename real_t>
__attribute__((always_inline)) inline void multiply_tile(
    const real_t* a, int64_t stride,
    const real_t* panel,  // (k, kColumns)
    int64_t k, GemmTile<kRows, real_t>& tile) {
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    // Row addresses are base + {0, 1, 2} * stride: five bases and one stride fit into the general registers, 14
    // addresses do not.
    constexpr int kGroups = (kCount + 2) / 3;
    const real_t* base[kGroups];
    for (int g = 0; g < kGroups; ++g) {
        base[g] = a + (kTransposed ? 0 : 3 * g * stride);
    }
    for (int64_t i = 0; i < k; ++i, panel += kColumns) {
        Vector<real_t> b[kGemmVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kGemmVectors; ++v) {
            b[v] = load_vector(panel + v * kLanes<real_t>);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kCount; ++r) {
            const Vector<real_t> value = broadcast(kTransposed ? base[0][r] : base[r / 3][r % 3 * stride]);
#pragma GCC unroll 4
            for (int v = 0; v < kGemmVectors; ++v) {
                tile[kFirst + r][v] += value * b[v];
            }
        }
        if (kTransposed) {
            base[0] += stride;
        } else {
#pragma GCC unroll 8
            for (int g = 0; g < kGroups; ++g) {
                ++base[g];
            }
        }
    }
}

// Call body(std::integral_constant<int, rows>{}) for 1 <= rows <= kMax: a tile's row count as a compile-time value.
template <int kMax = kGemmRows, typename Body>
__attribute__((always_inline)) inline void with_rows(int64_t rows, const Body& body) {
    if constexpr (kMax > 1) {
        if (rows < kMax) {
            return with_rows<kMax - 1>(rows, body);
        }
    }
    body(std::integral_constant<int, kMax>{});
}

// Call body(first, count) for row blocks of at most kGemmRows rows. Their sizes differ by at most one, so the last
// block is not small.
template <typename Body>
__attribute__((always_inline)) inline void for_row_blocks(int64_t m, const Body& body) {
    const int64_t blocks = (m + kGemmRows - 1) / kGemmRows;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * m / blocks;
        body(first, (block + 1) * m / blocks - first);
    }
}

// Store the first `columns` columns of a tile to `target` (kRows, row stride `stride`), or add them to it if
// `accumulate`.
template <int kRows, typename real_t>
__attribute__((always_inline)) inline void store_tile(
    const GemmTile<kRows, real_t>& tile, real_t* target, int64_t stride, int64_t columns, bool accumulate) {
    constexpr int64_t lanes = kLanes<real_t>;
    for (int r = 0; r < kRows; ++r, target += stride) {
        for (int v = 0; v < kGemmVectors; ++v) {
            real_t* out = target + v * lanes;
            const int64_t count = std::min(lanes, columns - v * lanes);
            if (count == lanes) {
                store_vector(out, accumulate ? load_vector(out) + tile[r][v] : tile[r][v]);
            } else if (count > 0) {
                const int part = static_cast<int>(count);
                store_partial(out, accumulate ? load_partial(out, part) + tile[r][v] : tile[r][v], part);
            }
        }
    }
}

// Compute one tile of C from `depth` steps over k.
template <int kRows, bool kTransposed, typename real_t>
__attribute__((always_inline)) inline void gemm_tile(
    const real_t* a, int64_t a_stride, const real_t* panel, int64_t depth, real_t* c, int64_t c_stride, int64_t columns,
    bool accumulate) {
    GemmTile<kRows, real_t> tile = {};
    multiply_tile<kRows, kTransposed>(a, a_stride, panel, depth, tile);
    store_tile<kRows>(tile, c, c_stride, columns, accumulate);
}

// C = A * B, or C += A * B if `accumulate`.
template <bool kTransposed = false, typename real_t>
void gemm(
    int64_t m, int64_t n, int64_t k, const real_t* a,
    int64_t a_stride,             // (m, k), row stride a_stride; transposed (k, m)
    const real_t* packed_b,       // gemm_pack of (k, n)
    real_t* c, int64_t c_stride,  // (m, n), row stride c_stride
    bool accumulate = false) {
    constexpr int64_t kColumns = kGemmColumns<real_t>;
    for (int64_t k_begin = 0; k_begin < std::max<int64_t>(k, 1); k_begin += kGemmDepth) {
        const int64_t depth = std::min(kGemmDepth, k - k_begin);
        const bool add = accumulate || k_begin > 0;
        const real_t* a_block = a + k_begin * (kTransposed ? a_stride : 1);
        for (int64_t first = 0; first < n; first += kColumns) {
            const real_t* panel = packed_b + first * k + k_begin * kColumns;
            const int64_t valid = std::min(kColumns, n - first);
            for_row_blocks(m, [&](int64_t row, int64_t rows) {
                with_rows(rows, [&](auto count) {
                    gemm_tile<decltype(count)::value, kTransposed>(
                        a_block + row * (kTransposed ? 1 : a_stride), a_stride, panel, depth,
                        c + row * c_stride + first, c_stride, valid, add);
                });
            });
        }
    }
}

}  // namespace spatialflow
