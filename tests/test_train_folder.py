# SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: one run at a time, complete runs stay as they are, and what an interrupt leaves."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.command_line import error_messages, train_arguments
from helpers.scenes import write_coco
from helpers.training import SMALL_RUN, start_in_group

from spatialflow.cli.main import main
from spatialflow.engine.checkpoint_store import TrainingError
from spatialflow.engine.distributed import ProcessGroup
from spatialflow.engine.run_folder import check_replaced_files, only_run_in
from spatialflow.engine.trainer import Trainer

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`

SETTINGS = tuple(f"{k}={v}" for k, v in SMALL_RUN.items() if k not in ("num_things", "num_stuff", "categories"))


@pytest.fixture
def command(scenes, tmp_path):
    """Return a function that makes the command line of a run in `tmp_path / "run"`; an epoch has two steps."""
    files = []
    for kind in ("", "validation-"):
        files += [f"--{kind}images", str(scenes / "images"), f"--{kind}annotations", str(scenes / "panoptic.json")]

    def arguments(*more, workers=0):
        output = ["--output", str(tmp_path / "run")]
        return ["train", "tiny", *SETTINGS, *files, *output, "--workers", str(workers), *more]

    return arguments


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


class TestOneRunAtATime:
    def test_a_second_run_is_refused_and_changes_nothing(self, command, tmp_path, capsys, monkeypatch):
        run, advance, seen = tmp_path / "run", Trainer._advance, []

        def with_a_second_run(*arguments):
            if not seen:
                before = contents(run)
                seen.extend([main(command()), main(command("--restart")), contents(run) == before])
            return advance(*arguments)

        monkeypatch.setattr(Trainer, "_advance", with_a_second_run)
        assert main(command("epochs=2")) == 0
        assert seen == [2, 2, True]
        refused = [line for line in error_messages(capsys) if "another process" in line]
        assert refused == [f"{run}: is being written by another process; use another output folder"] * 2
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
        assert main(command("epochs=3")) == 0

    def test_a_killed_process_does_not_lock_the_folder(self, command, tmp_path):
        code = (
            "import sys, time; from pathlib import Path; from spatialflow.files import open_locked\n"
            "stream = open_locked(Path(sys.argv[1])); print(flush=True); time.sleep(600)"
        )
        (tmp_path / "run").mkdir()
        holder = [sys.executable, "-c", code, str(tmp_path / "run" / ".training.lock")]
        with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert main(command()) == 2
            process.kill()
        assert main(command()) == 0

    def test_only_the_first_process_locks_and_all_stop(self, tmp_path, monkeypatch):
        second = ProcessGroup(1, 2, torch.device("cpu"))
        monkeypatch.setattr(ProcessGroup, "gather", lambda self, item: ["run: is in use", item])
        with pytest.raises(TrainingError, match="run: is in use"), only_run_in(tmp_path / "run", second):
            pass
        assert not (tmp_path / "run").exists()

    def test_a_mistyped_folder_is_not_created(self, command, tmp_path):
        assert main(command("--resume")) == 2
        assert not (tmp_path / "run").exists()


def record_steps(monkeypatch, before, result=None):
    """Call `before` with each step before it runs, and return the list of steps run; `result` replaces the losses."""
    advance, steps = Trainer._advance, []

    def recorded(trainer, *arguments):
        before(trainer.step)
        steps.append(trainer.step)
        losses = advance(trainer, *arguments)
        return losses if result is None else result

    monkeypatch.setattr(Trainer, "_advance", recorded)
    return steps


class TestCompleteRun:
    @pytest.mark.parametrize("change", ["epochs=2", "epochs=1", "learning_rate=0.5", "stuff_area_threshold=7"])
    def test_nothing_is_changed(self, change, command, tmp_path, capsys):
        run = tmp_path / "run"
        assert main(command("epochs=2")) == 0
        before = contents(run)
        capsys.readouterr()
        assert main(command("epochs=2", change)) == 0
        assert contents(run) == before
        shown = capsys.readouterr()
        assert f"{run}: is complete, so nothing was changed; a larger epochs=N continues it, --restart" in shown.out
        assert "4 steps: " in shown.out and "PQ " in shown.out
        assert "changed settings" not in shown.err and "the run ends" not in shown.err

    def test_more_epochs_continue_it(self, command, tmp_path):
        assert main(command()) == 0
        assert main(command("epochs=2")) == 0
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]["epochs"] == 2

    def test_missing_weights_are_written(self, command, tmp_path):
        assert main(command()) == 0
        weights = (tmp_path / "run" / "model.safetensors").read_bytes()
        (tmp_path / "run" / "model.safetensors").unlink()
        assert main(command()) == 0
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "number, word, code", [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
class TestInterrupt:
    @pytest.fixture(autouse=True)
    def interrupts(self):
        """Let SIGINT arrive: a process that a shell starts in the background ignores it."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_the_present_step_is_completed_and_saved(self, number, word, code, command, tmp_path, capsys, monkeypatch):
        """The run, stopped twice, ends with the weights and losses of a run that was not stopped."""
        assert main(command("epochs=3")) == 0
        uninterrupted = contents(tmp_path / "run")
        stops = {0, 3}
        steps = record_steps(monkeypatch, lambda step: os.kill(os.getpid(), number) if step in stops else None)
        for step in sorted(stops):
            capsys.readouterr()
            assert main(command("epochs=3", *["--restart"][: step == 0])) == code
            messages = error_messages(capsys)[-2:]
            path = tmp_path / "run" / "checkpoint.pt"
            assert messages[0] == "ends after this step; a second Ctrl-C ends at once, without the step"
            assert messages[1] == f"{word}: the same command continues at step {step + 1} of 6, from {path}"
            stops.remove(step)
        assert main(command("epochs=3")) == 0
        assert steps == [0, 1, 2, 3, 4, 5]
        resumed = contents(tmp_path / "run")
        assert resumed["model.safetensors"][1] == uninterrupted["model.safetensors"][1]
        logs = [[json.loads(line) for line in files["log.jsonl"][1].splitlines()] for files in (uninterrupted, resumed)]
        losses = [[row["total"] for row in rows if row["kind"] == "step"] for rows in logs]
        assert len(losses[0]) == 6 and losses[0] == losses[1]

    def test_a_second_signal_stops_at_once(self, number, word, code, command, tmp_path, capsys, monkeypatch):
        stops = [0, 0]
        steps = record_steps(monkeypatch, lambda step: [os.kill(os.getpid(), number) for stop in stops if stop == step])
        assert main(command("epochs=2")) == code
        assert error_messages(capsys)[-1] == f"{word}: nothing is saved yet, so the same command starts again"
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        stops[:] = [2, 2]
        assert main(command("epochs=2")) == code
        path = tmp_path / "run" / "checkpoint.pt"
        assert error_messages(capsys)[-1] == f"{word}: the same command continues at step 2 of 4, from {path}"
        assert steps == [0, 1]

    @pytest.mark.parametrize("failure", ["loss", "loader"])
    def test_a_step_that_fails_is_not_saved(self, number, word, code, failure, command, tmp_path, capsys, monkeypatch):
        """The checkpoint keeps the last finite state, also if the signal ended the processes that load data."""

        def stop(step):
            if step == 1:
                os.kill(os.getpid(), number)
                if failure == "loader":
                    raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

        steps = record_steps(monkeypatch, stop, result=torch.full((5,), torch.nan) if failure == "loss" else None)
        assert main(command("epochs=2")) == code
        assert error_messages(capsys)[-1] == f"{word}: nothing is saved yet, so the same command starts again"
        assert not (tmp_path / "run" / "checkpoint.pt").exists() and steps == [0, 1][: 1 + (failure == "loss")]

    def test_a_signal_while_losses_are_logged(self, number, word, code, command, tmp_path, capsys, monkeypatch):
        """The step is over by then, and is saved too."""
        log_losses, steps = Trainer._log_losses, record_steps(monkeypatch, lambda step: None)

        def stopping(trainer, *arguments):
            log_losses(trainer, *arguments)
            if len(steps) == 4 and trainer.step == 4:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Trainer, "_log_losses", stopping)
        assert main(command("epochs=3")) == code
        path = tmp_path / "run" / "checkpoint.pt"
        assert error_messages(capsys)[-1] == f"{word}: the same command continues at step 4 of 6, from {path}"
        assert main(command("epochs=3")) == 0 and steps == [0, 1, 2, 3, 4, 5]

    def test_a_signal_during_an_evaluation(self, number, word, code, command, tmp_path, capsys, monkeypatch):
        """The steps of the epoch are saved, and the next run begins with its evaluation."""
        evaluate, steps = Trainer._evaluate, record_steps(monkeypatch, lambda step: None)

        def stopping(trainer, *arguments):
            if len(steps) == 4 and trainer.step == 4:
                steps.append("evaluation")
                os.kill(os.getpid(), number)
            evaluate(trainer, *arguments)

        monkeypatch.setattr(Trainer, "_evaluate", stopping)
        settings = command("epochs=3", "evaluate_every_epochs=1")
        assert main(settings) == code
        path = tmp_path / "run" / "checkpoint.pt"
        assert error_messages(capsys)[-1] == f"{word}: the same command continues at step 4 of 6, from {path}"
        assert main(settings) == 0 and steps == [0, 1, 2, 3, "evaluation", 4, 5]
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log if row["kind"] == "evaluation"] == [2, 4, 6]

    def test_a_group_of_processes_that_gets_a_signal(self, number, word, code, command, tmp_path):
        """Ctrl-C, or the stop of a service, reaches the processes that load data too."""
        process = start_in_group(command("epochs=100000", workers=2))
        for line in process.stdout:
            if "images/s" in line:
                break
        os.killpg(process.pid, number)
        _, message = process.communicate(timeout=120)
        assert process.returncode == code
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        step = [row["step"] for row in log if row["kind"] == "step"][-1]
        if number == signal.SIGTERM:  # ends the loading processes too, and perhaps the step with them
            step = r"\d+"
        assert re.search(rf"\nspatialflow: {word}: the same command continues at step {step} of ", message), message


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
    check_replaced_files(tmp_path, ProcessGroup(0, 1, torch.device("cpu")))
    (tmp_path / "model.safetensors").touch()  # of a run whose checkpoint was deleted
    with pytest.raises(TrainingError, match=r"model\.safetensors: would be replaced"):
        check_replaced_files(tmp_path, ProcessGroup(0, 1, torch.device("cpu")))
