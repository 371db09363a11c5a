// SPDX-License-Identifier: Apache-2.0
//
// flow_tower: the lists of convolutions and the argument checks shared by all back ends. Schema in flow_tower.cpp.
#pragma once

#include "ops/flow_conv2d.h"

namespace spatialflow {

// Places in `counts`: how many entries of `packed` and `biases` each list has, one list after the other.
enum TowerList {
    kTowerCls, kTowerReg, kTowerStuff, kTowerThing, kFlowCls, kFlowStuff, kFlowThing, kFlowSemantic, kTowerLists
};

inline void check_flow_tower(
    const std::vector<Tensor>& levels, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
    const std::vector<int64_t>& counts, int64_t segmentation_levels) {
    const char* op = "flow_tower";
    check(!levels.empty(), op, ": levels must not be empty");
    check_dim(op, "levels[0]", levels[0], 4, "(N, C, H, W)");
    check_floating(op, "levels[0]", levels[0]);
    check_levels(op, "levels", levels, levels[0].size(1), levels[0], "levels[0]");
    check(segmentation_levels >= 0 && segmentation_levels <= static_cast<int64_t>(levels.size()), op,
          ": segmentation_levels must be from 0 to the number of levels, ", levels.size(), ", got ",
          segmentation_levels);
    check(counts.size() == kTowerLists, op, ": counts must have ", int(kTowerLists), " entries, got ", counts.size());
    size_t total = 0;
    for (const int64_t count : counts) {
        check(count >= 0, op, ": counts must not be negative, got ", count);
        total += static_cast<size_t>(count);
    }
    check(packed.size() == total && biases.size() == total, op, ": packed and biases must have ", total,
          " entries, the sum of counts, got ", packed.size(), " and ", biases.size());
    for (size_t i = 0; i < total; ++i) {
        check(packed[i].dim() == 1 && packed[i].is_contiguous() && biases[i].dim() == 1, op, ": packed[", i,
              "] and biases[", i, "] must be vectors");
        check_same_device(op, "packed", packed[i], "levels", levels[0]);
        check_same_device(op, "biases", biases[i], "levels", levels[0]);
    }
}

}  // namespace spatialflow
