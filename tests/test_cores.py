# SPDX-License-Identifier: Apache-2.0
"""The cores that a process may use: affinity mask and CPU limit of a container; how waiting threads behave."""

import os
import subprocess
import sys

import pytest

from spatialflow import threads


@pytest.mark.parametrize(
    "files, limit",
    [
        ({"cpu.max": "max 100000\n"}, sys.maxsize),
        ({"cpu.max": "250000 100000\n"}, 3),  # 2.5 cores, rounded up
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, sys.maxsize),
        ({"cpu.max": "no number\n"}, sys.maxsize),
        ({}, sys.maxsize),
    ],
)
def test_limit_of_a_container(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._container_limit(tmp_path) == limit


def test_available_cores_are_the_smaller_number(monkeypatch):
    cores = threads.available_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)
    monkeypatch.setattr(threads, "_container_limit", lambda: 1)
    assert threads.available_cores() == 1


@pytest.mark.parametrize("option, expected", [(None, 1), (2, 2)])
def test_threads_of_a_command(monkeypatch, option, expected):
    """Without --threads, a command uses at most the cores of its container."""
    import torch

    from spatialflow.cli import common

    used = []
    monkeypatch.setattr(common, "available_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    common.set_threads(option)
    assert used == [expected]


@pytest.mark.parametrize(
    "command", ["train tiny --output out", "visualize a.jpg --output out", "predict a.jpg --output out"]
)
def test_waiting_threads_of_commands_sleep(command):
    """The policy is set before a command starts, as torch reads it when it is imported."""
    name = command.split()[0]
    code = (
        f"import sys, os; from spatialflow.cli import main, {name}; "
        f"{name}.run = lambda _: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules) or 0; "
        f"main.main({command.split()!r})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "passive False", done.stderr
