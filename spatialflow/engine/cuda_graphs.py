# SPDX-License-Identifier: Apache-2.0
"""Cache of CUDA graphs of functions of tensors, one graph per key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UPS = 2
"""Runs before a capture, in which libraries choose algorithms and allocate workspaces outside the graph."""

_capturing = threading.Lock()
"""Permits one capture at a time: a capture begins with `torch.cuda.empty_cache`, which fails during another capture."""


def _kernel_settings() -> tuple[Any, ...]:
    """Collect the settings of torch that choose kernels, and so the contents of a graph."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # set by torch at import
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.are_deterministic_algorithms_enabled(),
    )


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # static tensors that the graph reads
    output: Any  # static tensors that the graph writes
    function: Callable[[list[Tensor]], Any]  # kept, as the graph also reads the tensors of its closure


class GraphCache:
    """Captured functions by key; the least recently used one is dropped beyond `limit`.

    The graphs share one memory pool: their intermediate tensors together take the memory of the largest graph. Each
    graph has its own inputs and results. If they leave too little memory for another graph, all graphs are dropped.
    A result is valid until the next call with any key: queue a copy in the same stream before that. Threads must hold
    `lock` until they have queued the copy.

    Args:
        device: a CUDA device.
        limit: largest number of graphs.
    """

    def __init__(self, device: torch.device, limit: int = 64) -> None:
        self.device, self.limit = device, limit
        self.lock = threading.Lock()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool: Any = None
        self._capture_stream: Any = (
            None  # stream of all captures: a pool reuses memory only within the stream that allocated it
        )
        self._last_stream: Any = None  # of the last call

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the graphs, which are valid in this process only."""
        return {"device": self.device, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["device"], state["limit"])  # type: ignore[misc]  # the class has no subclasses

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, key: Hashable, make: Callable[[], Callable[[list[Tensor]], Any]], inputs: list[Tensor]) -> Any:
        """Compute `function(inputs)` on the device with the graph of `key`.

        Args:
            key: determines the function and the shapes and dtypes of `inputs`. Torch's settings are added here.
            make: returns the function, once per capture. The function must not read values back to the host.
            inputs: on the host or on the device.

        Returns:
            The output tensors of the capture, with the values for these inputs.
        """
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)  # work queued there may still use the graphs' memory
        self._last_stream = stream
        key = (key, _kernel_settings())
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture_or_drop_others(make, inputs)
            if len(self._captured) > self.limit:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        for static, tensor in zip(captured.inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        captured.graph.replay()
        return captured.output

    def _capture_or_drop_others(
        self, make: Callable[[], Callable[[list[Tensor]], Any]], inputs: list[Tensor]
    ) -> _Captured:
        """Capture a graph; if it does not fit into memory, drop all other graphs and capture again."""
        try:
            return self._capture(make(), inputs)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        self._captured.clear()
        self._pool = None  # torch rejects a pool that no graph uses
        return self._capture(make(), inputs)

    def _capture(self, function: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> _Captured:
        with _capturing, torch.cuda.device(self.device):
            static = [tensor.to(self.device, non_blocking=True, copy=True) for tensor in inputs]
            stream = self._capture_stream = self._capture_stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(static)
            torch.cuda.current_stream().wait_stream(stream)
            pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Threads that decode images may allocate pinned memory, which the default mode forbids.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = function(static)
            self._pool = pool  # only after a successful capture
        return _Captured(graph, static, output, function)
