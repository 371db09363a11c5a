# SPDX-License-Identifier: Apache-2.0
"""The output folder of `spatialflow predict`."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import CommandError, as_command_errors, path_in_oserror
from spatialflow.cli.input_images import InputImage, without_suffix
from spatialflow.threads import available_cores, map_ahead

if TYPE_CHECKING:
    import numpy as np

    from spatialflow.engine.predict import Outcome
    from spatialflow.engine.result import PanopticResult

WRITERS = {"cpu": 1, "cuda": 8}
"""Largest number of threads that write files, by type of device. On the CPU the network needs the cores."""

MAX_UNWRITTEN = 4
"""Largest number of images in memory whose files are not written yet, with one thread; each further thread adds one."""

RESULTS = ("panoptic", "overlays")
"""Folders of pictures in the output folder."""

# No version is stored, so that the command may replace files that another version of it wrote.
_INFO = {"description": "written by spatialflow predict"}


class PredictionFolder:
    """Writes `panoptic.json`, `panoptic/<name>.png` and `overlays/<name>.jpg`.

    The folder has all files of an image or none of them. Several threads may write images at once; the end of the
    `with` block waits for them.

    The JSON files are written when the `with` block ends, even with an exception, so that the images done so far are
    usable. After an exception the journal of `PanopticWriter` is kept, and the next run resumes from it. The journal is
    also kept if an interrupted run did images that are not inputs of this run; `left_out` counts them.

    Args:
        root: the output folder.
        images: all inputs. The JSON files list those that are done, in the order of `images`.
        categories: copied into `panoptic.json`.
        settings: the settings that determine the results; only a run with equal settings resumes an interrupted run.
        overlays: write overlay pictures.
        style: keyword arguments of `PanopticResult.overlay` for them.
        detections: write `detections.json`.
        resume: resume an interrupted run.

    Raises:
        CommandError: the interrupted run had other settings, another process writes to the folder, or a file that
            would be replaced is not a result of `predict`.
    """

    def __init__(
        self,
        root: Path,
        images: Sequence[InputImage],
        categories: list[dict[str, Any]],
        settings: Mapping[str, Any],
        *,
        overlays: bool,
        detections: bool,
        resume: bool,
        style: Mapping[str, Any] | None = None,
    ) -> None:
        from spatialflow.panoptic import InUseError, PanopticWriter, ResumeError

        self.folder, self.overlay_folder = (root / name for name in RESULTS)
        self._root, self._overlays, self._detections = root, overlays, detections
        self._style = dict(style or {})
        self._images, self._ids = images, _image_ids(images)
        self.left_out = 0
        self._active_writes = 0
        self._write_ended = threading.Condition()
        try:
            self.replaces_results = self._check_replaced_files()
            self._writer = PanopticWriter(
                self.folder,
                root / "panoptic.json",
                categories,
                info=_INFO,
                settings=settings,
                resume=resume,
                colors=True,
                detections_path=root / "detections.json" if detections else None,
            )
        except InUseError as error:
            raise CommandError(f"{error}; use another --output") from None
        except ResumeError as error:
            raise CommandError(f"{error}; use another --output, or start over with --restart") from None
        except OSError as error:
            raise CommandError(f"{error.filename}: cannot be read: {error.strerror}") from None
        self.done = [image.name for image in images if self._is_done(image)]

    def _check_replaced_files(self) -> bool:
        """Tell whether the folder has the results of an earlier run that was completed.

        Raises:
            CommandError: the JSON or the journal was not written by `predict`, or neither exists and another file
                would be replaced.
        """
        from spatialflow.panoptic.writer import earlier_files

        results, unrelated = earlier_files(self._root / "panoptic.json", _INFO)
        if not results and not unrelated:
            unrelated = [self._root / "detections.json"] * self._detections + [*map(self._map_path, self._images)]
            unrelated += map(self._overlay_path, self._images) if self._overlays else ()
        for path in unrelated:
            if os.path.lexists(path):
                raise CommandError(f"{path}: would be replaced, and is not a result of `predict`; use another --output")
        return [path.name for path in results] == ["panoptic.json"]

    def _is_done(self, image: InputImage) -> bool:
        if self._overlays and not os.path.isfile(self._overlay_path(image)):
            return False
        return self._writer.is_done(self._ids[image.name], image.name, image.path)

    def _map_path(self, image: InputImage) -> Path:
        return self.folder / f"{without_suffix(image.name)}.png"

    def _overlay_path(self, image: InputImage) -> Path:
        return self.overlay_folder / f"{without_suffix(image.name)}.jpg"

    def overlays_done(self) -> list[tuple[str, Path]]:
        """List name and overlay of the images that are done, in the order of the inputs."""
        done = set(self.done)
        return [(image.name, self._overlay_path(image)) for image in self._images if image.name in done]

    def add_all(
        self, images: Iterable[InputImage], outcomes: Iterable[Outcome], threads: int = 1
    ) -> Generator[Future[dict[str, float]], None, None]:
        """Write the files of many images in worker threads.

        Args:
            images: one image per outcome.
            outcomes: the outcomes of `Predictor.outcomes`, requested in the caller's thread while fewer than
                `MAX_UNWRITTEN + threads - 1` images are not written yet.
            threads: images that are written at once, see `writers`.

        Yields:
            A future per image, in order, of the seconds by stage, including "write". The future raises ImageError for
            an image that could not be read, and OSError or PanopticFormatError for one that cannot be written.
        """
        return map_ahead(
            self._add_outcome, zip(images, outcomes, strict=True), threads, ahead=MAX_UNWRITTEN + threads - 1
        )

    def _add_outcome(self, pair: tuple[InputImage, Outcome]) -> dict[str, float]:
        image, (result, pixels, error) = pair
        if error is not None:
            raise error
        assert result is not None and pixels is not None
        begin = time.perf_counter()
        self.add(image, result, pixels)
        return result.times | {"write": time.perf_counter() - begin}

    def add(self, image: InputImage, result: PanopticResult, pixels: np.ndarray) -> None:
        """Write the files of one image; `pixels` is the decoded photograph."""
        with self._write_ended:
            self._active_writes += 1
        try:
            self._add(image, result, pixels)
        finally:
            with self._write_ended:
                self._active_writes -= 1
                self._write_ended.notify()

    def _add(self, image: InputImage, result: PanopticResult, pixels: np.ndarray) -> None:
        from spatialflow.files import write_jpeg
        from spatialflow.panoptic.detection import detection_rows

        image_id, picture = self._ids[image.name], self._overlay_path(image)
        if self._overlays:
            with path_in_oserror(picture):
                write_jpeg(picture, result.overlay(pixels, **self._style))
        path = self._map_path(image)
        try:
            with path_in_oserror(path):
                self._writer.add(
                    image_id,
                    image.name,
                    result.id_map,
                    result.segments,
                    photograph=image.path,
                    png_name=path.relative_to(self.folder).as_posix(),
                    detections=detection_rows(result, image_id) if self._detections else (),
                )
        except BaseException:
            if self._overlays:
                picture.unlink(missing_ok=True)
            raise
        self.done.append(image.name)

    def __enter__(self) -> PredictionFolder:
        """Create the folders, so that an output path that cannot be written fails before any inference."""
        from spatialflow.panoptic import InUseError

        with as_command_errors():
            for folder in (self.folder, self.overlay_folder) if self._overlays else (self.folder,):
                with path_in_oserror(folder):
                    folder.mkdir(parents=True, exist_ok=True)
            try:
                self._writer.__enter__()
            except InUseError as error:
                raise CommandError(f"{error}; use another --output") from None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with as_command_errors(), self._write_ended, path_in_oserror(self._root):
            self._write_ended.wait_for(lambda: self._active_writes == 0)
            done = set(self.done)
            if done:
                self._writer.write_json(image.name for image in self._images if image.name in done)
            self.left_out = len(self._writer.left_out(image.name for image in self._images))
            self._writer.close(keep_journal=kind is not None or self.left_out > 0)


def writers(kind: str) -> int:
    """Choose the number of threads for `PredictionFolder.add_all` by type of device; leave one core to the network."""
    return max(1, min(WRITERS[kind], available_cores() - 1))


def _image_ids(images: Sequence[InputImage]) -> dict[str, int | str]:
    """Map image names to ids: `image_id_of`, or the name without suffix if several images would share that id."""
    from spatialflow.engine.result import image_id_of

    ids = {image.name: image_id_of(image.name) for image in images}
    count = Counter(ids.values())
    return {name: image_id if count[image_id] == 1 else without_suffix(name) for name, image_id in ids.items()}
