# SPDX-License-Identifier: Apache-2.0
"""Images per second from image file to panoptic PNG, by stage, in the form of the paper's table XI.

Each model and short edge is run with `spatialflow.Predictor` and with `reference_pipeline.py`, with the same weights,
one image at a time. The panoptic map needs the masks of the confident detections only. The reference computes the masks
of all detections, as the released implementation does; so does spatialflow in the row "every mask". The pipelines take
turns image by image. "agreement" is the panoptic quality of a pipeline's maps with the reference's maps as ground
truth. The maps are not equal bit by bit: rounding decides ties of the stuff classes, and which boxes reach a threshold.
With ground truth (`--annotations`), PQ is reported too.

Without weights (`--checkpoint`), an untrained network is adjusted so that later stages have as much work as in a
trained one. The numbers of detections and segments are printed.

On a GPU, spatialflow replays a CUDA graph, whose time is in the stage "backbone + FPN", and stage times are those of
queuing; only "merge" waits for the device. `--no-cuda-graph` divides the graph into stages, and with
CUDA_LAUNCH_BLOCKING=1 their times are those of execution.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from harness import OURS, environment, optional, require_positive, results_path, write_figure, write_text
from pipeline_options import add_pipeline_options, find_images, find_weights, load_model
from reference_pipeline import STAGES, ReferencePipeline, torchvision

from spatialflow import Predictor, build_model
from spatialflow.data.categories import Categories
from spatialflow.panoptic import PanopticWriter, evaluate, read_panoptic_json, write_id_map

EVERY_MASK = f"{OURS}, every mask"
SIXTEEN_BITS = "reference, 16 bits"
REFERENCES = ("reference", "reference, channels-last", SIXTEEN_BITS)
PROVIDERS = (OURS, EVERY_MASK, *REFERENCES)
STAGE_OF = {
    "decode": "load",
    "preprocess": "load",
    "detect": "detections",
    "masks": "masks",
    "stuff": "stuff labels",
    "merge": "merge",
}
"""Stage of `PanopticResult.times` -> stage of the table; "network" is divided into three stages by hooks, except in
a CUDA graph."""


class Pipeline(Protocol):
    """Pipeline from an image file to a panoptic PNG."""

    categories: Categories

    def __call__(self, path: Path, png: Path) -> tuple[np.ndarray, list[dict[str, Any]], int, dict[str, float]]: ...


class OurPipeline:
    """`Predictor` and the writer of PNGs, with the interface of `ReferencePipeline`."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.categories = self.predictor.categories
        self._times: dict[str, float] = {}
        (network,) = self.predictor.pipeline.networks
        for module, stage in (
            (network.subnets, "sub-networks"),
            (network.box_head, "dense heads"),
            (network.stuff_head, "dense heads"),
        ):
            module.register_forward_pre_hook(lambda *_, stage=stage: self._count(stage, -1))
            module.register_forward_hook(lambda *_, stage=stage: self._count(stage, 1))

    def _count(self, stage: str, sign: int) -> None:
        self._times[stage] += sign * time.perf_counter()

    def __call__(self, path: Path, png: Path) -> tuple[np.ndarray, list[dict[str, Any]], int, dict[str, float]]:
        self._times = dict.fromkeys(STAGES, 0.0)
        result, times = self.predictor(path), self._times
        for stage, seconds in result.times.items():
            if stage in STAGE_OF:
                times[STAGE_OF[stage]] += seconds
        times["backbone + FPN"] = result.times["network"] - times["sub-networks"] - times["dense heads"]
        begin = time.perf_counter()
        write_id_map(png, result.id_map)
        times["write"] = time.perf_counter() - begin
        return result.id_map, result.segments, len(result.scores), times


def make_pipelines(options: argparse.Namespace, image: Path, short_edge: int) -> dict[str, Pipeline]:
    """Return the selected pipelines for one size of images, all with the same weights."""
    overrides = {"test_short_edges": [short_edge], "test_long_edge": round(short_edge * 1333 / 800), "test_flip": False}
    model = load_model(options, image, overrides)
    device = torch.device(options.device)
    pipelines: dict[str, Pipeline] = {}
    for name in options.providers:
        if name in (OURS, EVERY_MASK):
            dtype = getattr(torch, options.dtype)
            pipelines[name] = OurPipeline(
                Predictor(model, device, dtype, options.cuda_graph, detection_masks=name == EVERY_MASK)
            )
        else:
            copy = build_model(options.config, **overrides)
            copy.load_state_dict(model.state_dict())
            dtype = getattr(torch, options.dtype) if name == SIXTEEN_BITS else torch.float32
            pipelines[name] = ReferencePipeline(copy, copy.config.test, device, name != REFERENCES[0], dtype)
    return pipelines


def run(
    pipelines: dict[str, Pipeline], paths: Sequence[Path], seconds: float, folder: Path
) -> dict[str, dict[str, Any]]:
    """Time all pipelines on all images, in rounds until each has had `seconds`, at least one whole round.

    Returns:
        By provider: "times" (seconds of each run) and "stages" (summed seconds). From the first round: "detections",
        "instances", "segments" (mean numbers) and "json" (the maps as a COCO panoptic data set).
    """
    folder.mkdir()
    measured: dict[str, dict[str, Any]] = {}
    writers = {}
    for index, (name, pipeline) in enumerate(pipelines.items()):
        pipeline(paths[0], folder / "warm-up.png")
        measured[name] = {"times": [], "stages": dict.fromkeys(STAGES, 0.0), "counts": []}
        writers[name] = PanopticWriter(folder / str(index), categories=pipeline.categories.as_coco())
    while min(sum(entry["times"]) for entry in measured.values()) < seconds:
        for path in paths:
            for name, pipeline in pipelines.items():
                entry = measured[name]
                begin = time.perf_counter()
                id_map, segments, detections, times = pipeline(path, folder / "map.png")
                entry["times"].append(time.perf_counter() - begin)
                for stage, spent in times.items():
                    entry["stages"][stage] += spent
                if len(entry["counts"]) < len(paths):
                    entry["counts"].append((detections, sum(s["isthing"] for s in segments), len(segments)))
                    writers[name].add(image_id_of(path), path.name, id_map, segments)
    for name, entry in measured.items():
        entry["detections"], entry["instances"], entry["segments"] = np.mean(entry.pop("counts"), axis=0).tolist()
        entry["json"] = writers[name].write_json()
    return measured


def image_id_of(path: Path) -> int | str:
    return int(path.stem) if path.stem.isdigit() else path.stem


def quality(truth: Path | dict[str, Any], truth_folder: Path, prediction: Path) -> float:
    return float(evaluate(truth, truth_folder, prediction, prediction.with_suffix(""))["All"]["pq"])


def make_rows(
    measured: dict[str, dict[str, Any]], short_edge: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    reference = next((measured[name]["json"] for name in REFERENCES if name in measured), None)
    base = statistics.median(measured[OURS]["times"]) if OURS in measured else None
    rows = []
    for name, entry in measured.items():
        median, total = statistics.median(entry["times"]), sum(entry["times"])
        row = {
            "model": Path(options.config).stem,
            "weights": "trained" if find_weights(options) else "untrained",
            "short_edge": short_edge,
            "provider": name,
            "dtype": "float32" if name in REFERENCES[:2] else options.dtype,
            "images_per_second": 1 / median,
            "median_ms": median * 1e3,
            "q10_ms": float(np.quantile(entry["times"], 0.1)) * 1e3,
            "q90_ms": float(np.quantile(entry["times"], 0.9)) * 1e3,
            "runs": len(entry["times"]),
            "ratio": None if base is None else median / base,
            "share": {stage: spent / total for stage, spent in entry["stages"].items()},
            "detections": entry["detections"],
            "instances": entry["instances"],
            "segments": entry["segments"],
            "agreement": None,
            "pq": None,
        }
        if reference is not None:
            row["agreement"] = quality(reference, reference.with_suffix(""), entry["json"])
        if options.annotations is not None:
            truth = read_panoptic_json(options.annotations, with_categories=True)
            shown = {annotation["image_id"] for annotation in read_panoptic_json(entry["json"])["annotations"]}
            truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in shown]
            row["pq"] = quality(truth, options.annotations.with_suffix(""), entry["json"])
        rows.append(row)
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n  {first['model']} ({first['weights']}), short edge {first['short_edge']}: {first['detections']:.0f} "
        f"detections, {first['instances']:.1f} instances, {first['segments']:.1f} segments per image"
    )
    print(
        f"    {'pipeline':<26}{'images/s':>9}{'median ms':>11}{'10 %':>9}{'90 %':>9}{'runs':>6}{'ratio':>7}"
        f"{'agreement':>11}{'PQ':>7}"
    )
    for row in rows:
        optional_cells = [
            f"{row[key]:{width}.{digits}f}" if row[key] is not None else " " * width
            for key, width, digits in (("ratio", 7, 2), ("agreement", 11, 4))
        ]
        quality_cell = " " * 7 if row["pq"] is None else f"{100 * row['pq']:7.1f}"
        print(
            f"    {row['provider']:<26}{row['images_per_second']:>9.3f}{row['median_ms']:>11.1f}{row['q10_ms']:>9.1f}"
            f"{row['q90_ms']:>9.1f}{row['runs']:>6}{''.join(optional_cells)}{quality_cell}"
        )
    print("    share of the time in %: " + ", ".join(STAGES))
    for row in rows:
        shares = "  ".join(f"{100 * row['share'][stage]:5.1f}" for stage in STAGES)
        print(f"    {row['provider']:<26}  {shares}")
    sys.stdout.flush()


def save(rows: list[dict[str, Any]], setting: dict[str, Any], folder: Path) -> None:
    """Add rows to the device's file; rows of the same model, size and pipeline are replaced."""
    path = results_path(folder, setting["device"], "end_to_end")
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []

    def key_of(row: dict[str, Any]) -> tuple:
        return row["model"], -row["short_edge"], PROVIDERS.index(row["provider"])

    merged = {key_of(row): row for row in kept + [{**row, "setting": setting} for row in rows]}
    rows = [merged[key] for key in sorted(merged)]
    write_text(path, json.dumps({"op": "end_to_end", "title": TITLE, "rows": rows}, indent=1) + "\n")
    if optional("matplotlib") is not None:
        plot(rows, path.with_suffix(".png"))
    print(f"\n  written: {path}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot images per second over the short edge and, where it is known, panoptic quality over images per second."""
    from matplotlib import pyplot

    scored = [row for row in rows if row["pq"] is not None]
    panels = 2 if scored else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4.5), layout="constrained", squeeze=False)
    speed_axis, quality_axis = axes[0, 0], axes[0, -1]
    styles = dict(zip(PROVIDERS, ("o-", "v-.", "s--", "^:", "d:")))
    for model, provider in dict.fromkeys((row["model"], row["provider"]) for row in rows):
        series = [row for row in rows if (row["model"], row["provider"]) == (model, provider)]
        color = f"C{list(dict.fromkeys(row['model'] for row in rows)).index(model)}"
        label, style = f"{model}: {provider}", styles[provider]
        x, y = [row["short_edge"] for row in series], [row["images_per_second"] for row in series]
        speed_axis.plot(x, y, style, color=color, label=label)
        scored_series = [row for row in series if row["pq"] is not None]
        if scored_series:
            x = [row["images_per_second"] for row in scored_series]
            y = [100 * row["pq"] for row in scored_series]
            quality_axis.plot(x, y, style, color=color, label=label)
            for row, *point in zip(scored_series, x, y):
                quality_axis.annotate(f" {row['short_edge']}", point, fontsize=8)
    speed_axis.set(xlabel="short edge of the network's input in pixels", ylabel="images per second", ylim=(0, None))
    if scored:
        quality_axis.set(xlabel="images per second (numbers: short edge)", ylabel="PQ in %", xlim=(0, None))
    for axis in axes[0]:
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    setting = rows[-1]["setting"]
    caption = f"{setting['device']}, {setting['threads']} threads, torch {setting['versions']['torch']}"
    figure.suptitle(f"{TITLE}\n{caption}", fontsize=9)
    write_figure(figure, path)


TITLE = "image file to panoptic PNG, one image at a time"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--config", default="spatialflow_r50_coco", metavar="NAME", help="model (default: %(default)s)")
    parser.add_argument("--count", type=int, metavar="N", help="only the first pictures (default: all)")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="their panoptic ground truth, PNGs beside it")
    parser.add_argument(
        "--short-edges",
        type=int,
        nargs="+",
        default=[800, 600, 400],
        metavar="PIXELS",
        help="sizes of the network's input (default: 800 600 400)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help=f"pipelines: {'; '.join(PROVIDERS)} (default: all; the last one needs a 16-bit --dtype)",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time per pipeline and size (default: 5)")
    add_pipeline_options(parser, "end_to_end.json and .png")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "threads", "seconds")
    if options.providers is None:
        options.providers = [name for name in PROVIDERS if name != SIXTEEN_BITS or options.dtype != "float32"]
    if SIXTEEN_BITS in options.providers and options.dtype == "float32":
        parser.error(f"--providers {SIXTEEN_BITS}: needs --dtype bfloat16 or float16")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    setting = environment(options)
    operators = "torchvision's" if torchvision else "the references' (no torchvision here)"
    print(
        f"end_to_end: {TITLE}\n  {setting['device']}, {setting['threads']} threads, torch {torch.__version__}, "
        f"CPU level {setting['cpu_level']}; the reference's NMS and RoIAlign are {operators}"
    )
    with tempfile.TemporaryDirectory(prefix="spatialflow-benchmark-") as name:
        folder, rows = Path(name), []
        paths = find_images(options, folder, 2, (480, 640))
        for short_edge in options.short_edges:
            pipelines = make_pipelines(options, paths[0], short_edge)
            measured = run(pipelines, paths, options.seconds, folder / str(short_edge))
            rows += make_rows(measured, short_edge, options)
            print_rows(rows[-len(measured) :])
            save(rows, setting, options.output)  # after every size, so that a run that is ended early has results


if __name__ == "__main__":
    main()
