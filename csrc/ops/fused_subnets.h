// SPDX-License-Identifier: Apache-2.0
//
// Argument checks of fused_subnets and its lists of convolutions, shared by all back ends. Schema in fused_subnets.cpp.
#pragma once

#include "ops/flow_conv2d.h"

namespace spatialflow {

// Lists of convolutions, in the order of `packed` and `biases`. An enumerator is an index into `counts`, the lengths of
// the lists.
enum SubnetList {
    kSubnetCls,
    kSubnetReg,
    kSubnetStuff,
    kSubnetThing,
    kFlowCls,
    kFlowStuff,
    kFlowThing,
    kFlowSemantic,
    kNumSubnetLists
};

inline void check_fused_subnets(
    const std::vector<Tensor>& levels, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
    const std::vector<int64_t>& algorithms, const std::vector<int64_t>& counts, int64_t segmentation_levels) {
    const char* op = "fused_subnets";
    check(!levels.empty(), op, ": levels must not be empty");
    check_dim(op, "levels[0]", levels[0], 4, "(N, C, H, W)");
    check_floating(op, "levels[0]", levels[0]);
    check_levels(op, "levels", levels, levels[0].size(1), levels[0], "levels[0]");
    check(
        segmentation_levels >= 0 && segmentation_levels <= static_cast<int64_t>(levels.size()), op,
        ": segmentation_levels must be from 0 to the number of levels, ", levels.size(), ", got ", segmentation_levels);
    check(
        counts.size() == kNumSubnetLists, op, ": counts must have ", int(kNumSubnetLists), " entries, got ",
        counts.size());
    size_t total = 0;
    for (const int64_t count : counts) {
        check(count >= 0, op, ": counts must not be negative, got ", count);
        total += static_cast<size_t>(count);
    }
    check(
        packed.size() == total && biases.size() == total && algorithms.size() == total, op,
        ": packed, biases and algorithms must have ", total, " entries, the sum of counts, got ", packed.size(), ", ",
        biases.size(), " and ", algorithms.size());
    for (const int64_t algorithm : algorithms) {
        check_algorithm(op, algorithm);
    }
    const ScalarType dtype = accum_dtype(levels[0].scalar_type());
    for (size_t i = 0; i < total; ++i) {
        check(
            packed[i].dim() == 1 && packed[i].is_contiguous() && biases[i].dim() == 1, op, ": packed[", i,
            "] and biases[", i, "] must be vectors");
        check(
            packed[i].numel() == 0 || packed[i].scalar_type() == dtype, op, ": packed[", i, "] must be ",
            dtype_name(dtype), " for these levels, got ", dtype_name(packed[i].scalar_type()));
        check(have_same_device(packed[i], levels[0]), op, ": packed[", i, "] must be on the device of levels[0]");
        check(have_same_device(biases[i], levels[0]), op, ": biases[", i, "] must be on the device of levels[0]");
    }
}

struct SubnetConv {
    Tensor packed, bias;  // bias in the accumulation type
    int64_t in_channels = 0, out_channels = 0;
    int64_t size = 0;                                       // of `packed`, without its tag
    int64_t algorithm = kConvAuto, resolved = kConvDirect;  // see resolve_algorithm
    bool present = false;
};

// The eight lists of convolutions. `at` checks the length of packed weights, because it knows the number of input
// channels. For `columns`, see packed_tag.
class SubnetConvs {
public:
    SubnetConvs(
        const std::vector<Tensor>& packed, const std::vector<Tensor>& biases, const std::vector<int64_t>& algorithms,
        const std::vector<int64_t>& counts, ScalarType dtype, int64_t columns)
        : lists_(kNumSubnetLists) {
        size_t next = 0;
        for (size_t list = 0; list < lists_.size(); ++list) {
            for (int64_t i = 0; i < counts[list]; ++i, ++next) {
                SubnetConv conv;
                conv.packed = packed[next];
                conv.bias = contiguous_as(biases[next], dtype);
                conv.out_channels = biases[next].size(0);
                conv.algorithm = algorithms[next];
                conv.present = packed[next].numel() > 0;
                if (conv.present) {
                    check_packed_layout("fused_subnets", packed[next], columns);
                    conv.size = packed_size(packed[next]);
                }
                lists_[list].push_back(conv);
            }
        }
    }

    size_t stages(SubnetList list) const { return lists_[list].size(); }

    // Convolution `index` of a list, for `in_channels` input channels; null if it is absent. If `out_channels` is
    // given, it must equal the number of output channels.
    const SubnetConv* at(SubnetList list, size_t index, int64_t in_channels, int64_t out_channels = -1) {
        if (index >= lists_[list].size() || !lists_[list][index].present) {
            return nullptr;
        }
        SubnetConv& conv = lists_[list][index];
        const bool is_double = conv.packed.scalar_type() == ScalarType::Double;
        conv.resolved = resolve_algorithm(conv.algorithm, is_double, in_channels, conv.out_channels);
        check(
            conv.size == packed_conv_size(conv.resolved, is_double, in_channels, conv.out_channels),
            "fused_subnets: ", name(list), "[", index, "] was packed for other channels than the ", in_channels,
            " it reads, or for another algorithm");
        check(
            out_channels < 0 || conv.out_channels == out_channels, "fused_subnets: ", name(list), "[", index,
            "] must have the ", out_channels, " channels of the feature it is added to, got ", conv.out_channels);
        conv.in_channels = in_channels;
        return &conv;
    }

private:
    static const char* name(SubnetList list) {
        static const char* const names[kNumSubnetLists] = {"cls",      "reg",        "stuff",      "thing",
                                                           "flow_cls", "flow_stuff", "flow_thing", "semantic_flow"};
        return names[list];
    }

    std::vector<std::vector<SubnetConv>> lists_;
};

}  // namespace spatialflow
