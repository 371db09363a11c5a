# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies of images to a device and of results to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Download(NamedTuple):
    """Copies of tensors to the host, which may still be running."""

    value: Any
    done: torch.cuda.Event | None  # None on the CPU

    def wait(self) -> Any:
        """Wait for the copies; return the same structure with tensors on the host, cloned if they come from a GPU."""
        if self.done is None:
            return self.value
        # torch.cuda.set_sync_debug_mode("error") permits Event.synchronize, but not Stream.synchronize.
        self.done.synchronize()
        return _map(torch.clone, self.value)


class Transfers:
    """Copies between the host and a device. On the CPU only arrays that are read-only or not contiguous are copied.

    Copies to and from a GPU use pinned memory, so that the host need not wait for them. Torch reuses that memory only
    after the queued copies that read or write it are done.

    Args:
        device: "cpu" or a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        self._uploads: Any = None  # a stream, so that an upload does not wait for work queued earlier

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the stream, which is valid in this process only."""
        return vars(self) | {"_uploads": None}

    @property
    def max_queued(self) -> int:
        """Number of batches that may be queued or running while the host prepares the next one."""
        return 1 if self._is_gpu else 0

    def stage(self, pixels: np.ndarray) -> Tensor:
        """Copy an image to pinned memory, from which `upload` reads; may be called in any thread.

        Args:
            pixels: (H, W, 3) uint8 of any strides.
        """
        if not self._is_gpu:
            return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        pinned = torch.empty(pixels.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        np.copyto(pinned.numpy(), pixels)  # torch's copy would start further threads in every caller thread
        return pinned

    def upload(self, staged: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors of `stage` to the device. The current stream waits for the copies, the host does not.

        The caller must keep the result until the work that reads it is done, as another stream allocated its memory.
        """
        if not self._is_gpu:
            return list(staged)
        # A race between two threads makes two streams, which is harmless.
        stream = self._uploads = self._uploads or torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            uploaded = [tensor.to(self.device, non_blocking=True) for tensor in staged]
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return uploaded

    def download(self, value: Any) -> Download:
        """Queue copies of all tensors in nested lists and named tuples after the work of the current stream."""
        if not self._is_gpu:
            return Download(value, None)
        value = _map(lambda tensor: tensor.to("cpu", non_blocking=True), value)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return Download(value, done)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor in lists and named tuples; None stays."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else function(value)
    parts = [_map(function, part) for part in value]
    return parts if isinstance(value, list) else type(value)(*parts)
