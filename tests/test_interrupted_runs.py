# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs: completed work is kept, and the next run ends like a run without interruption."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.command_line import FAST, error_messages, train_arguments
from helpers.scenes import contents

import spatialflow
from spatialflow import images
from spatialflow.cli import info
from spatialflow.cli.main import main
from spatialflow.engine import predict
from spatialflow.panoptic import read_panoptic_json
from spatialflow.panoptic import writer as module

FEW = [*FAST, "score_threshold=0.001", "max_detections=5"]
NAMES = ["a.jpg", "b.png", "c/a.jpg", "c/d/3.jpg", "e.jpg", "f.jpg"]

SLOW = """
import sys, time
import spatialflow.images as images
from spatialflow.cli.main import main

read = images.read_image

def read_slowly(path):
    time.sleep(0.25)
    return read(path)

images.read_image = read_slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for index, name in enumerate(NAMES):
        coarse = np.random.default_rng(index).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), cv2.resize(coarse, (80, 60), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="module")
def arguments(photographs, weights):
    return ["predict", str(photographs), "--recursive", "--detections", "--checkpoint", str(weights), *FEW]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([*arguments, "--output", str(folder)]) == 0
    return contents(folder)


def journal(output):
    return output / "panoptic.journal.jsonl"


def rows_of(output) -> int:
    return len(journal(output).read_bytes().splitlines()) - 1 if journal(output).is_file() else 0


@pytest.fixture(autouse=True)
def interrupts():
    """Let SIGINT interrupt these tests and their child processes; a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stopped(arguments, tmp_path):
    """The output folder of a run that Ctrl-C ends before its fourth image."""
    output = tmp_path / "out"
    assert stop_before("3.jpg", [*arguments, "--output", str(output)], signal.SIGINT, 3) == 130
    return output


def patch_reading(patch, read_image):
    """Replace `read_image` in the commands that call it directly and in the predictor, whose threads call it."""
    patch.setattr(images, "read_image", read_image)
    patch.setattr(predict, "read_image", read_image)


def stop_before(name, arguments, number, written=0) -> int:
    """Run a command that gets a signal when it is about to read the image `name`; return its exit code.

    `predict` reads ahead, so the signal is sent once the rows of `written` images are in the journal.
    """
    read, output = images.read_image, Path(arguments[arguments.index("--output") + 1])

    def stopping(path):
        if path.name == name:
            deadline = time.monotonic() + 60
            while written and rows_of(output) < written and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(os.getpid(), number)
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch_reading(patch, stopping)
        return main(arguments)


class TestPredict:
    @pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_a_process_that_gets_a_signal(self, arguments, uninterrupted, tmp_path, capsys, number, code):
        command = [*arguments, "--output", str(tmp_path)]
        process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while rows_of(tmp_path) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, message = process.communicate(timeout=120)
        assert process.returncode == code, message
        rows = rows_of(tmp_path)
        assert 2 <= rows < len(NAMES)
        possible = {rows}
        if number == signal.SIGKILL:
            assert not (tmp_path / "panoptic.json").exists()
        else:
            content = read_panoptic_json(tmp_path / "panoptic.json", with_categories=True)
            done = len(content["images"])
            possible.add(done)
            assert rows - 1 <= done <= rows  # the signal may come right after the row of the current image
            assert [image["file_name"] for image in content["images"]] == NAMES[:done]
            word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
            assert f"{word}: {done} of 6 images done; run the same command again for the others" in message
            assert len(json.loads((tmp_path / "detections.json").read_text())) > 0
        first = (tmp_path / "panoptic" / "a.png").stat().st_mtime_ns
        assert main(command) == 0
        (message,) = error_messages(capsys)
        resumed = [f"continues an interrupted run, which did {n} of 6 images" for n in possible]
        assert message.removeprefix(f"{tmp_path}: ") in resumed
        assert (tmp_path / "panoptic" / "a.png").stat().st_mtime_ns == first
        assert contents(tmp_path) == uninterrupted

    def test_the_ids_of_equal_names_differ(self, uninterrupted):
        """The files of all images keep the folders of the photographs, too."""
        content = json.loads(uninterrupted["panoptic.json"])
        assert [image["file_name"] for image in content["images"]] == NAMES
        assert [image["id"] for image in content["images"]] == ["a", "b", "c/a", 3, "e", "f"]
        files = [f"panoptic/{name.rsplit('.')[0]}.png" for name in NAMES]
        files += [f"overlays/{name.rsplit('.')[0]}.jpg" for name in NAMES]
        assert sorted(uninterrupted) == sorted([*files, "panoptic.json", "detections.json"])

    @pytest.mark.parametrize(
        "change, expected_message",
        [
            (["--score", "0.9"], "instance_score_threshold 0.[0-9]+ -> 0.9"),
            (["--no-overlay"], "overlays True -> False"),
            (["--dtype", "bfloat16"], "dtype 'float32' -> 'bfloat16'"),
        ],
    )
    def test_other_settings_are_refused(self, arguments, stopped, capsys, change, expected_message):
        before = contents(stopped)
        capsys.readouterr()
        assert main([*arguments, "--output", str(stopped), *change]) == 2
        (message,) = error_messages(capsys)
        assert "is the journal of an interrupted run with other settings: " + expected_message.split(" ")[0] in message
        assert message.endswith("use another --output, or start over with --restart")
        assert contents(stopped) == before

    def test_other_weights_are_refused(self, arguments, stopped, tmp_path, capsys):
        torch.manual_seed(2)
        checkpoint = spatialflow.save_checkpoint(spatialflow.build_model("tiny"), tmp_path / "other.safetensors")
        assert main([*arguments, "--output", str(stopped), "--checkpoint", str(checkpoint)]) == 2

    def test_restart(self, arguments, uninterrupted, stopped):
        assert main([*arguments, "--output", str(stopped), "--score", "0.9", "--restart"]) == 0
        assert not journal(stopped).exists()
        assert main([*arguments, "--output", str(stopped)]) == 0  # a completed run leaves nothing to resume
        assert contents(stopped) == uninterrupted

    def test_files_that_are_gone_or_damaged_are_done_again(self, arguments, uninterrupted, stopped, capsys):
        (stopped / "panoptic" / "a.png").unlink()
        (stopped / "panoptic" / "b.png").write_bytes(b"")
        (stopped / "overlays" / "c" / "a.jpg").unlink()
        assert main([*arguments, "--output", str(stopped)]) == 0
        assert contents(stopped) == uninterrupted
        assert not [line for line in error_messages(capsys) if "interrupted run" in line]

    def test_photographs_that_changed_are_done_again(self, photographs, weights, tmp_path):
        folder, output = tmp_path / "photographs", tmp_path / "out"
        folder.mkdir()
        for name, source in (("a.jpg", "a.jpg"), ("b.jpg", "e.jpg"), ("c.jpg", "f.jpg")):
            (folder / name).write_bytes((photographs / source).read_bytes())
        command = ["predict", str(folder), "--checkpoint", str(weights), *FEW]
        assert stop_before("c.jpg", [*command, "--output", str(output)], signal.SIGTERM, 2) == 143
        (folder / "a.jpg").write_bytes((photographs / "f.jpg").read_bytes())
        (folder / "b.jpg").unlink()
        (folder / "0.jpg").write_bytes((photographs / "b.png").read_bytes())
        assert main([*command, "--output", str(output)]) == 0
        assert main([*command, "--output", str(tmp_path / "whole")]) == 0
        assert contents(tmp_path / "whole") == contents(output)

    @pytest.mark.parametrize("restart", [[], ["--restart"]])
    def test_a_second_run_is_refused_while_one_writes(self, arguments, uninterrupted, tmp_path, capsys, restart):
        command = [*arguments, "--output", str(tmp_path)]
        codes = []
        read = images.read_image

        def beginning_another(path):
            codes.append(main([*command, *restart]))
            return read(path)

        with pytest.MonkeyPatch.context() as patch:
            patch_reading(patch, beginning_another)
            assert main(command) == 0
        assert codes == [2] * len(NAMES)
        message = f"{journal(tmp_path)}: is being written by another process; use another --output"
        assert error_messages(capsys) == [message] * len(NAMES)
        assert contents(tmp_path) == uninterrupted

    def test_images_that_a_later_command_does_not_name_stay_in_the_journal(
        self, arguments, photographs, uninterrupted, stopped, capsys
    ):
        capsys.readouterr()
        few = [argument for argument in arguments if argument != str(photographs)]
        few.insert(1, str(photographs / "f.jpg"))
        assert main([*few, "--output", str(stopped)]) == 0
        message = "the interrupted run did 3 more images; the journal keeps the results, and panoptic.json"
        assert error_messages(capsys) == [f"{stopped}: {message} does not list them"]
        assert main([*arguments, "--output", str(stopped)]) == 0
        assert error_messages(capsys)[0].startswith(f"{stopped}: continues an interrupted run, which did 4 of 6 images")
        assert contents(stopped) == uninterrupted

    def test_the_handlers_are_put_back(self, arguments, stopped):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler

    @pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_library_that_turns_the_exception_into_its_own(self, arguments, tmp_path, monkeypatch, number, code):
        """If an interrupted loader raises another error, as safetensors does, the exit code is the signal's."""
        import safetensors

        def load(path, **_):
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), number)
                time.sleep(1)
            raise safetensors.SafetensorError("could not determine the shape")

        monkeypatch.setattr(safetensors, "safe_open", load)
        assert main([*arguments, "--output", str(tmp_path)]) == code

    def test_results_that_an_interrupted_run_cannot_save(self, arguments, tmp_path, monkeypatch, capsys):
        """If a write fails after a signal, as on a full disk, the last message is that of the failed write."""

        def failing(stream, items):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "_write_list", failing)
        assert stop_before("3.jpg", [*arguments, "--output", str(tmp_path)], signal.SIGTERM) == 2
        assert "No space left on device" in error_messages(capsys)[-1]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_while_torch_is_imported(self, number):
        """While torch is imported, an exception would abort the process, so the signal's default action ends it."""
        code = (
            "import os, torch; from spatialflow.cli import info, main; torch.__spec__._initializing = True; "
            f"info.run = lambda options: os.kill(os.getpid(), {int(number)}) or 0; main.main(['info'])"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == -number


def test_visualize_leaves_the_page_of_what_is_done(photographs, tmp_path, capsys):
    command = ["visualize", str(photographs), "--recursive", "--config", "tiny", "--output", str(tmp_path)]
    assert stop_before("3.jpg", command, signal.SIGTERM) == 143
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img ") == 3 and "pictures/c/a.jpg" in page
    assert error_messages(capsys)[-1] == "terminated: 3 of 6 pictures done"


def test_train_says_from_where_it_goes_on(tmp_path, monkeypatch, capsys):
    from helpers.scenes import write_coco

    from spatialflow.engine.trainer import Trainer

    save = Trainer.save_checkpoint

    def stopping(trainer):
        save(trainer)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "save_checkpoint", stopping)
    data, run = write_coco(tmp_path / "data", 2, (64, 96)), tmp_path / "run"
    settings = [
        "num_things=6",
        "num_stuff=7",
        "categories=synthetic",
        "images_per_step=2",
        "checkpoint_every_steps=1",
        "epochs=4",
        "train_short_edges=[64]",
        "train_long_edge=96",
    ]
    command = train_arguments(data, run, *settings)
    assert main(command) == 143
    path = run / "checkpoint.pt"
    assert error_messages(capsys)[-1] == f"terminated: the same command continues at step 2 of 4, from {path}"
    monkeypatch.undo()
    assert main(command) == 0
    assert "step 2 of 4" in capsys.readouterr().out


def test_synthesize_leaves_the_ground_truth_of_what_is_done(tmp_path, monkeypatch):
    from spatialflow.data.synthetic import dataset

    make = dataset.make_scene

    def stopping(size, seed, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(size, seed, index)

    monkeypatch.setattr(dataset, "make_scene", stopping)
    assert main(["synthesize", str(tmp_path), "--count", "4", "--size", "48", "64"]) == 143
    content = read_panoptic_json(tmp_path / "panoptic.json", with_categories=True)
    assert [image["file_name"] for image in content["images"]] == ["000001.jpg", "000002.jpg"]


def test_an_interrupt_where_python_raises_no_exception(monkeypatch, capsys):
    """Python prints and forgets an exception in `__del__` or in a callback of an import; the command still ends."""

    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)  # the exception comes here

    def run(_):
        Interrupted()
        time.sleep(30)

    monkeypatch.setattr(info, "run", run)
    begin = time.monotonic()
    assert main(["info"]) == 130 and time.monotonic() - begin < 20
    assert capsys.readouterr().err == "spatialflow: interrupted\n"


def test_an_interrupt_before_the_command_line_is_imported():
    """Python would print a traceback; the process ends by the signal instead."""
    code = "import os, signal, sys\nimport spatialflow.cli.start\nos.kill(os.getpid(), signal.SIGINT)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == -signal.SIGINT and result.stderr == b""


def test_workers_that_load_data_leave_interrupts_to_the_main_process(tmp_path):
    """Ctrl-C reaches all processes of a terminal, and a worker would print a traceback, wherever it is."""
    code = """
import signal
from spatialflow.config import DataConfig
from spatialflow.data.loader import SampleRequest, make_loader
from spatialflow.data.samples import SampleError

class Data:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        raise SampleError(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())))

if __name__ == "__main__":
    try:
        next(make_loader(Data(), DataConfig(), [[SampleRequest(0, (1,))]], workers=1, strict=True))
    except SampleError as error:
        print(error, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    (tmp_path / "script.py").write_text(code)
    result = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert result.stdout == "True False\n", result.stderr
