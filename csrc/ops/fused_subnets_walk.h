// SPDX-License-Identifier: Apache-2.0
//
// Schedule of the sub-networks of SpatialFlow and their flows, shared by the back ends of fused_subnets. Each stage
// computes
//
//   source   = relu(conv(source))                        the box sub-network, or the class sub-network
//   follower = relu(conv(follower + flow(source)))       the other of these two, and stuff
//
// After the last of these stages, each stage of thing computes, from the final stuff and source,
//
//   thing    = relu(conv(thing + semantic_flow(stuff) + flow(source))).
#pragma once

#include <algorithm>

#include "ops/fused_subnets.h"

namespace spatialflow {

// One update: feature = relu(conv(feature + flow(source))). If `flow` is null, nothing is added; if `conv` is null, the
// result is the sum. At least one of them is present.
template <typename Feature>
struct SubnetUpdate {
    Feature* feature;
    const SubnetConv* flow;
    const SubnetConv* conv;
};

// Schedule with a policy class. The policy runs the convolutions immediately (CPU) or grouped by dependency level
// (CUDA). It has these members:
//
//   Feature                           the maps of one sub-network
//   Feature input(size_t count)       the first `count` input levels
//   size_t num_levels(feature)        number of levels of a feature
//   int64_t channels(feature)         number of channels of a feature
//   bool is_input(feature)            whether no convolution has written the feature
//   void advance(source, updates)     apply each SubnetUpdate; all updates read the same `source`
template <typename Policy>
class SubnetWalk {
public:
    using Feature = typename Policy::Feature;

    SubnetWalk(Policy& policy, SubnetConvs& convs) : policy_(policy), convs_(convs) {}

    // Run the schedule. Return the final features of cls, reg, stuff and thing, without features that are still input
    // levels.
    std::vector<Feature> run(size_t levels, size_t segmentation_levels, bool source_is_cls) {
        const SubnetList source_list = source_is_cls ? kSubnetCls : kSubnetReg;
        const Feature all = policy_.input(levels), large = policy_.input(segmentation_levels);
        Feature source = all, thing = large;
        Follower followers[] = {
            {source_is_cls ? kSubnetReg : kSubnetCls, kFlowCls, all}, {kSubnetStuff, kFlowStuff, large}};

        const size_t stages =
            std::max({convs_.stages(kSubnetCls), convs_.stages(kSubnetReg), convs_.stages(kSubnetStuff)});
        for (size_t s = 0; s < stages; ++s) {
            if (const SubnetConv* conv = convs_.at(source_list, s, policy_.channels(source))) {
                policy_.advance(source, {{&source, nullptr, conv}});
            }
            advance(source, followers, s, [&](const Follower& follower) { return s < convs_.stages(follower.stages); });
        }
        // The flow into a sub-network without stages is added to its input levels.
        advance(source, followers, 0, [&](const Follower& follower) { return convs_.stages(follower.stages) == 0; });

        const Feature& stuff = followers[1].feature;
        for (size_t s = 0; s < std::max<size_t>(convs_.stages(kSubnetThing), 1) && segmentation_levels > 0; ++s) {
            if (const SubnetConv* flow =
                    convs_.at(kFlowSemantic, s, policy_.channels(stuff), policy_.channels(thing))) {
                policy_.advance(stuff, {{&thing, flow, nullptr}});
            }
            Updates updates;
            append(updates, source, thing, kSubnetThing, kFlowThing, s);
            policy_.advance(source, updates);
        }
        return written(source_is_cls, source, followers[0].feature, stuff, thing);
    }

private:
    using Updates = std::vector<SubnetUpdate<Feature>>;

    // A sub-network that adds flows from the source.
    struct Follower {
        SubnetList stages, flows;
        Feature feature;
    };

    // Run stage `s` of the followers for which has_stage(follower) is true.
    template <typename HasStage>
    void advance(const Feature& source, Follower (&followers)[2], size_t s, const HasStage& has_stage) {
        Updates updates;
        for (Follower& follower : followers) {
            if (has_stage(follower)) {
                append(updates, source, follower.feature, follower.stages, follower.flows, s);
            }
        }
        policy_.advance(source, updates);
    }

    void append(
        Updates& updates, const Feature& source, Feature& feature, SubnetList stages, SubnetList flows, size_t s) {
        if (policy_.num_levels(feature) == 0) {
            return;
        }
        const int64_t channels = policy_.channels(feature);
        const SubnetConv* flow = convs_.at(flows, s, policy_.channels(source), channels);
        const SubnetConv* conv = convs_.at(stages, s, channels);
        if (flow || conv) {
            updates.push_back({&feature, flow, conv});
        }
    }

    std::vector<Feature> written(
        bool source_is_cls, const Feature& source, const Feature& follower, const Feature& stuff,
        const Feature& thing) {
        std::vector<Feature> results;
        for (const Feature* feature :
             {source_is_cls ? &source : &follower, source_is_cls ? &follower : &source, &stuff, &thing}) {
            if (!policy_.is_input(*feature)) {
                results.push_back(*feature);
            }
        }
        return results;
    }

    Policy& policy_;
    SubnetConvs& convs_;
};

}  // namespace spatialflow
