# SPDX-License-Identifier: Apache-2.0
"""The process group of a training run, as torchrun starts it, and BatchNorm over the batches of all processes."""

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class ProcessGroup:
    """Rank and device of this process, and the number of processes, which is 1 without torchrun.

    Attributes:
        rank: of this process, 0-based.
        size: number of processes.
        device: of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> Tensor:
        """Average a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor = tensor / self.size
        return tensor

    def wait(self) -> None:
        """Block until all processes have called this method."""
        if self.size > 1:
            dist.barrier()

    def gather(self, item: Any) -> list[Any]:
        """Gather one item of each process, in the order of ranks, on all processes."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


def join(device: str | torch.device) -> ProcessGroup:
    """Initialize the process group that torchrun started, over NCCL on GPUs, else Gloo.

    Reads the environment variables RANK, LOCAL_RANK and WORLD_SIZE.

    Args:
        device: "cpu" or "cuda"; with several processes each uses the GPU of its local rank.
    """
    device = torch.device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ProcessGroup(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(dist.get_rank(), size, device)


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end(process_group: ProcessGroup) -> None:
    """Exit this process with code 0 if it is one of several, without the interpreter's finalization; call it last.

    DistributedDataParallel keeps the process group beyond `destroy_process_group`, and so Gloo's threads. A thread that
    releases a tensor during finalization aborts the process: "terminate called without an active exception".
    """
    if process_group.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that in training mode computes its statistics over the batches of all processes.

    All processes must run the forward and backward passes of these modules in the same order. Unlike torch's
    SyncBatchNorm, this module also runs on the CPU.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, (N, C, H, W); N, H and W may differ from process to process."""
        if not self.training:
            return super().forward(x)
        upcast = x.to(self.weight.dtype)  # from the dtype of mixed precision
        variance, mean = torch.var_mean(upcast, dim=(0, 2, 3), correction=0)  # (C,) of this process
        variance, mean = variance.double(), mean.double()  # float64, as mean(x^2) - mean(x)^2 below cancels
        count = torch.full_like(mean, x.numel() / x.shape[1])
        moments = torch.stack([count, count * mean, count * (variance + mean.square())])
        count, total, squares = _SumOverProcesses.apply(moments)  # type: ignore[no-untyped-call]  # of torch
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        normalized = torch.addcmul(shift.to(upcast)[:, None, None], upcast, scale.to(upcast)[:, None, None])
        return normalized.to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)  # type: ignore[no-untyped-call]  # of torch


def synchronize_norms(module: nn.Module) -> None:
    """Replace every BatchNorm2d inside a module by `SynchronizedBatchNorm2d` of the same parameters and statistics."""
    for name, part in module.named_children():
        if type(part) is nn.BatchNorm2d:
            norm = SynchronizedBatchNorm2d(part.num_features, part.eps, part.momentum)
            norm._parameters, norm._buffers = part._parameters, part._buffers
            setattr(module, name, norm.train(part.training))
        else:
            synchronize_norms(part)
