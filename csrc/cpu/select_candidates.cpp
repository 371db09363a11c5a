// SPDX-License-Identifier: Apache-2.0
//
// Selection and decoding of the best anchors of every level on the CPU. One pass over the logits finds the best logit
// of each anchor. A radix sort orders the few anchors that may be kept, and boxes and scores are computed for the kept
// anchors.
#include "ops/select_candidates.h"

#include <limits>

#include "common/select_candidates.h"
#include "cpu/dispatch.h"
#include "cpu/score_order.h"
#include "cpu/sigmoid.h"

namespace spatialflow {
namespace {

// Smallest amounts of work per thread. A smaller amount needs less time than starting another thread.
constexpr int64_t kLogitsPerThread = 1 << 17, kScoresPerThread = 1 << 14;

// Values of a level, (B, channels, H, W) with adjacent channels.
template <typename scalar_t>
struct LevelValues {
    const scalar_t* values;
    int64_t image_stride, row_stride, pixel_stride;

    explicit LevelValues(const Tensor& tensor)
        : values(data<scalar_t>(tensor)),
          image_stride(stride_of(tensor, 0)),
          row_stride(stride_of(tensor, 2)),
          pixel_stride(stride_of(tensor, 3)) {}

    const scalar_t* at(int64_t image, int64_t y, int64_t x) const {
        return values + image * image_stride + y * row_stride + x * pixel_stride;
    }
};

template <typename scalar_t>
struct CandidateLevel {
    LevelValues<scalar_t> logits, deltas;
    int64_t height, width, stride;
    const Box<float>* base;  // (A)
    CandidateRange range;
};

template <typename scalar_t>
struct CandidateProblem {
    std::vector<CandidateLevel<scalar_t>> levels;
    int64_t batch, anchors, classes;
    int64_t rows;  // candidates of an image
};

// Return the largest logit that is not NaN, or minus infinity if there is none.
template <typename scalar_t>
accum_t<scalar_t> best_logit(const scalar_t* logits, int64_t classes) {
    using real_t = accum_t<scalar_t>;
    constexpr int64_t lanes = kLanes<real_t>;
    real_t best = -std::numeric_limits<real_t>::infinity();
    if (classes < lanes) {
        for (int64_t c = 0; c < classes; ++c) {
            const real_t value = load(logits[c]);
            best = value > best ? value : best;
        }
        return best;
    }
    Vector<real_t> bests = broadcast(best);
    for (int64_t c = 0; c + lanes <= classes; c += lanes) {
        bests = lane_max(load_vector(logits + c), bests);
    }
    bests = lane_max(load_vector(logits + classes - lanes), bests);
    return largest_lane(bests);
}

// A level of an image, with the best logit of each anchor.
template <typename scalar_t>
struct ScoredLevel {
    const CandidateLevel<scalar_t>* level;
    int64_t image;
    std::vector<ScoreEntry<accum_t<scalar_t>>> entries;  // (H * W * A)
};

// Write the entries of the anchors in cell rows [begin, end).
template <typename scalar_t>
void score_anchors(
    const CandidateProblem<scalar_t>& problem, int64_t begin, int64_t end, ScoredLevel<scalar_t>& scored) {
    const CandidateLevel<scalar_t>& level = *scored.level;
    int64_t row = begin * level.width * problem.anchors;
    for (int64_t y = begin; y < end; ++y) {
        for (int64_t x = 0; x < level.width; ++x) {
            const scalar_t* logits = level.logits.at(scored.image, y, x);
            for (int64_t anchor = 0; anchor < problem.anchors; ++anchor, ++row) {
                const auto best = best_logit(logits + anchor * problem.classes, problem.classes);
                scored.entries[row] = {descending_key(best), static_cast<uint32_t>(row)};
            }
        }
    }
}

// Select the best anchors of every level that has more anchors than are kept. Element image * problem.rows + candidate
// of the result is the index of an anchor in its level.
template <typename scalar_t>
std::vector<uint32_t> selected_rows(const CandidateProblem<scalar_t>& problem) {
    using real_t = accum_t<scalar_t>;
    std::vector<ScoredLevel<scalar_t>> scored_levels;
    for (const auto& level : problem.levels) {
        for (int64_t image = 0; image < problem.batch && level.range.is_selected; ++image) {
            scored_levels.push_back({&level, image, {}});
        }
    }
    for (ScoredLevel<scalar_t>& scored : scored_levels) {
        const int64_t height = scored.level->height, row_anchors = scored.level->width * problem.anchors;
        scored.entries.resize(static_cast<size_t>(height * row_anchors));
        const int64_t grain = kLogitsPerThread / std::max<int64_t>(1, row_anchors * problem.classes) + 1;
        parallel_for(0, height, grain, [&](int64_t begin, int64_t end) { score_anchors(problem, begin, end, scored); });
    }
    std::vector<uint32_t> kept(scored_levels.empty() ? 0 : static_cast<size_t>(problem.batch * problem.rows));
    parallel_for(0, static_cast<int64_t>(scored_levels.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<ScoreEntry<real_t>> best, scratch;
        for (int64_t i = begin; i < end; ++i) {
            ScoredLevel<scalar_t>& scored = scored_levels[i];
            const CandidateRange& range = scored.level->range;
            take_best(scored.entries, static_cast<size_t>(range.count), best);
            radix_sort(best.data(), static_cast<int64_t>(best.size()), static_cast<decltype(best[0].key)>(-1), scratch);
            uint32_t* rows = kept.data() + scored.image * problem.rows + range.begin;
            for (int64_t row = 0; row < range.count; ++row) {
                rows[row] = best[row].row;
            }
        }
    });
    return kept;
}

template <typename scalar_t>
void write_candidates(
    const CandidateProblem<scalar_t>& problem, const std::vector<uint32_t>& kept, const int64_t* valid_sizes,
    const float* scale_factors, Box<accum_t<scalar_t>>* boxes, accum_t<scalar_t>* scores) {
    using real_t = accum_t<scalar_t>;
    const int64_t grain = kScoresPerThread / (problem.classes + 4) + 1;
    parallel_for(0, problem.batch * problem.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t image = i / problem.rows, candidate = i % problem.rows;
            const CandidateLevel<scalar_t>* level = &problem.levels[0];
            while (candidate >= level->range.begin + level->range.count) {
                ++level;
            }
            const int64_t row = level->range.is_selected ? kept[i] : candidate - level->range.begin;
            const int64_t cell = row / problem.anchors, anchor = row % problem.anchors;
            const int64_t y = cell / level->width, x = cell % level->width;
            const scalar_t* deltas = level->deltas.at(image, y, x) + 4 * anchor;
            const CandidateImage<real_t> candidate_image{
                static_cast<real_t>(valid_sizes[2 * image]), static_cast<real_t>(valid_sizes[2 * image + 1]),
                static_cast<real_t>(scale_factors[2 * image]), static_cast<real_t>(scale_factors[2 * image + 1])};
            boxes[i] = decode_candidate<real_t>(
                level->base[anchor], x * level->stride, y * level->stride, load(deltas[0]), load(deltas[1]),
                load(deltas[2]), load(deltas[3]), candidate_image);
            write_sigmoid(
                level->logits.at(image, y, x) + anchor * problem.classes, scores + i * problem.classes,
                problem.classes);
        }
    });
}

std::tuple<Tensor, Tensor> select_candidates_cpu(
    const std::vector<Tensor>& class_logits, const std::vector<Tensor>& box_deltas, const Tensor& base_anchors,
    const std::vector<int64_t>& strides, const Tensor& valid_sizes, const Tensor& scale_factors, int64_t per_level) {
    check_select_candidates(class_logits, box_deltas, base_anchors, strides, valid_sizes, scale_factors, per_level);
    const CandidateTensors tensors =
        candidate_tensors(class_logits, box_deltas, base_anchors, valid_sizes, scale_factors, per_level);
    if (tensors.boxes.numel() == 0) {
        return {tensors.boxes, tensors.scores};
    }
    dispatch_floating("select_candidates", class_logits[0].scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using real_t = accum_t<scalar_t>;
        CandidateProblem<scalar_t> problem{{}, tensors.batch, tensors.anchors, tensors.classes, tensors.rows};
        const auto* base = reinterpret_cast<const Box<float>*>(data<float>(tensors.base));
        for (size_t l = 0; l < tensors.ranges.size(); ++l) {
            const Tensor& logits = tensors.logits[l];
            problem.levels.push_back(
                {LevelValues<scalar_t>(logits), LevelValues<scalar_t>(tensors.deltas[l]), logits.size(2),
                 logits.size(3), strides[l], base + static_cast<int64_t>(l) * tensors.anchors, tensors.ranges[l]});
        }
        write_candidates(
            problem, selected_rows(problem), data<int64_t>(tensors.valid_sizes), data<float>(tensors.scale_factors),
            reinterpret_cast<Box<real_t>*>(mutable_data<real_t>(tensors.boxes)), mutable_data<real_t>(tensors.scores));
    });
    return {tensors.boxes, tensors.scores};
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("select_candidates", TORCH_BOX(&spatialflow::select_candidates_cpu));
}
