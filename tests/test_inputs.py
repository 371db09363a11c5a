# SPDX-License-Identifier: Apache-2.0
"""Kinds of images that a Predictor takes: equal maps for equal pixels, channel order, errors, bounded memory."""

import gc
import inspect
import io
import sys
import types
import warnings
import weakref

import cv2
import numpy as np
import pytest
import torch
from helpers.small_models import random_model
from PIL import Image

import spatialflow
from spatialflow.engine.inputs import is_one_image
from spatialflow.images import ChannelOrderWarning

SETTINGS = dict(test_short_edges=[32], test_long_edge=48, stuff_area_threshold=20, instance_score_threshold=0.0)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)  # a map of several segments, which depends on the order of the channels
        return random_model("tiny")


@pytest.fixture(scope="module")
def predictor(model):
    return spatialflow.Predictor(model, **SETTINGS)


@pytest.fixture(autouse=True)
def no_other_warning():
    """A ChannelOrderWarning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChannelOrderWarning)
        yield


def picture(height=32, width=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rgb_of(bgr):
    return np.ascontiguousarray(bgr[..., ::-1])


def chw_of(bgr):
    return torch.from_numpy(rgb_of(bgr)).permute(2, 0, 1)


def float_of(bgr):
    return chw_of(bgr).float() / 255


@pytest.fixture(scope="module")
def expected(predictor):
    return predictor(picture()).id_map


class SomePath:
    """A path of another library."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


KINDS = {
    "path": lambda bgr, file: file,
    "text": lambda bgr, file: str(file),
    "os.PathLike": lambda bgr, file: SomePath(file),
    "BGR": lambda bgr, file: bgr,
    "BGRA": lambda bgr, file: np.dstack([bgr, bgr[..., 0]]),
    "view": lambda bgr, file: np.repeat(bgr, 2, axis=1)[:, ::2],
    "PIL file": lambda bgr, file: Image.open(file),
    "PIL RGB": lambda bgr, file: Image.fromarray(rgb_of(bgr)),
    "PIL RGBA": lambda bgr, file: Image.fromarray(np.dstack([rgb_of(bgr), bgr[..., 0]])),
    "PIL RGBX": lambda bgr, file: Image.fromarray(rgb_of(bgr)).convert("RGBX"),
    "uint8 tensor": lambda bgr, file: chw_of(bgr),
    "contiguous tensor": lambda bgr, file: chw_of(bgr).contiguous(),
    "RGBA tensor": lambda bgr, file: torch.cat([chw_of(bgr), chw_of(bgr)[:1]]),
    "float32 tensor": lambda bgr, file: float_of(bgr),
    "float64 tensor": lambda bgr, file: chw_of(bgr).double() / 255,
    "float16 tensor": lambda bgr, file: float_of(bgr).half(),
    "tensor with a gradient": lambda bgr, file: torch.nn.Parameter(float_of(bgr)),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.png"
    cv2.imwrite(str(path), picture())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_equal_pixels_give_equal_maps(predictor, expected, file, kind):
    make = KINDS[kind]
    assert len(np.unique(expected)) > 2 and (expected != predictor(rgb_of(picture())).id_map).any()
    assert np.array_equal(predictor(make(picture(), file)).id_map, expected)
    from_list, from_iterator = predictor([make(picture(), file)]), predictor(iter([make(picture(), file)]))
    assert np.array_equal(from_list[0].id_map, expected) and np.array_equal(from_iterator[0].id_map, expected)


def test_rgb_arrays(model, predictor, expected):
    rgb = rgb_of(picture())
    rgba = np.dstack([rgb, rgb[..., 0]])
    assert np.array_equal(predictor(rgb, channel_order="rgb").id_map, expected)
    assert np.array_equal(predictor(rgba, channel_order="rgb").id_map, expected)
    assert np.array_equal(next(predictor.stream([rgb], channel_order="rgb")).id_map, expected)
    outcome = next(predictor.outcomes(iter([rgb]), channel_order="rgb"))
    assert np.array_equal(outcome.result.id_map, expected) and np.array_equal(outcome.pixels, picture())
    of_rgb = spatialflow.Predictor(model, channel_order="rgb", **SETTINGS)
    assert np.array_equal(of_rgb(rgb).id_map, expected)
    assert np.array_equal(of_rgb(picture(), channel_order="bgr").id_map, expected)
    for image in (Image.fromarray(rgb), chw_of(picture())):  # RGB, whatever the order of arrays
        for order in ("bgr", "rgb"):
            assert np.array_equal(predictor(image, channel_order=order).id_map, expected)


GRAY = {
    "array": lambda gray: gray,
    "array of one channel": lambda gray: gray[..., None],
    "PIL L": Image.fromarray,
    "PIL LA": lambda gray: Image.fromarray(gray).convert("LA"),
    "PIL P": lambda gray: Image.fromarray(gray).convert("P"),
    "PIL 16 bits": lambda gray: Image.fromarray(gray.astype(np.uint16) * 256 + 255),
    "PIL 16 bits, big-endian": lambda gray: Image.frombytes(
        "I;16B", gray.shape[::-1], (gray.astype(np.uint16) * 256).astype(">u2").tobytes()
    ),
    "tensor (1, H, W)": lambda gray: torch.from_numpy(gray)[None],
    "tensor (H, W)": lambda gray: torch.from_numpy(gray).float() / 255,
}


@pytest.mark.parametrize("kind", GRAY)
def test_gray(predictor, kind):
    gray = picture()[..., 0].copy()
    outcome = next(predictor.outcomes([GRAY[kind](gray)]))
    assert np.array_equal(outcome.pixels, gray[..., None].repeat(3, axis=2))
    assert outcome.result.id_map.shape == gray.shape


def test_batches_are_several_images(predictor, expected):
    batch = torch.stack([chw_of(picture()), chw_of(picture(seed=1))])
    arrays = np.stack([picture(), picture(seed=1)])
    for images in (batch, batch.float() / 255, arrays, list(batch), tuple(arrays), iter(batch)):
        results = predictor(images)
        assert [result.image_name for result in results] == ["image 0", "image 1"]
        assert np.array_equal(results[0].id_map, expected)
        assert np.array_equal(results[1].id_map, predictor(picture(seed=1)).id_map)
    assert len(predictor(batch[:1])) == 1 and predictor(batch[:0]) == []


def test_mixture_of_kinds_and_sizes(predictor, file):
    sizes = {3: (48, 32), 4: (20, 70)}
    images = [make(picture(*sizes.get(number, (32, 48)), number), file) for number, make in enumerate(KINDS.values())]
    alone = [predictor(image) for image in images]
    for many in (predictor(images), predictor(image for image in images)):
        for result, single in zip(many, alone, strict=True):
            assert np.array_equal(result.id_map, single.id_map) and result.segments == single.segments


def test_columns_of_paths(predictor, file, expected):
    for column in (np.array([str(file)] * 2), np.array([file, picture()[..., 0]], object)):
        for results in (predictor(column), list(predictor.stream(column))):
            assert len(results) == 2 and np.array_equal(results[0].id_map, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(predictor, expected):
    for tensor in (chw_of(picture()).cuda(), float_of(picture()).cuda()):
        for many in ([tensor], iter([tensor]), tensor[None]):
            assert np.array_equal(predictor(many)[0].id_map, expected)


def test_names(predictor, file, tmp_path):
    opened = Image.open(file)
    images = [file, SomePath(file), opened, opened.copy(), picture(), chw_of(picture())]
    names = ["a.png", "a.png", "a.png", "image 3", "image 4", "image 5"]
    assert [result.image_name for result in predictor(images)] == names
    assert [result.image_name for result in predictor(iter(images))] == names
    with open(file, "rb") as stream:
        assert predictor(Image.open(stream)).image_name == "image 0"


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation_is_that_of_the_file(predictor, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture(24, 40)).save(path, exif=exif)
    with Image.open(path) as image:
        of_file, of_image = predictor.outcomes([path, image])
    assert np.array_equal(of_image.pixels, of_file.pixels)
    assert of_image.pixels.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))


@pytest.mark.parametrize(
    "mode", ["RGB of 16 bits", "gray of 16 bits", "1", "L", "LA", "P", "P with transparency", "RGBA"]
)
def test_modes_of_pil_are_those_of_the_file(predictor, tmp_path, mode, recwarn):
    path = tmp_path / "a.png"
    if mode.endswith("16 bits"):
        deep = np.random.default_rng(0).integers(0, 65536, (32, 48, 3), dtype=np.uint16)
        cv2.imwrite(str(path), deep if mode.startswith("RGB") else deep[..., 0])
    else:
        image, options = Image.fromarray(picture()), {}
        if mode.endswith("transparency"):
            options = {"transparency": bytes(range(256))}
        image.convert(mode.split()[0]).save(path, **options)
    with Image.open(path) as image:
        of_file, of_image = predictor.outcomes([path, image])
    assert np.array_equal(of_image.pixels, of_file.pixels) and not recwarn


def test_damaged_exif_is_ignored(predictor):
    image = Image.fromarray(rgb_of(picture()))
    image.info["exif"] = b"Exif\0\0nothing"
    assert predictor(image).id_map.shape == (32, 48)


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "La", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16L"])
def test_other_modes_of_pil(predictor, mode):
    outcome = next(predictor.outcomes([Image.new(mode, (48, 32))]))
    assert outcome.error is None and outcome.pixels.shape == (32, 48, 3)


def test_an_iterator_may_reuse_its_memory(predictor, tmp_path):
    """Frames of one PIL file, closed files, and tensors that change in place."""
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    expected = [predictor(frame).id_map for frame in frames]

    def seeks():
        with Image.open(tmp_path / "a.tif") as image:
            for number in range(3):
                image.seek(number)
                yield image

    def closes():
        for number, frame in enumerate(frames):
            frame.save(tmp_path / f"{number}.png")
            with Image.open(tmp_path / f"{number}.png") as image:
                yield image

    def overwrites(buffer, values):
        for value in values:
            buffer[...] = value
            yield buffer

    tensors = [torch.from_numpy(np.asarray(frame).copy()).permute(2, 0, 1) for frame in frames]
    arrays = [np.asarray(frame) for frame in frames]
    for images, order in (
        (seeks(), None),
        (closes(), None),
        (overwrites(torch.empty(3, 32, 48), [tensor / 255 for tensor in tensors]), None),
        (overwrites(np.empty((32, 48, 3), np.uint8), arrays), "rgb"),
        (overwrites(np.empty((32, 48, 3), np.uint8), [array[..., ::-1] for array in arrays]), None),
    ):
        for result, id_map in zip(predictor.stream(images, channel_order=order), expected, strict=True):
            assert np.array_equal(result.id_map, id_map)


class ImageioArray(np.ndarray):
    """The class of arrays that imageio's first interface returns."""


ImageioArray.__module__ = "imageio.core.util"

SUSPICIOUS = {
    "reversed": (lambda: picture()[..., ::-1], "a reversed view"),
    "reversed crop": (lambda: picture(40, 60)[:32, :48, ::-1], "a reversed view"),
    "of PIL": (lambda: np.asarray(Image.fromarray(picture())), "made it of a PIL image"),
    "RGBA of PIL": (lambda: np.asarray(Image.fromarray(picture()).convert("RGBA")), "made it of a PIL image"),
    "crop of PIL": (lambda: np.asarray(Image.fromarray(picture(40, 60)))[:32, :48], "made it of a PIL image"),
    "imageio": (lambda: picture().view(ImageioArray), "imageio read it"),
    "crop of imageio": (lambda: np.asarray(picture().view(ImageioArray)[:20]), "imageio read it"),
}

UNSUSPICIOUS = {
    "plain": picture,
    "frame of a pipe": lambda: np.frombuffer(picture().tobytes(), np.uint8).reshape(32, 48, 3),
    "reversed array of PIL": lambda: np.asarray(Image.fromarray(rgb_of(picture())))[..., ::-1],
    "reversed array of imageio": lambda: picture().view(ImageioArray)[..., ::-1],
    "gray of PIL": lambda: np.asarray(Image.fromarray(picture()).convert("L")),
    "mirrored": lambda: picture()[::-1, ::-1],
    "read-only": lambda: np.broadcast_to(picture(), (32, 48, 3)),
    "planes": lambda: np.ascontiguousarray(picture().transpose(2, 0, 1)).transpose(1, 2, 0),
}


def test_the_order_is_documented_first():
    """`help(Predictor)` says it directly after what a Predictor is."""
    paragraphs = inspect.getdoc(spatialflow.Predictor).split("\n\n")
    assert "NumPy arrays are read as BGR" in paragraphs[1] and 'channel_order="rgb"' in paragraphs[1]


@pytest.mark.parametrize("kind", SUSPICIOUS)
def test_arrays_that_are_probably_rgb(predictor, kind):
    make, sign = SUSPICIOUS[kind]
    image = make()
    rule = f"image 0: this array is probably RGB, because .*{sign}.*, but arrays are read as BGR. Pass channel_order="
    calls = (
        lambda: predictor(image),
        lambda: list(predictor.stream([image, image])),
        lambda: list(predictor.outcomes(iter([image, image]))),
    )
    for call in calls:
        with pytest.warns(ChannelOrderWarning, match=rule) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]  # one warning, at the caller's line
    for order in ("bgr", "rgb"):
        predictor(image, channel_order=order)


@pytest.mark.parametrize("kind", UNSUSPICIOUS)
def test_arrays_without_a_sign_of_rgb(predictor, kind):
    predictor(UNSUSPICIOUS[kind]())


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((4, 5, 3), np.float32), r"array, got float32 with values 0 .. 0; use \(array \* 255\).round\(\)"),
        (np.full((4, 5, 3), 7.5), r"array, got float64 with values 7.5 .. 7.5; use array.round\(\)"),
        (np.full((4, 5, 3), 300.0), r"got float64 with values 300 .. 300; scale them to 0..255"),
        (np.full((4, 5), np.nan), "got float64 with values that are not finite"),
        (np.zeros((4, 5, 3), np.int64), r"got int64 with values 0 .. 0; use array.round\(\).astype\(numpy.uint8\)"),
        (np.zeros((4, 5, 3), np.uint16), r"got uint16; for values of 16 bits, use \(array >> 8\)"),
        (np.zeros((4, 5), bool), r"got bool; use array.astype\(numpy.uint8\) \* 255"),
        (np.zeros((4, 5), object), "must be a uint8 array, got object$"),
        (np.zeros((6, 5, 2), np.uint8), r"must be an \(H, W, 3\), .* array, got shape \(6, 5, 2\)$"),
        (np.zeros((3, 4, 5), np.uint8), r"got shape \(3, 4, 5\); its channels are first: array.transpose\(1, 2, 0\)"),
        (np.zeros(5, np.uint8), r"got shape \(5,\)$"),
        (np.zeros((1, 4, 5, 3), np.uint8), "it is a batch: pass it alone, or chain batches by itertools"),
        (np.zeros((0, 5, 3), np.uint8), r"has no pixels, got shape \(0, 5, 3\)"),
        (torch.zeros(6, 5, 3), r"must be a \(3, H, W\), .*, got shape \(6, 5, 3\); .* last: tensor.permute\(2, 0, 1\)"),
        (torch.zeros(2, 4, 5), r"got shape \(2, 4, 5\)$"),
        (torch.zeros(1, 3, 4, 5), "it is a batch: pass it alone, or chain batches by itertools"),
        (torch.zeros(()), r"got shape \(\)$"),
        (torch.zeros(3, 0, 5), "has no pixels"),
        (torch.zeros(3, 4, 5, dtype=torch.int32), "must be a uint8 tensor, or a floating-point one .* got torch.int32"),
        (torch.zeros(3, 4, 5, dtype=torch.bool), "got torch.bool"),
        (torch.full((3, 4, 5), 255.0), r"values in 0..1, got 255 .. 255; use tensor / 255, or a uint8 tensor"),
        (torch.full((3, 4, 5), -1.5), r"values in 0..1, got -1.5 .. -1.5; pass the image before its normalization"),
        (torch.full((3, 4, 5), 1e5), "got 100000 .. 100000; pass the image before"),
        (torch.tensor([0.0, float("nan")]).expand(3, 4, 2), "values in 0..1, got NaN"),
        (torch.zeros(3, 4, 5, device="meta"), "must be a dense tensor with values, got torch.strided on meta"),
        (torch.zeros(3, 4, 5).to_sparse(), "must be a dense tensor"),
        (Image.new("F", (5, 4)), "must have 8 or 16 bits per channel, got Pillow's mode 'F'; scale the values"),
        (Image.new("I", (5, 4)), "got Pillow's mode 'I'"),
        (Image.new("RGB", (0, 4)), r"has no pixels, got size \(0, 4\)"),
        ([1, 2], "must be a path, a PIL image, an array or a tensor, got list"),
        (b"content", "must be a path, a PIL image, an array or a tensor, got bytes"),
    ],
)
def test_wrong_images(predictor, image, words):
    """The error names the image, the rule, the value and, for common mistakes, the remedy."""
    for images in ([image], iter([image])):
        (outcome,) = predictor.outcomes(images)
        assert outcome.result is None
        with pytest.raises(spatialflow.ImageError, match=f"^image 0: .*{words}"):
            raise outcome.error
    if is_one_image(image):
        with pytest.raises(spatialflow.ImageError, match=words):
            predictor(image)


def test_a_truncated_pil_image(predictor, tmp_path):
    stream = io.BytesIO()
    Image.fromarray(picture(100, 100)).save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:2000])
    with pytest.raises(spatialflow.ImageError, match=r"^cut.jpg: is truncated or damaged: image file is truncated"):
        predictor(Image.open(tmp_path / "cut.jpg"))


def test_another_thread_may_be_importing_pillow(predictor, file, expected, monkeypatch):
    """The module is in `sys.modules` then, without its names."""
    monkeypatch.setitem(sys.modules, "PIL.Image", types.ModuleType("PIL.Image"))
    assert np.array_equal(predictor([file])[0].id_map, expected)


def test_a_folder_is_no_image(predictor, tmp_path):
    with pytest.raises(spatialflow.ImageError, match=r"Is a directory; give its files, such as sorted\(Path\('.*glob"):
        predictor(tmp_path)


def test_what_is_no_iterable_of_images(predictor):
    for images, words in (
        (Image.new("RGB", (5, 4)), "got one PIL image; call the Predictor"),
        (torch.zeros(3, 4, 5), r"got one tensor of shape \(3, 4, 5\); call the Predictor"),
        (SomePath("a.png"), "got one path"),
    ):
        with pytest.raises(TypeError, match=f"images: must be an iterable of images, {words}"):
            next(predictor.stream(images))
    for images, words in (
        (b"content", r"got bytes; decode them: PIL.Image.open\(io.BytesIO\(data\)\)"),
        ({"a": picture()}, r"got a dict; pass its values\(\)"),
    ):
        with pytest.raises(TypeError, match=f"images: must be an iterable of images, {words}"):
            predictor(images)
    for call in (predictor, predictor.stream, predictor.outcomes):
        with pytest.raises(ValueError, match="channel_order: must be 'bgr' or 'rgb', got 'gbr'"):
            list(call([picture()], channel_order="gbr"))


def test_a_long_stream_holds_few_images(predictor, monkeypatch):
    """Of 2,000 images of a generator, a few are alive at a time. The network is replaced by the result of one image."""
    makers = (picture, lambda: Image.fromarray(picture()), lambda: chw_of(picture()), lambda: float_of(picture()))
    pipeline, references, most, count = predictor.pipeline, [], 0, 0
    result = pipeline([torch.from_numpy(picture())], pipeline.plan([pipeline.geometries((32, 48))]))
    monkeypatch.setattr(type(pipeline), "__call__", lambda *_: result)

    def images():
        for number in range(2000):
            image = makers[number % len(makers)]()
            references.append(weakref.ref(image))
            yield image

    gc.disable()
    try:
        for outcome in predictor.outcomes(images()):
            assert outcome.error is None
            count += 1
            references[:] = [reference for reference in references if reference() is not None]
            most = max(most, len(references))
    finally:
        gc.enable()
    assert count == 2000 and most <= 4
