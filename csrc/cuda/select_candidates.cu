// SPDX-License-Identifier: Apache-2.0
//
// Selection and decoding of the best anchors of every level on CUDA, in four launches for all levels and images,
// without host synchronization. For levels with more anchors than are kept:
//
//   clear     set the histograms to zero
//   best      a few lanes per anchor reduce its logits to the best one. A block writes the keys (descending_key) of 256
//             anchors and counts the highest 11 bits of each key in the histogram of the level.
//   select    a block per level and image lists the keys up to the bin of the last kept anchor, in one pass over the
//             keys. Then it orders the best of this list (best_chunks.cuh)
//
// For all levels:
//
//   gather    a thread per vector of logits of a kept anchor computes scores; one more thread decodes the box. A vector
//             has 16 bytes, or one logit if `is_vectorizable` is false.
//
// Memory: 12 bytes per anchor (20 for float64) for keys and list.
#include "ops/select_candidates.h"

#include <cmath>
#include <limits>

#include "common/select_candidates.h"
#include "common/sigmoid.h"
#include "cuda/best_chunks.cuh"
#include "cuda/device_exp.cuh"
#include "cuda/launch.h"
#include "cuda/workspace.cuh"

namespace spatialflow {
namespace {

constexpr int kMaxLevels = 8;
constexpr int kThreads = 256;

// Vectors of logits that a lane loads before it uses the first. For 80 classes, an anchor has two lanes in 16 bits, and
// four in float32.
constexpr int kVectorsAhead = 5;
constexpr int kBestBlocks = 4;  // blocks of `best` per multiprocessor; more would leave too few registers for the loads
constexpr int kKeysAhead = 4;   // vectors of keys that a thread loads before it uses the first

// Right shift of a key that gives its bin in the histogram.
template <typename key_t>
constexpr int kFirstShift = static_cast<int>(8 * sizeof(key_t)) - kDigitBits;

// Values of a level, (B, channels, H, W) with adjacent channels.
template <typename scalar_t>
struct LevelValues {
    Global<const scalar_t> values;
    int64_t image_stride, row_stride, pixel_stride;

    __device__ __forceinline__ Global<const scalar_t> at(int64_t image, unsigned y, unsigned x) const {
        return values + (image * image_stride + y * row_stride + x * pixel_stride);
    }
};

template <typename scalar_t>
struct CandidateLevel {
    LevelValues<scalar_t> logits, deltas;
    unsigned width, stride, anchors;  // anchors of the level
    int64_t begin, count;             // first and number of the level's candidates among those of an image
    bool is_selected;                 // it has more anchors than candidates
};

// Level with more anchors than are kept.
struct SelectedLevel {
    int level;
    unsigned anchors;
    int64_t begin, count;  // first and number of the level's candidates among those of an image
    int64_t key_begin;     // first of the level's keys among those of an image
    unsigned block_begin;  // first of the blocks that compute the level's keys
};

struct SelectedLevels {
    SelectedLevel levels[kMaxLevels];
    int count;
    int64_t rows, keys;  // candidates and keys of an image
};

template <typename scalar_t>
struct CandidateProblem {
    CandidateLevel<scalar_t> levels[kMaxLevels];
    int level_count;
    unsigned anchors;    // of a cell
    int classes, group;  // group: lanes that share an anchor, a power of two
    int64_t rows;        // candidates of an image
};

// ---- device ------------------------------------------------------------------------------------------------------

// Cell of an anchor, and the anchor's number in the cell.
struct AnchorPlace {
    unsigned y, x, anchor;
};

__device__ __forceinline__ AnchorPlace place_of(unsigned index, unsigned anchors, unsigned width) {
    const unsigned cell = index / anchors, y = cell / width;
    return {y, cell - y * width, index - cell * anchors};
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, kBestBlocks) candidate_best_kernel(
    Global<ScoreKey<accum_t<scalar_t>>> keys,  // (B, keys of an image)
    Global<unsigned> histograms,               // (B, levels selected, kBins), zero on entry
    const CandidateProblem<scalar_t> problem, const SelectedLevels selected) {
    using real_t = accum_t<scalar_t>;
    using key_t = ScoreKey<real_t>;
    SPATIALFLOW_SHARED(key_t, block_keys, kThreads);
    SPATIALFLOW_SHARED(unsigned, histogram, kBins);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t image = blockIdx.y;
    for (int bin = thread; bin < kBins; bin += kThreads) {
        histogram[bin] = 0;
    }
    int index = 0;
    while (index + 1 < selected.count && blockIdx.x >= selected.levels[index + 1].block_begin) {
        ++index;
    }
    const SelectedLevel& selected_level = selected.levels[index];
    const CandidateLevel<scalar_t>& level = problem.levels[selected_level.level];
    const unsigned first = (blockIdx.x - selected_level.block_begin) * kThreads;
    const unsigned last = selected_level.anchors - 1 - first;  // relative to `first`: first + thread can exceed 32 bits
    const int group = problem.group, member = thread % group, vectors = problem.classes / kWidth;
#pragma unroll 1
    for (int block_anchor = thread / group; block_anchor < kThreads; block_anchor += kThreads / group) {
        const unsigned offset = static_cast<unsigned>(block_anchor);
        const AnchorPlace place = place_of(first + (offset < last ? offset : last), problem.anchors, level.width);
        const Global<const scalar_t> logits =
            level.logits.at(image, place.y, place.x) + static_cast<int64_t>(place.anchor) * problem.classes;
        real_t best = -std::numeric_limits<real_t>::infinity();
#pragma unroll 1
        for (int begin = 0; begin < vectors; begin += kVectorsAhead * group) {
            Vec<scalar_t, kWidth> values[kVectorsAhead];
#pragma unroll
            for (int i = 0; i < kVectorsAhead; ++i) {
                const int at = begin + i * group + member;
                values[i] = load_vector<kWidth>(logits + (at < vectors ? at : vectors - 1) * kWidth);
            }
#pragma unroll
            for (int i = 0; i < kVectorsAhead; ++i) {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    best = std::fmax(best, static_cast<real_t>(load(values[i][k])));  // fmax ignores NaN
                }
            }
        }
        for (int step = group / 2; step > 0; step /= 2) {
            best = std::fmax(best, __shfl_xor_sync(kAllLanes, best, step));
        }
        if (member == 0) {
            block_keys[block_anchor] = descending_key(best);
        }
    }
    __syncthreads();
    if (static_cast<unsigned>(thread) <= last) {
        const key_t key = block_keys[thread];
        keys[image * selected.keys + selected_level.key_begin + first + thread] = key;
        atomicAdd(histogram + static_cast<int>(key >> kFirstShift<key_t>), 1u);
    }
    __syncthreads();
    const Global<unsigned> total = histograms + (image * selected.count + index) * kBins;
    for (int bin = thread; bin < kBins; bin += kThreads) {
        const unsigned count = histogram[bin];
        if (count != 0) {
            atomicAdd(total + bin, count);
        }
    }
}

template <typename key_t>
__global__ void __launch_bounds__(kGreedyThreads) candidate_select_kernel(
    Global<const key_t> keys,           // (B, keys of an image)
    Global<const unsigned> histograms,  // (B, levels selected, kBins)
    Global<key_t> list_keys,            // (B, keys of an image), scratch
    Global<unsigned> list_rows,         // (B, keys of an image), scratch
    Global<unsigned> kept,              // (B, rows)
    const SelectedLevels selected) {
    SPATIALFLOW_SHARED(Entry<key_t>, chunk, kChunk);
    SPATIALFLOW_SHARED(unsigned, histogram, kBins);
    SPATIALFLOW_SHARED(unsigned, sums, kGreedyWarps);
    SPATIALFLOW_SHARED(unsigned, cut, kCutWords);
    SPATIALFLOW_SHARED(unsigned, listed, 2);  // bin of the last kept anchor; number of entries in the list
    constexpr int kWidth = kVectorElements<key_t>;
    const int thread = static_cast<int>(threadIdx.x);
    const SelectedLevel& level = selected.levels[blockIdx.x];
    const int64_t image = blockIdx.y, key_begin = image * selected.keys + level.key_begin;
    const Global<const unsigned> bins = histograms + (image * selected.count + blockIdx.x) * kBins;
    const Global<const key_t> level_keys = keys + key_begin;
    const Global<key_t> level_list_keys = list_keys + key_begin;
    const Global<unsigned> level_list_rows = list_rows + key_begin;
    const Global<unsigned> level_kept = kept + (image * selected.rows + level.begin);
    const unsigned wanted = static_cast<unsigned>(level.count);

    if (thread == 0) {
        listed[1] = 0;
    }
    const unsigned low = bins[2 * thread], high = bins[2 * thread + 1];
    unsigned total;
    const unsigned before = sum_before(low + high, sums, total);
    if (before < wanted && wanted <= before + low + high) {
        listed[0] = static_cast<unsigned>(2 * thread + (wanted <= before + low ? 0 : 1));
    }
    __syncthreads();
    const unsigned last_bin = listed[0];
#pragma unroll 1
    for (int64_t first = kWidth * thread; first < level.anchors; first += kKeysAhead * kWidth * kGreedyThreads) {
        Vec<key_t, kWidth> vectors[kKeysAhead];
#pragma unroll
        for (int i = 0; i < kKeysAhead; ++i) {
            const int64_t at = first + i * kWidth * kGreedyThreads;
            if (at < level.anchors) {
                vectors[i] = load_vector<kWidth>(level_keys + at);  // values beyond the keys of the level are not used
            }
        }
#pragma unroll
        for (int i = 0; i < kKeysAhead; ++i) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                const int64_t row = first + i * kWidth * kGreedyThreads + k;
                if (row < level.anchors && static_cast<unsigned>(vectors[i][k] >> kFirstShift<key_t>) <= last_bin) {
                    const unsigned slot = atomicAdd(listed + 1, 1u);
                    level_list_keys[slot] = vectors[i][k];
                    level_list_rows[slot] = static_cast<unsigned>(row);
                }
            }
        }
    }
    __syncthreads();
    const unsigned count = listed[1];
    Entry<key_t> begin{0, 0};
    for (unsigned done = 0; done < wanted;) {  // the list has at least that many entries
        const int taken =
            next_chunk<key_t>(level_list_keys, level_list_rows, count, begin, chunk, histogram, sums, cut);
        for (int i = thread; i < taken && done + static_cast<unsigned>(i) < wanted; i += kGreedyThreads) {
            const Entry<key_t> entry = chunk[i];
            level_kept[done + static_cast<unsigned>(i)] = entry.row;
        }
        done += static_cast<unsigned>(taken);
    }
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) candidate_gather_kernel(
    Global<const unsigned> kept,                                      // (B, rows)
    Global<const Box<float>> base,                                    // (levels, anchors)
    Global<const int64_t> valid_sizes,                                // (B, 2)
    Global<const float> scale_factors,                                // (B, 2)
    Global<Box<accum_t<scalar_t>>> boxes,                             // (B, rows)
    Global<accum_t<scalar_t>> scores,                                 // (B, rows, classes)
    const CandidateProblem<scalar_t> problem, const int64_t total) {  // threads
    using real_t = accum_t<scalar_t>;
    constexpr int kStored = kWidth < kVectorElements<real_t> ? kWidth : kVectorElements<real_t>;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (index >= total) {
        return;
    }
    const int vectors = problem.classes / kWidth;
    const int64_t row = index / (vectors + 1), vector = index - row * (vectors + 1);
    const int64_t image = row / problem.rows, candidate = row - image * problem.rows;
    int level_index = 0;
    while (candidate >= problem.levels[level_index].begin + problem.levels[level_index].count) {
        ++level_index;
    }
    const CandidateLevel<scalar_t>& level = problem.levels[level_index];
    const unsigned anchor_index = level.is_selected ? kept[row] : static_cast<unsigned>(candidate - level.begin);
    const AnchorPlace place = place_of(anchor_index, problem.anchors, level.width);
    if (vector < vectors) {
        const int64_t begin = vector * kWidth;
        const auto logits = load_vector<kWidth>(
            level.logits.at(image, place.y, place.x) + (static_cast<int64_t>(place.anchor) * problem.classes + begin));
#pragma unroll
        for (int first = 0; first < kWidth; first += kStored) {
            Vec<real_t, kStored> result;
#pragma unroll
            for (int k = 0; k < kStored; ++k) {
                result[k] = sigmoid<real_t, DeviceExp>(static_cast<real_t>(load(logits[first + k])));
            }
            store_vector(scores + (row * problem.classes + begin + first), result);
        }
    } else {
        const Global<const scalar_t> deltas =
            level.deltas.at(image, place.y, place.x) + 4 * static_cast<int64_t>(place.anchor);
        const CandidateImage<real_t> image_geometry{
            static_cast<real_t>(valid_sizes[2 * image]), static_cast<real_t>(valid_sizes[2 * image + 1]),
            static_cast<real_t>(scale_factors[2 * image]), static_cast<real_t>(scale_factors[2 * image + 1])};
        boxes[row] = decode_candidate<real_t>(
            base[static_cast<int64_t>(level_index) * problem.anchors + place.anchor],
            static_cast<int64_t>(place.x) * level.stride, static_cast<int64_t>(place.y) * level.stride, load(deltas[0]),
            load(deltas[1]), load(deltas[2]), load(deltas[3]), image_geometry);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
LevelValues<scalar_t> level_values(const Tensor& tensor) {
    return {data<scalar_t>(tensor), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 3)};
}

// Return true if the logits of every anchor consist of whole, aligned 16-byte vectors.
template <typename scalar_t>
bool is_vectorizable(const std::vector<Tensor>& logits, int64_t classes) {
    constexpr int kWidth = kVectorElements<scalar_t>;
    bool vectorizable = classes % kWidth == 0;
    for (const Tensor& level : logits) {
        vectorizable = vectorizable && is_aligned(level.const_data_ptr(), 16) && stride_of(level, 0) % kWidth == 0 &&
                       stride_of(level, 2) % kWidth == 0 && stride_of(level, 3) % kWidth == 0;
    }
    return vectorizable;
}

// Number of lanes per anchor: the smallest power of two that loads all vectors of an anchor at once, at most kWarpSize.
// For two vectors or more it is at least two, so that the lanes read whole sectors.
int lanes_of_anchor(int64_t vectors) {
    int lanes = vectors > 1 ? 2 : 1;
    while (lanes < kWarpSize && lanes * kVectorsAhead < vectors) {
        lanes *= 2;
    }
    return lanes;
}

template <typename scalar_t, int kWidth>
void run_candidates(CandidateProblem<scalar_t> problem, const CandidateTensors& tensors, Stream stream) {
    using real_t = accum_t<scalar_t>;
    using key_t = ScoreKey<real_t>;
    constexpr const char* kOp = "select_candidates";
    const int64_t batch = tensors.batch, vectors = problem.classes / kWidth;
    problem.group = lanes_of_anchor(vectors);

    SelectedLevels selected{{}, 0, problem.rows, 0};
    int64_t blocks = 0;
    for (int l = 0; l < problem.level_count; ++l) {
        const CandidateLevel<scalar_t>& level = problem.levels[l];
        if (level.is_selected) {
            selected.levels[selected.count++] = {l,           level.anchors, level.begin,
                                                 level.count, selected.keys, grid_size(kOp, blocks)};
            blocks += ceil_div(level.anchors, kThreads);
            selected.keys += ceil_div(level.anchors, kVectorElements<key_t>) * kVectorElements<key_t>;
        }
    }
    WorkspaceLayout layout;
    const auto histograms = layout.add<unsigned>(batch * selected.count * kBins);
    const int64_t zeros = layout.words, keys = batch * selected.keys;
    const auto all_keys = layout.add<key_t>(keys), list_keys = layout.add<key_t>(keys);
    const auto list_rows = layout.add<unsigned>(keys);
    const auto kept = layout.add<unsigned>(selected.count > 0 ? batch * problem.rows : 0);
    const Workspace workspace(layout, tensors.boxes);
    if (selected.count > 0) {
        clear_words(workspace, zeros, stream);
        launch<candidate_best_kernel<scalar_t, kWidth>>(
            dim3(grid_size(kOp, blocks), static_cast<unsigned>(batch)), dim3(kThreads), 0, stream, workspace[all_keys],
            workspace[histograms], problem, selected);
        launch<candidate_select_kernel<key_t>>(
            dim3(static_cast<unsigned>(selected.count), static_cast<unsigned>(batch)), dim3(kGreedyThreads), 0, stream,
            workspace[all_keys], workspace[histograms], workspace[list_keys], workspace[list_rows], workspace[kept],
            selected);
    }
    const int64_t total = batch * problem.rows * (vectors + 1);
    const Tensor base = aligned(tensors.base);
    launch<candidate_gather_kernel<scalar_t, kWidth>>(
        dim3(grid_size(kOp, ceil_div(total, kThreads))), dim3(kThreads), 0, stream, workspace[kept],
        pointer_cast<const Box<float>>(data<float>(base)), data<int64_t>(tensors.valid_sizes),
        data<float>(tensors.scale_factors), pointer_cast<Box<real_t>>(mutable_data<real_t>(tensors.boxes)),
        mutable_data<real_t>(tensors.scores), problem, total);
}

std::tuple<Tensor, Tensor> select_candidates_cuda(
    const std::vector<Tensor>& class_logits, const std::vector<Tensor>& box_deltas, const Tensor& base_anchors,
    const std::vector<int64_t>& strides, const Tensor& valid_sizes, const Tensor& scale_factors, int64_t per_level) {
    check_select_candidates(class_logits, box_deltas, base_anchors, strides, valid_sizes, scale_factors, per_level);
    const char* op = "select_candidates";
    const DeviceScope device(class_logits[0]);
    const int64_t batch = class_logits[0].size(0), classes = class_logits[0].size(1) / base_anchors.size(1);
    check(
        class_logits.size() <= kMaxLevels, op, ": at most ", kMaxLevels, " levels on CUDA, got ", class_logits.size());
    check(batch <= 65535, op, ": at most 65535 images on CUDA, got ", batch);
    check(classes <= 0x7fffffff, op, ": class_logits[0] must have at most 2147483647 classes, got ", classes);
    const CandidateTensors tensors =
        candidate_tensors(class_logits, box_deltas, base_anchors, valid_sizes, scale_factors, per_level);
    if (tensors.boxes.numel() == 0) {
        return {tensors.boxes, tensors.scores};
    }
    dispatch_floating(op, class_logits[0].scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        CandidateProblem<scalar_t> problem{};
        problem.level_count = static_cast<int>(tensors.ranges.size());
        problem.anchors = static_cast<unsigned>(tensors.anchors);
        problem.classes = static_cast<int>(classes);
        problem.rows = tensors.rows;
        for (size_t l = 0; l < tensors.ranges.size(); ++l) {
            const Tensor& logits = tensors.logits[l];
            problem.levels[l] = {
                level_values<scalar_t>(logits),
                level_values<scalar_t>(tensors.deltas[l]),
                static_cast<unsigned>(logits.size(3)),
                static_cast<unsigned>(strides[l]),
                static_cast<unsigned>(logits.size(2) * logits.size(3) * tensors.anchors),
                tensors.ranges[l].begin,
                tensors.ranges[l].count,
                tensors.ranges[l].is_selected};
        }
        if (is_vectorizable<scalar_t>(tensors.logits, classes)) {
            run_candidates<scalar_t, kVectorElements<scalar_t>>(problem, tensors, device.stream());
        } else {
            run_candidates<scalar_t, 1>(problem, tensors, device.stream());
        }
    });
    return {tensors.boxes, tensors.scores};
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("select_candidates", TORCH_BOX(&spatialflow::select_candidates_cuda)); }
