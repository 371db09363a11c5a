# SPDX-License-Identifier: Apache-2.0
"""Every operator has all its parts, and the libraries use the stable ABI only."""

import doctest
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatialflow import _library, ops
from spatialflow.ops import reference

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = sorted(_library.FOLDER.glob("libspatialflow_*.so"))


def namespace() -> list[str]:
    """Return the names of all raw operators, private ones included."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in names if name.startswith("spatialflow::")})


# Functions of spatialflow.ops that are not operators: a context manager and functions that pack weights.
NO_OPERATORS = ("checked", "pack_conv3x3", "pack_deform_conv2d", "pack_subnets")


def public() -> list[str]:
    return sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and name not in NO_OPERATORS)


def module_name(name: str) -> str:
    """Return the name of an operator's module, which is also that of its other files."""
    return getattr(ops, name).__module__.rsplit(".", 1)[1]


def registered_for_cuda() -> set[str]:
    """Return the raw operators that the sources of the CUDA library register."""
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    return {name for source in sources for name in re.findall(r'library\.impl\("(\w+)"', source)}


def test_strides_are_read_in_one_place():
    """Torch allows any stride for a dimension of size 1. `stride_of`, in ops/tensor.h, returns 0 for it."""
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    readers = {path.relative_to(ROOT / "csrc").as_posix() for path in sources if ".stride(" in path.read_text()}
    assert readers == {"ops/tensor.h"}
    assert ".strides()" not in "".join(path.read_text() for path in sources)


def test_no_launch_asks_for_the_current_device():
    """An operator opens one DeviceScope, whose stream determines the device of the launches."""
    sources = {path: path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cu")}
    assert [path.name for path, source in sources.items() if re.search(r"\bcudaGetDevice\(", source)] == []
    scopes = [body.count("DeviceScope device(") for source in sources.values() for body in source.split("\n}")]
    assert set(scopes) == {0, 1}


def test_files_are_looked_for_without_exceptions():
    """os.path.isfile returns False for an invalid name; Path.is_file raises if the name is too long."""
    package = ROOT / "spatialflow"
    sources = [path for path in package.rglob("*.py") if path.name != "_library.py"]  # it only checks fixed names
    raising = re.compile(r"\.(is_file|is_dir|exists)\(\)")
    assert [path.name for path in sources if raising.search(path.read_text())] == []


@pytest.mark.parametrize("name", public())
def test_docstring_example(name):
    """Every operator's docstring has an example, whose output is correct."""
    function = getattr(ops, name)
    example = doctest.DocTestParser().get_doctest(function.__doc__, {**vars(ops), "torch": torch}, name, None, None)
    assert example.examples
    printed = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(example, out=printed.write)
    assert result.failed == 0, printed.getvalue()


def tensor_arguments() -> list[tuple[str, str]]:
    """Return (operator, argument) for all arguments that take a tensor or a list of tensors."""
    signatures = {name: inspect.signature(getattr(ops, name)).parameters for name in public()}
    return [
        (op, key)
        for op, parameters in signatures.items()
        for key in parameters
        if "Tensor" in str(parameters[key].annotation)
    ]


OPTIONS = {
    "output_size": 1,
    "strides": [1],
    "iou_threshold": 0.5,
    "score_threshold": 0.5,
    "max_detections": 1,
    "size": (1, 1),
    "sizes": [(1, 1)],
    "valid_size": (1, 1),
    "original_size": (1, 1),
    "mean": (0, 0, 0),
    "std": (1, 1, 1),
    "stuff_labels": 1,
    "gt_segments": 1,
    "pred_segments": 1,
    "num_groups": 1,
    "per_level": 1,
    "parameters": ops.SubnetParameters(),
}


def arguments_of(name: str) -> dict[str, object]:
    """Return a tensor, or a list if required, for every tensor argument, and a value for every option."""
    parameters = inspect.signature(getattr(ops, name)).parameters
    arguments = {key: torch.zeros(1) for op, key in tensor_arguments() if op == name}
    arguments |= {key: value for key, value in OPTIONS.items() if key in parameters}
    lists = ("features", "levels", "class_logits", "box_deltas")
    return arguments | {key: [torch.zeros(1, 1, 1, 1)] for key in lists if key in arguments}


@pytest.mark.parametrize("name, argument", tensor_arguments())
def test_no_tensor(name, argument):
    """An argument that is not a tensor is named in a TypeError."""
    accepted, arguments = inspect.signature(getattr(ops, name)).parameters, arguments_of(name)
    for wrong, kind in (([0.5], "(list|float)"), (None, "NoneType"), ({}, "dict")):
        wrong = [wrong] if isinstance(arguments[argument], list) else wrong
        if wrong is None and "None" in accepted[argument].annotation:
            continue
        with pytest.raises(TypeError, match=rf"^{name}: {argument}(\[0\])? must be a tensor, got {kind}$"):
            getattr(ops, name)(**arguments | {argument: wrong})


def sequence_options() -> list[tuple[str, str]]:
    """Return (operator, option) for the options that take several numbers and never a single one."""
    signatures = {name: inspect.signature(getattr(ops, name)).parameters for name in public()}
    kinds = {(op, key): str(parameters[key].annotation) for op, parameters in signatures.items() for key in parameters}
    several = re.compile(r"(Sequence|tuple|Union\[tuple)\[")
    return [key for key, kind in kinds.items() if several.match(kind) and "Tensor" not in kind]


@pytest.mark.parametrize("name, option", sequence_options())
@pytest.mark.parametrize("wrong", [None, 0.5])
def test_no_sequence(name, option, wrong):
    """An option that is not a sequence is named in the error."""
    images = {"images": [torch.zeros(1, 1, 3, dtype=torch.uint8)]} if name == "preprocess_images" else {}
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: {option} must .*, got {wrong}"):
        getattr(ops, name)(**arguments_of(name) | images | {option: wrong})


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_no_symbol_beyond_the_stable_abi(library):
    """A symbol of at::, c10:: or torch:: would require one version of torch; the C shim has plain names."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines() if line.strip()]
    assert symbols, "nm lists nothing"
    tied = [name for name in symbols if re.match(r"_Z\w*?(2at|3c10|5torch)\d", name)]
    assert not tied, f"{library.name} needs {tied[:5]}"
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols), "the C shim is not used"


def test_something_is_built():
    assert {"schema"} < set(_library.built_libraries())
    assert any(name.startswith("cpu_") for name in _library.built_libraries())


def test_every_package_is_shipped():
    """setup.py finds packages by __init__.py; a folder without it would be missing in the wheel."""
    folders = {path.parent for path in (ROOT / "spatialflow").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not in a git checkout")
def test_every_folder_is_in_the_source_distribution():
    """`make` and the tests need all folders in an unpacked source distribution."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.split("/")[0] for name in files if "/" in name}
    assert folders <= set(re.findall(r"[\w.]+", (ROOT / "MANIFEST.in").read_text()))


@pytest.mark.skipif(not (ROOT / "cmake").is_dir(), reason="not in a source tree")
def test_every_kernel_source_is_built():
    lists = dict(re.findall(r"set\((\w+)\s([^)]*)\)", (ROOT / "cmake" / "ops.cmake").read_text()))
    both = {*lists["ops"].split(), *lists["shared_sources"].split()}
    listed = {"cuda/*.cu": both | set(lists["cuda_only_sources"].split()), "cpu/*.cpp": both}
    for pattern, names in listed.items():
        assert {path.stem for path in (ROOT / "csrc").glob(pattern)} == names


@pytest.mark.parametrize("name", namespace())
class TestRawOperator:
    def test_cpu_kernel(self, name):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spatialflow::{name}", "CPU")

    def test_cuda_kernel(self, name):
        """If torch has CUDA and loads the library (no GPU is needed), ask torch; else search the sources."""
        if torch.version.cuda is not None and "cuda" in _library.built_libraries():
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spatialflow::{name}", "CUDA")
        elif (ROOT / "csrc").is_dir():
            assert name in registered_for_cuda()
        else:
            pytest.skip("torch has no CUDA, and this is not a source tree")

    def test_fake_kernel(self, name):
        """torch.compile cannot trace an operator without a fake kernel."""
        entry = torch._library.simple_registry.singleton.find(f"spatialflow::{name}")
        assert entry.fake_impl.kernel is not None


@pytest.mark.parametrize("name", public())
class TestPublicOperator:
    def test_reference_has_the_same_arguments(self, name):
        by_reference = getattr(reference, name)
        ours, theirs = (
            set(inspect.signature(f).parameters) - {"algorithm", "options"} for f in (getattr(ops, name), by_reference)
        )
        assert ours == theirs

    def test_fuzzed(self, name):
        """The fuzzer has a strategy, a reference and a brute-force implementation for the operator."""
        pytest.importorskip("hypothesis")
        from fuzz import brute_force, cases, operators

        assert set(cases.OPERATORS) == set(operators.OPERATORS)
        assert name in cases.OPERATORS and callable(getattr(brute_force, name))

    def test_docstring(self, name):
        """Docstrings have a summary, all arguments, the result, the errors, and the source of the formula."""
        function = getattr(ops, name)
        text = inspect.getdoc(function)
        assert text and text.splitlines()[0].endswith(".")
        for section in ("Args:", "Returns:", "Raises:", "Source:"):
            assert section in text, f"{name} has no {section}"
        for argument in inspect.signature(function).parameters:
            assert re.search(rf"\b{argument}\b", text.split("Args:")[1]), f"{name}: {argument} is not described"

    def test_every_file_is_there(self, name):
        """Schema, CPU kernel, Python, reference and tests have the same file name; a benchmark exists."""
        stem = module_name(name)
        files = [
            f"csrc/ops/{stem}.cpp",
            f"csrc/cpu/{stem}.cpp",
            f"spatialflow/ops/{stem}.py",
            f"spatialflow/ops/reference/{stem}.py",
            f"tests/test_{stem}.py",
            f"benchmarks/{name}.py",
        ]
        if not (ROOT / "csrc").is_dir():
            pytest.skip("not in a source tree")
        assert [file for file in files if not (ROOT / file).is_file()] == []

    @pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="not in a source tree")
    def test_listed(self, name):
        """The table of operators and the benchmark of host time list the operator."""
        texts = {"docs/operators/index.md": f"({name}.md)", "benchmarks/host_overhead.py": f"ops.{name},"}
        assert [file for file, text in texts.items() if text not in (ROOT / file).read_text()] == []


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not in a source tree")
def test_build_options_do_not_stick(tmp_path):
    """CMake caches options; options of the previous build must not apply to the next one."""
    pytest.importorskip("pybind11")  # setup.py needs its folder
    cmake, log = tmp_path / "cmake", tmp_path / "log"
    cmake.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    cmake.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPATIALFLOW_", "CMAKE_"))}
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "SPATIALFLOW_CPU_LEVELS": "x86-64-v3"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    configure = log.read_text().split("\n")[0].split()
    assert {"-DSPATIALFLOW_CPU_LEVELS=x86-64-v3", "-USPATIALFLOW_CUDA", "-UCMAKE_CUDA_ARCHITECTURES"} <= set(configure)
