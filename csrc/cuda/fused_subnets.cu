// SPDX-License-Identifier: Apache-2.0
//
// fused_subnets on CUDA: the sub-networks of SpatialFlow and their flows over a whole pyramid, by one call of
// convolve3x3 per dependency level of the schedule in ops/fused_subnets_walk.h.
//
// A convolution that reads only inputs has dependency level 0. Any other convolution is one level above the highest
// convolution whose result it reads. One call computes all convolutions of a dependency level, on all maps. It is
// usually one launch; on compute capability 9.0 it may be two (sm90_conv3x3.cu). A flow is itself a convolution. A flow
// into another convolution is written to separate maps, which that convolution adds to its input. So the flow depends
// on its source only. Any other flow adds the feature as its residual. With four stages and all flows, there are 23
// convolutions in 8 levels. flow0 stands for the two flows into cls and stuff at stage 0; f0 stands for the two
// convolutions of cls and stuff:
//
//   reg0 | reg1 flow0 | reg2 flow1 f0 | reg3 flow2 f1 | flow3 f2, flow of thing | f3 | semantic | thing
#include <algorithm>
#include <memory>

#include "cuda/conv3x3.h"
#include "ops/fused_subnets_walk.h"

namespace spatialflow {
namespace {

// Policy of SubnetWalk that groups convolutions by dependency level. Maps are allocated when their dependency level is
// launched, and freed after the last dependency level that reads them.
class ScheduledSubnets {
public:
    // Maps of the first `levels` levels of the pyramid. The maps of a convolution are empty until its launch.
    struct Maps {
        std::vector<Tensor> tensors;
        size_t levels;
        int64_t channels;
        size_t dependency_level;  // lowest dependency level that may read the maps; 0 for inputs
    };
    using Feature = std::shared_ptr<Maps>;

    explicit ScheduledSubnets(const std::vector<Tensor>& levels) : levels_(levels) {}

    Feature input(size_t count) const {
        const auto end = levels_.begin() + static_cast<std::ptrdiff_t>(count);
        return std::make_shared<Maps>(Maps{{levels_.begin(), end}, count, levels_[0].size(1), 0});
    }
    static size_t num_levels(const Feature& feature) { return feature->levels; }
    static int64_t channels(const Feature& feature) { return feature->channels; }
    static bool is_input(const Feature& feature) { return feature->dependency_level == 0; }

    void advance(const Feature& source, const std::vector<SubnetUpdate<Feature>>& updates) {
        for (const SubnetUpdate<Feature>& update : updates) {
            Feature& feature = *update.feature;
            if (!update.conv) {
                feature = append({source, nullptr, feature, nullptr, update.flow, false}, feature->levels);
                continue;
            }
            const Feature flow = update.flow
                                     ? append({source, nullptr, nullptr, nullptr, update.flow, false}, feature->levels)
                                     : nullptr;
            feature = append({feature, flow, nullptr, nullptr, update.conv, true}, feature->levels);
        }
    }

    void launch(Stream stream) {
        for (std::vector<Node>& nodes : nodes_) {
            std::vector<Convolution> convolutions;
            for (const Node& node : nodes) {
                node.target->tensors = empty_channels_last(levels_, node.target->levels, node.target->channels);
                convolutions.push_back(
                    {node.source->tensors, maps_of(node.flow), maps_of(node.residual), node.target->tensors,
                     node.conv->packed, node.conv->bias, node.relu, node.conv->algorithm});
            }
            convolve3x3("fused_subnets", std::move(convolutions), stream);
            nodes.clear();
        }
    }

private:
    // target = conv(source + flow) + residual, with ReLU if `relu`; flow and residual may be null.
    struct Node {
        Feature source, flow, residual, target;
        const SubnetConv* conv;
        bool relu;
    };

    static std::vector<Tensor> maps_of(const Feature& feature) {
        return feature ? feature->tensors : std::vector<Tensor>{};
    }

    Feature append(Node node, size_t count) {
        size_t level = node.source->dependency_level;
        for (const Feature& operand : {node.flow, node.residual}) {
            level = std::max(level, operand ? operand->dependency_level : 0);
        }
        node.target = std::make_shared<Maps>(Maps{{}, count, node.conv->out_channels, level + 1});
        nodes_.resize(std::max(nodes_.size(), level + 1));
        nodes_[level].push_back(node);
        return node.target;
    }

    const std::vector<Tensor>& levels_;
    std::vector<std::vector<Node>> nodes_;  // by dependency level
};

std::vector<Tensor> fused_subnets_cuda(
    const std::vector<Tensor>& levels, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
    const std::vector<int64_t>& algorithms, const std::vector<int64_t>& counts, bool source_is_cls,
    int64_t segmentation_levels) {
    check_fused_subnets(levels, packed, biases, algorithms, counts, segmentation_levels);
    const DeviceScope device(levels[0]);
    std::vector<Tensor> dense;
    for (const Tensor& level : levels) {
        dense.push_back(to_contiguous(level, MemoryFormat::ChannelsLast));
    }
    SubnetConvs convs(packed, biases, algorithms, counts, accum_dtype(levels[0].scalar_type()), kPackedColumns);
    ScheduledSubnets subnets(dense);
    const auto features = SubnetWalk<ScheduledSubnets>(subnets, convs)
                              .run(dense.size(), static_cast<size_t>(segmentation_levels), source_is_cls);
    subnets.launch(device.stream());
    std::vector<Tensor> results;
    for (const ScheduledSubnets::Feature& feature : features) {
        const std::vector<Tensor> maps = in_format_of(levels, std::move(feature->tensors));
        results.insert(results.end(), maps.begin(), maps.end());
    }
    return results;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("fused_subnets", TORCH_BOX(&spatialflow::fused_subnets_cuda)); }
