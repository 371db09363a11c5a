# SPDX-License-Identifier: Apache-2.0
"""Reading, resizing and normalizing images; errors name unreadable files with the reason."""

import io
import json
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from spatialflow.data.transforms import (
    compute_resize,
    compute_resized_size,
    normalize,
    pad,
    resize_image,
    resize_labels,
)
from spatialflow.images import ImageError, ImageWarning, read_image

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def test_resize_equals_the_released_code(goldens):
    arrays = np.load(goldens / "ops" / "resize.npz")
    sizes = [name.split("_")[1] for name in arrays.files if name.startswith("nearest_")]
    for text in sizes:
        w, h = map(int, text.split("x"))
        assert np.array_equal(resize_labels(arrays["label"], (h, w)), arrays[f"nearest_{text}"])
        difference = np.abs(resize_image(arrays["image"], (h, w)).astype(int) - arrays[f"bilinear_{text}"])
        assert difference.max() <= 1  # OpenCV rounds one step differently on some processors


def test_sizes_and_scale_factors_equal_the_released_code(goldens):
    cases = json.loads((goldens / "ops" / "resize.json").read_text())["rescale_size"]
    for text, expected in cases.items():
        (w, h), (long_edge, short_edge) = (map(int, part.split("x")) for part in text.split("->"))
        new_h, new_w = compute_resized_size((h, w), short_edge, long_edge)
        assert [new_w, new_h] == expected["new_wh"]
        assert [float(np.float32(new_w / w)), float(np.float32(new_h / h))] == expected["scale_factor"]


@pytest.mark.parametrize(
    "size, expected", [((1, 1), (800, 800)), ((1, 5000), (1, 1333)), ((5000, 1), (1333, 1)), ((800, 1333), (800, 1333))]
)
def test_extreme_sizes_keep_a_pixel(size, expected):
    assert compute_resized_size(size, 800, 1333) == expected


def test_nearest_resize_equals_opencv():
    rng = np.random.default_rng(0)
    for _ in range(40):
        h, w, new_h, new_w = rng.integers(1, 90, 4)
        labels = rng.integers(0, 255, (h, w), dtype=np.uint8)
        assert np.array_equal(
            resize_labels(labels, (new_h, new_w)),
            cv2.resize(labels, (int(new_w), int(new_h)), interpolation=cv2.INTER_NEAREST),
        )


def test_normalize_and_pad():
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    result = pad(normalize(image, MEAN, STD), 32)
    expected = (image[:, :, ::-1].transpose(2, 0, 1) - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert result.shape == (3, 64, 64) and result.dtype == np.float32 and result.flags.c_contiguous
    assert np.abs(result[:, :40, :50] - expected).max() < 1e-6
    assert not result[:, 40:].any() and not result[:, :, 50:].any()
    assert pad(np.ones((3, 64, 32), np.float32), 32).shape == (3, 64, 32)


def test_compute_resize_has_every_size():
    geometry = compute_resize((40, 50), 80, 90)
    assert geometry.valid_size == (72, 90) and geometry.padded_size == (96, 96) and geometry.original_size == (40, 50)
    assert geometry.scale == (float(np.float32(1.8)), float(np.float32(1.8)))
    assert compute_resize((64, 32), 32, 64, divisor=32).padded_size == (64, 32)


def write(path, image, keep=1.0):
    content = cv2.imencode(path.suffix, image)[1].tobytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def test_every_kind_of_pixel_becomes_8_bit_bgr(tmp_path):
    rng = np.random.default_rng(2)
    bgr = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    assert np.array_equal(read_image(write(tmp_path / "plain.png", bgr)), bgr)
    assert np.array_equal(read_image(write(tmp_path / "gray.png", bgr[..., 0])), bgr[..., :1].repeat(3, axis=2))
    rgba = np.concatenate([bgr, np.zeros((6, 7, 1), np.uint8)], axis=2)
    assert np.array_equal(read_image(write(tmp_path / "transparent.png", rgba)), bgr)
    deep = rng.integers(0, 65536, (6, 7, 3), dtype=np.uint16)
    assert np.array_equal(read_image(write(tmp_path / "deep.png", deep)), (deep >> 8).astype(np.uint8))
    assert read_image(write(tmp_path / "pixel.jpg", bgr[:1, :1])).shape == (1, 1, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("keep", [0.3, 0.7, 0.98])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    image = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert read_image(write(tmp_path / f"whole{suffix}", image)).shape == (60, 80, 3)
    with pytest.raises(ImageError, match=f"cut{suffix}: is truncated"):
        read_image(write(tmp_path / f"cut{suffix}", image, keep))


def jpeg(image, **options):
    """Encode (H, W, 3) BGR pixels; options: `mode` (by default RGB), `format` (JPEG), those of Pillow's `save`."""
    stream = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.fromarray(image[..., ::-1]).convert(mode).save(stream, options.pop("format", "JPEG"), **options)
    return stream.getvalue()


def smooth_picture(height=60, width=83):
    coarse = np.random.default_rng(4).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


SECOND = Image.fromarray(np.full((40, 50, 3), 90, np.uint8))
THUMBNAIL = b"Exif\0\0" + jpeg(smooth_picture(16, 16))  # has a start, a scan and an end marker
JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "gray": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "comment with an end marker": {"comment": b"\xff\xd9 \xff\xda"},
    "several pictures": {"format": "MPO", "save_all": True, "append_images": [SECOND]},
}


@pytest.fixture(params=JPEGS)
def whole_jpeg(request):
    return jpeg(smooth_picture(), quality=90, **JPEGS[request.param])


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def decoded(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def test_data_behind_a_jpeg_are_passed_over(whole_jpeg, tmp_path, no_warning):
    """Data after a JPEG, as in Motion Photos of phones, are ignored; the noise includes start, scan and end markers."""
    for seed in range(20):
        noise = np.random.default_rng(seed).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
        (tmp_path / "a.jpg").write_bytes(whole_jpeg + noise)
        assert np.array_equal(read_image(tmp_path / "a.jpg"), decoded(whole_jpeg))
    for trailer in (b"\0" * 1000, b"\xff\xd8", b"\xff\xda", whole_jpeg[: len(whole_jpeg) // 2]):
        (tmp_path / "a.jpg").write_bytes(whole_jpeg + trailer)
        assert np.array_equal(read_image(tmp_path / "a.jpg"), decoded(whole_jpeg))


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind != "several pictures"])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker_is_read_with_a_warning(tmp_path, kind, missing):
    content = jpeg(smooth_picture(), quality=90, **JPEGS[kind])
    (tmp_path / "a.jpg").write_bytes(content[:-missing])
    with pytest.warns(ImageWarning, match="a.jpg: has no end marker, but all pixels"):
        assert np.array_equal(read_image(tmp_path / "a.jpg"), decoded(content))


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if kind not in ("several pictures", "progressive")])
@pytest.mark.parametrize("quality", [30, 95])
def test_a_cut_jpeg_is_refused(tmp_path, no_warning, kind, quality):
    """A truncated file is refused, unless no pixel depends on the missing bytes."""
    content = jpeg(smooth_picture(35, 43), quality=quality, **JPEGS[kind])
    for length in [*range(len(content) - 40, len(content) - 2), *range(2, len(content), len(content) // 40)]:
        (tmp_path / "a.jpg").write_bytes(content[:length])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ImageWarning)
                image = read_image(tmp_path / "a.jpg")
        except ImageError as error:
            assert "a.jpg: is " in str(error)
        else:
            assert len(content) - length < 8 and np.array_equal(image, decoded(content))


def test_markers_before_the_picture_do_not_count(tmp_path, no_warning):
    """An APP1 segment holds a JPEG thumbnail; the main picture after it is truncated."""
    content = jpeg(smooth_picture())
    segment = b"\xff\xe1" + (len(THUMBNAIL) + 2).to_bytes(2, "big") + THUMBNAIL
    content = content[:2] + segment + content[2:]
    (tmp_path / "whole.jpg").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "whole.jpg"), decoded(content))
    (tmp_path / "cut.jpg").write_bytes(content[: len(segment) + len(content) // 2])
    with pytest.raises(ImageError, match="cut.jpg: is truncated"):
        read_image(tmp_path / "cut.jpg")


FORMATS = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "PPM": {},
    "palette": {"format": "PNG", "mode": "P"},
    "APNG": {"format": "PNG", "save_all": True, "append_images": [SECOND.resize((83, 60))]},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_are_whole_or_refused(tmp_path, no_warning, kind):
    content = jpeg(smooth_picture(), **{"format": kind, **FORMATS[kind]})
    for trailer in (b"", b"\0" * 1000, np.random.default_rng(5).integers(0, 256, 5000, dtype=np.uint8).tobytes()):
        (tmp_path / "a.image").write_bytes(content + trailer)
        assert np.array_equal(read_image(tmp_path / "a.image"), decoded(content))
    for length in (len(content) // 2, len(content) - 20, len(content) - 5):
        (tmp_path / "a.image").write_bytes(content[:length])
        try:
            image = read_image(tmp_path / "a.image")
        except ImageError as error:
            assert "a.image: is " in str(error)
        else:
            assert kind == "APNG" and np.array_equal(image, decoded(content))  # the first picture is whole


def test_earlier_place_of_reading():
    from spatialflow.data import transforms

    assert (transforms.read_image, transforms.ImageError) == (read_image, ImageError)
    assert transforms.ImageWarning is ImageWarning


def png_with(header: bytes, chunk_length: int, chunk: bytes = b"IDAT") -> bytes:
    """Return a damaged 8-bit RGB PNG with a header and the beginning of one chunk.

    Args:
        header: width and height, 4 bytes each.
        chunk_length: value of the chunk's length field; the file holds 100 zero bytes of data.
        chunk: type of the chunk.
    """
    ihdr = b"IHDR" + header + bytes([8, 2, 0, 0, 0])
    begin = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + ihdr + zlib.crc32(ihdr).to_bytes(4, "big")
    return begin + chunk_length.to_bytes(4, "big") + chunk + bytes(100)


@pytest.mark.parametrize(
    "content",
    [
        png_with(bytes([0, 0, 0, 9, 0, 0, 0, 9]), 1 << 31),
        png_with(bytes([0, 0, 0, 9, 0, 0, 0, 9]), 1 << 31, b"IEND"),
        png_with(bytes([0, 0, 0x40, 0, 0, 0, 0x40, 0]), 50),
        b"\xff\xd8\xff\xff\xc0\0\x11\x08" + bytes([0x40, 0, 0x40, 0]) + jpeg(smooth_picture())[20:],
    ],
    ids=["chunk", "last chunk", "PNG", "JPEG"],
)
def test_files_too_short_for_their_headers_never_reach_a_decoder(tmp_path, content, monkeypatch):
    """Decoders allocate gigabytes before they detect the error."""
    monkeypatch.setattr(cv2, "imdecode", None)
    (tmp_path / "a.image").write_bytes(content)
    with pytest.raises(ImageError, match="a.image: is truncated or damaged: too short for the image"):
        read_image(tmp_path / "a.image")


def test_a_large_blank_picture_is_read(tmp_path):
    """An image of a single color has the smallest size per pixel that encoders produce."""
    for suffix in (".png", ".jpg"):
        cv2.imwrite(str(tmp_path / f"a{suffix}"), np.full((2000, 3000), 255, np.uint8))
        assert read_image(tmp_path / f"a{suffix}").shape == (2000, 3000, 3)


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("This is not an image.")
    (tmp_path / "empty.jpg").touch()
    for name, words in (("text.jpg", "not an image"), ("empty.jpg", "is empty"), ("absent.jpg", "No such file")):
        with pytest.raises(ImageError, match=f"{name}: .*{words}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"'\\x00.png': is not a file name"):
        read_image("\0.png")
