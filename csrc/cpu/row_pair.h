// SPDX-License-Identifier: Apache-2.0
//
// Cache of two adjacent rows, for interpolation between rows y and y + 1 of a map in ascending order of y.
#pragma once

#include <cstdint>

namespace spatialflow {

template <typename value_t>
class RowPair {
public:
    // `memory` has space for two rows of `row_size` values. Row y is at y % 2.
    RowPair(value_t* memory, int64_t row_size) : memory_(memory), row_size_(row_size) {}

    // Return row `y`. Call compute(y, row) to write it, unless it is in the cache.
    template <typename Compute>
    const value_t* row(int64_t y, const Compute& compute) {
        value_t* row = memory_ + y % 2 * row_size_;
        if (index_[y % 2] != y) {
            compute(y, row);
            index_[y % 2] = y;
        }
        return row;
    }

    // Forget both rows.
    void clear() { index_[0] = index_[1] = -1; }

private:
    value_t* memory_;
    int64_t row_size_;
    int64_t index_[2] = {-1, -1};  // indices of the cached rows; -1: none
};

}  // namespace spatialflow
