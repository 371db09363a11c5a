// SPDX-License-Identifier: Apache-2.0
//
// Product of two tiles in shared memory by a block of 4 * kRows threads, for the implicit GEMMs:
//
//   sums (kRows x kColumns) += left (kRows x kDepth) * right (kDepth x kColumns)
//
// A tile is stored by rows or by depth. By rows, the left tile is (row, depth) and the right tile is (column, depth).
// By depth, they are (depth, row) and (depth, column). The values of a tile have been converted by prepared(). kDepth
// is 64 bytes. A thread loads one 16-byte item of the left tile and kColumns / kRows of the right. Rows are padded
// against bank conflicts by 16 bytes; for tensor cores, if stored by depth, by eight elements.
//
//   16-bit types         mma.sync m16n8k16, float32 sums; kRows / 32 x 4 warps of 32 rows x kColumns / 4 columns each
//   float32 by TF32      the same by m16n8k8, once or (Tf32x3) three times
//   float32, float64     fused multiply-adds; kRows / 4 x 16 threads of 4 rows x kColumns / 16 columns each
#pragma once

#include "cuda/tensor_core.cuh"

namespace spatialflow {

constexpr int kProductThreads = 256;
constexpr int kProductRows = 64;

template <typename operand_t, int kColumns, bool kLeftByDepth, bool kRightByDepth, int kRows>
struct TileLayout {
    static constexpr int kItem = kVectorElements<element_t<operand_t>>;
    static constexpr int kDepth = 4 * kItem;
    static constexpr int kDepthRowPadding = kIsSimt<operand_t> ? kItem : 8;
    static constexpr int kLeftRow = kLeftByDepth ? kRows + kDepthRowPadding : kDepth + kItem;
    static constexpr int kLeftSize = (kLeftByDepth ? kDepth : kRows) * kLeftRow;
    static constexpr int kRightRow = kRightByDepth ? kColumns + kDepthRowPadding : kDepth + kItem;
    static constexpr int kRightSize = (kRightByDepth ? kDepth : kColumns) * kRightRow;
    static constexpr int kTilesSize = kLeftSize + kRightSize;
};

// Product by fused multiply-adds.
template <
    typename scalar_t, int kColumns, bool kLeftByDepth, bool kRightByDepth, int kRows = kProductRows,
    bool kSimt = kIsSimt<scalar_t>>
class TileProduct : public TileLayout<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows> {
    using Layout = TileLayout<scalar_t, kColumns, kLeftByDepth, kRightByDepth, kRows>;
    static constexpr int kThreadRows = 4, kThreadColumns = kColumns / 16;
    static constexpr int kPart = Layout::kItem < 4 ? Layout::kItem : 4;  // adjacent elements of a thread

public:
    static constexpr int kVisitColumns = kRightByDepth ? kPart : 1;  // adjacent columns of one call of `visit`

    __device__ __forceinline__ void accumulate(Shared<scalar_t> left, Shared<scalar_t> right) {
#pragma unroll
        for (int k = 0; k < Layout::kDepth; k += Layout::kItem) {
            scalar_t a[kThreadRows][Layout::kItem], b[kThreadColumns][Layout::kItem];
            load_side<kThreadRows, kLeftByDepth>(left, Layout::kLeftRow, k, [](int i) { return row(i); }, a);
            load_side<kThreadColumns, kRightByDepth>(right, Layout::kRightRow, k, [](int j) { return column(j); }, b);
#pragma unroll
            for (int step = 0; step < Layout::kItem; ++step) {
#pragma unroll
                for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
                    for (int j = 0; j < kThreadColumns; ++j) {
                        sums_[i][j] += a[i][step] * b[j][step];
                    }
                }
            }
        }
    }

    // Call visit(of_row, of_column, column, sums) for all sums of this thread. A call has the sums of one row and of
    // kVisitColumns adjacent columns from `column` on. Its first two arguments are the results of begin_row(row) and
    // begin_column(column).
    template <typename BeginRow, typename BeginColumn, typename Visit>
    __device__ __forceinline__ void for_each(BeginRow begin_row, BeginColumn begin_column, Visit visit) const {
        decltype(begin_column(0)) of_columns[kThreadColumns / kVisitColumns];
#pragma unroll
        for (int j = 0; j < kThreadColumns; j += kVisitColumns) {
            of_columns[j / kVisitColumns] = begin_column(column(j));
        }
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
            const auto of_row = begin_row(row(i));
#pragma unroll
            for (int j = 0; j < kThreadColumns; j += kVisitColumns) {
                Vec<scalar_t, kVisitColumns> values;
#pragma unroll
                for (int v = 0; v < kVisitColumns; ++v) {
                    values[v] = sums_[i][j + v];
                }
                visit(of_row, of_columns[j / kVisitColumns], column(j), values);
            }
        }
    }

    template <typename Visit>
    __device__ __forceinline__ void for_each(Visit visit) const {
        for_each(
            [](int row) { return row; }, [](int) { return 0; },
            [&](int row, int, int column, const Vec<scalar_t, kVisitColumns>& sums) { visit(row, column, sums); });
    }

    // Same interface as the tensor-core version, for a single part.
    template <int kPartIndex, int kParts, typename Visit>
    __device__ __forceinline__ void for_each_of_part(Visit visit) const {
        static_assert(kParts == 1, "a product in one part");
        for_each(visit);
    }
    template <int kPartIndex, int kParts>
    __device__ static __forceinline__ int column_of_part(int column) {
        return column;
    }

private:
    __device__ static __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 16 * kThreadRows + i; }
    // Column j of this thread. If the right tile is stored by depth, a thread has groups of kPart adjacent columns.
    // Otherwise its columns are 16 apart, against bank conflicts.
    __device__ static __forceinline__ int column(int j) {
        const int thread = static_cast<int>(threadIdx.x) % 16;
        return kRightByDepth ? j / kPart * 16 * kPart + thread * kPart + j % kPart : thread + 16 * j;
    }

    // Load Layout::kItem steps of depth of this thread's rows or columns, by 16-byte loads.
    template <int kCount, bool kByDepth, typename Position>
    __device__ static __forceinline__ void load_side(
        Shared<scalar_t> tile, int tile_row, int k, Position position, scalar_t (&values)[kCount][Layout::kItem]) {
        if constexpr (kByDepth) {
#pragma unroll
            for (int step = 0; step < Layout::kItem; ++step) {
#pragma unroll
                for (int i = 0; i < kCount; i += kPart) {
                    const auto vector = load_vector<kPart>(tile + ((k + step) * tile_row + position(i)));
#pragma unroll
                    for (int v = 0; v < kPart; ++v) {
                        values[i + v][step] = vector[v];
                    }
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const auto vector = load_vector<Layout::kItem>(tile + (position(i) * tile_row + k));
#pragma unroll
                for (int step = 0; step < Layout::kItem; ++step) {
                    values[i][step] = vector[step];
                }
            }
        }
    }

    scalar_t sums_[kThreadRows][kThreadColumns] = {};
};

// Product on the tensor cores.
template <typename operand_t, int kColumns, bool kLeftByDepth, bool kRightByDepth, int kRows>
class TileProduct<operand_t, kColumns, kLeftByDepth, kRightByDepth, kRows, false>
    : public TileLayout<operand_t, kColumns, kLeftByDepth, kRightByDepth, kRows> {
    using Layout = TileLayout<operand_t, kColumns, kLeftByDepth, kRightByDepth, kRows>;
    using scalar_t = element_t<operand_t>;
    static constexpr int kWarpColumns = kColumns / 4;
    // ldmatrix does not transpose 32-bit numbers. If the tile is stored by depth, a lane loads pairs of adjacent
    // elements. A pair is used as rows g and g + 8 of one product, or as column g of two products (g = lane / 4).
    static constexpr bool kPairedRows = sizeof(scalar_t) == 4 && kLeftByDepth;
    static constexpr bool kPairedColumns = sizeof(scalar_t) == 4 && kRightByDepth;

public:
    static constexpr int kVisitColumns = kPairedColumns ? 4 : 2;

    // For Tf32x3, which needs more registers, the loop is not unrolled.
    __device__ __forceinline__ void accumulate(Shared<scalar_t> left, Shared<scalar_t> right) {
#pragma unroll(std::is_same_v<operand_t, Tf32x3> ? 1 : 2)
        for (int k = 0; k < Layout::kDepth; k += 2 * Layout::kItem) {
            Fragment<operand_t, 4> a[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_left(left, k, warp_row() + i * 16, a[i]);
            }
#pragma unroll
            for (int j = 0; j < kWarpColumns; j += 16) {
                Fragment<operand_t, 2> b[2];
                load_right(right, k, warp_column() + j, b);
#pragma unroll
                for (int product = 0; product < 4; ++product) {
                    const int half = product / 2, i = product % 2;
                    multiply_add(sums_[i][j / 8 + half], a[i], b[half]);
                }
            }
        }
    }

    template <typename BeginRow, typename BeginColumn, typename Visit>
    __device__ __forceinline__ void for_each(BeginRow begin_row, BeginColumn begin_column, Visit visit) const {
        decltype(begin_column(0)) of_columns[kVisits];
#pragma unroll
        for (int j = 0; j < kVisits; ++j) {
            of_columns[j] = begin_column(warp_column() + column(j));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto of_row = begin_row(row(i));
#pragma unroll
            for (int j = 0; j < kVisits; ++j) {
                visit(of_row, of_columns[j], warp_column() + column(j), sums_of(i, j));
            }
        }
    }

    template <typename Visit>
    __device__ __forceinline__ void for_each(Visit visit) const {
        for_each(
            [](int row) { return row; }, [](int) { return 0; },
            [&](int row, int, int column, const Vec<float, kVisitColumns>& sums) { visit(row, column, sums); });
    }

    // Call visit(row, column, sums) for part kPartIndex of kParts. A part has 1 / kParts of the columns of every warp.
    // Columns are numbered within the part.
    template <int kPartIndex, int kParts, typename Visit>
    __device__ __forceinline__ void for_each_of_part(Visit visit) const {
        constexpr int kPartVisits = kVisits / kParts;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < kPartVisits; ++j) {
                visit(row(i), warp_column() / kParts + column(j), sums_of(i, kPartIndex * kPartVisits + j));
            }
        }
    }

    // Index of a column of a part among all columns.
    template <int kPartIndex, int kParts>
    __device__ static __forceinline__ int column_of_part(int column) {
        constexpr int kAdjacent = kWarpColumns / kParts;
        return column / kAdjacent * kWarpColumns + kPartIndex * kAdjacent + column % kAdjacent;
    }

private:
    static constexpr int kVisits = kWarpColumns / (4 * kVisitColumns);

    __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
    __device__ static __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / kWarpSize / 4 * 32; }
    __device__ static __forceinline__ int warp_column() {
        return static_cast<int>(threadIdx.x) / kWarpSize % 4 * kWarpColumns;
    }
    // Row i of the four rows of this lane's sums.
    __device__ static __forceinline__ int row(int i) {
        return warp_row() + (kPairedRows ? i / 2 * 16 + lane() / 4 * 2 + i % 2 : i * 8 + lane() / 4);
    }
    // Column j in the warp: the first of kVisitColumns adjacent columns.
    __device__ static __forceinline__ int column(int j) { return (j * 4 + lane() % 4) * kVisitColumns; }
    __device__ __forceinline__ Vec<float, kVisitColumns> sums_of(int i, int j) const {
        constexpr int kProducts = kVisitColumns / 2;  // products whose columns alternate in `values`
        Vec<float, kVisitColumns> values;
#pragma unroll
        for (int v = 0; v < kVisitColumns; ++v) {
            values[v] = sums_[i / 2][j * kProducts + v % kProducts][i % 2 * 2 + v / kProducts];
        }
        return values;
    }

    // Load the lane's part of 16 rows. ldmatrix loads four matrices, whose row addresses are in lanes 0-7, 8-15, 16-23
    // and 24-31.
    __device__ static __forceinline__ void load_left(
        Shared<scalar_t> tile, int k, int first, Fragment<operand_t, 4>& fragment) {
        unsigned words[4];
        if constexpr (kPairedRows) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const Vec<unsigned, 2> pair = load_vector<2>(pointer_cast<const unsigned>(
                    tile + ((k + e * 2 + lane() % 4) * Layout::kLeftRow + first + lane() / 4 * 2)));
                words[e] = pair[0];
                words[e + 1] = pair[1];
            }
        } else if constexpr (kLeftByDepth) {
            ldmatrix_x4_trans(
                words, tile + ((k + lane() % 8 + lane() / 16 * 8) * Layout::kLeftRow + first + lane() / 8 % 2 * 8));
        } else {
            ldmatrix_x4(words, tile + ((first + lane() % 16) * Layout::kLeftRow + k + lane() / 16 * Layout::kItem));
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            fragment.set(e, words[e]);
        }
    }

    // Load the lane's part of 16 columns, the right operands of two products.
    __device__ static __forceinline__ void load_right(
        Shared<scalar_t> tile, int k, int first, Fragment<operand_t, 2> (&fragments)[2]) {
        unsigned words[4];  // two of the first product, then two of the second
        if constexpr (kPairedColumns) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const Vec<unsigned, 2> pair = load_vector<2>(pointer_cast<const unsigned>(
                    tile + ((k + e * 4 + lane() % 4) * Layout::kRightRow + first + lane() / 4 * 2)));
                words[e] = pair[0];
                words[e + 2] = pair[1];
            }
        } else if constexpr (kRightByDepth) {
            ldmatrix_x4_trans(words, tile + ((k + lane() % 16) * Layout::kRightRow + first + lane() / 16 * 8));
        } else {
            ldmatrix_x4(
                words, tile + ((first + lane() % 8 + lane() / 16 * 8) * Layout::kRightRow + k +
                               lane() / 8 % 2 * Layout::kItem));
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            fragments[e / 2].set(e % 2, words[e]);
        }
    }

    float sums_[2][kWarpColumns / 8][4] = {};
};

// Sum over `depth` in steps of kStep, with double buffering. begin(k, buffer) starts the loads of the step at k, by
// cp.async or into registers. finish(buffer) stores the registers to shared memory, and applies prepared() to copied
// items. multiply(buffer) uses the tiles. The function ends with a barrier after the last use of the buffers.
template <int kStep, typename Begin, typename Multiply, typename Finish>
__device__ __forceinline__ void run_steps(int depth, Begin begin, Multiply multiply, Finish finish) {
    begin(0, 0);
    cp_async_commit();
    finish(0);
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

// Call load(row, element, target) for every 16-byte item of kRows rows of kRowItems items, distributed over the block.
// `element` is the item's first element in its row, `target` its address in the tile.
template <int kRows, int kRowItems, int kThreads = kProductThreads, typename scalar_t, typename Load>
__device__ __forceinline__ void load_items(Shared<scalar_t> tile, int tile_row, Load load) {
    constexpr int kItem = kVectorElements<scalar_t>, kStepRows = kThreads / kRowItems;
    static_assert(
        kThreads % kRowItems == 0 && kRows % kStepRows == 0,
        "all threads load the same number of items, each in one column");
    const int thread = static_cast<int>(threadIdx.x), row = thread / kRowItems, element = thread % kRowItems * kItem;
    const Shared<scalar_t> target = tile + (row * tile_row + element);
#pragma unroll
    for (int i = 0; i < kRows; i += kStepRows) {
        load(row + i, element, target + i * tile_row);
    }
}

// Apply prepared() to the items that this thread has copied by load_items and cp.async. Only Tf32 needs it; for other
// types the function does nothing. For Tf32 it waits for the copies, which must be committed.
template <typename operand_t, int kRows, int kRowItems, int kThreads = kProductThreads>
__device__ __forceinline__ void prepare_items(Shared<element_t<operand_t>> tile, int tile_row) {
    if constexpr (std::is_same_v<operand_t, Tf32>) {
        cp_async_wait<0>();
        load_items<kRows, kRowItems, kThreads>(tile, tile_row, [](int, int, Shared<float> target) {
            store_vector(target, prepared(load_vector<4>(target), operand_t{}));
        });
    }
}

}  // namespace spatialflow
