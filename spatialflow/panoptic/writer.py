# SPDX-License-Identifier: Apache-2.0
"""Writer of results in the COCO panoptic format, with a journal from which a killed run resumes."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from spatialflow.files import atomic_write
from spatialflow.panoptic.colors import color_ids
from spatialflow.panoptic.extents import ids_of
from spatialflow.panoptic.formats import write_id_map
from spatialflow.panoptic.journal import Journal, dumps
from spatialflow.panoptic.rules import VOID, PanopticFormatError


class _Entry(NamedTuple):
    """One image in the journal."""

    offset: int  # of its row, in bytes
    image_id: int | str
    png_name: str
    png_bytes: int
    photograph: list[int] | None  # size and time of modification
    path: str | None  # of the photograph
    restored: bool  # from an earlier run


def panoptic_row(
    image_id: int | str, image_name: str, png_name: str, id_map: np.ndarray, segments: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Make the rows of one image for a panoptic JSON: `image` for "images", `annotation` for "annotations".

    Args:
        image_id: as for `PanopticWriter.add`.
        image_name: as for `PanopticWriter.add`.
        png_name: path of the PNG relative to the folder of PNGs.
        id_map: as for `PanopticWriter.add`.
        segments: as for `PanopticWriter.add`.

    Raises:
        PanopticFormatError: the format does not allow an argument, or segments and map disagree.
    """
    if isinstance(image_id, bool) or not isinstance(image_id, int | np.integer | str):
        raise PanopticFormatError(f"{image_name}: image_id must be an integer or a string, got {image_id!r:.60}")
    if np.ndim(id_map) != 2:
        raise PanopticFormatError(f"image {image_id}: id_map must have shape (H, W), got {np.shape(id_map)}")
    path = PurePosixPath(png_name)
    if path.is_absolute() or ".." in path.parts:
        raise PanopticFormatError(f"image {image_id}: png_name must be a path inside the folder, got {png_name!r:.80}")
    segments = [dict(segment) for segment in segments]
    for segment in segments:
        for field in ("id", "category_id"):
            value = segment.get(field)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                rule = f"a segment's {field} must be an integer, got {value!r:.60}"
                raise PanopticFormatError(f"image {image_id}: {rule}")
    listed = [segment["id"] for segment in segments]
    present = set(ids_of(id_map).tolist()) - {VOID}
    if len(set(listed)) != len(listed) or set(listed) != present:
        raise PanopticFormatError(
            f"image {image_id}: segments must list every id of the map once: map {sorted(present)}, listed {listed}"
        )
    height, width = np.shape(id_map)
    return {
        "image": {"id": image_id, "file_name": image_name, "height": int(height), "width": int(width)},
        "annotation": {"image_id": image_id, "file_name": png_name, "segments_info": segments},
    }


def earlier_files(json_path: Path, info: Mapping[str, Any]) -> tuple[list[Path], list[Path]]:
    """Find the JSON and the journal that a writer would replace.

    An empty file is ignored. A file that ends within the expected beginning also matches, since a power failure may
    have truncated a journal there.

    Returns:
        The files of earlier writers with this `info`, and all other files, folders and broken links at these paths.
    """
    beginning = _beginning(info).encode()
    matching: list[Path] = []
    unrelated: list[Path] = []
    for path in (json_path, _journal_path(json_path)):
        if os.path.isfile(path):
            with open(path, "rb") as stream:
                content = stream.read(len(beginning))
            if content:
                (matching if beginning.startswith(content) else unrelated).append(path)
        elif os.path.lexists(path):  # a folder, or a link that leads nowhere
            unrelated.append(path)
    return matching, unrelated


def _journal_path(json_path: Path) -> Path:
    return json_path.with_name(f"{json_path.stem}.journal.jsonl")


def _beginning(info: Mapping[str, Any]) -> str:
    return f'{{"info": {dumps(info)}, '


class PanopticWriter:
    """Write results of many images to a folder of PNGs and one panoptic JSON.

    Use it as a context manager: the JSON is written at the end of the block, also after an exception, so that completed
    images stay usable. Segments may have any JSON-serializable field beside id and category_id.

    In its first `with` block, or with `resume`, the writer appends each image's segments to a journal right after it
    writes the PNG. The journal is beside the JSON: `panoptic.journal.jsonl` for `panoptic.json`. A process that is
    killed loses the current image at most. After a power failure, a resumed run does the images again that were not
    synced to disk. The journal is removed at the end of the block, unless an exception ended the block. While one
    process writes a journal, no other process can write it. Without `with` and `resume` there is no journal, and
    `write_json` saves the results.

    Several threads may call `add` at once: PNGs are encoded and written in parallel, rows of the journal one after the
    other. Call all other methods from one thread only, and not while a thread runs `add`.

    Args:
        folder: of the PNGs; created for the first result.
        json_path: the JSON file; by default the folder's name with ".json" appended, as panopticapi expects.
        categories: copied into the JSON, if given.
        info: first field of the JSON and of the journal.
        detections_path: file of the COCO results from `add`; None writes none.
        settings: JSON-serializable values that determine the results, such as thresholds and a hash of the weights.
        resume: continue the journal of an earlier run, see `is_done`; False replaces it.
        colors: write ids that are colors of the categories, as COCO's are, instead of the ids given; see `color_ids`.

    Raises:
        ResumeError: the journal to resume was written with other settings or categories.
        InUseError: another process is writing the journal; also raised by `with` and by the first `add`.
        ValueError: settings, info or categories cannot be written as JSON.
        OSError: the journal to resume cannot be read.

    Example:
        >>> with PanopticWriter("out/panoptic", settings={"score": 0.5}, resume=True) as writer:  # doctest: +SKIP
        ...     for image_id, path in enumerate(paths):
        ...         if not writer.is_done(image_id, path.name, path):
        ...             writer.add(image_id, path.name, *predict(path), photograph=path)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        json_path: str | os.PathLike[str] | None = None,
        categories: Iterable[Mapping[str, Any]] | None = None,
        *,
        info: Mapping[str, Any] | None = None,
        detections_path: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        colors: bool = False,
    ) -> None:
        self.folder = Path(folder)
        if json_path is None:
            named_folder = self.folder.resolve() if self.folder.name in ("", "..") else self.folder  # "." has no name
            json_path = named_folder.parent / f"{named_folder.name}.json"
        self.json_path = Path(json_path)
        self.detections_path = None if detections_path is None else Path(detections_path)
        self._info = info
        self._colors = colors
        self._categories = None if categories is None else [dict(category) for category in categories]
        self._entries: dict[str, _Entry] = {}  # image name -> location of its row, and its files
        self._taken: dict[tuple[str, int | str], str] = {}  # id, PNG or name (`_keys`) -> name of its image
        self._writing: dict[tuple[str, int | str], str] = {}  # the same for images without a row yet
        self._lock = threading.Lock()  # for the three dictionaries above and the journal
        categories_hash = hashlib.sha256(dumps(self._categories).encode()).hexdigest()[:16]
        header: dict[str, Any] = {} if info is None else {"info": info}
        header |= {"category table": categories_hash, "settings": {**(settings or {})}}
        self._journal = Journal(_journal_path(self.json_path), header, is_named=resume)
        if resume:
            for offset, row in self._journal.restore():
                try:
                    entry = _entry(offset, row, restored=True)
                except (KeyError, TypeError):  # not a row of this class: this image and later ones are done again
                    break
                self._register(entry, row)

    def __len__(self) -> int:
        """Number of images added, including those of an earlier run."""
        return len(self._entries)

    def is_done(self, image_id: int | str, image_name: str, photograph: str | os.PathLike[str] | None = None) -> bool:
        """Return whether the image was added, its PNG is complete, and the photograph has not changed since.

        Args:
            image_id: as for `add`.
            image_name: as for `add`.
            photograph: as for `add`. Photographs are compared by size and modification time.
        """
        entry = self._entries.get(image_name)
        if entry is None or entry.image_id != image_id:
            return False
        png = file_stamp(self.folder / entry.png_name)
        return png is not None and png[0] == entry.png_bytes and entry.photograph == file_stamp(photograph)

    def add(
        self,
        image_id: int | str,
        image_name: str,
        id_map: np.ndarray,
        segments: Iterable[Mapping[str, Any]],
        *,
        png_name: str | None = None,
        detections: Iterable[Mapping[str, Any]] = (),
        photograph: str | os.PathLike[str] | None = None,
        image_fields: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the PNG and the segments of one image.

        Args:
            image_id: the image's id in the data set.
            image_name: file name of the photograph.
            id_map: (H, W) integer segment ids, 0 for void.
            segments: mappings with at least `id` and `category_id`; every id of the map once, and no other. With
                `colors`, other ids are written.
            png_name: path of the PNG inside the folder; by default the stem of `image_name` with ".png".
            detections: COCO results of the image.
            photograph: the file, which `is_done` checks for changes.
            image_fields: further fields of the image's row in "images".

        Returns:
            Path of the PNG.

        Raises:
            PanopticFormatError: the format forbids an argument; segments and map disagree; a value cannot be written as
                JSON; or another image of this run has the same name, id or PNG. An image of an earlier run is replaced.
            InUseError: another process is writing the journal; no file was changed.
            OSError: a file cannot be written; no file of the image is left.
        """
        png_name = png_name or f"{Path(image_name).stem}.png"
        row = {
            **panoptic_row(image_id, image_name, png_name, id_map, segments),
            "detections": list(detections),
            "photograph": file_stamp(photograph),
            "path": None if photograph is None else os.path.abspath(photograph),
        }
        row["image"] |= image_fields or {}
        if self._colors:
            annotation = row["annotation"]
            id_map, annotation["segments_info"] = color_ids(id_map, annotation["segments_info"], self._categories)
        path = self.folder / png_name
        with self._reserved(row):
            write_id_map(path, id_map)
            try:
                with self._lock:
                    self._append({**row, "png_bytes": path.stat().st_size})
            except BaseException as error:  # also for an interrupt: the PNG would have no row
                path.unlink(missing_ok=True)
                if isinstance(error, ValueError | TypeError):  # raised by `json`
                    raise PanopticFormatError(f"image {image_id}: cannot be written as JSON: {error}") from None
                raise
        with self._lock:
            self._journal.sync_later(path)
        return path

    def left_out(self, image_names: Iterable[str]) -> list[str]:
        """List images of this and earlier runs that are not in `image_names` and whose photographs exist."""
        names = set(image_names)
        remaining = ((name, entry.path) for name, entry in self._entries.items() if name not in names)
        return [name for name, path in remaining if path is not None and os.path.isfile(path)]

    def rows(self, image_names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Read the rows of the journal, for `extend`: `image`, `annotation` and `detections` of each image.

        Args:
            image_names: images in order; those that were not added are skipped. None: all in the order of `add`, those
                of an earlier run first.
        """
        names = self._entries if image_names is None else (name for name in image_names if name in self._entries)
        return self._journal.rows([self._entries[name].offset for name in names])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add images that another writer, for instance of another process, has added to the same folder.

        Args:
            rows: the result of the other writer's `rows`.

        Raises:
            PanopticFormatError: an image of the same name, id or PNG exists; or a row is not one of `rows`.
        """
        for row in rows:
            try:
                _entry(0, row, restored=False)
            except (KeyError, TypeError):
                raise PanopticFormatError(f"a row must be one of another writer's `rows`, got {row!r:.80}") from None
            self._check_free(row)
            self._append(row)

    def write_json(
        self, image_names: Iterable[str] | None = None, further_fields: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the JSON, and the detections, of all images added so far; the journal stays.

        Args:
            image_names: images in order, as for `rows`.
            further_fields: JSON-serializable fields of the JSON beside "images", "annotations" and "categories".

        Returns:
            Path of the JSON.

        Raises:
            OSError: a file cannot be written.
        """
        names = None if image_names is None else list(image_names)
        with atomic_write(self.json_path, "w") as stream:
            stream.write("{" if self._info is None else _beginning(self._info))
            stream.write('"images": ')
            _write_list(stream, (row["image"] for row in self.rows(names)))
            stream.write(', "annotations": ')
            _write_list(stream, (row["annotation"] for row in self.rows(names)))
            if self._categories is not None:
                stream.write(f', "categories": {dumps(self._categories)}')
            for key, value in (further_fields or {}).items():
                stream.write(f", {dumps(key)}: {dumps(value)}")
            stream.write("}")
            _sync(stream)
        if self.detections_path is not None:
            with atomic_write(self.detections_path, "w") as stream:
                _write_list(stream, (result for row in self.rows(names) for result in row["detections"]))
                _sync(stream)
        return self.json_path

    def close(self, keep_journal: bool = False) -> None:
        """Close the journal.

        Args:
            keep_journal: keep the journal for a run that resumes it; False deletes it, as the results are in the JSON
                or not needed.
        """
        if keep_journal:
            self._journal.close()
        else:
            self._journal.remove()

    def __enter__(self) -> "PanopticWriter":
        self._journal.use_named_file()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.write_json()
        finally:
            self.close(keep_journal=kind is not None)

    @contextlib.contextmanager
    def _reserved(self, row: Mapping[str, Any]) -> Iterator[None]:
        """Reserve the id, the PNG and the name of an image during the block."""
        with self._lock:
            self._check_free(row)
            self._journal.claim()
            self._writing |= dict.fromkeys(_keys(row), row["image"]["file_name"])
        try:
            yield
        finally:
            with self._lock:
                for key in _keys(row):
                    del self._writing[key]

    def _append(self, row: Mapping[str, Any]) -> None:
        self._register(_entry(self._journal.append(row), row, restored=False), row)

    def _register(self, entry: _Entry, row: Mapping[str, Any]) -> None:
        for key in _keys(row):
            self._forget(self._taken.get(key))
        name = row["image"]["file_name"]
        self._taken |= dict.fromkeys(_keys(row), name)
        self._entries[name] = entry

    def _forget(self, name: str | None) -> None:
        """Remove an image that another one replaces."""
        if name is None or name not in self._entries:
            return
        entry = self._entries.pop(name)
        for key in (("id", entry.image_id), ("PNG", entry.png_name), ("name", name)):
            del self._taken[key]

    def _check_free(self, row: Mapping[str, Any]) -> None:
        for key in _keys(row):
            owner = self._writing.get(key)
            if owner is None and key in self._taken and not self._entries[self._taken[key]].restored:
                owner = self._taken[key]
            if owner is not None:
                kind, value = key
                name = row["image"]["file_name"]
                raise PanopticFormatError(f"{name}: the {kind} {value} is already used by {owner}")


def _entry(offset: int, row: Mapping[str, Any], restored: bool) -> _Entry:
    """Make the entry of a row; KeyError or TypeError for an object that is not a row of `PanopticWriter.rows`."""
    annotation = row["annotation"]
    set(_keys(row)), row["detections"]
    return _Entry(
        offset,
        annotation["image_id"],
        annotation["file_name"],
        row["png_bytes"],
        row["photograph"],
        row["path"],
        restored,
    )


def _keys(row: Mapping[str, Any]) -> list[tuple[str, int | str]]:
    """Return the id, the PNG and the name of an image, each unique among the images of a writer."""
    annotation = row["annotation"]
    return [("id", annotation["image_id"]), ("PNG", annotation["file_name"]), ("name", row["image"]["file_name"])]


def file_stamp(path: str | os.PathLike[str] | None) -> list[int] | None:
    """Return size in bytes and modification time in ns; None if there is no path or the file cannot be found."""
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        return None
    return None if status is None else [status.st_size, status.st_mtime_ns]


def _write_list(stream: IO[str], items: Iterable[Any]) -> None:
    """Write a JSON list item by item, so that it need not fit in memory."""
    stream.write("[")
    for index, item in enumerate(items):
        stream.write(f"{', ' if index else ''}{dumps(item)}")
    stream.write("]")


def _sync(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
