# SPDX-License-Identifier: Apache-2.0
"""Layers of the source tree: Python imports and C++ includes follow the tables, without cycles."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

GROUND = {
    "_library",
    "deprecated",
    "errors",
    "files",
    "image_formats",
    "images",
    "packaged",
    "requirements",
    "structures",
    "threads",
}
"""Modules that every sub-package except `config` and `ops` may import."""

MAY_IMPORT = {
    "_library": set(),
    "deprecated": set(),
    "errors": set(),
    "requirements": set(),
    "structures": set(),
    "files": set(),
    "packaged": set(),
    "threads": set(),
    "image_formats": set(),
    "images": {"errors", "image_formats", "requirements"},
    "video": {"images"},
    "config": {"errors", "requirements"},
    "ops": {"_library", "deprecated"},
    "panoptic": GROUND | {"_evaluation", "ops"},
    "models": GROUND | {"", "config", "ops"},  # "" for `__version__`
    "data": GROUND | {"config", "panoptic"},
    "viewer": GROUND | {"panoptic"},
    "engine": GROUND | {"config", "ops", "panoptic", "models", "data"},
    "": {"_library"},  # spatialflow/__init__.py when it is imported; its names are resolved on first use
    "__main__": {"cli"},
    "cli": GROUND | {"", "config", "panoptic", "models", "data", "engine", "video", "viewer"},
}
"""For each module or package of `spatialflow`, the others that it may import, inside functions too."""

MAY_INCLUDE = {
    "common": set(),
    "simt": {"common"},
    "ops": {"common"},
    "cpu": {"common", "ops"},
    "cuda": {"common", "ops", "simt"},  # without nvcc, platform.h and tensor_core.cuh include simt
    "evaluation": set(),
}
"""For each folder of csrc/, the others that it may include."""

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a source tree")


class Edge(NamedTuple):
    """One import or include, from one file to another."""

    source: str
    target: str
    place: str  # path:line: the text of the line


def _modules() -> dict[str, Path]:
    """Map module names to files of the package; "" is the package itself."""
    paths = (ROOT / "spatialflow").rglob("*.py")
    names = {path: path.relative_to(ROOT / "spatialflow").with_suffix("") for path in paths}
    return {".".join(name.parts).removesuffix("__init__").rstrip("."): path for path, name in names.items()}


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports below a node that are executed at some time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif _is_for_type_checkers(child):
            for statement in child.orelse:
                yield from _import_nodes(statement)
        else:
            yield from _import_nodes(child)


def _imports() -> list[Edge]:
    modules = _modules()
    edges = []
    for module, path in modules.items():
        text = path.read_text()
        for node in _import_nodes(ast.parse(text)):
            assert not getattr(node, "level", 0), f"{path}:{node.lineno}: relative import"
            imported = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{name}" for name in imported]
            for name in imported:
                package, _, target = name.partition(".")
                if package != "spatialflow":
                    continue
                while target not in modules and target != "_evaluation":  # a name that a module defines
                    target = target.rpartition(".")[0]
                line = text.splitlines()[node.lineno - 1].strip()
                edges.append(Edge(module, target, f"{path.relative_to(ROOT)}:{node.lineno}: {line}"))
    return edges


def _includes() -> list[Edge]:
    root = ROOT / "csrc"
    edges = []
    for path in sorted(path for path in root.rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := re.match(r'\s*#\s*include\s+"([^"]+)"', line):
                target = next((base / match[1] for base in (path.parent, root) if (base / match[1]).is_file()), None)
                assert target is not None, f"{path}:{number}: {line.strip()}: no such file in csrc/"
                source, included = (str(file.relative_to(root)) for file in (path, target))
                edges.append(Edge(source, included, f"{path.relative_to(ROOT)}:{number}: {line.strip()}"))
    return edges


def _check_layers(edges: list[Edge], separator: str, allowed: dict[str, set[str]]) -> None:
    """Fail if a line breaks the table; the message lists the lines."""
    crossing = [
        (edge.source.split(separator)[0], edge.target.split(separator)[0], edge.place)
        for edge in edges
        if edge.source.split(separator)[0] != edge.target.split(separator)[0]
    ]
    assert {source for source, _, _ in crossing} <= set(allowed), "a module or folder is missing in the table"
    assert [place for source, target, place in crossing if target not in allowed[source]] == []


def _check_cycles(edges: list[Edge]) -> None:
    graph: dict[str, set[str]] = {}
    for edge in edges:
        if edge.source != edge.target:
            graph.setdefault(edge.source, set()).add(edge.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        steps = list(zip(error.args[1][1:], error.args[1], strict=False))  # graphlib lists predecessors first
        pytest.fail("a cycle:\n" + "\n".join(edge.place for edge in edges if (edge.source, edge.target) in steps))


@pytest.mark.parametrize("allowed", [MAY_IMPORT, MAY_INCLUDE])
def test_the_tables_have_no_cycle(allowed):
    TopologicalSorter(allowed).prepare()


def test_imports_point_one_way():
    edges = _imports()
    assert len(edges) > 100
    _check_layers(edges, ".", MAY_IMPORT)


def test_modules_import_each_other_without_cycles():
    _check_cycles(_imports())


def test_includes_point_one_way():
    edges = _includes()
    assert len(edges) > 100
    _check_layers(edges, "/", MAY_INCLUDE)


def test_files_include_each_other_without_cycles():
    _check_cycles(_includes())


def test_an_offending_line_is_shown():
    edges = [Edge("ops.nms", "models.heads", "ops/nms.py:3: from spatialflow.models.heads import BoxHead")]
    with pytest.raises(AssertionError, match=r"ops/nms.py:3: from spatialflow.models"):
        _check_layers(edges, ".", MAY_IMPORT)


def test_a_cycle_is_shown():
    edges = [Edge("a", "b", "a.py:1: import b"), Edge("b", "a", "b.py:2: import a"), Edge("c", "a", "c.py:1: import a")]
    with pytest.raises(pytest.fail.Exception, match=r"(?s)a cycle.*a.py:1.*b.py:2") as failure:
        _check_cycles(edges)
    assert "c.py" not in str(failure.value)
