# SPDX-License-Identifier: Apache-2.0
"""The viewer's server and command: headers, addresses, names, ports, exported page, messages."""

import base64
import gzip
import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from helpers.command_line import error_messages
from helpers.imperfect import write_imperfect
from helpers.scenes import write_coco
from helpers.viewing import HOSTILE, edit_json, make_catalog, serving

from spatialflow.cli.main import main
from spatialflow.viewer import export, server
from spatialflow.viewer.scan import Scan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer")
    truth = write_coco(folder / "truth", 3)
    return truth, write_imperfect(truth, folder / "out", 1)


@pytest.fixture(scope="module")
def viewing(data):
    with serving(make_catalog(*data)) as running:
        yield running


def get(viewing, path, method="GET", headers=None):
    """Send a request exactly as given; return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", viewing.port, timeout=20)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


PATHS = {
    "/": "text/html; charset=utf-8",
    "/static/app.js": "text/javascript; charset=utf-8",
    "/static/style.css": "text/css; charset=utf-8",
    "/api/index.json": "application/json",
    "/api/scores.json?from=0": "application/json",
    "/api/classes.json": "application/json",
    "/api/image/0.json": "application/json",
    "/photo/0.jpg": "image/jpeg",
    "/thumb/photo/0.jpg?v=1": "image/jpeg",
    "/thumb/truth/2.jpg": "image/jpeg",
    "/map/prediction/0.bin": "application/octet-stream",
}


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_headers(viewing, path):
    status, headers, body = get(viewing, path)
    assert status == (200 if path in PATHS else 404) and int(headers["Content-Length"]) == len(body)
    assert headers["Content-Type"] == PATHS.get(path, "text/plain; charset=utf-8")
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert headers["Server"] == "spatialflow"
    head = get(viewing, path, "HEAD")
    assert head[0] == status and head[2] == b"" and head[1]["Content-Length"] == headers["Content-Length"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "//etc/passwd",
        "/../../etc/passwd",
        "/static/",
        "/photo/3.jpg",
        "/photo/-1.jpg",
        "/photo/99999999999.jpg",
        "/photo/0.json",
        "/photo/truth/0.jpg",
        "/thumb/0.jpg",
        "/thumb/other/0.jpg",
        "/map/photo/0.bin",
        "/map/truth/0.jpg",
        "/map/../truth/0.bin",
        "/api/image/truth/0.json",
        "/panoptic.json",
        "/images/000001.jpg",
        "//[",
        "/%00",
        "http://localhost/api/index.json",
    ],
)
def test_other_addresses_have_no_page(viewing, path):
    status, _, body = get(viewing, path)
    assert status == 404 and body == b"no such page"


def test_other_methods_and_no_http(viewing):
    for method in ("POST", "PUT", "DELETE"):
        status, headers, body = get(viewing, "/<script>", method)
        assert status == 501 and b"<" not in body and headers["X-Content-Type-Options"] == "nosniff"
    with socket.create_connection(("127.0.0.1", viewing.port), timeout=20) as raw:
        raw.sendall(b"<script>alert(1)</script>\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert b"<script>" not in answer
    assert get(viewing, "/")[0] == 200


def test_only_its_own_name_is_answered(viewing):
    """A page of another site must not read the answers by a name that it resolves to this machine."""
    for host in ("localhost", "127.0.0.1", f"LOCALHOST:{viewing.port}", "[::1]:80"):
        assert get(viewing, "/api/index.json", headers={"Host": host})[0] == 200, host
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert get(viewing, "/api/index.json", headers={"Host": host})[0] == 403, host


def test_json_is_compressed(viewing):
    plain = get(viewing, "/api/image/0.json")
    packed = get(viewing, "/api/image/0.json", headers={"Accept-Encoding": "gzip"})
    assert packed[1]["Content-Encoding"] == "gzip" and gzip.decompress(packed[2]) == plain[2]
    assert len(packed[2]) < len(plain[2]) / 2


def test_positions_that_are_no_numbers(viewing):
    for query in ("?from=-5", "?from=x", "", "?from=99999999999999999999"):
        assert len(json.loads(get(viewing, f"/api/scores.json{query}")[2])["rows"]) == 3
    assert json.loads(get(viewing, "/api/scores.json?from=7")[2])["rows"] == []


def test_names_cannot_end_a_script(tmp_path):
    truth = write_coco(tmp_path / "truth", 3)

    def rename(content):
        for row, name in zip(content["images"], HOSTILE):
            row["file_name"] = name
        content["categories"][0]["name"] = "</script><script>window.hacked=1</script>"

    edit_json(truth, rename)
    catalog = make_catalog(truth)
    with serving(catalog) as viewing:
        for path in ("/api/index.json", "/api/image/0.json"):
            body = get(viewing, path)[2]
            assert b"<" not in body and json.loads(body)
        assert json.loads(get(viewing, "/api/index.json")[2])["names"] == HOSTILE
        status, headers, body = get(viewing, "/photo/0.jpg")
        assert status == 404 and headers["Content-Type"].startswith("text/plain")
        assert export.export_page(tmp_path / "page.html", catalog, viewing.scan, 5) == 3
    page = (tmp_path / "page.html").read_text()
    assert "hacked=1</script>" not in page and "\\u003cscript>window.hacked=1" in page


def test_exported_page_has_everything(data, tmp_path):
    catalog = make_catalog(*data)
    scan = Scan(catalog)
    scan.run()
    export.export_page(tmp_path / "page.html", catalog, scan, 5)
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?(?!data:|#)[\w./:]""", re.sub(r"(?s)<script.*?</script>", "", page))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    for tag, text in re.findall(r"(?s)<(script|style)>(.*?)</\1>", page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    image = json.loads(re.search(r'id="data-image-2">(.*?)</script>', page)[1])
    assert image["payload"]["name"] == "000003.jpg" and set(image["maps"]) == {"truth", "prediction"}
    assert base64.b64decode(image["thumbs"]["photo"]).startswith(b"\xff\xd8")


def test_exported_page_has_the_worst_images(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "MAX_IMAGES", 2)
    path = tmp_path / "page.html"
    truth, out = data
    assert main(["view", str(out), "--ground-truth", str(truth), "--export", str(path)]) == 0
    catalog = make_catalog(*data)
    scan = Scan(catalog)
    scan.run()
    best = max(scan.since(0), key=lambda score: score.pq["prediction"]).index
    page = path.read_text()
    names = json.loads(re.search(r'id="data-index">(.*?)</script>', page)[1])["names"]
    assert len(names) == 2 and catalog.images[best].name not in names
    assert "2 images of lowest PQ of 3" in capsys.readouterr().out
    assert main(["view", str(out), "--export", str(path)]) == 0
    assert "2 images listed first of 3" in capsys.readouterr().out


def test_export_replaces_no_input(data, capsys):
    _, out = data
    before = (out / "panoptic.json").read_bytes()
    assert main(["view", str(out), "--export", str(out / "panoptic.json")]) == 2
    assert "is an input" in capsys.readouterr().err and (out / "panoptic.json").read_bytes() == before


def test_a_taken_port(data, viewing, capsys, monkeypatch):
    _, out = data
    assert main(["view", str(out), "--no-browser", "--port", str(viewing.port)]) == 2
    (message,) = error_messages(capsys)
    assert message.startswith(f"--port {viewing.port} on 127.0.0.1: cannot be used: address already in use")
    monkeypatch.setattr(server, "PORT", viewing.port)
    site = server.Site(viewing.catalog, viewing.scan)
    with server.Server(site, "127.0.0.1", None) as second:
        assert second.server_port != viewing.port and second.is_loopback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must be from 1 to 65535, got 0"),
        (["--port", "70000"], "--port must be from 1 to 65535, got 70000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: is not an address of this machine"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: cannot be used: "),
        (["--images", "absent"], "absent: no such folder"),
        (["--ground-truth", "absent.json"], "absent.json: no such file or folder"),
        (["--export", "/proc/none/page.html"], "/proc/none/page.html: cannot be written"),
    ],
)
def test_wrong_options_are_one_message(data, arguments, message, capsys):
    assert main(["view", str(data[1]), "--no-browser", *arguments]) == 2
    assert error_messages(capsys)[0].startswith(message)


@pytest.mark.parametrize("host", [None, "localhost", "0.0.0.0"])
def test_only_the_loopback_address_without_a_host(data, monkeypatch, capsys, host):
    """Another address is served on demand alone, and what that means is said."""
    served = []
    monkeypatch.setattr(server.Server, "serve_forever", lambda self: served.append(self.server_address[0]))
    arguments = [] if host is None else ["--host", host]
    assert main(["view", str(data[1]), "--no-browser", *arguments]) == 0
    messages = ["--host 0.0.0.0: everyone who reaches this machine can see these images"]
    assert served == ["0.0.0.0" if host == "0.0.0.0" else "127.0.0.1"]
    assert error_messages(capsys) == (messages if host == "0.0.0.0" else [])


def test_warnings_and_missing_photographs_are_printed(data, tmp_path, capsys):
    truth, out = (shutil.copytree(folder, tmp_path / folder.name) for folder in data)
    shutil.rmtree(truth / "images")
    edit_json(out, lambda content: content["categories"][0].update(name="pedestrian"))
    page = tmp_path / "page.html"
    assert main(["view", str(out), "--ground-truth", str(truth), "--export", str(page)]) == 0
    messages = error_messages(capsys)
    assert "'pedestrian'" in messages[0]
    assert messages[1:] == ["3 of 3 photographs are not found; --images names the folder"]
    assert all(json.dumps(message)[1:-1] in page.read_text() for message in messages)


def test_files_that_are_no_results(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "none.json").write_text('{"annotations": [], "categories": []}')
    for name in ("broken", "list", "none"):
        (tmp_path / name).mkdir()
    for name, message in {
        "absent": "absent: no such file or folder",
        "empty": "empty: holds no panoptic.json, and there is no ",
        "broken.json": "not a JSON file",
        "list.json": "a panoptic JSON is a mapping",
        "none.json": "lists no images",
    }.items():
        assert main(["view", str(tmp_path / name), "--no-browser"]) == 2
        assert message in error_messages(capsys)[0]


def start(*arguments):
    """Start the command in a process of its own; return the process and the address that it prints."""
    command = [sys.executable, "-m", "spatialflow.cli", "view", *map(str, arguments), "--no-browser"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell may have it ignored
    )
    line = process.stdout.readline()
    return process, re.search(r"http://\S+", line)[0] if line else line + process.communicate()[1]


def test_ctrl_c_ends_the_server(data):
    process, url = start(data[1], "--ground-truth", data[0])
    with urllib.request.urlopen(url + "api/index.json", timeout=30) as response:  # the connection is kept open
        assert len(json.load(response)["names"]) == 3
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and output == ""


def test_a_run_and_a_ground_truth_alone(data, tmp_path):
    truth, out = data
    shutil.copytree(out, tmp_path / "run" / "evaluation")
    for arguments, sides in (
        ((tmp_path / "run", "--compare", out, "--images", truth / "images"), ["run", "out"]),
        ((truth / "panoptic.json",), ["Ground truth"]),
        ((truth / "panoptic",), ["Ground truth"]),
    ):
        process, url = start(*arguments)
        with urllib.request.urlopen(url + "api/index.json", timeout=30) as response:
            index = json.load(response)
        process.terminate()
        process.communicate(timeout=30)
        assert [side["title"] for side in index["sides"]] == sides and process.returncode == 143
