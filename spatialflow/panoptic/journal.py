# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: JSON lines on disk, written by one process at a time, from which a run resumes."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from spatialflow.files import open_locked


class ResumeError(ValueError):
    """A journal that cannot be resumed: its run had other settings, which the message names, or still runs."""


class InUseError(ResumeError):
    """Another process is writing the journal."""


class Journal:
    """JSON lines on disk; the first line identifies the run.

    Args:
        path: the file; created by `claim`, with its first line. The first `append` replaces the content of an older
            file, unless the content was restored.
        header: JSON-serializable; equal for runs that may resume each other.
        is_named: False for an unnamed temporary file, which no run can resume.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], is_named: bool) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None  # while open, it locks the file
        self._is_named = is_named
        self._header = json.loads(dumps(header))
        self._restored = 0  # bytes of the complete lines of the earlier run
        self._has_begun = False  # whether the file was truncated to its first line and the restored lines
        self._has_lines = False  # whether a line was restored or appended
        self._syncing: Future[None] | None = None
        self._unsynced: list[Path] = []
        self._thread = ThreadPoolExecutor(1)  # its thread starts with the first task

    def restore(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read the offset and the content of the lines of an earlier run, up to the first incomplete line.

        Raises:
            ResumeError: the earlier run had other settings, or still runs.
        """
        if not os.path.isfile(self.path):
            return
        self.claim()
        with open(self.path, "rb") as stream:
            header = _loads(stream.readline())
            if header is None:  # the first line is incomplete
                return
            first = stream.tell()
            if header != self._header:
                if _loads(stream.readline()) is None:  # no image was done
                    return
                self.close()
                raise ResumeError(
                    f"{self.path}: is the journal of an interrupted run with other settings: "
                    + changes(header, self._header)
                )
            self._restored = first
            for line in stream:
                row = _loads(line)
                if row is None:
                    return
                yield self._restored, row
                self._restored += len(line)
                self._has_lines = True

    def append(self, row: Mapping[str, Any]) -> int:
        """Write a line and return its offset; on failure the file is truncated to its previous end."""
        stream = self.claim()
        if not self._has_begun:
            self._begin(stream)
        offset = stream.seek(0, os.SEEK_END)
        try:
            _write(stream, row)
        except BaseException:
            stream.truncate(offset)
            raise
        self._has_lines = True
        return offset

    def _begin(self, stream: IO[bytes]) -> None:
        """Truncate the file after the restored lines, and write the first line if it is missing."""
        stream.truncate(self._restored)
        if self._is_named and not self._restored:
            _write(stream, self._header)
            _sync_to_disk([self.path, self.path.parent])  # the journal must be on disk before the first PNG
        self._has_begun = True

    def use_named_file(self) -> None:
        """Replace an unnamed file by a named and locked one, unless a line was already appended."""
        if not self._is_named and not self._has_lines:
            if self._stream is not None:
                self._stream.close()
            self._stream, self._is_named, self._has_begun = None, True, False
        self.claim()

    def claim(self) -> IO[bytes]:
        """Open and lock the file; create it if it does not exist. Existing content is not changed.

        Raises:
            InUseError: another process, or another writer of this process, has the file open.
            ResumeError: the file was closed, and another run removed it since.
        """
        if self._stream is not None:
            return self._stream
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stream = self._locked() if self._is_named else tempfile.TemporaryFile(buffering=0, dir=self.path.parent)
        self._stream = stream
        if os.fstat(stream.fileno()).st_size == 0:
            try:
                if self._has_lines:
                    raise ResumeError(f"{self.path}: was removed by another run, with the images in it")
                self._restored = 0
                self._begin(stream)
            except BaseException:
                self.close()
                raise
        return stream

    def _locked(self) -> IO[bytes]:
        try:
            return open_locked(self.path)
        except BlockingIOError:
            raise InUseError(f"{self.path}: is being written by another process") from None

    def rows(self, offsets: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Read the lines at the given offsets."""
        offsets = list(offsets)
        if offsets:
            path = self.path if self._is_named else f"/proc/self/fd/{self.claim().fileno()}"
            with open(path, "rb") as stream:
                for offset in offsets:
                    stream.seek(offset)
                    yield json.loads(stream.readline())

    def sync_later(self, path: Path) -> None:
        """Sync a file and the journal to disk in a background thread."""
        if not self._is_named:
            return
        self._unsynced.append(path)
        if self._syncing is None or self._syncing.done():
            paths, self._unsynced = [*self._unsynced, self.path], []
            self._syncing = self._thread.submit(_sync_to_disk, paths)

    def close(self) -> None:
        """Close the file; delete it if it is empty, or if this run started it and appended nothing."""
        self._wait()
        if self._stream is not None and self._is_named:
            is_empty = os.fstat(self._stream.fileno()).st_size == 0
            if is_empty or (self._has_begun and not self._has_lines):
                self.path.unlink(missing_ok=True)
                self._has_begun = False
            self._unlock()
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Unlink the file, unless another process is writing it; `rows` can still read its lines."""
        self._wait()
        if self._is_named and os.path.exists(self.path):
            try:
                self.claim()
            except ResumeError:
                return
            self.path.unlink(missing_ok=True)
            self._unlock()  # a process that opened the file before may now lock it, and sees that it is unlinked
        self._is_named = False

    def _unlock(self) -> None:
        """Release the lock, also while a forked process has the stream open."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._stream, fcntl.LOCK_UN)

    def _wait(self) -> None:
        """Wait for the background thread to finish."""
        if self._syncing is not None:
            self._syncing.result()

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _write(stream: IO[bytes], content: Any) -> None:
    line = memoryview(dumps(content).encode() + b"\n")
    while line:  # an unbuffered stream may write only a part
        line = line[stream.write(line) :]


def _loads(line: bytes) -> dict[str, Any] | None:
    """Parse a complete line; None for any other line."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the fields in which two first lines of journals differ, with both values."""
    before, now = _flat(before), _flat(now)
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(f"{key} {before.get(key)!r:.60} -> {now.get(key)!r:.60}" for key in changed)


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    """Move the settings in the first line of a journal to the top level."""
    settings = header.get("settings")
    return {**header, **(settings if isinstance(settings, dict) else {}), "settings": None}


def dumps(content: Any) -> str:
    """Serialize as JSON, numpy values included; ValueError for a number that is not finite."""
    return json.dumps(content, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    """Convert a numpy number or array to Python values; TypeError for anything else."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _sync_to_disk(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        except OSError:  # a deleted file, or a file system without fsync; a resumed run checks the size in the row
            continue
