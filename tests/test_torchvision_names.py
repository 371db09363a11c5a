# SPDX-License-Identifier: Apache-2.0
"""Names of torchvision.ops in spatialflow.ops: with torchvision, without it, and with one that does not fit.

The torchvision of these tests is a few lines; `make test-migration` compares with the real one.
"""

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spatialflow import ops
from spatialflow.ops.torchvision_names import MODULES, NAMES

STUB = {
    "__init__.py": "__version__ = '0.1'\n",
    "ops/__init__.py": "from torchvision.ops.roi_pool import roi_pool, RoIPool\n",
    "ops/roi_pool.py": "def roi_pool(): return 'a'\ndef nms(): return 'b'\nclass RoIPool: pass\n",
    "ops/boxes.py": "def box_area(): return 'c'\ndef nms(): return 'd'\n",
}


def run(code, folder=None):
    """Run code in a process whose torchvision is that of `folder`, or missing; return what it prints."""
    start = f"sys.path.insert(0, {str(folder)!r})" if folder else "sys.modules['torchvision'] = None"
    result = subprocess.run([sys.executable, "-c", f"import sys; {start}\n{code}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def torchvision(tmp_path):
    for name, text in STUB.items():
        file = tmp_path / "torchvision" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


def printed_errors(*statements):
    return "\n".join(
        f"try: exec({statement!r})\nexcept Exception as error: print(type(error).__name__, '|', error)"
        for statement in statements
    )


def test_without_torchvision():
    """Its names say what to install; this package's names, and tools that read all names, work."""
    functions, members = [*NAMES], ["misc.FrozenBatchNorm2d", "boxes.box_area", "poolers.LevelMapper"]
    statements = [f"from spatialflow.ops import {name}" for name in functions]
    statements += ["from spatialflow.ops.{} import {}".format(*name.split(".")) for name in members]
    code = f"""
import inspect, pydoc
from spatialflow import ops
{printed_errors(*statements, "ops.box_iou", "ops.boxes.box_area")}
from spatialflow.ops import *
from spatialflow.ops import boxes
from spatialflow.ops.boxes import batched_nms as ours, nms
from spatialflow.ops.poolers import MultiScaleRoIAlign, roi_align
from spatialflow.ops.focal_loss import sigmoid_focal_loss
import spatialflow.ops.deform_conv
print(nms is ops.nms, ours is ops.batched_nms, roi_align is ops.roi_align, boxes.nms is ops.nms)
print(set(dir(ops)) >= set(ops.__all__) | {{"boxes"}}, "box_iou" in dir(ops), "roi_pool" in dir(ops))
pydoc.render_doc(ops), inspect.getmembers(ops), inspect.getmembers(boxes), inspect.getmodule(ops.nms)
"""
    *errors, identities, listed = run(code)
    assert errors == [
        f"ImportError | spatialflow.ops.{name} is torchvision's, and torchvision is not installed: "
        "pip install torchvision"
        for name in [*functions, *members, "box_iou", "boxes.box_area"]
    ]
    assert [identities, listed] == ["True True True True", "True False False"]


def test_names_are_torchvisions_objects_and_imported_when_used(torchvision):
    code = """
import spatialflow.ops as ops
print("torchvision" in sys.modules, "roi_pool" in dir(ops))
import spatialflow.ops.roi_pool
from spatialflow.ops import roi_pool, boxes
from spatialflow.ops.roi_pool import RoIPool
from spatialflow.ops.boxes import box_area, nms
print(roi_pool(), RoIPool is ops.RoIPool, box_area(), nms is ops.nms, callable(ops.roi_pool), "box_area" in dir(boxes))
"""
    code += printed_errors("ops.box_iou", "ops.boxes.nope", "from spatialflow.ops.boxes import nope", "ops.nope")
    assert run(code, torchvision) == [
        "False True",
        "a True c True True True",
        "AttributeError | spatialflow.ops.box_iou is torchvision's, and torchvision 0.1 does not have it",
        "AttributeError | spatialflow.ops.boxes.nope is torchvision's, and torchvision 0.1 does not have it",
        "ImportError | cannot import name 'nope' from 'spatialflow.ops.boxes' (unknown location)",
        "AttributeError | module 'spatialflow.ops' has no attribute 'nope'",
    ]


def test_a_torchvision_that_does_not_fit_torch(torchvision):
    (torchvision / "torchvision/ops/__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    (line,) = run(printed_errors("from spatialflow.ops import box_iou"), torchvision)
    assert line.startswith(
        "ImportError | spatialflow.ops.box_iou is torchvision's, and torchvision cannot be imported "
        "(operator nms does not exist): pip install the torchvision that fits torch 2."
    )


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(ops.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name, alias.asname) for node in block.body for alias in node.names}
    assert seen == {("torchvision.ops", name, name) for name in {*NAMES, *MODULES}}


def test_no_name_is_defined_here_too():
    assert not set(NAMES) & set(ops.__all__)
    assert all(hasattr(ops, name) for own in MODULES.values() for name in own)


def test_the_table_of_the_documentation_has_every_name():
    page = Path(__file__).resolve().parents[1] / "docs" / "migration.md"
    if not page.is_file():
        pytest.skip("not in a source tree")
    text = page.read_text().split("### Every name")[1].split("\n###")[0]
    table = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text, re.M))
    own = {"DeformConv2d", "MultiScaleRoIAlign", "RoIAlign", "batched_nms", "deform_conv2d", "nms", "roi_align"}
    own |= {"sigmoid_focal_loss"}
    assert own <= set(ops.__all__)
    functions = {name: whose for name, whose in table.items() if "." not in name}
    assert functions == dict.fromkeys(own, "here") | dict.fromkeys(NAMES, "torchvision's")
    assert {name for name in table if "." in name} == {f"ops.{name}" for name in {*MODULES, "roi_align"}}
    for name, replaced in MODULES.items():
        assert set(re.findall(r"`(\w+)`", table[f"ops.{name}"])) == set(replaced), name
        assert "torchvision's" in table[f"ops.{name}"]


def test_the_documentation_of_the_package_says_it():
    assert "torchvision" in pydoc.getdoc(ops) and inspect.getdoc(ops.MultiScaleRoIAlign)
