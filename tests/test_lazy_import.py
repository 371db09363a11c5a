# SPDX-License-Identifier: Apache-2.0
"""`import spatialflow` loads neither torch nor OpenCV, and all public names resolve."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spatialflow


def test_import_loads_neither_torch_nor_opencv():
    code = "import sys, spatialflow.panoptic; sys.exit(any(name in sys.modules for name in ('torch', 'cv2', 'yaml')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_reading_a_configuration_loads_neither_torch_nor_opencv():
    code = "import sys, spatialflow; spatialflow.load_config('demo', epochs=2); spatialflow.list_configs(); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'cv2')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_predicting_does_not_load_the_compiler():
    """Importing torch.compile's front end takes as long as all other imports together."""
    code = "import sys, spatialflow.engine.predict; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", spatialflow.__all__)
def test_every_public_name_resolves(name):
    assert callable(getattr(spatialflow, name)) and name in dir(spatialflow)


def test_type_checkers_see_the_same_names():
    """`__all__`, the table of lazy imports and the imports for type checkers have the same names."""
    tree = ast.parse(Path(spatialflow.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names if node.module != "spatialflow"}
    assert seen == spatialflow._MODULE_BY_NAME and sorted(seen) == spatialflow.__all__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'build_modell'"):
        _ = spatialflow.build_modell
    assert spatialflow.ops.roi_align is not None
