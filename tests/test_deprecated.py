# SPDX-License-Identifier: Apache-2.0
"""Old public names of operators and their arguments warn and work."""

import pytest
import torch

from spatialflow import ops, panoptic
from spatialflow.ops import reference

RENAMED = {
    "FlowTowerOutput": "SubnetOutput",
    "FlowTowerParameters": "SubnetParameters",
    "flow_tower": "fused_subnets",
    "pack_flow_tower": "pack_subnets",
}


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_renamed_operator(old, new):
    message = rf"^spatialflow\.ops\.{old} is deprecated, use spatialflow\.ops\.{new}$"
    with pytest.warns(DeprecationWarning, match=message) as record:
        assert getattr(ops, old) is getattr(ops, new)
    assert record[0].filename == __file__


def test_unknown_name():
    name = "no_such_operator"
    with pytest.raises(AttributeError, match=rf"^module 'spatialflow\.ops' has no attribute '{name}'$"):
        getattr(ops, name)


ONE_INSTANCE = (torch.ones(1, 2, 3, dtype=torch.bool), torch.tensor([0.9]), torch.tensor([5]), None)


@pytest.mark.parametrize(
    "old, new, value",
    [("stuff_area_limit", "stuff_area_threshold", 1), ("box_threshold", "box_overlap_threshold", 0.3)],
)
@pytest.mark.parametrize("merge", [ops.panoptic_merge, panoptic.merge], ids=["panoptic_merge", "merge"])
def test_renamed_keyword(merge, old, new, value):
    arguments = (*ONE_INSTANCE, torch.zeros(2, 3, dtype=torch.int64), *([1] if merge is ops.panoptic_merge else []))
    message = rf"^{merge.__name__}\({old}=\) is deprecated, use {merge.__name__}\({new}=\)$"
    with pytest.warns(DeprecationWarning, match=message) as record:
        by_old = merge(*arguments, **{old: value})
    assert record[0].filename == __file__
    assert torch.equal(by_old.id_map, merge(*arguments, **{new: value}).id_map)
    with pytest.raises(TypeError, match=f"^{merge.__name__}: {old} is the old name of {new}; pass only {new}$"):
        merge(*arguments, **{old: value, new: value})


def test_reference_has_new_names_only():
    with pytest.raises(TypeError, match="unexpected keyword argument 'box_threshold'"):
        reference.panoptic_merge(*ONE_INSTANCE, torch.zeros(2, 3, dtype=torch.int64), 1, box_threshold=0.3)
