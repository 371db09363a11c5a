# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the command line."""

FAST = ["--config", "tiny", "--size", "64", "96", "--set", "stuff_area_threshold=20"]
"""Options with which `predict` takes little time."""


def sentences(capsys) -> list[str]:
    """Complaints on standard error, one line each; the progress bar is off where there is no terminal."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert all(line.startswith("spatialflow: ") for line in lines), lines
    return [line.removeprefix("spatialflow: ") for line in lines]
