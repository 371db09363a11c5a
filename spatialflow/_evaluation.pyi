# SPDX-License-Identifier: Apache-2.0
"""Types of the compiled module; csrc/evaluation/bindings.cpp has its docstrings."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def decode_ids(image: NDArray[Any], *, bgr: bool = False) -> NDArray[np.int32]: ...
def encode_ids(ids: NDArray[Any], *, bgr: bool = False) -> NDArray[np.uint8]: ...
def unfilter_png(
    lines: bytes | bytearray | memoryview, height: int, width: int, channels: int
) -> NDArray[np.int32]: ...
def count_pairs(
    first: NDArray[Any], second: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None: ...
