# SPDX-License-Identifier: Apache-2.0
"""Train for a few steps in one process under torchrun, for `make gpu-check`.

This shows that the launcher, the data and the gradients of the fused kernels work together on a GPU. A single process
uses neither NCCL nor DistributedDataParallel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A few steps of training under torchrun.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "spatialflow.cli"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with tempfile.TemporaryDirectory(prefix="spatialflow-training-") as name:
        scenes, run = Path(name, "scenes"), Path(name, "run")
        subprocess.run([*command, "synthesize", str(scenes), "--count", "8", "--size", "128", "192"], check=True)
        subprocess.run(
            [
                *launcher,
                "-m",
                "spatialflow.cli",
                "train",
                "demo",
                "epochs=2",
                "images_per_step=2",
                "--images",
                str(scenes / "images"),
                "--annotations",
                str(scenes / "panoptic.json"),
                "--device",
                options.device,
                "--output",
                str(run),
            ],
            check=True,
        )
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [step["total"] for step in steps if "total" in step]
    print(f"{len(losses)} logged steps on {options.device}, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
