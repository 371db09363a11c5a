// SPDX-License-Identifier: Apache-2.0
//
// Panoptic merge on CUDA, without synchronization with the host: instances, a stuff label map and boxes to an id map
// and a table of segments. The rules are in common/panoptic_merge.h. The kernels are in panoptic_merge_instances.cuh,
// panoptic_merge_stuff.cuh and panoptic_merge_output.cuh, and run in this order, except that `ignore` follows `order`.
// Each decision on an instance or box depends on all earlier ones, so `greedy` and `fill` run as one block. The small
// kernels `ignore` and `label` also run as one block; the others use the whole device.
//
// Layouts: an image is a flat array of pixels; bit i of word w is pixel 32 w + i. `greedy` and `fill` keep the bits of
// an image in shared memory if it is large enough. Counts are integers, so the order of atomics and blocks does not
// matter. Bounding boxes are initialized with zeros, so they are stored as maxima: of W - x1, H - y1, x2 and y2.
#include "cuda/panoptic_merge_instances.cuh"
#include "cuda/panoptic_merge_output.cuh"
#include "cuda/panoptic_merge_stuff.cuh"

namespace spatialflow {
namespace {

// Scratch memory of a merge: its layout, allocation and pointers.
class MergeWorkspace {
public:
    MergeWorkspace(int64_t instances, int64_t stuff_labels, int64_t height, int64_t width, const Tensor& like)
        : instances_(instances),
          stuff_labels_(stuff_labels),
          height_(height),
          width_(width),
          workspace_(layout_, like) {}

    void clear(Stream stream) const { clear_words(workspace_, zeros_, stream); }

    MergeScratch scratch() const {
        MergeScratch scratch{};
        scratch.instances = static_cast<int>(instances_);
        scratch.stuff_labels = static_cast<int>(stuff_labels_);
        scratch.height = static_cast<int>(height_);
        scratch.width = static_cast<int>(width_);
        scratch.pixels = static_cast<int>(height_ * width_);
        scratch.words = static_cast<int>(words_);
        scratch.candidates = workspace_[candidates_];
        scratch.segments = workspace_[segments_];
        scratch.area = workspace_[area_];
        scratch.words_from = workspace_[words_from_];
        scratch.end_word = workspace_[end_word_];
        scratch.id_of = workspace_[id_of_];
        scratch.fill_id = workspace_[fill_id_];
        scratch.stuff_area = workspace_[stuff_area_];
        scratch.stuff_id = workspace_[stuff_id_];
        scratch.ignored = workspace_[ignored_];
        scratch.measured = workspace_[measured_];
        scratch.used = workspace_[used_];
        scratch.order = workspace_[order_];
        scratch.boxes = workspace_[boxes_];
        scratch.segment_source = workspace_[segment_source_];
        scratch.void_pixels = workspace_[void_pixels_];
        scratch.bits = workspace_[bits_];
        return scratch;
    }

private:
    // Initializers run in the order of the members, so all parts are laid out before the workspace is allocated.
    const int64_t instances_, stuff_labels_, height_, width_;
    const int64_t rows_ = instances_ + stuff_labels_;
    const int64_t words_ = ceil_div(height_ * width_, kGroup* kWarpSize) * kGroup;
    WorkspaceLayout layout_;
    // Zero before the first kernel.
    const WorkspacePart<int> candidates_ = layout_.add<int>(1), segments_ = layout_.add<int>(1);
    const WorkspacePart<int> area_ = layout_.add<int>(instances_), words_from_ = layout_.add<int>(instances_);
    const WorkspacePart<int> end_word_ = layout_.add<int>(instances_), id_of_ = layout_.add<int>(instances_);
    const WorkspacePart<int> fill_id_ = layout_.add<int>(instances_);
    const WorkspacePart<int> stuff_area_ = layout_.add<int>(stuff_labels_);
    const WorkspacePart<int> stuff_id_ = layout_.add<int>(stuff_labels_);
    const WorkspacePart<int> ignored_ = layout_.add<int>(stuff_labels_), measured_ = layout_.add<int>(5 * rows_);
    const WorkspacePart<unsigned> used_ = layout_.add<unsigned>(words_);
    const int64_t zeros_ = layout_.words;
    // Written before they are read.
    const WorkspacePart<int> order_ = layout_.add<int>(instances_), boxes_ = layout_.add<int>(4 * instances_);
    const WorkspacePart<int> segment_source_ = layout_.add<int>(rows_);
    const WorkspacePart<unsigned> void_pixels_ = layout_.add<unsigned>(words_);
    const WorkspacePart<unsigned> bits_ = layout_.add<unsigned>(instances_ * words_);
    const Workspace workspace_;
};

constexpr int64_t kStaticSharedBytes = 1024;  // upper bound for `greedy` and `fill`

dim3 blocks_for(int64_t items, int64_t per_block) {
    return dim3(grid_size("panoptic_merge", ceil_div(items, per_block)));
}

// Launcher of the kernels of a merge. Each method launches the kernels that need the same inputs.
struct MergeLauncher {
    const MergeScratch scratch;
    const MergeOptions options;
    const bool has_boxes;
    const bool in_shared;  // the bits of an image fit in shared memory
    const Stream stream;

    MergeLauncher(const MergeScratch& scratch, const MergeOptions& options, bool has_boxes, Stream stream)
        : scratch(scratch),
          options(options),
          has_boxes(has_boxes),
          in_shared(scratch.words * int64_t{4} <= largest_shared_bytes(stream) - kStaticSharedBytes),
          stream(stream) {}

    void order(const Tensor& scores, const Tensor& boxes) const {
        launch<merge_order_kernel>(
            blocks_for(scratch.instances, kThreads), dim3(kThreads), 0, stream, data<double>(scores),
            has_boxes ? data<double>(boxes) : Global<const double>(nullptr), scratch, options);
    }

    void ignore(const std::vector<int64_t>& labels) const {
        for (size_t first = 0; first < labels.size(); first += kIgnoredPerLaunch) {
            IgnoredLabels ignored{};
            for (; ignored.count < kIgnoredPerLaunch && first + ignored.count < labels.size(); ++ignored.count) {
                ignored.labels[ignored.count] = labels[first + ignored.count];
            }
            launch<merge_ignore_kernel>(dim3(1), dim3(kIgnoredPerLaunch), 0, stream, scratch, ignored);
        }
    }

    // Pack masks, with the widest loads that alignment allows.
    void pack(const Tensor& masks) const {
        const auto are_aligned = [&](int64_t bytes) {
            return scratch.pixels % bytes == 0 && is_aligned(masks.const_data_ptr(), static_cast<size_t>(bytes));
        };
        if (are_aligned(16)) {
            pack_pixels<16>(masks);
        } else if (are_aligned(4)) {
            pack_pixels<4>(masks);
        } else {
            pack_pixels<1>(masks);
        }
    }

    void greedy() const {
        if (in_shared) {
            launch<merge_greedy_kernel<true>>(dim3(1), dim3(kGreedyThreads), shared_bytes(), stream, scratch, options);
        } else {
            launch<merge_greedy_kernel<false>>(dim3(1), dim3(kGreedyThreads), 0, stream, scratch, options);
        }
    }

    // Choose the stuff labels, fill boxes, and write all pixels without an instance.
    template <typename label_t>
    void stuff(const Tensor& labels, const Tensor& id_map) const {
        const Global<const label_t> values = data<label_t>(labels);
        const dim3 grid = blocks_for(scratch.words, kLoads * kWarps), threads(kThreads);
        launch<merge_count_kernel<label_t>>(grid, threads, 0, stream, values, scratch);
        launch<merge_label_kernel>(dim3(1), dim3(kWarpSize), 0, stream, scratch, options);
        if (has_boxes) {
            launch<merge_void_kernel<label_t>>(grid, threads, 0, stream, values, scratch);
            if (in_shared) {
                launch<merge_fill_kernel<true>>(
                    dim3(1), dim3(kGreedyThreads), shared_bytes(), stream, scratch, options);
            } else {
                launch<merge_fill_kernel<false>>(dim3(1), dim3(kGreedyThreads), 0, stream, scratch, options);
            }
        }
        launch<merge_paint_stuff_kernel<label_t>>(
            grid, threads, 0, stream, values, mutable_data<int>(id_map), scratch, has_boxes);
    }

    void paint_instances(const Tensor& id_map) const {
        const dim3 grid(blocks_for(scratch.words, 4 * kThreads).x, static_cast<unsigned>(scratch.instances));
        launch<merge_paint_instances_kernel>(grid, dim3(kThreads), 0, stream, mutable_data<int>(id_map), scratch);
    }

    void measure(const Tensor& id_map) const {
        const int64_t parts = ceil_div(scratch.width, kLoads * kWarpSize);
        launch<merge_measure_kernel>(
            blocks_for(scratch.height * parts, kWarps), dim3(kThreads), 0, stream, data<int>(id_map), scratch,
            static_cast<int>(parts));
    }

private:
    size_t shared_bytes() const { return static_cast<size_t>(scratch.words) * 4; }

    template <int kPixels>
    void pack_pixels(const Tensor& masks) const {
        const dim3 grid(
            blocks_for(scratch.words, kPixels * kLoads * kWarps).x, static_cast<unsigned>(scratch.instances));
        launch<merge_pack_kernel<kPixels>>(grid, dim3(kThreads), 0, stream, data<uint8_t>(masks), scratch);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> panoptic_merge_cuda(
    const Tensor& masks, const Tensor& scores, const Tensor& labels, std::optional<Tensor> boxes, const Tensor& stuff,
    int64_t stuff_labels, std::vector<int64_t> ignored_stuff, double score_threshold, double overlap_threshold,
    int64_t stuff_area_threshold, double box_overlap_threshold) {
    const char* op = "panoptic_merge";
    check_panoptic_merge(
        masks, scores, labels, boxes, stuff, stuff_labels, score_threshold, overlap_threshold, box_overlap_threshold);
    const DeviceScope device(masks);
    const Stream stream = device.stream();
    const int64_t count = masks.size(0), height = masks.size(1), width = masks.size(2), pixels = height * width;
    check(
        pixels < 0x7fff0000, op, ": masks must have fewer than 2^31 - 2^16 pixels on CUDA, got ", height, " x ", width);
    check(count <= 65535, op, ": at most 65535 masks on CUDA, got ", count);
    const int64_t rows = count + stuff_labels;
    Tensor id_map = empty_like_sized(masks, {height, width}, ScalarType::Int);
    Tensor table = empty_like_sized(masks, {rows, kMergeColumns}, ScalarType::Long);
    Tensor segment_scores = empty_like_sized(masks, {rows}, ScalarType::Float);
    Tensor segment_count = empty_like_sized(masks, {}, ScalarType::Long);

    const Tensor mask_values = to_contiguous(masks), score_values = contiguous_as(scores, ScalarType::Double);
    const Tensor label_values = contiguous_as(labels, ScalarType::Long);
    const MergeWorkspace workspace(count, stuff_labels, height, width, masks);
    workspace.clear(stream);
    const MergeScratch scratch = workspace.scratch();
    if (pixels != 0) {
        const bool has_boxes = boxes && count != 0;
        const MergeOptions options{score_threshold, overlap_threshold, box_overlap_threshold, stuff_area_threshold};
        const MergeLauncher launcher(scratch, options, has_boxes, stream);
        launcher.order(score_values, has_boxes ? contiguous_as(*boxes, ScalarType::Double) : score_values);
        launcher.ignore(ignored_stuff);
        launcher.pack(mask_values);
        launcher.greedy();
        switch (stuff.scalar_type()) {
            case ScalarType::Byte:
                launcher.stuff<uint8_t>(to_contiguous(stuff), id_map);
                break;
            case ScalarType::Int:
                launcher.stuff<int32_t>(to_contiguous(stuff), id_map);
                break;
            default:
                launcher.stuff<int64_t>(contiguous_as(stuff, ScalarType::Long), id_map);
        }
        launcher.paint_instances(id_map);
        launcher.measure(id_map);
    }
    launch<merge_table_kernel>(
        blocks_for(rows > 0 ? rows : 1, kThreads), dim3(kThreads), 0, stream, data<double>(score_values),
        data<int64_t>(label_values), mutable_data<int64_t>(table), mutable_data<float>(segment_scores),
        mutable_data<int64_t>(segment_count), scratch);
    return {id_map, table, segment_scores, segment_count};
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("panoptic_merge", TORCH_BOX(&spatialflow::panoptic_merge_cuda)); }
