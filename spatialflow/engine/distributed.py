# SPDX-License-Identifier: Apache-2.0
"""The processes of one training run, as torchrun starts them, and BatchNorm over the batch of all of them."""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among all; alone where torchrun did not start it."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor = tensor / self.size
        return tensor

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, item: object) -> list:
        """Every process's item, in the order of ranks, on each process."""
        if self.size == 1:
            return [item]
        items: list = [None] * self.size
        dist.all_gather_object(items, item)
        return items


def join(device: str | torch.device) -> World:
    """Joins the processes that torchrun started (environment variables RANK, LOCAL_RANK, WORLD_SIZE), over NCCL on
    GPUs, else Gloo.

    Args:
        device: "cpu" or "cuda"; with several processes each takes the GPU of its local rank.
    """
    device = torch.device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, device)


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end(world: World) -> None:
    """Ends this process with code 0 if it is one of several, without the interpreter's own ending; call it last.

    DistributedDataParallel keeps the process group beyond `destroy_process_group`, and so Gloo's threads. One that lets
    go of a tensor while the interpreter ends aborts the process: "terminate called without an active exception".
    """
    if world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that in training mode takes its statistics from the batches of all processes together.

    Every process must call it, forward and backward, in the same order. Unlike torch's SyncBatchNorm it works on every
    device.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape; N, H and W may differ from process to process."""
        if not self.training:
            return super().forward(x)
        wide = x.to(self.weight.dtype)  # of mixed precision
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)  # (C,) of this process
        variance, mean = variance.double(), mean.double()  # the square of a mean is subtracted again below
        count = torch.full_like(mean, x.numel() / x.shape[1])
        moments = torch.stack([count, count * mean, count * (variance + mean.square())])
        count, total, squares = _SumOverProcesses.apply(moments)
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        normalised = torch.addcmul(shift.to(wide)[:, None, None], wide, scale.to(wide)[:, None, None])
        return normalised.to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, and the sum of its gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)


def synchronize_norms(module: nn.Module) -> None:
    """Replaces every BatchNorm inside a module by one over all processes, with the same parameters and statistics."""
    for name, part in module.named_children():
        if type(part) is nn.BatchNorm2d:
            norm = SynchronizedBatchNorm2d(part.num_features, part.eps, part.momentum)
            norm._parameters, norm._buffers = part._parameters, part._buffers
            setattr(module, name, norm.train(part.training))
        else:
            synchronize_norms(part)
