# SPDX-License-Identifier: Apache-2.0
"""Training with several processes, and BatchNorm over the batches of all processes."""

import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from helpers.scenes import write_coco
from helpers.training import steps_of
from kill_and_resume import command, environment
from safetensors.torch import load_file

from spatialflow.engine.distributed import ProcessGroup, end, leave, synchronize_norms


@pytest.mark.parametrize("norm_trains, epochs", [(False, 4), (True, 1)])
def test_two_processes_equal_one(tmp_path, norm_trains, epochs):
    """Two processes over Gloo, with half the batch each, have the losses, weights and statistics of one.

    With BatchNorm only the first four steps are compared. From the seventh step on, any change of rounding causes
    differences as large as those between one and two processes.
    """
    write_coco(tmp_path, 8, (64, 96))
    settings = (
        f"epochs={epochs}",
        "images_per_step=2",
        "learning_rate=0.002",
        f"backbone_norm_trains={norm_trains}",
    )
    one_process = command(tmp_path, tmp_path / "one", *settings)
    subprocess.run(one_process, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=240)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "spatialflow.cli",
    ]
    pair = command(tmp_path, tmp_path / "two", *settings)
    subprocess.run(launcher + pair[3:], env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=240)
    single, double = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert len(single) == len(double) == 4 * epochs
    for a, b in zip(single, double, strict=True):
        for name in ("total", "cls", "box", "thing", "stuff"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
    single, double = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    for name, value in single.items():
        torch.testing.assert_close(
            double[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def _normalize_a_part(rank, folder):
    """Run synchronized BatchNorm in one of two processes on a part of the batch, forward and backward."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batch, norm = torch.load(folder / "batch.pt"), torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double()
    torch.nn.init.normal_(norm[0].weight, generator=torch.Generator().manual_seed(1))
    synchronize_norms(norm)
    part = batch[:1] if rank == 0 else batch[1:, ..., :4, :]
    part.requires_grad_()
    out = norm(part)
    out.sin().sum().backward()
    results = (out.detach(), part.grad, norm[0].weight.grad, norm[0].running_mean, norm[0].running_var)
    torch.save(results, folder / f"{rank}.pt")
    leave()
    end(ProcessGroup(rank, 2, torch.device("cpu")))  # as in training: Gloo may abort the interpreter's finalization


def test_synchronized_norm_equals_one_over_the_whole_batch(tmp_path):
    """Outputs, gradients and running statistics in float64, with batches of different shapes."""
    with torch.device("cpu"):  # as in the child processes
        batch = torch.randn(3, 3, 6, 5, dtype=torch.float64) * 2 + 100
        norm = torch.nn.BatchNorm2d(3).double()
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(_normalize_a_part, (tmp_path,), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    values = torch.cat([batch[:1].movedim(1, 0).flatten(1), batch[1:, ..., :4, :].movedim(1, 0).flatten(1)], dim=1)
    values = values.t()[..., None, None].requires_grad_()  # (pixels of both processes, 3, 1, 1)
    out = norm(values)
    out.sin().sum().backward()

    def joined(index):
        return torch.cat([part[index].movedim(1, 0).flatten(1) for part in parts], dim=1).t()[..., None, None]

    torch.testing.assert_close(joined(0), out.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joined(1), values.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts[0][2] + parts[1][2], norm.weight.grad, rtol=1e-9, atol=1e-9)
    for part in parts:
        torch.testing.assert_close(part[3], norm.running_mean)
        torch.testing.assert_close(part[4], norm.running_var)
