# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of the command line."""

FAST = ["--config", "tiny", "--size", "64", "96", "--set", "stuff_area_threshold=20"]
"""Options that make `predict` fast."""


def sentences(capsys) -> list[str]:
    """Return the messages on standard error, one per line; the progress bar is off without a terminal."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert all(line.startswith("spatialflow: ") for line in lines), lines
    return [line.removeprefix("spatialflow: ") for line in lines]
