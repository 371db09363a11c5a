# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: JSON lines on disk, written by one process at a time, from which the next run goes on."""

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


class ResumeError(ValueError):
    """A journal cannot be used: its run had other settings, which the message names, or is still running."""


class InUseError(ResumeError):
    """Another process is writing the journal."""


class Journal:
    """JSON lines on disk, appended one by one; the first says what run they belong to.

    Args:
        path: the file; created by `claim`, with its first line. The first `append` replaces what an older one holds,
            unless that was restored.
        about: JSON-able, equal for runs that may go on from each other.
        named: False for a file without a name, which ends with the process: no run goes on from it.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], named: bool):
        self.path = path
        self._stream: IO[bytes] | None = None  # as long as it is open, no other process gets the file
        self._named = named
        self._about = json.loads(dumps(about))
        self._restored = 0  # bytes of complete lines that are kept
        self._begun = False  # it holds the first line, and after it nothing but what is kept
        self._has_lines = False
        self._syncing: Future | None = None
        self._unsynced: list[Path] = []
        self._thread = ThreadPoolExecutor(1)  # starts no thread before its first task

    def restore(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offset and content of the lines an earlier run left, up to the first one that is not complete.

        Raises:
            ResumeError: that run was another, or has not ended.
        """
        if not os.path.isfile(self.path):
            return
        self.claim()
        with open(self.path, "rb") as stream:
            about = _loads(stream.readline())
            if about is None:  # not even the first line was written
                return
            first = stream.tell()
            if about != self._about:
                if _loads(stream.readline()) is None:  # no image was done
                    return
                self.close()
                before, now = _flat(about), _flat(self._about)
                changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
                raise ResumeError(
                    f"{self.path}: belongs to a run with other settings that did not end: "
                    + ", ".join(f"{key} {before.get(key)!r:.60} -> {now.get(key)!r:.60}" for key in changed)
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
        """Writes a line and returns its offset. Where that fails, the file ends as it did before."""
        self.claim()
        if not self._begun:
            self._begin()
        offset = self._stream.seek(0, os.SEEK_END)
        try:
            _write(self._stream, row)
        except BaseException:
            self._stream.truncate(offset)
            raise
        self._has_lines = True
        return offset

    def _begin(self) -> None:
        self._stream.truncate(self._restored)
        if self._named and not self._restored:
            _write(self._stream, self._about)
            _bring_files_to_disk([self.path, self.path.parent])  # a PNG must not be there without it
        self._begun = True

    def give_name(self) -> None:
        """Makes it a file with a name, for this process alone, unless something was appended already."""
        if not self._named and not self._has_lines:
            if self._stream is not None:
                self._stream.close()
            self._stream, self._named, self._begun = None, True, False
        self.claim()

    def claim(self) -> None:
        """Opens the file, and creates it where there is none. Otherwise its content stays as it is.

        Raises:
            InUseError: another process, or another writer of this one, has it open.
            ResumeError: it was closed, and another run has removed it since.
        """
        if self._stream is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._locked() if self._named else tempfile.TemporaryFile(buffering=0, dir=self.path.parent)
        if os.fstat(self._stream.fileno()).st_size == 0:
            try:
                if self._has_lines:
                    raise ResumeError(f"{self.path}: was removed by another run, with the images in it")
                self._restored = 0
                self._begin()
            except BaseException:
                self.close()
                raise

    def _locked(self) -> IO[bytes]:
        while True:
            stream = open(self.path, "ab", buffering=0)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                raise InUseError(f"{self.path}: is being written by another process") from None
            except OSError:  # a file system without locks
                return stream
            if _is_file_of(stream, self.path):
                return stream
            stream.close()  # its run has just ended and removed it

    def rows(self, offsets: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The lines at some offsets."""
        offsets = list(offsets)
        if offsets:
            with open(self.path if self._named else f"/proc/self/fd/{self._stream.fileno()}", "rb") as stream:
                for offset in offsets:
                    stream.seek(offset)
                    yield json.loads(stream.readline())

    def sync_later(self, path: Path) -> None:
        """Brings a file and the journal to the disk in the background: the next image need not wait for the disk."""
        if not self._named:
            return
        self._unsynced.append(path)
        if self._syncing is None or self._syncing.done():
            paths, self._unsynced = [*self._unsynced, self.path], []
            self._syncing = self._thread.submit(_bring_files_to_disk, paths)

    def close(self) -> None:
        """Closes the file. It stays unless it is empty, or this run has begun it and appended nothing."""
        self._wait()
        if self._stream is not None and self._named:
            is_empty = os.fstat(self._stream.fileno()).st_size == 0
            if is_empty or (self._begun and not self._has_lines):
                self.path.unlink(missing_ok=True)
                self._begun = False
            self._unlock()
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Takes the file's name away, unless another process is writing it; its lines stay readable."""
        self._wait()
        if self._named and os.path.exists(self.path):
            try:
                self.claim()
            except ResumeError:
                return
            self.path.unlink(missing_ok=True)
            self._unlock()  # a process that has opened it already sees that it is gone
        self._named = False

    def _unlock(self) -> None:
        """Lets others open it, also while a forked process still has the stream."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._stream, fcntl.LOCK_UN)

    def _wait(self) -> None:
        """Returns when no file is being brought to the disk."""
        if self._syncing is not None:
            self._syncing.result()

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _is_file_of(stream: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _write(stream: IO[bytes], content: Any) -> None:
    line = memoryview(dumps(content).encode() + b"\n")
    while line:  # an unbuffered stream may take a part
        line = line[stream.write(line) :]


def _loads(line: bytes) -> dict[str, Any] | None:
    """A complete line's content, else None."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """A journal's first line with its settings beside the rest."""
    settings = about.get("settings")
    return {**about, **(settings if isinstance(settings, dict) else {}), "settings": None}


def dumps(content: Any) -> str:
    return json.dumps(content, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    """Numpy numbers and arrays as JSON has them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _bring_files_to_disk(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        except OSError:  # a file that is gone, or a file system without fsync; the row's size tells a resumed run
            continue
