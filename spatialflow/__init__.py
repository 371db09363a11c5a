# SPDX-License-Identifier: Apache-2.0
"""SpatialFlow: exact, fast vision operators and panoptic segmentation built on them.

Names are resolved on first use, so that `import spatialflow` is fast and scoring a folder of results does not import
torch. The raw operators, `torch.ops.spatialflow.*`, therefore need `import spatialflow.ops`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from spatialflow import _library

__version__ = "0.2.0"
# A build with sanitizers or coverage has the compiled module `_evaluation` in `BUILD`, not in the package's folder.
__path__ = [*dict.fromkeys((str(_library.BUILD), *__path__))]

if TYPE_CHECKING:  # the names that `__getattr__` resolves, for type checkers and editors
    from spatialflow import data as data
    from spatialflow import engine as engine
    from spatialflow import models as models
    from spatialflow import ops as ops
    from spatialflow import panoptic as panoptic
    from spatialflow.config import ConfigError, list_configs, load_config
    from spatialflow.engine.checkpoints import CheckpointError, load_backbone, load_checkpoint, save_checkpoint
    from spatialflow.engine.model_files import load_model, pretrained_model
    from spatialflow.engine.predict import Predictor
    from spatialflow.engine.result import PanopticResult
    from spatialflow.engine.train import train
    from spatialflow.images import ImageError
    from spatialflow.models.build import build_model
    from spatialflow.models.optimized.inference import optimize_for_inference

_MODULE_BY_NAME = {
    "CheckpointError": "spatialflow.engine.checkpoints",
    "ConfigError": "spatialflow.config",
    "ImageError": "spatialflow.images",
    "PanopticResult": "spatialflow.engine.result",
    "Predictor": "spatialflow.engine.predict",
    "build_model": "spatialflow.models.build",
    "list_configs": "spatialflow.config",
    "load_backbone": "spatialflow.engine.checkpoints",
    "load_checkpoint": "spatialflow.engine.checkpoints",
    "load_config": "spatialflow.config",
    "load_model": "spatialflow.engine.model_files",
    "optimize_for_inference": "spatialflow.models.optimized.inference",
    "pretrained_model": "spatialflow.engine.model_files",
    "save_checkpoint": "spatialflow.engine.checkpoints",
    "train": "spatialflow.engine.train",
}
_SUBPACKAGES = ("data", "engine", "models", "ops", "panoptic")

__all__ = [  # written out, because type checkers do not evaluate `sorted(_MODULE_BY_NAME)`
    "CheckpointError",
    "ConfigError",
    "ImageError",
    "PanopticResult",
    "Predictor",
    "build_model",
    "list_configs",
    "load_backbone",
    "load_checkpoint",
    "load_config",
    "load_model",
    "optimize_for_inference",
    "pretrained_model",
    "save_checkpoint",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_BY_NAME) | set(_SUBPACKAGES))
