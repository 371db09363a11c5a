// SPDX-License-Identifier: Apache-2.0
//
// Panoptic merge on CUDA: instances, a stuff label map and boxes to one id map and a table of segments, without a word
// to the host. The decisions are those of common/panoptic_merge.h, in an order that is sequential by nature: who is
// kept depends on all that were kept before. Two kernels of one block take them; all else is spread over the device.
//
//   order    rank of every instance by score, and its box in pixels; those below the threshold stay out
//   pack     masks to one bit per pixel, in score order, with their areas and the words they span
//   greedy   (one block) instance by instance: pixels already used, keep or drop, use them
//   count    free pixels of every stuff label
//   label    (one warp) ids of the stuff labels with enough of them
//   open     (with boxes) one bit for every pixel that is void
//   fill     (with boxes, one block) box by box: void pixels in it, fill them or not
//   paint    the id map: stuff and filled boxes, then instances
//   measure  area and extent of every segment in the id map
//   table    the rows of the result
//
// An image is a row of pixels, bit i of word w is pixel 32 w + i. Both blocks of one keep their bits in shared memory
// if it holds them. Counts are integers, so neither the order of atomics nor of blocks shows. What starts with a value
// starts with zero; extents are therefore kept as maxima, a lower end by its distance from the far side.
//
// Floor (H100, 3.0 TB/s), 100 masks of 800 x 1333: 107 MB of masks read: 36 us; stuff map and id map 8 MB: 3 us. For an
// instance the greedy block reads the bits of its rows, about 30 KB, while it works on the one before: 0.5 us; a box is
// one barrier or two and a few reads of shared memory per thread: 0.3 us.
#include "ops/panoptic_merge.h"

#include "common/panoptic_merge.h"
#include "cuda/workspace.cuh"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGreedyShift = 9;
constexpr int kGreedyThreads = 1 << kGreedyShift;
constexpr int kGreedyWarps = kGreedyThreads / kWarpSize;
constexpr int kGroup = 4;       // words of a 16-byte access; images are whole groups
constexpr int kHeldGroups = 6;  // of an instance, in the registers of a thread of the greedy block
constexpr int kLoads = 4;       // that a lane has in flight where the device is busy with memory
constexpr int kIgnoredPerLaunch = 32;

using Words = Vec<unsigned, kGroup>;

// Sizes, and scratch that all kernels share. Instances are numbered by rank: c-th best score.
struct MergeScratch {
    int instances, stuff_labels, height, width, pixels;
    int words;  // of the bits of an image
    // Zero on entry.
    Global<int> entered;     // (1), how many take part
    Global<int> segments;    // (1), ids given
    Global<int> area;        // (K), pixels of the mask
    Global<int> words_from;  // (K), words from the first that is not zero to the end of the image
    Global<int> end_word;    // (K), one beyond the last word that is not zero
    Global<int> id_of;       // (K), 0: dropped
    Global<int> fill_id;     // (K), what the box is filled with, 0: nothing
    Global<int> stuff_area;  // (S)
    Global<int> stuff_id;    // (S), 0: none
    Global<int> ignored;     // (S)
    Global<int> measured;    // (5, K + S), by id - 1: area, W - x1, H - y1, x2, y2, ends not included
    Global<unsigned> used;   // (words), pixels of instances
    // Written before it is read.
    Global<int> order;           // (K), instance of rank c
    Global<int> boxes;           // (K, 4), pixels
    Global<int> segment_source;  // (K + S), by id - 1: rank of an instance, or K + stuff label
    Global<unsigned> open;       // (words), void pixels; after fill: those that stay void
    Global<unsigned> bits;       // (K, words); after greedy: the pixels that became the instance's own

    __device__ __forceinline__ Global<unsigned> bits_of(int c) const { return bits + static_cast<int64_t>(c) * words; }
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
    Global<const double> boxes,   // (K, 4) or null
    const MergeScratch scratch, const MergeOptions options) {
    const int k = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (k >= scratch.instances) {
        return;
    }
    const double score = scores[k];
    if (!merge_score_enters(score, options.score_threshold)) {
        return;
    }
    int rank = 0;
    for (int other = 0; other < scratch.instances; ++other) {
        const double theirs = scores[other];
        rank +=
            merge_score_enters(theirs, options.score_threshold) && (theirs > score || (theirs == score && other < k));
    }
    scratch.order[rank] = k;
    atomicAdd(scratch.entered + 0, 1);
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

// kPixels adjacent pixels of a mask, a byte each, as they were loaded: a vector of bytes would be taken apart at once.
template <int kPixels>
struct PackedPixels {
    Vec<unsigned, kPixels / 4> words{};

    __device__ __forceinline__ void load(Global<const uint8_t> source) {
        words = load_vector<kPixels / 4>(pointer_cast<const unsigned>(source));
    }
    // One bit for every byte that is not zero.
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

// A lane reads kPixels adjacent pixels at a time.
template <int kPixels>
__global__ void __launch_bounds__(kThreads) merge_pack_kernel(
    Global<const uint8_t> masks,  // (K, H, W)
    const MergeScratch scratch) {
    constexpr int kLanes = kWarpSize / kPixels > 0 ? kWarpSize / kPixels : 1;  // of a word
    constexpr int kStep = kWarpSize * kPixels;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, c = static_cast<int>(blockIdx.y);
    if (c >= scratch.entered[0]) {
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

// Sum over the block, the same in all threads, with one barrier: `sums` may be used again only after that of another
// call with other sums.
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

// Three counts for four words: popc is the slowest instruction here.
__device__ __forceinline__ int common_pixels(const Words& a, const Words& b) {
    static_assert(kGroup == 4, "three words are added, the fourth is left");
    const unsigned x = a[0] & b[0], y = a[1] & b[1], z = a[2] & b[2], last = a[3] & b[3];
    const unsigned carry = (x & y) | (x & z) | (y & z);
    return __popc(x ^ y ^ z) + __popc(last) + 2 * __popc(carry);
}

__device__ __forceinline__ bool has_pixels(const Words& words) {
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// What the greedy block must know of an instance, as it was loaded, so that nothing waits for it before it is used.
struct MergeSpan {
    int area = 0, words_from = 0, end_word = 0;

    // Nothing for those beyond the last.
    __device__ __forceinline__ MergeSpan(const MergeScratch& scratch, int c, int entered) {
        if (c < entered) {
            area = scratch.area[c];
            words_from = scratch.words_from[c];
            end_word = scratch.end_word[c];
        }
    }
    // A thread's own groups lie kGreedyThreads apart, and are the same for all instances.
    __device__ __forceinline__ int first_own(const MergeScratch& scratch) const {
        const int first = (scratch.words - words_from) / kGroup;
        const int start = first / kGreedyThreads * kGreedyThreads + static_cast<int>(threadIdx.x);
        return start < first ? start + kGreedyThreads : start;
    }
    __device__ __forceinline__ int end() const { return (end_word + kGroup - 1) / kGroup; }
};

struct HeldGroups {
    Words words[kHeldGroups];

    __device__ __forceinline__ HeldGroups(const MergeScratch& scratch, int c, const MergeSpan& span) {
        const int first = span.first_own(scratch), end = span.end();
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

// Keeps or drops the instances in order. Of a kept one only the bits no earlier one has stay. `used` is read and
// written by the threads that own its groups alone, so the only barrier of an instance is that of its sum. While it is
// worked on, the next one is loaded.
template <typename Used>
__device__ __forceinline__ int merge_greedy(
    const MergeScratch& scratch, const MergeOptions& options, Used used, Shared<unsigned> sums) {
    const int thread = static_cast<int>(threadIdx.x), entered = scratch.entered[0];
    int segments = 0;
    MergeSpan span(scratch, 0, entered), next_span(scratch, 1, entered);
    HeldGroups held(scratch, 0, span);
    for (int c = 0; c < entered; ++c) {
        const HeldGroups next_held(scratch, c + 1, next_span);
        const MergeSpan after_next(scratch, c + 2, entered);
        Global<unsigned> mask = scratch.bits_of(c);
        const int first = span.first_own(scratch), end = span.end(), beyond = first + kHeldGroups * kGreedyThreads;
        int overlap = 0;
        const auto count = [&](int group, const Words& own) {
            if (has_pixels(own)) {
                overlap += common_pixels(own, load_vector<kGroup>(used + kGroup * group));
            }
        };
#pragma unroll
        for (int i = 0; i < kHeldGroups; ++i) {
            count(first + i * kGreedyThreads, held.words[i]);
        }
        for (int group = beyond; group < end; group += kGreedyThreads) {
            count(group, load_vector<kGroup>(mask + kGroup * group));
        }
        overlap = block_sum(overlap, sums + c % 2 * kGreedyWarps);
        // With a threshold of 1 or more an instance may pass without a pixel of its own; no segment is empty.
        if (merge_instance_is_kept(overlap, span.area, options.overlap_threshold) && overlap != span.area) {
            const auto use = [&](int group, const Words& own) {
                if (!has_pixels(own)) {
                    return;
                }
                const Words before = load_vector<kGroup>(used + kGroup * group);
                Words all, left;
#pragma unroll
                for (int i = 0; i < kGroup; ++i) {
                    all[i] = before[i] | own[i];
                    left[i] = own[i] & ~before[i];
                }
                store_vector(used + kGroup * group, all);
                store_vector(mask + kGroup * group, left);
            };
#pragma unroll
            for (int i = 0; i < kHeldGroups; ++i) {
                use(first + i * kGreedyThreads, held.words[i]);
            }
            for (int group = beyond; group < end; group += kGreedyThreads) {
                use(group, load_vector<kGroup>(mask + kGroup * group));
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

// One block in all: it may take all registers of a multiprocessor.
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

// Calls body(value, lanes) in one lane of those that have the same value, for every value that the warp has.
template <typename Body>
__device__ __forceinline__ void for_each_value(int value, const Body& body) {
    const unsigned peers = __match_any_sync(kAllLanes, value);
    if (static_cast<int>(threadIdx.x) % kWarpSize == __ffs(static_cast<int>(peers)) - 1) {
        body(value, peers);
    }
}

// The stuff label of every lane's pixel in kLoads words from `word` on, or -1: outside the image or the labels, or a
// pixel of an instance.
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

// First of the kLoads words that a warp works on.
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

// Bits of `word` that are among the pixels [begin, end), which it has some of.
__device__ __forceinline__ unsigned pixels_in_word(int word, int begin, int end) {
    const int from = begin - word * kWarpSize, to = end - word * kWarpSize;
    return (from <= 0 ? ~0u : ~0u << from) & (to >= kWarpSize ? ~0u : ~(~0u << to));
}

// Box by box in score order: a box that is void enough gives its void pixels to its own segment, or to a new one.
template <typename Open>
__device__ __forceinline__ int merge_fill(
    const MergeScratch& scratch, const MergeOptions& options, Open open, Shared<unsigned> sums) {
    const int thread = static_cast<int>(threadIdx.x), entered = scratch.entered[0];
    const auto box_at = [&](int c) { return c < entered ? load_vector<4>(scratch.boxes + 4 * c) : Vec<int, 4>{}; };
    int segments = scratch.segments[0], turn = 0;
    Vec<int, 4> next_box = box_at(0);
    int next_id = entered > 0 ? scratch.id_of[0] : 0;
    for (int c = 0; c < entered; ++c) {
        const Vec<int, 4> box = next_box;
        int id = next_id;
        next_box = box_at(c + 1);
        next_id = c + 1 < entered ? scratch.id_of[c + 1] : 0;
        const int x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3], area = (x2 - x1) * (y2 - y1);
        if (area == 0) {
            continue;
        }
        // A power of two of threads for the words of a row.
        const int most_words = (x2 - x1 + kWarpSize - 2) / kWarpSize + 1;
        const int row_shift = kWarpSize - __clz(most_words - 1);
        const int shift = row_shift < kGreedyShift ? row_shift : kGreedyShift, stride = 1 << shift;
        const int row_step = kGreedyThreads >> shift;
        // Calls body(word, read(word), its pixels in the box); kLoads words are read before the first call.
        const auto for_each_word = [&](const auto& read, const auto& body) {
            for (int column = thread & (stride - 1); column < most_words; column += stride) {
                for (int first_y = y1 + (thread >> shift); first_y < y2; first_y += kLoads * row_step) {
                    int begin[kLoads], word[kLoads];
                    unsigned value[kLoads];
                    bool inside[kLoads];
#pragma unroll
                    for (int i = 0; i < kLoads; ++i) {
                        const int y = first_y + i * row_step;
                        begin[i] = (y < y2 ? y : y1) * scratch.width + x1;
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
            }
        };
        int still_void = 0;
        for_each_word(
            [&](int word) -> unsigned { return open[word]; },
            [&](int, unsigned bits, unsigned pixels) { still_void += __popc(bits & pixels); });
        still_void = block_sum(still_void, sums + turn * kGreedyWarps);
        turn ^= 1;
        if (!merge_box_is_filled(still_void, area, options.box_threshold)) {
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
        for_each_word(
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
        __syncthreads();  // all threads have read the old number
    }
    if (threadIdx.x == 0) {
        scratch.segments[0] = segments;
    }
}

// All pixels but those of instances: their stuff, or the first box that was filled there.
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
            const int y = pixel / scratch.width, x = pixel - y * scratch.width;
            const int entered = scratch.entered[0];
            for (int c = 0; c < entered && id == 0; ++c) {
                const Vec<int, 4> box = load_vector<4>(scratch.boxes + 4 * c);
                const bool inside = x >= box[0] && x < box[2] && y >= box[1] && y < box[3];
                id = inside ? scratch.fill_id[c] : 0;
            }
        }
        id_map[pixel] = id;
    }
}

// A warp takes 32 words of an instance, a lane each, then those that are not zero in turn, a lane per pixel.
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

// A warp takes kLoads times 32 pixels of a row. Where they are of one id alone, they are counted at once.
__global__ void __launch_bounds__(kThreads) merge_measure_kernel(
    Global<const int> id_map,                       // (H, W)
    const MergeScratch scratch, const int parts) {  // of a row
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

// ---- host --------------------------------------------------------------------------------------------------------

constexpr int64_t kOwnSharedBytes = 1024;  // at most, of the kernels of one block, beside their dynamic shared memory

std::tuple<Tensor, Tensor, Tensor, Tensor> panoptic_merge_cuda(
    const Tensor& masks, const Tensor& scores, const Tensor& labels, std::optional<Tensor> boxes, const Tensor& stuff,
    int64_t stuff_labels, std::vector<int64_t> ignored_stuff, double score_threshold, double overlap_threshold,
    int64_t stuff_area_limit, double box_threshold) {
    const char* op = "panoptic_merge";
    check_panoptic_merge(
        masks, scores, labels, boxes, stuff, stuff_labels, score_threshold, overlap_threshold, box_threshold);
    const DeviceScope device(masks);
    const int64_t count = masks.size(0), height = masks.size(1), width = masks.size(2), rows = count + stuff_labels;
    const int64_t pixels = height * width, words = ceil_div(pixels, kGroup * kWarpSize) * kGroup;
    check(
        pixels < 0x7fff0000, op, ": masks must have fewer than 2^31 - 2^16 pixels on CUDA, got ", height, " x ", width);
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
    const auto id_of = layout.add<int>(count), fill_id = layout.add<int>(count);
    const auto stuff_area = layout.add<int>(stuff_labels), stuff_id = layout.add<int>(stuff_labels);
    const auto ignored = layout.add<int>(stuff_labels), measured = layout.add<int>(5 * rows);
    const auto used = layout.add<unsigned>(words);
    const int64_t zeros = layout.words;
    const auto order = layout.add<int>(count), pixel_boxes = layout.add<int>(4 * count);
    const auto segment_source = layout.add<int>(rows);
    const auto open = layout.add<unsigned>(words), bits = layout.add<unsigned>(count * words);
    const Workspace workspace(layout, masks);
    clear_words(workspace, zeros, device.stream());
    const MergeScratch scratch{
        static_cast<int>(count),
        static_cast<int>(stuff_labels),
        static_cast<int>(height),
        static_cast<int>(width),
        static_cast<int>(pixels),
        static_cast<int>(words),
        workspace[entered],
        workspace[segments],
        workspace[area],
        workspace[words_from],
        workspace[end_word],
        workspace[id_of],
        workspace[fill_id],
        workspace[stuff_area],
        workspace[stuff_id],
        workspace[ignored],
        workspace[measured],
        workspace[used],
        workspace[order],
        workspace[pixel_boxes],
        workspace[segment_source],
        workspace[open],
        workspace[bits]};
    const MergeOptions options{score_threshold, overlap_threshold, box_threshold, stuff_area_limit};
    const Stream stream = device.stream();
    const dim3 threads(kThreads);
    const auto blocks = [&](int64_t items, int64_t per_block) {
        return dim3(grid_size(op, ceil_div(items, per_block)));
    };
    if (pixels != 0) {
        const bool has_boxes = boxes && count != 0;
        const Tensor box_values = has_boxes ? contiguous_as(*boxes, ScalarType::Double) : score_values;
        const bool in_shared = words * 4 <= largest_shared_bytes(stream) - kOwnSharedBytes;
        const size_t shared_bytes = static_cast<size_t>(words) * 4;
        const dim3 one(1), greedy_threads(kGreedyThreads);
        launch<merge_order_kernel>(
            blocks(count, kThreads), threads, 0, stream, data<double>(score_values),
            has_boxes ? data<double>(box_values) : Global<const double>(nullptr), scratch, options);
        for (size_t first = 0; first < ignored_stuff.size(); first += kIgnoredPerLaunch) {
            IgnoredLabels some{};
            for (; some.count < kIgnoredPerLaunch && first + some.count < ignored_stuff.size(); ++some.count) {
                some.labels[some.count] = ignored_stuff[first + some.count];
            }
            launch<merge_ignore_kernel>(dim3(1), dim3(kIgnoredPerLaunch), 0, stream, scratch, some);
        }
        const auto pack = [&](auto width_constant) {
            constexpr int kPixels = decltype(width_constant)::value;
            const dim3 grid(grid_size(op, ceil_div(words, kPixels * kLoads * kWarps)), static_cast<unsigned>(count));
            launch<merge_pack_kernel<kPixels>>(grid, threads, 0, stream, data<uint8_t>(mask_values), scratch);
        };
        const auto masks_aligned = [&](int64_t bytes) {
            return pixels % bytes == 0 && is_aligned(mask_values.const_data_ptr(), static_cast<size_t>(bytes));
        };
        if (masks_aligned(16)) {
            pack(std::integral_constant<int, 16>{});
        } else if (masks_aligned(4)) {
            pack(std::integral_constant<int, 4>{});
        } else {
            pack(std::integral_constant<int, 1>{});
        }
        if (in_shared) {
            launch<merge_greedy_kernel<true>>(one, greedy_threads, shared_bytes, stream, scratch, options);
        } else {
            launch<merge_greedy_kernel<false>>(one, greedy_threads, 0, stream, scratch, options);
        }
        const dim3 word_grid = blocks(words, kLoads * kWarps);
        const auto run_stuff = [&](auto zero, const Tensor& values) {
            using label_t = decltype(zero);
            const Global<const label_t> stuff_values = data<label_t>(values);
            launch<merge_count_kernel<label_t>>(word_grid, threads, 0, stream, stuff_values, scratch);
            launch<merge_label_kernel>(dim3(1), dim3(kWarpSize), 0, stream, scratch, options);
            if (has_boxes) {
                launch<merge_open_kernel<label_t>>(word_grid, threads, 0, stream, stuff_values, scratch);
                if (in_shared) {
                    launch<merge_fill_kernel<true>>(one, greedy_threads, shared_bytes, stream, scratch, options);
                } else {
                    launch<merge_fill_kernel<false>>(one, greedy_threads, 0, stream, scratch, options);
                }
            }
            launch<merge_paint_stuff_kernel<label_t>>(
                word_grid, threads, 0, stream, stuff_values, mutable_data<int>(id_map), scratch, has_boxes);
        };
        switch (stuff.scalar_type()) {
            case ScalarType::Byte:
                run_stuff(uint8_t{}, to_contiguous(stuff));
                break;
            case ScalarType::Int:
                run_stuff(int32_t{}, to_contiguous(stuff));
                break;
            default:
                run_stuff(int64_t{}, contiguous_as(stuff, ScalarType::Long));
        }
        const dim3 instance_grid(grid_size(op, ceil_div(words, 4 * kThreads)), static_cast<unsigned>(count));
        launch<merge_paint_instances_kernel>(instance_grid, threads, 0, stream, mutable_data<int>(id_map), scratch);
        const int64_t parts = ceil_div(width, kLoads * kWarpSize);
        launch<merge_measure_kernel>(
            blocks(height * parts, kWarps), threads, 0, stream, data<int>(id_map), scratch, static_cast<int>(parts));
    }
    launch<merge_table_kernel>(
        blocks(rows > 0 ? rows : 1, kThreads), threads, 0, stream, data<double>(score_values),
        data<int64_t>(label_values), mutable_data<int64_t>(table), mutable_data<float>(segment_scores),
        mutable_data<int64_t>(segment_count), scratch);
    return {id_map, table, segment_scores, segment_count};
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("panoptic_merge", TORCH_BOX(&spatialflow::panoptic_merge_cuda)); }
