# SPDX-License-Identifier: Apache-2.0
"""Readers of configuration files and of settings on a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fuzz.mutate import SPECIAL, mutate_bytes, mutate_tree
from fuzz.workspace import WrongResult, json_bytes
from spatialflow.config import SECTIONS, Config, load_config, parse_settings


def read_configuration(folder: Path, base: int, changes: list) -> int:
    path = folder / "edited.yaml"
    name = ("tiny", "demo", "spatialflow_r50_cityscapes", "retinanet_r50_coco")[base]
    config = load_config(name)
    tree = {section: _with_lists(vars(getattr(config, section))) for section in SECTIONS}
    if base == 1:
        tree = {"base": "demo", "model": {"num_things": 6}}
    if any(kind in ("set", "flip", "cut", "drop", "repeat", "insert", "number") for kind, _, _ in changes):
        path.write_bytes(mutate_bytes(yaml.safe_dump(tree).encode(), changes))
    else:
        path.write_bytes(json_bytes(mutate_tree(tree, changes)))
    return _check_config(load_config(path))


def _with_lists(section: Any) -> dict:
    """Return the fields of a section with lists for tuples, as YAML has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in section.items()}


def _check_config(config: Config) -> int:
    hash(config)  # raises TypeError if a section or value is mutable
    if load_config(config) != config:
        raise WrongResult("an accepted configuration changes when it is read again")
    return len(SECTIONS)


TEXTS = (
    "",
    "=",
    "epochs",
    "epochs=",
    "epochs=5",
    "epochs=0x10",
    "epochs=1_000",
    "epochs=[",
    "epochs={",
    "epochs=1e3",
    "epochs=5.0",
    "seed=99999999999999999999999",
    "learning_rate=.inf",
    "learning_rate=1e400",
    "learning_rate=-0",
    "learning_rate=1e-400",
    "anchor_ratios=[1e-300]",
    "anchor_ratios=[]",
    "anchor_ratios=!!python/object/apply:os.system [x]",
    "categories=!!binary aGk=",
    "categories=2020-01-01",
    "categories=[a]",
    "model={}",
    "model=5",
    "model={fpn_channels: 8}",
    "model.fpn_channels=8",
    "model.=8",
    ".=8",
    "model={1: 2}",
    "model={null: 2}",
    "test_short_edges=[[[[1]]]]",
    "test_short_edges=[1,true]",
    "a" * 5000,
    "epochs=" + "9" * 5000,
    "epochs=" + "[" * 3000,
    "epochs=&a [*a]",
    "epochs=&a {b: *a}",
    "name=x",
    "\0=\0",
    "epochs=\0",
    "\ud800=1",
    "epochs=\ud800",
    "test_short_edges=" + "&a [1,1,1,1,1,1,1,1,1]",
    "base=tiny",
    "training={epochs: 3}",
    "learning_rate_epochs=" + json.dumps([5] * 3000),
    "flow_source=null",
    "flow_source=",
    "flow_source=reg",
    "image_std=[1,1,0]",
    "epochs=" + ", ".join(["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]).join("[]"),
    "? [a, b]: c",
    "epochs=? {a: b}\n: c",
    "epochs=- 1",
    "epochs=<<: 1",
    "epochs=!!set {a}",
    "epochs=!!omap [a: 1]",
    "epochs=%YAML 1.1",
)


def read_setting(folder: Path, base: int, changes: list) -> int:
    """Parse FIELD=VALUE as on a command line: arbitrary text, and every field with special values."""
    fields = [name for section in SECTIONS.values() for name in section.__dataclass_fields__]
    chosen = [TEXTS[base % len(TEXTS)]] if base & 1 else [f"{fields[base % len(fields)]}={SPECIAL[base // 7 % 50]}"]
    for _, place, value in changes:
        special = SPECIAL[value % (len(SPECIAL) - 2)]
        chosen.append(f"{fields[place % len(fields)]}={json.dumps(special)}")
    return _check_config(load_config("tiny", **parse_settings(chosen)))
