# SPDX-License-Identifier: Apache-2.0
"""Images from web addresses and from standard input, stored in temporary files."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO, Any

import spatialflow
from spatialflow.image_formats import image_suffix

SIZE_LIMIT = 256 * 2**20
"""Largest number of bytes of a download, and of standard input."""

SILENCE_LIMIT, TIME_LIMIT = 30.0, 600.0
"""Seconds after which a server that sends nothing, and a whole download, is given up."""

REDIRECTION_LIMIT = 5

_CHUNK = 2**16


class DownloadError(Exception):
    """A URL that cannot be read; the message names it and the reason."""


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows a few redirections, to http and https alone."""

    max_redirections = REDIRECTION_LIMIT

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_web_url(newurl):
            raise DownloadError(f"redirects to {newurl:.200}, and only http and https are read")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_url(text: str) -> bool:
    """Tell whether an argument is a URL of any scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def is_web_url(text: str) -> bool:
    """Tell whether an argument is a URL that `download` reads."""
    return text.lower().startswith(("http://", "https://"))


def download(url: str, folder: Path) -> Path:
    """Store the file of a URL.

    Args:
        url: http or https.
        folder: an empty folder, created if it is absent.

    Returns:
        Path of the file. Its name is the last part of the URL, with the suffix of its content if that has none.

    Raises:
        DownloadError: the scheme is another one, the server does not answer or answers with an error, the file is too
            large, or it cannot be stored.
    """
    if not is_web_url(url):
        raise DownloadError(f"{url}: only http and https URLs are read")
    opener = urllib.request.OpenerDirector()  # without handlers for file, ftp and data
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirections(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"spatialflow/{spatialflow.__version__}")]
    try:
        address = urllib.parse.quote(url.partition("#")[0], safe="%/:=&?~+!$,;'@()*[]")
        with opener.open(address, timeout=SILENCE_LIMIT) as response:
            return _store(response, url, folder)
    except DownloadError as error:
        raise DownloadError(f"{url}: {error}") from None
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: {_answer(error)}") from None
    except TimeoutError:
        raise DownloadError(f"{url}: the server sent nothing for {SILENCE_LIMIT:.0f} s") from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            raise DownloadError(f"{url}: the server sent nothing for {SILENCE_LIMIT:.0f} s") from None
        detail = reason.strerror or reason if isinstance(reason, OSError) else reason
        raise DownloadError(f"{url}: cannot be reached: {detail}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: cannot be read: {str(error) or type(error).__name__}") from None


def _answer(error: urllib.error.HTTPError) -> str:
    if "is not allowed" in str(error.msg):  # raised by HTTPRedirectHandler itself
        return f"redirects to {error.headers.get('Location', ''):.200}, and only http and https are read"
    if "infinite loop" in str(error.msg):
        return f"redirects more than {REDIRECTION_LIMIT} times"
    return f"the server answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()


def _store(response: Any, url: str, folder: Path) -> Path:
    headers: Message = response.headers
    if headers.get_content_type() == "text/html":
        raise DownloadError("is a web page, not a file of an image or a video")
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    too_large = f"is larger than {SIZE_LIMIT >> 20} MiB; download it and pass the file"
    if total is not None and total > SIZE_LIMIT:
        raise DownloadError(too_large)
    folder.mkdir(parents=True, exist_ok=True)
    temporary, received, end = folder / "download", 0, time.monotonic() + TIME_LIMIT
    with open(temporary, "wb") as file:
        while chunk := response.read1(_CHUNK):
            received += len(chunk)
            if received > SIZE_LIMIT:
                raise DownloadError(too_large)
            if time.monotonic() > end:
                raise DownloadError(f"was not complete after {TIME_LIMIT:.0f} s")
            file.write(chunk)
    if total is not None and received < total:
        raise DownloadError(f"ended after {received} of {total} bytes")
    with open(temporary, "rb") as file:
        path = folder / _file_name(url, file.read(512))
    temporary.rename(path)
    os.utime(path, (0, 0))  # an interrupted run compares size and time of the photographs
    return path


def _file_name(url: str, beginning: bytes) -> str:
    """Derive the name of the file of a URL, without characters that have a meaning in paths."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[\x00-\x1f/\\\ud800-\udfff]", "_", name).lstrip(".")[-100:] or "image"
    return name if Path(name).suffix else name + (image_suffix(beginning) or "")
