# SPDX-License-Identifier: Apache-2.0
"""The local server of the viewer: a page, JSON and pictures that it makes itself; it sends no file of a data set."""

import html
import json
import re
import secrets
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from socketserver import TCPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import deflate

import spatialflow.viewer
from spatialflow.viewer.catalog import Catalog
from spatialflow.viewer.payload import image_payload, index_payload, scores_payload
from spatialflow.viewer.pictures import PHOTOGRAPH, PICTURE_ERRORS, Pictures
from spatialflow.viewer.scan import Scan

PORT = 8470
"""The port that is tried first; another free one is used if it is taken."""

PICTURE_SIDE = 2560
"""Longer side of photographs and maps in pixels; larger ones are made smaller."""

SCRIPTS = ("source.js", "grid.js", "layers.js", "detail.js", "classes.js", "app.js")
STYLE, PAGE = "style.css", "index.html"

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "jpg": "image/jpeg",
    "bin": "application/octet-stream",
    "txt": "text/plain; charset=utf-8",
}

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Response(NamedTuple):
    """An answer of the server."""

    status: HTTPStatus
    kind: str  # a key of `_TYPES`
    body: bytes
    cached: bool = False  # whether the browser may keep it


_NO_PAGE = Response(HTTPStatus.NOT_FOUND, "txt", b"no such page")


def static_file(name: str) -> bytes:
    """Read a file of the page from the package."""
    return (files(spatialflow.viewer) / "static" / name).read_bytes()


def as_json(content: Any) -> bytes:
    """Encode a payload as JSON of ASCII characters, in which no `<` can end a script of a page."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").encode()


class Site:
    """The answers to all requests.

    Args:
        catalog: the images.
        scan: their scores.
    """

    def __init__(self, catalog: Catalog, scan: Scan) -> None:
        self._catalog, self._scan = catalog, scan
        self._pictures = Pictures(catalog, PICTURE_SIDE)
        self._static = {name: static_file(name) for name in (PAGE, STYLE, *SCRIPTS)}
        # The version is part of the addresses of pictures, so that a browser does not show those of an earlier server.
        index = index_payload(catalog, range(len(catalog.images))) | {"version": secrets.token_hex(4)}
        self._index = as_json(index)

    def answer(self, target: str) -> Response:
        """Answer a request for a path with an optional query."""
        path, _, query = target.partition("?")
        if path == "/":
            return Response(HTTPStatus.OK, "html", self._static[PAGE])
        name = path.removeprefix("/static/")
        if name != path and name in self._static:
            return Response(HTTPStatus.OK, name.rpartition(".")[2], self._static[name])
        if path == "/api/index.json":
            return Response(HTTPStatus.OK, "json", self._index)
        if path == "/api/classes.json":
            return Response(HTTPStatus.OK, "json", as_json(self._scan.classes()))
        if path == "/api/scores.json":
            first = parse_qs(query).get("from", ["0"])[0]
            position = int(first) if re.fullmatch(r"[0-9]{1,9}", first) else 0
            return Response(HTTPStatus.OK, "json", as_json(scores_payload(self._catalog, self._scan, position)))
        match = re.fullmatch(r"/(api/image|photo|thumb|map)/(?:([a-z]+)/)?([0-9]{1,9})\.(json|jpg|bin)", path)
        if match is None or int(match[3]) >= len(self._catalog.images):
            return _NO_PAGE
        with self._scan.giving_way():
            return self._answer_image(match[1], match[2], int(match[3]), match[4])

    def _answer_image(self, kind: str, key: str | None, index: int, suffix: str) -> Response:
        try:
            if kind == "api/image" and key is None and suffix == "json":
                body = as_json(image_payload(self._catalog, self._scan, self._pictures, index))
                return Response(HTTPStatus.OK, suffix, body)
            if kind == "photo" and key is None and suffix == "jpg":
                return Response(HTTPStatus.OK, suffix, self._pictures.photograph(index), cached=True)
            if kind == "thumb" and suffix == "jpg" and key in (PHOTOGRAPH, *self._catalog.sides):
                return Response(HTTPStatus.OK, suffix, self._pictures.thumbnail(index, key), cached=True)
            if kind == "map" and suffix == "bin" and key in self._catalog.sides:
                return Response(HTTPStatus.OK, suffix, self._pictures.slots(index, key), cached=True)
        except PICTURE_ERRORS as error:
            return Response(HTTPStatus.NOT_FOUND, "txt", str(error).encode("utf-8", "backslashreplace"))
        return _NO_PAGE


class Server(ThreadingHTTPServer):
    """A server of one site, which listens when it is created.

    Args:
        site: its answers.
        host: the address or name that it listens on.
        port: the port; None: `PORT`, or any free one.

    Raises:
        OSError: host is not an address of this machine, or port is taken.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, site: Site, host: str, port: int | None) -> None:
        self.site, self.host = site, host
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self._is_loopback = ip_address(str(address[0]).partition("%")[0]).is_loopback
        ports = (PORT, 0) if port is None else (port,)
        for chosen in ports:
            try:
                super().__init__((host, chosen), _Handler)
                return
            except OSError:
                if chosen == ports[-1]:
                    raise

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return self._is_loopback

    @property
    def url(self) -> str:
        """The address of the page."""
        host = self.host if ":" not in self.host else f"[{self.host}]"
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # what every address of the machine includes
        return f"http://{host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without the look-up of the machine's name, which may wait for a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that the browser closed; report other errors."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"spatialflow: view: {type(error).__name__}: {error}", file=sys.stderr)

    def allows(self, host: str) -> bool:
        """Tell whether a request's `Host` is a name of this server.

        A page of another site could otherwise read the answers by a name that it resolves to this machine.
        """
        if not self._is_loopback:
            return True
        name = re.sub(r":[0-9]*$", "", host.strip().lower()).strip("[]")
        return name in ("localhost", "127.0.0.1", "::1", self.host.lower())


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds after which an idle connection is closed

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def _respond(self) -> None:
        if not self.server.allows(self.headers.get("Host", "")):
            response = Response(HTTPStatus.FORBIDDEN, "txt", b"this server answers only to its own name")
        else:
            response = self.server.site.answer(self.path)
        self._send(response)

    def _send(self, response: Response) -> None:
        body, is_text = response.body, response.kind not in ("jpg", "bin")
        self.send_response(response.status)
        if is_text and len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = bytes(deflate.gzip_compress(body, 4))
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", _TYPES[response.kind])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "private, max-age=3600" if response.cached else "no-store")
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not HTTP, or a method that is not supported."""
        self.close_connection = True
        text = html.escape(message or HTTPStatus(code).phrase)
        self.headers = getattr(self, "headers", None) or _no_headers()
        self.command = getattr(self, "command", None) or ""
        self._send(Response(HTTPStatus(code), "txt", text.encode("utf-8", "backslashreplace")))

    def version_string(self) -> str:
        return "spatialflow"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""


def _no_headers() -> Any:
    from email.message import Message

    return Message()
