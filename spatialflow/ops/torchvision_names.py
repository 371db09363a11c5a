# SPDX-License-Identifier: Apache-2.0
"""Names of `torchvision.ops` that this package does not define itself: taken from torchvision when they are used.

A program that imports from `torchvision.ops`, or from one of its modules, can import the same names from
`spatialflow.ops`. torchvision is imported on the first use of such a name, and only then has to be installed.
docs/migration.md lists all names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

NAMES = (
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "DropBlock2d",
    "DropBlock3d",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "MLP",
    "PSRoIAlign",
    "PSRoIPool",
    "Permute",
    "RoIPool",
    "SqueezeExcitation",
    "StochasticDepth",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "distance_box_iou",
    "distance_box_iou_loss",
    "drop_block2d",
    "drop_block3d",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "masks_to_boxes",
    "ps_roi_align",
    "ps_roi_pool",
    "remove_small_boxes",
    "roi_pool",
    "stochastic_depth",
)
"""Functions and classes of `torchvision.ops.__all__` that this package does not define."""

MODULES: dict[str, tuple[str, ...]] = {
    "boxes": ("batched_nms", "nms"),
    "ciou_loss": (),
    "deform_conv": ("DeformConv2d", "deform_conv2d"),
    "diou_loss": (),
    "drop_block": (),
    "feature_pyramid_network": (),
    "focal_loss": ("sigmoid_focal_loss",),
    "giou_loss": (),
    "misc": (),
    "poolers": ("MultiScaleRoIAlign", "roi_align"),
    "ps_roi_align": (),
    "ps_roi_pool": (),
    "roi_pool": (),
    "stochastic_depth": (),
}
"""Modules of `torchvision.ops`, and their names that this package defines; `roi_align` is a module of both packages."""


def is_installed() -> bool:
    """Return whether torchvision is installed, without importing it."""
    return importlib.util.find_spec("torchvision") is not None


def torchvision_object(name: str) -> Any:
    """Return an object of `torchvision.ops` by its name, such as "box_iou" or "misc.FrozenBatchNorm2d".

    Raises:
        AttributeError: the installed torchvision does not have it.
        ImportError: torchvision is not installed, or does not fit the installed torch.
    """
    if not is_installed():
        raise ImportError(
            f"spatialflow.ops.{name} is torchvision's, and torchvision is not installed: pip install torchvision"
        )
    module, _, attribute = f"torchvision.ops.{name}".rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        version = importlib.import_module("torchvision").__version__
        raise AttributeError(
            f"spatialflow.ops.{name} is torchvision's, and torchvision {version} does not have it"
        ) from None
    except Exception as problem:  # RuntimeError if it was built for another torch
        raise ImportError(
            f"spatialflow.ops.{name} is torchvision's, and torchvision cannot be imported ({problem}): pip install the "
            f"torchvision that fits torch {torch.__version__}"
        ) from problem


class _Module(ModuleType):
    """A module of `torchvision.ops` with this package's objects in place of torchvision's."""

    def __init__(self, name: str, own: Mapping[str, Any]) -> None:
        super().__init__(f"spatialflow.ops.{name}", f"The names of `torchvision.ops.{name}`.")
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools look such names up in every loaded module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = torchvision_object(f"{self.__name__.removeprefix('spatialflow.ops.')}.{name}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        module = self.__name__.replace("spatialflow", "torchvision", 1)
        return sorted({*super().__dir__(), *(dir(importlib.import_module(module)) if is_installed() else ())})


def add_modules(own: Mapping[str, Any]) -> None:
    """Make the modules importable as modules of `spatialflow.ops`, whose objects are `own`.

    They are not attributes of the package, because functions have the names of some of them.
    """
    for name, replaced in MODULES.items():
        sys.modules[f"spatialflow.ops.{name}"] = _Module(name, {key: own[key] for key in replaced})
