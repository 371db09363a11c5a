# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests of the command line."""

FAST = ["--config", "tiny", "--size", "64", "96", "--set", "stuff_area_threshold=20"]
"""Options that make `predict` fast."""


def sentences(capsys) -> list[str]:
    """Messages on standard error, one per line; without a terminal there is no progress bar."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert all(line.startswith("spatialflow: ") for line in lines), lines
    return [line.removeprefix("spatialflow: ") for line in lines]
