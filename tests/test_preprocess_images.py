# SPDX-License-Identifier: Apache-2.0
"""preprocess_images: `OpMatrix`, and bitwise equality with OpenCV's steps of resizing, normalizing and padding."""

import cv2
import numpy as np
import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample

from spatialflow import ops
from spatialflow.data.transforms import normalize, pad, resize_image
from spatialflow.ops import reference

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)


def sample(shapes: list[tuple[int, int]], sizes: list[tuple[int, int]]):
    def tensors(extra: int = 0) -> list:
        return [[picture(h + extra, w + 2 * extra) for h, w in shapes]]

    def build() -> OpSample:
        return OpSample(
            op=ops.preprocess_images,
            reference=reference.preprocess_images,
            tensors=tensors(),
            options={"sizes": sizes, "mean": MEAN, "std": STD, "divisor": 8},
            differentiable=(),
            converted=(),
            images=(),
            raw=lambda images, sizes, mean, std, divisor: (
                torch.ops.spatialflow.preprocess_images,
                (images, [h for h, _ in sizes], [w for _, w in sizes], mean, std, divisor, torch.float32),
            ),
            resized=tensors,
            unpredicted_errors="no tensor arguments",  # torch's error message for an empty list
        )

    return build


class TestPreprocessImages(OpMatrix):
    has_gradient = False
    samples = {
        "larger": sample([(13, 17)], [(29, 33)]),
        "smaller, two images": sample([(40, 31), (20, 50)], [(17, 24), (9, 23)]),
    }
    thin_samples = {
        "one row": sample([(1, 17)], [(3, 33)]),
        "one column": sample([(13, 1)], [(20, 2)]),
        "one pixel": sample([(1, 1)], [(1, 1)]),
    }
    dtypes = (torch.float32,)  # of the result; test_dtypes tests the other dtypes

    def test_layouts(self, make_sample):
        sample = make_sample()
        expected = sample.op(*sample.tensors, **sample.options)
        assert expected.is_contiguous(memory_format=torch.channels_last)
        planes = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) for image in sample.tensors[0]]
        window = [torch.cat([image, image], 1)[:, : image.shape[1]] for image in sample.tensors[0]]
        flipped = [image.flip(2)[..., [2, 1, 0]] for image in sample.tensors[0]]
        for images in (planes, window, flipped):
            assert torch.equal(sample.op(images, **sample.options), expected)


def opencv_chain(image: torch.Tensor, size: tuple[int, int], divisor: int) -> np.ndarray:
    return pad(normalize(resize_image(image.cpu().numpy(), size), MEAN, STD), divisor)


def test_equal_to_opencv_for_any_size():
    rng = np.random.default_rng(0)
    cases = [(tuple(rng.integers(1, 60, 2)), tuple(rng.integers(1, 60, 2))) for _ in range(60)]
    cases += [((2 * h, 2 * w), (h, w)) for h, w in ((1, 1), (7, 5), (16, 16))]  # averaged over 2 x 2
    cases += [((20, 14), (10, 9)), ((20, 14), (11, 7)), ((20, 14), (40, 28)), ((9, 9), (9, 9)), ((9, 5), (9, 30))]
    cases += [((1, 1), (8, 8)), ((1, 30), (12, 7)), ((30, 1), (7, 12)), ((2, 2), (33, 1)), ((90, 3), (1, 70))]
    for shape, size in cases:
        image, size = picture(*map(int, shape)), tuple(map(int, size))
        actual = ops.preprocess_images(image, size, MEAN, STD, divisor=4)[0].cpu().numpy()
        expected = opencv_chain(image, size, 4)
        np.testing.assert_array_equal(actual, expected, err_msg=f"{shape} to {size}")


@pytest.mark.parametrize("size", [(200, 267), (63, 84), (75, 100)])
def test_equal_to_opencv_for_photographs(size):
    """Smooth images, where differences of rounding would show, at usual scale factors."""
    image = torch.as_tensor(cv2.resize(picture(12, 16).cpu().numpy(), (200, 150), interpolation=cv2.INTER_CUBIC))
    actual = ops.preprocess_images(image, size, MEAN, STD)[0].cpu().numpy()
    np.testing.assert_array_equal(actual, opencv_chain(image, size, 32))


def test_a_list_is_its_images_padded_to_one_size():
    """More images than one kernel launch takes, all of different sizes."""
    images = [picture(5 + n, 40 - n) for n in range(19)]
    sizes = [(3 + 2 * n, 50 - n) for n in range(19)]
    batch = ops.preprocess_images(images, sizes, MEAN, STD, divisor=16)
    assert batch.shape == (19, 3, 48, 64)
    for image, (h, w), result in zip(images, sizes, batch, strict=False):
        single = ops.preprocess_images(image, (h, w), MEAN, STD, divisor=1)[0]
        assert single.shape == (3, h, w) and torch.equal(result[:, :h, :w], single)
        assert not result[:, h:].any() and not result[:, :, w:].any()


@pytest.mark.parametrize("divisor", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype, divisor):
    """A 16-bit result is the float32 result, rounded once, also for rows that do not fill whole vectors."""
    image = picture(30, 41)
    expected = ops.preprocess_images(image, (37, 53), MEAN, STD, divisor)
    assert torch.equal(ops.preprocess_images(image, (37, 53), MEAN, STD, divisor, dtype), expected.to(dtype))


def test_channels_swap_places():
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).expand(4, 4, 3)
    result = ops.preprocess_images(image, (4, 4), (0.0, 1.0, 2.0), (1.0, 2.0, 4.0), divisor=1)
    assert result[0, :, 0, 0].tolist() == [30.0, 9.5, 2.0]


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    image, before = picture(64, 90), torch.get_num_threads()
    expected = reference.preprocess_images(image, (200, 301), MEAN, STD)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.preprocess_images(image, (200, 301), MEAN, STD), expected)
    finally:
        torch.set_num_threads(before)


IMAGE = torch.zeros(4, 5, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images must hold at least one image"),
        ({"images": [IMAGE[..., 0]]}, r"images\[0\] must be \(H, W, 3\) .* got shape \(4, 5\)"),
        ({"images": [IMAGE[:0]]}, r"images\[0\] must be .* with at least one pixel, got shape \(0, 5, 3\)"),
        ({"images": [IMAGE.float()]}, "images must be uint8, got float32"),
        ({"images": [IMAGE, IMAGE]}, r"sizes must hold one \(H, W\) for each of 2 images, got 1"),
        ({"sizes": [(0, 3)]}, r"sizes\[0\] must be from 1 to 16777216, got \(0, 3\)"),
        ({"sizes": [(3, 2**40)]}, r"sizes\[0\] must be from 1 to 16777216"),
        ({"mean": (1.0, 2.0)}, "mean must hold 3 numbers, got 2"),
        ({"mean": (1.0, float("nan"), 2.0)}, "mean must be finite, got nan"),
        ({"std": (1.0, 0.0, 2.0)}, "std must be positive and finite, got 0"),
        ({"divisor": 0}, "divisor must be from 1 to 16777216, got 0"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
    ],
)
def test_errors_name_argument_rule_and_value(change, message):
    arguments = {"images": [IMAGE], "sizes": [(6, 6)], "mean": MEAN, "std": STD} | change
    with pytest.raises(RuntimeError, match="preprocess_images: " + message):
        ops.preprocess_images(**arguments)
