// SPDX-License-Identifier: Apache-2.0
//
// Buckets of the boxes that greedy NMS has kept. A candidate is tested against a vector of boxes at a time.
//
// There is a bucket per class, or per cell of a grid. A bucket is a chain of blocks. A block has kLanes boxes as a
// structure of arrays; unused lanes have empty boxes, which suppress nothing. Memory is linear in the numbers of kept
// boxes and buckets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/nms.h"
#include "cpu/simd.h"

namespace spatialflow {

template <typename real_t>
class SelectedBoxes {
public:
    void clear(int64_t buckets) {
        chains_.assign(static_cast<size_t>(buckets), Chain{});
        blocks_.clear();
    }

    // Add a kept box. area_competes(area) (common/nms.h) must be true for kept boxes and candidates.
    void add(int64_t bucket, const Box<real_t>& box, real_t area) {
        Chain& chain = chains_[static_cast<size_t>(bucket)];
        const int64_t lane = chain.used % kLanes<real_t>;
        if (lane == 0) {
            constexpr real_t kInfinity = std::numeric_limits<real_t>::infinity();
            const Vector<real_t> high = broadcast(kInfinity), low = broadcast(-kInfinity);
            blocks_.push_back({high, high, low, low, Vector<real_t>{}, chain.last});
            chain.last = static_cast<int64_t>(blocks_.size()) - 1;
            chain.used = 0;
        }
        ++chain.used;
        Block& block = blocks_[static_cast<size_t>(chain.last)];
        block.x1[lane] = box.x1;
        block.y1[lane] = box.y1;
        block.x2[lane] = box.x2;
        block.y2[lane] = box.y2;
        block.area[lane] = area;
    }

    // Whether any box of the bucket suppresses the candidate, by the rule of `suppresses` per lane. The height of the
    // intersection is not clamped: a negative height makes inter <= 0, which is never above the threshold.
    bool suppress(int64_t bucket, const Box<real_t>& box, real_t area, real_t threshold) const {
        const Vector<real_t> x1 = broadcast(box.x1), y1 = broadcast(box.y1), x2 = broadcast(box.x2),
                             y2 = broadcast(box.y2), box_area = broadcast(area);
        const Vector<real_t> limit = broadcast(threshold), zero = {};
        for (int64_t index = chains_[static_cast<size_t>(bucket)].last; index >= 0;) {
            const Block& block = blocks_[static_cast<size_t>(index)];
            const Vector<real_t> width = lane_max(lane_min(x2, block.x2) - lane_max(x1, block.x1), zero);
            const Vector<real_t> height = lane_min(y2, block.y2) - lane_max(y1, block.y1);
            const Vector<real_t> inter = width * height;
            if (any_lane(inter > limit * ((box_area + block.area) - inter))) {
                return true;
            }
            index = block.previous;
        }
        return false;
    }

private:
    struct Block {
        Vector<real_t> x1, y1, x2, y2, area;
        int64_t previous;
    };
    struct Chain {
        int64_t last = -1;
        int64_t used = 0;  // lanes of the last block
    };

    std::vector<Chain> chains_;
    std::vector<Block> blocks_;
};

// Uniform grid over box centers. A kept box is in the cell of its center. A candidate is tested only against cells in
// which a suppressing box may have its center.
//
// IoU > t implies that the IoU of the x extents exceeds t, so the widths differ by a factor below 1 / t. The centers
// differ by less than width * (1 - t) / (2 t), for the width of either box. They also differ by less than half
// the sum of the widths. The same is true for heights. `t` is lowered and distances are enlarged by more than the
// rounding error, so the grid never changes the result.
template <typename real_t>
class UniformGrid {
public:
    struct Range {
        int64_t column_begin, column_end, row_begin, row_end;
    };

    // Create a grid. visit(add) must call add(box) for each box whose area competes.
    template <typename Visit>
    UniformGrid(real_t threshold, const Visit& visit) {
        constexpr real_t kInfinity = std::numeric_limits<real_t>::infinity();
        real_t low_x = kInfinity, high_x = -kInfinity, low_y = kInfinity, high_y = -kInfinity, max_coordinate = 0;
        double sum_width = 0, sum_height = 0, count = 0;
        visit([&](const Box<real_t>& box) {
            const real_t x = center(box.x1, box.x2), y = center(box.y1, box.y2);
            const real_t width = box.x2 - box.x1, height = box.y2 - box.y1;
            count += 1;
            low_x = std::min(low_x, x);
            high_x = std::max(high_x, x);
            low_y = std::min(low_y, y);
            high_y = std::max(high_y, y);
            max_width_ = std::max(max_width_, width);
            max_height_ = std::max(max_height_, height);
            sum_width += width;
            sum_height += height;
            max_coordinate =
                std::max({max_coordinate, std::abs(box.x1), std::abs(box.y1), std::abs(box.x2), std::abs(box.y2)});
        });
        const real_t lowered = std::min(threshold, real_t(1)) * real_t(1 - 1e-5);
        reach_ = (real_t(1) - lowered) / (real_t(2) * lowered) + real_t(1e-5);  // infinite for a threshold of 0
        slack_ = max_coordinate * real_t(16) * std::numeric_limits<real_t>::epsilon();
        x0_ = low_x;
        y0_ = low_y;
        const real_t mean_x = reach_of(static_cast<real_t>(sum_width / count), max_width_);
        const real_t mean_y = reach_of(static_cast<real_t>(sum_height / count), max_height_);
        // Choose cells about as large as the mean reach, with at least 8 boxes per cell on average.
        const double per_axis = std::sqrt(count / 8);
        columns_ = cells(high_x - low_x, mean_x, per_axis, per_column_);
        rows_ = cells(high_y - low_y, mean_y, per_axis, per_row_);
    }

    int64_t cell_count() const { return columns_ * rows_; }
    int64_t columns() const { return columns_; }

    int64_t cell(const Box<real_t>& box) const {
        return row(center(box.y1, box.y2)) * columns_ + column(center(box.x1, box.x2));
    }

    // Half-open ranges of cells that contain the centers of all boxes that may suppress `box`.
    Range reachable(const Box<real_t>& box) const {
        const real_t x = center(box.x1, box.x2), y = center(box.y1, box.y2);
        const real_t dx = reach_of(box.x2 - box.x1, max_width_), dy = reach_of(box.y2 - box.y1, max_height_);
        return {column(x - dx), column(x + dx) + 1, row(y - dy), row(y + dy) + 1};
    }

private:
    static real_t center(real_t low, real_t high) { return low * real_t(0.5) + high * real_t(0.5); }

    real_t reach_of(real_t extent, real_t largest_extent) const {
        const real_t by_threshold = extent * reach_, by_overlap = (extent + largest_extent) * real_t(0.5001);
        return std::min(by_threshold, by_overlap) * real_t(1.001) + slack_;
    }

    static int64_t cells(real_t range, real_t reach, double limit, real_t& per_unit) {
        const double bounded = std::min(static_cast<double>(range) / static_cast<double>(reach), limit);
        const int64_t count = bounded >= 1 ? static_cast<int64_t>(bounded) : 1;  // 1 also if `bounded` is NaN
        // 0 if `range` is infinite: all boxes are then in the first cell.
        per_unit = count > 1 ? static_cast<real_t>(count / static_cast<double>(range)) : real_t(0);
        return count;
    }

    // Cell index of a coordinate. It is monotonic, including rounding, so a range of coordinates maps to a range of
    // cells.
    static int64_t index(real_t at, real_t origin, real_t per_unit, int64_t count) {
        const real_t position = (at - origin) * per_unit;
        if (!(position > real_t(0))) {
            return 0;
        }
        return position < static_cast<real_t>(count - 1) ? static_cast<int64_t>(position) : count - 1;
    }
    int64_t column(real_t x) const { return index(x, x0_, per_column_, columns_); }
    int64_t row(real_t y) const { return index(y, y0_, per_row_, rows_); }

    real_t x0_ = 0, y0_ = 0, per_column_ = 0, per_row_ = 0;
    real_t max_width_ = 0, max_height_ = 0, reach_ = 0, slack_ = 0;
    int64_t columns_ = 1, rows_ = 1;
};

}  // namespace spatialflow
