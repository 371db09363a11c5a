# SPDX-License-Identifier: Apache-2.0
"""Execution of a case of the file fuzzer: an edited file is read in the worker, as by a user's command.

`fuzz.execute` calls `execute`. A reader may return a correct result or raise an exception of `ACCEPTED`; unexpected
exceptions reach the supervisor. A command may exit with 0, or with 1 or 2 and messages of one line each. Anything else
is a difference: a traceback, a RuntimeWarning or ResourceWarning, more than `MEMORY_LIMIT_MB` of memory, or execution
of code from the file.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from fuzz.read_annotations import (
    read_categories,
    read_cityscapes,
    read_detections,
    read_panoptic,
    read_photograph,
    read_png,
)
from fuzz.read_checkpoints import read_checkpoint, read_safetensors, read_training_checkpoint
from fuzz.read_configurations import read_configuration, read_setting
from fuzz.workspace import WrongResult, canary, input_folder, message_difference
from spatialflow.config import ConfigError
from spatialflow.data.categories import CategoryError
from spatialflow.data.cityscapes import CityscapesError
from spatialflow.data.samples import SampleError
from spatialflow.engine.checkpoints import CheckpointError
from spatialflow.images import ImageError
from spatialflow.panoptic import PanopticFormatError

MEMORY_LIMIT_MB = 1000

ACCEPTED = (ImageError, PanopticFormatError, SampleError, CityscapesError, CategoryError, CheckpointError, ConfigError)

REFUSED_WITHOUT_EDITS = {"checkpoint": (4, 5, 6, 7, 9), "setting": range(1 << 16)}
"""Indices of unedited files that a reader may refuse, by kind.

Unpickling checkpoints 4 to 6 would make a call, and checkpoints 7 and 9 have no network. All settings are included,
because some are arbitrary text.
"""


def execute(case: dict) -> dict:
    """Execute a case and return its report, in the format of `fuzz.execute`."""
    report = {"status": "right", "differences": [], "compared": 0, "excluded": 0, "skipped": []}
    base, changes = case["arguments"]["base"], case["arguments"]["edits"]
    _reset_peak_memory()
    memory_before = _peak_memory_mb()
    folder = Path(tempfile.mkdtemp(dir=input_folder()))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            report["compared"] = READERS[case["op"]](folder, base, changes)
    except WrongResult as error:
        report["differences"].append(str(error))
    except ACCEPTED as error:
        report["status"] = "refused"
        if case["valid"] and base not in REFUSED_WITHOUT_EDITS.get(case["op"], ()):
            report["differences"].append(f"a valid file is refused: {error}")
        if problem := message_difference(str(error)):
            report["differences"].append(problem)
    finally:
        shutil.rmtree(folder)
    forbidden = [w for w in warned if issubclass(w.category, RuntimeWarning | ResourceWarning)]
    report["differences"] += [f"{w.category.__name__}: {w.message} in {w.filename}:{w.lineno}" for w in forbidden]
    if canary().exists():
        canary().unlink()
        report["differences"].append("code of the file was run")
    if (growth := _peak_memory_mb() - memory_before) > MEMORY_LIMIT_MB:
        report["differences"].append(f"took {growth} megabytes")
    if report["differences"]:
        report["status"] = "wrong"
    return report


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mb() -> int:
    """Return the peak resident memory of the process since `_reset_peak_memory`, or 0 where Linux's /proc is absent."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return 0


READERS: dict[str, Callable[[Path, int, list], int]] = {
    "png_id_map": read_png,
    "photograph": read_photograph,
    "panoptic_json": read_panoptic,
    "detections_json": read_detections,
    "categories_json": read_categories,
    "cityscapes": read_cityscapes,
    "checkpoint": read_checkpoint,
    "safetensors": read_safetensors,
    "run_checkpoint": read_training_checkpoint,
    "configuration": read_configuration,
    "setting": read_setting,
}
