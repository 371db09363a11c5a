// SPDX-License-Identifier: Apache-2.0
//
// nms and batched_nms on CUDA: greedy non-maximum suppression within classes (common/nms.h), bit for bit as on the CPU.
// nms is batched_nms of one class. Memory is linear in N: 56 bytes per candidate (float64: 88).
//
//   1. order    sort the entries (class, score, row): chunks of 2048 in shared memory, then a search in all chunks
//               (up to 4 chunks) or merges of runs (more chunks)
//   2. gather   boxes in that order; for every tile of 1024 candidates, the begin of the class of its first candidate
//   3. rounds   a class may span tiles, and a tile may contain several classes; round r is the r-th tile of every class
//      suppress   a thread per candidate of later tiles tests it against the boxes that its class kept in round r - 1
//      greedy     a block per tile decides on the candidates of this round: in round 0 all classes that begin in the
//                 tile, in round r the class that began r tiles before
//   4. collect  sort the kept entries of batched_nms by (score, row); those of nms are in this order already
#include "cuda/nms.cuh"

#include <utility>

#include "cuda/workspace.cuh"
#include "ops/nms.h"

namespace spatialflow {
namespace {

constexpr int kRowThreads = 256;
constexpr int kMergeThreads = 256;
constexpr int kMergeTile = 1024;
constexpr int kTile = kGreedyThreads;
constexpr int kSuppressThreads = 256;
constexpr int kRankedChunks = 4;  // maximum number of chunks that are searched instead of merged
constexpr int64_t kRankedCount = static_cast<int64_t>(kRankedChunks) * kChunk;
// Rounds of batched_nms that are launched before the host reads the numbers of rounds and results. If a class spans
// more tiles, the remaining rounds and a second read follow.
constexpr int64_t kRoundsAhead = 2;
static_assert(kChunk % kMergeTile == 0 && kTile % kSuppressThreads == 0, "a block works within one run, one tile");

// Entry of a candidate with its class, ordered by class, then by descending score. Entries are sorted by comparison,
// because class numbers are any int64.
template <typename key_t>
struct alignas(sizeof(key_t) == 4 ? 16 : 8) ClassEntry {
    int64_t label;
    Entry<key_t> entry;
};

template <typename key_t>
__host__ __device__ __forceinline__ bool operator<(const ClassEntry<key_t>& a, const ClassEntry<key_t>& b) {
    return a.label != b.label ? a.label < b.label : a.entry < b.entry;
}

template <typename real_t>
using ClassEntryOf = ClassEntry<ScoreKey<real_t>>;

// Key of rows that are not candidates; these rows are last in their class.
template <typename real_t>
constexpr ScoreKey<real_t> kNoKey = ~ScoreKey<real_t>(0);

struct Progress {
    unsigned kept, rounds;
};

// Candidates in class order, and the state of the rounds.
template <typename real_t>
struct CandidateState {
    Global<const ClassEntryOf<real_t>> entries;  // (N)
    Global<Box<real_t>> boxes;                   // (N)
    Global<int> removed;                         // (N), nonzero: suppressed, or not a candidate
    Global<int64_t> begins;                      // (tiles), where the class of the tile's first candidate begins
    Global<unsigned> listed;                     // (N), per tile: kept candidates of the class of its last candidate
    Global<int> listed_count;                    // (tiles)
    Global<ClassEntryOf<real_t>> kept;           // (N), the kept entries in any order, with label 0
    Global<unsigned> progress;                   // (2), a Progress
    int64_t count;
    real_t threshold;
};

// ---- device ------------------------------------------------------------------------------------------------------

// Source of entries: the arguments of the operator.
template <typename real_t>
struct Rows {
    Global<const Box<real_t>> boxes;  // (N)
    Global<const real_t> scores;      // (N)
    Global<const int64_t> labels;     // (N) or null: all of one class

    __device__ __forceinline__ ClassEntryOf<real_t> operator[](int64_t row) const {
        const real_t score = scores[row];
        const bool is_candidate = score == score && box_is_valid<real_t>(boxes[row]);
        return {
            labels ? labels[row] : 0,
            {is_candidate ? descending_key(score) : kNoKey<real_t>, static_cast<unsigned>(row)}};
    }
};

// Source of entries: the kept entries. `Entries` is a struct because a kernel must not have a restrict-qualified
// pointer as a template argument. nvcc names such a kernel differently for host and device, and the launch fails
// ("invalid device function").
template <typename real_t>
struct Entries {
    Global<const ClassEntryOf<real_t>> values;  // (N)

    __device__ __forceinline__ ClassEntryOf<real_t> operator[](int64_t row) const { return values[row]; }
};

// Sort chunks of kChunk entries each from `source`: Rows or Entries.
template <typename real_t, typename source_t>
__global__ void __launch_bounds__(kGreedyThreads) nms_sort_chunks_kernel(
    const source_t source,                 // (N)
    Global<ClassEntryOf<real_t>> entries,  // (N)
    Global<unsigned> progress,             // (2), set to zero; or null
    const int64_t count) {
    using entry_t = ClassEntryOf<real_t>;
    SPATIALFLOW_SHARED(entry_t, chunk, kChunk);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
    const int size = static_cast<int>(count - first < kChunk ? count - first : kChunk);
    if (progress && first == 0 && thread < 2) {
        progress[thread] = 0;
    }
    int padded = kMinPadded;
    while (padded < size) {
        padded *= 2;
    }
    for (int i = thread; i < padded; i += kGreedyThreads) {
        chunk[i] = i < size ? source[first + i] : entry_t{INT64_MAX, {kNoKey<real_t>, ~0u}};  // no row is ~0
    }
    __syncthreads();
    sort_chunk<entry_t>(chunk, padded);
    for (int i = thread; i < size; i += kGreedyThreads) {
        entries[first + i] = chunk[i];
    }
}

// Return the first i in [low, high) for which before(i) is false, or high. before(i) must be true for all smaller i,
// and false for all others. All lanes of a warp must call it.
template <typename Before>
__device__ __forceinline__ int64_t partition_point(int64_t low, int64_t high, Before before) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    while (low < high) {
        const int64_t stride = (high - low + kWarpSize - 1) / kWarpSize, i = low + lane * stride;
        const bool is_before = i < high && before(i);
        const int64_t passed = __popc(__ballot_sync(kAllLanes, is_before));
        const int64_t next = low + passed * stride;
        high = next < high ? next : high;
        low = passed > 0 ? next - stride + 1 : low;
    }
    return low;
}

// Merge runs of `run` sorted entries, kChunk times a power of two, in pairs.
template <typename real_t>
__global__ void __launch_bounds__(kMergeThreads) nms_merge_kernel(
    Global<const ClassEntryOf<real_t>> runs,  // (N)
    Global<ClassEntryOf<real_t>> merged,      // (N)
    const int64_t count, const int64_t run) {
    using entry_t = ClassEntryOf<real_t>;
    SPATIALFLOW_SHARED(entry_t, tile, kMergeTile);
    SPATIALFLOW_SHARED(int64_t, cuts, 2);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kMergeTile;
    const int64_t left = first & ~(2 * run - 1);
    const int64_t right = left + run < count ? left + run : count, end = right + run < count ? right + run : count;
    const int size = static_cast<int>(end - first < kMergeTile ? end - first : kMergeTile);
    if (warp < 2) {
        // `before` is the number of merged entries before the tile (warp 0) or before its end (warp 1). `cut` is how
        // many of them are from the left run.
        const int64_t before = first - left + warp * size;
        const int64_t least = before > end - right ? before - (end - right) : 0;
        const int64_t most = before < right - left ? before : right - left;
        const int64_t cut =
            partition_point(least, most, [&](int64_t i) { return runs[left + i] < runs[right + (before - 1 - i)]; });
        if (thread % kWarpSize == 0) {
            cuts[warp] = cut;
        }
    }
    __syncthreads();
    const int64_t left_begin = cuts[0], left_end = cuts[1], right_begin = first - left - left_begin;
    const int from_left = static_cast<int>(left_end - left_begin);
    for (int i = thread; i < size; i += kMergeThreads) {
        tile[i] = runs[i < from_left ? left + left_begin + i : right + right_begin + (i - from_left)];
    }
    __syncthreads();
    for (int i = thread; i < size; i += kMergeThreads) {
        const entry_t entry = tile[i];
        int low = i < from_left ? from_left : 0, high = i < from_left ? size : from_left;
        while (low < high) {
            const int middle = (low + high) / 2;
            const entry_t middle_entry = tile[middle];
            if (middle_entry < entry) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        merged[first + i + low - from_left] = entry;  // either i or low is in the right part, which begins at from_left
    }
}

// Return the number of entries that precede `entry` in up to kRankedChunks sorted chunks. The searches in all chunks
// advance together.
template <typename entry_t>
__device__ __forceinline__ int rank_in_chunks(Global<const entry_t> chunks, int count, const entry_t& entry) {
    int before[kRankedChunks] = {};
    for (int step = kChunk; step > 0; step /= 2) {
        entry_t chunk_entries[kRankedChunks];
        bool in_range[kRankedChunks];
#pragma unroll
        for (int c = 0; c < kRankedChunks; ++c) {
            const int next = before[c] + step, at = c * kChunk + next - 1;
            in_range[c] = next <= kChunk && at < count;
            if (in_range[c]) {
                chunk_entries[c] = chunks[at];
            }
        }
#pragma unroll
        for (int c = 0; c < kRankedChunks; ++c) {
            before[c] += in_range[c] && chunk_entries[c] < entry ? step : 0;
        }
    }
    int rank = 0;
#pragma unroll
    for (int c = 0; c < kRankedChunks; ++c) {
        rank += before[c];
    }
    return rank;
}

// Merge the sorted chunks of up to kRankedCount candidates. Gather their boxes, and find the class begins of the tiles.
template <typename real_t>
__global__ void __launch_bounds__(kRowThreads) nms_place_kernel(
    Global<const ClassEntryOf<real_t>> chunks,  // (N)
    Global<const Box<real_t>> boxes,            // (N)
    Global<ClassEntryOf<real_t>> entries,       // (N), candidates.entries without const
    const CandidateState<real_t> candidates) {
    const int index = static_cast<int>(blockIdx.x) * kRowThreads + static_cast<int>(threadIdx.x);
    const int count = static_cast<int>(candidates.count);
    if (index >= count) {
        return;
    }
    const ClassEntryOf<real_t> class_entry = chunks[index];
    const int rank = rank_in_chunks<ClassEntryOf<real_t>>(chunks, count, class_entry);
    entries[rank] = class_entry;
    candidates.boxes[rank] = boxes[class_entry.entry.row];
    candidates.removed[rank] = class_entry.entry.key == kNoKey<real_t>;
    if (rank % kTile == 0) {
        const int begin = rank_in_chunks<ClassEntryOf<real_t>>(chunks, count, {class_entry.label, {0, 0}});
        candidates.begins[rank / kTile] = begin;
        atomicMax(candidates.progress + 1, static_cast<unsigned>(rank / kTile - begin / kTile + 1));
    }
}

// Merge the sorted chunks of up to kRankedCount kept entries, and write their rows.
template <typename real_t>
__global__ void __launch_bounds__(kRowThreads) nms_place_rows_kernel(
    Global<const ClassEntryOf<real_t>> chunks,  // (kept)
    Global<int64_t> rows,                       // (kept)
    const int count) {
    const int index = static_cast<int>(blockIdx.x) * kRowThreads + static_cast<int>(threadIdx.x);
    if (index < count) {
        const ClassEntryOf<real_t> class_entry = chunks[index];
        rows[rank_in_chunks<ClassEntryOf<real_t>>(chunks, count, class_entry)] = class_entry.entry.row;
    }
}

// Gather the boxes of the sorted candidates, and find the class begins of the tiles. A block processes a tile.
template <typename real_t>
__global__ void __launch_bounds__(kTile) nms_gather_kernel(
    Global<const Box<real_t>> boxes,  // (N)
    const CandidateState<real_t> candidates) {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t tile = blockIdx.x, first = tile * kTile, index = first + thread;
    if (index < candidates.count) {
        const Entry<ScoreKey<real_t>> entry = candidates.entries[index].entry;
        candidates.boxes[index] = boxes[entry.row];
        candidates.removed[index] = entry.key == kNoKey<real_t>;
    }
    if (thread < kWarpSize) {
        const int64_t label = candidates.entries[first].label;
        const int64_t begin = partition_point(0, first, [&](int64_t i) { return candidates.entries[i].label < label; });
        if (thread == 0) {
            candidates.begins[tile] = begin;
            atomicMax(candidates.progress + 1, static_cast<unsigned>(tile - begin / kTile + 1));
        }
    }
}

template <typename real_t>
__global__ void __launch_bounds__(kTile)
    nms_greedy_kernel(const CandidateState<real_t> candidates, const int64_t round) {
    SPATIALFLOW_SHARED(Box<real_t>, boxes, kTile);
    SPATIALFLOW_SHARED(int64_t, labels, kTile);
    SPATIALFLOW_SHARED(unsigned, kept_of_warp, kGreedyWarps);
    SPATIALFLOW_SHARED(unsigned, slots, kGreedySlots);
    SPATIALFLOW_SHARED(unsigned, kept_before, 1);
    const int64_t tile = blockIdx.x, first = tile * kTile, index = first + static_cast<int64_t>(threadIdx.x);
    const int64_t first_class_round = tile - candidates.begins[tile] / kTile;
    if (round > 0 && round != first_class_round) {
        return;
    }
    const int64_t last = first + kTile < candidates.count ? first + kTile - 1 : candidates.count - 1;
    const int64_t last_label = candidates.entries[last].label;
    Candidate<real_t, int64_t> candidate{};
    ClassEntryOf<real_t> entry{};
    if (index < candidates.count) {
        entry = candidates.entries[index];
        candidate.box = candidates.boxes[index];
        candidate.area = box_area(candidate.box);
        candidate.label = entry.label;
        const int64_t class_round = entry.label == candidates.entries[first].label ? first_class_round : 0;
        candidate.alive = class_round == round && candidates.removed[index] == 0;
    }
    int position;
    const int added = greedy_pass<real_t, int64_t>(
        candidate, kTile, boxes, labels, kept_of_warp, slots, candidates.threshold, position);
    // Only the last class of the tile can continue in later tiles. Its candidates are last in the tile, so the kept
    // candidates of other classes have lower positions.
    const int kept_of_other_classes = __syncthreads_count(position >= 0 && candidate.label != last_label);
    if (threadIdx.x == 0) {
        candidates.listed_count[tile] = added - kept_of_other_classes;
        kept_before[0] = atomicAdd(candidates.progress + 0, static_cast<unsigned>(added));
    }
    __syncthreads();
    if (position >= 0) {
        const unsigned before = kept_before[0];
        candidates.kept[static_cast<int64_t>(before) + position] = {0, entry.entry};
        if (position >= kept_of_other_classes) {
            candidates.listed[first + position - kept_of_other_classes] = static_cast<unsigned>(index);
        }
    }
}

template <typename real_t>
__global__ void __launch_bounds__(kSuppressThreads)
    nms_suppress_kernel(const CandidateState<real_t> candidates, const int64_t round) {
    SPATIALFLOW_SHARED(Box<real_t>, boxes, kSuppressThreads);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kSuppressThreads + thread, tile = index / kTile;
    const int64_t source = candidates.begins[tile] / kTile + round;  // the tile of this class in `round`
    if (source >= tile) {
        return;
    }
    Box<real_t> box{};
    bool alive = false;
    if (index < candidates.count) {
        box = candidates.boxes[index];
        // The other classes begin in this tile, so no earlier tile suppresses their candidates.
        alive =
            candidates.removed[index] == 0 && candidates.entries[index].label == candidates.entries[tile * kTile].label;
    }
    const bool was_alive = alive;
    const real_t area = box_area(box);
    const int kept = candidates.listed_count[source];
    for (int base = 0; base < kept; base += kSuppressThreads) {
        if (base + thread < kept) {
            boxes[thread] = candidates.boxes[candidates.listed[source * kTile + base + thread]];
        }
        __syncthreads();
        const int size = kept - base < kSuppressThreads ? kept - base : kSuppressThreads;
        for (int i = 0; i < size && alive; ++i) {
            const Box<real_t> kept_box = boxes[i];
            alive = !suppresses(kept_box, box_area(kept_box), box, area, candidates.threshold);
        }
        __syncthreads();
    }
    if (was_alive && !alive) {
        candidates.removed[index] = 1;
    }
}

template <typename real_t>
__global__ void __launch_bounds__(kRowThreads) nms_rows_kernel(
    Global<const ClassEntryOf<real_t>> entries,  // (kept)
    Global<int64_t> rows,                        // (kept)
    const int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + static_cast<int64_t>(threadIdx.x);
    if (i < count) {
        rows[i] = entries[i].entry.row;
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename real_t, typename source_t>
void sort_chunks(
    const char* op, const source_t& source, Global<ClassEntryOf<real_t>> target, Global<unsigned> progress,
    int64_t count, Stream stream) {
    launch<nms_sort_chunks_kernel<real_t, source_t>>(
        dim3(grid_size(op, ceil_div(count, kChunk))), dim3(kGreedyThreads), 0, stream, source, target, progress, count);
}

// Merge the sorted chunks of `entries`. `scratch` has the same size. The two are swapped after each pass, so that the
// result is in `entries`.
template <typename real_t>
void merge_chunks(
    const char* op, Global<ClassEntryOf<real_t>>& entries, Global<ClassEntryOf<real_t>>& scratch, int64_t count,
    Stream stream) {
    for (int64_t run = kChunk; run < count; run *= 2) {
        launch<nms_merge_kernel<real_t>>(
            dim3(grid_size(op, ceil_div(count, kMergeTile))), dim3(kMergeThreads), 0, stream, entries, scratch, count,
            run);
        std::swap(entries, scratch);
    }
}

template <typename real_t>
Tensor kept_rows_of(
    const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
    using entry_t = ClassEntryOf<real_t>;
    const int64_t count = boxes.size(0), tiles = ceil_div(count, kTile);
    const DeviceScope device(boxes);
    const Stream stream = device.stream();
    WorkspaceLayout layout;
    const WorkspacePart<entry_t> halves[2] = {layout.add<entry_t>(count), layout.add<entry_t>(count)};
    const auto sorted_boxes = layout.add<Box<real_t>>(count);
    const auto removed = layout.add<int>(count), listed_count = layout.add<int>(tiles);
    const auto begins = layout.add<int64_t>(tiles);
    const auto listed = layout.add<unsigned>(count), progress = layout.add<unsigned>(2);
    const Workspace workspace(layout, boxes);
    const Rows<real_t> rows{
        pointer_cast<const Box<real_t>>(data<real_t>(boxes)), data<real_t>(scores),
        idxs ? data<int64_t>(*idxs) : Global<const int64_t>(nullptr)};
    const auto per_row = [&](int64_t items) { return dim3(grid_size(op, ceil_div(items, kRowThreads))); };
    Global<entry_t> entries = workspace[halves[0]], kept = workspace[halves[1]];
    const bool ranked = count <= kRankedCount;
    sort_chunks<real_t>(op, rows, ranked ? kept : entries, workspace[progress], count, stream);
    if (!ranked) {
        merge_chunks<real_t>(op, entries, kept, count, stream);
    }
    const CandidateState<real_t> candidates{
        entries,
        workspace[sorted_boxes],
        workspace[removed],
        workspace[begins],
        workspace[listed],
        workspace[listed_count],
        kept,
        workspace[progress],
        count,
        static_cast<real_t>(iou_threshold)};
    if (ranked) {
        launch<nms_place_kernel<real_t>>(
            per_row(count), dim3(kRowThreads), 0, stream, kept, rows.boxes, entries, candidates);
    } else {
        launch<nms_gather_kernel<real_t>>(dim3(grid_size(op, tiles)), dim3(kTile), 0, stream, rows.boxes, candidates);
    }
    const auto run_rounds = [&](int64_t from, int64_t to) {
        for (int64_t round = from; round < to; ++round) {
            if (round > 0) {
                launch<nms_suppress_kernel<real_t>>(
                    dim3(grid_size(op, ceil_div(count, kSuppressThreads))), dim3(kSuppressThreads), 0, stream,
                    candidates, round - 1);
            }
            launch<nms_greedy_kernel<real_t>>(dim3(grid_size(op, tiles)), dim3(kTile), 0, stream, candidates, round);
        }
        return read_back(pointer_cast<const Progress>(workspace[progress]), stream);
    };
    const int64_t ahead = idxs && tiles > kRoundsAhead ? kRoundsAhead : tiles;
    Progress done = run_rounds(0, ahead);
    if (done.rounds > ahead) {
        done = run_rounds(ahead, done.rounds);
    }
    const Tensor result = empty_like_sized(boxes, {done.kept}, ScalarType::Long);
    const auto result_rows = mutable_data<int64_t>(result);
    if (idxs) {
        sort_chunks<real_t>(op, Entries<real_t>{kept}, entries, Global<unsigned>(nullptr), done.kept, stream);
        if (done.kept <= kRankedCount) {
            launch<nms_place_rows_kernel<real_t>>(
                per_row(done.kept), dim3(kRowThreads), 0, stream, entries, result_rows, static_cast<int>(done.kept));
            return result;
        }
        merge_chunks<real_t>(op, entries, kept, done.kept, stream);
        std::swap(entries, kept);
    }
    launch<nms_rows_kernel<real_t>>(
        per_row(done.kept), dim3(kRowThreads), 0, stream, kept, result_rows, static_cast<int64_t>(done.kept));
    return result;
}

Tensor kept_rows(const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
    if (boxes.size(0) == 0) {
        return empty_like_sized(boxes, {0}, ScalarType::Long);
    }
    check(boxes.size(0) < int64_t(1) << 32, op, ": boxes must be fewer than 2^32, got ", boxes.size(0));
    const ScalarType type = nms_compute_type(boxes, scores);
    const Tensor upcast_boxes = contiguous_as(boxes, type), upcast_scores = contiguous_as(scores, type);
    return type == ScalarType::Double ? kept_rows_of<double>(op, upcast_boxes, upcast_scores, idxs, iou_threshold)
                                      : kept_rows_of<float>(op, upcast_boxes, upcast_scores, idxs, iou_threshold);
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    check_nms("nms", boxes, scores, iou_threshold);
    return kept_rows("nms", boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
    check_batched_nms(boxes, scores, idxs, iou_threshold);
    const Tensor classes = to_contiguous(idxs);
    return kept_rows("batched_nms", boxes, scores, &classes, iou_threshold);
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("nms", TORCH_BOX(&spatialflow::nms_cuda));
    library.impl("batched_nms", TORCH_BOX(&spatialflow::batched_nms_cuda));
}
