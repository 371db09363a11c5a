# SPDX-License-Identifier: Apache-2.0
"""Inputs of commands: folders, patterns, standard input, URLs, and folders that hold no photographs."""

import contextlib
import http.server
import io
import os
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.command_line import FAST, error_messages
from helpers.scenes import write_cityscapes, write_coco

from spatialflow.cli import downloads
from spatialflow.cli.input_images import resolve_images
from spatialflow.cli.label_folders import RESULT_INFO
from spatialflow.cli.main import main
from spatialflow.files import write_json
from spatialflow.image_formats import UNREADABLE_SUFFIXES
from spatialflow.panoptic import read_panoptic_json
from spatialflow.panoptic.result_folder import SAVED_INFO


def names_of(*arguments, **options) -> list[str]:
    with resolve_images(arguments, **options) as inputs:
        return [image.name for image in inputs.images]


def write(folder, *names):
    """Create files; those with an image's suffix have no content, as they are not read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def picture():
    """The bytes of a small PNG."""
    return cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))[1].tobytes()


class TestFolders:
    def test_skipped_files_are_counted(self, tmp_path, capsys):
        write(
            tmp_path,
            "a.jpg",
            "b.txt",
            "c.TXT",
            "clip.mp4",
            "LICENSE",
            "._a.jpg",
            ".DS_Store",
            "deep/x.csv",
            "deep/y.png",
        )
        assert names_of(tmp_path) == ["a.jpg"]
        left_out, skipped = error_messages(capsys)
        assert left_out == f"{tmp_path}: 1 image in its sub-folders is left out; --recursive includes it"
        assert skipped == (
            f"{tmp_path}: skipped 2 hidden, 2 .txt, 1 without suffix, 1 .mp4; a video is read if its own path is given"
        )
        assert names_of(tmp_path, recursive=True) == ["a.jpg", "deep/y.png"]
        assert "1 .csv" in error_messages(capsys)[0]

    def test_photographs_that_need_a_library(self, tmp_path, monkeypatch, capsys):
        """One sentence for each library that is missing, and for raw files of cameras."""
        advice = dict.fromkeys((".heic", ".heif"), "HEIC needs pillow-heif: pip install pillow-heif")
        monkeypatch.setattr("spatialflow.cli.input_images.UNREADABLE_SUFFIXES", {**UNREADABLE_SUFFIXES, **advice})
        monkeypatch.setattr("spatialflow.cli.input_images.IMAGE_SUFFIXES", (".jpg",))
        write(tmp_path, "a.jpg", "IMG_1.HEIC", "IMG_2.heic", "b.heif", "c.NEF")
        assert names_of(tmp_path) == ["a.jpg"]
        assert error_messages(capsys) == [
            f"{tmp_path}: skipped 2 .heic, 1 .heif, 1 .nef; HEIC needs pillow-heif: pip install pillow-heif; "
            "a camera's raw file must be converted to JPEG, PNG or TIFF first"
        ]

    def test_many_kinds(self, tmp_path, capsys):
        write(tmp_path, "a.jpg", *(f"{kind}.x{kind}" for kind in range(12)))
        assert names_of(tmp_path) == ["a.jpg"]
        assert error_messages(capsys)[0].endswith("4 of other kinds")

    def test_id_maps_beside_a_json(self, tmp_path, capsys):
        """The folder is refused as an argument, by one message for all its files, and is left out below another."""
        data = write_coco(tmp_path / "data", count=2)
        maps = data / "panoptic"
        reason = f"holds the segment ids of {data}/panoptic.json, not photographs"
        message = f"{maps}: {reason}; the photographs are in {data}/images"
        for arguments in ([maps], sorted(maps.iterdir())):
            with resolve_images(arguments) as inputs:
                assert inputs.images == [] and inputs.failed == [message]
            assert error_messages(capsys) == [message]
        found = names_of(data)
        assert len(found) == 2 and all(name.startswith("images/") for name in found)
        assert error_messages(capsys)[0].startswith(f"{maps}: is left out: holds the segment ids of ")

    def test_a_json_of_another_name(self, tmp_path, capsys):
        data = write_coco(tmp_path / "data", count=1)
        (data / "panoptic.json").rename(data / "truth.json")
        assert names_of(data / "panoptic") == []
        assert "holds the segment ids of" in error_messages(capsys)[0]

    def test_photographs_beside_a_json(self, tmp_path, capsys):
        """Photographs are read although a panoptic JSON of the folder's name lists them, with few colors or many."""
        data = write_coco(tmp_path / "data", count=1)
        (data / "panoptic.json").rename(data / "images.json")
        assert len(names_of(data / "images")) == 1
        for path in (data / "images").iterdir():
            pixels = cv2.imread(str(path)) // 64 * 64
            path.unlink()
            cv2.imwrite(str(path.with_suffix(".png")), pixels)
        assert len(names_of(data / "images")) == 1
        assert error_messages(capsys) == []

    @pytest.mark.parametrize("info, writer", [(RESULT_INFO, "predict"), (SAVED_INFO, "PanopticResult.save")])
    def test_results(self, tmp_path, capsys, info, writer):
        photographs = write(tmp_path / "photos", "a/x.jpg")
        out = write(tmp_path / "out", "panoptic/a/x.png", "overlays/a/x.jpg")
        row = {"id": "x", "file_name": "a/x.jpg", "path": "../photos/a/x.jpg"}
        write_json(out / "panoptic.json", {"info": info, "images": [row], "annotations": []})
        for place in ("panoptic", "panoptic/a", "overlays/a/x.jpg"):
            assert names_of(out / place) == []
            (message,) = error_messages(capsys)
            assert f"that `{writer}` wrote, not photographs; the photographs are in " in message
            assert message.endswith(str(photographs / "a"))
        assert names_of(out) == []
        assert error_messages(capsys)[-1] == f"{out}: holds no image file"

    def test_label_pictures_of_cityscapes(self, tmp_path, capsys):
        root = write_cityscapes(tmp_path, count=2)
        found = names_of(root, recursive=True)
        assert len(found) == 2 and all(name.startswith("leftImg8bit/") for name in found)
        assert "2 Cityscapes label picture" in error_messages(capsys)[0]


def test_a_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write(tmp_path, "0"))
    assert names_of("0", "1") == ["0"]
    assert error_messages(capsys) == ["1: no such file; the option for a camera is --camera 1"]


@pytest.mark.parametrize("word", ["test_flip", "test.test_flip"])
def test_a_setting_without_its_value(tmp_path, monkeypatch, capsys, word):
    monkeypatch.chdir(tmp_path)
    assert names_of(word, "data.test_flip") == ["data.test_flip"]  # no field of that section
    assert error_messages(capsys) == [f"{word}: no such file; a setting has the form {word}=VALUE"]
    assert names_of(write(tmp_path, word) / word) == [word]


class TestPatterns:
    @pytest.mark.parametrize(
        "pattern, names",
        [
            ("photos/*.jpg", ["a.jpg", "b.jpg"]),
            ("photos/**/*.jpg", ["a.jpg", "b.jpg", "c/a.jpg", "c/d/e.jpg"]),
            ("photos/[ab].*", ["a.jpg", "b.jpg", "b.png"]),
            ("photos/c/*", ["a.jpg", "d/e.jpg"]),
            ("photos/*/d", ["c/d/e.jpg"]),
            ("photos/**", ["a.jpg", "b.jpg", "b.png", "c/a.jpg", "c/d/e.jpg"]),
        ],
    )
    @pytest.mark.parametrize("is_absolute", [False, True])
    def test_names(self, tmp_path, monkeypatch, pattern, names, is_absolute):
        write(tmp_path / "photos", "a.jpg", "b.jpg", "b.png", "c/a.jpg", "c/d/e.jpg")
        monkeypatch.chdir(tmp_path)
        assert names_of(f"{tmp_path}/{pattern}" if is_absolute else pattern) == names

    def test_a_file_of_that_name(self, tmp_path):
        write(tmp_path, "a[1].jpg", "a1.jpg")
        assert names_of(f"{tmp_path}/a[1].jpg") == ["a[1].jpg"]

    def test_no_match(self, tmp_path, capsys):
        write(tmp_path, "a.txt")
        assert names_of(f"{tmp_path}/*.jpg", f"{tmp_path}/*") == []
        assert error_messages(capsys) == [
            f"{tmp_path}/*: skipped 1 .txt",
            f"{tmp_path}/*.jpg: no file matches this pattern",
            f"{tmp_path}/*: matches no image",
        ]


class TestStandardInput:
    @pytest.fixture
    def give(self, monkeypatch):
        def set_input(content):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

        return set_input

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\0"])
    def test_a_list(self, tmp_path, give, end):
        write(tmp_path, "a.jpg", "b c.jpg", "d/e.jpg", "f1.png")
        give("".join(f"{tmp_path}/{name}{end}" for name in ("b c.jpg", "a.jpg", "d", "f?.png")).encode())
        assert names_of("-") == ["b c.jpg", "a.jpg", "e.jpg", "f1.png"]

    def test_an_image(self, give, picture):
        give(picture)
        with resolve_images(["-"]) as inputs:
            (image,) = inputs.images
            assert image.name == "stdin.png" and image.path.read_bytes() == picture
        assert not image.path.exists()

    @pytest.mark.parametrize(
        "content, reason",
        [
            (b"", "lists no path"),
            (b"\n\n", "lists no path"),
            (b"\x00\x01\x02", "is neither an image of a known format nor a list of paths"),
            (b"a" * 5000, "is neither an image of a known format nor a list of paths"),
        ],
    )
    def test_neither(self, give, capsys, content, reason):
        give(content)
        assert names_of("-") == []
        assert error_messages(capsys) == [f"standard input: {reason}"]

    def test_a_terminal(self, tmp_path, give, monkeypatch, capsys):
        """The message says why the command waits."""
        give(f"{write(tmp_path, 'a.jpg')}/a.jpg\n".encode())
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        assert names_of("-") == ["a.jpg"]
        assert error_messages(capsys) == ["reading paths from standard input, one a line; Ctrl-D ends the list"]

    def test_too_large(self, give, monkeypatch, capsys):
        monkeypatch.setattr("spatialflow.cli.input_images.SIZE_LIMIT", 2**20)
        give(b"a\n" * 2**20)
        assert names_of("-") == []
        assert error_messages(capsys) == ["standard input: has more than 1 MiB"]


@pytest.fixture
def server(picture, monkeypatch):
    """A local server of one picture, and of answers of every bad kind; returns its address."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, target = self.path.partition("?to=")
            if path.startswith("/redirect"):
                self.send_response(302)
                self.send_header("Location", target or "/redirect")
                self.end_headers()
            elif path == "/page":
                self.answer(b"<html>", "text/html")
            elif path == "/huge.png":
                self.answer(b"", "image/png", 2**40)
            elif path == "/endless.png":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(2**16))
            elif path == "/text.png":
                self.answer(b"text", "text/plain")
            elif path == "/cut.png":
                self.answer(picture[:50], "image/png", len(picture))
            elif path == "/silent.png":
                time.sleep(1)
            elif path.startswith(("/a", "/b")):
                self.answer(picture, "image/png")
            else:
                self.send_error(404)

        def answer(self, content, kind, length=None):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as local:
        threading.Thread(target=local.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{local.server_address[1]}"
        local.shutdown()


class TestUrls:
    def test_images(self, server, picture, tmp_path):
        """Files have the name in the URL, or the suffix of their content; equal names get folders in front."""
        urls = ["/a/x.png", "/b/x.png", "/a/photo?size=large", "/a/%C3%A4%2F..%2Fb.png", "/a/x.png"]
        with resolve_images([server + url for url in urls]) as inputs:
            assert not inputs.failed
            assert [image.name for image in inputs.images] == ["a/x.png", "b/x.png", "photo.png", "ä_.._b.png"]
            assert all(image.path.read_bytes() == picture for image in inputs.images)
            assert [image.source for image in inputs.images] == [server + url for url in urls[:4]]
        assert not any(image.path.exists() for image in inputs.images)

    def test_a_redirection(self, server):
        assert names_of(f"{server}/redirect?to=/a.png") == ["redirect.png"]

    @pytest.mark.parametrize(
        "path, reason",
        [
            ("/missing.png", "the server answered 404 Not Found"),
            ("/page", "is a web page, not a file of an image or a video"),
            ("/huge.png", "is larger than 1 MiB; download it and pass the file"),
            ("/endless.png", "is larger than 1 MiB; download it and pass the file"),
            ("/cut.png", "ended after 50 of "),
            ("/silent.png", "the server sent nothing for 0 s"),
            ("/redirect", "redirects more than 5 times"),
            (
                "/redirect?to=file:///etc/hostname",
                "redirects to file:///etc/hostname, and only http and https",
            ),
            ("/redirect?to=ftp://127.0.0.1/a.png", "redirects to ftp://127.0.0.1/a.png, and only http and https"),
        ],
    )
    def test_bad_answers(self, server, monkeypatch, capsys, path, reason):
        monkeypatch.setattr(downloads, "SIZE_LIMIT", 2**20)
        if path == "/silent.png":
            monkeypatch.setattr(downloads, "SILENCE_LIMIT", 0.2)
        with resolve_images([server + path]) as inputs:
            assert inputs.images == []
        (message,) = error_messages(capsys)
        assert message.startswith(f"{server}{path}: {reason}") and inputs.failed == [message]

    @pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a.png", "data://x"])
    def test_other_schemes(self, capsys, url):
        assert names_of(url) == []
        assert error_messages(capsys) == [f"{url}: only http and https URLs are read"]

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http:///a.png", "http://[/a.png", "http://a b/c.png"])
    def test_no_server(self, monkeypatch, capsys, url):
        monkeypatch.setenv("no_proxy", "*")
        assert names_of(url) == []
        (message,) = error_messages(capsys)
        assert message.startswith(f"{url}: cannot be re")

    def test_a_long_download(self, server, monkeypatch, capsys):
        monkeypatch.setattr(downloads, "TIME_LIMIT", 0.1)
        assert names_of(f"{server}/endless.png") == []
        assert error_messages(capsys) == [f"{server}/endless.png: was not complete after 0 s"]


def test_predict(server, picture, weights, tmp_path, monkeypatch, capsys):
    """URLs and standard input have results without a path; messages name the URL, not a temporary file."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture)))
    inputs = ["-", f"{server}/a.png", f"{server}/text.png", f"{server}/missing.png"]
    command = ["predict", *inputs, "--checkpoint", str(weights), "--output", str(tmp_path), *FAST]
    assert main(command) == 1
    images = read_panoptic_json(tmp_path / "panoptic.json")["images"]
    assert [(image["file_name"], image["path"]) for image in images] == [("stdin.png", None), ("a.png", None)]
    assert error_messages(capsys) == [
        f"{server}/missing.png: the server answered 404 Not Found",
        f"{server}/text.png: is not an image of a known format, or is damaged",
    ]


def test_names_of_files_and_urls(server, tmp_path):
    path = write(tmp_path, "a.png") / "a.png"
    found = names_of(path, f"{server}/a.png")
    assert found[0] == f"{tmp_path.name}/a.png" and found[1].endswith("/a.png") and len(set(found)) == 2
    assert os.sep not in Path(found[0]).name
