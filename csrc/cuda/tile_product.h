// SPDX-License-Identifier: Apache-2.0
//
// The product of two tiles in shared memory, by a block of 4 * kRows threads: what every implicit GEMM has inside.
//
//   sums (kRows x kColumns) += left (kRows x kDepth) * right (kDepth x kColumns)
//
// A tile lies in memory as its loader finds it: by rows, (row, depth) on the left and (column, depth) on the right, or
// by depth, (depth, row) and (depth, column). Rows of memory are 16 bytes longer than their values, so that neighbours
// lie in other banks. kDepth is 64 bytes: a thread loads one 16-byte item of the left tile and kColumns / kRows of the
// right.
//
//   16-bit types   mma.sync with float32 sums; kRows / 32 x 4 warps own 32 rows x kColumns / 4 columns each
//   float32, 64    fused multiply-adds; kRows / 4 x 16 threads own 4 rows x kColumns / 16 columns each
#pragma once

#include "cuda/tensor_core.h"

namespace spatialflow {

constexpr int kProductThreads = 256;
constexpr int kProductRows = 64;

template <typename scalar_t, int kColumns, bool kLeftByDepth, bool kRightByDepth, int kRows>
struct TileLayout {
    static constexpr int kItem = kWideElements<scalar_t>;
    static constexpr int kDepth = 4 * kItem;
    static constexpr int kLeftRow = (kLeftByDepth ? kRows : kDepth) + kItem;
    static constexpr int kLeftSize = (kLeftByDepth ? kDepth : kRows) * kLeftRow;
    static constexpr int kRightRow = (kRightByDepth ? kColumns : kDepth) + kItem;
    static constexpr int kRightSize = (kRightByDepth ? kDepth : kColumns) * kRightRow;
    static constexpr int kTilesSize = kLeftSize + kRightSize;
};

// By fused multiply-adds.
template <
    typename scalar_t, int kColumns, bool kLeftByDepth, bool kRightByDepth, int kRows = kProductRows,
    bool kTensorCore = sizeof(scalar_t) == 2>
class TileProduct : public TileLayout<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows> {
    using Layout = TileLayout<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows>;
    static constexpr int kOwnRows = 4, kOwnColumns = kColumns / 16;
    static constexpr int kPart = Layout::kItem < 4 ? Layout::kItem : 4;  // neighbours that a thread owns

public:
    static constexpr int kVisited = kRightByDepth ? kPart : 1;  // adjacent columns given to one call of `visit`

    __device__ __forceinline__ void accumulate(Shared<scalar_t> left, Shared<scalar_t> right) {
#pragma unroll
        for (int k = 0; k < Layout::kDepth; k += Layout::kItem) {
            scalar_t a[kOwnRows][Layout::kItem], b[kOwnColumns][Layout::kItem];
            load_side<kOwnRows, kLeftByDepth>(left, Layout::kLeftRow, k, [](int i) { return row(i); }, a);
            load_side<kOwnColumns, kRightByDepth>(right, Layout::kRightRow, k, [](int j) { return column(j); }, b);
#pragma unroll
            for (int step = 0; step < Layout::kItem; ++step) {
#pragma unroll
                for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
                    for (int j = 0; j < kOwnColumns; ++j) {
                        sums_[i][j] += a[i][step] * b[j][step];
                    }
                }
            }
        }
    }

    // visit(of_row, of_column, column, sums) for all that this thread owns, kVisited columns from `column` on, with the
    // results of begin_row(row) and begin_column(column).
    template <typename BeginRow, typename BeginColumn, typename Visit>
    __device__ __forceinline__ void for_each(BeginRow begin_row, BeginColumn begin_column, Visit visit) const {
        decltype(begin_column(0)) of_columns[kOwnColumns / kVisited];
#pragma unroll
        for (int j = 0; j < kOwnColumns; j += kVisited) {
            of_columns[j / kVisited] = begin_column(column(j));
        }
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            const auto of_row = begin_row(row(i));
#pragma unroll
            for (int j = 0; j < kOwnColumns; j += kVisited) {
                Vec<scalar_t, kVisited> values;
#pragma unroll
                for (int v = 0; v < kVisited; ++v) {
                    values[v] = sums_[i][j + v];
                }
                visit(of_row, of_columns[j / kVisited], column(j), values);
            }
        }
    }

    template <typename Visit>
    __device__ __forceinline__ void for_each(Visit visit) const {
        for_each(
            [](int row) { return row; }, [](int) { return 0; },
            [&](int row, int, int column, const Vec<scalar_t, kVisited>& sums) { visit(row, column, sums); });
    }

    // As on the tensor cores, for one part.
    template <int kPart, int kParts, typename Visit>
    __device__ __forceinline__ void for_each_of_part(Visit visit) const {
        static_assert(kParts == 1, "a product in one part");
        for_each(visit);
    }
    template <int kPart, int kParts>
    __device__ static __forceinline__ int column_of_part(int column) {
        return column;
    }

private:
    __device__ static __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 16 * kOwnRows + i; }
    // Neighbours where a row of memory is a run of columns, else a stride that leaves the banks to all threads.
    __device__ static __forceinline__ int column(int j) {
        const int thread = static_cast<int>(threadIdx.x) % 16;
        return kRightByDepth ? j / kPart * 16 * kPart + thread * kPart + j % kPart : thread + 16 * j;
    }

    // Layout::kItem steps of depth of the rows or columns that this thread owns, by 16-byte loads.
    template <int kCount, bool kByDepth, typename Position>
    __device__ static __forceinline__ void load_side(
        Shared<scalar_t> tile, int tile_row, int k, Position position, scalar_t (&values)[kCount][Layout::kItem]) {
        if constexpr (kByDepth) {
#pragma unroll
            for (int step = 0; step < Layout::kItem; ++step) {
#pragma unroll
                for (int i = 0; i < kCount; i += kPart) {
                    const auto some = load_vector<kPart>(tile + ((k + step) * tile_row + position(i)));
#pragma unroll
                    for (int v = 0; v < kPart; ++v) {
                        values[i + v][step] = some[v];
                    }
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const auto some = load_vector<Layout::kItem>(tile + (position(i) * tile_row + k));
#pragma unroll
                for (int step = 0; step < Layout::kItem; ++step) {
                    values[i][step] = some[step];
                }
            }
        }
    }

    scalar_t sums_[kOwnRows][kOwnColumns] = {};
};

// On the tensor cores.
template <typename scalar_t, int kColumns, bool kLeftByDepth, bool kRightByDepth, int kRows>
class TileProduct<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows, true>
    : public TileLayout<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows> {
    using Layout = TileLayout<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows>;
    static constexpr int kWarpColumns = kColumns / 4;

public:
    static constexpr int kVisited = 2;

    __device__ __forceinline__ void accumulate(Shared<scalar_t> left, Shared<scalar_t> right) {
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        // ldmatrix takes four 8 x 8 matrices, whose rows in memory come from lanes 0-7, 8-15, 16-23 and 24-31.
        const int low = lane % 8 + lane / 16 * 8, high = lane / 8 % 2 * 8;
        const int direct = lane % 16, beside = lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < Layout::kDepth; k += 16) {
            unsigned a[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int first = warp_row() + i * 16;
                if constexpr (kLeftByDepth) {
                    ldmatrix_x4_trans(a[i], left + ((k + low) * Layout::kLeftRow + first + high));
                } else {
                    ldmatrix_x4(a[i], left + ((first + direct) * Layout::kLeftRow + k + beside));
                }
            }
#pragma unroll
            for (int j = 0; j < kWarpColumns; j += 16) {
                unsigned b[4];
                const int first = warp_column() + j;
                if constexpr (kRightByDepth) {
                    ldmatrix_x4_trans(b, right + ((k + direct) * Layout::kRightRow + first + beside));
                } else {
                    ldmatrix_x4(b, right + ((first + low) * Layout::kRightRow + k + high));
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const unsigned column[2] = {b[half * 2], b[half * 2 + 1]};
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        mma_16816(sums_[i][j / 8 + half], a[i], column, scalar_t{});
                    }
                }
            }
        }
    }

    template <typename BeginRow, typename BeginColumn, typename Visit>
    __device__ __forceinline__ void for_each(BeginRow begin_row, BeginColumn begin_column, Visit visit) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        const int first_row = warp_row() + lane / 4, first_column = warp_column() + lane % 4 * 2;
        decltype(begin_column(0)) of_columns[kWarpColumns / 8];
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) {
            of_columns[j] = begin_column(first_column + j * 8);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto of_row = begin_row(first_row + i * 8);
#pragma unroll
            for (int j = 0; j < kWarpColumns / 8; ++j) {
                const Vec<float, 2> values = {{sums_[i / 2][j][i % 2 * 2], sums_[i / 2][j][i % 2 * 2 + 1]}};
                visit(of_row, of_columns[j], first_column + j * 8, values);
            }
        }
    }

    template <typename Visit>
    __device__ __forceinline__ void for_each(Visit visit) const {
        for_each(
            [](int row) { return row; }, [](int) { return 0; },
            [&](int row, int, int column, const Vec<float, 2>& sums) { visit(row, column, sums); });
    }

    // The columns in kParts parts: visit(row, column, sums) for a part, its columns counted without those of others.
    template <int kPart, int kParts, typename Visit>
    __device__ __forceinline__ void for_each_of_part(Visit visit) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        constexpr int kVisits = kWarpColumns / 8 / kParts;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < kVisits; ++j) {
                const float(&sums)[4] = sums_[i / 2][kPart * kVisits + j];
                const Vec<float, 2> values = {{sums[i % 2 * 2], sums[i % 2 * 2 + 1]}};
                visit(warp_row() + i * 8 + lane / 4, warp_column() / kParts + j * 8 + lane % 4 * 2, values);
            }
        }
    }

    // Where a column of a part is among all.
    template <int kPart, int kParts>
    __device__ static __forceinline__ int column_of_part(int column) {
        constexpr int kAdjacent = kWarpColumns / kParts;
        return column / kAdjacent * kWarpColumns + kPart * kAdjacent + column % kAdjacent;
    }

private:
    __device__ static __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / kWarpSize / 4 * 32; }
    __device__ static __forceinline__ int warp_column() {
        return static_cast<int>(threadIdx.x) / kWarpSize % 4 * kWarpColumns;
    }

    float sums_[2][kWarpColumns / 8][4] = {};
};

// Sums over `depth` in steps of kStep with two buffers a side. begin(k, buffer) starts the loads of the step at k, by
// cp.async or into registers; finish(buffer) puts what is in registers into shared memory; multiply(buffer) uses loaded
// tiles. Ends with a barrier after the last use of the buffers.
template <int kStep, typename Begin, typename Multiply, typename Finish>
__device__ __forceinline__ void run_steps(int depth, Begin begin, Multiply multiply, Finish finish) {
    begin(0, 0);
    finish(0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    int buffer = 0;
    for (int k = 0; k < depth; k += kStep) {
        const bool more = k + kStep < depth;
        if (more) {
            begin(k + kStep, buffer ^ 1);
            cp_async_commit();
        }
        multiply(buffer);
        if (more) {
            finish(buffer ^ 1);
        }
        cp_async_wait<0>();
        __syncthreads();
        buffer ^= 1;
    }
}

// Calls load(row, item, target) for every 16-byte item of kRows rows of kRowItems items, spread over the block.
template <int kRows, int kRowItems, int kThreads = kProductThreads, typename scalar_t, typename Load>
__device__ __forceinline__ void load_items(Shared<scalar_t> tile, int tile_row, Load load) {
    constexpr int kItem = kWideElements<scalar_t>, kStepRows = kThreads / kRowItems;
    static_assert(kThreads % kRowItems == 0 && kRows % kStepRows == 0, "every thread loads as many items of a column");
    const int thread = static_cast<int>(threadIdx.x), row = thread / kRowItems, element = thread % kRowItems * kItem;
    const Shared<scalar_t> target = tile + (row * tile_row + element);
#pragma unroll
    for (int i = 0; i < kRows; i += kStepRows) {
        load(row + i, element, target + i * tile_row);
    }
}

}  // namespace spatialflow
