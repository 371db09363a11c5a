# SPDX-License-Identifier: Apache-2.0
"""Tests of the fuzzer: it survives crashes of its worker, finds wrong operators, and is reproducible."""

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from fuzz.cases import CPU, OPERATORS, SIMT
from fuzz.command import Fuzzer, describe_case, describe_outcome, main
from fuzz.supervisor import Outcome, Supervisor

ROOT = Path(__file__).resolve().parents[1]


# --- functions that the workers execute ---


def misbehave(case):
    if case == "die":
        ctypes.string_at(0)
    elif case == "exit":
        os._exit(3)
    elif case == "hang":
        time.sleep(100)
    elif case == "raise":
        raise KeyError("nothing")
    elif case == "fill":
        return len(bytearray(3 << 30))
    elif case == "print":
        print("{}\n[1]")
    return [case, os.getpid()]


def read_beyond(case):
    """Read one element before or after a tensor in guarded memory."""
    from fuzz.tensors import Memory, build_tensor

    memory = Memory()
    memory.begin()
    described = {"tensor": [5], "dtype": "int32", "values": {"kind": "integers", "seed": 0}}
    tensor = [build_tensor(described, memory) for _ in range(4)][0 if case == "after" else 3]
    address = tensor.data_ptr() + (20 if case == "after" else -4)
    return ctypes.c_int32.from_address(address).value


def execute_wrong(case):
    """Execute a valid case; `stuff_labels` is wrong for non-contiguous logits, and `nms` crashes on a single box."""
    from fuzz import execute, operators

    from spatialflow import ops

    def wrong_labels(*, logits, **sizes):
        labels = ops.stuff_labels(logits, **sizes)
        return labels if logits.is_contiguous() else labels + 1

    def crashing_nms(*, boxes, **rest):
        if boxes.shape[0] == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return ops.nms(boxes, **rest)

    if not case["valid"]:  # an invalid case is refused, so it tests nothing here
        return {"status": "refused", "differences": [], "compared": 0, "excluded": 0, "skipped": []}
    for name, call in (("stuff_labels", wrong_labels), ("nms", crashing_nms)):
        operators.OPERATORS[name] = dataclasses.replace(operators.OPERATORS[name], call=call)
    return execute.execute(case)


# --- tests ---


def test_supervisor_survives_its_worker():
    with Supervisor("test_fuzz:misbehave", seconds=2, gigabytes=1) as supervisor:
        first = supervisor.run("good")
        assert first.kind == "done" and first.value[0] == "good"
        assert supervisor.run("print").value == ["print", first.value[1]]  # printed lines are not results
        raised = supervisor.run("raise")
        assert raised.kind == "raised" and "KeyError: 'nothing'" in raised.message
        full = supervisor.run("fill")
        assert full.kind == "raised" and "MemoryError" in full.message
        assert supervisor.starts == 1
        died = supervisor.run("die")
        assert died.kind == "died" and "SIGSEGV" in died.message and "misbehave" in died.message
        exited = supervisor.run("exit")
        assert exited.kind == "died" and "exit code 3" in exited.message
        again = supervisor.run("good")
        assert again.kind == "done" and again.value[1] != first.value[1]
        hung = supervisor.run("hang")
        assert hung.kind == "hung" and "2 s" in hung.message
        assert supervisor.run("good").kind == "done" and supervisor.starts == 4


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_read_beyond_a_tensor_ends_the_worker(side):
    with Supervisor("test_fuzz:read_beyond") as supervisor:
        assert supervisor.run(side).kind == "died"


@pytest.mark.parametrize("name, words", [("stuff_labels", "reference"), ("nms", "SIGSEGV")])
def test_a_wrong_operator_is_found_and_replayed(name, words):
    with Supervisor("test_fuzz:execute_wrong") as supervisor:
        case, description = Fuzzer(supervisor, SIMT, 60).try_round(name, 1)
        assert words in description
        assert name in describe_case(case) and len(describe_case(case)) < 1500
        replayed = describe_outcome(supervisor.run(json.loads(json.dumps(case))))
        assert replayed.split("\n")[0] == description.split("\n")[0]
    if name == "nms":
        assert case["arguments"]["boxes"]["tensor"] == [1, 4]
    with Supervisor("fuzz.execute:execute") as supervisor:
        assert describe_outcome(supervisor.run(case)) is None


class Recorder:
    """Mock of a supervisor, for which every case is right."""

    def __init__(self):
        self.cases = []

    def run(self, case):
        self.cases.append(json.dumps(case))
        return Outcome("done", {"status": "right", "differences": [], "compared": 0, "excluded": 0, "skipped": []})


def recorded(name, start):
    recorder = Recorder()
    assert Fuzzer(recorder, CPU, 60).try_round(name, start) is None
    return recorder.cases


def test_a_seed_gives_the_same_cases():
    cases = recorded("roi_align", 5)
    assert len(cases) == 100 and len(set(cases)) > 70
    assert recorded("roi_align", 5) == cases
    assert recorded("roi_align", 6) != cases


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_are_hostile(name):
    """Cases of every operator cover layouts, dtypes and special values."""
    text = "\n".join(case for start in range(3) for case in recorded(name, start))
    for word in ('"ones"', '"expand"', '"offset"', '"pads"', '"steps"', '"valid": false'):
        assert word in text, word
    if name not in ("panoptic_quality_counts", "preprocess_images"):
        assert all(f'"{dtype}"' in text for dtype in ("float32", "float64", "float16", "bfloat16"))
        assert '"nan"' in text or '"hostile": true' in text


def test_command():
    command = [sys.executable, "tests/fuzz", "--seconds", "4", "--ops", "panoptic_quality_counts"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    backend = os.environ.get("SPATIALFLOW_BACKEND", "cpu")
    done = subprocess.run(
        [*command, "--backend", backend if backend != "cuda" else "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "panoptic_quality_counts" in done.stdout and "per second" in done.stdout
    wrong = subprocess.run([*command, "none"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert wrong.returncode == 2 and "no target 'none'" in wrong.stderr


NMS = {"op": "nms", "arguments": {}, "valid": True}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seconds", "nan"], "--seconds must be positive and finite, got nan"),
        (["--seconds", "inf"], "--seconds must be positive and finite, got inf"),
        (["--seconds", "-1"], "--seconds must be positive and finite, got -1"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0"),
        (["--replay", "notjson"], "--replay: not JSON: "),
        (["--replay", ""], "--replay: not JSON: "),
        (["--replay", "[" * 100_000], "--replay: not JSON: "),
        (["--replay", "{}"], "--replay: not a case of a report: 'op' is missing"),
        (["--replay", "3"], "--replay: not a case of a report: must be an object, got int"),
        (["--replay", '{"op": ["nms"]}'], "--replay: no target ['nms']; there are "),
        (["--replay", '{"op": "none"}'], "--replay: no target 'none'; there are "),
        (["--replay", '{"op": "nms"}'], "--replay: not a case of a report: 'valid' is missing"),
        (["--replay", json.dumps(NMS | {"arguments": 3})], "not a case of a report: a value has another type"),
        (["--replay", json.dumps(NMS | {"gradient": {}})], "--replay: not a case of a report: 'jvp' is missing"),
        (["--replay", json.dumps(NMS | {"arguments": {"boxes": {"tensor": [1]}}})], "'dtype' is missing"),
        (["--replay", json.dumps(NMS | {"op": "setting"})], "--replay: not a case of a report: 'base' is missing"),
    ],
)
def test_wrong_arguments_end_in_a_message(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("fuzz.command.Supervisor", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
