# SPDX-License-Identifier: Apache-2.0
"""Panoptic segmentation independent of the network: merge, quality, files, pictures.

Names are resolved on first use, so that scoring a folder of results imports neither torch nor OpenCV.
"""

import importlib
import warnings
from typing import Any

from spatialflow.requirements import require_packages

require_packages()

_MODULE_BY_NAME = {
    "InUseError": "journal",
    "MergeResult": "merging",
    "PanopticFormatError": "rules",
    "PanopticQuality": "quality",
    "PanopticWriter": "writer",
    "ResumeError": "journal",
    "color_ids": "colors",
    "color_of": "colors",
    "decode_ids": "formats",
    "encode_ids": "formats",
    "evaluate": "quality",
    "evaluate_and_report": "report",
    "merge": "merging",
    "overlay": "drawing",
    "read_id_map": "formats",
    "read_panoptic_json": "formats",
    "validate": "validation",
    "write_id_map": "formats",
}

_DEPRECATED = {"colour_of": "color_of"}

__all__ = sorted(_MODULE_BY_NAME)


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        new_name = _DEPRECATED[name]
        warnings.warn(f"{__name__}.{name} is deprecated, use {new_name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(__name__), new_name)
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_BY_NAME))
