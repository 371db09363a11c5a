# SPDX-License-Identifier: Apache-2.0
"""The processes of one training run, as torchrun starts them."""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
