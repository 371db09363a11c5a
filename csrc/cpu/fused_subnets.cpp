// SPDX-License-Identifier: Apache-2.0
//
// fused_subnets on the CPU: the four sub-networks of SpatialFlow and their flows over a whole pyramid.
//
//   source = relu(conv(source))                     reg, or cls
//   sum_f  = f + flow_f(source)                     f = follower and stuff: branches of one job, sums in its epilogue
//   f      = relu(conv(sum_f))                      both together: one list of work for the threads
//
// per stage, and after the last one thing = relu(conv(P + semantic(stuff) + flow(source))). Only sums are stored, never
// flows; where a sum may replace its feature it does, and spent maps serve again.
#include "ops/fused_subnets.h"

#include <utility>

#include "cpu/conv3x3_tensors.h"

namespace spatialflow {
namespace {

// Maps of one sub-network. The input levels are shared and must not be overwritten; maps made here may be.
struct Feature {
    std::vector<Tensor> maps;
    bool owned = false;

    int64_t channels() const { return maps.empty() ? 0 : maps[0].size(1); }
};

template <typename scalar_t>
class Tower {
public:
    explicit Tower(const std::vector<Tensor>& levels) : levels_(levels) {}

    // Adds to the pending work: target = relu(conv(source)).
    void convolve(const Feature& source, const TowerConv& conv, Feature& target) {
        Feature result = take(target.maps.size(), conv.out_channels);
        ConvJob<scalar_t> job = {conv.in_channels, conv_levels<scalar_t>(first(source, result), {}), {}};
        job.branches.push_back(branch(conv, true, result, nullptr));
        jobs_[conv.resolved == kConvWinograd].push_back(std::move(job));
        finished_.push_back({&target, std::move(result)});
    }

    struct Flow {
        const TowerConv* conv;
        Feature* target;
    };

    // Adds to the pending work: target = target + conv(source) for each flow; one job per algorithm.
    void add_flows(const Feature& source, const std::vector<Flow>& flows) {
        for (const int64_t algorithm : {kConvWinograd, kConvDirect}) {
            ConvJob<scalar_t> job = {source.channels(), {}, {}};
            for (const Flow& flow : flows) {
                if (flow.conv->resolved == algorithm) {
                    Feature& f = *flow.target;
                    Feature sum = f.owned ? f : take(f.maps.size(), flow.conv->out_channels);
                    job.branches.push_back(branch(*flow.conv, false, sum, flow.target));
                    if (sum.maps.size() > job.levels.size()) {
                        job.levels = conv_levels<scalar_t>(first(source, sum), {});
                    }
                    finished_.push_back({flow.target, std::move(sum)});
                }
            }
            if (!job.branches.empty()) {
                jobs_[algorithm == kConvWinograd].push_back(std::move(job));
            }
        }
    }

    // Does the pending work; then the targets are what was asked for.
    void run() {
        for (const bool winograd : {false, true}) {
            if (!jobs_[winograd].empty()) {
                run_conv3x3<scalar_t>(winograd ? kConvWinograd : kConvDirect, jobs_[winograd]);
                jobs_[winograd].clear();
            }
        }
        for (auto& [target, result] : finished_) {
            if (target->owned && target->maps[0].const_data_ptr() != result.maps[0].const_data_ptr()) {
                spare_.push_back(std::move(*target));
            }
            *target = std::move(result);
        }
        finished_.clear();
    }

private:
    // The levels of `source` that `target` has.
    static std::vector<Tensor> first(const Feature& source, const Feature& target) {
        return {source.maps.begin(), source.maps.begin() + static_cast<std::ptrdiff_t>(target.maps.size())};
    }

    static ConvBranch<scalar_t> branch(const TowerConv& conv, bool relu, const Feature& out, const Feature* residual) {
        ConvBranch<scalar_t> result = {
            data<accum_t<scalar_t>>(conv.packed),
            data<accum_t<scalar_t>>(conv.bias),
            conv.out_channels,
            relu,
            output_pointers<scalar_t>(out.maps),
            {}};
        if (residual) {
            for (const Tensor& map : residual->maps) {
                result.residual.push_back(data<scalar_t>(map));
            }
        }
        return result;
    }

    // Maps for the first `count` levels: spent ones where there are any, else new ones.
    Feature take(size_t count, int64_t channels) {
        for (size_t i = 0; i < spare_.size(); ++i) {
            if (spare_[i].maps.size() == count && spare_[i].channels() == channels) {
                Feature found = std::move(spare_[i]);
                spare_.erase(spare_.begin() + static_cast<std::ptrdiff_t>(i));
                return found;
            }
        }
        const std::vector<Tensor> like(levels_.begin(), levels_.begin() + static_cast<std::ptrdiff_t>(count));
        return {empty_channels_last(like, channels), true};
    }

    const std::vector<Tensor>& levels_;
    std::vector<ConvJob<scalar_t>> jobs_[2];  // direct, winograd
    std::vector<std::pair<Feature*, Feature>> finished_;
    std::vector<Feature> spare_;
};

template <typename scalar_t>
std::vector<Feature> run_tower(  // those of cls, reg, stuff, thing that are no input levels
    const std::vector<Tensor>& levels, TowerConvolutions& convs, bool source_is_cls, size_t segmentation_levels) {
    Tower<scalar_t> tower(levels);
    const TowerList source_list = source_is_cls ? kTowerCls : kTowerReg;
    const Feature all = {levels, false};
    const Feature large = {{levels.begin(), levels.begin() + static_cast<std::ptrdiff_t>(segmentation_levels)}, false};
    Feature source = all, stuff = large, thing = large;
    struct Follower {
        TowerList stages, flows;
        Feature feature;
    };
    Follower followers[] = {{source_is_cls ? kTowerReg : kTowerCls, kFlowCls, all}, {kTowerStuff, kFlowStuff, large}};

    // f + flow for those followers that have stage `s`, then their convolutions.
    const auto flow_into = [&](size_t s, const auto& has_stage) {
        std::vector<typename Tower<scalar_t>::Flow> flows;
        for (Follower& follower : followers) {
            const Feature& f = follower.feature;
            if (has_stage(follower) && !f.maps.empty()) {
                if (const TowerConv* flow = convs.at(follower.flows, s, source.channels(), f.channels())) {
                    flows.push_back({flow, &follower.feature});
                }
            }
        }
        tower.add_flows(source, flows);
        tower.run();
    };
    const size_t stages = std::max({convs.stages(kTowerCls), convs.stages(kTowerReg), convs.stages(kTowerStuff)});
    for (size_t s = 0; s < stages; ++s) {
        if (const TowerConv* conv = convs.at(source_list, s, source.channels())) {
            tower.convolve(source, *conv, source);
            tower.run();
        }
        flow_into(s, [&](const Follower& follower) { return s < convs.stages(follower.stages); });
        for (Follower& follower : followers) {
            if (!follower.feature.maps.empty()) {
                if (const TowerConv* conv = convs.at(follower.stages, s, follower.feature.channels())) {
                    tower.convolve(follower.feature, *conv, follower.feature);
                }
            }
        }
        tower.run();
    }
    // A sub-network without stages takes its flow directly.
    flow_into(0, [&](const Follower& follower) { return convs.stages(follower.stages) == 0; });
    stuff = followers[1].feature;

    const size_t thing_stages = convs.stages(kTowerThing);
    for (size_t s = 0; s < std::max<size_t>(thing_stages, 1) && segmentation_levels > 0; ++s) {
        if (const TowerConv* semantic = convs.at(kFlowSemantic, s, stuff.channels(), thing.channels())) {
            tower.add_flows(stuff, {{semantic, &thing}});
            tower.run();
        }
        if (const TowerConv* flow = convs.at(kFlowThing, s, source.channels(), thing.channels())) {
            tower.add_flows(source, {{flow, &thing}});
            tower.run();
        }
        if (const TowerConv* conv = convs.at(kTowerThing, s, thing.channels())) {
            tower.convolve(thing, *conv, thing);
            tower.run();
        }
    }

    std::vector<Feature> results;
    const Feature& other = followers[0].feature;
    for (const Feature& feature : {source_is_cls ? source : other, source_is_cls ? other : source, stuff, thing}) {
        if (feature.owned) {
            results.push_back(feature);
        }
    }
    return results;
}

std::vector<Tensor> fused_subnets_cpu(
    const std::vector<Tensor>& levels, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
    const std::vector<int64_t>& algorithms, const std::vector<int64_t>& counts, bool source_is_cls,
    int64_t segmentation_levels) {
    check_fused_subnets(levels, packed, biases, algorithms, counts, segmentation_levels);
    const ScalarType dtype = levels[0].scalar_type();
    const std::vector<Tensor> dense = channels_last(levels);
    TowerConvolutions convs(packed, biases, algorithms, counts, accum_dtype(dtype), kPackedColumns);
    std::vector<Tensor> results;
    dispatch_floating("fused_subnets", dtype, [&](auto zero) {
        using scalar_t = decltype(zero);
        const size_t large = static_cast<size_t>(segmentation_levels);
        for (Feature& feature : run_tower<scalar_t>(dense, convs, source_is_cls, large)) {
            const std::vector<Tensor> maps = in_format_of(levels, std::move(feature.maps));
            results.insert(results.end(), maps.begin(), maps.end());
        }
    });
    return results;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("fused_subnets", TORCH_BOX(&spatialflow::fused_subnets_cpu));
}
