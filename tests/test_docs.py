# SPDX-License-Identifier: Apache-2.0
"""README.md, docs/*.md and the examples of `--help` name commands, options, files and Python names that exist."""

import argparse
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

import spatialflow
from spatialflow.cli.main import _parser
from spatialflow.config import SECTIONS, parse_settings, place_overrides

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="not in a source tree")

# Words with a slash that are no files of the source tree: what commands write or are given, headers of torch, patterns.
NOT_OURS = re.compile(
    r"[A-Z<*]|\.\./shared|torch/|goldens/|build/|(evaluation|tensorboard|overlays|panoptic_\w+|gpu_check_logs)/"
)


def commands_of(text: str) -> list[list[str]]:
    """The arguments of every `spatialflow ...` in code, with lines that end in a backslash joined."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"^ {4}\S.*$", text, re.M)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(spatialflow [^`\n]+)`", text)
    parts = [part for line in lines for part in line.split("&&")]
    matches = [re.match(r"\s*(?:torchrun .*-m spatialflow\.cli|spatialflow) (.*)", part) for part in parts]
    return [shlex.split(match[1].replace(" ...", ""), comments=True) for match in matches if match]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    known = subcommands()
    for name, *arguments in commands_of(page.read_text()):
        if name.startswith("--") or name == "COMMAND":
            continue
        assert name in known, f"{page.name}: no command {name!r}"
        given = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        assert given <= options_of(known[name]), f"{page.name}: spatialflow {name}: {given - options_of(known[name])}"
        configs = [value for option, value in itertools.pairwise(arguments) if option == "--config" and value.islower()]
        configs += arguments[:1] if name == "train" else []
        assert set(configs) <= set(spatialflow.list_configs()), f"{page.name}: {configs}"
        settings = [argument for argument in arguments if re.match(r"[a-z_]+=", argument)]
        place_overrides(parse_settings(settings))


@pytest.mark.parametrize("name", subcommands())
def test_examples_of_help(name):
    """Each is parsed as it stands, and belongs to the commands that lead to this one."""
    lines = re.findall(r"^  spatialflow (.*)$", subcommands()[name].epilog or "", re.M)
    assert lines or name == "info"
    assert all(_parser().parse_args(shlex.split(line)) for line in lines)
    assert not lines or name in {line.split()[0] for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text)
    assert all((page.parent / link).exists() for link, _ in links if link and "://" not in link), (
        f"{page.name}: {links}"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_names(page):
    """`spatialflow.a.b` of the text, and make targets."""
    text = page.read_text()
    for name in sorted(set(re.findall(r"\bspatialflow(?:\.[A-Za-z_]\w*)+", text))):
        value, *parts = (spatialflow, *name.split(".")[1:])
        for part in parts:
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^(?: {4})?make ([a-z-]+)", text, re.M))
    assert named <= targets, f"{page.name}: {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_environment_variables_and_macros(page):
    folders = (ROOT / name for name in ("spatialflow", "csrc", "cmake"))
    sources = [ROOT / "CMakeLists.txt", *(path for folder in folders for path in folder.rglob("*.[pch]*"))]
    known = {name for path in sources for name in re.findall(r"SPATIALFLOW_[A-Z_]+", path.read_text(errors="replace"))}
    assert set(re.findall(r"\bSPATIALFLOW_[A-Z_]+\b", page.read_text())) <= known | {"SPATIALFLOW_FIXTURES"}


def test_settings_of_the_text():
    """Words in code that look like a field of a configuration are one."""
    fields = {name for section in SECTIONS.values() for name in section.__dataclass_fields__}
    text = (ROOT / "docs" / "training.md").read_text() + (ROOT / "docs" / "prediction.md").read_text()
    assigned = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)[:=] ?\w", text))
    assert assigned - {"detection_masks"} <= fields | {"test_short_edges", "test_flip"}, assigned - fields
