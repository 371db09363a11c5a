# SPDX-License-Identifier: Apache-2.0
"""Benchmark harness: results are checked before they are timed, and scripts declare their cases and providers."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.scenes import write_coco
from test_surface import public

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
        setup=lambda count: harness.Problem((torch.randn(count),), features=(0,), differentiable=(0,), bytes=8 * count),
        sweep={"few": {"count": 10}, "many": {"count": 100}},
        providers={"spatialflow": ours, "reference": lambda x: x * x, "absent": None, **providers},
    )


def refuse(x):
    raise ValueError("too hot")


class TestHarness:
    @pytest.mark.parametrize(
        "option, value", [("threads", "0"), ("seconds", "-1"), ("seconds", "nan"), ("device", "tpu")]
    )
    def test_bad_options_are_named(self, option, value, capsys):
        harness = importlib.import_module("harness")
        with pytest.raises(SystemExit):
            harness.main(square(harness, torch.square), [f"--{option}", value])
        assert f"error: --{option} must be" in capsys.readouterr().err

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
        assert "| `square` | few | forward |" in harness.markdown([path])

    @pytest.mark.parametrize(
        "ours, right",
        [(lambda x: x * x + 1e-2, []), (lambda x: x * x.detach(), ["forward"]), (lambda x: (x * x)[1:], [])],
        ids=["offset", "gradient", "shape"],
    )
    def test_wrong_results_are_not_timed(self, tmp_path, ours, right):
        """If only the gradient is wrong, the forward pass is still timed."""
        harness = importlib.import_module("harness")
        with pytest.raises(SystemExit, match="square, few, .*spatialflow is off by .*nothing is timed"):
            harness.main(square(harness, ours), ["--seconds", "0.01", "--output", str(tmp_path)])
        kept = [json.loads(path.read_text()) for path in tmp_path.glob("*/square.json")]
        assert [row["mode"] for content in kept for row in content["rows"] if row["provider"] == "spatialflow"] == right

    def test_a_baseline_without_the_dtype_is_timed_in_float32(self, tmp_path):
        """A baseline without kernels for bfloat16, such as torchvision, is timed in float32 instead."""
        harness = importlib.import_module("harness")

        def float32_only(x):
            return x * x if x.dtype == torch.float32 else refuse(x)

        benchmark = square(harness, torch.square, **{"float32 only": float32_only})
        harness.main(benchmark, ["--seconds", "0.01", "--dtype", "bfloat16", "--output", str(tmp_path)])
        (path,) = tmp_path.glob("*/square.json")
        providers = [row["provider"] for row in json.loads(path.read_text())["rows"][:3]]
        assert providers == ["spatialflow", "reference", "float32 only, float32"]

    def test_cases_are_kept_as_they_come(self, tmp_path):
        """A run that ends early, here by a wrong result, keeps the rows of the earlier cases."""
        harness = importlib.import_module("harness")
        with pytest.raises(SystemExit, match="square, many, "):
            benchmark = square(harness, lambda x: x * x + (len(x) > 10))
            harness.main(benchmark, ["--seconds", "0.01", "--output", str(tmp_path)])
        (path,) = tmp_path.glob("*/square.json")
        assert {row["case"] for row in json.loads(path.read_text())["rows"]} == {"few"}

    def test_selection_is_not_kept(self, capsys):
        harness = importlib.import_module("harness")
        before = sorted(FOLDER.rglob("*"))
        harness.main(square(harness, torch.square), ["--seconds", "0.01", "--cases", "many"])
        assert "many, forward" in capsys.readouterr().out and sorted(FOLDER.rglob("*")) == before
        with pytest.raises(SystemExit, match="no case contains none; cases: few; many"):
            harness.main(square(harness, torch.square), ["--cases", "none"])

    @pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
    def test_a_baseline_that_cannot_be_used_is_absent(self, tmp_path, monkeypatch, error):
        """A torchvision built for another torch raises RuntimeError at import."""
        (tmp_path / "broken_peer.py").write_text(f"raise {error}('operator torchvision::nms does not exist')")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert importlib.import_module("harness").optional("broken_peer") is None


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, monkeypatch):
    """Importing a script times nothing; the script declares cases and providers, with "spatialflow" among them."""
    monkeypatch.delitem(sys.modules, name, raising=False)  # otherwise a cached module of this name would be used
    benchmark = importlib.import_module(name).BENCHMARK
    assert benchmark.name == name and benchmark.title and benchmark.sweep
    assert benchmark.providers["spatialflow"] is not None
    assert benchmark.oracle is not None or "reference" in benchmark.providers


@pytest.mark.parametrize("name", ["end_to_end", "stages", "gpu", "host_overhead"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_times_must_be_positive(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--output", str(tmp_path), "--seconds", value])
    assert ended.value.code == 2 and "--seconds must be positive and finite, got" in capsys.readouterr().err


class TestHostOverhead:
    def test_rows(self, tmp_path, capsys):
        """There is a row for every operator and mode, for tensors, arrays and, if installed, torchvision."""
        module = importlib.import_module("host_overhead")
        module.main(["--seconds", "0.001", "--output", str(tmp_path)])
        (path,) = tmp_path.glob("*/host_overhead.json")
        content = json.loads(path.read_text())
        assert content["threads"] == 1 and {row["op"].split(",")[0] for row in content["rows"]} == set(public())
        assert importlib.import_module("harness").markdown([path]) == ""  # only rows in milliseconds have a table
        keys = {(row["op"], row["grad_mode"], row["provider"]) for row in content["rows"]}
        ours = {
            (op, mode, f"spatialflow{kind}")
            for op in module.cases()
            for mode in module.MODES
            for kind in ("", ", arrays")
        }
        assert ours <= keys and {key[2] for key in keys - ours} <= {"torchvision"}
        for row in content["rows"]:
            assert 0 < row["least_us"] <= row["median_us"] and row["rounds"] >= 3
            assert (row["ratio"] is not None) == (row["provider"] == "torchvision")
        assert len(capsys.readouterr().out.splitlines()) == 2 + len(module.cases()) * len(module.MODES)

    def test_a_wrong_baseline_is_not_timed(self, monkeypatch):
        module = importlib.import_module("host_overhead")
        calls = {module.OURS: lambda: torch.ones(2), module.PEER: lambda: torch.zeros(2)}
        monkeypatch.setattr(module, "cases", lambda device: {"nms": calls})
        with pytest.raises(AssertionError, match="not close"):
            module.main(["--seconds", "0.001"])

    def test_unknown_call(self, capsys):
        with pytest.raises(SystemExit):
            importlib.import_module("host_overhead").main(["--ops", "convolve"])
        assert "--ops: no call contains convolve; calls: roi_align; deform_conv2d" in capsys.readouterr().err


PROVIDERS = ("spatialflow", "spatialflow, every mask", "reference", "reference, channels-last")


@pytest.fixture(scope="module")
def end_to_end_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    write_coco(folder / "data", 2, (96, 128))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        module = importlib.import_module("end_to_end")
    (folder / "little.yaml").write_text("base: tiny\ntest: {stuff_area_threshold: 40}\n")
    arguments = [
        "--images",
        str(folder / "data/images"),
        "--config",
        str(folder / "little.yaml"),
        "--seconds",
        "0.01",
        "--output",
        str(folder / "results"),
    ]
    module.main([*arguments, "--short-edges", "64", "96", "--threads", "1"])
    (path,) = (folder / "results").glob("*/end_to_end.json")
    before = json.loads(path.read_text())["rows"]
    module.main([*arguments, "--short-edges", "96", "--providers", "reference", "--threads", "1"])
    assert path.with_suffix(".png").stat().st_size > 1000
    return before, json.loads(path.read_text())["rows"]


class TestEndToEnd:
    def test_the_reference_finds_the_same(self, end_to_end_rows):
        """The reference pipeline, with its operators and merge, gives the same map, with things and stuff in it."""
        for row in end_to_end_rows[0]:
            assert row["agreement"] > 0.99 and row["instances"] >= 3 and row["segments"] > row["instances"]

    def test_rows(self, end_to_end_rows):
        before, _ = end_to_end_rows
        keys = [(row["short_edge"], row["provider"]) for row in before]
        assert keys == [(e, p) for e in (96, 64) for p in PROVIDERS]
        for row in before:
            assert row["images_per_second"] > 0 and row["runs"] >= 2 and row["pq"] is None
            assert 0.9 < sum(row["share"].values()) <= 1 and all(share >= 0 for share in row["share"].values())

    def test_other_rows_stay(self, end_to_end_rows):
        """A run of one pipeline and size replaces only its row."""
        before, after = end_to_end_rows
        changed = [new for old, new in zip(before, after) if old != new]
        assert len(after) == len(before) and [(r["short_edge"], r["provider"]) for r in changed] == [(96, "reference")]
        assert changed[0]["ratio"] is None


@pytest.mark.parametrize("name", ["end_to_end", "throughput"])
@pytest.mark.parametrize("is_there", [True, False])
def test_no_pictures(name, is_there, tmp_path, monkeypatch):
    folder = tmp_path if is_there else tmp_path / "absent"
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit, match=f"{folder}: contains no .jpg or .png"):
        importlib.import_module(name).main(["--images", str(folder), "--config", "tiny", "--output", str(tmp_path)])


def test_throughput(tmp_path, monkeypatch, capsys):
    """Rates of every stage, alone and overlapped, use the same images; every row has at least three rounds."""
    write_coco(tmp_path / "data", 3, (64, 96))
    (tmp_path / "little.yaml").write_text("base: tiny\ntest: {test_short_edges: [64], test_long_edge: 96}\n")
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("throughput")
    module.main(
        [
            "--images",
            str(tmp_path / "data/images"),
            "--config",
            str(tmp_path / "little.yaml"),
            "--count",
            "2",
            "--threads",
            "1",
            "--output",
            str(tmp_path / "results"),
        ]
    )
    (path,) = (tmp_path / "results").glob("*/throughput.json")
    content = json.loads(path.read_text())
    assert content["images"] == 2 and [row["row"] for row in content["rows"]] == list(module.ROWS)
    for row in content["rows"]:
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["rounds"] >= 3
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert min(row["of_slowest_stage"] for row in content["rows"][:3]) == 1
    assert "overlapped" in capsys.readouterr().out


def test_memory(tmp_path, monkeypatch):
    """Every row is the peak of its own process, which imports torch: more than 50 MiB."""
    monkeypatch.syspath_prepend(str(FOLDER))
    options = ["--images", "2", "--frames", "3", "--size", "64", "96", "--output", str(tmp_path)]
    importlib.import_module("memory").main(options)
    (path,) = tmp_path.glob("*/memory.json")
    rows = json.loads(path.read_text())["rows"]
    images = [(program, "images", 2) for program in ("spatialflow predict", "Predictor.stream")]
    assert [tuple(row.values())[:3] for row in rows] == [*images, ("spatialflow predict", "frames", 3)]
    assert all(50 << 20 < row["peak_bytes"] < 8 << 30 for row in rows)


def test_memory_of_a_failed_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit, match="memory: `.* -c 1/0` failed with exit code 1"):
        importlib.import_module("memory").peak_memory(["-c", "1/0"], 1)


def test_untrained_branches_are_not_zero():
    """Every residual branch has a nonzero output, and its norms have the statistics of the images."""
    from untrained import settle_norms

    from spatialflow import build_model

    backbone = build_model("tiny").backbone.eval()
    settle_norms(backbone, torch.randn(2, 3, 64, 64))
    blocks = [module for module in backbone.modules() if hasattr(module, "bn3")]
    assert blocks and all(block.bn3.weight.abs().min() > 0 for block in blocks)
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(not norm.training and norm.momentum == 0.1 for norm in norms)
    assert all((norm.running_var != 1).all() for norm in norms)
