# SPDX-License-Identifier: Apache-2.0
"""Check that training, killed and resumed, ends with the weights of an uninterrupted run, bit by bit.

Usage: `python tests/kill_and_resume.py --repeats 10`
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.command_line import train_arguments
from safetensors.torch import load_file

from spatialflow.data.synthetic import synthesize

SETTINGS = (
    "num_things=6",
    "num_stuff=6",
    "categories=synthetic",
    "backbone_base_channels=4",
    "fpn_channels=8",
    "head_channels=8",
    "thing_head_channels=8",
    "stuff_head_channels=8",
    "norm_groups=4",
    "backbone_norm_trains=true",
    "backbone_frozen_stages=-1",
    "train_short_edges=[64]",
    "train_long_edge=96",
    "images_per_step=2",
    "warmup_iterations=3",
    "candidates_per_level=50",
    "gradient_clip_norm=5.0",
)


def command(data: Path, folder: Path, *settings: str, workers: int = 0) -> list[str]:
    """Return the command `spatialflow train` on synthetic scenes, with the narrow network of SETTINGS."""
    return [
        sys.executable,
        "-m",
        "spatialflow.cli",
        *train_arguments(data, folder, *SETTINGS, *settings, workers=workers),
    ]


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def digest(folder: Path) -> str:
    """Return a hash of the names and values of the final weights."""
    state = load_file(folder / "model.safetensors")
    return hashlib.sha256(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def kill_and_resume(
    data: Path, expected: str, folder: Path, settings: tuple[str, ...], rng: random.Random, kills: int = 2
) -> bool:
    """Kill a run `kills` times, then resume it; return whether it ends with the expected weights.

    Each kill waits for one to three checkpoints. Then about half of the kills wait for the temporary file of another
    checkpoint, the others for up to 0.2 s.
    """
    for _ in range(kills):
        process = subprocess.Popen(
            command(data, folder, *settings), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        in_write = rng.random() < 0.5
        deadline = time.monotonic() + 120
        start = (folder / "checkpoint.pt").stat().st_mtime_ns if (folder / "checkpoint.pt").is_file() else 0
        writes = rng.randint(1, 3)
        while process.poll() is None and time.monotonic() < deadline:
            current = (folder / "checkpoint.pt").stat().st_mtime_ns if (folder / "checkpoint.pt").is_file() else 0
            if current != start:
                start, writes = current, writes - 1
            if writes <= 0 and (not in_write or any(folder.glob(".checkpoint.pt.*.tmp"))):
                if not in_write:
                    time.sleep(rng.uniform(0, 0.2))
                break
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
    subprocess.run(command(data, folder, *settings), env=environment(), check=True, stdout=subprocess.DEVNULL)
    return digest(folder) == expected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, equal = Path(folder), 0
        settings = ("epochs=6", "checkpoint_every_steps=1")
        list(synthesize(root / "data", 6, (64, 96)))
        subprocess.run(
            command(root / "data", root / "whole", *settings), env=environment(), check=True, stdout=subprocess.DEVNULL
        )
        expected, rng = digest(root / "whole"), random.Random(options.seed)
        for repeat in range(options.repeats):
            equal += kill_and_resume(root / "data", expected, root / f"run{repeat}", settings, rng)
            print(f"{equal} of {repeat + 1} equal", flush=True)
    return 0 if equal == options.repeats else 1


if __name__ == "__main__":
    sys.exit(main())
