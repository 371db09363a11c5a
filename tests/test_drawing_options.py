# SPDX-License-Identifier: Apache-2.0
"""Options for pictures of `predict` and `visualize`: opacity, labels, outlines, legend and contact sheet."""

import shutil

import cv2
import numpy as np
import pytest
from helpers.command_line import FAST, error_messages
from helpers.scenes import write_coco

from spatialflow.cli.drawing_options import write_contact_sheet
from spatialflow.cli.main import main
from spatialflow.images import read_image
from spatialflow.panoptic import overlay, read_id_map, read_panoptic_json
from spatialflow.panoptic.pages import thumbnails


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("truth"), 3, (64, 96))


def predict(truth, weights, output, *options):
    """Run `predict` on the three photographs; return the exit code."""
    files = [str(truth / "images"), "--checkpoint", str(weights), "--output", str(output)]
    return main(["predict", *files, *FAST, "stuff_area_threshold=1", "score_threshold=0.001", *options])


STYLES = [
    ([], {}),
    (["--opacity", "0.8"], {"opacity": 0.8}),
    (["--no-labels"], {"labels": False}),
    (["--no-outlines"], {"outlines": False}),
    (["--legend"], {"legend": True}),
]


@pytest.mark.parametrize("options, style", STYLES)
def test_overlays_of_predict(truth, weights, tmp_path, options, style):
    """The file is the picture of `overlay` with this style, up to JPEG."""
    assert predict(truth, weights, tmp_path, *options) == 0
    content = read_panoptic_json(tmp_path / "panoptic.json")
    annotation = content["annotations"][0]
    id_map = read_id_map(tmp_path / "panoptic" / annotation["file_name"])
    image = read_image(truth / "images" / content["images"][0]["file_name"])
    arguments = (image, id_map, annotation["segments_info"], content["categories"])
    assert annotation["segments_info"]
    drawn = read_image(tmp_path / "overlays" / "000001.jpg").astype(int)
    expected = overlay(*arguments, **style)
    assert drawn.shape == expected.shape and np.abs(drawn - expected).mean() < 4
    if style:
        other = overlay(*arguments)
        assert drawn.shape != other.shape or np.abs(drawn - other).mean() > 1.5 * np.abs(drawn - expected).mean()


@pytest.mark.parametrize("options, style", STYLES[1:])
def test_pictures_of_visualize(truth, tmp_path, options, style):
    """Ground truth in another style is another picture; with a legend the panels keep one height."""
    command = ["visualize", str(truth / "images" / "000001.jpg"), "--ground-truth", str(truth / "panoptic.json")]
    for folder, arguments in (("plain", []), ("styled", options)):
        assert main([*command, *arguments, "--output", str(tmp_path / folder)]) == 0
    plain, styled = (read_image(tmp_path / folder / "pictures" / "000001.jpg") for folder in ("plain", "styled"))
    assert plain.shape[1] == styled.shape[1]
    assert (styled.shape[0] > plain.shape[0]) if style.get("legend") else (styled != plain).any()
    assert (styled[60:200, :440] == plain[60:200, :440]).all()  # the photograph


@pytest.mark.parametrize("command", ["predict", "visualize"])
@pytest.mark.parametrize(
    "options, message",
    [
        (["--opacity", "2"], "--opacity must lie in [0, 1], got 2"),
        (["--opacity", "nan"], "--opacity must lie in [0, 1], got nan"),
        (["--contact-sheet", "0"], "--contact-sheet must be from 1 to 100, got 0"),
        (["--contact-sheet", "101"], "--contact-sheet must be from 1 to 100, got 101"),
    ],
)
def test_values_out_of_range(truth, tmp_path, capsys, command, options, message):
    inputs = ["--config", "tiny"] if command == "predict" else ["--ground-truth", str(truth / "panoptic.json")]
    assert main([command, str(truth / "images"), *inputs, *options, "--output", str(tmp_path / "out")]) == 2
    assert error_messages(capsys) == [message] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--contact-sheet", "2"], ["--legend"], ["--opacity", "0.2"], ["--no-labels"]])
def test_options_without_overlays_are_refused(truth, weights, tmp_path, capsys, options):
    assert predict(truth, weights, tmp_path / "out", "--no-overlay", *options) == 2
    (message,) = error_messages(capsys)
    assert message.endswith("are for overlay pictures, which --no-overlay excludes")


def test_an_interrupted_run_keeps_its_style(truth, weights, tmp_path, capsys, monkeypatch):
    """A run that continues another one in another style is refused, as it would mix the styles."""
    from spatialflow.cli.prediction_folder import PredictionFolder

    real, count = PredictionFolder.add, []

    def add(self, *arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as context:
        context.setattr(PredictionFolder, "add", add)
        assert predict(truth, weights, tmp_path, "--legend") == 130
    error_messages(capsys)
    assert predict(truth, weights, tmp_path) == 2
    assert "overlay legend True -> False" in error_messages(capsys)[0]
    assert predict(truth, weights, tmp_path, "--legend") == 0


class TestContactSheet:
    def test_predict_and_visualize_write_it(self, truth, weights, tmp_path):
        assert predict(truth, weights, tmp_path / "a", "--contact-sheet", "2") == 0
        sheet = read_image(tmp_path / "a" / "contact_sheet.jpg")
        assert sheet.shape[1] == 2 * 320 + 6
        command = ["visualize", str(truth / "images"), "--ground-truth", str(truth / "panoptic.json")]
        for _ in range(2):  # an earlier sheet in the output folder is no photograph
            assert main([*command, "--contact-sheet", "9", "--output", str(tmp_path / "b")]) == 0
        assert read_image(tmp_path / "b" / "contact_sheet.jpg").shape[1] == 960

    def test_pictures_at_even_distances(self, tmp_path):
        """Of pictures of 10 grays, a sheet of 4 shows numbers 0, 2, 5 and 7, in lines."""
        pictures = []
        for number in range(10):
            pictures.append((f"{number}.png", tmp_path / f"{number}.png"))
            cv2.imwrite(str(pictures[-1][1]), np.full((30, 40, 3), 25 * number, np.uint8))
        sheet = read_image(write_contact_sheet(tmp_path, pictures, 4))
        height = (sheet.shape[0] - 18) // 2
        shown = [sheet[26 + line * (height + 18) + 50, 100 + column * 326, 0] for line in (0, 1) for column in (0, 1)]
        np.testing.assert_allclose(shown, [0, 50, 125, 175], atol=3)
        write_contact_sheet(tmp_path, pictures[:1], 4)
        shutil.rmtree(tmp_path)

    def test_sizes_may_differ(self):
        pictures = [
            np.full((10, 40, 3), 9, np.uint8),
            np.full((50, 20, 3), 99, np.uint8),
            np.zeros((1, 1, 3), np.uint8),
        ]
        sheet = thumbnails((("name", picture) for picture in pictures), 2, 100)
        assert sheet.shape[1] == 206 and (sheet[30, 50] == 9).all() and (sheet[100, 110] == 99).all()
        with pytest.raises(ValueError, match="pictures must be one or more"):
            thumbnails([], 2)


def test_a_sheet_of_an_earlier_run_is_removed(truth, weights, tmp_path):
    assert predict(truth, weights, tmp_path, "--contact-sheet", "2") == 0
    assert (tmp_path / "contact_sheet.jpg").is_file()
    assert predict(truth, weights, tmp_path) == 0
    assert not (tmp_path / "contact_sheet.jpg").exists()


def test_a_sheet_shows_frames_of_a_video(truth, weights, tmp_path, capsys):
    """The frames of a video are pictures too; a legend would change their sizes."""
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 64))
    for name in ("000001", "000002", "000003"):
        writer.write(read_image(truth / "images" / f"{name}.jpg"))
    writer.release()
    command = ["predict", str(tmp_path / "clip.avi"), "--checkpoint", str(weights), "--output", str(tmp_path / "out")]
    assert main([*command, *FAST, "--legend"]) == 2
    assert "--legend is for images: the pictures of a video must have one size" in error_messages(capsys)[-1]
    assert main([*command, *FAST, "--contact-sheet", "4"]) == 0
    assert read_image(tmp_path / "out" / "contact_sheet.jpg").shape[1] == 2 * 320 + 6
