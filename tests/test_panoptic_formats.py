# SPDX-License-Identifier: Apache-2.0
"""Panoptic PNG and JSON files: read files of other programs, refuse damaged ones, never leave an incomplete file."""

import io
import json
import os
import resource
import stat
import zlib

import numpy as np
import pytest
from PIL import Image

from spatialflow import _evaluation
from spatialflow.files import atomic_write
from spatialflow.panoptic import (
    PanopticFormatError,
    PanopticWriter,
    decode_ids,
    encode_ids,
    read_id_map,
    read_panoptic_json,
    write_id_map,
)
from spatialflow.panoptic.png import decode_png, encode_png


def png(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def with_checksums(data):
    """Return the same chunks with correct checksums, so that damage reaches the decompressor."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        data[at + 8 + size : at + 12 + size] = zlib.crc32(data[at + 4 : at + 8 + size]).to_bytes(4, "big")
        at += 12 + size
    return bytes(data)


def test_ids_and_colors_are_inverse():
    ids = np.array([[0, 1, 255], [256, 65536, 16777215]])
    colors = encode_ids(ids)
    np.testing.assert_array_equal(colors[1], [[0, 1, 0], [0, 0, 1], [255, 255, 255]])
    np.testing.assert_array_equal(encode_ids(ids, bgr=True), colors[..., ::-1])
    for dtype in (np.int32, np.uint32, np.int64, np.uint64):
        np.testing.assert_array_equal(decode_ids(encode_ids(ids.astype(dtype))), ids)
    np.testing.assert_array_equal(decode_ids(colors[..., ::-1], bgr=True), ids)
    np.testing.assert_array_equal(decode_ids(colors[::-1, ::2]), ids[::-1, ::2])
    assert decode_ids(np.zeros((0, 4, 3), np.uint8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-1, np.int32), (1 << 24, np.int32), (-1, np.int64), (1 << 40, np.int64), (1 << 31, np.uint32)],
)
def test_ids_that_do_not_fit_are_refused(value, dtype):
    with pytest.raises(ValueError, match=rf"ids must lie in \[0, 16777215\].*{value}"):
        encode_ids(np.array([[0, value]], dtype))


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.zeros(4, int), np.zeros((2, 2, 3), int)])
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match="ids must be an .H, W. integer array"):
        encode_ids(bad)
    with pytest.raises(ValueError, match="image must be .H, W, 3. uint8 pixels"):
        decode_ids(bad)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("content", ["noise", "segments", "gradient", "constant"])
@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_png_decoder_equals_pillow(channels, content, level):
    rng = np.random.default_rng(level)
    for height, width in ((1, 1), (1, 300), (67, 1), (53, 91)):
        if content == "noise":
            pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        elif content == "segments":
            cells = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, channels), dtype=np.uint8)
            pixels = cells.repeat(9, 0).repeat(9, 1)[:height, :width]
        elif content == "gradient":
            pixels = np.add.outer(np.arange(height), np.arange(width * channels)).astype(np.uint8)
            pixels = pixels.reshape(height, width, channels)
        else:
            pixels = np.full((height, width, channels), 77, np.uint8)
        ids = pixels[..., :3].astype(int) @ [1, 256, 65536]
        np.testing.assert_array_equal(decode_png(png(pixels, compress_level=level)), ids)


@pytest.mark.parametrize("filter_type", range(5))
@pytest.mark.parametrize("channels", [3, 4])
def test_every_png_filter(filter_type, channels):
    """Lines are filtered by hand: encoders rarely use the average filter, and Sub mostly for noise."""
    rng = np.random.default_rng(filter_type)
    cells = rng.integers(0, 256, (6, 5, channels), dtype=np.uint8)
    pixels = cells.repeat(7, 0).repeat(11, 1)
    pixels[20:25] = rng.integers(0, 256, pixels[20:25].shape)
    height, width = pixels.shape[:2]
    padded = np.zeros((height + 1, width + 1, channels), int)
    padded[1:, 1:] = pixels
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    distances = np.stack([abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)])
    paeth = np.take_along_axis(np.stack([left, above, corner]), distances.argmin(0)[None], 0)[0]
    residual = (pixels - [0, left, above, (left + above) // 2, paeth][filter_type]).astype(np.uint8)
    lines = np.concatenate([np.full((height, 1), filter_type, np.uint8), residual.reshape(height, -1)], 1)

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    color_type = {3: 2, 4: 6}[channels]
    stream = zlib.compress(lines.tobytes())
    data = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, color_type, 0, 0, 0])
    )
    data += chunk(b"IDAT", stream[:5]) + chunk(b"IDAT", b"") + chunk(b"IDAT", stream[5:]) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_png(data), pixels[..., :3].astype(int) @ [1, 256, 65536])


@pytest.mark.parametrize("mode", ["L", "P", "LA", "I;16", "1"])
def test_png_of_another_kind_says_so(tmp_path, mode):
    Image.new("RGB", (4, 3)).convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / "a.png")
    with pytest.raises(PanopticFormatError, match=r"a\.png: a panoptic PNG is 8-bit RGB, this one is .*(gray|palette)"):
        read_id_map(tmp_path / "a.png")


def test_damaged_png_is_refused(tmp_path, goldens):
    data = next((goldens / "pq" / "gt").glob("*.png")).read_bytes()
    for damaged, message in (
        (b"", "not a PNG file"),
        (b"\xff\xd8\xff\xe0" + data, "not a PNG file"),
        (data[:-40], "truncated|longer than the file"),
        (data[:100] + bytes([data[100] ^ 1]) + data[101:], "checksum does not match"),
        (data[:18] + b"\x7f" + data[19:], "bad header"),
        (with_checksums(data[:16] + b"\x7f\xff\xff\xff\x7f\xff\xff\xff" + data[24:]), "too short for its image"),
        (with_checksums(data[:16] + bytes(8) + data[24:]), "no pixels"),
        (with_checksums(data[:28] + b"\x01" + data[29:]), "interlaced"),
        (
            with_checksums(data[:23] + bytes([data[23] ^ 3]) + data[24:]),
            "do not fit 640x480 pixels|before the last pixel",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            decode_png(damaged)
    with pytest.raises(PanopticFormatError, match="absent.png: cannot be read"):
        read_id_map(tmp_path / "absent.png")


def test_no_damage_passes_unnoticed(goldens):
    """Random bytes with correct chunk checksums cause an error, never another picture or a read out of bounds."""
    rng = np.random.default_rng(0)
    data = next((goldens / "pq" / "gt").glob("*.png")).read_bytes()
    for trial in range(300):
        damaged = bytearray(data)
        for position in rng.integers(41, len(data) - 16, 1 + trial % 3):
            damaged[position] ^= rng.integers(1, 256)
        with pytest.raises(ValueError, match="PNG"):
            decode_png(with_checksums(damaged))


def test_unfiltering_checks_its_arguments():
    """Wrong sizes would cause reads out of bounds; a line with an unknown filter may have a correct checksum."""
    lines = bytearray(2 * (1 + 5 * 3))
    assert _evaluation.unfilter_png(lines, 2, 5, 3).tolist() == [[0] * 5] * 2
    for height, width, channels in ((3, 5, 3), (2, 6, 3), (2, 5, 4), (32, 0, 3), (0, 5, 3), (1, 31, 1)):
        with pytest.raises(ValueError, match="lines must be|must be at least 1"):
            _evaluation.unfilter_png(lines, height, width, channels)
    lines[16] = 5
    with pytest.raises(ValueError, match="unknown filter 5"):
        _evaluation.unfilter_png(lines, 2, 5, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (31, 45)])
def test_any_decoder_reads_an_encoded_png(shape):
    import cv2

    colors = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    colors[::2, 1:] = 7
    data = encode_png(colors)
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), colors)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1], colors)
    np.testing.assert_array_equal(decode_png(data), decode_ids(colors))
    np.testing.assert_array_equal(decode_png(encode_png(colors[::-1, ::-1])), decode_ids(colors[::-1, ::-1]))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 4), (0, 5, 3), (4, 0, 3)])
def test_encode_png_refuses_what_is_no_rgb_picture(shape):
    with pytest.raises(ValueError, match=r"colors must be \(H, W, 3\) uint8 with at least one pixel, got .* uint8"):
        encode_png(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"got \(4, 5, 3\) uint16"):
        encode_png(np.zeros((4, 5, 3), np.uint16))


def test_id_map_round_trip(tmp_path):
    ids = np.random.default_rng(0).integers(0, 1 << 24, (31, 45))
    write_id_map(tmp_path / "new" / "a.png", ids)
    np.testing.assert_array_equal(read_id_map(tmp_path / "new" / "a.png"), ids)
    colors = np.asarray(Image.open(tmp_path / "new" / "a.png")).astype(int)
    np.testing.assert_array_equal(colors @ [1, 256, 65536], ids)
    with pytest.raises(ValueError, match="at least one pixel"):
        write_id_map(tmp_path / "b.png", np.zeros((0, 3), int))
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.png"]


def test_writer(tmp_path):
    ids = np.array([[0, 5], [9, 9]], np.int32)
    segments = [
        {"id": 5, "category_id": 1, "score": np.float32(0.5), "bbox": [1, 0, 1, 1]},
        {"id": 9, "category_id": 7},
    ]
    categories = [{"id": 1, "isthing": 1}, {"id": 7, "isthing": 0}]
    with PanopticWriter(tmp_path / "out", categories=categories) as writer:
        assert writer.add(3, "x/street.jpg", ids, segments) == tmp_path / "out" / "street.png"
        with pytest.raises(PanopticFormatError, match=r"image 4: segments must list every id of the map once"):
            writer.add(4, "b.jpg", ids, segments[:1])
        with pytest.raises(
            PanopticFormatError, match="y/street.png: the PNG street.png is already used by x/street.jpg"
        ):
            writer.add(4, "y/street.png", ids, segments)
        with pytest.raises(PanopticFormatError, match="b.jpg: the id 3 is already used"):
            writer.add(3, "b.jpg", ids, segments)
        with pytest.raises(PanopticFormatError, match="the id 3 is already used"):
            writer.extend(writer.rows())
    content = read_panoptic_json(tmp_path / "out.json", with_categories=True)
    assert content["images"] == [{"id": 3, "file_name": "x/street.jpg", "height": 2, "width": 2}]
    assert content["annotations"][0]["segments_info"][0]["score"] == 0.5
    np.testing.assert_array_equal(read_id_map(tmp_path / "out" / content["annotations"][0]["file_name"]), ids)


def annotated(image_id=1, file_name="a.png", **segment):
    """Return a panoptic JSON text of one segment, with the given values of fields."""
    segments = [{"id": 1, "category_id": 1, **segment}]
    return json.dumps({"annotations": [{"image_id": image_id, "file_name": file_name, "segments_info": segments}]})


def test_json_errors_name_file_and_field(tmp_path):
    path = tmp_path / "a.json"
    for content, message in (
        ("{", "a.json: not a JSON file"),
        ("[" * 100_000, "a.json: not a JSON file"),
        (
            annotated(file_name="a\0b"),
            r"annotations\[0\]: file_name must be a string without NUL or unpaired surrogates, got 'a\\x00b'",
        ),
        ("[]", 'a panoptic JSON is a mapping with a list "annotations"'),
        ('{"annotations": [{"image_id": 1}]}', r'annotations\[0\] must be a mapping with "file_name"'),
        ('{"annotations": [], "categories": [{"id": 1}]}', r'categories\[0\] must be a mapping with "isthing"'),
        ('{"annotations": [], "categories": [{"id": "1", "isthing": 0}]}', r"categories\[0\]: id must be an integer"),
        ('{"annotations": [], "categories": [{"id": 1, "isthing": 2}]}', "isthing must be 0 or 1, got 2"),
        (annotated(image_id=[3]), r"annotations\[0\]: image_id must be an integer or a string, got \[3\]"),
        (annotated(file_name=3), r"annotations\[0\]: file_name must be a string, got 3"),
        (annotated(id=1 << 24), r"segments_info\[0\]: id must lie in \[0, 16777215\], got 16777216"),
        (annotated(area="9"), r"segments_info\[0\]: area must be a number, got '9'"),
        (annotated(iscrowd="0"), r"segments_info\[0\]: iscrowd must be 0 or 1, got '0'"),
    ):
        path.write_text(content)
        with pytest.raises(PanopticFormatError, match=message):
            read_panoptic_json(path, with_categories=True)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PanopticFormatError, match="not a JSON file"):
        read_panoptic_json(path)
    with pytest.raises(PanopticFormatError, match="nowhere.json: cannot be read"):
        read_panoptic_json(tmp_path / "nowhere.json")


def test_atomic_write_obeys_the_file_mode_mask(tmp_path, monkeypatch):
    """The umask is applied but never changed, as all threads of the process share it."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch, atomic_write(tmp_path / "file") as stream:
            patch.setattr(os, "umask", None)
            stream.write(b"new")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path, "w") as stream:
        stream.write(json.dumps({"old": 1}))
    with pytest.raises(KeyError), atomic_write(path) as stream:
        stream.write(b"half")
        raise KeyError
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit of the file size replaces a full disk: the write fails after some bytes."""
    import signal

    write_id_map(tmp_path / "a.png", np.full((8, 8), 3))
    before = (tmp_path / "a.png").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            write_id_map(tmp_path / "a.png", np.random.default_rng(0).integers(0, 1 << 24, (200, 200)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
