// SPDX-License-Identifier: Apache-2.0
//
// Panoptic merge on the CPU, from instances, a stuff label map and boxes to an id map and a table of segments.
//
// Masks are first packed to one bit per pixel, so a row of 640 pixels is ten words. Packing takes most of the time and
// is the only pass over the bytes of the candidates' masks. The greedy selection of instances computes overlaps by
// popcounts of ANDs. The id map is written row by row: stuff first, then each kept instance, without the pixels of
// earlier ones. The remaining void pixels are another bit mask. It gives the number of void pixels of each box. If
// their fraction of the box reaches the threshold, they are filled.
//
// Packing is parallel over (mask, rows). Stuff statistics and painting are parallel over rows. Counts are integers, so
// the result does not depend on the number of threads.
#include "common/panoptic_merge.h"

#include <algorithm>
#include <numeric>

#include "cpu/bits.h"
#include "cpu/dispatch.h"
#include "ops/panoptic_merge.h"

namespace spatialflow {
namespace {

constexpr int64_t kBandRows = 32;  // rows per task

struct MergeOptions {
    double score_threshold;
    double overlap_threshold;
    int64_t stuff_area_threshold;
    double box_overlap_threshold;
};

struct Extent {
    int64_t x1 = INT64_MAX, y1 = INT64_MAX, x2 = -1, y2 = -1;  // bounds are inclusive

    void add(int64_t left, int64_t right, int64_t y) {
        x1 = std::min(x1, left);
        x2 = std::max(x2, right);
        y1 = std::min(y1, y);
        y2 = std::max(y2, y);
    }

    void add(const Extent& extent) {
        x1 = std::min(x1, extent.x1);
        x2 = std::max(x2, extent.x2);
        y1 = std::min(y1, extent.y1);
        y2 = std::max(y2, extent.y2);
    }
};

struct Segment {
    int64_t label;
    int64_t instance;  // -1: stuff
    int64_t area;
    Extent extent;
};

struct StuffClass {
    int64_t area = 0;
    Extent extent;
};

struct Image {
    int64_t height, width;
    int64_t words;  // per row
};

// Indices of the candidates, highest score first, ties in input order.
std::vector<int64_t> candidates(const double* scores, int64_t count, double score_threshold) {
    std::vector<int64_t> order;
    for (int64_t k = 0; k < count; ++k) {
        if (merge_is_candidate(scores[k], score_threshold)) {
            order.push_back(k);
        }
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    return order;
}

// Bit masks of all candidates, and the number of set bits of each row.
struct PackedMasks {
    std::vector<uint64_t> bits;      // (candidates, H, words)
    std::vector<int32_t> row_count;  // (candidates, H)

    PackedMasks(const uint8_t* masks, const std::vector<int64_t>& order, const Image& image)
        : bits(order.size() * static_cast<size_t>(image.height * image.words)),
          row_count(order.size() * static_cast<size_t>(image.height)) {
        const int64_t bands = (image.height + kBandRows - 1) / kBandRows;
        parallel_for(0, static_cast<int64_t>(order.size()) * bands, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t c = task / bands;
                const int64_t first = task % bands * kBandRows;
                const uint8_t* mask = masks + order[c] * image.height * image.width;
                for (int64_t y = first; y < std::min(first + kBandRows, image.height); ++y) {
                    const int64_t row = c * image.height + y;
                    row_count[row] = static_cast<int32_t>(
                        pack_row(mask + y * image.width, image.width, bits.data() + row * image.words));
                }
            }
        });
    }
};

// Keep or drop the candidates in order. The mask of a kept candidate loses the pixels of earlier kept candidates, the
// set bits of `used`. Row counts become 0 for a dropped candidate, and for rows without remaining pixels; other row
// counts do not change. Return the kept segments; candidate_ids[c] is the id of candidate c, 0 if dropped.
std::vector<Segment> keep_instances(
    PackedMasks& masks, const std::vector<int64_t>& order, const int64_t* labels, const Image& image,
    double overlap_threshold, std::vector<uint64_t>& used, std::vector<int32_t>& candidate_ids) {
    std::vector<Segment> segments;
    std::vector<uint64_t> columns(static_cast<size_t>(image.words));
    for (size_t c = 0; c < order.size(); ++c) {
        uint64_t* mask = masks.bits.data() + c * image.height * image.words;
        int32_t* row_count = masks.row_count.data() + c * image.height;
        int64_t area = 0, overlap = 0;
        for (int64_t y = 0; y < image.height; ++y) {
            area += row_count[y];
            if (row_count[y] == 0) {
                continue;
            }
            for (int64_t w = y * image.words; w < (y + 1) * image.words; ++w) {
                overlap += bit_count(mask[w] & used[w]);
            }
        }
        // If the threshold is 1 or more, an instance without remaining pixels may pass, but a segment must not be
        // empty.
        if (!merge_instance_is_kept(overlap, area, overlap_threshold) || overlap == area) {
            std::fill(row_count, row_count + image.height, 0);
            continue;
        }
        Segment segment{labels[order[c]], order[c], area - overlap, {}};
        std::fill(columns.begin(), columns.end(), 0);
        for (int64_t y = 0; y < image.height; ++y) {
            if (row_count[y] == 0) {
                continue;
            }
            uint64_t any = 0;
            for (int64_t w = 0; w < image.words; ++w) {
                const uint64_t added = mask[y * image.words + w] & ~used[y * image.words + w];
                mask[y * image.words + w] = added;
                used[y * image.words + w] |= added;
                columns[w] |= added;
                any |= added;
            }
            if (any != 0) {
                segment.extent.y1 = std::min(segment.extent.y1, y);
                segment.extent.y2 = y;
            } else {
                row_count[y] = 0;
            }
        }
        for (int64_t w = 0; w < image.words; ++w) {
            if (columns[w] != 0) {
                segment.extent.x1 = std::min(segment.extent.x1, w * kWordPixels + lowest_bit(columns[w]));
                segment.extent.x2 = w * kWordPixels + highest_bit(columns[w]);
            }
        }
        segments.push_back(segment);
        candidate_ids[c] = static_cast<int32_t>(segments.size());
    }
    return segments;
}

template <typename label_t>
bool is_constant(const label_t* labels, int64_t count) {
    label_t difference = 0;
    for (int64_t i = 0; i < count; ++i) {
        difference |= static_cast<label_t>(labels[i] ^ labels[0]);
    }
    return difference == 0;
}

// Call add(label, bits) for the runs of equal labels among the pixels `free` of a word.
template <typename label_t, typename Add>
__attribute__((always_inline)) inline void for_label_runs(
    const label_t* labels,  // (count)
    int64_t count, uint64_t free, const Add& add) {
    if (free != 0 && is_constant(labels, count)) {
        add(labels[0], free);
        return;
    }
    while (free != 0) {
        const int64_t first = lowest_bit(free);
        int64_t last = first + 1;
        while (last < count && labels[last] == labels[first]) {
            ++last;
        }
        const uint64_t run = free & bit_range(first, last);
        add(labels[first], run);
        free ^= run;
    }
}

// Compute the area and extent of every stuff label over the pixels without an instance.
template <typename label_t>
std::vector<StuffClass> stuff_statistics(
    const label_t* stuff, const std::vector<uint64_t>& used, const Image& image, int64_t labels) {
    const int64_t bands = (image.height + kBandRows - 1) / kBandRows;
    std::vector<StuffClass> band_classes(static_cast<size_t>(bands * labels));
    parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
        for (int64_t y = begin * kBandRows; y < std::min(end * kBandRows, image.height); ++y) {
            StuffClass* classes = band_classes.data() + y / kBandRows * labels;
            const label_t* row = stuff + y * image.width;
            const auto add = [&](int64_t label, int64_t x, uint64_t bits) {
                if (label >= 0 && label < labels) {
                    classes[label].area += bit_count(bits);
                    classes[label].extent.add(x + lowest_bit(bits), x + highest_bit(bits), y);
                }
            };
            for (int64_t w = 0, x = 0; w < image.words; ++w, x += kWordPixels) {
                const int64_t count = std::min(kWordPixels, image.width - x);
                const uint64_t free = ~used[y * image.words + w] & bit_range(0, count);
                for_label_runs(row + x, count, free, [&](int64_t label, uint64_t bits) { add(label, x, bits); });
            }
        }
    });
    std::vector<StuffClass> classes(static_cast<size_t>(labels));
    for (size_t i = 0; i < band_classes.size(); ++i) {
        classes[i % static_cast<size_t>(labels)].area += band_classes[i].area;
        classes[i % static_cast<size_t>(labels)].extent.add(band_classes[i].extent);
    }
    return classes;
}

// Write the ids of `count` pixels of a word. `free` is the bit mask of the pixels without an instance; other pixels get
// an unspecified id. Return the bit mask of the free pixels whose label has no id.
template <typename label_t, typename StuffId>
__attribute__((always_inline)) inline uint64_t paint_stuff(
    const label_t* labels, int64_t count, uint64_t free, const StuffId& stuff_id, int32_t* ids) {
    if (free == 0 || is_constant(labels, count)) {
        const int32_t id = free == 0 ? 0 : stuff_id(labels[0]);
        std::fill(ids, ids + count, id);
        return id == 0 ? free : 0;
    }
    uint64_t unlabeled = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t id = stuff_id(labels[i]);
        ids[i] = id;
        unlabeled |= static_cast<uint64_t>(id == 0) << i;
    }
    return unlabeled & free;
}

// Write `id` to the pixels of a mask row.
__attribute__((always_inline)) inline void paint_mask_row(
    const uint64_t* bits, int64_t words, int32_t id, int32_t* ids) {
    for (int64_t w = 0; w < words; ++w) {
        if (bits[w] != 0) {
            paint_word(ids + w * kWordPixels, bits[w], id);
        }
    }
}

// Write every pixel of the id map, and the bit mask `void_bits` of void pixels.
template <typename label_t>
void paint(
    const label_t* stuff, const std::vector<int32_t>& label_ids, const PackedMasks& masks,
    const std::vector<int32_t>& candidate_ids, const std::vector<uint64_t>& used, const Image& image, int32_t* id_map,
    std::vector<uint64_t>& void_bits) {
    const auto labels = static_cast<int64_t>(label_ids.size());
    const auto stuff_id = [&](label_t label) {
        const auto index = static_cast<int64_t>(label);
        return index >= 0 && index < labels ? label_ids[index] : 0;
    };
    parallel_for(0, image.height, kBandRows, [&](int64_t begin, int64_t end) {
        for (int64_t y = begin; y < end; ++y) {
            const label_t* row = stuff + y * image.width;
            int32_t* target = id_map + y * image.width;
            for (int64_t w = 0, x = 0; w < image.words; ++w, x += kWordPixels) {
                const int64_t count = std::min(kWordPixels, image.width - x);
                const uint64_t free = ~used[y * image.words + w] & bit_range(0, count);
                void_bits[y * image.words + w] = paint_stuff(row + x, count, free, stuff_id, target + x);
            }
            for (size_t c = 0; c < candidate_ids.size(); ++c) {
                if (candidate_ids[c] == 0 || masks.row_count[c * image.height + y] == 0) {
                    continue;
                }
                paint_mask_row(
                    masks.bits.data() + (c * image.height + y) * image.words, image.words, candidate_ids[c], target);
            }
        }
    });
}

// Fill boxes in score order. If the void fraction of a box reaches the threshold, assign its void pixels to the segment
// of its instance, or to a new segment.
void fill_boxes(
    const double* boxes, const std::vector<int64_t>& order, const int64_t* labels, const Image& image,
    double box_overlap_threshold, std::vector<int32_t>& candidate_ids, std::vector<uint64_t>& void_bits,
    std::vector<Segment>& segments, int32_t* id_map) {
    for (size_t c = 0; c < order.size(); ++c) {
        const PixelBox box = merge_pixel_box(boxes + 4 * order[c], image.height, image.width);
        if (box.area() == 0) {
            continue;
        }
        const int64_t first = box.x1 / kWordPixels, last = (box.x2 - 1) / kWordPixels;
        const auto part = [&](int64_t w) {
            return bit_range(
                w == first ? box.x1 - first * kWordPixels : 0, w == last ? box.x2 - last * kWordPixels : kWordPixels);
        };
        int64_t still_void = 0;
        for (int64_t y = box.y1; y < box.y2; ++y) {
            for (int64_t w = first; w <= last; ++w) {
                still_void += bit_count(void_bits[y * image.words + w] & part(w));
            }
        }
        if (!merge_box_is_filled(still_void, box.area(), box_overlap_threshold)) {
            continue;
        }
        if (candidate_ids[c] == 0) {
            segments.push_back({labels[order[c]], order[c], 0, {}});
            candidate_ids[c] = static_cast<int32_t>(segments.size());
        }
        Segment& segment = segments[static_cast<size_t>(candidate_ids[c] - 1)];
        segment.area += still_void;
        for (int64_t y = box.y1; y < box.y2; ++y) {
            for (int64_t w = first; w <= last; ++w) {
                const uint64_t bits = void_bits[y * image.words + w] & part(w);
                if (bits != 0) {
                    void_bits[y * image.words + w] ^= bits;
                    paint_word(id_map + y * image.width + w * kWordPixels, bits, candidate_ids[c]);
                    segment.extent.add(w * kWordPixels + lowest_bit(bits), w * kWordPixels + highest_bit(bits), y);
                }
            }
        }
    }
}

// Align the function: its loops over words take a tenth longer at another offset in a cache line of code. Without
// alignment, other files of the library would determine that offset.
template <typename label_t>
__attribute__((aligned(64))) std::vector<Segment> merge(
    const uint8_t* masks,              // (K, H, W)
    const double* scores,              // (K)
    const int64_t* labels,             // (K)
    const double* boxes,               // (K, 4) or nullptr: no box fill
    const label_t* stuff,              // (H, W)
    const std::vector<bool>& ignored,  // (stuff labels)
    int32_t* id_map,                   // (H, W), written
    int64_t count, const Image& image, const MergeOptions& options) {
    const std::vector<int64_t> order = candidates(scores, count, options.score_threshold);
    PackedMasks packed(masks, order, image);
    std::vector<uint64_t> used(static_cast<size_t>(image.height * image.words));
    std::vector<int32_t> candidate_ids(order.size());
    std::vector<Segment> segments =
        keep_instances(packed, order, labels, image, options.overlap_threshold, used, candidate_ids);

    const auto stuff_labels = static_cast<int64_t>(ignored.size());
    const std::vector<StuffClass> classes = stuff_statistics(stuff, used, image, stuff_labels);
    std::vector<int32_t> label_ids(ignored.size());
    for (int64_t label = 0; label < stuff_labels; ++label) {
        const StuffClass& stuff_class = classes[static_cast<size_t>(label)];
        if (!ignored[static_cast<size_t>(label)] && stuff_class.area > 0 &&
            stuff_class.area >= options.stuff_area_threshold) {
            segments.push_back({label, -1, stuff_class.area, stuff_class.extent});
            label_ids[static_cast<size_t>(label)] = static_cast<int32_t>(segments.size());
        }
    }
    std::vector<uint64_t> void_bits(used.size());
    paint(stuff, label_ids, packed, candidate_ids, used, image, id_map, void_bits);
    if (boxes != nullptr) {
        fill_boxes(
            boxes, order, labels, image, options.box_overlap_threshold, candidate_ids, void_bits, segments, id_map);
    }
    return segments;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> panoptic_merge_cpu(
    const Tensor& masks, const Tensor& scores, const Tensor& labels, std::optional<Tensor> boxes, const Tensor& stuff,
    int64_t stuff_labels, std::vector<int64_t> ignored_stuff, double score_threshold, double overlap_threshold,
    int64_t stuff_area_threshold, double box_overlap_threshold) {
    check_panoptic_merge(
        masks, scores, labels, boxes, stuff, stuff_labels, score_threshold, overlap_threshold, box_overlap_threshold);
    const int64_t count = masks.size(0), rows = count + stuff_labels;
    const Image image{masks.size(1), masks.size(2), words_per_row(masks.size(2))};
    Tensor id_map = empty_like_sized(masks, {image.height, image.width}, ScalarType::Int);
    Tensor table = empty_like_sized(masks, {rows, kMergeColumns}, ScalarType::Long);
    Tensor segment_scores = empty_like_sized(masks, {rows}, ScalarType::Float);
    Tensor segment_count = empty_like_sized(masks, {}, ScalarType::Long);

    std::vector<Segment> segments;
    const Tensor score_values = contiguous_as(scores, ScalarType::Double);
    if (id_map.numel() != 0) {
        const Tensor mask_values = to_contiguous(masks);
        const Tensor label_values = contiguous_as(labels, ScalarType::Long);
        const std::optional<Tensor> box_values =
            boxes ? std::optional<Tensor>(contiguous_as(*boxes, ScalarType::Double)) : std::nullopt;
        std::vector<bool> ignored(static_cast<size_t>(stuff_labels));
        for (const int64_t label : ignored_stuff) {
            if (label >= 0 && label < stuff_labels) {
                ignored[static_cast<size_t>(label)] = true;
            }
        }
        const auto run = [&](auto zero, const Tensor& stuff_values) {
            using label_t = decltype(zero);
            segments = merge(
                data<uint8_t>(mask_values), data<double>(score_values), data<int64_t>(label_values),
                box_values ? data<double>(*box_values) : nullptr, data<label_t>(stuff_values), ignored,
                mutable_data<int32_t>(id_map), count, image,
                {score_threshold, overlap_threshold, stuff_area_threshold, box_overlap_threshold});
        };
        switch (stuff.scalar_type()) {
            case ScalarType::Byte:
                run(uint8_t{}, to_contiguous(stuff));
                break;
            case ScalarType::Int:
                run(int32_t{}, to_contiguous(stuff));
                break;
            default:
                run(int64_t{}, contiguous_as(stuff, ScalarType::Long));
        }
    }

    int64_t* row = mutable_data<int64_t>(table);
    float* score = mutable_data<float>(segment_scores);
    std::fill(row, row + rows * kMergeColumns, 0);
    std::fill(score, score + rows, 0.0f);
    for (int64_t r = 0; r < rows; ++r, row += kMergeColumns) {
        row[kMergeLabel] = row[kMergeInstance] = -1;
        if (r >= static_cast<int64_t>(segments.size())) {
            continue;
        }
        const Segment& segment = segments[static_cast<size_t>(r)];
        row[kMergeLabel] = segment.label;
        row[kMergeIsThing] = segment.instance >= 0;
        row[kMergeInstance] = segment.instance;
        row[kMergeArea] = segment.area;
        row[kMergeX] = segment.extent.x1;
        row[kMergeY] = segment.extent.y1;
        row[kMergeWidth] = segment.extent.x2 - segment.extent.x1 + 1;
        row[kMergeHeight] = segment.extent.y2 - segment.extent.y1 + 1;
        if (segment.instance >= 0) {
            score[r] = static_cast<float>(data<double>(score_values)[segment.instance]);
        }
    }
    *mutable_data<int64_t>(segment_count) = static_cast<int64_t>(segments.size());
    return {id_map, table, segment_scores, segment_count};
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("panoptic_merge", TORCH_BOX(&spatialflow::panoptic_merge_cpu));
}
