# SPDX-License-Identifier: Apache-2.0
"""The lines that `make mutation-round` breaks still stand where it looks for them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "csrc").is_dir():
    pytest.skip("not in a source tree", allow_module_level=True)


def test_every_line_stands_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import mutation_round

    places = [(f"csrc/cuda/{one.file}", one) for one in mutation_round.MUTATIONS]
    places += [(f"csrc/{one.file}", one) for one in mutation_round.FAULTS]
    lost = [f"{file}: {one.name}" for file, one in places if (ROOT / file).read_text().count(one.before) != 1]
    assert not lost
