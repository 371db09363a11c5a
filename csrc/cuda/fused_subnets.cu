// SPDX-License-Identifier: Apache-2.0
//
// fused_subnets on CUDA: the four sub-networks of SpatialFlow and their flows over a whole pyramid, a launch per wave.
//
//   source = relu(conv(source))                     reg, or cls
//   f      = relu(conv(f + flow_f(source)))         f = follower and stuff
//
// per stage, and after the last one thing = relu(conv(P + semantic(stuff) + flow(source))). A convolution belongs to
// the wave after those of what it reads; all convolutions of a wave, on all levels, are one launch of conv3x3.cu, which
// has formula, mapping and tiles. Flows are written as maps of their own and added where the next convolution reads, so
// a flow waits for its source alone: four stages with all flows are 23 convolutions in 8 waves,
//
//   reg0 | reg1 flow0 | reg2 flow1 f0 | reg3 flow2 f1 | flow3 f2, flow of thing | f3 | semantic | thing
//
// where flow and f stand for those of cls and of stuff. Maps are made when their wave is launched and given back after
// the last wave that reads them. (On compute capability 9.0 a wave may be two launches, see sm90_conv3x3.cu.)
//
// Floor (H100, 790 TFLOP/s bf16), 256 channels, P3..P7 of 800 x 1333: 604 GFLOP: 0.76 ms; maps 0.5 GB: 0.17 ms.
// Expected: 1.5 ms, by the rate of mma.sync and what rectangles cover in vain (conv3x3.cu); by wgmma 1.0 ms
// (H200: 1,009 us; docs/kernels.md has the model).
#include <algorithm>
#include <memory>

#include "cuda/conv3x3.h"
#include "ops/fused_subnets.h"

namespace spatialflow {
namespace {

// Maps of the first `levels` levels; those made by a wave are empty until it is launched.
struct Maps {
    std::vector<Tensor> tensors;
    size_t levels;
    int64_t channels;
    size_t wave;  // first wave that may read them
};
using Feature = std::shared_ptr<Maps>;

// The convolutions of a tower, by waves.
class Schedule {
public:
    explicit Schedule(const std::vector<Tensor>& levels) : levels_(levels) {}

    // The first `count` of the given levels.
    Feature input(size_t count) const {
        const auto end = levels_.begin() + static_cast<std::ptrdiff_t>(count);
        return std::make_shared<Maps>(Maps{{levels_.begin(), end}, count, levels_[0].size(1), 0});
    }

    // relu(conv(source + flow)); `flow` may be null.
    Feature stage(const Feature& source, const Feature& flow, const TowerConv& conv) {
        return append({source, flow, nullptr, nullptr, &conv, true}, source->levels);
    }
    // conv(source) on `count` levels.
    Feature flow(const Feature& source, const TowerConv& conv, size_t count) {
        return append({source, nullptr, nullptr, nullptr, &conv, false}, count);
    }
    // f + conv(source).
    Feature sum(const Feature& f, const Feature& source, const TowerConv& conv) {
        return append({source, nullptr, f, nullptr, &conv, false}, f->levels);
    }

    void launch(Stream stream) {
        for (std::vector<Node>& wave : waves_) {
            std::vector<Convolution> convolutions;
            for (const Node& node : wave) {
                node.target->tensors = empty_channels_last(levels_, node.target->levels, node.target->channels);
                convolutions.push_back(
                    {node.source->tensors, maps_of(node.flow), maps_of(node.residual), node.target->tensors,
                     node.conv->packed, node.conv->bias, node.relu, node.conv->algorithm});
            }
            convolve3x3("fused_subnets", std::move(convolutions), stream);
            wave.clear();
        }
    }

private:
    struct Node {
        Feature source, flow, residual, target;
        const TowerConv* conv;
        bool relu;
    };

    static std::vector<Tensor> maps_of(const Feature& feature) {
        return feature ? feature->tensors : std::vector<Tensor>{};
    }

    Feature append(Node node, size_t count) {
        size_t wave = node.source->wave;
        for (const Feature& other : {node.flow, node.residual}) {
            wave = std::max(wave, other ? other->wave : 0);
        }
        node.target = std::make_shared<Maps>(Maps{{}, count, node.conv->out_channels, wave + 1});
        waves_.resize(std::max(waves_.size(), wave + 1));
        waves_[wave].push_back(node);
        return node.target;
    }

    const std::vector<Tensor>& levels_;
    std::vector<std::vector<Node>> waves_;
};

// Final features of cls, reg, stuff, thing: those that are no input levels.
std::vector<Feature> schedule_tower(
    Schedule& schedule, TowerConvolutions& convs, const Feature& all, const Feature& large, bool source_is_cls) {
    const TowerList source_list = source_is_cls ? kTowerCls : kTowerReg;
    Feature source = all;
    struct Follower {
        TowerList stages, flows;
        Feature feature;
    };
    Follower followers[] = {{source_is_cls ? kTowerReg : kTowerCls, kFlowCls, all}, {kTowerStuff, kFlowStuff, large}};

    // Stage `s` of a sub-network with its flow; without that stage, the flow alone.
    const auto advance = [&](Feature& f, TowerList list, TowerList flows, size_t s) {
        if (f->levels == 0) {
            return;
        }
        const TowerConv* flow = convs.at(flows, s, source->channels, f->channels);
        if (const TowerConv* conv = convs.at(list, s, f->channels)) {
            f = schedule.stage(f, flow ? schedule.flow(source, *flow, f->levels) : nullptr, *conv);
        } else if (flow) {
            f = schedule.sum(f, source, *flow);
        }
    };

    const size_t stages = std::max({convs.stages(kTowerCls), convs.stages(kTowerReg), convs.stages(kTowerStuff)});
    for (size_t s = 0; s < stages; ++s) {
        if (const TowerConv* conv = convs.at(source_list, s, source->channels)) {
            source = schedule.stage(source, nullptr, *conv);
        }
        for (Follower& follower : followers) {
            if (s < convs.stages(follower.stages)) {
                advance(follower.feature, follower.stages, follower.flows, s);
            }
        }
    }
    for (Follower& follower : followers) {
        if (convs.stages(follower.stages) == 0) {
            advance(follower.feature, follower.stages, follower.flows, 0);
        }
    }
    const Feature stuff = followers[1].feature;
    Feature thing = large;
    for (size_t s = 0; s < std::max<size_t>(convs.stages(kTowerThing), 1) && large->levels > 0; ++s) {
        if (const TowerConv* semantic = convs.at(kFlowSemantic, s, stuff->channels, thing->channels)) {
            thing = schedule.sum(thing, stuff, *semantic);
        }
        advance(thing, kTowerThing, kFlowThing, s);
    }

    std::vector<Feature> results;
    const Feature& other = followers[0].feature;
    for (const Feature& feature : {source_is_cls ? source : other, source_is_cls ? other : source, stuff, thing}) {
        if (feature->wave > 0) {
            results.push_back(feature);
        }
    }
    return results;
}

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
    TowerConvolutions convs(packed, biases, algorithms, counts, accum_dtype(levels[0].scalar_type()), kPackedColumns);
    Schedule schedule(dense);
    const std::vector<Feature> features = schedule_tower(
        schedule, convs, schedule.input(levels.size()), schedule.input(static_cast<size_t>(segmentation_levels)),
        source_is_cls);
    schedule.launch(device.stream());
    std::vector<Tensor> results;
    for (const Feature& feature : features) {
        const std::vector<Tensor> maps = in_format_of(levels, std::move(feature->tensors));
        results.insert(results.end(), maps.begin(), maps.end());
    }
    return results;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("fused_subnets", TORCH_BOX(&spatialflow::fused_subnets_cuda)); }
