# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a reader sees the old content or the whole new one, never a part."""

import contextlib
import os
import tempfile
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
        removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """The process's file mode mask, which mkstemp ignores; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
