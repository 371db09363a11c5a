// SPDX-License-Identifier: Apache-2.0
//
// Class-wise NMS of a batch on CUDA, from boxes (B, N, 4) and per-class scores (B, N, C), without host synchronization.
//
// Class-wise NMS, then the best D of all classes, equals one greedy pass over all (box, class) pairs in score order.
// The pass stops when D pairs are kept, so only the best pairs are sorted:
//
//   collect   a thread per eight scores appends those above the threshold to a list of its image, in any order
//   detect    a block per image selects the best 2048 pairs or fewer in order (best_chunks.cuh) and runs the greedy
//             pass (nms.cuh) over batches of 1024. It repeats with the next pairs until D are kept or none remains.
//
// Memory: 8 bytes per score (12 for float64) for the lists.
#include "cuda/best_chunks.cuh"
#include "cuda/nms.cuh"
#include "cuda/workspace.cuh"
#include "ops/multiclass_nms.h"

namespace spatialflow {
namespace {

constexpr int kCollectThreads = 256;
constexpr int kCollectItems = 8;  // scores per thread

template <typename real_t>
struct DetectionProblem {
    int64_t boxes, classes, max_detections;
    real_t score_threshold, iou_threshold;
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename real_t>
__global__ void __launch_bounds__(kCollectThreads) multiclass_nms_collect_kernel(
    Global<const real_t> scores,    // (B, N * C)
    Global<ScoreKey<real_t>> keys,  // (B, N * C)
    Global<unsigned> rows,          // (B, N * C)
    Global<unsigned> listed,        // (B), zero on entry
    const int64_t total, const real_t threshold) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t image = blockIdx.y;
    const int64_t first =
        static_cast<int64_t>(blockIdx.x) * kCollectItems * kCollectThreads + static_cast<int>(threadIdx.x);
    real_t item_scores[kCollectItems];
#pragma unroll
    for (int item = 0; item < kCollectItems; ++item) {
        const int64_t row = first + item * kCollectThreads;
        item_scores[item] = row < total ? scores[image * total + row] : threshold;
    }
    unsigned above_threshold[kCollectItems], count = 0;  // of the warp
#pragma unroll
    for (int item = 0; item < kCollectItems; ++item) {
        above_threshold[item] = __ballot_sync(kAllLanes, item_scores[item] > threshold);  // false for NaN
        count += static_cast<unsigned>(__popc(above_threshold[item]));
    }
    unsigned base = 0;
    if (lane == 0 && count != 0) {
        base = atomicAdd(listed + image, count);
    }
    base = __shfl_sync(kAllLanes, base, 0);
#pragma unroll
    for (int item = 0; item < kCollectItems; ++item) {
        if ((above_threshold[item] >> lane & 1u) != 0) {
            const int64_t at = image * total + base + __popc(above_threshold[item] & ((1u << lane) - 1u));
            keys[at] = descending_key(item_scores[item]);
            rows[at] = static_cast<unsigned>(first + item * kCollectThreads);
        }
        base += static_cast<unsigned>(__popc(above_threshold[item]));
    }
}

template <typename real_t>
constexpr size_t kDetectSharedBytes =
    kGreedyThreads * (sizeof(Box<real_t>) + sizeof(int)) + kChunk * sizeof(Entry<ScoreKey<real_t>>);

template <typename real_t>
__global__ void __launch_bounds__(kGreedyThreads) multiclass_nms_detect_kernel(
    Global<const Box<real_t>> boxes,      // (B, N)
    Global<const real_t> scores,          // (B, N * C)
    Global<const ScoreKey<real_t>> keys,  // (B, N * C), the first listed[b] of them
    Global<const unsigned> rows,          // (B, N * C)
    Global<const unsigned> listed,        // (B)
    Global<Box<real_t>> out_boxes,        // (B, D)
    Global<real_t> out_scores,            // (B, D)
    Global<int64_t> out_labels,           // (B, D)
    Global<int64_t> out_indices,          // (B, D)
    Global<int64_t> out_count,            // (B)
    const DetectionProblem<real_t> problem) {
    using key_t = ScoreKey<real_t>;
    SPATIALFLOW_DYNAMIC_SHARED(Box<real_t>, batch_boxes);
    SPATIALFLOW_SHARED(unsigned, histogram, kBins);
    SPATIALFLOW_SHARED(unsigned, words, kGreedyWarps);
    SPATIALFLOW_SHARED(unsigned, slots, kGreedySlots);
    SPATIALFLOW_SHARED(unsigned, cut, kCutWords);
    const auto chunk = pointer_cast<Entry<key_t>>(batch_boxes + kGreedyThreads);
    const auto batch_labels = pointer_cast<int>(chunk + kChunk);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t image = blockIdx.x, total = problem.boxes * problem.classes;
    const unsigned classes = static_cast<unsigned>(problem.classes);
    const int limit = static_cast<int>(problem.max_detections);
    Global<const Box<real_t>> image_boxes = boxes + image * problem.boxes;
    Global<const real_t> image_scores = scores + image * total;
    Global<const key_t> image_keys = keys + image * total;
    Global<const unsigned> image_rows = rows + image * total;
    Global<Box<real_t>> kept_boxes = out_boxes + image * limit;
    Global<real_t> kept_scores = out_scores + image * limit;
    Global<int64_t> kept_labels = out_labels + image * limit;
    Global<int64_t> kept_indices = out_indices + image * limit;

    const unsigned count = listed[image];
    int kept = 0;
    Entry<key_t> begin{0, 0};
    while (kept < limit) {
        const int taken = next_chunk<key_t>(image_keys, image_rows, count, begin, chunk, histogram, words, cut);
        if (taken == 0) {
            break;
        }
        for (int first = 0; first < taken && kept < limit; first += kGreedyThreads) {
            Candidate<real_t, int> candidate{};
            unsigned row = 0;
            if (first + thread < taken) {
                const Entry<key_t> entry = chunk[first + thread];
                row = entry.row;  // box * classes + class
                candidate.box = image_boxes[row / classes];
                candidate.area = box_area(candidate.box);
                candidate.label = static_cast<int>(row % classes);
                candidate.alive = box_is_valid(candidate.box);
            }
            for (int i = 0; i < kept && candidate.alive; ++i) {
                if (kept_labels[i] == candidate.label) {
                    const Box<real_t> kept_box = kept_boxes[i];
                    candidate.alive =
                        !suppresses(kept_box, box_area(kept_box), candidate.box, candidate.area, problem.iou_threshold);
                }
            }
            int position;
            const int added = greedy_pass<real_t, int>(
                candidate, limit - kept, batch_boxes, batch_labels, words, slots, problem.iou_threshold, position);
            if (position >= 0) {
                kept_boxes[kept + position] = candidate.box;
                kept_scores[kept + position] = image_scores[row];
                kept_labels[kept + position] = candidate.label;
                kept_indices[kept + position] = row / classes;
            }
            kept += added;
            __syncthreads();  // all threads read the kept boxes next
        }
    }
    for (int i = kept + thread; i < limit; i += kGreedyThreads) {
        kept_boxes[i] = Box<real_t>{0, 0, 0, 0};
        kept_scores[i] = real_t(0);
        kept_labels[i] = -1;
        kept_indices[i] = -1;
    }
    if (thread == 0) {
        out_count[image] = kept;
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiclass_nms_cuda(
    const Tensor& boxes, const Tensor& scores, double score_threshold, double iou_threshold, int64_t max_detections) {
    check_multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_detections);
    const char* op = "multiclass_nms";
    const DeviceScope device(boxes);
    const int64_t batch = boxes.size(0), count = boxes.size(1), classes = scores.size(2), total = count * classes;
    check(batch <= 65535, op, ": at most 65535 images on CUDA, got ", batch);
    const DetectionTensors tensors = detection_tensors(boxes, scores, max_detections);
    dispatch_accum(tensors.boxes.scalar_type(), [&](auto zero) {
        using real_t = decltype(zero);
        using key_t = ScoreKey<real_t>;
        WorkspaceLayout layout;
        const auto listed = layout.add<unsigned>(batch);
        const int64_t zeros = layout.words;
        const auto rows = layout.add<unsigned>(batch * total);
        const auto keys = layout.add<key_t>(batch * total);
        const Workspace workspace(layout, tensors.boxes);
        clear_words(workspace, zeros, device.stream());
        const DetectionProblem<real_t> problem{
            count, classes, max_detections, static_cast<real_t>(score_threshold), static_cast<real_t>(iou_threshold)};
        launch<multiclass_nms_collect_kernel<real_t>>(
            dim3(grid_size(op, ceil_div(total, kCollectThreads * kCollectItems)), static_cast<unsigned>(batch)),
            dim3(kCollectThreads), 0, device.stream(), data<real_t>(tensors.scores), workspace[keys], workspace[rows],
            workspace[listed], total, problem.score_threshold);
        launch<multiclass_nms_detect_kernel<real_t>>(
            dim3(static_cast<unsigned>(batch)), dim3(kGreedyThreads), kDetectSharedBytes<real_t>, device.stream(),
            pointer_cast<const Box<real_t>>(data<real_t>(tensors.boxes)), data<real_t>(tensors.scores), workspace[keys],
            workspace[rows], workspace[listed], pointer_cast<Box<real_t>>(mutable_data<real_t>(tensors.out_boxes)),
            mutable_data<real_t>(tensors.out_scores), mutable_data<int64_t>(tensors.labels),
            mutable_data<int64_t>(tensors.indices), mutable_data<int64_t>(tensors.count), problem);
    });
    return finished_detections(tensors, boxes, scores);
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("multiclass_nms", TORCH_BOX(&spatialflow::multiclass_nms_cuda)); }
