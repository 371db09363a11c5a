// SPDX-License-Identifier: Apache-2.0
//
// Numbers of pixels shared by each pair of segments of two id maps, on the CPU:
//
//   counts[g, p] = number of pixels with gt_map = g and pred_map = p, 0 <= g <= gt_segments, 0 <= p <= pred_segments
//
// Segments are large, so pixels are counted in runs of one pair, and the table is accessed only once per run. Each
// thread has a private table; the number of threads is limited so that a table is smaller than the thread's range of
// pixels. Sums of integers do not depend on their order.
#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "ops/panoptic_quality_counts.h"

namespace spatialflow {
namespace {

void count_rows(
    const int32_t* gt,    // range of pixels of a thread
    const int32_t* pred,  // same range
    int64_t pixels, int64_t gt_segments, int64_t pred_segments,
    int64_t* counts) {  // (gt_segments + 1, pred_segments + 1), incremented
    for (int64_t i = 0; i < pixels;) {
        const int32_t g = gt[i], p = pred[i];
        int64_t end = i + 1;
        while (end < pixels && gt[end] == g && pred[end] == p) {
            ++end;
        }
        if (g >= 0 && g <= gt_segments && p >= 0 && p <= pred_segments) {
            counts[g * (pred_segments + 1) + p] += end - i;
        }
        i = end;
    }
}

Tensor panoptic_quality_counts_cpu(
    const Tensor& gt_map, const Tensor& pred_map, int64_t gt_segments, int64_t pred_segments) {
    check_panoptic_quality_counts(gt_map, pred_map, gt_segments, pred_segments);
    Tensor counts = empty_like_sized(gt_map, {gt_segments + 1, pred_segments + 1}, ScalarType::Long);
    torch::stable::zero_(counts);
    const int64_t pixels = gt_map.numel(), cells = counts.numel();
    if (pixels == 0) {
        return counts;
    }
    const Tensor gt = to_contiguous(gt_map), pred = to_contiguous(pred_map);
    const int64_t parts = std::max<int64_t>(1, std::min(num_threads(), pixels / (4 * cells)));
    std::vector<int64_t> partial(static_cast<size_t>((parts - 1) * cells));
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const int64_t first = pixels * part / parts, last = pixels * (part + 1) / parts;
            int64_t* table = part == 0 ? mutable_data<int64_t>(counts) : partial.data() + (part - 1) * cells;
            count_rows(
                data<int32_t>(gt) + first, data<int32_t>(pred) + first, last - first, gt_segments, pred_segments,
                table);
        }
    });
    int64_t* total = mutable_data<int64_t>(counts);
    for (size_t i = 0; i < partial.size(); ++i) {
        total[i % static_cast<size_t>(cells)] += partial[i];
    }
    return counts;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("panoptic_quality_counts", TORCH_BOX(&spatialflow::panoptic_quality_counts_cpu));
}
