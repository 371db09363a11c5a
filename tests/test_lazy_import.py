# SPDX-License-Identifier: Apache-2.0
"""`import spatialflow` stays cheap, and its names are there."""

import subprocess
import sys

import pytest

import spatialflow


def test_import_loads_neither_torch_nor_opencv():
    code = "import sys, spatialflow.panoptic; sys.exit(any(name in sys.modules for name in ('torch', 'cv2', 'yaml')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", spatialflow.__all__)
def test_every_public_name_resolves(name):
    assert callable(getattr(spatialflow, name)) and name in dir(spatialflow)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'build_modell'"):
        spatialflow.build_modell
    assert spatialflow.ops.roi_align is not None
