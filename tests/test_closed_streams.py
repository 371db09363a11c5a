# SPDX-License-Identifier: Apache-2.0
"""Commands whose standard streams are closed, or whose current folder was deleted."""

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "spatialflow.cli"]


@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("arguments", [["completion", "bash"], ["visualize", "-", "--output", "o"]])
def test_a_closed_stream_is_no_error_by_itself(tmp_path, stream, arguments):
    """Also in a background job of an old service manager, which closes what it does not use."""

    def run(close: bool) -> subprocess.CompletedProcess:
        before = (lambda: os.close(stream)) if close else None
        return subprocess.run(
            [*COMMAND, *arguments], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, preexec_fn=before
        )

    expected, found = run(close=False), run(close=True)
    assert found.returncode == expected.returncode
    assert b"Traceback" not in found.stderr
    for number, name in ((1, "stdout"), (2, "stderr")):
        assert getattr(found, name) == (getattr(expected, name) if number != stream else b"")


def test_a_deleted_current_folder_is_one_sentence(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    script = f"cd '{folder}' && rmdir '{folder}' && exec '{sys.executable}' -m spatialflow.cli predict . --output o"
    found = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("spatialflow: the current folder cannot be used: No such file")
    assert "Traceback" not in found.stderr
