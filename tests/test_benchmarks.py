# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: right before fast, complete results, and scripts that declare what it needs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "= Benchmark(" in path.read_text())

pytest.importorskip("matplotlib", reason="plots need matplotlib")
if not FOLDER.is_dir():
    pytest.skip("not in a source tree", allow_module_level=True)


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def square(harness, ours, **providers):
    return harness.Benchmark(
        name="square",
        title="a test",
        setup=lambda count: harness.Problem((torch.randn(count),), differentiable=(0,), bytes=8 * count),
        sweep={"few": {"count": 10}, "many": {"count": 100}},
        providers={"spatialflow": ours, "reference": lambda x: x * x, "absent": None, **providers},
    )


def refuse(x):
    raise ValueError("too hot")


class TestHarness:
    def test_results(self, tmp_path, capsys):
        harness = importlib.import_module("harness")
        benchmark = square(harness, torch.square, refusing=refuse)
        harness.main(benchmark, ["--seconds", "0.01", "--threads", "1", "--output", str(tmp_path)])
        (path,) = tmp_path.glob("*/square.json")
        assert path.with_suffix(".png").stat().st_size > 1000
        content = json.loads(path.read_text())
        assert {"device", "threads", "versions", "commit", "date", "rows"} <= set(content)
        assert content["threads"] == 1 and content["versions"]["torch"] == torch.__version__
        keys = [(row["case"], row["mode"], row["provider"]) for row in content["rows"]]
        expected = [
            (case, mode, provider)
            for case in ("few", "many")
            for mode in ("forward", "forward+backward")
            for provider in ("spatialflow", "reference")
        ]
        assert keys == expected
        for row in content["rows"]:
            assert 0 < row["q10_ms"] <= row["median_ms"] <= row["q90_ms"] and row["runs"] >= 3 and row["error"] < 1e-6
        printed = capsys.readouterr().out
        assert "refusing fails on few, forward: too hot" in printed and "GB/s" in printed
        assert "| `square` | few | forward |" in harness.markdown(tmp_path)

    @pytest.mark.parametrize("ours", [lambda x: x * x + 1e-2, lambda x: x * x.detach(), lambda x: (x * x)[1:]])
    def test_wrong_results_are_not_timed(self, tmp_path, ours):
        """An offset, a wrong gradient behind right values, a wrong shape."""
        harness = importlib.import_module("harness")
        with pytest.raises(SystemExit, match="square, few, .*spatialflow is off by .*nothing is timed"):
            harness.main(square(harness, ours), ["--seconds", "0.01", "--output", str(tmp_path)])
        assert list(tmp_path.iterdir()) == []

    def test_selection_is_not_kept(self, capsys):
        harness = importlib.import_module("harness")
        before = sorted(FOLDER.rglob("*"))
        harness.main(square(harness, torch.square), ["--seconds", "0.01", "--cases", "many"])
        assert "many, forward" in capsys.readouterr().out and sorted(FOLDER.rglob("*")) == before
        with pytest.raises(SystemExit, match="no case contains none; cases: few; many"):
            harness.main(square(harness, torch.square), ["--cases", "none"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, monkeypatch):
    """Importing a script times nothing; it declares cases, and ours among the providers."""
    monkeypatch.delitem(sys.modules, name, raising=False)  # another module of that name would be taken instead
    benchmark = importlib.import_module(name).BENCHMARK
    assert benchmark.name == name and benchmark.title and benchmark.sweep
    assert benchmark.providers["spatialflow"] is not None
    assert benchmark.oracle is not None or "reference" in benchmark.providers
