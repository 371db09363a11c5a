# SPDX-License-Identifier: Apache-2.0
"""Libraries for lower CPU instruction-set levels, which other tests do not load, and the selection of the level.

A library repacks or refuses weights that another library packed.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spatialflow import _library

TESTS = Path(__file__).resolve().parent
OPERATORS = sorted(
    str(path) for path in TESTS.glob("test_*.py") if re.search(r"^class .*\(OpMatrix\)", path.read_text(), re.MULTILINE)
)
# bfloat16 covers the conversions; gradients have separate kernels.
SELECTED_TESTS = "(test_reference and (float32 or bfloat16)) or (test_gradient_against_reference and float32)"


@pytest.mark.parametrize("level", _library.cpu_levels()[1:])
def test_operators_equal_their_references(level):
    environment = os.environ | {"SPATIALFLOW_CPU_LEVEL": level, "SPATIALFLOW_BACKEND": "cpu"}
    used = "from spatialflow import _library; print(_library.backend_library())"
    loaded = subprocess.run(
        [sys.executable, "-c", used], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == f"cpu_{level}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED_TESTS, *OPERATORS]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 4 * len(OPERATORS)


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_native_is_the_level_of_the_processor(tmp_path):
    options = ["SPATIALFLOW_CPU_LEVELS=native", "SPATIALFLOW_CUDA=off", f"SPATIALFLOW_PACKAGE_DIR={tmp_path}/package"]
    command = ["cmake", "-S", TESTS.parent, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run([*command, *(f"-D{option}" for option in options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = set(re.findall(r"libspatialflow_cpu_([\w-]+)\.so", (tmp_path / "build.ninja").read_text()))
    assert built == {_library._processor_levels()[0]}


class TestMissingLibraries:
    """The error names the levels that are built, those that the processor supports, and the build command."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_library, "FOLDER", tmp_path)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(_library, "_processor_levels", lambda: ("x86-64-v3", "x86-64-v2"))
        monkeypatch.delenv("SPATIALFLOW_CPU_LEVEL", raising=False)
        return tmp_path

    def test_nothing_is_built(self, folder):
        with pytest.raises(ImportError) as error:
            _library.cpu_level()
        text = str(error.value)
        assert text.startswith(f"spatialflow's compiled libraries are missing in {folder}: build them with")

    def test_only_built_for_a_newer_processor(self, folder):
        (folder / "libspatialflow_cpu_x86-64-v4.so").touch()
        (folder / "libspatialflow_schema.so").touch()
        with pytest.raises(ImportError) as error:
            _library.cpu_level()
        text = str(error.value)
        assert "built for x86-64-v4" in text and "runs x86-64-v3, x86-64-v2" in text and "missing" not in text

    def test_the_best_level_that_runs(self, folder):
        for level in ("v4", "v2"):
            (folder / f"libspatialflow_cpu_x86-64-{level}.so").touch()
        assert _library.cpu_level() == "x86-64-v2"

    def test_a_level_that_does_not_run_is_asked_for(self, folder, monkeypatch):
        (folder / "libspatialflow_cpu_x86-64-v4.so").touch()
        (folder / "libspatialflow_cpu_x86-64-v2.so").touch()
        monkeypatch.setenv("SPATIALFLOW_CPU_LEVEL", "x86-64-v4")
        with pytest.raises(ImportError, match="SPATIALFLOW_CPU_LEVEL=x86-64-v4: .*those are x86-64-v2"):
            _library.cpu_level()


# The arguments of both scripts are the tests' folder and a file.
WRITE = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.small_models import random_model
import spatialflow
from spatialflow import ops
torch.manual_seed(0)
model, images, content = random_model("tiny", stuff_head_channels=32, head_channels=32), torch.randn(1, 3, 64, 96), {}
with torch.inference_mode():
    plain = model(images)
network = spatialflow.optimize_for_inference(model)
predictor = spatialflow.Predictor(model)
conv = ops.pack_conv3x3(torch.randn(40, 33, 3, 3), torch.randn(40))
with open(sys.argv[2], "wb") as file:
    pickle.dump([images, plain.stuff_logits, plain.class_logits, network, predictor, conv, conv.packed], file)
"""
READ = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[1])
from spatialflow import ops
with open(sys.argv[2], "rb") as file:
    images, stuff, classes, network, predictor, conv, foreign = pickle.load(file)
for loaded in (network, predictor.pipeline.networks[0]):
    with torch.inference_mode():
        output = loaded(images)
    for actual, expected in zip([output.stuff_logits, *output.class_logits], [stuff, *classes]):
        assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()
x = torch.randn(1, 33, 7, 9)
expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).relu()
torch.testing.assert_close(ops.flow_conv2d(x, None, conv), expected, rtol=1e-4, atol=1e-4)
held = conv._replace(packed=foreign)  # packed by another instruction set
for call in (
    lambda: ops.flow_conv2d(x, None, held),
    lambda: ops.fused_subnets([x], ops.SubnetParameters(cls=(held,), segmentation_levels=0)),
):
    try:
        call()
        print("computed with foreign weights")
    except RuntimeError as error:
        print("refused" if "layout of another instruction set" in str(error) else error)
"""


@pytest.mark.parametrize("level", _library.cpu_levels()[1:])
def test_packed_weights_move_between_levels(level, tmp_path):
    """A pickle from the best level gives the results of this level; a bare packed tensor is refused."""

    def run(script, level):
        environment = os.environ | {"SPATIALFLOW_CPU_LEVEL": level, "SPATIALFLOW_BACKEND": "cpu"}
        command = [sys.executable, "-c", script, str(TESTS), str(tmp_path / "packed.pickle")]
        done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split("\n")[:-1]

    run(WRITE, _library.cpu_levels()[0])
    assert run(READ, level) == ["refused", "refused"]
