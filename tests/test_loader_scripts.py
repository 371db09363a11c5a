# SPDX-License-Identifier: Apache-2.0
"""Scripts that train: worker processes do not run them again, and read data sets that they define."""

import os
import subprocess
import sys

import pytest
from helpers.scenes import write_coco

SCRIPT = """
import sys
from spatialflow.config import DataConfig
from spatialflow.data.categories import load_categories
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.loader import Schedule, make_loader

print("the script runs")
folder = sys.argv[1]
data = CocoPanoptic(f"{folder}/panoptic.json", f"{folder}/images", None, load_categories("synthetic", 6, 7))
requests = Schedule(data.sizes, 1, 0).batches(0, 2, 0, 1, 1)
print(len(list(make_loader(data, DataConfig(), requests, workers=1))), "batches")
"""
GUARDED = """
from spatialflow.data.coco import CocoPanoptic

class Own(CocoPanoptic):
    pass

if __name__ == "__main__":
""" + SCRIPT.replace("\n", "\n    ").replace("data = CocoPanoptic", "data = Own")


@pytest.mark.parametrize("script", [SCRIPT, GUARDED], ids=["without-guard", "own-class"])
def test_workers_do_not_run_the_script(script, tmp_path):
    write_coco(tmp_path / "data", 2, (64, 96))
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py", "data"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("the script runs\n2 batches\n", "")
