# SPDX-License-Identifier: Apache-2.0
"""Each line that `make mutation-round` changes occurs exactly once in its file."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "csrc").is_dir():
    pytest.skip("not in a source tree", allow_module_level=True)


def test_every_line_stands_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import mutation_round

    places = [(f"csrc/cuda/{change.file}", change) for change in mutation_round.MUTATIONS]
    places += [(f"csrc/{change.file}", change) for change in mutation_round.FAULTS]
    lost = [f"{file}: {change.name}" for file, change in places if (ROOT / file).read_text().count(change.before) != 1]
    assert not lost
