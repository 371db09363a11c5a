# SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: files of others, and two processes."""

import os
import subprocess
import sys

import pytest
from helpers.command_line import train_arguments
from helpers.scenes import write_coco

from spatialflow.cli.main import main
from spatialflow.engine.checkpoint_store import TrainingError
from spatialflow.engine.run_folder import check_replaced_files, only_process


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "curves.png", "model.safetensors"])
def test_files_of_others_are_kept(tmp_path, capsys, name):
    """The command replaced them in silence."""
    write_coco(tmp_path / "data", 2)
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_bytes(b"mine")
    assert main(train_arguments(tmp_path / "data", run)) == 2
    error = capsys.readouterr().err
    assert f"{run / name}: would be replaced" in error and "--restart" in error
    assert (run / name).read_bytes() == b"mine"


@pytest.mark.parametrize("log", ["", '{"kind": "step", "step": 1}\n'])
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path, log):
    (tmp_path / "log.jsonl").write_text(log)
    (tmp_path / "config.yaml").write_text("model: {}")
    check_replaced_files(tmp_path)
    (tmp_path / "model.safetensors").touch()  # of a run whose checkpoint was deleted
    with pytest.raises(TrainingError, match=r"model\.safetensors: would be replaced"):
        check_replaced_files(tmp_path)


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from spatialflow.engine.run_folder import only_process\n"
        "with only_process(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(TrainingError, match="another process trains into this folder"),
            only_process(tmp_path / "run"),
        ):
            pass
        other.kill()
    with only_process(tmp_path / "run"):  # the lock ended with the process
        assert os.path.isdir(tmp_path / "run")
