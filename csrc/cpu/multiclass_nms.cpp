// SPDX-License-Identifier: Apache-2.0
//
// Class-wise NMS of a batch of boxes with per-class scores, on the CPU.
//
// The result is that of NMS of each class, then selection of the best `max_detections` (box, class) pairs. One greedy
// pass over all pairs in score order has the same result and stops early. So only the best pairs are sorted, a chunk at
// a time. The first chunk has at least max(1024, 4 * max_detections) pairs, or all. The minimum of each next chunk is
// four times as large.
#include "ops/multiclass_nms.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/nms_buckets.h"
#include "cpu/score_order.h"

namespace spatialflow {
namespace {

// Smallest number of scores per thread. Fewer scores are scanned faster than another thread starts.
constexpr int64_t kScoresPerThread = 1 << 18;

template <typename real_t>
struct Options {
    real_t score_threshold, iou_threshold;
    int64_t boxes, classes, max_detections;
};

// Results of one image: arrays with `max_detections` rows.
template <typename real_t>
struct Detections {
    Box<real_t>* boxes;
    real_t* scores;
    int64_t* labels;
    int64_t* indices;
};

// Append an entry for each score in [begin, end) above the threshold: its key, which is smaller for higher scores, and
// its flat (box, class) index.
template <typename real_t>
void collect(
    const real_t* scores, int64_t begin, int64_t end, real_t threshold, std::vector<ScoreEntry<real_t>>& entries) {
    constexpr int64_t kBlock = 4 * kLanes<real_t>;
    const Vector<real_t> limit = broadcast(threshold);
    size_t used = entries.size();
    for (int64_t i = begin; i < end;) {
        const int64_t stop = std::min(i + kBlock, end);
        if (stop - i == kBlock) {
            auto above = load_vector(scores + i) > limit;
            for (int64_t lane = kLanes<real_t>; lane < kBlock; lane += kLanes<real_t>) {
                above |= load_vector(scores + i + lane) > limit;
            }
            if (!any_lane(above)) {
                i = stop;
                continue;
            }
        }
        if (entries.size() < used + kBlock) {
            entries.resize(std::max(entries.size() * 2, used + kBlock));
        }
        for (; i < stop; ++i) {
            entries[used] = {descending_key(scores[i]), static_cast<uint32_t>(i)};
            used += scores[i] > threshold;
        }
    }
    entries.resize(used);
}

template <typename real_t>
std::vector<ScoreEntry<real_t>> candidates_of(const real_t* scores, const Options<real_t>& options) {
    const int64_t total = options.boxes * options.classes;
    const int64_t parts = std::max<int64_t>(1, std::min(num_threads(), total / kScoresPerThread));
    std::vector<std::vector<ScoreEntry<real_t>>> entries(static_cast<size_t>(parts));
    parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
            collect(
                scores, total * part / parts, total * (part + 1) / parts, options.score_threshold,
                entries[static_cast<size_t>(part)]);
        }
    });
    for (int64_t part = 1; part < parts; ++part) {
        entries[0].insert(entries[0].end(), entries[part].begin(), entries[part].end());
    }
    return std::move(entries[0]);
}

template <typename real_t>
int64_t detect(
    const Box<real_t>* boxes, const real_t* scores, const Options<real_t>& options, const Detections<real_t>& result) {
    if (options.max_detections == 0 || options.boxes * options.classes == 0) {
        return 0;
    }
    std::vector<ScoreEntry<real_t>> pending = candidates_of(scores, options), chunk, scratch;
    SelectedBoxes<real_t> kept;
    kept.clear(options.classes);
    int64_t count = 0;
    for (size_t chunk_size = std::max<size_t>(1024, 4 * static_cast<size_t>(options.max_detections)); !pending.empty();
         chunk_size *= 4) {
        take_best(pending, chunk_size, chunk);
        radix_sort(chunk.data(), static_cast<int64_t>(chunk.size()), static_cast<decltype(chunk[0].key)>(-1), scratch);
        for (const auto& entry : chunk) {
            const int64_t index = entry.row / options.classes, label = entry.row % options.classes;
            const Box<real_t> box = boxes[index];
            if (!box_is_valid(box)) {
                continue;
            }
            const real_t area = box_area(box);
            if (area_competes(area)) {
                if (kept.suppress(label, box, area, options.iou_threshold)) {
                    continue;
                }
                kept.add(label, box, area);
            }
            result.boxes[count] = box;
            result.scores[count] = scores[entry.row];
            result.labels[count] = label;
            result.indices[count] = index;
            if (++count == options.max_detections) {
                return count;
            }
        }
    }
    return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiclass_nms_cpu(
    const Tensor& boxes, const Tensor& scores, double score_threshold, double iou_threshold, int64_t max_detections) {
    check_multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_detections);
    const int64_t batch = boxes.size(0), rows = boxes.size(1), classes = scores.size(2);
    const DetectionTensors tensors = detection_tensors(boxes, scores, max_detections);
    dispatch_accum(tensors.boxes.scalar_type(), [&](auto zero) {
        using real_t = decltype(zero);
        const Options<real_t> options{
            static_cast<real_t>(score_threshold), static_cast<real_t>(iou_threshold), rows, classes, max_detections};
        const auto* batch_boxes = reinterpret_cast<const Box<real_t>*>(data<real_t>(tensors.boxes));
        const real_t* batch_scores = data<real_t>(tensors.scores);
        const Detections<real_t> first{
            reinterpret_cast<Box<real_t>*>(mutable_data<real_t>(tensors.out_boxes)),
            mutable_data<real_t>(tensors.out_scores), mutable_data<int64_t>(tensors.labels),
            mutable_data<int64_t>(tensors.indices)};
        parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
            for (int64_t image = begin; image < end; ++image) {
                const int64_t offset = image * max_detections;
                const Detections<real_t> result{
                    first.boxes + offset, first.scores + offset, first.labels + offset, first.indices + offset};
                const int64_t kept =
                    detect(batch_boxes + image * rows, batch_scores + image * rows * classes, options, result);
                mutable_data<int64_t>(tensors.count)[image] = kept;
                std::fill(result.boxes + kept, result.boxes + max_detections, Box<real_t>{0, 0, 0, 0});
                std::fill(result.scores + kept, result.scores + max_detections, real_t(0));
                std::fill(result.labels + kept, result.labels + max_detections, int64_t(-1));
                std::fill(result.indices + kept, result.indices + max_detections, int64_t(-1));
            }
        });
    });
    return finished_detections(tensors, boxes, scores);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("multiclass_nms", TORCH_BOX(&spatialflow::multiclass_nms_cpu));
}
