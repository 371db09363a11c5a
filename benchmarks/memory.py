# SPDX-License-Identifier: Apache-2.0
"""Peak memory of prediction for few and for many images, and for short and for long videos.

Each row is a process of its own: `spatialflow predict` on a folder or on a video, or `Predictor.stream` in Python. The
images are hard links of 20 synthetic scenes. The peak is the largest resident set that the system reports for the
process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from harness import environment, require_positive, results_path, write_text

from spatialflow.data.synthetic import synthesize

TITLE = "peak memory of prediction"
SCENES = 20
STREAM = """
import sys
from pathlib import Path
import spatialflow
predictor = spatialflow.Predictor(spatialflow.load_model("demo"))
for result in predictor.stream(sorted(Path(sys.argv[1]).iterdir())):
    result.save(sys.argv[2])
"""


def link_images(scenes: Sequence[Path], folder: Path, count: int) -> Path:
    """Fill `folder` with `count` hard links of the scenes, under different names."""
    folder.mkdir()
    for index, scene in zip(range(count), itertools.cycle(scenes)):
        os.link(scene, folder / f"{index:06d}{scene.suffix}")
    return folder


def write_video(scenes: Sequence[Path], path: Path, frames: int) -> Path:
    """Write a video that repeats the scenes."""
    images = [cv2.imread(str(scene)) for scene in scenes]
    height, width = images[0].shape[:2]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (width, height))
    for _, image in zip(range(frames), itertools.cycle(images)):
        video.write(image)
    video.release()
    return path


def peak_memory(arguments: Sequence[str], threads: int) -> int:
    """Run Python with `arguments`; return the peak of its resident memory in bytes.

    Raises:
        SystemExit: the process failed.
    """
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    output = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    command = [sys.executable, *arguments]
    process = os.posix_spawn(sys.executable, command, os.environ | variables, file_actions=output)
    _, status, usage = os.wait4(process, 0)
    if status != 0:
        sys.exit(f"memory: `{' '.join(command)}` failed with exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each program and length: `program`, `unit`, `count`, `peak_bytes`."""
    list(synthesize(folder / "scenes", SCENES, tuple(options.size), seed=0))
    scenes = sorted((folder / "scenes" / "images").iterdir())
    rows = []

    def add(program: str, unit: str, count: int, arguments: list[str]) -> None:
        peak = peak_memory(arguments, options.threads)
        rows.append({"program": program, "unit": unit, "count": count, "peak_bytes": peak})
        print(f"    {program:<20}{count:>7} {unit:<8}{peak / 2**20:>8.0f} MiB", flush=True)

    predict = ["-m", "spatialflow", "predict", "--model", "demo", "--threads", str(options.threads)]
    for count in options.images:
        images = link_images(scenes, folder / f"images-{count}", count)
        output = folder / f"output-{count}"
        add("spatialflow predict", "images", count, [*predict, str(images), "--output", str(output)])
        add("Predictor.stream", "images", count, ["-c", STREAM, str(images), str(folder / f"saved-{count}")])
    for count in options.frames:
        video = write_video(scenes, folder / f"frames-{count}.mp4", count)
        output = folder / f"video-{count}"
        add("spatialflow predict", "frames", count, [*predict, str(video), "--output", str(output)])
    return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{TITLE.capitalize()} on the CPU, in separate processes.")
    parser.add_argument(
        "--images", type=int, nargs="+", default=(100, 2000), metavar="N", help="images (default: 100 2000)"
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", default=(50, 500), metavar="N", help="frames of a video (default: 50 500)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of the scenes (default: 480 640)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="FOLDER",
        help="folder of <device>/memory.json (default: benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    options.device = "cpu"
    for name in ("images", "frames", "size"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {min(getattr(options, name))}")
    require_positive(parser, options, "threads")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    options = parse_arguments(arguments)
    setting = environment(options) | {"threads": options.threads}
    size = "x".join(map(str, options.size))
    print(f"memory: {TITLE}, {size}\n  {setting['device']}, {options.threads} threads, model demo")
    with tempfile.TemporaryDirectory(prefix="spatialflow-benchmark-") as name:
        rows = measure(options, Path(name))
    path = results_path(options.output, setting["device"], "memory")
    content = {"op": "memory", "title": TITLE, **setting, "size": list(options.size), "rows": rows}
    write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"\n  written: {path}")


if __name__ == "__main__":
    main()
