// SPDX-License-Identifier: Apache-2.0
//
// select_candidates: argument checks, sizes and results shared by all back ends. Schema in select_candidates.cpp.
#pragma once

#include <algorithm>

#include "ops/tensor.h"

namespace spatialflow {

inline void check_select_candidates(
    const std::vector<Tensor>& class_logits, const std::vector<Tensor>& box_deltas, const Tensor& base_anchors,
    const std::vector<int64_t>& strides, const Tensor& valid_sizes, const Tensor& scale_factors, int64_t per_level) {
    constexpr const char* kOp = "select_candidates";
    const size_t levels = class_logits.size();
    check(levels > 0, kOp, ": class_logits must hold at least one level");
    check(
        box_deltas.size() == levels, kOp, ": box_deltas must have one tensor per level of class_logits, got ",
        box_deltas.size(), " for ", levels, " levels");
    check(
        strides.size() == levels, kOp, ": strides must have one number per level of class_logits, got ", strides.size(),
        " for ", levels, " levels");
    check(
        base_anchors.dim() == 3 && base_anchors.size(0) == static_cast<int64_t>(levels) && base_anchors.size(1) > 0 &&
            base_anchors.size(2) == 4,
        kOp, ": base_anchors must have shape (", levels, ", A, 4) with A > 0, got shape ", base_anchors);
    check_dtype(kOp, "base_anchors", base_anchors, ScalarType::Float);
    const Tensor& first = class_logits[0];
    const int64_t anchors = base_anchors.size(1);
    for (size_t l = 0; l < levels; ++l) {
        const std::string logits_name = "class_logits[" + std::to_string(l) + "]";
        const std::string deltas_name = "box_deltas[" + std::to_string(l) + "]";
        const Tensor& logits = class_logits[l];
        const Tensor& deltas = box_deltas[l];
        check_dim(kOp, logits_name.c_str(), logits, 4, "(B, A * classes, H, W)");
        check_floating(kOp, logits_name.c_str(), logits);
        check_dtype(kOp, logits_name.c_str(), logits, first.scalar_type());
        check_same_device(kOp, logits_name.c_str(), logits, "class_logits[0]", first);
        check(
            logits.size(0) == first.size(0) && logits.size(1) == first.size(1), kOp, ": ", logits_name,
            " must have the batch size and the channels of class_logits[0], (", first.size(0), ", ", first.size(1),
            "), got shape ", logits);
        check(
            deltas.dim() == 4 && deltas.size(0) == logits.size(0) && deltas.size(1) == 4 * anchors &&
                deltas.size(2) == logits.size(2) && deltas.size(3) == logits.size(3),
            kOp, ": ", deltas_name, " must have shape (", logits.size(0), ", ", 4 * anchors, ", ", logits.size(2), ", ",
            logits.size(3), "), got shape ", deltas);
        check_dtype(kOp, deltas_name.c_str(), deltas, first.scalar_type());
        check_same_device(kOp, deltas_name.c_str(), deltas, "class_logits[0]", first);
        // Test by division, because with an empty batch the number of cells may exceed 64 bits.
        const int64_t height = logits.size(2), width = logits.size(3), max_cells = ((int64_t(1) << 32) - 1) / anchors;
        check(
            height == 0 || width <= max_cells / height, kOp, ": ", logits_name,
            " must have fewer than 2^32 anchors, got ", height, " x ", width, " cells of ", anchors);
        check(
            strides[l] > 0 && strides[l] <= 0x7fffffff, kOp, ": strides must be from 1 to 2147483647, got ",
            strides[l]);
    }
    check(
        first.size(1) % anchors == 0, kOp, ": class_logits[0] must have a multiple of ", anchors,
        " channels, the number of anchors of base_anchors, got shape ", first);
    check(
        valid_sizes.dim() == 2 && valid_sizes.size(0) == first.size(0) && valid_sizes.size(1) == 2, kOp,
        ": valid_sizes must have shape (", first.size(0), ", 2), got shape ", valid_sizes);
    check_dtype(kOp, "valid_sizes", valid_sizes, ScalarType::Long);
    check(
        scale_factors.dim() == 2 && scale_factors.size(0) == first.size(0) && scale_factors.size(1) == 2, kOp,
        ": scale_factors must have shape (", first.size(0), ", 2), got shape ", scale_factors);
    check_dtype(kOp, "scale_factors", scale_factors, ScalarType::Float);
    for (const auto& [name, tensor] :
         {std::pair<const char*, const Tensor&>("base_anchors", base_anchors),
          {"valid_sizes", valid_sizes},
          {"scale_factors", scale_factors}}) {
        check_same_device(kOp, name, tensor, "class_logits[0]", first);
    }
    check(per_level >= 0 && per_level <= 0x7fffffff, kOp, ": per_level must be from 0 to 2147483647, got ", per_level);
}

// Range of the candidates of a level among the candidates of an image.
struct CandidateRange {
    int64_t begin, count;
    bool is_selected;  // the level has more than `count` anchors
};

inline std::vector<CandidateRange> candidate_ranges(
    const std::vector<Tensor>& class_logits, int64_t anchors, int64_t per_level) {
    std::vector<CandidateRange> ranges;
    int64_t begin = 0;
    for (const Tensor& logits : class_logits) {
        const int64_t level_anchors = logits.size(2) * logits.size(3) * anchors;
        const bool is_selected = per_level > 0 && per_level < level_anchors;
        ranges.push_back({begin, is_selected ? per_level : level_anchors, is_selected});
        begin += ranges.back().count;
    }
    return ranges;
}

// Arguments in the form that kernels expect, and the results that kernels fill.
struct CandidateTensors {
    int64_t batch, anchors, classes;          // anchors: per cell
    std::vector<CandidateRange> ranges;       // per level
    int64_t rows;                             // candidates per image
    std::vector<Tensor> logits, deltas;       // channels adjacent
    Tensor base, valid_sizes, scale_factors;  // contiguous
    Tensor boxes, scores;                     // (B, rows, 4), (B, rows, classes)
};

inline CandidateTensors candidate_tensors(
    const std::vector<Tensor>& class_logits, const std::vector<Tensor>& box_deltas, const Tensor& base_anchors,
    const Tensor& valid_sizes, const Tensor& scale_factors, int64_t per_level) {
    const Tensor& first = class_logits[0];
    const int64_t batch = first.size(0), anchors = base_anchors.size(1), classes = first.size(1) / anchors;
    std::vector<CandidateRange> ranges = candidate_ranges(class_logits, anchors, per_level);
    const int64_t rows = ranges.back().begin + ranges.back().count;
    const ScalarType type = accum_dtype(first.scalar_type());
    CandidateTensors tensors{
        batch,
        anchors,
        classes,
        std::move(ranges),
        rows,
        {},
        {},
        to_contiguous(base_anchors),
        to_contiguous(valid_sizes),
        to_contiguous(scale_factors),
        empty_like_sized(first, {batch, rows, 4}, type),
        empty_like_sized(first, {batch, rows, classes}, type)};
    for (size_t l = 0; l < class_logits.size(); ++l) {
        tensors.logits.push_back(channels_adjacent(class_logits[l]));
        tensors.deltas.push_back(channels_adjacent(box_deltas[l]));
    }
    return tensors;
}

}  // namespace spatialflow
