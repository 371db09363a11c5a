// SPDX-License-Identifier: Apache-2.0
//
// fused_subnets on the CPU: the sub-networks of SpatialFlow and their flows over a whole pyramid.
//
// An update feature = relu(conv(feature + flow(source))) runs in two steps: first the flows, with the addition in their
// epilogue, then the convolutions. A step has one parallel loop per algorithm in use. The flows of one loop share the
// input transform of their source. Only sums are stored, never flows. A sum overwrites its feature unless the feature
// is an input level, and the memory of maps that no feature uses is reused.
#include <utility>

#include "cpu/conv3x3_tensors.h"
#include "ops/fused_subnets_walk.h"

namespace spatialflow {
namespace {

// Policy of SubnetWalk that runs convolutions immediately.
class EagerSubnets {
public:
    // Maps of one sub-network. Input levels are shared and read-only; maps allocated here are writable.
    struct Feature {
        std::vector<Tensor> maps;
        bool writable = false;
    };

    explicit EagerSubnets(const std::vector<Tensor>& levels) : levels_(levels) {}

    Feature input(size_t count) const { return {first_maps(levels_, count), false}; }
    static size_t num_levels(const Feature& feature) { return feature.maps.size(); }
    static int64_t channels(const Feature& feature) { return feature.maps.empty() ? 0 : feature.maps[0].size(1); }
    static bool is_input(const Feature& feature) { return !feature.writable; }

    void advance(const Feature& source, const std::vector<SubnetUpdate<Feature>>& updates) {
        add_flows(source, updates);
        run();
        for (const SubnetUpdate<Feature>& update : updates) {
            if (update.conv) {
                convolve(*update.feature, *update.conv);
            }
        }
        run();
    }

private:
    // Enqueue feature += flow(source) for each update with a flow, one group of convolutions per algorithm.
    void add_flows(const Feature& source, const std::vector<SubnetUpdate<Feature>>& updates) {
        for (const int64_t algorithm : {kConvWinograd, kConvDirect}) {
            ConvTensors group;
            for (const SubnetUpdate<Feature>& update : updates) {
                if (!update.flow || update.flow->resolved != algorithm) {
                    continue;
                }
                Feature& feature = *update.feature;
                Feature sum = feature.writable ? feature : allocate(num_levels(feature), update.flow->out_channels);
                group.branches.push_back({update.flow->packed, update.flow->bias, false, sum.maps, feature.maps});
                if (num_levels(sum) > group.x.size()) {
                    group.x = first_maps(source.maps, num_levels(sum));
                }
                pending_.push_back({&feature, std::move(sum)});
            }
            enqueue(algorithm, std::move(group));
        }
    }

    // Enqueue feature = relu(conv(feature)).
    void convolve(Feature& feature, const SubnetConv& conv) {
        Feature result = allocate(num_levels(feature), conv.out_channels);
        enqueue(conv.resolved, {feature.maps, {}, {{conv.packed, conv.bias, true, result.maps, {}}}, {}});
        pending_.push_back({&feature, std::move(result)});
    }

    void enqueue(int64_t algorithm, ConvTensors group) {
        if (!group.x.empty()) {
            groups_[algorithm == kConvWinograd].push_back(std::move(group));
        }
    }

    // Run the enqueued convolutions, then assign their results to the features.
    void run() {
        for (const bool winograd : {false, true}) {
            run_conv3x3(winograd ? kConvWinograd : kConvDirect, groups_[winograd]);
            groups_[winograd].clear();
        }
        for (auto& [feature, result] : pending_) {
            if (feature->writable && feature->maps[0].const_data_ptr() != result.maps[0].const_data_ptr()) {
                free_list_.push_back(std::move(*feature));
            }
            *feature = std::move(result);
        }
        pending_.clear();
    }

    static std::vector<Tensor> first_maps(const std::vector<Tensor>& maps, size_t count) {
        return {maps.begin(), maps.begin() + static_cast<std::ptrdiff_t>(count)};
    }

    // Return writable maps for the first `count` levels, from the free list if it has maps of that shape.
    Feature allocate(size_t count, int64_t channels) {
        for (size_t i = 0; i < free_list_.size(); ++i) {
            if (num_levels(free_list_[i]) == count && this->channels(free_list_[i]) == channels) {
                Feature reused = std::move(free_list_[i]);
                free_list_.erase(free_list_.begin() + static_cast<std::ptrdiff_t>(i));
                return reused;
            }
        }
        return {empty_channels_last(first_maps(levels_, count), channels), true};
    }

    const std::vector<Tensor>& levels_;
    std::vector<ConvTensors> groups_[2];                 // direct, winograd
    std::vector<std::pair<Feature*, Feature>> pending_;  // the feature and its next value
    std::vector<Feature> free_list_;
};

std::vector<Tensor> fused_subnets_cpu(
    const std::vector<Tensor>& levels, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
    const std::vector<int64_t>& algorithms, const std::vector<int64_t>& counts, bool source_is_cls,
    int64_t segmentation_levels) {
    check_fused_subnets(levels, packed, biases, algorithms, counts, segmentation_levels);
    const std::vector<Tensor> dense = channels_last(levels);
    SubnetConvs convs(packed, biases, algorithms, counts, accum_dtype(levels[0].scalar_type()), kPackedColumns);
    std::vector<Tensor> results;
    EagerSubnets subnets(dense);
    SubnetWalk<EagerSubnets> walk(subnets, convs);
    for (auto& feature : walk.run(dense.size(), static_cast<size_t>(segmentation_levels), source_is_cls)) {
        const std::vector<Tensor> maps = in_format_of(levels, std::move(feature.maps));
        results.insert(results.end(), maps.begin(), maps.end());
    }
    return results;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("fused_subnets", TORCH_BOX(&spatialflow::fused_subnets_cpu));
}
