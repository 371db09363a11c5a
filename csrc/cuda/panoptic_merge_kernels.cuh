// SPDX-License-Identifier: Apache-2.0
//
// Kernels of the panoptic merge; panoptic_merge.cu launches them in this order:
//
//   order    rank of every instance by score, and its box in pixels; instances below the threshold are omitted
//   pack     masks to one bit per pixel, in score order, with their areas and ranges of nonzero words
//   greedy   (one block) for each instance: count the pixels already used, keep or drop it, mark its pixels
//   count    free pixels of every stuff label
//   label    (one warp) ids of the stuff labels with enough free pixels
//   open     (with boxes) one bit for every void pixel
//   fill     (with boxes, one block) for each box: count its void pixels, fill them or not
//   paint    the id map: stuff and filled boxes, then instances
//   measure  area and bounding box of every segment in the id map
//   table    the rows of the result
#pragma once

#include "common/panoptic_merge.h"
#include "cuda/workspace.cuh"
#include "ops/panoptic_merge.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGreedyShift = 9;
constexpr int kGreedyThreads = 1 << kGreedyShift;
constexpr int kGreedyWarps = kGreedyThreads / kWarpSize;
constexpr int kGroup = 4;       // words of a 16-byte access; images are padded to whole groups
constexpr int kHeldGroups = 6;  // groups of an instance that a thread of the greedy block keeps in registers
constexpr int kLoads = 4;       // loads of a lane in flight
constexpr int kIgnoredPerLaunch = 32;

using Words = Vec<unsigned, kGroup>;

// Sizes, and scratch memory that all kernels share. Instances are numbered by rank c, in descending order of scores.
struct MergeScratch {
    int instances, stuff_labels, height, width, pixels;
    int words;  // in the bits of an image
    // Zero before the first kernel.
    Global<int> candidates;  // (1), instances at or above the score threshold
    Global<int> segments;    // (1), ids assigned
    Global<int> area;        // (K), pixels of the mask
    Global<int> words_from;  // (K), words from the first nonzero one to the end of the image
    Global<int> end_word;    // (K), end of the nonzero words
    Global<int> id_of;       // (K), 0: not kept
    Global<int> fill_id;     // (K), id that fills the box; 0: not filled
    Global<int> stuff_area;  // (S)
    Global<int> stuff_id;    // (S), 0: not kept
    Global<int> ignored;     // (S), nonzero: ignored
    Global<int> measured;    // (5, K + S), by id - 1: area, W - x1, H - y1, x2, y2; x2, y2 exclusive
    Global<unsigned> used;   // (words), pixels of kept instances
    // Written before they are read.
    Global<int> order;           // (K), instance of rank c
    Global<int> boxes;           // (K, 4), pixels
    Global<int> segment_source;  // (K + S), by id - 1: rank of an instance, or K + stuff label
    Global<unsigned> open;       // (words), void pixels; after fill: those still void
    Global<unsigned> bits;       // (K, words); after greedy, for kept instances: the pixels assigned to them

    __device__ __forceinline__ Global<unsigned> bits_of(int c) const { return bits + static_cast<int64_t>(c) * words; }
};

struct MergeOptions {
    double score_threshold, overlap_threshold, box_overlap_threshold;
    int64_t stuff_area_threshold;
};

// Stuff labels to ignore, up to kIgnoredPerLaunch at a time.
struct IgnoredLabels {
    int64_t labels[kIgnoredPerLaunch];
    int count;
};

__global__ void __launch_bounds__(kThreads) merge_order_kernel(
    Global<const double> scores,  // (K)
    Global<const double> boxes,   // (K, 4) or null
    const MergeScratch scratch, const MergeOptions options) {
    const int k = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (k >= scratch.instances) {
        return;
    }
    const double score = scores[k];
    if (!merge_is_candidate(score, options.score_threshold)) {
        return;
    }
    int rank = 0;
    for (int other = 0; other < scratch.instances; ++other) {
        const double theirs = scores[other];
        rank +=
            merge_is_candidate(theirs, options.score_threshold) && (theirs > score || (theirs == score && other < k));
    }
    scratch.order[rank] = k;
    atomicAdd(scratch.candidates + 0, 1);
    if (boxes) {
        const int64_t first = static_cast<int64_t>(k) * 4;
        const double corners[4] = {boxes[first], boxes[first + 1], boxes[first + 2], boxes[first + 3]};
        const PixelBox box = merge_pixel_box(corners, scratch.height, scratch.width);
        Vec<int, 4> edges = {
            {static_cast<int>(box.x1), static_cast<int>(box.y1), static_cast<int>(box.x2), static_cast<int>(box.y2)}};
        if (box.area() == 0) {
            edges = {};
        }
        store_vector(scratch.boxes + 4 * rank, edges);
    }
}

__global__ void merge_ignore_kernel(const MergeScratch scratch, const IgnoredLabels ignored) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < ignored.count && ignored.labels[i] >= 0 && ignored.labels[i] < scratch.stuff_labels) {
        scratch.ignored[ignored.labels[i]] = 1;
    }
}

// kPixels adjacent pixels of a mask, a byte each, as words: the compiler would wait for a vector of bytes and unpack
// it.
template <int kPixels>
struct PackedPixels {
    Vec<unsigned, kPixels / 4> words{};

    __device__ __forceinline__ void load(Global<const uint8_t> source) {
        words = load_vector<kPixels / 4>(pointer_cast<const unsigned>(source));
    }
    // One bit for every nonzero byte.
    __device__ __forceinline__ unsigned bits() const {
        unsigned result = 0;
#pragma unroll
        for (int i = 0; i < kPixels / 4; ++i) {
            const unsigned tops = (words[i] | ((words[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu)) & 0x80808080u;
            result |= ((tops >> 7) * 0x10204080u >> 28) << (4 * i);
        }
        return result;
    }
};

template <>
struct PackedPixels<1> {
    uint8_t value = 0;

    __device__ __forceinline__ void load(Global<const uint8_t> source) { value = source[0]; }
    __device__ __forceinline__ unsigned bits() const { return value != 0; }
};

// Pack the masks into bits. A lane reads kPixels adjacent pixels at a time.
template <int kPixels>
__global__ void __launch_bounds__(kThreads) merge_pack_kernel(
    Global<const uint8_t> masks,  // (K, H, W)
    const MergeScratch scratch) {
    constexpr int kLanes = kWarpSize / kPixels > 0 ? kWarpSize / kPixels : 1;  // lanes that share a word
    constexpr int kStep = kWarpSize * kPixels;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, c = static_cast<int>(blockIdx.y);
    if (c >= scratch.candidates[0]) {
        return;
    }
    Global<const uint8_t> mask = masks + static_cast<int64_t>(scratch.order[c]) * scratch.pixels;
    const int first =
        (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize) * kLoads * kStep +
        lane * kPixels;
    PackedPixels<kPixels> values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        if (first + i * kStep < scratch.pixels) {
            values[i].load(mask + (first + i * kStep));
        }
    }
    unsigned area = 0, from = 0, end = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        unsigned bits = values[i].bits() << (lane % kLanes * kPixels);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            bits |= __shfl_xor_sync(kAllLanes, bits, step);
        }
        const int word = (first + i * kStep) / kWarpSize;
        if (lane % kLanes == 0 && word < scratch.words) {
            scratch.bits_of(c)[word] = bits;
            if (bits != 0) {
                area += static_cast<unsigned>(__popc(bits));
                from = from != 0 ? from : static_cast<unsigned>(scratch.words - word);
                end = static_cast<unsigned>(word) + 1;
            }
        }
    }
    area = __reduce_add_sync(kAllLanes, area);
    from = __reduce_max_sync(kAllLanes, from);
    end = __reduce_max_sync(kAllLanes, end);
    if (lane == 0 && area != 0) {
        atomicAdd(scratch.area + c, static_cast<int>(area));
        atomicMax(scratch.words_from + c, static_cast<int>(from));
        atomicMax(scratch.end_word + c, static_cast<int>(end));
    }
}

// Sum over the block, returned in all threads, with one barrier. Consecutive calls must use different `sums`.
__device__ __forceinline__ int block_sum(int value, Shared<unsigned> sums) {
    const unsigned of_warp = __reduce_add_sync(kAllLanes, static_cast<unsigned>(value));
    if (threadIdx.x % kWarpSize == 0) {
        sums[threadIdx.x / kWarpSize] = of_warp;
    }
    __syncthreads();
    unsigned other = 0;
    if (threadIdx.x % kWarpSize < kGreedyWarps) {
        other = sums[threadIdx.x % kWarpSize];
    }
    return static_cast<int>(__reduce_add_sync(kAllLanes, other));
}

// Number of common bits. A full adder reduces four popc to three, since popc is the slowest instruction here.
__device__ __forceinline__ int common_pixels(const Words& a, const Words& b) {
    static_assert(kGroup == 4, "three words are added, the fourth is left");
    const unsigned x = a[0] & b[0], y = a[1] & b[1], z = a[2] & b[2], last = a[3] & b[3];
    const unsigned carry = (x & y) | (x & z) | (y & z);
    return __popc(x ^ y ^ z) + __popc(last) + 2 * __popc(carry);
}

__device__ __forceinline__ bool has_pixels(const Words& words) {
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// Area and range of nonzero words of an instance, as loaded, so that only their first use waits for the loads.
struct MergeSpan {
    int area = 0, words_from = 0, end_word = 0;

    // Zeros for `c` beyond the last candidate.
    __device__ __forceinline__ MergeSpan(const MergeScratch& scratch, int c, int candidates) {
        if (c < candidates) {
            area = scratch.area[c];
            words_from = scratch.words_from[c];
            end_word = scratch.end_word[c];
        }
    }
    // First group of this thread in the range. The groups of a thread have a stride of kGreedyThreads, equal for all
    // instances.
    __device__ __forceinline__ int first_of_thread(const MergeScratch& scratch) const {
        const int first = (scratch.words - words_from) / kGroup;
        const int start = first / kGreedyThreads * kGreedyThreads + static_cast<int>(threadIdx.x);
        return start < first ? start + kGreedyThreads : start;
    }
    __device__ __forceinline__ int end() const { return (end_word + kGroup - 1) / kGroup; }
};

struct HeldGroups {
    Words words[kHeldGroups];

    __device__ __forceinline__ HeldGroups(const MergeScratch& scratch, int c, const MergeSpan& span) {
        const int first = span.first_of_thread(scratch), end = span.end();
#pragma unroll
        for (int i = 0; i < kHeldGroups; ++i) {
            words[i] = {};
            const int group = first + i * kGreedyThreads;
            if (group < end) {
                words[i] = load_vector<kGroup>(scratch.bits_of(c) + kGroup * group);
            }
        }
    }
};

// Add a group of words of an instance to `used`, and keep in `mask` only the bits that no earlier instance uses.
template <typename Used>
__device__ __forceinline__ void use_group(Used used, Global<unsigned> mask, int group, const Words& words) {
    if (!has_pixels(words)) {
        return;
    }
    const Words before = load_vector<kGroup>(used + kGroup * group);
    Words all, left;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        all[i] = before[i] | words[i];
        left[i] = words[i] & ~before[i];
    }
    store_vector(used + kGroup * group, all);
    store_vector(mask + kGroup * group, left);
}

// Add to `overlap` the pixels of a group of words that earlier instances use.
template <typename Used>
__device__ __forceinline__ void add_used_pixels(Used used, int group, const Words& words, int& overlap) {
    if (has_pixels(words)) {
        overlap += common_pixels(words, load_vector<kGroup>(used + kGroup * group));
    }
}

// Keep or drop the instances in order. A kept instance keeps only the pixels that no earlier instance uses. One thread
// reads and writes each group of `used`, so an instance needs only the barrier of block_sum. The next instance is
// loaded before the current one is decided. Return the number of segments.
template <typename Used>
__device__ __forceinline__ int merge_greedy(
    const MergeScratch& scratch, const MergeOptions& options, Used used, Shared<unsigned> sums) {
    const int thread = static_cast<int>(threadIdx.x), candidates = scratch.candidates[0];
    int segments = 0;
    MergeSpan span(scratch, 0, candidates), next_span(scratch, 1, candidates);
    HeldGroups held(scratch, 0, span);
    for (int c = 0; c < candidates; ++c) {
        const HeldGroups next_held(scratch, c + 1, next_span);
        const MergeSpan after_next(scratch, c + 2, candidates);
        Global<unsigned> mask = scratch.bits_of(c);
        const int first = span.first_of_thread(scratch), end = span.end();
        const int beyond = first + kHeldGroups * kGreedyThreads;  // first group that is not in registers
        int overlap = 0;
#pragma unroll
        for (int i = 0; i < kHeldGroups; ++i) {
            add_used_pixels(used, first + i * kGreedyThreads, held.words[i], overlap);
        }
        for (int group = beyond; group < end; group += kGreedyThreads) {
            add_used_pixels(used, group, load_vector<kGroup>(mask + kGroup * group), overlap);
        }
        overlap = block_sum(overlap, sums + c % 2 * kGreedyWarps);
        // With a threshold of 1 or more, an instance without a free pixel passes the test. It is dropped: segments are
        // not empty.
        if (merge_instance_is_kept(overlap, span.area, options.overlap_threshold) && overlap != span.area) {
#pragma unroll
            for (int i = 0; i < kHeldGroups; ++i) {
                use_group(used, mask, first + i * kGreedyThreads, held.words[i]);
            }
            for (int group = beyond; group < end; group += kGreedyThreads) {
                use_group(used, mask, group, load_vector<kGroup>(mask + kGroup * group));
            }
            if (thread == 0) {
                scratch.id_of[c] = segments + 1;
                scratch.segment_source[segments] = c;
            }
            ++segments;
        }
        span = next_span;
        next_span = after_next;
        held = next_held;
    }
    return segments;
}

// Launched with one block, which may use all registers of a multiprocessor.
template <bool kInShared>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    merge_greedy_kernel(const MergeScratch scratch, const MergeOptions options) {
    SPATIALFLOW_SHARED(unsigned, sums, 2 * kGreedyWarps);
    int segments;
    if constexpr (kInShared) {
        SPATIALFLOW_DYNAMIC_SHARED(unsigned, used);
        for (int group = static_cast<int>(threadIdx.x); group < scratch.words / kGroup; group += kGreedyThreads) {
            store_vector(used + kGroup * group, Words{});
        }
        segments = merge_greedy(scratch, options, used, sums);
        for (int group = static_cast<int>(threadIdx.x); group < scratch.words / kGroup; group += kGreedyThreads) {
            store_vector(scratch.used + kGroup * group, load_vector<kGroup>(used + kGroup * group));
        }
    } else {
        segments = merge_greedy(scratch, options, scratch.used, sums);
    }
    if (threadIdx.x == 0) {
        scratch.segments[0] = segments;
    }
}

// Call body(value, lanes) for each different value in the warp, in the first lane of `lanes` that have this value.
template <typename Body>
__device__ __forceinline__ void for_each_value(int value, const Body& body) {
    const unsigned peers = __match_any_sync(kAllLanes, value);
    if (static_cast<int>(threadIdx.x) % kWarpSize == __ffs(static_cast<int>(peers)) - 1) {
        body(value, peers);
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
__global__ void __launch_bounds__(kThreads) merge_open_kernel(
    Global<const label_t> stuff,  // (H, W)
    const MergeScratch scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, first = first_word_of_warp();
    int labels[kLoads];
    load_stuff(stuff, scratch, first, labels);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int word = first + i, pixel = word * kWarpSize + lane;
        const bool is_void = pixel < scratch.pixels && (labels[i] < 0 || scratch.stuff_id[labels[i]] == 0);
        const unsigned open = __ballot_sync(kAllLanes, is_void);
        if (lane == 0 && word < scratch.words) {
            scratch.open[word] = open & ~static_cast<unsigned>(scratch.used[word]);
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
                for_some_rows(column, first_y, read, body);
            }
        }
    }

private:
    template <typename Read, typename Body>
    __device__ __forceinline__ void for_some_rows(int column, int first_y, const Read& read, const Body& body) const {
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

// Fill boxes in score order. If enough pixels of a box are void, they become pixels of its instance's segment. If the
// instance was dropped, they become a new segment. Return the number of segments.
template <typename Open>
__device__ __forceinline__ int merge_fill(
    const MergeScratch& scratch, const MergeOptions& options, Open open, Shared<unsigned> sums) {
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
            [&](int word) -> unsigned { return open[word]; },
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
            [&](int word, unsigned, unsigned pixels) { atomicAnd(open + word, ~pixels); });  // rows may share a word
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
        SPATIALFLOW_DYNAMIC_SHARED(unsigned, open);
        for (int group = static_cast<int>(threadIdx.x); group < scratch.words / kGroup; group += kGreedyThreads) {
            store_vector(open + kGroup * group, load_vector<kGroup>(scratch.open + kGroup * group));
        }
        __syncthreads();
        segments = merge_fill(scratch, options, open, sums);
        __syncthreads();
        for (int group = static_cast<int>(threadIdx.x); group < scratch.words / kGroup; group += kGreedyThreads) {
            store_vector(scratch.open + kGroup * group, load_vector<kGroup>(open + kGroup * group));
        }
    } else {
        segments = merge_fill(scratch, options, scratch.open, sums);
        __syncthreads();  // all threads have read the previous count
    }
    if (threadIdx.x == 0) {
        scratch.segments[0] = segments;
    }
}

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
        if (has_boxes && id == 0 && (scratch.open[word] >> lane & 1u) == 0) {
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
        const unsigned own = base + lane < end ? scratch.bits_of(c)[base + lane] : 0u;
        for (unsigned left = __ballot_sync(kAllLanes, own != 0); left != 0; left &= left - 1) {
            const int source = __ffs(static_cast<int>(left)) - 1;
            if ((__shfl_sync(kAllLanes, own, source) >> lane & 1u) != 0) {
                id_map[(base + source) * kWarpSize + lane] = id;
            }
        }
    }
}

// Add area and bounding box of the segments. A warp reads kLoads times 32 pixels of a row; if all have one id, it adds
// them at once.
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
