// SPDX-License-Identifier: Apache-2.0
//
// Kernels of the panoptic merge for stuff labels and boxes, in this order:
//
//   ignore   mark the stuff labels to ignore
//   count    free pixels of every stuff label: those that no kept instance uses
//   label    (one warp) ids of the stuff labels with enough free pixels
//   void     (with boxes) one bit for every void pixel
//   fill     (with boxes, one block) for each box: count its void pixels, fill them or not
#pragma once

#include "cuda/panoptic_merge.cuh"

namespace spatialflow {
namespace {

constexpr int kIgnoredPerLaunch = 32;

// Stuff labels to ignore, up to kIgnoredPerLaunch at a time.
struct IgnoredLabels {
    int64_t labels[kIgnoredPerLaunch];
    int count;
};

__global__ void merge_ignore_kernel(const MergeScratch scratch, const IgnoredLabels ignored) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < ignored.count && ignored.labels[i] >= 0 && ignored.labels[i] < scratch.stuff_labels) {
        scratch.ignored[ignored.labels[i]] = 1;
    }
}

// Load the stuff label of this lane's pixel in each of kLoads words from `word` on. It is -1 for pixels outside the
// image, pixels of instances, and labels out of range.
template <typename label_t>
__device__ __forceinline__ void load_stuff(
    Global<const label_t> stuff, const MergeScratch& scratch, int word, int (&labels)[kLoads]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    label_t values[kLoads];
    unsigned used[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int pixel = (word + i) * kWarpSize + lane;
        used[i] = ~0u;
        if (pixel < scratch.pixels) {
            values[i] = stuff[pixel];
            used[i] = scratch.used[word + i];
        }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        labels[i] = -1;
        if ((used[i] >> lane & 1u) == 0) {
            const int64_t value = static_cast<int64_t>(values[i]);
            labels[i] = value >= 0 && value < scratch.stuff_labels ? static_cast<int>(value) : -1;
        }
    }
}

// First of the kLoads words that the warp processes.
__device__ __forceinline__ int first_word_of_warp() {
    return (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize) * kLoads;
}

template <typename label_t>
__global__ void __launch_bounds__(kThreads) merge_count_kernel(
    Global<const label_t> stuff,  // (H, W)
    const MergeScratch scratch) {
    int labels[kLoads];
    load_stuff(stuff, scratch, first_word_of_warp(), labels);
    int same = labels[0];
    bool all_same = true;
#pragma unroll
    for (int i = 1; i < kLoads; ++i) {
        all_same &= labels[i] == same;
    }
    if (__all_sync(kAllLanes, all_same)) {
        for_each_value(same, [&](int label, unsigned lanes) {
            if (label >= 0) {
                atomicAdd(scratch.stuff_area + label, kLoads * __popc(lanes));
            }
        });
        return;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        for_each_value(labels[i], [&](int label, unsigned lanes) {
            if (label >= 0) {
                atomicAdd(scratch.stuff_area + label, __popc(lanes));
            }
        });
    }
}

__global__ void __launch_bounds__(kWarpSize)
    merge_label_kernel(const MergeScratch scratch, const MergeOptions options) {
    const int lane = static_cast<int>(threadIdx.x);
    int segments = scratch.segments[0];
    for (int64_t first = 0; first < scratch.stuff_labels; first += kWarpSize) {
        const int64_t label = first + lane;
        bool kept = false;
        if (label < scratch.stuff_labels) {
            const int area = scratch.stuff_area[label];
            kept = scratch.ignored[label] == 0 && area > 0 && area >= options.stuff_area_threshold;
        }
        const unsigned all = __ballot_sync(kAllLanes, kept);
        if (kept) {
            const int index = segments + __popc(all & ((1u << lane) - 1u));
            scratch.stuff_id[label] = index + 1;
            scratch.segment_source[index] = static_cast<int>(scratch.instances + label);
        }
        segments += __popc(all);
    }
    __syncwarp();  // all lanes have read the previous count
    if (lane == 0) {
        scratch.segments[0] = segments;
    }
}

template <typename label_t>
__global__ void __launch_bounds__(kThreads) merge_void_kernel(
    Global<const label_t> stuff,  // (H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, first = first_word_of_warp();
    int labels[kLoads];
    load_stuff(stuff, scratch, first, labels);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int word = first + i, pixel = word * kWarpSize + lane;
        const bool is_void = pixel < scratch.pixels && (labels[i] < 0 || scratch.stuff_id[labels[i]] == 0);
        const unsigned void_pixels = __ballot_sync(kAllLanes, is_void);
        if (lane == 0 && word < scratch.words) {
            scratch.void_pixels[word] = void_pixels & ~static_cast<unsigned>(scratch.used[word]);
        }
    }
}

// Bits of `word` for the pixels [begin, end), of which at least one is in the word.
__device__ __forceinline__ unsigned pixels_in_word(int word, int begin, int end) {
    const int from = begin - word * kWarpSize, to = end - word * kWarpSize;
    return (from <= 0 ? ~0u : ~0u << from) & (to >= kWarpSize ? ~0u : ~(~0u << to));
}

// Words of an image's bits that contain pixels of a box, distributed over the threads of the block.
struct BoxWords {
    int x1, y1, x2, y2, image_width;
    int most_words;       // maximum in a row of the box
    int shift, row_step;  // 1 << shift threads for the words of a row; rows that the block processes at once

    __device__ __forceinline__ BoxWords(const Vec<int, 4>& box, int image_width)
        : x1(box[0]), y1(box[1]), x2(box[2]), y2(box[3]), image_width(image_width) {
        most_words = (x2 - x1 + kWarpSize - 2) / kWarpSize + 1;
        const int row_shift = kWarpSize - __clz(most_words - 1);
        shift = row_shift < kGreedyShift ? row_shift : kGreedyShift;
        row_step = kGreedyThreads >> shift;
    }

    // Call body(word, read(word), pixels of the word in the box). kLoads words are read before the first call.
    template <typename Read, typename Body>
    __device__ __forceinline__ void for_each(const Read& read, const Body& body) const {
        const int thread = static_cast<int>(threadIdx.x), stride = 1 << shift;
        for (int column = thread & (stride - 1); column < most_words; column += stride) {
            for (int first_y = y1 + (thread >> shift); first_y < y2; first_y += kLoads * row_step) {
                for_row_group(column, first_y, read, body);
            }
        }
    }

private:
    template <typename Read, typename Body>
    __device__ __forceinline__ void for_row_group(int column, int first_y, const Read& read, const Body& body) const {
        int begin[kLoads], word[kLoads];
        unsigned value[kLoads];
        bool inside[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int y = first_y + i * row_step;
            begin[i] = (y < y2 ? y : y1) * image_width + x1;
            word[i] = begin[i] / kWarpSize + column;
            inside[i] = y < y2 && word[i] * kWarpSize < begin[i] + (x2 - x1);
            value[i] = 0;
            if (inside[i]) {
                value[i] = read(word[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if (inside[i]) {
                body(word[i], value[i], pixels_in_word(word[i], begin[i], begin[i] + (x2 - x1)));
            }
        }
    }
};

// Fill boxes in score order. If enough pixels of a box are void, its void pixels are added to the segment of its
// instance. If the instance was dropped, they become a new segment. Return the number of segments.
template <typename VoidPixels>
__device__ __forceinline__ int merge_fill(
    const MergeScratch& scratch, const MergeOptions& options, VoidPixels void_pixels, Shared<unsigned> sums) {
    const int thread = static_cast<int>(threadIdx.x), candidates = scratch.candidates[0];
    const auto box_at = [&](int c) { return c < candidates ? load_vector<4>(scratch.boxes + 4 * c) : Vec<int, 4>{}; };
    int segments = scratch.segments[0], parity = 0;
    Vec<int, 4> next_box = box_at(0);
    int next_id = candidates > 0 ? scratch.id_of[0] : 0;
    for (int c = 0; c < candidates; ++c) {
        const Vec<int, 4> box = next_box;
        int id = next_id;
        next_box = box_at(c + 1);
        next_id = c + 1 < candidates ? scratch.id_of[c + 1] : 0;
        const int area = (box[2] - box[0]) * (box[3] - box[1]);
        if (area == 0) {
            continue;
        }
        const BoxWords words(box, scratch.width);
        int still_void = 0;
        words.for_each(
            [&](int word) -> unsigned { return void_pixels[word]; },
            [&](int, unsigned bits, unsigned pixels) { still_void += __popc(bits & pixels); });
        still_void = block_sum(still_void, sums + parity * kGreedyWarps);
        parity ^= 1;
        if (!merge_box_is_filled(still_void, area, options.box_overlap_threshold)) {
            continue;
        }
        if (id == 0) {
            id = ++segments;
            if (thread == 0) {
                scratch.segment_source[segments - 1] = c;
            }
        }
        if (thread == 0) {
            scratch.fill_id[c] = id;
        }
        words.for_each(
            [](int) { return 0u; },
            [&](int word, unsigned, unsigned pixels) {
                atomicAnd(void_pixels + word, ~pixels);
            });  // rows may share a word
        __syncthreads();
    }
    return segments;
}

template <bool kInShared>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    merge_fill_kernel(const MergeScratch scratch, const MergeOptions options) {
    SPATIALFLOW_SHARED(unsigned, sums, 2 * kGreedyWarps);
    int segments;
    if constexpr (kInShared) {
        SPATIALFLOW_DYNAMIC_SHARED(unsigned, void_pixels);
        copy_bits(void_pixels, scratch.void_pixels, scratch.words);
        __syncthreads();
        segments = merge_fill(scratch, options, void_pixels, sums);
        __syncthreads();
        copy_bits(scratch.void_pixels, void_pixels, scratch.words);
    } else {
        segments = merge_fill(scratch, options, scratch.void_pixels, sums);
        __syncthreads();  // all threads have read the previous count
    }
    if (threadIdx.x == 0) {
        scratch.segments[0] = segments;
    }
}

}  // namespace
}  // namespace spatialflow
