# SPDX-License-Identifier: Apache-2.0
"""Videos: frames of files and cameras, and writing of videos, through OpenCV."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # errors are exceptions here, so FFmpeg need not print them

import cv2
import numpy as np
from cv2 import videoio_registry

from spatialflow.images import ImageError

ENCODERS = (("mp4v", ".mp4"), ("MJPG", ".avi"))
"""Codes of codecs, and the suffixes of their files; the first one that OpenCV has is used."""

USUAL_RATE = 25.0
"""Frames per second of a source that does not tell."""


class VideoError(ImageError):
    """A video that cannot be read or written; the message names the file and the reason."""


class Video:
    """The frames of a video file or a camera, decoded one at a time.

    Args:
        source: a file, or the number of a camera.

    Attributes:
        name: for messages.
        rate: frames per second.
        count: number of frames as the file's header has it, which may be an estimate; None for a camera, and for a file
            without it.

    Raises:
        VideoError: the source cannot be opened.
    """

    def __init__(self, source: str | Path | int) -> None:
        self._is_camera = isinstance(source, int)
        if isinstance(source, int):
            self.name = f"camera {source}"
            with _without_messages():
                self._capture = cv2.VideoCapture(source)
            problem = "cannot be opened; is it connected, and not used by another program?"
        else:
            self.name = str(source)
            try:
                with open(source, "rb"):
                    pass
            except OSError as error:
                raise VideoError(f"{source}: cannot be read: {error.strerror}") from None
            has_ffmpeg = cv2.CAP_FFMPEG in videoio_registry.getStreamBackends()
            with _without_messages():
                self._capture = cv2.VideoCapture(os.path.abspath(source), cv2.CAP_FFMPEG if has_ffmpeg else cv2.CAP_ANY)
            problem = "is not a video that OpenCV can read, or is damaged at its beginning"
        if not self._capture.isOpened():
            raise VideoError(f"{self.name}: {problem}")
        rate, count = (self._capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.rate = rate if 0 < rate < 1000 else USUAL_RATE
        self.count = int(count) if 0 < count < 2**31 and not self._is_camera else None

    def positions(self, every: int = 1, limit: int | None = None) -> Iterator[int]:
        """Go through the video; at each position `decode` returns the frame.

        Args:
            every: step; 1 for all frames.
            limit: largest number of positions; None: no limit.

        Yields:
            Numbers of frames: 0, `every`, `2 * every`, ...

        Raises:
            VideoError: a file has no frame, or far fewer than its header says; a camera stops.
        """
        number = 0
        while limit is None or number < limit * every:
            if not self._capture.grab():
                self._check_end(number)
                return
            if number % every == 0:
                yield number
            number += 1

    def decode(self) -> np.ndarray:
        """Decode the frame at the current position, (H, W, 3) uint8 BGR, upright.

        Raises:
            VideoError: the frame is damaged.
        """
        has_frame, pixels = self._capture.retrieve()
        if not has_frame or pixels is None:
            raise VideoError(f"{self.name}: a frame cannot be decoded")
        return pixels if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)

    def close(self) -> None:
        """Close the file or the camera."""
        self._capture.release()

    def _check_end(self, number: int) -> None:
        """Raise VideoError if the video cannot end after `number` frames; headers may be wrong by a few frames."""
        if self._is_camera:
            raise VideoError(f"{self.name}: gave no frame {number}")
        if number == 0:
            raise VideoError(f"{self.name}: has no frame that can be decoded")
        if self.count is not None and number < self.count - max(2, self.count // 20):
            raise VideoError(f"{self.name}: ends at frame {number} of {self.count}: is truncated or damaged there")


class VideoWriter:
    """Writes a video to a temporary file, which gets its name when the video is closed.

    Args:
        stem: path of the file without suffix; the encoder determines the suffix.
        rate: frames per second.
    """

    def __init__(self, stem: str | Path, rate: float) -> None:
        self._stem, self._rate = Path(stem), rate
        self._writer: cv2.VideoWriter | None = None
        self._temporary, self._size, self._count = Path(), (0, 0), 0

    def add(self, pixels: np.ndarray) -> None:
        """Add a frame, (H, W, 3) uint8 BGR; one of another size than the first is resized.

        Raises:
            VideoError: OpenCV has no encoder for this size of frame, or the folder cannot be written.
        """
        if self._writer is None:
            self._open((pixels.shape[1], pixels.shape[0]))
        assert self._writer is not None
        if (pixels.shape[1], pixels.shape[0]) != self._size:
            pixels = cv2.resize(pixels, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(pixels)
        self._count += 1

    def close(self) -> Path | None:
        """Complete the video.

        Returns:
            Path of the file; None if no frame was added.

        Raises:
            VideoError: the file cannot be read again, for instance as the disk is full; it is removed.
        """
        if self._writer is None:
            return None
        self._writer.release()
        self._writer = None
        path = self._stem.with_name(f"{self._stem.name}{self._temporary.suffix}")
        try:
            check = Video(self._temporary)
            complete = check.count is None or check.count >= self._count
            check.close()
            if not complete:
                raise VideoError("")
            self._temporary.replace(path)
        except (VideoError, OSError):
            self._temporary.unlink(missing_ok=True)
            raise VideoError(f"{path}: cannot be written completely; is the disk full?") from None
        return path

    def _open(self, size: tuple[int, int]) -> None:
        try:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VideoError(f"{self._stem.parent}: cannot be written: {error.strerror}") from None
        for code, suffix in ENCODERS:
            temporary = self._stem.with_name(f".{self._stem.name}.{secrets.token_hex(4)}.tmp{suffix}")
            with _without_messages():
                writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*code), self._rate, size)
            if writer.isOpened():
                self._writer, self._temporary, self._size = writer, temporary, size
                return
            temporary.unlink(missing_ok=True)
        raise VideoError(
            f"{self._stem}: this OpenCV cannot write a video of {size[0]}x{size[1]} pixels ("
            f"{', '.join(code for code, _ in ENCODERS)})"
        )


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Keep OpenCV from printing why a source cannot be opened; an exception tells it."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
