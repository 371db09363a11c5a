# SPDX-License-Identifier: Apache-2.0
"""Images per second from image files to the files of `spatialflow predict`, by stage and as a whole.

There are three stages:

- decoding, with the threads of `Predictor.stream`
- the network, from arrays to maps on the host
- writing of PNG, overlay and journal, with the threads of `spatialflow predict`

The row "one after the other" takes each image through all stages before the next image. The row "overlapped" is
`spatialflow predict`: at best as fast as the slowest stage, and on a CPU the stages share the cores. The rows take
turns, and medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from spatialflow.threads import leave_cores_to_others, map_ahead

leave_cores_to_others()

import torch
from harness import environment, require_positive, results_path, write_text
from pipeline_options import add_pipeline_options, find_images, load_model

from spatialflow import Predictor
from spatialflow.cli.input_images import InputImage
from spatialflow.cli.prediction_folder import PredictionFolder, writers
from spatialflow.engine.predict import DECODERS, Outcome
from spatialflow.images import read_image

STAGES = ("decode", "network", "write")
ROWS = (*STAGES, "one after the other", "overlapped")
TITLE = "image files to the files of `spatialflow predict`"


class Runs:
    """Timed rows on one set of images; each run processes all of them."""

    def __init__(self, predictor: Predictor, paths: Sequence[Path], folder: Path) -> None:
        self.predictor, self.folder, self.count = predictor, folder, 0
        self.images = [InputImage(path, path.name) for path in paths]
        self.pixels = [read_image(path) for path in paths]
        self.results = list(predictor.stream(self.pixels))  # warms up, too

    def output(self) -> PredictionFolder:
        """Return a new prediction folder with overlays."""
        self.count += 1
        categories = self.predictor.categories.as_coco()
        return PredictionFolder(
            self.folder / str(self.count), self.images, categories, {}, overlays=True, detections=False, resume=False
        )

    def decode(self) -> None:
        threads = DECODERS[self.predictor.device.type]
        for future in map_ahead(read_image, [image.path for image in self.images], threads, 2 * threads):
            future.result()

    def network(self) -> None:
        for _ in self.predictor.stream(self.pixels):
            pass

    def write(self) -> None:
        self._write(Outcome(result, pixels, None) for result, pixels in zip(self.results, self.pixels))

    def one_after_the_other(self) -> None:
        with self.output() as output:
            for image in self.images:
                pixels = read_image(image.path)
                output.add(image, self.predictor(pixels), pixels)

    def overlapped(self) -> None:
        with closing(self.predictor.outcomes([image.path for image in self.images])) as outcomes:
            self._write(outcomes)

    def _write(self, outcomes: Iterable[Outcome]) -> None:
        threads = writers(self.predictor.device.type)
        with self.output() as output, closing(output.add_all(self.images, outcomes, threads)) as files:
            for written in files:
                written.result()


def measure(runs: Runs, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each run by row: at least three rounds, and as many as fit into `seconds`."""
    functions: dict[str, Callable[[], None]] = {row: getattr(runs, row.replace(" ", "_")) for row in ROWS}
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    while len(times[ROWS[0]]) < 3 or sum(map(sum, times.values())) < seconds:
        for row, function in functions.items():
            begin = time.perf_counter()
            function()
            times[row].append(time.perf_counter() - begin)
    return times


def make_rows(times: dict[str, list[float]], count: int) -> list[dict[str, Any]]:
    medians = {row: statistics.median(values) for row, values in times.items()}
    slowest = max(medians[stage] for stage in STAGES)
    return [
        {
            "row": row,
            "images_per_second": count / median,
            "seconds": median,
            "least": min(times[row]),
            "most": max(times[row]),
            "rounds": len(times[row]),
            "of_slowest_stage": slowest / median,
        }
        for row, median in medians.items()
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"    {'':<22}{'images/s':>9}{'seconds':>9}{'least':>8}{'most':>8}{'relative to slowest stage':>27}")
    for row in rows:
        print(
            f"    {row['row']:<22}{row['images_per_second']:>9.2f}{row['seconds']:>9.2f}{row['least']:>8.2f}"
            f"{row['most']:>8.2f}{100 * row['of_slowest_stage']:>25.0f} %"
        )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Images per second, {TITLE}: each stage alone, and overlapped.")
    parser.add_argument("--config", default="demo", metavar="NAME", help="model (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of the scenes (default: 480 640)"
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="number of images (default: 100)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per batch (default: 1)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of all rounds; there are at least three")
    add_pipeline_options(parser, "throughput.json")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "count", "batch_size", "threads", "seconds")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    setting = environment(options)
    print(
        f"throughput: {TITLE}\n  {setting['device']}, {setting['threads']} threads, torch {torch.__version__}, "
        f"{options.config} in {options.dtype}, batches of {options.batch_size}, {options.count} images"
    )
    with tempfile.TemporaryDirectory(prefix="spatialflow-benchmark-") as name:
        folder = Path(name)
        paths = find_images(options, folder, options.count, tuple(options.size))
        predictor = Predictor(
            load_model(options, paths[0], {}),
            options.device,
            getattr(torch, options.dtype),
            options.cuda_graph,
            batch_size=options.batch_size,
            detection_masks=False,
        )
        rows = make_rows(measure(Runs(predictor, paths, folder), options.seconds), len(paths))
    print_rows(rows)
    chosen = {name: getattr(options, name) for name in ("config", "dtype", "batch_size")}
    chosen["cuda_graph"] = predictor.pipeline.graphs is not None
    path = results_path(options.output, setting["device"], "throughput")
    content = {"op": "throughput", "title": TITLE, **setting, **chosen, "images": len(paths), "rows": rows}
    write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"\n  written: {path}")


if __name__ == "__main__":
    main()
