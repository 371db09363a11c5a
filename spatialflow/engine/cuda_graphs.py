# SPDX-License-Identifier: Apache-2.0
"""Functions of tensors replayed from CUDA graphs, one graph per shape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UPS = 2
"""Runs before a capture: libraries choose algorithms and allocate their workspaces, which a capture must not see."""

_capturing = threading.Lock()
"""One capture at a time in a process: each empties torch's allocator first, which fails while another is at work."""


def _kernel_settings() -> tuple[Any, ...]:
    """What torch is set to where the settings choose kernels, and so what a graph holds."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.are_deterministic_algorithms_enabled(),
    )


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # what the graph reads
    output: Any  # what it writes
    function: Callable[[list[Tensor]], Any]  # keeps alive what it closes over, which the graph reads too


class GraphCache:
    """Captured functions by key; the least recently used one is dropped beyond `limit`.

    The graphs share one memory pool: intermediate tensors of all take what the largest graph needs. Inputs and results
    add up; where they leave too little memory for another graph, all are dropped. A result is valid until the next
    call, whatever its key: copy it out first, in the same stream. Threads hold `lock` until they have queued that copy.

    Args:
        device: a CUDA device.
        limit: graphs kept.
    """

    def __init__(self, device: torch.device, limit: int = 64):
        self.device, self.limit = device, limit
        self.lock = threading.Lock()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool: Any = None
        self._side: Any = None  # the stream of all captures: in a pool, memory serves the stream that took it alone
        self._stream: Any = None  # of the last call

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which belong to this process: a copy captures its own."""
        return {"device": self.device, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["device"], state["limit"])

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, key: Hashable, make: Callable[[], Callable[[list[Tensor]], Any]], inputs: list[Tensor]) -> Any:
        """`function(inputs)` on the device, from the graph of `key`.

        Args:
            key: all that the function and the shapes and dtypes of `inputs` depend on, but torch's settings.
            make: gives the function, once per capture. It reads nothing back to the host.
            inputs: on the host or on the device.

        Returns:
            What the function returned when it was captured, with the values for these inputs.
        """
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)  # the graphs' memory is in use there
        self._stream = stream
        key = (key, _kernel_settings())
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture_with_room(make, inputs)
            if len(self._captured) > self.limit:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        for static, given in zip(captured.inputs, inputs):
            static.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.output

    def _capture_with_room(self, make: Callable[[], Callable[[list[Tensor]], Any]], inputs: list[Tensor]) -> _Captured:
        """A new graph, in place of all others where the memory is not enough for both."""
        try:
            return self._capture(make(), inputs)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        self._captured.clear()
        self._pool = None  # torch refuses a pool that no graph uses any more
        return self._capture(make(), inputs)

    def _capture(self, function: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> _Captured:
        with _capturing, torch.cuda.device(self.device):
            static = [given.to(self.device, non_blocking=True, copy=True) for given in inputs]
            stream = self._side = self._side or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(static)
            torch.cuda.current_stream().wait_stream(stream)
            pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Threads that decode the next images may allocate pinned memory, which the default mode forbids them.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = function(static)
            self._pool = pool  # not that of a capture that failed
        return _Captured(graph, static, output, function)
