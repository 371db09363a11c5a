# SPDX-License-Identifier: Apache-2.0
"""Copies of images to a device and of results to the host, which run beside the work of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Download(NamedTuple):
    """Copies of tensors to the host, which may not have ended."""

    value: Any
    done: torch.cuda.Event | None  # None on the CPU

    def wait(self) -> Any:
        """The same structure of tensors on the host, in memory of their own."""
        if self.done is None:
            return self.value
        self.done.synchronize()  # the one wait that torch's sync debug mode lets pass: a stream's is an error there
        return _map(torch.clone, self.value)


class Transfers:
    """The way to a device and back. On the CPU nothing is copied.

    Copies to and from a GPU go through pinned memory, so that the host need not wait for them. Torch keeps that memory
    and hands it out again once the copies queued from or to it are done. Nothing here keeps it longer than that.

    Args:
        device: "cpu" or a CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._is_gpu = device.type == "cuda"
        self._uploads: Any = None  # a stream, so that an upload does not queue behind the work before it

    def __getstate__(self) -> dict[str, Any]:
        """Without the stream, which belongs to this process."""
        return vars(self) | {"_uploads": None}

    @property
    def queued(self) -> int:
        """How many batches may be queued or at work while the host prepares the next one."""
        return 1 if self._is_gpu else 0

    def stage(self, pixels: np.ndarray) -> Tensor:
        """Where `upload` reads an image from; called in any thread.

        Args:
            pixels: (H, W, 3) uint8 of any strides.
        """
        if not self._is_gpu:
            return torch.from_numpy(np.require(pixels, requirements="CW"))
        pinned = torch.empty(pixels.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        np.copyto(pinned.numpy(), pixels)  # torch's copy would start threads of its own for each of ours
        return pinned

    def upload(self, staged: Sequence[Tensor]) -> list[Tensor]:
        """Tensors on the device for those of `stage`. The current stream waits for them, the host does not.

        The caller keeps them until the work that reads them has ended: their memory belongs to another stream.
        """
        if not self._is_gpu:
            return list(staged)
        stream = self._uploads = self._uploads or torch.cuda.Stream(self.device)  # two threads may each make one
        with torch.cuda.stream(stream):
            uploaded = [tensor.to(self.device, non_blocking=True) for tensor in staged]
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return uploaded

    def download(self, value: Any) -> Download:
        """Queues copies of all tensors in nested lists and named tuples behind the current stream's work."""
        if not self._is_gpu:
            return Download(value, None)
        value = _map(lambda tensor: tensor.to("cpu", non_blocking=True), value)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return Download(value, done)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of every tensor in lists and named tuples; None stays."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else function(value)
    parts = [_map(function, part) for part in value]
    return parts if isinstance(value, list) else type(value)(*parts)
