# SPDX-License-Identifier: Apache-2.0
"""Host time of a call: every operator on a few elements, where the kernel takes almost no time.

There are three autograd modes: "default" (gradients enabled, no input requires one), "no_grad" and "inference_mode".
Providers take turns in one process. The reported time of a call is the least of many rounds; the file has the median
too. `ratio` is the time of spatialflow over that of torchvision; both must return the same results. Rows named "arrays"
are calls with arrays of NumPy, or of CuPy on CUDA (docs/arrays.md). On CUDA a call ends when its work is queued, unless
it reads values back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import OURS, environment, map_tensors, optional, require_positive, results_path, write_text

from spatialflow import ops

PEER, ARRAYS = "torchvision", f"{OURS}, arrays"
MODES = {
    "default": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
CALLS = 20
"""Consecutive calls that are timed together, so that reading the clock takes a small share."""

torchvision, cupy = optional("torchvision.ops"), optional("cupy")


def cases(device: str = "cpu") -> dict[str, dict[str, Callable[[], Any]]]:
    """Return, by name of a call, its providers as functions without arguments."""
    to_array = torch.Tensor.numpy if device == "cpu" else cupy and cupy.from_dlpack
    with torch.device(device):
        ours, baselines = spatialflow_calls(), torchvision_calls() if torchvision else {}
    providers = {}
    for name, (function, inputs, options) in ours.items():
        providers[name] = {OURS: partial(function, *inputs, **options)}
        if to_array:
            arrays, values = map_tensors(to_array, (inputs, tuple(options.values())))
            providers[name][ARRAYS] = partial(function, *arrays, **dict(zip(options, values)))
        if name in baselines:
            providers[name][PEER] = baselines[name]
    return providers


def few_elements() -> tuple[torch.Tensor, ...]:
    """Return the inputs of both libraries: a map, a RoI, weight, bias, offset and mask, boxes, scores and classes."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0], [5.0, 5.0, 6.0, 6.0]])
    return (
        torch.ones(1, 1, 2, 2),
        torch.tensor([[0, 0.0, 0.0, 1.0, 1.0]]),
        torch.ones(1, 1, 3, 3),
        torch.ones(1),
        torch.zeros(1, 18, 2, 2),
        torch.ones(1, 9, 2, 2),
        boxes,
        torch.tensor([0.4, 0.1, 0.3, 0.2]),
        torch.tensor([0, 0, 1, 1]),
    )


def spatialflow_calls() -> dict[str, tuple[Callable[..., Any], tuple, dict[str, Any]]]:
    """Return, by name, the function, arguments and options of each call of spatialflow."""
    feature, roi, weight, bias, offset, mask, boxes, scores, classes = few_elements()
    logits, labels, conv = torch.zeros(2, 2), torch.tensor([0, 1]), ops.pack_conv3x3(weight, bias)
    subnets = ops.SubnetParameters(cls=((weight, bias),), reg=((weight, bias),), segmentation_levels=1)
    instance, stuff = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int64)
    id_map, photograph = torch.ones(2, 2, dtype=torch.int32), torch.zeros(2, 2, 3, dtype=torch.uint8)
    return {
        "roi_align": (ops.roi_align, (feature, roi, 1, 1.0, 1), {}),
        "deform_conv2d": (ops.deform_conv2d, (feature, offset, weight, bias), {"padding": 1, "mask": mask}),
        "deform_conv2d, packed": (
            ops.deform_conv2d,
            (feature, offset, ops.pack_deform_conv2d(weight, bias)),
            {"padding": 1, "mask": mask},
        ),
        "nms": (ops.nms, (boxes, scores, 0.5), {}),
        "batched_nms": (ops.batched_nms, (boxes, scores, classes, 0.5), {}),
        "sigmoid_focal_loss": (ops.sigmoid_focal_loss, (logits, labels), {}),
        "sigmoid_focal_loss, sum": (ops.sigmoid_focal_loss, (logits, labels), {"reduction": "sum"}),
        "multilevel_roi_align": (ops.multilevel_roi_align, ([feature, feature], roi, 1, (1, 2)), {}),
        "multiclass_nms": (ops.multiclass_nms, (boxes, scores[:, None], 0.05, 0.5, 4), {}),
        "select_candidates": (
            ops.select_candidates,
            (
                [feature],
                [feature.expand(1, 4, 2, 2)],
                boxes[:1, None].reshape(1, 1, 4),
                (8,),
                classes[2:].reshape(1, 2),
                scores[:2].reshape(1, 2),
                2,
            ),
            {},
        ),
        "group_norm_relu": (ops.group_norm_relu, (feature, 1, bias, bias), {}),
        "flow_conv2d": (ops.flow_conv2d, (feature, feature, weight, bias), {}),
        "flow_conv2d, packed": (ops.flow_conv2d, (feature, feature, conv), {}),
        "fused_subnets, packed": (ops.fused_subnets, ([feature], ops.pack_subnets(subnets)), {}),
        "paste_masks": (ops.paste_masks, (torch.zeros(1, 2, 2), boxes[:1], (2, 2)), {}),
        "stuff_labels": (ops.stuff_labels, (feature[0], (4, 4), (2, 2)), {}),
        "panoptic_merge": (ops.panoptic_merge, (instance, scores[:1], classes[:1], boxes[:1], stuff, 1), {}),
        "panoptic_quality_counts": (ops.panoptic_quality_counts, (id_map, id_map, 1, 1), {}),
        "preprocess_images": (ops.preprocess_images, (photograph, (2, 2), (0, 0, 0), (1, 1, 1), 1), {}),
    }


def torchvision_calls() -> dict[str, Callable[[], Any]]:
    """Return, by name, each call of torchvision as a function without arguments."""
    feature, roi, weight, bias, offset, mask, boxes, scores, classes = few_elements()
    logits, one_hot = torch.zeros(2, 2), torch.eye(2)
    return {
        "roi_align": partial(torchvision.roi_align, feature, roi, 1, 1.0, 1),
        "deform_conv2d": partial(torchvision.deform_conv2d, feature, offset, weight, bias, padding=1, mask=mask),
        "nms": partial(torchvision.nms, boxes, scores, 0.5),
        "batched_nms": partial(torchvision.batched_nms, boxes, scores, classes, 0.5),
        "sigmoid_focal_loss": partial(torchvision.sigmoid_focal_loss, logits, one_hot),
        "sigmoid_focal_loss, sum": partial(torchvision.sigmoid_focal_loss, logits, one_hot, reduction="sum"),
    }


def measure(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return the microseconds of each call by round; the calls take turns for about `seconds` each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(CALLS):  # warm-up
            call()
    until = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < until or len(times[OURS]) < 3:
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter_ns() - begin) / CALLS / 1e3)
            if torch.cuda.is_initialized():  # empties the queue of launches, so that no call waits for space
                torch.cuda.synchronize()
    return times


def rows_of(name: str, mode: str, times: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row per provider; `ratio` is the time of spatialflow over the baseline's."""
    ours = min(times[OURS])
    return [
        {
            "op": name,
            "grad_mode": mode,
            "provider": provider,
            "least_us": round(min(microseconds), 3),
            "median_us": round(statistics.median(microseconds), 3),
            "rounds": len(microseconds),
            "ratio": round(ours / min(microseconds), 3) if provider == PEER else None,
        }
        for provider, microseconds in times.items()
    ]


def line_of(rows: list[dict[str, Any]]) -> str:
    cells = {row["provider"]: f"{row['least_us']:8.1f} us" for row in rows}
    (ratio,) = [f"{row['ratio']:7.2f}" for row in rows if row["ratio"] is not None] or [""]
    call = f"{rows[0]['op']:25}{rows[0]['grad_mode']:16}"
    return f"{call}{cells[OURS]}{cells.get(PEER, ''):>11}{ratio:>7}{cells.get(ARRAYS, ''):>11}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    parser = argparse.ArgumentParser(description="Host time of a call of every operator, on a few elements.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per provider, call and mode (default: 0.5)")
    parser.add_argument("--ops", nargs="+", metavar="TEXT", help="only calls whose name contains one of these")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of <device>/host_overhead.json (default: printed alone)"
    )
    options = parser.parse_args(arguments)
    require_positive(parser, options, "threads", "seconds")
    torch.set_num_threads(options.threads)
    known, wanted = cases(options.device), options.ops or [""]
    chosen = {name: calls for name, calls in known.items() if any(text in name for text in wanted)}
    if not chosen:
        parser.error(f"--ops: no call contains {' or '.join(wanted)}; calls: {'; '.join(known)}")
    setting = environment(options)
    print(f"{setting['device']}, {setting['threads']} threads, torch {torch.__version__}; least time of a call")
    print(f"{'':41}{OURS:>11}{PEER:>11}{'ratio':>7}{'arrays':>11}")
    rows: list[dict[str, Any]] = []
    for name, calls in chosen.items():
        if PEER in calls:
            torch.testing.assert_close(calls[OURS](), calls[PEER]())
        for mode, context in MODES.items():
            with context():
                rows += rows_of(name, mode, measure(calls, options.seconds))
            print(line_of(rows[-len(calls) :]), flush=True)
    if options.output is not None:
        path = results_path(options.output, setting["device"], "host_overhead")
        write_text(path, json.dumps({"op": "host_overhead", **setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
