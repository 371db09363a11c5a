# SPDX-License-Identifier: Apache-2.0
"""Each text that `make mutation-round` and `make fuzz-planted` change occurs exactly once in its file."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "csrc").is_dir():
    pytest.skip("not in a source tree", allow_module_level=True)


def test_every_text_occurs_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import fuzz_planted
    import mutation_round

    places = [(f"csrc/cuda/{change.file}", change) for change in mutation_round.MUTATIONS]
    places += [(f"csrc/{change.file}", change) for change in mutation_round.FAULTS]
    places += [(fault.file, fault) for fault in fuzz_planted.FAULTS]
    lost = [f"{file}: {change.name}" for file, change in places if (ROOT / file).read_text().count(change.before) != 1]
    assert not lost
