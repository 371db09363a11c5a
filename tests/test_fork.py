# SPDX-License-Identifier: Apache-2.0
"""Operators in a forked process do not wait for the threads on which the parent ran operators."""

import os
import subprocess
import sys
import textwrap

import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs os.fork", allow_module_level=True)

if os.environ.get("SPATIALFLOW_BACKEND", "cpu").startswith("simt"):
    pytest.skip("interpreted kernels do not use torch's threads", allow_module_level=True)

PARENT = """
    import os
    import signal

    import numpy
    import torch
    from torch.utils.data import DataLoader, Dataset

    from spatialflow import ops

    signal.alarm(100)  # a process that waits forever is killed; a fork clears the alarm
    torch.set_num_threads(4)
    feature, weight = torch.randn(2, 64, 48, 48), torch.randn(64, 64, 3, 3)
    corner = torch.rand(300, 2) * 90
    boxes = torch.cat([corner, corner + 20], 1)
    scores, rois = torch.rand(300), torch.cat([torch.zeros(300, 1), boxes], 1)

    def results():
        return [
            ops.flow_conv2d(feature, None, weight),
            ops.roi_align(feature, rois, 7, 0.25),
            ops.deform_conv2d(feature, torch.zeros(2, 18, 48, 48), weight, padding=1),
            ops.nms(boxes, scores, 0.5),
            ops.paste_masks(torch.zeros(300, 28, 28), boxes, (96, 96)),
        ]

    expected = results()

    def check():
        for one, other in zip(results(), expected):
            assert numpy.array_equal(one.numpy(), other.numpy())
"""

CHILDREN = {
    "worker of a DataLoader": """
        class Checks(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                signal.alarm(60)
                check()
                return index

        loaded = DataLoader(Checks(), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=80)
        assert sorted(int(index) for index in loaded) == [0, 1, 2, 3]
    """,
    "plain fork": """
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            check()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        check()
    """,
}


@pytest.mark.parametrize("child", CHILDREN)
def test_operators_in_a_forked_process(child):
    script = textwrap.dedent(PARENT) + textwrap.dedent(CHILDREN[child])
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
