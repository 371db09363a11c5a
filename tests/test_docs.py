# SPDX-License-Identifier: Apache-2.0
"""Documentation pages and examples of `--help`: names, links and options exist; code blocks and tutorials run."""

import argparse
import importlib
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

import spatialflow
from spatialflow.cli.main import _parser
from spatialflow.config import SECTIONS, parse_settings, place_overrides

ROOT = Path(__file__).resolve().parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", CONTRIBUTING, *SITE]
TUTORIALS = [ROOT / "docs" / "tour.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]

pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="not in a source tree")

# Words with a slash that are not files of the source tree: inputs and outputs of commands, torch headers, patterns, and
# the operator that CONTRIBUTING.md adds as an example.
NOT_OURS = re.compile(
    r"[A-Z<*]|count_above|torch/|goldens/|build/|(evaluation|tensorboard|overlays|panoptic_\w+|gpu_check(_second)?_logs)/|^(clip|mydata|one|out|photos|pictures|run|scenes|two)/"
)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block of code; `reason` is why it cannot run in a test, or empty."""

    language: str
    text: str
    reason: str


def blocks_of(page: Path) -> list[Block]:
    pattern = r"(?:^<!-- not run: ([^>]+) -->\n)?^```(\w*)\n(.*?)^```"
    return [Block(m[2], m[3], m[1] or "") for m in re.finditer(pattern, page.read_text(), re.M | re.S)]


def commands_of(text: str) -> list[list[str]]:
    """Return the arguments of every `spatialflow ...` in code, after joining lines that end in a backslash.

    A file for standard input is left out.
    """
    text = re.sub(r" < \S+", "", text.replace("\\\n", " "))
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"^ {4}\S.*$", text, re.M)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(spatialflow [^`\n]+)`", text)
    parts = [part for line in lines for part in line.split("&&")]
    matches = [re.match(r"\s*(?:torchrun .*-m spatialflow\.cli|spatialflow) (.*)", part) for part in parts]
    return [shlex.split(match[1].replace(" ...", ""), comments=True) for match in matches if match]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    options = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):  # the actions of `dataset`
            options = options.union(*map(options_of, action.choices.values()))
    return options


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands(page):
    known = subcommands()
    for name, *arguments in commands_of(page.read_text()):
        if name.startswith("--") or name == "COMMAND":
            continue
        assert name in known, f"{page.name}: no command {name!r}"
        used = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        assert used <= options_of(known[name]), f"{page.name}: spatialflow {name}: {used - options_of(known[name])}"
        configs = [value for option, value in itertools.pairwise(arguments) if option == "--config" and value.islower()]
        configs += [word for word in arguments[:1] if name == "train" and "=" not in word and word[0] != "-"]
        configs = [config for config in configs if not config.endswith(".yaml")]  # written by the reader
        assert set(configs) <= set(spatialflow.list_configs()), f"{page.name}: {configs}"
        settings = [argument for argument in arguments if re.match(r"[a-z_]+=", argument)]
        place_overrides(parse_settings(settings))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_console_blocks(page):
    """The parser accepts every `spatialflow` command of a console block."""
    for block in blocks_of(page):
        if block.language == "console":
            for arguments in commands_of(f"```\n{block.text}```\n"):
                try:
                    _parser().parse_args(arguments)
                except SystemExit:
                    pytest.fail(f"{page_name(page)}: spatialflow {shlex.join(arguments)}")


def has_python_blocks(page: Path) -> bool:
    return any(block.language == "python" and not block.reason for block in blocks_of(page))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if has_python_blocks(p) and p not in (CONTRIBUTING, *TUTORIALS)], ids=page_name
)
def test_python_blocks(page, tmp_path, monkeypatch):
    """The blocks of a page run in order in one session."""
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    for block in blocks_of(page):
        if block.language == "python" and not block.reason:
            exec(compile(block.text, page_name(page), "exec"), session)


@pytest.mark.skipif("SPATIALFLOW_BACKEND" in os.environ, reason="the commands are tested on the CPU kernels")
def test_first_examples_of_the_readme(tmp_path):
    """The first commands of README's section work as they stand, and its Python after the first of them."""
    section = PAGES[0].read_text().split("## Panoptic segmentation")[1].split("\n## ")[0]
    console, python = (re.search(rf"^```{kind}\n(.*?)^```", section, re.M | re.S)[1] for kind in ("console", "python"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = commands_of(f"```\n{console}```\n")
    assert [command[0] for command in commands] == ["synthesize", "predict", "evaluate", "view"]
    commands[0][commands[0].index("--count") + 1] = "2"
    commands[3] += ["--export", "view.html"]  # instead of a server
    for arguments in commands:
        run([sys.executable, "-m", "spatialflow", *arguments], tmp_path, environment)
    result = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_syntax(page):
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, page_name(page), "exec")


def test_example_of_an_operator():
    """The tests in the example of CONTRIBUTING.md take only arguments that tests of `OpMatrix` have."""
    sources = [block.text for block in blocks_of(CONTRIBUTING) if block.language == "python"]
    tests: dict = {}
    exec(next(source for source in sources if "class TestCountAbove" in source), tests)

    def arguments(kind: type) -> set[str]:
        methods = [value for name, value in vars(kind).items() if name.startswith("test_") and callable(value)]
        return {key for method in methods for key in inspect.signature(method).parameters}

    assert arguments(tests["TestCountAbove"]) <= arguments(tests["OpMatrix"])
    function = next(source for source in sources if "@register_fake" in source)
    assert "from __future__ import annotations" in function


@pytest.mark.skipif("SPATIALFLOW_BACKEND" in os.environ, reason="the commands are tested on the CPU kernels")
@pytest.mark.parametrize("page", TUTORIALS, ids=page_name)
def test_tutorial(page, tmp_path):
    """Commands and Python blocks run in order in an empty folder, on a few small images and for one epoch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    python: list[str] = []
    for block in blocks_of(page):
        if block.language == "yaml":
            (path,) = re.findall(r"Save this as `([^`]+)`:", page.read_text())
            text = re.sub(r"epochs: \d+", "epochs: 1", block.text)
            (tmp_path / path).write_text(re.sub(r"(learning_rate_epochs: ).*", r"\1[1]", text))
        elif block.language == "python" and not block.reason:
            python.append(block.text)  # a later block may use names of an earlier one
            run([sys.executable, "-c", "\n".join(python)], tmp_path, environment)
        elif block.language == "console":
            for arguments in commands_of(f"```\n{block.text}```\n"):
                inputs = {"photos": "scenes/images", "weights.pth": "", "run" if arguments[0] != "train" else "": ""}
                if any(argument in inputs and not (tmp_path / argument).exists() for argument in arguments):
                    continue  # these need files of the user
                count = arguments.index("--count") + 1 if "--count" in arguments else None
                if count:
                    arguments[count] = "4"
                if arguments[0] == "train":
                    arguments.insert(1, "epochs=1")
                run([sys.executable, "-m", "spatialflow.cli", *arguments], tmp_path, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("name", subcommands())
def test_examples_of_help(name):
    """The parser accepts each example, and at least one is an example of the command itself."""
    lines = re.findall(r"^  spatialflow (.*)$", subcommands()[name].epilog or "", re.M)
    assert lines or name == "info"
    assert all(_parser().parse_args(shlex.split(line)) for line in lines)
    assert not lines or name in {line.split()[0] for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files(page):
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", text)
    paths = {
        word
        for words in code
        for word in words.split()
        if re.fullmatch(r"[\w.<>*-]*/[\w.<>*/-]*|\w+\.(md|cmake)", word)
    }
    missing = []
    for path in sorted(paths):
        if NOT_OURS.search(path):
            continue
        homes = (ROOT, ROOT / "spatialflow", page.parent)
        if not any((home / path).exists() for home in homes):
            missing.append(path)
    assert not missing, f"{page.name}: {missing}"
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    assert all((page.parent / link).exists() for link, _ in links if link and "://" not in link), (
        f"{page.name}: {links}"
    )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_line_numbers_of_files(page):
    """Pages name functions and files; line numbers would be wrong after the next change."""
    assert not re.findall(r"\w+\.(?:cuh?|h|cpp|py):\d+", page.read_text())


def test_navigation():
    """Every page is in mkdocs.yml once, and every operator has a page with a figure of its name."""
    navigation = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(navigation) == sorted(str(page.relative_to(ROOT / "docs")) for page in SITE)
    operators = [path.stem for path in (ROOT / "csrc" / "ops").glob("*.cpp")]
    public = set(spatialflow.ops.__all__) & {*operators, "batched_nms"}
    for operator in public:
        assert (ROOT / "docs" / "operators" / f"{operator}.md").is_file(), operator
        picture = ROOT / "docs" / "assets" / f"{operator}.svg"
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_assets_are_small():
    for path in (ROOT / "docs" / "assets").iterdir():
        assert path.stat().st_size < 150_000, path


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 120


def test_tables_of_the_configuration():
    """The tables are those of the package, describe every field and list every configuration."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        tables = importlib.import_module("tables")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for path in tables.PAGES:
        assert path.read_text() == tables.with_tables(path.read_text()), f"run python docs/tables.py: {path}"
    text = (ROOT / "docs" / "configuration.md").read_text()
    for section, kind in SECTIONS.items():
        rows = text.partition(f"<!-- fields: {section} -->\n\n")[2].partition("\n\n<!-- end -->")[0].splitlines()[2:]
        assert [row.split("`")[1] for row in rows] == list(kind.__dataclass_fields__)
        assert all(row.rsplit("|", 2)[1].strip() for row in rows), section
    text = (ROOT / "docs" / "models.md").read_text()
    assert all(text.count(f"\n| `{name}` |") == 1 for name in spatialflow.list_configs())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_names(page):
    """Names such as `spatialflow.a.b` and make targets exist."""
    text = page.read_text()
    for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", text, re.M):  # a function may have its module's name
        assert hasattr(importlib.import_module(module), name), f"{page.name}: {module}.{name}"
    text = re.sub(r"^::: .*", "", text, flags=re.M)
    for name in sorted(set(re.findall(r"\bspatialflow(?:\.[A-Za-z_]\w*)+", text))):
        if name.endswith(".count_above"):  # the example of CONTRIBUTING.md
            continue
        value, *parts = (spatialflow, *name.split(".")[1:])
        for part in parts:
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^(?: {4})?make ([a-z-]+)", text, re.M))
    assert named <= targets, f"{page.name}: {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_environment_variables_and_macros(page):
    folders = (ROOT / name for name in ("spatialflow", "csrc", "cmake"))
    build = [ROOT / "CMakeLists.txt", ROOT / "tools" / "build_backend.py"]
    sources = [*build, *(path for folder in folders for path in folder.rglob("*.[pch]*"))]
    known = {name for path in sources for name in re.findall(r"SPATIALFLOW_[A-Z_]+", path.read_text(errors="replace"))}
    assert set(re.findall(r"\bSPATIALFLOW_[A-Z_]+\b", page.read_text())) <= known | {"SPATIALFLOW_FIXTURES"}


def test_settings_of_the_text():
    """Inline code such as `field: value` or `field=value` uses fields that exist."""
    fields = {name for section in SECTIONS.values() for name in section.__dataclass_fields__}
    text = "".join((ROOT / "docs" / name).read_text() for name in ("training.md", "prediction.md", "predictor.md"))
    assigned = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)[:=] ?\w", text))
    assert assigned - {"detection_masks"} <= fields | {"test_short_edges", "test_flip"}, assigned - fields
