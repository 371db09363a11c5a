# SPDX-License-Identifier: Apache-2.0
"""Image formats beyond JPEG and PNG: what is read, what is refused, and which library is missing."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image, features

from spatialflow import image_formats
from spatialflow.image_formats import FORMAT_LIBRARIES, IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, image_suffix, pillow_format
from spatialflow.images import ImageError, image_size, read_image

PILLOW = {
    "GIF": {},
    "AVIF": {"quality": 100},
    "JPEG2000": {},
}


@pytest.fixture(params=PILLOW)
def kind(request):
    return request.param


def smooth_picture(height=60, width=83):
    coarse = np.random.default_rng(4).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(kind, image=None, **options):
    stream = io.BytesIO()
    image = Image.fromarray(smooth_picture()) if image is None else image
    image.save(stream, kind, **{**PILLOW.get(kind, {}), **options})
    return stream.getvalue()


def pixels_by_pillow(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[..., ::-1]


def test_pixels_are_those_of_pillow(tmp_path, kind):
    content = encode(kind)
    (tmp_path / "a.bin").write_bytes(content)
    assert pillow_format(content) == pillow_format(content[:512]) == kind
    assert np.array_equal(read_image(tmp_path / "a.bin"), pixels_by_pillow(content))
    assert np.abs(read_image(tmp_path / "a.bin").astype(int) - smooth_picture()[..., ::-1]).mean() < 12


def test_whole_or_refused(tmp_path, kind):
    """Of a truncated file, either all pixels are read or none."""
    content, path = encode(kind), tmp_path / "a.bin"
    lengths = [*range(len(content) - 8, len(content)), *range(3, len(content), len(content) // 40)]
    for length in lengths:
        path.write_bytes(content[:length])
        try:
            image = read_image(path)
        except ImageError as error:
            assert "a.bin: is " in str(error)
        else:
            assert len(content) - length < 8 and np.array_equal(image, pixels_by_pillow(content))
    path.write_bytes(content + bytes(1000))
    assert np.array_equal(read_image(path), pixels_by_pillow(content))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(smooth_picture(), "RGB"), Image.new("RGB", (83, 60), "red")]
    content = encode("GIF", frames[0], save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "a.gif"), pixels_by_pillow(content))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_avif(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.avif").write_bytes(encode("AVIF", exif=exif))
    upright = pixels_by_pillow(encode("AVIF"))
    expected = np.rot90(upright, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    assert np.array_equal(read_image(tmp_path / "a.avif"), expected)


def test_too_many_pixels(tmp_path):
    content = bytearray(encode("GIF"))
    content[6:10] = b"\xff\xff\xff\xff"  # 65535 x 65535
    (tmp_path / "a.gif").write_bytes(content)
    with pytest.raises(ImageError, match="a.gif: cannot be decoded: Image size .* exceeds limit"):
        read_image(tmp_path / "a.gif")


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_opencv_decodes_what_pillow_was_built_without(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(features, "get_supported", lambda: [])
    content = encode(kind)
    (tmp_path / "a.bin").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "a.bin"), pixels_by_pillow(content))
    (tmp_path / "a.bin").write_bytes(content[:-50])
    with pytest.raises(ImageError, match=f"a.bin: .* cannot decode {kind}: pip install --upgrade pillow$"):
        read_image(tmp_path / "a.bin")


BEGINS = {
    "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JXL": b"\0\0\0\x0cJXL \r\n\x87\n",
}


@pytest.mark.parametrize("kind", FORMAT_LIBRARIES)
def test_a_missing_library_is_named(tmp_path, monkeypatch, kind):
    library = FORMAT_LIBRARIES[kind]
    monkeypatch.setitem(sys.modules, library.module, None)  # makes the import fail
    (tmp_path / "IMG_1.HEIC").write_bytes(BEGINS[kind] + bytes(100))
    with pytest.raises(ImageError, match=f"IMG_1.HEIC: {library.title} needs .*: pip install {library.package}$"):
        read_image(tmp_path / "IMG_1.HEIC")


@pytest.mark.parametrize("kind", FORMAT_LIBRARIES)
def test_optional_formats(tmp_path, kind):
    library = FORMAT_LIBRARIES[kind]
    module = pytest.importorskip(library.module)
    if kind == "HEIF":
        module.register_heif_opener()
    path = tmp_path / f"a{library.suffixes[0]}"
    content = encode(kind)
    path.write_bytes(content)
    assert np.array_equal(read_image(path), pixels_by_pillow(content))
    exif = Image.Exif()
    exif[0x0112] = 6
    path.write_bytes(encode(kind, exif=exif.tobytes()))
    assert read_image(path).shape == (83, 60, 3)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="is truncated or damaged"):
        read_image(path)


def test_brands_of_the_same_container():
    assert pillow_format(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf") == "AVIF"
    assert pillow_format(b"\0\0\0\x14ftypmif1\0\0\0\0miaf") == "HEIF"
    assert pillow_format(b"\0\0\0\x14ftypisom\0\0\0\0mp42") is None
    assert pillow_format(b"") is pillow_format(b"\0\0\0\0ftyp") is None


def test_files_of_every_suffix_are_read(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        Image.fromarray(smooth_picture()).convert("L").save(tmp_path / f"a{suffix}")
        assert read_image(tmp_path / f"a{suffix}").shape == (60, 83, 3), suffix
    assert not set(IMAGE_SUFFIXES) & set(UNREADABLE_SUFFIXES)
    for library in FORMAT_LIBRARIES.values():
        for suffix in library.suffixes:
            assert (suffix in IMAGE_SUFFIXES) != (UNREADABLE_SUFFIXES.get(suffix) == library.advice)


@pytest.mark.parametrize("turn", range(1, 9))
def test_size_is_that_of_the_pixels(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    for suffix in (".jpg", ".png", ".avif"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(smooth_picture()).save(path, exif=exif)
        assert image_size(path) == read_image(path).shape[:2]


def test_size_of_what_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match="a.jpg: is no image that can be read"):
        image_size(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="b.jpg: No such file or directory"):
        image_size(tmp_path / "b.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".tif", ".webp", ".pgm", ".avif", ".jp2"])
def test_suffix_follows_from_the_content(suffix):
    stream = io.BytesIO()
    kind = Image.registered_extensions()[suffix]
    Image.fromarray(smooth_picture()).convert("L").save(stream, kind)
    assert image_suffix(stream.getvalue()[:512]) == suffix
    assert image_suffix(b"no image") is image_suffix(b"") is None


def test_raw_files_are_not_read_as_their_thumbnail(tmp_path):
    Image.fromarray(smooth_picture()).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a.NEF")
    with pytest.raises(ImageError, match="a.NEF: a camera's raw file must be converted"):
        read_image(tmp_path / "a.NEF")


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO"])
def test_formats_that_are_not_read_are_named(tmp_path, kind):
    (tmp_path / "a.bin").write_bytes(encode(kind))
    with pytest.raises(ImageError, match=f"a.bin: is a file of the format {kind}, which is not read; convert it"):
        read_image(tmp_path / "a.bin")


def test_suffixes_are_known_without_the_libraries():
    code = (
        f"import sys, {image_formats.__name__}; sys.exit(any(name in sys.modules for name in ('cv2', 'PIL', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
