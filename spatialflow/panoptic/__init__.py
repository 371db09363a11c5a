# SPDX-License-Identifier: Apache-2.0
"""Panoptic segmentation apart from any network: merge, quality, files, pictures.

Names are resolved on first use, so that scoring a folder of results imports neither torch nor OpenCV.
"""

import importlib

_HOMES = {
    "InUseError": "journal",
    "MergeResult": "merging",
    "PanopticFormatError": "rules",
    "PanopticQuality": "quality",
    "PanopticWriter": "writer",
    "ResumeError": "journal",
    "colour_of": "drawing",
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

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
