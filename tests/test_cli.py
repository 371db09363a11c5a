# SPDX-License-Identifier: Apache-2.0
"""Command line: its output, and one message for every kind of invalid input.

`predict`, `validate`, `visualize` and `train` have separate test files.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from helpers.command_line import FAST, error_messages

import spatialflow
from spatialflow.cli import info
from spatialflow.cli import main as cli
from spatialflow.cli.main import main


class TestEvaluate:
    @pytest.fixture
    def prediction(self, photographs, weights, tmp_path):
        output = tmp_path / "prediction"
        images = [str(photographs / name) for name in ("plain.jpg", "gray.png")]
        assert main(["predict", *images, "--checkpoint", str(weights), "--output", str(output), *FAST]) == 0
        return output

    def test_a_prediction_against_itself(self, prediction, tmp_path, capsys):
        numbers = tmp_path / "numbers.json"
        capsys.readouterr()
        arguments = [str(prediction), str(prediction / "panoptic"), "--output", str(numbers), "--per-class"]
        assert main(["evaluate", *arguments]) == 0
        result = json.loads(numbers.read_text())
        assert result["All"]["n"] > 0 and result["All"]["pq"] == 1
        heading, *lines = capsys.readouterr().out.splitlines()
        assert heading.endswith(" scored") and lines[0].split() == ["PQ", "SQ", "RQ", "N"]
        assert lines[1].split() == ["All", "100.0", "100.0", "100.0", str(result["All"]["n"])]
        assert len([line for line in lines[5:] if line.split()[1:]]) == 1 + result["All"]["n"]

    def test_errors(self, prediction, tmp_path, capsys):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "none.json"), str(prediction)]) == 2
        assert main(["evaluate", str(prediction), str(prediction), "--workers", "0"]) == 2
        (prediction / "panoptic" / "gray.png").write_bytes(b"")
        assert main(["evaluate", str(prediction), str(prediction), "--output", str(tmp_path / "numbers.json")]) == 2
        messages = error_messages(capsys)
        assert len(messages) == 3
        assert (
            "none.json: no such file" in messages[0]
            and "--workers must be" in messages[1]
            and "gray.png" in messages[2]
        )
        assert not (tmp_path / "numbers.json").exists()

    def test_torch_is_not_imported(self, prediction):
        code = (
            "import sys; from spatialflow.cli.main import main; code = main(sys.argv[1:]); "
            "sys.exit(code or ('torch' in sys.modules and 3))"
        )
        command = [sys.executable, "-c", code, "evaluate", str(prediction), str(prediction)]
        assert subprocess.run(command, capture_output=True).returncode == 0

    def test_inputs_are_not_replaced(self, prediction, weights, capsys):
        """An input is not overwritten, even if the output names it by another path."""
        link = prediction / "link.json"
        link.symlink_to(prediction / "panoptic.json")
        paths = list(map(str, (prediction, prediction, prediction)))
        before = (prediction / "panoptic.json").read_bytes(), weights.read_bytes()
        capsys.readouterr()
        for output in (prediction / "panoptic.json", link):
            assert main(["evaluate", *paths[:2], "--output", str(output)]) == 2
            assert main(["validate", paths[0], "--output", str(output)]) == 2
        assert main(["convert", str(weights), str(weights), "--half"]) == 2
        for picture in (prediction / "panoptic").iterdir():
            assert main(["validate", paths[0], "--output", str(picture)]) == 2
        messages = error_messages(capsys)
        assert len(messages) == 7 and all(
            "is an input of this command, which does not replace it" in line for line in messages
        )
        assert before == ((prediction / "panoptic.json").read_bytes(), weights.read_bytes())
        report = prediction / "report.json"
        report.touch()
        assert main(["validate", paths[0], "--images", str(prediction / "absent"), "--output", str(report)]) == 2
        assert main(["convert", str(prediction / "absent.pth"), str(weights)]) == 2
        assert [line.split(": ")[0] for line in error_messages(capsys)] == [
            str(prediction / "absent"),
            str(prediction / "absent.pth"),
        ]


class TestConvert:
    def test_converted_weights_load(self, weights, tmp_path, capsys):
        target = tmp_path / "copy.safetensors"
        assert main(["convert", str(weights), str(target)]) == 0
        assert "tensors" in capsys.readouterr().out
        spatialflow.load_checkpoint(spatialflow.build_model("tiny"), target)

    @pytest.mark.parametrize(
        "source, target, reason",
        [
            ("none.pth", "copy.safetensors", "none.pth: there is no such file"),
            (None, "copy.txt", "must end in .safetensors"),
            (None, "folder/is/a/file.safetensors", "cannot be written"),
        ],
    )
    def test_errors(self, weights, tmp_path, capsys, source, target, reason):
        (tmp_path / "folder").write_text("")
        assert main(["convert", str(source or weights), str(tmp_path / target)]) == 2
        (message,) = error_messages(capsys)
        assert reason in message
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class TestSynthesize:
    def test_scenes_are_a_data_set(self, tmp_path, capsys):
        assert main(["synthesize", str(tmp_path / "a"), "--count", "2", "--size", "48", "64"]) == 0
        assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
        assert "100.0" in capsys.readouterr().out
        assert cv2.imread(str(next((tmp_path / "a" / "images").iterdir()))).shape == (48, 64, 3)

    @pytest.mark.parametrize("change", [["--count", "0"], ["--size", "4", "4"], ["--seed", "-1"]])
    def test_errors(self, tmp_path, capsys, change):
        assert main(["synthesize", str(tmp_path / "a"), *change]) == 2
        assert len(error_messages(capsys)) == 1 and not (tmp_path / "a" / "panoptic.json").exists()


class TestOutput:
    @pytest.mark.parametrize("command", ["info", "evaluate", "benchmark"])
    def test_closed_pipe(self, command, tmp_path):
        """A closed pipe, as in `spatialflow info | head -1`, gives neither a traceback nor a message."""
        scenes = tmp_path / "scenes"
        assert main(["synthesize", str(scenes), "--count", "1", "--size", "64", "96"]) == 0
        arguments = {"evaluate": [scenes, scenes], "benchmark": ["--list"]}.get(command, [])
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run(
            [sys.executable, "-m", "spatialflow.cli", command, *map(str, arguments)],
            stdout=writing,
            stderr=subprocess.PIPE,
        )
        os.close(writing)
        assert (result.returncode, result.stderr) == (141, b"")

    def test_a_name_that_is_not_utf8(self, tmp_path):
        """A file name that is not UTF-8 does not make the final message fail."""
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "spatialflow.cli",
                "synthesize",
                tmp_path / "caf\udce9",
                "--count",
                "1",
                "--size",
                "64",
                "64",
            ],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
        )
        assert result.returncode == 0 and b"caf\\udce9/panoptic.json" in result.stdout, result.stderr

    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # surrogateescape is the handler of the C locale
    def test_a_category_that_no_terminal_can_print(self, tmp_path, errors):
        assert main(["synthesize", str(tmp_path), "--count", "1", "--size", "64", "96"]) == 0
        path = tmp_path / "panoptic.json"
        content = json.loads(path.read_text())
        for row in content["categories"]:
            row["name"] = "\ud800"
        path.write_text(json.dumps(content))
        result = subprocess.run(
            [sys.executable, "-m", "spatialflow.cli", "evaluate", tmp_path, tmp_path, "--per-class"],
            env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
            capture_output=True,
        )
        assert result.returncode == 0 and b"\\ud800" in result.stdout, result.stderr

    def test_a_ground_truth_of_others_is_not_replaced(self, tmp_path, capsys):
        (tmp_path / "panoptic.json").write_text('{"images": []}')
        assert main(["synthesize", str(tmp_path), "--count", "1", "--size", "48", "64"]) == 2
        message = f"{tmp_path / 'panoptic.json'}: would be replaced, and was not written by synthesize"
        assert error_messages(capsys) == [message] and [path.name for path in tmp_path.iterdir()] == ["panoptic.json"]


class TestInfoAndBenchmark:
    def test_info(self, capsys):
        assert main(["info"]) == 0
        printed = capsys.readouterr().out
        assert spatialflow.__version__ in printed and torch.__version__ in printed and "in use" in printed

    def test_benchmark_names(self, capsys):
        assert main(["benchmark", "--list"]) == 0
        names = capsys.readouterr().out.split()
        assert {"roi_align", "training_step"} <= set(names) and not {"card", "gpu", "kernel_count"} & set(names)
        assert main(["benchmark", "no_such_op"]) == 2
        assert "no benchmark named no_such_op" in error_messages(capsys)[0]

    def test_help_lists_the_commands(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert all(command in printed for command in ("predict", "evaluate", "convert", "benchmark", "info"))


@pytest.mark.parametrize("content, error", [(None, "cannot be read"), ("[1]", "row 0 must have")])
def test_bad_detections_are_refused_before_the_scoring(photographs, weights, tmp_path, capsys, content, error):
    predicted, detections = tmp_path / "predicted", tmp_path / "detections.json"
    command = ["predict", str(photographs / "plain.jpg"), *FAST, "--checkpoint", str(weights)]
    assert main([*command, "--output", str(predicted)]) == 0
    if content is not None:
        detections.write_text(content)
    capsys.readouterr()
    assert main(["evaluate", str(predicted), str(predicted), "--detections", str(detections)]) == 2
    captured = capsys.readouterr()
    assert f"{detections}: {error}" in captured.err and captured.out == ""


def _options() -> list[tuple[str, str]]:
    """Return (command, destination) of every option."""
    (commands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [
        (name, action.dest)
        for name, command in commands.choices.items()
        for action in command._actions
        if action.dest != "help"
    ]


def test_every_option_is_read():
    """The sources of the commands contain `options.<name>`, or the name as a string for getattr."""
    root = Path(cli.__file__).parent
    trees = [ast.parse(path.read_text()) for path in sorted(root.glob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "options"}
    defining = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    definitions = {id(part) for call in defining for part in ast.walk(call)}
    read |= {n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in definitions}
    options = _options()
    assert len(options) > 50
    assert [(command, name) for command, name in options if name not in read] == []


@pytest.mark.parametrize("setting", ["fpn_channels=1000000000", "num_things=100000000000", "size_divisor=16000000"])
def test_settings_that_ask_for_more_memory_than_there_is(photographs, tmp_path, capsys, setting):
    arguments = ["predict", str(photographs / "plain.jpg"), "--config", "tiny", "--set", setting, "--no-overlay"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "out of memory: " in error_messages(capsys)[-1]


def test_other_runtime_errors_are_not_hidden(monkeypatch):
    def fails(_):
        raise RuntimeError("an internal error")

    monkeypatch.setattr(info, "run", fails)
    with pytest.raises(RuntimeError, match="an internal error"):
        main(["info"])


LONG = "a" * 300  # too long for a file name, so that pathlib's is_file() raises


@pytest.mark.parametrize(
    "command",
    [
        f"predict {LONG} --config tiny --output OUT",
        f"predict PHOTOGRAPHS --config {LONG} --output OUT",
        f"predict PHOTOGRAPHS --config tiny --checkpoint {LONG} --output OUT",
        f"predict PHOTOGRAPHS --config tiny --set categories={LONG} --output OUT",
        f"validate {LONG}",
        f"evaluate {LONG} {LONG}",
        f"visualize {LONG} --config tiny --output OUT",
        f"train tiny --cityscapes {LONG} --output OUT",
        f"train tiny --images PHOTOGRAPHS --annotations {LONG} --output OUT",
    ],
)
def test_names_that_are_too_long(photographs, tmp_path, capsys, command):
    words = command.replace("PHOTOGRAPHS", str(photographs)).replace("OUT", str(tmp_path / "out")).split()
    assert main(words) in (1, 2)
    assert LONG[:30] in "".join(error_messages(capsys))
