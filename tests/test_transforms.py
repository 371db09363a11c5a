# SPDX-License-Identifier: Apache-2.0
"""Reading, resizing and normalising images; what cannot be read is named with its reason."""

import json

import cv2
import numpy as np
import pytest

from spatialflow.data.transforms import (
    ImageError,
    check_image,
    fit_image,
    fit_size,
    normalise,
    pad,
    read_image,
    resize_image,
    resize_labels,
)

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
        new_h, new_w = fit_size((h, w), short_edge, long_edge)
        assert [new_w, new_h] == expected["new_wh"]
        assert [float(np.float32(new_w / w)), float(np.float32(new_h / h))] == expected["scale_factor"]


@pytest.mark.parametrize(
    "size, expected", [((1, 1), (800, 800)), ((1, 5000), (1, 1333)), ((5000, 1), (1333, 1)), ((800, 1333), (800, 1333))]
)
def test_extreme_sizes_keep_a_pixel(size, expected):
    assert fit_size(size, 800, 1333) == expected


def test_nearest_resize_equals_opencv():
    rng = np.random.default_rng(0)
    for _ in range(40):
        h, w, new_h, new_w = rng.integers(1, 90, 4)
        labels = rng.integers(0, 255, (h, w), dtype=np.uint8)
        assert np.array_equal(
            resize_labels(labels, (new_h, new_w)),
            cv2.resize(labels, (int(new_w), int(new_h)), interpolation=cv2.INTER_NEAREST),
        )


def test_normalise_and_pad():
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    result = pad(normalise(image, MEAN, STD), 32)
    expected = (image[:, :, ::-1].transpose(2, 0, 1) - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert result.shape == (3, 64, 64) and result.dtype == np.float32 and result.flags.c_contiguous
    assert np.abs(result[:, :40, :50] - expected).max() < 1e-6
    assert not result[:, 40:].any() and not result[:, :, 50:].any()
    assert pad(np.ones((3, 64, 32), np.float32), 32).shape == (3, 64, 32)


def test_fit_image_knows_every_size():
    fitted = fit_image((40, 50), 80, 90)
    assert fitted.valid_size == (72, 90) and fitted.padded_size == (96, 96) and fitted.original_size == (40, 50)
    assert fitted.scale == (float(np.float32(1.8)), float(np.float32(1.8)))
    assert fit_image((64, 32), 32, 64, divisor=32).padded_size == (64, 32)


def write(path, image, keep=1.0):
    content = cv2.imencode(path.suffix, image)[1].tobytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def test_every_kind_of_pixel_becomes_8_bit_bgr(tmp_path):
    rng = np.random.default_rng(2)
    bgr = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    assert np.array_equal(read_image(write(tmp_path / "plain.png", bgr)), bgr)
    assert np.array_equal(read_image(write(tmp_path / "grey.png", bgr[..., 0])), bgr[..., :1].repeat(3, axis=2))
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


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "text.jpg").write_text("This is not an image.")
    (tmp_path / "empty.jpg").touch()
    for name, words in (("text.jpg", "not an image"), ("empty.jpg", "is empty"), ("absent.jpg", "No such file")):
        with pytest.raises(ImageError, match=f"{name}: .*{words}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((4, 4), np.uint8), r"got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        ([1], "got list"),
    ],
)
def test_wrong_arrays_are_refused(image, words):
    with pytest.raises(ImageError, match=words):
        check_image(image)
