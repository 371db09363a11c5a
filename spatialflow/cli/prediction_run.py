# SPDX-License-Identifier: Apache-2.0
"""The loops of `spatialflow predict` over images and over the frames of videos."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import format_error, print_error
from spatialflow.cli.input_images import InputImage
from spatialflow.cli.prediction_folder import PredictionFolder, writers

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from tqdm import tqdm

    from spatialflow.engine.predict import Predictor
    from spatialflow.video import Video, VideoWriter


class PredictionRun:
    """Predicts and writes images and videos; an image that cannot be read or written is reported and skipped.

    Args:
        predictor: predicts.
        output: entered before the methods are called.
        failed: receives messages about images that cannot be read or written; they are printed too.
        every: step between the frames of a video.
        limit: largest number of frames of a video; None: no limit.

    Attributes:
        times: total seconds by stage.
        count: images and frames done by this run.
    """

    def __init__(
        self, predictor: Predictor, output: PredictionFolder, failed: list[str], every: int, limit: int | None
    ) -> None:
        self._predictor, self._output, self.failed = predictor, output, failed
        self._every, self._limit = every, limit
        self.times: dict[str, float] = {}
        self.count = 0

    def predict_images(self) -> None:
        """Predict the images that are not done."""
        images, done = self._output.images, set(self._output.done)
        remaining = [image for image in images if image.name not in done]
        if not images:
            return
        with (
            _bar("predict", "image", len(images), len(done)) as bar,
            contextlib.closing(self._predictor.outcomes([image.path for image in remaining])) as outcomes,
            contextlib.closing(
                self._output.add_all(remaining, outcomes, writers(self._predictor.device.type))
            ) as files,
        ):
            for image, written in zip(remaining, files, strict=True):
                self._finish(image, written)
                bar.update()

    def predict_video(self, video: InputImage, camera: int | None = None) -> None:
        """Predict the frames of a video that are not done, and write its overlay video.

        After an error or an interrupt, the overlay video has the frames before it.

        Args:
            video: the file, or the name of the camera.
            camera: number of the camera.
        """
        from spatialflow.video import Video, VideoError, VideoWriter

        try:
            source = Video(video.path if camera is None else camera)
        except VideoError as error:
            self._fail(error, video)
            return
        pictures = _OverlayVideo(
            self._output, VideoWriter(self._output.overlay_video(video), source.rate / self._every)
        )
        try:
            self._predict_frames(video, source, pictures)
        except VideoError as error:
            self._fail(error, video)
        finally:
            source.close()
            pictures.close()
            if pictures.error is not None:
                self._fail(pictures.error, video)

    def _predict_frames(self, video: InputImage, source: Video, pictures: _OverlayVideo) -> None:
        predicted, running = deque[InputImage](), deque[InputImage]()  # frames without and with an outcome

        def frames() -> Iterator[np.ndarray]:
            for number in source.positions(self._every, self._limit):
                frame = video.frame(number)
                pictures.frames.append(frame)
                if self._output.begin_frame(frame):
                    bar.update()
                else:
                    predicted.append(frame)
                    yield source.decode()

        def frames_with_outcome() -> Iterator[InputImage]:
            while predicted:
                running.append(predicted.popleft())
                yield running[-1]

        total = None if source.count is None else -(-source.count // self._every)
        if self._limit is not None and (total is None or self._limit < total):
            total = self._limit
        with (
            _bar(video.name, "frame", total) as bar,
            contextlib.closing(self._predictor.outcomes(frames())) as outcomes,
            contextlib.closing(
                self._output.add_all(frames_with_outcome(), outcomes, writers(self._predictor.device.type))
            ) as files,
        ):
            for written in files:
                frame = running.popleft()
                self._finish(frame, written)
                bar.update()
                pictures.add_until(frame)

    def _finish(self, image: InputImage, written: Future[dict[str, float]]) -> None:
        """Wait until the files of an image are written."""
        from spatialflow.images import ImageError
        from spatialflow.panoptic import PanopticFormatError

        try:
            for stage, seconds in written.result().items():
                self.times[stage] = self.times.get(stage, 0.0) + seconds
            self.count += 1
        except (ImageError, PanopticFormatError, OSError) as error:
            self._fail(error, image)

    def _fail(self, error: Exception, image: InputImage) -> None:
        """Print a message; it names what the user named, not a temporary file."""
        from tqdm import tqdm

        self.failed.append(image.named(format_error(error)))
        with tqdm.external_write_mode(file=sys.stderr):
            print_error(self.failed[-1])


class _OverlayVideo:
    """Collects the overlay pictures of frames in a video.

    Args:
        output: has the pictures.
        writer: writes the video.

    Attributes:
        frames: frames that are not in the video, in order.
        error: why the video could not be written; None if there was no error.
    """

    def __init__(self, output: PredictionFolder, writer: VideoWriter) -> None:
        self._output, self._writer = output, writer
        self.frames: deque[InputImage] = deque()
        self.error: Exception | None = None

    def add_until(self, last: InputImage | None = None) -> None:
        """Add the frames up to `last`, those that have a picture. None: all frames."""
        from spatialflow.images import ImageError, read_image

        while self.frames:
            frame = self.frames.popleft()
            path = self._output.overlay_of(frame)
            if path is not None and self.error is None:
                try:
                    self._writer.add(read_image(path))
                except ImageError as error:  # of the picture or of the video
                    self.error = error
            if frame is last:
                return

    def close(self) -> None:
        """Add all frames, and complete the video."""
        from spatialflow.video import VideoError

        try:
            self.add_until()
            path = self._writer.close()
        except VideoError as error:
            self.error = self.error or error
            return
        if path is not None:
            self._output.add_overlay_video(path)


def _bar(text: str, unit: str, total: int | None, done: int = 0) -> tqdm[Any]:
    """Make a progress bar, which is shown on a terminal."""
    from tqdm import tqdm

    return tqdm(desc=text, unit=unit, total=total, initial=done, disable=None)
