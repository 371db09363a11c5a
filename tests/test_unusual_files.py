# SPDX-License-Identifier: Apache-2.0
"""Files that are no regular files, and unusual names, in the folders that commands read."""

import os

import pytest

from spatialflow.cli.common import print_error
from spatialflow.cli.input_images import resolve_images
from spatialflow.data.convert.photographs import Photographs
from spatialflow.panoptic.report import quality_table


@pytest.fixture
def folder(tmp_path):
    """A folder with an empty image file, and a pipe that has an image's suffix."""
    (tmp_path / "a.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


class TestPipes:
    """Nobody writes into a pipe in a folder, so reading it would wait without end."""

    def test_a_pipe_in_a_folder_is_no_image(self, folder, capsys):
        with resolve_images([folder]) as inputs:
            assert [image.name for image in inputs.images] == ["a.png"]
        assert "skipped 1 pipe or device" in capsys.readouterr().err

    def test_a_pipe_that_a_pattern_matches_is_no_image(self, folder, capsys):
        with resolve_images([f"{folder}/*.png"]) as inputs:
            assert [image.name for image in inputs.images] == ["a.png"]
        assert "skipped 1 pipe or device" in capsys.readouterr().err

    def test_a_pipe_is_no_photograph_of_a_conversion(self, folder):
        assert Photographs(folder).names == ["a.png"]

    def test_a_pipe_that_is_an_argument_is_read(self, folder):
        """As with the shell's `<(command)`."""
        with resolve_images([folder / "pipe.png"]) as inputs:
            assert len(inputs.images) == 1


def test_names_in_messages_do_not_control_the_terminal(capsys):
    """A name with an escape sequence could hide other messages. Spaces of all kinds are text."""
    print_error("\x1b[2Ja.jpg: is empty\nb\r\x9b\udcff \u202f\u00e9.jpg")
    assert capsys.readouterr().err == "spatialflow: \\x1b[2Ja.jpg: is empty\nb\\r\\x9b\\udcff \u202f\u00e9.jpg\n"


def test_names_of_classes_do_not_control_the_terminal():
    row = {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1, "tp": 1, "fp": 0, "fn": 0}
    groups = dict.fromkeys(("All", "Things", "Stuff"), row)
    table = quality_table({**groups, "per_class": {1: row}}, {1: "\x1b[2J\nsky"})
    assert "\\x1b[2J\\nsky" in table and "\x1b" not in table
