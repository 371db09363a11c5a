# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a reader sees the old content or the whole new one, never a part."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`, and rename it to `path` when the block ends without an exception.

    Args:
        path: the file to create or replace; its folder is created if it is absent.
        mode: "wb" or "w" (UTF-8).

    Returns:
        A context manager that gives the open file. On any exception, a full disk included, the temporary file is
        removed and `path` stays as it was. Several threads may write files at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # less the process's umask
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
