// SPDX-License-Identifier: Apache-2.0
//
// Kernels of the panoptic merge for its results, in this order:
//
//   paint    the id map: stuff and filled boxes, then instances
//   measure  area and bounding box of every segment in the id map
//   table    the rows of the result
#pragma once

#include "cuda/panoptic_merge_stuff.cuh"

namespace spatialflow {
namespace {

// Id of the first filled box that contains a pixel, or 0.
__device__ __forceinline__ int filled_box_at(const MergeScratch& scratch, int pixel) {
    const int y = pixel / scratch.width, x = pixel - y * scratch.width;
    const int candidates = scratch.candidates[0];
    int id = 0;
    for (int c = 0; c < candidates && id == 0; ++c) {
        const Vec<int, 4> box = load_vector<4>(scratch.boxes + 4 * c);
        const bool inside = x >= box[0] && x < box[2] && y >= box[1] && y < box[3];
        id = inside ? scratch.fill_id[c] : 0;
    }
    return id;
}

// Write the pixels without an instance: the id of their stuff label, or of the first filled box that contains them.
template <typename label_t>
__global__ void __launch_bounds__(kThreads) merge_paint_stuff_kernel(
    Global<const label_t> stuff,  // (H, W)
    Global<int> id_map,           // (H, W)
    const MergeScratch scratch, const bool has_boxes) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, first = first_word_of_warp();
    int labels[kLoads];
    load_stuff(stuff, scratch, first, labels);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int word = first + i, pixel = word * kWarpSize + lane;
        if (pixel >= scratch.pixels || (scratch.used[word] >> lane & 1u) != 0) {
            continue;
        }
        int id = labels[i] >= 0 ? scratch.stuff_id[labels[i]] : 0;
        if (has_boxes && id == 0 && (scratch.void_pixels[word] >> lane & 1u) == 0) {
            id = filled_box_at(scratch, pixel);
        }
        id_map[pixel] = id;
    }
}

// Write the pixels of kept instances. A warp loads 32 words of an instance, one per lane. It then processes the nonzero
// words in order, one pixel per lane.
__global__ void __launch_bounds__(kThreads) merge_paint_instances_kernel(
    Global<int> id_map,  // (H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, c = static_cast<int>(blockIdx.y);
    const int id = scratch.id_of[c];
    if (id == 0) {
        return;
    }
    const int first = scratch.words - scratch.words_from[c], end = scratch.end_word[c];
    const int warp = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    for (int base = first + warp * kWarpSize; base < end; base += static_cast<int>(gridDim.x) * kThreads) {
        const unsigned lane_word = base + lane < end ? scratch.bits_of(c)[base + lane] : 0u;
        for (unsigned left = __ballot_sync(kAllLanes, lane_word != 0); left != 0; left &= left - 1) {
            const int source = __ffs(static_cast<int>(left)) - 1;
            if ((__shfl_sync(kAllLanes, lane_word, source) >> lane & 1u) != 0) {
                id_map[(base + source) * kWarpSize + lane] = id;
            }
        }
    }
}

// Measure area and bounding box of the segments. A warp reads kLoads times 32 pixels of a row; if all have the same id,
// one lane adds them to `measured`.
__global__ void __launch_bounds__(kThreads) merge_measure_kernel(
    Global<const int> id_map,                       // (H, W)
    const MergeScratch scratch, const int parts) {  // warps of a row
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    const int y = warp / parts, first_x = (warp - y * parts) * kLoads * kWarpSize;
    if (y >= scratch.height) {
        return;
    }
    const int64_t rows = static_cast<int64_t>(scratch.instances) + scratch.stuff_labels;
    const auto add = [&](int id, int area, int from_x, int end_x) {
        Global<int> entry = scratch.measured + (id - 1);
        atomicAdd(entry + 0, area);
        atomicMax(entry + rows, scratch.width - from_x);
        atomicMax(entry + 2 * rows, scratch.height - y);
        atomicMax(entry + 3 * rows, end_x);
        atomicMax(entry + 4 * rows, y + 1);
    };
    int ids[kLoads];
    bool all_same = true;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int x = first_x + i * kWarpSize + lane;
        ids[i] = x < scratch.width ? id_map[y * scratch.width + x] : 0;
    }
    const int front = __shfl_sync(kAllLanes, ids[0], 0);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        all_same &= ids[i] == front;
    }
    if (__all_sync(kAllLanes, all_same)) {
        if (front != 0 && lane == 0) {
            add(front, kLoads * kWarpSize, first_x, first_x + kLoads * kWarpSize);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int x = first_x + i * kWarpSize;
        for_each_value(ids[i], [&](int id, unsigned lanes) {
            if (id != 0) {
                add(id, __popc(lanes), x + __ffs(static_cast<int>(lanes)) - 1,
                    x + kWarpSize - __clz(static_cast<int>(lanes)));
            }
        });
    }
}

__global__ void __launch_bounds__(kThreads) merge_table_kernel(
    Global<const double> scores,    // (K)
    Global<const int64_t> labels,   // (K)
    Global<int64_t> table,          // (K + S, kMergeColumns)
    Global<float> segment_scores,   // (K + S)
    Global<int64_t> segment_count,  // (1)
    const MergeScratch scratch) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const int64_t rows = static_cast<int64_t>(scratch.instances) + scratch.stuff_labels;
    const int segments = scratch.segments[0];
    if (row == 0) {
        segment_count[0] = segments;
    }
    if (row >= rows) {
        return;
    }
    int64_t values[kMergeColumns] = {-1, 0, -1, 0, 0, 0, 0, 0};
    float score = 0.0f;
    if (row < segments) {
        const int64_t source = scratch.segment_source[row];
        const bool is_thing = source < scratch.instances;
        const int64_t instance = is_thing ? scratch.order[source] : -1;
        const int64_t x1 = scratch.width - scratch.measured[rows + row];
        const int64_t y1 = scratch.height - scratch.measured[2 * rows + row];
        values[kMergeLabel] = is_thing ? labels[instance] : source - scratch.instances;
        values[kMergeIsThing] = is_thing;
        values[kMergeInstance] = instance;
        values[kMergeArea] = scratch.measured[row];
        values[kMergeX] = x1;
        values[kMergeY] = y1;
        values[kMergeWidth] = scratch.measured[3 * rows + row] - x1;
        values[kMergeHeight] = scratch.measured[4 * rows + row] - y1;
        score = is_thing ? static_cast<float>(scores[instance]) : 0.0f;
    }
#pragma unroll
    for (int column = 0; column < kMergeColumns; ++column) {
        table[row * kMergeColumns + column] = values[column];
    }
    segment_scores[row] = score;
}

}  // namespace
}  // namespace spatialflow
