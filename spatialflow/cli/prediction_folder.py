# SPDX-License-Identifier: Apache-2.0
"""What `spatialflow predict` leaves in its output folder."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import InputImage, named, sentence, without_suffix
from spatialflow.errors import CommandError
from spatialflow.threads import available_cores, map_ahead

if TYPE_CHECKING:
    from spatialflow.engine.predict import Outcome, PanopticResult

WRITERS = {"cpu": 1, "cuda": 8}
"""Threads that write files, at most, by the kind of device. On the CPU the network needs the cores itself."""

HELD = 4
"""Images that `PredictionFolder.add_all` holds in memory until their files are written; one more per further thread."""

RESULTS = ("panoptic", "overlays")
"""Folders of pictures in the output folder."""

_INFO = {"description": "written by spatialflow predict"}  # no version: files of another one may be replaced


class PredictionFolder:
    """`panoptic.json`, `panoptic/<name>.png`, `overlays/<name>.jpg`; an image's files are there all or not at all.

    Several threads may write images at once; the end of the block waits for those that do.

    The JSON files are written when the `with` block ends, however it ends, so that images already done stay usable.
    The journal of `PanopticWriter` stays where it ends by an exception, and the next run goes on from it. It stays too
    where an interrupted run did images that are not among the inputs of this one: `left_out` counts them.

    Args:
        root: the output folder.
        images: all inputs; the JSON files list those that are done in this order.
        categories: copied into `panoptic.json`.
        settings: what decides the results; a run that was interrupted is resumed by one of equal settings only.
        overlays: write overlay pictures.
        detections: write `detections.json`.
        resume: go on from an interrupted run.

    Raises:
        CommandError: the interrupted run had other settings, another process writes to the folder, or a file that
            would be replaced is no result of `predict`.
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
    ) -> None:
        from spatialflow.panoptic import InUseError, PanopticWriter, ResumeError

        self.folder, self.overlay_folder = (root / name for name in RESULTS)
        self._root, self._overlays, self._detections = root, overlays, detections
        self._images, self._ids = images, _image_ids(images)
        self.left_out = 0
        self._adding = 0  # threads
        self._ended = threading.Condition()  # one of them has ended
        try:
            self.replaces = self._replaces()
            self._writer = PanopticWriter(
                self.folder,
                root / "panoptic.json",
                categories,
                info=_INFO,
                settings=settings,
                resume=resume,
                detections_path=root / "detections.json" if detections else None,
            )
        except InUseError as error:
            raise CommandError(f"{error}; use another --output") from None
        except ResumeError as error:
            raise CommandError(f"{error}; use another --output, or start over with --restart") from None
        except OSError as error:
            raise CommandError(f"{error.filename}: cannot be read: {error.strerror}") from None
        self.done = [image.name for image in images if self._is_done(image)]

    def _replaces(self) -> bool:
        """True if the folder holds the results of an earlier run that has ended.

        Raises:
            CommandError: the JSON or the journal is not of `predict`, or neither is there and another file is in the
                way.
        """
        from spatialflow.panoptic.writer import earlier_files

        own, others = earlier_files(self._root / "panoptic.json", _INFO)
        if not own and not others:
            others = [self._root / "detections.json"] * self._detections + [*map(self._map_path, self._images)]
            others += map(self._overlay_path, self._images) if self._overlays else ()
        for path in others:
            if os.path.lexists(path):
                raise CommandError(f"{path}: would be replaced, and is no result of `predict`; use another --output")
        return [path.name for path in own] == ["panoptic.json"]

    def _is_done(self, image: InputImage) -> bool:
        if self._overlays and not os.path.isfile(self._overlay_path(image)):
            return False
        return self._writer.is_done(self._ids[image.name], image.name, image.path)

    def _map_path(self, image: InputImage) -> Path:
        return self.folder / f"{without_suffix(image.name)}.png"

    def _overlay_path(self, image: InputImage) -> Path:
        return self.overlay_folder / f"{without_suffix(image.name)}.jpg"

    def add_all(self, images: Iterable[InputImage], outcomes: Iterable[Outcome], threads: int = 1) -> Iterator[Future]:
        """Writes the files of many images in threads beside the caller's.

        Args:
            images: as many as outcomes.
            outcomes: of `Predictor.outcomes`, asked for in the caller's thread. They wait while
                `HELD + threads - 1` images are not written.
            threads: images that are written at once, see `writers`.

        Yields:
            A future per image, in their order: the seconds by stage, "write" among them. It raises ImageError for an
            image that could not be read, and OSError or PanopticFormatError for one that cannot be written.
        """
        return map_ahead(self._add_outcome, zip(images, outcomes), threads, ahead=HELD + threads - 1)

    def _add_outcome(self, found: tuple[InputImage, Outcome]) -> dict[str, float]:
        image, (result, pixels, error) = found
        if error is not None:
            raise error
        begin = time.perf_counter()
        self.add(image, result, pixels)
        return result.times | {"write": time.perf_counter() - begin}

    def add(self, image: InputImage, result: PanopticResult, pixels: Any) -> None:
        """Writes the files of one image; `pixels` are those of the photograph."""
        with self._ended:
            self._adding += 1
        try:
            self._add(image, result, pixels)
        finally:
            with self._ended:
                self._adding -= 1
                self._ended.notify()

    def _add(self, image: InputImage, result: PanopticResult, pixels: Any) -> None:
        import cv2

        from spatialflow.files import atomic_write
        from spatialflow.panoptic.detection import detection_rows

        image_id, picture = self._ids[image.name], self._overlay_path(image)
        if self._overlays:
            _, data = cv2.imencode(".jpg", result.overlay(pixels))
            with named(picture), atomic_write(picture) as file:
                file.write(data)
        path = self._map_path(image)
        try:
            with named(path):
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
        """The folders are made before the first image, so that a place which cannot be written costs no prediction."""
        from spatialflow.panoptic import InUseError

        try:
            for folder in (self.folder, self.overlay_folder) if self._overlays else (self.folder,):
                with named(folder):
                    folder.mkdir(parents=True, exist_ok=True)
            self._writer.__enter__()
        except InUseError as error:
            raise CommandError(f"{error}; use another --output") from None
        except OSError as error:
            raise CommandError(sentence(error)) from None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._ended, named(self._root):
                self._ended.wait_for(lambda: self._adding == 0)
                done = set(self.done)
                if done:
                    self._writer.write_json(image.name for image in self._images if image.name in done)
                self.left_out = len(self._writer.left_out(image.name for image in self._images))
                self._writer.close(keep_journal=kind is not None or self.left_out > 0)
        except OSError as error:
            raise CommandError(sentence(error)) from None


def writers(kind: str) -> int:
    """Threads for `PredictionFolder.add_all`, by the kind of device; they leave a core to the network's thread."""
    return max(1, min(WRITERS[kind], available_cores() - 1))


def _image_ids(images: Sequence[InputImage]) -> dict[str, int | str]:
    """The id of each image by its name: see `image_id_of`; where several would share one, the name without suffix."""
    from spatialflow.engine.predict import image_id_of

    ids = {image.name: image_id_of(image.name) for image in images}
    count = Counter(ids.values())
    return {name: image_id if count[image_id] == 1 else without_suffix(name) for name, image_id in ids.items()}
