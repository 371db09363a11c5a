# SPDX-License-Identifier: Apache-2.0
"""The pipeline from array to panoptic map on a GPU: images per second, and kernels and their time by stage.

The model is untrained, and its logits are adjusted so that later stages have as much work as in a trained model
(`untrained.untrained_model`). Two forms are timed: every kernel queued by the host ("eager"), and one CUDA graph from
the network's input to the mask logits ("graph"). The table by stage has the number of kernels and the sum of their
durations. It is from torch's profiler, for one image in the eager form. `--device cpu --config tiny` is a dry run,
which counts operators instead of kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from harness import environment, require_positive, results_path, write_text
from kernel_count import name_stages
from torch.profiler import ProfilerActivity, profile, record_function
from untrained import untrained_model

from spatialflow import Predictor
from spatialflow.data.synthetic import synthesize
from spatialflow.images import read_image

PREFIX = "stage: "


def profile_stages(predictor: Predictor, image: Any, on_gpu: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the number of kernels of one image and the sum of their milliseconds, by innermost stage and by kernel."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        predictor(image)
        if on_gpu:
            torch.cuda.synchronize()
    stages: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])

    def visit(event: Any, stage: str) -> None:
        stage = event.name.removeprefix(PREFIX) if event.name.startswith(PREFIX) else stage
        work = [(kernel.name, kernel.duration) for kernel in event.kernels]
        if not on_gpu and not event.cpu_children:
            work = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in work:
            for entry in (stages[stage], kernels[stage, name]):
                entry[0] += 1
                entry[1] += microseconds / 1e3
        for child in event.cpu_children:
            visit(child, stage)

    for event in profiler.events():
        if event.cpu_parent is None and getattr(event, "device_type", None) == torch.autograd.DeviceType.CPU:
            visit(event, "other")
    by_stage = [{"stage": name, "kernels": count, "ms": ms} for name, (count, ms) in stages.items()]
    by_kernel = [
        {"stage": stage, "kernel": name[:160], "count": count, "ms": ms}
        for (stage, name), (count, ms) in kernels.items()
    ]
    return by_stage, sorted(by_kernel, key=lambda row: -row["ms"])


def time_images(predictor: Predictor, image: Any, seconds: float) -> dict[str, Any]:
    """Measure the median latency from an array to its panoptic map on the host."""
    for _ in range(5):
        predictor(image)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        predictor(image)
        times.append(time.perf_counter() - begin)
    median = statistics.median(times)
    return {"images_per_second": 1 / median, "median_ms": median * 1e3, "runs": len(times)}


def graph_milliseconds(predictor: Predictor) -> float:
    """Return the median time on the GPU of a replay of the graph that was captured for the previous image."""
    captured = next(reversed(predictor.pipeline.graphs._captured.values()))
    times = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        captured.graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    parser = argparse.ArgumentParser(description="The pipeline on a GPU: images per second, and kernels by stage.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--config", default="spatialflow_r50_coco", metavar="NAME", help="model (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="size of the image")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for eager and for graph each (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="receives <device>/stages.json")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "seconds")
    torch.set_num_threads(8)
    on_gpu, rows = options.device.startswith("cuda"), []
    with tempfile.TemporaryDirectory(prefix="spatialflow-stages-") as folder:
        list(synthesize(Path(folder), 1, tuple(options.size), seed=0))
        path = next((Path(folder) / "images").iterdir())
        overrides = {"test_short_edges": [options.size[0]], "test_long_edge": max(options.size), "test_flip": False}
        model, image = untrained_model(options.config, path, overrides), read_image(path)
    content: dict[str, Any] = {
        "op": "stages",
        **environment(options),
        "config": options.config,
        "size": list(options.size),
        "dtype": options.dtype,
        "forms": rows,
    }

    def save() -> None:
        if options.output is not None:
            write_text(results_path(options.output, content["device"], "stages"), json.dumps(content, indent=1) + "\n")

    dtype = getattr(torch, options.dtype)
    for form, graph in (("eager", False), ("graph", True)):
        if graph and not on_gpu:
            continue
        predictor = Predictor(model, options.device, dtype, cuda_graph=graph, detection_masks=False)
        row = {"form": form, **time_images(predictor, image, options.seconds)}
        if graph:
            row["replay_ms"] = graph_milliseconds(predictor)
        rows.append(row)
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
        save()
    predictor = Predictor(model, options.device, dtype, cuda_graph=False, detection_masks=False)
    name_stages(predictor.pipeline, lambda stage: record_function(PREFIX + stage))
    for _ in range(3):
        predictor(image)
    content["stages"], content["kernels"] = profile_stages(predictor, image, on_gpu)
    save()
    print(f"  {'stage':<14}{'kernels':>9}{'ms':>9}")
    for row in content["stages"]:
        print(f"  {row['stage']:<14}{row['kernels']:>9}{row['ms']:>9.3f}")
    total = Counter()
    for row in content["stages"]:
        total.update({"kernels": row["kernels"], "ms": row["ms"]})
    print(f"  {'sum':<14}{total['kernels']:>9}{total['ms']:>9.3f}")
    for row in content["kernels"][:40]:
        print(f"  {row['ms']:8.3f} ms {row['count']:>4} x  {row['stage']:<12} {row['kernel'][:110]}")


if __name__ == "__main__":
    main()
