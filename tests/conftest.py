# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """With SPATIALFLOW_BACKEND=cuda, make the GPU torch's default device for all tests."""
    if os.environ.get("SPATIALFLOW_BACKEND") == "cuda":
        # Reference implementations use cuBLAS, which torch considers deterministic only with this setting.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import torch

        torch.set_default_device("cuda")
        torch.backends.cudnn.allow_tf32 = False  # reference implementations in float32 must not use TF32


GOLDENS = Path(__file__).resolve().parent / "data" / "goldens"
"""Recorded results of the released implementation (tests/data/README.md)."""

HOW_TO_GET_RECORDINGS = (
    "the test needs recordings that are not in the repository; tests/data/README.md says how to record them"
)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Return the folder of the larger recordings, which SPATIALFLOW_FIXTURES names; without it, skip the test."""
    root = os.environ.get("SPATIALFLOW_FIXTURES")
    if not root:
        pytest.skip(f"SPATIALFLOW_FIXTURES is not set: {HOW_TO_GET_RECORDINGS}")
    if not Path(root, "goldens").is_dir():
        pytest.skip(f"SPATIALFLOW_FIXTURES={root} has no folder goldens/: {HOW_TO_GET_RECORDINGS}")
    return Path(root).resolve()


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return `GOLDENS`."""
    return GOLDENS


@pytest.fixture(scope="session")
def large_goldens(fixtures: Path) -> Path:
    """Return the folder of recordings that are too large for the repository."""
    return fixtures / "goldens"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of random weights for the configuration `tiny`; return its path."""
    import torch

    import spatialflow

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return spatialflow.save_checkpoint(spatialflow.build_model("tiny"), path)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write readable images of every kind; return their folder."""
    import cv2
    import numpy as np

    def picture(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
        coarse = np.random.default_rng(height * width).integers(0, 256, (9, 11, channels), dtype=np.uint8)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
        return smooth.astype(dtype) * (257 if dtype == np.uint16 else 1)

    folder = tmp_path_factory.mktemp("photographs")
    pictures = {
        "plain.jpg": picture(60, 80),
        "gray.png": picture(50, 70, 1),
        "transparent.png": picture(50, 70, 4),
        "deep.png": picture(50, 70, 3, np.uint16),
        "dot.png": picture(1, 1),
        "line.png": picture(1, 5000),
    }
    for name, pixels in pictures.items():
        assert cv2.imwrite(str(folder / name), pixels)
    return folder


@pytest.fixture(autouse=True)
def seed():
    """Seed all random generators before every test."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)


@pytest.fixture
def precision_restored():
    """Restore torch's precision of float32 convolutions after a test."""
    import torch

    before = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision = before
