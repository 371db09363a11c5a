# SPDX-License-Identifier: Apache-2.0
"""Compare the naive CuPy kernels of the benchmarks with the operators and with their reference implementations.

On a GPU, CuPy compiles and launches the kernels. Elsewhere they are compiled as C++ and run one thread index at a time.
The operators are then the CPU kernels or, with SPATIALFLOW_BACKEND=simt, the interpreted CUDA kernels.
"""

import ctypes
import importlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tensors import DEVICE

from spatialflow import ops
from spatialflow.ops import reference

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PRELUDE = """
#include <algorithm>
#include <cmath>
using std::max;
#define __device__ static
#define __global__
struct Index { int x; };
static thread_local Index blockIdx, threadIdx, blockDim{256};
"""
LOOP = """
extern "C" void run_%(name)s(int blocks, %(declared)s) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < 256; ++threadIdx.x) %(name)s(%(passed)s);
}
"""


@pytest.fixture(scope="module")
def naive_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("naive_kernels")


@pytest.fixture(scope="module")
def run(naive_kernels, tmp_path_factory):
    """Return `naive_kernels.launch` on a GPU; elsewhere a function that runs the same kernel on the CPU."""
    if DEVICE == "cuda":
        if naive_kernels.cupy is None:
            pytest.skip("needs CuPy, which is not installed")
        return naive_kernels.launch
    libraries = {}

    def build(name):
        source = naive_kernels.SOURCES[name]
        declared = source[source.index(f"void {name}(") + len(f"void {name}(") :].split(")")[0]
        passed = ", ".join(part.split()[-1].lstrip("*") for part in declared.split(","))
        path = tmp_path_factory.mktemp("naive_kernels") / f"{name}.cpp"
        path.write_text(PRELUDE + source + LOOP % dict(name=name, declared=declared, passed=passed))
        library = path.with_suffix(".so")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(path), "-o", str(library)], check=True)
        return getattr(ctypes.CDLL(str(library)), f"run_{name}")

    def launch(name, total, *arguments):
        if name not in libraries:
            libraries[name] = build(name)
        values = []
        for value in map(naive_kernels._argument, arguments):
            kind = {np.uint64: ctypes.c_void_p, np.float32: ctypes.c_float, np.int32: ctypes.c_int}
            values.append(kind.get(type(value), ctypes.c_longlong)(value.item() if hasattr(value, "item") else value))
        libraries[name](ctypes.c_int(-(-total // naive_kernels.THREADS)), *values)

    return launch


@pytest.fixture(params=[ops, reference], ids=["operator", "reference"])
def implementation(request):
    return request.param


def test_every_kernel_is_compared(naive_kernels):
    assert {f"test_{name}" for name in naive_kernels.SOURCES} <= set(globals())


def boxes(count, height, width):
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.6
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * torch.tensor([width, height]) * 0.6], dim=1)


@pytest.mark.parametrize("ratio, aligned", [(2, True), (0, False)])
def test_roi_align(naive_kernels, run, implementation, ratio, aligned):
    image, rois = torch.randn(2, 3, 20, 30), boxes(9, 40, 60)
    rois = torch.cat([torch.arange(9)[:, None] % 2, rois], dim=1)
    result = naive_kernels.roi_align(image, rois, 5, 0.5, ratio, aligned, run=run)
    torch.testing.assert_close(
        result, implementation.roi_align(image, rois, 5, 0.5, ratio, aligned), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("masked, stride, groups", [(True, 1, 1), (False, 2, 2)])
def test_deform_conv2d(naive_kernels, run, implementation, masked, stride, groups):
    image, weight, bias = torch.randn(2, 4, 12, 14), torch.randn(6, 4 // groups, 3, 3), torch.randn(6)
    size = (12 // stride, 14 // stride)
    offset, mask = torch.randn(2, 18, *size), torch.rand(2, 9, *size) if masked else None
    result = naive_kernels.deform_conv2d(image, offset, weight, bias, mask, (stride, stride), run=run)
    expected = implementation.deform_conv2d(image, offset, weight, bias, stride, 1, 1, mask)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_flow", [True, False])
def test_flow_conv2d(naive_kernels, run, implementation, with_flow):
    x = [torch.randn(1, 4, 9, 11), torch.randn(1, 4, 5, 6)]
    flow, weight, bias = [level * 0.3 for level in x] if with_flow else None, torch.randn(5, 4, 3, 3), torch.randn(5)
    results = naive_kernels.flow_conv2d(x, flow, weight, bias, run=run)
    for result, expected in zip(results, implementation.flow_conv2d(x, flow, weight, bias), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_paste_masks(naive_kernels, run, implementation):
    logits, places = torch.randn(7, 14, 14), boxes(7, 40, 50)
    result = naive_kernels.paste_masks(logits.sigmoid(), places, (40, 50), run=run)
    assert (result != implementation.paste_masks(logits, places, (40, 50))).float().mean() < 1e-3 and result.any()
