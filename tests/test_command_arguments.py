# SPDX-License-Identifier: Apache-2.0
"""The command line's words: settings and images anywhere, suggestions, versions, completion, the first examples."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.command_line import error_messages
from helpers.scenes import write_coco

import spatialflow
from spatialflow.cli import main as cli
from spatialflow.cli.arguments import CommandParser, add_settings_option, numbers
from spatialflow.cli.main import main
from spatialflow.data.synthetic import is_drawn
from spatialflow.errors import did_you_mean
from spatialflow.panoptic import read_panoptic_json


@pytest.fixture
def parser():
    parser = CommandParser(prog="spatialflow test")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--size", type=numbers)
    parser.add_argument("--model", action="append")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction)
    parser.add_argument("--score", type=float)
    parser.add_argument("--count", type=int)
    add_settings_option(parser, "x=1")
    return parser


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg b.jpg --size 256x384 --model m x=1 test.y=[2]",
        "--size 256x384 a.jpg --model m b.jpg x=1 test.y=[2]",
        "--size 256 384 a.jpg b.jpg x=1 --model m test.y=[2]",
        "x=1 --model m test.y=[2] a.jpg --size 256 384 b.jpg",
        "--set x=1 a.jpg --size 256,384 --model=m --set test.y=[2] b.jpg",
        "a.jpg b.jpg --set x=1 test.y=[2] --mod m --size=256x384",
    ],
)
def test_the_order_of_words_does_not_matter(parser, line):
    options = parser.parse_args(shlex.split(line))
    assert options.images == ["a.jpg", "b.jpg"] and options.size == [256, 384]
    assert options.model == ["m"] and options.settings == ["x=1", "test.y=[2]"]


def test_words_that_are_no_settings(parser, tmp_path, monkeypatch):
    """Files of that name, paths, addresses, values of options and words after -- are what they look like."""
    monkeypatch.chdir(tmp_path)
    for name in ("x=1.jpg", "384"):
        (tmp_path / name).touch()
    line = "x=1.jpg ./y=2.jpg https://host/z?a=b --model n=3 --flip -- c=4 --size"
    options = parser.parse_args(shlex.split(line))
    assert options.images == ["x=1.jpg", "./y=2.jpg", "https://host/z?a=b", "c=4", "--size"]
    assert options.settings == [] and options.model == ["n=3"] and options.flip
    assert parser.parse_args(["--size", "256", "384"]).images == ["384"]  # an image of that name
    assert parser.parse_args(["--score", "-1", "-"]).images == ["-"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--modle m", "no such option: --modle; did you mean --model?"),
        ("--zzzzzz", "no such option: --zzzzzz (see `spatialflow test --help`)"),
        ("--size 256xa", "must be numbers, such as 256x384 or 600,800, got '256xa'"),
        ("--size --flip", "--size: expected one argument"),
        ("a.jpg b.jpg --model", "--model: expected one argument"),
        ("a.jpg --size", "--size: expected one argument"),
        ("--score -- a.jpg", "--score: expected one argument"),
        ("a.jpg x=1 --set", "--set: expected one argument"),
        ("--score high", "--score: must be a number, got 'high'"),
        ("--count 2.5", "--count: must be an integer, got '2.5'"),
        ("--s 3", "ambiguous option: --s could match --size, --score, --set"),
    ],
)
def test_wrong_words(parser, capsys, line, message):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(shlex.split(line))
    assert ended.value.code == 2
    (error,) = error_messages(capsys)
    assert message in error


@pytest.mark.parametrize(
    "line, message",
    [
        ("predit a.jpg", "no such command: predit; did you mean predict?"),
        ("predict a.jpg --outptu x", "no such option: --outptu; did you mean --output?"),
        ("train demo --train-short-edges 5", "no such option: --train-short-edges; train_short_edges is a setting: "),
        ("predict a.jpg --num_things=5", "no such option: --num_things; num_things is a setting: num_things=VALUE"),
        ("predict a.jpg --output x --config demoo", "got 'demoo'; did you mean demo"),
        (
            "predict a.jpg --output x --config w.safetensors",
            "weights are given as the model (--model)",
        ),
        ("predict a.jpg --output x --config demo.yaml", "no such file: demo.yaml; did you mean demo?"),
        ("predict a.jpg --output x --model dmo", "packaged weights (demo); did you mean demo?"),
        (
            "predict a.jpg --output x --model demo nms_treshold=1",
            "no such field: 'nms_treshold'; did you mean nms_",
        ),
        ("train lr=0.1 --output x --images a --annotations b", "no such field: 'lr'; docs/configuration.md lists all"),
        ("predict a.jpg --output x --model demo fpn_channels=3", "fpn_channels: the weights of "),
        ("predict a.jpg --output x", "which network? give --model: the folder of a training run, a weights file, or "),
        ("train demoo --output x --images a --annotations b", "did you mean demo"),
        ("convert dmo x.safetensors", "packaged weights (demo); did you mean demo?"),
        ("dataset convert a --output x --imagez b", "no such option: --imagez; did you mean --images?"),
        ("synthesize x --size 64", "--size takes a height and a width, such as 480x640, got 64"),
    ],
)
def test_messages_of_commands(tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("a.jpg", np.zeros((64, 64, 3), np.uint8))
    try:
        assert main(shlex.split(line)) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert message in error_messages(capsys)[-1] and not (tmp_path / "x").exists()


@pytest.mark.parametrize("words, shown", [([], "\ncommands:\n"), (["dataset"], "\nactions:\n")])
def test_without_a_command_the_help_is_shown(words, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and shown in capsys.readouterr().err


def test_similar_names():
    assert did_you_mean("visualiz", ["visualize", "validate"]) == "; did you mean visualize?"
    assert did_you_mean("zzz", ["visualize"]) == ""


def test_every_command_has_a_version(capsys):
    names = [command.__name__.rpartition(".")[2] for command in cli._COMMANDS]
    for words in ([], *([name] for name in names)):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"spatialflow {spatialflow.__version__}\n"


@pytest.mark.parametrize("action", ["convert", "check"])
def test_actions_have_their_own_help(capsys, action):
    with pytest.raises(SystemExit) as ended:
        main(["dataset", action, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: spatialflow dataset {action} ")


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "spatialflow", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"spatialflow {spatialflow.__version__}\n"


def test_the_first_examples_of_the_help(tmp_path, monkeypatch, capsys):
    """They work as they stand, without any photograph and without a message."""
    monkeypatch.chdir(tmp_path)
    for line in cli.EXAMPLES:
        line = line.replace("--count 20 --size 256x384", "--count 2 --size 64x96")
        assert main(shlex.split(line)) == 0
    assert capsys.readouterr().err == ""
    assert len(read_panoptic_json(tmp_path / "out" / "panoptic.json")["annotations"]) == 2


class TestDrawnScenes:
    """Weights that know only drawn scenes say so for other images."""

    def predict(self, output, *words):
        return main(["predict", "--output", str(output), "--no-overlay", "--size", "64", *map(str, words)])

    @pytest.mark.parametrize("option", ["--model", "--config"])
    def test_photographs(self, photographs, tmp_path, capsys, option):
        assert self.predict(tmp_path / "out", photographs / "plain.jpg", option, "demo") == 0
        assert error_messages(capsys) == [
            "these weights know only drawn scenes of `spatialflow synthesize`: their maps of photographs are "
            "meaningless. For photographs, train on your own (`spatialflow train`) or give other weights with --model "
            "(docs/weights.md)"
        ]

    def test_scenes(self, photographs, tmp_path, capsys):
        scenes = write_coco(tmp_path / "scenes", 2, (64, 96))
        assert is_drawn(scenes / "panoptic.json") and not is_drawn(tmp_path / "absent.json")
        assert self.predict(tmp_path / "a", scenes / "images", "--model", "demo") == 0
        assert self.predict(tmp_path / "b", scenes / "images" / "000001.jpg", "--model", "demo") == 0
        assert error_messages(capsys) == []
        photograph = photographs / "plain.jpg"
        assert self.predict(tmp_path / "c", scenes / "images", photograph, "--model", "demo") == 0
        assert len(error_messages(capsys)) == 1

    def test_visualize(self, photographs, tmp_path, capsys):
        scenes = write_coco(tmp_path / "scenes", 1, (64, 96)) / "images"
        arguments = ["--model", "demo", "test_short_edges=[64]", "--output", str(tmp_path / "out")]
        assert main(["visualize", str(scenes), *arguments]) == 0 and error_messages(capsys) == []
        assert main(["visualize", str(photographs / "plain.jpg"), *arguments]) == 0
        (message,) = error_messages(capsys)
        assert message.startswith("these weights know only drawn scenes of `spatialflow synthesize`: ")

    def test_no_photograph(self, tmp_path, capsys):
        """Nothing is said of photographs that do not exist."""
        assert self.predict(tmp_path / "out", tmp_path / "absent.jpg", "--model", "demo") == 1
        absent = f"{tmp_path}/absent.jpg: cannot be read: No such file or directory"
        assert error_messages(capsys) == [absent, "no image could be predicted"]

    def test_other_weights(self, photographs, weights, tmp_path, capsys):
        assert self.predict(tmp_path / "out", photographs / "plain.jpg", "--model", weights) == 0
        assert error_messages(capsys) == []


class TestRunFolders:
    def test_evaluate_and_visualize_take_one(self, tmp_path, capsys):
        """The predictions of a run are those of its last evaluation."""
        scenes = write_coco(tmp_path / "scenes", 2, (64, 96))
        run = tmp_path / "run"
        output = str(run / "evaluation")
        assert main(["predict", str(scenes / "images"), "--model", "demo", "--size", "64", "--output", output]) == 0
        capsys.readouterr()
        assert main(["evaluate", str(scenes), str(run)]) == 0
        assert capsys.readouterr().out.splitlines()[1].split() == ["PQ", "SQ", "RQ", "N"]
        arguments = ["--prediction", str(run), "--ground-truth", str(scenes), "--output", str(tmp_path / "pictures")]
        assert main(["visualize", str(scenes / "images"), *arguments]) == 0
        assert "2 of 2 pictures done" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "results, message",
        [
            ("absent", "absent: no such file or folder"),
            (
                "empty",
                "empty: holds no panoptic.json, and there is no empty.json; give a panoptic JSON or the output of ",
            ),
            ("run", "run: is a training run without an evaluation; predict photographs with it first: spatialflow "),
            (
                "run/model.safetensors",
                "run/model.safetensors: holds weights, not results; predict photographs with it ",
            ),
        ],
    )
    def test_what_has_no_results(self, tmp_path, monkeypatch, capsys, results, message):
        monkeypatch.chdir(tmp_path)
        write_coco(tmp_path / "scenes", 1, (64, 96))
        (tmp_path / "empty").mkdir()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "model.safetensors").touch()
        for command in (
            ["evaluate", "scenes", results],
            ["view", results, "--no-browser"],
            ["visualize", "scenes/images", "--prediction", results, "--output", "pictures"],
            ["validate", results],
            ["dataset", "check", results],
        ):
            assert main(command) == 2
            (text,) = error_messages(capsys)
            assert text.startswith(message)
            if results.startswith("run"):
                assert text.endswith(f"spatialflow predict PHOTOGRAPHS --model {results} --output predicted")

    def test_visualize_takes_a_model_and_settings(self, tmp_path, capsys):
        scenes = write_coco(tmp_path / "scenes", 1, (64, 96))
        output = ["--output", str(tmp_path / "pictures")]
        assert main(["visualize", "test_short_edges=[64]", str(scenes / "images"), "--model", "demo", *output]) == 0
        assert "1 of 1 picture done" in capsys.readouterr().out
        assert main(["visualize", str(scenes / "images"), "fpn_channels=3", "--model", "demo", *output]) == 2
        assert "fpn_channels: the weights of" in error_messages(capsys)[-1]


class TestCompletion:
    def test_a_missing_package_is_named(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "argcomplete", None)
        assert main(["completion", "bash"]) == 2
        assert error_messages(capsys) == ["completion needs the package argcomplete: pip install argcomplete"]

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_scripts(self, shell, capsys):
        pytest.importorskip("argcomplete")
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "spatialflow" in script and "_ARGCOMPLETE" in script

    @staticmethod
    def complete(line: str, folder: Path) -> list[str]:
        """Ask as the scripts do; return the words."""
        answer = folder / ".answer"
        code = "import sys; from spatialflow.cli.main import main; sys.argv[0] = 'spatialflow'; main()"
        settings = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_IFS": "\n"}
        environment = os.environ | settings | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
        result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True)
        assert result.returncode == 0, result.stderr
        words = answer.read_text().split("\n")
        answer.unlink()
        return [word.strip() for word in words if word.strip()]

    def test_words(self, tmp_path):
        pytest.importorskip("argcomplete")
        for name in ("mine.yaml", "photo.jpg", "weights.pt"):
            (tmp_path / name).touch()
        assert self.complete("spatialflow vi", tmp_path) == ["view", "visualize"]
        assert {"--model", "--config", "--size"} <= set(self.complete("spatialflow predict photo.jpg --", tmp_path))
        assert self.complete("spatialflow predict --config spatialflow_r50_c", tmp_path) == [
            "spatialflow_r50_cityscapes",
            "spatialflow_r50_coco",
        ]
        assert self.complete("spatialflow predict photo.jpg --config mi", tmp_path) == ["mine.yaml"]
        assert self.complete("spatialflow predict photo.jpg --model de", tmp_path) == ["demo"]
        assert self.complete("spatialflow predict --model we", tmp_path) == ["weights.pt"]
        assert self.complete("spatialflow predict pho", tmp_path) == ["photo.jpg"]

    def test_it_imports_neither_torch_nor_numpy(self):
        """The shell waits for the answer."""
        code = "import sys; from spatialflow.cli.main import main\ntry: main(['predict', '--help'])\n"
        code += "except SystemExit: sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'cv2')))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
