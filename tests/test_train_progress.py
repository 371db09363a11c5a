# SPDX-License-Identifier: Apache-2.0
"""Progress of a run without a terminal, the log while it runs, early evaluations, --resume and --restart."""

import os
import re
import signal
import sys
import time

import pytest
from helpers.scenes import write_coco
from helpers.training import SINGLE_PROCESS, SMALL_RUN, small, start_in_group

import spatialflow
from spatialflow.cli.main import main
from spatialflow.engine import progress as module
from spatialflow.engine.checkpoint_store import TrainingError
from spatialflow.engine.log import read_log
from spatialflow.engine.progress import Progress, format_duration
from spatialflow.engine.trainer import Trainer

pytest_plugins = ["helpers.training"]  # fixtures `scenes` and `data`

LINE = (
    r"step {step} of {total} \(epoch {epoch}\)  loss [\d.]+  rate [\d.e-]+  [\d.e+]+ images/s  "
    r"[\d]+ (s|min|h)[^:]* left"
)


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (11_000, "3 h 3 min")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


class TestLines:
    def test_first_soon_then_at_the_interval(self, capsys, monkeypatch):
        """One step of 4 images per 2 seconds: the first line after 10 s, the next after 30 s more."""
        now = [100.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        progress = Progress(0, 100, 10, 4, shown=True)
        for step in range(1, 26):
            now[0] += 2
            progress.show(step, 1.5, 0.01)
        assert capsys.readouterr().out.splitlines() == [
            "step 5 of 100 (epoch 1)  loss 1.500  rate 0.01  2 images/s  3 min left",
            "step 20 of 100 (epoch 2)  loss 1.500  rate 0.01  2 images/s  3 min left",
        ]

    def test_the_first_step_does_not_count(self, capsys, monkeypatch):
        """It waits for the processes that load data."""
        now = [0.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        progress = Progress(0, 100, 10, 2, shown=True)
        now[0] = 50.0
        progress.begin(1)
        progress.show(1, 1.5, 0.01)
        now[0] = 60.0
        progress.show(11, 1.5, 0.01)
        (line,) = capsys.readouterr().out.splitlines()
        assert line == "step 11 of 100 (epoch 2)  loss 1.500  rate 0.01  2 images/s  89 s left"

    def test_evaluations_do_not_count_for_the_speed(self, capsys, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        progress = Progress(50, 100, 10, 2, shown=True)
        now[0] = 1000.0
        progress.evaluated(50, 0.25, 1000.0)
        for step in range(51, 62):
            now[0] += 1
            progress.show(step, 1.5, 0.01)
        evaluation, line = capsys.readouterr().out.splitlines()
        assert evaluation == "step 50 of 100: PQ 25.00 on the validation images"
        assert line == "step 60 of 100 (epoch 6)  loss 1.500  rate 0.01  2 images/s  40 s left  PQ 25.0"

    def test_nothing_is_shown_on_demand(self, data, tmp_path, capsys):
        Trainer(small(), data, tmp_path, SINGLE_PROCESS).run()
        assert capsys.readouterr() == ("", "")

    def test_a_run_prints_them(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(module, "FIRST_LINE_S", 0.0)
        Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS, validation=data, progress=True).run()
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(LINE.format(step=2, total=4, epoch=1), lines[0]), lines
        assert re.fullmatch(r"step 2 of 4: PQ [\d.]+ on the validation images", lines[1]), lines
        assert re.fullmatch(LINE.format(step=4, total=4, epoch=2) + r"  PQ [\d.]+", lines[2]), lines


def test_the_bar_has_the_quality(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS, validation=data, progress=True).run()
    shown = capsys.readouterr()
    assert "train" in shown.err and re.search(r"loss=[\d.]+  PQ [\d.]+", shown.err) and shown.out == ""


def test_the_first_evaluation_is_early(data, tmp_path):
    Trainer(small(epochs=4, evaluate_every_epochs=3), data, tmp_path, SINGLE_PROCESS, validation=data).run()
    assert [row["epoch"] for row in read_log(tmp_path / "log.jsonl") if row["kind"] == "evaluation"] == [1, 3, 4]


def test_the_log_is_complete_while_the_run_continues(data, tmp_path, monkeypatch):
    seen = []
    trainer = Trainer(small(epochs=2), data, tmp_path, SINGLE_PROCESS)
    check = trainer.monitor.check

    def look(losses, step):
        check(losses, step)

    monkeypatch.setattr(trainer.monitor, "check", look)
    show = Progress.show

    def record(progress, step, loss, rate):
        seen.append((step, len(read_log(tmp_path / "log.jsonl"))))
        show(progress, step, loss, rate)

    monkeypatch.setattr(Progress, "show", record)
    trainer.run()
    assert seen == [(2, 2), (4, 4)]


class TestResume:
    SETTINGS = tuple(f"{k}={v}" for k, v in SMALL_RUN.items() if k != "num_stuff")

    def run(self, scenes, output, *more):
        files = ["--images", str(scenes / "images"), "--annotations", str(scenes / "panoptic.json")]
        settings, flags = ([word for word in more if ("=" in word) == is_setting] for is_setting in (True, False))
        return main(
            ["train", "tiny", *self.SETTINGS, *settings, "--workers", "0", *files, "--output", str(output), *flags]
        )

    def test_what_happens_is_said(self, scenes, tmp_path, capsys):
        assert self.run(scenes, tmp_path, "--resume") == 2
        assert f"{tmp_path / 'checkpoint.pt'}: no such checkpoint, so there is no run to resume" in (
            capsys.readouterr().err
        )
        assert os.listdir(tmp_path) == []
        assert self.run(scenes, tmp_path) == 0
        assert f"4 images, 2 steps per epoch, step 0 of 2: {tmp_path}: new run" in capsys.readouterr().out
        assert self.run(scenes, tmp_path, "--resume") == 0
        assert (
            f"step 2 of 2: {tmp_path}: is complete, so nothing was changed; a larger epochs=N"
            in capsys.readouterr().out
        )
        assert self.run(scenes, tmp_path, "epochs=2", "gradient_clip_norm=5") == 0
        shown = capsys.readouterr()
        assert f"step 2 of 4: {tmp_path}: continues from its checkpoint" in shown.out
        assert (
            f"spatialflow: {tmp_path}: continues with changed settings: gradient_clip_norm None -> 5.0\n" in shown.err
        )
        assert self.run(scenes, tmp_path, "--restart") == 0
        assert f"step 0 of 2: {tmp_path}: starts over, and replaces the earlier run" in capsys.readouterr().out

    def test_other_settings_are_an_error(self, scenes, tmp_path, capsys):
        assert self.run(scenes, tmp_path) == 0
        for more in ((), ("--resume",)):
            assert self.run(scenes, tmp_path, "momentum=0.5", *more) == 2
            message = capsys.readouterr().err
            assert "momentum 0.9 -> 0.5; use another folder, or start over (--restart)" in message

    def test_resume_and_restart_exclude_each_other(self, scenes, tmp_path, capsys):
        with pytest.raises(SystemExit):
            self.run(scenes, tmp_path, "--resume", "--restart")
        assert "not allowed with" in capsys.readouterr().err

    def test_other_classes_are_an_error_but_another_place_of_them_is_not(self, tmp_path):
        data = write_coco(tmp_path / "data", 2, (64, 96))
        given = dict(config="tiny", output=tmp_path / "run", workers=0, progress=False)
        fields = {k: v for k, v in SMALL_RUN.items() if k not in ("num_things", "num_stuff", "categories")}
        spatialflow.train(data / "images", data / "panoptic.json", **given, **fields)
        data = data.rename(tmp_path / "moved")
        result = spatialflow.train(data / "images", data / "panoptic.json", **given, **fields, resume=True)
        assert result.steps == 1
        text = (data / "panoptic.json").read_text()
        (data / "panoptic.json").write_text(text.replace('"sky"', '"heaven"'))
        with pytest.raises(TrainingError, match="belongs to a run with other classes"):
            spatialflow.train(data / "images", data / "panoptic.json", **given, **fields)


def test_an_interrupt_while_the_workers_start_leaves_no_traceback(scenes, tmp_path):
    """Ctrl-C reaches all processes of a terminal, here the process group."""
    files = ["--images", str(scenes / "images"), "--annotations", str(scenes / "panoptic.json")]
    settings = [f"{k}={v}" for k, v in SMALL_RUN.items() if k not in ("num_stuff", "epochs")]
    command = ["train", "tiny", *settings, "epochs=100000", *files, "--workers", "2", "--output", str(tmp_path)]
    process = start_in_group(command)
    for line in process.stdout:
        if "new run" in line:
            break
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in message, message
    assert message.splitlines()[-1].startswith("spatialflow: interrupted")
