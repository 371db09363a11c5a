# SPDX-License-Identifier: Apache-2.0
"""Pack everything that `make gpu-check` needs on a machine without a network: `make gpu-pack FILE=gpu.tgz`.

    python tools/gpu_pack.py gpu.tgz
    tar xf gpu.tgz && cd spatialflow && python3 tools/gpu_check.py --pack results.tgz     # on the machine with the GPU

The archive contains the files that git tracks except benchmarks/results, and the compiled libraries except that of the
SIMT interpreter. It also has the Hopper probes if they are built, and wheels of packages that the machine may lack. The
wheels are for Python 3.12 and for the Python that packs. The archive has at most 40 MB. Its `commit.txt` has the
commit.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deflate", "pycocotools")
"""Needed to read and write panoptic PNGs, and by some tests; a CUDA image of PyTorch rarely has them."""

PYTHONS = ("3.12", f"{sys.version_info[0]}.{sys.version_info[1]}")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PROBES = ROOT / "build" / "hopper_probes" / "hopper_probes"
LIMIT = 40 * 10**6
LEFT_OUT = ("benchmarks/results/",)
"""Tracked folders that are not packed: results of other devices."""


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.startswith(LEFT_OUT)]
    return [name for name in names if (ROOT / name).is_file()]


def commit() -> str:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from harness import commit

    return commit() or "unknown"


def download_wheels(folder: Path) -> None:
    """Download wheels of `PACKAGES` for each Python of `PYTHONS`; report the ones that are not available."""
    for python in dict.fromkeys(PYTHONS):
        for package in PACKAGES:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "--implementation",
                "cp",
                "--python-version",
                python,
                "-d",
                str(folder),
            ]
            command += [word for platform in PLATFORMS for word in ("--platform", platform)]
            done = subprocess.run([*command, package], capture_output=True, text=True)
            if done.returncode != 0:
                reason = done.stderr.strip().rsplit("\n", 1)[-1]
                print(f"gpu-pack: no wheel of {package} for Python {python}: {reason}", file=sys.stderr)


def write_archive(target: Path, wheels: Path) -> None:
    package = ROOT / "spatialflow"
    libraries = [*sorted((package / "lib").glob("*")), *sorted(package.glob("_evaluation*.so"))]
    with tarfile.open(target, "w:gz", compresslevel=6) as archive:
        for name in tracked_files():
            archive.add(ROOT / name, f"spatialflow/{name}")
        for path in libraries:
            if "simt" not in path.name:
                archive.add(path, f"spatialflow/{path.relative_to(ROOT)}")
        if PROBES.is_file():
            archive.add(PROBES, f"spatialflow/{PROBES.relative_to(ROOT)}")
        for path in sorted(wheels.glob("*.whl")):
            archive.add(path, f"spatialflow/wheels/{path.name}")
        text = commit().encode()
        entry = tarfile.TarInfo("spatialflow/commit.txt")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Packs all that gpu-check needs on a machine without a network.")
    parser.add_argument("file", type=Path, metavar="FILE.tgz")
    options = parser.parse_args(arguments)
    if not (ROOT / "spatialflow" / "lib" / "libspatialflow_cuda.so").is_file():
        print("gpu-pack: the CUDA library is not built: make build, where nvcc is", file=sys.stderr)
        return 2
    temporary = options.file.with_name(f".{options.file.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="spatialflow-wheels-") as folder:
        download_wheels(Path(folder))
        write_archive(temporary, Path(folder))
    size = temporary.stat().st_size
    if size > LIMIT:
        temporary.unlink()
        print(f"gpu-pack: the archive would be {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}", file=sys.stderr)
        return 1
    os.replace(temporary, options.file)
    print(f"{options.file}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
