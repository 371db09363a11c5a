# SPDX-License-Identifier: Apache-2.0
"""Models with the weights of the recordings (goldens), and comparisons with recorded results."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from spatialflow.engine.checkpoints import name_from_released
from spatialflow.models.build import build_model

TOLERANCE = 1e-4
"""Default tolerance of float32 results, relative to the largest absolute value of the expected tensor."""


def golden_state(goldens: Path, variant: str) -> dict[str, torch.Tensor]:
    """Compute the weights of a variant with `weights.py` of the recordings; the keys are this package's names."""
    fill = fill_function(goldens)
    keys = json.loads((goldens / "keys" / f"{variant}_keys.json").read_text())["keys"]
    return {
        name_from_released(k["name"]): torch.from_numpy(np.asarray(fill(k["name"], k["shape"], variant))) for k in keys
    }


def fill_function(goldens: Path):
    spec = importlib.util.spec_from_file_location("golden_weights", goldens / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


def golden_model(goldens: Path, variant: str, config: str):
    """Build the model of `config` in evaluation mode with the weights of `variant`."""
    model = build_model(config)
    model.load_state_dict(golden_state(goldens, variant))
    return model.eval()


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Return the largest difference divided by the largest expected magnitude."""
    assert tuple(actual.shape) == expected.shape, f"{tuple(actual.shape)} instead of {expected.shape}"
    return float(np.abs(actual.detach().double().numpy() - expected).max() / max(np.abs(expected).max(), 1e-30))


def assert_close(name: str, actual: torch.Tensor, expected: np.ndarray, tolerance: float = TOLERANCE):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: differs by {error:.2e} of its maximum"


def assert_same_detections(boxes, scores, labels, expected_boxes_scores, expected_labels):
    """Assert a one-to-one match of actual and expected detections with equal labels and close boxes and scores.

    Scores may differ by TOLERANCE. Coordinates may differ by `TOLERANCE * max(m, 1)`, where m is the largest expected
    magnitude of a coordinate.
    """
    actual = torch.cat([boxes, scores[:, None]], dim=1).double().numpy()
    assert len(actual) == len(expected_labels)
    limit = TOLERANCE * max(np.abs(expected_boxes_scores[:, :4]).max(), 1)
    free = np.ones(len(actual), bool)
    for box, label in zip(expected_boxes_scores.astype(np.float64), expected_labels):
        same = (
            free
            & (labels.numpy() == label)
            & (np.abs(actual - box)[:, :4].max(1) <= limit)
            & (np.abs(actual[:, 4] - box[4]) <= TOLERANCE)
        )
        assert same.any(), f"no partner for label {label}, box and score {box}"
        free[np.argmax(same)] = False
