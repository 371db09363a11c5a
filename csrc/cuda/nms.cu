// SPDX-License-Identifier: Apache-2.0
//
// nms and batched_nms on CUDA: candidates by descending score, each kept unless a kept one of its class suppresses it
// (common/nms.h, the same bits as on the CPU).
//
//   1. rank      a thread per row counts the rows that come before it (better score, or equal and lower row): a sort
//                without passes, stable by construction, that also lays out boxes, classes and areas in score order
//   2. in batches of 1024 candidates:
//      greedy    one block keeps and drops within the batch, given who is dropped already
//      suppress  a thread per later candidate tests it against the boxes that the batch kept
//
// Memory is linear in N; there is no N x N bit mask. Nothing is read back before the end, where the number of rows of
// the result must be known to the host.
//
// Floor (H100): 5000 boxes are 100 KB, so it is latency: 1 + 2 * 5 launches and, one after the
// other, a vote and a test of about 0.05 us for every box kept.
// The rank compares N^2 keys, 25 million for 5000 boxes: 2 us; 10^10 for 100,000: about 1 ms.
#include "cuda/nms.h"

#include "cuda/launch.h"
#include "ops/nms.h"

namespace spatialflow {
namespace {

constexpr int kRankThreads = 256;
constexpr int kSuppressThreads = 256;

// Candidates in score order.
template <typename real_t>
struct Sorted {
    Global<Box<real_t>> boxes;    // (N)
    Global<int64_t> labels;       // (N)
    Global<int64_t> rows;         // (N), where they came from
    Global<int> removed;          // (N), not 0: suppressed, or not a candidate
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename real_t>
using ScoreKey = decltype(descending_key(real_t{}));

// Ascends as scores descend; rows that take no part come after all others.
template <typename real_t>
__device__ __forceinline__ ScoreKey<real_t> row_key(
    Global<const Box<real_t>> boxes, Global<const real_t> scores, int64_t row) {
    const real_t score = scores[row];
    const Box<real_t> box = boxes[row];
    return score == score && box_is_valid(box) ? descending_key(score) : ~ScoreKey<real_t>(0);
}

template <typename real_t>
__global__ void __launch_bounds__(kRankThreads) nms_rank_kernel(
    Global<const Box<real_t>> boxes,  // (N)
    Global<const real_t> scores,      // (N)
    Global<const int64_t> labels,     // (N) or null: all of one class
    const Sorted<real_t> sorted, const int64_t count) {
    SPATIALFLOW_SHARED(ScoreKey<real_t>, keys, kRankThreads);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRankThreads + thread;
    const ScoreKey<real_t> own = row < count ? row_key(boxes, scores, row) : ScoreKey<real_t>(0);
    int64_t rank = 0;
    for (int64_t base = 0; base < count; base += kRankThreads) {
        if (base + thread < count) {
            keys[thread] = row_key(boxes, scores, base + thread);
        }
        __syncthreads();
        const int tile = static_cast<int>(count - base < kRankThreads ? count - base : kRankThreads);
        // Rows below the own one win ties, the others lose them.
        const int lower = static_cast<int>(row <= base ? 0 : row - base < tile ? row - base : tile);
        int before = 0;
        for (int i = 0; i < lower; ++i) {
            const ScoreKey<real_t> other = keys[i];
            before += other <= own;
        }
        for (int i = lower; i < tile; ++i) {
            const ScoreKey<real_t> other = keys[i];
            before += other < own;
        }
        rank += before;
        __syncthreads();
    }
    if (row < count) {
        sorted.boxes[rank] = boxes[row];
        sorted.labels[rank] = labels ? labels[row] : 0;
        sorted.rows[rank] = row;
        sorted.removed[rank] = own == ~ScoreKey<real_t>(0);
    }
}

// Candidates [begin, begin + 1024). The kept ones follow those of earlier batches in `kept`.
template <typename real_t>
__global__ void __launch_bounds__(kGreedyThreads) nms_greedy_kernel(
    const Sorted<real_t> sorted,
    Global<int64_t> kept,       // (N), positions in score order
    Global<int64_t> kept_rows,  // (N), the result
    Global<int64_t> kept_count,  // (batches + 1), after every batch; [0] is 0
    const int64_t count, const int64_t batch, const real_t threshold) {
    SPATIALFLOW_SHARED(Box<real_t>, boxes, kGreedyThreads);
    SPATIALFLOW_SHARED(int64_t, labels, kGreedyThreads);
    SPATIALFLOW_SHARED(unsigned, kept_of_warp, kGreedyWarps);
    const int64_t index = batch * kGreedyThreads + static_cast<int64_t>(threadIdx.x);
    Candidate<real_t, int64_t> candidate{};
    if (index < count) {
        candidate.box = sorted.boxes[index];
        candidate.area = box_area(candidate.box);
        candidate.label = sorted.labels[index];
        candidate.alive = sorted.removed[index] == 0;
    }
    int position;
    const int added = greedy_pass<real_t, int64_t>(candidate, kGreedyThreads, boxes, labels, kept_of_warp, threshold, position);
    const int64_t before = kept_count[batch];
    if (position >= 0) {
        kept[before + position] = index;
        kept_rows[before + position] = sorted.rows[index];
    }
    if (threadIdx.x == 0) {
        kept_count[batch + 1] = before + added;
    }
}

template <typename real_t>
__global__ void __launch_bounds__(kSuppressThreads) nms_suppress_kernel(
    const Sorted<real_t> sorted, Global<const int64_t> kept, Global<const int64_t> kept_count, const int64_t count,
    const int64_t batch, const real_t threshold) {
    SPATIALFLOW_SHARED(Box<real_t>, boxes, kSuppressThreads);
    SPATIALFLOW_SHARED(int64_t, labels, kSuppressThreads);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t index =
        (batch + 1) * kGreedyThreads + static_cast<int64_t>(blockIdx.x) * kSuppressThreads + thread;
    bool alive = index < count && sorted.removed[index] == 0;
    const bool was_alive = alive;
    const Box<real_t> box = index < count ? sorted.boxes[index] : Box<real_t>{};
    const int64_t label = index < count ? sorted.labels[index] : 0;
    const real_t area = box_area(box);
    const int64_t end = kept_count[batch + 1];
    for (int64_t base = kept_count[batch]; base < end; base += kSuppressThreads) {
        if (base + thread < end) {
            const int64_t position = kept[base + thread];
            boxes[thread] = sorted.boxes[position];
            labels[thread] = sorted.labels[position];
        }
        __syncthreads();
        const int tile = static_cast<int>(end - base < kSuppressThreads ? end - base : kSuppressThreads);
        for (int i = 0; i < tile && alive; ++i) {
            const int64_t other_label = labels[i];
            if (other_label == label) {
                const Box<real_t> other = boxes[i];
                alive = !suppresses(other, box_area(other), box, area, threshold);
            }
        }
        __syncthreads();
    }
    if (was_alive && !alive) {
        sorted.removed[index] = 1;
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

Tensor kept_rows_of(
    const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
    const int64_t count = boxes.size(0);
    if (count == 0) {
        return empty_like_sized(boxes, {0}, ScalarType::Long);
    }
    const DeviceScope device(boxes);
    const ScalarType type = nms_compute_type(boxes, scores);
    const Tensor wide_boxes = contiguous_as(boxes, type), wide_scores = contiguous_as(scores, type);
    const int64_t batches = ceil_div(count, kGreedyThreads);
    const auto buffer = [&](int64_t size, ScalarType dtype) { return empty_like_sized(boxes, {size}, dtype); };
    const Tensor sorted_boxes = buffer(count * 4, type), labels = buffer(count, ScalarType::Long);
    const Tensor rows = buffer(count, ScalarType::Long), removed = buffer(count, ScalarType::Int);
    const Tensor kept = buffer(count, ScalarType::Long), kept_rows = buffer(count, ScalarType::Long);
    Tensor kept_count = buffer(batches + 1, ScalarType::Long);
    torch::stable::zero_(kept_count);
    const auto run = [&](auto zero) {
        using real_t = decltype(zero);
        const Sorted<real_t> sorted{pointer_cast<Box<real_t>>(mutable_data<real_t>(sorted_boxes)),
                                    mutable_data<int64_t>(labels), mutable_data<int64_t>(rows),
                                    mutable_data<int>(removed)};
        const real_t threshold = static_cast<real_t>(iou_threshold);
        launch<nms_rank_kernel<real_t>>(
            dim3(grid_size(op, ceil_div(count, kRankThreads))), dim3(kRankThreads), 0, device.stream(),
            pointer_cast<const Box<real_t>>(data<real_t>(wide_boxes)), data<real_t>(wide_scores),
            idxs ? data<int64_t>(*idxs) : Global<const int64_t>(nullptr), sorted, count);
        for (int64_t batch = 0; batch < batches; ++batch) {
            launch<nms_greedy_kernel<real_t>>(
                dim3(1), dim3(kGreedyThreads), 0, device.stream(), sorted, mutable_data<int64_t>(kept),
                mutable_data<int64_t>(kept_rows), mutable_data<int64_t>(kept_count), count, batch, threshold);
            const int64_t later = count - (batch + 1) * kGreedyThreads;
            launch<nms_suppress_kernel<real_t>>(
                dim3(grid_size(op, later > 0 ? ceil_div(later, kSuppressThreads) : 0)), dim3(kSuppressThreads), 0,
                device.stream(), sorted, data<int64_t>(kept), data<int64_t>(kept_count), count, batch, threshold);
        }
    };
    if (type == ScalarType::Double) {
        run(double{});
    } else {
        run(float{});
    }
    // Exactly sized, so that the scratch behind it is freed.
    const int64_t found = read_back(data<int64_t>(kept_count) + batches, device.stream());
    Tensor result = empty_like_sized(boxes, {found}, ScalarType::Long);
    Tensor source = kept_rows;
    return torch::stable::copy_(result, torch::stable::narrow(source, 0, 0, found));
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    check_nms("nms", boxes, scores, iou_threshold);
    return kept_rows_of("nms", boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
    check_batched_nms(boxes, scores, idxs, iou_threshold);
    const Tensor classes = to_contiguous(idxs);
    return kept_rows_of("batched_nms", boxes, scores, &classes, iou_threshold);
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("nms", TORCH_BOX(&spatialflow::nms_cuda));
    library.impl("batched_nms", TORCH_BOX(&spatialflow::batched_nms_cuda));
}
