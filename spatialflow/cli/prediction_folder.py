# SPDX-License-Identifier: Apache-2.0
"""The output folder of `spatialflow predict`."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialflow.cli.common import CommandError, as_command_errors, path_in_oserror
from spatialflow.cli.drawing_options import write_contact_sheet
from spatialflow.cli.earlier_results import EarlierResults, files_of, remove_file
from spatialflow.cli.input_images import InputImage, without_suffix
from spatialflow.cli.label_folders import RESULT_INFO, RESULTS
from spatialflow.threads import available_cores, map_ahead

if TYPE_CHECKING:
    import numpy as np

    from spatialflow.engine.predict import Outcome
    from spatialflow.engine.result import PanopticResult

WRITERS = {"cpu": 1, "cuda": 8}
"""Largest number of threads that write files, by type of device. On the CPU the network needs the cores."""

MAX_UNWRITTEN = 4
"""Largest number of images in memory whose files are not written yet, with one thread; each further thread adds one."""


class PredictionFolder:
    """Writes `panoptic.json`, `panoptic/<name>.png` and `overlays/<name>.jpg`.

    The folder has all files of an image or none of them. Several threads may write images at once; the end of the
    `with` block waits for them.

    The JSON files are written when the `with` block ends, even with an exception, so that the images done so far are
    usable. After an exception the journal of `PanopticWriter` is kept, and the next run resumes from it. The journal is
    also kept if an interrupted run did images that are not inputs of this run; `left_out` counts them.

    The results of an earlier run that has ended are deleted when the `with` block begins: all files that its
    `panoptic.json` lists, and no other. With `keep` they stay instead, and are listed with those of this run.

    Args:
        root: the output folder.
        images: all inputs. The JSON files list those that are done, in the order of `images`, then frames of videos.
        categories: copied into `panoptic.json`.
        settings: the settings that determine the results; only a run with equal settings resumes an interrupted run.
        overlays: write overlay pictures.
        style: keyword arguments of `PanopticResult.overlay` for them.
        contact_sheet: number of overlays on a contact sheet; None writes none.
        detections: write `detections.json`.
        resume: resume an interrupted run.
        keep: keep the results of earlier runs.
        videos: videos, whose frames follow by `begin_frame`.
        is_live: the input ends only by an interrupt, such as a camera; the run is complete then.

    Attributes:
        images: the inputs, with output files that differ from those of kept results.
        done: names of images that are done, and of frames once they are reached.
        frames_done: number of frames of `videos` that earlier runs did.
        earlier: names of images of an earlier run: all that `keep` keeps, or all that are deleted.

    Raises:
        CommandError: the interrupted run, or the results to keep, had other settings; another process writes to the
            folder; or a file that would be replaced is not a result of `predict`.
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
        keep: bool = False,
        videos: Sequence[InputImage] = (),
        is_live: bool = False,
        style: Mapping[str, Any] | None = None,
        contact_sheet: int | None = None,
    ) -> None:
        from spatialflow.panoptic import InUseError, PanopticFormatError, PanopticWriter, ResumeError

        self.folder, self.overlay_folder = (root / name for name in RESULTS)
        self._root, self._overlays, self._detections, self._is_live = root, overlays, detections, is_live
        self._settings, self._removes_earlier = settings, False
        self.images, self._others, self._frames = list(images), list[str](), list[str]()
        self.earlier, self.overlay_videos = set[str](), list[str]()
        self._changed: dict[str, str] = {}  # PNG by image name
        self._style, self._contact_sheet = dict(style or {}), contact_sheet
        self._frame_prefixes = tuple(f"{video.stem}/" for video in videos)
        self.left_out = 0
        self._created: list[Path] = []  # folders that this run created, the outermost first
        self._active_writes = 0
        self._write_ended = threading.Condition()
        try:
            self.replaces_results = self._check_replaced_files()
            self._earlier = EarlierResults(root, with_journal=not resume)
            self._writer = PanopticWriter(
                self.folder,
                root / "panoptic.json",
                categories,
                info=RESULT_INFO,
                settings=settings,
                resume=resume,
                colors=True,
                detections_path=root / "detections.json" if detections else None,
            )
            if keep:
                self._keep_earlier(videos)
            elif not len(self._writer):
                self.earlier, self._removes_earlier = set(self._earlier.pngs), True
        except InUseError as error:
            raise CommandError(f"{error}; use another --output") from None
        except ResumeError as error:
            raise CommandError(f"{error}; use another --output, or start over with --restart") from None
        except PanopticFormatError as error:
            raise CommandError(str(error)) from None
        except OSError as error:
            raise CommandError(f"{error.filename}: cannot be read: {error.strerror}") from None
        names = [row["image"]["file_name"] for row in self._writer.rows()] if videos else []
        self.frames_done = sum(name.startswith(self._frame_prefixes) for name in names)
        self._ids = _image_ids(self.images, self._ids_of_others())
        self.done = [image.name for image in self.images if self._is_done(image)]

    def _check_replaced_files(self) -> bool:
        """Tell whether the folder has the results of an earlier run that was completed.

        Raises:
            CommandError: the JSON or the journal was not written by `predict`, or neither exists and another file
                would be replaced.
        """
        from spatialflow.panoptic.writer import earlier_files

        results, unrelated = earlier_files(self._root / "panoptic.json", RESULT_INFO)
        if not results and not unrelated:
            unrelated = [self._root / "detections.json"] * self._detections + [*map(self._map_path, self.images)]
            unrelated += map(self._overlay_path, self.images) if self._overlays else ()
        for path in unrelated:
            if os.path.lexists(path):
                raise CommandError(f"{path}: would be replaced, and is not a result of `predict`; use another --output")
        return [path.name for path in results] == ["panoptic.json"]

    def _keep_earlier(self, videos: Sequence[InputImage]) -> None:
        """Add the results of earlier runs to the writer, and give other output files to images that have theirs.

        Results of images whose photograph has changed, or whose files are gone, are not added.
        """
        from spatialflow.panoptic.journal import changes
        from spatialflow.panoptic.writer import file_stamp

        header = json.loads(json.dumps({"settings": self._settings}))
        if self._earlier.pngs and self._earlier.settings != header["settings"]:
            different = (
                "an older version of spatialflow"
                if self._earlier.settings is None
                else f"other settings: {changes({'settings': self._earlier.settings}, header)}"
            )
            raise CommandError(
                f"{self._root}: holds results of {different}; --skip-existing keeps only results of the same settings, "
                f"so use another --output, or leave out --skip-existing, which replaces them"
            )
        listed = {row["image"]["file_name"]: row for row in self._writer.rows()}
        earlier = {row["image"]["file_name"]: row for row in self._earlier.rows()} | listed
        self._take_names(earlier)
        inputs = {image.name: image for image in self.images}
        for name, row in earlier.items():
            if name in listed:
                continue
            image = inputs.get(name) or next((v for v in videos if name.startswith(f"{v.stem}/")), None)
            overlay = files_of(self._root, without_suffix(row["annotation"]["file_name"]))[1]
            if image is None or (
                row["photograph"] == file_stamp(image.path) and (not self._overlays or os.path.isfile(overlay))
            ):
                self._writer.extend([row])
            else:
                self._changed[name] = row["annotation"]["file_name"]
        rows = {row["image"]["file_name"]: row["annotation"]["file_name"] for row in self._writer.rows()}
        self.earlier = set(rows)
        self._others = [name for name in rows if name not in inputs]
        self.overlay_videos = [name for name in self._earlier.videos if os.path.isfile(self._root / name)]
        taken = {without_suffix(rows[name]) for name in self._others}
        for index, image in enumerate(self.images):
            if image.name in rows:
                self.images[index] = image._replace(output=without_suffix(rows[image.name]))
            elif image.stem in taken:
                self.images[index] = image._replace(output=image.name)

    def _take_names(self, earlier: Mapping[str, Mapping[str, Any]]) -> None:
        """Rename inputs: as the result that their photograph has, and not as that of another photograph.

        Args:
            earlier: rows of `PanopticWriter` by image name.
        """
        name_by_path = {os.path.realpath(row["path"]): name for name, row in earlier.items() if row["path"] is not None}
        used = {image.name for image in self.images}
        for index, image in enumerate(self.images):
            name = None if image.source else name_by_path.get(os.path.realpath(image.path))
            if name is not None and name not in used:
                used.add(name)
                self.images[index] = image._replace(name=name)
                continue
            renamed = image
            while (renamed.name in earlier and _is_of_another_file(earlier[renamed.name]["path"], renamed)) or (
                renamed is not image and renamed.name in used
            ):
                renamed = renamed.with_longer_name()
            used.add(renamed.name)
            self.images[index] = renamed

    def _ids_of_others(self) -> dict[str, int | str]:
        """Map names to ids for images of earlier runs that are kept."""
        if not self.earlier or self._removes_earlier:
            return {}
        return {row["image"]["file_name"]: row["image"]["id"] for row in self._writer.rows()}

    def has_other_detections(self) -> bool:
        """Tell whether the folder, once entered, has a `detections.json` that this run does not write."""
        return not self._detections and os.path.isfile(self._root / "detections.json")

    def other_images(self) -> list[str]:
        """List the images of `earlier` that are no inputs of this run, nor frames of its videos."""
        names = {image.name for image in self.images}
        return sorted(name for name in self.earlier if name not in names and not name.startswith(self._frame_prefixes))

    @property
    def changed(self) -> int:
        """Number of images that `keep` does not keep, as the photograph or a file of the result has changed."""
        return len(self._changed)

    def begin_frame(self, frame: InputImage) -> bool:
        """List a frame of a video in the JSON files, once it is done; return whether it is done already."""
        if frame.name not in self._ids:
            self._ids[frame.name] = frame.stem
            self._frames.append(frame.name)
        is_done = self._is_done(frame)
        if is_done:
            self.done.append(frame.name)
        return is_done

    def _is_done(self, image: InputImage) -> bool:
        if self._overlays and not os.path.isfile(self._overlay_path(image)):
            return False
        return self._writer.is_done(self._ids[image.name], image.name, image.path)

    def _map_path(self, image: InputImage) -> Path:
        return files_of(self._root, image.stem)[0]

    def _overlay_path(self, image: InputImage) -> Path:
        return files_of(self._root, image.stem)[1]

    def overlay_of(self, image: InputImage) -> Path | None:
        """Return the path of the overlay picture of an image that is done; None if there is none."""
        return self._overlay_path(image) if self._overlays and self._is_done(image) else None

    def overlay_video(self, video: InputImage) -> Path:
        """Return the path of the overlay video of a video, without suffix."""
        return self.overlay_folder / video.stem

    def add_overlay_video(self, path: Path) -> None:
        """List an overlay video in `panoptic.json`."""
        name = path.relative_to(self._root).as_posix()
        if name not in self.overlay_videos:
            self.overlay_videos.append(name)

    def add_all(
        self, images: Iterable[InputImage], outcomes: Iterable[Outcome], threads: int = 1
    ) -> Generator[Future[dict[str, float]], None, None]:
        """Write the files of many images in worker threads.

        Args:
            images: one image per outcome; each is requested after its outcome.
            outcomes: the outcomes of `Predictor.outcomes`, requested in the caller's thread while fewer than
                `MAX_UNWRITTEN + threads - 1` images are not written yet.
            threads: images that are written at once, see `writers`.

        Yields:
            A future per image, in order, of the seconds by stage, including "write". The future raises ImageError for
            an image that could not be read, and OSError or PanopticFormatError for one that cannot be written.
        """
        return map_ahead(
            self._add_outcome, zip(outcomes, images, strict=True), threads, ahead=MAX_UNWRITTEN + threads - 1
        )

    def _add_outcome(self, pair: tuple[Outcome, InputImage]) -> dict[str, float]:
        (result, pixels, error), image = pair
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
                    image_fields={"path": self._relative_path(image)},
                )
        except BaseException:
            if self._overlays:
                picture.unlink(missing_ok=True)
            raise
        self.done.append(image.name)

    def _relative_path(self, image: InputImage) -> str | None:
        """Return the path of a photograph relative to the output folder, with "/"; None if no file of it stays."""
        if image.source:
            return None
        return Path(os.path.relpath(os.path.abspath(image.path), os.path.realpath(self._root))).as_posix()

    def __enter__(self) -> PredictionFolder:
        """Delete the results of an earlier run, and create the folders; without a result they are removed at the end.

        So an output path that cannot be written fails before any inference.
        """
        from spatialflow.panoptic import InUseError

        with as_command_errors():
            for folder in (self.folder, self.overlay_folder) if self._overlays else (self.folder,):
                self._created += [path for path in (*reversed(folder.parents), folder) if not os.path.lexists(path)]
                with path_in_oserror(folder):
                    folder.mkdir(parents=True, exist_ok=True)
            try:
                self._writer.__enter__()
            except InUseError as error:
                raise CommandError(f"{error}; use another --output") from None
            if self._removes_earlier:
                self._earlier.remove()
                if not self._overlays:
                    with contextlib.suppress(OSError):  # it does not exist, or has files of others
                        self.overlay_folder.rmdir()
            self._remove(self._changed)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        from spatialflow.images import ImageError

        with as_command_errors(ImageError), self._write_ended, path_in_oserror(self._root):
            self._write_ended.wait_for(lambda: self._active_writes == 0)
            names = self._names()
            done = {*self.done, *self._others}
            if done:
                listed = [name for name in names if name in done]
                self._writer.write_json(listed, {"run": self._description(listed)})
            pictures = [] if kind is not None and not self._is_live else self._overlays_of(names, done)
            left_out = self._writer.left_out(names)
            self.left_out = len(left_out)
            keeps_journal = (kind is not None and not self._is_live and len(self._writer) > 0) or self.left_out > 0
            if not keeps_journal:
                rows = ((row["image"]["file_name"], row["annotation"]["file_name"]) for row in self._writer.rows())
                self._remove({name: png for name, png in rows if name not in done})  # photographs that are gone
            self._writer.close(keep_journal=keeps_journal)
            if self._contact_sheet is not None and pictures:
                write_contact_sheet(self._root, pictures, self._contact_sheet)
            for folder in reversed(self._created) if not done else ():
                with contextlib.suppress(OSError):  # it has files
                    folder.rmdir()

    def _overlays_of(self, names: Sequence[str], done: set[str]) -> list[tuple[str, Path]]:
        """List name and overlay of the images that are done, in the order of `names`."""
        rows = self._writer.rows(name for name in names if name in done)
        pngs = [(row["image"]["file_name"], row["annotation"]["file_name"]) for row in rows]
        return [(name, files_of(self._root, without_suffix(png))[1]) for name, png in pngs]

    def _remove(self, pngs: Mapping[str, str]) -> None:
        """Delete the files of images, given by name and PNG."""
        for png in pngs.values():
            for path in files_of(self._root, without_suffix(png)):
                remove_file(path, self._root)

    def _names(self) -> list[str]:
        """List all images and frames in the order of the JSON files."""
        return list(dict.fromkeys([*(image.name for image in self.images), *self._frames, *self._others]))

    def _description(self, names: Sequence[str]) -> dict[str, Any]:
        """Describe the run in `panoptic.json`, for `EarlierResults`."""
        stamps = {row["image"]["file_name"]: row["photograph"] for row in self._writer.rows(names)}
        has_sheet = self._contact_sheet is not None or (self._earlier.has_contact_sheet and not self._removes_earlier)
        run = {"settings": self._settings, "videos": self.overlay_videos, "photographs": stamps}
        return run | {"contact_sheet": has_sheet}


def _is_of_another_file(path: str | None, image: InputImage) -> bool:
    """Tell whether a result is that of another photograph, which still exists at `path`."""
    if path is None or image.source or not os.path.exists(path) or not os.path.exists(image.path):
        return False
    return not os.path.samefile(path, image.path)


def writers(kind: str) -> int:
    """Choose the number of threads for `PredictionFolder.add_all` by type of device; leave one core to the network."""
    return max(1, min(WRITERS[kind], available_cores() - 1))


def _image_ids(images: Sequence[InputImage], kept: Mapping[str, int | str]) -> dict[str, int | str]:
    """Map image names to ids: `image_id_of`, or if several images would share that id, the path of the output.

    Args:
        images: the inputs.
        kept: name -> id of images of earlier runs, which keep their ids.
    """
    from spatialflow.panoptic.photographs import image_id_of

    ids = {image.name: kept.get(image.name, image_id_of(image.name)) for image in images}
    others = {image.name: [image.name, image.stem] for image in images if image.name not in kept}
    while True:
        count = Counter({**kept, **ids}.values())
        repeated = [name for name, image_id in ids.items() if count[image_id] > 1 and others.get(name)]
        if not repeated:
            return ids
        for name in repeated:
            ids[name] = others[name].pop()
