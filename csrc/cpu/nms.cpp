// SPDX-License-Identifier: Apache-2.0
//
// Greedy non-maximum suppression on the CPU. Candidates are visited by descending score. A candidate is kept unless a
// kept box of its class suppresses it.
//
// The rows without NaN are sorted by score once. A second stable sort groups them by class, and a thread processes one
// class at a time. Kept boxes are tested a vector at a time. In large classes, only boxes in nearby cells of a grid are
// tested (nms_buckets.h). Memory is linear in the number of boxes.
#include "ops/nms.h"

#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/nms_buckets.h"
#include "cpu/score_order.h"

namespace spatialflow {
namespace {

// Smallest class size for a grid of kept boxes. For smaller classes the grid costs more time than it saves.
constexpr int64_t kGridFrom = 384;

// Smallest number of boxes for several threads. Fewer boxes are processed faster than another thread starts.
constexpr int64_t kThreadsFrom = 32768;

template <typename real_t>
struct SortedCandidates {
    const Box<real_t>* boxes;                  // by row
    std::vector<ScoreEntry<real_t>> by_score;  // valid rows, best first; a `position` is an index into this list

    const Box<real_t>& box(int64_t position) const { return boxes[by_score[static_cast<size_t>(position)].row]; }
};

// Return the rows without a NaN in score or box, best first, equal scores by row.
template <typename real_t>
SortedCandidates<real_t> sorted_candidates(const Box<real_t>* boxes, const real_t* scores, int64_t count) {
    SortedCandidates<real_t> candidates{boxes, {}};
    auto& entries = candidates.by_score;
    entries.resize(static_cast<size_t>(count));
    size_t valid = 0;
    for (int64_t row = 0; row < count; ++row) {
        entries[valid] = {descending_key(scores[row]), static_cast<uint32_t>(row)};
        valid += scores[row] == scores[row] && box_is_valid(boxes[row]);
    }
    entries.resize(valid);
    std::vector<ScoreEntry<real_t>> scratch;
    radix_sort(entries.data(), static_cast<int64_t>(valid), static_cast<decltype(entries[0].key)>(-1), scratch);
    return candidates;
}

// Whether a kept box suppresses `box`. Only the cells that can contain the center of a suppressing box are searched.
template <typename real_t>
__attribute__((always_inline)) inline bool suppressed_by_neighbors(
    const SelectedBoxes<real_t>& kept, const UniformGrid<real_t>& grid, const Box<real_t>& box, real_t area,
    real_t threshold) {
    const auto range = grid.reachable(box);
    for (int64_t row = range.row_begin; row < range.row_end; ++row) {
        for (int64_t column = range.column_begin; column < range.column_end; ++column) {
            if (kept.suppress(row * grid.columns() + column, box, area, threshold)) {
                return true;
            }
        }
    }
    return false;
}

// Apply NMS to one class. positions(0 .. count - 1) ascend, so scores descend. Set keep[position] = 1 for each kept
// box.
template <typename real_t, typename Positions>
void greedy_nms(
    const SortedCandidates<real_t>& candidates, const Positions& positions, int64_t count, real_t threshold,
    SelectedBoxes<real_t>& kept, uint8_t* keep) {
    const auto scan = [&](auto&& suppressed, auto&& bucket_of) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = positions(i);
            const Box<real_t> box = candidates.box(position);
            const real_t area = box_area(box);
            if (area_competes(area)) {  // other boxes neither suppress nor are suppressed
                if (suppressed(box, area)) {
                    continue;
                }
                kept.add(bucket_of(box), box, area);
            }
            keep[position] = 1;
        }
    };
    if (count >= kGridFrom) {
        const UniformGrid<real_t> grid(threshold, [&](auto&& add) {
            for (int64_t i = 0; i < count; ++i) {
                const Box<real_t>& box = candidates.box(positions(i));
                if (area_competes(box_area(box))) {
                    add(box);
                }
            }
        });
        if (grid.cell_count() > 1) {
            kept.clear(grid.cell_count());
            scan(
                [&](const Box<real_t>& box, real_t area) {
                    return suppressed_by_neighbors(kept, grid, box, area, threshold);
                },
                [&](const Box<real_t>& box) { return grid.cell(box); });
            return;
        }
    }
    kept.clear(1);
    scan(
        [&](const Box<real_t>& box, real_t area) { return kept.suppress(0, box, area, threshold); },
        [](const Box<real_t>&) { return int64_t(0); });
}

// Apply NMS to each class separately. Threads take classes dynamically, because class sizes differ.
template <typename real_t>
void greedy_nms_by_class(
    const SortedCandidates<real_t>& candidates, const int64_t* idxs, real_t threshold, uint8_t* keep) {
    const int64_t count = static_cast<int64_t>(candidates.by_score.size());
    int64_t lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();
    for (const auto& entry : candidates.by_score) {
        lowest = std::min(lowest, idxs[entry.row]);
        highest = std::max(highest, idxs[entry.row]);
    }
    // Use unsigned differences, because the range of int64 classes can exceed int64.
    const auto class_key = [&](int64_t id) { return static_cast<uint64_t>(id) - static_cast<uint64_t>(lowest); };
    std::vector<KeyedRow<uint64_t>> by_class(static_cast<size_t>(count)), scratch;
    for (int64_t position = 0; position < count; ++position) {
        const int64_t id = idxs[candidates.by_score[static_cast<size_t>(position)].row];
        by_class[static_cast<size_t>(position)] = {class_key(id), static_cast<uint32_t>(position)};
    }
    radix_sort(by_class.data(), count, class_key(highest), scratch);
    std::vector<int64_t> class_begin;
    for (int64_t i = 0; i < count; ++i) {
        if (i == 0 || by_class[i].key != by_class[i - 1].key) {
            class_begin.push_back(i);
        }
    }
    const int64_t classes = static_cast<int64_t>(class_begin.size());
    class_begin.push_back(count);
    std::atomic<int64_t> next{0};
    const int64_t workers = count < kThreadsFrom ? 1 : std::min(classes, num_threads());
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        SelectedBoxes<real_t> kept;
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < classes;) {
                const KeyedRow<uint64_t>* members = by_class.data() + class_begin[index];
                greedy_nms(
                    candidates, [&](int64_t i) { return static_cast<int64_t>(members[i].row); },
                    class_begin[index + 1] - class_begin[index], threshold, kept, keep);
            }
        }
    });
}

// Return the kept rows, best first. `idxs` is the class of each row, or null if there is only one class.
Tensor kept_rows(const char* op, const Tensor& boxes, const Tensor& scores, const int64_t* idxs, double iou_threshold) {
    const int64_t count = boxes.size(0);
    check(count < kMaxRows, op, ": boxes must be fewer than 2^32, got ", count);
    const ScalarType type = nms_compute_type(boxes, scores);
    const Tensor upcast_boxes = contiguous_as(boxes, type), upcast_scores = contiguous_as(scores, type);
    std::vector<int64_t> rows;
    dispatch_accum(type, [&](auto zero) {
        using real_t = decltype(zero);
        const SortedCandidates<real_t> candidates = sorted_candidates(
            reinterpret_cast<const Box<real_t>*>(data<real_t>(upcast_boxes)), data<real_t>(upcast_scores), count);
        const size_t valid = candidates.by_score.size();
        std::vector<uint8_t> keep(valid, 0);
        const real_t threshold = static_cast<real_t>(iou_threshold);
        if (idxs != nullptr) {
            greedy_nms_by_class(candidates, idxs, threshold, keep.data());
        } else {
            SelectedBoxes<real_t> kept;
            greedy_nms(
                candidates, [](int64_t i) { return i; }, static_cast<int64_t>(valid), threshold, kept, keep.data());
        }
        rows.resize(valid);
        size_t kept_count = 0;
        for (size_t position = 0; position < valid; ++position) {
            rows[kept_count] = candidates.by_score[position].row;
            kept_count += keep[position];
        }
        rows.resize(kept_count);
    });
    Tensor result = empty_like_sized(boxes, {static_cast<int64_t>(rows.size())}, ScalarType::Long);
    std::copy(rows.begin(), rows.end(), mutable_data<int64_t>(result));
    return result;
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    check_nms("nms", boxes, scores, iou_threshold);
    return kept_rows("nms", boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
    check_batched_nms(boxes, scores, idxs, iou_threshold);
    const Tensor classes = to_contiguous(idxs);
    return kept_rows("batched_nms", boxes, scores, data<int64_t>(classes), iou_threshold);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("nms", TORCH_BOX(&spatialflow::nms_cpu));
    library.impl("batched_nms", TORCH_BOX(&spatialflow::batched_nms_cpu));
}
