# SPDX-License-Identifier: Apache-2.0
"""Atomic writing of files, which a reader never sees in part, and files that one process at a time has open."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, and rename it to `path` if the block ends without an exception.

    Args:
        path: the file to create or replace; its folder is created if it is absent.
        mode: "wb" or "w" (UTF-8).

    Returns:
        A context manager for the open file. On any exception, such as that of a full disk, the temporary file is
        removed and `path` is unchanged. Several threads may write files at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the process's umask applies
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def open_locked(path: Path) -> IO[bytes]:
    """Open a file for appending, and lock it until it is closed or the process ends; create it if it does not exist.

    On a file system without locks, the file is only opened.

    Raises:
        BlockingIOError: another process, or another stream of this process, has locked the file.
        OSError: the file cannot be opened.
    """
    while True:
        stream = open(path, "ab", buffering=0)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise
        except OSError:  # a file system without locks
            return stream
        if _is_file_of(stream, path):
            return stream
        stream.close()  # the process that locked it before has removed it


def _is_file_of(stream: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = None) -> None:
    """Write `content` as JSON and a final newline.

    Args:
        path: the file to create or replace.
        content: JSON-serializable.
        indent: spaces per nesting level; None writes one line.

    Raises:
        OSError: the file cannot be written.
        TypeError: an object in `content` is not JSON-serializable.
    """
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=indent)
        file.write("\n")


def is_special_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path` is a pipe, a socket or a device, whose content may never end; False for an absent file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_jpeg(path: str | os.PathLike[str], image: np.ndarray, quality: int = 95) -> None:
    """Write an image as JPEG.

    Args:
        path: the file to create or replace.
        image: (H, W, 3) uint8 BGR.
        quality: 0 to 100.

    Raises:
        OSError: the file cannot be written.
    """
    content = encode_jpeg(image, quality)
    with atomic_write(path) as file:
        file.write(content)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode an image (H, W, 3) uint8 BGR as JPEG; `quality` is from 0 to 100."""
    import cv2

    _, content = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))
    return content.tobytes()
