// SPDX-License-Identifier: Apache-2.0
//
// Panoptic merge on CUDA: instances, a stuff label map and boxes to one id map and a table of segments, without a word
// to the host. The decisions are those of common/panoptic_merge.h, in an order that is sequential by nature: who is
// kept depends on all that were kept before. Two kernels of one block take them; all else is spread over the device.
//
//   order    rank of every instance by score; those below the threshold stay out
//   pack     masks to one bit per pixel, in score order, with their areas and the words they span
//   greedy   (one block) instance by instance: pixels already used, keep or drop, use them
//   count    free pixels of every stuff label
//   label    (one warp) ids of the stuff labels with enough of them
//   paint    the id map, and one bit for every pixel that is void
//   fill     (one block) box by box: void pixels in it, fill them or not
//   measure  area and extent of every segment in the id map
//   table    the rows of the result
//
// Rows of pixels are whole words of 32. Counts are integers, so neither the order of atomics nor of blocks shows. All
// scratch is one tensor, and what starts with a value starts with zero: one allocation, one fill. Extents are therefore
// kept as maxima, a lower end by its distance from the far side.
//
// Floor (H100, 3.0 TB/s), 100 masks of 800 x 1333: 107 MB of masks read: 36 us; stuff map and id map 8 MB: 3 us. The
// greedy block reads the bits of each instance's own rows twice, about 20 KB: about 1 us an instance.
#include "common/panoptic_merge.h"

#include "cuda/workspace.h"
#include "ops/panoptic_merge.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kGreedyThreads = 1024;
constexpr int kGreedyWarps = kGreedyThreads / kWarpSize;
constexpr int kIgnoredPerLaunch = 32;

// Sizes, and scratch that all kernels share. Instances are numbered by rank: c-th best score.
struct MergeScratch {
    int64_t instances, height, width, words;  // words per row
    int64_t stuff_labels;
    // Zero on entry.
    Global<int> entered;       // (1), how many take part
    Global<int> segments;      // (1), ids given
    Global<int> area;          // (K), pixels of the mask
    Global<int> words_from;    // (K), words from the first that is not zero to the end of the image
    Global<int> end_word;      // (K), one beyond the last word that is not zero
    Global<int> id_of;         // (K), 0: dropped
    Global<int> stuff_area;    // (S)
    Global<int> stuff_id;      // (S), 0: none
    Global<int> ignored;       // (S)
    Global<int> measured;      // (5, K + S), by id - 1: area, W - x1, H - y1, x2, y2, ends not included
    Global<unsigned> used;     // (H * words)
    // Written before it is read.
    Global<int> order;           // (K), instance of rank c
    Global<int> segment_source;  // (K + S), by id - 1: rank of an instance, or K + stuff label
    Global<unsigned> open;       // (H * words), void pixels
    Global<unsigned> bits;       // (K, H * words); after greedy: the pixels that became the instance's own
};

struct MergeOptions {
    double score_threshold, overlap_threshold, box_threshold;
    int64_t stuff_area_limit;
};

// Stuff labels to ignore, some at a time.
struct IgnoredLabels {
    int64_t labels[kIgnoredPerLaunch];
    int count;
};

// ---- device ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) merge_order_kernel(
    Global<const double> scores,  // (K)
    const MergeScratch scratch, const MergeOptions options) {
    const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (k >= scratch.instances) {
        return;
    }
    const double score = scores[k];
    if (!merge_score_enters(score, options.score_threshold)) {
        return;
    }
    int rank = 0;
    for (int64_t other = 0; other < scratch.instances; ++other) {
        const double theirs = scores[other];
        rank += merge_score_enters(theirs, options.score_threshold) &&
                (theirs > score || (theirs == score && other < k));
    }
    scratch.order[rank] = static_cast<int>(k);
    atomicAdd(scratch.entered + 0, 1);
}

__global__ void merge_ignore_kernel(const MergeScratch scratch, const IgnoredLabels ignored) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < ignored.count && ignored.labels[i] >= 0 && ignored.labels[i] < scratch.stuff_labels) {
        scratch.ignored[ignored.labels[i]] = 1;
    }
}

// A warp per word: lane l reads pixel l.
__global__ void __launch_bounds__(kThreads) merge_pack_kernel(
    Global<const uint8_t> masks,  // (K, H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t c = blockIdx.y;
    if (c >= scratch.entered[0]) {
        return;
    }
    const int64_t image_words = scratch.height * scratch.words;
    const int64_t mask = scratch.order[c] * scratch.height * scratch.width;
    int area = 0, from = 0, end = 0;
    for (int64_t word = blockIdx.x * (kThreads / kWarpSize) + static_cast<int>(threadIdx.x) / kWarpSize;
         word < image_words; word += static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize)) {
        const int64_t y = word / scratch.words, x = word % scratch.words * kWarpSize + lane;
        const unsigned bits = __ballot_sync(
            kAllLanes, x < scratch.width && masks[mask + y * scratch.width + x] != 0);
        if (lane == 0) {
            scratch.bits[c * image_words + word] = bits;
        }
        if (bits != 0) {
            area += __popc(bits);
            from = from != 0 ? from : static_cast<int>(image_words - word);
            end = static_cast<int>(word) + 1;
        }
    }
    if (lane == 0 && area != 0) {
        atomicAdd(scratch.area + c, area);
        atomicMax(scratch.words_from + c, from);
        atomicMax(scratch.end_word + c, end);
    }
}

// Sum over the block, the same in all threads. Two barriers, the second so that `sums` can be used again.
__device__ __forceinline__ int block_sum(int value, Shared<int> sums) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, step);
    }
    if (threadIdx.x % kWarpSize == 0) {
        sums[threadIdx.x / kWarpSize] = value;
    }
    __syncthreads();
    int total = sums[threadIdx.x % kWarpSize];
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        total += __shfl_xor_sync(kAllLanes, total, step);
    }
    __syncthreads();
    return total;
}

// Keeps or drops the instances in order. Of a kept one only the bits no earlier one has stay. One block in all: to
// leave registers for a second one on its multiprocessor, the compiler would spill.
__global__ void __launch_bounds__(kGreedyThreads, 1) merge_greedy_kernel(
    const MergeScratch scratch, const MergeOptions options) {
    SPATIALFLOW_SHARED(int, sums, kGreedyWarps);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t image_words = scratch.height * scratch.words;
    const int entered = scratch.entered[0];
    int segments = 0;
    for (int c = 0; c < entered; ++c) {
        Global<unsigned> mask = scratch.bits + c * image_words;
        const int area = scratch.area[c];
        const int64_t first = image_words - scratch.words_from[c], end = scratch.end_word[c];  // 0 without pixels
        int overlap = 0;
        for (int64_t word = first + thread; word < end; word += kGreedyThreads) {
            overlap += __popc(mask[word] & scratch.used[word]);
        }
        overlap = block_sum(overlap, sums);
        // With a threshold of 1 or more an instance may pass without a pixel of its own; no segment is empty.
        if (!merge_instance_is_kept(overlap, area, options.overlap_threshold) || overlap == area) {
            continue;
        }
        for (int64_t word = first + thread; word < end; word += kGreedyThreads) {
            const unsigned before = scratch.used[word], own = mask[word];
            mask[word] = own & ~before;
            scratch.used[word] = before | own;
        }
        if (thread == 0) {
            scratch.id_of[c] = segments + 1;
            scratch.segment_source[segments] = c;
        }
        ++segments;
        __syncthreads();  // `used` is read by other threads for the next instance
    }
    if (thread == 0) {
        scratch.segments[0] = segments;
    }
}

template <typename label_t>
__global__ void __launch_bounds__(kThreads) merge_count_kernel(
    Global<const label_t> stuff,  // (H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t image_words = scratch.height * scratch.words;
    int64_t pending_label = -1;  // of this lane, with its pixels not yet added
    int pending = 0;
    for (int64_t word = blockIdx.x * (kThreads / kWarpSize) + static_cast<int>(threadIdx.x) / kWarpSize;
         word < image_words; word += static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize)) {
        const int64_t y = word / scratch.words, x = word % scratch.words * kWarpSize + lane;
        if (x >= scratch.width || (scratch.used[word] >> lane & 1u) != 0) {
            continue;
        }
        const int64_t label = static_cast<int64_t>(stuff[y * scratch.width + x]);
        if (label != pending_label) {
            if (pending != 0) {
                atomicAdd(scratch.stuff_area + pending_label, pending);
            }
            pending_label = label;
            pending = 0;
        }
        pending += label >= 0 && label < scratch.stuff_labels;
    }
    if (pending != 0) {
        atomicAdd(scratch.stuff_area + pending_label, pending);
    }
}

__global__ void __launch_bounds__(kWarpSize) merge_label_kernel(
    const MergeScratch scratch, const MergeOptions options) {
    const int lane = static_cast<int>(threadIdx.x);
    int segments = scratch.segments[0];
    for (int64_t first = 0; first < scratch.stuff_labels; first += kWarpSize) {
        const int64_t label = first + lane;
        bool kept = false;
        if (label < scratch.stuff_labels) {
            const int area = scratch.stuff_area[label];
            kept = scratch.ignored[label] == 0 && area > 0 && area >= options.stuff_area_limit;
        }
        const unsigned all = __ballot_sync(kAllLanes, kept);
        if (kept) {
            const int index = segments + __popc(all & ((1u << lane) - 1u));
            scratch.stuff_id[label] = index + 1;
            scratch.segment_source[index] = static_cast<int>(scratch.instances + label);
        }
        segments += __popc(all);
    }
    __syncwarp();  // every lane has read the old number
    if (lane == 0) {
        scratch.segments[0] = segments;
    }
}

template <typename label_t>
__global__ void __launch_bounds__(kThreads) merge_paint_kernel(
    Global<const label_t> stuff,  // (H, W)
    Global<int> id_map,           // (H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t image_words = scratch.height * scratch.words;
    const int64_t word = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) +
                         static_cast<int>(threadIdx.x) / kWarpSize;
    if (word >= image_words) {
        return;
    }
    const int64_t y = word / scratch.words, x = word % scratch.words * kWarpSize + lane;
    const bool inside = x < scratch.width;
    int id = 0;
    if ((scratch.used[word] >> lane & 1u) != 0) {
        const int entered = scratch.entered[0];
        for (int c = 0; c < entered && id == 0; ++c) {
            const int of_instance = scratch.id_of[c];
            if (of_instance != 0 && (scratch.bits[c * image_words + word] >> lane & 1u) != 0) {
                id = of_instance;
            }
        }
    } else if (inside) {
        const int64_t label = static_cast<int64_t>(stuff[y * scratch.width + x]);
        id = label >= 0 && label < scratch.stuff_labels ? scratch.stuff_id[label] : 0;
    }
    if (inside) {
        id_map[y * scratch.width + x] = id;
    }
    const unsigned open = __ballot_sync(kAllLanes, inside && id == 0);
    if (lane == 0) {
        scratch.open[word] = open;
    }
}

// Bits of `word` of a row that lie in columns [x1, x2).
__device__ __forceinline__ unsigned columns_in_word(int64_t word, int64_t x1, int64_t x2) {
    const int64_t begin = x1 - word * kWarpSize, end = x2 - word * kWarpSize;
    const unsigned from = begin <= 0 ? ~0u : begin >= kWarpSize ? 0u : ~0u << begin;
    const unsigned to = end >= kWarpSize ? ~0u : end <= 0 ? 0u : ~(~0u << end);
    return from & to;
}

// Box by box in score order: a box that is void enough gives its void pixels to its own segment, or to a new one.
__global__ void __launch_bounds__(kGreedyThreads) merge_fill_kernel(
    Global<const double> boxes,  // (K, 4)
    Global<int> id_map,          // (H, W)
    const MergeScratch scratch, const MergeOptions options) {
    SPATIALFLOW_SHARED(int, sums, kGreedyWarps);
    const int thread = static_cast<int>(threadIdx.x);
    const int entered = scratch.entered[0];
    int segments = scratch.segments[0];
    for (int c = 0; c < entered; ++c) {
        const int64_t instance = scratch.order[c];
        const double corners[4] = {boxes[instance * 4], boxes[instance * 4 + 1], boxes[instance * 4 + 2],
                                   boxes[instance * 4 + 3]};
        const PixelBox box = merge_pixel_box(corners, scratch.height, scratch.width);
        if (box.area() == 0) {
            continue;
        }
        const int64_t first = box.x1 / kWarpSize, count = (box.x2 - 1) / kWarpSize + 1 - first;
        const int64_t total = count * (box.y2 - box.y1);
        int still_void = 0;
        for (int64_t i = thread; i < total; i += kGreedyThreads) {
            const int64_t word = first + i % count;
            const unsigned open = scratch.open[(box.y1 + i / count) * scratch.words + word];
            still_void += __popc(open & columns_in_word(word, box.x1, box.x2));
        }
        still_void = block_sum(still_void, sums);
        if (!merge_box_is_filled(still_void, box.area(), options.box_threshold)) {
            continue;
        }
        int id = scratch.id_of[c];
        if (id == 0) {
            id = ++segments;
            if (thread == 0) {
                scratch.segment_source[segments - 1] = c;
            }
        }
        for (int64_t i = thread; i < total; i += kGreedyThreads) {
            const int64_t word = first + i % count, y = box.y1 + i / count;
            const unsigned open = scratch.open[y * scratch.words + word];
            const unsigned filled = open & columns_in_word(word, box.x1, box.x2);
            for (unsigned left = filled; left != 0; left &= left - 1) {
                id_map[y * scratch.width + word * kWarpSize + __ffs(static_cast<int>(left)) - 1] = id;
            }
            if (filled != 0) {
                scratch.open[y * scratch.words + word] = open ^ filled;
            }
        }
        __syncthreads();  // `open` is read by other threads for the next box
    }
    if (thread == 0) {
        scratch.segments[0] = segments;
    }
}

// A warp per row: a lane adds up the pixels of one id as long as it does not change.
__global__ void __launch_bounds__(kThreads) merge_measure_kernel(
    Global<const int> id_map,  // (H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t y = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) +
                      static_cast<int>(threadIdx.x) / kWarpSize;
    if (y >= scratch.height) {
        return;
    }
    const int64_t rows = scratch.instances + scratch.stuff_labels;
    int id = 0, area = 0, from_x = 0, end_x = 0;
    for (int64_t x = lane; x < scratch.width + kWarpSize; x += kWarpSize) {
        const int next = x < scratch.width ? id_map[y * scratch.width + x] : 0;
        if (next != id) {
            if (id != 0) {
                Global<int> entry = scratch.measured + (id - 1);
                atomicAdd(entry + 0, area);
                atomicMax(entry + rows, from_x);
                atomicMax(entry + 2 * rows, static_cast<int>(scratch.height - y));
                atomicMax(entry + 3 * rows, end_x);
                atomicMax(entry + 4 * rows, static_cast<int>(y + 1));
            }
            id = next;
            area = 0;
            from_x = static_cast<int>(scratch.width - x);
        }
        ++area;
        end_x = static_cast<int>(x) + 1;
    }
}

__global__ void __launch_bounds__(kThreads) merge_table_kernel(
    Global<const double> scores,   // (K)
    Global<const int64_t> labels,  // (K)
    Global<int64_t> table,         // (K + S, kMergeColumns)
    Global<float> segment_scores,  // (K + S)
    Global<int64_t> segment_count,  // (1)
    const MergeScratch scratch) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const int64_t rows = scratch.instances + scratch.stuff_labels;
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

// ---- host --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> panoptic_merge_cuda(
    const Tensor& masks, const Tensor& scores, const Tensor& labels, std::optional<Tensor> boxes, const Tensor& stuff,
    int64_t stuff_labels, std::vector<int64_t> ignored_stuff, double score_threshold, double overlap_threshold,
    int64_t stuff_area_limit, double box_threshold) {
    const char* op = "panoptic_merge";
    check_panoptic_merge(masks, scores, labels, boxes, stuff, stuff_labels, score_threshold, overlap_threshold,
                         box_threshold);
    const DeviceScope device(masks);
    const int64_t count = masks.size(0), height = masks.size(1), width = masks.size(2), rows = count + stuff_labels;
    const int64_t words = ceil_div(width, kWarpSize), image_words = height * words;
    check(image_words <= 0x7fffffff / kWarpSize, op, ": masks must have fewer than 2^31 pixels on CUDA, got ", height,
          " x ", width);
    check(count <= 65535, op, ": at most 65535 masks on CUDA, got ", count);
    Tensor id_map = empty_like_sized(masks, {height, width}, ScalarType::Int);
    Tensor table = empty_like_sized(masks, {rows, kMergeColumns}, ScalarType::Long);
    Tensor segment_scores = empty_like_sized(masks, {rows}, ScalarType::Float);
    Tensor segment_count = empty_like_sized(masks, {}, ScalarType::Long);

    const Tensor mask_values = to_contiguous(masks), score_values = contiguous_as(scores, ScalarType::Double);
    const Tensor label_values = contiguous_as(labels, ScalarType::Long);

    WorkspaceLayout layout;
    const auto entered = layout.add<int>(1), segments = layout.add<int>(1), area = layout.add<int>(count);
    const auto words_from = layout.add<int>(count), end_word = layout.add<int>(count);
    const auto id_of = layout.add<int>(count), stuff_area = layout.add<int>(stuff_labels);
    const auto stuff_id = layout.add<int>(stuff_labels), ignored = layout.add<int>(stuff_labels);
    const auto measured = layout.add<int>(5 * rows);
    const auto used = layout.add<unsigned>(image_words);
    const int64_t zeros = layout.words;
    const auto order = layout.add<int>(count), segment_source = layout.add<int>(rows);
    const auto open = layout.add<unsigned>(image_words), bits = layout.add<unsigned>(count * image_words);
    const Workspace workspace(layout, masks);
    clear_words(workspace, zeros, device.stream());
    const MergeScratch scratch{
        count, height, width, words, stuff_labels, workspace[entered], workspace[segments], workspace[area],
        workspace[words_from], workspace[end_word], workspace[id_of], workspace[stuff_area], workspace[stuff_id],
        workspace[ignored], workspace[measured], workspace[used], workspace[order], workspace[segment_source],
        workspace[open], workspace[bits]};
    const MergeOptions options{score_threshold, overlap_threshold, box_threshold, stuff_area_limit};
    const Stream stream = device.stream();
    const dim3 threads(kThreads);
    const auto blocks = [&](int64_t items, int64_t per_block) {
        return dim3(grid_size(op, ceil_div(items, per_block)));
    };
    if (id_map.numel() != 0) {
        constexpr int64_t kWarps = kThreads / kWarpSize;
        launch<merge_order_kernel>(
            blocks(count, kThreads), threads, 0, stream, data<double>(score_values), scratch, options);
        for (size_t first = 0; first < ignored_stuff.size(); first += kIgnoredPerLaunch) {
            IgnoredLabels some{};
            for (; some.count < kIgnoredPerLaunch && first + some.count < ignored_stuff.size(); ++some.count) {
                some.labels[some.count] = ignored_stuff[first + some.count];
            }
            launch<merge_ignore_kernel>(dim3(1), dim3(kIgnoredPerLaunch), 0, stream, scratch, some);
        }
        // Sixteen words a warp: fewer atomics, and still enough warps.
        const dim3 pack_grid(grid_size(op, ceil_div(image_words, 16 * kWarps)), static_cast<unsigned>(count));
        launch<merge_pack_kernel>(pack_grid, threads, 0, stream, data<uint8_t>(mask_values), scratch);
        launch<merge_greedy_kernel>(dim3(1), dim3(kGreedyThreads), 0, stream, scratch, options);
        const auto run_stuff = [&](auto zero, const Tensor& values) {
            using label_t = decltype(zero);
            launch<merge_count_kernel<label_t>>(
                blocks(image_words, 16 * kWarps), threads, 0, stream, data<label_t>(values), scratch);
            launch<merge_label_kernel>(dim3(1), dim3(kWarpSize), 0, stream, scratch, options);
            launch<merge_paint_kernel<label_t>>(
                blocks(image_words, kWarps), threads, 0, stream, data<label_t>(values), mutable_data<int>(id_map),
                scratch);
        };
        switch (stuff.scalar_type()) {
            case ScalarType::Byte: run_stuff(uint8_t{}, to_contiguous(stuff)); break;
            case ScalarType::Int: run_stuff(int32_t{}, to_contiguous(stuff)); break;
            default: run_stuff(int64_t{}, contiguous_as(stuff, ScalarType::Long));
        }
        if (boxes && count != 0) {
            const Tensor box_values = contiguous_as(*boxes, ScalarType::Double);
            launch<merge_fill_kernel>(
                dim3(1), dim3(kGreedyThreads), 0, stream, data<double>(box_values), mutable_data<int>(id_map), scratch,
                options);
        }
        launch<merge_measure_kernel>(blocks(height, kWarps), threads, 0, stream, data<int>(id_map), scratch);
    }
    launch<merge_table_kernel>(
        blocks(rows > 0 ? rows : 1, kThreads), threads, 0, stream, data<double>(score_values),
        data<int64_t>(label_values), mutable_data<int64_t>(table), mutable_data<float>(segment_scores),
        mutable_data<int64_t>(segment_count), scratch);
    return {id_map, table, segment_scores, segment_count};
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("panoptic_merge", TORCH_BOX(&spatialflow::panoptic_merge_cuda));
}
