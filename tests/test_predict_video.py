# SPDX-License-Identifier: Apache-2.0
"""`predict` with videos: frames, overlay videos, interrupts, damaged files, cameras."""

import itertools
import json
import os
import signal
import time

import cv2
import numpy as np
import pytest
from helpers.command_line import FAST, error_messages
from helpers.scenes import contents

from spatialflow import video as video_module
from spatialflow.cli.main import main
from spatialflow.cli.prediction_folder import MAX_UNWRITTEN
from spatialflow.engine.predict import DECODERS, PATIENCE
from spatialflow.panoptic import read_id_map, read_panoptic_json, writer
from spatialflow.video import Video, VideoError, VideoWriter

COUNT, SIZE = 10, (80, 60)


def picture(number):
    """Return a picture whose mean increases with the number."""
    return np.full((SIZE[1], SIZE[0], 3), 20 * number % 240, np.uint8)


def write_video(path, count=COUNT, code="mp4v", rate=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, SIZE)
    assert writer.isOpened()
    for number in range(count):
        writer.write(picture(number))
    writer.release()
    return path


def frames_of(path):
    video = Video(path)
    return video, [(number, video.decode()) for number in video.positions()]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4")


@pytest.fixture
def command(weights):
    return ["predict", "--checkpoint", str(weights), *FAST, "--device", "cpu"]


@pytest.fixture(autouse=True)
def interrupts():
    """Let SIGINT interrupt these tests; a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestVideo:
    def test_frames(self, clip):
        video, frames = frames_of(clip)
        assert (video.rate, video.count) == (10, COUNT)
        assert [number for number, _ in frames] == list(range(COUNT))
        for number, pixels in frames:
            assert pixels.shape == (SIZE[1], SIZE[0], 3) and abs(pixels.mean() - 20 * number) < 5

    @pytest.mark.parametrize("every, limit, numbers", [(3, None, [0, 3, 6, 9]), (3, 2, [0, 3]), (1, 4, [0, 1, 2, 3])])
    def test_some_frames(self, clip, every, limit, numbers):
        video = Video(clip)
        assert list(video.positions(every, limit)) == numbers

    def test_a_name_with_a_pattern(self, tmp_path):
        """A file name that OpenCV could take for a sequence of images, or for another protocol."""
        for name in ("a%03d.mp4", "concat:b.mp4"):
            write_video(tmp_path / "plain.mp4").rename(tmp_path / name)
            assert len(frames_of(tmp_path / name)[1]) == COUNT

    @pytest.mark.parametrize(
        "content, reason", [(b"no video", "is not a video"), (b"", "is not a video"), (None, "No such")]
    )
    def test_no_video(self, tmp_path, capfd, content, reason):
        path = tmp_path / "x.mp4"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(VideoError, match=f"{path}: .*{reason}"):
            Video(path)
        assert capfd.readouterr().err == ""

    def test_truncated(self, tmp_path):
        path = write_video(tmp_path / "long.avi", 60, "MJPG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(VideoError, match=r"long.avi: ends at frame [1-5]\d of 60: is truncated or damaged there"):
            frames_of(path)

    def test_a_camera_that_ends(self, clip, monkeypatch):
        """A camera that is unplugged gives an error; a file of this length ends."""
        video = Video(clip)
        monkeypatch.setattr(video, "_is_camera", True)
        with pytest.raises(VideoError, match=f"gave no frame {COUNT}$"):
            list(video.positions())

    def test_no_camera(self, capfd):
        with pytest.raises(VideoError, match="camera 63: cannot be opened"):
            Video(63)
        assert capfd.readouterr().err == ""


class TestVideoWriter:
    def test_same_frames(self, tmp_path):
        writer = VideoWriter(tmp_path / "new" / "a", 7.5)
        for number in range(4):
            writer.add(picture(number))
        assert writer.close() == tmp_path / "new" / "a.mp4"
        video, frames = frames_of(tmp_path / "new" / "a.mp4")
        assert video.rate == 7.5 and len(frames) == 4 and abs(frames[3][1].mean() - 60) < 5
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]

    def test_other_sizes(self, tmp_path):
        writer = VideoWriter(tmp_path / "a", 10)
        for size in ((64, 48), (32, 48), (100, 100)):
            writer.add(np.zeros((size[1], size[0], 3), np.uint8))
        writer.close()
        assert [pixels.shape for _, pixels in frames_of(tmp_path / "a.mp4")[1]] == [(48, 64, 3)] * 3

    def test_no_frame(self, tmp_path):
        assert VideoWriter(tmp_path / "a", 10).close() is None and not any(tmp_path.iterdir())

    def test_another_encoder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(video_module, "ENCODERS", (("none", ".mp4"), ("MJPG", ".avi")))
        writer = VideoWriter(tmp_path / "a", 10)
        writer.add(picture(0))
        assert writer.close() == tmp_path / "a.avi"

    def test_no_encoder(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(video_module, "ENCODERS", (("none", ".mp4"),))
        with pytest.raises(VideoError, match="a: this OpenCV cannot write a video of 80x60 pixels .none."):
            VideoWriter(tmp_path / "a", 10).add(picture(0))
        assert not any(tmp_path.iterdir())

    def test_a_file_that_is_incomplete(self, tmp_path):
        writer = VideoWriter(tmp_path / "a", 10)
        writer.add(picture(0))
        writer._count += 1
        with pytest.raises(VideoError, match="a.mp4: cannot be written completely; is the disk full"):
            writer.close()
        assert not any(tmp_path.iterdir())


class TestPredict:
    def test_files(self, clip, command, photographs, tmp_path, capsys):
        """A video beside an image: a map and a picture per frame, an overlay video, and paths of photographs alone."""
        arguments = [
            str(clip),
            str(photographs / "plain.jpg"),
            "--every",
            "4",
            "--detections",
            "--output",
            str(tmp_path),
        ]
        assert main([*command, *arguments]) == 0
        names = ["plain.jpg", "clip/000000.png", "clip/000004.png", "clip/000008.png"]
        content = read_panoptic_json(tmp_path / "panoptic.json")
        assert [image["file_name"] for image in content["images"]] == names
        assert [image["id"] for image in content["images"]] == ["plain", *(name[:-4] for name in names[1:])]
        assert [image["path"] is None for image in content["images"]] == [False, True, True, True]
        for row in content["annotations"]:
            assert read_id_map(tmp_path / "panoptic" / row["file_name"]).shape == (60, 80)
        video, frames = frames_of(tmp_path / "overlays" / "clip.mp4")
        assert video.rate == 2.5 and len(frames) == 3
        for (_, pixels), name in zip(frames, names[1:], strict=True):
            drawn = cv2.imread(str(tmp_path / "overlays" / f"{name[:-4]}.jpg"))
            assert np.abs(pixels.astype(int) - drawn).mean() < 8
        printed = capsys.readouterr()
        files = ["panoptic.json", "panoptic/", "overlays/", "overlays/clip.mp4", "detections.json"]
        line = f"4 of 4 images done: {', '.join(f'{tmp_path}/{name}' for name in files)}"
        assert line in printed.out.splitlines()
        assert printed.err == ""

    def test_frames_are_those_of_images(self, clip, command, tmp_path):
        frames = tmp_path / "frames"
        frames.mkdir()
        for number, pixels in frames_of(clip)[1][:2]:
            cv2.imwrite(str(frames / f"{number:06d}.png"), pixels)
        assert main([*command, str(clip), "--frames", "2", "--output", str(tmp_path / "a")]) == 0
        assert main([*command, str(frames), "--output", str(tmp_path / "b")]) == 0
        for name in ("000000.png", "000001.png"):
            first = read_id_map(tmp_path / "a" / "panoptic" / "clip" / name)
            assert np.array_equal(first, read_id_map(tmp_path / "b" / "panoptic" / name))

    def test_without_overlays(self, clip, command, tmp_path):
        assert main([*command, str(clip), "--frames", "1", "--no-overlay", "--output", str(tmp_path)]) == 0
        assert not (tmp_path / "overlays").exists()

    def test_interrupted_and_resumed(self, clip, command, tmp_path, monkeypatch, capsys):
        """After Ctrl-C the frames done are in the video and the JSON; the next run predicts only the others."""
        arguments = [*command, str(clip), "--frames", "8"]
        assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
        decode, numbers, output = Video.decode, itertools.count(), tmp_path / "out"

        def stopping(video):
            if next(numbers) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return decode(video)

        capsys.readouterr()
        monkeypatch.setattr(Video, "decode", stopping)
        assert main([*arguments, "--output", str(output)]) == 130
        monkeypatch.undo()
        done = len(read_panoptic_json(output / "panoptic.json")["images"])
        assert 1 <= done <= 6 and len(frames_of(output / "overlays" / "clip.mp4")[1]) == done
        assert error_messages(capsys) == [f"interrupted: {done} images done; run the same command again for the others"]
        assert main([*arguments, "--output", str(output)]) == 0
        assert contents(output).keys() == contents(tmp_path / "whole").keys()
        assert len(frames_of(output / "overlays" / "clip.mp4")[1]) == 8
        resumed, whole = (json.loads(contents(path)["panoptic.json"]) for path in (output, tmp_path / "whole"))
        assert resumed == whole

    def test_few_frames_are_held(self, command, tmp_path, monkeypatch):
        """However slow the writing is, decoding waits for it."""
        decode, write, decoded, most = Video.decode, writer.write_id_map, [], []

        def slow(path, ids):
            time.sleep(0.1)
            most.append(len(decoded) - len(most))
            write(path, ids)

        monkeypatch.setattr(Video, "decode", lambda video: (decoded.append(0), decode(video))[1])
        monkeypatch.setattr(writer, "write_id_map", slow)
        clip = write_video(tmp_path / "clip.mp4", 40)
        assert main([*command, str(clip), "--output", str(tmp_path / "out")]) == 0
        assert len(most) == 40 and max(most) <= MAX_UNWRITTEN + 2 * DECODERS["cpu"] + 2 * PATIENCE + 1

    def test_a_truncated_video(self, command, photographs, tmp_path, capsys):
        """The frames before the damage stay; other inputs are done."""
        path = write_video(tmp_path / "long.avi", 60, "MJPG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        output = tmp_path / "out"
        arguments = [str(path), str(photographs / "dot.png"), "--every", "8", "--output", str(output)]
        assert main([*command, *arguments]) == 1
        (message,) = error_messages(capsys)
        assert message == f"{path}: ends at frame 20 of 60: is truncated or damaged there"
        names = [image["file_name"] for image in read_panoptic_json(output / "panoptic.json")["images"]]
        assert names == ["dot.png", "long/000000.png", "long/000008.png", "long/000016.png"]
        assert len(frames_of(output / "overlays" / "long.mp4")[1]) == 3

    def test_no_video(self, command, tmp_path, capsys):
        (tmp_path / "a.mp4").write_bytes(b"text")
        assert (
            main([*command, str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "--output", str(tmp_path / "out")]) == 1
        )
        assert error_messages(capsys) == [
            f"{tmp_path}/a.mp4: is not a video that OpenCV can read, or is damaged at its beginning",
            f"{tmp_path}/b.mp4: cannot be read: No such file or directory",
            "no image could be predicted",
        ]

    def test_names_that_coincide(self, clip, command, photographs, tmp_path):
        """Two videos of one name, and a folder of images of that name."""
        other = tmp_path / "in" / "clip"
        other.mkdir(parents=True)
        (other / "a.jpg").write_bytes((photographs / "dot.png").read_bytes())
        copy = write_video(tmp_path / "clip.avi", 1, "MJPG")
        inputs = [str(clip), str(copy), str(tmp_path / "in")]
        assert main([*command, *inputs, "--frames", "1", "--output", str(tmp_path / "out")]) == 0
        images = read_panoptic_json(tmp_path / "out" / "panoptic.json")["images"]
        names = [image["file_name"] for image in images]
        assert names == ["clip/a.jpg", "clip.mp4/000000.png", "clip.avi/000000.png"]

    def test_no_encoder(self, clip, command, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(video_module, "ENCODERS", (("none", ".mp4"),))
        assert main([*command, str(clip), "--frames", "2", "--output", str(tmp_path)]) == 1
        (message,) = error_messages(capsys)
        assert message.startswith(f"{tmp_path}/overlays/clip: this OpenCV cannot write a video")
        assert len(list((tmp_path / "overlays" / "clip").iterdir())) == 2

    def test_a_camera(self, clip, command, tmp_path, monkeypatch, capsys):
        """The frames of a camera until Ctrl-C; the next run starts over."""
        capture = cv2.VideoCapture

        class Camera:
            def __init__(self, source, *_):
                self.is_camera = not isinstance(source, str)
                self.plain = capture(str(clip) if self.is_camera else source)
                self.count = 0

            def grab(self):
                self.count += 1
                if self.is_camera and self.count == 6:
                    os.kill(os.getpid(), signal.SIGINT)
                return self.plain.grab()

            def __getattr__(self, name):
                return getattr(self.plain, name)

        monkeypatch.setattr(cv2, "VideoCapture", Camera)
        arguments = [*command, "--camera", "0", "--output", str(tmp_path)]
        assert main(arguments) == 130
        done = len(read_panoptic_json(tmp_path / "panoptic.json")["images"])
        assert error_messages(capsys) == [f"interrupted: {done} images done"]
        assert not (tmp_path / "panoptic.journal.jsonl").exists()
        assert len(frames_of(tmp_path / "overlays" / "camera0.mp4")[1]) == done
        assert main([*arguments, "--frames", "2"]) == 0
        names = [image["file_name"] for image in read_panoptic_json(tmp_path / "panoptic.json")["images"]]
        assert names == ["camera0/000000.png", "camera0/000001.png"]
        assert sorted(path.name for path in (tmp_path / "panoptic" / "camera0").iterdir()) == [
            "000000.png",
            "000001.png",
        ]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "no input: give images, folders or videos, or --camera 0"),
            (["a.jpg", "--camera", "0"], "--camera takes no other input, got a.jpg"),
            (["--camera", "-1"], "--camera must be at least 0, got -1"),
            (["a.mp4", "--every", "0"], "--every must be at least 1, got 0"),
            (["a.mp4", "--frames", "0"], "--frames must be at least 1, got 0"),
            (["a.jpg", "--every", "2"], "--every is for videos, and there is none"),
            (["a.jpg", "--frames", "2"], "--frames is for videos, and there is none"),
            (["--camera", "0", "--skip-existing"], "--skip-existing and --camera exclude each other"),
            (["a.jpg", "--restart", "--skip-existing"], "--skip-existing and --restart exclude each other"),
        ],
    )
    def test_wrong_options(self, command, tmp_path, capsys, arguments, message):
        assert main([*command, *arguments, "--output", str(tmp_path / "out")]) == 2
        assert error_messages(capsys) == [message]
        assert not (tmp_path / "out").exists()

    def test_visualize(self, clip, tmp_path, capsys):
        assert main(["visualize", str(clip), "--config", "tiny", "--output", str(tmp_path)]) == 2
        assert error_messages(capsys) == [f"{clip}: is a video; `visualize` shows images"]
